"""An error in one line, for logs and records that others read.

Knows nothing of who raised it.
"""

from engine.redaction import redacted

MAX_CHARACTERS = 500


def error_line(error: BaseException) -> str:
    """What an error says in one line, without secrets."""
    words = " ".join(redacted(str(error)).split())
    kind = type(error).__name__
    return f"{kind}: {words}"[:MAX_CHARACTERS] if words else kind

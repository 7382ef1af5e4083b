"""An error in one line, for logs and records that others read.

Knows nothing of who raised it.
"""

from engine.redaction import public_uri

MAX_CHARACTERS = 500


def error_line(error: BaseException) -> str:
    """What an error says in one line, without what its URIs hold of users, passwords, tokens."""
    text = str(error).strip()
    first = text.splitlines()[0] if text else ""
    words = " ".join(public_uri(word) for word in first.split(" "))
    kind = type(error).__name__
    return f"{kind}: {words}"[:MAX_CHARACTERS] if words else kind

"""Values within the texts of errors, cut where they are long.

Knows nothing of what is wrong with them.
"""

MAX_CHARACTERS = 80


def shown(value: object) -> str:
    """A value as Python writes it, of 80 characters and three dots at most."""
    text = repr(value[: MAX_CHARACTERS + 1] if isinstance(value, str | bytes | tuple) else value)
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}..."

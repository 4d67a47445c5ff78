"""Shortens other libraries' errors to their first line, for our own messages."""


def first_line(error: Exception) -> str:
    """What an error says, as part of a sentence."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")

"""What other libraries' errors say, for sentences of our own."""


def first_line(error: Exception) -> str:
    """What an error says, as part of a sentence."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")

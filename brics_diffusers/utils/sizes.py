"""Sizes of images: one number for squares, or a pair."""

from collections.abc import Sequence


def height_and_width(size: int | Sequence[int], name: str = "size") -> tuple[int, int]:
    """
    Height and width in pixels, of a pair or of the side of a square; a `ValueError`, which calls them `name`, if they
    are no positive whole numbers.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, (list, tuple)) else ()
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"{name} is {size}; give a positive number of pixels, or height and width as a pair.")
    return sides


def size_text(size: int | Sequence[int]) -> str:
    """Such as `64 x 48`, height first."""
    return "{} x {}".format(*height_and_width(size))

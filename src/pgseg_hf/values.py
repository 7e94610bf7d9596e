"""Numbers and lists by what they are, not by the library that they come from."""

import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from typing import Any, TypeGuard

import numpy as np
from PIL import ImageColor


def is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    """Whether a value is several in an order: a list, tuple, NumPy array, pandas Series, column of `datasets` ..."""
    one = isinstance(value, (str, bytes, bytearray, memoryview, Mapping, Set, Iterator))
    return isinstance(value, Iterable) and not one and getattr(value, "ndim", 1) > 0


def are_images(value: Any) -> TypeGuard[Sequence[Any]]:
    """Whether a value is several images and not one; arrays and tensors of numbers are one."""
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "OU" and value.ndim > 0
    return is_list(value) and not hasattr(value, "numpy")  # a tensor


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number: `int`, NumPy's or a tensor of one; `True` is none."""
    if _is_truth(value):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def whole_number(value: Any, name: str, least: int = 1) -> int:
    """A whole number as Python's own.

    Raises:
        ValueError: another value, or one below `least`.
    """
    if not is_whole(value) or operator.index(value) < least:
        raise ValueError(f"{name} is {value!r}, expected a whole number of at least {least}.")
    return operator.index(value)


def share(value: Any, name: str, others: str = "") -> float:
    """A number from 0 to 1 as Python's own: `float`, `int`, NumPy's or a tensor of one; neither `True` nor text.

    Args:
        value: to look at.
        name, others: for messages, what it is and what else it may be.

    Raises:
        ValueError: another value.
    """
    is_text = isinstance(value, (str, bytes, bytearray))
    try:
        found = math.nan if is_text or _is_truth(value) else float(value)
    except (TypeError, ValueError, RuntimeError):
        found = math.nan
    if not 0 <= found <= 1:
        raise ValueError(f"{name} is {value!r}, expected {others}a number from 0 to 1.")
    return found


def hex_colour(value: Any, name: str, others: str = "") -> str:
    """A colour as `"#rrggbb"`, from one that is written as in CSS: `"#f00"`, `"#ff0000"`, `"red"`.

    Raises:
        ValueError: another value, or a colour that light shines through.
    """
    rgb: tuple[int, ...] = ()
    with suppress(ValueError, AttributeError, TypeError):
        rgb = ImageColor.getrgb(value)
    if len(rgb) != 3 or max(rgb) > 255:
        raise ValueError(f"{name} is {value!r}, expected {others}a colour such as '#ff0000' or 'red'.")
    return f"#{bytes(rgb).hex()}"


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))

"""Checks for numbers, lists and colours that work for Python, NumPy, torch and pandas values alike."""

import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from typing import Any, TypeGuard

import numpy as np
from PIL import ImageColor


def is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    """Whether a value is an ordered collection: a list, tuple, NumPy array, pandas Series, `datasets` column etc."""
    one = isinstance(value, (str, bytes, bytearray, memoryview, Mapping, Set, Iterator))
    return isinstance(value, Iterable) and not one and getattr(value, "ndim", 1) > 0


def are_images(value: Any) -> TypeGuard[Sequence[Any]]:
    """Whether a value is a collection of images. A numeric array or tensor is a single image."""
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "OU" and value.ndim > 0
    return is_list(value) and not hasattr(value, "numpy")  # a tensor


def is_whole(value: Any) -> bool:
    """Whether a value is an integer of Python, NumPy or a tensor with one element; booleans are not."""
    if _is_truth(value):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def whole_number(value: Any, name: str, least: int = 1) -> int:
    """Converts an integer value to `int`.

    Raises:
        ValueError: the value is not an integer or is below `least`.
    """
    if not is_whole(value) or operator.index(value) < least:
        raise ValueError(f"{name} is {value!r}, expected a whole number of at least {least}.")
    return operator.index(value)


def share(value: Any, name: str, others: str = "") -> float:
    """Converts a number from 0 to 1, of Python, NumPy or a tensor with one element, to `float`.

    Args:
        value: the value to convert; booleans and strings are refused.
        name, others: for error messages, the name of the value and other values that are allowed.

    Raises:
        ValueError: the value is not a number from 0 to 1.
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
    """Converts a CSS colour, `"#f00"`, `"#ff0000"` or `"red"`, to `"#rrggbb"`.

    Raises:
        ValueError: the value is not a colour, or is not opaque.
    """
    rgb: tuple[int, ...] = ()
    with suppress(ValueError, AttributeError, TypeError):
        rgb = ImageColor.getrgb(value)
    if len(rgb) != 3 or max(rgb) > 255:
        raise ValueError(f"{name} is {value!r}, expected {others}a colour such as '#ff0000' or 'red'.")
    return f"#{bytes(rgb).hex()}"


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))

"""Numbers and lists by what they are, not by the library that they come from."""

import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any


def is_list(value: Any) -> bool:
    """Whether a value is several in an order: a list, tuple, NumPy array, pandas Series, column of `datasets` ..."""
    one = isinstance(value, (str, bytes, bytearray, memoryview, Mapping, Set, Iterator))
    return isinstance(value, Iterable) and not one and getattr(value, "ndim", 1) > 0


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number: `int`, NumPy's or a tensor of one; `True` is none."""
    if _is_truth(value):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def is_number(value: Any) -> bool:
    """Whether a value is a finite number: `int`, `float`, NumPy's or a tensor of one; `True` is none, nor is text."""
    if _is_truth(value) or isinstance(value, (str, bytes, bytearray)):
        return False
    try:
        return math.isfinite(value)
    except (TypeError, ValueError, OverflowError):
        return False


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))

"""Pickles of arrays, read without running anything that they name.

A pickle is a program: it names functions and calls them. Of the files that data sets come in, only NumPy's way to
store an array is of use, so that nothing else is let through, and not even NumPy's own functions are called: plain
objects stand in for them and keep what was stored, which is checked before an array is made of it.
"""

from __future__ import annotations

import math
import os
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from diffusers_concept_maps.errors import ConceptMapsError

_ELEMENT = re.compile(r"[biufSU]\d+")
_DAMAGED = (AttributeError, EOFError, LookupError, OverflowError, RecursionError, TypeError, ValueError)


class _Refused(Exception):
    """What a pickle holds and must not."""


class StoredArray:
    """An array as a pickle holds it; `array` is what it stands for.

    Attributes:
        array: the array, not writable; None until the pickle has told its contents.
    """

    __slots__ = ("array",)

    def __init__(self, array: np.ndarray | None = None) -> None:
        self.array = array

    def __setstate__(self, state: tuple[int, tuple[int, ...], _Element, bool, bytes]) -> None:
        _, shape, element, is_fortran, raw = state
        self.array = _array(raw, element, shape, "F" if is_fortran else "C")


class _Element:
    """The element type of an array: numbers, truth values, or strings of a fixed length."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *_: bool) -> None:
        if not (isinstance(code, str) and _ELEMENT.fullmatch(code)):
            raise _Refused(f"arrays of {code!r}; expected numbers, truth values or strings of a fixed length")
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, order, subarray, names, fields, *_ = state
        if order not in ("<", ">", "|", "=") or (subarray, names, fields) != (None, None, None):
            raise _Refused("arrays of records; expected numbers, truth values or strings of a fixed length")
        self.order = order

    @property
    def dtype(self) -> np.dtype[Any]:
        """As NumPy has it."""
        return np.dtype(self.order + self.code)


class _Global:
    """A function that a pickle may call, as an object that it cannot change."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise _Refused(f"a new state for a function, {state!r}; expected arrays, strings and containers")


def _array(raw: Any, element: Any, shape: Any, order: Any) -> np.ndarray:
    if not isinstance(raw, bytes | bytearray) or not isinstance(element, _Element):
        raise _Refused(f"an array whose contents are {type(raw).__name__}; expected the bytes of its elements")
    if math.prod(shape) * element.dtype.itemsize != len(raw):
        raise _Refused(f"an array of shape {shape} and type {element.dtype} in {len(raw)} bytes")
    return np.frombuffer(raw, element.dtype).reshape(shape, order=order)


def _reconstruct(*_: Any) -> StoredArray:
    return StoredArray()


def _frombuffer(raw: Any, element: Any, shape: Any, order: Any, *_: Any) -> StoredArray:
    return StoredArray(_array(raw, element, shape, order))


def _scalar(element: Any, raw: Any) -> Any:
    return _array(raw, element, (1,), "C")[0].item()


def _encode(text: Any, encoding: Any) -> bytes:
    """How old protocols write bytes."""
    if encoding != "latin1" or not isinstance(text, str):
        raise _Refused(f"the encoding {encoding!r}; expected latin1")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """How old protocols write bytes where there are none."""
    return b""


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): _Element,
    ("numpy", "ndarray"): _reconstruct,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
}
for _core in ("numpy.core", "numpy._core"):  # before and since NumPy 2
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = _reconstruct
    _ALLOWED[f"{_core}.multiarray", "scalar"] = _scalar
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = _frombuffer


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise _Refused(f"the global {module}.{name}; expected arrays, strings and containers, and nothing to run")
        return _Global(_ALLOWED[module, name])


def load_array_pickle(path: str | os.PathLike[str]) -> Any:
    """Read a pickle of arrays, numbers, strings, bytes and containers of them; anything else is refused.

    Args:
        path: the file.

    Returns:
        What it holds; every array as a `StoredArray`, for `stored_array`.

    Raises:
        ConceptMapsError: the file cannot be read, is damaged or no pickle, or names something that is not on the list,
            of which nothing has been imported or run.
    """
    try:
        with open(path, "rb") as file:
            return _ArrayUnpickler(file).load()
    except _Refused as error:
        raise ConceptMapsError(
            f"{os.fspath(path)!r} holds {error}. Nothing of it was run; fetch the file from its publisher"
        ) from error
    except OSError as error:
        raise ConceptMapsError(f"cannot read {os.fspath(path)!r}: {error}") from error
    except MemoryError as error:
        raise ConceptMapsError(f"{os.fspath(path)!r} is damaged, or larger than the memory of this machine") from error
    except (*_DAMAGED, pickle.UnpicklingError) as error:
        raise ConceptMapsError(f"{os.fspath(path)!r} is damaged or no pickle of arrays: {error!r}") from error


def stored_array(value: Any) -> np.ndarray | None:
    """The array that a value out of `load_array_pickle` is; None if it is none."""
    return value.array if isinstance(value, StoredArray) else None

"""Pickles of arrays come back as they were; one that would run something is refused, and nothing of it runs."""

from __future__ import annotations

import builtins
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusers_concept_maps.errors import ConceptMapsError
from diffusers_concept_maps.evaluation.array_pickle import StoredArray, load_array_pickle, stored_array

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
ARRAYS = [
    np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    np.arange(12, dtype=">i4").reshape(4, 3)[::2],
    np.array([[True, False], [False, True]]),
    np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), dtype=np.uint8),
    np.array([b"\xff\xd8one", b"\xff\xd8three"]),
    np.array(["a", "b\N{BULLET}c"]),
    np.zeros((0, 3, 2)),
    np.array(3.5),
]


def reload(data: Any, path: Path, protocol: int = 4) -> Any:
    path.write_bytes(pickle.dumps(data, protocol))
    return load_array_pickle(path)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_come_back(protocol: int, tmp_path: Path) -> None:
    found = reload(ARRAYS, tmp_path / "a.pkl", protocol)
    for value, expected in zip(found, ARRAYS, strict=True):
        array = stored_array(value)
        assert array is not None
        assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
        assert np.array_equal(array, expected)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_everything_else_that_is_plain_comes_back(protocol: int, tmp_path: Path) -> None:
    data = {"a": [1, 2.5, True, None], "b": (b"\x00\xff", "text"), "c": {}, "d": [[], ()]}
    assert reload(data, tmp_path / "a.pkl", protocol) == data
    scalars = [np.float32(1.5), np.int64(-3), np.bool_(True), np.bytes_(b"ab")]
    assert reload(scalars, tmp_path / "a.pkl", protocol) == [1.5, -3, True, b"ab"]


def test_the_names_of_numpy_before_and_since_2(tmp_path: Path) -> None:
    data = pickle.dumps(ARRAYS[0], 2)
    other = {b"numpy._core.multiarray": b"numpy.core.multiarray", b"numpy.core.multiarray": b"numpy._core.multiarray"}
    here = next(name for name in other if name in data)
    (tmp_path / "a.pkl").write_bytes(data.replace(here, other[here]))
    array = stored_array(load_array_pickle(tmp_path / "a.pkl"))
    assert array is not None
    assert np.array_equal(array, ARRAYS[0])


class Call:
    """Pickled as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def named(module: str, name: str, *tail: bytes) -> bytes:
    """A pickle of protocol 4 that looks a global up, and what to do with it."""
    text = b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name))
    return b"\x80\x04" + text + b"\x93" + b"".join(tail) + b"."


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "written_by_the_pickle"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nothing_is_run(protocol: int, tmp_path: Path, target: Path) -> None:
    """Each of these leaves a file when it is run, which plain unpickling proves."""
    code = f"open({str(target)!r}, 'w').close()"
    calls = [
        (Call(os.system, f"touch {target}"), "(posix|nt).system"),
        (Call(eval, code), f"({builtins.__name__}|__builtin__).eval"),
        (Call(exec, code), f"({builtins.__name__}|__builtin__).exec"),
        (Call(np.save, str(target) + ".npy", np.zeros(1)), r"numpy\.save"),
        (Call(np.ndarray.tofile, np.zeros(1), str(target)), "getattr|tofile"),
    ]
    for call, name in calls:
        path = tmp_path / "bad.pkl"
        path.write_bytes(pickle.dumps([np.zeros(2), call], protocol))
        with pytest.raises(ConceptMapsError, match=f"holds the global .*({name}).*; expected arrays"):
            load_array_pickle(path)
        assert [p.name for p in tmp_path.iterdir()] == ["bad.pkl"]
        pickle.loads(path.read_bytes())
        written = [p for p in tmp_path.iterdir() if p.name != "bad.pkl"]
        assert len(written) == 1
        written[0].unlink()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "getattr"),
        ("builtins", "__import__"),
        ("builtins", "dict.__class__"),
        ("numpy", "ndarray.tofile"),
        ("numpy", "dtype.__class__"),
        ("numpy", "load"),
        ("numpy", "fromfile"),
        ("numpy", "matrix"),
        ("numpy.core.multiarray", "fromfile"),
        ("numpy._core.multiarray", "_reconstruct.__globals__"),
        ("numpy.core", "multiarray._reconstruct"),
        ("numpy.f2py", "run_main"),
        ("_codecs", "decode"),
        ("codecs", "encode"),
        ("copyreg", "_reconstructor"),
        ("collections", "OrderedDict"),
        ("functools", "partial"),
        ("operator", "attrgetter"),
        ("diffusers_concept_maps.evaluation.array_pickle", "load_array_pickle"),
        ("a module that is not there", "x"),
    ],
)
def test_a_name_that_is_not_on_the_list_is_refused(module: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "bad.pkl").write_bytes(named(module, name))
    with pytest.raises(ConceptMapsError) as caught:
        load_array_pickle(tmp_path / "bad.pkl")
    assert str(caught.value) == (
        f"{str(tmp_path / 'bad.pkl')!r} holds the global {module}.{name}; expected arrays, strings and containers, "
        f"and nothing to run. Nothing of it was run; fetch the file from its publisher"
    )


def test_a_module_that_is_named_is_not_imported(tmp_path: Path) -> None:
    assert "antigravity" not in sys.modules
    (tmp_path / "bad.pkl").write_bytes(named("antigravity", "geohash"))
    with pytest.raises(ConceptMapsError, match=r"holds the global antigravity\.geohash"):
        load_array_pickle(tmp_path / "bad.pkl")
    assert "antigravity" not in sys.modules


class Record:
    """Pickled by state, as an array of objects or of records would be."""


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_of_objects_and_records_are_refused(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "bad.pkl"
    with pytest.raises(ConceptMapsError, match=r"holds arrays of 'O8?'; expected numbers, truth values or strings"):
        reload(np.array([1, "a"], dtype=object), path, protocol)
    with pytest.raises(ConceptMapsError, match=r"holds arrays of 'V12'; expected numbers"):
        reload(np.zeros(2, dtype=[("a", "f8"), ("b", "i4")]), path, protocol)
    with pytest.raises(ConceptMapsError, match=r"holds arrays of 'M8'; expected numbers"):
        reload(np.zeros(2, dtype="M8[s]"), path, protocol)
    with pytest.raises(ConceptMapsError, match=r"holds the global .*(Record|_reconstructor)"):
        reload(Record(), path, protocol)


EMPTY = b"cnumpy.core.multiarray\n_reconstruct\n)R"
FLOAT = b"cnumpy\ndtype\n(U\x02f4\x89\x88tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"cnumpy\ndtype\n}X\x01\x00\x00\x00ai\x01sb", "is damaged or no pickle of arrays"),
        (b"cnumpy\ndtype\n}b", r"holds a new state for a function, \{\}; expected arrays"),
        (b"cnumpy\ndtype\n(N}tb", "holds a new state for a function"),
        (b"cnumpy\ndtype\nN" + 20_000 * b"\x85" + b"b", "is damaged or no pickle of arrays: RecursionError"),
        (
            b"cnumpy\ndtype\n(U\x02f4tR(K\x03U\x01<(NK\x02tNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",
            "arrays of records",
        ),
        (b"cnumpy\ndtype\n(U\x02f4tR(K\x03U\x01oNNNK\x00K\x00K\x00tb", "arrays of records"),
        (b"cnumpy\ndtype\n(K\x04tR", "holds arrays of 4; expected numbers"),
        (b"cnumpy\ndtype\n(U\x05f4,O8tR", "holds arrays of 'f4,O8'; expected numbers"),
        (
            EMPTY + b"(K\x01(K\x02t" + FLOAT + b"\x89](K\x01K\x02etb",
            "an array whose contents are list; exp",
        ),
        (EMPTY + b"(K\x01(K\x02tU\x02f4\x89C\x04abcdtb", "an array whose contents are bytes; expected the bytes"),
        (
            EMPTY + b"(K\x01(K\x02t" + FLOAT + b"\x89C\x04abcdtb",
            r"array of shape \(2,\) and type float32 in 4 bytes",
        ),
        (EMPTY + b"(K\x01(J\xff\xff\xff\xffJ\xff\xff\xff\xfft" + FLOAT + b"\x89C\x04abcdtb", "is damaged"),
        (EMPTY + b"}b", "is damaged or no pickle of arrays"),
        (b"cnumpy\nndarray\n)\x81", "is damaged or no pickle of arrays"),
        (b"c_codecs\nencode\n(U\x01aU\x05rot13tR", "holds the encoding 'rot13'; expected latin1"),
        (b"c_codecs\nencode\n(K\x01U\x06latin1tR", "holds the encoding 'latin1'; expected latin1"),
        (b"]}b", "is damaged or no pickle of arrays"),
        (b"\x82\x01", "is damaged or no pickle of arrays"),
        (b"Pa\n", "is damaged or no pickle of arrays"),
        (b"]", "is damaged or no pickle of arrays"),
    ],
)
def test_programs_by_hand_are_refused(program: bytes, message: str, tmp_path: Path) -> None:
    stop = b"" if program == b"]" else b"."
    (tmp_path / "bad.pkl").write_bytes(b"\x80\x03" + program + stop)
    with pytest.raises(ConceptMapsError, match=message):
        load_array_pickle(tmp_path / "bad.pkl")


def test_the_list_is_as_it_was_after_a_pickle_that_tries_to_change_it(tmp_path: Path) -> None:
    """A second array of the same process is read right, and an array that was never filled is none."""
    for program in (b"cnumpy\ndtype\n(N}U\x08__call__K\x01stb.", b"cnumpy\nndarray\n(N}U\x05_callK\x01stb."):
        (tmp_path / "bad.pkl").write_bytes(b"\x80\x02" + program)
        with pytest.raises(ConceptMapsError, match="new state for a function"):
            load_array_pickle(tmp_path / "bad.pkl")
    array = stored_array(reload(ARRAYS[0], tmp_path / "a.pkl"))
    assert array is not None
    assert np.array_equal(array, ARRAYS[0])
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02" + EMPTY + b".")
    assert stored_array(load_array_pickle(tmp_path / "a.pkl")) is None
    assert stored_array(np.zeros(2)) is None
    assert stored_array(StoredArray(ARRAYS[0])) is ARRAYS[0]


@pytest.mark.parametrize("length", [0, 1, 40, -1])
def test_a_damaged_file_is_named(length: int, tmp_path: Path) -> None:
    (tmp_path / "cut.pkl").write_bytes(pickle.dumps(ARRAYS[0])[:length])
    with pytest.raises(ConceptMapsError, match=r"cut.pkl' is damaged or no pickle of arrays"):
        load_array_pickle(tmp_path / "cut.pkl")


@pytest.mark.parametrize("opcode", [b"\x8e", b"\x96", b"\x95"])
def test_a_length_beyond_all_memory_is_an_error(opcode: bytes, tmp_path: Path) -> None:
    (tmp_path / "big.pkl").write_bytes(b"\x80\x05" + opcode + (1 << 46).to_bytes(8, "little") + b"few.")
    with pytest.raises(ConceptMapsError, match=r"big.pkl' is damaged"):
        load_array_pickle(tmp_path / "big.pkl")


def test_what_does_not_fit_into_memory_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> object:
        raise MemoryError

    monkeypatch.setattr(np, "frombuffer", fail)
    with pytest.raises(ConceptMapsError, match=r"a.pkl' is damaged, or larger than the memory of this machine"):
        reload(ARRAYS[0], tmp_path / "a.pkl")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConceptMapsError, match=r"cannot read '.*none.pkl': "):
        load_array_pickle(tmp_path / "none.pkl")

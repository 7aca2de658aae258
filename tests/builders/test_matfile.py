"""The reader of MATLAB files: the same as scipy's on whole ones, one sentence on damaged ones."""

from __future__ import annotations

import struct
import tempfile
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from scipy.io import loadmat, savemat

from beton_builders._matfile import read_mat

TYPES = ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"]
# Written by MATLAB 5.3 to 7.4 and by Octave, some on a big-endian machine.
OF_MATLAB = sorted((Path(scipy.io.__file__).parent / "matlab/tests/data").glob("*.mat"))


def content() -> dict:
    generator = np.random.default_rng(0)
    synsets = np.empty((3, 1), [(name, object) for name in ("ID", "WNID", "words", "children")])
    for row in range(3):
        synsets[row, 0] = (row + 1, f"n0000000{row}", "grüße, 猫" * row, [[1.0, 2.0]] * row)
    cell = np.empty((2, 2), object)
    cell[:] = [["a", np.arange(3)], [{"inner": {"deep": "er"}}, 1.5]]
    return {
        **{f"of_{kind}": (generator.random((3, 4, 2)) * 100).astype(kind) for kind in TYPES},
        "row": np.arange(5.0),
        "empty": np.zeros((0, 3)),
        "yes": np.array([[True, False]]),
        "text": "words",
        "lines": np.array(["one", "three", "é"]),
        "nothing": "",
        "synsets": synsets,
        "one": {"name": "x", "value": 3},
        "cell": cell,
    }


@pytest.fixture(params=["plain", "compressed"])
def saved(request, tmp_path) -> Path:
    path = tmp_path / "some.mat"
    compressed = request.param == "compressed"
    savemat(path, content(), format="5", do_compression=compressed, long_field_names=True)
    return path


def same(found, expected) -> bool:
    """`found` has what loadmat gives, which has structs and cells as arrays of their shape."""
    if expected is None:
        return found == {}  # a struct without fields
    if expected.dtype.names:
        rows = expected.reshape(-1, order="F")
        return len(found) == len(rows) and all(
            list(one) == list(expected.dtype.names) and all(same(one[key], row[key]) for key in one)
            for one, row in zip(found, rows)
        )
    if expected.dtype == object:
        rows = expected.reshape(-1, order="F")
        return len(found) == len(rows) and all(map(same, found, rows))
    if expected.dtype == bool:
        expected = expected.view(np.uint8)
    return (
        found.shape == expected.shape
        and found.dtype == expected.dtype.newbyteorder("=")
        and np.array_equal(found, expected)
    )


def names_in(mat: dict) -> list[str]:
    return [name for name in mat if not name.startswith("__")]


def read(data: bytes, names: list[str], **options) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "some.mat"
        path.write_bytes(data)
        return read_mat(path, names, **options)


def refusal(data: bytes, names: list[str], **options) -> str:
    """What is said about it."""
    with pytest.raises(ValueError) as caught:
        read(data, names, **options)
    message = str(caught.value)
    assert type(caught.value) is ValueError and "\n" not in message
    assert "/some.mat cannot be read as a MATLAB 5 file (" in message
    assert message.endswith("): download it again, or save it again with -v7.")
    return message


# --- whole files --------------------------------------------------------------------------------


def test_reads_what_loadmat_reads(saved):
    expected = loadmat(saved, mat_dtype=True)
    names = names_in(expected)
    assert names == list(content())
    found = read_mat(saved, names)
    assert list(found) == names
    for name in names:
        assert same(found[name], expected[name]), name
    for name in names:
        assert same(read_mat(saved, [name])[name], expected[name]), name
    assert read_mat(saved, []) == {}


def test_structs_are_dicts(saved):
    rows = read_mat(saved, ["synsets"])["synsets"]
    assert [(row["ID"].item(), row["WNID"].item()) for row in rows] == [
        (1, "n00000000"),
        (2, "n00000001"),
        (3, "n00000002"),
    ]
    assert rows[2]["words"].item() == "grüße, 猫grüße, 猫"


@pytest.mark.skipif(not OF_MATLAB, reason="this scipy came without its test data")
@pytest.mark.filterwarnings("ignore")  # scipy's own, on some of them
def test_reads_what_matlab_wrote():
    read = set()
    for path in set(OF_MATLAB) - {OF_MATLAB[0].with_name("nasty_duplicate_fieldnames.mat")}:
        try:
            expected = loadmat(path, mat_dtype=True)
            found = read_mat(path, names_in(expected))
        except (ValueError, NotImplementedError, zlib.error):
            continue  # not of version 5, sparse, complex, an object, a function or damaged
        assert all(same(found[name], expected[name]) for name in found), path.name
        read.add(path.name)
    assert len(read) > 55, len(read)
    assert read > {"big_endian.mat", "testunicode_7.4_GLNX86.mat", "teststructarr_6.1_SOL2.mat"}


def tag(kind: int, size: int, order: str = "<") -> bytes:
    return struct.pack(f"{order}II", kind, size)


def handmade(body: bytes, order: str = "<") -> bytes:
    mark = b"IM" if order == "<" else b"MI"
    return b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack(f"{order}H", 0x0100) + mark + body


def variable(kind: int, shape: tuple[int, ...], values: bytes, order: str = "<") -> bytes:
    """One called x."""
    dimensions = struct.pack(f"{order}{len(shape)}i", *shape)
    body = tag(6, 8, order) + struct.pack(f"{order}II", kind, 0)
    if kind != 17:  # an object that MATLAB keeps to itself
        body += tag(5, len(dimensions), order) + dimensions + bytes(-len(dimensions) % 8)
    body += struct.pack(f"{order}I", 1 << 16 | 1) + b"x\0\0\0" + values
    return tag(14, len(body), order) + body


@pytest.mark.parametrize("order", ["<", ">"])
def test_doubles_stored_as_smaller_integers(order):
    small = struct.pack(f"{order}I2h", 4 << 16 | 3, 7, -2)  # the data in the tag itself
    data = handmade(variable(6, (1, 2), small, order), order)
    found = read(data, ["x"])["x"]
    assert found.dtype == np.float64 and found.tolist() == [[7, -2]]


def test_pixels_are_not_copied(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 2000), np.uint8)  # 6 MB
    for compressed in (False, True):
        path = tmp_path / "some.mat"
        savemat(path, {"before": pixels, "X": pixels, "y": [[1]]}, do_compression=compressed)
        tracemalloc.start()
        found = read_mat(path, ["X", "y"])["X"]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (found == pixels).all() and found.flags.f_contiguous
        assert peak < 1.3 * pixels.nbytes


# --- others -------------------------------------------------------------------------------------


def test_files_of_another_kind(tmp_path):
    assert "(it is empty)" in refusal(b"", ["x"])
    assert "(it has another head)" in refusal(b"<html>", ["x"])
    assert "(it has another head)" in refusal(bytes(1000), ["x"])
    savemat(tmp_path / "v4.mat", {"x": [[1.0]]}, format="4")
    assert "(it has another head)" in refusal((tmp_path / "v4.mat").read_bytes(), ["x"])
    head = b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM" + bytes(384) + b"\x89HDF\r\n\x1a\n"
    for data in (head, head[512:] + bytes(1000)):
        assert "(it is HDF5, that is version 7.3)" in refusal(data, ["x"])


def test_variables_of_another_kind(saved, tmp_path):
    assert "(it has no another)" in refusal(saved.read_bytes(), ["row", "another"])
    path = tmp_path / "other.mat"
    values = {"s": scipy.sparse.eye(3), "c": [[1j]], "n": {"c": [[1j]]}, "x": [[1.0]]}
    savemat(path, values)
    assert read_mat(path, ["x"])["x"].tolist() == [[1]]  # the others do not matter then
    for name, what in {"s": "a sparse array", "c": "an array of complex", "n": "complex"}.items():
        assert what in refusal(path.read_bytes(), [name])
    for kind in (3, 16, 17):
        another = variable(kind, (1, 1), b"")
        assert "which is not read" in refusal(handmade(another), ["x"])
        following = variable(9, (1, 1), struct.pack("<II", 1 << 16 | 2, 5)).replace(b"x", b"y")
        assert read(handmade(another + following), ["y"])["y"].tolist() == [[5]]


def test_every_truncation_is_told(saved):
    data = saved.read_bytes()
    last = list(content())[-1]
    for size in [*range(0, 300), *range(300, len(data), 37), len(data) - 1]:
        refusal(data[:size], [last])


@pytest.mark.parametrize(
    ("kind", "shape", "values"),
    [
        (9, (1 << 30, 1 << 30), tag(2, 8) + bytes(8)),  # more pixels than bytes
        (9, (1, 7), tag(2, 8) + bytes(8)),
        (9, (1, -8), tag(2, 8) + bytes(8)),
        (9, (1, 8), tag(2, 1 << 31) + bytes(8)),
        (9, (1, 1), tag(9, 8) + bytes(8)),  # a byte stored as a double
        (9, (1, 1), tag(16, 1) + bytes(8)),
        (9, (1, 4), struct.pack("<I", 5 << 16 | 2) + bytes(4)),
        (9, (1,) * 33, tag(2, 1) + bytes(8)),
        (9, ((1 << 31) - 1, (1 << 31) - 1, (1 << 31) - 1, 0), tag(2, 0)),
        (4, (1 << 30, 1 << 30), tag(16, 8) + b"damaged."),
        (4, (1, 4), tag(16, 4) + b"\xff\xfe\xfd\xfc" + bytes(4)),
        (1, (1 << 30, 1), tag(14, 0)),  # cells
        (1, (1, 1), tag(9, 0)),
        (1, (1, 1), tag(14, 48) + bytes(48)),
        (2, (1 << 30, 1), tag(5, 4) + struct.pack("<II", 8, 0) + tag(1, 0)),  # structs
        (2, (1, 1), tag(5, 4) + struct.pack("<II", 0, 0) + tag(1, 0)),
        (2, (1, 1), tag(5, 4) + struct.pack("<Ii", 1, -1) + tag(1, 8) + bytes(8)),
        (99, (1, 1), tag(2, 1) + bytes(8)),
    ],
)
def test_claims_that_do_not_fit(kind, shape, values):
    plain = variable(kind, shape, values)
    packed = zlib.compress(plain)
    for data in (handmade(plain), handmade(tag(15, len(packed)) + packed)):
        tracemalloc.start()
        refusal(data, ["x"])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 20


def test_deep_nesting_and_many_parts():
    nested = variable(9, (1, 1), tag(2, 1) + bytes(8))
    for _ in range(3000):
        nested = variable(1, (1, 1), nested)
    assert "damaged struct or cell" in refusal(handmade(nested), ["x"])
    many = variable(1, (1 << 21, 1), tag(14, 0) * (1 << 21))
    assert "2,097,152 arrays where there is no room" in refusal(handmade(many), ["x"])


def test_a_small_file_that_unpacks_to_a_large_one():
    zeros = 1 << 26
    packed = zlib.compress(variable(9, (1, zeros), tag(2, zeros) + bytes(zeros)))
    data = handmade(tag(15, len(packed)) + packed)
    assert len(data) < 1 << 17
    tracemalloc.start()
    message = refusal(data, ["x"], most=1 << 20)
    assert "(it has no y)" in refusal(data, ["y"])  # skipped, not unpacked
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "it has 67,108,912 bytes of x, and 1,048,576 are the most" in message
    assert peak < 1 << 21
    endless = zlib.compress(variable(9, (1, 8), tag(2, 8) + bytes(8)) + bytes(zeros))
    tracemalloc.start()
    message = refusal(handmade(tag(15, len(endless)) + endless), ["x"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "packed bytes do not end where it does" in message and peak < 1 << 20


@pytest.mark.parametrize("seed", range(2))
def test_damaged_files_raise_nothing_but_one_sentence(saved, seed):
    """150 of each kind of file and seed; without compression the damage is in the heads."""
    generator = np.random.default_rng(seed)
    good, names = saved.read_bytes(), list(content())
    refused = 0
    for _ in range(150):
        data = bytearray(good)
        for _ in range(generator.integers(1, 5)):
            place = int(generator.integers(124, len(data)))
            how = generator.integers(4)
            if how == 0:
                data[place] = generator.integers(256)
            elif how == 1:
                word = int(generator.choice([0, 1, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]))
                data[place // 4 * 4 : place // 4 * 4 + 4] = word.to_bytes(4, "little")
            elif how == 2:
                del data[place : place + int(generator.integers(1, 20))]
            else:
                data[place:place] = generator.bytes(int(generator.integers(1, 20)))
        try:
            assert set(read(data, names)) == set(names)
        except ValueError as error:
            assert "/some.mat cannot be read as a MATLAB 5 file (" in str(error)
            assert "\n" not in str(error)
            refused += 1
    assert refused > 75

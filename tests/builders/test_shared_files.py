"""What several builders share: MATLAB files, lists of images."""

import numpy as np
import pytest
from scipy.io import savemat

from beton_builders._files import parse_lines, read_mat, whole_numbers


@pytest.fixture(params=[False, True], ids=["plain", "compressed"])
def mat(request, tmp_path):
    path = tmp_path / "some.mat"
    savemat(
        path, {"X": np.arange(24, dtype=np.uint8).reshape(2, 3, 4), "y": [[1.0], [2.0]]}, do_compression=request.param
    )
    return path


def test_read_mat_returns_the_variables(mat):
    content = read_mat(mat, ["X", "y"])
    assert (content["X"] == np.arange(24).reshape(2, 3, 4)).all() and content["X"].dtype == np.uint8
    assert whole_numbers(mat, "y", content["y"], 1, 2).tolist() == [1, 2]


def test_read_mat_names_what_is_missing(mat):
    with pytest.raises(ValueError, match="some.mat cannot be read as a MATLAB file .it has no z.: download it again"):
        read_mat(mat, ["X", "z"])


@pytest.mark.parametrize("content", [b"", b"<html>a server's error</html>", b"MATLAB 5.0 MAT-file" + bytes(200)])
def test_read_mat_refuses_what_is_not_a_mat_file(tmp_path, content):
    (tmp_path / "a.mat").write_bytes(content)
    with pytest.raises(ValueError, match="a.mat cannot be read as a MATLAB file .*: download it again"):
        read_mat(tmp_path / "a.mat", ["X"])


def test_a_file_that_crashes_scipy_is_one_sentence(tmp_path, monkeypatch):
    """scipy's reader ends the process on some damaged files, so a process of its own reads a file first."""
    monkeypatch.setattr(
        "beton_builders._files.READ_MAT_SAFELY", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    )
    savemat(tmp_path / "a.mat", {"X": 1})
    with pytest.raises(ValueError, match="a.mat cannot be read as a MATLAB file .the reader crashed.: download"):
        read_mat(tmp_path / "a.mat", ["X"])


@pytest.mark.parametrize("value", [[[0]], [[3]], [[1.5]], [[np.nan]], "text", {"a": 1}])
def test_whole_numbers_refuses_others(tmp_path, value):
    value = np.array(value) if not isinstance(value, dict) else value
    with pytest.raises(ValueError, match="does not hold whole numbers from 1 to 2 as y"):
        whole_numbers(tmp_path / "a.mat", "y", value, 1, 2)


def test_parse_lines(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("a b.jpg 3\r\n\nc.jpg 4\n")
    pattern, words = "(?P<name>.+) (?P<label>[0-9]+)", ("a name and a number", "unpack it again")
    assert list(parse_lines(path, pattern, *words)) == [("a b.jpg", 3), ("c.jpg", 4)]
    path.write_text("a 3\nb\n")
    with pytest.raises(ValueError, match="Line 2 of .*list.txt must be a name and a number, not 'b': unpack it again"):
        list(parse_lines(path, pattern, *words))
    path.write_text("a x\nb y\n")
    pattern = "(?P<name>.+) (?P<label>.+)"
    with pytest.raises(ValueError, match="Line 2 of"):
        list(parse_lines(path, pattern, *words, labels={"x": 7}))

"""Atomic writes, and the errors of paths that cannot be written."""

import os

import pytest

from fastssl.common.errors import UserError
from fastssl.common.files import explain_write_errors, replace_durably, write_atomically


@pytest.mark.parametrize("content", ["käse\n", "käse\n".encode(), lambda part: part.write_bytes("käse\n".encode())])
def test_text_bytes_and_functions_are_written_in_a_new_folder(tmp_path, content):
    write_atomically(tmp_path / "new" / "x.txt", content)
    assert (tmp_path / "new" / "x.txt").read_bytes() == "käse\n".encode()
    assert os.listdir(tmp_path / "new") == ["x.txt"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.txt"
    write_atomically(path, "old")

    def fail(part):
        part.write_text("half of the new f")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_atomically(path, fail, keep=tmp_path / "previous.txt")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.txt"]


def test_the_suffix_of_the_temporary_file_is_that_of_the_file(tmp_path):
    """np.save and others append a suffix that is missing."""
    seen = []
    write_atomically(tmp_path / "x.npy", lambda part: (seen.append(part.suffix), part.touch()))
    assert seen == [".npy"]


def test_the_old_file_is_moved_to_another_name(tmp_path):
    path, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    for text in ("1", "2", "3"):
        write_atomically(path, text, keep=previous)
    assert (path.read_text(), previous.read_text()) == ("3", "2")


def test_replace_durably(tmp_path):
    (tmp_path / "part").write_text("new")
    (tmp_path / "final").write_text("old")
    replace_durably(tmp_path / "part", tmp_path / "final")
    assert os.listdir(tmp_path) == ["final"] and (tmp_path / "final").read_text() == "new"


def test_a_path_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "x.txt"
    with pytest.raises(UserError, match=r"file/x.txt cannot be written \(.*\): free some space, or choose"):
        with explain_write_errors(path):
            write_atomically(path, "text")

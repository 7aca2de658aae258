"""Atomic writes, and the errors of paths that cannot be written."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from fastssl.common.errors import UserError
from fastssl.common.files import explain_write_errors, replace_durably, sync, try_lock, write_atomically


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


WRONG = {
    errno.ENOSPC: "^out cannot be written .No space left on device.: free some space",
    errno.EDQUOT: "^out cannot be written .*: free some space",
    errno.EROFS: "^out cannot be written .*choose a path that you can write to",
    errno.EACCES: "^out cannot be written .*choose a path that you can write to",
    errno.EFBIG: "^out cannot be written .*ulimit -f",
    errno.EMFILE: "^out was not written, because this machine has reached a limit .*open files .ulimit -n",
    errno.ENFILE: "^out was not written, because this machine has reached a limit .*too many files are open",
    errno.EAGAIN: "^out was not written, because this machine has reached a limit .*processes .*ulimit -u",
    errno.ENOMEM: "^out was not written, because this machine has reached a limit .*memory",
}


@pytest.mark.parametrize("number", WRONG, ids=errno.errorcode.get)
def test_a_write_error_blames_what_is_at_fault(number):
    with pytest.raises(UserError, match=WRONG[number]):
        with explain_write_errors(Path("out")):
            raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("name", ["out", "out/train.beton", "/", ".out.17.part", b"out/train.beton"])
def test_a_write_error_that_names_a_file_of_the_output_blames_the_output(name):
    with pytest.raises(UserError, match="^out cannot be written"), explain_write_errors(Path("out")):
        raise OSError(errno.EIO, os.strerror(errno.EIO), name)


@pytest.mark.parametrize("name", ["photos/1.jpg", "/dev/shm/x", "output", b"photos/1.jpg"])
def test_a_write_error_that_names_another_file_blames_that_file(name):
    with pytest.raises(UserError, match=f"^{os.fsdecode(name)} cannot be read or written .*, so out is missing"):
        with explain_write_errors(Path("out")):
            raise OSError(errno.EIO, os.strerror(errno.EIO), name)


# --- file systems that can do less --------------------------------------------------------------

UNSUPPORTED = ["ENOSYS", "ENOLCK", "EOPNOTSUPP", "EINVAL"]


def failing(number: int):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


def test_a_lock_is_held_until_the_file_is_closed(tmp_path):
    with open(tmp_path / "lock", "w") as first, open(tmp_path / "lock", "w") as second:
        assert try_lock(first)
        with pytest.raises(BlockingIOError):
            try_lock(second)
        first.close()
        assert try_lock(second)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_file_system_without_locks(tmp_path, monkeypatch, name):
    monkeypatch.setattr(fcntl, "flock", failing(getattr(errno, name)))
    with open(tmp_path / "lock", "w") as file:
        assert not try_lock(file)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_file_system_that_cannot_sync(tmp_path, monkeypatch, name):
    (tmp_path / "part").write_text("new")
    monkeypatch.setattr(os, "fsync", failing(getattr(errno, name)))
    replace_durably(tmp_path / "part", tmp_path / "final")
    write_atomically(tmp_path / "final", "newer")
    assert (tmp_path / "final").read_text() == "newer"


@pytest.mark.parametrize("name", ["EIO", "ENOSPC", "EDQUOT"])
def test_a_sync_that_fails_is_an_error(tmp_path, monkeypatch, name):
    monkeypatch.setattr(os, "fsync", failing(getattr(errno, name)))
    for path in (tmp_path, Path(__file__)):
        with pytest.raises(OSError):
            sync(path)

"""Atomic writes, and the errors of paths that cannot be written."""

import errno
import fcntl
import os
import socket
import subprocess
from pathlib import Path

import pytest

from fastssl.common.errors import UserError
from fastssl.common.files import (
    UnsafeFile,
    explain_write_errors,
    make_folder,
    open_regular,
    part_of,
    read_bytes,
    remove_abandoned_files,
    replace_durably,
    sync,
    try_lock,
    write_atomically,
)


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


# --- what is not a regular file -------------------------------------------------------------------


def make_pipe(path):
    os.mkfifo(path)


def make_socket(path):
    folder = os.open(path.parent, os.O_RDONLY)  # the whole path may be longer than a socket's name can be
    try:
        socket.socket(socket.AF_UNIX).bind(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.close(folder)


def link_to_a_device(path):
    path.symlink_to("/dev/zero")


SPECIAL = {"named pipe": make_pipe, "socket": make_socket, "device": link_to_a_device}


@pytest.mark.parametrize("make", SPECIAL.values(), ids=SPECIAL)
@pytest.mark.parametrize("mode", ["rb", "ab", "r+b", "w"])
def test_only_regular_files_are_opened(tmp_path, make, mode):
    make(tmp_path / "x")
    with pytest.raises(UnsafeFile, match="a named pipe, a socket or a device|a symbolic link"):
        open_regular(tmp_path / "x", mode)


@pytest.mark.parametrize("mode", ["ab", "r+b", "w", "wb"])
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_nothing_is_written_through_a_link(tmp_path, link, mode):
    (tmp_path / "precious").write_text("content")
    link(tmp_path / "precious", tmp_path / "x")
    with pytest.raises(UserError, match="x is a (symbolic|hard) link.*, so nothing is written to it: remove it"):
        with explain_write_errors(tmp_path / "x"):
            open_regular(tmp_path / "x", mode)
    assert (tmp_path / "precious").read_text() == "content"
    with open_regular(tmp_path / "x") as file:  # reading follows links
        assert file.read() == b"content"


def test_a_regular_file_is_opened_as_open_does(tmp_path):
    for mode, text in (("w", "one"), ("a", "two"), ("w", "three"), ("x", None)):
        try:
            with open_regular(tmp_path / "x", mode, encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            assert mode == "x"
    assert (tmp_path / "x").read_text() == "three"
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "gone")
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)


def test_a_file_that_is_read_whole_has_a_limit(tmp_path):
    (tmp_path / "x").write_bytes(b"12345")
    assert read_bytes(tmp_path / "x", limit=5) == b"12345"
    assert read_bytes(tmp_path / "x", limit=1 << 46) == b"12345"  # a limit takes no memory
    with pytest.raises(OSError, match="larger than the 4 bytes"):
        read_bytes(tmp_path / "x", limit=4)


def test_a_linked_folder_is_not_written_to(tmp_path):
    make_folder(tmp_path / "new" / "x")
    (tmp_path / "link").symlink_to(tmp_path / "new")
    (tmp_path / "broken").symlink_to(tmp_path / "gone")
    for name in ("link", "broken"):
        with pytest.raises(UnsafeFile, match="a symbolic link"):
            make_folder(tmp_path / name)


def test_a_link_at_the_temporary_name_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("content")
    part_of(tmp_path / "x.txt").symlink_to(tmp_path / "precious")
    for content in ("text", b"bytes", lambda part: part.write_text("function")):
        write_atomically(tmp_path / "x.txt", content)
    assert (tmp_path / "precious").read_text() == "content" and (tmp_path / "x.txt").read_text() == "function"


# --- what killed processes leave ------------------------------------------------------------------


def ended_process():
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_temporary_files_of_killed_processes_are_removed_and_nothing_else(tmp_path):
    gone, alive = ended_process(), os.getppid()
    ours = [f".last.pt.{gone}.part.pt", f".recipe.yaml.{gone}.part.yaml", f".LICENSE.{gone}.part"]
    others = [
        f".last.pt.{alive}.part.pt",  # is being written
        ".notes.part", ".notes.part.md", ".video.mp4.part", ".x.0.part", ".x.-1.part", ".x.99999999999.part",
        f".last.pt.{gone}.part.txt", f".last.pt.{gone}.partial", f"last.pt.{gone}.part.pt",
    ]  # fmt: skip
    for name in (*ours, *others):
        (tmp_path / name).write_text("content")
    folder, link = tmp_path / f".folder.{gone}.part", tmp_path / f".link.{gone}.part"
    folder.mkdir()
    link.symlink_to(tmp_path / ".notes.part")
    remove_abandoned_files(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*others, folder.name, link.name}

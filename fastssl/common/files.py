"""Files that are opened safely, and written whole or not at all, even after a crash or a power cut.

A path may come from somebody else, with an archive or a data set. So what is read or written is a regular file: opening
a named pipe waits for its other end, a device has no end, and a link in an output directory leads to a file elsewhere.
"""

import errno
import fcntl
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fastssl.common.errors import UserError

# What the kernel answers where a file system cannot do what is asked: lock a file, sync a folder.
UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
MACHINE_FIXES = {
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "end other programs, because too many files are open",
    errno.EAGAIN: "raise the limit on processes and threads (ulimit -u), or end some of them",
    errno.ENOMEM: "free some memory, or raise the limit on the address space (ulimit -v)",
}
# The temporary file of write_atomically: .NAME.PID.part with the suffix of NAME, such as .last.pt.4711.part.pt.
PART_NAME = re.compile(r"\.(?P<name>.+)\.(?P<pid>[1-9]\d{0,9})\.part(?P<suffix>\.[^.]+)?")
LARGEST_TEXT = 64 << 20  # bytes of a file of text that is read whole
PIECE = 16 << 20  # bytes that are read at a time
LARGEST_LOG = 4 << 30  # bytes of a file that is read line by line
LONGEST_LINE = 1 << 20  # bytes of a line in it


class UnsafeFile(OSError):
    """A path that is not opened. `strerror` says what it is, such as "a named pipe or a device"."""

    def __init__(self, path: str | Path, what: str):
        super().__init__(errno.EINVAL, what, str(path))


def open_regular(path: str | Path, mode: str = "rb", **options: Any) -> IO[Any]:
    """Open a regular file, as `open` does.

    For reading, links are followed. For writing they are not: another file than the named one would change.

    Raises:
        UnsafeFile: `path` is a named pipe, a device or a socket, or, for writing, a link.
        OSError: as `open`.
    """
    return open(path, mode, opener=_open_regular, **options)


def _open_regular(path: str, flags: int) -> int:
    writes = flags & os.O_ACCMODE != os.O_RDONLY
    try:
        status = os.lstat(path) if writes else os.stat(path)
    except FileNotFoundError:
        pass
    else:
        if stat.S_ISLNK(status.st_mode):
            raise UnsafeFile(path, "a symbolic link")
        if stat.S_ISREG(status.st_mode) and writes and status.st_nlink > 1:
            raise UnsafeFile(path, "a hard link, so another file would change too")
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):  # `open` itself refuses folders
            raise UnsafeFile(path, "a named pipe, a socket or a device, not a regular file")
    # O_NONBLOCK: the kernel's own files, such as /proc/kmsg, call themselves regular and may wait.
    return os.open(path, flags | os.O_NONBLOCK | (os.O_NOFOLLOW if writes else 0), 0o666)


def read_bytes(path: str | Path, limit: int) -> bytes:
    """Return the content of a regular file. Raises OSError, also if it has more than `limit` bytes."""
    pieces: list[bytes] = []
    left = limit + 1
    with open_regular(path) as file:
        # In pieces, as `read` takes as much memory at once as it may return.
        while left and (piece := file.read(min(PIECE, left))):
            pieces.append(piece)
            left -= len(piece)
    if not left:
        raise UnsafeFile(path, f"larger than the {limit:,} bytes that such a file may have")
    return b"".join(pieces)


def read_text(path: str | Path, limit: int = LARGEST_TEXT, errors: str = "strict") -> str:
    """Return the text of a regular UTF-8 file. Raises OSError as `read_bytes`, and UnicodeDecodeError."""
    return read_bytes(path, limit).decode("utf-8", errors)


def read_lines(path: str | Path) -> Iterator[str]:
    """Yield the lines of a regular file without their ends. Lines of more than 1 MiB are left out. Raises OSError."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > LARGEST_LOG:
            raise UnsafeFile(path, f"larger than the {LARGEST_LOG:,} bytes that such a file may have")
        is_start = True
        while piece := file.readline(LONGEST_LINE):
            is_end = piece.endswith(b"\n") or len(piece) < LONGEST_LINE
            if is_start and is_end:
                yield piece.decode("utf-8", "replace").rstrip("\r\n")
            is_start = is_end


def expand_user(path: str | Path) -> Path:
    """Return the path with ~ expanded. Without such a user, ~name stays as it is."""
    return Path(os.path.expanduser(path))


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, to write files into. Raises UnsafeFile if it is a symbolic link."""
    if path.is_symlink():
        raise UnsafeFile(path, "a symbolic link")
    path.mkdir(parents=True, exist_ok=True)


def part_of(path: Path) -> Path:
    """Return the temporary name of a file or folder that this process writes."""
    return path.with_name(f".{path.name}.{os.getpid()}.part{path.suffix}")


def abandoned_parts(folder: Path) -> Iterator[Path]:
    """Yield what `part_of` names in a folder, files or folders, where the process that wrote it is gone."""
    for path in sorted(folder.glob(".*.part*")):
        match = PART_NAME.fullmatch(path.name)
        if match and Path(match["name"]).suffix == (match["suffix"] or "") and not _is_running(int(match["pid"])):
            yield path


def remove_abandoned_files(folder: Path, start: str = "") -> None:
    """Remove the temporary files of killed processes, and nothing else.

    start: with which the names of the files begin that those processes wrote.
    """
    for path in abandoned_parts(folder):
        if path.name.startswith(f".{start}") and stat.S_ISREG(path.lstat().st_mode):
            path.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # of another user, or no number of a process
        return True
    return True


def write_atomically(path: Path, content: str | bytes | Callable[[Path], object], keep: Path | None = None) -> None:
    """Write a file under a temporary name and rename it, so that readers see the old file or the new one.

    Args:
        path: the file; its folder is made if it is missing.
        content: text (written as UTF-8), bytes, or a function that writes the file at the path that it is given.
        keep: where to move the old file. At every moment `path` is there (on a file system without hard links, it is
            missing between two renames).

    Example:
        write_atomically(Path("scores.npy"), lambda part: np.save(part, scores))
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    # What has this name is of an ended process with our number, or a link from elsewhere. "x" makes a new file.
    part.unlink(missing_ok=True)
    try:
        open(part, "xb").close()
        if isinstance(content, str):
            part.write_text(content, encoding="utf-8")
        elif isinstance(content, bytes):
            part.write_bytes(content)
        else:
            content(part)
        sync(part)
        if keep and path.exists():
            _move_aside(path, keep)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _move_aside(path: Path, keep: Path) -> None:
    """Give the file the name `keep`. Its own name is there until another file takes it."""
    second = part_of(keep)
    second.unlink(missing_ok=True)
    try:
        os.link(path, second)
        os.replace(second, keep)
    except OSError as error:
        if error.errno not in (*UNSUPPORTED, errno.EPERM, errno.EMLINK):
            raise
        os.replace(path, keep)
    finally:
        second.unlink(missing_ok=True)  # a rename does nothing where both names are of one file already


def replace_durably(part: Path, final: Path) -> None:
    """Rename a finished file, and return when the new name would survive a power cut."""
    os.replace(part, final)
    sync(final.parent)


def sync(path: Path) -> None:
    """Return when the content of a file or folder would survive a power cut, as far as its file system can tell."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # Some network file systems do not sync folders, or do not open them.
        if not (error.errno in UNSUPPORTED or (path.is_dir() and error.errno in (errno.EACCES, errno.EBADF))):
            raise


def try_lock(file: IO[Any]) -> bool:
    """Lock an open file until it is closed; the kernel releases the lock when the process ends, however it ends.

    Returns False on a file system without locks (some of Lustre and NFS). Raises BlockingIOError if another process
    holds the lock.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return False
        raise
    return True


def machine_fix(error: OSError) -> str | None:
    """Return what helps against an error for which no file is to blame, but a limit of the machine; None for others."""
    return MACHINE_FIXES.get(error.errno or 0)


def write_error(path: Path, error: OSError) -> UserError:
    """Return what to tell the user about `error`, which came while `path` was written: what is at fault, the fix."""
    reason = error.strerror or str(error)
    if isinstance(error, UnsafeFile):
        return UserError(
            f"{error.filename} is {reason}, so nothing is written to it", hint="remove it, or use another path"
        )
    if fix := machine_fix(error):
        return UserError(f"{path} was not written, because this machine has reached a limit ({reason})", hint=fix)
    if isinstance(error.filename, str | bytes) and not _belongs_to(Path(os.fsdecode(error.filename)), path):
        return UserError(
            f"{os.fsdecode(error.filename)} cannot be read or written ({reason}), so {path} is missing",
            hint="make it readable and writable for your user, and run the same command again",
        )
    if error.errno == errno.EFBIG:
        return UserError(
            f"{path} cannot be written ({reason})", hint="raise the limit on the size of files (ulimit -f)"
        )
    return UserError(
        f"{path} cannot be written ({reason})", hint="free some space, or choose a path that you can write to"
    )


def _belongs_to(file: Path, path: Path) -> bool:
    """Whether writing `path` may touch `file`: itself, what is in it, a folder above it, or its temporary file."""
    file, path = file.absolute(), path.absolute()
    is_temporary = any(part.name.startswith(f".{path.name}.") for part in (file, *file.parents))
    return file == path or path in file.parents or file in path.parents or is_temporary


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block, which writes to `path`, into a UserError that names what is at fault."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error

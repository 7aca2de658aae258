"""Read the bytes of an image, and tell a bad image from trouble of the machine. Worker processes run this.

A disk that is away or fails, a limit that is reached, a file that may not be read: such trouble passes, and the image
is good. So it stops the build, which continues later. Only what the entry itself causes makes it a bad image.
"""

import errno
import os
import stat

from fastssl.beton.source import ImageFile, ImageSource, file_of
from fastssl.common.errors import UserError
from fastssl.common.files import machine_fix

MISSING = "missing"  # the reason of a bad image whose file does not exist: the next build looks for it again

# Bytes of an image file, wherever it is read from. An image of 179 megapixels, the limit of Pillow, has as many without
# compression in 16-bit RGB; an entry that states more is a hole, a device or no image.
LARGEST_FILE = 1 << 30

# What opening an entry gives if it is, for example, a folder, below a file, or a link to itself.
ENTRY_ERRORS = (errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.ENXIO)
# Libraries raise these without a number.
NUMBERS = {
    FileNotFoundError: errno.ENOENT,
    PermissionError: errno.EACCES,
    TimeoutError: errno.ETIMEDOUT,
    ConnectionError: errno.ECONNRESET,
}


def read_image_bytes(source: ImageFile) -> bytes:
    """Return the bytes of an image file, from where `Sample.image` says. Raises ValueError if they are too many."""
    if isinstance(source, bytes) or callable(source):
        content = source if isinstance(source, bytes) else source()
        _refuse_large(len(content))
        return content
    path, offset, size = source if isinstance(source, tuple) else (source, 0, -1)
    # Opening a named pipe would wait for a writer, and reading a device might never end. The kernel's own files call
    # themselves regular: /proc/kmsg is empty and waits, /proc/kcore has 128 TB.
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if status.st_size == 0:
        raise ValueError("the file is empty")
    _refuse_large(size if size >= 0 else status.st_size)
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        content = file.read(size)
        # Some network file systems return less than they have.
        while len(content) < size and (rest := file.read(size - len(content))):
            content += rest
    if size > len(content):
        raise ValueError(f"{path} ends within this image, at byte {offset + len(content):,}")
    return content


def _refuse_large(size: int) -> None:
    if size > LARGEST_FILE:
        limit = f"{LARGEST_FILE >> 30} GiB"
        raise ValueError(f"has {size / 1e9:,.1f} GB, more than the {limit} that an image file may have")


def read_or_explain(source: ImageFile) -> bytes | str:
    """Return the bytes of an image file, or why the image is bad.

    Raises:
        UserError: the file cannot be read for a reason that is not its own.
        MemoryError: there is not enough memory for it.
    """
    try:
        return read_image_bytes(source)
    except (MemoryError, UserError):
        raise
    except OSError as error:
        number = error_number(error)
        if number is None:  # from a decoder, such as that of a Parquet file
            return f"{type(error).__name__}: {error}"
        if number in ENTRY_ERRORS:
            return error.strerror or str(error)
        file = error.filename if isinstance(error.filename, str | bytes) else file_of(source)
        if number != errno.ENOENT or file is None:
            raise machine_error(source, error, "cannot be read") from error
        # The file of a link that leads nowhere is the one that it leads to.
        folder = os.path.dirname(os.path.realpath(os.fsdecode(file)))
        if _holds_anything(folder):
            return MISSING
        raise UserError(
            f"{os.fsdecode(file)} cannot be read, because the folder {folder} is missing or empty",
            hint="mount its disk, or take the file out of the source, and run the same command again; a build goes on "
            "where it stopped",
        ) from error
    except ImportError as error:
        raise machine_error(source, error, "cannot be read") from error
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def error_number(error: OSError) -> int | None:
    """Return the error's number; None for errors that decoders raise, which are not the system's."""
    return error.errno or next((number for kind, number in NUMBERS.items() if isinstance(error, kind)), None)


def machine_error(source: ImageSource, error: Exception, what: str) -> UserError:
    """Return what to tell the user about trouble of the machine with an image; `what` could not be done with it."""
    named = getattr(error, "filename", None) or file_of(source)
    name = os.fsdecode(named) if isinstance(named, str | bytes | os.PathLike) else "An image"
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    fix = (machine_fix(error) if isinstance(error, OSError) else None) or "check the disk and the machine"
    return UserError(
        f"{name} {what} ({reason})", hint=f"{fix}, and run the same command again; a build goes on where it stopped"
    )


def _holds_anything(folder: str) -> bool:
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is not None
    except OSError:
        return False

"""Files that hold many images, such as tar files: where they are, the split of each, and what a tar file holds."""

import bisect
import io
import os
import posixpath
import re
import tarfile
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import BinaryIO, NamedTuple

from beton_builders._files import split_word, walk

MOST_LINKS = 40  # from one member of a tar to the next; the limit of Linux for symbolic links
SCANNED = 1 << 20  # bytes at a time
MOST_ZEROS = 1 << 27  # bytes after the end of a tar that are searched for another one
LARGEST_HEADER = 1 << 20  # bytes of a member's header: longer ones are not of names


def files_by_split(source: Path, suffixes: tuple[str, ...], by_name: bool = True) -> dict[str, list[tuple[str, str]]]:
    """Return for each split (path, path within SOURCE) of the files with these suffixes, all sorted.

    Raises ValueError if the split of a file is not clear, or only some of the files have a name that tells it.
    """
    found: dict[str | None, list[tuple[str, str]]] = {}
    for path, name in files_with_suffix(source, suffixes):
        found.setdefault(split_of(name) if by_name else "train", []).append((path, name))
    unnamed = found.pop(None, [])
    if found and unnamed:
        named = next(iter(found.values()))[0][1]
        raise ValueError(
            f"In {source} the name of {named} tells its split, and the name of {unnamed[0][1]} does not: rename the "
            "files or put them into folders such as train and val, or use --splits none to take all as train."
        )
    if unnamed:
        return {"train": unnamed}
    return {split: found[split] for split in sorted(split for split in found if split)}


def files_with_suffix(source: Path, suffixes: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return (path, path within SOURCE) of the files below SOURCE with these suffixes, sorted; SOURCE may be one.

    Links to folders are followed, each folder is searched once, and litter of other programs is left out. Raises
    ValueError for a pipe or a broken link.
    """
    if source.is_file():
        return [(str(source), source.name)] if source.name.lower().endswith(suffixes) else []
    prefix = os.path.join(source, "")
    found = []
    searched = set()
    for folder in walk(str(source)):
        real_path = os.path.realpath(folder.path)
        if real_path in searched:
            continue
        searched.add(real_path)
        for name in (*folder.files, *folder.special):
            path = os.path.join(folder.path, name)
            if name.lower().endswith(suffixes):
                if not os.path.isfile(path):
                    raise ValueError(f"{path} is a broken link or no regular file: repair or remove it.")
                found.append((path, path.removeprefix(prefix)))
    return sorted(found)


def split_of(name: str) -> str | None:
    """Return the split that a file's path within SOURCE tells; None if it tells none.

    The folders decide whose whole name is a word for a split, then the words of the file's name together with those
    of its folders. Raises ValueError if these are words for different splits.
    """
    *folders, file = name.split("/")
    whole = {split for folder in folders if (split := split_word(folder))}
    words = whole or splits_in(file) | {split for folder in folders for split in splits_in(folder)}
    if len(words) > 1:
        raise ValueError(
            f"The name {name} has words for the splits {' and '.join(sorted(words))}: rename the file or its folder, "
            "or use --splits none to take all files as train."
        )
    return next(iter(words), None)


def splits_in(name: str) -> set[str]:
    """Return the splits that words of the name stand for. A word is separated by anything but letters."""
    return {split for word in re.findall(r"[^\W\d_]+", name) if (split := split_word(word))}


class TarHeaders(io.BufferedReader):
    """A tar of which only headers are read: tarfile takes the memory that a header claims to have."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return super().read(size)


class TarMember(NamedTuple):
    """A file in a tar, or a link to one."""

    name: str
    offset: int  # of its content in the tar, in bytes
    size: int
    problem: str | None  # why its content is not there, such as "a link to no file in the tar"


def tar_members(path: str, start: int = 0, size: int | None = None) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset, size) of each file in an uncompressed tar, which may be a part of `path`.

    Raises ValueError for a damaged, truncated or compressed one, and for a file whose content is not in it.
    """
    for member in tar_contents(path, start, size):
        if member.problem:
            raise ValueError(f"{member.name} in {path} is {member.problem}: pack the files themselves.")
        yield member[:3]


def tar_contents(path: str, start: int = 0, size: int | None = None) -> Iterator[TarMember]:
    """Yield each member of an uncompressed tar, which may be a part of `path`, except for folders.

    A link, hard or symbolic, has the content of the file that it names. Raises ValueError for a damaged, truncated or
    compressed tar.
    """
    by_name: dict[str, list[tarfile.TarInfo]] | None = None
    for info in _headers(path, start, size):
        target: tarfile.TarInfo | None = info
        if info.islnk() or info.issym():
            if by_name is None:  # few tars have links: only those are read twice
                by_name = {}
                for each in _headers(path, start, size):
                    by_name.setdefault(posixpath.normpath(each.name), []).append(each)
            target = _follow(info, by_name)
        if info.isdir():
            continue
        if target is None:
            problem: str | None = "a link to no file in the tar"
        elif not target.isreg():
            problem = "no regular file"
        elif target.issparse():
            problem = "stored without its zeros (tar --sparse)"
        else:
            yield TarMember(info.name, target.offset_data, target.size, None)
            continue
        yield TarMember(info.name, 0, 0, problem)


def _follow(link: tarfile.TarInfo, by_name: dict[str, list[tarfile.TarInfo]]) -> tarfile.TarInfo | None:
    """Return the member that a link leads to; None if there is none."""
    member = link
    for _ in range(MOST_LINKS):
        if member.issym():
            folder = posixpath.dirname(member.name)
            found = by_name.get(posixpath.normpath(posixpath.join(folder, member.linkname)), [])
            position = len(found)  # of several members of one name the last one stays when a tar is unpacked
        elif member.islnk():
            found = by_name.get(posixpath.normpath(member.linkname), [])
            # A hard link is the file that had the name when the link was packed; or else one that comes later.
            position = max(1, bisect.bisect_left(found, member.offset, key=attrgetter("offset")))
        else:
            return member
        if not found:
            return None
        member = found[position - 1]
    return None


def _headers(path: str, start: int, size: int | None) -> Iterator[tarfile.TarInfo]:
    end = os.path.getsize(path) if size is None else start + size
    position: int | None = start
    try:
        with TarHeaders(io.FileIO(path)) as file:
            while position is not None:
                file.seek(position)
                with tarfile.open(fileobj=file, mode="r:") as archive:
                    while (member := archive.next()) is not None:
                        archive.members.clear()  # type: ignore[attr-defined]  # it would keep all of a million members
                        if not position < archive.offset <= end:
                            raise tarfile.ReadError(f"{member.name} ends after the end of the file")
                        position = archive.offset
                        yield member
                # At a damaged header tarfile stops as if the tar ended there: a real end is a block of zeros.
                file.seek(position)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError(f"damaged or cut off at byte {position:,}")
                position = _next_tar(file, start, position, end)
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is not a whole, uncompressed tar ({error}): download or copy it again.") from error


def _next_tar(file: BinaryIO, start: int, position: int, end: int) -> int | None:
    """Return where another tar begins after the end of one (`cat a.tar b.tar`); None if none does."""
    zeros = position
    while position < end:
        if position - zeros > MOST_ZEROS:
            raise tarfile.ReadError(f"more than {MOST_ZEROS:,} zeros at byte {zeros:,}")
        file.seek(position)
        block = file.read(min(SCANNED, end - position))
        content = block.lstrip(b"\0")
        if content or not block:
            position += len(block) - len(content)
            position -= (position - start) % tarfile.BLOCKSIZE
            break
        position += len(block)
    if position >= end:
        return None
    file.seek(position)
    try:
        tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
    except tarfile.HeaderError:  # zeros up to the end, or what an old tar left in its last block
        return None
    return position

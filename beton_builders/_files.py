"""What several builders share: folders of images, lists of images, labels, MATLAB files."""

import errno
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastssl.beton import Sample

# Every suffix of photographs and drawn or rendered images that Pillow reads. Not among them, though Pillow would open
# them: documents (.pdf, .psd; .eps and .ps start Ghostscript, .wmf a renderer), video (.mpg, .fli), icons (.ico, .icns,
# .cur), textures with mipmaps (.dds, .blp, .ftc), and arrays of measurements (.fits, .h5, .grib, .pfm).
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    *(".png", ".apng", ".gif", ".webp", ".avif", ".qoi"),
    *(".bmp", ".dib", ".tif", ".tiff", ".tga", ".pcx", ".ras", ".sgi"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
    *(".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
)
ARRAY_SUFFIX = ".npy"  # an image only where --channels asks for another number of channels than RGB's
# The words, in any case, by which the name of a folder or of a file tells its split: those of Hugging Face's datasets.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "development"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# What other programs leave in folders, in lower case; besides these all names that begin with a dot.
LITTER = frozenset(
    (
        *("__macosx", "icon\r", "network trash folder", "temporary items"),  # macOS
        *("thumbs.db", "thumbs.db:encryptable", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini"),  # Windows
        *("$recycle.bin", "recycler", "recycled", "system volume information", "found.000"),
        *("@eadir", "@tmp", "@sharebin", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "~snapshot"),  # NAS
        *("lost+found", "__pycache__", "picasa.ini", "pspbrwse.jbf"),  # Linux, Python, image viewers
    )
)
SAME_FOLDER = 1000  # times that symbolic links may lead to one folder: n links to links lead there 2^n times
UNLABELLED = -1
# What people write for "none", in any case, and what pandas and numpy write.
NO_LABEL_WORDS = frozenset(("", "-1", "-1.0", "none", "nan", "null", "na", "n/a", "<na>"))
BROKEN_LINK = (errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG)  # besides a link to what does not exist
LARGEST_TEXT = 1 << 30  # bytes of a list that is read whole; the largest, of iNaturalist, has 0.2 GB
MAX_LABEL = 10**6  # a larger number is not a class but, for example, the number of the image

# scipy.io.loadmat crashes the process on some damaged files (SIGSEGV within a few hundred mutated files, scipy 1.17),
# and a small file may claim to unpack to any size.
READ_MAT_SAFELY = """
import resource, sys
from scipy.io import loadmat
resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
names = sys.argv[2:]
missing = set(names) - set(loadmat(sys.argv[1], variable_names=names))
sys.exit(f"it has no {min(missing)}" if missing else 0)
"""


def split_word(name: str) -> str | None:
    """Return the split that `name`, all of it, is a word for; None if it is no such word."""
    return SPLIT_WORDS.get(name.lower())


def is_no_label(text: str) -> bool:
    return text.strip().lower() in NO_LABEL_WORDS


def number_classes(labels: Iterable[str]) -> tuple[list[str], dict[str, int]]:
    """Return the names of the classes, sorted, and the number of each label's class.

    If all labels are numbers they are sorted as numbers, and whole ones that are written as 2.0 name the class 2. A
    label that stands for none has the number UNLABELLED and is no class.
    """
    numbers = {label: UNLABELLED for label in labels}
    named = [label for label in numbers if not is_no_label(label)]
    numeric = all(re.fullmatch(r"-?[0-9]{1,18}(\.[0-9]{1,18})?", label, re.ASCII) for label in named)
    class_of = {label: re.sub(r"\.0+$", "", label) if numeric else label for label in named}
    names = sorted(set(class_of.values()))
    if numeric:
        names.sort(key=Decimal)
    position = {name: number for number, name in enumerate(names)}
    return names, numbers | {label: position[name] for label, name in class_of.items()}


def find_folder(builder: str, source: Path, below: Sequence[str], holds: Sequence[str], fix: str) -> Path:
    """Return the first of the folders `below` SOURCE ("" is SOURCE itself) with all files or folders in `holds`.

    fix: what the message of the FileNotFoundError says how to get them.
    """
    for folder in below:
        found = [source / folder / name for name in holds]
        if all(path.is_file() or path.is_dir() for path in found):  # and no pipe
            return source / folder
    others = "".join(f" or {folder}/ in it" for folder in below if folder)
    raise FileNotFoundError(f"{builder} found no {' and '.join(holds)} in {source}{others}: {fix}.")


def is_litter(name: str) -> bool:
    """Whether a file or folder of this name is hidden or left behind by another program: no builder reads it."""
    return name.startswith(".") or name.lower() in LITTER


def has_image_suffix(name: str, arrays: bool = False) -> bool:
    return name.lower().endswith((*IMAGE_SUFFIXES, ARRAY_SUFFIX) if arrays else IMAGE_SUFFIXES)


def is_image(name: str, arrays: bool = False) -> bool:
    return has_image_suffix(name, arrays) and not is_litter(name)


class Folder(NamedTuple):
    """What a folder holds. Symbolic links count as what they lead to; a broken link is a file that cannot be read."""

    path: str
    files: list[str]  # names, sorted
    folders: list[str]
    special: list[str]  # pipes, sockets and devices, which are never opened
    litter: str | None = None  # the name of the outermost folder of litter that it is or lies in


def walk(top: str, litter: bool = False) -> Iterator[Folder]:
    """Yield `top` and every folder below it, each before its subfolders, these sorted by name.

    Links to folders are followed, except to one that the link itself lies in. Litter is left out unless `litter` is
    set. Raises OSError for a folder that cannot be read, and ValueError for one that is linked more than SAME_FOLDER
    times.
    """
    # Strings, not Path objects, which take several times as long.
    reached: Counter[tuple[int, int]] = Counter()
    waiting: list[tuple[str, bool, str | None]] = [(top, False, None)]
    while waiting:
        path, below_link, inside = waiting.pop()
        folder, links = _read_folder(path, litter, inside)
        # Only a link can lead back, and some network file systems give all folders the same number.
        if below_link:
            if _is_loop(path):
                continue
            status = os.stat(path)
            reached[status.st_dev, status.st_ino] += 1
            if reached[status.st_dev, status.st_ino] > SAME_FOLDER:
                raise ValueError(f"More than {SAME_FOLDER} symbolic links lead to {path}: remove links.")
        yield folder
        for name in reversed(folder.folders):
            outermost = inside or (name if is_litter(name) else None)
            waiting.append((os.path.join(path, name), below_link or name in links, outermost))


def _read_folder(path: str, litter: bool = True, inside: str | None = None) -> tuple[Folder, set[str]]:
    """Return the folder, and the names of its subfolders that are links."""
    files, folders, special, links = [], [], [], set()
    with os.scandir(path) as entries:
        for entry in entries:
            if not litter and is_litter(entry.name):
                continue
            try:
                if entry.is_file():
                    files.append(entry.name)
                elif entry.is_dir():
                    folders.append(entry.name)
                    if entry.is_symlink():
                        links.add(entry.name)
                elif entry.is_symlink() and not os.path.exists(entry.path):
                    files.append(entry.name)
                else:
                    special.append(entry.name)
            except OSError as error:
                if error.errno not in BROKEN_LINK:
                    raise
                files.append(entry.name)
    return Folder(path, sorted(files), sorted(folders), special, inside), links


def _is_loop(path: str) -> bool:
    """Whether a folder is one of those that it lies in, which a link makes possible."""
    status = os.stat(path)
    path = os.path.abspath(path)
    while path != os.path.dirname(path):
        path = os.path.dirname(path)
        if os.path.samestat(status, os.stat(path)):
            return True
    return False


def image_paths(folder: str, arrays: bool = False) -> Iterator[str]:
    """Yield every image in `folder` and below it: the files of a folder first, then its subfolders, sorted by name."""
    for path, files, *_ in walk(folder):
        prefix = os.path.join(path, "")
        for name in files:
            if has_image_suffix(name, arrays):
                yield prefix + name


def holds_images(folder: str, arrays: bool = False) -> bool:
    """Whether there is an image in the folder or below it."""
    return next(image_paths(folder, arrays), None) is not None


def split_folders(builder: str, source: Path) -> dict[str, str]:
    """Return, for the splits train, val and test, the folder in SOURCE whose name is a word for it.

    Raises ValueError for two folders of one split, such as valid and validation.
    """
    found: dict[str, str] = {}
    for name in class_folders(source):
        split = split_word(name)
        if split is not None and found.setdefault(split, name) != name:
            raise ValueError(
                f"{source} holds {found[split]}/ and {name}/, and {builder} takes both for the split {split}: move or "
                "rename one of them."
            )
    return {split: found[split] for split in ("train", "val", "test") if split in found}


def samples_by_class(source: Path, folders: Iterable[str]) -> Iterator[Sample]:
    """Yield the images in and below each of the folders of SOURCE; the n-th folder has label n."""
    prefix = os.path.join(source, "")
    for label, folder in enumerate(folders):
        for path in image_paths(os.path.join(prefix, folder)):
            yield Sample(path, label, path.removeprefix(prefix))


def class_folders(folder: Path) -> list[str]:
    """Return the names of the subfolders without litter, sorted."""
    return _read_folder(str(folder), litter=False)[0].folders


def parse_lines(
    path: Path, pattern: str, expected: str, fix: str, labels: Mapping[str, int] | None = None
) -> Iterator[tuple[str, int]]:
    """Yield (name, label) of each line of a list of images; empty lines are skipped.

    pattern: a regular expression with the groups `name` and `label`; `label` is a number, or a key of `labels`.
    Raises ValueError, with the line, what was `expected` and the `fix`, for a line that does not match.
    """
    for number, line in enumerate(read_lines(path), 1):
        match = re.fullmatch(pattern, line, re.ASCII)
        if line and (match is None or (labels is not None and match["label"] not in labels)):
            raise ValueError(f"Line {number} of {path} must be {expected}, not {line[:60]!r}: {fix}.")
        if match:
            yield match["name"], int(match["label"]) if labels is None else labels[match["label"]]


def read_lines(path: Path) -> list[str]:
    """Return the lines of a small UTF-8 text file, stripped, without empty ones at its end."""
    try:
        return [line.strip() for line in read_text(path).rstrip().split("\n")]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing: unpack the archive again.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file ({error}): unpack the archive again.") from error


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file. Raises ValueError if it is no regular file, or a very large one."""
    if path.exists() and not path.is_file():  # a pipe would wait, a device might have no end
        raise ValueError(f"{path} is no regular file: unpack the archive again.")
    if path.stat().st_size > LARGEST_TEXT:
        raise ValueError(f"{path} has {path.stat().st_size / 1e9:,.1f} GB, more than a list: unpack the archive again.")
    return path.read_text(encoding="utf-8")


def unpack(archive: tarfile.TarFile, folder: str, names: Sequence[str] | None = None) -> None:
    """Write the regular files of a tar, or only those with these names, to a folder, and nothing outside of it.

    That is tarfile's filter "data", which the Python 3.11.2 of Debian 12 lacks. Raises KeyError for a name that is
    missing, tarfile.TarError for a path that leads elsewhere or no regular file.
    """
    members = archive.getmembers() if names is None else [archive.getmember(name) for name in names]
    for member in members:
        path = Path(folder, member.name)
        if member.isdir():
            continue
        if not member.isfile() or not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
            raise tarfile.ReadError(f"{member.name} is no file in it")
        path.parent.mkdir(parents=True, exist_ok=True)
        content = archive.extractfile(member)
        assert content is not None  # as it is a regular file
        with content, open(path, "wb") as target:
            shutil.copyfileobj(content, target)


def read_mat(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """Return the variables `names` of a MATLAB file, as scipy.io.loadmat does.

    Raises ValueError for a file that is damaged or lacks one of them. A process of its own reads the file first.
    """
    from scipy.io import loadmat

    if not path.is_file():
        raise ValueError(f"{path} is missing or no regular file: download it again.")
    command = [sys.executable, "-W", "ignore", "-c", READ_MAT_SAFELY, str(path), *names]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.split("\n") if done.returncode > 0 else ["the reader crashed"]
        reason = [line for line in lines if line.strip()][-1]
        raise ValueError(f"{path} cannot be read as a MATLAB file ({reason}): download it again.")
    content = loadmat(path, variable_names=names)
    return {name: content[name] for name in names}


def whole_numbers(path: Path, name: str, value: Any, low: int, high: int) -> np.ndarray:
    """Return a MATLAB array as int64 (N,). Raises ValueError unless all of it are whole numbers in [low, high]."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "uif":
        numbers = value.reshape(-1, order="F")
        if ((numbers >= low) & (numbers <= high) & (numbers == np.floor(numbers))).all():
            return numbers.astype(np.int64)
    raise ValueError(f"{path} does not hold whole numbers from {low:,} to {high:,} as {name}: download it again.")

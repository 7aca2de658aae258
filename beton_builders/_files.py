"""What several builders share: folders of images, lists of images, labels, MATLAB files."""

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from fastssl.beton import Sample

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
# The words, in any case, by which the name of a folder or of a file tells its split: those of Hugging Face's datasets.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "development"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
UNLABELLED = -1
# What people write for "none", in any case, and what pandas and numpy write.
NO_LABEL_WORDS = frozenset(("", "-1", "-1.0", "none", "nan", "null", "na", "n/a", "<na>"))
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
        if all((source / folder / name).exists() for name in holds):
            return source / folder
    others = "".join(f" or {folder}/ in it" for folder in below if folder)
    raise FileNotFoundError(f"{builder} found no {' and '.join(holds)} in {source}{others}: {fix}.")


def is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


def image_paths(folder: str) -> Iterator[str]:
    """Yield every image in `folder` and below it: the files of a folder first, then its subfolders, sorted by name."""
    # Strings, not Path objects: a million files are listed in 4 seconds instead of 16. Unless its error is raised,
    # os.walk skips a folder that it cannot read.
    for parent, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if is_image(name):
                yield os.path.join(parent, name)


def _raise(error: OSError) -> NoReturn:
    raise error


def samples_by_class(source: Path, folders: Iterable[str]) -> Iterator[Sample]:
    """Yield the images in and below each of the folders of SOURCE; the n-th folder has label n."""
    prefix = os.path.join(source, "")
    for label, folder in enumerate(folders):
        for path in image_paths(os.path.join(prefix, folder)):
            yield Sample(path, label, path.removeprefix(prefix))


def class_folders(folder: Path) -> list[str]:
    """Return the names of the subfolders, sorted; hidden ones are ignored."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


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
        return [line.strip() for line in path.read_text(encoding="utf-8").rstrip().split("\n")]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing: unpack the archive again.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file ({error}): unpack the archive again.") from error


def read_mat(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """Return the variables `names` of a MATLAB file, as scipy.io.loadmat does.

    Raises ValueError for a file that is damaged or lacks one of them. A process of its own reads the file first.
    """
    from scipy.io import loadmat

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

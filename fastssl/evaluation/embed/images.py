"""The images that are embedded: those of a folder, of a list of paths, or of a .beton."""

import importlib
import os
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastssl.beton.accounting import account_for_files
from fastssl.beton.format import UNLABELLED
from fastssl.beton.source import Sample, SampleList, SourceSplit, as_utf8
from fastssl.common.errors import UserError
from fastssl.common.files import UnsafeFile, open_regular
from fastssl.common.terminal import Advance, progress

LONGEST_LINE = 1 << 20  # characters of a list
LISTED_AT_A_TIME = 10_000  # files, between two updates of the progress


class BadImage(NamedTuple):
    """An image that cannot be embedded."""

    name: str
    reason: str


class ImageFiles(NamedTuple):
    """The image files of a folder or of a list, in order. A million take about 120 MB."""

    path: Path  # the folder or the list
    samples: SampleList
    bad: list[BadImage]  # lines of a list that name a file in a folder that does not exist
    arrays: bool  # whether .npy files are images

    def account(self, embedded: int, bad: int) -> str:
        """Say what happened to each file of the folder, or to each line of the list."""
        if not self.path.is_dir():
            return f"Of {embedded + bad:,} images of {self.path}: {embedded:,} embedded, {bad:,} bad."
        split = SourceSplit("images", [], self.samples, np.arange(len(self.samples)), [], {})
        return account_for_files("embed", self.path, [split], embedded, bad, "embedded", self.arrays)


def list_images(path: Path, arrays: bool = False) -> ImageFiles:
    """List the images of a folder, at any depth, or of a text file with one path per line; or one image.

    In a folder, the rules of build-beton say which files are images, with `arrays` also .npy files. Relative paths of a
    list start at its folder. No image is opened.

    Raises:
        UserError: the folder or the list cannot be read, or there is no image.
    """
    rules = importlib.import_module("beton_builders._files")  # not at the start: it imports fastssl.beton
    bad: list[BadImage] = []
    found: Iterator[tuple[str, str]]
    if path.is_dir():
        prefix = os.path.join(path, "")
        found = ((image, image.removeprefix(prefix)) for image in rules.image_paths(str(path), arrays))
    elif rules.has_image_suffix(path.name, arrays):
        found = iter([(str(path), path.name)])
    else:
        found = _paths_in_list(path, bad)
    try:
        with progress(f"Listing {path}", None) as advance:
            samples = SampleList(_samples(found, advance))
    except UnsafeFile as error:
        raise UserError(
            f"{path} is {error.strerror}", hint="name a folder, a list of paths, an image or a .beton"
        ) from error
    except OSError as error:
        file = os.fsdecode(error.filename or path)
        raise UserError(f"{file} cannot be read ({error.strerror})", hint="make it readable for your user") from error
    except ValueError as error:  # too many links to one folder
        raise UserError(str(error), hint="name another folder, or a list of paths") from error
    images = ImageFiles(path, samples, bad, arrays)
    if not len(samples) and not bad:
        betons = ", ".join(sorted(file.name for file in path.glob("*.beton"))) if path.is_dir() else ""
        fix = f"name one of its files, {betons}" if betons else "name another folder, a list of paths or a .beton"
        raise UserError(f"{path} holds no images ({images.account(0, 0).rstrip('.')})", hint=fix)
    return images


def _samples(found: Iterator[tuple[str, str]], advance: Advance) -> Iterator[Sample]:
    for number, (image, name) in enumerate(found, 1):
        yield Sample(image, UNLABELLED, as_utf8(name))
        if number % LISTED_AT_A_TIME == 0:
            advance(LISTED_AT_A_TIME)


def _paths_in_list(path: Path, bad: list[BadImage]) -> Iterator[tuple[str, str]]:
    """Yield (path, line) of each line of a list; empty lines and those that begin with # are skipped.

    Where the folder of a path does not exist, the line is added to `bad`.
    """
    folder_exists = lru_cache(maxsize=1000)(os.path.isdir)
    is_first = True
    with open_regular(path, "r", encoding="utf-8-sig", errors="surrogateescape") as file:
        for line in iter(partial(file.readline, LONGEST_LINE), ""):
            name = line.rstrip("\r\n")
            if "\0" in name or len(line) == LONGEST_LINE:
                raise UserError(
                    f"{path} is no folder, no .beton and no text file with one path per line", hint="name one of these"
                )
            if not name.strip() or name.startswith("#"):
                continue
            image = os.path.join(path.parent, name)
            if is_first and not os.path.lexists(image) and os.path.lexists(name):
                raise UserError(
                    f"{path} names {as_utf8(name)}, which is in the current folder but not in {path.parent}, where its "
                    "relative paths start",
                    hint="write absolute paths, or move the list",
                )
            is_first = False
            if folder_exists(os.path.dirname(image)):
                yield image, name
            else:
                bad.append(BadImage(as_utf8(name), "missing: its folder does not exist"))

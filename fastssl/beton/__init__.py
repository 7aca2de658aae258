"""The .beton file: one file with all images of a split, in FFCV's format.

    build.py       build_beton: a builder lists the images, workers encode and write them
    forecast.py    what a build would give
    builders.py    the builders, found by name; listing.py what they list, in little memory
    images.py      one image: decode, convert, resize, encode; jpeg.py the loader's own decoder
    pool.py        the worker processes; progress.py how far they are
    unfinished.py  a file that is being built, kept so that a build that was stopped goes on
    write.py       the pages and tables of one file; format.py their dtypes
    read.py        what a file holds, checked before compiled code follows its pointers
    inspection.py  what a file holds, as tables for a person; sheet.py some of its images, drawn
    verification.py  every image decoded and compared with the checksum its build left
    index_list.py  subsets: lists of names, as indices

Two layouts. "canvas": every image resized to one square, stored as pixels up to 64 px, as JPEG
above. "full": a JPEG that fits is stored with its own bytes, others are shrunk to fit and encoded.

Every file has the fields `image`, `label`, `index` (the position in the builder's order, before
bad images are skipped), and `height` and `width` of the source after its EXIF rotation, in px.
Stock FFCV reads these files. Beside X.beton lie X.beton.json (how it was built, its classes, a
checksum a sample) and X.beton.names.txt (line i + 1: the name of the image of index i).
"""

from fastssl.beton.build import SplitReport, build_beton
from fastssl.beton.builders import builder_names, describe_builders
from fastssl.beton.estimate import BuildEstimate, estimate_build
from fastssl.beton.index_list import read_index_list
from fastssl.beton.inspection import Summary, inspect_beton, subset_table, summary_tables
from fastssl.beton.read import (
    BetonInfo,
    data_checksum,
    read_header,
    read_labels,
    read_metadata,
    read_names,
    read_samples,
)
from fastssl.beton.sample import Sample
from fastssl.beton.sheet import draw_samples, draw_sheet
from fastssl.beton.verification import Verification, verify

__all__ = [
    "BetonInfo",
    "BuildEstimate",
    "Sample",
    "SplitReport",
    "Summary",
    "Verification",
    "build_beton",
    "builder_names",
    "data_checksum",
    "describe_builders",
    "draw_samples",
    "draw_sheet",
    "estimate_build",
    "inspect_beton",
    "read_header",
    "read_index_list",
    "read_labels",
    "read_metadata",
    "read_names",
    "read_samples",
    "subset_table",
    "summary_tables",
    "verify",
]

"""The .beton file: one file with all images of a split, in FFCV's format.

    build.py          build_beton; file_build.py builds one file; options.py; estimate.py estimates size and time
    source.py         the builders, and the samples that they list
    listing.py        what they found; shared_list.py: the list that processes share, each of which builds a shard
    slurm.py          builds shards as jobs of a cluster
    pool.py           the worker processes, which encode images and write them to the file
    images.py         one image: decode, convert, resize, encode; jpeg.py decodes as the loader does, resize.py resizes
    bc4.py            compresses a canvas to blocks that need no entropy decoding, and decodes them
    partial_build.py  a file that is being built; a build that was stopped resumes with it
    format.py         the layout of the file: the types of its tables, and how they are written
    read.py           reads a file or a set of shards; parts.py maps its files one after the other
    tables.py         checks the tables before compiled code follows their pointers
    manifest.py       the schema of X.beton.json, which may come from elsewhere; set_manifest.py: that of a set
    index_list.py     subsets: lists of names, as indices
    inspection.py     the contents of a file as tables; sheet.py draws some of its images
    verification.py   decodes every image and compares it with its checksum

There are two layouts. "canvas": every image is resized to one square, stored as pixels up to 64 px and in BC4 above.
"full": a JPEG that fits is stored with its own bytes, others are shrunk to fit and encoded.

Every file has the fields `image`, `label`, `index` (the position in the builder's order, counted before bad images are
skipped), and `height` and `width` of the source after its EXIF rotation, in px. Stock FFCV reads these files. In the
same folder are X.beton.json (how X.beton was built, its classes, a checksum per sample) and X.beton.names.txt
(line i + 1: the name of the image with index i). Of a data set in shards, see shards.py.
"""

from fastssl.beton.build import BuildReport, build_beton
from fastssl.beton.estimate import BuildEstimate, estimate_build
from fastssl.beton.file_build import SplitReport
from fastssl.beton.index_list import read_index_list
from fastssl.beton.inspection import inspect_beton, subset_table
from fastssl.beton.options import BuildOptions, recorded_plan
from fastssl.beton.read import (
    BetonInfo,
    beton_file,
    data_checksum,
    has_split,
    read_header,
    read_labels,
    read_metadata,
    read_names,
    read_samples,
)
from fastssl.beton.sheet import draw_samples, draw_sheet
from fastssl.beton.source import LeftOut, Sample, builder_names, describe_builders
from fastssl.beton.verification import verify

__all__ = [
    "BetonInfo",
    "BuildEstimate",
    "BuildOptions",
    "BuildReport",
    "LeftOut",
    "Sample",
    "SplitReport",
    "beton_file",
    "build_beton",
    "builder_names",
    "data_checksum",
    "describe_builders",
    "draw_samples",
    "draw_sheet",
    "estimate_build",
    "has_split",
    "inspect_beton",
    "read_header",
    "read_index_list",
    "read_labels",
    "read_metadata",
    "read_names",
    "read_samples",
    "recorded_plan",
    "subset_table",
    "verify",
]

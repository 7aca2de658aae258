"""The .beton file: one file with all images of a split, in FFCV's format.

    build.py     build_beton: a builder lists the images, workers encode them, one process writes
    images.py    one image: decode, convert, resize, encode
    builders.py  the builders, found by name
    pool.py      the worker processes; progress.py how far they are
    write.py     the pages and tables of one file; format.py their dtypes
    read.py      what a file holds, checked before compiled code follows its pointers

Two layouts. "canvas": every image resized to one square, stored as pixels up to 64 px, as JPEG
above. "full": a JPEG that fits is stored with its own bytes, others are shrunk to fit and encoded.

Every file has the fields `image`, `label`, `index` (the position in the builder's order, before
bad images are skipped), and `height` and `width` of the source after its EXIF rotation, in px.
Stock FFCV reads these files. Beside X.beton lies X.beton.json: how it was built, and its classes.
"""

from .build import SplitReport, build_beton
from .read import BetonInfo, read_header, read_labels, read_metadata, read_samples
from .sample import Sample

__all__ = [
    "BetonInfo",
    "Sample",
    "SplitReport",
    "build_beton",
    "read_header",
    "read_labels",
    "read_metadata",
    "read_samples",
]

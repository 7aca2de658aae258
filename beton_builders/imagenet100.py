"""ImageNet-100: 126,689 training and 5,000 validation images in 100 classes of ImageNet.

The 100 classes that Tian et al., Contrastive Multiview Coding, 2019, drew from ImageNet-1k; they are listed in
imagenet100.txt next to this file.

SOURCE is that of the builder imagenet: the folder with the official tars, with train/ and val/, or Kaggle's; see there
for the archives, their checksums and the terms. Other classes are skipped. Class names are the WordNet ids, sorted;
labels are from 0 to 99 in that order. Order of the samples: by class and file name.
"""

from pathlib import Path

from beton_builders import Splits
from beton_builders.imagenet import LABEL_FILES as LABEL_FILES
from beton_builders.imagenet import SOURCE as SOURCE
from beton_builders.imagenet import find_splits

CANVAS = 256


def splits(source: Path) -> Splits:
    return find_splits("imagenet100", source, wanted=class_names())


def class_names() -> list[str]:
    lines = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").split("\n")
    return sorted(line for line in lines if line and not line.startswith("#"))

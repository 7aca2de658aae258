"""A data set of your own: images whose classes are in a table, `path,class`, converted to train.beton.

python examples/labels_in_a_table.py PHOTOS/labels.csv data/photos

The paths of the table are relative to its folder. As a file of beton_builders/, the part above `main` is the builder
labels_in_a_table of `fastssl build-beton`.
"""

import argparse
import csv
from pathlib import Path

import beton_builders
from fastssl.beton import Sample, build_beton

CANVAS = 64
SOURCE = "the table, a .csv file with the columns path and class"


def splits(source: Path) -> beton_builders.Splits:
    with open(source, newline="") as file:
        rows = list(csv.DictReader(file))
    classes = sorted({row["class"] for row in rows})
    samples = [Sample(source.parent / row["path"], classes.index(row["class"]), row["path"]) for row in rows]
    return {"train": (classes, samples)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help=SOURCE)
    parser.add_argument("out", type=Path, help="folder for train.beton")
    options = parser.parse_args()
    beton_builders.__path__.append(str(Path(__file__).parent))  # builders are found by name in this package
    build_beton("labels_in_a_table", options.table, options.out)


if __name__ == "__main__":
    main()

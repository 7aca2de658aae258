"""Print the photographs of a folder that are most like one of them, by the cosine of their representations.

python examples/nearest_photographs.py runs/photos PHOTOS PHOTOS/holiday/0001.jpg
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

import fastssl

BATCH = 64
SUFFIXES = (".jpg", ".jpeg", ".png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run directory of fastssl train")
    parser.add_argument("photographs", type=Path, help="folder of JPEG and PNG files, at any depth")
    parser.add_argument("query", type=Path, help="one photograph")
    parser.add_argument("--count", type=int, default=5, help="photographs to print")
    options = parser.parse_args()
    model = fastssl.load_model(options.run)
    paths = sorted(path for path in options.photographs.rglob("*") if path.suffix.lower() in SUFFIXES)
    h_ND = torch.cat([model.embed(paths[i : i + BATCH]).h for i in range(0, len(paths), BATCH)])
    query_1D = model.embed([options.query]).h
    similarity_N = F.cosine_similarity(h_ND, query_1D)
    for i in similarity_N.argsort(descending=True)[: options.count]:
        print(f"{similarity_N[i]:.3f}\t{paths[i]}")


if __name__ == "__main__":
    main()

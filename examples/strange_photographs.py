"""Print the photographs of a folder that are least like the images that a run was trained on, the strangest first.

python examples/strange_photographs.py runs/photos PHOTOS --count 20
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np


def main() -> None:
    # Here, not at the top: the processes that convert images import this file, and need no torch.
    from fastssl.evaluation.embed import embed_images, load_embedder

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run directory of fastssl train")
    parser.add_argument("photographs", help="folder of images, at any depth")
    parser.add_argument("--count", type=int, default=20, help="photographs to print")
    parser.add_argument("--score", default="layers_unlabelled", help="detector; docs/ood.md has all")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "scores.npz"
        embed_images(load_embedder(options.run), options.photographs, out, score=options.score)
        with np.load(out) as file:
            names, score = file["name"], file["score"]
    for position in np.argsort(-score)[: options.count]:
        print(f"{score[position]:.4g}\t{Path(options.photographs) / names[position]}")


if __name__ == "__main__":
    main()

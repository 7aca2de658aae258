"""Train with an objective of your own: the loader, the views and the model of fastssl in a loop of PyTorch.

python examples/custom_objective.py data/photos/train.beton --size 64 --epochs 5

The objective here is alignment and uniformity (Wang and Isola, arXiv 2005.10242, section 4.1). docs/extend.md
says how to make an objective a part of recipes.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.loading import BetonLoader
from fastssl.models import ModelInput, SSLModel
from fastssl.recipe import make_recipe
from fastssl.views import PairedViews


def align_and_spread(z1: Tensor, z2: Tensor) -> Tensor:
    """Embeddings (B, D) of both views -> alignment of the two views plus uniformity of each, a scalar."""
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    alignment = (z1 - z2).square().sum(1).mean()
    uniformity = [torch.pdist(z).square().mul(-2).exp().mean().log() for z in (z1, z2)]
    return alignment + (uniformity[0] + uniformity[1]) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("beton", help="file of fastssl build-beton")
    parser.add_argument("--size", type=int, default=64, help="side of the views in px")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--backbone", default="resnet18", help="of timm")
    options = parser.parse_args()
    recipe = make_recipe({
        "name": "custom", "data": {"train": options.beton}, "views": {"size": options.size},
        "model": {"backbone": options.backbone, "projector": {"hidden": 256, "out": 64}},
    })  # fmt: skip
    loader = BetonLoader(options.beton, options.batch_size, seed=0)
    make_views = PairedViews(recipe.views, seed=0)
    torch.manual_seed(0)
    model = SSLModel(recipe).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    for epoch in range(options.epochs):
        loader.set_epoch(epoch)
        for step, batch in enumerate(loader, epoch * len(loader)):
            pair = make_views(batch.image, batch.index, epoch, batch.height, batch.width)
            first, second = model(ModelInput(pair, batch.label, batch.index, torch.tensor(step)))
            loss = align_and_spread(first.z, second.z)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}", flush=True)


if __name__ == "__main__":
    main()

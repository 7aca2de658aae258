"""What a training step sends between GPUs and stores in their memory, counted, not timed: for docs/scaling.md.

python benchmarks/scaling.py --out records/scaling.md

Sent: one real step of each recipe in a fake process group of N ranks, in which every collective call is counted with
its bytes. Stored: the tensors that autograd saves for the backward pass of one step under bf16 autocast, at two batch
sizes, whose difference gives the cost per image; weights, gradients and AdamW's two moments follow from the parameters.
In eager mode: torch.compile stores less.
"""

import argparse
import inspect
import platform
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from fastssl.models import ModelInput, SSLModel, convert_batch_norms
from fastssl.objectives import TotalLoss
from fastssl.recipe import Recipe, load_recipe

RECIPES = [
    "recipes/barlow.yaml", "recipes/zprob_barlow.yaml", "recipes/hprob_barlow.yaml", "recipes/zprob_vicreg.yaml",
    "recipes/beyond/zprob_simclr.yaml", "recipes/beyond/resnet50_zprob_barlow.yaml",
]  # fmt: skip
GPUS = [(2, 256), (4, 256), (8, 256), (8, 2048), (16, 2048), (32, 2048), (64, 2048)]  # and the global batch
MB = 1e6


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, help="write the tables here as Markdown")
    out = arguments.parse_args().out
    lines = [
        "# What a step sends and stores",
        "",
        f"`python benchmarks/scaling.py`, torch {torch.__version__}, {platform.machine()}: counted, not timed.",
        "",
        "## Stored in a GPU's memory",
        "",
        "| recipe | parameters, millions | weights, gradients, AdamW: MB | saved for the backward pass, MB per image |",
        "|---|---|---|---|",
    ]
    for name in RECIPES:
        recipe = load_recipe(name)
        count, per_image = parameters(recipe), saved_per_image(recipe)
        lines.append(f"| {short(name)} | {count / 1e6:.1f} | {4 * 4 * count / MB:.0f} | {per_image / MB:.1f} |")
        print(lines[-1], flush=True)
    lines += [
        "",
        "## Sent by each GPU per step, with train.sync_bn, in MB (calls)",
        "",
        "Gradients: 2 (N - 1) / N of their bytes, as in a ring all-reduce; half of that with train.compress_gradients. "
        "Statistics: what loss and batch norms exchange in the forward and backward passes, counted in the same way.",
        "",
        "| recipe | GPUs | global batch | gradients | loss statistics | batch-norm statistics |",
        "|---|---|---|---|---|---|",
    ]
    for name in RECIPES[:4]:
        recipe = load_recipe(name)
        for world, batch in GPUS:
            loss, norms = sent(recipe, world, batch // world)
            ring = 2 * (world - 1) / world
            gradients = 4 * parameters(recipe) * ring / MB
            lines.append(
                f"| {short(name)} | {world} | {batch} | {gradients:.0f} "
                f"| {loss['bytes'] * ring / MB:.1f} ({loss['calls']}) "
                f"| {norms['bytes'] * ring / MB:.2f} ({norms['calls']}) |"
            )
            print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    if out:
        out.write_text(text)


def short(name: str) -> str:
    return name.removeprefix("recipes/").removesuffix(".yaml")


def parameters(recipe: Recipe) -> int:
    return sum(p.numel() for p in SSLModel(recipe).parameters() if p.requires_grad)


def saved_per_image(recipe: Recipe, batches: tuple[int, int] = (4, 8)) -> float:
    """Return the bytes that autograd saves per image (both views), from the difference between two batch sizes."""
    model, total_loss = SSLModel(recipe), TotalLoss(recipe)
    saved = []
    for batch in batches:
        bytes_of: dict[int, int] = {}  # by the storage's address

        def record(tensor: torch.Tensor, bytes_of: dict[int, int] = bytes_of) -> torch.Tensor:
            storage = tensor.untyped_storage()
            bytes_of[storage.data_ptr()] = storage.nbytes()
            return tensor

        inputs = random_input(batch, recipe.views.size)
        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16):
                views = model(inputs)
            terms = total_loss(views, model.priors, inputs.step)
        saved.append(sum(bytes_of.values()))
        del views, terms
    return (saved[1] - saved[0]) / (batches[1] - batches[0])


def random_input(batch: int, size: int) -> ModelInput:
    views = tuple(torch.randn(2, batch, 3, size, size))
    return ModelInput(views, torch.full((batch,), -1), torch.arange(batch), torch.tensor(0))


def sent(recipe: Recipe, world: int, batch: int) -> tuple[Counter, Counter]:
    """Count bytes and calls of one step's collectives: those of the loss, and those of the batch norms.

    The images are small, because the size of the statistics does not depend on theirs.
    """
    of_loss, of_norms = Counter(), Counter()

    def all_reduce(tensor, *_):
        (of_norms if in_batch_norm() else of_loss).update(bytes=tensor.nbytes, calls=1)
        tensor.mul_(world)  # as if all ranks had the same batch

    def all_gather(parts, tensor):
        # A ring all-gather sends each part once, a ring all-reduce twice.
        of_loss.update(bytes=tensor.nbytes * world / 2, calls=1)
        for part in parts:
            part.copy_(tensor)

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        with mock.patch.object(dist, "all_reduce", all_reduce), mock.patch.object(dist, "all_gather", all_gather):
            model, inputs = convert_batch_norms(SSLModel(recipe)), random_input(batch, 32)
            TotalLoss(recipe)(model(inputs), model.priors, inputs.step)["loss"].backward()
    finally:
        dist.destroy_process_group()
    return of_loss, of_norms


def in_batch_norm() -> bool:
    return any(frame.function in ("forward", "backward") and "sync_bn" in frame.filename for frame in inspect.stack(0))


if __name__ == "__main__":
    main()

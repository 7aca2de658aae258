"""What training measures of itself: its speed, and the rank of what it makes."""

import time
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fastssl.loading import BetonLoader

from .distributed import of_all_processes


@torch.no_grad()
def rankme(z_BD: Tensor) -> float:
    """RankMe (arXiv 2210.02885, equation 1): the effective rank of embeddings, from 1 to min(B, D).

    exp of the entropy of the singular values as shares of their sum. Collapsed embeddings have few; all zeros have 1. A
    training batch bounds it by B, so it compares runs of one batch size; the paper takes 25,600 samples. NaN for
    embeddings that are not finite.
    """
    z_BD = z_BD.detach().double()
    if not z_BD.isfinite().all():
        return float("nan")
    # The roots of the smaller Gram matrix's eigenvalues: at 1024 x 4048 a fifth of svdvals' time, equal to 1e-6.
    gram = z_BD @ z_BD.T if len(z_BD) < z_BD.shape[1] else z_BD.T @ z_BD
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    shares = singular / singular.sum().clamp_min(1e-300) + 1e-7
    return max(1.0, (-shares * shares.log()).sum().exp().item())


class Meter:
    """Images per second and the share of time spent waiting for the loader, since the last reading."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        self.images, self.waited, self.since = 0, 0.0, time.perf_counter()

    def watch(self, loader: Iterable) -> Iterator:
        """The loader's batches; the time inside the loader counts as waiting."""
        batches = iter(loader)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited += time.perf_counter() - asked
            yield batch

    def read(self, loader: BetonLoader) -> dict[str, float]:
        """Since the last reading, over all processes: the one that waits most holds up the others."""
        seconds = time.perf_counter() - self.since
        of_each = of_all_processes(torch.tensor([self.waited / seconds, loader.bad_samples], dtype=torch.float64))
        figures = {"images_per_second": self.images / seconds, "data_wait": of_each[:, 0].max().item()}
        bad = of_each[:, 1]
        if bad_samples := int(bad.max() if loader.resident else bad.sum()):  # resident: each decodes the whole file
            figures["bad_samples"] = bad_samples
        self.restart()
        return figures


def compile_counts() -> dict[str, int]:
    """What torch.compile has made in this process: each graph beyond the expected ones cost a compilation."""
    from torch._dynamo.utils import counters, get_compilation_metrics

    breaks = sum(sum(counters[cause].values()) for cause in ("graph_break", "unimplemented"))
    recompiled = sum(compilation.recompile_reason is not None for compilation in get_compilation_metrics())
    return {"graphs": counters["stats"]["unique_graphs"], "graph_breaks": breaks, "recompiled": recompiled}

"""Which leg limits a training, and what lifting that limit would give: arithmetic on costs, nothing is measured here.

Legs that use different resources overlap, and the slowest one sets the pace; legs on the same resource add up. A
resource with all that it has to do for one image is a line:

    disk      storage                           images that are not in the page cache
    threads   storage + decode + cpu_augment    the loader's threads, which wait for the disk themselves
    reader    copy                              the loader's reader: makes up batches, starts their copies
    device    views + compute + communication   the GPU; without one, the main thread and torch's threads
    host      launch                            the main thread of a run on a GPU
    cores     CPU-seconds of all legs / cores   what the lines above share
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

LINES = {
    "disk": ("storage",),
    "threads": ("storage", "decode", "cpu_augment"),
    "reader": ("copy",),
    "device": ("views", "compute", "communication"),
    "host": ("launch",),
}
BALANCED = 1.1  # what a leg for nothing must give at least to be called the limit


class Cost(NamedTuple):
    """What a leg takes for one image."""

    seconds: float  # with the threads that the run gives it, when nothing else runs
    cpu_seconds: float = 0.0  # over all its threads


@dataclass(frozen=True)
class Costs:
    """All legs of one process that are known; one that is missing costs nothing. Cores are this process's share."""

    legs: dict[str, Cost]
    cores: int
    decodes_in_reader: bool = False  # small raw images: no thread is worth waking for them
    processes: int = 1

    def lines(self) -> dict[str, float]:
        """Seconds an image, by line."""
        lines = {}
        for line, legs in LINES.items():
            if self.decodes_in_reader:
                legs = {"threads": (), "reader": LINES["threads"] + LINES["reader"]}.get(line, legs)
            lines[line] = sum(self.legs[leg].seconds for leg in legs if leg in self.legs)
        return lines | {"cores": sum(cost.cpu_seconds for cost in self.legs.values()) / self.cores}

    def images_per_second(self) -> float:
        """Of all processes."""
        slowest = max(self.lines().values())
        return self.processes / slowest if slowest > 0 else float("inf")

    def cause(self) -> str:
        """The leg that has the largest part in the slowest line; there must be one that costs something."""
        lines = self.lines()
        line = max(reversed(lines), key=lines.get)  # of disk and threads that wait for it alone: the threads
        if line == "cores":
            return max(self.legs, key=lambda leg: self.legs[leg].cpu_seconds)
        legs = LINES[line] if line != "reader" or not self.decodes_in_reader else LINES["threads"] + LINES["reader"]
        return max((leg for leg in legs if leg in self.legs), key=lambda leg: self.legs[leg].seconds)

    def faster(self, leg: str, factor: float) -> "Costs":
        """If that leg were so many times as fast; `inf`: if it cost nothing."""
        seconds, cpu_seconds = self.legs[leg]
        return replace(self, legs={**self.legs, leg: Cost(seconds / factor, cpu_seconds / factor)})

    def is_balanced(self) -> bool:
        """Whether not even the limiting leg for nothing would make training faster by BALANCED."""
        return self.faster(self.cause(), float("inf")).images_per_second() < BALANCED * self.images_per_second()

"""The loader of node-local shards (data.shards=local): local_shards.py has the rules."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from fastssl.beton import read_header
from fastssl.beton.set_manifest import hash_checksums, read_shard_list
from fastssl.common.distributed import on_all_ranks, own_node
from fastssl.common.errors import UserError
from fastssl.loading.loader import BetonLoader, LoaderState
from fastssl.loading.local_shards import Assignment, NodeShards, Rounds, assign, count_visits, exchange, order_seed
from fastssl.loading.order import epoch_order
from fastssl.loading.samples import Indices, Samples

ATTEMPTS = 3  # to open the shards of an epoch while others move them
PAUSE = 1.0  # seconds between two of them


class LocalShardsLoader(BetonLoader):
    """Iterable over batches of a set of shards, of which each node reads only those on its own disk.

    Every epoch has as many batches as if all images were visited once. Global batch b consists of the b-th part of each
    node's own order; a node's part is as large as its share of the processes. `samples` and `rows` are those of the
    node, and change when an epoch begins.

    Args:
        path: the pattern of the set. Its manifest is next to the shards on every node.
        batch_size: samples per process.
        options: as for BetonLoader.

    Raises:
        UserError: as BetonLoader; the manifest of the set is missing; a node has no shard that is its own.
    """

    def __init__(self, path: str | Path, batch_size: int, **options: Any) -> None:
        self.path = Path(path)
        self.shard_files = on_all_ranks(lambda: read_shard_list(self.path))
        self.assignment = self._assign(epoch=0)
        self._saved_assignment: str | None = None
        on_all_ranks(lambda: BetonLoader.__init__(self, path, batch_size, **options))
        self._opened = self.own_files()

    @property
    def node(self) -> NodeShards:
        """What this process's node reads in the running epoch."""
        return self.assignment.nodes[self.assignment.own]

    def own_files(self) -> list[Path]:
        """The shards that this node reads in the running epoch."""
        return [self.path.parent / self.shard_files[shard].name for shard in self.node.reads]

    @property
    def epoch_images(self) -> int:
        """Images of the whole set."""
        return sum(file.samples for file in self.shard_files)

    def begin_epoch(self) -> list[str]:
        """Look which shards the nodes have now, and open this node's. All processes call this together.

        Without this call an epoch is read from the shards of the one before.

        Returns what the user should know: images that are left out or visited again.
        """
        for attempt in range(1, ATTEMPTS + 1):
            self.assignment = self._assign(self.epoch)
            try:
                on_all_ranks(self._open_own_files)
                break
            except UserError:  # a shard was moved after its node had listed it
                if attempt == ATTEMPTS:
                    raise
                time.sleep(PAUSE)
        visits = count_visits(self.assignment, len(self), self.batch_size).sentence(self.epoch)
        return [*([visits] if visits else []), *self._explain_resume()]

    def _assign(self, epoch: int) -> Assignment:
        assignment = assign(exchange(self.path.parent, self.shard_files), epoch)
        without = [number for number, node in enumerate(assignment.nodes) if not node.reads]
        if without:
            here = f", among them this one ({self.path.parent})" if assignment.own in without else ""
            raise UserError(
                f"{len(without)} of {len(assignment.nodes)} nodes have no shard of {self.path.name} that is theirs "
                f"alone to read in epoch {epoch + 1}{here}",
                hint="copy other shards to each node, or start on fewer nodes",
            )
        return assignment

    def _open_own_files(self) -> None:
        """Map the shards of the running epoch in place of those before, unless they are the same."""
        if self.own_files() == self._opened:
            return
        try:
            info = read_header(self.path, self.own_files())
            samples = Samples.read(info)
        except OSError as error:
            raise UserError(
                f"{error.filename} cannot be read ({error.strerror})", hint="copy the shard to the node again"
            ) from error
        same_size = self.crop != "gpu" or (
            info.resolution is not None and self.cropping.image_shape(samples) == self._image_shape
        )
        if info.storage != self.samples.storage or not same_size:
            raise UserError(
                f"{self.path.parent} holds shards of another build than in the epoch before",
                hint="copy the shards of one build to all nodes",
            )
        self.samples = samples
        self.rows = self.selection.rows(samples)
        self._opened = self.own_files()

    def _explain_resume(self) -> list[str]:
        """Say what a resume in the middle of an epoch repeats, if the nodes read other shards than before it."""
        if not self.position or self._saved_assignment in (None, self.assignment.digest()):
            return []
        visited = self.position / self.epoch_images
        about = round(self.epoch_images * visited * (1 - visited))
        return [
            f"The nodes have other shards than before the interruption. Of the {self.epoch_images:,} images of epoch "
            f"{self.epoch + 1}, of which {visited:.0%} were visited, about {about:,} are visited twice and as many not "
            "at all; the next epoch is regular."
        ]

    def epoch_order(self) -> Indices:
        """The node's own order of its images, again and again if there are few."""

        def make(round_number: int) -> Indices:
            seed = order_seed(self.seed, self.node.reads, round_number)
            return epoch_order(self.order, seed, self.epoch, self.samples, self.rows)

        return Rounds(make, len(self.rows), len(self) * self.node.processes * self.batch_size)

    def positions_in_order(self, first: int) -> np.ndarray:
        """(batch_size,): this process's part of the node's part of the global batch."""
        step = first // (self.batch_size * self.world)
        part = step * self.node.processes + own_node().process
        return part * self.batch_size + np.arange(self.batch_size)

    def state_dict(self) -> LoaderState:
        """The position, and which node reads which shards."""
        return {**super().state_dict(), "assignment": self.assignment.digest()}

    def load_state_dict(self, state: LoaderState) -> None:
        """Continue at a saved position; nodes, their processes and their shards may be others."""
        super().load_state_dict(state)
        self._saved_assignment = state.get("assignment")

    @property
    def _samples_hash(self) -> str:
        return hash_checksums([file.checksum for file in self.shard_files])

"""Node-local shards (data.shards=local): each node reads only the shards of a set that are on its own disk.

A node is the processes that one torchrun starts. Each has the manifest of the set and some of the shards. At the start
of an epoch every node lists the shards that it has, and all nodes exchange the lists. Which node reads which shard in
this epoch is a function of these lists and of the epoch:

* A shard that one node has is that node's.
* A shard that several nodes have is that of the one with the fewest images so far for each of its processes, shards in
  their order. Between nodes with as many the epoch decides, so that copies of a shard take turns.

An epoch has as many steps as if all images were visited once, wherever they are: learning rates and steps do not
depend on the nodes. A node visits its images in an order that is a function of (seed, epoch, its shards). One with
fewer images than its share of the steps begins again, in another order; one with more leaves some out.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

import numpy as np
import torch

from fastssl.beton.set_manifest import SetFile, hash_checksums, read_shard_list
from fastssl.common.distributed import all_gather_values, own_node
from fastssl.common.errors import UserError
from fastssl.loading.samples import Indices


class NodeShards(NamedTuple):
    """What a node has, and what it reads in an epoch."""

    processes: int
    has: list[int]  # numbers of shards
    reads: list[int]


class Assignment(NamedTuple):
    """Which shards each node reads in an epoch."""

    nodes: list[NodeShards]
    own: int  # the node of this process
    shard_images: list[int]  # of each shard of the set

    def images(self, node: int) -> int:
        """Return how many images a node reads from."""
        return sum(self.shard_images[shard] for shard in self.nodes[node].reads)

    def digest(self) -> str:
        """Return a hash that differs if other images would be in the batches, whatever number a node has."""
        nodes = sorted((node.reads, node.processes) for node in self.nodes)
        return hashlib.sha256(json.dumps(nodes).encode()).hexdigest()


def complete_shards(folder: Path, files: Sequence[SetFile]) -> list[int]:
    """Return the numbers of the shards in a folder. One that is still being copied has another size, and is left out.

    A folder that cannot be read has none.
    """
    found = []
    for number, file in enumerate(files):
        try:
            stat = (folder / file.name).stat()
        except OSError:
            continue
        if S_ISREG(stat.st_mode) and stat.st_size == file.bytes:
            found.append(number)
    return found


def shard_here(path: Path) -> Path:
    """Return a shard of the set `path` that is on this node. Raises UserError if there is none."""
    files = read_shard_list(path)
    found = complete_shards(path.parent, files)
    if not found:
        raise UserError(
            f"{path.parent} holds no complete shard of {path.name}", hint="copy some of the shards to this node"
        )
    return path.parent / files[found[0]].name


def exchange(folder: Path, files: Sequence[SetFile]) -> Assignment:
    """Exchange the lists of shards with all other nodes. Nothing is assigned yet. All processes call this together.

    Raises UserError on all of them if the nodes have manifests of different sets.
    """
    node = own_node()
    has_S = torch.zeros(len(files), dtype=torch.uint8)
    if node.process == 0:  # what a node has is what its first process saw
        has_S[complete_shards(folder, files)] = 1
    same = hash_checksums([file.model_dump() for file in files])
    head = torch.tensor([node.number, node.process, int(same[:14], 16)])
    head_R3 = all_gather_values(head)
    if (head_R3[:, 2] != head[2]).any():
        raise UserError(
            "The nodes have manifests of different sets of shards",
            hint="copy the same manifest, such as train-of-00064.beton.json, to every node",
        )
    has_RS = all_gather_values(has_S)
    nodes = []
    for number in sorted(set(head_R3[:, 0].tolist())):
        of_node_R = head_R3[:, 0] == number
        has = has_RS[of_node_R].any(0).nonzero()[:, 0].tolist()
        nodes.append((NodeShards(int(of_node_R.sum()), has, []), number))
    # Numbered by what they have: torchrun may number the same nodes otherwise at the next start.
    nodes.sort(key=lambda pair: (pair[0].has, pair[1]))
    own = [number for _, number in nodes].index(node.number)
    return Assignment([pair[0] for pair in nodes], own, [file.samples for file in files])


def assign(lists: Assignment, epoch: int) -> Assignment:
    """Return which node reads which shards in an epoch. The module's docstring has the rule."""
    nodes = lists.nodes
    holders: list[list[int]] = [[] for _ in lists.shard_images]
    for number, node in enumerate(nodes):
        for shard in node.has:
            holders[shard].append(number)
    reads: list[list[int]] = [[] for _ in nodes]
    images = [0] * len(nodes)

    def load(number: int) -> tuple[float, int]:
        return images[number] / nodes[number].processes, (number + epoch) % len(nodes)

    # First what only one node has, so that the other shards even it out.
    for shard in sorted(range(len(holders)), key=lambda shard: (len(holders[shard]) > 1, shard)):
        if holders[shard]:
            reader = min(holders[shard], key=load)
            reads[reader].append(shard)
            images[reader] += lists.shard_images[shard]
    return lists._replace(nodes=[node._replace(reads=sorted(r)) for node, r in zip(nodes, reads, strict=True)])


class EpochCounts(NamedTuple):
    """How often the images of a set are visited in an epoch, in which all nodes take their parts of all batches."""

    images: int  # of the set
    absent: int  # on no node
    again: int  # visits by nodes with fewer images than their share
    left_out: int  # images of nodes with more than their share, and of an incomplete last batch

    def sentence(self, epoch: int) -> str | None:
        """Return what is not as with all shards on every node; None if nothing is."""
        if not self.absent and not self.again:
            return None
        parts = [f"{self.absent:,} are on no node"] if self.absent else []
        if self.again:
            parts.append(f"{self.again:,} are visited again, as their nodes have fewer images than their share")
        if self.left_out:
            parts.append(f"{self.left_out:,} are left out")
        return f"Epoch {epoch + 1}: of {self.images:,} images {', '.join(parts)} (data.shards=local)."


def count_visits(assignment: Assignment, steps: int, batch_size: int) -> EpochCounts:
    """Count the visits of an epoch of so many steps. batch_size: of a process."""
    again = left_out = 0
    for number, node in enumerate(assignment.nodes):
        extra = steps * node.processes * batch_size - assignment.images(number)
        again += max(0, extra)
        left_out += max(0, -extra)
    total = sum(assignment.shard_images)
    present = sum(assignment.images(number) for number in range(len(assignment.nodes)))
    return EpochCounts(total, total - present, again, left_out)


def order_seed(seed: int, shards: Sequence[int], round_number: int) -> int:
    """Return the seed of a node's order. Nodes with as many images have different orders, and so have rounds."""
    name = json.dumps([seed, *shards, round_number]).encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:8])


class Rounds:
    """The order in which a node visits its images: all in one order, then all in another one, and so on.

    Args:
        make: returns the order of a round, as positions 0 to images - 1.
        images: of the node.
        length: positions that are needed.
    """

    def __init__(self, make: Callable[[int], Indices], images: int, length: int) -> None:
        self.make = make
        self.images = images
        self.length = length
        self._made: dict[int, Indices] = {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position_B: np.ndarray) -> np.ndarray:
        round_B, within_B = np.divmod(position_B, self.images)
        out_B = np.empty_like(within_B)
        rounds = np.unique(round_B).tolist()
        self._made = {number: order for number, order in self._made.items() if number in rounds}
        for number in rounds:
            if number not in self._made:
                self._made[number] = self.make(number)
            is_in_round_B = round_B == number
            out_B[is_in_round_B] = self._made[number][within_B[is_in_round_B]]
        return out_B

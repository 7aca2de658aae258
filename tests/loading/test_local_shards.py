"""Which node reads which shards of a set, in which order, and what an epoch then leaves out or repeats."""

import itertools

import numpy as np
import pytest
import torch

from fastssl.beton.set_manifest import SetFile
from fastssl.common.distributed import Node, own_node
from fastssl.common.errors import UserError
from fastssl.common.randomness import permutation
from fastssl.loading import local_shards
from fastssl.loading.local_shards import (
    Assignment,
    NodeShards,
    Rounds,
    assign,
    complete_shards,
    count_visits,
    order_seed,
)


def reads(has, images, epoch=0, processes=None):
    """What each node reads of what each has."""
    processes = processes or [1] * len(has)
    lists = Assignment([NodeShards(count, shards, []) for count, shards in zip(processes, has)], 0, images)
    return [node.reads for node in assign(lists, epoch).nodes]


def test_a_shard_of_one_node_is_that_nodes():
    assert reads([[0, 3], [1], [2]], [5, 5, 5, 5]) == [[0, 3], [1], [2]]


def test_a_shard_of_several_nodes_is_that_of_the_one_with_the_fewest_images():
    assert reads([[0, 1, 2], [2]], [10, 10, 10]) == [[0, 1], [2]]
    assert reads([[0, 1, 2, 3], [0, 1, 2, 3]], [40, 10, 10, 20]) == [[0], [1, 2, 3]]
    assert reads([[0, 1], [1, 2], [0, 2]], [10, 10, 10]) == [[0], [1], [2]]
    assert reads([[0, 1, 2], [0, 1, 2]], [10, 10, 10], processes=[1, 2]) == [[0], [1, 2]]


def test_copies_take_turns():
    everywhere = [list(range(6))] * 3
    by_epoch = [reads(everywhere, [10] * 6, epoch) for epoch in range(4)]
    assert by_epoch[0] == [[0, 3], [1, 4], [2, 5]] and by_epoch[3] == by_epoch[0]
    assert all({tuple(node[n]) for node in by_epoch} == {(0, 3), (1, 4), (2, 5)} for n in range(3))


@pytest.mark.parametrize("nodes", [1, 2, 5])
def test_every_shard_that_is_somewhere_is_read_once(nodes):
    generator = np.random.default_rng(nodes)
    for epoch in range(20):
        has = [np.flatnonzero(generator.random(40) < 0.4).tolist() for _ in range(nodes)]
        found = reads(has, generator.integers(1, 100, 40).tolist(), epoch)
        assert sorted(sum(found, [])) == sorted(set(sum(has, [])))
        assert all(set(mine) <= set(own) for mine, own in zip(found, has))


def test_the_digest_is_that_of_the_batches_not_of_the_numbers_of_nodes():
    def digest(*nodes):
        return Assignment([NodeShards(processes, [], shards) for processes, shards in nodes], 0, [5] * 4).digest()

    assert digest((1, [0, 1]), (2, [2])) == digest((2, [2]), (1, [0, 1]))
    others = (((1, [0]), (2, [2])), ((2, [0, 1]), (1, [2])), ((1, [0, 1]), (2, [2]), (1, [3])))
    assert len({digest(*nodes) for nodes in others} | {digest((1, [0, 1]), (2, [2]))}) == 4


def test_visits_are_counted():
    nodes = [NodeShards(2, [0, 1], [0, 1]), NodeShards(1, [2], [2])]
    counts = count_visits(Assignment(nodes, 0, [50, 60, 70, 30]), steps=10, batch_size=7)
    # Of 140 visits, the first node makes 30 again; the second leaves 0 of 70 images out; shard 3 is nowhere.
    assert counts == (210, 30, 30, 0)
    assert counts.sentence(3) == (
        "Epoch 4: of 210 images 30 are on no node, 30 are visited again, as their nodes have fewer images than their "
        "share (data.shards=local)."
    )
    even = count_visits(Assignment([NodeShards(1, [0], [0]), NodeShards(1, [1], [1])], 0, [50, 50]), 7, 7)
    assert even == (100, 0, 0, 2) and even.sentence(0) is None  # an incomplete last batch, as always
    # Whatever the distribution: what is left out and missing, less what is repeated, is the incomplete batch.
    for images in ([50, 50], [90, 10], [99, 1]):
        found = count_visits(Assignment([NodeShards(1, [0], [0]), NodeShards(1, [1], [1])], 0, images), 7, 7)
        assert found.left_out + found.absent - found.again == 100 - 7 * 14


def test_only_complete_shards_count(tmp_path):
    files = files_of_set(4)
    (tmp_path / files[1].name).write_bytes(bytes(101))
    (tmp_path / files[2].name).write_bytes(bytes(50))  # still being copied
    (tmp_path / files[3].name).mkdir()
    assert complete_shards(tmp_path, files) == [1]
    assert complete_shards(tmp_path / "gone", files) == []


def files_of_set(count, checksum="0"):
    return [
        SetFile(
            name=f"train-{n:05}-of-{count:05}.beton",
            samples=10,
            bytes=100 + n,
            metadata="0" * 8,
            checksum=checksum * 64,
        )
        for n in range(count)
    ]


def test_lists_are_exchanged(tmp_path, monkeypatch):
    """Of three processes on two nodes, the first process of each node looks at its disk."""
    files = files_of_set(3)
    for node, shards in (("a", [2]), ("b", [0, 1])):
        (tmp_path / node).mkdir()
        for shard in shards:
            (tmp_path / node / files[shard].name).write_bytes(bytes(100 + shard))
    processes = [(Node(0, 0, 2), "a"), (Node(0, 1, 2), "a"), (Node(1, 0, 1), "b")]
    sent = {}

    def exchange_as(number, files):
        node, folder = processes[number]
        step = itertools.count()

        def gather(values_N):
            at = next(step)
            sent[number, at] = values_N
            return torch.stack([sent.get((other, at), values_N) for other in range(len(processes))])

        monkeypatch.setattr(local_shards, "own_node", lambda: node)
        monkeypatch.setattr(local_shards, "all_gather_values", gather)
        return local_shards.exchange(tmp_path / folder, files)

    for number in range(3):  # what each sends; what it receives counts in the second round only
        exchange_as(number, files)
    found = [exchange_as(number, files) for number in range(3)]
    # Numbered by what they have: node 1 of torchrun has the first shards.
    assert found[0].nodes == [NodeShards(1, [0, 1], []), NodeShards(2, [2], [])]
    assert [each.own for each in found] == [1, 1, 0] and found[0].nodes == found[1].nodes == found[2].nodes
    assert found[0].shard_images == [10, 10, 10]
    with pytest.raises(UserError, match="manifests of different sets"):
        exchange_as(2, files_of_set(3, "1"))


def test_a_single_process_is_a_node(tmp_path):
    files = files_of_set(2)
    (tmp_path / files[1].name).write_bytes(bytes(101))
    assert local_shards.exchange(tmp_path, files) == Assignment([NodeShards(1, [1], [])], 0, [10, 10])


def test_the_node_is_what_torchrun_says(monkeypatch):
    assert own_node() == Node(0, 0, 1)
    for name, value in (("GROUP_RANK", "3"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert own_node() == Node(3, 1, 4)


def test_a_node_with_few_images_begins_again_in_another_order():
    made = []

    def make(round_number):
        made.append(round_number)
        return permutation(order_seed(3, [1, 4], round_number), 0, 10).numpy()

    rounds = Rounds(make, 10, 25)
    assert len(rounds) == 25
    visited = np.concatenate([rounds[np.arange(first, first + 5)] for first in range(0, 25, 5)])
    assert [sorted(visited[n : n + 10]) for n in (0, 10)] == [list(range(10))] * 2 and len(set(visited[20:])) == 5
    assert not np.array_equal(visited[:10], visited[10:20]) and made == [0, 1, 2]
    assert np.array_equal(rounds[np.arange(7, 23)], visited[7:23])


def test_nodes_with_as_many_images_have_different_orders():
    seeds = {order_seed(seed, shards, number) for seed in (0, 1) for shards in ([0], [1], [0, 1]) for number in (0, 1)}
    assert len(seeds) == 12 and all(0 <= seed < 2**64 for seed in seeds)

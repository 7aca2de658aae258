"""Batches of nodes that read only the shards on their own disks."""

import json
import os
import shutil
import socket
from collections import Counter

import numpy as np
import pytest
import torch

from fastssl.beton import beton_file, build_beton, mapped
from fastssl.beton.format import metadata_type
from fastssl.beton.set_manifest import read_shard_list
from fastssl.beton.shards import files_of, set_manifest_path
from fastssl.beton.tables import read_file_header
from fastssl.common.distributed import Node, joined_processes
from fastssl.common.errors import UserError
from fastssl.loading import BetonLoader, local_loader
from fastssl.loading.local_loader import LocalShardsLoader
from fastssl.loading.local_shards import Assignment, NodeShards, complete_shards
from fastssl.recipe import ViewsConfig, load_recipe

VIEWS = ViewsConfig(size=24)


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    """A folder with 48 images in three shards."""
    out = tmp_path_factory.mktemp("whole")
    build_beton("imagefolder", photos, out, canvas=32, shards=3, workers=1)
    return out


@pytest.fixture
def cluster(whole, tmp_path, monkeypatch):
    """A function that puts shards on nodes, and returns a function that makes the loaders of all their processes."""
    files = files_of(beton_file(whole, "train"))
    manifest = set_manifest_path(beton_file(whole, "train"))

    def put(*shards_of_nodes, processes=None):
        processes = processes or [1] * len(shards_of_nodes)
        folders = [tmp_path / f"node{number}" for number in range(len(shards_of_nodes))]
        for folder, shards in zip(folders, shards_of_nodes):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            shutil.copy(manifest, folder)
            for shard in shards:
                shutil.copy(files[shard], folder)

        def make(batch_size=4, **options):
            return [
                FakeProcess(folders, processes, node, process, monkeypatch, batch_size, options)
                for node in range(len(folders))
                for process in range(processes[node])
            ]

        return make

    return put


class FakeProcess:
    """The loader of one process among those of several nodes, which all are in this process."""

    def __init__(self, folders, processes, node, process, monkeypatch, batch_size, options):
        self.own = Node(node, process, processes[node])

        def exchange(folder, files):
            nodes = [NodeShards(count, complete_shards(each, files), []) for each, count in zip(folders, processes)]
            return Assignment(nodes, node, [file.samples for file in files])

        self.patches = {"exchange": exchange, "own_node": lambda: self.own}
        self.monkeypatch = monkeypatch
        # The pattern: a folder may be empty.
        path = folders[node] / "train-*-of-00003.beton"
        self.loader = self.run(lambda: LocalShardsLoader(path, batch_size, views=VIEWS, seed=5, workers=1, **options))
        self.loader.rank, self.loader.world = sum(processes[:node]) + process, sum(processes)

    def run(self, call):
        for name, value in self.patches.items():
            self.monkeypatch.setattr(local_loader, name, value)
        return call()

    def begin(self):
        return self.run(self.loader.begin_epoch)

    def batches(self, count=None):
        def take():
            found = []
            for batch in self.loader:
                found.append(batch)
                if len(found) == count:
                    break
            return found

        return self.run(take)


def epoch_of(processes, count=None):
    """The indices of each batch, for each process."""
    for process in processes:
        process.begin()
    return [[batch.index.tolist() for batch in process.batches(count)] for process in processes]


def visits(processes):
    return Counter(index for batches in epoch_of(processes) for batch in batches for index in batch)


@pytest.fixture(scope="module")
def pixels(whole):
    """The images of the set by their indices, and the shard of each."""
    found, shard_of = {}, {}
    for number, file in enumerate(files_of(beton_file(whole, "train"))):
        for batch in BetonLoader(file, 1, shuffle=False):
            found[int(batch.index)] = batch.image[0]
            shard_of[int(batch.index)] = number
    return found, shard_of


@pytest.mark.parametrize("most_in_memory", [mapped.MOST_IN_MEMORY, 10])  # as above it: tables that stay in the files
@pytest.mark.parametrize("order", [True, "quasi_random"])
def test_each_node_reads_its_own_shards_and_each_image_is_visited_once(
    cluster, pixels, order, most_in_memory, monkeypatch
):
    """Two processes on the node with two of the three shards: the shares fit."""
    monkeypatch.setattr(mapped, "MOST_IN_MEMORY", most_in_memory)
    images, shard_of = pixels
    processes = cluster([0, 2], [1], processes=[2, 1])(shuffle=order)
    assert [len(process.loader) for process in processes] == [4] * 3  # 48 images in global batches of 12
    assert {process.loader.samples.is_mapped for process in processes} == {most_in_memory == 10}
    seen = []
    for epoch in range(2):
        assert all(process.begin() == [] for process in processes)
        for process in processes:
            own = [0, 2] if process.own.number == 0 else [1]
            for batch in process.batches():
                seen.append((epoch, batch.index.tolist()))
                for index, image in zip(batch.index.tolist(), batch.image):
                    assert shard_of[index] in own and torch.equal(image, images[index])
    for epoch in range(2):
        assert sorted(sum((indices for e, indices in seen if e == epoch), [])) == sorted(images)
    assert [indices for epoch, indices in seen if epoch == 0] != [indices for epoch, indices in seen if epoch == 1]
    assert processes[0].loader.epoch == 2 and processes[0].loader.position == 0


def test_a_node_with_few_images_repeats_and_one_with_many_leaves_out(cluster, pixels):
    processes = cluster([0, 1], [2])()
    assert len(processes[0].loader) == 6
    remark = (
        "Epoch 1: of 48 images 8 are visited again, as their nodes have fewer images than their share, 8 are left out "
        "(data.shards=local)."
    )
    assert [process.begin() for process in processes] == [[remark]] * 2
    counts = visits(processes)
    assert sum(counts.values()) == 48 and len(counts) == 40 and sum(n - 1 for n in counts.values()) == 8
    assert {pixels[1][index] for index, count in counts.items() if count == 2} == {2}
    assert [process.begin() for process in processes] == [[remark.replace("Epoch 1", "Epoch 2")]] * 2


def test_shards_on_no_node_are_left_out_with_their_number(cluster, pixels):
    processes = cluster([0], [1])(batch_size=4)
    assert processes[0].begin() == [
        "Epoch 1: of 48 images 16 are on no node, 16 are visited again, as their nodes have fewer images than their "
        "share (data.shards=local)."
    ]
    counts = visits(processes)
    assert len(processes[0].loader) == 6 and len(counts) == 32
    assert {pixels[1][index] for index in counts} == {0, 1}


def test_with_all_shards_everywhere_the_nodes_share_them_in_turns(cluster, pixels):
    processes = cluster([0, 1, 2], [0, 1, 2], [0, 1, 2])()
    shards = []
    for _ in range(3):
        found = epoch_of(processes)
        assert sorted(sum(sum(found, []), [])) == sorted(pixels[0])
        shards.append([{pixels[1][index] for batch in batches for index in batch} for batches in found])
    assert all(len(each) == 1 for epoch in shards for each in epoch)
    assert all({tuple(epoch[node])[0] for epoch in shards} == {0, 1, 2} for node in range(3))


def test_one_node_with_all_shards_visits_each_image_once(cluster, pixels):
    (process,) = cluster([0, 1, 2])(batch_size=7)
    assert process.begin() == [] and len(process.loader) == 6  # 42 of 48, as always
    assert len(visits([process])) == 42


def test_shards_may_move_between_epochs(cluster, whole, pixels):
    make = cluster([0, 1], [2])
    processes = make()
    epoch_of(processes)
    folders = [process.loader.path.parent for process in processes]
    shutil.move(folders[0] / "train-00001-of-00003.beton", folders[1])
    found = epoch_of(processes)
    assert [{pixels[1][index] for batch in batches for index in batch} for batches in found] == [{0}, {1, 2}]
    # What is mapped stays readable, and an incomplete copy does not count.
    begun = processes[1].begin()
    assert "8 are visited again" in begun[0]
    for file in folders[1].glob("*.beton"):
        file.unlink()
    shutil.copy(whole / "train-00002-of-00003.beton", folders[1])
    (folders[1] / "train-00001-of-00003.beton").write_bytes(b"incomplete")
    assert len(processes[1].batches()) == 6
    assert "16 are on no node" in processes[1].begin()[0]
    (folders[1] / "train-00002-of-00003.beton").unlink()
    for process in processes:
        process.loader.set_epoch(5)
        with pytest.raises(UserError, match="1 of 2 nodes have no shard of train-.*-of-00003.beton that is theirs"):
            process.begin()


def test_a_shard_of_another_build_is_refused(cluster, tmp_path):
    make = cluster([0, 1])
    file = tmp_path / "node0/train-00001-of-00003.beton"
    header = read_file_header(file)
    content = np.memmap(file, np.uint8, mode="r+")
    content[header.metadata_start : header.metadata_end].view(metadata_type(header.field_types))["label"][2] ^= 1
    content.flush()
    with pytest.raises(
        UserError, match="train-00001-of-00003.beton is not the shard that .* names: it has other labels"
    ):
        make()


def run_node(rank, folder, case, store):
    """One of two real processes, each a node; in the second epoch a shard arrives, and is moved on."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", GROUP_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store))
    shard = "train-00002-of-00003.beton"
    exchange = local_loader.exchange

    def exchange_and_move(*arguments):
        lists = exchange(*arguments)
        if rank == 1 and (folder / "1" / shard).exists():  # after this node has listed it
            shutil.move(folder / "1" / shard, folder / "0")
        return lists

    with joined_processes(torch.device("cpu")):
        try:
            loader = LocalShardsLoader(folder / str(rank) / "train-*-of-00003.beton", 4, seed=5, workers=1)
            for epoch in range(2):
                if epoch == 1 and case == "moved":
                    local_loader.exchange = exchange_and_move
                    if rank == 1:
                        shutil.copy(folder / shard, folder / "1")
                loader.begin_epoch()
                indices = [index for batch in loader for index in batch.index.tolist()]
                (folder / f"{rank}-{epoch}.json").write_text(json.dumps([loader.node.reads, indices]))
        except UserError as error:
            (folder / f"{rank}-error.txt").write_text(str(error))


def run_two_nodes(whole, folder, case):
    files = files_of(beton_file(whole, "train"))
    shutil.copy(files[2], folder)
    for node, shards in (("0", [0]), ("1", [1])):
        (folder / node).mkdir()
        shutil.copy(set_manifest_path(beton_file(whole, "train")), folder / node)
        for shard in shards:
            shutil.copy(files[shard], folder / node)
    if case == "no manifest":
        set_manifest_path(beton_file(folder / "1", "train")).unlink()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(run_node, (folder, case, port), nprocs=2, start_method="spawn")


def test_a_shard_that_is_moved_while_an_epoch_begins_is_read_where_it_is_then(whole, tmp_path, pixels):
    run_two_nodes(whole, tmp_path, "moved")
    found = [[json.loads((tmp_path / f"{rank}-{epoch}.json").read_text()) for rank in (0, 1)] for epoch in (0, 1)]
    assert [[reads for reads, _ in of_epoch] for of_epoch in found] == [[[0], [1]], [[0, 2], [1]]]
    for reads, indices in found[1]:
        assert {pixels[1][index] for index in indices} == set(reads)


def test_what_one_node_lacks_is_said_on_all_of_them(whole, tmp_path):
    run_two_nodes(whole, tmp_path, "no manifest")
    errors = [(tmp_path / f"{rank}-error.txt").read_text() for rank in (0, 1)]
    assert errors[0] == errors[1] and f"{tmp_path}/1/train-of-00003.beton.json is missing" in errors[0]


def test_a_position_goes_on_with_the_same_batches(cluster):
    make = cluster([0, 2], [1], processes=[2, 1])
    straight = epoch_of(make())
    interrupted = make()
    first = epoch_of(interrupted, 2)
    states = [process.loader.state_dict() for process in interrupted]
    assert states[0] == states[1] == states[2] and states[0]["position"] == 24
    resumed = make()
    for process in resumed:
        process.loader.load_state_dict(states[0])
        assert process.begin() == []
    rest = epoch_of(resumed)
    assert [a + b for a, b in zip(first, rest)] == straight


def test_a_position_goes_on_with_other_nodes_and_says_what_is_repeated(cluster):
    processes = cluster([0, 1], [2])()
    epoch_of(processes, 2)
    state = processes[0].loader.state_dict()
    (alone,) = cluster([0, 1, 2])(batch_size=8)
    alone.loader.load_state_dict(state)
    assert alone.begin() == [
        "The nodes have other shards than before the interruption. Of the 48 images of epoch 1, of which 33% were "
        "visited, about 11 are visited twice and as many not at all; the next epoch is regular."
    ]
    assert len(alone.batches()) == 4 and alone.begin() == []  # steps 3 to 6; then the next epoch
    assert len(visits([alone])) == 48
    # At the end of an epoch there is nothing to say.
    at_end = {**state, "epoch": 1, "position": 0}
    alone.loader.load_state_dict(at_end)
    assert alone.begin() == []


def test_what_cannot_be_read_is_refused(cluster, whole, tmp_path):
    cluster([0], [1])
    path = tmp_path / "node0" / "train-*-of-00003.beton"
    with pytest.raises(UserError, match="does not name a set of shards"):
        LocalShardsLoader(tmp_path / "node0" / "train-00000-of-00003.beton", 4)
    manifest = set_manifest_path(path)
    content = manifest.read_text()
    for before, after in (("train-00001-of-00003", "../rain-00001-of-0003"), ('"samples": 16', '"samples": 1')):
        manifest.write_text(content.replace(before, after))
        with pytest.raises(UserError, match="does not name the 3 shards"):
            read_shard_list(path)
    manifest.write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        read_shard_list(path)
    manifest.unlink()
    with pytest.raises(UserError, match="train-of-00003.beton.json is missing") as error:
        LocalShardsLoader(path, 4)
    assert "copy it" in error.value.hint


@pytest.mark.parametrize(
    "override, says",
    [("data.limit=5", "data.limit"), ("data.subset=x.txt", "data.subset"), ("data.resident=true", "keeps the first")],
)
def test_keys_that_do_not_go_together_are_refused(override, says):
    with pytest.raises(UserError, match=says):
        load_recipe("recipes/barlow.yaml", ["data.shards=local", override])

"""Training on two nodes with shards of their own: two torchruns in two working folders, with one run directory."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from training_runs import (
    ENVIRONMENT,
    PATIENCE,
    SMALL,
    assert_same_run,
    checkpoint_in,
    losses_of,
    metrics_of,
    wait_for_line,
)

from fastssl.beton import beton_file, build_beton
from fastssl.beton.shards import files_of, set_manifest_path
from fastssl.common.errors import UserError
from fastssl.evaluation.probe import probe_from_recipe
from fastssl.recipe import load_recipe
from fastssl.training import train


@pytest.fixture(scope="module")
def nodes(photos, tmp_path_factory):
    """The working folders of two nodes: one with two of three shards of 48 images, one with the third."""
    root = tmp_path_factory.mktemp("nodes")
    build_beton("imagefolder", photos, root / "whole", canvas=32, shards=3, workers=1)
    pattern = beton_file(root / "whole", "train")
    folders = [root / "a", root / "b"]
    for folder, shards in zip(folders, ([0, 2], [1])):
        (folder / "data").mkdir(parents=True)
        shutil.copy(set_manifest_path(pattern), folder / "data")
        for shard in shards:
            shutil.copy(files_of(pattern)[shard], folder / "data")
    return folders


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def start_node(folder: Path, port: int, run_dir: Path, nodes: str, *overrides: str, output=None) -> subprocess.Popen:
    """One torchrun with one process, whose relative paths are those of the node's folder."""
    rendezvous = [
        "--nnodes", nodes, "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-id", "x",
        "--rdzv-endpoint", f"localhost:{port}", "--rdzv-conf", "last_call_timeout=5,keep_alive_interval=1",
    ]  # fmt: skip
    train = [
        "-m", "fastssl", "train", "barlow", *SMALL, "data.train=data", "data.val=null", "data.shards=local",
        f"run.dir={run_dir}", *overrides, "--resume", "auto",
    ]  # fmt: skip
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *rendezvous, *train],
        cwd=folder, env=environment, stdout=output or subprocess.DEVNULL, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_for_port(port: int) -> None:
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", port)) == 0:
                return
        time.sleep(0.1)


def kill(launcher: subprocess.Popen) -> None:
    """End a torchrun and its processes at once, as if the host had lost its power."""
    for process in (*psutil.Process(launcher.pid).children(recursive=True), psutil.Process(launcher.pid)):
        process.kill()
    launcher.wait()


def start_both(folders: list[Path], port: int, *arguments, **options) -> list[subprocess.Popen]:
    first = start_node(folders[0], port, *arguments, **options)
    wait_for_port(port)  # the rendezvous is this host's
    return [first, start_node(folders[1], port, *arguments)]


@pytest.mark.slow
def test_one_of_two_nodes_dies_and_the_run_continues_with_the_shards_of_the_other(nodes, tmp_path):
    run, port = tmp_path / "run", free_port()
    remaining, gone = start_both(
        nodes, port, run, "1:2", "train.epochs=60", "checkpoint.every=2", output=subprocess.PIPE
    )
    wait_for_line(remaining, run, 8)
    kill(gone)
    output, _ = remaining.communicate(timeout=PATIENCE)
    assert remaining.returncode == 0, output
    assert [step for step, _ in losses_of(run)] == list(range(1, 181))
    starts = json.loads((run / "environment.json").read_text())
    assert starts["processes"] == 1 and starts["earlier"][0]["processes"] == 2
    said = " ".join(output.split())
    # Two nodes of one process each, with 32 and 16 images of 48.
    assert "Epoch 1: of 48 images 8 are visited again, as their nodes have fewer images than their share, 8 are" in said
    assert "of 48 images 16 are on no node, 16 are visited again" in said
    checkpoint = checkpoint_in(run)
    assert checkpoint["step"] == 180 and len(checkpoint["loader"]["assignment"]) == 64


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_batches_on_the_same_nodes(nodes, tmp_path):
    """Bit for bit, in whatever order the nodes come back."""
    settings = ("train.epochs=6", "checkpoint.every=2")
    for name, kills in (("straight", 0), ("killed", 1)):
        for attempt in range(1 + kills):
            launchers = start_both(nodes if attempt == 0 else nodes[::-1], free_port(), tmp_path / name, "2", *settings)
            if attempt < kills:
                wait_for_line(launchers[0], tmp_path / name, 5)
                for launcher in launchers:
                    kill(launcher)
            else:
                assert [launcher.wait(PATIENCE) for launcher in launchers] == [0, 0]
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


@pytest.mark.usefixtures("default_signals")
def test_one_node_trains_and_probes_with_the_shards_it_has(nodes, photos, tmp_path, capsys):
    """The probe searches one of its two shards; the images of the third are left out, with their number."""
    for file in (nodes[0].parent / "whole").glob("val-*"):
        shutil.copy(file, nodes[0] / "data")
    data = nodes[0] / "data"
    settings = [*SMALL, f"data.train={data}", f"data.val={data}", "data.shards=local", "probe.every=1", "probe.k=3"]
    recipe = load_recipe("recipes/barlow.yaml", [*settings, f"run.dir={tmp_path / 'run'}"])
    train(recipe, probe=probe_from_recipe(recipe))
    said = " ".join("".join(capsys.readouterr()).split())
    assert "The probe searches the images of one shard on the main process's node" in said
    for epoch in (1, 2):
        assert f"Epoch {epoch}: of 48 images 16 are on no node, 16 are visited again" in said
    assert [step for step, _ in losses_of(tmp_path / "run")] == list(range(1, 7))
    assert sum("knn" in line for line in metrics_of(tmp_path / "run")) == 2
    # The shards that a run was trained on are a part of what it is.
    shared = [f"data.train={data.parent.parent / 'whole'}", "data.shards=shared", f"run.dir={tmp_path / 'run'}"]
    with pytest.raises(UserError, match="other values of data.shards"):
        train(load_recipe("recipes/barlow.yaml", [*settings, *shared]), resume="auto")

"""`fastssl train` in several processes, started by torchrun: equal to one, killed, restarted, resized."""

import json
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from training_runs import (
    PATIENCE,
    assert_same_run,
    checkpoint_in,
    losses_of,
    metrics_of,
    small,
    start,
    train_jobs_in_processes,
    wait_for_line,
    weights_of,
)

from fastssl.common.distributed import unused_store
from fastssl.models import SSLModel
from fastssl.objectives import TotalLoss
from fastssl.profiling.device_stages import plain_network
from fastssl.recipe import load_recipe
from fastssl.training import setup, train

FP32 = "train.precision=fp32"  # on every CPU, so that only the exchange between processes rounds differently
TWENTY_STEPS = ["train.epochs=20", "train.batch_size=48", "optim.warmup_epochs=0", FP32]  # one batch an epoch
SGD = "optim={name: sgd, lr: 2e-3, final_lr_factor: 1.0}"


AS_ONE = {  # recipe, further overrides, tolerances: of losses, of norms, of the weights' way with SGD
    "sgd": ("vicreg", [SGD], 1e-4, 1e-2, 0.1),
    "accumulate": ("zprob_barlow", [SGD, "train.accumulate=2"], 1e-4, 1e-2, 0.1),
    # AdamW divides by the root of a gradient's square: where that is nearly zero, rounding decides the step.
    "adamw": ("zprob_barlow", ["optim.lr=1e-4"], 1e-3, 1e-2, None),
    # Gradients that are sent in bf16 are rounded by 0.4 %.
    "bf16_gradients": ("vicreg", ["optim.lr=1e-4", "train.compress_gradients=true"], 1e-2, 1e-2, None),
    # Batch statistics of two halves round differently, and then every activation, by 0.4 %. Two processes end as far
    # from one as bf16 from fp32 in one process: losses 1e-3, norms 5 %, 0.3 of the weights' way in 20 noisy steps.
    "bf16": ("zprob_barlow", [SGD, "train.precision=bf16"], 3e-3, 0.15, 0.6),
}
RESTARTED = ["train.epochs=6", "checkpoint.every=2"]


@pytest.fixture(scope="module")
def two_process_runs(canvas, tmp_path_factory):
    """A folder of undisturbed runs of two processes: those of AS_ONE, and one to compare a restarted run with."""
    folder = tmp_path_factory.mktemp("two_processes")
    jobs = [(recipe, small(canvas, folder / name, *TWENTY_STEPS, *more)) for name, (recipe, more, *_) in AS_ONE.items()]
    train_jobs_in_processes([*jobs, ("hprob_vicreg", small(canvas, folder / "restarted", *RESTARTED))], 2)
    return folder


@pytest.mark.parametrize("name", AS_ONE)
def test_two_processes_train_as_one(canvas, tmp_path, two_process_runs, name):
    """With synchronized batch norms: the loss of every step, and with SGD the weights after the last one."""
    recipe, more, of_losses, of_norms, of_way = AS_ONE[name]
    one, two = tmp_path / "1", two_process_runs / name
    train(load_recipe(f"recipes/{recipe}.yaml", small(canvas, one, *TWENTY_STEPS, *more)))
    losses = [[loss for _, loss in losses_of(run)] for run in (one, two)]
    assert len(losses[0]) == 20 and losses[1] == pytest.approx(losses[0], rel=of_losses)
    for key, steps in (("rankme_h", 20), ("rankme_z", 20), ("grad_norm", 5)):  # norms drift apart before losses do
        values = [[line[key] for line in metrics_of(run)[:steps]] for run in (one, two)]
        assert values[1] == pytest.approx(values[0], rel=of_norms), key
    assert json.loads((two / "environment.json").read_text())["processes"] == 2
    if of_way:
        torch.manual_seed(0)
        start_weights = dict(SSLModel(load_recipe(one / "recipe.yaml")).named_parameters())
        first, second, begun = (
            torch.cat([weights[name].double().flatten() for name in start_weights])
            for weights in (weights_of(one), weights_of(two), start_weights)
        )
        apart = (first - second).norm()
        assert apart < 1e-4 * first.norm() and apart < of_way * (first - begun).norm()


@pytest.mark.slow
def test_two_compiled_processes_train_as_two_that_are_not(canvas, tmp_path):
    """In bf16, and as one process in fp32. The 1.5 MB of gradients exceed DDP's first bucket, so graphs are split."""
    steps = [*TWENTY_STEPS, "train.epochs=6", SGD]
    in_bf16 = {"plain": ["train.compile=false"], "compiled": ["train.compile=true"]}
    jobs = [
        ("zprob_barlow", small(canvas, tmp_path / name, *steps, "train.precision=bf16", *more))
        for name, more in in_bf16.items()
    ]
    train_jobs_in_processes(jobs, 2, patience=4 * PATIENCE)
    train(load_recipe("recipes/zprob_barlow.yaml", small(canvas, tmp_path / "one", *steps)))
    losses = {name: [loss for _, loss in losses_of(tmp_path / name)] for name in (*in_bf16, "one")}
    assert len(losses["compiled"]) == 6
    assert losses["compiled"] == pytest.approx(losses["plain"], rel=3e-3)  # measured: 5e-4
    assert losses["compiled"] == pytest.approx(losses["one"], rel=5e-3)  # 6e-4; not compiled 1e-3
    for key, tolerance in (("rankme_h", 3e-2), ("std_z", 3e-2), ("grad_norm", 6e-2)):  # norms: 4 %; fp32's is between
        plain, compiled = ([line[key] for line in metrics_of(tmp_path / name)] for name in in_bf16)
        assert compiled == pytest.approx(plain, rel=tolerance)
    last = metrics_of(tmp_path / "compiled")[-1]
    assert last["graph_breaks"] == last["recompiled"] == 0


def test_gradients_that_are_sent_over_a_network_are_in_smaller_buckets(monkeypatch):
    """Of a compiled step only: on several hosts, a sixth of the gradients."""
    recipe = load_recipe("recipes/zprob_barlow.yaml")
    network = setup.Network(SSLModel(recipe), TotalLoss(recipe), torch.device("cpu"), "fp32")
    assert setup.bucket_size(network) == pytest.approx(63.6e6 / 6 / 2**20, rel=1e-3)
    assert setup.bucket_size(torch.nn.Linear(10, 10)) == 1  # the least that torch.compile takes
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        for on_this_host, compiled, wanted in ((4, True, 25), (2, False, 25), (2, True, setup.bucket_size(network))):
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(on_this_host))
            wrapped, _ = setup.wrap_network(network, recipe, compiled)
            assert plain_network(SimpleNamespace(network=wrapped)) is network
            assert wrapped.bucket_bytes_cap == int(wanted * 2**20)
    finally:
        dist.destroy_process_group()


def test_a_store_with_keys_of_an_earlier_start_gives_an_unused_one():
    """Three ranks (threads here) join twice over one store, which holds the request of a process that has ended."""
    store = dist.HashStore()
    store.set("fastssl/request/1", "of a process that has ended")

    def join(rank):
        unused = unused_store(store, rank, 3)
        unused.set(f"from {rank}", "x")
        unused.wait(["from 0", "from 1", "from 2"], timedelta(seconds=60))
        return unused.get("from 0")

    for _ in range(2):
        with ThreadPoolExecutor(3) as threads:
            assert list(threads.map(join, range(3))) == [b"x"] * 3


def ranks_of(launcher) -> dict[int, psutil.Process]:
    """The training processes below torchrun, by rank."""
    found = {}
    for process in psutil.Process(launcher.pid).children(recursive=True):
        environment = process.environ()
        if "LOCAL_RANK" in environment:
            found[int(environment["RANK"])] = process
    return found


def test_torchrun_restarts_a_killed_rank_and_the_run_ends_as_undisturbed(canvas, tmp_path, two_process_runs):
    """The command of the first start names no checkpoint: a restarted process finds its own run."""
    launcher = start("hprob_vicreg", small(canvas, tmp_path / "killed", *RESTARTED), 2, ("--max-restarts", "2"))
    wait_for_line(launcher, tmp_path / "killed", 5)
    ranks_of(launcher)[1].send_signal(signal.SIGKILL)
    output, _ = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == 0, output
    assert "Resuming" in output
    assert_same_run(two_process_runs / "restarted", tmp_path / "killed")
    assert len(json.loads((tmp_path / "killed" / "environment.json").read_text())["earlier"]) == 1


def test_sigterm_to_torchrun_saves_the_step_and_one_process_continues(canvas, tmp_path):
    """As a scheduler does it: all ranks stop at one step, with a checkpoint; the run ends at another world size."""
    arguments = small(canvas, tmp_path / "run", "train.epochs=30", "checkpoint.every=1000", "optim.lr=1e-4")
    launcher = start("zprob_barlow", arguments, 2)
    wait_for_line(launcher, tmp_path / "run", 4)
    asked = time.time()
    launcher.send_signal(signal.SIGTERM)
    output, _ = launcher.communicate(timeout=PATIENCE)
    assert time.time() - asked < 30 and launcher.returncode != 0
    stopped_at = checkpoint_in(tmp_path / "run")["step"]
    assert 4 <= stopped_at < 90 and f"Stopped by SIGTERM after step {stopped_at}" in output
    train(load_recipe("recipes/zprob_barlow.yaml", arguments), resume="auto")
    assert [step for step, _ in losses_of(tmp_path / "run")] == list(range(1, 91))


def test_a_batch_that_does_not_divide_is_refused_by_every_process(canvas, tmp_path):
    launcher = start("barlow", small(canvas, tmp_path / "run", "train.batch_size=15"), 2)
    output, _ = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode != 0 and not (tmp_path / "run").exists()
    assert "(rank 1): train.batch_size=15 does not divide by 2 processes" in output
    assert "UserError" not in output  # one sentence; the traceback is torchrun's own


@pytest.mark.slow
def test_a_job_continues_on_the_remaining_host(canvas, tmp_path):
    """Two hosts of one process each (two torchruns); one is killed, the other continues alone."""
    arguments = small(canvas, tmp_path / "run", "train.epochs=200", "checkpoint.every=2", "--resume", "auto")
    rendezvous = ("--nnodes", "1:2", "--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-id", "test")
    endpoint = ("--rdzv-endpoint", "localhost:29417", "--rdzv-conf", "last_call_timeout=5,keep_alive_interval=1")
    remaining = start("barlow", arguments, 1, (*rendezvous, *endpoint))
    while socket.socket().connect_ex(("localhost", 29417)) != 0:  # the rendezvous is this host's
        time.sleep(0.1)
    gone = start("barlow", arguments, 1, (*rendezvous, *endpoint))
    wait_for_line(remaining, tmp_path / "run", 6)
    for process in (*psutil.Process(gone.pid).children(recursive=True), psutil.Process(gone.pid)):
        process.kill()
    output, _ = remaining.communicate(timeout=PATIENCE)
    assert remaining.returncode == 0, output
    assert [step for step, _ in losses_of(tmp_path / "run")] == list(range(1, 601))
    starts = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert starts["processes"] == 1 and starts["earlier"][0]["processes"] == 2

"""A run can be evaluated, exported and shown while it trains."""

import multiprocessing
import os
import subprocess
import time
import warnings

import pytest
import torch
from small_models import make_run
from training_runs import ENVIRONMENT, PATIENCE, command, metrics_of, small

from fastssl.evaluation import evaluate_knn, find_evaluation_data, load_run_encoder
from fastssl.export import export_run
from fastssl.models.checkpoint import newest_checkpoint, write_checkpoint


def save_until(run, ends_at):
    saved = newest_checkpoint(run).saved
    step = 0
    while time.time() < ends_at:
        step += 1
        write_checkpoint(run, "last.pt", {**saved, "step": step})


def test_a_checkpoint_that_is_replaced_all_the_time_is_read_whole(tmp_path):
    run, _, _ = make_run(tmp_path / "run", {"train": "x.beton"})
    write_checkpoint(run, "last.pt", newest_checkpoint(run).saved)
    writer = multiprocessing.get_context("fork").Process(target=save_until, args=(run, time.time() + 5))
    writer.start()
    steps = []
    while writer.is_alive():
        found = newest_checkpoint(run)
        assert found.warning is None
        steps.append(found.saved["step"])
    assert writer.exitcode == 0 and steps == sorted(steps) and len(set(steps)) > 20
    assert sorted(os.listdir(run / "checkpoints")) == ["last.pt", "previous.pt"]


@pytest.mark.slow
def test_evaluations_and_exports_during_training_change_nothing(canvas, tmp_path):
    run = tmp_path / "run"
    keys = small(canvas, run, "train.epochs=40", "checkpoint.every=1")
    process = subprocess.Popen(
        command("barlow", keys), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.time() + PATIENCE
    while not (run / "checkpoints" / "previous.pt").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    evaluated = set()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        while process.poll() is None:
            encoder = load_run_encoder(run)
            result = evaluate_knn(encoder, find_evaluation_data(encoder), ks=[3])
            evaluated.add(result["encoder_sha256"])
            export_run(run, "timm", tmp_path / f"{len(evaluated)}-{time.time()}" / "x.safetensors")
    assert process.returncode == 0 and len(evaluated) > 2
    assert [line["step"] for line in metrics_of(run) if "loss" in line] == list(range(1, 121))
    assert torch.load(run / "checkpoints" / "last.pt", weights_only=True)["step"] == 120

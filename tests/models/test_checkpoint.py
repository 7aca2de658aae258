"""The checkpoint file: its keys do not change by accident, and files with the fewest keys still load."""

import resource
import signal

import pytest
import torch
from small_models import make_run
from training_runs import checkpoint_in, small

import fastssl
from fastssl.models.checkpoint import SavedState, newest_checkpoint, write_checkpoint
from fastssl.recipe import load_recipe
from fastssl.training import train

# Another key, or another meaning of one, needs a way to read the files that users have.
KEYS = {
    "recipe", "model", "ema", "optimizer", "scaler", "loader", "skipped", "step", "epochs_probed", "best", "seconds",
    "precision", "torch_threads", "rng", "cuda_rng", "decay_epochs",
}  # fmt: skip


def test_training_writes_the_documented_keys(canvas, tmp_path):
    run = train(load_recipe("recipes/zprob_barlow.yaml", small(canvas, tmp_path / "run", "train.epochs=1")))
    assert checkpoint_in(run).keys() == SavedState.__annotations__.keys() == KEYS


def test_recipe_model_and_step_are_enough_for_a_model(tmp_path):
    run, recipe, model = make_run(tmp_path / "run", {"train": "x.beton"})
    checkpoint = newest_checkpoint(run)
    assert checkpoint.recipe == recipe and checkpoint.weights.keys() == model.state_dict().keys()
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(fastssl.load_model(run).embed(images).h, model.embed(images).h)


def test_weights_are_the_moving_average_if_there_is_one(tmp_path):
    run, _, model = make_run(tmp_path / "run", {"train": "x.beton"})
    saved = newest_checkpoint(run).saved
    average = {name: tensor + 1 for name, tensor in saved["model"].items()}
    write_checkpoint(run, "last.pt", {**saved, "ema": average})
    loaded = fastssl.load_model(run).state_dict()
    assert all(torch.equal(loaded[name], average[name]) for name in average)
    before = newest_checkpoint(run / "checkpoints" / "previous.pt").weights
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_disk_that_is_full_at_any_byte_is_an_error_of_the_disk_and_the_old_file_stays(tmp_path):
    """torch.save itself raises a RuntimeError for most of these sizes."""
    run, *_ = make_run(tmp_path / "run", {"train": "x.beton"})
    saved, path = newest_checkpoint(run).saved, run / "checkpoints" / "last.pt"
    whole = path.read_bytes()
    handler, before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for size in (0, 100, 5000, 70_000, len(whole) // 2, len(whole) - 3000, len(whole) - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
            with pytest.raises(OSError, match="File too large"):
                write_checkpoint(run, "last.pt", {**saved, "step": 7})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == whole and [file.name for file in path.parent.iterdir()] == ["last.pt"]
    write_checkpoint(run, "last.pt", {**saved, "step": 7})
    assert newest_checkpoint(run).saved["step"] == 7

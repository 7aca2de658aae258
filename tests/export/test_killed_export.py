"""An export or an embedding that was killed is repeated by the same command, and leaves no other files."""

import importlib
import os
import signal
import sys

import pytest
import torch
from small_models import make_run
from training_runs import FORKS, PATIENCE

from fastssl.cli import main
from fastssl.common.errors import UserError
from fastssl.export import export_run
from fastssl.models import load_encoder


def killed_in(place, *arguments):
    """Run a command in a process that is killed when it comes to the function `place`."""
    process = FORKS.Process(target=run_and_kill, args=(place, ["fastssl", *map(str, arguments)]))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL


def run_and_kill(place, argv):
    torch.set_num_threads(1)
    module, _, name = place.rpartition(".")
    setattr(importlib.import_module(module), name, lambda *arguments, **options: os.kill(os.getpid(), signal.SIGKILL))
    sys.argv = argv
    main()


@pytest.fixture
def run(canvas, tmp_path):
    folder, _, _ = make_run(tmp_path / "run", {"train": str(canvas / "train.beton")}, embedding={"stochastic": "z"})
    return folder


@pytest.mark.parametrize(
    "format, place",
    [
        ("timm", "fastssl.export.run.save_file"),
        ("safetensors", "fastssl.export.run.write_exported"),
        ("safetensors", "fastssl.common.files.sync"),  # before the card has its name
    ],
)
def test_a_killed_export_is_repeated(run, format, place):
    killed_in(place, "export", run, "--format", format)
    folder = run / "export" / format
    assert len(list(folder.iterdir())) in (1, 2)
    made = export_run(run, format)
    assert sorted(os.listdir(folder)) == sorted([made.card.name, made.path.name])
    if format == "safetensors":
        assert load_encoder(made.path) is not None
    with pytest.raises(UserError, match="exists already and is not overwritten"):
        export_run(run, format)


def test_a_card_of_the_user_or_of_another_export_is_not_overwritten(run):
    killed_in("fastssl.export.run.save_file", "export", run, "--format", "timm")
    card = run / "export" / "timm" / "model_card.md"
    for content in (card.read_bytes() + b"License: MIT\n", card.read_bytes()[:-1], b""):
        card.write_bytes(content)
        with pytest.raises(UserError, match="model_card.md exists already and is not overwritten"):
            export_run(run, "timm")
        assert card.read_bytes() == content


@pytest.mark.parametrize("name", ["export", "export/timm"])
def test_an_export_writes_through_no_linked_folder(run, tmp_path, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).symlink_to(outside)
    with pytest.raises(UserError, match="is a symbolic link, so nothing is written to it"):
        export_run(run, "timm")
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("suffix", [".npz", ".csv"])
def test_a_killed_embedding_leaves_nothing_behind_the_next_one(run, canvas, tmp_path, monkeypatch, suffix):
    out = tmp_path / "out"
    out.mkdir()
    path = out / f"x{suffix}"
    arguments = ("embed", run, canvas / "val.beton", "--out", path)
    place = "fastssl.evaluation.embed.output._write_header" if suffix == ".npz" else "fastssl.common.files.sync"
    killed_in(place, *arguments)
    (left,) = out.iterdir()
    assert left.name.startswith(f".x{suffix}.") and ".part" in left.name
    mine = out / f".notes{left.name.removeprefix(f'.x{suffix}')}"  # written by the same process, but another file
    mine.write_text("mine")
    torch.manual_seed(0)
    monkeypatch.setattr(sys, "argv", ["fastssl", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code and {file.name for file in out.iterdir()} == {path.name, mine.name}

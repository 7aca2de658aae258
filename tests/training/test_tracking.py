"""metrics.jsonl, TensorBoard and Weights & Biases: every metric of every step once, also after a resume."""

import json
import resource
import signal
import sys
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import metrics_of, small

from fastssl.common.errors import Stopped, UserError
from fastssl.recipe import load_recipe
from fastssl.training import tracking, train
from fastssl.training.tracking import MetricsFile, parse_metrics


def no_warning(line):
    raise AssertionError(line)


def test_a_resume_keeps_the_lines_before_its_checkpoint_and_drops_incomplete_ones(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 1, "epoch": 0, "loss": 1.0}, {"step": 2, "epoch": 0, "loss": None},
        {"step": 2, "epoch": 0, "knn": 0.1},
        {"step": 3, "epoch": 1, "loss": 3.0}, {"step": 4, "epoch": 1, "loss": 4.0}, {"step": 4, "epoch": 1, "knn": 0.2},
    ]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    for resumed_at, epochs_probed, kept in ((0, 0, []), (2, 0, [0, 1]), (2, 1, [0, 1, 2]), (4, 1, [0, 1, 2, 3, 4])):
        path.write_text(text + '{"step": 5, "lo')
        log = MetricsFile(path, resumed_at, epochs_probed, no_warning)
        log.write(9, {"loss": float("nan")})
        log.close()
        assert metrics_of(tmp_path) == [*(lines[i] for i in kept), {"step": 9, "loss": None}]
    odd = b'\xff\xfe\n[1]\n7\n{"step": "x", "loss": 1}\n{"step": 1, "epoch": null}\n'
    path.write_bytes(odd + b"[" * 100_000)  # so deep that the parser gives up
    MetricsFile(path, 5, 0, no_warning).close()
    assert path.read_text() == ""


def test_tensorboard_shows_each_step_once_across_a_resume(canvas, tmp_path):
    keys = "log.to=[tensorboard]", "probe.every=1"
    recipe = load_recipe("recipes/barlow.yaml", small(canvas, tmp_path / "run", *keys))
    probes = iter([{"knn": 0.5}, None, {"knn": 0.75}])

    def probe(model):
        values = next(probes)
        if values is None:
            raise RuntimeError("killed here, after step 6, with nothing saved since step 3")
        return values

    with pytest.raises(RuntimeError):
        train(recipe, probe=probe)
    train(recipe, resume="auto", probe=probe)
    shown = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert {"loss", "knn", "lr", "images_per_second", "rankme_h"} <= set(shown.Tags()["scalars"])
    for key in ("loss", "knn"):
        logged = [(line["step"], line[key]) for line in metrics_of(tmp_path / "run") if key in line]
        assert [event.step for event in shown.Scalars(key)] == [step for step, _ in logged]
        assert [event.value for event in shown.Scalars(key)] == pytest.approx([value for _, value in logged], rel=1e-6)


def test_weights_and_biases_gets_every_line_under_one_identity(canvas, tmp_path, monkeypatch):
    """The package is not a dependency: a fake one records what it is called with."""
    calls = []

    class Run:
        def log(self, metrics, step):
            calls.append((step, metrics))

        def finish(self):
            calls.append("finished")

    def init(**options):
        calls.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    recipe = load_recipe("recipes/barlow.yaml", small(canvas, tmp_path / "run", "log.to=[wandb]", "train.epochs=1"))
    for _ in range(2):
        train(recipe, resume="auto")
    first, second = [entry for entry in calls if isinstance(entry, dict)]
    assert first["id"] == second["id"] and first["config"]["optim"]["name"] == "adamw"
    assert [entry[0] for entry in calls if isinstance(entry, tuple)] == [1, 2, 3]
    assert calls.count("finished") == 2


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_package_is_one_sentence(canvas, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    recipe = load_recipe("recipes/barlow.yaml", small(canvas, tmp_path / "run", f"log.to=[{name}]"))
    with pytest.raises(UserError, match=f"pip install {name}"):
        train(recipe)
    assert not (tmp_path / "run").exists()


def test_environment_json_holds_every_start(canvas, tmp_path):
    recipe = load_recipe("recipes/barlow.yaml", small(canvas, tmp_path / "run", "probe.every=1"))

    def stop(model):
        raise Stopped(0)

    with pytest.raises(Stopped):
        train(recipe, probe=stop)
    train(recipe, resume="auto")
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert {"command", "git", "packages", "host", "cpu", "cores", "memory_gb", "processes"} <= set(environment)
    assert len(environment["earlier"]) == 1 and environment["earlier"][0]["step"] == 0


def test_lines_that_wait_for_room_are_written_when_there_is_some(tmp_path):
    """Once there is room again, the next save or the end writes the line, also without a further line."""
    warnings = []
    log = MetricsFile(tmp_path / "metrics.jsonl", 0, 0, warnings.append)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        log.write(1, {"loss": 1.0})
        resource.setrlimit(resource.RLIMIT_FSIZE, (40, before[1]))
        log.write(2, {"loss": 2.0})
        log.write(3, {"loss": 3.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [line["step"] for line in metrics_of(tmp_path)] == [1] and len(warnings) == 1
    log.flush()
    assert [line["step"] for line in metrics_of(tmp_path)] == [1, 2, 3]
    log.close()


def test_a_tracker_whose_disk_is_full_is_left_out_and_training_goes_on(canvas, tmp_path, monkeypatch, capsys):
    def no_space(self, step, metrics):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tracking.TensorBoard, "write", no_space)
    keys = "log.to=[tensorboard]", "train.epochs=1"
    run = train(load_recipe("recipes/barlow.yaml", small(canvas, tmp_path / "run", *keys)))
    assert len(metrics_of(run)) == 3
    assert capsys.readouterr().out.count("warning: tensorboard cannot be written") == 1


def test_parse_metrics_skips_other_lines():
    lines = ["null", "[1]", '{"step": "x"}', '{"step": 1, "loss": null, "note": "x"}', "[" * 100000, '{"step": 2, "l']
    assert list(parse_metrics(lines)) == [{"step": 1, "loss": None}]

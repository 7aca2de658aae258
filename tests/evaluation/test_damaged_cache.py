"""Results and features in a run directory from elsewhere, or of a process that was killed."""

import json
import math
import os
import pickle
import platform
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from pydantic import ValidationError
from small_models import make_run

from fastssl.evaluation import evaluate_knn, features, load_run_encoder
from fastssl.evaluation import find_evaluation_data as data_of_run
from fastssl.evaluation.features import Features, read_features, write_features
from fastssl.evaluation.mutual_information import estimators
from fastssl.evaluation.mutual_information import evaluate as mi
from fastssl.evaluation.ood import evaluate as ood
from fastssl.evaluation.ood import find_sets


def saved_features(folder, **changes):
    """A cache of five images, as an attacker would write it: with checksums that are right."""
    import zlib

    rng = np.random.default_rng(0)
    arrays = {
        "h": rng.normal(size=(5, 3)).astype(np.float32), "label": np.arange(5), "index": np.arange(5),
        "mu": rng.normal(size=(5, 2)).astype(np.float32), "sigma": np.ones((5, 2), np.float32),
    }  # fmt: skip
    arrays |= {name: x for name, x in changes.items() if name in arrays}
    folder.mkdir()
    crc = {}
    for name, x in arrays.items():
        if x is not None:
            np.save(folder / f"{name}.npy", x, allow_pickle=True)
            crc[name] = zlib.crc32(np.ascontiguousarray(x).data) if x.dtype != object else 0
    about = {"space": changes.get("space", "z"), "crc32": changes.get("crc32", crc)}
    (folder / "about.json").write_text(json.dumps(about))
    return folder


ODD = {
    "another number of rows": {"label": np.arange(4)},
    "no rows": {name: np.zeros((0, 3), np.float32) for name in ("h", "mu", "sigma")},
    "one dimension": {"h": np.zeros(5, np.float32)},
    "four dimensions": {"h": np.zeros((5, 2, 2, 2), np.float32)},
    "texts": {"label": np.array(list("abcde"))},
    "labels that are no integers": {"label": np.arange(5.0)},
    "float64": {"h": np.zeros((5, 3))},
    "nan": {"h": np.full((5, 3), np.nan, np.float32)},
    "infinity": {"sigma": np.full((5, 2), np.inf, np.float32)},
    "pickled objects": {"h": np.array([print] * 5, dtype=object)},
    "records": {"label": np.zeros(5, [("a", np.int64)])},
    "mu without sigma": {"sigma": None},
    "no h": {"h": None},
    "an unknown space": {"space": "x"},
    "a number as space": {"space": 3},
    "no space": {"space": None},
    "checksums of other types": {"crc32": {"h": "x"}},
    "a path out of the folder": {"crc32": {"../../x": 0}},
    "a list": {"crc32": []},
}


@pytest.mark.parametrize("name", ODD)
def test_a_cache_with_other_arrays_is_not_read(tmp_path, name):
    assert isinstance(read_features(saved_features(tmp_path / "good")), Features)
    assert read_features(saved_features(tmp_path / "odd", **ODD[name])) is None


@pytest.mark.parametrize("file", ["about.json", "h.npy", "label.npy"])
def test_files_that_are_no_arrays_neither_hang_nor_run_code(tmp_path, file):
    folder = saved_features(tmp_path / "x")
    path = folder / file
    bomb = b"\x93NUMPY\x01\x00\xf0\x10" + b"(" * 4336
    huge = b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999, 3), }"
    for content in (b"[" * 10**6, pickle.dumps(print), bomb, huge.ljust(128) + b"\n", b"{}", b"PK\x03\x04", b""):
        path.write_bytes(content)
        assert read_features(folder) is None
    path.unlink()
    os.mkfifo(path)
    assert read_features(folder) is None
    path.unlink()
    path.symlink_to("/dev/zero")
    assert read_features(folder) is None
    path.unlink()
    path.mkdir()
    assert read_features(folder) is None


@pytest.fixture
def run(canvas, tmp_path):
    folder, _, _ = make_run(tmp_path / "run", {"train": str(canvas / "train.beton"), "val": str(canvas / "val.beton")})
    return folder


def knn(run):
    encoder = load_run_encoder(run)
    return evaluate_knn(encoder, data_of_run(encoder), ks=[5])


def test_features_of_other_images_or_another_width_are_computed_again(run):
    right = knn(run)["metrics"]
    (cache,) = (run / "features").glob("val-*")
    good = {file.name: file.read_bytes() for file in cache.iterdir()}
    for name, change in (
        ("index", lambda x: x + 10**12),
        ("label", lambda x: x[::-1] + 7),
        ("h", lambda x: x[:, :5]),
        ("h", lambda x: np.stack([x, x], 1)),
    ):
        x = np.ascontiguousarray(change(np.load(cache / f"{name}.npy")))
        np.save(cache / f"{name}.npy", x)
        about = json.loads(good["about.json"])
        about["crc32"][name] = features.zlib.crc32(x.data)
        (cache / "about.json").write_text(json.dumps(about))
        assert read_features(cache) is not None  # sound in itself
        (run / "eval" / "knn.json").unlink()
        assert knn(run)["metrics"] == right
        assert {file.name: file.read_bytes() for file in cache.iterdir()} == good


def test_a_result_without_its_fields_is_measured_again(run):
    right = knn(run)
    path = run / "eval" / "knn.json"
    good = json.loads(path.read_text())
    cases = [{**good, "metrics": odd} for odd in (None, [], {"a": "b"}, {"a": None}, {"a": True}, {"a": math.nan}, 3)]
    cases += [{**good, "intervals": odd} for odd in ([], {"a": [1]}, {"a": [0, 1, 2]}, {"a": ["x", "y"]}, {"a": 1})]
    cases += [{**good, key: odd} for key in ("measured_at", "fastssl", "saturated") for odd in (3, {}, None)]
    cases += [{**good, "metrics": {"a": 10**400}}, {key: x for key, x in good.items() if key != "metrics"}, [good], 3]
    for case in cases:
        path.write_text(json.dumps(case))
        again = knn(run)
        assert {**again, "measured_at": ""} == {**right, "measured_at": ""}, case
    for content in (b"[" * 10**6, b'{"a":' * 5000, b"\xff", b""):
        path.write_bytes(content)
        assert knn(run)["metrics"] == right["metrics"]
    path.unlink()
    os.mkfifo(path)
    assert knn(run)["metrics"] == right["metrics"]


KILLED = """
import sys, time, numpy as np
from pathlib import Path
from fastssl.evaluation.features import Features, write_features
def batches():
    yield Features(np.ones((2, 3), np.float32), np.zeros(2, np.int64), np.arange(2))
    print("half", flush=True)
    time.sleep(600)
write_features(Path(sys.argv[1]), batches(), 4)
"""


def test_the_features_of_a_killed_process_are_removed_by_the_next_one_and_nothing_else(tmp_path):
    folder = tmp_path / "val-0123456789abcdef"

    def start():
        process = subprocess.Popen([sys.executable, "-c", KILLED, folder], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "half\n"
        return process

    killed, alive = start(), start()
    left = tmp_path / f".{folder.name}.{killed.pid}.part"
    assert (left / "h.npy").stat().st_size > 0
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    of_user = tmp_path / f".notes.{killed.pid}.part"  # the same kind of name, with files of his own
    of_user.mkdir()
    (of_user / "diary.txt").write_text("mine")
    with_more = tmp_path / f".more.{killed.pid}.part"
    with_more.mkdir()
    (with_more / "about.json").write_text(json.dumps({"host": platform.node()}))
    (with_more / "diary.txt").write_text("mine")
    elsewhere = tmp_path / f".elsewhere.{killed.pid}.part"  # on another machine the number may be of a running one
    elsewhere.mkdir()
    (elsewhere / "about.json").write_text(json.dumps({"host": "another"}))
    link = tmp_path / f".link.{killed.pid}.part"
    link.symlink_to(of_user)
    try:
        batch = Features(np.ones((2, 3), np.float32), np.zeros(2, np.int64), np.arange(2))
        write_features(tmp_path / "train-0123456789abcdef", [batch], 2)
        assert not left.exists() and link.is_symlink() and elsewhere.exists()
        assert (of_user / "diary.txt").read_text() == (with_more / "diary.txt").read_text() == "mine"
        assert (tmp_path / f".{folder.name}.{alive.pid}.part" / "h.npy").exists()
        yesterday = time.time() - features.ABANDONED_AFTER - 1
        os.utime(elsewhere / "about.json", (yesterday, yesterday))
        write_features(tmp_path / "test-0123456789abcdef", [batch], 2)
        assert not elsewhere.exists() and of_user.exists()
    finally:
        alive.kill()
        alive.wait()


@pytest.mark.parametrize("name", ["eval", "features"])
def test_nothing_is_written_through_a_linked_folder(run, tmp_path, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    (run / name).symlink_to(outside)
    with pytest.raises(Exception, match="is a symbolic link, so nothing is written to it"):
        knn(run)
    assert list(outside.iterdir()) == []


def changed(value, path, new):
    """The JSON value with another value at a path of keys; `new` None removes the key."""
    key, *rest = path
    inner = {name: x for name, x in value.items() if name != key or rest or new is not None}
    return inner | ({key: changed(value[key], rest, new) if rest else new} if rest or new is not None else {})


def assert_every_field_is_needed(schema, result, paths, values):
    schema.validate_python(result, strict=True)
    for path in paths:
        for odd in (None, *values):
            with pytest.raises(ValidationError):
                schema.validate_python(changed(result, path, odd), strict=True)


def test_a_result_of_ood_without_its_fields_is_not_used(run, canvas, monkeypatch):
    monkeypatch.setattr(ood, "DETECTORS", {name: ood.DETECTORS[name] for name in ("knn_cosine", "mahalanobis")})
    monkeypatch.setattr(ood.plots, "draw_ood_plots", lambda *arguments: None)
    encoder = load_run_encoder(run)
    result = ood.evaluate_ood(encoder, find_sets(encoder, near=[canvas / "train.beton"]))
    detector = ("detectors", "knn_cosine")
    near = (*detector, "near")
    (name,) = result["near"]
    paths = [("detectors",), ("scores",), near, (*near, "metrics"), (*near, "metrics", "auroc")]
    paths += [
        (*near, "intervals", "auroc"),
        (*near, "inverted"),
        (*detector, "norm_correlation"),
        (*detector, "labels"),
    ]
    paths += [(*detector, "sets", name), (*detector, "sets", name, "metrics", "auroc")]
    assert_every_field_is_needed(ood.OOD_RESULT, result, paths, [3j, {"a": "b"}, math.nan])
    for path, odd in ((near, 3), ((*near, "metrics", "auroc"), math.nan), ((*near, "intervals", "auroc"), [0.5])):
        with pytest.raises(ValidationError):
            ood.OOD_RESULT.validate_python(changed(result, path, odd), strict=True)
    path = next((run / "eval").glob("ood-*.json"))
    path.write_text(json.dumps(changed(result, (*near, "metrics", "auroc"), None)))
    again = ood.evaluate_ood(encoder, find_sets(encoder, near=[canvas / "train.beton"]))
    assert again["detectors"] == result["detectors"]


def test_a_result_of_mi_without_its_fields_is_not_used(canvas, tmp_path, monkeypatch):
    monkeypatch.setattr(estimators, "STEPS", 20)
    data = {"train": str(canvas / "train.beton"), "val": str(canvas / "train.beton")}
    folder, _, _ = make_run(tmp_path / "run", data, embedding={"stochastic": "z", "samples": 2})
    result = mi.evaluate_mi(load_run_encoder(folder))
    quantity = ("quantities", "I(V;H)")
    bound = ("bounds", next(iter(result["bounds"])))
    paths = [("quantities",), ("bounds",), ("checks",), ("infinite",), ("plot",), (*quantity, "js"), (*bound, "rate")]
    paths += [
        (*quantity, "mine", "nats"),
        (*quantity, "js", "saturated"),
        (*quantity, "js", "ceiling"),
        (*bound, "upper"),
    ]
    assert_every_field_is_needed(mi.MI_RESULT, result, paths, [3j, {"a": "b"}, [[]], math.nan])

"""Where a file cannot be written, a command ends with one sentence, and no half file and no leftover stays.

The limit on the size of files stands for a full disk: the kernel refuses to write more, to any library.
"""

import contextlib
import io
import json
import resource
import shutil
import signal
import sys
import warnings

import pytest
import torch
from small_models import make_run
from training_runs import FORKS, PATIENCE

from fastssl import cli

COMMANDS = {
    "knn": "eval knn RUN --k 3",
    "linear": "eval linear RUN --protocol lbfgs",
    "out": "eval knn RUN --k 3 --out OUT/x.json",
    "uncertainty": "eval uncertainty RUN",
    "ood": "eval ood RUN --near DATA/val.beton",
    "semisup": "eval semisup RUN --percent 50 --set train.epochs=1 --set log.every=1",
    "weights": "eval knn RUN/checkpoints/alone.pt --k 3",
    "timm": "export RUN --format timm",
    "safetensors": "export RUN --format safetensors --sigma --out OUT/x.safetensors",
    "npz": "embed RUN DATA/val.beton --out OUT/x.npz --score knn_cosine",
    "csv": "embed RUN DATA/val.beton --out OUT/x.csv",
    "sheet": "inspect DATA/val.beton --sheet OUT/x.png",
}
LIMITS = (0, 1000, 20_000, 300_000, 10**9)  # bytes of a file
QUICK = ("semisup", "npz", "timm")


def run_under_limits(argv, connection):
    """Run a command under each of LIMITS: (exit code or exception, stderr), and wait for an answer after each."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    for limit in LIMITS:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            sys.argv = ["fastssl", *argv]
            try:
                cli.main()
            except SystemExit as end:
                code = end.code or 0
            except BaseException as error:
                code = repr(error)
        connection.send((code, err.getvalue()))
        connection.recv()


@pytest.mark.parametrize("name", [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in COMMANDS])
def test_a_file_that_cannot_be_written_is_one_sentence(canvas, tmp_path, name):
    run, out = tmp_path / "run", tmp_path / "out"
    data = {"train": str(canvas / "train.beton"), "val": str(canvas / "val.beton")}
    make_run(run, data, embedding={"stochastic": "z"}, train={"batch_size": 8})
    shutil.copy(run / "checkpoints" / "last.pt", tmp_path / "alone.pt")
    out.mkdir()
    places = {"RUN/checkpoints/alone.pt": tmp_path / "alone.pt", "RUN": run, "OUT": out, "DATA": canvas}
    argv = COMMANDS[name]
    for word, path in places.items():
        argv = argv.replace(word, str(path))
    before = {path for path in tmp_path.rglob("*")}
    ours, theirs = FORKS.Pipe()
    process = FORKS.Process(target=run_under_limits, args=(argv.split(), theirs))
    process.start()
    theirs.close()
    codes = []
    for limit in LIMITS:
        assert ours.poll(PATIENCE)
        code, err = ours.recv()
        codes.append(code)
        after = {path for path in tmp_path.rglob("*")} - before
        left = [path for path in after if path.name.startswith((".", "tmp")) and path.name != ".lock"]
        assert not left, (limit, left)
        if code:
            sentences = [line for line in err.splitlines() if line.startswith("error: ")]
            assert code == 2 and len(sentences) == 1 and "Traceback" not in err, (limit, code, err)
            assert "cannot be written" in err, (limit, err)
        for path in after:
            if path.suffix == ".json":
                json.loads(path.read_text())
        ours.send(None)
    process.join(PATIENCE)
    assert codes[0] == 2 and codes[-1] == 0, codes

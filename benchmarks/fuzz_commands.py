"""Fuzz the commands with files from somebody else: .beton files, checkpoints, weights, recipes and run directories.

python benchmarks/fuzz_commands.py --minutes 10 --seed 0
python benchmarks/fuzz_commands.py --minutes 1 --what checkpoint run

A data set and a run are made once (`make_base`). Each case copies them into a folder of its own, changes one thing
(`KINDS`), and runs a command or two on it in a child process, which goes on to the next case.

Failures:
- traceback: an exception that is not a UserError
- crash: the process died of a signal, or ended by itself
- hang: a command took more than HANG seconds
- memory: the process took more than MEMORY
- exit code: neither 0 nor 2
- message: of several lines, with control characters, or above LONGEST_MESSAGE
- touched: a file outside of the run or output directory changed, or a file of the user in it
- leftover: a temporary file stayed
- verified: `inspect --verify` accepts a .beton that cannot be read

Case i of a kind is a function of (seed, kind, i); `--case KIND I` runs it alone and keeps its folder. The exit code is
1 if there was a failure.
"""

import argparse
import contextlib
import copy
import faulthandler
import io
import itertools
import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import yaml
from fuzz_inputs import mutate_beton, mutate_bytes
from fuzz_process import ChildProcess
from PIL import Image
from safetensors.torch import load_file, save_file

from fastssl import cli
from fastssl.beton import build_beton
from fastssl.common.terminal import progress
from fastssl.recipe import load_recipe
from fastssl.training import train

HANG = 60  # seconds; the slowest command takes about three
START = 120  # seconds for the child process to import and compile
MEMORY = 6 << 30  # bytes; a process that has trained and embedded has 1 GiB
LONGEST_MESSAGE = 1200  # characters, without the folder's name
IMAGES = {"train": 24, "val": 12}
SMALL = [
    "model.backbone=test_resnet", "views.size=32", "model.projector={layers: 2, hidden: 32, out: 32}",
    "embedding.samples=3", "train.batch_size=8", "train.epochs=1", "train.device=cpu", "log.every=1",
    "probe={every: 1, k: 3}", "optim.warmup_epochs=0", "data.workers=1",
]  # fmt: skip
PROFILE = Path(__file__).parents[1] / "records" / "profile-canvas.json"
USER_FILES = ("notes.txt", ".thesis.part", ".film.mp4.part", "checkpoints/.mine.part.pt", "checkpoints/mine.pt")

Command = list[str]


# --- what the cases start from ------------------------------------------------------------------


def make_base(base: Path) -> None:
    """Make base/{raw,jpeg,bc4,full}/{train,val}.beton, base/run, and base/model.safetensors."""
    rng = np.random.default_rng(0)
    for split, count in IMAGES.items():
        for number in range(count):
            folder = base / "photos" / split / f"class{number % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((90 - number, 60 + number)).save(folder / f"{number:02}.jpg")
    files = {
        "raw": {"canvas": 32},
        "jpeg": {"canvas": 96, "codec": "jpeg"},
        "bc4": {"canvas": 96},
        "full": {"max_side": 80},
    }
    for name, options in files.items():
        build_beton("imagefolder", base / "photos", base / name, workers=1, **options)  # type: ignore[arg-type]
    train_base(base)


def train_base(base: Path) -> None:
    """Train base/run on base/raw, evaluate it, and export base/model.safetensors."""
    data = [f"data.train={base}/raw/train.beton", f"data.val={base}/raw/val.beton", f"run.dir={base}/run"]
    train(load_recipe("recipes/hprob_barlow.yaml", [*SMALL, *data]))
    for name in ("recipe.yaml", "checkpoints/last.pt"):
        assert (base / "run" / name).is_file()
    for command in (
        ["eval", "knn", f"{base}/run"],
        ["export", f"{base}/run", "--format", "safetensors", "--sigma", "--out", f"{base}/model.safetensors"],
    ):
        code, _, err = run_command(command)
        assert code == 0, err


# --- mutations of values and files --------------------------------------------------------------


def hostile(rng: Random, outside: Path) -> Any:
    """A value that nobody expects."""
    return rng.choice((
        None, True, False, 0, -1, 1, 2, 1000, 2**31, 2**63, -(2**63), 10**12, 10**400, 0.5, 1e308, math.nan, math.inf,
        "", "x", "x" * 5000, "\x1b[2J\x1b]0;title\x07", "two\nlines", "null\0", "\ud800", "../../outside/precious.txt",
        str(outside), str(outside / "precious.txt"), "/dev/zero", "/proc/kmsg", "<script>alert(1)</script>", "$\\frac$",
        "1e999999999", "2020-01-01", "!!python/object:os.system", [], {}, [[]], [None] * 1000, {"": {}}, nested(100),
    ))  # fmt: skip


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def mutate_value(rng: Random, value: Any, make: Callable[[], Any]) -> Any:
    """Return a copy of nested dicts and lists in which one or two nodes were replaced, removed, renamed or swapped."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        nodes = list(containers(value))
        if not nodes:
            return make()
        # Nodes near the root are few, and what they hold matters most.
        parent, key = nodes[min(rng.randrange(len(nodes)), rng.randrange(len(nodes)))]
        how = rng.randrange(8)
        if how == 0 and isinstance(parent, dict):
            parent[rng.choice(("x", "", str(key).upper(), "step"))] = parent.pop(key)
        elif how == 1:
            del parent[key]
        elif how == 2:
            other, name = rng.choice(nodes)
            parent[key] = copy.deepcopy(other.get(name) if isinstance(other, dict) else parent[key])
        elif how == 3:
            parent[key] = [parent[key]]
        else:
            parent[key] = make()
    return value


def containers(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key or index) of every value in nested dicts and lists, breadth first."""
    waiting = [value]
    for each in waiting:
        keys = each.keys() if isinstance(each, dict) else range(len(each)) if isinstance(each, list) else ()
        for key in keys:
            yield each, key
            waiting.append(each[key])


def hostile_tensor(rng: Random) -> torch.Tensor:
    kind = rng.randrange(9)
    if kind == 0:
        return torch.zeros(0)
    if kind == 1:
        return torch.full((3,), math.nan)
    if kind == 2:
        return torch.zeros(1).expand(10**12)  # four bytes in the file
    if kind == 3:
        return torch.zeros(3, 3).to_sparse()
    if kind == 4:
        return torch.zeros(2, dtype=torch.complex64)
    if kind == 5:
        return torch.zeros(2, device="meta")
    if kind == 6:
        return torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8)
    if kind == 7:
        return torch.tensor(-5)
    return torch.zeros(2, dtype=torch.bool)


def mutate_file(rng: Random, path: Path, outside: Path) -> None:
    """Replace a file by something else of the same name."""
    how = rng.randrange(12)
    if how <= 3 and path.is_file():
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))
        return
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if how == 4:
        os.mkfifo(path)
    elif how == 5:
        path.symlink_to(rng.choice((outside / "precious.txt", outside, outside / "new", "/dev/zero", path)))
    elif how == 6:
        os.link(outside / "precious.txt", path)
    elif how == 7:
        path.mkdir()
        (path / "x").write_text("x")
    elif how == 8:
        path.write_bytes(b"")
    elif how == 9:
        with open(path, "wb") as file:
            file.truncate(200 << 30)  # without blocks on the disk
    elif how == 10:
        path.write_bytes(b"[" * 100_000)
    # else it is missing


def mutate_json(rng: Random, path: Path, outside: Path) -> None:
    value = mutate_value(rng, json.loads(path.read_text()), lambda: hostile(rng, outside))
    path.write_text(json.dumps(value))


def mutate_lines(rng: Random, path: Path, outside: Path) -> None:
    """Change some lines of a .jsonl."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(
        "".join(json.dumps(line) + "\n" for line in mutate_value(rng, lines, lambda: hostile(rng, outside)))
    )


# --- one function for each kind: change something in the folder, and return the commands --------


def beton(rng: Random, folder: Path, base: Path, outside: Path) -> list[Command]:
    shutil.copytree(base / rng.choice(("raw", "jpeg", "bc4", "full")), folder / "data")
    path = folder / "data" / "train.beton"
    size = path.stat().st_size
    others = sorted(each for each in (folder / "data").iterdir() if each.name.startswith("train.beton."))
    how = rng.randrange(8)
    if how <= 1:
        path.write_bytes(mutate_beton(rng, path.read_bytes()))
    elif how <= 3:  # header and field descriptors
        path.write_bytes(mutate_bytes(rng, path.read_bytes(), end=600))
    elif how <= 5:  # the tables at the end
        path.write_bytes(mutate_bytes(rng, path.read_bytes(), start=max(0, size - 2500)))
    elif how == 6:
        target = rng.choice(others or [path])
        (mutate_json if target.suffix == ".json" else mutate_file)(rng, target, outside)
    else:
        mutate_file(rng, rng.choice([path, *others]), outside)
    return [
        ["inspect", str(path), "--verify"],
        ["inspect", str(path), "--sheet", str(folder / "sheet.png")],
        ["embed", str(base / "run"), str(path), "--out", str(folder / "out.npz")],
    ]


def checkpoint(rng: Random, folder: Path, base: Path, outside: Path) -> list[Command]:
    shutil.copytree(base / "run", folder / "run")
    path = folder / "run" / "checkpoints" / "last.pt"
    if rng.randrange(6) == 0:
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))
    else:
        saved = torch.load(path, weights_only=True)
        rng_of_tensors = rng.randrange(2)
        make = (lambda: hostile_tensor(rng)) if rng_of_tensors else (lambda: hostile(rng, outside))
        # Half of the cases change the fields themselves, which a resume reads one by one.
        if rng.randrange(2):
            saved[rng.choice(sorted(saved))] = make()
        else:
            saved = mutate_value(rng, saved, make)
        torch.save(saved, path)
    return [on_a_run(rng, folder)]


def on_a_run(rng: Random, folder: Path) -> Command:
    """A command that reads folder/run."""
    run = str(folder / "run")
    data = str(folder.parent / "base" / "raw" / "val.beton")
    return rng.choice((
        ["train", "--resume", run, "train.epochs=2", "probe.every=0"],
        ["train", "--resume", run, "train.epochs=2", "probe.every=0"],
        ["train", f"{run}/recipe.yaml", f"run.dir={run}", "--resume", "auto"],
        ["eval", "knn", run],
        ["eval", "knn", run, f"{folder.parent}/base/run"],
        ["export", run, "--format", "safetensors"],
        ["export", run, "--format", "timm", "--out", str(folder / "model.safetensors")],
        ["embed", run, data, "--out", str(folder / "out.csv")],
        ["embed", run, data, "--out", str(folder / "out.npz"), "--score", "knn_cosine"],
    ))  # fmt: skip


def run(rng: Random, folder: Path, base: Path, outside: Path) -> list[Command]:
    shutil.copytree(base / "run", folder / "run")
    entries = sorted(path for path in (folder / "run").rglob("*") if path.name not in ("mine.pt", ".mine.part.pt"))
    for path in rng.sample(entries, rng.choice((1, 1, 2))):
        if not os.path.lexists(path):  # it was in a folder that is gone
            continue
        if path.suffix in (".json", ".jsonl") and path.is_file() and rng.randrange(3):
            (mutate_json if path.suffix == ".json" else mutate_lines)(rng, path, outside)
        else:
            mutate_file(rng, path, outside)
    return [on_a_run(rng, folder)]


def recipe(rng: Random, folder: Path, base: Path, outside: Path) -> list[Command]:
    path = folder / "recipe.yaml"
    values = yaml.safe_load((base / "run" / "recipe.yaml").read_text())
    if rng.randrange(3):
        values = mutate_value(rng, values, lambda: hostile(rng, outside))
        path.write_text(yaml.safe_dump(values, allow_unicode=True), errors="surrogatepass")
    else:
        text = yaml.safe_dump(values, sort_keys=False)
        for _ in range(rng.choice((1, 1, 3))):
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice(YAML_PARTS) + text[at + rng.choice((0, 0, 1, 20)) :]
        path.write_text(text, errors="surrogatepass")
    fixed = ["train.epochs=1", "train.device=cpu", f"run.dir={folder}/new"]
    return [["train", str(path), *fixed]]


YAML_PARTS = (
    "&a ", "*a", "<<: *a", ": ", "\n", "  ", "- ", "{", "}", "[", "]", "!!int x", "!!binary x", "!!python/name:os ",
    "[" * 3000, "|", "? ", "%", "\t", "\0", "\x85", "\u2028", "'", '"', "2020-13-45", "1:30:00", "0x", "1" * 5000, "#",
    "\n<<: {a: b}\n", "a: &a [*a, *a]\n", "\nname: x\n", "---\n", "...\n", "~", ".nan", "-.inf", "\x1b[31m",
)  # fmt: skip


def sweep(rng: Random, folder: Path, base: Path, outside: Path) -> list[Command]:
    path = folder / "sweep.yaml"
    grid = {"recipe": str(base / "run" / "recipe.yaml"), "name": "one", "set": {"train.epochs": 2}}
    axes: dict[str, list[Any]] = {"seed": [0, 1], "optim.lr": [0.001, 0.01], "embedding.prior": ["mixture"]}
    values = {
        "name": "ablation",
        "dir": str(folder / "sweeps"),
        "set": {"log.every": 5},
        "grids": [grid | {"axes": axes}],
    }
    values = mutate_value(rng, values, lambda: hostile(rng, outside))
    path.write_text(yaml.safe_dump(values, sort_keys=False), errors="surrogatepass")
    return [["sweep", str(path), "--dry-run", "--images-per-second", "100"]]


def weights(rng: Random, folder: Path, base: Path, outside: Path) -> list[Command]:
    """An exported file, or one for model.init."""
    path = folder / "model.safetensors"
    shutil.copy(base / "model.safetensors", path)
    content = path.read_bytes()
    how = rng.randrange(4)
    if how == 0:
        path.write_bytes(mutate_bytes(rng, content, end=4000))  # the header
    elif how == 1:
        mutate_file(rng, path, outside)
    else:
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        if how == 2:
            metadata = header["__metadata__"]
            if rng.randrange(2):
                values = mutate_value(rng, json.loads(metadata["recipe"]), lambda: hostile(rng, outside))
                metadata["recipe"] = json.dumps(values)
            else:
                metadata = mutate_value(rng, metadata, lambda: str(hostile(rng, outside)))
            metadata = {str(key): str(value) for key, value in metadata.items()}
            with contextlib.suppress(ValueError):  # a surrogate
                save_file(load_file(path), path, metadata)
        else:
            text = json.dumps(mutate_value(rng, header, lambda: hostile(rng, outside))).encode()
            path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    data = str(base / "raw" / "val.beton")
    return [
        ["embed", str(path), data, "--out", str(folder / "out.csv")],
        ["train", f"{base}/run/recipe.yaml", f"run.dir={folder}/new", f"model.init={path}", "probe.every=0"],
    ]


def profile(rng: Random, folder: Path, base: Path, outside: Path) -> list[Command]:
    path = folder / "profile.json"
    shutil.copy(PROFILE, path)
    (mutate_json if rng.randrange(4) else mutate_file)(rng, path, outside)
    return [["profile", "--compare", str(PROFILE), str(path)]]


Kind = Callable[[Random, Path, Path, Path], list[Command]]
KINDS: dict[str, Kind] = {
    "beton": beton, "checkpoint": checkpoint, "profile": profile, "recipe": recipe, "run": run, "sweep": sweep,
    "weights": weights,
}  # fmt: skip


# --- in the child process -----------------------------------------------------------------------


@dataclass
class Outcome:
    """What became of one case."""

    codes: list[int] = field(default_factory=list)  # exit codes of the commands
    failures: list[tuple[str, str]] = field(default_factory=list)  # what failed, and details


def child(connection: Connection, base: Path) -> None:
    """Run cases until the parent closes the connection, and answer each with its outcome."""
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    while True:
        try:
            root, kind, number, seed = connection.recv()
        except EOFError:
            return
        Path("/proc/self/clear_refs").write_text("5")  # the peak of the memory starts again
        connection.send(run_case(root, base, kind, number, seed))


def run_case(root: Path, base: Path, kind: str, number: int, seed: int) -> Outcome:
    """Make the case's folder below `root`, run its commands, and check what they did."""
    folder, outside = root / "work", root / "outside"
    faulthandler.dump_traceback_later(HANG - 1)  # shows where it hangs
    for path in (folder, outside):
        path.mkdir(parents=True)
    (root / "base").symlink_to(base)
    (outside / "precious.txt").write_text("precious")
    (outside / "folder").mkdir()
    (outside / "folder" / "last.pt").write_text("precious")
    rng = Random(f"{seed}/{kind}/{number}")
    commands = KINDS[kind](rng, folder, base, outside)
    users = [folder / "run" / name for name in USER_FILES if (folder / "run" / name).parent.is_dir()]
    users = [path for path in users if not path.parent.is_symlink()]
    for path in users:
        path.write_text("of the user")
    before = contents(outside), contents(base), {path: path.read_text() for path in users}

    outcome = Outcome()
    os.chdir(folder)
    for command in commands:
        found = check_command(command, root, outcome)
        outcome.failures += [(what, f"fastssl {' '.join(command[:2])}: {details}") for what, details in found]
    if kind == "beton" and outcome.codes[0] == 0 and 2 in outcome.codes:
        outcome.failures.append(("verified", "inspect --verify accepts it, another command does not"))
    for name, path, was in (("outside", outside, before[0]), ("the base", base, before[1])):
        if changed := sorted(str(each) for each, _ in was.items() ^ contents(path).items()):
            outcome.failures.append(("touched", f"{name}: {changed[0]}"))
    for path, text in before[2].items():
        if not path.is_file() or path.read_text() != text:
            outcome.failures.append(("touched", f"a file of the user: {path.name}"))
    left = [path for path in folder.rglob(".*.part*") if re.search(rf"\.{os.getpid()}\.part", path.name)]
    outcome.failures += [("leftover", str(path)) for path in left]
    if peak_memory() > MEMORY:
        outcome.failures.append(("memory", f"{peak_memory() / (1 << 30):.1f} GiB"))
    faulthandler.cancel_dump_traceback_later()
    return outcome


def contents(folder: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of all files. Evaluations may add caches to the base's run."""
    skipped = ("features", "eval", "export")
    return {
        path: (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in folder.rglob("*")
        if not path.is_dir() and not any(part in skipped for part in path.parts)
    }


def check_command(command: Command, root: Path, outcome: Outcome) -> list[tuple[str, str]]:
    try:
        code, out, err = run_command(command)
    except Exception as error:
        return [("traceback", describe(error))]
    outcome.codes.append(code)
    if code not in (0, 2):
        return [("exit code", f"{code}: {err[-300:]}")]
    lines = err.replace(str(root), "").splitlines()
    labels = [line.partition(": ")[0] for line in lines[-2:]]
    is_message = labels[-1:] == ["error"] or labels == ["error", "hint"]
    failures = []
    if code == 2 and (not is_message or max(map(len, lines[-2:])) > LONGEST_MESSAGE):
        failures.append(("message", err[-600:] or "none"))
    if raw := set(re.findall(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", out + err)):
        failures.append(("message", f"control characters {sorted(raw)}: {(out + err)[:300]!r}"))
    return failures


def run_command(command: Command) -> tuple[int, str, str]:
    """Run `fastssl` in this process: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    argv, sys.argv = sys.argv, ["fastssl", *command]
    code: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = argv
    return int(code), out.getvalue(), err.getvalue()


def describe(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [each for each in frames if "/fastssl/" in each.filename][-1:]
    where = " < ".join(f"{Path(each.filename).name}:{each.name}" for each in (frames[-1], *ours))
    return f"{type(error).__name__} in {where}: {error}"


def peak_memory() -> int:
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0])


# --- in the main process ------------------------------------------------------------------------


class Child(ChildProcess):
    """The child process; a new one is started after it hung or died."""

    def run(self, root: Path, kind: str, number: int, seed: int) -> Outcome:
        if self.process is None:
            self.start()
        try:
            self.connection.send((root, kind, number, seed))
            if self.connection.poll(HANG):
                outcome: Outcome = self.connection.recv()
                return outcome
            failure = ("hang", f"more than {HANG} s")
        except (EOFError, OSError):
            self.process.join(5)
            failure = ("crash", f"exit code {self.process.exitcode}")
        self.stop()
        return Outcome(failures=[failure])

    def start(self) -> None:
        super().start()
        # The first commands import and compile, which may take longer than HANG.
        with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
            self.connection.send((Path(root), "beton", 0, 0))
            assert self.connection.poll(START), "the child process does not start"
            self.connection.recv()


@dataclass
class Tally:
    """The outcomes of all cases of a kind."""

    cases: int = 0
    codes: Counter[int] = field(default_factory=Counter)
    failures: int = 0
    examples: dict[str, str] = field(default_factory=dict)  # a distinct failure -> the first case of it


def fuzz(base: Path, kinds: list[str], seed: int, minutes: float, cases: int | None = None) -> dict[str, Tally]:
    """Try cases of all kinds in turn, at least one of each, for some minutes or until there are `cases` of each."""
    tallies: dict[str, Tally] = defaultdict(Tally)
    process = Child(child, base)
    numbers = itertools.count() if cases is None else range(cases)
    try:
        process.start()
        end = time.monotonic() + 60 * minutes
        with progress("Fuzz", None, "cases") as advance:
            for number, kind in ((number, kind) for number in numbers for kind in kinds):
                if number and time.monotonic() > end:
                    break
                with tempfile.TemporaryDirectory(prefix="fuzz-", ignore_cleanup_errors=True) as root:
                    record(tallies[kind], f"{kind} {number}", process.run(Path(root), kind, number, seed))
                advance()
    finally:
        process.stop()
    return tallies


def record(tally: Tally, name: str, outcome: Outcome) -> None:
    tally.cases += 1
    tally.codes.update(outcome.codes)
    tally.failures += bool(outcome.failures)
    for what, details in outcome.failures:
        # Numbers, names and bytes differ from case to case.
        kind = re.sub(r"'[^']*'|\"[^\"]*\"|/\S+|0x[0-9a-f]+|-?\d+(\.\d+)?", "#", f"{what}: {details}")[:160]
        tally.examples.setdefault(kind, f"{name}: {what}: {details[:600]}")


def report(tallies: dict[str, Tally]) -> str:
    lines = ["| files | cases | exit code 0 | exit code 2 | failures |", "|---|---|---|---|---|"]
    for kind, tally in tallies.items():
        lines.append(f"| {kind} | {tally.cases:,} | {tally.codes[0]:,} | {tally.codes[2]:,} | {tally.failures:,} |")
    examples = [example for tally in tallies.values() for example in tally.examples.values()]
    return "\n".join(lines + [""] * bool(examples) + [f"- {' '.join(each.split())}" for each in examples])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--cases", type=int, help="cases of each kind; default: as many as the minutes allow")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--what", nargs="+", choices=[*KINDS], default=[*KINDS], help="kinds of files")
    parser.add_argument("--case", nargs=2, metavar=("KIND", "NUMBER"), help="run one case, and keep its folder")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        base = Path(folder) / "base"
        make_base(base)
        if options.case:
            root = Path(tempfile.mkdtemp(prefix="fuzz-"))
            print(root, run_case(root, base, options.case[0], int(options.case[1]), options.seed))
            return 0
        began = time.monotonic()
        tallies = fuzz(base, options.what, options.seed, options.minutes, options.cases)
        versions = f"Python {platform.python_version()}, torch {torch.__version__}"
        print(f"seed {options.seed}, {time.monotonic() - began:.0f} s, {versions}\n\n{report(tallies)}")
    return int(any(tally.failures for tally in tallies.values()))


if __name__ == "__main__":
    raise SystemExit(main())

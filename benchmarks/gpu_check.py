"""Ten minutes or so on a GPU: run what only a GPU can show, and compare the figures with what is expected.

    make gpu-check                                # or: python benchmarks/gpu_check.py
    python benchmarks/gpu_check.py --again views  # this check once more

Each check is a process of its own with a time limit, the most valuable one first. After each, its figures are in
records/gpu/NAME-OF-GPU.json, and the table of all in NAME-OF-GPU.md. After a kill the same command goes on: it does not
repeat what is done, but what has failed, and last what ran out of time. Another commit or another torch starts from the
beginning. Nothing is downloaded; the images are generated. The table says what is missing because a package (ffcv,
kornia, lightly) is not installed. Logs, images and profiles are in .cache/gpu-check.

The exit code is 0 if all checks are done and all figures as expected, and 1 if not. With --device cpu the program can
be tried with small sizes; its figures then say nothing about a GPU.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from fastssl.common.errors import UserError
from fastssl.common.files import write_atomically
from fastssl.common.terminal import printable
from fastssl.profiling import read_profile

ROOT = Path(__file__).parents[1]
DONE, FAILED, OUT_OF_TIME, LEFT_OUT = "done", "failed", "out of time", "left out"
PR_SET_PDEATHSIG = 1  # from <sys/prctl.h>
DISTINCT = 512  # generated images that differ; the others repeat them
TEST_RESULT = re.compile(r"^tests/.*::.* (PASSED|FAILED|ERROR|SKIPPED)(?: \(.*\))? +\[ *\d+%\]$", re.MULTILINE)
ABOUT = """
import json, sys, torch
from fastssl.common.environment import describe_environment
about = describe_environment(torch.device(sys.argv[1]))
print(json.dumps({key: about[key] for key in ("device", "git", "packages", "python", "cuda", "cpu", "cores")}))
"""


class Figure(NamedTuple):
    """One measured value, and the range in which it is expected."""

    name: str
    measured: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def is_as_expected(self) -> bool:
        is_low = self.at_least is not None and not self.measured >= self.at_least
        is_high = self.at_most is not None and not self.measured <= self.at_most
        return not (is_low or is_high)


class Check(NamedTuple):
    """Something to run, and how to read its figures."""

    name: str
    title: str
    seconds: float  # time limit
    command: list[str]
    read: Callable[[Path], list[Figure]]  # from the files in the folder of logs; what is missing there raises
    package: str | None = None  # that it cannot do without, and that may be missing
    after: str | None = None  # a check that makes what this one reads


class Result(NamedTuple):
    """What became of a check."""

    status: str
    seconds: float
    note: str  # why it is not done
    figures: list[Figure]


class Sizes(NamedTuple):
    """How much is measured."""

    views_batch: int
    step_batch: int
    step_size: int  # px
    batches: tuple[int, int]  # of the profiles
    canvases: int  # generated images of 256 px
    small_images: int  # and of 32 px


SIZES = {
    "cuda": Sizes(256, 256, 224, (256, 1024), 8192, 50_000),
    "cpu": Sizes(2, 4, 32, (8, 16), 64, 5000),
}


def make_checks(work: Path, device: str) -> list[Check]:
    """All checks, in the order of their worth. work: the folder of logs and data."""
    sizes, on_gpu = SIZES[device], device == "cuda"

    def benchmark(name: str, *options: object) -> list[str]:
        command = [sys.executable, f"benchmarks/{name}.py", "--device", device, "--json", f"{work}/{name}.json"]
        return command + [str(option) for option in options]

    def profile(name: str, recipe: str, data: str, *keys: str) -> list[str]:
        files = [f"data.train={work}/{data}/train.beton", "data.val=null", "--json", f"{work}/{name}.json"]
        command = [sys.executable, "-m", "fastssl", "profile", f"recipes/{recipe}.yaml", *files]
        return [*command, f"train.device={device}", *keys]

    pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "-v"]
    ways = "ours, compiled" if on_gpu else "ours"
    make = [sys.executable, "benchmarks/gpu_check.py", "--device", device, "--make-data", str(work)]
    checks = [
        Check("tests", "the tests that need a GPU", 360, pytest, read_tests, package="ffcv"),
        Check(
            "views", "views of 224 px", 90,
            benchmark("views", "--batch", sizes.views_batch, "--rounds", 3, "--seconds", 1), read_views,
        ),
        Check(
            "objectives", "forward and backward pass, Barlow Twins, S = 12", 120,
            benchmark(
                "objectives", "--objectives", "barlow_twins", "--spaces", "none", "z", "h", "--samples", 12,
                "--parts", "step", "--ways", ways, "--batch", sizes.step_batch, "--size", sizes.step_size,
            ), read_step,
        ),
        Check("data", "generated images", 60, make, lambda folder: [], package="ffcv"),
    ]  # fmt: skip
    for batch in sizes.batches:
        name = f"profile-{batch}"
        command = profile(name, "zprob_barlow", "large", "data.resident=false", f"train.batch_size={batch}")
        title = f"profile of the ImageNet recipe, batch {batch}"
        checks.append(Check(name, title, 120, command, profile_reader(name), package="ffcv", after="data"))
    for graphs in (False, True):
        name = "resident-graphs" if graphs else "resident"
        keys = ["data.resident=true", f"train.cuda_graphs={graphs}"] if on_gpu else ["train.batch_size=16"]
        command = profile(name, "cifar10/zprob_barlow", "small", *keys)
        title = f"profile of the CIFAR-10 recipe, resident, {'with' if graphs else 'without'} CUDA graphs"
        checks.append(Check(name, title, 120, command, resident_reader(name), package="ffcv", after="data"))
    command = benchmark("end_to_end", "--source", f"{work}/small/images/train", "--rounds", 1)
    title = "end to end next to lightly, 32 px"
    checks.append(Check("end_to_end", title, 90, command, read_end_to_end, package="lightly", after="data"))
    return checks


def read_tests(folder: Path) -> list[Figure]:
    """From the log, so that tests count that had ended when the time was over."""
    results = TEST_RESULT.findall((folder / "tests.log").read_text(errors="replace"))
    return [
        Figure("passed", results.count("PASSED"), at_least=1),
        Figure("failed", results.count("FAILED") + results.count("ERROR"), at_most=0),
        Figure("skipped", results.count("SKIPPED"), at_most=0),
    ]


def read_views(folder: Path) -> list[Figure]:
    rows = {row["chain"]: row for row in json.loads((folder / "views.json").read_text())}
    figures = []
    for name, row in rows.items():
        figures.append(Figure(f"{name}: views/s", row["views_per_second"]))
        if "kernels" in row:
            # Four of them make the views; the others draw the parameters.
            most = 18 if name.startswith("fastssl, Triton") else None
            figures.append(Figure(f"{name}: kernels", row["kernels"], at_least=1, at_most=most))
            figures.append(Figure(f"{name}: GB/s", row["gb_per_second"]))
    ours = rows.get("fastssl, Triton") or rows["fastssl, CPU kernel"]
    for name, least in {"fastssl, torch chain, compiled": 2, "kornia": 1, "kornia, compiled": 1}.items():
        if name in rows:
            ratio = ours["views_per_second"] / rows[name]["views_per_second"]
            figures.append(Figure(f"{ours['chain']} / {name}", ratio, at_least=least))
    from_blocks = rows[f"{ours['chain']}, from blocks"]
    ratio = from_blocks["views_per_second"] / ours["views_per_second"]
    figures.append(Figure(f"{from_blocks['chain']} / {ours['chain']}", ratio, at_least=0.5))
    return figures


def read_step(folder: Path) -> list[Figure]:
    rows = {row["space"]: row for row in json.loads((folder / "objectives.json").read_text())}
    figures = []
    for space, name in {"none": "deterministic", "z": "Z-prob", "h": "H-prob"}.items():
        row = rows[space]
        figures += [
            Figure(f"{name}: ms", row["milliseconds"]),
            Figure(f"{name}: images/s", 1e3 * row["batch"] / row["milliseconds"]),
            Figure(f"{name}: peak MB", row["megabytes"]),
        ]
    for space, name, most in (("z", "Z-prob", None), ("h", "H-prob", 1.5)):
        ratio = rows[space]["milliseconds"] / rows["none"]["milliseconds"]
        figures.append(Figure(f"{name} / deterministic", ratio, at_most=most))
    return figures


def profile_reader(name: str) -> Callable[[Path], list[Figure]]:
    def read(folder: Path) -> list[Figure]:
        profile = read_profile(folder / f"{name}.json")
        stages = profile.stages
        waited, peak = stages.end_to_end.data_wait, stages.step.peak_memory_bytes
        measured = {
            "images/s": stages.end_to_end.rate,
            "accelerator utilization": profile.bottleneck.accelerator_utilization,
            "waiting for data, share": waited.median if waited else None,
            "kernels of the views": stages.views.kernels,
            "MFU of the step": stages.step.mfu,
            "peak memory, GB": peak / 1e9 if peak else None,
        }
        least = {"accelerator utilization": 0.9}
        return [Figure(label, value, least.get(label)) for label, value in measured.items() if value is not None]

    return read


def resident_reader(name: str) -> Callable[[Path], list[Figure]]:
    def read(folder: Path) -> list[Figure]:
        figures = profile_reader(name)(folder)[:1]
        if name == "resident-graphs" and (folder / "resident.json").exists():
            ratio = figures[0].measured / profile_reader("resident")(folder)[0].measured
            figures.append(Figure("with / without CUDA graphs", ratio, at_least=1))
        return figures

    return read


def read_end_to_end(folder: Path) -> list[Figure]:
    round_ = json.loads((folder / "end_to_end.json").read_text())[0]
    ours, theirs = (round_[name]["images_per_second"] for name in ("fastssl", "lightly"))
    return [
        Figure("fastssl: images/s", ours),
        Figure("lightly: images/s", theirs),
        Figure("fastssl / lightly", ours / theirs, at_least=3),
    ]


def make_data(work: Path, sizes: Sizes) -> None:
    """Write photograph-like JPEGs of 256 and of 32 px, and a .beton of each."""
    rng = np.random.default_rng(0)
    for name, side, count in (("large", 256, sizes.canvases), ("small", 32, sizes.small_images)):
        folder = work / name
        if (folder / "train.beton").exists():
            continue
        files = []
        for number in range(count):
            path = folder / "images" / "train" / str(number % 10) / f"{number:05}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            if number < DISTINCT:
                coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
                smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
                noisy = smooth + rng.normal(0, 6, smooth.shape)
                Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
                files.append(path.read_bytes())
            else:
                path.write_bytes(files[number % DISTINCT])
        build = [sys.executable, "-m", "fastssl", "build-beton", "imagefolder", "--source", str(folder / "images")]
        subprocess.run([*build, "--out", str(folder), "--canvas", str(side)], check=True)


def run_check(check: Check, work: Path, results: dict[str, Result]) -> Result:
    """Run a check, unless what it needs is missing. Its output goes to NAME.log in the folder `work`."""
    if check.package and not importlib.util.find_spec(check.package):
        return Result(LEFT_OUT, 0, f"{check.package} is not installed", [])
    if check.after and (check.after not in results or results[check.after].status != DONE):
        return Result(LEFT_OUT, 0, f"needs what the check {check.after} makes", [])
    log = work / f"{check.name}.log"
    (work / f"{check.name}.json").unlink(missing_ok=True)  # of an earlier call
    began = time.monotonic()
    code = run_limited(check.command, check.seconds, log)
    seconds = round(time.monotonic() - began, 1)
    try:
        figures = check.read(work)
    except (OSError, ValueError, LookupError, TypeError, UserError) as error:
        figures, code = [], 1 if code == 0 else code
        with open(log, "a") as file:
            file.write(f"\ngpu_check: no figures, {type(error).__name__}: {error}\n")
    if code == 0:
        return Result(DONE, seconds, "", figures)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    note = printable(lines[-1].strip())[:200] if lines else f"exit code {code}"
    if code is None:
        return Result(OUT_OF_TIME, seconds, f"longer than {check.seconds:.0f} s; last line: {note}", figures)
    return Result(FAILED, seconds, note, figures)


def run_limited(command: list[str], seconds: float, log: Path) -> int | None:
    """Run a command in the repository with its output in a file. Returns its exit code, None if it took too long."""
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"}, start_new_session=True, preexec_fn=die_with_parent,
        )  # fmt: skip
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):  # what it has started ends too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def die_with_parent() -> None:
    """Have the kernel kill this process when the parent dies, even of SIGKILL: the next call needs the GPU."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def run_checks(checks: list[Check], about: dict[str, Any], record: Path, work: Path, again: list[str]) -> bool:
    """Run what is not done, and write the record after each check. Returns whether everything is as expected.

    record: the path of the JSON file; the table is next to it. again: names of checks to run once more.
    """
    results = {} if not record.exists() else read_results(record, about)
    waiting = [check for check in checks if check.name in again or results.get(check.name, NOT_RUN).status != DONE]
    waiting.sort(key=lambda check: results.get(check.name, NOT_RUN).status == OUT_OF_TIME)  # keeps their order else
    work.mkdir(parents=True, exist_ok=True)
    for check in waiting:
        print(f"{check.title} (at most {check.seconds:.0f} s) ...", flush=True)
        results[check.name] = run_check(check, work, results)
        write_record(checks, about, results, record)
        print("\n".join(f"  {row}" for row in rows_of(check, results[check.name])), flush=True)
    write_record(checks, about, results, record)
    return all(
        check.name in results
        and results[check.name].status == DONE
        and all(figure.is_as_expected for figure in results[check.name].figures)
        for check in checks
    )


NOT_RUN = Result("not run", 0, "", [])


def read_results(record: Path, about: dict[str, Any]) -> dict[str, Result]:
    """The results of an earlier call; none if they are of other code."""
    stored = json.loads(record.read_text())
    if versions(stored["about"]) != versions(about):
        print(f"{record} is of another commit or another torch: starting from the beginning.")
        return {}
    results = {}
    for name, fields in stored["checks"].items():
        figures = [Figure(**{key: figure[key] for key in Figure._fields}) for figure in fields["figures"]]
        results[name] = Result(fields["status"], fields["seconds"], fields["note"], figures)
    return results


def versions(about: dict[str, Any]) -> tuple[str, str, str]:
    """What makes figures comparable. The record itself may be what makes a checkout dirty."""
    return about["device"], str(about["git"]).removesuffix("-dirty"), about["packages"]["torch"]


def write_record(checks: list[Check], about: dict[str, Any], results: dict[str, Result], record: Path) -> None:
    stored = {
        name: {
            **result._asdict(),
            "figures": [{**figure._asdict(), "as_expected": figure.is_as_expected} for figure in result.figures],
        }
        for name, result in results.items()
    }
    write_atomically(record, json.dumps({"about": about, "checks": stored}, indent=1) + "\n")
    write_atomically(record.with_suffix(".md"), report(checks, about, results))


def report(checks: list[Check], about: dict[str, Any], results: dict[str, Result]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items() if version)
    missing = ", ".join(name for name in ("ffcv", "kornia", "lightly") if not importlib.util.find_spec(name))
    lines = [
        f"# GPU check: {printable(about['device'])}",
        "",
        f"`make gpu-check` at commit {str(about['git'])[:12]}; {packages}; CUDA {about['cuda']}; "
        f"{printable(about['cpu'])}, {about['cores']} cores. Not installed: {missing or 'nothing that is measured'}.",
        "",
        "| check | figure | expected | measured | |",
        "|---|---|---|---|---|",
    ]
    for check in checks:
        lines += rows_of(check, results.get(check.name, NOT_RUN))
    return "\n".join([*lines, "", *(f"* {check.name}: `{shown(check)}`" for check in checks), ""])


def shown(check: Check) -> str:
    """The command, with paths as one would type them."""
    command = " ".join(f"'{word}'" if " " in word else word for word in check.command)
    return command.replace(sys.executable, "python").replace(f"{ROOT}/", "")


def rows_of(check: Check, result: Result) -> list[str]:
    """The lines of the table about a check."""
    title = f"{check.title} ({result.seconds:.0f} s)" if result.seconds else check.title
    rows = []
    if result.status != DONE or not result.figures:
        note = result.note.replace("|", "/")
        rows.append(f"| {title} | | | {result.status}{': ' if note else ''}{note} | |")
    for figure in result.figures:
        limits = {"at least": figure.at_least, "at most": figure.at_most}
        bounds = [f"{word} {number(limit)}" for word, limit in limits.items() if limit is not None]
        verdict = "" if not bounds else "ok" if figure.is_as_expected else "**NOT AS EXPECTED**"
        rows.append(f"| {title} | {figure.name} | {', '.join(bounds)} | {number(figure.measured)} | {verdict} |")
        title = ""
    return rows


def number(value: float | None) -> str:
    """Three digits of small numbers, all digits before the point of whole and large ones."""
    if value is None:
        return ""
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 100 else f"{value:.3g}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=SIZES)
    parser.add_argument("--again", nargs="+", default=[], metavar="CHECK", help="run these once more")
    parser.add_argument("--records", type=Path, default=ROOT / "records" / "gpu", help="folder of the result")
    parser.add_argument("--make-data", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make_data:
        make_data(options.make_data, SIZES[options.device])
        return 0
    # In a process of its own: this one makes no context on the GPU, whose memory the checks measure.
    asked = subprocess.run([sys.executable, "-c", ABOUT, options.device], cwd=ROOT, capture_output=True, text=True)
    if asked.returncode:
        print(f"gpu_check: torch sees no GPU here: {asked.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return 2
    about = json.loads(asked.stdout)
    name = re.sub(r"[^\w.-]+", "-", about["device"]).strip("-")
    work, record = ROOT / ".cache" / "gpu-check" / name, options.records / f"{name}.json"
    checks = make_checks(work, options.device)
    if unknown := set(options.again) - {check.name for check in checks}:
        parser.error(f"no check {', '.join(sorted(unknown))}: choose from {', '.join(check.name for check in checks)}")
    is_as_expected = run_checks(checks, about, record, work, options.again)
    print(record.with_suffix(".md").read_text())
    print(f"Written to {record.with_suffix('.md')} and {record}")
    return 0 if is_as_expected else 1


if __name__ == "__main__":
    sys.exit(main())

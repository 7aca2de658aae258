"""Fuzz the conversion: damaged and unusual files through the real path, against Pillow's view of them.

python benchmarks/fuzz_build.py --minutes 10 --seed 0
python benchmarks/fuzz_build.py --minutes 1 --what png tar

Small valid files are made and mutated (fuzz_inputs.py): EXIF blocks, JPEG segments, PNG chunks, TIFF tags, WebP chunks,
bytes of any format, tar headers, parquet footers and pages, CSV text. A child process puts each image through
`encode_all` with three plans (raw canvas, JPEG canvas, full), and each container through `list_splits` and `encode_all`
of every sample.

Failures: a traceback (an exception that is not a UserError or the reason of a bad image), a hang (10 s), the death of
the process, more than 3 GiB of memory, stored pixels or sizes that are not Pillow's, and images of a damaged container
that are lost without a word. Counted, but no failures: images that Pillow decodes and we call bad, and the reverse. One
file of each distinct kind of all these is kept in --out.

File i of a kind is a function of (seed, kind, i). The exit code is 1 if there was a failure.
"""

import argparse
import contextlib
import io
import platform
import re
import resource
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

import numpy as np
import PIL
from fuzz_inputs import KINDS, ROWS, Case, valid_jpeg
from fuzz_process import ChildProcess
from PIL import Image, ImageOps

from fastssl.beton import jpeg
from fastssl.beton.format import RAW
from fastssl.beton.images import Case as Stored
from fastssl.beton.images import Encoded, StoragePlan, encode_all
from fastssl.beton.source import list_splits
from fastssl.common.errors import UserError

PLANS = {
    "raw": StoragePlan("canvas", 32, 90),
    "jpg": StoragePlan("canvas", 96, 90, codec="jpeg"),
    "full": StoragePlan("full", 500, 90),
}
BUILDERS = {".tar": "webdataset", ".parquet": "parquet", ".csv": "csv"}
HANG = 10  # seconds
PATIENCE = 120  # seconds for the comparison with Pillow, and for the start of a process
MEMORY = 3 << 30  # bytes; an image of 179 megapixels, Pillow's limit, takes 2 GiB with transparency
# Grey levels. Raw pixels may differ by the rounding of a resize before or after a rotation, and of 16 bits to 8.
RAW_TOLERANCE = 2
MEAN_TOLERANCE, MAX_TOLERANCE = 2.0, 48  # of JPEGs that were encoded from pixels that differ by one grey level
OPTIONS = re.compile(r"--max-side|--max-megapixels|--range")  # a reason that names one of these is a rule of the build


@dataclass
class Outcome:
    """What became of one file."""

    stored: int = 0  # images, each once
    bad: int = 0
    reason: str = ""  # the first one, or the UserError of a container
    failures: list[tuple[str, str]] = field(default_factory=list)  # what failed, and details
    refused: str = ""  # Pillow decodes the image, and this is why it is bad
    lenient: bool = False  # Pillow refuses the image, and it is stored


# --- in the child process -----------------------------------------------------------------------


def child(connection: Connection) -> None:
    """Process cases until the parent closes the connection. Answers each with the outcome, twice for images.

    The first answer ends the time limit; the second one includes the comparison with Pillow.
    """
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while True:
        try:
            case, seed = connection.recv()
        except EOFError:
            return
        Path("/proc/self/clear_refs").write_text("5")  # the peak of the memory starts again
        outcome = Outcome()
        results: dict[str, Encoded | str] = {}
        try:
            if case.suffix in BUILDERS:
                convert_container(case, seed, outcome)
            else:
                results = {name: encode_all([case.content], plan)[0] for name, plan in PLANS.items()}
        except Exception as error:
            outcome.failures.append(("traceback", describe(error)))
        if peak_memory() > MEMORY:
            outcome.failures.append(("memory", f"above {MEMORY >> 30} GiB"))
        connection.send(outcome)
        if results:
            compare_with_pillow(case.content, results, outcome)
        connection.send(outcome)


def describe(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    ours = [each for each in traceback.extract_tb(error.__traceback__) if "/fastssl/" in each.filename][-1:]
    where = " < ".join(f"{Path(each.filename).name}:{each.name}" for each in (frame, *ours))
    return f"{type(error).__name__} in {where}: {error}"


def peak_memory() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+)", status)[0])


def convert_container(case: Case, seed: int, outcome: Outcome) -> None:
    """List the splits of a shard, parquet file or CSV, and convert every image."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        source = Path(folder) / f"train-0{case.suffix}"
        source.write_bytes(case.content)
        if case.suffix == ".csv":
            for row in range(ROWS):
                (Path(folder) / f"{row}.jpg").write_bytes(valid_jpeg(Random(f"{seed}/{row}")))
        try:
            splits = list_splits(BUILDERS[case.suffix], source)
        except UserError as error:
            outcome.reason = str(error)
            if "\n" in outcome.reason.replace(str(source), ""):
                outcome.failures.append(("message of several lines", outcome.reason))
            return
        for split in splits:
            for sample in split.samples:
                try:
                    result = encode_all([sample.image], PLANS["raw"])[0]
                except UserError as error:  # stops the build
                    outcome.reason = str(error)
                    return
                if isinstance(result, str):
                    outcome.bad += 1
                    outcome.reason = outcome.reason or result
                else:
                    outcome.stored += 1
        found = outcome.stored + outcome.bad + sum(sum(split.left_out.values()) for split in splits)
        if not case.checks_renewed and found < case.images:
            outcome.failures.append(("lost", f"{case.suffix}: images of a damaged file without a word"))


def compare_with_pillow(content: bytes, results: dict[str, Encoded | str], outcome: Outcome) -> None:
    """Hold every stored image against `ImageOps.exif_transpose(Image.open(...)).convert("RGB")`."""
    for name, result in results.items():
        view, why = pillow_view(content, PLANS[name])
        if isinstance(result, str):
            outcome.reason = outcome.reason or result
            if view is not None and not OPTIONS.search(result):
                outcome.refused = f"{name}: {result}"
            continue
        if view is None:
            outcome.lenient = True
            outcome.reason = outcome.reason or why
            continue
        if difference := differs(result, view, PLANS[name]):
            outcome.failures.append(("wrong pixels", f"{name} {result.source_format}: {difference}"))
    stored = [not isinstance(result, str) for result in results.values()]
    outcome.stored, outcome.bad = int(any(stored)), int(not any(stored))


@dataclass
class View:
    image: Image.Image  # RGB, upright
    size: tuple[int, int]  # px (width, height) of the source; the image may be smaller (`Image.draft`)


def pillow_view(content: bytes, plan: StoragePlan) -> tuple[View | None, str]:
    """Return the image as Pillow shows it, composited over white, or None and why it does not."""
    try:
        image: Image.Image = Image.open(io.BytesIO(content))
        full = image.size
        if image.format in ("JPEG", "MPO"):
            smallest = target(full, plan)
            image.draft(None, (2 * smallest[0], 2 * smallest[1]))
        drafted = image.size
        image.load()
        size = full if image.size == drafted else image.size  # Pillow turns a TIFF while it loads it
        # Metadata that cannot be read is ignored. Turned in place, as Pillow may fail to write the metadata afterwards.
        with contextlib.suppress(Exception):
            size = size[::-1] if image.getexif().get(0x0112) in (5, 6, 7, 8) else size
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I") or image.mode == "F":
            values = np.asarray(image)
            upper = np.clip(values.astype(np.float64) / 257 if image.mode == "F" else values >> 8, 0, 255)
            image = Image.fromarray(np.nan_to_num(upper).astype(np.uint8))
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return View(image.convert("RGB"), size), ""
    except Exception as error:
        return None, f"Pillow: {type(error).__name__}: {error}"


def target(size: tuple[int, int], plan: StoragePlan) -> tuple[int, int]:
    if plan.layout == "canvas":
        return plan.side, plan.side
    scale = min(1.0, plan.side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def differs(result: Encoded, view: View, plan: StoragePlan) -> str:
    """What differs between a stored image and Pillow's view of it; "" if nothing does."""
    if (result.source_width, result.source_height) != view.size:
        return f"source size {result.source_width}x{result.source_height}, not {view.size[0]}x{view.size[1]}"
    wanted = view.image.resize(target(view.size, plan), Image.Resampling.BILINEAR)
    if (result.width, result.height) != wanted.size:
        return f"size {result.width}x{result.height}, not {wanted.size[0]}x{wanted.size[1]}"
    if result.mode == RAW:
        pixels = np.frombuffer(result.payload, np.uint8).reshape(result.height, result.width, 3)
        difference = np.abs(pixels.astype(int) - np.asarray(wanted))
        return f"raw pixels by up to {difference.max()}" if difference.max() > RAW_TOLERANCE else ""
    decoded = jpeg.decode(result.payload)
    if decoded.warning:
        return f"the decoder warns: {decoded.warning}"
    if result.case != Stored.PASSED_THROUGH:
        buffer = io.BytesIO()
        wanted.save(buffer, "JPEG", quality=plan.quality, subsampling="4:2:0")
        wanted = Image.open(buffer)
    difference = np.abs(decoded.pixels.astype(int) - np.asarray(wanted))
    if difference.mean() <= MEAN_TOLERANCE and difference.max() <= MAX_TOLERANCE:
        return ""
    return f"{result.case.name} pixels by {difference.mean():.1f}, up to {difference.max()}"


# --- in the main process ------------------------------------------------------------------------


class Child(ChildProcess):
    """A child process that is started again after it was killed or has died."""

    def run(self, case: Case, seed: int) -> Outcome:
        try:
            if self.process is None:
                self.start()
            self.connection.send((case, seed))
            if not self.connection.poll(HANG):
                self.stop()
                return Outcome(failures=[("hang", f"more than {HANG} s")])
            outcome: Outcome = self.connection.recv()
            if self.connection.poll(PATIENCE):
                outcome = self.connection.recv()
            else:
                self.stop()
            return outcome
        except (EOFError, OSError):
            self.process.join(5)
            code = self.process.exitcode
            self.stop()
            return Outcome(failures=[("crash", f"the process died with exit code {code}")])

    def start(self) -> None:
        super().start()
        # The first image compiles the resize, which may take longer than HANG.
        self.connection.send((Case(valid_jpeg(Random(0)), ".jpg"), 0))
        for _ in range(2):
            assert self.connection.poll(PATIENCE), "the child process does not start"
            self.connection.recv()


@dataclass
class Tally:
    """The outcomes of all files of a kind."""

    files: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)  # a distinct failure or refusal -> the first file of it


def fuzz(kinds: list[str], seed: int, minutes: float, files: int | None, out: Path) -> dict[str, Tally]:
    """Try files of all kinds in turn, for some minutes or until `files` of each."""
    tallies: dict[str, Tally] = defaultdict(Tally)
    end = time.monotonic() + 60 * minutes
    process = Child(child)
    try:
        for kind, number in in_turn(kinds, files):
            if time.monotonic() > end:
                break
            case = KINDS[kind](Random(f"{seed}/{kind}/{number}"))
            record(tallies[kind], f"{kind}-{seed}-{number}{case.suffix}", case, process.run(case, seed), out)
    finally:
        process.stop()
    return tallies


def in_turn(kinds: list[str], files: int | None) -> Iterator[tuple[str, int]]:
    number = 0
    while files is None or number < files:
        for kind in kinds:
            yield kind, number
        number += 1


def record(tally: Tally, name: str, case: Case, outcome: Outcome, out: Path) -> None:
    tally.files += 1
    tally.counts["stored"] += outcome.stored
    tally.counts["bad"] += outcome.bad
    tally.counts["not listed"] += case.suffix in BUILDERS and not outcome.stored + outcome.bad
    tally.counts["stored, Pillow refuses"] += outcome.lenient
    tally.counts["bad, Pillow decodes"] += bool(outcome.refused)
    tally.counts["failures"] += bool(outcome.failures)
    found = [f"{what}: {details}" for what, details in outcome.failures]
    found += [f"bad, Pillow decodes: {outcome.refused}"] if outcome.refused else []
    found += [f"stored, Pillow refuses: {outcome.reason}"] if outcome.lenient else []
    for text in found:
        # Numbers, names and bytes differ from file to file.
        kind = re.sub(r"<[^>]*>|b?'[^']*'|b?\"[^\"]*\"|/\S+|0x[0-9a-f]+|-?\d+(\.\d+)?", "#", text)[:160]
        if kind not in tally.examples:
            tally.examples[kind] = f"{name}: {text[:300]}"
            out.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(case.content)


def report(tallies: dict[str, Tally], out: Path) -> str:
    columns = ("stored", "bad", "not listed", "bad, Pillow decodes", "stored, Pillow refuses", "failures")
    lines = ["| input | files | " + " | ".join(columns) + " |", "|---|" + "---|" * (len(columns) + 1)]
    for kind, tally in tallies.items():
        cells = [f"{tally.files:,}", *(f"{tally.counts[column]:,}" for column in columns)]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    examples = [example for tally in tallies.values() for example in tally.examples.values()]
    if examples:
        lines += [
            "",
            f"One file of each distinct kind, in {out}:",
            *(f"- {' '.join(each.split())}" for each in examples),
        ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--files", type=int, help="files of each kind; default: as many as the minutes allow")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--what", nargs="+", choices=[*KINDS], default=[*KINDS], help="kinds of input")
    parser.add_argument("--out", type=Path, default=Path("fuzz-failures"), help="folder for the examples")
    options = parser.parse_args()
    began = time.monotonic()
    tallies = fuzz(options.what, options.seed, options.minutes, options.files, options.out)
    versions = f"Python {platform.python_version()}, Pillow {PIL.__version__}, numpy {np.__version__}"
    print(f"seed {options.seed}, {time.monotonic() - began:.0f} s, {versions}\n\n{report(tallies, options.out)}")
    return int(any(tally.counts["failures"] for tally in tallies.values()))


if __name__ == "__main__":
    raise SystemExit(main())

"""A profile as a file: what is in it, written whole or not at all, checked when it is read, held against thresholds.

In the program a profile is a plain dict; the classes below say what it holds and are what a file is checked with, so
that later code may trust whatever `read_profile` gives. Times are in seconds, rates a second, shares from 0 to 1.
"""

import difflib
import json
import math
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, Strict, StrictBool, ValidationError, model_validator

from fastssl.common.errors import UserError
from fastssl.common.files import explain_write_errors, write_atomically
from fastssl.common.terminal import printable

SCHEMA = 1  # raise it when a profile changes so that older code would misread it
DEEPEST = 30  # levels of a profile: what is deeper is no profile, and could exhaust the stack
SHARES = ("accelerator_utilisation", "mfu", "gpu_utilisation")
RATE = "images_per_second"
LEGS = (
    "storage", "decode", "cpu_augment", "copy", "loader", "views", "step", "communication", "launch", "replay",
    "end_to_end",
)  # fmt: skip
LEG_OF_CAUSE = {"compute": "step"}  # a cause has the name of its leg, but for this one


def _is_line(value: object) -> object:
    """pydantic's own check refuses a path that is not UTF-8, which Python keeps as surrogates."""
    if not isinstance(value, str) or len(value) > 5000:
        raise ValueError("not a string of at most 5000 characters")
    return value


# Bounds that no machine reaches, so that no sum, ratio or logarithm of two of them overflows.
Number = Annotated[float, Strict(), Field(ge=0, le=1e18, allow_inf_nan=False)]
Positive = Annotated[float, Strict(), Field(ge=1e-9, le=1e18, allow_inf_nan=False)]
Whole = Annotated[int, Strict(), Field(ge=0, le=10**18)]
Line = Annotated[Any, AfterValidator(_is_line)]
Section = dict[Any, Any]  # keys of JSON are strings, if not always of valid Unicode
Key = Annotated[str, Strict(), Field(pattern=r"^[a-z][a-z_ ]{0,23}$")]
Workers = Annotated[str, Strict(), Field(pattern=r"^[1-9][0-9]{0,3}$")]


class Figure(BaseModel):
    """Measured several times: a window is one of them."""

    median: Number
    low: Number
    high: Number
    windows: Annotated[list[Number], Field(min_length=1)]

    @model_validator(mode="after")
    def check(self) -> "Figure":
        if not self.low <= self.median <= self.high:
            raise ValueError("low, median and high are not in this order")
        return self


class Rate(Figure):
    median: Positive
    low: Positive
    high: Positive


class Percentiles(BaseModel):
    p50: Number
    p95: Number
    p99: Number


class GPU(BaseModel):
    utilisation: Number | None = None
    sm_clock_mhz: Number | None = None
    max_sm_clock_mhz: Number | None = None
    power_w: Number | None = None


class Stage(BaseModel):
    """One arrow of the data's flow, measured alone. Below `missing`, what only some legs have."""

    images_per_second: Rate | None = None
    cpu_seconds: Figure | None = None  # an image, over all threads
    missing: Line | None = None  # why the leg is not there

    cold_bytes_per_second: Rate | None = None
    warm_bytes_per_second: Rate | None = None
    workers: dict[Workers, Rate] | None = None  # images a second by the number of decoding threads
    knee: Whole | None = None  # workers from which on more give little
    bytes_per_second: Rate | None = None
    peak_bytes_per_second: Positive | None = None
    kernels: Number | None = None  # a batch
    bytes_per_image: Number | None = None
    phases: dict[Key, Figure] | None = None  # seconds an image
    phases_note: Line | None = None
    busy_seconds: Number | None = None  # an image: that a GPU's kernels run, gaps between them left out
    flops: Number | None = None  # an image
    flops_per_second: Number | None = None
    mfu: Number | None = None
    peak_memory_bytes: Number | None = None
    page_faults: Number | None = None  # of a step, without a disk: memory that the system hands out anew
    data_wait: Figure | None = None  # share of the time
    wait_seconds: Percentiles | None = None  # a batch
    cores_busy: Number | None = None
    gpu: GPU | None = None


class Machine(BaseModel):
    device: Line
    kind: Line
    cores: Whole
    processes: Whole
    peak_flops: Number | None  # a second
    peak_source: Line | None


class Data(BaseModel):
    path: Line
    images: Whole
    file_bytes: Number
    image_bytes: Number  # stored, mean of an image
    decoded_bytes: Number
    layout: Line
    storage: Line
    resolution: list[Whole] | None  # height and width in pixels
    crop: Line
    resident: StrictBool
    in_page_cache: Number | None
    fits_into_memory: StrictBool | None
    batches_per_epoch: Whole


class Run(BaseModel):
    batch_size: Whole  # over all processes
    workers: Whole
    precision: Line
    compiled: StrictBool
    parameters: Whole
    views: Whole
    size: Whole  # of a view, in pixels


class Limits(BaseModel):
    lines: dict[Key, Number]  # seconds an image that each resource is busy
    predicted_images_per_second: Positive | None
    measured_images_per_second: Positive | None
    error: Annotated[float, Strict(), Field(ge=-1, le=1e18, allow_inf_nan=False)] | None


class Next(BaseModel):
    cause: Line
    images_per_second: Positive


class Verdict(BaseModel):
    cause: Line
    sentence: Line
    accelerator_utilisation: Number | None
    next: Next | None  # the limit when the present one is lifted
    twice_as_fast: dict[Key, Positive]  # images a second if that leg were


class Profile(BaseModel):
    made: Line
    seconds: Number
    fastssl: Line
    name: Line
    recipe: Section
    overrides: list[Line]
    environment: Section
    machine: Machine
    data: Data
    run: Run
    legs: dict[Key, Stage]
    limits: Limits
    verdict: Verdict
    remarks: list[Line]
    trace: Line | None


def write_profile(path: Path, profile: dict) -> None:
    """Raises UserError where the file cannot be written, ValueError for a figure that is no number."""
    text = json.dumps(profile, indent=2, allow_nan=False) + "\n"
    with explain_write_errors(path):
        write_atomically(path, lambda beside: beside.write_text(text))


def read_profile(path: Path) -> dict:
    """The profile as it was written. Raises UserError with one sentence for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"No profile at {path}: `fastssl profile RECIPE --json {path}` makes one.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give the file of a profile.") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not readable as JSON: give the file that fastssl profile --json wrote.") from None
    if not isinstance(value, dict) or not {"schema", "legs"} <= value.keys() or is_deeper(value, DEEPEST):
        raise UserError(f"{path} is not a profile: give the file that fastssl profile --json wrote.")
    if type(value["schema"]) is not int or value["schema"] != SCHEMA:
        raise UserError(f"{path} was written by another version: profile again.")
    try:
        Profile.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = printable(".".join(map(str, first["loc"])))[:200]
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{path} is a damaged profile ({key}: {message}): profile again.") from None
    return value


def is_deeper(value: object, levels: int) -> bool:
    """Whether dicts and lists stand in each other to more than so many levels; without recursion."""
    layer = [value]
    for _ in range(levels):
        inner = [x.values() if isinstance(x, dict) else x for x in layer if isinstance(x, dict | list)]
        layer = [x for values in inner for x in values]
    return any(isinstance(x, dict | list) for x in layer)


def figure(profile: dict, leg: str, name: str = RATE) -> dict | None:
    """One figure of a leg, None where it was not measured."""
    return profile["legs"].get(leg, {}).get(name)


def median(profile: dict, leg: str, name: str = RATE) -> float | None:
    found = figure(profile, leg, name)
    return found and found["median"]


def why_missing(profile: dict, leg: str) -> str:
    return profile["legs"].get(leg, {}).get("missing") or "it was not measured"


def missing_legs(profile: dict) -> dict[str, str]:
    """The legs without a rate, with the reason."""
    return {leg: why_missing(profile, leg) for leg in profile["legs"] if figure(profile, leg) is None}


def limiting_leg(profile: dict) -> str:
    return leg_of(profile["verdict"]["cause"])


def leg_of(cause: str) -> str:
    return LEG_OF_CAUSE.get(cause, cause)


def step_parts(profile: dict) -> dict[str, float]:
    """What the device's time goes to, in seconds an image and in the order of a step."""
    parts, processes = {}, profile["machine"]["processes"]  # which work on as many images at a time
    wait, pace = median(profile, "end_to_end", "data_wait"), median(profile, "end_to_end")
    if wait is not None and pace is not None:
        parts["wait for data"] = processes * wait / pace
    if views := median(profile, "views"):
        parts["views"] = processes / views
    phases = {name: phase["median"] for name, phase in (figure(profile, "step", "phases") or {}).items()}
    parts |= phases
    if step := median(profile, "step"):
        rest = processes / step - sum(phases.values())
        if rest > 0.02 * processes / step:  # less is noise: the phases were timed apart from the whole
            parts["rest of the step" if phases else "step"] = rest
    if "communication" not in phases and (communication := median(profile, "communication")):
        parts["communication"] = processes / communication
    return parts


def failed_thresholds(profile: dict, thresholds: list[str]) -> list[str]:
    """One sentence for each KEY=VALUE that the profile falls below. Raises UserError for what cannot be checked."""
    failures = []
    for key, least in parse_thresholds(thresholds):
        value = _figure_of(profile, key)
        if value < least:
            failures.append(f"{key} is {value:.6g}, below {least:.6g}.")
    return failures


def parse_thresholds(thresholds: list[str]) -> list[tuple[str, float]]:
    """Keys and numbers of KEY=VALUE. Raises UserError for a key that no profile has, and for what is no number."""
    return [_threshold(text) for text in thresholds]


def _threshold(text: str) -> tuple[str, float]:
    key, equals, number = text.partition("=")
    key = key.strip()
    known = [RATE, *SHARES, *(f"{leg}.{RATE}" for leg in LEGS)]
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}."
        raise UserError(f"--fail-under {text}: there is no figure {key!r}: {hint}")
    example = f"{key}={0.9 if key in SHARES else 1000}"
    # float() would also take nan, which nothing is below, and 1_000
    least = float(number) if re.fullmatch(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", number) else math.nan
    if not math.isfinite(least):
        raise UserError(f"--fail-under {text}: write KEY=VALUE with a number, such as {example}.")
    if key in SHARES and least > 1:
        raise UserError(f"--fail-under {text}: {key} is a share from 0 to 1: write it as such, as in {example}.")
    return key, least


def _figure_of(profile: dict, key: str) -> float:
    """Raises UserError where this profile lacks it."""
    step, end = (profile["legs"].get(leg, {}) for leg in ("step", "end_to_end"))
    if key == "accelerator_utilisation":
        value = profile["verdict"]["accelerator_utilisation"]
        lacks = next((leg for leg in ("replay", "end_to_end") if figure(profile, leg) is None), "replay")
        why = f"{lacks}: {why_missing(profile, lacks)}"
    elif key == "mfu":
        value = step.get("mfu")
        why = step.get("missing") or "the peak of this device is not known"
    elif key == "gpu_utilisation":
        value = (end.get("gpu") or {}).get("utilisation")
        is_cpu = profile["machine"]["kind"] == "cpu"
        why = end.get("missing") or ("there was no GPU" if is_cpu else "the GPU's counters could not be read")
    else:
        leg = key.removesuffix(RATE).removesuffix(".") or "end_to_end"
        value, why = median(profile, leg), why_missing(profile, leg)
    if value is None:
        raise UserError(f"--fail-under {key}: it is not in this profile: {printable(why).rstrip('.')}.")
    return value

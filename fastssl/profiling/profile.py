"""A profile: what it holds, and how profile.json is written and read.

Times are in seconds, rates per second over all processes, shares from 0 to 1. The models check a file when it is read,
so later code relies on types and ranges. Names and paths are made printable when a model is built.
"""

import shlex
import statistics
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, StrictBool, ValidationError, model_validator

from fastssl.common.errors import UserError
from fastssl.common.files import LARGEST_TEXT, explain_write_errors, read_bytes, write_atomically
from fastssl.common.terminal import printable


def _printable_json(value: object) -> object:
    """Make all text printable: pydantic's str refuses the names of files that are not UTF-8."""
    if isinstance(value, dict):
        return {printable(str(key)): _printable_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_printable_json(inner) for inner in value]
    return printable(value) if isinstance(value, str) else value


OTHERS_RAN = "Other processes kept"  # how the remark on a busy machine begins
RUN_AGAIN = "Profile again when nothing else runs."  # how the remark on stages that predict another speed ends

# No machine reaches these bounds, so no sum, ratio or logarithm of two values overflows.
Number = Annotated[float, Strict(), Field(ge=0, le=1e18, allow_inf_nan=False)]
Positive = Annotated[float, Strict(), Field(ge=1e-9, le=1e18, allow_inf_nan=False)]
Whole = Annotated[int, Strict(), Field(ge=0, le=10**18)]
Printable = Annotated[str, Strict(), Field(max_length=5000), BeforeValidator(_printable_json)]
Key = Annotated[str, Strict(), Field(pattern=r"^[a-z][a-z_ ]{0,23}$")]
Section = Annotated[dict[str, object], BeforeValidator(_printable_json)]


class ProfilePart(BaseModel):
    model_config = ConfigDict(validate_assignment=True)


class Measurement(ProfilePart):
    """One quantity, measured in several windows of time."""

    median: Number
    low: Number
    high: Number
    windows: Annotated[list[Number], Field(min_length=1)]

    @classmethod
    def of(cls, windows: list[float]) -> Self:
        return cls(median=statistics.median(windows), low=min(windows), high=max(windows), windows=windows)

    def spread(self) -> float:
        """Return half the range of the windows, relative to the median."""
        return 0.5 * (self.high - self.low) / self.median if self.median else 0.0

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if not self.low <= self.median <= self.high:
            raise ValueError("low, median and high are not in this order")
        return self


class Rate(Measurement):
    median: Positive
    low: Positive
    high: Positive


class Percentiles(ProfilePart):
    p50: Number
    p95: Number
    p99: Number


class GpuCounters(ProfilePart):
    """Medians of nvidia-smi's counters while training ran."""

    utilization: Number
    sm_clock_mhz: Number
    max_sm_clock_mhz: Number
    power_w: Number


class StageResult(ProfilePart):
    """One stage, measured alone. Fields below `missing` belong to the stages that the comments name."""

    images_per_second: Rate | None = None
    cpu_seconds: Measurement | None = None  # per image, over all threads
    missing: Printable | None = None  # why the stage was not measured

    # storage
    cold_bytes_per_second: Rate | None = None  # evicted from the page cache before
    warm_bytes_per_second: Rate | None = None  # from the page cache
    # decode, copy_images
    workers: dict[Annotated[int, Field(ge=1, le=9999)], Rate] | None = None  # images per second by number of threads
    knee: Whole | None = None  # number of threads beyond which more give less than 5 %
    # transfer
    bytes_per_second: Rate | None = None
    peak_bytes_per_second: Positive | None = None
    # views
    kernels: Number | None = None  # per batch
    bytes_per_image: Number | None = None
    # step
    phases: dict[Key, Measurement] | None = None  # seconds per image
    phases_note: Printable | None = None
    flops: Number | None = None  # per image
    flops_per_second: Number | None = None  # of one device
    mfu: Number | None = None  # model FLOPs utilization
    peak_memory_bytes: Number | None = None
    page_faults: Number | None = None  # per step, without disk reads: memory that the system hands out again
    # views and step on a GPU
    busy_seconds: Number | None = None  # per image, in which kernels run; gaps between them do not count
    # end_to_end
    data_wait: Measurement | None = None  # share of the time
    wait_seconds: Percentiles | None = None  # per batch
    cores_busy: Number | None = None
    gpu: GpuCounters | None = None

    @property
    def rate(self) -> float | None:
        """Median images per second."""
        return self.images_per_second.median if self.images_per_second else None

    @property
    def reason(self) -> str:
        """Why the stage was not measured."""
        return self.missing or "it was not measured"


class Stages(ProfilePart):
    """Every stage of training, in the order of the data flow. docs/profiling.md says what each one times."""

    storage: StageResult
    decode: StageResult
    copy_images: StageResult = Field(default_factory=StageResult)  # profiles of older versions have no such stage
    cpu_augment: StageResult
    transfer: StageResult
    loader: StageResult
    views: StageResult
    step: StageResult
    communication: StageResult
    launch: StageResult
    replay: StageResult
    end_to_end: StageResult

    def by_name(self) -> dict[str, StageResult]:
        return {name: getattr(self, name) for name in STAGES}


STAGES = tuple(Stages.model_fields)


class ProfiledMachine(ProfilePart):
    device: Printable
    kind: Printable  # "cpu" or "cuda"
    cores: Whole  # of one process
    processes: Whole
    peak_flops: Number  # per second
    peak_source: Printable


class ProfiledData(ProfilePart):
    path: Printable
    images: Whole
    file_bytes: Number
    image_bytes: Number  # mean, as stored
    decoded_bytes: Number  # of an image in a batch: its pixels or blocks, with all of its crops
    layout: Printable
    storage: Printable
    resolution: list[Whole] | None  # height and width in pixels
    crop: Printable
    resident: StrictBool
    in_page_cache: Number | None
    fits_into_memory: StrictBool
    batches_per_epoch: Whole


class ProfiledRun(ProfilePart):
    batch_size: Whole  # over all processes
    workers: Whole
    precision: Printable
    compiled: StrictBool
    parameters: Whole
    views: Whole
    size: Whole  # of a view, in pixels


class Prediction(ProfilePart):
    """What the cost model (bottleneck.py) makes of the stages, compared with training itself."""

    resource_seconds: dict[Key, Number]  # per image, that each resource is busy
    predicted_images_per_second: Positive
    measured_images_per_second: Positive
    relative_error: Annotated[float, Strict(), Field(ge=-1, le=1e18, allow_inf_nan=False)]


class NextBottleneck(ProfilePart):
    stage: Key
    images_per_second: Positive


class Bottleneck(ProfilePart):
    stage: Key  # or "balanced"
    sentence: Printable  # the verdict
    advice: Printable = ""  # what helps; profiles of older versions say it in the sentence
    accelerator_utilization: Number
    next: NextBottleneck | None  # once the present one is fixed
    twice_as_fast: dict[Key, Positive]  # predicted images per second if that stage were twice as fast


class Profile(ProfilePart):
    schema_version: Literal[2]  # increase it when a profile changes so that older code would misread it
    measured_at: Printable
    seconds: Number  # that profiling took
    fastssl_version: Printable
    name: Printable
    recipe: Section
    overrides: list[Printable]
    environment: Section
    machine: ProfiledMachine
    data: ProfiledData
    run: ProfiledRun
    stages: Stages
    prediction: Prediction
    bottleneck: Bottleneck
    remarks: list[Printable]
    trace: Printable | None  # file name


def write_profile(path: Path, profile: Profile) -> None:
    """Write profile.json. Raises UserError where the file cannot be written."""
    text = profile.model_dump_json(indent=2, exclude_defaults=True) + "\n"
    with explain_write_errors(path):
        write_atomically(path, text)


def read_profile(path: Path) -> Profile:
    """Read profile.json. Raises UserError with one sentence for any other or damaged file."""
    try:
        text = read_bytes(path, LARGEST_TEXT)
    except FileNotFoundError:
        raise UserError(
            f"No profile at {path}", hint=f"`fastssl profile RECIPE --json {shlex.quote(str(path))}` makes one"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})", hint="give the file of a profile") from None
    try:
        return Profile.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
    if first["type"] == "json_invalid":
        raise UserError(f"{path} is not readable as JSON", hint="give the file that fastssl profile --json wrote")
    if not first["loc"] or (first["loc"] == ("schema_version",) and first["type"] == "missing"):
        raise UserError(f"{path} is not a profile", hint="give the file that fastssl profile --json wrote")
    if first["loc"] == ("schema_version",):
        raise UserError(f"{path} was written by another version of fastssl", hint="profile the recipe again")
    key = printable(".".join(map(str, first["loc"])))[:200]
    message = first["msg"].removeprefix("Value error, ")
    raise UserError(f"{path} is a damaged profile ({key}: {message})", hint="profile the recipe again")


def accelerator_utilization(stages: Stages) -> Measurement | None:
    """Return the time that the device computes over the total time, which is MLPerf Storage's definition.

    Each window of training is compared with its neighbor of `replay`, so a drift of the machine's speed does not count.
    """
    training, ceiling = stages.end_to_end.images_per_second, stages.replay.images_per_second
    if not training or not ceiling:
        return None
    return Measurement.of([min(1.0, a / b) for a, b in zip(training.windows, ceiling.windows)])


def short_remarks(profile: Profile) -> str:
    """Return the first sentence of each remark, empty without remarks."""
    sentences = (remark.split(". ")[0].removesuffix(".") for remark in profile.remarks)
    return " ".join(f"{sentence}." for sentence in sentences)


def was_busy(profile: Profile) -> bool:
    """Whether a remark says that something else ran on the machine, or probably did."""
    return any(words in remark for remark in profile.remarks for words in (OTHERS_RAN, RUN_AGAIN))


def training_seconds(profile: Profile) -> float:
    """Return the time that an image takes a process in training, end to end: what every share of time is a share of."""
    return profile.machine.processes / profile.prediction.measured_images_per_second


def device_time(profile: Profile) -> dict[str, float]:
    """Return what the device's time goes to: part -> seconds per image, in the order of a step."""
    # Rates are those of all processes together.
    seconds = {name: profile.machine.processes / x.rate for name, x in profile.stages.by_name().items() if x.rate}
    parts = {}
    if waited := profile.stages.end_to_end.data_wait:
        parts["wait for data"] = waited.median * training_seconds(profile)
    if "views" in seconds:
        parts["views"] = seconds["views"]
    phases = {name: phase.median for name, phase in (profile.stages.step.phases or {}).items()}
    step = seconds.get("step", 0.0)
    rest = step - sum(phases.values())
    exchange = seconds.get("communication", 0.0)
    if "backward" in phases:  # which the exchange of gradients is a part of
        phases["backward"] = max(0.0, phases["backward"] - exchange)
    parts |= phases
    # Less than 2 % is noise, as the phases were timed separately from the whole step.
    if rest > 0.02 * step:
        parts["rest of the step" if phases else "step"] = rest
    if exchange:
        parts["communication"] = exchange
    return parts

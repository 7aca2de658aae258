"""`--fail-under KEY=VALUE`: thresholds that a profile is checked against, for continuous integration."""

import difflib
import math
import re
from typing import NamedTuple

from fastssl.common.errors import UserError, quote
from fastssl.profiling.profile import STAGES, Profile

RATE = "images_per_second"
SHARES = ("accelerator_utilization", "mfu", "gpu_utilization")  # from 0 to 1
KEYS = (RATE, *SHARES, *(f"{stage}.{RATE}" for stage in STAGES))


class Threshold(NamedTuple):
    key: str  # one of KEYS
    minimum: float


def parse_thresholds(texts: list[str]) -> list[Threshold]:
    """Parse KEY=VALUE. Raises UserError for an unknown key or a value that is not a number in its range."""
    thresholds = []
    for text in texts:
        key, _, number = text.partition("=")
        key = key.strip()
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(KEYS)}"
            raise UserError(f"--fail-under {text}: unknown key {quote(key)}", hint=hint)
        example = f"{key}={0.9 if key in SHARES else 1000}"
        # float() would also accept nan, which no value is below, and 1_000.
        minimum = float(number) if re.fullmatch(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", number) else math.nan
        if not math.isfinite(minimum):
            raise UserError(f"--fail-under {text} is not KEY=VALUE with a number", hint=f"write it like {example}")
        if key in SHARES and minimum > 1:
            raise UserError(f"--fail-under {text}: {key} is a share from 0 to 1", hint=f"write it as in {example}")
        thresholds.append(Threshold(key, minimum))
    return thresholds


def failed_thresholds(profile: Profile, thresholds: list[Threshold]) -> list[str]:
    """Return one sentence for each threshold that the profile is below. Raises UserError if it lacks the value."""
    step, training = profile.stages.step, profile.stages.end_to_end
    no_counters = "there was no GPU" if profile.machine.kind == "cpu" else "the GPU's counters could not be read"
    # By key, the value and why it may be missing.
    values: dict[str, tuple[float | None, str]] = {
        RATE: (training.rate, training.reason),
        "accelerator_utilization": (profile.bottleneck.accelerator_utilization, ""),
        "mfu": (step.mfu, step.reason),
        "gpu_utilization": (training.gpu.utilization if training.gpu else None, no_counters),
    }
    values |= {f"{name}.{RATE}": (stage.rate, stage.reason) for name, stage in profile.stages.by_name().items()}
    failures = []
    for key, minimum in thresholds:
        value, reason = values[key]
        if value is None:
            raise UserError(
                f"--fail-under {key} is not in this profile ({reason.rstrip('.')})",
                hint="leave out this --fail-under, or profile where it can be measured",
            )
        if value < minimum:
            failures.append(f"{key} is {value:.6g}, below {minimum:.6g}.")
    return failures

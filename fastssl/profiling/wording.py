"""How a profile's names and numbers are shown. Each has one name on screens, pages, figures and in docs/profiling.md;
the keys of profile.json are the keys of these tables."""

import math

STAGE_NAMES = {
    "storage": "reading from disk",
    "decode": "image decoding",
    "copy_images": "image copying",
    "cpu_augment": "cropping on the CPU",
    "transfer": "batch transfer",
    "loader": "whole data loader",
    "views": "view augmentation",
    "step": "training step",
    "communication": "gradient all-reduce",
    "launch": "kernel launching",
    "replay": "training without loading",
    "end_to_end": "training end to end",
}
WITH_ARTICLE = ("step", "communication", "forward", "backward", "kl", "objective", "optimizer")  # in sentences
PART_NAMES = {  # of the training time
    "wait for data": "waiting for data",
    "views": "view augmentation",
    "forward": "forward pass",
    "draws": "embedding samples",
    "objective": "objective",
    "kl": "KL term",
    "backward": "backward pass",
    "optimizer": "optimizer step",
    "communication": "gradient all-reduce",
    "step": "training step",
    "rest of the step": "rest of the step",
}
BELOW_NOISE = "below the noise"
RESOURCE_NAMES = {
    "disk": "disk",
    "threads": "loader threads",
    "reader": "batch thread",
    "device": "device",
    "main_thread": "main thread",
    "cores": "CPU cores",
}


def in_sentence(key: str) -> str:
    """Return the name of a stage or of a part of the step as it reads within a sentence."""
    name = STAGE_NAMES.get(key) or PART_NAMES.get(key, key)
    return f"the {name}" if key in WITH_ARTICLE else name


def capitalized(text: str) -> str:
    """Return a sentence with its first letter in upper case, and the others as they are."""
    return text[:1].upper() + text[1:]


def significant(value: float, digits: int = 3) -> str:
    """Format a number of at least 0 with this many significant digits (all digits of whole numbers), without an
    exponent."""
    if value <= 0:
        return "0"
    decimals = digits - 1 - math.floor(math.log10(value))
    return f"{value:,.{min(max(decimals, 0), 9)}f}"


def is_below_noise(part: str, seconds: float) -> bool:
    """Whether a part's time is only 0 because it is the difference of two times. Training may really not wait."""
    return seconds == 0 and part != "wait for data"


def rounded(value: float) -> str:
    """Format a prediction: not with more than three digits that are not zero."""
    return significant(float(f"{value:.3g}"))


def percent(share: float) -> str:
    """Format a share in whole percents, below 10 % with one decimal."""
    return f"{100 * share:.{0 if share >= 0.0995 else 1}f} %"


def times(factor: float) -> str:
    """Format a ratio of two speeds: 1.99x."""
    return f"{significant(factor)}x"


def si(value: float, unit: str = "") -> str:
    """Format with an SI prefix: 12.1 GB/s."""
    power = min(max(int(math.log10(value) / 3), 0), 5) if value > 0 else 0
    return f"{significant(value / 1000**power)} {['', 'k', 'M', 'G', 'T', 'P'][power]}{unit}".strip()

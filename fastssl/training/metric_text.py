"""The metrics of training as a person reads them: their names, their groups, their values as text."""

import math

# The groups of the panel, with the name of each metric there. docs/glossary.md explains these names.
GROUPS = {
    "Loss and optimizer": {
        "loss": "loss",
        "on_diagonal": "on-diagonal term",
        "off_diagonal": "off-diagonal term",
        "invariance": "invariance term",
        "variance": "variance term",
        "covariance": "covariance term",
        "sigreg": "SIGReg term",
        "scale": "scale term",
        "shape": "shape term",
        "center": "center term",
        "nt_xent": "NT-Xent term",
        "prediction": "prediction term",
        "cross_entropy": "cross-entropy term",
        "beta_kl": "beta * KL term",
        "accuracy": "accuracy of this batch",
        "lr": "learning rate",
        "grad_norm": "gradient norm",
        "skipped_steps": "skipped steps (NaN, inf)",
    },
    "Speed": {
        "images_per_second": "images/s",
        "data_wait": "time waiting for data",
        "bad_samples": "undecodable images",
    },
    "Embedding": {
        "kl_h": "KL(q||p) of h, nats",
        "kl_z": "KL(q||p) of z, nats",
        "sigma_h": "sigma of h, mean",
        "sigma_z": "sigma of z, mean",
        "std_z": "std of z over images",
        "knn": "kNN accuracy",
    },
    "Rank (effective dimensions)": {"rankme_h": "RankMe of h", "rankme_z": "RankMe of z"},
}
LABELS = {name: label for group in GROUPS.values() for name, label in group.items()}
# What a small window shows at least, the most important first.
KEY_METRICS = ("loss", "accuracy", "kl_h", "kl_z", "images_per_second", "data_wait", "std_z", "lr", "knn", "rankme_z")
# Metrics that metrics.jsonl has and the panel has not.
ONLY_IN_FILE = ("epoch", "seconds", "graphs", "graph_breaks", "recompiled")
ONLY_IN_FILE_PREFIXES = ("kl_per_dim_", "sigma_min_", "sigma_max_", "sigma_clamped_")
SHARES = ("accuracy", "data_wait", "knn")  # from 0 to 1


def label(name: str) -> str:
    return LABELS.get(name, name)


def is_only_in_file(name: str) -> bool:
    return name in ONLY_IN_FILE or name.startswith(ONLY_IN_FILE_PREFIXES)


def shown(name: str, value: float) -> str:
    """Return the value of a metric in at most eight characters."""
    if name in SHARES and math.isfinite(value):
        return f"{100 * value:.0f} %" if name == "data_wait" else f"{100 * value:.2f} %"
    if name == "images_per_second" and 100 <= value < 999_999.5:
        return f"{value:,.0f}"
    return str(value) if isinstance(value, int) else number(value)


def number(value: float) -> str:
    """Return up to four digits of a number in at most six characters (7 below 1e-99): 66.21, 0.0412, 12345, 3.2e-4."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    size = abs(value)
    if 1e-3 <= size < 99_999.5:
        decimals = min(max(3 - math.floor(math.log10(size)), 0), 3 if value < 0 else 4)
        text = f"{value:.{decimals}f}"
        return text if len(text) <= 6 else f"{value:.{decimals - 1}f}"  # -9.9996 is rounded to -10.000
    for digits in (1, 0):
        mantissa, exponent = f"{value:.{digits}e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
        if len(text) <= 6:
            break
    return text


def duration(seconds: float) -> str:
    """Return a time in at most six characters, up to 999 days: 1:05, 2h07m, 3d04h."""
    seconds = int(seconds)
    if seconds < 3600:
        return f"{seconds // 60}:{seconds % 60:02}"
    if seconds < 86_400:
        return f"{seconds // 3600}h{seconds // 60 % 60:02}m"
    return f"{seconds // 86_400}d{seconds // 3600 % 24:02}h"

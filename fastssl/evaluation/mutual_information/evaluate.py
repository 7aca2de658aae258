"""`fastssl eval mi`: how much of an image survives into h and z, and how much two views of it share."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.common.errors import UserError
from fastssl.common.randomness import NOISE_EVALUATION, normals
from fastssl.common.terminal import progress
from fastssl.evaluation.features import (
    CACHE_VERSION,
    CHUNK_BYTES,
    Features,
    cached_features,
    eval_loader,
    in_fp32,
    valid_rows,
)
from fastssl.evaluation.mutual_information import critic, estimators
from fastssl.evaluation.mutual_information.critic import principal_components
from fastssl.evaluation.mutual_information.estimators import Estimate, estimate
from fastssl.evaluation.mutual_information.gaussian_bounds import BATCH, posterior_bounds, rate
from fastssl.evaluation.mutual_information.plots import draw_curves
from fastssl.evaluation.results import load_or_compute
from fastssl.evaluation.runs import BetonSubset, RunEncoder
from fastssl.models import Classifier, Model
from fastssl.models.gaussian import DiagonalGaussian
from fastssl.models.ssl_model import evaluating
from fastssl.views import eval_transform

SIDE = 8  # V is the clean view, averaged to so many squares a side
ROWS = 4096  # through the projector at a time
# The counter's time of a draw: none is used twice.
H_CLEAN, Z_CLEAN, H_VIEWS, Z_VIEWS = range(4)
ADDED_NATS, ADDED_DIMS = 1.0, 4  # of the independent Gaussian pair that the check of additivity appends
COMPONENTS = critic.DIRECTIONS - ADDED_DIMS  # of V, h and z: with those dimensions, as many as the critic looks at
INDEPENDENT_WITHIN, ADDITIVE_WITHIN = 0.02, 0.5  # nats; a critic that missed the added pair would be 1 off
CONSTANTS = {
    "side": SIDE,
    "components": COMPONENTS,
    "directions": critic.DIRECTIONS,
    "critic": [critic.HIDDEN, critic.WIDTH],
    "soft_clip_beyond": critic.SOFT_CLIP_BEYOND,
    "largest_r2": critic.LARGEST_R2,
    "rows_per_direction": critic.ROWS_PER_DIRECTION,
    "folds": estimators.FOLDS,
    "validation": [estimators.VALIDATION_SHARE, estimators.MAX_VALIDATION],
    "steps": [estimators.STEPS, estimators.GAUSSIAN_STEPS, estimators.CHECK_EVERY, estimators.PATIENCE],
    "averaging": estimators.AVERAGING,
    "cap_above_pairs": estimators.CAP_ABOVE_PAIRS,
    "temperatures": estimators.TEMPERATURES,
    "anchor": estimators.ANCHOR,
    "saturated": [estimators.MARGIN, estimators.MAX_UNSEEN],
    "checks": [ADDED_NATS, ADDED_DIMS, INDEPENDENT_WITHIN, ADDITIVE_WITHIN],
    "batch_size": estimators.BATCH_SIZE,
    "lrs": [estimators.GAUSSIAN_LR, estimators.NETWORK_LR],
    "weight_decay": estimators.WEIGHT_DECAY,
    "bounds_batch": BATCH,
    "features": CACHE_VERSION,
}


class Variables(NamedTuple):
    """N images as what the table compares, one draw for each where a variable is stochastic. float32."""

    v_NP: Tensor
    h_ND: Tensor
    z_NE: Tensor | None = None  # None: a supervised run has no z
    view_z_2NE: Tensor | None = None  # of two augmented views
    h_given_v: DiagonalGaussian | None = None  # where h is stochastic; h_ND is the draw
    z_given_h: DiagonalGaussian | None = None  # where z is; z_NE is the draw


def evaluate_mi(encoder: RunEncoder, data: Path | None = None, *, seed: int = 0) -> dict:
    """I(V;H), I(H;Z), I(Z;Z') and I(V;Z) of the run on data.val, or on another .beton; kept in RUN/eval/mi.json, with a
    picture of the learning curves beside it. Returns what that file holds.

    seed: of folds, critics and noise. Raises UserError where there are no images to evaluate on, or too few.
    """
    images = images_of(encoder, data)
    about = images.describe()
    if about["images"] < estimators.MIN_SAMPLES:
        raise UserError(f"{images.path} holds {about['images']} images, too few for mutual information: name another.")
    other = f"-data-{Path(data).resolve().parent.name}-{Path(data).stem}" if data else ""
    name = f"mi{'' if seed == 0 else f'-seed{seed}'}{encoder.suffix}{other}"

    def measure() -> dict:
        variables = variables_of(encoder, images, seed)
        pairs = pairs_of(variables)
        known = known_bounds(encoder.model, variables, seed, encoder.device)
        total = len(pairs) * 4 * estimators.STEPS
        with progress("Critics", total, "steps") as advance:
            options = {"device": encoder.device, "advance": advance}
            found = {pair: measure_pair(*xy, seed, options) for pair, xy in pairs.items()}
        path = encoder.run_dir / "eval" / f"{name}.png"
        draw_curves(path, found)
        quantities = {
            pair: {kind: each._asdict() for kind, each in estimates.items()} for pair, estimates in found.items()
        }
        checks = checks_of(found, known)
        return {
            "metrics": figures_of(found, known),
            "saturated": saturated_of(found, known),
            # A continuous z that is a function of h shares infinitely many nats with it.
            "infinite": ["I(H;Z)"] if variables.z_NE is not None and variables.z_given_h is None else [],
            "quantities": quantities,
            "bounds": known,
            "checks": checks,
            "failed": [check["check"] for check in checks if check["passed"] is False],
            "plot": path.name,
        }

    request = {
        "evaluation": "mi",
        "protocol": "lower bounds in nats by critics, cross-fitted; for a stochastic embedding bounds from its known q",
        "settings": CONSTANTS,
        "augmentation": encoder.recipe.views.model_dump(mode="json"),  # I(Z;Z') is of two such views
        "seed": seed,
        **encoder.describe(),
        "val": about,
    }
    return load_or_compute(encoder.run_dir, name, request, measure)


def images_of(encoder: RunEncoder, data: Path | None) -> BetonSubset:
    if data is None and encoder.recipe.data.val is None:
        raise UserError(f"{encoder.run_dir}/recipe.yaml names no data.val: give images with --data FILE.beton.")
    return BetonSubset(Path(data or encoder.recipe.data.val))


def variables_of(encoder: RunEncoder, images: BetonSubset, seed: int) -> Variables:
    """The same draws whatever else is measured: a function of (seed, sample, view)."""
    model, clean = encoder.model, cached_features(encoder, images)
    v_NP = small_pictures(encoder, images)
    h_ND, h_given_v = draw_h(clean, None, seed, encoder.device)
    if isinstance(model, Classifier):
        return Variables(v_NP, h_ND, h_given_v=h_given_v)
    z_NE, z_given_h = draw_z(model, h_ND, clean.index, None, seed)
    pair = cached_features(encoder, images, augmented=True)
    view_z = []
    for view in (0, 1):
        h, _ = draw_h(pair, view, seed, encoder.device)
        view_z.append(draw_z(model, h, pair.index, view, seed)[0])
    return Variables(v_NP, h_ND, z_NE, torch.stack(view_z), h_given_v, z_given_h)


@torch.inference_mode()
def small_pictures(encoder: RunEncoder, images: BetonSubset) -> Tensor:
    """V: the clean view, averaged over areas to 8 x 8 RGB, (N, 192) float32.

    A fixed function of the image, so I(V; .) is a lower bound of the image's own.
    """
    views, parts = encoder.recipe.views, []
    clean, loader = eval_transform(views), eval_loader(images, views, encoder.device)
    for batch in loader:
        image_B3SS = clean(batch.image, batch.height, batch.width).float()
        parts.append(valid_rows(F.adaptive_avg_pool2d(image_B3SS, SIDE).flatten(1), batch))
    return torch.from_numpy(np.concatenate(parts)).to(encoder.device)


def draw_h(features: Features, view: int | None, seed: int, device) -> tuple[Tensor, DiagonalGaussian | None]:
    """h of the clean view or of one of two, (N, D); and what it is a draw from, where it is stochastic."""

    def of_view(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(x if view is None else x[:, view], np.float32)).to(device)

    if features.space != "h":
        return of_view(features.h), None
    q = DiagonalGaussian(of_view(features.mu), 2 * of_view(features.sigma).log())
    return draw(q, features.index, H_CLEAN if view is None else H_VIEWS, view or 0, seed), q


@torch.inference_mode()
def draw_z(model: Model, h_ND: Tensor, index: np.ndarray, view: int | None, seed: int):
    """z = projector(h), (N, E), with the running batch statistics, before BYOL's predictor; where z is stochastic, a
    draw from q(z|h), and that q."""
    parts = []
    with evaluating(model), in_fp32(h_ND.device):
        for h_BD in h_ND.split(ROWS):
            z = model.projector(h_BD)
            q = model.heads["z"](z) if "z" in model.heads else None
            parts.append((z, torch.empty(0)) if q is None else (q.mu, q.log_var))
    z_NE, log_var_NE = (torch.cat(column) for column in zip(*parts))
    if "z" not in model.heads:
        return z_NE, None
    q = DiagonalGaussian(z_NE, log_var_NE)
    return draw(q, index, Z_CLEAN if view is None else Z_VIEWS, view or 0, seed), q


def draw(q: DiagonalGaussian, index: np.ndarray, time: int, view: int, seed: int) -> Tensor:
    """One draw for each image, (N, D)."""
    index_N = torch.from_numpy(np.array(index)).to(q.mu.device)
    parts, rows = [], max(1, CHUNK_BYTES // (16 * q.mu.shape[1]))
    for first in range(0, len(index_N), rows):
        part = slice(first, first + rows)
        noise_BD = normals(seed, time, index_N[part], view, 1, q.mu.shape[1], NOISE_EVALUATION)[0]
        parts.append(q.mu[part] + q.sigma[part] * noise_BD)
    return torch.cat(parts)


def pairs_of(variables: Variables) -> dict[str, tuple[Tensor, Tensor]]:
    """What is compared: the first principal components of each, which take no eigenvectors of 1,024 dimensions a fold
    (7 of 22 s of an estimate), and keep a lower bound a lower bound."""
    v_NP, h_NP = (principal_components(data, COMPONENTS) for data in (variables.v_NP, variables.h_ND))
    if variables.z_NE is None:
        return {"I(V;H)": (v_NP, h_NP)}
    z_NP, *view_z = (principal_components(data, COMPONENTS) for data in (variables.z_NE, *variables.view_z_2NE))
    return {"I(V;H)": (v_NP, h_NP), "I(H;Z)": (h_NP, z_NP), "I(Z;Z')": tuple(view_z), "I(V;Z)": (v_NP, z_NP)}


def measure_pair(x: Tensor, y: Tensor, seed: int, options: dict) -> dict[str, Estimate]:
    """js is the headline, mine what the paper used; the others are what the checks need."""
    order_N = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
    more_x, more_y = (torch.cat([data, added.to(x)], 1) for data, added in zip((x, y), gaussian_pair(len(x), seed)))
    return {
        "js": estimate(x, y, "js", seed, **options),
        "mine": estimate(x, y, "mine", seed, **options),
        # A cyclic shift in random order: no image keeps its partner.
        "independent": estimate(x[order_N], y[order_N.roll(1)], "js", seed, **options),
        "added": estimate(more_x, more_y, "js", seed, **options),
    }


def gaussian_pair(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """x and y with a mutual information of ADDED_NATS."""
    rho = math.sqrt(1 - math.exp(-2 * ADDED_NATS / ADDED_DIMS))
    x, noise = torch.randn(2, count, ADDED_DIMS, generator=torch.Generator().manual_seed(seed))
    return x, rho * x + math.sqrt(1 - rho**2) * noise


def known_bounds(model: Model, variables: Variables, seed: int, device) -> dict[str, dict]:
    """Sandwich and rate of each stochastic space: of h given the image, of z given h (given the image too, where h is
    a function of it)."""
    deterministic_h = variables.h_given_v is None
    spaces = {
        "h": ("I(X;H)", variables.h_given_v, variables.h_ND),
        "z": ("I(X;Z) = I(H;Z)" if deterministic_h else "I(H;Z)", variables.z_given_h, variables.z_NE),
    }
    known = {}
    for space, (of, q, drawn) in spaces.items():
        if q is not None:
            bounds = posterior_bounds(q.mu, q.sigma, drawn, seed=seed, device=device)
            known[of] = {**bounds._asdict(), "rate": rate(q.mu, q.sigma, model.priors[space], drawn)}
    return known


def figures_of(found: dict[str, dict[str, Estimate]], known: dict[str, dict]) -> dict[str, float]:
    figures = {f"{pair} {kind}": each[kind].nats for pair, each in found.items() for kind in ("js", "mine")}
    bounds = ("lower", "upper", "rate")
    return figures | {f"{of} {name}": of_q[name] for of, of_q in known.items() for name in bounds}


def saturated_of(found: dict[str, dict[str, Estimate]], known: dict[str, dict]) -> list[str]:
    """Names of figures that must not be compared."""
    critics = [f"{pair} {kind}" for pair, each in found.items() for kind in ("js", "mine") if each[kind].saturated]
    return critics + [f"{of} lower" for of, bounds in known.items() if bounds["saturated"]]


def checks_of(found: dict[str, dict[str, Estimate]], known: dict[str, dict]) -> list[dict]:
    """What must hold of mutual information, with what was found. passed: None where a saturated estimate says nothing.

    (Of principal components, data processing holds but for what z has of h beyond h's own.)
    """
    checks = []

    def check(what: str, says: str, passed: bool, *needed: Estimate) -> None:
        saturated = any(each.saturated for each in needed)
        checks.append({"check": what, "found": says, "passed": None if saturated else bool(passed)})

    for pair, of in found.items():
        nats = of["independent"].nats
        check(f"{pair}, shuffled pairs: 0", f"{nats:.3f}", abs(nats) <= INDEPENDENT_WITHIN)
    for pair, of in found.items():
        expected, nats = of["js"].nats + ADDED_NATS, of["added"].nats
        passed = abs(nats - expected) <= ADDITIVE_WITHIN
        says = f"{nats:.2f}, expected {expected:.2f}"
        check(f"{pair} and an independent pair of {ADDED_NATS:g} nat: the sum", says, passed, of["js"], of["added"])
    for less, more in (("I(V;Z)", "I(V;H)"), ("I(V;Z)", "I(H;Z)")):
        if less in found:
            one, other = found[less]["js"], found[more]["js"]
            passed = one.nats <= other.nats + 2 * math.hypot(one.error, other.error)
            # A saturated larger one is above its estimate.
            check(f"{less} <= {more}", f"{one.nats:.2f}, {other.nats:.2f}", passed or other.saturated, one)
    for of, bounds in known.items():
        limited = {"I(X;H)": ("I(V;H)", "I(V;Z)"), "I(H;Z)": ("I(H;Z)",)}.get(of, ("I(H;Z)", "I(V;Z)"))
        for pair in (pair for pair in limited if pair in found):
            one = found[pair]["js"]
            says = f"{one.nats:.2f}, {bounds['upper']:.2f}"
            check(f"{pair} <= {of}, upper bound", says, one.nats <= bounds["upper"] + 2 * one.error)
    return checks

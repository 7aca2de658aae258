"""`fastssl eval mi`: how much information about an image is in h and z, and how much do two views of it share?"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor
from typing_extensions import TypedDict

from fastssl.beton import beton_file
from fastssl.common.errors import UserError
from fastssl.common.randomness import NOISE_EVALUATION, normals
from fastssl.common.schema import Finite
from fastssl.evaluation.arrays import Device
from fastssl.evaluation.features import (
    CACHE_VERSION,
    CHUNK_BYTES,
    Features,
    cached_features,
    eval_input,
    eval_loader,
    in_fp32,
    valid_rows,
)
from fastssl.evaluation.mutual_information import critic, estimators
from fastssl.evaluation.mutual_information.critic import principal_components
from fastssl.evaluation.mutual_information.estimators import PairEstimates, estimate
from fastssl.evaluation.mutual_information.gaussian_bounds import BATCH, posterior_bounds, rate
from fastssl.evaluation.mutual_information.plots import draw_learning_curves
from fastssl.evaluation.results import EvaluationResult, load_or_compute
from fastssl.evaluation.runs import BetonSubset, RunEncoder
from fastssl.models import Model
from fastssl.models.encoder_only import EncoderOnly
from fastssl.models.gaussian import DiagonalGaussian, Prior
from fastssl.models.ssl_model import SSLModel, evaluating

# V is the evaluation transform of the image, averaged to SIDE x SIDE pixels. It is a function of the image, so
# I(V; .) is a lower bound of the information about the image itself.
SIDE = 8
ROWS = 4096  # representations that go through the projector at a time
# The purposes of the noise, in place of the counter's training step, so that no noise is used twice.
H_EVAL, Z_EVAL, H_VIEWS, Z_VIEWS = range(4)
# The self-checks: an independent pair of Gaussians with this mutual information is appended, ...
ADDED_NATS = 1.0
ADDED_DIMS = 4
# ... and estimates may be off by these numbers of nats. A critic that missed the appended pair would be 1 off.
SHUFFLED_TOLERANCE = 0.02
ADDED_TOLERANCE = 0.5
# Of V, h and z. With the appended dimensions, they are as many as the critic uses.
COMPONENTS = critic.DIRECTIONS - ADDED_DIMS
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
    "checks": [ADDED_NATS, ADDED_DIMS, SHUFFLED_TOLERANCE, ADDED_TOLERANCE],
    "batch_size": estimators.BATCH_SIZE,
    "lrs": [estimators.GAUSSIAN_LR, estimators.NETWORK_LR],
    "weight_decay": estimators.WEIGHT_DECAY,
    "bounds_batch": BATCH,
    "features": CACHE_VERSION,
}


class Representations(NamedTuple):
    """V, h and z of N images, float32, with one draw per image where a variable is stochastic."""

    v_NP: Tensor
    h_ND: Tensor
    z_NE: Tensor | None = None  # None for an encoder without a projector, which has no z
    view_z_2NE: Tensor | None = None  # z of two augmented views
    h_given_v: DiagonalGaussian | None = None  # if h is stochastic: its distribution, of which h_ND is a draw
    z_given_h: DiagonalGaussian | None = None  # if z is stochastic: its distribution, of which z_NE is a draw


class SelfCheck(TypedDict):
    check: str  # what must hold
    found: str  # the values
    passed: bool | None  # None if a saturated estimate makes the check meaningless


class SavedEstimate(TypedDict):
    """The fields of Estimate."""

    nats: Finite
    error: Finite
    ceiling: Finite
    saturated: bool
    unseen: Finite


class SavedPair(TypedDict):
    """The fields of PairEstimates."""

    js: SavedEstimate
    mine: SavedEstimate


class SavedBounds(TypedDict):
    """The fields of PosteriorBounds, and the rate in nats."""

    lower: Finite
    upper: Finite
    ceiling: Finite
    saturated: bool
    rate: Finite


class MIResult(EvaluationResult):
    """RUN/eval/mi.json. Quantities are such as "I(V;H)"."""

    infinite: list[str]  # quantities that are infinite in theory
    quantities: dict[str, SavedPair]
    bounds: dict[str, SavedBounds]  # of stochastic embeddings
    checks: list[SelfCheck]
    plot: str  # file name of the learning curves


MI_RESULT = TypeAdapter(MIResult)


def evaluate_mi(encoder: RunEncoder, data: Path | None = None, *, seed: int = 0) -> MIResult:
    """Estimate I(V;H), I(H;Z), I(Z;Z') and I(V;Z), and write RUN/eval/mi.json and a plot of the learning curves.

    Args:
        encoder: of the run.
        data: a .beton file; by default data.val of the run.
        seed: of folds, critics and noise.

    Raises:
        UserError: if there are no images, or too few.
    """
    file = data or encoder.recipe.data.val
    if file is None:
        raise UserError(f"{encoder.run_dir}/recipe.yaml has no data.val", hint="name images with --data FILE.beton")
    images = BetonSubset(beton_file(file, "val"))
    encoder.check_channels(images.path)
    about = images.describe()
    if about["images"] < estimators.MIN_SAMPLES:
        raise UserError(
            f"{images.path} has {about['images']} images, too few for mutual information",
            hint=f"choose a file with at least {estimators.MIN_SAMPLES}",
        )
    name = "mi" + ("" if seed == 0 else f"-seed{seed}") + encoder.suffix
    if data:
        name += f"-data-{images.path.resolve().parent.name}-{images.path.stem}"

    def compute() -> dict[str, Any]:
        representations = compute_representations(encoder, images, seed)
        pairs = component_pairs(representations)
        bounds = compute_bounds(encoder.model, representations, seed, encoder.device)
        with encoder.progress("critics", len(pairs) * 4 * estimators.STEPS, "steps") as advance:
            estimates = {q: estimate_pair(x, y, seed, encoder.device, advance) for q, (x, y) in pairs.items()}
        plot = encoder.run_dir / "eval" / f"{name}.png"
        draw_learning_curves(plot, estimates)
        checks = run_checks(estimates, bounds)
        metrics = {f"{q} {kind}": getattr(each, kind).nats for q, each in estimates.items() for kind in ("js", "mine")}
        saturated = [name for name in metrics if getattr(estimates[name.split()[0]], name.split()[1]).saturated]
        metrics |= {f"{q} {key}": bound[key] for q, bound in bounds.items() for key in ("lower", "upper", "rate")}
        saturated += [f"{q} lower" for q, bound in bounds.items() if bound["saturated"]]
        return {
            "metrics": metrics,
            "saturated": saturated,
            # A continuous z that is a function of h shares infinitely many nats with it.
            "infinite": ["I(H;Z)"] if "I(H;Z)" in pairs and representations.z_given_h is None else [],
            "quantities": {
                q: {kind: value._asdict() for kind, value in each._asdict().items()} for q, each in estimates.items()
            },
            "bounds": bounds,
            "checks": checks,
            "failed": [check["check"] for check in checks if check["passed"] is False],
            "plot": plot.name,
        }

    request = {
        "evaluation": "mi",
        "protocol": "cross-fitted lower bounds in nats by critics; for a stochastic embedding bounds from its known q",
        "settings": CONSTANTS,
        "augmentation": encoder.recipe.views.model_dump(mode="json"),  # of the two views of I(Z;Z')
        "seed": seed,
        **encoder.describe(),
        "val": about,
    }
    return load_or_compute(encoder.run_dir, name, request, compute, MI_RESULT)


def compute_representations(encoder: RunEncoder, images: BetonSubset, seed: int) -> Representations:
    """Compute V, h and z of all images. The noise of draws is a function of (seed, image id, view)."""
    model = encoder.model
    features = cached_features(encoder, images)
    v_NP = averaged_pixels(encoder, images)
    h_ND, h_given_v = draw_h(features, None, seed, encoder.device)
    if not isinstance(model, SSLModel):  # there is no projector
        return Representations(v_NP, h_ND, h_given_v=h_given_v)
    z_NE, z_given_h = draw_z(model, h_ND, features.index, None, seed)
    augmented = cached_features(encoder, images, augmented=True)
    view_h = [draw_h(augmented, view, seed, encoder.device)[0] for view in (0, 1)]
    view_z = [draw_z(model, h, augmented.index, view, seed)[0] for view, h in enumerate(view_h)]
    return Representations(v_NP, h_ND, z_NE, torch.stack(view_z), h_given_v, z_given_h)


@torch.inference_mode()
def averaged_pixels(encoder: RunEncoder, images: BetonSubset) -> Tensor:
    """Return V (N, 64 C): images under the evaluation transform, averaged to 8 x 8 pixels of C channels."""
    views = encoder.recipe.views
    make_input = eval_input(views)
    parts = []
    for batch in eval_loader(images, views, encoder.device):
        parts.append(valid_rows(F.adaptive_avg_pool2d(make_input(batch).float(), SIDE).flatten(1), batch))
    return torch.from_numpy(np.concatenate(parts)).to(encoder.device)


def draw_h(features: Features, view: int | None, seed: int, device: Device) -> tuple[Tensor, DiagonalGaussian | None]:
    """Return h (N, D) and, if it is stochastic, the distribution from which it was drawn (view None: not augmented)."""

    def of_view(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(x if view is None else x[:, view], np.float32)).to(device)

    if features.space != "h" or features.mu is None or features.sigma is None:
        return of_view(features.h), None
    q = DiagonalGaussian(of_view(features.mu), 2 * of_view(features.sigma).log())
    return draw(q, features.index, H_EVAL if view is None else H_VIEWS, view or 0, seed), q


@torch.inference_mode()
def draw_z(
    model: SSLModel, h_ND: Tensor, index: np.ndarray, view: int | None, seed: int
) -> tuple[Tensor, DiagonalGaussian | None]:
    """Return z (N, E) of h and, if it is stochastic, the distribution from which it was drawn.

    The projector uses the running statistics of batch norm. For BYOL, z is before the predictor.
    """
    with evaluating(model), in_fp32(h_ND.device):
        z_NE = torch.cat([model.projector(h_BD) for h_BD in h_ND.split(ROWS)])
        if "z" not in model.heads:
            return z_NE, None
        parts = [model.heads["z"](z_BE) for z_BE in z_NE.split(ROWS)]
    q = DiagonalGaussian(torch.cat([part.mu for part in parts]), torch.cat([part.log_var for part in parts]))
    return draw(q, index, Z_EVAL if view is None else Z_VIEWS, view or 0, seed), q


def draw(q: DiagonalGaussian, index: np.ndarray, purpose: int, view: int, seed: int) -> Tensor:
    """Draw one sample per image, (N, D)."""
    index_N = torch.from_numpy(np.array(index)).to(q.mu.device)
    dims = q.mu.shape[1]
    chunks = index_N.split(max(1, CHUNK_BYTES // (16 * dims)))
    noise_ND = torch.cat([normals(seed, purpose, index_B, view, 1, dims, NOISE_EVALUATION)[0] for index_B in chunks])
    return q.mu + q.sigma * noise_ND


def component_pairs(representations: Representations) -> dict[str, tuple[Tensor, Tensor]]:
    """Return x and y of each quantity: the first principal components of V, h and z. A lower bound remains one.

    Without this reduction, each fold would need eigenvectors of all dimensions: 7 of the 22 s of an estimate for 1,024.
    """
    v_NP = principal_components(representations.v_NP, COMPONENTS)
    h_NP = principal_components(representations.h_ND, COMPONENTS)
    pairs = {"I(V;H)": (v_NP, h_NP)}
    if representations.z_NE is not None and representations.view_z_2NE is not None:
        z_NP = principal_components(representations.z_NE, COMPONENTS)
        first_NP, second_NP = (principal_components(z_NE, COMPONENTS) for z_NE in representations.view_z_2NE)
        pairs |= {"I(H;Z)": (h_NP, z_NP), "I(Z;Z')": (first_NP, second_NP), "I(V;Z)": (v_NP, z_NP)}
    return pairs


def estimate_pair(
    x_NP: Tensor, y_NP: Tensor, seed: int, device: Device, advance: Callable[[int], object]
) -> PairEstimates:
    """Compute the estimates of one quantity, and those that the self-checks need."""
    order_N = torch.randperm(len(x_NP), generator=torch.Generator().manual_seed(seed)).to(x_NP.device)
    added_x, added_y = (added.to(x_NP) for added in gaussian_pair(len(x_NP), seed))
    longer_x, longer_y = torch.cat([x_NP, added_x], dim=1), torch.cat([y_NP, added_y], dim=1)
    return PairEstimates(
        js=estimate(x_NP, y_NP, "js", seed, device=device, advance=advance),
        mine=estimate(x_NP, y_NP, "mine", seed, device=device, advance=advance),
        # A cyclic shift in random order, so no x keeps its y.
        shuffled=estimate(x_NP[order_N], y_NP[order_N.roll(1)], "js", seed, device=device, advance=advance),
        added=estimate(longer_x, longer_y, "js", seed, device=device, advance=advance),
    )


def gaussian_pair(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return samples of x and y (count, ADDED_DIMS) with a mutual information of ADDED_NATS."""
    rho = math.sqrt(1 - math.exp(-2 * ADDED_NATS / ADDED_DIMS))
    x, noise = torch.randn(2, count, ADDED_DIMS, generator=torch.Generator().manual_seed(seed))
    return x, rho * x + math.sqrt(1 - rho**2) * noise


def compute_bounds(
    model: Model | EncoderOnly, representations: Representations, seed: int, device: Device
) -> dict[str, dict[str, Any]]:
    """Compute the bounds of stochastic embeddings: of h given the image, and of z given h.

    If h is deterministic, it is a function of the image, so the bounds of z given h are those given the image as well.
    """
    of_z = "I(X;Z) = I(H;Z)" if representations.h_given_v is None else "I(H;Z)"
    bounds = {}
    for space, quantity, q, sample in (
        ("h", "I(X;H)", representations.h_given_v, representations.h_ND),
        ("z", of_z, representations.z_given_h, representations.z_NE),
    ):
        if q is not None and sample is not None:
            posterior = posterior_bounds(q.mu, q.sigma, sample, seed=seed, device=device)
            prior = cast(Prior, model.priors[space])
            bounds[quantity] = {**posterior._asdict(), "rate": rate(q.mu, q.sigma, prior, sample)}
    return bounds


def run_checks(estimates: Mapping[str, PairEstimates], bounds: Mapping[str, Mapping[str, Any]]) -> list[SelfCheck]:
    """Check properties that mutual information has."""
    checks: list[SelfCheck] = []

    def add(check: str, found: str, passed: bool, saturated: bool) -> None:
        checks.append({"check": check, "found": found, "passed": None if saturated else passed})

    for quantity, each in estimates.items():
        passed = abs(each.shuffled.nats) <= SHUFFLED_TOLERANCE
        add(f"{quantity}, shuffled pairs: 0", f"{each.shuffled.nats:.3f}", passed, each.shuffled.saturated)
    for quantity, each in estimates.items():
        expected = each.js.nats + ADDED_NATS
        passed = abs(each.added.nats - expected) <= ADDED_TOLERANCE
        check = f"{quantity} with an independent pair of {ADDED_NATS:g} nat appended: the sum"
        saturated = each.js.saturated or each.added.saturated
        add(check, f"{each.added.nats:.2f}, expected {expected:.2f}", passed, saturated)
    # The data processing inequalities hold for h and z. They can fail for the principal components that are estimated,
    # if those of z contain information about h that those of h do not contain.
    for smaller, larger in (("I(V;Z)", "I(V;H)"), ("I(V;Z)", "I(H;Z)")):
        if smaller in estimates:
            one, other = estimates[smaller].js, estimates[larger].js
            # If the larger one is saturated, its true value is above the estimate.
            passed = other.saturated or one.nats <= other.nats + 2 * math.hypot(one.error, other.error)
            add(f"{smaller} <= {larger}", f"{one.nats:.2f}, {other.nats:.2f}", passed, one.saturated)
    bounded = {"I(X;H)": ("I(V;H)", "I(V;Z)"), "I(H;Z)": ("I(H;Z)",), "I(X;Z) = I(H;Z)": ("I(H;Z)", "I(V;Z)")}
    for bound_of, bound in bounds.items():
        for quantity in bounded[bound_of]:
            if quantity in estimates:
                one = estimates[quantity].js
                passed = one.nats <= bound["upper"] + 2 * one.error
                check = f"{quantity} <= {bound_of}, upper bound"
                add(check, f"{one.nats:.2f}, {bound['upper']:.2f}", passed, one.saturated)
    return checks

"""Estimates of the mutual information of two variables from samples, by a critic that is trained to tell pairs apart.

Both estimators train the critic f of `critic.py` on most of the samples, and evaluate the Donsker-Varadhan lower bound
I >= E_joint f - log E_marginal e^f on others. They differ in the training loss:

    js    softplus loss of the Jensen-Shannon divergence (Nowozin et al., arXiv 1606.00709)
    mine  Donsker-Varadhan bound itself (Belghazi et al., arXiv 1801.04062)

Joint pairs are (x, y) of one sample, marginal pairs x of one sample and y of another. All marginal pairs of a batch are
used, and a joint pair never counts as a marginal one.
"""

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.evaluation.arrays import Array, Device, as_tensor
from fastssl.evaluation.mutual_information.critic import Inputs, canonical_inputs, initial_critic, scores

EstimatorName = Literal["js", "mine"]
ESTIMATORS: tuple[EstimatorName, ...] = ("js", "mine")

FOLDS = 5
# Of the training samples of a fold, these stop the training.
VALIDATION_SHARE = 0.1
MAX_VALIDATION = 1000
BATCH_SIZE = 256
STEPS = 300
CHECK_EVERY = 10  # steps
PATIENCE = 60  # steps without improvement
GAUSSIAN_STEPS = 50  # first steps, which train the Gaussian part of the critic only
GAUSSIAN_LR = 0.1
NETWORK_LR = 3e-3
WEIGHT_DECAY = 1e-2
AVERAGING = 0.9  # decay of the moving averages of the weights and of MINE's E e^f
CAP_ABOVE_PAIRS = 1.0  # f is capped this many nats above the log of the number of tested pairs
TEMPERATURES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)  # factors of f, of which each fold chooses the best
ANCHOR = 0.1  # weight of ReMINE's regularizer
MIN_SAMPLES = 40
MARGIN = 1.0  # nats below the ceiling from which on an estimate counts as saturated
MAX_UNSEEN = 0.5  # see Estimate.saturated
TEST_ROWS = 1024  # rows of the matrix of pairs that are scored at a time


class Estimate(NamedTuple):
    """A lower bound of the mutual information on held-out samples."""

    nats: float  # at most the ceiling; may be slightly below 0
    # Standard error of the mean of f over the joint pairs. The marginal pairs add an error of their own: with the true
    # f of 20 dimensions and 400 samples, the standard deviation was 0.11 at 4 nats, equal to this error, but 0.28 at 8
    # nats, where this error was 0.17.
    error: float
    ceiling: float  # the largest estimate that so many samples allow, in nats
    saturated: bool  # the mutual information is at least `nats`, and may be much larger
    unseen: float  # share of joint pairs whose f is capped or exceeds that of every marginal pair
    curve: list[tuple[int, float]]  # (step, estimate in nats on the validation samples, mean over folds)


class PairEstimates(NamedTuple):
    """Estimates of one quantity, and of what the self-checks compare them with."""

    js: Estimate
    mine: Estimate
    shuffled: Estimate  # js with every x next to the y of another image: 0 nats
    added: Estimate  # js with an independent pair of Gaussians appended: more by their mutual information


class Folds(NamedTuple):
    """Rows of the samples for cross-fitting."""

    train_FM: Tensor  # the critic of a fold is trained on these,
    validation_FV: Tensor  # stopped by these
    test_FT: Tensor  # and tested on these


class PairScores(NamedTuple):
    """What the bound needs of the scores f of all pairs of N samples, float64."""

    joint_FN: Tensor  # f of the joint pairs
    log_mean_F: Tensor  # log of the mean of e^f over the marginal pairs
    largest_F: Tensor  # largest f of a marginal pair

    def donsker_varadhan(self) -> Tensor:
        """Return the Donsker-Varadhan bounds (F,) in nats."""
        return self.joint_FN.mean(dim=1) - self.log_mean_F


def estimate(
    x: Array,
    y: Array,
    estimator: EstimatorName = "js",
    seed: int = 0,
    *,
    device: Device = "cpu",
    advance: Callable[[int], object] = lambda steps: None,
) -> Estimate:
    """Estimate I(X; Y) in nats, from below, from N pairs.

    The estimate is cross-fitted: each of five folds is tested once, by a critic that was trained on nine tenths of the
    other four and stopped where it is best on their last tenth. If N is not divisible by five, up to four samples are
    ignored. The result is a function of the data and the seed, for a given number of threads.

        x = torch.randn(5000, 4)
        estimate(x, x + torch.randn(5000, 4)).nats  # about 2 log 2 = 1.39

    Args:
        x: samples (N, D) or (N,) of any numeric type.
        y: samples (N, E) or (N,).
        estimator: "js" or "mine".
        seed: of folds, batches and initial weights.
        device: where the critics are trained.
        advance: called with numbers of finished training steps, `STEPS` in total.

    Returns:
        The estimate, finite for any finite input; with fewer than 40 samples 0 nats and a ceiling of 0.

    Raises:
        ValueError: if shapes do not match or values are not finite.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"The estimator must be one of {', '.join(ESTIMATORS)}, not {estimator!r}.")
    x_ND = as_samples(x, device)
    y_NE = as_samples(y, device)
    if len(x_ND) != len(y_NE):
        raise ValueError(f"x and y have {len(x_ND)} and {len(y_NE)} samples: they must be pairs.")
    if len(x_ND) < MIN_SAMPLES:
        return Estimate(nats=0.0, error=0.0, ceiling=0.0, saturated=True, unseen=1.0, curve=[(0, 0.0)])
    generator = torch.Generator().manual_seed(seed)
    folds = Folds(*(rows.to(x_ND.device) for rows in cross_fitting(len(x_ND), generator)))
    inputs = canonical_inputs(x_ND, y_NE, folds.train_FM)
    # A mean over M pairs cannot show density ratios above M.
    ceiling = log_pairs(folds.test_FT.shape[1])
    # Larger scores could not be confirmed by any tested pair. Without the cap, a few pairs of CIFAR-10's test images
    # moved MINE's held-out I(H;Z) to -122; with it, I(H;Z) is at its ceiling, and I(V;H) 5.8 instead of 5.5.
    cap = ceiling + CAP_ABOVE_PAIRS
    critic, curve = train(estimator, inputs, folds, cap, generator, advance)
    with torch.inference_mode():
        tested = score_pairs(critic, inputs, folds.test_FT, cap)
    nats = min(tested.donsker_varadhan().mean().item(), ceiling)
    # Capped pairs count as unseen, because two nearly equal images have a marginal pair with a score as large.
    unseen_FN = (tested.joint_FN > tested.largest_F[:, None]) | (tested.joint_FN >= cap)
    unseen = unseen_FN.double().mean().item()
    return Estimate(
        nats=nats,
        error=tested.joint_FN.var(dim=1).mean().sqrt().item() / math.sqrt(tested.joint_FN.numel()),
        ceiling=ceiling,
        # Measured with the true density ratio of 20 dimensions with 10 nats: with 1,000 samples per fold, 40 % of the
        # joint pairs are unseen and the bound is 5 % too high; with 1,700 samples, 28 % and 1 %.
        saturated=nats > ceiling - MARGIN or unseen > MAX_UNSEEN,
        unseen=unseen,
        curve=curve,
    )


def as_samples(x: Array, device: Device) -> Tensor:
    """Return x as (N, D) on the device."""
    tensor = as_tensor(x).detach().to(device)
    if tensor.ndim not in (1, 2) or tensor.numel() == 0:
        raise ValueError(f"Samples must have shape (N, D) or (N,), not {tuple(tensor.shape)}.")
    if not tensor.isfinite().all():
        raise ValueError("Samples contain values that are not finite.")
    return tensor.reshape(len(tensor), -1)


def cross_fitting(count: int, generator: torch.Generator) -> Folds:
    """Divide `count` samples at random into five test sets, each with training and validation rows from the others."""
    order_FT = torch.randperm(count, generator=generator)[: count // FOLDS * FOLDS].view(FOLDS, -1)
    others = [torch.cat([order_FT[:fold], order_FT[fold + 1 :]]).flatten() for fold in range(FOLDS)]
    # Shuffled, because otherwise the validation rows of a fold would all come from one other fold.
    rest_FR = torch.stack([rest[torch.randperm(len(rest), generator=generator)] for rest in others])
    validation = min(max(int(VALIDATION_SHARE * rest_FR.shape[1]), 2), MAX_VALIDATION)
    return Folds(rest_FR[:, validation:], rest_FR[:, :validation], order_FT)


def log_pairs(count: int) -> float:
    """Return the log of the number of marginal pairs of `count` samples."""
    return math.log(count * (count - 1))


def train(
    estimator: EstimatorName,
    inputs: Inputs,
    folds: Folds,
    cap: float,
    generator: torch.Generator,
    advance: Callable[[int], object],
) -> tuple[dict[str, Tensor], list[tuple[int, float]]]:
    """Train the critics of all folds in parallel, and return them and the learning curve.

    Each critic is that of the step at which its validation bound was largest (the initial f = 0 included).
    """
    gaussian, networks = initial_critic(inputs, generator)
    device = folds.train_FM.device
    critic = {name: weight.to(device).requires_grad_() for name, weight in {**gaussian, **networks}.items()}
    groups = [
        {"params": [critic[name] for name in gaussian], "weight_decay": 0.0},
        {"params": [critic[name] for name in networks], "weight_decay": WEIGHT_DECAY},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
    # The moving average of the weights is what is validated and returned.
    average = {name: weight.detach().clone() for name, weight in critic.items()}
    best = {name: weight.clone() for name, weight in average.items()}
    best_F = torch.full((FOLDS,), -math.inf, dtype=torch.float64, device=device)
    best_step = 0
    curve = []
    log_average_F = torch.zeros(FOLDS, device=device)
    batches = shuffled_batches(folds.train_FM, generator)
    fold_F1 = torch.arange(FOLDS, device=device)[:, None]
    for step in range(STEPS + 1):
        if step % CHECK_EVERY == 0:
            with torch.inference_mode():
                nats_F = score_pairs(average, inputs, folds.validation_FV, cap).donsker_varadhan()
            better_F = nats_F > best_F  # False for NaN
            if better_F.any():
                best_F = torch.where(better_F, nats_F, best_F)
                best_step = step
                for name, weight in best.items():
                    weight[better_F] = average[name][better_F]
            curve.append((step, nats_F.mean().item()))
            if step == STEPS or step >= max(best_step, GAUSSIAN_STEPS) + PATIENCE:
                advance(STEPS - step)
                break

        cosine = 0.5 * (1 + math.cos(math.pi * step / STEPS))
        gaussian_group, network_group = optimizer.param_groups
        gaussian_group["lr"] = GAUSSIAN_LR * cosine
        network_group["lr"] = NETWORK_LR * cosine * min(1, max(0, step - GAUSSIAN_STEPS) / 50)
        rows_FB = next(batches)
        f_FBB = scores(critic, inputs.x_FNP[fold_F1, rows_FB], inputs.y_FNQ[fold_F1, rows_FB], inputs.r2_FK)
        if estimator == "mine":
            loss_F, log_average_F = mine_loss(f_FBB, log_average_F)
        else:
            loss_F = softplus_loss(f_FBB)
        optimizer.zero_grad()
        loss_F.sum().backward()
        optimizer.step()
        with torch.no_grad():
            for name, weight in average.items():
                weight.lerp_(critic[name], 1 - AVERAGING)
        advance(1)
    return temperature_scaled(best, inputs, folds.validation_FV, cap), curve


def shuffled_batches(train_FM: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield batches of training rows (F, B) without end, each epoch in a new order."""
    size = min(BATCH_SIZE, train_FM.shape[1])
    while True:
        order_M = torch.randperm(train_FM.shape[1], generator=generator).to(train_FM.device)
        for first in range(0, len(order_M) - size + 1, size):
            yield train_FM[:, order_M[first : first + size]]


def softplus_loss(f_FBB: Tensor) -> Tensor:
    """Return the losses (F,) of a logistic regression of joint against marginal pairs.

    This is the softplus loss of Jensen-Shannon, except that each of the B - 1 marginal pairs of a sample has full
    weight, and the odds of the two classes are taken into account (noise contrastive estimation with B - 1 noise
    samples, Gutmann and Hyvarinen 2012). Its optimal f is the log density ratio as well.
    """
    odds = math.log(f_FBB.shape[1] - 1)
    joint_FB = f_FBB.diagonal(dim1=1, dim2=2)
    noise_FBB = F.softplus(f_FBB - odds)
    noise_FB = noise_FBB.sum(dim=2) - noise_FBB.diagonal(dim1=1, dim2=2)
    return (F.softplus(odds - joint_FB) + noise_FB).mean(dim=1)


def mine_loss(f_FBB: Tensor, log_average_F: Tensor) -> tuple[Tensor, Tensor]:
    """Return losses (F,) whose gradient is that of minus the Donsker-Varadhan bound, and the new moving average.

    As in MINE, section 3.2, the denominator of the gradient is a moving average of E e^f, because the gradient of the
    log of a batch's mean is biased. The average is stored as a logarithm, so that e^f cannot overflow. The term of
    ReMINE (Choi and Lee, arXiv 2011.07932) fixes the constant that the bound leaves free at E e^f = 1, so that f can be
    capped.
    """
    count = f_FBB.shape[1]
    joint_FB = f_FBB.diagonal(dim1=1, dim2=2)
    same_BB = torch.eye(count, dtype=torch.bool, device=f_FBB.device)
    log_mean_F = f_FBB.masked_fill(same_BB, -math.inf).flatten(1).logsumexp(dim=1) - log_pairs(count)
    log_average_F = torch.logaddexp(log_average_F + math.log(AVERAGING), log_mean_F.detach() + math.log(1 - AVERAGING))
    loss_F = (log_mean_F - log_average_F).exp() - joint_FB.mean(dim=1) + ANCHOR * log_mean_F.square()
    return loss_F, log_average_F


@torch.inference_mode()
def temperature_scaled(
    critic: dict[str, Tensor], inputs: Inputs, validation_FV: Tensor, cap: float
) -> dict[str, Tensor]:
    """Scale the f of each fold by the factor that is best on the validation samples: overfitted f are too steep."""
    factor_T = torch.tensor(TEMPERATURES).to(critic["c"])
    nats_TF = []
    for factor in factor_T:
        scaled = {**critic, "factor": factor.expand_as(critic["c"])}
        nats_TF.append(score_pairs(scaled, inputs, validation_FV, cap).donsker_varadhan())
    return {**critic, "factor": factor_T[torch.stack(nats_TF).argmax(dim=0)].view(-1, 1, 1)}


def score_pairs(critic: dict[str, Tensor], inputs: Inputs, rows_FN: Tensor, cap: float) -> PairScores:
    """Score all pairs of the given rows of each fold, with f clamped to [-cap, cap]."""
    count = rows_FN.shape[1]
    joint_FN = torch.empty(rows_FN.shape, dtype=torch.float64, device=rows_FN.device)
    marginal_FN = torch.empty_like(joint_FN)  # log of the sum of e^f over the marginal pairs of each row
    largest_FN = torch.empty_like(joint_FN)
    for fold, rows_N in enumerate(rows_FN):
        fold_critic = {name: weight[fold : fold + 1] for name, weight in critic.items()}
        y_1NQ = inputs.y_FNQ[fold, rows_N][None]
        for first in range(0, count, TEST_ROWS):
            part = slice(first, first + TEST_ROWS)
            x_1RP = inputs.x_FNP[fold, rows_N[part]][None]
            f_RN = scores(fold_critic, x_1RP, y_1NQ, inputs.r2_FK[fold : fold + 1])[0].double().clamp_(-cap, cap)
            joint_FN[fold, part] = f_RN.diagonal(first)
            f_RN.diagonal(first).fill_(-math.inf)
            marginal_FN[fold, part] = f_RN.logsumexp(dim=1)
            largest_FN[fold, part] = f_RN.amax(dim=1)
    return PairScores(joint_FN, marginal_FN.logsumexp(dim=1) - log_pairs(count), largest_FN.amax(dim=1))

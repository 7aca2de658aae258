"""Estimates of the mutual information of two variables, from samples, by a critic that tells pairs apart.

Every estimator trains the critic of `critic.py` on most of the samples and evaluates a bound on others:

| name    | trained by                                       | evaluated by                         | ceiling, nats    |
|---------|--------------------------------------------------|--------------------------------------|------------------|
| js      | softplus loss (Nowozin et al., arXiv 1606.00709) | Donsker-Varadhan                     | log pairs        |
| mine    | Donsker-Varadhan (Belghazi et al., 1801.04062)   | Donsker-Varadhan                     | log pairs        |
| infonce | InfoNCE (van den Oord et al., 1807.03748)        | InfoNCE                              | log candidates   |
| nwj     | NWJ (Nguyen et al., 0809.0853)                   | NWJ                                  | log pairs        |
| smile   | softplus loss                                    | Donsker-Varadhan, clipped (1910.06222) | the clip       |

All but SMILE, whose clipped term may be too small, are lower bounds.
Donsker-Varadhan: I >= E_joint f - log E_marginal e^f. Pairs are those of one sample's x and another's y, all of them:
the B - 1 cyclic shifts of a batch are B - 1 derangements, so no joint pair is ever taken for a marginal one.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from fastssl.evaluation.arrays import as_tensor
from fastssl.evaluation.mutual_information.critic import Inputs, canonical_inputs, initial_critic, scores

Name = Literal["mine", "js", "infonce", "nwj", "smile"]

FOLDS = 5
VALIDATION_SHARE, MOST_VALIDATED = 0.1, 1000  # of a fold's training samples, for stopping
BATCH_SIZE = 256
STEPS, CHECK_EVERY, PATIENCE = 300, 10, 60
GAUSSIAN_STEPS = 50  # for the Gaussian part alone
GAUSSIAN_LR, NETWORK_LR, WEIGHT_DECAY = 0.1, 3e-3, 1e-2
AVERAGING = 0.9  # of the weights that are checked and kept, as of MINE's mean of e^f
CAP_ABOVE_PAIRS = 1.0  # nats above the log of the pairs tested at which f is capped
TEMPERATURES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)  # of which each fold takes the best where it was stopped
CLIP = 10.0  # SMILE's tau
ANCHOR = 0.1  # of ReMINE's regulariser
FEWEST = 40  # samples; of fewer nothing is estimated
MARGIN = 1.0  # nats below the ceiling that are not trusted
MOST_UNSEEN = 0.5  # see Estimate.saturated
TEST_ROWS = 1024  # scored at a time


class Estimate(NamedTuple):
    """A lower bound on held-out samples, in nats."""

    nats: float  # never above the ceiling; may be slightly below 0
    # Standard error of the mean of f over the joint pairs. The mean of e^f over the marginal ones has an error of its
    # own: with the true f of 20 dimensions and 400 samples the sd was 0.11 at 4 nats, as this says, but 0.28 at 8,
    # where this said 0.17.
    error: float
    ceiling: float  # what this estimator can show at most with so many samples
    saturated: bool  # do not read `nats` as the mutual information: that is as large, or larger
    unseen: float  # share of joint pairs with a larger f than every marginal pair, or one that was capped
    curve: list[tuple[int, float]]  # (step, estimate on the samples that stop the training, mean over folds)


def softplus_loss(f_FBB: Tensor, average_F: Tensor) -> tuple[Tensor, Tensor]:
    """Logistic regression of joint against marginal pairs, each of a sample's B - 1 marginal pairs with full weight.

    That is Jensen-Shannon's softplus loss with the classes' odds in place of 1:1 (noise contrastive estimation with
    B - 1 noise samples, Gutmann and Hyvarinen 2012); f is still the log density ratio at its optimum.
    """
    odds = math.log(f_FBB.shape[1] - 1)
    joint_FB = f_FBB.diagonal(dim1=1, dim2=2)
    noise_FBB = F.softplus(f_FBB - odds)
    noise_FB = noise_FBB.sum(dim=2) - noise_FBB.diagonal(dim1=1, dim2=2)
    return (F.softplus(odds - joint_FB) + noise_FB).mean(dim=1), average_F


def mine_loss(f_FBB: Tensor, average_F: Tensor) -> tuple[Tensor, Tensor]:
    """Minus Donsker-Varadhan, its gradient's denominator a moving average of E e^f over the steps.

    MINE, section 3.2: the gradient of log of a batch's mean is biased. The average is kept as a logarithm, so that
    no e^f overflows. ReMINE's term (Choi and Lee, arXiv 2011.07932) holds the constant that the bound leaves free at
    E e^f = 1, so that f can be capped.
    """
    log_mean_F = log_mean_marginal(f_FBB)
    average_F = torch.logaddexp(average_F + math.log(AVERAGING), log_mean_F.detach() + math.log(1 - AVERAGING))
    anchored_F = ANCHOR * log_mean_F.square()
    return (log_mean_F - average_F).exp() - joint(f_FBB).mean(dim=1) + anchored_F, average_F


def infonce_loss(f_FBB: Tensor, average_F: Tensor) -> tuple[Tensor, Tensor]:
    return -infonce_bound(f_FBB), average_F


def nwj_loss(f_FBB: Tensor, average_F: Tensor) -> tuple[Tensor, Tensor]:
    """Minus NWJ of f + 1, so that f = 0 is 0 nats. Beyond e^10 the mean grows linearly, not exponentially."""
    log_mean_F = log_mean_marginal(f_FBB)
    capped_F = log_mean_F.clamp_max(10)
    return capped_F.exp() * (1 + log_mean_F - capped_F) - 1 - joint(f_FBB).mean(dim=1), average_F


def joint(f_FBB: Tensor) -> Tensor:
    return f_FBB.diagonal(dim1=1, dim2=2)


def log_mean_marginal(f_FBB: Tensor) -> Tensor:
    """(F,): log of the mean of e^f over the pairs of different samples."""
    count = f_FBB.shape[1]
    same = torch.eye(count, dtype=torch.bool, device=f_FBB.device)
    return f_FBB.masked_fill(same, -math.inf).flatten(1).logsumexp(dim=1) - math.log(count * (count - 1))


def infonce_bound(f_FBB: Tensor) -> Tensor:
    """(F,): log B + log softmax of the joint pair, among a sample's B candidates y and B candidates x, the mean."""
    both_FB = 0.5 * (f_FBB.logsumexp(dim=1) + f_FBB.logsumexp(dim=2))
    return math.log(f_FBB.shape[1]) + (joint(f_FBB) - both_FB).mean(dim=1)


class Estimator(NamedTuple):
    loss: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (f_FBB, state_F) -> (loss_F, state_F)
    bound: Callable[["Scored"], Tensor]  # -> nats (F,)
    ceiling: Callable[[int], float]  # of the number of samples that are scored together


class Scored(NamedTuple):
    """What the bounds need of the scores of all pairs of n samples, float64."""

    joint_FN: Tensor
    log_mean_F: Tensor  # log of the mean over marginal pairs of e^f
    log_mean_clipped_F: Tensor  # the same of f clipped to [-CLIP, CLIP]
    log_row_FN: Tensor  # log of the mean over all n candidates y of e^f
    log_column_FN: Tensor  # over all n candidates x
    largest_F: Tensor  # f of a marginal pair


def donsker_varadhan(scored: Scored) -> Tensor:
    return scored.joint_FN.mean(dim=1) - scored.log_mean_F


def nwj(scored: Scored) -> Tensor:
    return scored.joint_FN.mean(dim=1) + 1 - scored.log_mean_F.clamp_max(50).exp()


def smile(scored: Scored) -> Tensor:
    return scored.joint_FN.mean(dim=1) - scored.log_mean_clipped_F


def infonce(scored: Scored) -> Tensor:
    return (scored.joint_FN - 0.5 * (scored.log_row_FN + scored.log_column_FN)).mean(dim=1)


def log_pairs(count: int) -> float:
    """A mean over M pairs says nothing of what is rarer than 1 / M: of density ratios above M."""
    return math.log(count * (count - 1))


ESTIMATORS = {
    "js": Estimator(softplus_loss, donsker_varadhan, log_pairs),
    "mine": Estimator(mine_loss, donsker_varadhan, log_pairs),
    "infonce": Estimator(infonce_loss, infonce, math.log),
    "nwj": Estimator(nwj_loss, nwj, log_pairs),
    "smile": Estimator(softplus_loss, smile, lambda count: CLIP),
}


def estimate(
    x: ArrayLike | Tensor,
    y: ArrayLike | Tensor,
    estimator: Name = "js",
    seed: int = 0,
    *,
    device: torch.device | str = "cpu",
    advance: Callable[[int], object] = lambda steps: None,
) -> Estimate:
    """I(X; Y) in nats, from below (SMILE: about), from N pairs x (N, D), y (N, E) (or (N,)) of any float type.

    Cross-fitted: of five folds each is tested once, by a critic that was trained on nine tenths of the other four and
    stopped where it is best on the last tenth. Up to four samples that five does not divide are left out; of fewer
    than 40 nothing is estimated (0 nats under a ceiling of 0). A function of the seed, for a given number of threads.
    `advance` is told of training steps.

    Raises ValueError where shapes do not fit or numbers are not finite; no finite input gives anything but a number.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"The estimator is one of {', '.join(ESTIMATORS)}, not {estimator!r}.")
    x_ND, y_NE = as_samples(x, device), as_samples(y, device)
    if len(x_ND) != len(y_NE):
        raise ValueError(f"x and y hold {len(x_ND)} and {len(y_NE)} samples: they come in pairs.")
    if len(x_ND) < FEWEST:
        return Estimate(0.0, 0.0, 0.0, True, 1.0, [(0, 0.0)])
    method = ESTIMATORS[estimator]
    generator = torch.Generator().manual_seed(seed)
    train_FM, stop_FV, test_FT = (rows.to(x_ND.device) for rows in cross_fitting(len(x_ND), generator))
    inputs = canonical_inputs(x_ND, y_NE, train_FM)
    # What no tested pair can confirm is not claimed. Uncapped, few pairs of CIFAR-10's test images sent the held-out
    # I(H;Z) of MINE's critic to -122; capped it is at its ceiling, and I(V;H) 5.8 where it was 5.5.
    cap = log_pairs(test_FT.shape[1]) + CAP_ABOVE_PAIRS
    critic, curve = train(method, inputs, train_FM, stop_FV, cap, generator, advance)
    with torch.inference_mode():
        scored = score(critic, inputs, test_FT, cap)
    ceiling = method.ceiling(test_FT.shape[1])
    nats = min(method.bound(scored).mean().item(), ceiling)
    # A pair at the cap counts too: where two images are nearly the same, their marginal pair is as large.
    beyond_FN = (scored.joint_FN > scored.largest_F[:, None]) | (scored.joint_FN >= cap)
    unseen = beyond_FN.double().mean().item()
    return Estimate(
        nats=nats,
        error=scored.joint_FN.var(dim=1).mean().sqrt().item() / math.sqrt(scored.joint_FN.numel()),
        ceiling=ceiling,
        # Measured with the true density ratio of 20 dimensions with 10 nats: 1,000 samples a fold leave 0.4 of the
        # joint pairs unseen, and Donsker-Varadhan is 5 % too high; 1,700 leave 0.28, and it is 1 % too high.
        saturated=nats > ceiling - MARGIN or unseen > MOST_UNSEEN,
        unseen=unseen,
        curve=curve,
    )


def as_samples(x: ArrayLike | Tensor, device: torch.device | str) -> Tensor:
    x = as_tensor(x).detach().to(device)
    if x.ndim not in (1, 2) or x.numel() == 0:
        raise ValueError(f"Samples have shape (N, D) or (N,), not {tuple(x.shape)}.")
    if not x.isfinite().all():
        raise ValueError("Samples hold numbers that are not finite.")
    return x.reshape(len(x), -1)


def cross_fitting(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that each fold trains on, stops by, and is tested on."""
    order_FT = torch.randperm(count, generator=generator)[: count // FOLDS * FOLDS].view(FOLDS, -1)
    others = [torch.cat([order_FT[:fold], order_FT[fold + 1 :]]).flatten() for fold in range(FOLDS)]
    # Shuffled: else what stops one fold would be one other fold's samples.
    rest_FR = torch.stack([rest[torch.randperm(len(rest), generator=generator)] for rest in others])
    stop = min(max(int(VALIDATION_SHARE * rest_FR.shape[1]), 2), MOST_VALIDATED)
    return rest_FR[:, stop:], rest_FR[:, :stop], order_FT


def train(
    method: Estimator,
    inputs: Inputs,
    train_FM: Tensor,
    stop_FV: Tensor,
    cap: float,
    generator: torch.Generator,
    advance: Callable[[int], object],
) -> tuple[dict[str, Tensor], list[tuple[int, float]]]:
    """Each fold's critic where it was best on the samples that stop it, f = 0 among the candidates; and the curve."""
    gaussian, networks = initial_critic(inputs, generator)
    device = train_FM.device
    critic = {name: weight.to(device).requires_grad_() for name, weight in {**gaussian, **networks}.items()}
    groups = [
        {"params": [critic[name] for name in gaussian], "weight_decay": 0.0},
        {"params": [critic[name] for name in networks], "weight_decay": WEIGHT_DECAY},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
    average = {name: weight.detach().clone() for name, weight in critic.items()}
    best = {name: weight.clone() for name, weight in average.items()}
    best_F = torch.full((FOLDS,), -math.inf, dtype=torch.float64, device=device)
    state_F, best_step, curve = torch.zeros(FOLDS, device=device), 0, []
    batches = shuffled_batches(train_FM, generator)
    fold_F1 = torch.arange(FOLDS, device=device)[:, None]
    for step in range(STEPS + 1):
        if step % CHECK_EVERY == 0:
            with torch.inference_mode():
                nats_F = method.bound(score(average, inputs, stop_FV, cap))
            better_F = nats_F > best_F  # not where it is not a number
            if better_F.any():
                best_F, best_step = torch.where(better_F, nats_F, best_F), step
                for name, weight in best.items():
                    weight[better_F] = average[name][better_F]
            curve.append((step, nats_F.mean().item()))
            if step == STEPS or step >= max(best_step, GAUSSIAN_STEPS) + PATIENCE:
                advance(STEPS - step)
                break

        cosine = 0.5 * (1 + math.cos(math.pi * step / STEPS))
        groups_lr = (GAUSSIAN_LR * cosine, NETWORK_LR * cosine * min(1, max(0, step - GAUSSIAN_STEPS) / 50))
        for group, lr in zip(optimizer.param_groups, groups_lr, strict=True):
            group["lr"] = lr
        rows_FB = next(batches)
        f_FBB = scores(critic, inputs.x_FNP[fold_F1, rows_FB], inputs.y_FNQ[fold_F1, rows_FB], inputs.r2_FK)
        loss_F, state_F = method.loss(f_FBB, state_F)
        optimizer.zero_grad()
        loss_F.sum().backward()
        optimizer.step()
        with torch.no_grad():
            for name, weight in average.items():
                weight.lerp_(critic[name], 1 - AVERAGING)
        advance(1)
    return temperature_scaled(method, best, inputs, stop_FV, cap), curve


@torch.inference_mode()
def temperature_scaled(
    method: Estimator, critic: dict[str, Tensor], inputs: Inputs, stop_FV: Tensor, cap: float
) -> dict[str, Tensor]:
    """Each fold's critic times the factor that is best on the samples that stopped it: overfit, f is too steep."""
    factors = [torch.full_like(critic["c"], factor) for factor in TEMPERATURES]
    nats_TF = [method.bound(score({**critic, "factor": factor}, inputs, stop_FV, cap)) for factor in factors]
    best_F = torch.stack(nats_TF).argmax(dim=0)
    return {**critic, "factor": torch.tensor(TEMPERATURES).to(critic["c"])[best_F].view(-1, 1, 1)}


def shuffled_batches(train_FM: Tensor, generator: torch.Generator):
    """(F, B) rows for ever, each epoch in a new order."""
    size = min(BATCH_SIZE, train_FM.shape[1])
    while True:
        order_M = torch.randperm(train_FM.shape[1], generator=generator).to(train_FM.device)
        for first in range(0, len(order_M) - size + 1, size):
            yield train_FM[:, order_M[first : first + size]]


def score(critic: dict[str, Tensor], inputs: Inputs, rows_FN: Tensor, cap: float) -> Scored:
    """All pairs of each fold's rows, a part at a time, f within `cap` of 0."""
    folds, count = rows_FN.shape
    parts = []
    for fold in range(folds):
        one = {name: weight[fold : fold + 1] for name, weight in critic.items()}
        x_1NP, y_1NQ = inputs.x_FNP[fold, rows_FN[fold]][None], inputs.y_FNQ[fold, rows_FN[fold]][None]
        joint, rows, off, clipped, largest = [], [], [], [], []
        column_N = torch.full((count,), -math.inf, dtype=torch.float64, device=rows_FN.device)
        for first in range(0, count, TEST_ROWS):
            f_RN = scores(one, x_1NP[:, first : first + TEST_ROWS], y_1NQ, inputs.r2_FK[fold : fold + 1])[0].double()
            place_R = torch.arange(len(f_RN), device=f_RN.device)
            f_RN.clamp_(-cap, cap)
            joint.append(f_RN[place_R, first + place_R].clone())
            rows.append(f_RN.logsumexp(dim=1) - math.log(count))
            column_N = torch.logaddexp(column_N, f_RN.logsumexp(dim=0))
            f_RN[place_R, first + place_R] = -math.inf
            off.append(f_RN.logsumexp(dim=1))
            largest.append(f_RN.amax())
            f_RN.clamp_(-CLIP, CLIP)[place_R, first + place_R] = -math.inf
            clipped.append(f_RN.logsumexp(dim=1))
        log_pairs = math.log(count * (count - 1))
        parts.append((
            torch.cat(joint), torch.cat(off).logsumexp(0) - log_pairs, torch.cat(clipped).logsumexp(0) - log_pairs,
            torch.cat(rows), column_N - math.log(count), torch.stack(largest).amax(),
        ))  # fmt: skip
    return Scored(*(torch.stack(column) for column in zip(*parts, strict=True)))

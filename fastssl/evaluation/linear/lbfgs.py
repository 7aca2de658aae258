"""Multinomial logistic regression to its optimum, for a path of penalties, the best chosen on held-out samples.

What CLIP (arXiv 2103.00020, appendix A.3) and DINOv2 report beside or in place of SGD: convex, so no rate and no
schedule; only the penalty is chosen, on a held-out tenth of the training set. Each penalty starts from the optimum of
the stronger one before it. scikit-learn's LogisticRegression finds the same optimum (C = 1 / (penalty * N)); it wants
all features in float64 in memory, and no GPU.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from fastssl.evaluation.arrays import as_numpy
from fastssl.evaluation.linear.batches import fits, in_order, mean_and_std, take
from fastssl.evaluation.linear.classifier import LinearClassifier, LinearFit
from fastssl.evaluation.metrics import CHUNK_ROWS
from fastssl.evaluation.splits import HOLDOUT_SHARE, holdout_split

PENALTIES = tuple(10.0**power for power in np.arange(0, -6.5, -0.5).tolist())  # from strong to weak
MOST_STEPS = 1000  # of a penalty, as CLIP
# The optimum is where no derivative is larger. In coordinates of curvature 1, the loss is then within half of their sum
# of squares of its least value: 3e-7 with 5,000 weights.
GRADIENT = 1e-5
# For records:
CONSTANTS = {"penalties": PENALTIES, "most_steps": MOST_STEPS, "gradient": GRADIENT, "held_out_share": HOLDOUT_SHARE}


class Objective:
    """Mean cross-entropy of some rows on standardised features, as a function of the flat weights, with its gradient.

    In float64: with float32 products the line search stops at noise of 1e-6 to 1e-5, which is what the result should
    agree to.

    Features of a network are strongly correlated. So L-BFGS moves in coordinates in which the loss is about as curved
    in every direction: along the principal axes of the features, each scaled by 1 / sqrt(its variance / C + penalty).
    1 / C is the curvature of cross-entropy where C classes are equally likely. The optimum is the same: on the
    features of 10,000 images it takes 21, 53 and 374 evaluations at penalties 1e-1, 1e-3 and 1e-5, without the axes 79,
    337 and 1,040 (records/linear.md).
    """

    def __init__(
        self, features_ND: ArrayLike | Tensor, target_N: np.ndarray, classes: int, rows: np.ndarray,
        device: torch.device | str,
    ):  # fmt: skip
        self.classes, self.device = classes, torch.device(device)
        self.target_N = torch.from_numpy(target_N[rows]).to(device)
        if fits(features_ND, rows, self.device):
            # Read from the disk, and sent to a GPU, once: an optimum takes hundreds of evaluations.
            features_ND, rows = take(features_ND, rows, device), np.arange(len(rows))
        self.features_ND, self.rows = features_ND, rows
        self.mean_D, self.std_D = mean_and_std(features_ND, rows, device)
        self._kept: list[Tensor] | None = None
        second_EE = sum(x_RE.T @ x_RE for x_RE in self.parts()) / len(rows)
        self.variance_E, self.axes_EE = torch.linalg.eigh(second_EE)

    def parts(self):
        """The standardised features, with a one that the bias multiplies; those that fit into one part are kept."""
        if self._kept is not None:
            yield from self._kept
            return
        for part_RD in in_order(self.features_ND, self.rows, self.device, self.classes):
            x_RE = F.pad(part_RD.double().sub_(self.mean_D).div_(self.std_D), (0, 1), value=1.0)
            if len(x_RE) == len(self.rows):
                self._kept = [x_RE]
            yield x_RE

    def scale_E(self, penalty: float) -> Tensor:
        return (self.variance_E.clamp_min(0) / self.classes + penalty).rsqrt()

    @torch.inference_mode()
    def __call__(self, flat: np.ndarray, penalty: float) -> tuple[float, np.ndarray]:
        """Mean cross-entropy + penalty / 2 * sum of squared weights, the bias not among them; and its gradient."""
        axes_EE = self.axes_EE * self.scale_E(penalty)
        weight_CE = torch.from_numpy(flat.reshape(self.classes, -1)).to(self.device) @ axes_EE.T
        loss, gradient_CE, first = 0.0, torch.zeros_like(weight_CE), 0
        for x_RE in self.parts():
            target_R = self.target_N[first : first + len(x_RE)]
            residual_RC = (x_RE @ weight_CE.T).log_softmax(dim=1)
            each = torch.arange(len(x_RE), device=self.device)
            loss -= residual_RC[each, target_R].sum()
            residual_RC.exp_()
            residual_RC[each, target_R] -= 1
            gradient_CE.addmm_(residual_RC.T, x_RE)
            first += len(x_RE)
        decayed_CE = weight_CE * penalty
        decayed_CE[:, -1] = 0
        loss = loss / first + (decayed_CE * weight_CE).sum() / 2
        return float(loss), ((gradient_CE / first + decayed_CE) @ axes_EE).flatten().cpu().numpy()

    def minimize(self, weight_CE: Tensor, penalty: float) -> tuple[Tensor, bool]:
        """The optimum from a start, (C, E) each, and whether it was reached in the steps that it is given."""
        # Here, as it takes half a second: training's probe needs nothing of it.
        from scipy.optimize import minimize
        from threadpoolctl import threadpool_limits

        axes_EE, scale_E = self.axes_EE, self.scale_E(penalty)
        start = ((weight_CE @ axes_EE) / scale_E).flatten().cpu().numpy()
        # scipy's threads and torch's wait for each other in busy loops: 600 x 20 features took 7.8 s, and 0.25 s so.
        with threadpool_limits(1, user_api="blas"):
            found = minimize(
                self, start, (penalty,), method="L-BFGS-B", jac=True,
                options={"maxiter": MOST_STEPS, "maxfun": 2 * MOST_STEPS, "gtol": GRADIENT, "ftol": 0.0, "maxcor": 10},
            )  # fmt: skip
        optimum_CE = torch.from_numpy(found.x.reshape(self.classes, -1)).to(self.device) * scale_E @ axes_EE.T
        # At the optimum a line search may fail on the last bits; that is no failure.
        return optimum_CE, bool(np.abs(found.jac).max() <= 10 * GRADIENT)

    def classifier(self, weight_CE: Tensor, class_C: np.ndarray) -> LinearClassifier:
        weight_CE, mean_D, std_D = weight_CE.float(), self.mean_D.float(), self.std_D.float()
        return LinearClassifier(torch.from_numpy(class_C), weight_CE[:, :-1], weight_CE[:, -1], mean_D, std_D)


def fit_lbfgs(
    features: ArrayLike | Tensor,
    labels: ArrayLike | Tensor,
    *,
    penalties: Sequence[float] = PENALTIES,
    seed: int = 0,
    device: torch.device | str = "cpu",
    advance: Callable[[int], object] = lambda fits: None,
) -> LinearFit:
    """Fit every penalty on nine tenths of the samples, choose the one that is best on the last tenth (stratified,
    seeded; of equal ones, the lower cross-entropy), and fit that one again on all, from where it was.

    Features are (N, D), an array, a map of a file or a tensor, labels (N,) integers. penalties: from strong to weak.
    `advance(1)` is called len(penalties) + 1 times.
    """
    label_N = as_numpy(labels)
    fit_rows, held_rows = holdout_split(label_N, seed)
    class_C, target_N = np.unique(label_N, return_inverse=True)
    part = Objective(features, target_N, len(class_C), fit_rows, device)
    weight_CE = torch.zeros(len(class_C), features.shape[1] + 1, dtype=torch.float64, device=device)
    optima, selection = [], []
    for penalty in penalties:
        weight_CE, converged = part.minimize(weight_CE, penalty)
        accuracy, nll = held_out_figures(part.classifier(weight_CE, class_C), features, target_N, held_rows)
        optima.append(weight_CE)
        selection.append({"penalty": penalty, "accuracy": accuracy, "nll": nll, "converged": converged})
        advance(1)
    best = max(range(len(penalties)), key=lambda i: (selection[i]["accuracy"], -selection[i]["nll"]))

    whole = Objective(features, target_N, len(class_C), np.arange(len(label_N)), device)
    weight_CE, converged = whole.minimize(optima[best], penalties[best])
    advance(1)
    chosen = {"penalty": penalties[best], "converged": converged}
    return LinearFit(whole.classifier(weight_CE, class_C), {"held_out": len(held_rows)}, chosen, selection)


def held_out_figures(
    classifier: LinearClassifier, features_ND: ArrayLike | Tensor, target_N: np.ndarray, rows: np.ndarray
) -> tuple[float, float]:
    """(accuracy, mean cross-entropy) on some rows."""
    right, loss = 0, 0.0
    for first in range(0, len(rows), CHUNK_ROWS):
        part = rows[first : first + CHUNK_ROWS]
        logits_RC, target_R = classifier.logits(features_ND[part]), torch.from_numpy(target_N[part])
        right += int((logits_RC.argmax(dim=1) == target_R).sum())
        loss += float(F.cross_entropy(logits_RC.double(), target_R, reduction="sum"))
    return right / len(rows), loss / len(rows)

"""Multinomial logistic regression to its optimum, for a path of penalties, the best chosen on held-out samples.

CLIP (arXiv 2103.00020, appendix A.3) and DINOv2 report it next to SGD or in place of it. The problem is convex, so
there is no learning rate and no schedule; only the penalty is chosen, on a held-out tenth of the training set. Each
penalty starts from the optimum of the stronger one before it. scikit-learn's LogisticRegression finds the same optimum
(C = 1 / (penalty * N)), but needs all features in memory in float64 and does not run on a GPU.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.evaluation.arrays import Advance, Array, Device, as_numpy, mean_and_std, read_if_small, read_in_chunks
from fastssl.evaluation.linear.classifier import Candidate, LinearClassifier, LinearFit, best_candidate
from fastssl.evaluation.metrics import CHUNK_ROWS
from fastssl.evaluation.splits import HOLDOUT_SHARE, holdout_split

PENALTIES = tuple(10.0**power for power in np.arange(0, -6.5, -0.5).tolist())  # from strong to weak
MAX_STEPS = 1000  # per penalty, as in CLIP
# The optimum is where no derivative is larger. In coordinates of curvature 1, the loss is then within half of their sum
# of squares of its minimum: 3e-7 with 5,000 weights.
MAX_GRADIENT = 1e-5
CONSTANTS = {  # recorded in results
    "penalties": PENALTIES, "max_steps": MAX_STEPS, "max_gradient": MAX_GRADIENT, "held_out_share": HOLDOUT_SHARE,
}  # fmt: skip


class LogisticLoss:
    """Mean cross-entropy of some rows on standardized features, its gradient, and its minimum.

    Computed in float64: with float32 products the line search stops at noise of 1e-6 to 1e-5, the precision that the
    result should have.

    The features of a network are strongly correlated. So L-BFGS moves in coordinates in which the loss has about the
    same curvature in every direction: along the principal axes of the features, each scaled by
    1 / sqrt(variance / C + penalty), where 1 / C is the curvature of cross-entropy for C equally likely classes. The
    optimum is the same. On the features of 10,000 images it takes 21, 53 and 374 evaluations at penalties 1e-1, 1e-3
    and 1e-5, and 79, 337 and 1,040 without the axes (records/linear.md).

    target_N are class numbers from 0 to classes - 1; rows are those that are fitted on.
    """

    def __init__(self, features_ND: Array, target_N: np.ndarray, classes: int, rows: np.ndarray, device: Device):
        self.classes = classes
        self.device = torch.device(device)
        self.target_N = torch.from_numpy(target_N[rows]).to(device)
        # Read from the disk and copied to a GPU only once, if they fit: an optimum takes hundreds of evaluations.
        self.features_ND, self.rows = read_if_small(features_ND, rows, self.device)
        self.mean_D, self.std_D = mean_and_std(self.features_ND, self.rows, device)
        self._only_chunk: Tensor | None = None  # of inputs, if all rows fit into one
        second_moment_EE = sum(x_RE.T @ x_RE for x_RE in self.inputs()) / len(rows)
        self.variance_E, self.axes_EE = torch.linalg.eigh(second_moment_EE)

    def inputs(self) -> Iterator[Tensor]:
        """Yield chunks of the standardized features, with a 1 that the bias multiplies: (R, E), E = D + 1."""
        if self._only_chunk is not None:
            yield self._only_chunk
            return
        for chunk_RD in read_in_chunks(self.features_ND, self.rows, self.device, self.classes):
            x_RE = F.pad(chunk_RD.double().sub_(self.mean_D).div_(self.std_D), (0, 1), value=1.0)
            if len(x_RE) == len(self.rows):
                self._only_chunk = x_RE
            yield x_RE

    def scale_E(self, penalty: float) -> Tensor:
        return (self.variance_E.clamp_min(0) / self.classes + penalty).rsqrt()

    @torch.inference_mode()
    def __call__(self, flat: np.ndarray, penalty: float) -> tuple[float, np.ndarray]:
        """Mean cross-entropy + penalty / 2 * sum of squared weights (without the bias), and its gradient.

        flat: (C * E,) weights in the scaled coordinates; the gradient is in the same ones.
        """
        axes_EE = self.axes_EE * self.scale_E(penalty)
        weight_CE = torch.from_numpy(flat.reshape(self.classes, -1)).to(self.device) @ axes_EE.T
        loss: float | Tensor = 0.0
        gradient_CE, first = torch.zeros_like(weight_CE), 0
        for x_RE in self.inputs():
            target_R = self.target_N[first : first + len(x_RE)]
            residual_RC = (x_RE @ weight_CE.T).log_softmax(dim=1)
            row_R = torch.arange(len(x_RE), device=self.device)
            loss -= residual_RC[row_R, target_R].sum()
            # From log-probabilities to probabilities - one_hot(target), in place.
            residual_RC.exp_()
            residual_RC[row_R, target_R] -= 1
            gradient_CE.addmm_(residual_RC.T, x_RE)
            first += len(x_RE)
        decayed_CE = weight_CE * penalty
        decayed_CE[:, -1] = 0
        loss = loss / first + (decayed_CE * weight_CE).sum() / 2
        return float(loss), ((gradient_CE / first + decayed_CE) @ axes_EE).flatten().cpu().numpy()

    def minimize(self, weight_CE: Tensor, penalty: float) -> tuple[Tensor, bool]:
        """The optimum (C, E), starting from weight_CE, and whether it was reached within MAX_STEPS."""
        # Imported here as they take half a second, and the probe of training does not need them.
        from scipy.optimize import minimize
        from threadpoolctl import threadpool_limits

        axes_EE, scale_E = self.axes_EE, self.scale_E(penalty)
        start = ((weight_CE @ axes_EE) / scale_E).flatten().cpu().numpy()
        # Otherwise the threads of scipy's BLAS and of torch wait for each other in busy loops: 600 x 20 features took
        # 7.8 s in place of 0.25 s.
        with threadpool_limits(1, user_api="blas"):
            options = {"maxiter": MAX_STEPS, "maxfun": 2 * MAX_STEPS, "gtol": MAX_GRADIENT, "ftol": 0.0, "maxcor": 10}
            found = minimize(self, start, (penalty,), method="L-BFGS-B", jac=True, options=options)
        optimum_CE = torch.from_numpy(found.x.reshape(self.classes, -1)).to(self.device) * scale_E @ axes_EE.T
        # found.success is not used: at the optimum a line search may fail on the last bits.
        return optimum_CE, bool(np.abs(found.jac).max() <= 10 * MAX_GRADIENT)

    def classifier(self, weight_CE: Tensor, class_C: np.ndarray) -> LinearClassifier:
        weight_CE, mean_D, std_D = weight_CE.float(), self.mean_D.float(), self.std_D.float()
        return LinearClassifier(torch.from_numpy(class_C), weight_CE[:, :-1], weight_CE[:, -1], mean_D, std_D)


def fit_lbfgs(
    features: Array,
    labels: Array,
    *,
    penalties: Sequence[float] = PENALTIES,
    seed: int = 0,
    device: Device = "cpu",
    advance: Advance = lambda fits: None,
) -> LinearFit:
    """Fit every penalty to features (N, D) and labels (N,) of nine tenths of the samples, and the best one to all.

    The best penalty has the highest accuracy on the last tenth (stratified, seeded) and, of equal ones, the lowest
    cross-entropy. penalties go from strong to weak. `advance(1)` is called after each of len(penalties) + 1 fits.
    """
    label_N = as_numpy(labels)
    fit_rows, held_rows = holdout_split(label_N, seed)
    class_C, target_N = np.unique(label_N, return_inverse=True)
    regression = LogisticLoss(features, target_N, len(class_C), fit_rows, device)
    weight_CE = torch.zeros(len(class_C), features.shape[1] + 1, dtype=torch.float64, device=device)
    optima: list[Tensor] = []
    candidates: list[Candidate] = []
    for penalty in penalties:
        weight_CE, converged = regression.minimize(weight_CE, penalty)
        accuracy, nll = _test(regression.classifier(weight_CE, class_C), features, target_N, held_rows)
        optima.append(weight_CE)
        candidates.append({"penalty": penalty, "accuracy": accuracy, "nll": nll, "converged": converged})
        advance(1)
    best = best_candidate(candidates)

    final = LogisticLoss(features, target_N, len(class_C), np.arange(len(label_N)), device)
    weight_CE, converged = final.minimize(optima[best], penalties[best])
    advance(1)
    chosen: dict[str, float] = {"penalty": penalties[best], "converged": converged}
    return LinearFit(final.classifier(weight_CE, class_C), {"held_out": len(held_rows)}, chosen, candidates)


def _test(
    classifier: LinearClassifier, features_ND: Array, target_N: np.ndarray, rows: np.ndarray
) -> tuple[float, float]:
    """Accuracy and mean cross-entropy on some rows."""
    correct, loss = 0, 0.0
    for first in range(0, len(rows), CHUNK_ROWS):
        part = rows[first : first + CHUNK_ROWS]
        logits_RC, target_R = classifier.logits(features_ND[part]), torch.from_numpy(target_N[part])
        correct += int((logits_RC.argmax(dim=1) == target_R).sum())
        loss += float(F.cross_entropy(logits_RC.double(), target_R, reduction="sum"))
    return correct / len(rows), loss / len(rows)

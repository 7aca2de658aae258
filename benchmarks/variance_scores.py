"""How much of a variance score is the length of the features? For Z-prob runs.

    python benchmarks/variance_scores.py RUN --near data/tinyimagenet/train.beton --far data/mnist/test.beton

Prints tables in Markdown: the AUROC of each score on each set in percent, where data.val is ID, and its rank
correlation with the lengths of h and mu over ID images.

    length of h, of mu      minus the length: shorter features are taken for OOD
    sigma_mean              and draws_disagreement: the detectors of `fastssl eval ood`
    sigma_mean, h rescaled  of the projector and the head applied to h after it is scaled to the median length of the
                            training images' h: what sigma says in addition to the length
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from fastssl.evaluation import Features, RunEncoder, cached_features, load_run_encoder
from fastssl.evaluation.ood import detector, find_sets, metrics
from fastssl.models.ssl_model import evaluating


def scores_of(encoder: RunEncoder, features: Features, length: float) -> dict[str, np.ndarray]:
    """Score -> values (N,). length: to which h is scaled for the last one."""
    model = encoder.model
    h_ND = torch.from_numpy(np.array(features.h))
    length_N = h_ND.norm(dim=1, keepdim=True)
    with torch.inference_mode(), evaluating(model):
        rescaled = model.heads["z"](model.projector((h_ND * length / length_N).to(encoder.device)))
    arrays = {"features": features.h, "sigma": features.sigma, "mu": features.mu}
    return {
        "length of h": -length_N[:, 0].numpy(),
        "length of mu": -np.linalg.norm(features.mu, axis=1),
        "sigma_mean": detector("sigma_mean").score(**arrays),
        "draws_disagreement": detector("draws_disagreement").score(**arrays),
        "sigma_mean, h rescaled": rescaled.sigma.mean(dim=1).cpu().numpy(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--near", type=Path, nargs="*", default=[])
    parser.add_argument("--far", type=Path, nargs="*", default=[])
    arguments = parser.parse_args()
    encoder = load_run_encoder(arguments.run)
    if "z" not in encoder.model.heads or "h" in encoder.model.heads:
        parser.error(f"{arguments.run} is not a Z-prob run")
    sets = find_sets(encoder, near=arguments.near, far=arguments.far)
    length = float(np.median(np.linalg.norm(cached_features(encoder, sets.fit).h, axis=1)))
    features = {name: cached_features(encoder, data) for name, data in {"ID": sets.id, **sets.ood}.items()}
    scores = {name: scores_of(encoder, each, length) for name, each in features.items()}

    print("| set | images | length of h | length of mu | sigma |\n|---|---|---|---|---|")
    for name, each in features.items():
        h, mu = (np.median(np.linalg.norm(array, axis=1)) for array in (each.h, each.mu))
        print(f"| {name} | {len(each.h):,} | {h:.1f} | {mu:.2f} | {np.median(each.sigma.mean(axis=1)):.4f} |")
    print("\n| score | " + " | ".join(sets.ood) + " | rho with h | rho with mu |")
    print("|---|" + "---|" * (len(sets.ood) + 2))
    for score, id_N in scores["ID"].items():
        auroc = [f"{100 * metrics(id_N, scores[name][score])['auroc']:.1f}" for name in sets.ood]
        rho = [f"{spearmanr(id_N, -scores['ID'][f'length of {of}']).statistic:.2f}" for of in ("h", "mu")]
        print(f"| {score} | " + " | ".join(auroc + rho) + " |")


if __name__ == "__main__":
    main()

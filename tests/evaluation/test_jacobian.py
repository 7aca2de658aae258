"""Singular values of the Jacobian and JEPA-SCORE, against finite differences and NumPy, one image at a time."""

import json

import numpy as np
import pytest
import torch
from many_channels import write_images
from scipy.stats import spearmanr
from small_models import make_run

from fastssl.beton import build_beton
from fastssl.common.errors import UserError
from fastssl.evaluation import BetonSubset, cached_features, load_run_encoder
from fastssl.evaluation.embed import embed_images
from fastssl.evaluation.features import eval_input, eval_loader
from fastssl.evaluation.ood import detector, evaluate, evaluate_ood, find_sets, jacobian, metrics, ood_table
from fastssl.evaluation.ood.evaluate import unsupported_detectors
from fastssl.evaluation.ood.jacobian import cached_jacobian_values, jacobian_values, random_subspace, singular_values
from fastssl.evaluation.ood.label_free import SMALLEST_SINGULAR_VALUE
from fastssl.models.encoder import build_encoder

PROJECTOR = {"layers": 2, "hidden": 16, "out": 8}
SIDE = 8


@pytest.fixture
def run(canvas, tmp_path):
    """A Z-prob run of 8 px and h of 96 dimensions, so that a Jacobian has 192 columns."""
    return run_of(tmp_path / "run", canvas, "z")


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr(evaluate.plots, "draw_ood_plots", lambda *arguments: None)


def run_of(folder, canvas, stochastic, **model):
    data = {"train": str(canvas / "train.beton"), "val": str(canvas / "val.beton")}
    sections = {"model": {"backbone": "test_resnet", "projector": PROJECTOR} | model, "views": {"size": SIDE}}
    made, _, _ = make_run(folder, data, embedding={"stochastic": stochastic}, **sections)
    return load_run_encoder(made, device="cpu")


def images_of(encoder, data):
    (batch,) = eval_loader(data, encoder.recipe.views, encoder.device)
    return eval_input(encoder.recipe.views)(batch)[batch.valid]


def numeric_jacobian(embed, image):
    """(D, P) by central differences in float64, a pixel at a time."""
    columns = []
    for pixel in range(image.numel()):
        step = torch.zeros(image.numel(), dtype=torch.float64)
        step[pixel] = 1e-6
        step = step.view_as(image)
        with torch.no_grad():
            columns.append(((embed((image + step)[None]) - embed((image - step)[None])) / 2e-6)[0].numpy())
    return np.stack(columns, axis=1)


def numpy_score(jacobian_DP):
    return -np.log(np.maximum(np.linalg.svd(jacobian_DP, compute_uv=False), 1e-6)).sum()


def autograd_jacobian(embed, image):
    return torch.autograd.functional.jacobian(lambda x: embed(x[None])[0], image).flatten(1).detach().numpy()


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
def test_values_are_those_of_finite_differences(backbone):
    torch.manual_seed(0)
    side = 16 if backbone == "test_vit" else 8  # a ViT's patches have 16 px
    encoder = build_encoder(backbone, "imagenet", side).double().eval()
    images = torch.randn(2, 3, side, side, dtype=torch.float64)
    found = singular_values(encoder, images)
    for image, values in zip(images, found):
        expected = np.linalg.svd(numeric_jacobian(encoder, image), compute_uv=False)
        np.testing.assert_allclose(values, expected, atol=1e-6 * expected[0])
        ours = detector("jepa_score").score(values[None])[0]
        assert ours == pytest.approx(numpy_score(numeric_jacobian(encoder, image)), abs=0.05)
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_score_is_a_log_density_up_to_a_constant():
    """x = g(z) with z standard normal has log p(x) = log N(f(x)) + log |det J|, f the inverse of g."""
    z_BCHW = torch.randn(50, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_BCHW = torch.sinh(z_BCHW)
    values = singular_values(lambda x: torch.asinh(x).flatten(1), x_BCHW)
    score = detector("jepa_score").score(values)
    slope = 1 / torch.sqrt(1 + x_BCHW**2)
    np.testing.assert_allclose(score, -slope.log().flatten(1).sum(1), rtol=1e-9)
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(z_BCHW).flatten(1).sum(1)
    # The paper takes embeddings of many dimensions to have one length, so that the other term is the same for all.
    log_density = normal + slope.log().flatten(1).sum(1)
    assert spearmanr(score, -log_density).statistic > 0.9


def test_small_values_count_as_the_published_eps():
    score = detector("jepa_score").score(np.array([[1.0, 0, 0], [1.0, 1e-6, 1e-9], [1.0, 1.0, 1.0]]))
    np.testing.assert_allclose(score, [-2 * np.log(1e-6)] * 2 + [0])
    assert SMALLEST_SINGULAR_VALUE == 1e-6


def test_directions_give_the_jacobian_along_them():
    torch.manual_seed(0)
    encoder = build_encoder("test_resnet", "imagenet", 8).double().eval()
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    some = random_subspace(96, images.device).double()
    torch.testing.assert_close(some @ some.T, torch.eye(24, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(some, random_subspace(96, images.device).double())
    assert [jacobian.directions_of(dims) for dims in (0, 1, 8, 256, 2048)] == [0, 1, 2, 64, 64]
    found = singular_values(encoder, images, some)
    for image, values in zip(images, found):
        expected = np.linalg.svd(some.numpy() @ autograd_jacobian(encoder, image), compute_uv=False)
        np.testing.assert_allclose(values, expected, atol=1e-8 * expected[0])
    # All directions, turned: the values of J itself.
    turned = torch.linalg.qr(torch.randn(96, 96, dtype=torch.float64)).Q
    torch.testing.assert_close(singular_values(encoder, images, turned), singular_values(encoder, images))


@pytest.mark.parametrize("stochastic", ["none", "z", "h", "hz"])
@pytest.mark.parametrize("out", [8, 120])  # fewer and more dimensions of z than h has
@pytest.mark.parametrize("exact", [True, False])
def test_cached_values_are_those_of_what_embed_returns(stochastic, out, exact, canvas, tmp_path, monkeypatch):
    encoder = run_of(tmp_path / "run", canvas, stochastic, projector={**PROJECTOR, "hidden": 200, "out": out})
    model = encoder.model
    data = BetonSubset(canvas / "val.beton")
    images = images_of(encoder, data)

    def embed_h(x):
        return model.heads["h"](model.encoder(x)).mu if "h" in model.heads else model.encoder(x)

    spaces = {"h": embed_h} | (
        {"mu": lambda x: model.heads["z"](model.projector(embed_h(x))).mu} if stochastic == "z" else {}
    )
    with torch.no_grad():
        shown = model.embed(images)
        for space, embed in spaces.items():
            torch.testing.assert_close(embed(images), shown.mu if space == "mu" else shown.h)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    model.train()
    monkeypatch.setattr(jacobian, "CHUNK_IMAGES", 5)  # and a smaller last chunk
    found = cached_jacobian_values(encoder, data, exact)
    assert model.training and found.keys() == spaces.keys()
    # Batch norms kept their statistics, and nothing has a gradient.
    for name, x in model.state_dict().items():
        torch.testing.assert_close(x, state[name], atol=0, rtol=0)
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    for space, embed in spaces.items():
        dims = out if space == "mu" else 96
        assert found[space].shape == (12, min(96, dims) if exact else dims // 4)
        directions = np.eye(dims) if exact else random_subspace(dims, images.device).numpy()
        for image, values in zip(images, found[space]):
            expected = np.linalg.svd(directions @ autograd_jacobian(embed, image), compute_uv=False)[: len(values)]
            np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-6)


def test_memory_is_bounded_by_chunks(run, canvas, monkeypatch):
    (batch,) = eval_loader(BetonSubset(canvas / "val.beton"), run.recipe.views, run.device)
    whole = jacobian_values(run, batch, True)
    seen, advanced, of_both = [], [], jacobian.singular_values_of_both

    def watched(embed, head, images):
        seen.append(len(images))
        return of_both(embed, head, images)

    monkeypatch.setattr(jacobian, "singular_values_of_both", watched)
    monkeypatch.setattr(jacobian, "CHUNK_BYTES", 5 * 4 * 96 * 3 * SIDE * SIDE)
    found = jacobian_values(run, batch, True, advanced.append)
    assert seen == advanced == [5, 5, 2]
    for space, values in whole.items():
        np.testing.assert_allclose(found[space], values, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(jacobian, "CHUNK_BYTES", 1)  # less than one image: one at a time
    jacobian_values(run, batch, True)
    assert seen[3:] == [1] * 12


def test_runs_without_a_mu_of_z_are_told_so(canvas, tmp_path):
    labels = np.zeros(3, np.int64)
    reasons = {x: unsupported_detectors(run_of(tmp_path / x, canvas, x).model, labels) for x in ("none", "h", "z")}
    assert reasons["none"]["jepa_score_mu"] == "the embedding is deterministic"
    assert reasons["h"]["jepa_score_mu"] == "mu is h, so it is jepa_score"
    assert not {"jepa_score", "jepa_score_mu"} & reasons["z"].keys() and "jepa_score" not in reasons["none"]


@pytest.fixture
def few_detectors(monkeypatch):
    names = ("knn_cosine", "jepa_score", "jepa_score_mu")
    monkeypatch.setattr(evaluate, "DETECTORS", {name: evaluate.DETECTORS[name] for name in names})


@pytest.mark.parametrize("exact", [True, False])
def test_eval_ood_computes_it_only_when_asked(exact, run, canvas, few_detectors, monkeypatch):
    sets = find_sets(run, near=[canvas / "train.beton"])
    without = evaluate_ood(run, sets)
    reason = "slow; --jepa-images 200 computes it, of 200 images a set"
    assert without["skipped"] == {"jepa_score": reason, "jepa_score_mu": reason}
    scores_without = dict(np.load(run.run_dir / "eval" / without["scores"]))

    result = evaluate_ood(run, sets, jepa_images=5, jepa_exact=exact)
    assert result["skipped"] == {} and result["settings"]["jepa_images"] == 5
    scores = dict(np.load(run.run_dir / "eval" / result["scores"]))
    for name, x in scores_without.items():  # bit for bit
        np.testing.assert_array_equal(scores[name], x)
    assert result["detectors"]["knn_cosine"] == without["detectors"]["knn_cosine"]
    (near,) = sets.near
    for space, name in (("h", "jepa_score"), ("mu", "jepa_score_mu")):
        for part, data in (("id", sets.id), (near, sets.near[near])):
            found = scores[f"{part}/{name}"]
            is_scored = np.isfinite(found)
            assert is_scored.sum() == 5 and len(found) == len(cached_features(run, data).h)
            drawn = BetonSubset(data.path, None, 5)
            np.testing.assert_array_equal(scores[f"{part}/index"][is_scored], cached_features(run, drawn).index)
            expected = detector(name).score(cached_jacobian_values(run, drawn, exact)[space])
            np.testing.assert_array_equal(found[is_scored], expected)
        scored = [scores[f"{part}/{name}"][np.isfinite(scores[f"{part}/{name}"])] for part in ("id", near)]
        assert result["detectors"][name]["near"]["metrics"] == metrics(*scored)
    # Shown again, not measured again.
    monkeypatch.setattr(evaluate, "detector_arrays", None)
    assert evaluate_ood(run, sets, jepa_images=5, jepa_exact=exact)["measured_at"] == result["measured_at"]


def test_more_images_than_a_set_has_are_all_of_them(run, canvas, few_detectors):
    result = evaluate_ood(run, find_sets(run, near=[canvas / "train.beton"]), jepa_images=1000)
    scores = np.load(run.run_dir / "eval" / result["scores"])
    assert np.isfinite(scores["id/jepa_score"]).all() and len(scores["id/jepa_score"]) == 12


def test_an_interrupted_evaluation_keeps_the_sets_that_are_done(run, canvas, few_detectors, monkeypatch):
    sets = find_sets(run, near=[canvas / "train.beton"])
    calls = []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return jacobian_values(*arguments)

    monkeypatch.setattr(jacobian, "jacobian_values", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_ood(run, sets, jepa_images=5)
    assert not any(".part" in path.name for path in (run.run_dir / "features").iterdir())
    evaluate_ood(run, sets, jepa_images=5)
    assert len(calls) == 3  # of two sets; the one that was done is read from its cache


def test_weights_that_are_not_finite_are_refused(run, canvas):
    with torch.no_grad():
        next(run.model.encoder.layer4.parameters()).fill_(torch.nan)
    with pytest.raises(UserError, match="The Jacobian of the encoder is not finite"):
        cached_jacobian_values(run, BetonSubset(canvas / "val.beton"), False)
    assert list((run.run_dir / "features").iterdir()) == []


def test_embed_scores_every_image(run, canvas, tmp_path):
    embed_images(run, canvas / "val.beton", tmp_path / "x.npz", score="jepa_score")
    expected = detector("jepa_score").score(cached_jacobian_values(run, BetonSubset(canvas / "val.beton"), False)["h"])
    np.testing.assert_allclose(np.load(tmp_path / "x.npz")["score"], expected, rtol=1e-4, atol=1e-3)


def test_the_command_and_its_table(run, canvas, fastssl, few_detectors):
    near = canvas / "train.beton"
    code, out, _ = fastssl("eval", "ood", run.run_dir, "--near", near, "--device", "cpu", "--jepa-images", 4)
    assert code == 0 and "jepa_score" in out and "jepa_score_mu" in out
    assert "at most 4 images of each set, along up to 64 random directions of the embedding" in " ".join(out.split())
    code, out, _ = fastssl("eval", "ood", run.run_dir, "--near", near, "--jepa-images", 4, "--jepa-exact")
    assert code == 0 and "along all directions of the embedding" in " ".join(out.split())
    code, _, err = fastssl("eval", "ood", run.run_dir, "--near", near, "--jepa-exact")
    assert code == 2 and "add --jepa-images N" in err
    code, out, _ = fastssl("eval", "ood", run.run_dir, "--near", near, "--device", "cpu")
    assert code == 0 and "skipped: jepa_score, jepa_score_mu: slow; --jepa-images 200" in " ".join(out.split())
    code, _, err = fastssl("eval", "ood", run.run_dir, "--near", near, "--jepa-images", -1)
    assert code == 2 and "--jepa-images" in err
    (path,) = (run.run_dir / "eval").glob("ood-*.json")
    assert ood_table(json.loads(path.read_text())) is not None


@pytest.mark.filterwarnings("ignore:.*smaller than.*")
def test_images_of_one_channel(tmp_path):
    for split in ("train", "val"):
        write_images(tmp_path / "source" / split, 1, 6)
    build_beton("imagefolder", tmp_path / "source", tmp_path / "built", canvas=32, workers=1, channels=1)
    data = {"train": str(tmp_path / "built/train.beton"), "val": str(tmp_path / "built/val.beton")}
    model = {"backbone": "test_resnet", "in_chans": 1, "projector": PROJECTOR}
    views = {"size": SIDE, "mean": [0.5], "std": [0.25]}
    folder, _, _ = make_run(tmp_path / "run", data, views=views, model=model)
    encoder = load_run_encoder(folder, device="cpu")
    found = cached_jacobian_values(encoder, BetonSubset(tmp_path / "built/val.beton"), True)["h"]
    # There are at most as many values above zero as pixels.
    assert found.shape[1] == 96 and (found[:, SIDE * SIDE :] < 1e-6).all() and (found[:, 0] > 0).all()

"""The supervised baseline and fine-tuning: one view, labels, a subset, a learning rate for the new layer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from no_host import NoHost
from PIL import Image
from safetensors import safe_open
from small_models import recipe_of
from training_runs import losses_of, metrics_of, small, weights_of

import fastssl
from fastssl.common.errors import UserError
from fastssl.common.randomness import NOISE_H, normals
from fastssl.evaluation import cached_features
from fastssl.evaluation import probe as probe_module
from fastssl.evaluation.runs import find_evaluation_data, load_run_encoder
from fastssl.export import export_run
from fastssl.loading import BetonLoader
from fastssl.models import Classifier, ModelInput, SSLModel, build_model
from fastssl.objectives import TotalLoss, cross_entropy_loss
from fastssl.recipe import load_recipe
from fastssl.training import loop, setup, train

SUPERVISED = {"name": "supervised", "classes": 5, "label_smoothing": 0.1}
THREE = "objective={name: supervised, classes: 3}"
STOCHASTIC = "embedding={stochastic: h, samples: 3, beta: 1e-3, prior: mixture, mixture_components: 3}"
B, C, S = 6, 5, 3


def classifier_of(embedding):
    torch.manual_seed(0)
    return build_model(recipe_of(SUPERVISED, embedding)).double()


def inputs():
    v = torch.randn(B, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ModelInput((v,), torch.arange(B) % C, torch.arange(50, 50 + B), torch.tensor(4))


# --- Model and loss --------------------------------------------------------------------------------------------------


def test_deterministic_loss_equals_torch_cross_entropy():
    model, batch = classifier_of({"stochastic": "none"}), inputs()
    (v,), label = batch.views, batch.label
    reference = copy.deepcopy(model)
    (view,) = views = model(batch)
    terms = TotalLoss(recipe_of(SUPERVISED, {}))(views, model.priors, 0)
    h = reference.encoder(v)
    logits = h @ reference.classifier.weight.T + reference.classifier.bias
    torch.testing.assert_close(view.h, h)
    torch.testing.assert_close(terms["loss"], F.cross_entropy(logits, label, label_smoothing=0.1))
    assert terms["accuracy"] == (logits.argmax(1) == label).double().mean() and not terms["accuracy"].requires_grad
    assert terms.keys() == {"loss", "cross_entropy", "accuracy"} and terms["loss"] == terms["cross_entropy"]


def test_stochastic_loss_averages_logits_over_draws_and_adds_the_kl_of_the_view():
    embedding = {"stochastic": "h"}
    model, batch = classifier_of(embedding), inputs()
    (view,) = views = model(batch)
    q, h_SBD = view.draws["h"]
    assert torch.equal(h_SBD, q.mu + q.sigma * normals(0, batch.step, batch.index, 0, S, q.mu.shape[1], NOISE_H))
    logits = torch.stack([model.classifier(h) for h in h_SBD]).mean(0)
    kl = 0.5 * (q.mu**2 + q.sigma**2 - 1 - 2 * q.sigma.log()).sum(-1).mean()
    terms = TotalLoss(recipe_of(SUPERVISED, embedding))(views, model.priors, 0)
    torch.testing.assert_close(terms["loss"], F.cross_entropy(logits, batch.label, label_smoothing=0.1) + 0.1 * kl)
    torch.testing.assert_close(terms["kl_h"], kl.detach())
    terms["loss"].backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_loss_is_fp32_under_autocast():
    logits, label = torch.randn(S, B, C, generator=torch.Generator().manual_seed(0)).bfloat16(), torch.arange(B) % C
    with torch.autocast("cpu", torch.bfloat16):
        loss = cross_entropy_loss(logits, label)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.float().mean(0), label))


@pytest.mark.parametrize("stochastic", ["none", "h"])
def test_logits_come_from_the_embedding_and_do_not_change_the_model(stochastic):
    model, (v,) = classifier_of({"stochastic": stochastic}), inputs().views
    before = copy.deepcopy(model.state_dict())
    logits, embedding = model.logits(v), model.embed(v)
    assert model.training and not logits.requires_grad and logits.shape == (B, C)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert torch.equal(logits, model.mean_z(embedding.h))
    frozen = copy.deepcopy(model).eval()
    h = frozen.encoder(v)
    want = h if stochastic == "none" else frozen.heads["h"](h).mu
    torch.testing.assert_close(logits, frozen.classifier(want))
    assert embedding.space == (None if stochastic == "none" else "h")
    assert (embedding.sigma is None) == (stochastic == "none")


def test_step_reads_no_tensor_value():
    model, recipe = classifier_of({"stochastic": "h"}), recipe_of(SUPERVISED, {"stochastic": "h"})
    with NoHost():
        views = model(inputs())
        TotalLoss(recipe, 3)(views, model.priors, torch.tensor(4))["loss"].backward()


@pytest.mark.slow
@pytest.mark.parametrize("stochastic", ["none", "h"])
def test_model_and_loss_compile_in_one_graph(stochastic):
    recipe = recipe_of(SUPERVISED, {"stochastic": stochastic})
    network = setup.Network(Classifier(recipe).double(), TotalLoss(recipe), torch.device("cpu"), "fp32")
    want = network(inputs()).terms["loss"]
    loss = torch.compile(network, fullgraph=True, dynamic=False)(inputs()).terms["loss"]
    loss.backward()
    torch.testing.assert_close(loss, want)


# --- Runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(canvas, tmp_path_factory):
    """Two finished runs of 24 steps, deterministic and stochastic, on whole images whose class is easily seen."""
    folder = tmp_path_factory.mktemp("supervised")
    keys = ["views.scale=[1,1]", "views.ratio=[1,1]", "views.flip=0", "train.epochs=8", "optim.warmup_epochs=0"]
    for name, more in {"none": [], "h": [STOCHASTIC]}.items():
        arguments = small(canvas, folder / name, *keys, "optim.lr=0.3", THREE, *more)
        train(load_recipe("recipes/supervised.yaml", arguments))
    return folder


@pytest.mark.parametrize("kind", ["none", "h"])
def test_run_learns_its_labels(runs, kind):
    lines = metrics_of(runs / kind)
    assert len(lines) == 24 and sum(line["accuracy"] for line in lines[-6:]) / 6 > 0.8  # chance is 1/3
    terms = ["cross_entropy", "beta_kl"] if kind == "h" else ["cross_entropy"]
    for line in lines:
        assert line["loss"] == pytest.approx(sum(line[term] for term in terms), rel=1e-5)
        assert 1 <= line.get("rankme_z", 1) <= 3.01 and 1 <= line.get("rankme_h", 1) <= 16
    assert [line["step"] for line in lines if "rankme_z" in line] == list(range(3, 25, 3))  # once an epoch
    width, height = Image.open(runs / kind / "views.png").size
    assert (width, height) == (4 * (4 * 34 + 2), 4 * (4 * 34 + 2))  # one view of 32 px per image, enlarged four times


@pytest.mark.parametrize("kind", ["none", "h"])
def test_run_reloads_as_a_classifier(runs, canvas, kind):
    model = fastssl.load_model(runs / kind)
    assert isinstance(model, Classifier) and not model.training
    transform = fastssl.views.eval_transform(load_recipe(runs / kind / "recipe.yaml").views)
    batch = next(iter(BetonLoader(canvas / "val.beton", 12, shuffle=False)))
    logits = model.logits(transform(batch.image))
    own = {name.removeprefix("classifier."): weight for name, weight in weights_of(runs / kind).items()}
    torch.testing.assert_close(logits, F.linear(model.embed(transform(batch.image)).h, own["weight"], own["bias"]))
    assert (logits.argmax(1) == batch.label).float().mean() > 0.6
    images = torch.rand(2, 3, 32, 32)
    if kind == "none":
        with torch.no_grad():
            torch.testing.assert_close(fastssl.load_encoder(runs / kind)(images), model.embed(images).h)


def test_run_is_exported_with_its_card(runs, tmp_path):
    images = torch.rand(2, 3, 32, 32)
    whole = export_run(runs / "h", "safetensors", tmp_path / "whole" / "x.safetensors", sigma=True)
    exported, trained = (fastssl.load_model(path).logits(images) for path in (whole.path, runs / "h"))
    torch.testing.assert_close(exported, trained)
    card = whole.card.read_text()
    assert "trained with labels (cross-entropy)" in card and "classes: 3" in card
    assert "parameters of classifier and heads" in card
    encoder = export_run(runs / "none", "timm", tmp_path / "timm" / "x.safetensors")
    with safe_open(encoder.path, "pt") as file:
        assert not any("classifier" in name for name in file.keys())
    assert "self-supervised" not in encoder.card.read_text()


def test_fine_tuning_starts_from_an_ssl_run_with_a_new_classifier(canvas, tmp_path):
    """model.init: all of the encoder and the h head come, before the first step."""
    ssl = train(load_recipe("recipes/hprob_barlow.yaml", small(canvas, tmp_path / "ssl", "train.epochs=1")))
    embedding = "embedding={stochastic: h, samples: 3}"
    recipe = load_recipe(
        "recipes/supervised.yaml", small(canvas, tmp_path / "fine", THREE, embedding, f"model.init={ssl}")
    )
    run, remarks = setup.prepare(recipe, torch.device("cpu"), None)
    before, after = weights_of(ssl), run.state.model.state_dict()
    come = {name for name in after if name.startswith(("encoder.", "heads."))}
    assert come == {name for name in before if not name.startswith("projector.")}
    assert all(torch.equal(before[name], after[name]) for name in come)
    assert after.keys() - come == {"classifier.weight", "classifier.bias"}
    assert "2 others start at random, such as classifier.weight" in " ".join(remarks)
    train(recipe)
    assert losses_of(tmp_path / "fine")

    other = load_recipe("recipes/supervised.yaml", small(canvas, tmp_path / "x", THREE, "model.backbone=test_resnet",
                                                         f"model.init={ssl}", "model.stem=small"))  # fmt: skip
    with pytest.raises(UserError, match="model.init: .* has another stem: set model.stem=imagenet"):
        setup.prepare(other, torch.device("cpu"), None)


# --- Data ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def twenty(tmp_path):
    path = tmp_path / "twenty.txt"
    path.write_text("\n".join(map(str, range(5, 45, 2))))
    return path


@pytest.mark.parametrize("layout", ["canvas", "full"])
def test_run_sees_only_its_subset(request, tmp_path, twenty, monkeypatch, layout):
    """Crops on the device from a canvas, one crop on the CPU from whole images."""
    data, seen, real = request.getfixturevalue(layout), [], loop.forward_and_backward

    def watched(run, batches, epoch):
        seen.extend(batches)
        return real(run, batches, epoch)

    monkeypatch.setattr(loop, "forward_and_backward", watched)
    keys = [THREE, f"data.subset={twenty}", "train.batch_size=10"]
    train(load_recipe("recipes/supervised.yaml", small(data, tmp_path / "run", *keys)))
    shape = (32, 32, 3) if layout == "canvas" else (1, 32, 32, 3)
    assert len(seen) == 4 and all(batch.image.shape[1:] == shape for batch in seen)
    for epoch in (seen[:2], seen[2:]):
        assert sorted(torch.cat([batch.index for batch in epoch]).tolist()) == list(range(5, 45, 2))


def test_probe_and_evaluation_use_the_subset_too(canvas, tmp_path, twenty, monkeypatch):
    keys = [THREE, f"data.subset={twenty}", "train.epochs=1", "train.batch_size=5", "probe={every: 1, k: 3}"]
    recipe = load_recipe("recipes/supervised.yaml", small(canvas, tmp_path / "run", *keys))
    rest = load_recipe("recipes/supervised.yaml", small(canvas, tmp_path / "rest", *keys, "data.limit=8",
                                                        "probe.split=rest"))  # fmt: skip
    seen, real = [], probe_module.compute_features

    def watched(*arguments, **options):
        seen.append(set(real(*arguments, **options).index.tolist()))
        return real(*arguments, **options)

    monkeypatch.setattr(probe_module, "compute_features", watched)
    run = train(recipe, probe=probe_module.knn_probe(recipe))
    train(rest, probe=probe_module.knn_probe(rest))
    listed = set(range(5, 45, 2))
    assert seen[0] == listed and len(seen[1]) == 12
    assert len(seen[2]) == 8 and len(seen[3]) == 12 and seen[2] | seen[3] == listed
    encoder = load_run_encoder(run, device="cpu")
    split, whole = find_evaluation_data(encoder), find_evaluation_data(encoder, train=recipe.data.train)
    assert set(cached_features(encoder, split.train).index.tolist()) == listed
    about = split.describe()["train"]
    assert about["subset"] == str(twenty) and about["images"] == len(listed)
    assert len(cached_features(encoder, whole.train).label) == 48
    with pytest.raises(UserError, match="leaves out none of the 20 images"):
        probe_module.knn_probe(rest.model_copy(update={"data": rest.data.model_copy(update={"limit": 20})}))


# --- Two rates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "lars", "lamb"])
def test_head_learning_rate_is_its_factor_times_the_others(canvas, tmp_path, optimizer):
    """One step from the same weights: the classifier moves ten times as far, every other weight as far."""
    moved = []
    for factor in (1, 10):
        keys = [THREE, f"optim={{name: {optimizer}, lr: 0.1, weight_decay: 0.01, warmup_epochs: 0, "
                f"clip: null, head_lr_factor: {factor}}}", "train.batch_size=48", "train.epochs=1"]  # fmt: skip
        recipe = load_recipe("recipes/supervised.yaml", small(canvas, tmp_path / str(factor), *keys))
        torch.manual_seed(recipe.seed)
        before = build_model(recipe).state_dict()
        after = weights_of(train(recipe))
        moved.append({name: after[name] - before[name] for name in before if after[name].is_floating_point()})
    for name, step in moved[0].items():
        times = 10 if name.startswith("classifier.") else 1
        torch.testing.assert_close(moved[1][name], times * step, atol=1e-6, rtol=1e-3)


def test_weight_decay_excludes_the_classifier_bias():
    recipe = recipe_of(SUPERVISED, {"stochastic": "h"})
    model = build_model(recipe)
    optim = recipe.optim.model_copy(update={"weight_decay": 0.1, "head_lr_factor": 3.0})
    groups = setup.make_optimizer(model, optim).param_groups
    of_head = [group for group in groups if "lr_factor" in group]
    assert [group["lr_factor"] for group in of_head] == [3.0, 3.0]
    (weight, bias) = (group["params"] for group in of_head)
    assert len(weight) == len(bias) == 1 and weight[0] is model.classifier.weight and bias[0] is model.classifier.bias
    assert [group["weight_decay"] for group in of_head] == [0.1, 0.0]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


# --- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override, message",
    [
        ("objective={name: supervised}", "the key objective.classes is missing."),
        ("objective={name: supervised, classes: 1}", "objective.classes must be 2 or more, got 1"),
        ("objective={name: supervised, classes: 9, lambd: 1}", "objective.lambd belongs to barlow_twins"),
        ("embedding.stochastic=z", "set embedding.stochastic to none or h"),
        ("embedding.stochastic=hz", "set embedding.stochastic to none or h"),
        ("embedding={stochastic: h, chunk: 2}", "embedding.chunk cannot split .* leave out embedding.chunk"),
        ("optim.head_lr_factor=0", "optim.head_lr_factor"),
    ],
)
def test_contradictory_keys_are_refused(override, message):
    with pytest.raises(UserError, match=message) as error:
        load_recipe("recipes/supervised.yaml", [override])
    assert "\n" not in str(error.value)


def test_head_lr_factor_without_a_classifier_is_refused():
    with pytest.raises(
        UserError, match="optim.head_lr_factor is the learning rate of a classifier, .* leave out optim.head"
    ):
        load_recipe("recipes/barlow.yaml", ["optim.head_lr_factor=10"])
    assert isinstance(build_model(recipe_of({"name": "barlow_twins"}, {})), SSLModel)


def test_labels_without_an_output_are_refused_before_training(canvas, tmp_path, monkeypatch):
    two = small(canvas, tmp_path / "run", "objective={name: supervised, classes: 2}")
    with pytest.raises(UserError, match="holds labels from 0 to 2: set objective.classes=3"):
        train(load_recipe("recipes/supervised.yaml", two))
    assert not (tmp_path / "run").exists()

    labels = {int(i): int(label) for b in BetonLoader(canvas / "train.beton", 48) for i, label in zip(b.index, b.label)}
    zeros_and_ones = tmp_path / "list.txt"
    zeros_and_ones.write_text("\n".join(str(index) for index, label in labels.items() if label < 2))
    train(load_recipe("recipes/supervised.yaml", [*two, f"data.subset={zeros_and_ones}", "train.epochs=1"]))

    loader = BetonLoader(canvas / "train.beton", 8)
    loader.samples.rows.label_B[:5] = -1
    with pytest.raises(UserError, match="5 of the 48 images .* have no label, .* data.subset"):
        setup.check_labels(loader, 3)


def test_missing_subset_file_is_refused(canvas, tmp_path):
    keys = small(canvas, tmp_path / "run", THREE, "data.subset=/no/list.txt")
    with pytest.raises(UserError, match="No file /no/list.txt: name a list of images"):
        train(load_recipe("recipes/supervised.yaml", keys))

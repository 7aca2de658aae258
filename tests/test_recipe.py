"""Recipes: the shipped ones load, and mistakes are refused with one sentence that names the fix."""

from pathlib import Path

import pytest
import torch
import yaml
from pydantic import ValidationError

from fastssl.common.errors import UserError
from fastssl.recipe import Recipe, explain, find_recipe, load_recipe, recipe_keys, shipped_recipes
from fastssl.sweep import load_sweep

SHIPPED = sorted(
    str(path.relative_to(shipped_recipes()))
    for path in shipped_recipes().rglob("*.yaml")
    if path.parent.name != "sweeps"  # tested in test_sweep.py
)


@pytest.fixture
def minimal(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\ndata: {train: x.beton}\n")
    return path


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_load_and_survive_a_round_trip(name, tmp_path):
    recipe = load_recipe(f"recipes/{name}")
    again = tmp_path / "recipe.yaml"
    again.write_text(recipe.to_yaml())
    assert load_recipe(again) == recipe
    text = (shipped_recipes() / name).read_text()
    assert text.startswith("# ") and "# Run:" in text and "# Needs:" in text and "# From:" in text


def test_the_published_values_are_in_the_recipes():
    betas = {"hprob_barlow": 1e-3, "zprob_barlow": 1e-2, "hprob_vicreg": 1e-4, "zprob_vicreg": 1e-3}
    for folder in ("", "cifar10/"):
        for name, beta in betas.items():
            recipe = load_recipe(f"recipes/{folder}{name}.yaml")
            assert recipe.embedding.beta == beta and recipe.embedding.samples == 12
            assert recipe.embedding.stochastic == name[0]
    imagenet, cifar = load_recipe("recipes/barlow.yaml"), load_recipe("recipes/cifar10/barlow.yaml")
    assert (imagenet.train.epochs, imagenet.optim.warmup_epochs, imagenet.optim.final_lr_factor) == (100, 4, 0.5)
    assert (cifar.train.epochs, cifar.optim.warmup_epochs, cifar.optim.final_lr_factor) == (200, 0, 0.01)
    assert imagenet.model.projector.layers == 3 and cifar.model.projector.layers == 2
    assert cifar.model.stem == "small" and cifar.views.first.blur == cifar.views.second.blur == 0
    vicreg = load_recipe("recipes/vicreg.yaml").objective
    assert (vicreg.inv, vicreg.var, vicreg.cov) == (25, 25, 1)


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.startswith("reference/")])
def test_reference_recipes_are_the_plain_ones_with_the_published_choices(name):
    """docs/fidelity.md lists the choices; nothing else may differ."""
    ours = name.removeprefix("reference/").replace("cifar10_", "cifar10/")
    reference, plain = load_recipe(f"recipes/{name}"), load_recipe(f"recipes/{ours}")
    want = plain.model_dump()
    want |= {"name": f"reference_{plain.name}", "seed": 1997}
    want["objective"]["gather"] = False
    if plain.objective.name == "vicreg":
        want["objective"] |= {"eps": 1e-6, "center": True}
    else:
        want["objective"] |= {"unbiased": True, "eps": 0}
    if plain.embedding.stochastic != "none":
        want["embedding"] |= {"kl": "mc", "mixture_mode": "reference"}
    want["optim"]["exclude"] = ()
    want["train"]["precision"] = "fp16"
    if "cifar10" in name:
        want["data"]["limit"] = 40_000
        want["probe"]["split"] = "rest"
    assert reference.model_dump() == want


def test_no_key_is_a_boolean_in_yaml():
    """`on`, `off`, `yes` and `no` are booleans in YAML 1.1: a key of that name cannot be written in a file."""
    for key in recipe_keys():
        assert yaml.safe_load(f"{key}: 1") == {key: 1}, key


def test_shipped_recipes_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("recipes/zprob_barlow.yaml").name == "zprob_barlow"


@pytest.mark.parametrize(
    "name, file",
    [
        ("zprob_barlow", "zprob_barlow.yaml"),
        ("barlow.yaml", "barlow.yaml"),  # and not those in cifar10 and reference
        ("cifar10/barlow", "cifar10/barlow.yaml"),
        ("recipes/cifar10/barlow", "cifar10/barlow.yaml"),
        ("byol", "beyond/byol.yaml"),
        ("ablation_cifar10", "sweeps/ablation_cifar10.yaml"),
    ],
)
def test_a_shipped_recipe_is_found_by_its_name(name, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe(Path(name)) == shipped_recipes() / file
    (tmp_path / Path(name).with_suffix("")).mkdir(parents=True)  # a folder of that name is no recipe
    assert find_recipe(Path(name)) == shipped_recipes() / file
    own = tmp_path / Path(name).with_suffix(".yaml")
    own.touch()  # a file of the user comes first
    assert find_recipe(Path(name)).resolve() == own


@pytest.mark.parametrize("name", ["barlo", "arlow", "cifar/barlow", "x/recipes/barlow", "/recipes/barlow", "a" * 5000])
def test_no_recipe_is_found_by_another_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="No recipe"):
        find_recipe(Path(name))


def test_overrides_reach_every_kind_of_value(minimal):
    recipe = load_recipe(
        minimal,
        ["train.epochs=3", "optim.lr=1e-2", "views.scale=[0.2,1]", "objective.name=vicreg", "optim.clip=null",
         "views.eval=center", "model.projector.out=64", "train.compile=false", "optim.exclude=[]"],
    )  # fmt: skip
    assert recipe.train.epochs == 3 and recipe.optim.lr == 1e-2 and recipe.views.scale == (0.2, 1)
    assert recipe.objective.name == "vicreg" and recipe.objective.inv == 25 and recipe.optim.clip is None
    assert recipe.views.eval == "center" and recipe.model.projector.out == 64
    assert recipe.train.compile is False and recipe.optim.exclude == ()


def test_loading_does_not_touch_data(minimal):
    assert load_recipe(minimal, ["data.train=/nowhere/at/all.beton"]).data.train == "/nowhere/at/all.beton"


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.epoch=3", "did you mean train.epochs?"),
        ("epochs=3", "did you mean train.epochs?"),
        ("views.jiter.hue=0", "did you mean views.jitter?"),
        ("objective.lamda=0.1", "did you mean objective.lambd?"),
        ("objective.name=barlow", "barlow_twins"),
        ("train.epochs=many", "train.epochs"),
        ("train.epochs=2.5", "train.epochs"),
        ("train.batch_size=1", "train.batch_size"),
        ("views.scale=[0.5]", "views.scale"),
        ("views.scale=[1,0.5]", "views.scale"),
        ("views.flip=1.5", "views.flip"),
        ("seed=-1", "seed"),
        ("seed.x=1", "seed"),
        ("train.precision=fp8", "train.precision"),
        ("train.epochs", "key=value"),
        ("data.train={", "data.train"),
        ("embedding={prior: mixture, kl: closed}", "embedding.kl=mc"),
    ],
)
def test_error_for_a_wrong_override_names_the_key(minimal, override, message):
    with pytest.raises(UserError) as error:
        load_recipe(minimal, ["seed=0", "objective.name=barlow_twins", override])
    sentence = str(error.value)
    assert message in sentence and "\n" not in sentence


@pytest.mark.parametrize(
    "override, hint",
    [
        ("log.to=wandb", "write log.to=[wandb]"),
        ("log.to=wand", "write log.to=[wandb]"),
        ("log.to=disk", "its values are tensorboard or wandb, as in log.to=[tensorboard]"),
        ("log.to=[tensorboard, wand]", "did you mean wandb?"),
        ("log.to=[disk]", "choose one of these"),
        ("views.mean=0.5", "write views.mean=[0.5]"),
        ("views.scale=0.5", "write it like views.scale=[0.08,1]"),
        ("embedding.stochastic=y", "choose one of these"),
        ("train.compile=3", "choose one of these"),
        ("train.compile=autos", "did you mean train.compile=auto?"),
        ("train.precision=fp61", "did you mean train.precision=fp16?"),
        ("objective.name=true", "choose one of these"),
        ("train.epochs=x", "write it like train.epochs=100"),
    ],
)
def test_the_hint_about_a_wrong_value_keeps_the_method(minimal, override, hint):
    with pytest.raises(UserError) as error:
        load_recipe(minimal, [override])
    assert error.value.hint == hint


@pytest.mark.parametrize(
    "override, written", [("train.epochs=", "null"), ("embedding.stochastic=true", "true"), ("train.epochs=a", "'a'")]
)
def test_a_wrong_value_is_quoted_as_in_yaml(minimal, override, written):
    with pytest.raises(UserError) as error:
        load_recipe(minimal, [override])
    assert error.value.message.endswith(f", got {written}")


def test_only_the_faults_of_a_file_name_it(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("name: x\ndata: {train: x}\ntrain: {epochs: 0}\n")
    for overrides in [], ["seed=1"]:
        with pytest.raises(UserError, match=f"^{path}: train.epochs must be"):
            load_recipe(path, overrides)
    with pytest.raises(UserError, match="^train.epochs must be an integer, got 'abc'"):
        load_recipe(path, ["train.epochs=abc"])
    with pytest.raises(UserError, match="^unknown key train.epoch:"):
        load_recipe("zprob_barlow", ["train.epoch=1"])


def test_a_sweep_in_place_of_a_recipe_and_the_reverse():
    with pytest.raises(UserError, match="is a sweep, not a recipe: run it with `fastssl sweep ablation_cifar10`"):
        load_recipe("ablation_cifar10")
    with pytest.raises(UserError, match="is a recipe, not a sweep: train it with `fastssl train zprob_barlow`"):
        load_sweep("zprob_barlow")


@pytest.mark.parametrize(
    "text, message",
    [
        ("name: x\n", "data is missing"),
        ("- a\n- b\n", "not a recipe"),
        ("name: [", "not readable as YAML"),
        ("name: !!python/object/apply:os.system ['touch /tmp/owned']\ndata: {train: x}\n", "not readable as YAML"),
    ],
)
def test_error_for_a_wrong_file_names_it(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_recipe(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_error_for_a_missing_recipe_names_the_nearest():
    with pytest.raises(UserError, match="did you mean recipes/zprob_barlow.yaml"):
        load_recipe("recipes/zprob_barlo.yaml")


def test_dumped_recipe_holds_every_key(minimal):
    dumped = yaml.safe_load(load_recipe(minimal).to_yaml())
    assert set(dumped) == set(Recipe.model_fields)
    assert dumped["views"]["jitter"]["hue"] == 0.1


@pytest.mark.parametrize(
    "overrides, named",
    [
        (["model.in_chans=1"], "views.mean has 3 values"),
        (["model.in_chans=5", "views.mean=[0.5]"], "views.std has 3 values"),
        (["model.in_chans=2", "views.mean=[0.5, 0.4, 0.3]", "views.std=[1]"], "views.mean has 3 values"),
        (["views.mean=[0.5, 0.4]"], "views.mean has 2 values"),
        (["views.mean=[]"], "views.mean must be a list of 1 or more"),
        (["model.in_chans=0"], "model.in_chans must be"),
        (["model.in_chans=65"], "model.in_chans must be"),
        (["model.in_chans=1", "views.mean=[0.5]", "views.std=[1]", "views.kernel=triton"], "views.kernel=triton makes"),
    ],
)
def test_mean_std_and_kernel_fit_the_number_of_channels(minimal, overrides, named):
    with pytest.raises(UserError, match=named):
        load_recipe(minimal, overrides)


@pytest.mark.parametrize("in_chans, values", [(1, "[0.5]"), (5, "[0.5]"), (3, "[0.5]"), (2, "[0.5, 0.4]")])
def test_recipes_of_other_channels_survive_a_round_trip(minimal, in_chans, values):
    recipe = load_recipe(minimal, [f"model.in_chans={in_chans}", f"views.mean={values}", f"views.std={values}"])
    minimal.write_text(recipe.to_yaml())
    assert load_recipe(minimal) == recipe


@pytest.mark.parametrize("objective", [torch.tensor(1.0), 3, "vicreg", ["vicreg"], None, object()])
def test_an_objective_that_is_no_section_is_one_sentence(objective):
    """A checkpoint may hold anything in the place of a recipe's section."""
    with pytest.raises(ValidationError) as error:
        Recipe.model_validate({"name": "x", "data": {"train": "x.beton"}, "objective": objective})
    assert str(explain(error.value, Recipe)).startswith(("objective", "the key objective.name"))

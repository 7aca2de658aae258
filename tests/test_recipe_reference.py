"""The reference of recipe keys: complete, with the defaults that act, and the same in the docs."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fastssl.common.errors import UserError
from fastssl.recipe import OBJECTIVES, make_recipe, recipe_keys
from fastssl.recipe_reference import keys_below, sections

KEYS = [key for section in sections() for key in section.keys]


def values_of(recipe):
    """By dotted key, every value of a recipe as plain data."""

    def walk(values, prefix):
        for name, value in values.items():
            yield prefix + name, value
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{name}.")

    return dict(walk(recipe.model_dump(mode="json"), ""))


def six_digits(value):
    if isinstance(value, list):
        return [six_digits(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def test_every_key_is_listed_with_a_meaning():
    listed = {key.name for key in KEYS}
    missing = {name for name in recipe_keys() if not any(f"{key}.".startswith(f"{name}.") for key in listed)}
    assert not missing and listed <= set(recipe_keys())
    for key in KEYS:
        assert len(key.meaning) >= 5, f"{key.name} has no comment in recipe.py"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_defaults_are_those_of_a_recipe(objective):
    values = {"name": "x", "data": {"train": "x.beton"}, "objective": {"name": objective}}
    if objective == "supervised":
        values["objective"]["classes"] = 2
    actual = values_of(make_recipe(values))
    checked = 0
    for section in sections():
        if section.title == f"objective, with name: {objective}" or not section.title.startswith("objective"):
            for key in section.keys:
                if key.default != "required":
                    assert yaml.safe_load(key.default) == six_digits(actual[key.name]), key
                    checked += 1
    assert checked > 70


def test_types_in_words():
    types = {key.name: key.type for key in KEYS}
    assert types["train.epochs"] == "integer (1 or more)"
    assert types["views.flip"] == "number (0 to 1)"
    assert types["data.train"] == "path" and types["data.val"] == "path or null"
    assert types["train.compile"] == "auto, true or false"
    assert types["views.scale"] == "list of 2 numbers" and types["views.std"] == "list of numbers"
    assert types["train.ema"] == "number (above 0, below 1) or null"
    assert types["log.rank_every"] == "epoch or integer (0 or more)"


def test_the_page_in_the_docs_is_up_to_date():
    command = [sys.executable, "-m", "fastssl.recipe_reference"]
    page = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    docs = Path(__file__).parents[1] / "docs/recipe.md"
    assert docs.read_text() == page, "run: python -m fastssl.recipe_reference > docs/recipe.md"


def test_keys_of_one_section():
    assert [key.name for section in keys_below("run") for key in section.keys] == ["run.dir"]
    blur_and_solarize = ["views.first.blur", "views.first.solarize"]
    assert [key.name for section in keys_below("views.first") for key in section.keys] == blur_and_solarize
    assert len(keys_below("objective")) == 1 + len(OBJECTIVES)


@pytest.mark.parametrize(
    "wrong, near", [("trian", "train"), ("views.jiter", "views.jitter"), ("epochs", "train.epochs")]
)
def test_an_unknown_section_names_near_ones(wrong, near):
    with pytest.raises(UserError, match=f"did you mean.*{near}"):
        keys_below(wrong)


def test_the_command_fits_80_columns(fastssl, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = fastssl("recipes", "keys")
    assert code == 0 and max(map(len, out.splitlines())) <= 80
    words = " ".join(out.split())
    for key in KEYS:
        default = "" if key.default == "required" else f"={key.default}"
        assert f"{key.name}{default} {key.type}" in words and key.meaning in words
    assert fastssl("recipes", "keys", "train.epochs")[1].split()[:2] == ["train", "train.epochs=100"]

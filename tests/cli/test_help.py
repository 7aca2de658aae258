"""The help of every command: it fits 80 columns, and its examples are real commands."""

import shlex
from pathlib import Path

import pytest
import typer.main

from fastssl import __version__, cli
from fastssl.recipe import find_recipe, load_recipe


def all_commands(group, *names):
    """Yield the names and the command of every command below a group."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from all_commands(command, *names, name)
        else:
            yield (*names, name), command


TOP = typer.main.get_command(cli.app)
COMMANDS = dict(all_commands(TOP))
GROUPS = [(), *sorted({names[:-1] for names in COMMANDS if len(names) > 1})]


def examples(command):
    """The command lines at the end of a command's help."""
    heading, *lines = command.epilog.replace("\\\n", " ").replace("\\[", "[").splitlines()
    assert heading == "Examples:"
    return [line.strip() for line in lines]


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("names", [*GROUPS, *COMMANDS], ids=" ".join)
def test_help_fits_80_columns(fastssl, names, option, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = fastssl(*names, option)
    assert code == 0 and max(map(len, out.splitlines())) <= 80
    assert "<bool>" not in out  # switches take no value
    for line in COMMANDS[names].epilog.splitlines() if names in COMMANDS else ():
        assert line.strip().replace("\\[", "[") in out  # not wrapped


@pytest.mark.parametrize("names", COMMANDS, ids=" ".join)
def test_examples_are_commands_that_parse(names):
    command = COMMANDS[names]
    assert 1 <= len(examples(command)) <= 5
    for line in examples(command):
        program, _, given = line.partition(" -m fastssl " if line.startswith("torchrun") else "fastssl ")
        words = shlex.split(given)
        assert program in ("", "torchrun --nproc-per-node 8") and tuple(words[: len(names)]) == names, line
        values = command.make_context(names[-1], words[len(names) :]).params
        recipe = values.get("recipe") or values.get("file")
        if names[-1] == "sweep":
            find_recipe(Path(recipe))
        elif str(recipe).endswith(".json"):
            assert values["plan"], f"{line}: a saved profile is for --plan"
        elif recipe and ".beton" not in str(recipe):
            load_recipe(recipe, values.get("overrides") or [])


@pytest.mark.parametrize("names", COMMANDS, ids=" ".join)
def test_every_option_is_explained_in_a_sentence(names):
    for param in COMMANDS[names].params:
        assert param.help[0].isupper() or param.help.startswith(("auto: ", "timm", "small: ", "3: ")), param.name
        assert param.help.endswith("."), param.name


def test_the_top_help_lists_every_command_in_the_order_of_use(fastssl):
    out = fastssl("--help")[1]
    order = (
        "doctor",
        "demo",
        "recipes",
        "build-beton",
        "inspect",
        "train",
        "profile",
        "sweep",
        "eval",
        "report",
        "embed",
        "export",
    )
    positions = [out.index(f" {name} ") for name in order]
    assert positions == sorted(positions) and set(order) == set(TOP.commands)


def test_version(fastssl):
    assert fastssl("--version") == (0, f"fastssl {__version__}\n", "")

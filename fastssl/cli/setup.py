"""`fastssl doctor`, `fastssl demo` and `fastssl recipes`: check the machine, try it, choose a recipe."""

import os
import re
import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Option, Typer

from fastssl.cli.help import Command, Group
from fastssl.common.errors import UserError
from fastssl.common.files import explain_write_errors, write_atomically
from fastssl.common.terminal import print_line, printable
from fastssl.recipe import find_recipe, read_recipe_text, shipped_recipes

recipes = Typer(cls=Group, help="List, show and copy the recipes, and explain their keys.", no_args_is_help=True)
RecipeName = Annotated[str, Argument(metavar="RECIPE", help="A YAML file, or the name of a recipe of `ls`.")]


def doctor() -> None:
    """Check this machine, and show the command that fixes each fault.

    Examples:
      fastssl doctor
    """
    from fastssl import doctor

    sys.exit(doctor.main())


def demo(
    seed: Annotated[int, Option(min=0, metavar="N", help="Seed of the weights, the views and the noise.")] = 0,
) -> None:
    """Train on 3,200 handwritten digits for two to five minutes, and show what the encoder has learned.

    Examples:
      fastssl demo
      fastssl demo --seed 1
    """
    from fastssl.demo import run_demo

    run_demo(seed)


# The folders of the shipped recipes, beginners first, and what their recipes have in common.
TO_TRY = "To try the installation: fastssl demo"
FOLDERS = {
    "": "ImageNet, ResNet-18, 100 epochs",
    "cifar10": "CIFAR-10, ResNet-18, 200 epochs",
    "beyond": "Beyond the paper: ImageNet, ResNet-18 if no other is named, 100 epochs",
    "reference": "As published (docs/fidelity.md): ImageNet, or CIFAR-10 if the name says so",
    "sweeps": "Many runs from one file: fastssl sweep NAME",
}
IN_COMMON = re.compile(r": (ImageNet|CIFAR-10)( as published)?(, ResNet-18)?, [0-9]+ epochs\.$")


@recipes.command(cls=Command)
def ls() -> None:
    """List the recipes.

    Examples:
      fastssl recipes ls
    """
    from rich.table import Table
    from rich.text import Text

    from fastssl.common.terminal import console

    screen = console()
    groups: dict[str, dict[str, str]] = {TO_TRY: {}, **{title: {} for title in FOLDERS.values()}}
    for file in sorted(shipped_recipes().rglob("*.yaml")):
        name = str(file.relative_to(shipped_recipes()).with_suffix(""))
        title = TO_TRY if name == "demo" else FOLDERS[name.rpartition("/")[0]]
        first_line = file.read_text().partition("\n")[0].removeprefix("# ")
        groups[title][name] = IN_COMMON.sub("", first_line).removesuffix(".")
    for title, group in groups.items():
        screen.print(Text(title, "bold"))
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for name, description in group.items():
            table.add_row(Text(name, no_wrap=True), Text(description))
        screen.print(table)
        screen.print()
    print_line(screen, "h: the encoder's output; z: the projector's; stochastic: a Gaussian per image.")
    print_line(screen, "fastssl recipes show NAME prints a recipe; fastssl train NAME trains it.")


@recipes.command(cls=Command)
def show(recipe: RecipeName) -> None:
    """Print a recipe, with its comments.

    Examples:
      fastssl recipes show zprob_barlow
      fastssl recipes show cifar10/barlow
    """
    lines = read_recipe_text(find_recipe(Path(recipe))).splitlines()
    print("\n".join(printable(line) for line in lines))


@recipes.command(cls=Command)
def copy(
    recipe: RecipeName, to: Annotated[Path, Argument(metavar="FILE", help="File to write, which must not exist.")]
) -> None:
    """Copy a recipe to a file of your own, to change it.

    Examples:
      fastssl recipes copy zprob_barlow mine.yaml
    """
    text = read_recipe_text(find_recipe(Path(recipe)))
    if os.path.lexists(to):
        raise UserError(f"{to} exists already", hint="name another file")
    with explain_write_errors(to):
        write_atomically(to, text)


@recipes.command(cls=Command)
def keys(
    section: Annotated[
        str | None, Argument(metavar="SECTION", help="Show only these keys, such as train or views.jitter.")
    ] = None,
) -> None:
    """Show the keys of a recipe: default, type and meaning.

    Examples:
      fastssl recipes keys
      fastssl recipes keys train
      fastssl recipes keys views.jitter
    """
    from rich.padding import Padding
    from rich.text import Text

    from fastssl.common.terminal import console
    from fastssl.recipe_reference import keys_below, sections

    screen = console()
    for number, group in enumerate(keys_below(section) if section else sections()):
        screen.print(Text(("\n" if number else "") + (group.title or "recipe"), style="bold"))
        if group.about:
            screen.print(Padding(Text(group.about), (0, 0, 0, 2), expand=False))
        for key in group.keys:
            if key.default == "required":
                line = Text(f"{key.name}  ").append(f"{key.type}, required", "dim")
            else:
                line = Text(f"{key.name}={key.default}  ").append(key.type, "dim")
            screen.print(Padding(line, (0, 0, 0, 2), expand=False))
            screen.print(Padding(Text(key.meaning), (0, 0, 0, 6), expand=False))

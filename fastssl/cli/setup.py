"""`fastssl doctor`, `fastssl demo` and `fastssl recipes`: check the machine, try it, choose a recipe."""

import os
import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Option, Typer

from fastssl.common.errors import UserError
from fastssl.common.files import explain_write_errors, write_atomically
from fastssl.common.terminal import printable
from fastssl.recipe import find_recipe, read_recipe_text, shipped_recipes

recipes = Typer(help="List, show and copy the recipes that come with fastssl.", no_args_is_help=True)
RecipePath = Annotated[str, Argument(help="such as recipes/zprob_barlow.yaml")]


def doctor() -> None:
    """Check what this machine has and lacks, and show the command that fixes each fault."""
    from fastssl import doctor

    sys.exit(doctor.main())


def demo(seed: Annotated[int, Option(min=0, help="Of the weights, the views and the noise.")] = 0) -> None:
    """Train on 3,200 handwritten digits for two minutes and show what the encoder has learned."""
    from fastssl.demo import run_demo

    run_demo(seed)


@recipes.command()
def ls() -> None:
    """List the shipped recipes."""
    for path in sorted(shipped_recipes().rglob("*.yaml")):
        first_line = path.read_text().split("\n")[0].removeprefix("# ")
        print(f"recipes/{path.relative_to(shipped_recipes())!s:<36} {first_line}")


@recipes.command()
def show(recipe: RecipePath) -> None:
    """Print a recipe."""
    lines = read_recipe_text(find_recipe(Path(recipe))).splitlines()
    print("\n".join(printable(line) for line in lines))


@recipes.command()
def copy(recipe: RecipePath, to: Annotated[Path, Argument(help="file to write, which must not exist")]) -> None:
    """Copy a recipe to a file, to change it."""
    text = read_recipe_text(find_recipe(Path(recipe)))
    if os.path.lexists(to):
        raise UserError(f"{to} exists already: name another file.")
    with explain_write_errors(to):
        write_atomically(to, text)

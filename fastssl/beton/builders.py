"""The builders, found by name in the package beton_builders."""

import difflib
import importlib
import pkgutil
from types import ModuleType

from fastssl.common.errors import UserError


def builder_names() -> list[str]:
    package = importlib.import_module("beton_builders")
    names = (module.name for module in pkgutil.iter_modules(package.__path__))
    return sorted(name for name in names if not name.startswith("_"))


def describe_builders() -> dict[str, tuple[str, bool]]:
    """For each builder the first line of its documentation, and whether it can download."""
    modules = {name: load_builder(name) for name in builder_names()}
    return {
        name: (module.__doc__.strip().split("\n")[0], hasattr(module, "DOWNLOAD")) for name, module in modules.items()
    }


def load_builder(name: str) -> ModuleType:
    """The module beton_builders.NAME; an unknown name is refused with the nearest one."""
    names = builder_names()
    if name not in names:
        nearest = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {nearest[0]}?" if nearest else "there is none of a similar name."
        raise UserError(f"Unknown builder {name!r}; {hint} Builders: {', '.join(names)}.")
    return importlib.import_module(f"beton_builders.{name}")

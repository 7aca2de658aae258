"""What `fastssl` says about a command line that it cannot parse: a mistyped option, a missing argument."""

import difflib
from contextlib import suppress
from pathlib import Path
from typing import Any

import typer
from pydantic import ValidationError

from fastssl.common.errors import UserError, in_short
from fastssl.common.validation import any_of, choices_of, requirement
from fastssl.recipe import recipe_keys

UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # typer has no public name for it
GROUPS = ("eval", "recipes")  # commands with commands of their own


# Any: typer does not export the types of its errors and contexts.
def explain_usage_error(error: Any, arguments: list[str]) -> UserError:
    """Typer's error about the `arguments`, with the nearest option, command or recipe key as the hint."""
    context = error.ctx
    command = context.command_path if context else _command_of(arguments)
    message = in_short(error.format_message()).removesuffix(".")
    fix = f"`{command} --help` shows how to call it"
    if message.startswith("Got unexpected extra") and _names_shards(arguments):
        return UserError(
            f"{command} takes one path here, and the shell has put the names of several shards there",
            hint="put the pattern in quotes",
        )
    if message.startswith("No such option"):
        return UserError(f"{command} has no option {error.option_name}", hint=_near_option(error, arguments))
    if message.startswith("No such command"):
        wrong = error.message.split("'")[1]
        near = difflib.get_close_matches(wrong, list(context.command.commands), n=2, cutoff=0.5)
        if near:
            fix = f"did you mean {any_of([f'{command} {each}' for each in near])}?"
        return UserError(f"{command} has no command '{wrong}'", hint=fix)
    if isinstance(error.__cause__, ValidationError):
        given = error.__cause__.errors()[0]
        with suppress(TypeError, ValueError):
            given["input"] = int(given["input"])  # quoted as a number
        return UserError(f"{error.param.opts[0]} {requirement([given])}", hint=_fix_of(error.param, given) or fix)
    if message.startswith("Missing"):
        param = error.param
        name = param.opts[0] if param.param_type_name == "option" else param.metavar or param.name.upper()
        meaning = param.help[:1].lower() + param.help[1:].removesuffix(".")
        return UserError(f"{command} needs {name}: {meaning}", hint=fix)
    return UserError(f"{command}: {message[0].lower()}{message[1:]}", hint=fix)


def _fix_of(param: Any, given: Any) -> str | None:
    """The choice most like a wrong value of an option, or its default where that is a number."""
    option = param.opts[-1]
    if choices := choices_of(given):
        near = difflib.get_close_matches(str(given["input"]), choices, n=1)
        return f"did you mean {option} {near[0]}?" if near else "choose one of these"
    is_number = isinstance(param.default, int | float) and not isinstance(param.default, bool)
    return f"write it like {option} {param.default}" if is_number else None


def _names_shards(arguments: list[str]) -> bool:
    from fastssl.beton.shards import is_shard  # imports what a --help does not need

    return sum(is_shard(Path(each)) for each in arguments) > 1


def _command_of(arguments: list[str]) -> str:
    words = ["fastssl", *(word for word in arguments[:1] if word[0] != "-")]
    return " ".join(words + arguments[1:2] if words[-1] in GROUPS else words)


def _near_option(error: Any, arguments: list[str]) -> str:
    """`--epochs 3` means the recipe key train.epochs=3 to commands that take recipe keys."""
    option, context = error.option_name, error.ctx
    params = context.command.params
    takes = {param.name for param in params} & {"overrides", "set_"}
    word = option.lstrip("-").replace("-", "_")
    keys = [key for key in recipe_keys() if f".{key}".endswith(f".{word}")] if takes else []
    if keys:
        value = _value_after(option, arguments)
        depth = min(key.count(".") for key in keys)
        written = any_of([f"{key}={value}" for key in keys if key.count(".") == depth][:3])
        return f"write {written}" + (" after --set" if "set_" in takes else "; keys of the recipe have no dashes")
    options = [each[2:] for param in params for each in param.opts if each.startswith("--")] + ["help", "debug"]
    near = [f"--{each}" for each in difflib.get_close_matches(option.lstrip("-"), options, n=2, cutoff=0.6)]
    if takes and not near:
        deepest_first = sorted(recipe_keys(), key=lambda key: -key.count("."))
        last_words = {key.rpartition(".")[2]: key for key in deepest_first}
        near = [f"{last_words[each]}=VALUE" for each in difflib.get_close_matches(word, last_words, n=2, cutoff=0.6)]
    return f"did you mean {any_of(near)}?" if near else f"`{context.command_path} --help` lists the options"


def _value_after(option: str, arguments: list[str]) -> str:
    """The value of --option value or --option=value."""
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        if argument == option and following and not following.startswith("-"):
            return following
        if argument.startswith(f"{option}="):
            return argument.partition("=")[2]
    return "VALUE"

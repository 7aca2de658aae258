"""Pydantic's errors in plain words: "must be an integer, got 'abc'"."""

import re
from collections.abc import Sequence
from typing import Any

from fastssl.common.errors import in_short, quote

# What a value must be, by the type of pydantic's error; {names} are of the error's context.
WANTED = {
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_parsing_size": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "less than {lt}",
    "less_than_equal": "{le} or less",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a group of keys",
    "model_type": "a group of keys",
    "model_attributes_type": "a group of keys",
    "too_short": "a list of {min_length} or more values",
    "too_long": "a list of {max_length} or fewer values",
}


def requirement(errors: Sequence[Any]) -> str:
    """What one value must be and what it is, from the errors of every type that it may have."""
    wanted: list[str] = []
    for error in errors:
        wanted += [each for each in _wanted(error) if each not in wanted]
    return f"must be {any_of(wanted)}, got {quote(errors[0]['input'])}"


def choices(errors: Sequence[Any]) -> list[str]:
    """The words that the value may be."""
    return [each for error in errors if error["type"] == "literal_error" for each in _wanted(error)]


def any_of(words: Sequence[str]) -> str:
    """a, b or c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _wanted(error: Any) -> list[str]:
    context = error.get("ctx", {})
    if error["type"] == "literal_error":
        return re.findall(r"'([^']*)'", context["expected"])
    if error["type"] in ("bool_type", "bool_parsing"):
        return ["true", "false"]
    if error["type"] in WANTED:
        return [WANTED[error["type"]].format(**context)]
    # Another message of pydantic or of ours, such as "Input should be a path".
    message = in_short(error["msg"]).removeprefix("Value error, ").removesuffix(".")
    if among := re.search(r"is not one of (.*)$", message):  # typer's, of an option with choices
        return re.findall(r"'([^']*)'", among[1])
    return [message.removeprefix("Input should be ").removeprefix("Input should ")]

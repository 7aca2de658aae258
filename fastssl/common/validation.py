"""Pydantic's errors in plain words: "must be an integer, got 'abc'"."""

import difflib
import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from fastssl.common.errors import in_short, quote

# What a value must be, by the type of pydantic's error; {names} are of the error's context.
WANTED = {
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_parsing_size": "an integer of fewer digits",
    "int_from_float": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "less than {lt}",
    "less_than_equal": "{le} or less",
    "string_type": "text",
    "string_too_long": "text of {max_length} characters or fewer",
    "string_pattern_mismatch": "text that matches {pattern}",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a group of keys",
    "model_type": "a group of keys",
    "model_attributes_type": "a group of keys",
    "too_short": "a list of {min_length} or more values",
    "too_long": "of at most {max_length} values",
    "missing": "a list of more values",  # of a tuple; a missing key is no wrong value
}


class InvalidValues(ValueError):
    """Raised by validators of ours: values that do not go together, and what to change."""

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def requirement(errors: Sequence[Any]) -> str:
    """What one value must be and what it is, from the errors of every type that it may have."""
    wanted: list[str] = []
    for error in errors:
        wanted += [each for each in _wanted(error) if each not in wanted]
    return f"must be {any_of(wanted)}, got {quote(errors[0]['input'])}"


def any_of(words: Sequence[str]) -> str:
    """a, b or c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def value_hint(key: str, errors: Sequence[Any], default: object) -> str:
    """What to write in place of a wrong value: the most similar word that it may be, else its default."""
    words = [each for error in errors if error["type"] == "literal_error" for each in _wanted(error)]
    if near := difflib.get_close_matches(quote(errors[0]["input"]).strip("'"), words, n=1):
        return f"did you mean {key}={near[0]}?"
    if isinstance(default, bool):
        return f"write it like {key}={str(default).lower()}"
    if isinstance(default, tuple):
        return f"write it like {key}=[{','.join(str(_in_short(each)) for each in default)}]"
    if isinstance(default, str | int | float):
        return f"write it like {key}={default}"
    return f"correct {key}" if default is PydanticUndefined else f"leave out {key}"


def keys_of(section: type[BaseModel], prefix: str = "") -> dict[str, object]:
    """All dotted keys of a section and of the sections in it, which are included themselves, with their defaults."""
    found: dict[str, object] = {}
    for name, field in section.model_fields.items():
        found[prefix + name] = field.default
        below = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for kind in below:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found = {**keys_of(kind, prefix + name + "."), **found}
    return found


def nearest_key(parts: list[str], keys: Sequence[str]) -> str | None:
    """The known key most like a mistyped one: in the same section, else with the same last word, else anywhere."""
    siblings = [key for key in keys if key.split(".")[:-1] == parts[:-1]]
    close = difflib.get_close_matches(".".join(parts), siblings, n=1, cutoff=0.6)
    close = close or sorted((key for key in keys if key.split(".")[-1] == parts[-1]), key=lambda key: key.count("."))
    close = close or difflib.get_close_matches(".".join(parts), keys, n=1, cutoff=0.6)
    return close[0] if close else None


def _in_short(value: object) -> object:
    """1 for 1.0, and at most 4 digits of other floats."""
    return f"{value:.4g}" if isinstance(value, float) else value


def _wanted(error: Any) -> list[str]:
    context = error.get("ctx", {})
    if error["type"] == "literal_error":
        return re.findall(r"'([^']*)'", context["expected"])
    if error["type"] in ("bool_type", "bool_parsing"):
        return ["true", "false"]
    if error["type"] in WANTED:
        return [WANTED[error["type"]].format(**{name: _in_short(value) for name, value in context.items()})]
    # Another message of pydantic or of ours, such as "Input should be a path".
    message = in_short(error["msg"]).removeprefix("Value error, ").removesuffix(".")
    if among := re.search(r"is not one of (.*)$", message):  # typer's, of an option with choices
        return re.findall(r"'([^']*)'", among[1])
    return [message.removeprefix("Input should be ")]

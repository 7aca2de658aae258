"""Pydantic's errors in plain words: "must be an integer, got 'abc'"."""

import difflib
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
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
CHOICES = ("literal_error", "bool_type", "bool_parsing")  # types of errors whose messages list all legal values


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
    return f"must be {any_of(wanted)}, got {as_written(errors[0]['input'])}"


def as_written(value: object) -> str:
    """The value as in YAML, which has true, false and null where Python has True, False and None."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else quote(value)


def any_of(words: Sequence[str]) -> str:
    """a, b or c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def value_hint(key: str, errors: Sequence[Any], field: FieldInfo) -> str:
    """What to write in place of a wrong value: the most similar word that it may be, else its default."""
    default = field.default
    if isinstance(default, tuple):
        return _list_hint(key, errors[0], field)
    choices = [word for error in errors if error["type"] in CHOICES for word in _wanted(error)]
    if near := difflib.get_close_matches(_bare(errors[0]["input"]), choices, n=1):
        return f"did you mean {key}={near[0]}?"
    if all(error["type"] in CHOICES for error in errors):
        return "choose one of these"
    if isinstance(default, str | int | float):
        return f"write it like {key}={_in_short(default)}"
    return f"correct {key}" if default is PydanticUndefined else f"leave out {key}"


def _list_hint(key: str, error: Any, field: FieldInfo) -> str:
    """The list of the given value if that is one of its items, else a list of a similar word, else the default."""
    given, words = error["input"], _words_of(field.annotation)
    near = difflib.get_close_matches(_bare(given), words, n=1)
    if error["type"] not in ("list_type", "tuple_type") and words:  # an item is wrong
        return f"did you mean {near[0]}?" if near else "choose one of these"
    for item in (given, *near):
        if isinstance(item, str | int | float) and _is_legal([item], field):
            return f"write {key}=[{_bare(item)}]"
    if words:
        return f"its values are {any_of(words)}, as in {key}=[{words[0]}]"
    return f"write it like {key}=[{','.join(str(_in_short(each)) for each in field.default)}]"


def _words_of(annotation: Any) -> list[str]:
    """The words of all Literals in a type."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [word for part in get_args(annotation) for word in _words_of(part)]


def _is_legal(value: object, field: FieldInfo) -> bool:
    kind: Any = Annotated[field.annotation, *field.metadata, None]
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError:
        return False
    return True


def _bare(value: object) -> str:
    return as_written(value).strip("'")


def keys_of(section: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """All dotted keys of a section and of the sections in it, which are included themselves, with their fields."""
    found: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        found[prefix + name] = field
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


def choices_of(error: Any) -> list[str]:
    """All legal words, if the error is about a value that must be one of some."""
    return _wanted(error) if error["type"] in CHOICES or "is not one of" in error["msg"] else []


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

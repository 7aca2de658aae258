"""Every key of a recipe with its type, default and meaning, which is the comment at the key in recipe.py.

`fastssl recipes keys` shows them; docs/recipe.md is written by `python -m fastssl.recipe_reference > docs/recipe.md`.
"""

import ast
import difflib
import inspect
import io
import tokenize
from collections.abc import Iterator, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fastssl import recipe
from fastssl.common.errors import UserError, quote
from fastssl.recipe import OBJECTIVES, Recipe, recipe_keys

LARGEST = 10**6  # limits from here on only keep the numbers of values in tensors from overflowing: not shown


class Key(NamedTuple):
    name: str  # with dots, such as train.epochs
    type: str
    default: str  # in YAML syntax; "required" if there is none
    meaning: str


class Section(NamedTuple):
    title: str  # such as "train"
    about: str  # one sentence or more; may be empty
    keys: list[Key]


def sections() -> list[Section]:
    """The keys of all sections, in the order of a recipe file."""
    comments = _comments()
    top: list[Key] = []
    found = [Section("", "", top)]
    for name, field in Recipe.model_fields.items():
        if name == "objective":
            found += _objectives(comments)
        elif kind := _section(field):
            default = None if field.is_required() else field.default
            found.append(Section(name, _about(kind), list(_keys(kind, default, f"{name}.", comments))))
        else:
            top.append(_key(name, field, field.default, comments[Recipe.__name__, name]))
    return found


def _objectives(comments: dict[tuple[str, str], str]) -> Iterator[Section]:
    name = Key("objective.name", _either(list(OBJECTIVES)), Recipe.model_fields["objective"].default.name, "the loss")
    about = "To choose another objective, write it whole, such as objective='{name: vicreg, cov: 2}'."
    yield Section("objective", about, [name])
    for objective, kind in OBJECTIVES.items():
        keys = [key for key in _keys(kind, None, "objective.", comments) if key.name != name.name]
        yield Section(f"objective, with name: {objective}", _about(kind), keys)


def keys_below(name: str) -> list[Section]:
    """The sections with only the key `name`, or the keys below it, such as those of views.jitter.

    Raises UserError if there are none.
    """
    found = []
    for section in sections():
        keys = [key for key in section.keys if f"{key.name}.".startswith(f"{name}.")]
        if keys:
            found.append(section._replace(keys=keys))
    if not found:
        near = difflib.get_close_matches(name, recipe_keys(), n=3, cutoff=0.5)
        near = near or [key for key in recipe_keys() if key.rpartition(".")[2] == name]
        top = ", ".join(Recipe.model_fields)
        hint = f"did you mean {_either(near)}?" if near else f"the sections are {top}"
        raise UserError(f"a recipe has no section or key {quote(name)}", hint=hint)
    return found


def markdown() -> str:
    """The page docs/recipe.md."""
    lines = [
        "# Keys of a recipe",
        "",
        "<!-- From the comments in fastssl/recipe.py, by `python -m fastssl.recipe_reference > docs/recipe.md`. -->",
        "",
        "A recipe is a YAML file with these keys; `fastssl recipes keys [SECTION]` shows them in a terminal.",
        "Each can be set in the file or on the command line, as in `fastssl train zprob_barlow train.epochs=50`.",
        "Unknown keys are errors.",
    ]
    for section in sections():
        if section.title:
            lines += ["", f"## {section.title}"]
        if section.about:
            lines += ["", section.about]
        lines += ["", "| key | type | default | meaning |", "|---|---|---|---|"]
        for key in section.keys:
            default = key.default if key.default == "required" else f"`{key.default}`"
            lines.append(f"| `{key.name}` | {key.type} | {default} | {key.meaning} |")
    return "\n".join(lines) + "\n"


def _keys(
    kind: type[BaseModel], values: BaseModel | None, prefix: str, comments: dict[tuple[str, str], str]
) -> Iterator[Key]:
    """The keys of a section and of the sections in it. `values` holds the defaults; None: those of the class."""
    for name, field in kind.model_fields.items():
        default = getattr(values, name) if values else field.default
        owner = next(base for base in kind.__mro__ if name in base.__dict__.get("__annotations__", ()))
        below = _section(field)
        if not below or default is None:
            yield _key(prefix + name, field, default, comments[owner.__name__, name])
        if below:
            yield from _keys(below, default, f"{prefix}{name}.", comments)


def _key(name: str, field: FieldInfo, default: Any, meaning: str) -> Key:
    if field.is_required():
        text = "required"
    else:
        text = yaml.safe_dump(_plain(default), default_flow_style=True, width=1000).removesuffix("\n...\n").strip()
    return Key(name, type_name(field.annotation, field.metadata), text, meaning)


def _plain(value: Any) -> Any:
    """Lists for tuples, and numbers of at most six digits."""
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """The class of a field that holds keys."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if inspect.isclass(kind) and issubclass(kind, BaseModel):
            return kind
    return None


def _about(kind: type[BaseModel]) -> str:
    return " ".join((kind.__doc__ or "").split())


def type_name(kind: Any, limits: Sequence[Any] = ()) -> str:
    """A type in words, such as "integer (1 or more)" or "auto, gpu or cpu"."""
    words = _alternatives(kind, limits)
    return _either(words)


def _either(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]


def _alternatives(kind: Any, limits: Sequence[Any]) -> list[str]:
    """What a value may be, null last."""
    arguments = get_args(kind)
    if get_origin(kind) is Annotated:
        return _alternatives(arguments[0], [limit for each in kind.__metadata__ for limit in _flat(each)])
    if get_origin(kind) is Literal:
        return list(arguments)
    if get_origin(kind) in (Union, UnionType):
        return [word for each in arguments for word in _alternatives(each, ())]
    if get_origin(kind) is tuple:
        item = type_name(arguments[0])
        if Ellipsis in arguments:
            return ["list of " + item.replace("number", "numbers")]
        return [f"list of {len(arguments)} " + item.replace("number", "numbers")]
    if kind in (int, float):
        return [("integer" if kind is int else "number") + _range(limits)]
    if kind is str:
        return ["path" if any(getattr(each, "func", None) is recipe._user_path for each in limits) else "text"]
    return {bool: ["true", "false"], NoneType: ["null"]}.get(kind, ["keys"])  # keys: of a section or of optim.options


def _flat(annotation: Any) -> list[Any]:
    return annotation.metadata if isinstance(annotation, FieldInfo) else [annotation]


def _range(limits: Sequence[Any]) -> str:
    """The limits of a number, such as " (0 to 1)" or " (1 or more)"."""
    bounds = {}
    for limit in limits:
        for name in ("ge", "gt", "le", "lt"):
            if (value := getattr(limit, name, None)) is not None and value < LARGEST:
                bounds[name] = value
    if {"ge", "le"} <= bounds.keys():
        return f" ({bounds['ge']} to {bounds['le']})"
    words = {"ge": "{} or more", "gt": "above {}", "lt": "below {}"}
    found = [text.format(bounds[name]) for name, text in words.items() if name in bounds]
    return f" ({', '.join(found)})" if found else ""


def _comments() -> dict[tuple[str, str], str]:
    """The comment of each (class, field) in recipe.py: at the end of its line, else on the lines above."""
    source = inspect.getsource(recipe)
    lines = source.splitlines()
    comment_at = {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    fields = [(node.name, field) for node in classes for field in node.body if isinstance(field, ast.AnnAssign)]
    found = {}
    for owner, field in fields:
        assert isinstance(field.target, ast.Name) and field.end_lineno
        above = field.lineno - 1
        while lines[above - 1].lstrip().startswith("#"):
            above -= 1
        numbers = [field.end_lineno] if field.end_lineno in comment_at else range(above + 1, field.lineno)
        found[owner, field.target.id] = " ".join(comment_at[number] for number in numbers)
    return found


if __name__ == "__main__":
    print(markdown(), end="")

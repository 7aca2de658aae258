"""Every error that a user can cause says what is wrong and what to do: the texts in the source, by its syntax trees."""

import ast
import pickle
import re
from pathlib import Path

import pytest

from fastssl.beton.source import explain_builder_error, how_to_make
from fastssl.common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
ERRORS = ("UserError", "DamagedCheckpoint", "RunDirBusy", "InvalidValues")
# A hint says what to do or offers a choice: it starts with one of these words.
IMPERATIVES = set(
    "add build call change check choose continue copy correct delete describe did end evaluate export for free "
    "give if install leave let load lower make mount move name profile put raise read remove rename repair resume "
    "run save set shorten start take the train try use wait where write".split()
)


def sites() -> list[tuple[str, ast.Call]]:
    """(path:line, call) for each place that makes an error."""
    found = []
    for path in sorted((ROOT / "fastssl").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ERRORS:
                found.append((f"{path.relative_to(ROOT)}:{node.lineno}", node))
    return found


def text_of(node: ast.expr) -> str | None:
    """The text of a string, with {} for values; None for other expressions."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return None


def hint_of(call: ast.Call) -> ast.expr | None:
    return next((keyword.value for keyword in call.keywords if keyword.arg == "hint"), None)


def test_every_error_has_a_hint():
    assert len(sites()) > 250
    assert [where for where, call in sites() if hint_of(call) is None] == []


def test_messages_and_hints_end_without_period_and_hints_say_what_to_do():
    wrong = []
    for where, call in sites():
        message, hint = text_of(call.args[0]), hint_of(call)
        hint_text = None if hint is None else text_of(hint)
        if message is not None and re.search(r"[.,:;?!]$", message):
            wrong.append((where, message))
        if hint_text is not None:
            first = re.match(r"[`A-Za-z-]+|\{\}", hint_text)
            known = first and (first[0] in IMPERATIVES or first[0][0] == "`" or first[0] == "{}")
            if not known or re.search(r"[.,:;!]$", hint_text) or " " not in hint_text.replace("{}", " "):
                wrong.append((where, hint_text))
    assert wrong == []


@pytest.mark.parametrize(
    "error, sentence",
    [
        (UserError("x is missing", hint="make it"), "x is missing: make it."),
        (UserError("x is missing.", hint="make it."), "x is missing: make it."),
        (UserError("unknown key a", hint="did you mean b?"), "unknown key a: did you mean b?"),
        (UserError("x is missing"), "x is missing."),
        (UserError("x: cut ...", hint="cut..."), "x: cut ...: cut..."),
        (UserError("lost", hint="make it").prefixed("Run a: "), "Run a: lost: make it."),
    ],
)
def test_an_error_is_one_sentence_also_after_pickling(error, sentence):
    again = pickle.loads(pickle.dumps(error))
    assert str(error) == str(again) == sentence and again.hint == error.hint


@pytest.mark.parametrize(
    "error, message, hint",
    [
        (ValueError("a.csv lists no images: write one per line."), "a.csv lists no images", "write one per line"),
        (
            ValueError("a.csv must name its columns."),
            "a.csv must name its columns",
            "name the folder or archive of csv",
        ),
        (OSError(5, "Input/output error", "x: y"), "[Errno 5] Input/output error: 'x: y'", "name the folder or"),
    ],
)
def test_the_sentence_of_a_builder_is_divided(error, message, hint):
    explained = explain_builder_error("csv", error)
    assert explained.message == message and (explained.hint or "").startswith(hint)


@pytest.mark.parametrize(
    "path, hint",
    [
        (
            "data/nope.beton",
            "`fastssl build-beton imagefolder --source DIR --out data/nope`, and name data/nope/train.beton",
        ),
        ("data/cifar10/train.beton", "`fastssl build-beton cifar10 --source DIR --download --out data/cifar10`"),
        ("data/cifar10", "`fastssl build-beton cifar10 --source DIR --download --out data/cifar10`"),
        ("data/mnist5k/val.beton", "`fastssl build-beton mnist5k --out data/mnist5k`"),
        ("my data/val.beton", "`fastssl build-beton imagefolder --source DIR --out 'my data'`"),
    ],
)
def test_a_missing_file_comes_with_the_command_that_makes_it(path, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert how_to_make(Path(path)) == f"make it with {hint}"


def test_a_missing_file_comes_with_a_file_of_a_similar_name(tmp_path):
    (tmp_path / "train.beton").touch()
    assert how_to_make(tmp_path / "trian.beton") == f"did you mean {tmp_path}/train.beton?"
    assert how_to_make(tmp_path / "other.beton").endswith(
        f", and name {tmp_path}/other/train.beton, or name {tmp_path}/train.beton"
    )

"""Every error that a user can cause says what is wrong and what to do: the texts in the source, by its syntax trees."""

import ast
import pickle
import re
from pathlib import Path

import pytest

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

"""Every command and every Python snippet in README, docs and the headers of recipes is parsed by what would run it."""

import ast
import importlib
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
from command_lines import parse

from fastssl.cli.usage import UsageError
from fastssl.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "records").rglob("*.md")])
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


class Snippet(NamedTuple):
    """One command."""

    file: Path
    line: int
    text: str
    is_command: bool = True  # False: in a sentence, where a command may be named without its arguments

    @property
    def place(self):
        return f"{self.file.relative_to(ROOT)}:{self.line}"


def blocks_of(page):
    """Yield (language, first line's number, lines) of each fenced or indented block of code."""
    language, start, lines = None, 0, []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.startswith("```"):
            if language is None:
                language, start, lines = line[3:].strip(), number + 1, []
            else:
                yield language, start, lines
                language = None
        elif language is not None:
            lines.append(line)
        elif line.startswith("    "):
            yield "", number, [line[4:]]


def commands_of(file, start, lines):
    """Yield the commands of a block, with continued lines joined and comments left out."""
    joined, first = "", start
    for number, line in enumerate(lines, start):
        joined = joined + line.removeprefix("$ ") if joined else line.removeprefix("$ ")
        if joined.endswith("\\"):
            joined = joined[:-1]
            continue
        yield Snippet(file, first, re.sub(r"(^|\s)#.*", "", joined).strip())
        joined, first = "", number + 1


def all_commands():
    for page in PAGES:
        for language, start, lines in blocks_of(page):
            if language in ("", "bash", "console"):
                yield from commands_of(page, start, lines)
        for number, line in enumerate(page.read_text().splitlines(), 1):
            for text in re.findall(r"`(fastssl [^`]+)`", line):
                yield Snippet(page, number, text, is_command=False)
    for recipe in RECIPES:
        header = [line[1:].strip() for line in recipe.read_text().splitlines() if line.startswith("#")]
        for number, line in enumerate(header, 1):
            yield Snippet(recipe, number, re.sub(r"\s#.*", "", re.sub(r"^(Run|Needs):\s*", "", line)).strip())


def fastssl_arguments(text):
    """The arguments of each call of fastssl in a command line; those with what only a shell knows are left out."""
    for part in re.split(r"\s*(?:;|&&|\||, or:)\s*", text):
        part = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", part)
        found = re.match(r"(?:fastssl|(?:torchrun|python)\b.* -m fastssl)\s+(.*)", part)
        if found and not re.search(r"[$(){}<>\[\]]|\.\.\.|^COMMAND|^--version", found[1]):
            yield ["1" if each == "N" else each for each in shlex.split(found[1])]


FASTSSL = [
    pytest.param(snippet, arguments, id=f"{snippet.place} {' '.join(arguments)}"[:100])
    for snippet in all_commands()
    for arguments in fastssl_arguments(snippet.text)
]


@pytest.mark.parametrize("snippet, arguments", FASTSSL)
def test_commands_are_understood(snippet, arguments, monkeypatch):
    """The command exists and takes these options; a recipe takes these keys."""
    monkeypatch.chdir(ROOT)
    try:
        parsed = parse(arguments)
    except UsageError as error:
        if snippet.is_command or "No such" in str(error):
            raise
        return
    recipe = parsed.get("recipe")
    if recipe and "overrides" in parsed and (recipe.isidentifier() or Path(recipe).exists()):
        load_recipe(recipe, [each for each in parsed["overrides"] if "=" in each])


def test_many_commands_are_found():
    assert len(FASTSSL) > 200 and {snippet.file.parent.name for snippet, _ in (p.values for p in FASTSSL)} > {"docs"}


def python_snippets():
    for page in PAGES:
        # The first is made of docstrings and signatures; the code of the second is run by test_extend_docs.py.
        if page.name not in ("api.md", "extend.md"):
            for language, start, lines in blocks_of(page):
                if language == "python":
                    yield Snippet(page, start, "\n".join(re.sub(r"^(>>>|\.\.\.) ?", "", line) for line in lines))
    for snippet in all_commands():
        if (words := shlex.split(snippet.text, comments=True) if "python -c" in snippet.text else []) and "-c" in words:
            yield snippet._replace(text=words[words.index("-c") + 1])


@pytest.mark.parametrize("snippet", [pytest.param(each, id=each.place) for each in python_snippets()])
def test_python_is_valid_and_its_names_exist(snippet):
    for node in ast.walk(ast.parse(snippet.text)):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name != "elpv_dataset":  # of the tutorial: 91 MB that the tests do not install
                    importlib.import_module(name.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)


def test_programs_and_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    missing = []
    for snippet in all_commands():
        for file in re.findall(r"\bpython3? ((?:benchmarks|examples|scripts)/\S+\.py)", snippet.text):
            missing += [] if (ROOT / file).exists() else [f"{snippet.place}: {file}"]
        if found := re.match(r"make ([a-z][a-z-]*)", snippet.text):
            missing += [] if found[1] in targets else [f"{snippet.place}: make {found[1]}"]
    assert not missing

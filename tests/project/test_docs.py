"""The documentation: pages made of the code are up to date, and every link of the site leads somewhere."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import write_reference  # noqa: E402

OUTDATED = "run `python scripts/write_reference.py`"


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python 3.14 writes unions of types in another way.")
def test_the_reference_of_the_python_names_is_that_of_the_docstrings():
    assert (ROOT / "docs" / "api.md").read_text() == write_reference.api_page(), OUTDATED


def test_the_reference_of_the_commands_is_that_of_the_command_line():
    assert (ROOT / "docs" / "cli.md").read_text() == write_reference.cli_page(), OUTDATED


def test_sections_of_a_docstring():
    text = """A sum: of two numbers.

    Args:
        a, b: the numbers,
            which may be negative.

    Any type that adds.

    Returns:
        Their sum.

    Example::

        add(1, 2)
    """
    assert "\n".join(write_reference.docstring(inspect.cleandoc(text))) == (
        "A sum: of two numbers.\n\n**Arguments**\n\n* `a, b`: the numbers,\n  which may be negative.\n\n"
        "Any type that adds.\n\n**Returns**\n\nTheir sum.\n\n```python\nadd(1, 2)\n```\n"
    )


def test_every_row_of_a_table_belongs_to_a_table_with_a_header():
    # A row after a blank line is shown as text with bars in it.
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "records").rglob("*.md")]
    stray = []
    for page in pages:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for table in re.findall(r"(?:^\|.*\n?)+", text, flags=re.MULTILINE):
            rows = table.splitlines()
            if len(rows) < 2 or not re.fullmatch(r"\|[ :|-]+\|", rows[1]):
                stray.append(f"{page.relative_to(ROOT)}: {rows[0][:60]}")
    assert len(pages) > 30 and not stray


def test_the_site_is_built_without_a_broken_link():
    pytest.importorskip("mkdocs", reason="the extra 'docs' is not installed")
    built = subprocess.run(
        [sys.executable, ROOT / "scripts" / "build_docs.py"], capture_output=True, text=True, cwd=ROOT
    )
    assert built.returncode == 0, built.stdout + built.stderr
    page = (ROOT / "dist" / "docs" / "docs" / "objectives.html").read_text()
    assert "https://fonts" not in page and 'src="http' not in page  # the site needs no network

"""Names of files, classes, runs and metrics are shown as they are: on the terminal, in figures, in Markdown.

What they hold would color or command a terminal, run a script, make a link, end a table's cell, or be a formula.
"""

import ast
import io
import json
import re
import sys
import warnings

import pytest
from markdown_it import MarkdownIt
from PIL import Image
from rich.table import Table
from small_models import make_run

from fastssl.beton import build_beton
from fastssl.cli import main
from fastssl.common.figures import plain_label, save_figure
from fastssl.common.terminal import PlainConsole, console, pairs_table, print_line
from fastssl.export import export_run
from fastssl.export.card import code, code_block, escape

HOSTILE = [
    "\x1b[2J\x1b]0;title\x07", "\x9b31m", "[red]x[/red] :smile:", "<script>alert(1)</script>", "<img src=x onerror=y>",
    "](javascript:alert(1))", "[x](javascript:alert(1))", "![x](http://x.example/y.png)", "a|b", "a\\|b", "`code`",
    "```\nend\n```", "**bold** _it_ ~~s~~", "&lt;b&gt; &amp;", "a\nb", "a\r\nb", "\u202etxt.exe", "$\\frac{1$",
    "_hidden", "$$x$$", "# head", "zprob_barlow_x", "a`` `b", "\udcff",
]  # fmt: skip


def printed(*parts):
    screen = PlainConsole(file=io.StringIO(), width=200, markup=False, emoji=False)
    for part in parts:
        screen.print(part)
    return screen.file.getvalue()


@pytest.mark.parametrize("name", HOSTILE)
def test_tables_and_lines_hold_no_command_for_the_terminal(name):
    table = Table(name, title=name, caption=name)
    table.add_row(name)
    screen = PlainConsole(file=io.StringIO(), width=200, markup=False, emoji=False, force_terminal=True, no_color=True)
    print_line(screen, name)
    for text in (printed(table, name, pairs_table(name, {name: name})), screen.file.getvalue()):
        assert all(c.isprintable() or c == "\n" for c in text.replace("\x1b[1m", "").replace("\x1b[0m", "")), text
    assert screen.file.getvalue().count("\n") == 1
    assert type(console()) is PlainConsole


def test_names_without_commands_are_shown_as_they_are():
    assert printed("[red]x[/red] :smile: $x$ *a*").strip() == "[red]x[/red] :smile: $x$ *a*"
    assert "grün [b]" in printed(pairs_table("x", {"grün [b]": "é"}))


@pytest.mark.parametrize("name", HOSTILE)
def test_markdown_shows_a_name_and_nothing_else(name):
    row = f"| {escape(name)} | {code(name.replace('|', ''))} |"
    text = f"# {escape(name)}\n\n| a | b |\n|---|---|\n{row}\n\n- {code(name)}\n"
    parser = MarkdownIt("gfm-like", {"linkify": False, "html": True})
    tokens = parser.parse(text + "\n" + code_block(name, "text"))
    kinds = [token.type for token in tokens] + [child.type for token in tokens for child in token.children or ()]
    assert kinds.count("td_open") == 2 and kinds.count("fence") == 1 and kinds.count("code_inline") == 2
    assert not {"html_inline", "html_block", "link_open", "image", "em_open", "strong_open", "s_open", "hr"} & set(
        kinds
    )
    assert kinds.count("heading_open") == 1 and kinds.count("bullet_list_open") == 1
    shown = "".join(child.content for token in tokens[:4] for child in token.children or ())
    assert shown.split() == escape_controls(name).split() or name.startswith("#")


def escape_controls(name):
    from fastssl.common.terminal import printable

    return printable(" ".join(name.split()))


@pytest.mark.parametrize("name", HOSTILE)
def test_figures_draw_a_name_and_no_formula(tmp_path, name):
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots()
    axes.plot([0, 1], label=plain_label(name))
    axes.set_title(plain_label(name))
    axes.set_xticks([0], [plain_label(name)])
    legend = axes.legend()
    assert len(legend.get_texts()) == 1  # not hidden
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a missing glyph
        save_figure(tmp_path / "x.png", figure)
    assert Image.open(tmp_path / "x.png").size[0] > 0


CLASSES = ["a\x1b[31m$\\frac{$[b]|`", "<script>_x_&\u202e"]


@pytest.fixture(scope="module")
def hostile_data(tmp_path_factory):
    """A data set with such classes, and file names."""
    root, out = tmp_path_factory.mktemp("hostile"), tmp_path_factory.mktemp("hostile_out")
    for label, name in enumerate(CLASSES):
        for split in ("train", "val"):
            (root / split / name).mkdir(parents=True)
            for number in range(12):
                color = (200 * label, 20 * number, 99)
                Image.new("RGB", (40, 40), color).save(root / split / name / f"{number}\x1b[2J$x$<b>.jpg")
    build_beton("imagefolder", root, out, canvas=32, workers=1)
    return out


def run_command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["fastssl", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capsys.readouterr()
    for text in (out, err):
        assert all(c.isprintable() or c == "\n" for c in text), [
            line for line in text.split("\n") if not line.isprintable()
        ]
    return end.value.code or 0, out, err


@pytest.mark.slow
def test_commands_with_hostile_data_and_runs(hostile_data, tmp_path, monkeypatch, capsys):
    data = {"train": str(hostile_data / "train.beton"), "val": str(hostile_data / "val.beton")}
    runs = [
        make_run(
            tmp_path / f"run{i}\x1b[31m$\\frac{{$[b]|`",
            data,
            seed=i,
            name="<b>$x$|[y](z)`",
            embedding={"stochastic": "z"},
        )[0]
        for i in (0, 1)
    ]
    copy = tmp_path / "out\x1b[2J"
    copy.mkdir()
    for arguments in (
        ["inspect", hostile_data / "val.beton", "--sheet", tmp_path / "x.png"],
        ["eval", "linear", *runs, "--protocol", "lbfgs"],
        ["eval", "linear", runs[0], "--protocol", "lbfgs"],
        ["eval", "uncertainty", runs[0]],
        ["eval", "ood", runs[0], "--near", hostile_data / "val.beton"],
        ["eval", "ood", *runs, "--near", hostile_data / "val.beton"],
        ["embed", runs[0], hostile_data / "val.beton", "--out", tmp_path / "x.csv"],
        ["export", runs[0], "--format", "timm"],
        ["eval", "knn", runs[0], "--train", copy / "nowhere.beton"],
        ["eval", "knn", copy],
        ["train", copy / "nowhere.yaml"],
    ):
        code, _, err = run_command(monkeypatch, capsys, *arguments)
        assert code == (2 if arguments[-1] in (copy, copy / "nowhere.beton", copy / "nowhere.yaml") else 0), err


def test_the_card_of_a_hostile_run(tmp_path):
    run, recipe, _ = make_run(tmp_path / "run", {"train": "x/<b>`|.beton"}, name="<b>$x$|[y](z)`" + "```")
    (run / "eval").mkdir()
    for number, name in enumerate(HOSTILE):
        safe = name.encode("utf-8", "replace").decode()
        result = {"evaluation": safe, "metrics": {safe: 0.5}, "val": {"path": f"x/{safe}.beton", "images": 3}}
        (run / "eval" / f"{number}.json").write_text(json.dumps(result))
    (run / "eval" / "``x](javascript:0)\x1b[2J.json").write_text("{")
    (run / "environment.json").write_text(
        json.dumps({"git": "<b>\x1b|", "device": "[x](y)", "packages": {"torch": "`"}})
    )
    (run / "metrics.jsonl").write_text(json.dumps({"step": 0, "<b>|`[x](y)": 1.0}) + "\n")
    out = tmp_path / "a`` ```b\u202e.safetensors"
    text = export_run(run, "timm", out).card.read_text()
    assert all(c.isprintable() or c == "\n" for c in text)
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S)
    tokens = MarkdownIt("gfm-like", {"linkify": False, "html": True}).parse(body)
    kinds = [token.type for token in tokens] + [child.type for token in tokens for child in token.children or ()]
    assert not {"html_inline", "html_block", "link_open", "image", "em_open", "strong_open", "s_open"} & set(kinds)
    assert [token.info for token in tokens if token.type == "fence"] == ["python", "yaml"]
    assert [token.content for i, token in enumerate(tokens) if i and tokens[i - 1].type == "heading_open"][1:] == [
        "Use", "Input", "Model", "Training", "Results", "Made with", "Known limits",
    ]  # fmt: skip
    (program,) = (token.content for token in tokens if token.info == "python")
    constants = [node.value for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Constant)]
    assert out.name in constants
    rows = body.split("## Results")[1].split("##")[0]
    assert len(re.findall(r"(?m)^\|", rows)) == 2 + len(HOSTILE)

"""Output without a terminal: plain lines of progress, tables, and text that a terminal must not take for commands."""

import io
import itertools
import re

import pytest

from fastssl.common import terminal
from fastssl.common.terminal import (
    console,
    count_of,
    numbered_steps,
    pairs_table,
    print_error,
    print_line,
    printable,
    progress,
    time_in_words,
)


def test_progress_prints_plain_lines_without_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "PLAIN_LINE_EVERY", 0.0)
    monkeypatch.setattr(terminal, "SHORT", 0.0)
    with progress("[train]", 4, unit="files", done=1) as advance:
        advance(2, 5_000_000)
        advance()
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("[train]: 3 of 4 files, ") and " files/s, " in first
    assert last.startswith("[train]: 4 files in under 1 s, ") and last.endswith(" MB/s")


def test_progress_without_a_total(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "PLAIN_LINE_EVERY", 0.0)
    with progress("listing", None) as advance:
        advance(1000)
    assert capsys.readouterr().err.startswith("listing: 1,000 images, ")


def test_steps_are_named_when_they_begin(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    with numbered_steps("warming up", 2) as begin:
        begin("[loader]")
        assert capsys.readouterr().err == "warming up: [loader] (1 of 2)\n"
        begin("training step")
        now[0] = 130.0
    assert capsys.readouterr().err.splitlines() == [
        "warming up: training step (2 of 2)", "warming up: done in 2 min 10 s",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "seconds_of_each, lines", [(0.001, []), (0.0021, [r"work: 1,000 images in 2 s, 47\d images/s"])]
)
def test_progress_is_rare_without_a_terminal(capsys, monkeypatch, seconds_of_each, lines):
    """Nothing about work of a second, one line about work of two seconds."""
    clock = itertools.count(step=seconds_of_each)
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    with progress("work", 1000) as advance:
        for _ in range(1000):
            advance()
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == len(lines) and all(map(re.fullmatch, lines, printed))


def test_progress_of_many_seconds_shows_the_time_left(capsys, monkeypatch):
    clock = itertools.count(step=1.0)
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    with progress("work", 100) as advance:
        for _ in range(100):
            advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "work: 10 of 100 images, 1.0 images/s" and len(lines) == 10
    assert lines[1] == "work: 20 of 100 images, 1.0 images/s, 1 min 20 s left"
    assert lines[-1] == "work: 100 images in 1 min 40 s, 1.0 images/s"


def test_the_time_left_does_not_count_the_start_of_processes(capsys, monkeypatch):
    """A build of 4,000 images said "2 h 22 min left" after its first 32, and took 75 s."""
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    with progress("work", 1000) as advance:
        for _ in range(3):
            now[0] += 20.0 if now[0] == 0 else 10.0
            advance(10)
    first, second, _ = capsys.readouterr().err.splitlines()
    assert first == "work: 10 of 1,000 images, 0.5 images/s"
    assert second == "work: 20 of 1,000 images, 0.67 images/s, 16 min 20 s left"


def test_the_time_left_does_not_count_slow_first_items(capsys, monkeypatch):
    """200 epochs of linear classifiers said "12 min 15 s left" after 4 of them, and took 97 s."""
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    with progress("work", 200) as advance:
        for epoch in range(24):
            now[0] += 2.5 if epoch < 4 else 0.5
            advance()
    first, second = capsys.readouterr().err.splitlines()
    assert first == "work: 4 of 200 images, 0.4 images/s"
    assert second == "work: 24 of 200 images, 1.2 images/s, 1 min 28 s left"


@pytest.mark.parametrize("seconds, shown", [(0.5, None), (65.0, "in 1 min 05 s")])
def test_a_bar_of_finished_work_says_how_long_it_took(monkeypatch, seconds, shown):
    """And the bar of short work is cleared away."""
    screen = terminal.PlainConsole(file=io.StringIO(), force_terminal=True, width=100, markup=False, emoji=False)
    now = [100.0]
    monkeypatch.setattr(terminal, "console", lambda stderr: screen)
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(screen, "get_time", lambda: now[0])
    with progress("work", 10) as advance:
        now[0] += seconds
        advance(10)
    out = screen.file.getvalue()
    cleared = out.rstrip().endswith("\x1b[2K")
    assert cleared == (shown is None) and (shown is None or shown in out)


@pytest.mark.parametrize("columns, width", [(None, 160), ("91", 91)])
def test_the_width_without_a_terminal(monkeypatch, columns, width):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    assert console().width == width


def test_text_is_printed_as_it_is(capsys):
    console().print(pairs_table("a [title]", {"[bold]": ":cat:\x1b[2J", ":dog:": "[red]"}))
    print_line(console(), "[bold] " + "x" * 300)
    out = capsys.readouterr().out
    assert "a [title]" in out and r":cat:\x1b[2J" in out and "[red]" in out and "[bold]" in out and ":dog:" in out
    assert out.splitlines()[-1] == "[bold] " + "x" * 300


def test_a_terminal_may_say_that_it_has_no_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "0")
    for term in "xterm", "dumb":
        monkeypatch.setenv("TERM", term)
        print_line(console(), "two words")
        assert capsys.readouterr().out == "two words\n", term


def test_a_line_that_cannot_be_written_is_no_error():
    class FullDisk(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    full = console()
    full.file = FullDisk()
    print_line(full, "a line")


def test_an_error_in_a_file_is_one_plain_line_and_its_hint_another(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    print_error("[bold]" + " words" * 30 + "\x1b[2J\nnext", "do" + " this" * 30)
    print_error("no hint", label="error (rank 3)")
    assert capsys.readouterr().err.splitlines() == [
        "error: [bold]" + " words" * 30 + r"\x1b[2J\nnext", "hint: do" + " this" * 30, "error (rank 3): no hint",
    ]  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("width", [60, 80, 120])
def test_an_error_on_a_terminal_is_wrapped_between_words(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr("sys.stderr", Terminal())
    path = "/a-long/" + "folder-name/" * 20 + "x.beton"
    print_error(f"{path} is missing " + "and so on " * 20, "make it")
    with monkeypatch.context() as patch:
        patch.setenv("NO_COLOR", "1")
        print_error("no", "colors")
    text = terminal.sys.stderr.getvalue()
    assert "\x1b[1;31merror:\x1b[0m " in text and "\x1b[1;36mhint:\x1b[0m make it\n" in text
    assert path in text  # never inside a path
    assert "31m" not in text.rpartition("make it")[2] and "36m" not in text.rpartition("make it")[2]
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    assert max(len(line) for line in plain if path not in line) <= width and len(plain) > 4


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_command_in_a_hint_stays_on_one_line(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("sys.stderr", Terminal())
    command = "`fastssl build-beton imagefolder --source DIR --out 'two  spaces' --download`"
    print_error("No file", f"make it with {command}, and " + "so on " * 30)
    assert command in terminal.sys.stderr.getvalue()


def test_an_error_that_cannot_be_written_is_no_error(monkeypatch):
    class FullDisk(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("sys.stderr", FullDisk())
    print_error("a line", "a hint")


def test_printable():
    assert printable("naïve 猫") == "naïve 猫"
    assert printable("a\nb\x1b[2J\udce9") == r"a\nb\x1b[2J\udce9"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "under 1 s"), (0.99, "under 1 s"), (1.0, "1 s"), (59.9, "59 s"), (60, "1 min 00 s"),
        (198.2, "3 min 18 s"),
        (3600, "1 h 00 min"), (7625, "2 h 07 min"), (86_400 * 3 + 4 * 3600 + 59, "3 d 04 h"),
    ],
)  # fmt: skip
def test_times_in_sentences(seconds, words):
    assert time_in_words(seconds) == words


def test_a_count_with_its_noun():
    counts = count_of(0, "run"), count_of(1, "run"), count_of(1200, "image"), count_of(1, "class"), count_of(2, "class")
    assert counts == ("0 runs", "1 run", "1,200 images", "1 class", "2 classes")

"""What training shows: log lines of 80 columns that form a table, and a panel that fits windows of all sizes."""

import math
import re
from io import StringIO
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from training_runs import metrics_of as read_metrics
from training_runs import small, train_jobs

from fastssl.common.terminal import PlainConsole, print_line
from fastssl.models import DiagonalGaussian, Draws, StandardNormal, ViewOutput
from fastssl.objectives import TotalLoss
from fastssl.recipe import load_recipe
from fastssl.training import display as display_module
from fastssl.training.display import LINES_PER_HEADER, Display, LogTable, sparkline
from fastssl.training.metric_text import GROUPS, LABELS, duration, is_only_in_file, number, shown
from fastssl.training.step_log import CountWarning

RECIPES = sorted(str(path) for path in Path("recipes").rglob("*.yaml") if "sweeps" not in path.parts)
TERMS = {
    "barlow_twins": ["on_diagonal", "off_diagonal"], "vicreg": ["invariance", "variance", "covariance"],
    "simclr": ["nt_xent"], "byol": ["prediction"], "sigreg": ["invariance", "sigreg"],
    "visreg": ["invariance", "scale", "shape", "center"],
    "supervised": ["cross_entropy"],
}  # fmt: skip
UNCERTAINTY = ("kl", "kl_per_dim", "sigma", "sigma_min", "sigma_max", "sigma_clamped")


def metrics_of(recipe, value=0.123456, **more):
    """The metrics of a log line of this recipe, in the order of StepLog."""
    spaces = {"none": "", "z": "z", "h": "h", "hz": "hz"}[recipe.embedding.stochastic]
    names = ["loss", *TERMS[recipe.objective.name], *(["beta_kl"] if spaces else [])]
    names += ["accuracy"] if recipe.objective.needs_labels else []
    names += [f"{name}_{space}" for space in spaces for name in UNCERTAINTY]
    known = {"epoch": 3, "lr": 0.00321}
    speed = {"images_per_second": 1432.1, "data_wait": 0.034, "seconds": 12.5}
    return known | dict.fromkeys(names, value) | {"grad_norm": 1.5, "skipped_steps": 0, "std_z": value} | speed | more


def terminal(width, height=24):
    return PlainConsole(
        file=StringIO(), force_terminal=True, color_system=None, width=width, height=height, markup=False, emoji=False
    )


def panel(width, height=24, title="cifar10_zprob_barlow  (cpu, bf16)", total_steps=48_800, step=12_200, metrics=None):
    """The lines of the panel in a window, without drawing it again and again."""
    display = Display(title, 0, total_steps, epochs=100)
    display.console = terminal(width, height)
    display.step(1)
    display.step(step)
    display.latest = dict(metrics or {})
    display.losses = [math.exp(-i / 50) for i in range(200)]
    display.console.print(display)
    return display.console.file.getvalue().rstrip("\n").split("\n")


@pytest.mark.parametrize("path", RECIPES)
def test_lines_of_every_recipe_fit_80_columns(path):
    recipe = load_recipe(path)
    for total_steps in (6, 1120, 48_800, 1_000_000, 12_345_678):
        check_lines(recipe, total_steps)


def check_lines(recipe, total_steps):
    """Step, epoch, loss, lr, speed, wait and ETA in each line, and as many figures of the embedding as fit."""
    table = LogTable(total_steps)
    header, *lines = [
        *table.lines(1, metrics_of(recipe), "?"),
        *table.lines(total_steps, metrics_of(recipe, -1.5e-10, images_per_second=1_234_567, data_wait=1), "23h59m"),
        *table.lines(2, metrics_of(recipe, math.nan, lr=math.inf, epoch=9998), "99d23h"),
    ]
    cell = re.compile(r"\S+( \S+)*")  # two spaces or more separate cells: "KL z", "3 %"
    ends = {match.end() for match in cell.finditer(header)}
    for line in lines:
        assert {match.end() for match in cell.finditer(line)} == ends and len(line) == len(header) <= 80
    headings = re.split(r" {2,}", header.strip())
    assert headings[:3] == ["step", "epoch", "loss"] and headings[-4:] == ["lr", "images/s", "data wait", "ETA"]
    spaces = {"none": "", "hz": "hz"}.get(recipe.embedding.stochastic, recipe.embedding.stochastic)
    telling = ["accuracy"] * recipe.objective.needs_labels + [f"KL {space}" for space in spaces] + ["std z"]
    shown_of_them = headings[3:-4][: len(telling)]
    assert shown_of_them == telling[: len(shown_of_them)] and shown_of_them
    assert total_steps > 99_999 or len(shown_of_them) >= min(2, len(telling)) or recipe.objective.needs_labels


def test_the_header_comes_again_and_the_probe_is_a_sentence(capsys):
    display = Display("title", 0, 10_000)
    for step in range(1, 2 * LINES_PER_HEADER + 2):
        display.step(step)
        display.log(step, {"epoch": 0, "loss": 1.0, "std_z": 0.5})
    display.log(step, {"epoch": 3, "knn": 0.79})
    lines = capsys.readouterr().out.splitlines()
    headers = [number for number, line in enumerate(lines) if "loss" in line]
    assert [b - a for a, b in pairwise(headers)] == 2 * [LINES_PER_HEADER + 1] and headers[0] == 0
    assert lines[-1] == "Probe after epoch 4: kNN accuracy 79.00 %"


def test_the_first_step_is_a_line_where_the_next_one_is_far(capsys):
    def printed(first_step, total_steps, log_every):
        display = Display("title", first_step, total_steps, log_every=log_every)
        display.step(first_step + 1)
        display.step(first_step + 2)
        return capsys.readouterr().out

    assert printed(0, 1000, 50) == "Step 1 done; the next line comes after step 50.\n"
    assert printed(960, 980, 50) == "Step 961 done; the next line comes after step 980.\n"
    assert printed(0, 1000, 1) == printed(49, 1000, 50) == printed(19, 20, 50) == ""


def test_slow_steps_are_said_before_the_first_log_line(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(display_module.time, "monotonic", lambda: now)
    display = Display("title", 0, 100, log_every=50)
    for step in range(1, 51):
        display.step(step)
        now += 8.0
    lines = capsys.readouterr().out.splitlines()
    # At step 5, 32 s after the first one: 95 steps of 8 s are left. Said once.
    assert lines[1:] == ["Step 5 done, 8 s a step, 12:40 left."]
    display.log(50, {"epoch": 0, "loss": 1.0})
    display.step(51)
    assert "a step" not in capsys.readouterr().out


def test_the_first_step_is_no_line_above_a_panel(monkeypatch):
    screen = terminal(80)
    monkeypatch.setattr(display_module, "console", lambda: screen)
    with Display("title", 0, 100, log_every=50) as display:
        display.step(1)
    assert "done" not in screen.file.getvalue()


@pytest.mark.parametrize(
    "path", ["recipes/barlow.yaml", "recipes/supervised.yaml", "recipes/beyond/hzprob_barlow.yaml"]
)
@pytest.mark.parametrize("width", [20, 40, 60, 77, 80, 100, 200])
def test_the_panel_fits_the_window(path, width):
    """The bar, the step and the times come first in every window, and no row is cut off."""
    for height in (8, 10, 12, 16, 20, 24, 50):
        for total_steps, title in ((48_800, "demo  (cpu, bf16)"), (12_345_678, "long_" * 30)):
            metrics = metrics_of(load_recipe(path), rankme_h=43.2, rankme_z=1.0, knn=0.7912, bad_samples=12_345)
            lines = panel(width, height, title, total_steps, total_steps // 2, metrics)
            assert len({len(line) for line in lines}) == 1
            assert len(lines[0]) <= max(20, width - 3) and len(lines) < height  # ^C and the cursor have room
            assert lines[0][0] == "╭" and lines[-1][0] == "╰" and (width < 40 or "…" not in "".join(lines[1:]))
            assert "━" in lines[1] and "50 %" in lines[1]
            first = " ".join(lines[2:4])
            assert f"step {total_steps // 2:,}" in first and ("elapsed" in first or width == 20)
            if width >= 40:
                assert f"of {total_steps:,}" in first and "left" in first and "loss" in "".join(lines[3:7])


@pytest.mark.parametrize("path", RECIPES)
def test_an_80x24_window_shows_every_metric_in_words(path):
    """All that the trainer logs is on the panel under a name of its own, or is only for metrics.jsonl."""
    recipe = load_recipe(path)
    metrics = metrics_of(recipe, rankme_h=43.2, rankme_z=31.2, knn=0.7912, bad_samples=2)
    text = "\n".join(panel(80, metrics=metrics))
    assert "loss curve" in text
    for name in metrics:
        assert is_only_in_file(name) or f" {LABELS[name]}  " in text, name
    for heading in GROUPS:
        assert f" {heading} " in text
    assert "_" not in text.replace("cifar10_zprob_barlow", "")  # no name of a variable


@pytest.mark.parametrize("path", RECIPES)
def test_every_term_of_the_loss_has_a_name(path):
    """What the loss returns is what `metrics_of` above expects, so the test before this one has seen it."""
    recipe = load_recipe(path)
    views = tuple(random_view(recipe) for _ in range(recipe.objective.num_views))
    priors = torch.nn.ModuleDict({space: StandardNormal() for space in views[0].draws})
    logged = set(TotalLoss(recipe)(views, priors, torch.zeros((), dtype=torch.int64)))
    assert logged <= set(metrics_of(recipe))


def random_view(recipe):
    z_BD, label_B = torch.randn(8, 16), torch.arange(8)
    spaces = {"none": "", "z": "z", "h": "h", "hz": "hz"}[recipe.embedding.stochastic]
    q = DiagonalGaussian(z_BD, torch.zeros(8, 16))
    target = {"byol": z_BD, "supervised": label_B}.get(recipe.objective.name)
    return ViewOutput(z_BD, z_BD, {space: Draws(q, q.rsample(2)) for space in spaces}, target)


def test_every_metric_of_a_run_has_a_name(canvas, tmp_path):
    train_jobs([("beyond/hzprob_barlow", small(canvas, tmp_path / "run", "train.epochs=1", "probe.every=1"))])
    names = {name for line in read_metrics(tmp_path / "run") for name in line} - {"step"}
    assert {"kl_z", "std_z", "rankme_h", "knn", "data_wait"} <= names
    assert [name for name in names if not is_only_in_file(name) and name not in LABELS] == []


def test_a_probe_that_is_not_ours_keeps_its_names():
    text = "\n".join(panel(80, metrics={"loss": 1.0, "linear_top5": 0.5}))
    assert re.search(r" linear_top5 +0.5000 ", text)


def test_values_on_the_panel():
    recipe = load_recipe("recipes/zprob_barlow.yaml")
    metrics = metrics_of(recipe, loss=math.nan, skipped_steps=3, bad_samples=2, rankme_z=31.2, graphs=2)
    values = {"loss": "nan", "on-diagonal term": "0.1235", "RankMe of z": "31.20", "images/s": "1,432"}
    values |= {"time waiting for data": "3 %", "learning rate": "0.0032", "undecodable images": "2"}
    for width in (80, 120):
        text = "\n".join(panel(width, metrics=metrics))
        for name, value in values.items():
            assert re.search(rf"{name} +{re.escape(value)} ", text), name
        assert "step 12,200 of 48,800, epoch 26 of 100" in text and "25 %" in text
    for width, height in ((72, 24), (60, 24), (40, 24)):
        text = "\n".join(panel(width, height, metrics=metrics))
        for name, value in values.items():
            assert re.search(rf"{name} +{re.escape(value)} ", text), name
        assert "loss curve" in text
    medium = panel(60, 20, metrics=metrics)  # no row is left free
    assert len(medium) == 19 and "loss curve" in medium[-2] and "on-diagonal term" in medium[5]
    assert " on-diagon… 0.1235 " in panel(24, metrics=metrics)[5]  # what is cut off has a mark
    narrow = "\n".join(panel(40, 12, metrics=metrics))
    assert "KL(q||p) of z, nats" in narrow and "on-diagonal" not in narrow


def test_the_color_can_be_read_on_white_and_on_black():
    """WCAG's contrast of 4.5 to 1, for text of normal size."""
    values = [int(value) / 255 for value in re.findall(r"\d+", display_module.COLOR)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
    luminance = sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear))
    assert 1.05 / (luminance + 0.05) >= 4.5 and (luminance + 0.05) / 0.05 >= 4.5


def test_a_live_panel_stays_in_place(monkeypatch):
    """Messages come above it. A narrower window, where each of its lines takes two rows, is erased as a whole."""
    screen = terminal(80)
    monkeypatch.setattr(display_module, "console", lambda: screen)
    with Display("title", 0, 100) as display:
        display.live.auto_refresh = False
        display.step(1)
        display.log(1, {"loss": 2.0, "lr": 0.1})
        display.print("warning: something.")
        with display.during("probe running"):
            display.live.refresh()
        before = len(screen.file.getvalue())
        screen.width = 60
        display.live.refresh()
        drawn = screen.file.getvalue()
    assert "warning: something.\n" in drawn.replace("\r", "") and "probe running" in drawn
    erased = drawn[before:].replace("\x1b[2K\x1b[1B", "-")
    assert erased.startswith("\x1b[H" + 24 * "-" + "\x1b[Hwarning: something.")
    assert not display.live.is_started


class Window:
    """A terminal that moves rows out at its top where it shrinks, and back where it grows, as tmux does."""

    def __init__(self, height):
        self.height = height
        self.rows = [""]  # with those above the window
        self.y = 0  # of the cursor, in `rows`
        self.x = 0

    @property
    def top(self):
        return max(0, len(self.rows) - self.height)

    def resize(self, height):
        while len(self.rows) - 1 > self.y and len(self.rows) > height:
            self.rows.pop()  # empty rows below the cursor
        self.height = height

    def write(self, text):
        for command, count, kind, other in re.findall(r"(\x1b\[\??(\d*)([A-Za-z]))|([^\x1b])", text):
            if kind == "A":
                self.y = max(self.top, self.y - int(count))
            elif kind == "B":
                self.y = min(self.top + self.height - 1, self.y + int(count))
            elif kind == "H":
                self.y, self.x = self.top, 0
            elif kind == "K":
                self.rows[self.y : self.y + 1] = [""]
            elif other == "\r":
                self.x = 0
            elif other == "\n":
                self.y, self.x = self.y + 1, 0
            elif not command:
                self.rows[self.y] = self.rows[self.y][: self.x].ljust(self.x) + other + self.rows[self.y][self.x + 1 :]
                self.x += 1
            self.rows += [""] * (self.y + 1 - len(self.rows))

    def shown(self):
        return self.rows[self.top :]


def test_no_window_shows_the_rows_of_an_earlier_panel(monkeypatch):
    """Not after it shrank, which moves rows of the panel out of it, nor after it grew, which brings them back."""
    screen, window = terminal(80), Window(24)
    monkeypatch.setattr(display_module, "console", lambda: screen)
    metrics = metrics_of(load_recipe("recipes/zprob_barlow.yaml"), rankme_h=43.2, rankme_z=1.0)
    window.write("an earlier command\n" * 30)
    with Display("title", 0, 100) as display:
        display.live.auto_refresh = False
        display.print("Training title in runs/title")
        display.step(1)
        display.log(1, metrics)
        written = 0
        for height in (24, 40, 23, 14, 12, 24, 40, 12, 16, 24):
            screen.height = height
            window.resize(height)
            for _ in range(2):
                display.live.refresh()
                drawn = screen.file.getvalue()
                window.write(drawn[written:])
                written = len(drawn)
                rows = [row for row in window.shown() if row]
                assert [row[0] for row in rows].count("╭") == [row[0] for row in rows].count("╰") == 1, rows
                first = next(number for number, row in enumerate(rows) if row[0] == "╭")
                assert rows[first - 1] == "Training title in runs/title" and rows[-1][0] == "╰"
                assert all(row[0] == "│" for row in rows[first + 1 : -1])
                assert first == 1 or rows[0] == "an earlier command"


def test_the_messages_above_a_panel_are_those_that_fit(monkeypatch):
    screen = terminal(60, 24)
    monkeypatch.setattr(display_module, "console", lambda: screen)
    display = Display("title", 0, 100)
    for i in range(3):
        display.print(f"message {i} " + "x" * 70)  # of three rows, as a long word is not wrapped
    display.print("fastssl train " + "x " * 60, wrap=False)
    above = [text.plain for text in display.messages_above()]
    assert [text.split()[1] for text in above] == ["0", "1", "2", "train"] and "\n" not in above[-1]
    screen.height = len(panel(60, total_steps=100)) + 3 + 3
    assert [text.plain.split()[1] for text in display.messages_above()] == ["2", "train"]
    screen.height = 5
    assert display.messages_above() == []


def test_a_curve_of_a_long_run_keeps_its_shape():
    display = Display("title", 0, 10**6)
    for i in range(10_000):
        display._remember(math.nan if i % 3 == 0 else 10_000 - i)
    assert len(display.losses) <= display_module.LOSSES
    assert sparkline(display.losses, 8) == "█▇▆▅▄▃▂▁"
    assert sparkline([], 8) == "" and sparkline([1.0], 8) == "▁" and sparkline([5.0, 5.0], 8) == "▁▁"
    assert sparkline([24.1] * 100, 7) == 7 * "▁"  # though means of equal values differ in the last bit


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (66.2134, "66.21"), (701.0, "701.0"), (0.0412, "0.0412"), (0.00321, "0.0032"), (3.21e-4, "3.2e-4"),
        (12345.6, "12346"), (99_999.7, "1.0e5"), (-0.123456, "-0.123"), (-1.6e-10, "-2e-10"), (1e-300, "1e-300"),
        (math.nan, "nan"), (-math.inf, "-inf"), (9.9999, "10.000"), (-99_999, "-99999"),
        (-9.9996, "-10.00"), (-999.96, "-1000"),
    ],
)  # fmt: skip
def test_numbers_take_six_characters(value, text):
    assert number(value) == text and len(text) <= 6
    assert math.isnan(value) or float(text) == pytest.approx(value, rel=0.4)


def test_other_values():
    assert [duration(s) for s in (0.9, 65, 3599, 3600, 86_399, 86_400 * 3 + 3_700)] == [
        "0:00", "1:05", "59:59", "1h00m", "23h59m", "3d01h",
    ]  # fmt: skip
    assert shown("images_per_second", 12.345) == "12.35" and shown("images_per_second", 12_345.6) == "12,346"
    assert (
        shown("accuracy", 1.0) == "100.00 %" and shown("data_wait", 0.036) == "4 %" and shown("knn", math.nan) == "nan"
    )
    assert shown("skipped_steps", 1_000_000) == "1000000"


def test_counts_that_should_be_zero_are_reported_each_time_they_double():
    warning = CountWarning("bad_samples", "bad images")
    found = [warning.check({"bad_samples": count} if count else {}) for count in (0, 1, 1, 2, 3, 9, 17, 18)]
    assert [text and text.split()[3] for text in found] == [None, "1", None, "2", None, "9", None, "18"]


def test_messages_are_wrapped_on_a_terminal_but_paths_are_not():
    path = "/" + "long_folder/" * 10 + "views.png"
    message = (
        f"Done: 1,120 steps in 1:38, in runs/demo (look at {path} first), and a few more words to see where they go."
    )
    screen = terminal(60)
    print_line(screen, message)
    lines = screen.file.getvalue().splitlines()
    assert path in lines and all(len(line) <= 60 for line in lines if line != path)
    assert " ".join(line.strip() for line in lines) == message
    file = PlainConsole(file=StringIO(), width=60, markup=False, emoji=False)
    print_line(file, message)
    assert file.file.getvalue() == message + "\n"

"""The tables of benchmarks/loading.py, from results that were not measured."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def tables():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("loading_tables")


@pytest.fixture(scope="module")
def loading():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("loading")


@pytest.fixture
def task(tables):
    says = {
        "fastssl, BC4": tables.Says("BC4", ours=True),
        "fastssl, JPEG": tables.Says("JPEG", ours=True),
        "slow": tables.Says("JPEG"),
        "fast": tables.Says("JPEG", antialiased="no"),
        "memcpy": tables.Says("BC4", bound=True),
        "broken": tables.Says("JPEG"),
    }
    return tables.TaskSays("two crops", says)


def row(line, rate, round_=1, run="2026-11-29 22:00", task="crops"):
    figures = {"rate": rate, "per_core_second": rate / 2, "memory": 100.0, "output": "uint8 2 x 224 x 224 x 3"}
    return {"run": run, "task": task, "line": line, "round": round_, "versions": "2 threads; torch 2"} | figures


@pytest.fixture
def rows():
    rates = {
        "fastssl, BC4": (4000, 4400, 3600), "fastssl, JPEG": (2000, 2000, 2000), "slow": (500, 5000, 500),
        "fast": (1000, 1100, 900), "memcpy": (9e4, 9e4, 9e4),
    }  # fmt: skip
    measured = [row(line, rate, i) for line, three in rates.items() for i, rate in enumerate(three, 1)]
    broken = {key: value for key, value in row("broken", 1).items() if key in ("run", "task", "line", "round")}
    return [*measured, broken | {"error": "No module named spdl", "versions": "2 threads; torch 2"}]


def test_the_best_peer_is_the_fastest_by_its_median_and_neither_ours_nor_a_bound(tables, task, rows):
    found = tables.latest(rows, "crops")
    assert tables.best_peer(task, found) == "fast"
    assert tables.best_peer(task, {"fastssl, BC4": found["fastssl, BC4"], "memcpy": found["memcpy"]}) is None


def test_a_ratio_compares_within_rounds_that_both_have(tables):
    ours = [row("a", rate, i) for i, rate in enumerate((100, 200, 300), 1)]
    peer = [row("b", 50, 1), row("b", 40, 2)]
    assert tables.ratio(ours, peer) == (2 + 5) / 2
    assert tables.ratio(ours, [row("b", 50, 1, run="2026-11-30 00:00")]) == 2


def test_only_the_last_run_of_a_task_counts(tables, rows):
    again = [row("fast", 9, run="2026-11-30 08:00"), row("fast", 7, run="2026-11-30 08:00", task="decode")]
    assert [found["rate"] for found in tables.latest(rows + again, "crops")["fast"]] == [9]
    assert tables.latest(rows, "decode") == {}


def test_a_table_has_every_line_the_fastest_first_with_the_best_peer_in_bold(tables, task, rows):
    text = tables.task_table(task, tables.latest(rows, "crops"))
    names = [line.split("|")[1].strip() for line in text.splitlines()[2:8]]
    assert names == ["memcpy", "fastssl, BC4", "fastssl, JPEG", "**fast**", "slow", "broken"]
    assert "| 1,000 (900 to 1,100) | 500 | 4.00x | 2.00x | 100 |" in text
    assert "not measured: No module named spdl" in text and "torch 2; 3 rounds; 2026-11-29 22:00." in text
    cells = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(cells) == 1


def test_the_summary_names_the_best_peer_of_each_task_that_was_measured(tables, task, rows):
    text = tables.summary_table({"crops": task, "decode": task}, rows)
    assert text.splitlines()[2:] == ["| two crops | BC4 4,000, JPEG 2,000 | 1,000 fast | BC4 4.0x, JPEG 2.0x |"]


def test_a_block_is_replaced_between_its_comments_and_nothing_else_is(tables, tmp_path):
    page = tmp_path / "page.md"
    begin, end = (f"<!-- {which} of benchmarks/loading.py, crops -->\n" for which in ("begin", "end"))
    page.write_text(f"before\n{begin}old\n{end}after\n")
    assert tables.replace_block(page, "crops", "new \\1\n") and not tables.replace_block(page, "decode", "no")
    assert page.read_text() == f"before\n{begin}new \\1\n{end}after\n"


def test_every_task_has_a_block_in_the_record_and_at_most_one_file_of_ours_per_source(loading):
    record = (BENCHMARKS.parent / "records/loading.md").read_text()
    for key, task in loading.TASKS.items():
        assert f"<!-- begin of benchmarks/loading.py, {key} -->" in record
        own = [line.source for line in task.lines.values() if line.ours]
        assert own and len(own) == len(set(own))
        assert all(loading.says(task).lines[name].ours == line.ours for name, line in task.lines.items())


def test_measure_counts_the_source_images_and_describes_what_one_of_them_gives(loading, tmp_path, monkeypatch):
    """A batch of 8 images in two views takes a second, and 1.6 seconds of the cores."""
    shared = sys.modules["loading_shared"]
    now = 0.0

    def batches():
        nonlocal now
        while True:
            now += 1
            yield [np.full((8, 20, 20, 3), 200, np.uint8)] * 2

    monkeypatch.setattr(shared.time, "perf_counter", lambda: now)
    monkeypatch.setattr(shared, "cpu_seconds", lambda: 1.6 * now)
    result = shared.measure(batches(), 10, tmp_path / "row.png")
    assert (result["rate"], result["per_core_second"]) == (8, 5)
    assert result["output"] == "uint8 2 x 20 x 20 x 3" and (tmp_path / "row.png").exists()

"""`make gpu-check` on a machine without a GPU: its checks are stand-ins here, small programs that take no time."""

import importlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ABOUT = {
    "device": "Stand-in 9000", "git": "abc-dirty", "packages": {"torch": "2.9"}, "python": "3", "cuda": "13",
    "cpu": "a cpu", "cores": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def gpu_check():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("gpu_check")


@pytest.fixture
def stand_in(gpu_check, tmp_path):
    """stand_in(NAME, program, ...): a check that runs a Python program, which appends its name to tmp_path/order."""

    def make(name, program="", seconds=20, figures=(), **options):
        code = f"open({str(tmp_path / 'order')!r}, 'a').write({name + ' '!r})\n{textwrap.dedent(program)}"
        return gpu_check.Check(
            name, name.title(), seconds, [sys.executable, "-c", code], lambda _: [*figures], **options
        )

    return make


def run(gpu_check, checks, tmp_path, about=ABOUT, again=()):
    return gpu_check.run_checks(checks, about, tmp_path / "gpu" / "x.json", tmp_path / "work", list(again))


def order(tmp_path):
    names = (tmp_path / "order").read_text().split()
    (tmp_path / "order").unlink()
    return names


def statuses(tmp_path):
    checks = json.loads((tmp_path / "gpu" / "x.json").read_text())["checks"]
    return {name: check["status"] for name, check in checks.items()}


def test_a_failure_or_a_lack_of_time_does_not_stop_the_others(gpu_check, stand_in, tmp_path):
    figure = gpu_check.Figure("views/s", 2e6, at_least=1e6)
    slow = f"import subprocess, sys, time; print('begun', flush=True); open({str(tmp_path / 'pid')!r}, 'w').write(str("
    slow += "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)); time.sleep(60)"
    checks = [
        stand_in("slow", slow, seconds=2),
        stand_in("broken", "print('one | two'); raise SystemExit('no such kernel')"),
        stand_in("missing", package="no_such_package"),
        stand_in("child", after="broken"),
        stand_in("good", figures=[figure]),
    ]
    began = time.monotonic()
    assert not run(gpu_check, checks, tmp_path)
    assert time.monotonic() - began < 15
    assert order(tmp_path) == ["slow", "broken", "good"]
    assert statuses(tmp_path) == {
        "slow": "out of time", "broken": "failed", "missing": "left out", "child": "left out", "good": "done",
    }  # fmt: skip
    assert not is_running(int((tmp_path / "pid").read_text()))
    table = (tmp_path / "gpu" / "x.md").read_text()
    assert "| failed: no such kernel |" in table and "longer than 2 s; last line: begun" in table
    assert "no_such_package is not installed" in table and "needs what the check broken makes" in table
    assert "| views/s | at least 1,000,000 | 2,000,000 | ok |" in table and "abc-dirty" in table

    # The next call does not repeat what is done; what ran out of time comes last.
    assert not run(gpu_check, checks, tmp_path)
    assert order(tmp_path) == ["broken", "slow"]
    checks[0], checks[1] = stand_in("slow"), stand_in("broken")
    assert run(gpu_check, [*checks[:2], *checks[3:]], tmp_path, again=["good"])
    assert order(tmp_path) == ["broken", "child", "good", "slow"]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except FileNotFoundError:
        return False


def test_everything_as_expected_is_a_success_and_runs_once(gpu_check, stand_in, tmp_path):
    checks = [stand_in("a", figures=[gpu_check.Figure("ratio", 1.4, at_most=1.5)]), stand_in("b")]
    for _ in range(2):
        assert run(gpu_check, checks, tmp_path)
    assert order(tmp_path) == ["a", "b"]
    # The checks of another commit or another torch are other checks; whether files have changed is not compared.
    assert run(gpu_check, checks, tmp_path, about={**ABOUT, "git": "abc"})
    assert not (tmp_path / "order").exists()
    assert run(gpu_check, checks, tmp_path, about={**ABOUT, "git": "def"})
    assert order(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("measured", [0.89, float("nan")])
def test_a_figure_that_is_not_as_expected_is_marked(gpu_check, stand_in, tmp_path, measured):
    checks = [stand_in("a", figures=[gpu_check.Figure("utilization", measured, at_least=0.9)])]
    assert not run(gpu_check, checks, tmp_path)
    assert statuses(tmp_path) == {"a": "done"}
    assert "| utilization | at least 0.9 |" in (text := (tmp_path / "gpu" / "x.md").read_text()) and "NOT AS" in text


def test_figures_that_cannot_be_read_are_a_failure(gpu_check, tmp_path):
    command = [sys.executable, "-c", "print('nothing')"]
    checks = [gpu_check.Check("views", "Views", 20, command, gpu_check.read_views)]
    assert not run(gpu_check, checks, tmp_path)
    assert "| failed: gpu_check: no figures, FileNotFoundError" in (tmp_path / "gpu" / "x.md").read_text()
    checks = [gpu_check.Check("views", "Views", 0.2, ["sleep", "60"], gpu_check.read_views)]
    assert not run(gpu_check, checks, tmp_path)
    assert statuses(tmp_path) == {"views": "out of time"}


def test_a_killed_call_goes_on_and_leaves_no_process(gpu_check, stand_in, tmp_path):
    """The second of three checks is killed with its parent. The same call then begins with it."""
    wait = f"""
        import os, time
        open({str(tmp_path / "pid")!r}, 'w').write(str(os.getpid()))
        time.sleep(60)
    """
    child = os.fork()
    if not child:
        try:
            run(gpu_check, [stand_in("a"), stand_in("b", wait, seconds=60), stand_in("c")], tmp_path)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 60
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pid = int((tmp_path / "pid").read_text())
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert order(tmp_path) == ["a", "b"] and statuses(tmp_path) == {"a": "done"}
    assert run(gpu_check, [stand_in("a"), stand_in("b"), stand_in("c")], tmp_path)
    assert order(tmp_path) == ["b", "c"]


def test_the_real_checks_are_in_the_order_of_their_worth(gpu_check, tmp_path):
    for device in ("cuda", "cpu"):
        checks = gpu_check.make_checks(tmp_path, device)
        names = [check.name for check in checks]
        assert [name.split("-")[0] for name in names] == [
            "tests", "views", "objectives", "data", "profile", "profile", "resident", "resident", "end_to_end",
        ]  # fmt: skip
        assert len(set(names)) == len(names) and sum(check.seconds for check in checks) <= 20 * 60
        for check in checks:
            assert all((BENCHMARKS.parent / word).exists() for word in check.command if word.endswith((".py", ".yaml")))


LOG = """
tests/test_gpu.py::test_noise PASSED                                     [ 33%]
tests/test_gpu.py::test_views[a PASSED word] FAILED                      [ 66%]
tests/training/test_optim.py::test_steps[lars] SKIPPED (needs a CUDA device) [100%]
FAILED tests/test_gpu.py::test_views[a PASSED word] - AssertionError
"""


def test_the_readers_take_what_the_benchmarks_write(gpu_check, tmp_path):
    (tmp_path / "tests.log").write_text(LOG)
    assert [figure.measured for figure in gpu_check.read_tests(tmp_path)] == [1, 1, 1]

    views = [
        {"chain": chain, "views_per_second": rate, "low": 1, "high": 9, "kernels": n, "gb_per_second": 100.0}
        for chain, rate, n in (
            ("fastssl, Triton", 2e6, 7), ("fastssl, Triton, from blocks", 1.5e6, 7),
            ("fastssl, torch chain, compiled", 1e5, 29), ("kornia, compiled", 5e4, 90),
        )
    ]  # fmt: skip
    (tmp_path / "views.json").write_text(json.dumps(views))
    found = {figure.name: figure for figure in gpu_check.read_views(tmp_path)}
    assert (
        found["fastssl, Triton / kornia, compiled"].measured == 40 and found["fastssl, Triton: kernels"].measured == 7
    )
    assert found["fastssl, Triton, from blocks / fastssl, Triton"].measured == 0.75
    assert all(figure.is_as_expected for figure in found.values())

    real = json.loads((BENCHMARKS.parent / "records" / "profile-canvas.json").read_text())
    for name in ("profile-256", "resident", "resident-graphs"):
        (tmp_path / f"{name}.json").write_text(json.dumps(real))
    found = {figure.name: figure for figure in gpu_check.profile_reader("profile-256")(tmp_path)}
    assert found["accelerator utilization"].at_least == 0.9 and found["images/s"].measured > 0
    assert [figure.measured for figure in gpu_check.resident_reader("resident-graphs")(tmp_path)][1] == 1
    assert len(gpu_check.resident_reader("resident")(tmp_path)) == 1

    (tmp_path / "end_to_end.json").write_text(
        json.dumps([{"lightly": {"images_per_second": 100.0}, "fastssl": {"images_per_second": 250.0}}])
    )
    assert not gpu_check.read_end_to_end(tmp_path)[2].is_as_expected


def test_a_check_of_this_machine_s_cpu_writes_its_record(gpu_check, tmp_path):
    """The real command of one check with the sizes of a CPU; the other checks are left for another call."""
    check = next(check for check in gpu_check.make_checks(tmp_path / "work", "cpu") if check.name == "objectives")
    run(gpu_check, [check], tmp_path)
    assert statuses(tmp_path) == {"objectives": "done"}
    table = (tmp_path / "gpu" / "x.md").read_text()
    assert "H-prob / deterministic | at most 1.5 |" in table and "python benchmarks/objectives.py" in table


def test_without_a_gpu_it_is_one_sentence():
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu_check.py"], capture_output=True, text=True, timeout=120,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("gpu_check: torch sees no GPU here")
    assert done.stderr.count("\n") == 1

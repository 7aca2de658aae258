"""The doctor reports what is installed, and what is missing with the command that fixes it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from fastssl import doctor
from fastssl.common.system import cpu_has_bf16

SOURCE = Path(doctor.__file__)


@pytest.fixture(scope="module")
def checks():
    return {check.name: check for check in doctor.run_checks()}


def test_everything_required_is_installed_here(checks):
    lacking = [check for check in checks.values() if check.required and not check.answer.ok]
    assert not lacking


def test_every_check_reports_what_it_found(checks):
    assert "decodes and resizes a JPEG" in checks["ffcv"].answer.found
    assert checks["numba"].answer.found.endswith("compiles")
    assert "built for" in checks["torch"].answer.found
    assert checks["CPU cores"].answer.found.endswith(" in bf16" if cpu_has_bf16() else " in fp32 (no bf16)")
    assert all(check.answer.found for check in checks.values())


def test_the_optional_checks(checks):
    optional = {check.name for check in checks.values() if not check.required}
    assert optional == {"GPU", "torch.compile", "CPU cores", "memory", "/dev/shm", "disk"}


def only(monkeypatch, **checks):
    monkeypatch.setattr(doctor, "CHECKS", checks)


def test_met_requirements_end_in_0(monkeypatch, capsys):
    only(monkeypatch, linux=doctor.check_platform, python=doctor.check_python)
    assert doctor.main() == 0
    assert capsys.readouterr().out.splitlines()[-1] == "Ready."


def test_a_missing_package_ends_in_2_and_shows_the_fix(monkeypatch, capsys):
    only(monkeypatch, python=doctor.check_python, nonesuch=doctor.imports("nonesuch", "nonesuch"))
    assert doctor.main() == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:2] == ["MISSING", "nonesuch"]
    assert lines[2].split()[:2] == ["fix:", "make"]
    assert lines[-1] == "Not ready: nonesuch."


def test_a_fault_of_something_optional_is_a_note(monkeypatch, capsys):
    only(monkeypatch, disk=lambda: doctor.Answer(False, "1 GB", "free some space"))
    assert doctor.main() == 0
    assert capsys.readouterr().out.split()[0] == "note"


def test_a_package_that_breaks_at_import_is_reported(monkeypatch):
    def broken():
        raise OSError("libGL.so.1: cannot open shared object file\nand more")

    only(monkeypatch, opencv=broken)
    (check,) = doctor.run_checks()
    assert not check.answer.ok
    assert check.answer.found == "OSError: libGL.so.1: cannot open shared object file"


def test_an_ffcv_that_does_not_decode_is_refused(monkeypatch):
    import ffcv.libffcv

    monkeypatch.setattr(ffcv.libffcv, "imdecode", lambda *arguments: 0)
    answer = doctor.check_ffcv()
    assert not answer.ok
    assert "wrongly" in answer.found


def test_it_runs_where_nothing_is_installed():
    # -S: without site-packages
    answer = subprocess.run([sys.executable, "-S", "-P", SOURCE], capture_output=True, text=True, timeout=60)
    assert answer.returncode == 2
    assert answer.stderr == ""
    assert "No module named 'torch'" in answer.stdout
    assert answer.stdout.count("fix: make") >= 14


def test_its_top_imports_only_the_standard_library():
    imported = set()
    for node in ast.parse(SOURCE.read_text()).body:
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    assert imported <= sys.stdlib_module_names

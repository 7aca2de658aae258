"""The doctor finds what is there, and names what is not with the line that mends it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from fastssl import doctor

SOURCE = Path(doctor.__file__)


@pytest.fixture(scope="module")
def checks():
    return {check.name: check for check in doctor.doctor()}


def test_everything_required_is_here(checks):
    lacking = [check for check in checks.values() if check.required and not check.ok]
    assert not lacking


def test_what_was_found_is_said(checks):
    assert "decodes and resizes a JPEG" in checks["ffcv"].found
    assert checks["numba"].found.endswith("compiles")
    assert "built for" in checks["torch"].found
    assert all(check.found for check in checks.values())


def test_what_is_optional_is_not_required(checks):
    optional = {check.name for check in checks.values() if not check.required}
    assert optional == {"GPU", "torch.compile", "CPU cores", "memory", "/dev/shm", "disk"}


def only(monkeypatch, **looks):
    monkeypatch.setattr(doctor, "LOOKS", looks)


def test_all_well_ends_in_0(monkeypatch, capsys):
    only(monkeypatch, linux=doctor.linux, python=doctor.python)
    assert doctor.main() == 0
    assert capsys.readouterr().out.splitlines()[-1] == "Ready."


def test_a_missing_package_ends_in_2_and_shows_the_mend(monkeypatch, capsys):
    only(monkeypatch, python=doctor.python, nonesuch=doctor.imports("nonesuch", "nonesuch"))
    assert doctor.main() == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:2] == ["MISSING", "nonesuch"]
    assert lines[2].split()[:2] == ["mend:", "make"]
    assert lines[-1] == "Not ready: nonesuch."


def test_an_optional_lack_is_a_note(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "LOOKS", {"disk": lambda: (False, "1 GB", "make room")})
    assert doctor.main() == 0
    assert capsys.readouterr().out.split()[0] == "note"


def test_a_package_that_breaks_at_import_is_reported(monkeypatch):
    def broken():
        raise OSError("libGL.so.1: cannot open shared object file\nand more")

    only(monkeypatch, opencv=broken)
    (check,) = doctor.doctor()
    assert not check.ok
    assert check.found == "OSError: libGL.so.1: cannot open shared object file"


def test_an_ffcv_that_does_not_decode_is_refused(monkeypatch):
    import ffcv.libffcv

    monkeypatch.setattr(ffcv.libffcv, "imdecode", lambda *arguments: 0)
    ok, found, _ = doctor.ffcv()
    assert not ok
    assert "wrongly" in found


def test_it_works_where_nothing_is_installed():
    # -S: without site-packages
    answer = subprocess.run([sys.executable, "-S", "-P", SOURCE], capture_output=True, text=True, timeout=60)
    assert answer.returncode == 2
    assert answer.stderr == ""
    assert "No module named 'torch'" in answer.stdout
    assert answer.stdout.count("mend: make") >= 14


def test_its_top_imports_the_standard_library_alone():
    imported = set()
    for node in ast.parse(SOURCE.read_text()).body:
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    assert imported <= sys.stdlib_module_names

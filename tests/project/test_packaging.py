"""The installation's promises that can be held without installing anything."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fastssl.cli import app

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DEPENDENCIES = [
    Requirement(line)
    for lines in (
        PYPROJECT["project"]["dependencies"],
        *PYPROJECT["project"]["optional-dependencies"].values(),
    )
    for line in lines
]
PINS = {
    canonicalize_name(name): version
    for name, _, version in (line.partition("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    if version
}


def test_one_sentence_says_what_this_is():
    tagline = PYPROJECT["project"]["description"]
    assert f"**{tagline}**" in (ROOT / "README.md").read_text()
    assert app.info.help == tagline


def run(*command, **environment):
    # make hands its flags and variables to what it starts, and `make test` started these tests.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    inherited = {k: v for k, v in inherited.items() if k not in ("PYTHON", "TORCH")}
    return subprocess.run(
        command,
        cwd=ROOT,
        env=inherited | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_make_alone_lists_every_target():
    listed = run("make")
    assert listed.returncode == 0, listed.stderr
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.M).group(1).split()
    assert {"help", "setup", "demo", "test", "lint", "wheel", "clean"} <= set(targets)
    for target in targets:
        assert re.search(rf"^  make {target} +\S", listed.stdout, re.M), target


@pytest.mark.parametrize("target", ["demo", "test", "test-slow", "lint"])
def test_each_target_sets_up_first(target):
    dry = run("make", "--dry-run", target)
    assert dry.stdout.splitlines()[0] == "scripts/setup.sh", dry.stderr


def test_ci_runs_make_lint_and_make_test_from_a_script_that_can_be_executed():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-2:] == ["make lint", "make test"]


# -- versions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dependency", DEPENDENCIES, ids=lambda dependency: dependency.name)
def test_every_dependency_is_pinned_within_its_bounds(dependency):
    pinned = PINS.get(canonicalize_name(dependency.name))
    assert pinned, f"constraints.txt does not pin {dependency.name}"
    assert dependency.specifier.contains(pinned)


def test_everything_that_the_dependencies_bring_is_pinned():
    """A package added to pyproject.toml may bring others: they belong in constraints.txt too."""
    unpinned, seen = set(), set()
    waiting = [str(dependency) for dependency in DEPENDENCIES]
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        try:
            asked_for = metadata.requires(name) or []
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if name not in PINS:
            unpinned.add(name)
        if name == "torch" and version.partition("+")[0] != PINS["torch"]:
            continue  # TORCH=system: what another torch brings is not ours to pin
        for line in asked_for:
            marker = Requirement(line).marker
            extras = requirement.extras or {""}
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(line)
    assert not unpinned


def test_the_ffcv_version_is_the_same_everywhere():
    in_scripts = re.search(r"^FFCV_VERSION=(\S+)$", (ROOT / "scripts/lib.sh").read_text(), re.M)
    (in_project,) = (d for d in DEPENDENCIES if d.name == "ffcv")
    assert f"=={in_scripts.group(1)}" == str(in_project.specifier)
    assert in_scripts.group(1) == PINS["ffcv"]


def test_no_dependency_brings_the_opencv_that_needs_libgl():
    assert "opencv-python" not in PINS
    asked_for = [Requirement(line).name for line in metadata.requires("ffcv")]
    assert "opencv-python-headless" in asked_for
    assert "opencv-python" not in asked_for


# -- what is shipped ------------------------------------------------------------------------------


def test_the_wheel_ships_the_builders_and_the_recipes(tmp_path):
    from hatchling.builders.wheel import WheelBuilder

    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"fastssl/doctor.py", "beton_builders/__init__.py"} <= names
    recipes = {path.relative_to(ROOT) for path in (ROOT / "recipes").rglob("*.yaml")}
    assert {f"fastssl/{recipe}" for recipe in recipes} <= names
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"fastssl", "beton_builders"}


def dockerfile_stages():
    """The instructions of each stage, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    stages = []
    for line in lines:
        if line.startswith("FROM "):
            stages.append([])
        elif stages:
            stages[-1].append(line)
    return stages


def test_the_dockerfile_installs_through_the_makefile():
    wheel, final = dockerfile_stages()
    assert "RUN make wheel" in wheel
    assert "COPY --from=wheel /opt/fastssl/.cache .cache" in final
    (setup,) = (line for line in final if "make setup" in line)
    # Beside make, only apt runs, for what `make` itself and torch.compile need.
    for line in (*wheel, *final):
        if line.startswith("RUN ") and line not in ("RUN make wheel", setup):
            assert line.startswith("RUN apt-get update && apt-get install -y")
    assert "pip install" not in (ROOT / "Dockerfile").read_text()


def test_the_dockerfile_copies_what_is_there():
    for line in (line for stage in dockerfile_stages() for line in stage):
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), line


# -- what the scripts say -------------------------------------------------------------------------


@pytest.fixture
def bare_path(tmp_path):
    """A PATH with the tools that the scripts themselves use: no apt, no sudo, no compiler."""
    for tool in ("bash", "cat", "dirname", "env", "id", "uname"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    return tmp_path


def add_tool(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!{shutil.which('bash')}\n{body}\n")
    (folder / name).chmod(0o755)


def one_sentence(answer) -> str:
    assert answer.returncode == 1
    (line,) = answer.stderr.splitlines()
    assert line.startswith("fastssl: ")
    return line


def test_no_apt_is_one_sentence_that_names_what_is_missing(bare_path):
    answer = run("scripts/system_packages.sh", "build", PATH=str(bare_path), PYTHON=sys.executable)
    line = one_sentence(answer)
    assert "apt-get was not found" in line
    assert "g++ pkg-config" in line and "libturbojpeg0-dev" in line


def test_neither_root_nor_sudo_is_one_sentence_with_the_line_to_run(bare_path):
    (bare_path / "id").unlink()
    add_tool(bare_path, "id", "echo 1000")
    add_tool(bare_path, "apt-get", "echo apt-get must not run; exit 9")
    answer = run("scripts/system_packages.sh", "build", PATH=str(bare_path), PYTHON=sys.executable)
    assert "apt-get install --no-install-recommends g++ pkg-config" in one_sentence(answer)


def test_sudo_is_used_where_not_root(bare_path):
    (bare_path / "id").unlink()
    add_tool(bare_path, "id", "echo 1000")
    add_tool(bare_path, "apt-get", "echo apt-get $*")
    add_tool(bare_path, "sudo", 'echo as root: $*; "$@"')
    answer = run("scripts/system_packages.sh", "build", PATH=str(bare_path), PYTHON=sys.executable)
    assert answer.returncode == 0, answer.stderr
    assert "as root: apt-get update" in answer.stdout
    assert re.search(r"^apt-get install -y .*g\+\+ pkg-config", answer.stdout, re.M)


def test_nothing_missing_asks_for_nothing(bare_path):
    """This environment exists, so what it needs to run is here, and apt is not called."""
    answer = run("scripts/system_packages.sh", "run", PATH=str(bare_path), PYTHON=sys.executable)
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "body, said",
    [
        ('[[ $1 == -V ]] && echo "Python 3.10.12"; exit 1', "is Python 3.10.12"),
        (None, "was not found"),
    ],
)
def test_a_python_that_will_not_do_is_one_sentence(bare_path, body, said):
    if body:
        add_tool(bare_path, "python3.10", body)
    answer = run("scripts/system_packages.sh", "run", PATH=str(bare_path), PYTHON="python3.10")
    line = one_sentence(answer)
    assert said in line and "make setup PYTHON=" in line


def test_a_wrong_torch_choice_is_one_sentence():
    assert "'pip' or 'system', not 'cuda'" in one_sentence(run("scripts/setup.sh", TORCH="cuda"))


# -- over an installed torch ----------------------------------------------------------------------


def test_an_installed_torch_keeps_what_it_stands_on(tmp_path):
    (tmp_path / "lib/python3/site-packages").mkdir(parents=True)
    answer = run(sys.executable, "scripts/system_torch.py", "constraints.txt", str(tmp_path))
    pins = dict(line.split("==") for line in answer.stdout.splitlines() if line and line[0] != "#")
    assert pins["torch"] == metadata.version("torch")
    assert pins["torchvision"] == metadata.version("torchvision")
    assert "timm" in pins and "numba" in pins
    assert not {"numpy", "pillow", "sympy", "triton"} & set(pins)
    assert not [name for name in pins if name.startswith(("nvidia-", "cuda-"))]


def test_no_torch_to_keep_is_one_sentence(tmp_path):
    # -S: without site-packages, so without torch
    answer = run(sys.executable, "-S", "scripts/system_torch.py", "constraints.txt", str(tmp_path))
    assert "TORCH=system" in one_sentence(answer)

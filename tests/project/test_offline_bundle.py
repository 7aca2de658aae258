"""`make offline-bundle`: what goes in, and what its install script does on a host. Nothing here uses a network."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

# setuptools first: once pip is imported, setuptools fails to import, and torch.compile of a later test needs it.
# isort: off
import setuptools  # noqa: F401
import pip

# isort: on
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import offline_bundle  # noqa: E402
import offline_install  # noqa: E402

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
PURE, COMPILED = "py3-none-any", "cp312-cp312-manylinux_2_28_x86_64"


def item(name, version, requires=(), tag=PURE):
    return {
        "download_info": {"url": f"https://pypi.example/{name}-{version}-{tag}.whl"},
        "metadata": {"name": name, "version": version, "requires_dist": list(requires)},
        "requested": name == "fastssl-trainer",
    }


REPORT = {
    "install": [
        item(
            "fastssl-trainer",
            "0.1.0",
            ["torch>=2.13", "numba>=0.61", "numpy>=2", "opencv-python-headless>=4.10", "rich", "pytest; extra=='dev'"],
        ),
        item("torch", "2.15.0", ["typing_extensions>=4.10", "sympy", "cuda-toolkit[cublas]==13"], COMPILED),
        item("cuda-toolkit", "13", ["nvidia-cublas; extra=='cublas'", "nvidia-cufft; extra=='cufft'"]),
        item("nvidia-cublas", "13.4", tag="py3-none-manylinux_2_27_x86_64"),
        item("sympy", "1.14", ["mpmath"]),
        item("mpmath", "1.3"),
        item("Typing_Extensions", "4.16.0"),
        item("numba", "0.68", ["numpy>=1.22", "llvmlite==0.50"], COMPILED),
        item("llvmlite", "0.50", tag=COMPILED),
        item("numpy", "2.4", tag=COMPILED),
        item("opencv-python-headless", "5.0", ["numpy>=2"], "cp37-abi3-manylinux_2_28_x86_64"),
        item("rich", "15.0", ["typing-extensions>=4.12", "tomli; python_version < '3.12'"]),
        item("tomli", "2.0"),
    ]
}


@pytest.fixture
def packages():
    return offline_bundle.read_report(REPORT, "3.12")


def bundled(packages, *host_has):
    names, lacking = offline_install.plan(packages, offline_bundle.read_host(host_has, packages))
    assert not lacking
    return set(names)


# -- what goes in ---------------------------------------------------------------------------------


def test_markers_are_those_of_the_hosts_python(packages):
    assert "tomli" not in packages["rich"]["requires"]
    assert "tomli" in offline_bundle.read_report(REPORT, "3.11")["rich"]["requires"]


def test_what_only_the_hosts_python_asks_for_is_asked_for_next():
    ours = item("fastssl-trainer", "0.1.0", ["rich", "new>=2; python_version >= '3.14'"])
    report = {"install": [ours, item("rich", "15.0")]}
    assert offline_bundle.not_resolved(offline_bundle.read_report(report, "3.12")) == []
    assert offline_bundle.not_resolved(offline_bundle.read_report(report, "3.14")) == ["new>=2"]


def test_extras_bring_what_they_name(packages):
    assert set(packages["cuda-toolkit"]["requires"]) == {"nvidia-cublas"}
    assert "pytest" not in packages["fastssl-trainer"]["requires"]


def test_without_options_everything_goes_in(packages):
    assert bundled(packages) == set(packages)


def test_a_host_with_torch_has_what_torch_stands_on(packages):
    left_out = set(packages) - bundled(packages, "torch")
    # rich asks for typing-extensions too: a small wheel, and the host's version is not known.
    assert left_out == {"torch", "sympy", "mpmath", "cuda-toolkit", "nvidia-cublas"}


def test_numba_brings_llvmlite_and_numpy(packages):
    assert not bundled(packages, "torch", "numba") & {"numba", "llvmlite", "numpy", "torch"}


def test_any_opencv_will_do(packages):
    assert "opencv-python-headless" not in bundled(packages, "opencv-python")


def test_the_host_is_told_what_it_must_have(packages):
    names = bundled(packages, "torch", "numba")
    asked = offline_bundle.required_of_host({name: packages[name] for name in names})
    assert asked == {"numba": ">=0.61", "numpy": ">=2", "torch": ">=2.13"}


@pytest.mark.parametrize(
    "lines",
    [
        "torch==2.13.0+cu130\nnumpy==1.26\nnumba @ file:///build/numba\n-e git+https://example/x\nunheard-of==1",
        "Package  Version\n-------- -------\ntorch    2.13.0a0+nv26\nnumpy    1.26\nnumba\n",
    ],
)
def test_a_list_of_the_hosts_packages_counts_as_it_stands(packages, tmp_path, lines):
    (tmp_path / "host.txt").write_text(lines)
    names = bundled(packages, str(tmp_path / "host.txt"))
    # Its numpy is too old; what torch and numba stand on is theirs.
    assert names == {"fastssl-trainer", "numpy", "opencv-python-headless", "rich", "typing-extensions"}


@pytest.mark.parametrize(
    "word, said",
    [
        ("numbas", "did you mean numba?"),
        ("pytorch", "did you mean torch?"),
        ("opencv", "did you mean opencv-python"),
        ("zzz", "leave it out"),
        ("fastssl-trainer", "HOST_HAS names fastssl-trainer"),
        ("no/host.txt", "does not exist"),
    ],
)
def test_a_wrong_word_is_one_sentence(packages, word, said):
    with pytest.raises(SystemExit, match="^fastssl: .*") as stopped:
        offline_bundle.read_host([word], packages)
    assert said in str(stopped.value) and "\n" not in str(stopped.value)


def test_a_file_that_lists_nothing_is_one_sentence(packages, tmp_path):
    (tmp_path / "host.txt").write_text("\n")
    with pytest.raises(SystemExit, match="lists no package"):
        offline_bundle.read_host([str(tmp_path / "host.txt")], packages)


def test_usual_names_direct_dependencies():
    pyproject = (ROOT / "pyproject.toml").read_text()
    for name in offline_bundle.USUAL:
        assert f'"{name}>=' in pyproject


@pytest.mark.parametrize(
    "stderr, said",
    [
        ("WARNING: Retrying after connection broken by 'NewConnectionError'\nERROR: No", "PyPI does not answer"),
        ("WARNING: x\nERROR: No matching distribution found for numpy==2.4.6\n", "Python 3.15; pip says: No matching"),
    ],
)
def test_what_pip_says_becomes_one_sentence(monkeypatch, stderr, said):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1, stderr=stderr))
    with pytest.raises(SystemExit) as stopped:
        offline_bundle.run_pip("install", python="3.15")
    assert said in str(stopped.value) and "\n" not in str(stopped.value)


# -- versions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "version, specifier, will_do",
    [
        ("2.13.0", ">=2.13", True),
        ("2.12.1", ">=2.13", False),
        ("2.13.0a0+nv26.10", ">=2.13", True),
        ("2.15.0+cu130", "==2.15.0", True),
        ("2.14.0", "==2.15.0", False),
        ("any", "==2.15.0", True),
        ("git-abc", ">=1", True),
    ],
)
def test_which_versions_will_do(version, specifier, will_do):
    assert offline_install.meets(version, specifier) == will_do


def test_several_specifiers_are_told_as_one():
    assert offline_install.merged([">=1.9", "", ">=1.22,<3", ">=1.10"]) == ">=1.22,<3"


def test_what_an_installed_package_pins_is_not_forced_on_it():
    """pydantic pins pydantic-core: a host with both keeps both."""
    table = {
        "fastssl-trainer": {"requires": {"pydantic": ">=2.10"}},
        "pydantic": {"requires": {"pydantic-core": "==2.50.4"}},
        "pydantic-core": {"requires": {}},
    }
    assert offline_install.plan(table, {"pydantic": "2.11", "pydantic-core": "2.33"})[0] == ["fastssl-trainer"]
    assert offline_install.plan(table, {"pydantic": "2.9", "pydantic-core": "2.23"})[0] == list(table)


# -- make offline-bundle --------------------------------------------------------------------------


def from_lib(function, root):
    script = f"source scripts/lib.sh; {function}"
    return subprocess.run(["bash", "-c", script], cwd=root, capture_output=True, text=True).stdout.strip()


def make_bundle(root, **environment):
    inherited = {k: v for k, v in os.environ.items() if k not in ("PY", "HOST_HAS", "PYTHON")}
    return subprocess.run(
        ["scripts/offline_bundle.sh"],
        cwd=root,
        env=inherited | {"PYTHON": sys.executable} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    "py, said",
    [
        ("", "make offline-bundle PY=3.12"),
        ("abc", "not 'abc'"),
        ("3.12.1", "not '3.12.1'"),
        ("3.9", "Python 3.11 or newer on the host, and PY is 3.9"),
    ],
)
def test_a_wrong_python_is_one_sentence(py, said):
    answer = make_bundle(ROOT, PY=py)
    (line,) = answer.stderr.splitlines()
    assert answer.returncode == 1 and line.startswith("fastssl: ") and said in line


def test_without_network_the_last_bundle_stays(tmp_path):
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    shutil.copy(ROOT / "constraints.txt", tmp_path)
    wheels = tmp_path / from_lib("wheel_folder", tmp_path)
    wheels.mkdir(parents=True)
    (wheels / "ffcv-1.0.2-cp311-abi3-manylinux_2_35_x86_64.whl").touch()
    (tmp_path / "dist/offline-cp312").mkdir(parents=True)
    answer = make_bundle(tmp_path, PY="3.12", PIP_NO_INDEX="1", PIP_FIND_LINKS="", PIP_CONFIG_FILE=os.devnull)
    assert answer.returncode == 1
    assert answer.stderr.splitlines()[-1].startswith("fastssl: ") and "on a machine with network" in answer.stderr
    assert [path.name for path in (tmp_path / "dist").iterdir()] == ["offline-cp312"]


def test_one_ffcv_wheel_serves_every_python():
    wheel = from_lib("ffcv_wheel", ROOT)
    if not wheel:
        pytest.skip("`make wheel` has not run here")
    files = zipfile.ZipFile(ROOT / wheel)
    names = files.namelist()
    assert "-cp311-abi3-" in wheel
    assert "ffcv/_libffcv.abi3.so" in names and not [name for name in names if ".cpython-" in name]
    assert b"distutils" not in files.read("ffcv/pipeline/graph.py")  # not in Python since 3.12


# -- on the host ----------------------------------------------------------------------------------


def write_wheel(folder, name, version):
    """A wheel with one module that knows its version."""
    module, info = name.replace("-", "_"), f"{name.replace('-', '_')}-{version}.dist-info"
    files = {
        f"{module}.py": f"version = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {PURE}\n",
    }
    record = "".join(
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip('=')},\n"
        for path, text in files.items()
    )
    file = folder / f"{module}-{version}-{PURE}.whl"
    with zipfile.ZipFile(file, "w") as wheel:
        for path, text in (files | {f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}).items():
            wheel.writestr(path, text)
    return file.name


@pytest.fixture
def bundle(tmp_path):
    """A bundle of two packages that was made for a host with torch."""
    folder = tmp_path / "offline bundle"  # a name with a space
    (folder / "pip").mkdir(parents=True)
    (folder / "pip/pip").symlink_to(Path(pip.__file__).parent)
    shutil.copy(ROOT / "scripts/offline_install.py", folder / "install.py")
    packages = {
        "fastssl-trainer": {"requires": {"torch": ">=2.13", "small": ">=2"}, "version": "0.1.0"},
        "small": {"requires": {}, "version": "2.0"},
    }
    for name, package in packages.items():
        package["wheel"] = write_wheel(folder, name, package["version"])
    table = {"python": PYTHON, "glibc": "2.17", "pip": "pip", "packages": packages}
    (folder / "bundle.json").write_text(json.dumps(table))
    return folder


@pytest.fixture
def host(tmp_path):
    """A Python without packages, and a way to give it some."""
    venv.create(tmp_path / "host", with_pip=False)

    class Host:
        python = tmp_path / "host/bin/python"
        (site,) = (tmp_path / "host").glob("lib/python*/site-packages")

        def has(self, name, version):
            wheel = write_wheel(self.site, name, version)
            zipfile.ZipFile(self.site / wheel).extractall(self.site)
            (self.site / wheel).unlink()

        def runs(self, *command, **environment):
            inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON"))}
            answer = subprocess.run(
                [self.python, *command], env=inherited | environment, capture_output=True, text=True, timeout=60
            )
            return answer

    return Host()


def one_sentence(answer):
    assert answer.returncode == 1
    (line,) = answer.stderr.splitlines()
    assert line.startswith("fastssl: ")
    return line


def test_a_host_that_lacks_something_is_left_alone(bundle, host):
    assert "lacks packages that this bundle leaves out: torch>=2.13." in one_sentence(host.runs(bundle / "install.py"))
    host.has("torch", "2.11.0")
    line = one_sentence(host.runs(bundle / "install.py"))
    assert "torch>=2.13 (it has 2.11.0)" in line and f"make offline-bundle PY={PYTHON} HOST_HAS=host.txt" in line
    assert not list(host.site.glob("small*"))


def test_what_the_host_has_stays_and_what_it_lacks_comes(bundle, host):
    host.has("torch", "2.13.0a0+nv26")
    host.has("small", "2.7")
    answer = host.runs(bundle / "install.py")
    assert answer.returncode == 0, answer.stderr
    assert "installed fastssl-trainer 0.1.0\n" in answer.stdout and "-m fastssl doctor" in answer.stdout
    assert host.runs("-c", "import fastssl_trainer, small; print(small.version)").stdout == "2.7\n"


def test_what_will_not_do_is_replaced_and_named(bundle, host):
    host.has("torch", "2.15.0")
    host.has("small", "1.0")
    answer = host.runs(bundle / "install.py")
    assert answer.returncode == 0, answer.stderr
    assert "small 1.0 is too old or too new: replacing it by 2.0" in answer.stdout
    assert host.runs("-c", "import small; print(small.version)").stdout == "2.0\n"


def test_a_folder_of_its_own(bundle, host, tmp_path):
    host.has("torch", "2.15.0")
    for _ in range(2):  # again: a newer bundle takes the first one's place
        answer = host.runs(bundle / "install.py", "--target", tmp_path / "site")
        assert answer.returncode == 0, answer.stderr
        assert f'export PYTHONPATH="{tmp_path}/site"' in answer.stdout
    assert not list(host.site.glob("small*"))
    read = host.runs("-c", "import small; print(small.version)", PYTHONPATH=str(tmp_path / "site"))
    assert read.stdout == "2.0\n"


@pytest.mark.parametrize(
    "key, value, said",
    [("python", "3.10", "is for Python 3.10"), ("glibc", "9.9", "needs glibc 9.9")],
)
def test_another_host_is_one_sentence(bundle, host, key, value, said):
    table = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps(table | {key: value}))
    assert said in one_sentence(host.runs(bundle / "install.py"))

"""Fill a folder with the wheels that a host lacks, and the script that installs them there.

    python offline_bundle.py FOLDER PY WHEELS CONSTRAINTS [HOST_HAS...]

FOLDER: to fill. PY: the host's Python, 3.12. WHEELS: a folder with our own wheel, FFCV's and those of
packages that PyPI has only as source. HOST_HAS: names of packages, "usual" for those that a host
with PyTorch commonly has, or a file that the host's `pip list --format=freeze` wrote. Called by
offline_bundle.sh.
"""

import difflib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pip
from offline_install import OURS, STAND_INS, merged, plan
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

USUAL = "torch torchvision timm numba opencv-python-headless scikit-learn matplotlib".split()
MB = 1e6


def die(sentence):
    sys.exit(f"fastssl: {sentence}")


# -- the dependencies of fastssl -----------------------------------------------------------------------


def read_report(report, python):
    """{name: {version, compiled, requires: {name: specifier}}} from `pip install --report`.

    What a package requires depends on the host's Python, not on the one that runs pip.
    """
    environment = default_environment() | {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "implementation_version": f"{python}.0",
    }
    items = {canonicalize_name(item["metadata"]["name"]): item for item in report["install"]}
    extras = {name: {""} for name in items}  # torch asks for cuda-toolkit[cublas,...]
    packages = {}
    waiting = [OURS]
    while waiting:
        name = waiting.pop()
        metadata, requires = items[name]["metadata"], {}
        for line in map(Requirement, metadata.get("requires_dist", [])):
            if line.marker and not any(line.marker.evaluate(environment | {"extra": extra}) for extra in extras[name]):
                continue
            needed = canonicalize_name(line.name)
            requires[needed] = ",".join(filter(None, (requires.get(needed), str(line.specifier))))
            if needed in items and (needed not in packages or not line.extras <= extras[needed]):
                extras[needed] |= line.extras
                waiting.append(needed)
        compiled = not items[name]["download_info"]["url"].endswith("-none-any.whl")
        packages[name] = {"version": metadata["version"], "compiled": compiled, "requires": requires}
    return packages


def not_resolved(packages):
    """Return what the host's Python requires and the one that runs pip does not."""
    return sorted(
        {
            needed + specifier
            for package in packages.values()
            for needed, specifier in package["requires"].items()
            if needed not in packages
        }
    )


def with_dependencies(names, packages):
    found = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += packages[name]["requires"]
    return found


# -- what the host has ----------------------------------------------------------------------------


def read_list(path):
    """{name: version} from what `pip list`, in either format, or `pip freeze` wrote."""
    if not Path(path).is_file():
        die(f"HOST_HAS names the file {path}, which does not exist.")
    found = {}
    for line in Path(path).read_text().splitlines():
        match = re.match(r"([A-Za-z0-9][A-Za-z0-9._-]*)(?:==|\s+|$)(\S*)", line)
        if match:
            name, version = match.groups()
            found[canonicalize_name(name)] = version if version[:1].isdigit() else "any"
    return found or die(f"{path} lists no package; on the host: python3 -m pip list --format=freeze >host.txt")


def read_host(words, packages):
    """{name: version} of what the host has; "any" if the version is not known."""
    host, named = {}, []
    stands_for = {other: name for name, others in STAND_INS.items() for other in others}
    for word in words:
        name, _, version = word.partition("==")
        name = canonicalize_name(name)
        name = stands_for.get(name, name)
        if word == "usual":
            named += USUAL
        elif "/" in word or word.endswith(".txt"):
            host |= read_list(word)
        elif name in packages and name != OURS:
            named.append(name)
            if version:
                host[name] = version
        else:
            known = ["usual", *packages, *stands_for]
            close = difflib.get_close_matches(name, known, n=1) or [other for other in known if name in other]
            hint = f"did you mean {close[0]}?" if close else "leave it out."
            die(f"HOST_HAS names {word}, which is not a dependency of fastssl; {hint}")
    # A host that has torch has the dependencies of torch. Pure Python ones are small, though, and their versions there
    # are unknown, so the bundle contains them: nobody should have to come back for a newer typing-extensions.
    for name in with_dependencies(named, packages):
        if name in named or packages[name]["compiled"]:
            host.setdefault(name, "any")
    return host


def required_of_host(bundled):
    """{name: specifier}: what the bundled packages require and the bundle does not hold."""
    asked = {}
    for package in bundled.values():
        for needed, specifier in package["requires"].items():
            if needed not in bundled:
                asked.setdefault(needed, []).append(specifier)
    return {name: merged(specifiers) for name, specifiers in sorted(asked.items())}


# -- pip ------------------------------------------------------------------------------------------


def run_pip(*arguments, python):
    """Run pip; an error becomes one sentence."""
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], stderr=subprocess.PIPE, text=True)
    if done.returncode == 0:
        return
    if re.search(r"connection|name resolution|timed out|ProxyError", done.stderr, re.I):
        die("PyPI does not answer; run `make offline-bundle` on a machine with network, then copy the folder.")
    errors = [line[7:] for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    die(f"PyPI lacks a package for Python {python}; pip says: {(errors or [done.stderr.strip()])[0]}")


def for_host(python, glibc):
    """Return pip's options for wheels that run on the host, whatever this machine is."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(glibc, 4, -1)]
    platforms += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]
    options = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    return options + [word for name in platforms for word in ("--platform", name)]


def resolve(python, wheels, constraints, options, report):
    """Return all dependencies of fastssl at the versions of the constraints, without downloading them."""
    added = []
    while True:
        run_pip(
            *("install", "--quiet", "--dry-run", "--ignore-installed", "--report", str(report)),
            *("--constraint", constraints, "--find-links", str(wheels), *options),
            *(str(next(wheels.glob("fastssl_trainer-*.whl"))), *added),
            python=python,
        )
        packages = read_report(json.loads(report.read_text()), python)
        if not (more := not_resolved(packages)):
            return packages
        added += more


# -- the folder -----------------------------------------------------------------------------------


def write_readme(folder, python, glibc, asked):
    usage = Path(__file__).with_name("offline_install.py").read_text().split('"""')[1]
    (folder / "README.txt").write_text(
        f"{usage.strip()}\n\n"
        f"For Linux x86-64 with Python {python} and glibc {glibc} or newer"
        + (f" that has\n{', '.join(name + specifier for name, specifier in asked.items())}" if asked else "")
        + ".\n"
    )


def main(folder, python, wheels, constraints, *host_has):
    folder, wheels = Path(folder), Path(wheels)
    (ffcv,) = wheels.glob("ffcv-*.whl")
    # FFCV's wheel was built here, and runs with this C library or a newer one.
    glibc = max(int(minor) for minor in re.findall(r"manylinux_2_(\d+)_", ffcv.name))
    options = for_host(python, glibc)
    packages = resolve(python, wheels, constraints, options, wheels / "report.json")
    names, _ = plan(packages, read_host(host_has, packages))
    bundled = {name: packages[name] for name in sorted(names)}

    print(f"fastssl: downloading {len(bundled)} of {len(packages)} packages", flush=True)
    quiet = () if "nvidia-cublas" in bundled else ("--quiet",)  # show a progress bar for 3 GB
    run_pip(
        *("download", *quiet, "--no-deps", "--dest", str(folder), "--find-links", str(wheels), *options),
        *(f"{name}=={package['version']}" for name, package in bundled.items()),
        f"pip=={pip.__version__}",
        python=python,
    )
    files = {parse_wheel_filename(path.name)[0]: path for path in folder.glob("*.whl")}
    for name, package in bundled.items():
        package["wheel"] = files[name].name
    asked = required_of_host(bundled)
    table = {"python": python, "glibc": f"2.{glibc}", "pip": files["pip"].name, "packages": bundled}
    (folder / "bundle.json").write_text(json.dumps(table, indent=1) + "\n")
    shutil.copy(Path(__file__).with_name("offline_install.py"), folder / "install.py")
    write_readme(folder, python, f"2.{glibc}", asked)

    sizes = {name: path.stat().st_size / MB for name, path in files.items()}
    total = sum(sizes.values())
    print(f"fastssl: {len(files)} wheels, {total:.0f} MB, for Python {python} and glibc 2.{glibc} or newer")
    if asked:
        print(f"fastssl: the host must have {', '.join(name + specifier for name, specifier in asked.items())}")
    if total > 60:
        largest = sorted(set(sizes) - {OURS, "ffcv"}, key=sizes.get, reverse=True)[:6]
        listed = ", ".join(f"{name} {sizes[name]:.0f}" for name in largest)
        print(f"fastssl: the largest, in MB: {listed}; HOST_HAS leaves out what the host has")
        print(f"fastssl: HOST_HAS=usual, for a host with {', '.join(USUAL)}, makes a small one")


if __name__ == "__main__":
    main(*sys.argv[1:])

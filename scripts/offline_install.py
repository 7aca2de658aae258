"""Installs the wheels of this folder into the Python that runs it: without network, compiler or root.

    python3 install.py                  where this Python installs packages; best in a virtual environment
    python3 install.py --user           into the home folder
    python3 install.py --target site    into a folder of its own, for a Python that cannot be written to

What is given is handed to pip, whose wheel is in the folder too. What the host has in a version that
will do is left as it is. Where something is missing that the bundle was made without, nothing is
installed.
"""

import json
import os
import platform
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
OURS = "fastssl-trainer"
# Each of these holds the same module cv2.
STAND_INS = {"opencv-python-headless": ("opencv-python", "opencv-contrib-python-headless", "opencv-contrib-python")}


def die(sentence):
    sys.exit(f"fastssl: {sentence}")


def host_packages():
    """The installed packages and their versions."""
    from importlib import metadata

    from pip._vendor.packaging.utils import canonicalize_name

    found = {}
    for package in metadata.distributions():
        if package.metadata["Name"]:  # a half-removed package has none
            found.setdefault(canonicalize_name(package.metadata["Name"]), package.version)
    return found


def version_at(name, host):
    """The version that the host has of a package, or of one that stands in for it; None where it has neither."""
    return next((host[other] for other in (name, *STAND_INS.get(name, ())) if other in host), None)


def meets(version, specifier):
    """Whether a version will do; "any" always does."""
    from pip._vendor.packaging.specifiers import SpecifierSet
    from pip._vendor.packaging.version import InvalidVersion, Version

    try:
        # NVIDIA's images call their torch 2.13.0a0+..., which would count as older than 2.13.
        return version == "any" or SpecifierSet(specifier).contains(Version(version).base_version)
    except InvalidVersion:
        return True


def merged(specifiers):
    """One specifier for several, with the highest of their lower bounds."""
    from pip._vendor.packaging.version import Version

    parts = {part for specifier in specifiers for part in specifier.split(",") if part}
    bounds = sorted((part for part in parts if part.startswith(">=")), key=lambda part: Version(part[2:]))
    return ",".join([*bounds[-1:], *sorted(parts.difference(bounds))])


def plan(packages, host):
    """What to install on a host, and what it lacks that is not among the packages.

    packages: {name: {"requires": {name: specifier}}}; host: {name: version}. What the host lacks is
    {name: [specifier]}.
    """
    install, lacking = [OURS], {}
    for name in install:  # grows on the way
        for needed, specifier in packages[name]["requires"].items():
            version = version_at(needed, host)
            if needed in install or (version and meets(version, specifier)):
                continue
            if needed in packages:
                install.append(needed)
            else:
                lacking.setdefault(needed, []).append(specifier)
    return install, lacking


def main(pip_options):
    with open(os.path.join(HERE, "bundle.json")) as file:
        bundle = json.load(file)
    python = "{}.{}".format(*sys.version_info[:2])
    if python != bundle["python"]:
        die(
            f"this bundle is for Python {bundle['python']}, and {sys.executable} is {python}; run it with"
            f" python{bundle['python']}, or make another: make offline-bundle PY={python}"
        )
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        die(f"runs on Linux x86-64 only, and this is {platform.system()} {platform.machine()}.")
    libc = os.confstr("CS_GNU_LIBC_VERSION").split()[1]
    if [int(part) for part in libc.split(".")] < [int(part) for part in bundle["glibc"].split(".")]:
        die(f"this bundle needs glibc {bundle['glibc']}, and this host has {libc}; take a newer container.")

    # pip runs from its wheel and lends its rules for versions: many hosts have an old one or none.
    pip = os.path.join(HERE, bundle["pip"])
    sys.path.insert(0, pip)
    packages, host = bundle["packages"], host_packages()
    names, lacking = plan(packages, host)
    if lacking:
        listed = [
            name + merged(specifiers) + (f" (it has {version_at(name, host)})" if version_at(name, host) else "")
            for name, specifiers in sorted(lacking.items())
        ]
        die(
            f"{sys.executable} lacks what this bundle was made without: {', '.join(listed)}. Nothing was installed."
            " For a bundle that fits, here: python3 -m pip list --format=freeze > host.txt; and where the network is:"
            f" make offline-bundle PY={python} HOST_HAS=host.txt"
        )
    for name in names:
        if name in host and name != OURS:
            print(f"fastssl: {name} {host[name]} will not do; {packages[name]['version']} takes its place", flush=True)

    # --no-deps: all was checked above, and under --target pip would look for torch in this folder.
    # --force-reinstall: a second bundle of the same version number takes the first one's place.
    wheels = [os.path.join(HERE, packages[name]["wheel"]) for name in names]
    command = [sys.executable, os.path.join(pip, "pip"), "install", "--quiet", "--no-index", "--no-deps", "--upgrade"]
    if subprocess.call([*command, "--force-reinstall", *pip_options, *wheels]) != 0:
        die("pip could not install; its lines above say why. `--target FOLDER` needs no right but to that folder.")

    print("fastssl: installed", ", ".join(f"{name} {packages[name]['version']}" for name in names))
    for option, following in zip(pip_options, [*pip_options[1:], ""]):
        if option in ("-t", "--target") or option.startswith("--target="):
            folder = os.path.abspath(option.partition("=")[2] or following)
            print(f'fastssl: before each use: export PYTHONPATH="{folder}"')
    print(f"fastssl: to check: {sys.executable} -m fastssl doctor")


if __name__ == "__main__":
    main(sys.argv[1:])

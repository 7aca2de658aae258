"""Install the wheels of this folder into the Python that runs it: without network, compiler or root.

    python3 install.py                  where this Python installs packages; best in a virtual environment
    python3 install.py --user           into the home folder
    python3 install.py --target site    into a separate folder, for a Python that cannot be written to

Options are passed to pip, whose wheel is in the folder too. Packages that the host has in a suitable version stay as
they are. If a package is missing on the host and in the bundle, nothing is installed.
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
    """Return the installed packages and their versions."""
    from importlib import metadata

    from pip._vendor.packaging.utils import canonicalize_name

    found = {}
    for package in metadata.distributions():
        if package.metadata["Name"]:  # a half-removed package has none
            found.setdefault(canonicalize_name(package.metadata["Name"]), package.version)
    return found


def version_at(name, host):
    """Return the host's version of a package, or of one that replaces it; None if it has neither."""
    return next((host[other] for other in (name, *STAND_INS.get(name, ())) if other in host), None)


def meets(version, specifier):
    """Whether a version fulfills the specifier; "any" always does."""
    from pip._vendor.packaging.specifiers import SpecifierSet
    from pip._vendor.packaging.version import InvalidVersion, Version

    try:
        # NVIDIA's images call their torch 2.13.0a0+..., which would count as older than 2.13.
        return version == "any" or SpecifierSet(specifier).contains(Version(version).base_version)
    except InvalidVersion:
        return True


def merged(specifiers):
    """Merge several specifiers into one, with the highest of their lower bounds."""
    from pip._vendor.packaging.version import Version

    parts = {part for specifier in specifiers for part in specifier.split(",") if part}
    bounds = sorted((part for part in parts if part.startswith(">=")), key=lambda part: Version(part[2:]))
    return ",".join([*bounds[-1:], *sorted(parts.difference(bounds))])


def plan(packages, host):
    """Return what to install on a host, and what it lacks that is not among the packages.

    packages: {name: {"requires": {name: specifier}}}; host: {name: version}. What the host lacks is
    {name: [specifier]}.
    """
    install, lacking = [OURS], {}
    for name in install:  # the list grows while it is read
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

    # pip runs from its wheel, which also has the rules for versions: many hosts have an old pip or none.
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
            f"{sys.executable} lacks packages that this bundle leaves out: {', '.join(listed)}. Nothing was installed."
            " For a bundle that fits, run here: python3 -m pip list --format=freeze > host.txt; and with a network:"
            f" make offline-bundle PY={python} HOST_HAS=host.txt"
        )
    for name in names:
        if name in host and name != OURS:
            print(
                f"fastssl: {name} {host[name]} is too old or too new: replacing it by {packages[name]['version']}",
                flush=True,
            )

    # --no-deps: everything was checked above, and with --target pip would look for torch in this folder.
    # --force-reinstall: a second bundle of the same version number replaces the first one.
    wheels = [os.path.join(HERE, packages[name]["wheel"]) for name in names]
    command = [sys.executable, os.path.join(pip, "pip"), "install", "--quiet", "--no-index", "--no-deps", "--upgrade"]
    if subprocess.call([*command, "--force-reinstall", *pip_options, *wheels]) != 0:
        die("pip could not install; see its output above. `--target FOLDER` needs write access to that folder only.")

    print("fastssl: installed", ", ".join(f"{name} {packages[name]['version']}" for name in names))
    for option, following in zip(pip_options, [*pip_options[1:], ""]):
        if option in ("-t", "--target") or option.startswith("--target="):
            folder = os.path.abspath(option.partition("=")[2] or following)
            print(f'fastssl: before each use: export PYTHONPATH="{folder}"')
    print(f"fastssl: to check: {sys.executable} -m fastssl doctor")


if __name__ == "__main__":
    main(sys.argv[1:])

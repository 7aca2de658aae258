"""Build the documentation as a site in dist/docs. A link to a page, heading or file that does not exist is an error."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / ".cache" / "docs"  # docs_dir of mkdocs.yml, which may not be the folder of mkdocs.yml itself
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "LICENSE")


def main() -> None:
    shutil.rmtree(SOURCE, ignore_errors=True)
    SOURCE.mkdir(parents=True)
    for page in PAGES:
        shutil.copy(ROOT / page, SOURCE)
    for folder in ("docs", "records"):
        shutil.copytree(ROOT / folder, SOURCE / folder)
    mkdocs = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", ROOT / "mkdocs.yml"]
    # Without its advertisement of a successor.
    sys.exit(subprocess.run(mkdocs, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}).returncode)


if __name__ == "__main__":
    main()

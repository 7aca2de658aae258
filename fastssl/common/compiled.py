"""Functions compiled by numba, with their machine code cached on disk.

From the start of a loader to the first augmented views of a canvas, one core takes 9 s when it compiles these functions
and 0.3 s when it loads them from the cache (records/loading.md).
"""

import hashlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., object])
PACKAGE = Path(__file__).parent.parent
CONFIG: Any = numba.config  # its names come from the environment, so it has no types
KERNEL_FOLDERS = ("common", "beton", "loading", "views")


def compiled(
    *, fastmath: bool | set[str] = False, inline: Literal["never", "always"] = "never"
) -> Callable[[Function], Function]:
    """Decorate a function with `numba.njit`, without the GIL, and cache its machine code if a folder is writable.

    Call each function with one set of argument types only: two processes that compile different sets at the same time
    might store them under the same name.

    fastmath is always passed on: numba compiles a function that does not set it with the options of whichever function
    calls it first, so pixels would depend on what ran before.
    """
    njit = partial(numba.njit, nogil=True, error_model="numpy", fastmath=fastmath, inline=inline)

    def decorate(function: Function) -> Function:
        users_folder = CONFIG.CACHE_DIR
        CONFIG.CACHE_DIR = CACHE_FOLDER
        try:
            return cast(Function, njit(cache=True)(function))
        except RuntimeError:  # no folder is writable
            return cast(Function, njit()(function))
        finally:
            CONFIG.CACHE_DIR = users_folder

    return decorate


def cache_folder() -> str:
    """The folder of the cached code, whose name changes with every source file that may hold a kernel.

    numba itself compiles a function again only if its own file has changed, although the machine code also contains the
    functions that it calls and the constants that it reads from other files.
    """
    sources = hashlib.sha256()
    for folder in KERNEL_FOLDERS:
        for path in sorted((PACKAGE / folder).rglob("*.py")):
            sources.update(path.read_bytes())
    root = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return str(Path(root) / "fastssl" / f"kernels-{sources.hexdigest()[:16]}")


CACHE_FOLDER = cache_folder()

"""Functions compiled by numba, with their machine code cached on disk.

From the start of a loader to the first augmented views of a canvas, one core takes 9 s when it compiles these functions
and 0.3 s when it loads them from the cache (records/loading.md).
"""

import hashlib
import os
import pickle
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import numba
from numba.core.caching import (
    CompileResultCacheImpl,
    FunctionCache,
    IndexDataCacheFile,
    UserProvidedCacheLocator,
)

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
        dispatcher: Any = njit(function)
        users_folder = CONFIG.CACHE_DIR
        CONFIG.CACHE_DIR = CACHE_FOLDER
        try:
            dispatcher._cache = KernelCache(function)
        except (OSError, RuntimeError):  # the folder is not writable
            pass
        finally:
            CONFIG.CACHE_DIR = users_folder
        return cast(Function, dispatcher)

    return decorate


class KernelFolder(CompileResultCacheImpl):
    """Where numba keeps a function: in CACHE_FOLDER only, because in its other folders it would miss changes."""

    _locator_classes: list[type[object]] = [UserProvidedCacheLocator]


class KernelFiles(IndexDataCacheFile):
    """The files of one function, each with a CRC-32 at its end: damaged machine code must not run."""

    def _dump(self, value: Any) -> bytes:
        content: bytes = super()._dump(value)
        return content + zlib.crc32(content).to_bytes(4)

    def _load_data(self, name: str) -> Any:
        content = Path(self._data_path(name)).read_bytes()
        if zlib.crc32(content[:-4]).to_bytes(4) != content[-4:]:
            raise ValueError(f"{name} is damaged")
        return pickle.loads(content[:-4])


class KernelCache(FunctionCache):
    """numba's cache of a function, but a full disk or a damaged file costs the cache only, and not the function."""

    _impl_class = KernelFolder

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__(function)
        folder = self._impl.locator
        self._cache_file = KernelFiles(folder.get_cache_path(), self._impl.filename_base, folder.get_source_stamp())

    @contextmanager
    def _guard_against_spurious_io_errors(self) -> Iterator[None]:
        """numba loads and saves in this context; where loading gives nothing, it compiles."""
        try:
            yield
        except Exception:  # unpickling raises nearly anything on a damaged file, MemoryError too
            with suppress(OSError):
                self.flush()  # otherwise a damaged index would prevent every save


def cache_folder() -> str:
    """Return the folder of the cached code, whose name changes with every source file that may hold a kernel.

    numba itself compiles a function again only if its own file has changed, although the machine code also contains the
    functions that it calls and the constants that it reads from other files. "" if there is no folder.
    """
    sources = hashlib.sha256()
    for folder in KERNEL_FOLDERS:
        for path in sorted((PACKAGE / folder).rglob("*.py")):
            sources.update(path.read_bytes())
    root = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if root.startswith("~"):  # a user without a home
        return ""
    return str(Path(root) / "fastssl" / f"kernels-{sources.hexdigest()[:16]}")


CACHE_FOLDER = cache_folder()

"""The cache of compiled functions: found by the next process, but not after a change; never a cause of failure."""

import errno
import importlib.util
import os
import resource
from pathlib import Path

import pytest

from fastssl.common import compiled as module

SOURCE = """
from fastssl.common.compiled import compiled

@compiled(fastmath={"contract"})
def add(a, b):
    return a + b
"""


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(module, "CACHE_FOLDER", str(tmp_path / "cache"))
    (tmp_path / "kernels.py").write_text(SOURCE)
    return tmp_path / "cache"


def call_in_new_module(folder: Path) -> bool:
    """Call the function as a new process would. Return whether its code came from the cache."""
    spec = importlib.util.spec_from_file_location("kernels", folder / "kernels.py")
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    assert kernels.add(1, 2) == 3
    return bool(sum(kernels.add.stats.cache_hits.values()))


def test_the_machine_code_is_loaded_from_the_cache(cache, tmp_path):
    assert [call_in_new_module(tmp_path) for _ in range(3)] == [False, True, True]
    assert list(cache.rglob("*.nbc"))


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    if how == "a folder":
        path.unlink()
        path.mkdir()
        return
    damaged = {
        "empty": b"",
        "cut off": content[:middle],
        "zeros": content[: middle - 50] + bytes(100) + content[middle + 50 :],
        "another bit": content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :],
        "a text": b"no cache",
        "a missing module": content[:10] + b"cno_such_module\nx\n.",
    }
    path.write_bytes(damaged[how])


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize("how", ["empty", "cut off", "zeros", "a text", "a missing module", "a folder"])
def test_a_damaged_file_of_the_cache_costs_the_cache_only(cache, tmp_path, suffix, how):
    """The function is compiled again, and the files are repaired, if they are files."""
    call_in_new_module(tmp_path)
    damage(next(cache.rglob(f"*.{suffix}")), how)
    assert not call_in_new_module(tmp_path)
    assert call_in_new_module(tmp_path) == (how != "a folder")


def test_machine_code_with_another_bit_is_not_run(cache, tmp_path):
    call_in_new_module(tmp_path)
    damage(next(cache.rglob("*.nbc")), "another bit")
    assert [call_in_new_module(tmp_path) for _ in range(2)] == [False, True]


def test_a_full_disk_costs_the_cache_only(cache, tmp_path):
    """A limit on the size of files replaces the full disk: the same write fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        assert not call_in_new_module(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(cache.rglob("*.nb*"))
    assert [call_in_new_module(tmp_path) for _ in range(2)] == [False, True]


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EROFS", "EIO", "ESTALE"])
def test_errors_of_the_disk_cost_the_cache_only(cache, tmp_path, monkeypatch, name):
    call_in_new_module(tmp_path)

    def fail(*_):
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    with monkeypatch.context() as patch:
        for method in ("_load_index", "_save_index", "_save_data"):
            patch.setattr(module.KernelFiles, method, fail)
        assert not call_in_new_module(tmp_path)
    assert call_in_new_module(tmp_path)  # nothing was lost


@pytest.mark.parametrize("folder", ["file/cache", "/proc/cache", ""])
def test_a_folder_that_is_not_writable_costs_the_cache_only(cache, tmp_path, monkeypatch, folder):
    """numba's other folders, such as __pycache__, are not used: it would not see there that another file changed."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(module, "CACHE_FOLDER", folder and str(tmp_path / folder))
    assert not any(call_in_new_module(tmp_path) for _ in range(2))
    assert not list(tmp_path.rglob("*.nb*"))


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user id that is in no list
    assert module.cache_folder() == ""


def test_a_change_of_any_kernel_file_gives_a_new_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PACKAGE", tmp_path)
    (tmp_path / "views").mkdir()
    (tmp_path / "views" / "operations.py").write_text("BLUR_RADIUS = 11")
    before = module.cache_folder()
    assert module.cache_folder() == before
    (tmp_path / "views" / "operations.py").write_text("BLUR_RADIUS = 12")
    assert module.cache_folder() != before

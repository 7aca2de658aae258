"""The cache of compiled functions: found again by the next process, and left alone after a change of the sources."""

import importlib.util

from fastssl.common import compiled as module

SOURCE = """
from fastssl.common.compiled import compiled

@compiled(fastmath={"contract"})
def add(a, b):
    return a + b
"""


def test_the_machine_code_is_loaded_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CACHE_FOLDER", str(tmp_path / "cache"))
    (tmp_path / "kernels.py").write_text(SOURCE)
    for hits in (0, 1):
        spec = importlib.util.spec_from_file_location("kernels", tmp_path / "kernels.py")
        kernels = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(kernels)
        assert kernels.add(1, 2) == 3
        assert sum(kernels.add.stats.cache_hits.values()) == hits
    assert list((tmp_path / "cache").rglob("*.nbc"))


def test_a_folder_that_is_not_writable_costs_the_cache_only(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setattr(module, "CACHE_FOLDER", str(blocked / "cache"))
    monkeypatch.setattr(module.numba, "njit", refuse_cache(module.numba.njit))
    assert module.compiled()(lambda a: a + 1)(1) == 2


def refuse_cache(njit):
    """numba finds other folders to write to where it can: as root everywhere."""

    def refusing(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    return refusing


def test_a_change_of_any_kernel_file_gives_a_new_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PACKAGE", tmp_path)
    (tmp_path / "views").mkdir()
    (tmp_path / "views" / "operations.py").write_text("BLUR_RADIUS = 11")
    before = module.cache_folder()
    assert module.cache_folder() == before
    (tmp_path / "views" / "operations.py").write_text("BLUR_RADIUS = 12")
    assert module.cache_folder() != before

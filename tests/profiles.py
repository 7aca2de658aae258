"""Invented profiles for tests: of a CPU that decoding limits, and of a GPU with every field."""

from copy import deepcopy

from fastssl.profiling import Profile

Json = dict[str, object]


def measured(median: float, spread: float = 0.01) -> dict:
    """Three windows around a median."""
    windows = [median * (1 - spread), median, median * (1 + spread)]
    return {"median": median, "low": windows[0], "high": windows[2], "windows": windows}


def stage(rate: float | None, cpu_seconds: float | None = None, missing: str | None = None, **extras) -> dict:
    return {
        "images_per_second": None if rate is None else measured(rate),
        "cpu_seconds": None if cpu_seconds is None else measured(cpu_seconds),
        "missing": missing,
        **extras,
    }


def example_profile(**changes) -> Profile:
    return Profile.model_validate(example_json(**changes))


def gpu_profile(**changes) -> Profile:
    return Profile.model_validate(gpu_json(**changes))


def example_json(**changes) -> Json:
    """A profile of two CPU cores. changes: dotted keys with `__` for the dot, `stages__decode__knee=1`."""
    return changed(deepcopy(CPU), changes)


def gpu_json(**changes) -> Json:
    """A profile of one H200, with every field that a profile may have."""
    profile = deepcopy(CPU)
    profile["machine"] = {
        "device": "NVIDIA H200", "kind": "cuda", "cores": 16, "processes": 1, "peak_flops": 9.89e14,
        "peak_source": "NVIDIA H200 datasheet, dense bf16",
    }  # fmt: skip
    profile["run"] |= {"batch_size": 1024, "workers": 16, "precision": "bf16", "compiled": True, "size": 224}
    workers = {str(n): measured(1250 * n**0.93) for n in (1, 2, 4, 8, 16)}
    phases = {"forward": 2.0e-5, "draws": 1e-6, "objective": 4e-6, "kl": 1e-6, "backward": 4.1e-5, "optimizer": 3e-6}
    profile["stages"] = {
        "storage": stage(
            48_000, 1e-6, cold_bytes_per_second=measured(1.4e9), warm_bytes_per_second=measured(9.8e9)
        ),
        "decode": stage(workers["16"]["median"], 8e-4, workers=workers, knee=16),
        "cpu_augment": stage(None, missing="the views are cut on the GPU"),
        "transfer": stage(184_000, 2e-6, bytes_per_second=measured(3.62e10), peak_bytes_per_second=5.5e10),
        "loader": stage(15_800, 8.1e-4),
        "views": stage(61_000, 1e-6, kernels=212, bytes_per_image=602_112.0),
        "step": stage(
            14_250, 4e-6, phases={name: measured(seconds) for name, seconds in phases.items()},
            phases_note="timed apart, without the compiler: they may add up to more than the step",
            flops=1.1e10, flops_per_second=1.57e14, mfu=0.159, peak_memory_bytes=41_200_000_000,
        ),
        "communication": stage(None, missing="there is one process"),
        "launch": stage(33_000, 3e-5),
        "replay": stage(11_600, 4e-6),
        "end_to_end": stage(
            11_400, 8.3e-4, data_wait=measured(0.012, 0.2), cores_busy=0.61,
            wait_seconds={"p50": 1e-4, "p95": 2e-4, "p99": 9.3e-3},
            gpu={"utilization": 0.97, "sm_clock_mhz": 1755, "max_sm_clock_mhz": 1980, "power_w": 512.0},
        ),
    }  # fmt: skip
    profile["prediction"] = {
        "resource_seconds": {
            "disk": 2.1e-5, "threads": 6.1e-5, "reader": 5e-6, "device": 8.66e-5, "main_thread": 3e-5, "cores": 5.2e-5,
        },
        "predicted_images_per_second": 11_547.0, "measured_images_per_second": 11_400.0, "relative_error": 0.0129,
    }  # fmt: skip
    profile["bottleneck"] = {
        "stage": "step",
        "sentence": "The training step is the bottleneck (80 % of the time). Halving its cost would make training "
        "1.42x as fast; the next limit is image decoding at 16,470 images/s.",
        "accelerator_utilization": 0.983,
        "next": {"stage": "decode", "images_per_second": 16_470.0},
        "twice_as_fast": {"step": 16_470.0, "views": 12_720.0, "decode": 11_547.0},
        "advice": "What helps: a smaller views.size, a smaller backbone or more GPUs.",
    }
    return changed(profile, changes)


def changed(profile: Json, changes: Json) -> Json:
    for key, value in changes.items():
        *parents, last = key.split("__")
        inner = profile
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
    return profile


PHASES = {"forward": 8.1e-5, "draws": 2.2e-5, "objective": 1.4e-5, "kl": 3e-6, "backward": 1.3e-4, "optimizer": 9e-6}
CPU = {
    "schema_version": 2, "measured_at": "2025-11-28T13:40:00+01:00", "seconds": 61.3, "fastssl_version": "0.1.0",
    "name": "zprob_barlow",
    "recipe": {"name": "zprob_barlow", "data": {"train": "data/mnist/train.beton"}, "train": {"batch_size": 256}},
    "overrides": ["train.batch_size=256"],
    "environment": {
        "python": "3.11.7", "packages": {"torch": "2.15.0", "ffcv": "1.0.2"}, "machine": "Linux 6.1 x86_64",
        "host": "builder", "cpu": "AMD EPYC 9B14", "cores": 2, "memory_gb": 24.0, "torch_threads": 2, "git": "8ab4fcb",
    },
    "machine": {
        "device": "AMD EPYC 9B14", "kind": "cpu", "cores": 2, "processes": 1, "peak_flops": 1.5e11,
        "peak_source": "measured: a product of 2048 x 2048 matrices in fp32",
    },
    "data": {
        "path": "data/mnist/train.beton", "images": 4_000, "file_bytes": 12_600_000, "image_bytes": 3_150.0,
        "decoded_bytes": 3_072.0, "layout": "canvas", "storage": "jpg", "resolution": [32, 32], "crop": "gpu",
        "resident": False, "in_page_cache": 1.0, "fits_into_memory": True, "batches_per_epoch": 15,
    },
    "run": {
        "batch_size": 256, "workers": 2, "precision": "fp32", "compiled": False, "parameters": 11_690_000, "views": 2,
        "size": 32,
    },
    "stages": {
        "storage": stage(
            None, missing="the whole file is in the page cache", cold_bytes_per_second=None,
            warm_bytes_per_second=measured(6.1e9),
        ),
        "decode": stage(1_980, 1e-3, workers={"1": measured(1000, 0.03), "2": measured(1_980)}, knee=2),
        "cpu_augment": stage(None, missing="the views are cut on the device"),
        "transfer": stage(410_000, 2e-6, bytes_per_second=measured(1.21e10), peak_bytes_per_second=None),
        "loader": stage(1_910, 1e-3),
        "views": stage(9_100, 2.2e-4, kernels=None, bytes_per_image=24_576.0),
        "step": stage(
            3_800, 5.2e-4, phases={name: measured(seconds, 0.05) for name, seconds in PHASES.items()}, phases_note=None,
            flops=2.2e7, flops_per_second=8.4e10, mfu=0.56, peak_memory_bytes=1_230_000_000,
        ),
        "communication": stage(None, missing="there is one process"),
        "launch": stage(None, missing="there is no GPU"),
        "replay": stage(2_680, 7.4e-4),
        "end_to_end": stage(
            1_150, 1.7e-3, data_wait=measured(0.43, 0.05), wait_seconds={"p50": 0.08, "p95": 0.12, "p99": 0.2},
            cores_busy=0.98, gpu=None,
        ),
    },
    "prediction": {
        "resource_seconds": {
            "disk": 0.0, "threads": 5.05e-4, "reader": 3e-6, "device": 3.73e-4, "main_thread": 0.0, "cores": 8.6e-4,
        },
        "predicted_images_per_second": 1_163.0, "measured_images_per_second": 1_150.0, "relative_error": 0.0113,
    },
    "bottleneck": {
        "stage": "decode",
        "sentence": "Image decoding is the bottleneck (51 % of the time). Halving its cost would make training 1.40x "
        "as fast; the next limit is the training step at 2,700 images/s.",
        "accelerator_utilization": 0.43,
        "next": {"stage": "step", "images_per_second": 2_700.0},
        "twice_as_fast": {"decode": 1_640.0, "step": 1_400.0, "views": 1_200.0, "transfer": 1_163.0},
    },
    "remarks": ["The windows of the step differ by 10 %: another program may be running."],
    "trace": "zprob_barlow.trace.json.gz",
}  # fmt: skip

"""`fastssl profile`: the order in which a run is measured, and what is made of the measurements."""

import os
import resource
import statistics
import time
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from datetime import datetime
from functools import partial
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path

import torch

from fastssl.beton import read_header
from fastssl.common.distributed import broadcast_from_main, is_main_process, joined_processes, world_size
from fastssl.common.errors import UserError
from fastssl.common.files import write_atomically
from fastssl.common.system import available_cores, free_memory
from fastssl.common.terminal import progress
from fastssl.evaluation.plots import save_figure
from fastssl.loading.decoding import DecodeTask
from fastssl.profiling.bottleneck import Facts, cuda_graphs_of, verdict
from fastssl.profiling.device_stages import (
    Phases,
    busy_seconds,
    count_flops,
    launch_windows,
    take_step,
    with_fixed_views,
)
from fastssl.profiling.end_to_end import EndToEnd
from fastssl.profiling.loader_stages import (
    AHEAD,
    Decoding,
    Loading,
    Undecoded,
    endless,
    prepared_batches,
    worker_counts,
)
from fastssl.profiling.machine import copy_peak, cores_busy_now, measured_peak
from fastssl.profiling.page import write_page
from fastssl.profiling.peaks import find_device
from fastssl.profiling.plots import draw_profile
from fastssl.profiling.resources import Cost, Costs
from fastssl.profiling.result import SCHEMA, write_profile
from fastssl.profiling.storage import Storage
from fastssl.profiling.timing import Stage, figure_of, missing, rates_of, rates_of_difference
from fastssl.profiling.trace import write_trace
from fastssl.recipe import Recipe
from fastssl.training.optim import skips_on_device
from fastssl.training.run_dir import describe_machine
from fastssl.training.schedule import image_size
from fastssl.training.setup import Run, choose_device, prepare

WINDOW = {"short": 0.3, "step": 1.0, "end_to_end": 1.5}  # seconds of one, by the kind of leg
KEPT = 3  # batches of replay, on the device
ROUNDS = (3, 5)  # least and most windows of each leg
SECONDS = 40.0  # that rounds beyond the least may take
SHORT_EPOCH = 20  # batches, below which the loader's start in every epoch counts
NEVER_IDLE = 0.9  # share of the time from which on a GPU's kernels leave no gaps to launching
OTHER_EPOCH = 1  # whose order the loader's own legs follow: what end_to_end reads they have not just read
OTHERS = 0.1  # cores that others keep busy, from which on it is said
DISAGREEMENT = 0.1  # between predicted and measured, from which it is said


def profile_recipe(recipe: Recipe, overrides: list[str] = (), trace: Path | None = None) -> dict | None:
    """Measure what limits the recipe's training on this machine: the profile, in the first process, else None.

    trace: file for a timeline of some steps. The model that is trained here is not kept, and no run directory is made.
    Raises UserError as training does.
    """
    began, others = time.perf_counter(), cores_busy_now()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would say on stderr that it starts, and stops
    with ExitStack() as stack:
        device = stack.enter_context(joined_processes(choose_device(recipe.train.device)))
        run, remarks = prepare(recipe, device, None)
        legs = Legs(run, stack)
        legs.measure()
        if trace:
            write_trace(trace, legs.end_to_end.training, device)
        data, results = legs.data(), legs.results()
        result = {
            "schema": SCHEMA,
            "made": datetime.now().astimezone().isoformat(timespec="seconds"),
            "fastssl": version("fastssl-trainer"),
            "name": recipe.name,
            "recipe": recipe.model_dump(mode="json"),
            "overrides": list(overrides),
            "environment": describe_machine(device),
            "machine": legs.machine(),
            "data": data,
            "run": legs.run_facts(),
            "legs": results,
            **legs.limits(data, results),
            "trace": trace.name if trace else None,
        }
        result["remarks"] = [*remarks, *remarks_on(result, others)]
        result["seconds"] = time.perf_counter() - began
        return result if is_main_process() else None


def default_path(recipe: Recipe, file: Path) -> Path:
    """Where a recipe's profile goes: into the run directory whose recipe.yaml `file` is, else profiles/NAME.json."""
    if file.name == "recipe.yaml" and (file.parent / "checkpoints").is_dir():
        return file.parent / "profile.json"
    return Path("profiles") / f"{recipe.name.replace('/', '_')}.json"


def trace_path(path: Path) -> Path:
    """The trace's file beside the profile's. Raises UserError before anything is measured where neither can be."""
    if path.suffix != ".json" or path.is_dir():
        raise UserError(f"--json {path}: give a file's name that ends in .json; pictures and trace go beside it.")
    trace = path.with_suffix(".trace.json.gz")
    there = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        write_atomically(there / f"{trace.name}.try", lambda beside: beside.touch())
        (there / f"{trace.name}.try").unlink()
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): name another with --json.") from None
    return trace


def write_files(path: Path, profile: dict) -> None:
    """Picture and page, and behind them profile.json."""
    save_figure(path.with_suffix(".png"), draw_profile(profile))
    write_page(path.with_suffix(".html"), profile)
    write_profile(path, profile)


class Legs:
    """All legs of a run: built, measured in turns, and what came of it."""

    def __init__(self, run: Run, stack: ExitStack):
        self.run, self.recipe, self.device = run, run.recipe, run.device
        self.loader, self.cores = run.state.loader, available_cores()
        self.epoch = self.recipe.train.epochs - 1  # views.progressive_resize has grown
        self.storage = self.copy = self.whole_loader = self.with_crops = None
        self.decode: dict[int, Stage] = {}
        if not self.loader.resident:
            self._add_loader_legs(stack)
        with closing(endless(self.loader)) as batches:
            self.batches = list(islice(batches, KEPT * self.recipe.train.accumulate))
        self.loader.set_epoch(0)
        self._add_device_legs()
        self.end_to_end = EndToEnd(run, self.epoch, self.cores, WINDOW["end_to_end"])
        stack.callback(self.end_to_end.training.close)

    def _add_loader_legs(self, stack: ExitStack) -> None:
        loader, device = self.loader, self.device
        self.storage = Storage(loader.samples, loader.rows, loader.workers)
        for _ in range(ROUNDS[0]):
            self.storage.measure()
        whole = stack.enter_context(closing(Loading(self.recipe, device, OTHER_EPOCH)))
        undecoded = stack.enter_context(closing(Loading(self.recipe, device, OTHER_EPOCH, Undecoded)))
        ahead = dict(seconds=WINDOW["short"], dropped=AHEAD, least=AHEAD)
        self.whole_loader = Stage(whole, device, **ahead, begin=whole.begin, end=whole.close)
        self.copy = Stage(undecoded, device, **ahead, begin=undecoded.begin, end=undecoded.close)
        crops = loader.crops if loader.crop == "cpu" else 0

        def decoding(workers: int, crops: int, prepared: list[DecodeTask]) -> Stage:
            work = stack.enter_context(closing(Decoding(loader.make_decoder(workers=workers, crops=crops), prepared)))
            return Stage(work, device, WINDOW["short"], end=work.end)

        plain = prepared_batches(loader, 0)
        counts = broadcast_from_main(
            lambda: worker_counts(loader.workers, self.cores)
        )  # other hosts may have other cores
        self.decode = {workers: decoding(workers, 0, plain) for workers in counts}
        if crops:
            self.with_crops = decoding(loader.workers, crops, prepared_batches(loader, crops))

    def _add_device_legs(self) -> None:
        run, epoch, accumulate = self.run, self.epoch, self.recipe.train.accumulate
        groups = [self.batches[i : i + accumulate] for i in range(0, len(self.batches), accumulate)]
        made = run.views(self.batches[0], epoch)
        fixed, turns, batches = with_fixed_views(run, made), cycle(groups), cycle(self.batches)

        def make_views() -> int:
            batch = next(batches)
            run.views(batch, epoch)
            return len(batch.index)

        def step_apart() -> int:
            with run.no_sync():
                return take_step(fixed, groups[0], epoch)

        self.views = Stage(make_views, self.device, WINDOW["short"])
        self.step = Stage(partial(take_step, fixed, groups[0], epoch), self.device, WINDOW["step"])
        self.apart = Stage(step_apart, self.device, WINDOW["step"]) if world_size() > 1 else None
        self.replay = Stage(lambda: take_step(run, next(turns), epoch), self.device, WINDOW["step"])
        self.phases = Phases(run, self.batches[0], made)
        self.flops = count_flops(run, self.batches[0], made)

    def measure(self) -> None:
        in_front = [*self.decode.values(), self.with_crops, self.copy, self.whole_loader]
        alone = [leg for leg in [*in_front, self.views, self.step, self.apart, self.replay] if leg]
        turns = [*alone, self.phases, self.end_to_end]
        timed = [*alone, self.end_to_end.leg]
        with shown_progress("warming up", len(timed), "legs") as advance:
            for leg in timed:
                leg.warm_up()
                advance()
            self.phases.measure()
            self.phases.windows.clear()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        least, most = ROUNDS
        with shown_progress("measuring", most * len(turns), "windows") as advance:
            began = time.perf_counter()
            for done in range(most):
                a_round = (time.perf_counter() - began) / max(1, done)
                if broadcast_from_main(lambda: done >= least and (done + 1) * a_round > SECONDS):  # noqa: B023
                    advance((most - done) * len(turns))
                    break
                for leg in turns:
                    leg.measure()
                    advance()

        self.peak_memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if self.device.type == "cuda":
            self.peak_memory = torch.cuda.max_memory_allocated(self.device)
        self.peak, self.copy_peak = measured_peak(self.device, self.run.precision), copy_peak(self.device)
        self.busy, self.kernels, self.launch = {}, None, None
        if self.device.type == "cuda":
            self.busy["views"], self.kernels = busy_seconds(self.views.work, self.device)
            self.busy["compute"], _ = busy_seconds((self.apart or self.step).work, self.device)
            self.busy = {leg: seconds for leg, seconds in self.busy.items() if seconds}  # none: kernels are not shown
            if skips_on_device(self.run.state.optimizer):  # else the launching thread waits for the GPU in each step
                self.launch = launch_windows(self.replay.work, self.device)

    def results(self) -> dict[str, dict]:
        """The profile's section `legs`."""
        resident = "All images stay on the device (data.resident): nothing is read, decoded or copied."
        results = dict.fromkeys(("storage", "decode", "cpu_augment", "copy", "loader"), missing(resident))
        if not self.loader.resident:
            results |= self._loader_results()
        results["views"] = {**self.views.rates(), "kernels": self.kernels, "bytes_per_image": self._bytes_of_views()}
        results["views"]["busy_seconds"] = self.busy.get("views")
        results["step"] = self._step_result()
        results["communication"] = missing("One process: no gradients are exchanged.")
        if self.apart:
            results["communication"] = rates_of_difference(self.step, self.apart)
        waits = f"optim.name={self.recipe.optim.name} waits for the GPU in each step: launching cannot be timed."
        results["launch"] = missing(waits if self.device.type == "cuda" else "No GPU: nothing is launched.")
        if self.launch:
            results["launch"] = rates_of(self.launch)
        results["replay"] = self.replay.rates()
        results["end_to_end"] = self.end_to_end.result()
        return results

    def _loader_results(self) -> dict[str, dict]:
        storage, results = self.storage, {}
        results["storage"] = missing("Linux keeps the file's pages in memory: nothing can be read anew from the disk.")
        if storage.cold:
            rates = [world_size() / seconds for seconds in storage.seconds_an_image]
            results["storage"] = {
                "images_per_second": figure_of(rates), "cpu_seconds": figure_of([0.0] * len(rates)), "missing": None
            }  # fmt: skip
        results["storage"] |= {
            "cold_bytes_per_second": figure_of(storage.cold) if storage.cold else None,
            "warm_bytes_per_second": figure_of(storage.warm),
        }
        workers = {count: leg.images_per_second() for count, leg in self.decode.items()}
        best = max(rate["median"] for rate in workers.values())
        knee = min(count for count, rate in workers.items() if rate["median"] >= 0.95 * best)
        by_workers = {str(count): rate for count, rate in workers.items()}
        results["decode"] = {**self._own_decode().rates(), "workers": by_workers, "knee": knee}
        results["cpu_augment"] = missing("Crops are made on the device.")
        if self.with_crops:
            results["cpu_augment"] = rates_of_difference(self.with_crops, self._own_decode())
        rates, image_bytes = self.copy.rates(), self.loader.image_bytes
        copied = [rate * image_bytes / world_size() for rate in rates["images_per_second"]["windows"]]
        results["copy"] = {
            **rates,
            "bytes_per_second": figure_of(copied) if self.copy_peak else None,  # on a CPU pointers change hands
            "peak_bytes_per_second": self.copy_peak,
        }
        return results | {"loader": self.whole_loader.rates()}

    def _own_decode(self) -> Stage:
        """With as many workers as the run has; on a host with fewer cores than the first one's, with the most tried."""
        return self.decode.get(self.loader.workers) or list(self.decode.values())[-1]

    def _step_result(self) -> dict:
        rates = self.step.rates()
        flops_per_second = self.flops * rates["images_per_second"]["median"] / world_size()  # of one device
        one_graph = "Compiled: the forward pass is one graph, draws, objective and KL included."
        peak, _ = self._peak()
        return {
            **rates,
            "phases": self.phases.figures(),
            "phases_note": one_graph if self.run.compiled else None,
            "busy_seconds": self.busy.get("compute"),
            "flops": self.flops,
            "flops_per_second": flops_per_second,
            "mfu": flops_per_second / peak,
            "peak_memory_bytes": self.peak_memory,
            "page_faults": statistics.median(window.page_faults / self.step.repeats for window in self.step.windows),
        }

    def _peak(self) -> tuple[float, str]:
        """FLOP/s that the device could reach, and where that comes from."""
        if self.device.type == "cuda":
            known = find_device(torch.cuda.get_device_name(self.device))
            if known and known.peak(self.run.precision):
                return known.peak(self.run.precision), f"{known.source}, dense {self.run.precision}"
        return self.peak, "measured: a large matrix product or convolution"

    def _bytes_of_views(self) -> int:
        """That have to move at least for an image's views: the pixels in, the floats out."""
        size = image_size(self.recipe.views, self.epoch)
        return self.loader.image_bytes + self.recipe.view_count * 3 * size**2 * 4

    def machine(self) -> dict:
        on_gpu = self.device.type == "cuda"
        peak, source = self._peak()
        return {
            "device": torch.cuda.get_device_name(self.device) if on_gpu else describe_machine(self.device)["cpu"],
            "kind": self.device.type,
            "cores": self.cores,
            "processes": world_size(),
            "peak_flops": peak,
            "peak_source": source,
        }

    def data(self) -> dict:
        loader, info = self.loader, read_header(self.loader.path)
        file_bytes = loader.path.stat().st_size
        return {
            "path": str(loader.path),
            "images": len(loader.rows),
            "file_bytes": file_bytes,
            "image_bytes": float(loader.samples.size_N[loader.rows].mean()),
            "decoded_bytes": loader.image_bytes,
            "layout": info.layout,
            "storage": info.storage,
            "resolution": list(info.resolution) if info.resolution else None,
            "crop": loader.crop,
            "resident": loader.resident,
            "in_page_cache": self.storage.cached_before if self.storage else None,
            "fits_into_memory": file_bytes <= free_memory(),
            "batches_per_epoch": len(loader),
        }

    def run_facts(self) -> dict:
        return {
            "batch_size": self.recipe.train.batch_size,
            "workers": self.loader.workers,
            "precision": self.run.precision,
            "compiled": self.run.compiled,
            "parameters": sum(p.numel() for p in self.run.state.model.parameters() if p.requires_grad),
            "views": self.recipe.view_count,
            "size": image_size(self.recipe.views, self.epoch),
        }

    def costs(self, results: dict[str, dict]) -> Costs:
        """What an image costs this process, by leg."""
        costs = {}
        named = {"decode": "decode", "cpu_augment": "cpu_augment", "copy": "copy", "views": "views", "compute": "step"}
        for leg, name in {**named, "communication": "communication", "launch": "launch"}.items():
            if rate := results[name]["images_per_second"]:
                costs[leg] = Cost(world_size() / rate["median"], results[name]["cpu_seconds"]["median"])
        if self.apart:
            alone = self.apart.rates()
            costs["compute"] = Cost(world_size() / alone["images_per_second"]["median"], alone["cpu_seconds"]["median"])
        if self.storage and self.storage.cold and self.storage.cached_before is not None:
            cold = figure_of(self.storage.seconds_an_image)["median"]
            costs["storage"] = Cost(cold * (1 - self.storage.cached_before))
        of_replay = world_size() / results["replay"]["images_per_second"]["median"]
        if sum(self.busy.values()) > NEVER_IDLE * of_replay:  # a full queue lets the launching thread wait
            costs.pop("launch", None)
        for leg, seconds in self.busy.items():  # of a GPU: what its kernels take, whatever the main thread is late with
            costs[leg] = Cost(seconds)
        return Costs(costs, self.cores, self.loader.decodes_in_reader, world_size())

    def facts(self, data: dict) -> Facts:
        phases = {name: of["median"] for name, of in self.phases.figures().items()}
        return Facts(
            workers=self.loader.workers,
            layout=data["layout"],
            on_gpu=self.device.type == "cuda",
            compiled=self.run.compiled,
            cuda_graphs=cuda_graphs_of(self.recipe),
            precision=self.run.precision,
            fits_into_memory=data["fits_into_memory"],
            phases=phases,
        )

    def limits(self, data: dict, results: dict[str, dict]) -> dict:
        """The profile's sections `limits` and `verdict`; lines are seconds an image, over all processes."""
        costs = self.costs(results)
        pace, ceiling = (results[leg]["images_per_second"] for leg in ("end_to_end", "replay"))
        measured, predicted = pace["median"], costs.images_per_second()
        judged, error = verdict(costs, self.facts(data), pace["windows"], ceiling["windows"]), predicted / measured - 1
        if abs(error) > DISAGREEMENT:
            judged["sentence"] += f" (Doubtful: the legs predict {error:+.0%} of what was measured.)"
        return {
            "limits": {
                "lines": {line: seconds / world_size() for line, seconds in costs.lines().items()},
                "predicted_images_per_second": predicted,
                "measured_images_per_second": measured,
                "error": error,
            },
            "verdict": judged,
        }


def shown_progress(*arguments) -> AbstractContextManager:
    """In the first process."""
    return progress(*arguments) if is_main_process() else nullcontext(lambda *_: None)


def remarks_on(result: dict, others: float) -> list[str]:
    """What a reader has to know before believing the figures."""
    remarks, limits, data = [], result["limits"], result["data"]
    if data["batches_per_epoch"] < SHORT_EPOCH and not data["resident"]:
        remarks.append(
            f"Batches of an epoch: {data['batches_per_epoch']} only, and the loader starts anew in each: of a larger "
            "data set less time would go to waiting."
        )
    if abs(limits["error"]) > DISAGREEMENT:
        remarks.append(
            f"The legs predict {limits['predicted_images_per_second']:,.1f} images/s, "
            f"{limits['error']:+.0%} from what was measured: profile again when nothing else runs, and distrust the "
            "verdict if that stays."
        )
    if others > OTHERS:
        remarks.append(f"Other processes kept {others:.1f} cores of this machine busy when this began.")
    return remarks

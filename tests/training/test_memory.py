"""Memory: what a model needs is compared with what is free before it is taken, and a lack of it ends a run in order."""

import os
import re
import resource
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from training_runs import FORKS, PATIENCE, small

from fastssl import cli, load_encoder, load_model
from fastssl.common.commands import training_command
from fastssl.common.errors import UserError, is_out_of_memory
from fastssl.evaluation import probe
from fastssl.loading import loader as loader_module
from fastssl.models import build_model, exported, weights_file
from fastssl.models import memory as model_memory
from fastssl.models.build import outline_model
from fastssl.models.checkpoint import find_checkpoints
from fastssl.models.memory import count_bytes
from fastssl.models.weights_file import read_weights
from fastssl.profiling import profiler
from fastssl.recipe import load_recipe
from fastssl.training import loop, run_writer, train
from fastssl.training import memory as training_memory
from fastssl.training.memory import check_memory
from fastssl.training.snapshot import Snapshot

CPU = torch.device("cpu")
GB = 10**9


def recipe_of(*overrides: str, name: str = "zprob_barlow"):
    return load_recipe(f"recipes/{name}.yaml", ["model.backbone=test_resnet", "views.size=32", *overrides])


@pytest.mark.parametrize(
    "overrides, key",
    [
        (["model.projector={layers: 100, hidden: 1000000}"], "model.projector.hidden"),
        (["model.projector={layers: 1, out: 1000000}"], "free: lower model.projector.out."),
        (["objective.predictor_hidden=1000000", "model.projector.out=20000"], "objective.predictor_hidden"),
        (["embedding={stochastic: h, prior: mixture, mixture_components: 1000000}", "model.backbone=resnet50"],
         "embedding.mixture_components"),
        (["embedding={stochastic: z, prior: vamp, mixture_components: 1000000}", "model.projector.out=4096"],
         "embedding.mixture_components"),
        (["objective={name: supervised, classes: 1000000}", "model.backbone=resnet50", "embedding.stochastic=none"],
         "objective.classes"),
        (["embedding.samples=1000000000"], "embedding.samples or train.batch_size"),
        (["embedding={stochastic: hz, samples: 1000000}"], "embedding.samples or train.batch_size"),
        (["train.batch_size=1000000000"], "train.batch_size"),
        (["objective={name: sigreg, slices: 1000000}"], "objective.slices"),
        (["views.size=4096", "train.batch_size=4096"], "views.size"),
        (["model.backbone=vit_7b_patch16_dinov3", "views.size=224"], "choose a smaller model.backbone"),
    ],
)  # fmt: skip
def test_more_than_the_memory_is_refused_before_it_is_taken(overrides, key, monkeypatch):
    for module in (model_memory, training_memory):
        monkeypatch.setattr(module, "free_memory", lambda: 8 * GB)
    name = "beyond/byol" if "predictor" in overrides[0] else "zprob_barlow"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        UserError, match="needs at least .* GB of memory on the machine, and 8.0 GB are free: "
    ) as error:
        check_memory(recipe_of(*overrides, name=name), CPU)
    assert key in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB


@pytest.mark.parametrize(
    "name, overrides",
    [
        ("zprob_barlow", ["model.backbone=vit_large_patch16_224", "views.size=224", "train.batch_size=64"]),
        ("beyond/resnet50_zprob_barlow", ["model.backbone=resnet50", "views.size=224", "train.batch_size=1024"]),
        ("beyond/byol", ["model.backbone=resnet50", "views.size=224", "train.batch_size=256", "train.ema=0.99"]),
        ("supervised", ["model.backbone=resnet18", "views.size=224", "train.batch_size=512"]),
    ],
)
def test_what_fits_into_24_gb_is_not_refused(name, overrides, monkeypatch):
    monkeypatch.setattr(training_memory, "free_memory", lambda: 20 * GB)
    check_memory(recipe_of(*overrides, name=name), CPU)


def test_the_copy_of_a_checkpoint_is_part_of_the_need(monkeypatch):
    """With train.ema and AdamW's two averages the state is four times the weights: on a CPU twice, on a GPU once."""
    recipe = recipe_of("model.projector={layers: 3, hidden: 8192, out: 8192}", "train.batch_size=2", "train.ema=0.9")
    weights = count_bytes(outline_model(recipe))  # 0.6 GB, nearly all in matrices of 2**n bytes
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * GB, 80 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    free = [0]
    monkeypatch.setattr(training_memory, "free_memory", lambda: free[0])
    for device, copies, rounded in (("cpu", 8, 1.0), ("cuda", 4, 1.2)):
        free[0] = int(copies * weights * 0.999)
        with pytest.raises(UserError, match=r"of memory on the machine, .*: lower model\.projector\.hidden"):
            check_memory(recipe, torch.device(device))
        free[0] = int(copies * weights * 1.001 * rounded)
        check_memory(recipe, torch.device(device))


@pytest.mark.parametrize("overrides", [[], ["embedding={stochastic: hz, prior: vamp}"], ["embedding.stochastic=none"]])
def test_an_outline_has_the_size_of_the_model_and_leaves_the_generator_alone(overrides):
    recipe = recipe_of(*overrides)
    state = torch.manual_seed(0).get_state()
    outline = outline_model(recipe)
    assert torch.equal(torch.get_rng_state(), state)
    model = build_model(recipe)
    assert (
        count_bytes(outline)
        == count_bytes(model)
        == sum(
            tensor.numel() * tensor.element_size()
            for tensor in {id(t): t for t in model.state_dict(keep_vars=True).values()}.values()
        )
    )


def hostile_files(finished: Path, folder: Path) -> list[Path]:
    """A checkpoint and two exports whose recipes ask for models that no machine has room for."""
    from safetensors.torch import save_file

    saved = torch.load(finished / "checkpoints" / "last.pt", weights_only=True)
    recipe = load_recipe(finished / "recipe.yaml")
    wide = recipe.model_copy(
        update={
            "model": recipe.model.model_copy(
                update={"projector": recipe.model.projector.model_copy(update={"hidden": 10**6, "layers": 100})}
            )
        }
    )
    tall = recipe.model_copy(update={"model": recipe.model.model_copy(update={"backbone": "vit_7b_patch16_dinov3"})})
    files = [folder / "wide.pt", folder / "wide.safetensors", folder / "tall.safetensors", folder / "tall.pt"]
    for file, asked in zip(files, (wide, wide, tall, tall)):
        if file.suffix == ".pt":
            torch.save({**saved, "recipe": asked.model_dump(mode="json")}, file)
        else:
            save_file({"encoder.x": torch.ones(1)}, file, metadata={"recipe": asked.model_dump_json()})
    return files


@pytest.fixture(scope="module")
def finished(canvas, tmp_path_factory):
    run = tmp_path_factory.mktemp("finished") / "run"
    return train(load_recipe("recipes/barlow.yaml", small(canvas, run, "train.epochs=1")))


def test_models_of_others_are_not_built_if_they_are_too_large(finished, tmp_path, monkeypatch, fastssl):
    monkeypatch.setattr(model_memory, "free_memory", lambda: 8 * GB)
    for file in hostile_files(finished, tmp_path):
        with pytest.raises(UserError, match=f"{file.name}: The weights of this model take .* GB, and 8.0 GB"):
            load_encoder(file) if file.name == "tall.safetensors" else load_model(file)
        code, _, err = fastssl("export", file, "--format", "timm", "--out", tmp_path / "out")
        assert code == 2 and err.count("\nhint: ") <= 1, err
    assert isinstance(load_model(finished), torch.nn.Module)  # a small one is built


GPU_ERROR = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.10 GiB"
LACKS = [
    MemoryError(),
    torch.OutOfMemoryError(GPU_ERROR),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
    ),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("can't start new thread"),
    RuntimeError("could not create a primitive"),  # oneDNN
    OSError(12, "Cannot allocate memory"),
]
PLACES = {  # what fails, and where it does
    "step": (loop, "forward_and_backward"),
    "optimizer": (loop, "optimize"),
    "loader": (loader_module.BetonLoader, "_assemble"),
    "probe": (probe, "compute_features"),
    "checkpoint": (run_writer, "write_checkpoint"),  # in its thread
    "first batch": (run_writer.RunWriter, "save_views"),
    "model": (loop, "prepare"),
    "snapshot": (Snapshot, "take"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_lack_of_memory_is_one_sentence_and_the_run_goes_on_later(canvas, tmp_path, monkeypatch, fastssl, place):
    run = tmp_path / "run"
    overrides = small(canvas, run, "probe.every=1", "embedding.stochastic=z", "checkpoint.every=2")
    owner, name = PLACES[place]
    real, calls = getattr(owner, name), []

    def fails(*arguments, **options):
        calls.append(1)
        if place in ("model", "first batch") or len(calls) == 5 or (place == "probe" and len(calls) == 2):
            raise LACKS[list(PLACES).index(place) % len(LACKS)]
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails)
        code, out, err = fastssl("train", "recipes/barlow.yaml", *overrides)
    assert code == 2, out + err
    assert err.startswith("error: There was not enough memory (") and err.count("\nhint: ") <= 1
    for key in ("train.batch_size=16", "views.size=32", "embedding.chunk=1", "train.accumulate=1"):
        assert key in err
    assert (f"with {training_command('--resume', run)}" in err) == (place != "model")

    if place == "model":
        return
    code, out, err = fastssl("train", "--resume", run)
    assert code == 0 and re.search("Resuming barlow|Training barlow|barlow is already finished", out), err
    straight = tmp_path / "straight"
    fastssl("train", "recipes/barlow.yaml", *overrides, f"run.dir={straight}")
    for key, weight in load_file(straight / "encoder.safetensors").items():
        assert torch.equal(load_file(run / "encoder.safetensors")[key], weight)


def train_with_little_memory(arguments: list[str], output: Path, place: str, spare: int) -> None:
    """In a process of its own: `fastssl train`, which from the first call of `place` on may take `spare` bytes more."""
    torch.set_num_threads(1)
    owner, name = PLACES[place]
    real = getattr(owner, name)

    def limited(*parts, **options):
        if not limited.done:
            limited.done = True
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + spare, resource.RLIM_INFINITY))
        return real(*parts, **options)

    limited.done = False
    setattr(owner, name, limited)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["fastssl", "train", *arguments]
    cli.main()


SPARE = {"step": 50 << 20, "snapshot": 5 << 20, "loader": 1 << 20}  # bytes


@pytest.mark.parametrize(
    "place, spare", [pytest.param(*each, marks=() if each[0] == "step" else pytest.mark.slow) for each in SPARE.items()]
)
def test_memory_that_is_really_full_ends_a_run_in_order(canvas, tmp_path, fastssl, place, spare):
    run, output = tmp_path / "run", tmp_path / "output"
    # A step at 160 px takes more than 50 MB, and a snapshot more than 5 MB.
    overrides = small(canvas, run, "views.size=160", "model.projector.hidden=1024", "train.batch_size=48")
    arguments = ["recipes/barlow.yaml", *overrides]
    process = FORKS.Process(target=train_with_little_memory, args=(arguments, output, place, spare))
    process.start()
    process.join(PATIENCE)
    lines = output.read_text().splitlines()
    assert process.exitcode == 2, lines
    assert any(line.startswith("error: There was not enough memory (") for line in lines[-2:]), lines
    if find_checkpoints(run):
        code, out, err = fastssl("train", "--resume", run)
        assert code == 0, err


@pytest.mark.parametrize("error", LACKS, ids=lambda error: type(error).__name__)
def test_a_lack_of_memory_is_never_a_damaged_file(finished, tmp_path, monkeypatch, fastssl, error):
    """The last checkpoint stays the last one, and no weights are said to be misfits."""
    assert is_out_of_memory(error)

    def fails(*_, **__):
        raise error

    before = sorted(path.name for path in (finished / "checkpoints").iterdir())
    for owner, name in ((torch, "load"), (torch.nn.Module, "load_state_dict")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails)
            for command in (["train", "--resume", finished, "train.epochs=2"], ["eval", "knn", finished],
                            ["export", finished, "--format", "timm", "--out", tmp_path / "out"]):  # fmt: skip
                code, _, err = fastssl(*command)
                assert code == 2 and "here was not enough memory (" in err and err.count("\nhint: ") <= 1, err
                assert "half-written" not in err and "damaged" not in err and "does not fit" not in err
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == before

    for module in (exported, weights_file):
        monkeypatch.setattr(module, "safe_open", fails)
    for load in (load_model, partial(read_weights, key="model.init: ")):
        with pytest.raises(type(error)):
            load(str(finished / "encoder.safetensors"))


def test_other_errors_are_no_lack_of_memory():
    for error in (
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("Error(s) in loading state_dict: size mismatch"),
        RuntimeError("could not create a primitive descriptor for a convolution forward propagation primitive"),
        ValueError("out of memory"),
        UserError("out of memory"),
        OSError(28, "No space left on device"),
    ):
        assert not is_out_of_memory(error)


def test_a_profile_for_which_there_is_not_enough_memory_is_one_sentence(canvas, tmp_path, monkeypatch, fastssl):
    def fails(*_):
        raise torch.OutOfMemoryError(GPU_ERROR)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(profiler.Profiler, "measure", fails)
    monkeypatch.setattr(profiler, "OTHERS_SECONDS", 0.01)
    code, _, err = fastssl("profile", "recipes/barlow.yaml", *small(canvas, tmp_path / "run"))
    assert code == 2 and err.startswith("error: There was not enough memory (CUDA out of memory.")
    assert "train.batch_size=16" in err and "--resume" not in err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("space, key", [("h", "choose a smaller model.backbone"), ("z", "lower model.projector.out")])
def test_large_heads_are_made_smaller_by_what_sets_their_width(space, key):
    model = nn.Module()
    model.encoder = nn.Linear(2, 2)
    model.heads = nn.ModuleDict({space: nn.Linear(9, 9)})
    assert model_memory.suggest_smaller(model) == key

"""The checkpoint file of a training run, written and read, and the models in it. Untrusted files run no code."""

import errno
import hashlib
import io
import os
import warnings
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Annotated, Any, NotRequired, cast

import torch
from pydantic import AfterValidator, Field, InstanceOf, SkipValidation, Strict, TypeAdapter, ValidationError
from torch import Tensor, nn
from typing_extensions import TypedDict

from fastssl.common.errors import UserError, in_short, is_out_of_memory
from fastssl.common.files import expand_user, machine_fix, open_regular, write_atomically
from fastssl.common.schema import Count, Finite, first_problem
from fastssl.common.system import total_memory
from fastssl.common.terminal import printable
from fastssl.loading.loader import LoaderState
from fastssl.models.build import Model, build_model
from fastssl.models.exported import check_dense, load_exported_encoder, load_exported_model, misfit
from fastssl.recipe import Recipe, explain

LAST, PREVIOUS = "last.pt", "previous.pt"  # in RUN/checkpoints


def _check_best(best: dict[str, float]) -> dict[str, float]:
    if best and "step" not in best:
        raise ValueError('metrics without their "step"')
    return best


DenseTensor = Annotated[InstanceOf[Tensor], AfterValidator(check_dense)]
Weights = dict[str, DenseTensor]
Positive = Annotated[Finite, Field(gt=0)]


class SavedScaler(TypedDict, total=False):
    """torch.amp.GradScaler's state. Empty unless the precision is fp16."""

    scale: Positive
    growth_factor: Positive
    backoff_factor: Positive
    growth_interval: Count
    _growth_tracker: Count


class SavedOptimizer(TypedDict):
    """torch.optim.Optimizer's state. `load_optimizer` in training/optim.py compares it with the optimizer's own."""

    # By the number of the parameter; AggMo has a buffer for each momentum.
    state: dict[Count, dict[str, DenseTensor | bool | int | float | dict[Finite, DenseTensor] | None]]
    param_groups: list[dict[str, Any]]


class SavedState(TypedDict):
    """The contents of a checkpoint file, as torch.save writes them.

    The first three keys are enough for a model; a resume needs all of them.
    """

    recipe: SkipValidation[dict[str, Any]]  # Recipe.model_dump(mode="json"); checked by Checkpoint.recipe
    model: Weights
    step: Count  # optimizer steps, skipped ones included
    ema: NotRequired[Weights | None]  # the moving average of the model, with train.ema
    optimizer: NotRequired[SavedOptimizer]
    scaler: NotRequired[SavedScaler]  # of the gradients
    loader: NotRequired[LoaderState]
    skipped: NotRequired[DenseTensor]  # int64 (): steps skipped because they were not finite
    decay_epochs: NotRequired[Annotated[Count, Field(ge=1)]]  # until the learning rate has its final value
    epochs_probed: NotRequired[Count]
    best: NotRequired[Annotated[dict[str, Finite], Field(max_length=100), AfterValidator(_check_best)]]
    seconds: NotRequired[Annotated[Finite, Field(ge=0)]]  # of training
    precision: NotRequired[Annotated[str, Strict(), Field(pattern="^(fp32|tf32|bf16|fp16)$")]]  # without "auto"
    torch_threads: NotRequired[Annotated[int, Strict(), Field(ge=1, le=2**31)]]
    rng: NotRequired[DenseTensor]  # of torch's CPU generator
    cuda_rng: NotRequired[DenseTensor | None]


NO_RUNS = ("checkpoints", "eval", "export", "slurm")  # folders of runs and sweeps, which may hold other runs
SAVED_STATE = TypeAdapter(SavedState)


# Numbers of errors of a disk, of permissions and of limits: what is in the file is not known.
MACHINE_ERRORS = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE)


class DamagedCheckpoint(UserError):
    """A file is no checkpoint, or a damaged one. The one before it may be good."""


class DamagedArchive(ValueError):
    """An archive is not as torch.save wrote it."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file that has been read."""

    path: Path
    saved: SavedState  # tensors on the CPU
    sha256: str  # of the file
    warning: str | None = None  # where the newest file is damaged and this is the one before it

    @property
    def weights(self) -> dict[str, Tensor]:
        """The model's weights: their moving average where the run has one."""
        average = self.saved.get("ema")
        return self.saved["model"] if average is None else average

    @property
    def recipe(self) -> Recipe:
        """The run's recipe. Keys that are newer than the checkpoint have their defaults."""
        try:
            return Recipe.model_validate(self.saved["recipe"])
        except ValidationError as error:
            raise UserError(
                f"{self.path} holds a recipe that this version of fastssl does not know: "
                f"{explain(error, Recipe).message}",
                hint="use the version that wrote it",
            ) from None


def write_checkpoint(run_dir: Path, name: str, saved: SavedState) -> None:
    """Write RUN/checkpoints/NAME; the last.pt before it becomes previous.pt.

    A reader sees the old file or the new one, whole. Raises OSError if the disk is full; the old files then stay.
    """

    def write(part: Path) -> None:
        with open(part, "wb") as file:
            output = _Output(file)
            torch.save(saved, cast(IO[bytes], output))
            if output.error:
                raise output.error

    folder = run_dir / "checkpoints"
    keep = folder / PREVIOUS if name == LAST else None
    write_atomically(folder / name, write, keep=keep)


class _Output:
    """A file for torch.save. After the first error of the disk, which it keeps, it takes all bytes and writes none.

    torch.save itself raises other errors then, which depend on the part of the archive that it was in. Serialized in
    memory first, a checkpoint would take its size again, and no other thread would run while a tensor is copied there.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: memoryview) -> int:
        try:
            if not self.error:
                self.file.write(data)
        except OSError as error:
            self.error = error
        return len(data)

    def flush(self) -> None:
        """Nothing: closing the file does it."""


def read_checkpoint(path: Path) -> Checkpoint:
    """Read one file. Raises DamagedCheckpoint, and UserError if the machine cannot read it."""
    try:
        with open_regular(path) as file:
            check_archive(file)
            file.seek(0)
            data = file.read()
        saved = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        missing = {"recipe", "model", "step"} - (saved.keys() if isinstance(saved, dict) else set())
    except Exception as error:  # damaged bytes raise errors of many types
        if is_out_of_memory(error):
            raise
        if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
            fix = machine_fix(error) or "check the disk, and whether your user may read the file"
            raise UserError(f"{path} cannot be read ({error.strerror})", hint=fix) from None
        reason = printable(in_short((str(error) or type(error).__name__).split("\n")[0].rstrip(".")))
        raise DamagedCheckpoint(
            f"{path} is not a readable checkpoint, perhaps half-written ({reason})", hint="name an earlier checkpoint"
        ) from None
    if missing:
        raise DamagedCheckpoint(
            f"{path} is not a checkpoint of fastssl: it lacks {', '.join(sorted(missing))}",
            hint="for weights from elsewhere, set model.init, or call fastssl eval with --weights FILE --backbone NAME",
        )
    try:
        SAVED_STATE.validate_python(saved)
    except ValidationError as error:
        raise DamagedCheckpoint(
            f"{path} is a damaged checkpoint ({first_problem(error)})", hint="name an earlier checkpoint"
        ) from None
    return Checkpoint(path, saved, hashlib.sha256(data).hexdigest())


def check_archive(file: IO[bytes]) -> None:
    """Check the archive that torch.save has written: torch itself does not verify its checksums.

    Raises:
        DamagedArchive: a part has another checksum (a flipped bit would become a weight), or the parts are larger than
            the file, as they are compressed or overlap: a small file could fill the memory.
        zipfile.BadZipFile: it is no archive.
    """
    size = file.seek(0, io.SEEK_END)
    if size > total_memory():
        raise DamagedArchive(f"its {size / 1e9:,.0f} GB are more than this machine's memory")
    with zipfile.ZipFile(file) as archive:
        if sum(part.file_size for part in archive.infolist()) > size:
            raise DamagedArchive("its parts are compressed or overlap, as torch.save does not write them")
        if damaged := archive.testzip():
            raise DamagedArchive(f"the checksum of {damaged} is wrong")


def find_checkpoints(run_or_checkpoint: str | Path) -> list[Path]:
    """The last.pt and previous.pt of a run directory, those that exist, or the path itself if it is a file."""
    path = Path(run_or_checkpoint)
    files = [path / "checkpoints" / name for name in (LAST, PREVIOUS)] if path.is_dir() else [path]
    return [file for file in files if file.is_file()]


def newest_checkpoint(run_or_checkpoint: str | Path) -> Checkpoint:
    """Read the last checkpoint of a run, or the one before it if the last is damaged.

    Raises UserError if no checkpoint can be read, or the machine cannot read one.
    """
    files = find_checkpoints(run_or_checkpoint)
    if not files:
        raise UserError(
            f"{run_or_checkpoint} holds no checkpoint", hint="name a run directory of fastssl train or a .pt file"
        )
    errors: list[DamagedCheckpoint] = []
    for path in files:
        try:
            found = read_checkpoint(path)
        except DamagedCheckpoint as error:
            errors.append(error)
            continue
        warning = printable(f"{errors[0]} Taking {path}, of step {found.saved['step']}.") if errors else None
        return replace(found, warning=warning)
    raise errors[0]


def run_dir_of(checkpoint: Path) -> Path | None:
    """The run directory that contains a checkpoint file, or None."""
    folder = checkpoint.resolve().parent
    return folder.parent if folder.name == "checkpoints" and (folder.parent / "recipe.yaml").is_file() else None


def find_run_dir(path: Path) -> Path:
    """The run directory that a user means by its path, or that of `checkpoints`, a file in it, or its only run.

    Raises:
        UserError: if there is no run, or several.
    """
    path = expand_user(path)
    if path.exists():
        folder = path if path.is_dir() else path.parent
        for candidate in (folder, folder.parent) if folder.name == "checkpoints" else (folder,):
            if is_run_dir(candidate):
                return candidate
    runs = sorted(child for child in path.iterdir() if is_run_dir(child)) if path.is_dir() else []
    if len(runs) > 1:
        raise UserError(f"{path} holds {len(runs)} runs, such as {runs[0]}", hint="name one of them")
    if not runs:
        raise UserError(f"{path} holds no run", hint="name a run directory of fastssl train")
    return runs[0]


def is_run_dir(path: Path) -> bool:
    return (path / "recipe.yaml").is_file() or bool(path.is_dir() and find_checkpoints(path))


def runs_below(folder: Path) -> list[Path]:
    """Return the run directories in a folder, such as that of a sweep, at any depth; links are not followed."""
    runs = []
    for parent, names, _ in os.walk(folder):
        names.sort()
        for name in list(names):
            path = Path(parent, name)
            if name in NO_RUNS or name.startswith("."):
                names.remove(name)
            elif is_run_dir(path):
                names.remove(name)
                runs.append(path)
    return runs


def load_model(run_or_checkpoint: str | Path) -> Model:
    """The trained model of a run directory, a checkpoint or an exported .safetensors, in eval mode, on the CPU.

    Its weights are their moving average if the run has one (train.ema).
    """
    if Path(run_or_checkpoint).suffix == ".safetensors":
        return load_exported_model(Path(run_or_checkpoint))
    checkpoint = newest_checkpoint(run_or_checkpoint)
    if checkpoint.warning:
        warnings.warn(checkpoint.warning, stacklevel=2)
    return model_from_checkpoint(checkpoint)


def model_from_checkpoint(checkpoint: Checkpoint) -> Model:
    """The model of a checkpoint, as `load_model` returns it."""
    recipe = checkpoint.recipe
    try:
        model = build_model(recipe)
        model.load_state_dict(checkpoint.weights)
    except (RuntimeError, TypeError, AttributeError, UserError) as error:
        raise misfit(checkpoint.path, error) from None
    return model.eval()


def load_encoder(run_or_checkpoint: str | Path) -> nn.Module:
    """The trained timm backbone in eval mode: images (B, 3, H, W) to features (B, D)."""
    if Path(run_or_checkpoint).suffix == ".safetensors":
        return load_exported_encoder(Path(run_or_checkpoint))
    return load_model(run_or_checkpoint).encoder

"""The typed recipe: every setting of a run, loaded from YAML, overridden, checked and dumped.

    recipe = load_recipe("recipes/zprob_barlow.yaml", ["train.epochs=1", "data.train=x.beton"])

This file is the one place for keys, defaults, limits and forbidden combinations. An unknown key is an error that names
the nearest known one. Of our own modules it imports only those of common, so that every other file may import it.
"""

import difflib
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from fastssl.common.errors import UserError, in_short, quote
from fastssl.common.files import UnsafeFile, read_text
from fastssl.common.validation import (
    InvalidValues,
    any_of,
    as_written,
    keys_of,
    nearest_key,
    requirement,
    value_hint,
)
from fastssl.common.yaml_values import MAX_VALUES, parse_yaml

Probability = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1, le=10**12)]
Epochs = Annotated[float, Field(ge=0, le=10**12)]
# Limits that no run comes near. Below them the numbers of values in tensors do not overflow.
Width = Annotated[int, Field(ge=1, le=10**6)]
Side = Annotated[int, Field(ge=8, le=4096)]  # of an image, in px
Range = tuple[float, float]
Threads = Annotated[int, Field(ge=1, le=1024)]
MAX_CHANNELS = 64
CONTROL = re.compile(r"[\0-\x1f\x7f-\x9f]")
PerChannel = Annotated[tuple[float, ...], Field(min_length=1, max_length=MAX_CHANNELS)]


def _user_path(path: str) -> str:
    """~ is the home directory."""
    if not _is_file_name(path):
        raise PydanticCustomError("path", "Input should be a path without control characters")
    return os.path.expanduser(path)


def _run_name(name: str) -> str:
    folders = name.split("/")
    if len(name) > 200 or not _is_file_name(name) or any(not part or part.startswith(".") for part in folders):
        raise PydanticCustomError(
            "name",
            "Input should be a folder within runs/, in 1 to 200 characters without control characters or dot in front",
        )
    return name


def _is_file_name(text: str) -> bool:
    """Whether no character commands a terminal, and the system can encode all."""
    return not CONTROL.search(text) and all(not "\ud800" <= c <= "\udfff" or "\udc80" <= c <= "\udcff" for c in text)


UserPath = Annotated[str, AfterValidator(_user_path)]
RunName = Annotated[str, AfterValidator(_run_name)]


class Section(BaseModel):
    """One group of keys. Unknown keys are errors; values never change after loading. No number is infinite or NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RunConfig(Section):
    dir: UserPath | None = None  # run directory; null: runs/NAME, or runs/NAME-2 and so on if that exists


class DataConfig(Section):
    train: UserPath  # a .beton, a folder with train.beton or its shards, a pattern or a list of shards
    # shared: every node sees all shards. local: each node reads only the shards on its own disk (docs/loading.md).
    shards: Literal["shared", "local"] = "shared"
    val: UserPath | None = None  # the same for the probe and the evaluation, with val.beton
    subset: UserPath | None = None  # a file that lists images by name or index: train on these only; null: all
    limit: Count | None = None  # train on this many images (of the subset), always the same random ones; null: all
    # Where crops are made. auto: on the GPU for a canvas, on the CPU for the full layout.
    crop: Literal["auto", "gpu", "cpu"] = "auto"
    # Order of the images in an epoch. quasi_random: for a file larger than memory, read in pieces of 8 MB.
    order: Literal["random", "quasi_random"] = "random"
    resident: bool | Literal["auto"] = "auto"  # all images on the device; auto: if a GPU has room next to training
    # If an image cannot be decoded. skip: use the next image of the batch in its place.
    on_bad_sample: Literal["error", "skip"] = "error"
    workers: Threads | None = None  # threads that decode; null: all cores that this process may use

    @model_validator(mode="after")
    def check(self) -> "DataConfig":
        for key in ("subset", "limit"):
            if self.shards == "local" and getattr(self, key) is not None:
                raise InvalidValues(
                    f"data.shards=local reads all images of the shards on a node, and data.{key} selects some",
                    hint=f"leave out data.{key}, or build shards of the images that are wanted",
                )
        if self.shards == "local" and self.resident is True:
            raise InvalidValues(
                "data.shards=local may read other shards in each epoch, and data.resident=true keeps the first ones",
                hint="leave out data.resident",
            )
        return self


class JitterConfig(Section):
    """Random brightness, contrast, saturation and hue, in random order, with torchvision's strengths."""

    p: Probability = 0.8  # probability of the whole operation
    brightness: NonNegative = 0.4  # strength s: the factor is drawn from 1 - s to 1 + s
    contrast: NonNegative = 0.4  # strength, as of brightness
    saturation: NonNegative = 0.2  # strength, as of brightness
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1  # largest shift, as a share of the color circle


class PerViewConfig(Section):
    """Operations whose probability differs between the two views (BYOL, arXiv 2006.07733, table 6)."""

    blur: Probability = 0.0  # probability of a Gaussian blur
    solarize: Probability = 0.0  # probability of inverting all values above the middle


class ProgressiveResizeConfig(Section):
    """Training views that start small, as FFCV's progressive resizing. Evaluation always uses views.size."""

    size: Side  # side of the views in the first epochs, in px
    epochs: tuple[Epochs, Epochs]  # the views grow from the first of these epochs to the second, in steps of 32 px


class ViewsConfig(Section):
    size: Side = 224  # side of the views, in px
    progressive_resize: ProgressiveResizeConfig | None = None  # views that grow during training; null: one size
    scale: Range = (0.08, 1.0)  # area of the crop / area of the source image
    ratio: Range = (3 / 4, 4 / 3)  # width / height of the crop
    flip: Probability = 0.5  # probability of a horizontal flip
    # The evaluation transform: the whole image squashed to a square, or resize and center crop.
    eval: Literal["squash", "center"] = "squash"
    jitter: JitterConfig = JitterConfig()
    gray: Probability = 0.2  # probability of a view without color
    first: PerViewConfig = PerViewConfig(blur=1.0)
    second: PerViewConfig = PerViewConfig(blur=0.1, solarize=0.2)
    # Mean of each channel, of values in [0, 1], or one for all channels; the defaults are ImageNet's.
    mean: PerChannel = (0.485, 0.456, 0.406)
    # Standard deviation of each channel, or one for all channels.
    std: PerChannel = (0.229, 0.224, 0.225)
    # What makes the views on a GPU. auto: Triton's kernel, after the first batch was made by both and compared.
    kernel: Literal["auto", "triton", "torch"] = "auto"

    @model_validator(mode="after")
    def check(self) -> "ViewsConfig":
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise InvalidValues(
                f"views.scale must be 0 < low <= high <= 1, got {list(self.scale)}",
                hint="write it like views.scale=[0.08,1]",
            )
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise InvalidValues(
                f"views.ratio must be 0 < low <= high, got {list(self.ratio)}",
                hint="write it like views.ratio=[0.75,1.33]",
            )
        if min(self.std) <= 0:
            raise InvalidValues(
                f"views.std must be above 0, got {quote(self.std)}", hint="write it like views.std=[0.25]"
            )
        resize = self.progressive_resize
        if resize and not (resize.size < self.size and resize.epochs[0] < resize.epochs[1]):
            raise InvalidValues(
                f"views.progressive_resize must have a size below views.size={self.size} and epochs that rise, got "
                f"{resize.size} and {list(resize.epochs)}",
                hint="write it like 'views.progressive_resize={size: 160, epochs: [0, 50]}'",
            )
        if resize and self.size - resize.size > 7 * 32:
            raise InvalidValues(
                "views.progressive_resize has more than 8 sizes, and each is compiled", hint="start from a larger size"
            )
        return self


class ProjectorConfig(Section):
    layers: Annotated[int, Field(ge=1, le=100)] = 3  # linear layers
    hidden: Width = 1024  # width of the hidden layers
    out: Width = 1024  # width of z


class ModelConfig(Section):
    backbone: str = "resnet18"  # timm's name of the encoder
    stem: Literal["imagenet", "small"] = "imagenet"  # first layers of a ResNet; small: 3x3 convolution, no max-pool
    in_chans: Annotated[int, Field(ge=1, le=MAX_CHANNELS)] = 3  # channels of the images; 3: RGB
    projector: ProjectorConfig = ProjectorConfig()
    # A run or a file of weights to start from (docs/training.md, Weights from elsewhere); null: random weights.
    init: UserPath | None = None


class EmbeddingConfig(Section):
    stochastic: Literal["none", "z", "h", "hz"] = "none"  # which of h and z are Gaussians
    samples: Count = 12  # S, the Monte Carlo draws of each image
    # What the layer of log sigma^2 reads. normalized: features scaled to one length, so that sigma cannot follow it.
    sigma_input: Literal["features", "normalized"] = "features"
    chunk: Count | None = None  # draws per pass, computed again in the backward pass; null: all in one pass
    beta: NonNegative = 1e-3  # weight of the KL term
    beta_warmup_epochs: Epochs = 0  # epochs in which beta grows linearly from 0
    free_bits: NonNegative = 0  # nats per dimension below which the KL of an image costs nothing
    # Prior of the KL term. mixture: of Gaussians that are learned; vamp: VampPrior (arXiv 1705.07120).
    prior: Literal["standard_normal", "mixture", "vamp"] = "standard_normal"
    mixture_components: Width = 10  # components of a mixture or vamp prior
    # joint: a mixture over vectors; per_dim: one for each dimension; reference: as in the published code.
    mixture_mode: Literal["joint", "per_dim", "reference"] = "joint"
    # How the KL is computed. auto: in closed form for a standard normal, else by Monte Carlo.
    kl: Literal["auto", "closed", "mc"] = "auto"

    @model_validator(mode="after")
    def check(self) -> "EmbeddingConfig":
        if self.prior != "standard_normal" and self.kl == "closed":
            raise InvalidValues(
                f"embedding.kl=closed has no formula for a {self.prior} prior", hint="set embedding.kl=mc"
            )
        if self.prior == "vamp" and self.mixture_mode != "joint":
            raise InvalidValues(
                f"embedding.mixture_mode={self.mixture_mode} is for embedding.prior=mixture, and vamp is always joint",
                hint="leave out embedding.mixture_mode",
            )
        if self.prior == "mixture" and self.mixture_mode == "reference" and self.stochastic == "hz":
            raise InvalidValues(
                "embedding.mixture_mode=reference averages over the draws of one Gaussian, and with "
                "embedding.stochastic=hz each draw of z has its own",
                hint="set embedding.mixture_mode to joint or per_dim",
            )
        return self


class ObjectiveConfig(Section):
    """The keys of one objective, and its needs. objectives/__init__.py lists the steps to add one."""

    num_views: ClassVar[Literal[1, 2]] = 2  # augmented views of each image
    needs_labels: ClassVar[bool] = False  # every training image must have one
    has_projector: ClassVar[bool] = True  # False: a linear classifier in its place, so z are logits

    name: str  # the objective
    gather: bool = True  # statistics over the batches of all processes; false: each process has its own

    @property
    def is_mean_over_draws(self) -> bool:
        """Whether the loss of S draws is the mean of S losses, so that embedding.chunk may split them."""
        return True


class BarlowTwinsConfig(ObjectiveConfig):
    name: Literal["barlow_twins"] = "barlow_twins"  # the objective
    lambd: NonNegative = 5e-3  # weight of the off-diagonal terms
    unbiased: bool = False  # divide the variance by B - 1, not by B
    eps: NonNegative = 1e-5  # added to the variance


class VICRegConfig(ObjectiveConfig):
    name: Literal["vicreg"] = "vicreg"  # the objective
    inv: NonNegative = 25.0  # weight of the invariance term
    var: NonNegative = 25.0  # weight of the variance term
    cov: NonNegative = 1.0  # weight of the covariance term
    gamma: Positive = 1.0  # the standard deviation that the hinge asks for
    eps: NonNegative = 1e-4  # added to the variance
    center: bool = False  # subtract each view's mean before the invariance term


class SimCLRConfig(ObjectiveConfig):
    name: Literal["simclr"] = "simclr"  # the objective
    temperature: Positive = 0.1  # of the softmax over the images of a batch
    # How the draws are combined. mean: of their losses; log_mean_exp: inside the logarithm, MCInfoNCE.
    over_draws: Literal["mean", "log_mean_exp"] = "mean"

    @property
    def is_mean_over_draws(self) -> bool:
        return self.over_draws == "mean"


class BYOLConfig(ObjectiveConfig):
    """The only objective with a predictor and a target network, a copy of the model that follows it slowly."""

    name: Literal["byol"] = "byol"  # the objective
    momentum: Probability = 0.996  # momentum of the target network at the first step; it is 1 at the last
    predictor_hidden: Width = 4096  # width of the predictor's hidden layer


class SlicedConfig(ObjectiveConfig):
    """An objective that projects the embeddings onto random directions, other ones at every step."""

    slices: Width  # random directions onto which the embeddings are projected


class SIGRegConfig(SlicedConfig):
    name: Literal["sigreg"] = "sigreg"  # the objective
    slices: Width = 1024  # random directions onto which the embeddings are projected
    lambd: Probability = 0.05  # weight of the SIGReg term; that of the invariance term is 1 - lambd
    knots: Annotated[int, Field(ge=2, le=1000)] = 17  # values of t at which characteristic functions are compared
    t_max: Positive = 3.0  # the largest of these values; the least is 0


class VISRegConfig(SlicedConfig):
    name: Literal["visreg"] = "visreg"  # the objective
    slices: Width = 4096  # random directions onto which the embeddings are projected
    lambd: Probability = 0.9  # weight of the next three terms; that of the invariance term is 1 - lambd
    scale: NonNegative = 1.0  # weight of the scale term
    shape: NonNegative = 1.0  # weight of the shape term
    center: NonNegative = 1.0  # weight of the center term


class SupervisedConfig(ObjectiveConfig):
    """Cross-entropy on labels."""

    num_views: ClassVar[Literal[1, 2]] = 1
    needs_labels: ClassVar[bool] = True
    has_projector: ClassVar[bool] = False

    name: Literal["supervised"] = "supervised"  # the objective
    classes: Annotated[int, Field(ge=2, le=10**6)]  # number of classes
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of a label that goes to all classes

    @property
    def is_mean_over_draws(self) -> bool:
        return False  # the logits of the draws are averaged before the loss


AnyObjective = (
    BarlowTwinsConfig | VICRegConfig | SimCLRConfig | BYOLConfig | SIGRegConfig | VISRegConfig | SupervisedConfig
)
OBJECTIVES: dict[str, type[ObjectiveConfig]] = {
    kind.model_fields["name"].default: kind for kind in get_args(AnyObjective)
}


class OptimConfig(Section):
    name: str = "adamw"  # a class of torch.optim or torch_optimizer in lowercase, such as sgd, lars, lamb, radam
    lr: Positive = 1e-3  # learning rate at batch size 256; the run uses lr x train.batch_size / 256
    weight_decay: NonNegative = 1e-4  # coefficient of the weight decay
    head_lr_factor: Positive = 1.0  # learning rate of a supervised run's classifier / that of all other layers
    warmup_epochs: Epochs = 4  # epochs in which the learning rate grows linearly from 0
    final_lr_factor: Probability = 0.5  # the cosine ends at this share of lr
    # For a resume with more train.epochs. stretch: the cosine of all epochs; constant: its last rate in the new ones.
    extend: Literal["stretch", "constant"] = "stretch"
    clip: Positive | None = 0.5  # largest norm of the gradient; null: no clipping
    # Parameters without weight decay, and without trust ratio in LARS and LAMB.
    exclude: tuple[Literal["bias", "norm", "prior"], ...] = ("bias", "norm", "prior")
    options: dict[str, bool | int | float | tuple[float, ...]] = {}  # other arguments of the optimizer's class


class TrainConfig(Section):
    epochs: Count = 100  # passes over the training images
    batch_size: Annotated[int, Field(ge=2, le=10**9)] = 256  # images per step, over all processes
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU if there is one
    accumulate: Count = 1  # micro-batches per step; loss and batch norms have the statistics of one micro-batch
    # Data type of the step. auto: bf16 on a GPU and on a CPU that has it (avx512_bf16, amx_bf16), fp32 on other CPUs.
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    compile: Literal["auto"] | bool = "auto"  # torch.compile; auto: on for a GPU, off for a CPU
    cuda_graphs: bool = False  # replay the kernels of the compiled step as one CUDA graph; experimental
    channels_last: bool = True  # memory format of images and convolutions
    sync_bn: bool = True  # batch-norm statistics over all processes
    compress_gradients: bool = False  # processes exchange gradients in bf16
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None  # decay of a moving average of the weights; null: none
    max_skipped_steps: Annotated[int, Field(ge=0)] = 0  # non-finite steps to skip before the run stops


class ProbeConfig(Section):
    every: Annotated[int, Field(ge=0)] = 10  # epochs between kNN probes; 0: never
    train: UserPath | None = None  # labeled images to search for neighbors, a .beton; null: those of data.train
    split: Literal["val", "rest"] = "val"  # images to classify; rest: those of data.train that data.limit leaves out
    k: Count = 20  # number of nearest neighbors


class LogConfig(Section):
    every: Count = 50  # steps between log lines
    # Steps between log lines with RankMe, which waits for the GPU; epoch: one in each, 0: none.
    rank_every: Literal["epoch"] | Annotated[int, Field(ge=0)] = "epoch"
    to: tuple[Literal["tensorboard", "wandb"], ...] = ()  # where metrics go in addition to metrics.jsonl


class CheckpointConfig(Section):
    every: Count = 1000  # steps between writes of last.pt
    every_minutes: Positive | None = None  # also when last.pt is that old; null: by steps only
    keep: Annotated[int, Field(ge=0)] = 0  # epochs between checkpoints that are never deleted; 0: none


class Recipe(Section):
    name: RunName  # name of the run and of its folder in runs/
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0  # seed of weights, order, views and noise
    run: RunConfig = RunConfig()
    data: DataConfig
    views: ViewsConfig = ViewsConfig()
    model: ModelConfig = ModelConfig()
    embedding: EmbeddingConfig = EmbeddingConfig()
    objective: Annotated[AnyObjective, Field(discriminator="name")] = BarlowTwinsConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    probe: ProbeConfig = ProbeConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="before")
    @classmethod
    def check_size(cls, values: Any) -> Any:
        """Refuse what pydantic would describe for ever: in a checkpoint, lists may share and contain each other."""
        waiting, count = [values], 0
        while waiting:
            value = waiting.pop()
            count += 1
            if count > MAX_VALUES:
                raise InvalidValues(f"it holds more than {MAX_VALUES:,} values", hint="name a recipe or a sweep file")
            if isinstance(value, dict):
                waiting.extend(value.values())
            elif isinstance(value, list | tuple):
                waiting.extend(value)
        return values

    @model_validator(mode="after")
    def check(self) -> "Recipe":
        objective, embedding = self.objective, self.embedding
        for name, values in (("mean", self.views.mean), ("std", self.views.std)):
            if len(values) not in (1, self.model.in_chans):
                raise InvalidValues(
                    f"views.{name} has {len(values)} values, and the images have model.in_chans={self.model.in_chans} "
                    "channels",
                    hint="give a value for each channel or one for all, such as views.mean=[0.5] views.std=[0.25]",
                )
        if self.views.kernel == "triton" and self.model.in_chans != 3:
            raise InvalidValues(
                f"views.kernel=triton makes views of RGB images, and model.in_chans={self.model.in_chans}",
                hint="leave out views.kernel",
            )
        if not objective.has_projector and "z" in embedding.stochastic:
            raise InvalidValues(
                f"embedding.stochastic={embedding.stochastic} needs a projector's z, which "
                f"objective.name={objective.name} does not have",
                hint="set embedding.stochastic to none or h",
            )
        averages_inside = isinstance(objective, SimCLRConfig) and objective.over_draws == "log_mean_exp"
        if averages_inside and embedding.stochastic == "none":
            raise InvalidValues(
                "objective.over_draws=log_mean_exp needs draws to average over",
                hint="set embedding.stochastic to z, h or hz",
            )
        if embedding.chunk is not None and not objective.is_mean_over_draws:
            raise InvalidValues(
                f"embedding.chunk cannot split the draws of objective.name={objective.name}, which averages over them "
                "before the logarithm",
                hint="leave out embedding.chunk",
            )
        if objective.has_projector and self.optim.head_lr_factor != 1:
            raise InvalidValues(
                f"optim.head_lr_factor is the learning rate of a classifier, which objective.name={objective.name} "
                "does not have",
                hint="leave out optim.head_lr_factor",
            )
        if self.train.batch_size % self.train.accumulate:
            raise InvalidValues(
                f"train.accumulate={self.train.accumulate} does not divide train.batch_size={self.train.batch_size}",
                hint="set train.batch_size to a multiple of train.accumulate",
            )
        if self.train.cuda_graphs and self.train.compile is False:
            raise InvalidValues("train.cuda_graphs needs compiled steps", hint="leave out train.compile=false")
        if self.train.cuda_graphs and self.train.accumulate > 1:
            raise InvalidValues(
                "train.cuda_graphs keeps no gradients between micro-batches", hint="leave out train.accumulate"
            )
        if self.train.batch_size < 2 * self.train.accumulate:
            raise InvalidValues(
                f"train.accumulate={self.train.accumulate} splits train.batch_size={self.train.batch_size} into "
                "micro-batches of one image, which have no batch statistics",
                hint="lower train.accumulate",
            )
        if self.probe.split == "rest" and self.probe.train:
            raise InvalidValues("probe.split=rest searches data.train, not probe.train", hint="leave out one of them")
        if self.probe.split == "rest" and self.data.limit is None:
            raise InvalidValues("probe.split=rest uses the images that data.limit leaves out", hint="set data.limit")
        return self

    def to_yaml(self) -> str:
        """Every key with its value, including defaults; `load_recipe` reads it back unchanged."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply overrides and check every key. Data files are not touched.

    Args:
        path: a YAML file, or the name of a recipe that ships with the package, such as "zprob_barlow".
        overrides: `key=value` with dotted keys and values in YAML syntax, such as "optim.lr=1e-3".

    Raises:
        UserError: names the file, the key and what to write.
    """
    file = find_recipe(Path(path))
    values = read_yaml(file)
    if "grids" in values and "data" not in values:
        raise UserError(
            f"{path} is a sweep, not a recipe",
            hint=f"run it with `fastssl sweep {shlex.quote(str(path))}`",
        )
    try:
        return _validate(values, overrides)
    except ValidationError as error:
        found = explain(error, Recipe)
    # The file is not to blame for what an override has set.
    raise found.prefixed(f"{file}: ") if str(found) == _fault_of(values) else found


def _fault_of(values: dict[str, Any]) -> str | None:
    """What is wrong with the values of a file without overrides."""
    try:
        Recipe.model_validate(values)
    except ValidationError as error:
        return str(explain(error, Recipe))
    return None


def make_recipe(values: dict[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe with these values and then `key=value` overrides. Raises UserError as `load_recipe` does."""
    try:
        return _validate(Recipe.model_validate(values).model_dump(mode="json"), overrides)
    except ValidationError as error:
        raise explain(error, Recipe) from None


def _validate(values: dict[str, Any], overrides: Sequence[str]) -> Recipe:
    values = dict(values)
    for override in overrides:
        _apply(values, override)
    return Recipe.model_validate(values)


def shipped_recipes() -> Path:
    """The folder of the recipes that ship with the package: inside an installed wheel, else in the checkout."""
    package = Path(__file__).parent
    inside_wheel = package / "recipes"
    return inside_wheel if inside_wheel.is_dir() else package.parent / "recipes"


def find_recipe(path: Path) -> Path:
    """The file at `path` or `path`.yaml, else the shipped recipe of that name. Raises UserError if there is neither.

    A shipped recipe is named with or without its folders and its suffix: recipes/cifar10/barlow.yaml, cifar10/barlow.
    """
    for file in path, Path(f"{path}.yaml"):
        if os.path.isfile(file):  # unlike Path.is_file, no error about a name that is too long
            return file
    wanted = Path(str(path).removesuffix(".yaml")).parts
    shipped = [file.relative_to(shipped_recipes()) for file in shipped_recipes().rglob("*.yaml")]
    # Of two recipes of one name, the one in fewer folders: barlow is recipes/barlow.yaml.
    for file in sorted(shipped, key=lambda file: (len(file.parts), file)):
        if ("recipes" / file.with_suffix("")).parts[-len(wanted) :] == wanted:
            return shipped_recipes() / file
    if os.path.exists(path):
        raise UserError(
            f"{path} is a folder or a device, not a file",
            hint="name a YAML file; `fastssl recipes ls` lists the shipped ones",
        )
    if path.name == "recipe.yaml":  # of a run directory
        raise UserError(f"No recipe at {path}", hint="put the run's recipe.yaml back there, or name another run")
    raise UserError(f"No recipe at {in_short(path)}", hint=_near_recipes(path))


def _near_recipes(path: Path) -> str:
    """The most similar shipped recipes, by their whole paths and by their names alone."""
    known = ["recipes/" + str(p.relative_to(shipped_recipes())) for p in sorted(shipped_recipes().rglob("*.yaml"))]
    wanted = str(path)[:LONGEST_PATH].removesuffix(".yaml")
    name = Path(wanted).name

    def similarity(recipe: str) -> float:
        ratio = difflib.SequenceMatcher(None, wanted, recipe.removesuffix(".yaml")).ratio()
        return max(ratio, difflib.SequenceMatcher(None, name, Path(recipe).stem).ratio())

    # Of equal ones those in fewer folders.
    nearest = sorted(known, key=lambda recipe: (-similarity(recipe), recipe.count("/")))[:3]
    near = [recipe for recipe in nearest if similarity(recipe) >= 0.5]
    return f"did you mean {any_of(near)}?" if near else "`fastssl recipes ls` lists the shipped ones"


MAX_BYTES = 128 * 1024  # of a YAML file: recipes and sweeps have a few KB, and PyYAML reads about 100 KB a second
LONGEST_PATH = 4096  # of Linux


def read_recipe_text(path: Path) -> str:
    """The text of a recipe or sweep file. Raises UserError if it cannot be read."""
    try:
        return read_text(path, MAX_BYTES)
    except UnsafeFile as error:
        raise UserError(f"{path} is {error.strerror}", hint="name a recipe or a sweep file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})", hint="name another file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8", hint="save it as UTF-8, or name another file") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file. Raises UserError if it is not YAML, or holds no keys."""
    text = read_recipe_text(path)
    try:
        values = parse_yaml(text)
    except yaml.YAMLError as error:
        reason: object = error
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
            reason = f"line {error.problem_mark.line + 1}: {error.problem}"
        raise UserError(
            f"{path} is not readable as YAML ({in_short(reason)})", hint="correct that line, or name another file"
        ) from None
    if not isinstance(values, dict):
        raise UserError(
            f"{path} is not a recipe, as it holds no keys",
            hint="write keys such as name, data and train, or name another file",
        )
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *parents, last = words = key.split(".")
    if not equals or not all(words):
        raise UserError(f"{quote(override)} is not an override", hint="write key=value, such as train.epochs=1")
    section = values
    for parent in parents:
        below = {} if section.get(parent) is None else section[parent]
        if not isinstance(below, dict):
            raise UserError(
                f"{in_short(key)}: {in_short(parent)} is a single value and has no keys below it",
                hint=f"write {in_short(key.partition(parent)[0] + parent)}=VALUE",
            )
        section[parent] = dict(below)  # a copy, because in YAML an alias elsewhere may stand for the same values
        section = section[parent]
    try:
        section[last] = parse_yaml(text)
    except yaml.YAMLError:
        raise UserError(
            f"{in_short(key)}: {quote(text)} is not a value in YAML syntax",
            hint="put quotes around text with special characters",
        ) from None


def explain(error: ValidationError, section: type[BaseModel]) -> UserError:
    """The first of pydantic's errors about a `section`, with the dotted key and what to write."""
    errors = error.errors()
    first = errors[0]
    if first["type"] == "value_error":  # from our own validators
        ours = first["ctx"]["error"]
        return UserError(str(ours), hint=getattr(ours, "hint", None))
    known = keys_of(section)
    parts, objective = _location(first)
    if objective and section is Recipe:
        known = {**known, **keys_of(OBJECTIVES[objective], "objective.")}
    key = in_short(".".join(parts))
    if parts[:2] == ["optim", "options"] and len(parts) > 2:  # pydantic adds each type that it tried
        key = in_short(".".join(parts[:3]))
        return UserError(
            f"{key} must be a number, true, false or a list of numbers, got {as_written(first['input'])}",
            hint=f"write it like {key}=0.9",
        )
    if first["type"] == "extra_forbidden":
        return _unknown_key(key, parts, objective, list(known))
    is_value = first["type"] != "missing" or isinstance(first["input"], list | tuple)
    if not is_value:
        return UserError(f"the key {key} is missing", hint=f"add {EXAMPLES.get(key, f'{key}=VALUE')}")
    if first["type"] == "union_tag_invalid":
        given = first["input"]  # in a checkpoint it may be anything
        name = given.get("name") if isinstance(given, dict) else given
        near = difflib.get_close_matches(quote(name).strip("'"), OBJECTIVES, n=1)
        return UserError(
            f"objective.name must be {any_of(list(OBJECTIVES))}, got {as_written(name)}",
            hint=f"did you mean objective.name={near[0]}?" if near else "choose one of these",
        )
    if first["type"] == "union_tag_not_found":
        return UserError("the key objective.name is missing", hint=f"write {any_of(list(OBJECTIVES))}")
    key, same = _errors_of_one_value(errors, known)
    message = f"{key} {requirement(same)}"
    field = known.get(key, FieldInfo())
    if key == "objective":
        return UserError(message, hint="write it whole, such as 'objective={name: vicreg}'")
    if isinstance(field.default, BaseModel):
        first_key = next(iter(type(field.default).model_fields))
        return UserError(message, hint=f"write its keys, such as {key}.{first_key}=VALUE")
    if key in EXAMPLES:
        return UserError(message, hint=f"write it like {EXAMPLES[key]}")
    return UserError(message, hint=value_hint(key, same, field))


# For keys that have no default.
EXAMPLES = {
    "name": "name=my_run",
    "data": "data.train=data/cifar10",
    "data.train": "data.train=data/cifar10",
    "objective.name": "objective.name=barlow_twins",
    "objective.classes": "objective.classes=10",
    "grids": "grids, a list of recipes with axes, as in recipes/sweeps",
}


def _location(error: Any) -> tuple[list[str], str | None]:
    """The parts of the dotted key, and the objective that it is of: pydantic adds the name of the chosen class."""
    parts = [str(part) for part in error["loc"]]
    objective = parts.pop(1) if len(parts) > 1 and parts[0] == "objective" else None
    return parts, objective


def _errors_of_one_value(errors: Sequence[Any], known: Mapping[str, FieldInfo]) -> tuple[str, list[Any]]:
    """The key of the first error, without positions in its list and types that pydantic tried, and all its errors."""

    def key_of(error: Any) -> str:
        parts, _ = _location(error)
        for end in range(len(parts), 0, -1):
            name = ".".join(part for part in parts[:end] if not part.isdigit())
            if not parts[end - 1].isdigit() and name in known:
                end += isinstance(known[name].default, dict)  # the key of an entry
                return in_short(".".join(parts[:end]))
        return in_short(".".join(parts)) or "it"

    key = key_of(errors[0])
    return key, [error for error in errors if key_of(error) == key]


def _unknown_key(key: str, parts: list[str], objective: str | None, known: list[str]) -> UserError:
    owners = [name for name, kind in OBJECTIVES.items() if parts[-1] in kind.model_fields] if objective else []
    if owners:
        return UserError(
            f"{key} belongs to {any_of(owners)}",
            hint=f"write the whole objective, 'objective={{name: {objective}}}', or leave out {key}",
        )
    near = nearest_key(parts, known)
    return UserError(
        f"unknown key {key}", hint=f"did you mean {near}?" if near else "`fastssl recipes keys` lists the keys"
    )


def recipe_keys() -> list[str]:
    """All dotted keys of a recipe, those of every objective included."""
    return list(keys_of(Recipe))

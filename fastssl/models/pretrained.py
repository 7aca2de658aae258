"""The weights of a file, from fastssl or from elsewhere, as the state dict of an encoder. Untrusted files run no code.

`load_pretrained` fills a new model (`model.init`), `load_encoder_weights` an encoder alone. Both call `find_encoder`,
which looks for the part of the file that holds this encoder: under every prefix, under timm's names or under those of a
known layout, and resampled to the encoder's image size where timm can do it.
"""

import math
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from timm.layers import resample_abs_pos_embed, resample_abs_pos_embed_nhwc
from timm.models.resnet import ResNet
from torch import Tensor, nn

from fastssl.common.errors import UserError, is_out_of_memory
from fastssl.models.build import Model
from fastssl.models.encoder import adapt_input_channels, build_encoder
from fastssl.models.exported import ENCODER
from fastssl.models.weight_layouts import COUNTER, numbered, pair_by_order, sequences, torchvision_vit, without_chunks
from fastssl.models.weights_file import WeightsFile, read_weights
from fastssl.recipe import Recipe

MIN_SHARE = 0.9  # of the encoder's parameters that a file must hold
TARGET = "target.encoder."  # BYOL's target, in checkpoints of fastssl
MAX_GROUPS = 8  # of left-out or missing tensors that a remark lists
SIZES = (224, 256, 384, 32, 64, 96, 128, 160, 192, 288, 320, 448, 512, 518)  # image sizes that a sentence may suggest

# Of several networks in one file that fit equally well, the one that the method's authors evaluate: the earlier line
# wins, and a part without any of these names comes in place of the empty line.
PREFERENCE: tuple[tuple[str, ...], ...] = (
    ("model_ema", "state_dict_ema", "ema"),  # timm: the average of the weights
    ("teacher", "teacher_backbone"),  # DINO, DINOv2, iBOT
    # MoCo v1 and v2, MoCo v3, BYOL, solo-learn and lightly
    ("encoder_q", "base_encoder", "online_encoder", "online_network", "backbone"),
    ("target_encoder",),  # I-JEPA: next to "encoder"
    (),
    ("encoder_k", "momentum_encoder", "momentum_backbone", "backbone_momentum", "student", "student_backbone"),
    ("target", "target_network"),
)  # fmt: skip

STEMS: tuple[Literal["imagenet", "small"], ...] = ("imagenet", "small")
# Backbones that a sentence may suggest. The large ones come first, as a ResNet-34 holds all tensors of a ResNet-18.
COMMON_BACKBONES = (
    "vit_large_patch16_224", "vit_base_patch16_224", "vit_base_patch14_dinov2", "vit_small_patch16_224",
    "vit_small_patch14_dinov2", "vit_tiny_patch16_224", "wide_resnet50_2", "resnet152", "resnet101", "resnet50",
    "resnet34", "resnet18", "swin_tiny_patch4_window7_224", "convnext_tiny",
)  # fmt: skip


class Keys(NamedTuple):
    """How the sentences for users spell the settings."""

    source: str = "model.init: "
    backbone: str = "model.backbone="
    stem: str = "model.stem="
    size: str = "views.size="
    in_chans: str | None = "model.in_chans="


OPTIONS = Keys("--weights ", "--backbone ", "--stem ", "--size ", None)  # of `fastssl eval`


class Shapes(NamedTuple):
    there: tuple[int, ...]  # in the file
    here: tuple[int, ...]  # in the encoder


@dataclass(frozen=True)
class Match:
    """The part of a file that fits an encoder, and what does not."""

    prefix: str  # of its names in the file, such as "module.encoder_q."; "": none
    state: dict[str, Tensor] = field(repr=False)  # by the encoder's names
    used: set[str] = field(repr=False)  # names in the file
    resampled: dict[str, Shapes]
    rgb: dict[str, Shapes]  # first convolutions for RGB images that were adapted to images of other channels
    other_shape: dict[str, Shapes]
    missing: list[str]
    matched: int  # elements of the encoder's parameters
    share: float  # of the encoder's parameters, 0 to 1
    by_order: bool = False  # names do not fit; order, shapes and the last word of the names do
    rivals: tuple[str, ...] = ()  # other prefixes that fit as well

    @property
    def score(self) -> tuple[int, int]:
        return self.matched, len(self.state)


def load_pretrained(model: Model, recipe: Recipe, source: str) -> list[str]:
    """Fill a new model with the weights of `source`, for `model.init`. Returns remarks about what was loaded.

    Projector, classifier, heads and priors are loaded where they are in a run, a checkpoint or an export of fastssl,
    and names and shapes agree.

    Args:
        model: of this recipe.
        source: a run directory, or a file of weights (docs/training.md lists the layouts).

    Raises:
        UserError: less than 90 % of the encoder's parameters are in `source`, some have another shape, or the file
            cannot be read.
    """
    keys = Keys()
    weights = read_weights(source, keys.source)
    match = require_encoder(weights, model.encoder, recipe, keys)
    own = model.state_dict()
    loaded = {ENCODER + name: tensor for name, tensor in match.state.items()}
    if match.prefix == ENCODER:
        for name, tensor in weights.tensors.items():
            if not name.startswith((ENCODER, TARGET)) and name in own and own[name].shape == tensor.shape:
                loaded[name] = tensor
        if any(name.startswith(TARGET) for name in weights.tensors) and TARGET + next(iter(match.state)) in own:
            target = find_encoder(weights, model.encoder, prefixes=[TARGET])
            loaded |= {TARGET + name: tensor for name, tensor in target.state.items()}
    # BYOL's target starts as a copy of the online network, where the source has no target of its own.
    for name in own:
        online = name.removeprefix("target.")
        if name not in loaded and online in loaded and name != online:
            loaded[name] = loaded[online]
    require_finite(weights, loaded, keys)
    model.load_state_dict(loaded, strict=False)

    lacking = [name for name in own if name not in loaded and not name.startswith(ENCODER)]
    rest = f"; {len(lacking)} others start at random, such as {lacking[0]}" if lacking else ""
    used = match.used | (loaded.keys() if match.prefix == ENCODER else set())
    first = f"Starting from {source}: {len(loaded)} tensors{describe_match(match)}{rest}."
    return [*([weights.warning] if weights.warning else []), first, *remarks_on(match, weights, used, recipe, keys)]


def load_encoder_weights(encoder: nn.Module, recipe: Recipe, source: str, keys: Keys = OPTIONS) -> list[str]:
    """Fill an encoder, built from `recipe`, with the weights of `source`. Returns and raises as `load_pretrained`."""
    weights = read_weights(source, keys.source)
    match = require_encoder(weights, encoder, recipe, keys)
    require_finite(weights, match.state, keys)
    encoder.load_state_dict(match.state, strict=False)
    first = f"Weights of {source}: {len(match.state)} tensors{describe_match(match)}."
    return [
        *([weights.warning] if weights.warning else []),
        first,
        *remarks_on(match, weights, match.used, recipe, keys),
    ]


# --- The search for the encoder --------------------------------------------------------------------------------------


def find_encoder(weights: WeightsFile, encoder: nn.Module, prefixes: Sequence[str] | None = None) -> Match:
    """The part of a file that fits most of the encoder's parameters, by number of elements.

    Args:
        prefixes: where to look; None: everywhere.
    """
    own = encoder.state_dict()
    parts = {
        prefix: {name.removeprefix(prefix): t for name, t in weights.tensors.items() if name.startswith(prefix)}
        for prefix in (_prefixes(weights.tensors, own) if prefixes is None else prefixes)
    }
    matches = [
        _fit(prefix, inside, candidate, encoder)
        for prefix, inside in parts.items()
        for candidate in _candidates(inside, encoder)
    ]
    best = max(matches, key=lambda match: match.score)  # of equal ones the first
    if best.share < MIN_SHARE and weights.ordered:
        for prefix, inside in parts.items():
            if pairs := pair_by_order(inside, own):
                paired = _Candidate({name: inside[old] for name, old in pairs.items()}, pairs)
                return replace(_fit(prefix, inside, paired, encoder), by_order=True)
    rivals = dict.fromkeys(m.prefix for m in matches if m.score == best.score and m.prefix != best.prefix)
    return replace(best, rivals=tuple(rivals))


def _prefixes(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """The empty prefix and all that end at a dot and have half as many elements as the encoder or more; best first."""
    elements: Counter[str] = Counter()
    for name, tensor in tensors.items():
        for dot in re.finditer(r"\.", name):
            elements[name[: dot.end()]] += tensor.numel()
    least = sum(tensor.numel() for tensor in own.values()) / 2
    found = ["", *(prefix for prefix, count in elements.items() if count >= least)]
    return sorted(found, key=lambda prefix: (_rank(prefix), prefix.count(".")))


def _rank(prefix: str) -> int:
    """The line of PREFERENCE for a prefix: that of its least preferred name, else that of its most preferred one."""
    ranks = [rank for rank, names in enumerate(PREFERENCE) if set(names) & set(prefix.split("."))]
    neutral = PREFERENCE.index(())
    return max(ranks) if ranks and max(ranks) > neutral else min(ranks, default=neutral)


class _Candidate(NamedTuple):
    """A state dict that may fit, and the names in the file that its tensors came from."""

    state: Mapping[str, Tensor]
    origin: Mapping[str, str]


def _candidates(inside: dict[str, Tensor], encoder: nn.Module) -> Iterator[_Candidate]:
    """Yield state dicts that may fit.

    Each renaming is tried with and without timm's own filter for this architecture, which knows the names of official
    checkpoints and resamples what depends on the image size.
    """
    own = encoder.state_dict()
    timm_filter = getattr(sys.modules[type(encoder).__module__], "checkpoint_filter_fn", None)
    renamings: list[Callable[[str], str]] = [lambda name: name, torchvision_vit, without_chunks]
    for modules in sequences(encoder):
        renamings.append(partial(numbered, modules=modules))
    for number, rename in enumerate(renamings):
        origin = {rename(name): name for name in inside}
        renamed = {name: inside[old] for name, old in origin.items()}
        if number and not (renamed.keys() - inside.keys()) & own.keys():
            continue  # this layout is another one
        yield _Candidate(renamed, origin)
        if timm_filter is not None:
            try:
                with warnings.catch_warnings(action="ignore"):  # about torch's functions that it calls
                    filtered = timm_filter(dict(renamed), encoder)
            except Exception as error:  # it was written for other names, and fails on these in its own ways
                if is_out_of_memory(error):
                    raise
                continue
            by_id = {id(renamed[name]): old for name, old in origin.items()}
            yield _Candidate(filtered, {name: by_id.get(id(t), origin.get(name, name)) for name, t in filtered.items()})


def _fit(prefix: str, inside: Mapping[str, Tensor], candidate: _Candidate, encoder: nn.Module) -> Match:
    """Compare a state dict with the encoder's, tensor by tensor."""
    own = encoder.state_dict()
    first_layers = _first_layers(encoder)
    state: dict[str, Tensor] = {}
    used: set[str] = set()
    resampled: dict[str, Shapes] = {}
    rgb: dict[str, Shapes] = {}
    other_shape: dict[str, Shapes] = {}
    for name, target in own.items():
        if name not in candidate.state or candidate.state[name].is_floating_point() != target.is_floating_point():
            continue  # integers in place of floats are those of a quantized model
        tensor, old = candidate.state[name], candidate.origin[name]
        shapes = Shapes(tuple(inside[old].shape if old in inside else tensor.shape), tuple(target.shape))
        changed = resampled
        if tensor.shape != target.shape:
            tensor = _resample_positions(name, tensor, target.shape)
        if name in first_layers and _channels(tensor) == 3 != _channels(target):
            adapted = adapt_input_channels(tensor, target.shape[1])
            tensor, changed = (tensor, resampled) if adapted is None else (adapted, rgb)
        if tensor.shape != target.shape:
            other_shape[name] = shapes
            continue
        state[name] = tensor
        used.add(prefix + old)
        if shapes.there != shapes.here:
            changed[name] = shapes
    sizes = {name: parameter.numel() for name, parameter in encoder.named_parameters()}
    matched = sum(size for name, size in sizes.items() if name in state)
    missing = [name for name in own if name not in state and name not in other_shape and not name.endswith(COUNTER)]
    return Match(prefix, state, used, resampled, rgb, other_shape, missing, matched, matched / sum(sizes.values()))


def _first_layers(encoder: nn.Module) -> list[str]:
    """The names of the weights that images are multiplied with, as timm knows them."""
    first = getattr(encoder, "pretrained_cfg", {}).get("first_conv") or ()
    names = [f"{name}.weight" for name in ([first] if isinstance(first, str) else first)]
    return [*names, "conv1.weight"] if isinstance(encoder, ResNet) else names  # which model.stem=small replaces


def _channels(weight: Tensor) -> int | None:
    """Input channels of a convolution's weight."""
    return weight.shape[1] if weight.ndim == 4 else None


def _resample_positions(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    """A position embedding on a grid of another size, for architectures whose filter in timm leaves that out."""
    if not re.search(r"(^|\.)pos_embed(_\d+)?$", name) or tensor.ndim != len(shape) or tensor.shape[-1] != shape[-1]:
        return tensor
    if tensor.ndim == 4:
        return resample_abs_pos_embed_nhwc(tensor, list(shape[1:3]))
    for class_tokens in (1, 0, 2):
        side = math.isqrt(max(0, shape[1] - class_tokens))
        old_side = math.isqrt(max(0, tensor.shape[1] - class_tokens))
        if side and old_side and (side**2 + class_tokens, old_side**2 + class_tokens) == (shape[1], tensor.shape[1]):
            return resample_abs_pos_embed(tensor, [side, side], num_prefix_tokens=class_tokens)
    return tensor


# --- What is said about it -------------------------------------------------------------------------------------------


def require_encoder(weights: WeightsFile, encoder: nn.Module, recipe: Recipe, keys: Keys) -> Match:
    """`find_encoder`. Raises UserError, with the key to change, unless enough of the encoder is in the file.

    Tensors of another shape are an error, too, as they belong to another architecture, and so is a missing first layer.
    Of a run of fastssl all must fit.
    """
    match = find_encoder(weights, encoder)
    if _is_enough(match, encoder) and not (weights.recipe and match.missing):
        return match
    problem, fix = _reason(weights, match, encoder, recipe, keys)
    raise UserError(f"{keys.source}{weights.path} {problem}", hint=fix)


def _is_enough(match: Match, encoder: nn.Module) -> bool:
    lacks_first_layer = not set(match.missing).isdisjoint(_first_layers(encoder))
    return match.share >= MIN_SHARE and not match.other_shape and not lacks_first_layer


def _reason(weights: WeightsFile, match: Match, encoder: nn.Module, recipe: Recipe, keys: Keys) -> tuple[str, str]:
    """Why a file does not fit, as the end of a sentence that begins with the file's name; and what to do about it."""
    model, size = recipe.model, recipe.views.size
    name, shapes = next(iter(match.other_shape.items()), ("", Shapes((), ())))
    wrong = f"{name} has shape {_text(shapes.there)} there and {_text(shapes.here)} here"
    if weights.recipe:
        theirs = weights.recipe.model
        if theirs.backbone != model.backbone:
            return f"holds a {theirs.backbone}", f"set {keys.backbone}{theirs.backbone}"
        if theirs.stem != model.stem:
            return "has another stem", f"set {keys.stem}{theirs.stem}"
    elif stem := _fitting_stem(weights, recipe):
        return "has another stem", f"set {keys.stem}{stem}"
    if name in _first_layers(encoder) and len(shapes.there) == 4 and shapes.there[1] != shapes.here[1]:
        fix = f"set {keys.in_chans}{shapes.there[1]}" if keys.in_chans else "name images of as many channels"
        return f"is for images of {shapes.there[1]} channels, and these have {shapes.here[1]}", fix
    trained_at = _fitting_size(weights, recipe) if name and match.share >= MIN_SHARE else None
    if trained_at:
        return (
            f"was trained at {keys.size}{trained_at}, and {name} of a {model.backbone} cannot be resampled to "
            f"{keys.size}{size}",
            f"set {keys.size}{trained_at}",
        )
    holds = f"holds {100 * match.share:.3g} % of the parameters of {keys.backbone}{model.backbone}"
    if fitting := _suggest(weights, recipe, keys):
        return holds, f"it fits {fitting}, so set that"
    if name:
        return f"{holds}; {wrong}", "name the backbone that it was trained with"
    names = list(weights.tensors)
    some = ", ".join(dict.fromkeys((names[0], names[len(names) // 2], names[-1])))
    return (
        f"{holds}; it lacks {', '.join(match.missing[:3])} and has {some}",
        "name the backbone that it was trained with",
    )


def _fitting_stem(weights: WeightsFile, recipe: Recipe) -> str | None:
    """The other model.stem, if the file fits with it."""
    other = STEMS[1 - STEMS.index(recipe.model.stem)]
    encoder = _try_to_build(recipe, recipe.model.backbone, other, recipe.views.size)
    return other if encoder is not None and _is_enough(find_encoder(weights, encoder), encoder) else None


def _fitting_size(weights: WeightsFile, recipe: Recipe) -> int | None:
    """The views.size at which the file fits the backbone as it is, if another one is the reason that it does not."""
    if weights.recipe:
        return weights.recipe.views.size if weights.recipe.views.size != recipe.views.size else None
    for size in SIZES:
        encoder = _try_to_build(recipe, recipe.model.backbone, recipe.model.stem, size)
        if encoder is not None:
            match = find_encoder(weights, encoder)
            if _is_enough(match, encoder) and not match.resampled:
                return size
    return None


def _try_to_build(recipe: Recipe, backbone: str, stem: Literal["imagenet", "small"], size: int) -> nn.Module | None:
    """An encoder without memory for its weights, or None where it cannot be built for this image size."""
    try:
        with torch.device("meta"):
            return build_encoder(backbone, stem, size, recipe.model.in_chans)
    except Exception:  # of many types, raised by timm
        return None


def _suggest(weights: WeightsFile, recipe: Recipe, keys: Keys) -> str | None:
    """The settings for a common backbone that is in the file as a whole."""
    for backbone in COMMON_BACKBONES:
        for stem in STEMS if backbone.startswith("resnet") else STEMS[:1]:
            encoder = _try_to_build(recipe, backbone, stem, recipe.views.size)
            match = find_encoder(weights, encoder) if encoder is not None else None
            if match and match.share == 1 and not match.other_shape:
                return f"{keys.backbone}{backbone} {keys.stem}{stem}"
    return None


def require_finite(weights: WeightsFile, loaded: Mapping[str, Tensor], keys: Keys) -> None:
    for name, tensor in loaded.items():
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{keys.source}{weights.path} holds numbers that are not finite, in {name}",
                hint="take an earlier checkpoint",
            )


def describe_match(match: Match) -> str:
    """Where in the file the encoder was found, and how much of it: follows a number of tensors."""
    parts = []
    if match.share == 1 and not match.missing:
        parts.append("all of the encoder")
    else:
        parts.append(f"{math.floor(1000 * match.share) / 10:g} % of the encoder's parameters")
    if match.prefix not in ("", ENCODER):
        parts.append(f"under {match.prefix[:-1]}")
    if match.by_order:
        parts.append("whose names differ, paired in their order with equal shapes")
    if match.rivals:
        parts.append(f"not those under {' or '.join(prefix[:-1] or 'no prefix' for prefix in match.rivals)}")
    return "".join(f", {part}" for part in parts)


def remarks_on(match: Match, weights: WeightsFile, used: set[str], recipe: Recipe, keys: Keys) -> list[str]:
    """What was resampled, what is missing, and what of the file was left out."""
    remarks = []
    if match.resampled:
        changes = [f"{name} from {_text(old)} to {_text(new)}" for name, (old, new) in match.resampled.items()]
        rest = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        remarks.append(
            f"Resampled as timm does for {keys.backbone}{recipe.model.backbone} and {keys.size}{recipe.views.size}: "
            f"{', '.join(changes[:3])}{rest}."
        )
    for name, shapes in match.rgb.items():
        remarks.append(f"{name} was adapted from RGB to {shapes.here[1]} input channels, as timm does it.")
    if match.missing:
        remarks.append(f"Missing, so these keep their initial values: {_groups(match.missing, '')}.")
    left_out = [name for name in weights.tensors if name not in used and not name.endswith(COUNTER)]
    if left_out:
        remarks.append(f"Left out: {_groups(left_out, match.prefix)}.")
    return remarks


def _groups(names: Sequence[str], prefix: str) -> str:
    """Names by the module that they are in, with their number, such as "fc (2 tensors), queue"."""
    groups: dict[str, list[str]] = {}
    for name in names:
        inside = prefix
        while not name.startswith(inside):
            inside = inside[: inside[:-1].rfind(".") + 1]
        groups.setdefault(inside + name[len(inside) :].partition(".")[0], []).append(name)
    texts = [f"{group} ({len(of)} tensors)" if len(of) > 1 else of[0] for group, of in groups.items()]
    shown = texts[:MAX_GROUPS]
    rest = [f"{len(texts) - len(shown)} more such as {texts[len(shown)]}"] if len(texts) > len(shown) else []
    return ", ".join([*shown, *rest])


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "()"

"""Optimizers by name, LARS and LAMB that never wait for the device, and gradient clipping."""

import copy
import difflib
import functools
import inspect
import itertools
from collections import defaultdict
from typing import Any, cast

import torch
import torch_optimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from fastssl.common.errors import UserError, in_short, is_out_of_memory, quote
from fastssl.models.checkpoint import SavedOptimizer
from fastssl.recipe import OptimConfig

MOMENTUM = 0.9  # of SGD and LARS, as in SimCLR, BYOL and Barlow Twins
TRUST = 1e-3  # of LARS, as in Barlow Twins
DEFAULTS = {"sgd": {"momentum": MOMENTUM}, "lars": {"momentum": MOMENTUM, "trust_coefficient": TRUST}}
CHANGED_BY_STEPS = ("lr", "phase", "k")  # options that the trainer, SWATS and MADGRAD change

ParamGroup = dict[str, Any]
Tensors = list[Tensor] | tuple[Tensor, ...]

REFUSED = {  # names, and why they do not work here
    "a2gradexp": "follows no learning rate",
    "a2gradinc": "follows no learning rate",
    "a2graduni": "follows no learning rate",
    "adahessian": "needs second derivatives",
    "apollo": "warms up by itself and keeps the graph of every step",
    "lbfgs": "needs the loss several times per step",
    "lookahead": "needs another optimizer to wrap",
    "sparseadam": "takes sparse gradients only",
}
NOT_OPTIONS = ("params", "lr", "weight_decay", "foreach", "fused", "capturable", "differentiable", "maximize")


def make_optimizer(model: nn.Module, optim: OptimConfig) -> Optimizer:
    """The recipe's optimizer over all of the model's parameters.

    Parameters that `optim.exclude` names have no weight decay, and LARS and LAMB do not adapt their learning rate to
    their norm. The groups of a classifier have `lr_factor`, their learning rate divided by that of the others.

    Raises:
        UserError: for an unknown name or option, or one with which the optimizer cannot train.
    """
    name = optim.name.lower()
    kind = optimizer_class(name)
    options = check_options(name, kind, optim)
    decay, plain = split_parameters(model, optim.exclude)
    head = {id(p) for name, p in model.named_parameters() if name.startswith("classifier.")}
    groups = [
        {"params": [p for p in params if (id(p) in head) == is_head], **decays, **rate}
        for is_head, rate in ((False, {}), (True, {"lr_factor": optim.head_lr_factor}))
        for params, decays in (
            (decay, {"weight_decay": optim.weight_decay}),
            (plain, {"weight_decay": 0.0, "adapt": False}),
        )
    ]
    groups = [group for group in groups if group["params"]]
    try:
        step_once(kind, options)
        constructor: Any = kind
        optimizer: Optimizer = constructor(groups, lr=optim.lr, **options)
    except Exception as error:  # constructors and steps of other packages raise errors of many types
        if is_out_of_memory(error):
            raise
        given = f" with optim.options={quote(optim.options)}" if optim.options else ""
        raise UserError(
            f"optim.name: {name}{given} does not train here ({in_short(error)})",
            hint="choose another optimizer, such as adamw",
        ) from error
    if kind is torch.optim.SGD and options["momentum"]:
        # The fused step creates these uninitialized, and leaves them so if the first step is skipped.
        for p in (*decay, *plain):
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def optimizer_class(name: str) -> type[Optimizer]:
    """The class with this lowercase name: ours, else torch.optim's, else torch_optimizer's."""
    known = {
        key.lower(): value
        for module in (torch_optimizer, torch.optim)  # of two with one name the last stays
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer
    }
    known |= {"lars": LARS, "lamb": LAMB}
    if name in REFUSED:
        raise UserError(
            f"optim.name: {name} does not work here, as it {REFUSED[name]}",
            hint="choose another optimizer, such as adamw",
        )
    if name not in known:
        near = difflib.get_close_matches(name[:100], known.keys() - REFUSED.keys(), n=1)
        hint = f"did you mean {near[0]}?" if near else "adamw, sgd, lars and lamb are some of those that it has"
        raise UserError(f"optim.name: no optimizer {in_short(name)} in torch.optim or torch_optimizer", hint=hint)
    return known[name]


def check_options(name: str, kind: type[Optimizer], optim: OptimConfig) -> dict[str, Any]:
    """The optimizer's keyword arguments without `lr`: our defaults, the recipe's options and the fused step."""
    arguments = inspect.signature(kind).parameters
    for key, instead in (("lr", "optim.lr"), ("weight_decay", "optim.weight_decay")):
        if key in optim.options:
            raise UserError(f"optim.options.{key} has a key of its own", hint=f"set {instead} instead")
    allowed = [key for key in arguments if key not in NOT_OPTIONS]
    for key in optim.options:
        if key in NOT_OPTIONS:
            raise UserError(f"optim.options.{key} is set by the trainer itself", hint=f"leave out optim.options.{key}")
        if key not in allowed:
            raise UserError(
                f"optim.options.{in_short(key)}: {name} has no such option", hint=f"use one of {', '.join(allowed)}"
            )
    if optim.options.get("dampening"):
        # Dampening treats the first step differently, and only the device knows whether that step was skipped.
        raise UserError(
            "optim.options.dampening does not work with steps that may be skipped on the device",
            hint="leave out optim.options.dampening",
        )
    if optim.weight_decay and "weight_decay" not in arguments:
        raise UserError(f"optim.weight_decay: {name} has no weight decay", hint="set optim.weight_decay=0")
    fused = {"fused": True} if "fused" in arguments else {}
    return {**DEFAULTS.get(name, {}), **optim.options, **fused}


def step_once(kind: type[Optimizer], options: dict[str, Any]) -> None:
    """A step with a bias, a matrix and a convolution, so that the optimizer fails here if it cannot train them."""
    params = [nn.Parameter(torch.ones(shape)) for shape in ((2,), (2, 2), (2, 2, 1, 1))]
    for p in params:
        p.grad = torch.ones_like(p)
    constructor: Any = kind
    constructor(params, lr=1e-3, **options).step()


def load_optimizer(optimizer: Optimizer, saved: SavedOptimizer) -> None:
    """Continue from the saved state of an optimizer of the same recipe.

    Its options stay those of the recipe. What it has for each parameter must be what one step gives it, in tensors of
    the same shape: the kernels of fused steps do not compare shapes.

    Raises:
        ValueError: if the state is another optimizer's, or of other parameters.
    """
    groups = []
    for own, group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        changed = {key: group[key] for key in CHANGED_BY_STEPS if key in own and type(group[key]) is type(own[key])}
        groups.append({**own, **changed, "params": group["params"]})
    expected = {
        p: _state_after_a_step(optimizer, group, p) for group in optimizer.param_groups for p in group["params"]
    }
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    for p, state in expected.items():
        if optimizer.state[p]:
            _compare_state(optimizer.state[p], state)


def _state_after_a_step(optimizer: Optimizer, group: ParamGroup, p: Tensor) -> dict[str, Any]:
    """What a new optimizer has for a parameter like `p` after a step, in tensors without memory.

    The optimizer does not change.
    """
    other = nn.Parameter(torch.ones_like(p))
    other.grad = torch.ones_like(p)
    trial = object.__new__(type(optimizer))
    trial.__dict__.update(optimizer.__dict__)
    trial.param_groups, trial.state = [{**group, "params": [other]}], defaultdict(dict)
    if optimizer.state[p]:
        trial.state[other] = copy.deepcopy(optimizer.state[p])
    trial.step()
    return cast(dict[str, Any], tree_map_only(Tensor, lambda x: torch.empty_like(x, device="meta"), trial.state[other]))


def _compare_state(saved: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        found = saved.get(name)
        if isinstance(value, dict) and isinstance(found, dict):
            _compare_state(found, value)
        elif isinstance(value, Tensor) and isinstance(found, Tensor):
            if (found.shape, found.dtype) != (value.shape, value.dtype):
                raise ValueError(f"optimizer: {name} is {found.dtype} {tuple(found.shape)}, not {tuple(value.shape)}")
        elif type(found) is not type(value):
            raise ValueError(f"optimizer: {name} is no {type(value).__name__}")


def skips_on_device(optimizer: Optimizer) -> bool:
    """Whether the optimizer skips a step where `optimizer.found_inf`, a float tensor on the device, is 1.

    The CPU then need not wait for the flag. This is torch's protocol for fused optimizers, which GradScaler uses too;
    our LARS and LAMB follow it.
    """
    return isinstance(optimizer, ForeachStep) or optimizer.defaults.get("fused") is True


def split_parameters(model: nn.Module, exclude: tuple[str, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Trainable parameters with, and those without weight decay and adaptation.

    "norm" is every vector that is neither bias nor prior: the scales of norms of any kind, and of layers. A
    transformer's position embedding and class token are no vectors: they decay.
    """
    decay: list[Tensor] = []
    plain: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = "weight"
        if name.startswith("priors."):
            kind = "prior"
        elif name.endswith("bias"):
            kind = "bias"
        elif parameter.ndim <= 1:
            kind = "norm"
        (plain if kind in exclude else decay).append(parameter)
    return decay, plain


class ForeachStep:
    """A step over all tensors of a group in foreach kernels, which never waits for the device.

    The steps of torch-optimizer read the norm of every tensor, so the CPU waits once per tensor.
    """

    param_groups: list[ParamGroup]  # of the Optimizer that a subclass also derives from
    found_inf: Tensor | None = None  # set by the caller: 1 to skip the step

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        skip = None if self.found_inf is None else self.found_inf.bool()
        for group in self.param_groups:
            by_kind: defaultdict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_kind[p.device, p.dtype].append(p)
            for params in by_kind.values():
                grads = [cast(Tensor, p.grad) for p in params]
                if skip is not None:
                    zero_where(skip, grads)
                self.step_group(group, params, grads, skip)

    def step_group(self, group: ParamGroup, params: list[Tensor], grads: Tensors, skip: Tensor | None) -> None:
        """Step parameters of one device and data type.

        skip: bool () on the device, or None. Where it is true, the gradients are zeros, and nothing may change.
        """
        raise NotImplementedError


def unless(skip: Tensor | None, value: Any, otherwise: float) -> Any:
    """`value`, a number or a tensor, or `otherwise` where `skip` is true."""
    if skip is None:
        return value
    if not isinstance(value, Tensor):
        value = torch.full((), value, device=skip.device)
    return value.masked_fill(skip, otherwise)


INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a value


def zero_where(flag: Tensor, tensors: list[Tensor]) -> None:
    """Set all tensors to zero, in place, if `flag`, a bool () on the device, is true.

    0 times NaN is NaN, and there is no foreach function of `where`: so the bits are multiplied, as integers.
    """
    integer = INTEGERS[tensors[0].element_size()]
    torch._foreach_mul_([x.view(integer) for x in tensors], (~flag).to(integer))


ROW = 1024  # values


class Rows:
    """Memory for a tensor like each of some tensors, in rows of one flat tensor: each part begins a row.

    So all parts are multiplied by a factor each in one kernel. A foreach function with a list of factors that are on
    the device runs a kernel per tensor.
    """

    def __init__(self, like: list[Tensor]):
        counts = tuple(-(-_memory_span(x) // ROW) for x in like)
        self.part_of_row_R = _part_of_row(counts, like[0].device)
        self.flat = like[0].new_empty((len(self.part_of_row_R), ROW))
        starts = itertools.accumulate(counts, initial=0)
        self.parts = [self.flat.as_strided(x.shape, x.stride(), ROW * start) for x, start in zip(like, starts)]

    def multiply(self, factor_N: Tensor) -> None:
        """Multiply each part by its factor, in place."""
        self.flat.mul_(factor_N.to(self.flat.dtype)[self.part_of_row_R, None])


def _memory_span(x: Tensor) -> int:
    """Values from the first to the last one in memory."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride())) if x.numel() else 0


@functools.lru_cache(maxsize=16)
def _part_of_row(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """The number of the part that each row belongs to, int64 (R,)."""
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(device)


class LARS(ForeachStep, torch_optimizer.LARS):  # type: ignore[misc]  # its step takes no closure
    """torch-optimizer's LARS in foreach kernels, without dampening (see `check_options`).

    As in torch-optimizer, a group without weight decay is not adapted; nor is one with `adapt` False.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        trust_coefficient: float = 0.01,
        eps: float = 1e-8,
    ):
        super().__init__(params, lr, momentum, 0.0, weight_decay, nesterov, trust_coefficient, eps)

    def step_group(self, group: ParamGroup, params: list[Tensor], grads: Tensors, skip: Tensor | None) -> None:
        decay = group["weight_decay"]
        if decay != 0:
            p_norm = torch.stack(torch._foreach_norm(params))
            g_norm = torch.stack(torch._foreach_norm(grads))
            scaled = (p_norm > 0) & (g_norm > 0)
            trust = group["trust_coefficient"] * p_norm / (g_norm + decay * p_norm + group["eps"])
            rows = Rows(params)
            torch._foreach_copy_(rows.parts, params)
            rows.multiply(scaled * decay)
            torch._foreach_add_(rows.parts, grads)
            if group.get("adapt", True):
                rows.multiply(trust.masked_fill(~scaled, 1.0))
            grads = rows.parts

        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        momentum = unless(skip, group["momentum"], 1.0)
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, grads)
        updates: Tensors = buffers
        if group["nesterov"]:
            updates = torch._foreach_add(grads, torch._foreach_mul(buffers, momentum))
        torch._foreach_sub_(params, torch._foreach_mul(updates, unless(skip, group["lr"], 0.0)))


class LAMB(ForeachStep, torch_optimizer.Lamb):  # type: ignore[misc]  # its step takes no closure
    """torch-optimizer's Lamb in foreach kernels. A group with `adapt` False has trust ratio 1, as in Adam."""

    def add_param_group(self, param_group: ParamGroup) -> None:
        # This key makes load_state_dict put "step" on the parameters' device.
        super().add_param_group({**param_group, "capturable": True})

    def step_group(self, group: ParamGroup, params: list[Tensor], grads: Tensors, skip: Tensor | None) -> None:
        for p in params:
            if not self.state[p]:
                count = torch.zeros((), device=p.device)
                self.state[p] = {"step": count, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        states = [self.state[p] for p in params]
        counts, means, squares = ([state[key] for state in states] for key in ("step", "exp_avg", "exp_avg_sq"))

        beta1, beta2 = group["betas"]
        # A list of numbers or tensors: for a single tensor, the CPU would read its value.
        torch._foreach_add_(counts, [unless(skip, 1.0, 0.0)] * len(counts))
        torch._foreach_mul_(means, unless(skip, beta1, 1.0))
        torch._foreach_add_(means, grads, alpha=1 - beta1)
        torch._foreach_mul_(squares, unless(skip, beta2, 1.0))
        torch._foreach_addcmul_(squares, grads, grads, value=1 - beta2)

        roots = torch._foreach_sqrt(squares)
        torch._foreach_add_(roots, group["eps"])
        rows = Rows(params)
        torch._foreach_copy_(rows.parts, means)
        torch._foreach_div_(rows.parts, roots)
        if group["weight_decay"] != 0:
            torch._foreach_add_(rows.parts, params, alpha=group["weight_decay"])

        rates = torch.full((len(params),), group["lr"], device=params[0].device)
        if self.debias:
            count = torch.stack(counts).double()  # in float32, 1 - 0.999 is wrong in the fifth digit
            rates = rates * (1 - beta2**count).sqrt() / (1 - beta1**count)
        if group.get("adapt", True) and not self.adam:
            p_norm = torch.stack(torch._foreach_norm(params)).clamp(max=self.clamp_value)
            u_norm = torch.stack(torch._foreach_norm(rows.parts))
            rates = rates * (p_norm / u_norm).masked_fill((p_norm == 0) | (u_norm == 0), 1.0)
        rows.multiply(unless(skip, rates, 0.0))
        torch._foreach_sub_(params, rows.parts)


def clip_gradients(model: nn.Module, optimizer: Optimizer, scaler: torch.amp.GradScaler, limit: float | None) -> Tensor:
    """Scale the gradients to a norm of at most `limit`. Returns their norm before that, a tensor () on the device."""
    if scaler.is_enabled():
        scaler.unscale_(optimizer)
    if limit is None:
        return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return nn.utils.clip_grad_norm_(model.parameters(), limit)

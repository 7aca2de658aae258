"""What a step launches on a GPU beyond the network, counted without one: optimizers, guard, log (tests/launches.py)."""

import copy
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from launches import Launches, launches_of, of_lists
from torch import nn

from fastssl.models import SSLModel
from fastssl.recipe import OptimConfig, load_recipe
from fastssl.training.guard import FiniteGuard
from fastssl.training.optim import LAMB, LARS, Rows, clip_gradients, make_optimizer, zero_where
from fastssl.training.step_log import HostCopy

RECIPES = {18: "zprob_barlow", 50: "beyond/resnet50_zprob_barlow"}
DISABLED = torch.amp.GradScaler("cpu", enabled=False)


def model_on(device, depth):
    return SSLModel(load_recipe(f"recipes/{RECIPES[depth]}.yaml")).to(device)


@pytest.fixture(scope="module")
def models():
    """On meta tensors, which have no memory, and so no values that could be read. 71 and 170 weights and biases."""
    return {depth: model_on("meta", depth) for depth in RECIPES}


def with_gradients(model):
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    return model


@pytest.mark.parametrize(
    "name, options, limits",
    [
        ("lars", {}, {18: 48, 50: 97}),
        ("lars", {"nesterov": True}, {18: 52, 50: 111}),
        ("lamb", {}, {18: 63, 50: 135}),
        ("lamb", {"debias": True}, {18: 83, 50: 155}),
    ],
)
def test_lars_and_lamb_launch_no_kernel_per_tensor(models, name, options, limits):
    """One operation per tensor, as before, were 309 and 351 for the ResNet-18. A ResNet-50 fills several lists."""
    for depth, model in models.items():
        optimizer = make_optimizer(with_gradients(model), OptimConfig(name=name, options=options))
        optimizer.found_inf = torch.empty((), device="meta")
        optimizer.step()  # makes its state
        launched = launches_of(optimizer.step)
        assert 20 < launched.total <= limits[depth], launched.by_call


@pytest.mark.parametrize("name, limit", [("sgd", 4), ("adamw", 10)])
def test_fused_optimizers_launch_a_handful(name, limit):
    model = with_gradients(model_on("cpu", 18))
    optimizer = make_optimizer(model, OptimConfig(name=name))
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    launched = launches_of(optimizer.step)
    assert 1 <= launched.total <= limit, launched.by_call


def test_clipping_launches_a_handful(models, monkeypatch):
    """torch chooses foreach functions on a GPU only."""
    monkeypatch.setattr("torch.nn.utils.clip_grad._has_foreach_support", lambda tensors, device: True)
    model = with_gradients(models[18])
    launched = launches_of(lambda: clip_gradients(model, None, DISABLED, 0.5))
    assert 5 <= launched.total <= 10, launched.by_call


def test_a_log_step_launches_a_handful():
    """Without the network: the terms over all ranks, and their copy to the host."""
    model = nn.BatchNorm1d(4)
    guard = FiniteGuard(model, SimpleNamespace(skipped=torch.tensor(0)))
    terms, std_z = dict(zip("abcdefghijkl", torch.ones(12).unbind())), torch.ones(())

    def log():
        HostCopy(guard.over_ranks(terms) | {"std_z": std_z})

    assert 3 <= launches_of(log).total <= 6


def test_views_and_allocations_are_no_launches_and_lists_count_by_their_limits():
    x, many, scalars = torch.ones(4, 4), [torch.ones(2) for _ in range(65)], [torch.ones(()) for _ in range(65)]
    with Launches() as counted:
        torch.empty_like(x.t()[0].view(2, 2).detach())
        torch.stack([x[0]] * 129)
        torch._foreach_mul_(many, many)
        torch._foreach_mul_(many, scalars)  # a kernel each
    assert counted.by_call == Counter({"stack": 2, "_foreach_mul_": 2 + 65})
    assert of_lists([[torch.empty(65536 * 321, device="meta")]]) == 2


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_zeros_where_a_step_is_skipped_and_the_same_bits_elsewhere(flag, dtype):
    values = torch.tensor([1.5, -0.0, float("nan"), float("inf"), -float("inf"), 1e-7], dtype=dtype)
    given = [values.clone(), values.reshape(2, 3).t(), values[2].clone()]
    before = [x.clone() for x in given]
    zero_where(torch.tensor(flag), given)
    for x, old in zip(given, before):
        expected = torch.zeros_like(old) if flag else old
        assert x.flatten().view(torch.uint8).tolist() == expected.flatten().view(torch.uint8).tolist()


def test_rows_have_the_layout_of_their_tensors_and_a_factor_each():
    like = [torch.randn(3, 5), torch.randn(2, 3, 20, 20).to(memory_format=torch.channels_last), torch.randn(()),
            torch.randn(1024), torch.empty(0), torch.randn(7, 300).t()]  # fmt: skip
    rows = Rows(like)
    for part, x in zip(rows.parts, like, strict=True):
        assert part.shape == x.shape and part.stride() == x.stride()
        assert part.storage_offset() % 1024 == 0
    torch._foreach_copy_(rows.parts, like)
    factors = torch.rand(len(like))
    rows.multiply(factors)
    for part, x, factor in zip(rows.parts, like, factors):
        assert torch.equal(part, x * factor)


class OneByOneLARS(LARS):
    """The arithmetic of `step_group` with one operation after the other for every tensor."""

    def step_group(self, group, params, grads, skip):
        if skip is not None:
            grads = [torch.where(skip, 0.0, g) for g in grads]
        m, lr = (torch.tensor(group[key]) for key in ("momentum", "lr"))
        if skip is not None:
            m, lr = torch.where(skip, 1.0, m), torch.where(skip, 0.0, lr)
        for p, g in zip(params, grads):
            if group["weight_decay"]:
                p_norm, g_norm = p.norm(), g.norm()
                scaled = (p_norm > 0) & (g_norm > 0)
                denominator = g_norm + group["weight_decay"] * p_norm + group["eps"]
                trust = torch.where(scaled, group["trust_coefficient"] * p_norm / denominator, 1.0)
                g = g + p * torch.where(scaled, group["weight_decay"], 0.0)
                g = g * trust if group.get("adapt", True) else g
            buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            buffer.mul_(m).add_(g)
            p.sub_((g + buffer * m if group["nesterov"] else buffer) * lr)


class OneByOneLAMB(LAMB):
    """The same for LAMB."""

    def step_group(self, group, params, grads, skip):
        beta1, beta2 = group["betas"]
        never = torch.tensor(False) if skip is None else skip
        for p, g in zip(params, grads):
            g = torch.where(never, 0.0, g)
            if not self.state[p]:
                zeros = torch.zeros_like(p)
                self.state[p] = {"step": torch.zeros(()), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
            state = self.state[p]
            mean, square = state["exp_avg"], state["exp_avg_sq"]
            state["step"] += torch.where(never, 0.0, 1.0)
            mean.mul_(torch.where(never, 1.0, beta1) if skip is not None else beta1).add_(g, alpha=1 - beta1)
            square.mul_(torch.where(never, 1.0, beta2) if skip is not None else beta2)
            square.addcmul_(g, g, value=1 - beta2)
            update = (mean / (square.sqrt() + group["eps"])).add_(p, alpha=group["weight_decay"])
            rate = torch.full((), group["lr"])
            if self.debias:
                count = state["step"].double()
                rate = rate * (1 - beta2**count).sqrt() / (1 - beta1**count)
            if group.get("adapt", True) and not self.adam:
                p_norm, u_norm = p.norm().clamp(max=self.clamp_value), update.norm()
                rate = rate * torch.where((p_norm == 0) | (u_norm == 0), 1.0, p_norm / u_norm)
            p.sub_(update * torch.where(never, 0.0, rate).to(p.dtype))


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize(
    "kind, reference, options",
    [
        (LARS, OneByOneLARS, {"momentum": 0.9, "trust_coefficient": 0.02}),
        (LARS, OneByOneLARS, {"momentum": 0.9, "nesterov": True}),
        (LAMB, OneByOneLAMB, {}),
        (LAMB, OneByOneLAMB, {"debias": True}),
    ],
)
def test_lars_and_lamb_have_the_bits_of_one_operation_after_the_other(kind, reference, options, decay, guarded):
    """Steps with a gradient of zeros, a tensor of zeros, and skipped steps, the first among them."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 5), (4, 3, 5, 5), (7,), (), (40, 60), (3, 4)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    start[1], start[-1] = start[1].to(memory_format=torch.channels_last), torch.zeros(3, 4)
    ours, theirs = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    optimizers = []
    for of_kind, params in ((kind, ours), (reference, theirs)):
        groups = [{"params": params[:4], "weight_decay": decay}, {"params": params[4:], "adapt": False}]
        optimizers.append(of_kind(groups, lr=0.02, weight_decay=0.01, **options))
    for step in range(12):
        grads = [torch.randn(shape, generator=generator) for shape in shapes]
        skipped = guarded and step in (0, 5)
        if step % 3 == 1:
            grads[0].zero_()
        if skipped:
            grads[1].fill_(float("nan"))
        for params, optimizer in zip((ours, theirs), optimizers):
            for p, g in zip(params, grads):
                p.grad = copy.deepcopy(g)
            if guarded:
                optimizer.found_inf = torch.tensor(float(skipped))
            optimizer.step()
        for p, q in zip(ours, theirs):
            assert torch.equal(p, q), step
            for a, b in zip(optimizers[0].state[p].values(), optimizers[1].state[q].values(), strict=True):
                assert torch.equal(a, b), step

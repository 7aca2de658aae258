"""FiniteGuard: what it launches, and that it leaves the same bits as one operation per buffer."""

import copy
from types import SimpleNamespace

import pytest
import torch
from launches import launches_of
from torch import nn

from fastssl.models import SSLModel
from fastssl.recipe import load_recipe
from fastssl.training.guard import FiniteGuard, Statistics

NAMES = ("loss", "on_diagonal", "sigma_max_z", "grad_norm")


class NoStep:
    """Takes the place of a fused optimizer, whose launches are not the guard's."""

    defaults = {"fused": True}

    def step(self):
        pass


def guard_of(model, precision="fp32"):
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
    if precision == "fp16":
        scaler.scale(torch.ones(()))  # makes its scale
        scaler.update = lambda: None  # needs gradients
    return FiniteGuard(
        model, SimpleNamespace(optimizer=NoStep(), scaler=scaler, step=0, skipped=torch.tensor(0, dtype=torch.int64))
    )


def terms_of(*values):
    return dict(zip(NAMES, torch.tensor(values).unbind()))


@pytest.mark.parametrize("precision, limit", [("fp32", 15), ("fp16", 19)])
@pytest.mark.parametrize("recipe", ["zprob_barlow", "beyond/resnet50_zprob_barlow"])
def test_a_step_launches_few_kernels(recipe, precision, limit):
    """With all buffers of encoder, projector and heads: 66 of a ResNet-18, 165 of a ResNet-50."""
    model = SSLModel(load_recipe(f"recipes/{recipe}.yaml"))
    guard = guard_of(model, precision)

    def step():
        guard.remember()
        guard.step(terms_of(1.0, 2.0, 5.0, 0.5))

    step()  # allocates
    launched = launches_of(step)
    more = 6 * (len(list(model.buffers())) > 128)  # what does not fit into the lists of one launch
    assert 10 <= launched.total <= limit + more, launched.by_call


def buffers_of_all_kinds():
    torch.manual_seed(0)
    return [
        torch.randn(7),
        torch.tensor(3),  # num_batches_tracked
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(5, 3).t(),
        torch.tensor([True, False, True]),
        torch.randn(3).double(),
        torch.randn(5).half(),
        torch.arange(6).expand(1, -1),
        torch.randn(9)[2:6],
        torch.empty(0),
    ]


@pytest.mark.parametrize("bad", [False, True])
def test_buffers_of_any_kind_are_restored_bit_for_bit(bad):
    buffers = buffers_of_all_kinds()
    before = [buffer.clone() for buffer in buffers]
    statistics = Statistics(buffers)
    statistics.save()
    for buffer in buffers:
        buffer.fill_(float("nan") if buffer.is_floating_point() else 0)
    after = [buffer.clone() for buffer in buffers]
    statistics.restore(where=torch.tensor(bad))
    for buffer, expected in zip(buffers, before if bad else after):
        assert torch.equal(buffer.nan_to_num(7.0), expected.nan_to_num(7.0)) and buffer.shape == expected.shape


def test_a_model_without_buffers_has_nothing_to_restore():
    guard = guard_of(nn.Linear(2, 2))
    guard.remember()
    assert not guard.step(terms_of(1.0, 2.0, 3.0, 4.0))


NOT_FINITE = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_the_first_step_that_is_not_finite_is_kept_with_its_terms(name, value, tmp_path):
    model = nn.BatchNorm1d(3)
    guard = guard_of(model)
    state = guard.state
    good, large = terms_of(1.0, 2.0, float("inf"), 0.5), terms_of(3e38, 2.0, 1.0, 3e38)
    for step, terms in enumerate((good, large, {**good, name: torch.tensor(value)}, good)):
        state.step = step
        before = copy.deepcopy(model.state_dict())
        guard.remember()
        model(torch.randn(4, 3))
        skipped = guard.step(terms)
        assert bool(skipped) == (step == 2) == bool(state.optimizer.found_inf)
        same = all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
        assert same == (step == 2)
    assert state.skipped == 1 and guard.first_bad_step == 2
    message = str(guard.error(tmp_path))
    assert message.startswith("Step 2 was not finite (loss=") and f"{name}={value:.4g}" in message


@pytest.mark.parametrize("scale, counted", [(1.0, 1), (2.0, 0)])
def test_an_overflow_of_fp16_counts_at_scale_one_only(scale, counted):
    guard = guard_of(nn.BatchNorm1d(3), "fp16")
    guard.state.scaler._scale.fill_(scale)
    assert guard.step(terms_of(1.0, 2.0, 3.0, float("inf")))
    assert guard.state.skipped == counted
    assert guard.step(terms_of(float("nan"), 2.0, 3.0, 1.0))
    assert guard.state.skipped == counted + 1

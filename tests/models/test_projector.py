"""The projector, and S draws in one pass against the loop over draws."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl.models import Projector, project_draws

# float64, the same sums per channel in another order.
CLOSE = dict(rtol=1e-11, atol=1e-12)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def projector(**batch_norm):
    """Three layers with batch norms whose affine and running values are nowhere trivial."""
    made = Projector(6, 8, 5, layers=3)
    for i, layer in enumerate(made):
        if isinstance(layer, nn.BatchNorm1d):
            made[i] = norm = nn.BatchNorm1d(8, **{"eps": 1e-3, **batch_norm})
            for values in (norm.weight, norm.bias, norm.running_mean):
                if values is not None:
                    nn.init.normal_(values)
            if norm.running_var is not None:
                nn.init.uniform_(norm.running_var, 0.5, 2)
    return made.double()


def both_ways(made, h_SBD):
    """Outputs, gradients and buffers of the batched form and of the loop."""
    results = []
    for run in (project_draws, lambda p, h: torch.stack([p(draw) for draw in h])):
        p, h = copy.deepcopy(made), h_SBD.clone().requires_grad_()
        z = run(p, h)
        weights = torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view(z.shape)
        (z * weights).sum().backward()
        gradients = {name: value.grad for name, value in p.named_parameters()}
        results.append((z, h.grad, gradients, dict(p.named_buffers())))
    return results


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_layers(layers):
    made = Projector(6, 8, 5, layers)
    block = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert [type(m) for m in made] == block * (layers - 1) + [nn.Linear]
    assert all(m.bias is None for m in made if isinstance(m, nn.Linear))
    assert made(torch.randn(4, 6)).shape == (4, 5)
    with pytest.raises(ValueError, match="at least 1 layer"):
        Projector(6, 8, 5, 0)


@pytest.mark.parametrize("S", [1, 4])
@pytest.mark.parametrize(
    "batch_norm",
    [{}, {"momentum": 0.3}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}],
    ids=str,
)
def test_draws_equal_the_loop(batch_norm, S):
    made = projector(**batch_norm)
    h = torch.randn(S, 7, 6).double() * torch.arange(1, S + 1)[:, None, None]
    if batch_norm.get("momentum", 0.1) is None:
        made(3 * h[0])  # a cumulative average that has seen a batch before
    batched, loop = both_ways(made, h)
    torch.testing.assert_close(batched, loop, **CLOSE)
    if "track_running_stats" not in batch_norm:
        before = dict(made.named_buffers())
        assert not torch.allclose(batched[3]["1.running_var"], before["1.running_var"])
        assert batched[3]["1.num_batches_tracked"] == before["1.num_batches_tracked"] + S


def test_draws_do_not_share_statistics():
    h = torch.randn(3, 7, 6).double() * torch.tensor([1, 10, 100]).view(3, 1, 1)
    made = projector()
    pooled = made(h.flatten(0, 1)).view(3, 7, 5)
    assert (project_draws(made, h) - pooled).abs().max() > 0.1


def test_eval_mode_uses_running_statistics_and_does_not_change_them():
    made = projector().eval()
    before = copy.deepcopy(made.state_dict())
    batched, loop = both_ways(made, torch.randn(4, 7, 6).double())
    torch.testing.assert_close(batched, loop, **CLOSE)
    project_draws(made, torch.randn(4, 7, 6).double())
    torch.testing.assert_close(made.state_dict(), before, rtol=0, atol=0)


def test_one_frozen_batch_norm():
    made = projector()
    made[1].eval()
    batched, loop = both_ways(made, torch.randn(4, 7, 6).double())
    torch.testing.assert_close(batched, loop, **CLOSE)


def test_autocast_gives_the_dtypes_of_the_loop():
    made = projector().float()
    h = torch.randn(4, 32, 6)
    with torch.autocast("cpu", torch.bfloat16):
        (z, *_, buffers), (want, *_, want_buffers) = both_ways(made, h)
    assert z.dtype == want.dtype == torch.bfloat16
    # bf16 keeps 8 bits (4e-3); three layers of numbers up to 5.
    torch.testing.assert_close(z, want, rtol=2e-2, atol=4e-2)
    assert buffers["1.running_mean"].dtype == torch.float32
    torch.testing.assert_close(buffers, want_buffers, rtol=1e-2, atol=1e-2)


class CountProducts(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


def test_twelve_draws_need_as_many_products_as_two():
    counts = []
    for S in (2, 12):
        with CountProducts() as products:
            project_draws(projector(), torch.randn(S, 7, 6).double())
        counts.append(products.count)
    assert counts == [3, 3]


def test_compiles_whole():
    made, h = projector(), torch.randn(3, 7, 6).double()
    plain = copy.deepcopy(made)
    compiled = torch.compile(project_draws, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(made, h), project_draws(plain, h), **CLOSE)
    torch.testing.assert_close(made.state_dict(), plain.state_dict(), **CLOSE)


def test_refusals():
    sync = nn.Sequential(nn.Linear(6, 8), nn.SyncBatchNorm(8))
    with pytest.raises(TypeError, match="SyncBatchNorm"):
        project_draws(sync, torch.randn(2, 7, 6))
    with pytest.raises(ValueError, match="more than 1 value per channel"):  # torch's own
        project_draws(projector(), torch.randn(2, 1, 6).double())

"""Two and four processes against one: losses, batch norm, and whole training steps, with all gradients."""

import copy
import itertools
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from small_models import recipe_of
from torch.nn.parallel import DistributedDataParallel

from fastssl.common import distributed
from fastssl.common.distributed import (
    all_gather_values,
    any_rank,
    any_rank_each,
    broadcast_from_main,
    gather_rows,
    sum_over_ranks,
)
from fastssl.common.errors import UserError
from fastssl.models import GlobalBatchNorm, ModelInput, SSLModel, build_model, convert_batch_norms, sync_bn
from fastssl.objectives import (
    TotalLoss,
    barlow_twins_loss,
    byol_loss,
    cross_entropy_loss,
    sigreg_loss,
    simclr_loss,
    vicreg_loss,
    visreg_loss,
)
from fastssl.training.guard import FiniteGuard
from fastssl.training.optim import make_optimizer
from fastssl.training.state import TrainState

# float64 on both sides, sums in another order; the gradients of a whole network collect more roundings.
CLOSE = dict(rtol=1e-11, atol=1e-12)
CLOSE_WEIGHTS = dict(rtol=1e-7, atol=1e-9)
BATCH = 12


def spawn(check, world, tmp_path, *arguments):
    torch.multiprocessing.start_processes(
        join_group, (world, str(tmp_path / "rendezvous"), check, *arguments), nprocs=world, start_method="forkserver"
    )


def join_group(rank, world, address, check, *arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=world)
    check(rank, world, *arguments)
    dist.destroy_process_group()


def views(*shape):
    """(2, ...) correlated views with unequal means and scales, so that every convention matters."""
    first, noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.stack((2 * first + 1, first + 0.5 * noise - 2))


def byol_against_fixed_targets(z1, z2, gather=None):
    return byol_loss(z1, z2, z2.detach().mean(0).cos(), z1.detach().mean(0).sin(), gather=gather)


def cross_entropy_of_fixed_labels(z1, z2, gather=None):
    return cross_entropy_loss(z1, z2.detach().mean(0).argmax(-1), gather=gather)


LOSSES = [
    (barlow_twins_loss, {}),
    (barlow_twins_loss, {"unbiased": True, "eps": 0.0}),
    (vicreg_loss, {}),
    (vicreg_loss, {"center": True}),
    (simclr_loss, {}),
    (simclr_loss, {"over_draws": "log_mean_exp"}),
    (sigreg_loss, {"slices": 30, "step": 5}),
    (visreg_loss, {"slices": 30, "step": 5}),  # 30 directions do not divide by four processes
    (byol_against_fixed_targets, {}),
    (cross_entropy_of_fixed_labels, {}),
]


def without_gradient_sums(rank, world, check):
    """Run a check with collectives that sum in the forward pass only: test_mutations expects it to fail."""
    distributed._AllReduceSum.backward = staticmethod(lambda ctx, grad: grad)
    healthy = sync_bn._BatchNormOverRanks.backward

    def backward(*arguments):
        with mock.patch.object(dist, "all_reduce"):
            return healthy(*arguments)

    sync_bn._BatchNormOverRanks.backward = staticmethod(backward)
    check(rank, world)


def check_losses(rank, world):
    whole_views = views(3, BATCH, 3)
    mine = whole_views.chunk(world, dim=2)[rank]

    def network(width):
        torch.manual_seed(1)
        return torch.nn.Linear(3, width, dtype=torch.float64)

    def embed(network, views):
        """(2, S, B, D) -> one (S, B, D) a view, in a layout that makes the gradients non-contiguous."""
        return network(views).transpose(1, 2).contiguous().transpose(1, 2)

    # Few dimensions for the samples and many: products of D x D or of B x B.
    for (loss, options), width in itertools.product(LOSSES, (4, 3 * BATCH)):
        whole = network(width)
        whole_loss = loss(*embed(whole, whole_views), gather=False, **options)
        whole_loss.backward()

        parallel = DistributedDataParallel(network(width))
        global_loss = loss(*embed(parallel, mine), **options)
        global_loss.backward()
        torch.testing.assert_close(global_loss, whole_loss, **CLOSE)
        torch.testing.assert_close(parallel.module.weight.grad, whole.weight.grad, **CLOSE)
        torch.testing.assert_close(parallel.module.bias.grad, whole.bias.grad, **CLOSE)

        explicit = loss(*embed(whole, mine), gather=True, **options)
        torch.testing.assert_close(explicit, whole_loss, **CLOSE)
        local = loss(*embed(whole, mine), gather=False, **options)
        assert abs(local.item() - whole_loss.item()) > 1e-3


def check_collectives(rank, world):
    # A transposed layout on one rank only: gloo adds memory to memory and ignores strides.
    x = views(4, 3)[0].requires_grad_()
    laid_out = x if rank == 0 else x.T.contiguous().T
    weights = (rank + 1) * torch.arange(12, dtype=torch.float64).view(4, 3)
    total = sum_over_ranks(laid_out, None)
    (total * (weights if rank == 0 else weights.T.contiguous().T)).sum().backward()
    torch.testing.assert_close(total, world * x, **CLOSE)
    torch.testing.assert_close(x.grad, sum_over_ranks(weights, None), **CLOSE)

    x.grad = None
    rows = gather_rows((x * (rank + 1)).T.contiguous().T, None)
    torch.testing.assert_close(rows, torch.cat([x * (r + 1) for r in range(world)]), **CLOSE)
    (rows.T * (rank + 1)).sum().backward()  # a gradient that is not contiguous
    everyone = sum(r + 1 for r in range(world))
    torch.testing.assert_close(x.grad, torch.full_like(x, everyone * (rank + 1)), **CLOSE)

    # One sample a rank still makes a global batch; unequal batches are refused by every rank, so that none waits.
    one_each = views(world, 5)[:, rank : rank + 1]
    whole = barlow_twins_loss(*views(world, 5), gather=False)
    torch.testing.assert_close(barlow_twins_loss(*one_each), whole, **CLOSE)
    with pytest.raises(ValueError, match="at least 2 samples"):
        barlow_twins_loss(*one_each, gather=False)
    unequal = views(3, 9, 5)[:, :, : 4 if rank else 5]
    by_sample = byol_against_fixed_targets, cross_entropy_of_fixed_labels
    for loss in (barlow_twins_loss, vicreg_loss, simclr_loss, sigreg_loss, visreg_loss, *by_sample):
        with pytest.raises(ValueError, match="batches of one size"):
            loss(*unequal)


def check_batch_norm(rank, world):
    for shape in ((BATCH, 5), (BATCH, 5, 3, 2)):
        dims = len(shape) - 2
        plain = {0: torch.nn.BatchNorm1d, 2: torch.nn.BatchNorm2d}[dims](5, eps=1e-3, momentum=0.3).double()
        torch.nn.init.normal_(plain.weight, generator=torch.Generator().manual_seed(1))
        synced = DistributedDataParallel(GlobalBatchNorm(copy.deepcopy(plain)))
        whole_x, weights = views(*shape)
        my_x, my_weights = (t.chunk(world)[rank].clone() for t in (whole_x, weights))
        whole_x, my_x = whole_x.clone().requires_grad_(), my_x.requires_grad_()
        y = plain(whole_x)
        (y * weights).sum().backward()
        mine = synced(my_x)
        (mine * my_weights).sum().backward()  # ranks hold parts of one sum, not copies of a global loss
        torch.testing.assert_close(mine, y.chunk(world)[rank], **CLOSE)
        torch.testing.assert_close(my_x.grad, whole_x.grad.chunk(world)[rank], rtol=1e-9, atol=1e-10)
        for name, parameter in plain.named_parameters():
            ours = dict(synced.module.named_parameters())[name].grad * world  # DDP averages
            torch.testing.assert_close(ours, parameter.grad, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(synced.module.state_dict(), plain.state_dict(), **CLOSE)


MODELS = [
    ({"name": "barlow_twins"}, {"stochastic": "none"}),
    ({"name": "barlow_twins"}, {"stochastic": "h"}),
    ({"name": "vicreg"}, {"stochastic": "z", "prior": "mixture"}),
    ({"name": "vicreg"}, {"stochastic": "hz", "chunk": 2}),
    ({"name": "simclr"}, {"stochastic": "z", "prior": "vamp"}),
    ({"name": "byol", "predictor_hidden": 16}, {"stochastic": "h"}),
    ({"name": "sigreg", "slices": 30}, {"stochastic": "h", "chunk": 2}),
    ({"name": "visreg", "slices": 30}, {"stochastic": "z"}),
    ({"name": "supervised", "classes": 5}, {"stochastic": "h", "prior": "mixture"}),
]


class Loss(torch.nn.Module):
    def __init__(self, recipe):
        super().__init__()
        torch.manual_seed(0)
        self.model, self.total_loss = build_model(recipe).double(), TotalLoss(recipe)

    def forward(self, inputs):
        return self.total_loss(self.model(inputs), self.model.priors, inputs.step)


def train_steps(module, inputs, steps=3):
    core = getattr(module, "module", module)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.05)
    values = []
    for step in range(steps):
        terms = module(inputs._replace(step=torch.tensor(step)))
        terms["loss"].backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        if core.model.target is not None:
            core.model.update_target(0.9, skip=torch.tensor(False))
        values.append({name: value.item() for name, value in terms.items() if not name.startswith("sigma")})
    return values


def check_training(rank, world):
    """Encoder, heads, projector, objective and KL: a run of several processes is the run of one."""
    v1, v2 = views(BATCH, 3, 32, 32)
    index = torch.arange(100, 100 + BATCH)
    for objective, embedding in MODELS:
        both = (v1,) if objective["name"] == "supervised" else (v1, v2)
        # The whole batch in this process alone, although several processes run.
        whole, mine = Loss(recipe_of(objective | {"gather": False}, embedding)), Loss(recipe_of(objective, embedding))
        convert_batch_norms(mine)
        parallel = DistributedDataParallel(mine)
        want = train_steps(whole, ModelInput(both, index % 5, index, torch.tensor(0)))
        my_views = tuple(v.chunk(world)[rank] for v in both)
        my_label, my_index = (index % 5).chunk(world)[rank], index.chunk(world)[rank]
        got = train_steps(parallel, ModelInput(my_views, my_label, my_index, torch.tensor(0)))
        for of_whole, of_rank in zip(want, got, strict=True):
            assert of_rank == pytest.approx(of_whole, rel=1e-7), (objective, embedding)
        torch.testing.assert_close(mine.state_dict(), whole.state_dict(), **CLOSE_WEIGHTS)


def check_guard(rank, world):
    """A local loss that is infinite in the last process only: all processes skip the step and count it once."""
    recipe = recipe_of({"name": "barlow_twins", "gather": False}, {"stochastic": "none"})
    model = SSLModel(recipe).double()
    optimizer = make_optimizer(model, recipe.optim)
    scaler, loader = torch.amp.GradScaler(enabled=False), None
    state = TrainState(recipe, model, optimizer, scaler, loader, "fp32", skipped=torch.zeros((), dtype=torch.int64))
    guard, before = FiniteGuard(model, state), copy.deepcopy(model.state_dict())
    for bad_rank in (world - 1, None):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        loss = torch.tensor(float("inf") if rank == bad_rank else 2.0 + rank)
        terms = {"loss": loss, "sigma_min": torch.tensor(1.0 + rank), "grad_norm": torch.tensor(1.0)}
        left_out = guard.step(terms)
        same = all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        assert bool(left_out) == same == (bad_rank is not None)
    metrics = {name: value.item() for name, value in guard.over_ranks(terms).items()}
    assert metrics == {"loss": 2 + (world - 1) / 2, "sigma_min": 1.0, "grad_norm": 1.0, "skipped_steps": 1}


def check_host_values(rank, world):
    """A UserError of the main process, such as a run directory that is taken, is raised on every rank."""
    assert broadcast_from_main(lambda: f"of rank {rank}") == "of rank 0"
    with pytest.raises(UserError, match="taken"):
        broadcast_from_main(refuse)
    assert any_rank(rank == world - 1) and not any_rank(False)
    assert any_rank_each([False, rank == 0, rank == 1]) == [False, True, True]
    assert all_gather_values(torch.tensor([rank, 7])).tolist() == [[r, 7] for r in range(world)]


def refuse():
    raise UserError("taken")


CHECKS = [check_host_values, check_guard, check_losses, check_collectives, check_batch_norm, check_training]


@pytest.mark.parametrize("world", [2, 4])
def test_processes_equal_one(tmp_path, world):
    spawn(check_all, world, tmp_path)


def check_all(rank, world):
    for check in CHECKS:
        check(rank, world)

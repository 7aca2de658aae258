"""Whole models with extreme numbers: half precisions, both limits of sigma, collapse, tiny batches."""

from types import SimpleNamespace

import pytest
import torch
from no_host import NoHost
from small_models import recipe_of

from fastssl.models import ModelInput, SSLModel
from fastssl.objectives import TotalLoss
from fastssl.training.guard import FiniteGuard
from fastssl.training.optim import clip_gradients, make_optimizer

BYOL = {"name": "byol", "predictor_hidden": 16}
OBJECTIVES = [
    {"name": "barlow_twins"},
    {"name": "vicreg"},
    {"name": "simclr"},
    BYOL,
    {"name": "sigreg"},
    {"name": "visreg"},
]
EMBEDDINGS = [
    {"stochastic": "none"},
    {"stochastic": "z"},
    {"stochastic": "h", "prior": "mixture"},
    {"stochastic": "hz", "prior": "vamp"},
]
COMBINATIONS = pytest.mark.parametrize(
    "objective, embedding",
    [pytest.param(o, e, id=f"{o['name']}-{e['stochastic']}") for o in OBJECTIVES for e in EMBEDDINGS],
)


def step(recipe, model, batch=8, images=None, dtype=None, scale=1.0):
    """The terms, after a backward pass; under autocast where a dtype is given."""
    if images is None:
        images = torch.randn(2, batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    inputs = ModelInput(tuple(images), torch.full((batch,), -1), torch.arange(batch), torch.tensor(0))
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        # The loss too: under autocast it must give the same.
        terms = TotalLoss(recipe)(model(inputs), model.priors, inputs.step)
    (scale * terms["loss"]).backward()
    return terms


def build(objective, embedding):
    torch.manual_seed(0)
    recipe = recipe_of(objective, embedding)
    return recipe, SSLModel(recipe)


def assert_finite(terms, model):
    assert all(value.isfinite() for value in terms.values()), terms
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients)


@COMBINATIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_fp32_losses_and_finite_gradients(objective, embedding, dtype):
    """fp16 with a loss scale of 1,024, well below GradScaler's start of 65,536, which may overflow by design."""
    recipe, model = build(objective, embedding)
    terms = step(recipe, model, dtype=dtype, scale=1024.0 if dtype == torch.float16 else 1.0)
    assert {value.dtype for value in terms.values()} == {torch.float32}
    assert_finite(terms, model)
    exact = step(*build(objective, embedding))
    # Half precisions round the features (bf16 to 4e-3); were the loss in half precision too, Barlow Twins' sums over
    # D^2 would be off by more.
    assert terms["loss"].item() == pytest.approx(exact["loss"].item(), rel=0.1)


@pytest.mark.parametrize("raw", [-99.0, 99.0])
@COMBINATIONS
def test_gradients_are_finite_if_every_sigma_is_at_a_limit(objective, embedding, raw):
    recipe, model = build(objective, embedding)
    for head in model.heads.values():
        torch.nn.init.constant_(head.log_var.bias, raw)
    terms = step(recipe, model)
    assert_finite(terms, model)
    for space in model.heads:
        assert terms[f"sigma_clamped_{space}"] == 1


@COMBINATIONS
def test_gradients_are_finite_when_all_features_collapse(objective, embedding):
    """The same black image everywhere, through an encoder whose last block is zero: no variance at all."""
    recipe, model = build(objective, embedding)
    black = torch.zeros(2, 8, 3, 32, 32)
    assert_finite(step(recipe, model, images=black), model)
    recipe, model = build(objective, embedding)
    with torch.no_grad():
        for p in model.projector.parameters():
            p.zero_()
    assert_finite(step(recipe, model), model)


@COMBINATIONS
def test_batch_of_two_works_and_batch_of_one_is_refused(objective, embedding):
    recipe, model = build(objective, embedding)
    assert_finite(step(recipe, model, batch=2), model)
    with pytest.raises(ValueError, match="at least 2 samples|more than 1 value per channel"):
        step(recipe, model, batch=1)


def training_step(objective, embedding, device):
    """A function that takes one whole training step: loss, gradients, clipping, optimizer, BYOL's target."""
    recipe, model = build(objective, {**embedding, "chunk": 2})
    model, total_loss = model.to(device), TotalLoss(recipe, beta_warmup_steps=10)
    state = SimpleNamespace(
        model=model, optimizer=make_optimizer(model, recipe.optim), step=0,
        scaler=torch.amp.GradScaler(device, enabled=False), skipped=torch.zeros((), dtype=torch.int64, device=device),
    )  # fmt: skip
    guard = FiniteGuard(model, state)
    views = tuple(torch.randn(2, 8, 3, 32, 32, device=device))
    index, step = torch.arange(8, device=device), torch.zeros((), dtype=torch.int64, device=device)
    inputs = ModelInput(views, torch.full_like(index, -1), index, step)

    def take_step():
        guard.remember()
        terms = total_loss(model(inputs), model.priors, step)
        terms["loss"].backward()
        terms["grad_norm"] = clip_gradients(model, state.optimizer, state.scaler, 0.5)
        skipped = guard.step(terms)
        state.optimizer.zero_grad()
        if model.target is not None:
            model.update_target(0.9, skip=skipped)
        return skipped

    return take_step


@COMBINATIONS
def test_step_reads_no_tensor_value(objective, embedding):
    take_step = training_step(objective, embedding, "cpu")
    take_step()  # creates the optimizer's state
    with NoHost():
        skipped = take_step()
    assert not skipped


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@COMBINATIONS
def test_step_never_waits_for_the_gpu(objective, embedding):
    take_step = training_step(objective, embedding, "cuda")
    take_step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        skipped = take_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not skipped

"""Optimizers: ours against torch-optimizer's, skipped steps, names and options, exclusions, the learning rate."""

import copy
import io
from types import SimpleNamespace

import pytest
import torch
import torch_optimizer
from no_host import NoHost
from torch import nn

from fastssl.common.errors import UserError
from fastssl.models import SSLModel
from fastssl.recipe import OptimConfig, load_recipe
from fastssl.training.guard import FiniteGuard
from fastssl.training.optim import (
    LAMB,
    LARS,
    make_optimizer,
    optimizer_class,
    skips_on_device,
    split_parameters,
)
from fastssl.training.schedule import Schedule

PAIRS = [
    pytest.param(LARS, torch_optimizer.LARS, options, id=f"lars-{number}")
    for number, options in enumerate(
        [
            dict(momentum=0.9, trust_coefficient=0.02),
            dict(momentum=0.9, trust_coefficient=0.02, nesterov=True),
            dict(momentum=0.0, eps=1e-3),
        ]
    )
] + [
    pytest.param(LAMB, torch_optimizer.Lamb, options, id=f"lamb-{number}")
    for number, options in enumerate(
        [
            dict(),
            dict(debias=True),
            dict(clamp_value=0.5, betas=(0.5, 0.9)),
            dict(adam=True, debias=True, eps=1e-3),
            dict(clamp_value=0.0),
        ]
    )
]
ON_DEVICE = ["adamw", "adam", "sgd", "adagrad", "lars", "lamb"]
ON_HOST = [
    "radam", "nadam", "adamax", "rmsprop", "adafactor", "adadelta", "asgd",
    "accsgd", "adabelief", "adabound", "adamod", "adamp", "aggmo", "diffgrad", "madgrad", "novograd", "pid",
    "qhadam", "qhm", "ranger", "rangerqh", "rangerva", "sgdp", "sgdw", "shampoo", "swats", "yogi",
]  # fmt: skip
# Adam and similar ones move a weight by about the learning rate for any gradient; these move it in proportion to it.
RATES = {"sgd": 0.1, "lars": 0.1, "adadelta": 10.0, "pid": 0.1, "qhm": 0.1}


def weights(seed=0):
    """Tensors of several shapes; the last is zero, where neither optimizer adapts."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(6, 5), (4, 3, 2, 2), (7,), (), (3, 4)]
    *tensors, last = (torch.randn(shape, generator=generator) for shape in shapes)
    return [nn.Parameter(t) for t in (*tensors, torch.zeros_like(last))]


def groups_of(params, weight_decay):
    return [{"params": params[:2], "weight_decay": 0.0}, {"params": params[2:], "weight_decay": weight_decay}]


def set_gradients(params, seed):
    """A quadratic's gradient with noise; that of the second tensor is zero in every third step."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = 0.1 * p.detach() + torch.randn(p.shape, generator=generator)
    if seed % 3 == 0:
        params[1].grad.zero_()


def assert_same(ours, theirs):
    """Norms sum in another order, a rounding or two a step (6e-8): over 40 steps of 1% less than 1e-6."""
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("kind, reference, options", PAIRS)
def test_lars_and_lamb_equal_torch_optimizer(kind, reference, options, weight_decay):
    """A group without the key `adapt`, through a state_dict half way, at a rate that changes."""
    ours, theirs = weights(), weights()
    optimizer = kind(groups_of(ours, weight_decay), lr=0.01, **options)
    expected = reference(groups_of(theirs, weight_decay), lr=0.01, **options)
    for step in range(1, 41):
        for params, stepped in ((ours, optimizer), (theirs, expected)):
            set_gradients(params, seed=step)
            for group in stepped.param_groups:
                group["lr"] = 0.01 / step**0.5
            stepped.step()
        if step == 20:
            saved = optimizer.state_dict()
            optimizer = kind(groups_of(ours, weight_decay), lr=0.01, **options)
            optimizer.load_state_dict(saved)
    assert_same(ours, theirs)
    assert not any(torch.equal(a, b) for a, b in zip(ours, weights()))


@pytest.mark.parametrize("kind, reference, options", PAIRS)
def test_skipped_steps_equal_torch_optimizer_without_them(kind, reference, options):
    ours, theirs = weights(), weights()
    optimizer, expected = kind(groups_of(ours, 0.05), **options), reference(groups_of(theirs, 0.05), **options)
    for group in (*optimizer.param_groups, *expected.param_groups):
        group["lr"] = 0.01
    for step in range(1, 21):
        set_gradients(ours, seed=step)
        optimizer.found_inf = torch.tensor(float(step % 4 == 0))
        if step % 4 == 0:
            ours[0].grad.fill_(float("nan"))
        else:
            set_gradients(theirs, seed=step)
            expected.step()
        optimizer.step()
    assert_same(ours, theirs)


def training(name, lr=None, **keys):
    """A model with convolution, norm and biases, its optimizer, and a function that makes a loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 4))
    nn.init.normal_(model[1].weight)  # away from one, so that a decayed norm would show
    x, y = torch.randn(8, 3, 4, 4), torch.randn(8, 4)
    optimizer = make_optimizer(model, OptimConfig(name=name, lr=lr or RATES.get(name, 0.01), **keys))
    return model, optimizer, lambda: (model(x) - y).square().mean()


def step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def everything(model, optimizer):
    """All tensors and numbers of the model and of the optimizer's state, copied."""
    return copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"]])


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize("name", ON_DEVICE + ON_HOST)
def test_every_name_trains_and_resumes_exactly(name):
    model, optimizer, loss = training(name)
    assert skips_on_device(optimizer) == (name in ON_DEVICE)
    first = loss().item()
    for _ in range(3):
        step(optimizer, loss())
    assert loss().item() < first

    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    for _ in range(3):
        step(optimizer, loss())
    resumed, again, its_loss = training(name)
    file.seek(0)
    for part, saved in zip((resumed, again), torch.load(file, weights_only=True)):
        part.load_state_dict(saved)
    for _ in range(3):
        step(again, its_loss())
    assert equal(everything(model, optimizer), everything(resumed, again))


@pytest.mark.parametrize("name", ["adam", "radam", "sgd", "lars", "lamb", "adabelief"])
def test_a_quadratic_goes_down(name):
    """Adam's and LAMB's weights move by about the rate a step, here 2% of their size."""
    torch.manual_seed(0)
    model = nn.Linear(20, 1, bias=False)
    optimizer = make_optimizer(model, OptimConfig(name=name, lr=0.05 if name != "lars" else 50.0, weight_decay=1e-4))
    losses = [step(optimizer, model.weight.square().sum()) for _ in range(4)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("bad_step", [0, 1, 2])
@pytest.mark.parametrize("name", [*ON_DEVICE, "radam", "sgdw"])
def test_a_step_that_is_not_finite_changes_nothing(name, bad_step):
    """Through the guard, the first step too: weights, statistics and state stay, and later steps are as without it."""
    options = {"debias": True} if name == "lamb" else {}
    (model, optimizer, loss), (model_without, expected, loss_without) = (
        training(name, options=options) for _ in range(2)
    )
    state = SimpleNamespace(
        optimizer=optimizer, scaler=torch.amp.GradScaler("cpu", enabled=False), step=0, skipped=torch.tensor(0)
    )
    guard = FiniteGuard(model, state)
    for number in range(3):
        before = everything(model, optimizer)
        guard.remember()
        optimizer.zero_grad()
        term = loss() * (float("nan") if number == bad_step else 1)
        term.backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        guard.step({"loss": term.detach(), "grad_norm": norm})
        if number != bad_step:
            step(expected, loss_without())
        elif number > 0:
            assert equal(before, everything(model, optimizer))
    assert state.skipped == 1
    # Where the flag becomes a float32 factor, lr and momentum are rounded once: 6e-8 a step.
    for a, b in zip(model.state_dict().values(), model_without.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name, options", [("lars", {}), ("lars", {"nesterov": True}), ("lamb", {"debias": True})])
def test_lars_and_lamb_read_no_tensor_value(name, options):
    """Tensors without values (device meta) refuse what the mode does not see: reads inside a kernel."""
    model, optimizer, loss = training(name, options=options)
    loss().backward()
    for flag in (None, torch.tensor(1.0)):
        optimizer.found_inf = flag
        with NoHost():
            optimizer.step()

    model = model.to("meta")
    optimizer = make_optimizer(model, OptimConfig(name=name, options=options))
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    for flag in (None, torch.empty((), device="meta")):
        optimizer.found_inf = flag
        optimizer.step()


def test_no_host_detects_reads():
    params = weights()
    set_gradients(params, seed=1)
    with NoHost(), pytest.raises(AssertionError):
        torch_optimizer.Lamb(params).step()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_lars_and_lamb_never_wait_for_the_gpu(name):
    model, _, _ = training(name)
    model.cuda()
    optimizer = make_optimizer(model, OptimConfig(name=name, options={"debias": True} if name == "lamb" else {}))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.found_inf = torch.zeros((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_biases_and_norms_are_neither_decayed_nor_adapted(name):
    """The first step from gradients of size 1 to 2, far above every eps.

    LARS without adaptation is SGD. LAMB without it is Adam without debiasing, whose first update is the
    gradient's sign times 0.1 / sqrt(0.001); adapted, it moves a tensor by the rate times its norm.
    """
    lr = 0.01
    model, optimizer, loss = training(name, lr=lr, weight_decay=0.05)
    before = [p.detach().clone() for p in model.parameters()]
    loss().backward()
    for p in model.parameters():
        p.grad = p.grad.sign() * (1 + p.grad.abs().clamp(max=1))
    optimizer.step()
    for p, old in zip(model.parameters(), before):
        move = old - p.detach()
        if p.ndim == 1:  # biases, and the batch norm's weight; a decay of 0.05 would show in the second digit
            expected = lr * (p.grad if name == "lars" else p.grad.sign() * 0.1 / 0.001**0.5)
            torch.testing.assert_close(move, expected, rtol=1e-3, atol=0)
        else:  # 0.05 |w| compared with |g|: in LARS the decay turns the update a little
            expected = lr * old.norm() * (1e-3 if name == "lars" else 1)
            torch.testing.assert_close(move.norm(), expected, rtol=0.1 if name == "lars" else 1e-3, atol=0)


@pytest.mark.parametrize("kind", [LARS, LAMB])
def test_adapt_false_turns_off_adaptation_but_not_decay(kind):
    (ours, *_), (theirs, *_) = weights(), weights()
    optimizer = kind([{"params": [ours], "adapt": False}], lr=0.01, weight_decay=0.05)
    if kind is LAMB:
        expected = torch_optimizer.Lamb([theirs], lr=0.01, weight_decay=0.05, adam=True)
    else:
        expected = torch.optim.SGD([theirs], lr=0.01, weight_decay=0.05)
    ours.grad = theirs.grad = torch.ones_like(ours)
    optimizer.step()
    expected.step()
    assert_same([ours], [theirs])


def test_excluded_parameters_have_no_decay():
    recipe = load_recipe("recipes/zprob_barlow.yaml", ["embedding.prior=mixture", "model.projector.hidden=64"])
    model = SSLModel(recipe)
    names = {id(p): name for name, p in model.named_parameters()}
    decay, plain = ({names[id(p)] for p in part} for part in split_parameters(model, ("bias", "norm", "prior")))
    assert {"priors.z.means", "heads.z.mu.bias", "encoder.bn1.weight", "projector.1.weight"} <= plain
    assert {"encoder.conv1.weight", "projector.0.weight", "heads.z.mu.weight"} <= decay
    assert len(decay) + len(plain) == len(names)
    assert len(split_parameters(model, ())[1]) == 0
    for kind, some in (("norm", "encoder.bn1.weight"), ("bias", "heads.z.mu.bias"), ("prior", "priors.z.logits")):
        of_kind = {names[id(p)] for p in split_parameters(model, (kind,))[1]}
        assert some in of_kind and of_kind < plain
    model.encoder.requires_grad_(False)
    assert sum(map(len, split_parameters(model, ()))) < len(names) / 2

    for group in make_optimizer(model, OptimConfig(name="lamb", weight_decay=0.1)).param_groups:
        excluded = names[id(group["params"][0])] in plain
        assert group["weight_decay"] == (0 if excluded else 0.1) and group.get("adapt", True) == (not excluded)


@pytest.mark.parametrize("backbone", ["test_vit4", "test_convnext", "test_resnet"])
def test_norms_and_scales_of_any_backbone_are_excluded(backbone):
    """timm's norms are not all torch's, and layer scales are no norms at all."""
    recipe = load_recipe("recipes/barlow.yaml", [f"model.backbone={backbone}", "views.size=160"])
    decay, plain = split_parameters(SSLModel(recipe), ("bias", "norm", "prior"))
    assert all(p.ndim > 1 for p in decay) and all(p.ndim == 1 for p in plain)


def test_names_are_found_in_any_case_and_torch_comes_first():
    assert optimizer_class("radam") is torch.optim.RAdam and optimizer_class("adafactor") is torch.optim.Adafactor
    assert optimizer_class("adabelief") is torch_optimizer.AdaBelief
    assert (optimizer_class("lars"), optimizer_class("lamb")) == (LARS, LAMB)
    model = nn.Linear(2, 2)
    assert type(make_optimizer(model, OptimConfig(name="RMSprop"))) is torch.optim.RMSprop
    assert type(make_optimizer(model, OptimConfig())) is torch.optim.AdamW


def test_options_reach_the_optimizer(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\ndata: {train: x.beton}\noptim: {name: adamw, options: {betas: [0.8, 0.95]}}\n")
    recipe = load_recipe(path, ["optim.options.amsgrad=true", "optim.options.eps=1e-6"])
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml())
    assert load_recipe(again) == recipe

    def made(**keys):
        return make_optimizer(nn.Linear(2, 2), OptimConfig(**keys)).defaults

    made_here = make_optimizer(nn.Linear(2, 2), recipe.optim).defaults
    assert (made_here["betas"], made_here["amsgrad"], made_here["eps"]) == ((0.8, 0.95), True, 1e-6)
    assert made(name="sgd")["momentum"] == made(name="lars")["momentum"] == 0.9
    assert made(name="lars")["trust_coefficient"] == 1e-3
    assert made(name="sgd", options={"momentum": 0.95})["momentum"] == 0.95
    lars = made(name="lars", options={"momentum": 0.8, "trust_coefficient": 0.02, "nesterov": True})
    assert (lars["momentum"], lars["trust_coefficient"], lars["nesterov"]) == (0.8, 0.02, True)
    k = made(name="ranger", options={"k": 5})["k"]
    assert k == 5 and type(k) is int


@pytest.mark.parametrize(
    "keys, message",
    [
        (dict(name="adamww"), r"no optimizer adamww in torch.optim or torch_optimizer: did you mean adamw\?"),
        (dict(name="lasr"), "did you mean lars"),
        (dict(name="optimizer"), "no optimizer optimizer"),
        (dict(name="xyz"), "no optimizer xyz in torch.optim or torch_optimizer: adamw, sgd"),
        (dict(name="LBFGS"), "lbfgs does not work here, as it needs the loss several times"),
        (dict(name="lookahead"), "lookahead does not work here"),
        (dict(name="adahessian"), "second derivatives"),
        (dict(name="apollo"), "apollo does not work here"),
        (dict(name="a2graduni"), "no learning rate"),
        (dict(name="sparseadam"), "sparseadam does not work here, as it takes sparse gradients"),
        (dict(name="muon"), "muon does not train here .Muon only supports 2D parameters"),
        (dict(name="rprop"), "set optim.weight_decay=0"),
        (dict(name="sgd", options={"lr": 1.0}), "optim.options.lr has a key of its own: set optim.lr instead"),
        (dict(name="sgd", options={"weight_decay": 1.0}), "set optim.weight_decay instead"),
        (dict(name="adam", options={"fused": False}), "optim.options.fused is set by the trainer"),
        (dict(name="lamb", options={"foreach": True}), "optim.options.foreach is set by the trainer"),
        (dict(name="sgd", options={"momentun": 0.9}), "sgd has no such option: use one of momentum, dampening"),
        (dict(name="lars", options={"dampening": 0.1}), "lars has no such option: use one of momentum, nesterov"),
        (dict(name="sgd", options={"momentum": -1.0}), "Invalid momentum value: -1"),
        (dict(name="sgd", options={"dampening": 0.1}), "optim.options.dampening does not work with steps"),
        (dict(name="adamw", options={"betas": (0.9,)}), "betas.* does not train here"),
        (dict(name="lamb", options={"betas": (0.9, 0.99, 0.999)}), "betas.* does not train here"),
        (dict(name="lamb", options={"betas": 0.9}), "lamb with optim.options={'betas': 0.9} does not train here"),
    ],
)
def test_optimizers_that_cannot_train_are_refused(keys, message):
    with pytest.raises(UserError, match=message) as error:
        make_optimizer(nn.Linear(2, 2), OptimConfig(**keys))
    assert "\n" not in str(error.value) and str(error.value).startswith("optim.")


def test_learning_rate_warms_up_and_follows_the_cosine():
    schedule = Schedule(
        total_steps=100, decay_steps=100, warmup_steps=10, beta_warmup_steps=0, peak_rate=2.0, final_factor=0.5
    )
    rates = [schedule.rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.5) and rates[100] == pytest.approx(1.0)
    assert all(a <= b for a, b in zip(rates[:10], rates[1:10]))
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))

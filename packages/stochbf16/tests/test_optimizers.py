"""What stochbf16's optimizers compute and store, against float64 and torch."""

import math
from functools import partial

import pytest
import torch
from torch.nn import Parameter

from optstate_codecs import master_weights, rules, state_bytes
from optstate_codecs.testing import Trainer
from stochbf16 import SGD, Adam, AdamW, Compass, Lion, LPFAdamW, RMSProp

EVERY = {
    "adamw": AdamW,
    "adam": Adam,
    "compass": Compass,
    "lpf": LPFAdamW,
    "rmsprop": RMSProp,
    "sgd": partial(SGD, momentum=0.9),
    "lion": Lion,
}
NORMAL = torch.Generator().manual_seed(0)
START = torch.randn(2000, generator=NORMAL)
# slopes with a common part, so that means count
GRADS = [0.3 * START.sign() + torch.randn(2000, generator=NORMAL) for _ in range(60)]


def due(name, grads, lr):
    """Every step's movement, in float64: each mean as the sum that it is."""

    def mean(values, beta):
        last = len(values) - 1
        return sum((1 - beta) * beta ** (last - i) * value for i, value in enumerate(values))

    grads = [grad.double() for grad in grads]
    moves = []
    for t in range(1, len(grads) + 1):
        seen = grads[:t]
        if name == "lion":
            old = mean(seen[:-1], 0.99) if t > 1 else 0 * seen[0]
            moves.append(-lr * torch.sign(0.9 * old + 0.1 * seen[-1]))
            continue
        if name == "sgd":
            moves.append(-lr * sum(0.9 ** (t - 1 - i) * grad for i, grad in enumerate(seen)))
            continue
        if name == "compass":
            seen = [g + 5 * mean(grads[: i + 1], 0.99) for i, g in enumerate(seen)]
        if name == "lpf":
            seen = [g + 2 * mean(grads[: i + 1], 0.9) for i, g in enumerate(seen)]
        along = seen[-1] if name in ("compass", "rmsprop") else mean(seen, 0.9)
        beta1 = {"compass": 0.99, "rmsprop": 0.0}.get(name, 0.9)
        root = (mean([s**2 for s in seen], 0.999) / (1 - 0.999**t)).sqrt()
        moves.append(-lr * along / (1 - beta1**t) / (root + 1e-8))
    return moves


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", EVERY)
def test_direction_and_length_of_every_rule(name, dtype) -> None:
    """Of all movement over sixty steps; and, where the parameter is exact, of the last step."""
    lr = 1e-3
    # so small that they move by many times what bfloat16 tells apart
    param = Parameter((0.01 * START).to(dtype))
    begin = param.detach().double()
    optimizer = EVERY[name]([param], lr=lr)
    for grad in GRADS:
        before = param.detach().double()
        param.grad = grad.to(dtype)
        optimizer.step()
    moves = due(name, [grad.to(dtype) for grad in GRADS], lr)
    compared = [(sum(moves), param.detach().double() - begin)]
    if dtype == torch.float32:
        compared.append((moves[-1], param.detach().double() - before))
    for expected, got in compared:
        along = float(expected @ got / expected.square().sum())
        cosine = float(expected @ got / (expected.norm() * got.norm()))
        assert abs(along - 1) < 0.003, along
        assert cosine > 0.99, cosine


@pytest.mark.parametrize(
    ("make", "per_parameter"),
    [
        (AdamW, 4),
        (Adam, 4),
        (Compass, 4),
        (LPFAdamW, 6),
        (RMSProp, 2),
        (partial(SGD, momentum=0.9), 2),
        (SGD, 0),
        (Lion, 2),
        (partial(AdamW, amsgrad=True), 6),
        (partial(AdamW, master_weight_bits=24), 5),
        (partial(AdamW, master_weight_bits=32), 6),
    ],
)
def test_state_takes_just_the_bytes_that_are_said(make, per_parameter) -> None:
    trainer = Trainer(make, ((64, 64), (33,)), torch.bfloat16).run(2)
    step = 4
    assert state_bytes(trainer.optimizer) == per_parameter * (64 * 64 + 33) + 2 * step


def test_state_is_named_as_its_users_know_it() -> None:
    named = {
        AdamW: {"ema", "ema_squared"},
        Compass: {"ema", "ema_squared"},
        LPFAdamW: {"ema", "ema_squared", "smoothing"},
        RMSProp: {"ema_squared"},
        Lion: {"exp_avg"},
    }
    for make, names in named.items():
        trainer = Trainer(make, ((5,),), torch.bfloat16).run(1)
        state = trainer.optimizer.state[trainer.params[0]]
        assert set(state) == {"step", *names}
        assert {state[name].dtype for name in names} == {torch.bfloat16}


def test_steps_too_small_for_bfloat16_are_kept_in_the_mean() -> None:
    """1.0 less a hundred times 1e-3, where bfloat16 is 0.004 to 0.008 apart."""
    ends = {}
    for name, make in {"ours": SGD, "torch": torch.optim.SGD}.items():
        param = Parameter(torch.ones(20000, dtype=torch.bfloat16))
        optimizer = make([param], lr=1e-3)
        param.grad = torch.ones_like(param)
        for _ in range(100):
            optimizer.step()
        ends[name] = float(param.detach().double().mean())
    assert abs(ends["ours"] - 0.9) < 0.002
    assert ends["torch"] == 1.0


@pytest.mark.parametrize(
    ("make", "theirs"),
    [
        (AdamW, torch.optim.AdamW),
        (Adam, torch.optim.Adam),
        (SGD, torch.optim.SGD),
    ],
)
def test_weight_decay_is_torchs(make, theirs) -> None:
    """The first step, which no rounding of moments reaches, but for a last place.

    In that torch's roots differ from processor to processor, and ours do not.
    """
    sides = []
    for optimizer_class in (make, theirs):
        param = Parameter(START.clone())
        optimizer = optimizer_class([param], lr=0.01, weight_decay=0.3)
        param.grad = GRADS[0].clone()
        optimizer.step()
        sides.append(param.detach())
    torch.testing.assert_close(*sides, rtol=3e-7, atol=1e-9)


@pytest.mark.parametrize("make", [AdamW, Compass, LPFAdamW, RMSProp, Lion])
def test_decay_alone_multiplies_by_one_minus_lr_wd(make) -> None:
    param = Parameter(START.clone())
    optimizer = make([param], lr=0.01, weight_decay=0.3)
    param.grad = torch.zeros(2000)
    for _ in range(10):
        optimizer.step()
    expected = START.double() * (1 - 0.01 * 0.3) ** 10
    torch.testing.assert_close(param.detach(), expected.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("make", "beta"), [(AdamW, 0.9), (Compass, 0.99), (LPFAdamW, 0.9)])
def test_decay_may_be_bias_corrected(make, beta) -> None:
    """As torchastic's: ``lr / (1 - beta^t)`` decays, too."""
    param = Parameter(START.clone())
    optimizer = make([param], lr=1e-3, weight_decay=0.3, weight_decay_mode="bias_corrected")
    param.grad = torch.zeros(2000)
    for _ in range(10):
        optimizer.step()
    factor = math.prod(1 - 1e-3 / (1 - beta**t) * 0.3 for t in range(1, 11))
    torch.testing.assert_close(param.detach(), (START.double() * factor).float(), rtol=1e-6, atol=0)


def test_a_list_may_mix_dtypes() -> None:
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    params = [Parameter(torch.ones(50, dtype=dtype)) for dtype in dtypes]
    optimizer = AdamW(params, lr=0.01)
    for _ in range(3):
        for param in params:
            param.grad = torch.linspace(-1, 1, 50, dtype=param.dtype)
        optimizer.step()
    for param, dtype in zip(params, dtypes, strict=True):
        assert param.dtype == dtype
        assert optimizer.state[param]["ema"].dtype == torch.bfloat16
        torch.testing.assert_close(param.double(), params[-1], rtol=0.02, atol=0)
    assert not torch.equal(params[2].double(), params[2].bfloat16().double())


def test_a_parameter_without_gradient_is_left_alone() -> None:
    params = [Parameter(torch.ones(9, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = AdamW(params)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert torch.equal(params[1], torch.ones_like(params[1]))
    assert params[1] not in optimizer.state


def test_what_rounding_leaves_can_be_kept_instead() -> None:
    """With 32 bits it is float32 training, whose moments alone are bfloat16."""
    whole = Trainer(partial(AdamW, lr=1e-3), ((300,),), torch.float32)
    split = Trainer(partial(AdamW, lr=1e-3, master_weight_bits=32), ((300,),), torch.bfloat16)
    whole.params[0].data.copy_(split.params[0].float())
    for step in range(30):
        grad = GRADS[step][:300].bfloat16()
        whole.params[0].grad, split.params[0].grad = grad.float(), grad
        whole.optimizer.step()
        split.optimizer.step()
    kept = master_weights(split.optimizer, split.params[0])
    assert torch.equal(kept, whole.params[0])
    assert torch.equal(split.params[0], kept.bfloat16())


def test_torchs_checkpoint_is_taken_and_given_back() -> None:
    theirs = Trainer(torch.optim.AdamW, ((40, 3), (7,)), torch.bfloat16).run(3)
    ours = Trainer(AdamW, ((40, 3), (7,)), torch.bfloat16)
    ours.optimizer.load_state_dict(theirs.optimizer.state_dict())
    back = torch.optim.AdamW(theirs.params)
    back.load_state_dict(ours.optimizer.full_state_dict())
    for param, mine in zip(theirs.params, ours.params, strict=True):
        stored, given = ours.optimizer.state[mine], back.state[param]
        known = theirs.optimizer.state[param]
        assert set(stored) == {"step", "ema", "ema_squared"}
        # bfloat16 moments are taken as they are
        for own, plain in (("ema", "exp_avg"), ("ema_squared", "exp_avg_sq")):
            assert torch.equal(stored[own], known[plain])
            assert torch.equal(given[plain], known[plain])
        assert float(given["step"]) == 3


@pytest.mark.parametrize("make", [AdamW, Compass, LPFAdamW, RMSProp])
def test_torchastics_checkpoint_is_taken(make) -> None:
    """It has no text of formats, a step that is an int, and moments under the same names."""
    trainer = Trainer(make, ((40, 3),), torch.bfloat16).run(3)
    saved = trainer.optimizer.state_dict()
    known = ("params", "lr", "betas", "beta", "amp_fac", "eps", "weight_decay", "centralization")
    theirs = {
        "state": {0: {**saved["state"][0], "step": 3}},
        "param_groups": [{k: v for k, v in saved["param_groups"][0].items() if k in known}],
    }
    other = Trainer(make, ((40, 3),), torch.bfloat16)
    other.optimizer.load_state_dict(theirs)
    for key, value in trainer.optimizer.state[trainer.params[0]].items():
        assert torch.equal(other.optimizer.state[other.params[0]][key], value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (partial(AdamW, weight_decay_mode="torch"), "weight_decay_mode='torch': must be one of"),
        (partial(AdamW, centralization=2), "centralization=2: must be from 0 to 1"),
        (partial(AdamW, master_weight_bits=16), "master_weight_bits=16: must be None, 24 or 32"),
        (partial(AdamW, betas=(0.9, 1.0)), r"betas\[1\]=1.0"),
        (partial(Compass, amp_fac=-1), "amp_fac=-1"),
        (partial(RMSProp, beta=2), "beta=2"),
    ],
)
def test_bad_arguments(make, words) -> None:
    with pytest.raises(ValueError, match=words):
        make([Parameter(torch.ones(3, dtype=torch.bfloat16))])


def test_coupled_decay_has_no_correction() -> None:
    with pytest.raises(ValueError, match="corrected_decay=True: must be False unless decoupled"):
        rules.Adam(corrected_decay=True)
    with pytest.raises(TypeError, match="weight_decay_mode: unknown argument"):
        Adam([Parameter(torch.ones(3))], weight_decay_mode="bias_corrected")

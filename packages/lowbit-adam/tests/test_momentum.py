"""Lion8bit and SGD8bit: documented bytes, the laws that apply, and whom they follow."""

import inspect
from functools import partial

import pytest
import torch
from torch.nn import Parameter

from lowbit_adam import Lion8bit, SGD8bit
from optstate_codecs import decode_state, master_weights, memory_report, testing
from optstate_codecs.testing import Subject, Trainer, assert_close

BOTH = [Lion8bit, partial(SGD8bit, momentum=0.9)]
IDS = ["Lion8bit", "SGD8bit"]


class ExactLion(torch.optim.Optimizer):
    """Chen et al., arXiv:2302.06675, algorithm 2, in the parameter's dtype."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (b1, b2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.sub_(lr * ((b1 * m + (1 - b1) * p.grad).sign() + group["weight_decay"] * p))
                m.copy_(b2 * m + (1 - b2) * p.grad)


MOMENTUM = partial(torch.optim.SGD, momentum=0.9)
ALWAYS = (
    testing.locality,
    testing.resume,
    testing.bytes_are_said,
    testing.no_surprises,
    testing.independence,
)
LION = {"near": ExactLion, "error": 0.2, "max_step": 1.001}
# left alone, a buffer travels nine times its own length: up to 100 lr here
SGD = {"near": MOMENTUM, "error": 0.02, "drift": 10.0}
SUBJECTS = [
    Subject("Lion8bit", Lion8bit, **LION),
    Subject("Lion8bit-64-master", partial(Lion8bit, block_size=64, master_weight_bits=24), **LION),
    Subject("SGD8bit", partial(SGD8bit, momentum=0.9), **SGD),
    Subject("SGD8bit-bf16", partial(SGD8bit, momentum=0.9, bf16_stochastic_round=True), **SGD),
]
# after gradients stop, exact Lion goes on as its momentum's sign was: there is no drift to bound
LION_ONLY = (testing.scale_equivariance, testing.positive_stays_positive)
CASES = [
    pytest.param(law, subject, id=f"{subject.name}-{law.__name__}")
    for subject in SUBJECTS
    for law in (*ALWAYS, *(LION_ONLY if subject.name.startswith("Lion") else (testing.zero_stays,)))
]


@pytest.mark.parametrize(("law", "subject"), CASES)
def test_law(law, subject) -> None:
    law(subject)


def test_arguments_are_torchs() -> None:
    known = inspect.signature(torch.optim.SGD).parameters
    ours = list(inspect.signature(SGD8bit).parameters.values())
    for parameter, theirs in zip(ours[:6], known.values(), strict=False):
        assert parameter.name == theirs.name
        assert parameter.default == theirs.default


@pytest.mark.parametrize("make", BOTH, ids=IDS)
@pytest.mark.parametrize(("block_size", "bits"), [(2048, 8.015625), (64, 8.5)])
def test_bits_per_parameter(make, block_size: int, bits: float) -> None:
    param = Parameter(torch.ones(1024, 64))
    param.grad = torch.ones_like(param)
    optimizer = make([param], block_size=block_size)
    optimizer.step()
    assert memory_report(optimizer).state_bytes == bits * param.numel() / 8 + 4 + 8


def test_without_momentum_nothing_is_stored() -> None:
    trainer = Trainer(SGD8bit).run(6)
    exact = Trainer(torch.optim.SGD).run(6)
    assert all(set(state) == {"step"} for state in trainer.optimizer.state.values())
    for ours, theirs in zip(trainer.params, exact.params, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("make", BOTH, ids=IDS)
def test_block_sizes_are_a_groups_own(make) -> None:
    params = [Parameter(torch.ones(600)), Parameter(torch.ones(600))]
    optimizer = make([{"params": params[:1], "block_size": 64}, {"params": params[1:]}])
    for param in params:
        param.grad = torch.linspace(-1, 1, 600)
    optimizer.step()
    scales = [
        sum(value.numel() for key, value in optimizer.state[param].items() if "scale" in key)
        for param in params
    ]
    assert scales == [10, 1]


@pytest.mark.parametrize("options", [{"nesterov": True}, {"dampening": 0.3}], ids=str)
def test_sgd_follows_torch_and_takes_its_checkpoint(options) -> None:
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, **options}
    exact, ours = (
        Trainer(partial(make, **options), ((70, 70),)) for make in (torch.optim.SGD, SGD8bit)
    )
    start = exact.params[0].detach().clone()
    moved = exact.run(10).params[0].detach() - start
    assert_close("SGD", moved, ours.run(10).params[0].detach() - start, 0.03)
    ours.optimizer.load_state_dict(exact.optimizer.state_dict())
    ours.params[0].data.copy_(exact.params[0])
    buffer = exact.optimizer.state[exact.params[0]]["momentum_buffer"]
    decoded = decode_state(ours.optimizer, ours.params[0])["momentum_buffer"]
    assert_close("momentum_buffer", buffer, decoded, 0.03)


def test_lion_leaves_alone_what_has_no_gradient() -> None:
    param = Parameter(torch.linspace(-1, 1, 4000))
    start, still = param.detach().clone(), torch.arange(4000) % 2 == 0
    optimizer = Lion8bit([param], lr=1e-2)
    noise = torch.Generator().manual_seed(0)
    for _ in range(30):
        param.grad = torch.randn(4000, generator=noise) * ~still
        optimizer.step()
    assert torch.equal(param[still], start[still])
    assert not torch.equal(param[~still], start[~still])


@pytest.mark.parametrize("make", BOTH, ids=IDS)
def test_they_learn_a_least_squares_problem(make) -> None:
    noise = torch.Generator().manual_seed(0)
    features = torch.randn(512, 32, generator=noise)
    target = features @ torch.randn(32, 8, generator=noise)
    weight = Parameter(torch.zeros(32, 8))
    lr = 5e-2 if make is Lion8bit else 1e-2
    optimizer = make([weight], lr=lr)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / 400)
        batch = slice(64 * (step % 8), 64 * (step % 8) + 64)
        loss = (features[batch] @ weight - target[batch]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    loss = (features @ weight.detach() - target).square().mean()
    assert float(loss / target.square().mean()) < 1e-3


@pytest.mark.parametrize("make", BOTH, ids=IDS)
def test_master_weights_keep_small_steps(make) -> None:
    param = Parameter(torch.ones(3000, dtype=torch.bfloat16))
    optimizer = make([param], lr=1e-4, master_weight_bits=24)
    for _ in range(50):
        param.grad = torch.ones_like(param)
        optimizer.step()
    exact = Parameter(torch.ones(1))
    reference = (ExactLion if make is Lion8bit else MOMENTUM)([exact], lr=1e-4)
    for _ in range(50):
        exact.grad = torch.ones(1)
        reference.step()
    moved = master_weights(optimizer, param) - 1
    assert abs(float(moved.mean() / (exact.detach() - 1)) - 1) < 0.01


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"block_size": 100}, ValueError, "block_size=100: must be a power of two"),
        ({"master_weight_bits": 16}, ValueError, "master_weight_bits=16: must be None, 24 or 32"),
        ({"formats": {}}, TypeError, "formats: unknown argument"),
        ({"amsgrad": True}, TypeError, "amsgrad: unknown argument"),
    ],
)
@pytest.mark.parametrize("make", BOTH, ids=IDS)
def test_bad_arguments(make, options, error, words) -> None:
    with pytest.raises(error, match=words):
        make([Parameter(torch.ones(3))], **options)

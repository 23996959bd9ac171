"""The 4-bit and FP8 optimizers: documented bytes, arguments, and how closely they follow torch."""

import copy
import inspect

import pytest
import torch
from torch.nn import Parameter

from lowbit_adam import Adam4bit, AdamFp8, AdamW4bit, AdamWFp8
from optstate_codecs import decode_state, memory_report

ALL = [Adam4bit, AdamW4bit, AdamFp8, AdamWFp8]
BITS = [
    (Adam4bit, 128, 8.25),
    (AdamW4bit, 64, 8.5),
    (AdamFp8, 2048, 16.03125),
    (AdamWFp8, 256, 16.25),
]


def stepped(optimizer_class, shape, steps: int = 1, **options):
    noise = torch.Generator().manual_seed(0)
    param = Parameter(torch.randn(shape, generator=noise))
    optimizer = optimizer_class([param], **options)
    for _ in range(steps):
        param.grad = torch.randn(shape, generator=noise)
        optimizer.step()
    return param, optimizer


@pytest.mark.parametrize("ours", ALL)
def test_arguments_are_torchs(ours) -> None:
    theirs = torch.optim.AdamW if "W" in ours.__name__ else torch.optim.Adam
    known = inspect.signature(theirs).parameters
    for name, parameter in list(inspect.signature(ours).parameters.items())[1:6]:
        assert parameter.default == known[name].default
    group = ours([Parameter(torch.ones(3))]).param_groups[0]
    assert group["block_size"] == (128 if "4bit" in ours.__name__ else 2048)


@pytest.mark.parametrize(("optimizer_class", "block_size", "bits"), BITS)
def test_bits_per_parameter(optimizer_class, block_size: int, bits: float) -> None:
    _, optimizer = stepped(optimizer_class, (1024, 1024), block_size=block_size)
    report = memory_report(optimizer)
    assert report.state_bytes == bits * 1024**2 / 8 + 4 + 8


def test_an_odd_tensor_takes_half_a_byte_more() -> None:
    _, optimizer = stepped(Adam4bit, (129,))
    assert memory_report(optimizer).state_bytes == 2 * (65 + 2 * 2) + 4


@pytest.mark.parametrize(
    ("ours", "theirs", "error", "gain"),
    [
        (Adam4bit, torch.optim.Adam, 0.2, 0.02),
        (AdamW4bit, torch.optim.AdamW, 0.2, 0.02),
        (AdamFp8, torch.optim.Adam, 0.05, 0.005),
        (AdamWFp8, torch.optim.AdamW, 0.05, 0.005),
    ],
)
def test_follows_torch(ours, theirs, error: float, gain: float) -> None:
    options = {"lr": 1e-2, "weight_decay": 0.1}
    exact, _ = stepped(theirs, (70, 70), 30, **options)
    coded, _ = stepped(ours, (70, 70), 30, **options)
    start = torch.randn((70, 70), generator=torch.Generator().manual_seed(0))
    moved, apart = (exact - start).detach(), (coded - exact).detach()
    assert float(apart.norm() / moved.norm()) < error
    assert abs(float(apart.flatten() @ moved.flatten() / moved.norm() ** 2)) < gain


def test_fp8_codes_are_torchs() -> None:
    param, optimizer = stepped(AdamFp8, (4096,), 3)
    state = optimizer.state[param]
    values = state["exp_avg_codes"].view(torch.float8_e4m3fn).to(torch.float32)
    root = decode_state(optimizer, param)["exp_avg_sq"].sqrt()
    expected = values * state["exp_avg_scale"].repeat_interleave(2048) * root
    torch.testing.assert_close(decode_state(optimizer, param)["exp_avg"], expected)


@pytest.mark.parametrize("optimizer_class", ALL)
def test_to_torch_and_back(optimizer_class) -> None:
    param, optimizer = stepped(optimizer_class, (33, 7), 4)
    plain = torch.optim.AdamW([param])
    plain.load_state_dict(optimizer.full_state_dict())
    plain.step()
    other = optimizer_class([param])
    other.load_state_dict(plain.state_dict())
    copied = copy.deepcopy(other)
    copied.step()
    assert float(other.state[param]["step"]) == 5
    assert float(copied.state[copied.param_groups[0]["params"][0]]["step"]) == 5


def test_four_bits_learn_what_adam_learns() -> None:
    """A least-squares problem with features of unlike scales, to the same loss."""
    noise = torch.Generator().manual_seed(0)
    features = torch.randn(512, 64, generator=noise) * torch.exp(torch.randn(64, generator=noise))
    target = features @ torch.randn(64, 8, generator=noise)
    losses = {}
    for optimizer_class in (torch.optim.Adam, Adam4bit, AdamFp8):
        weight = Parameter(torch.zeros(64, 8))
        optimizer = optimizer_class([weight], lr=3e-2)
        for step in range(400):
            batch = slice(64 * (step % 8), 64 * (step % 8) + 64)
            loss = (features[batch] @ weight - target[batch]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[optimizer_class] = float((features @ weight.detach() - target).square().mean())
    start = float(target.square().mean())
    assert losses[torch.optim.Adam] < 0.01 * start
    assert losses[AdamFp8] < 0.01 * start
    assert losses[Adam4bit] < 0.01 * start


@pytest.mark.parametrize("ours", [Adam4bit, AdamW4bit])
def test_impulses_add_up_to_exact_adams(ours) -> None:
    """100 gradients, and 100 steps without, which deliver the rest of what is stored."""
    grads = [*torch.randn(100, 4096, generator=torch.Generator().manual_seed(0))]
    grads += 100 * [torch.zeros(4096)]

    def moved(optimizer_class, dtype, **options) -> torch.Tensor:
        param = Parameter(torch.zeros(4096, dtype=dtype))
        optimizer = optimizer_class([param], lr=1e-3, weight_decay=0.0, **options)
        for grad in grads:
            param.grad = grad.to(dtype)
            optimizer.step()
        return param.detach().double()

    # the second moment exact, so that nothing but the first is rounded
    options = {"formats": {"exp_avg_sq": "fp32"}}
    exact = moved(torch.optim.Adam, torch.float64)
    apart = [
        (moved(ours, torch.float32, error_feedback=flag, **options) - exact).norm() / exact.norm()
        for flag in (False, True)
    ]
    # what is delivered early is divided by an earlier root
    assert apart[1] < 0.03
    assert apart[0] > 5 * apart[1]


def test_error_feedback_rounds_to_nearest() -> None:
    _, optimizer = stepped(AdamW4bit, (256,), error_feedback=True)
    formats = optimizer.group_formats(optimizer.param_groups[0])
    assert formats["exp_avg"].spec == "costate(bits=4, levels=normal)"
    assert memory_report(optimizer).state_bytes == 2 * (128 + 2 * 2) + 4
    _, other = stepped(AdamW4bit, (256,), error_feedback=True, formats={"exp_avg": "bf16"})
    assert other.group_formats(other.param_groups[0])["exp_avg"].spec == "bf16"
    with pytest.raises(TypeError, match="error_feedback=1: must be True or False"):
        stepped(AdamW4bit, (3,), error_feedback=1)

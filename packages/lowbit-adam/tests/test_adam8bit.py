"""Adam8bit and AdamW8bit: documented bytes, torch's directions, and earlier systems' defects."""

import copy
import inspect

import pytest
import torch
from torch.nn import Parameter

from lowbit_adam import Adam8bit, AdamW8bit
from optstate_codecs import decode_state, master_weights, memory_report

BOTH = [Adam8bit, AdamW8bit]
PAIRS = [(Adam8bit, torch.optim.Adam), (AdamW8bit, torch.optim.AdamW)]


def stepped(optimizer_class, shape, steps: int = 1, dtype=torch.float32, **options):
    noise = torch.Generator().manual_seed(0)
    param = Parameter(torch.randn(shape, generator=noise).to(dtype))
    optimizer = optimizer_class([param], **options)
    for _ in range(steps):
        param.grad = torch.randn(shape, generator=noise).to(dtype)
        optimizer.step()
    return param, optimizer


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_arguments_are_torchs(ours, theirs) -> None:
    known = inspect.signature(theirs).parameters
    for name, parameter in list(inspect.signature(ours).parameters.items())[:6]:
        assert name in known
        if name != "params":
            assert parameter.default == known[name].default
    optimizer = ours([Parameter(torch.ones(3))])
    assert optimizer.param_groups[0]["block_size"] == 2048


@pytest.mark.parametrize("optimizer_class", BOTH)
def test_clipping_in_the_step_equals_clipping_before(optimizer_class) -> None:
    params = [Parameter(torch.ones(300)) for _ in range(2)]
    inside = optimizer_class(params[:1], max_grad_norm=0.5, capturable=True)
    before = optimizer_class(params[1:])
    for scale in (1.0, 1e-4):
        for param in params:
            param.grad = torch.linspace(-1, 2, 300) * scale
        torch.nn.utils.clip_grad_norm_(params[1:], 0.5)
        inside.step()
        before.step()
        assert torch.equal(*params)
    with pytest.raises(ValueError, match="max_grad_norm=-1: must be finite and above 0"):
        optimizer_class(params, max_grad_norm=-1)


@pytest.mark.parametrize("optimizer_class", BOTH)
@pytest.mark.parametrize(("block_size", "bits"), [(2048, 16.3), (256, 16.6)])
def test_bits_per_parameter(optimizer_class, block_size: int, bits: float) -> None:
    _, optimizer = stepped(optimizer_class, (4096, 4096), block_size=block_size)
    report = memory_report(optimizer)
    assert report.state_bits_per_parameter <= bits
    assert report.state_bytes == 2 * 4096**2 + 2 * 4 * 4096**2 // block_size + 4 + 8


def test_amsgrad_adds_one_moment() -> None:
    param, optimizer = stepped(AdamW8bit, (4096,), amsgrad=True)
    assert memory_report(optimizer).state_bytes == 3 * 4096 + 3 * 4 * 2 + 4
    assert decode_state(optimizer, param)["max_exp_avg_sq"].shape == (4096,)


def test_no_table_per_tensor() -> None:
    _, optimizer = stepped(AdamW8bit, (16,))
    assert memory_report(optimizer).state_bytes == 2 * 16 + 2 * 4 + 4


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_follows_torch(ours, theirs, weight_decay: float) -> None:
    options = {"lr": 1e-2, "weight_decay": weight_decay}
    exact, _ = stepped(theirs, (70, 70), 30, **options)
    coded, _ = stepped(ours, (70, 70), 30, **options)
    start = torch.randn((70, 70), generator=torch.Generator().manual_seed(0))
    moved = exact.detach() - start
    assert float((coded - exact).detach().norm() / moved.norm()) < 0.1
    gain = float((coded.detach() - start).flatten() @ moved.flatten() / moved.norm() ** 2)
    assert abs(gain - 1) < 0.01


@pytest.mark.parametrize("optimizer_class", BOTH)
def test_no_long_steps_in_heterogeneous_blocks(optimizer_class) -> None:
    """Peers whose second-moment codes decode to zero step thousands of lr here."""
    generator = torch.Generator().manual_seed(0)
    param = Parameter(torch.zeros(2048 * 4))
    root = torch.exp(torch.randn(2048 * 4, generator=generator))  # v spreads with sigma 2
    optimizer = optimizer_class([param], lr=1e-3, weight_decay=0.0)
    longest = 0.0
    for _ in range(200):
        before = param.detach().clone()
        param.grad = torch.randn(2048 * 4, generator=generator) * root
        optimizer.step()
        longest = max(longest, float((param.detach() - before).abs().max()) / 1e-3)
    assert longest <= 8


def test_block_size_per_group_survives_a_load() -> None:
    params = [Parameter(torch.ones(600)), Parameter(torch.ones(600))]
    groups = [{"params": params[:1], "block_size": 64}, {"params": params[1:]}]
    optimizer = AdamW8bit(groups, block_size=256)
    for param in params:
        param.grad = torch.ones(600)
    optimizer.step()
    assert optimizer.state[params[0]]["exp_avg_scale"].numel() == 10
    assert optimizer.state[params[1]]["exp_avg_scale"].numel() == 3

    other = AdamW8bit([{"params": params[:1]}, {"params": params[1:]}], block_size=128)
    other.load_state_dict(optimizer.state_dict())
    assert [g["block_size"] for g in other.param_groups] == [128, 128]
    assert other.state[params[0]]["exp_avg_scale"].numel() == 5
    other.step()


def test_one_line_swap_and_back() -> None:
    param, exact = stepped(torch.optim.AdamW, (300,), 5)
    ours = AdamW8bit([param])
    ours.load_state_dict(exact.state_dict())
    back = torch.optim.AdamW([param])
    back.load_state_dict(ours.full_state_dict())
    assert "block_size" not in back.param_groups[0]
    back.step()


def test_bf16_stochastic_round_keeps_small_steps() -> None:
    """One hundred steps of 1e-4, each far below the precision of 1.0 in bfloat16."""
    moved = {}
    for stochastic in (False, True):
        param = Parameter(torch.ones(20000, dtype=torch.bfloat16))
        optimizer = AdamW8bit([param], lr=1e-4, weight_decay=0.0, bf16_stochastic_round=stochastic)
        for _ in range(100):
            param.grad = torch.ones_like(param)
            optimizer.step()
        moved[stochastic] = 1 - float(param.detach().float().mean())
    assert moved[False] == 0
    assert abs(moved[True] - 0.01) < 5e-4


@pytest.mark.parametrize(("bits", "extra"), [(24, 1), (32, 2)])
def test_master_weights_keep_small_steps(bits: int, extra: int) -> None:
    """As above, but every element arrives, within the noise of its moments."""
    options = {"lr": 1e-4, "weight_decay": 0.0, "master_weight_bits": bits}
    param = Parameter(torch.ones(20000, dtype=torch.bfloat16))
    optimizer = AdamW8bit([param], **options)
    for _ in range(100):
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert float((master_weights(optimizer, param) - 0.99).abs().max()) < 1e-3
    assert memory_report(optimizer).state_bytes == (2 + extra) * 20000 + 2 * 4 * 10 + 4
    wide, exact = stepped(AdamW8bit, (300,), master_weight_bits=bits)
    assert memory_report(exact).state_bytes == 2 * 300 + 2 * 4 + 4
    assert torch.equal(wide, stepped(AdamW8bit, (300,))[0])


def test_deepcopy_and_float_lr() -> None:
    param, optimizer = stepped(AdamW8bit, (100,))
    copied = copy.deepcopy(optimizer)
    copied.param_groups[0]["lr"] = 0.5
    copied_param = copied.param_groups[0]["params"][0]
    copied_param.grad = torch.ones(100)
    copied.step()
    assert float((copied_param - param).detach().abs().max()) > 0.1


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"block_size": 100}, ValueError, "block_size=100: must be a power of two"),
        ({"block_size": 2.0}, TypeError, "block_size=2.0: must be an int"),
        ({"bf16_stochastic_round": 1}, TypeError, "bf16_stochastic_round=1: must be True"),
        ({"master_weight_bits": 16}, ValueError, "master_weight_bits=16: must be None, 24 or 32"),
        ({"master_weight_bits": True}, ValueError, "master_weight_bits=True: must be None"),
        (
            {"master_weight_bits": 24, "bf16_stochastic_round": True},
            ValueError,
            "master_weight_bits=24: must be None with bf16_stochastic_round=True",
        ),
        ({"lr": -1e-3}, ValueError, "lr=-0.001: must be finite and at least 0"),
        ({"betas": (0.9, 2)}, ValueError, r"betas\[1\]=2"),
        ({"nesterov": True}, TypeError, "nesterov: unknown argument"),
    ],
)
@pytest.mark.parametrize("optimizer_class", BOTH)
def test_bad_arguments(optimizer_class, options, error, words) -> None:
    with pytest.raises(error, match=words):
        optimizer_class([Parameter(torch.ones(3))], **options)

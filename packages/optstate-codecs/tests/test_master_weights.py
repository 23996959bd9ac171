"""Training with split master weights: against float32 training, in the state, in checkpoints."""

import copy

import pytest
import torch
from subjects import EXACT, SECOND
from torch.nn import Parameter

from optstate_codecs import (
    Adam,
    CodedOptimizer,
    decode_state,
    master_weights,
    predicted_state_bytes,
    state_bytes,
)
from optstate_codecs.writes import CORRECTION, WRITES, Nearest, parameter_write

CODED = {
    "exp_avg": "dynamic8(block_size=256, rounding=stochastic, units=update)",
    "exp_avg_sq": SECOND,
}
HALVES = [torch.bfloat16, torch.float16]

halves = pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])
splits = pytest.mark.parametrize("name", ["split24", "split32"])


def make(params, formats=EXACT, **options) -> CodedOptimizer:
    return CodedOptimizer(params, Adam(decoupled=True), formats, **options)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_32_bits_are_a_float32_master_weight(weight_decay, amsgrad) -> None:
    """torch.optim.AdamW on float32 copies, given the same gradients, takes the same steps."""
    noise = torch.Generator().manual_seed(0)
    shapes = ((61, 83), (129,), ())
    params = [Parameter(torch.randn(s, generator=noise).bfloat16()) for s in shapes]
    masters = [Parameter(p.detach().float()) for p in params]
    options = {"lr": 1e-3, "weight_decay": weight_decay, "amsgrad": amsgrad}
    ours = make(params, write="split32", **options)
    theirs = torch.optim.AdamW(masters, **options)
    for _ in range(40):
        for param, master in zip(params, masters, strict=True):
            param.grad = torch.randn(param.shape, generator=noise).bfloat16()
            master.grad = param.grad.float()
        ours.step()
        theirs.step()
    for param, master in zip(params, masters, strict=True):
        got = master_weights(ours, param)
        assert torch.equal(got, master.detach())
        for key, moment in decode_state(ours, param).items():
            assert torch.equal(moment, theirs.state[master][key])
        tie = master.detach().view(torch.int32) & 0xFFFF == 0x8000
        assert torch.equal(param[~tie], master.detach().bfloat16()[~tie])


@splits
@halves
def test_steps_below_the_parameters_precision_add_up(name, dtype) -> None:
    """1.0 minus 100 x 1e-5: nearest rounding would stay at 1.0."""
    param = Parameter(torch.ones(2000, dtype=dtype))
    optimizer = make([param], lr=1e-5, weight_decay=0.0, write=name)
    for _ in range(100):
        param.grad = torch.ones_like(param)
        optimizer.step()
    master = master_weights(optimizer, param)
    assert abs(float(master.mean()) - 0.999) < 1e-5
    assert float((master - 0.999).abs().max()) < 1e-3


@splits
@halves
def test_no_gradient_no_movement(name, dtype) -> None:
    """Law 2, for parameter and correction, from random values and from untouched ones."""
    noise = torch.Generator().manual_seed(0)
    param = Parameter(torch.randn(3000, generator=noise).mul(0.01).to(dtype))
    optimizer = make([param], CODED, lr=1e-3, weight_decay=0.0, write=name)
    still = torch.arange(3000) % 2 == 0
    start = param.detach().clone()
    for _ in range(30):
        param.grad = torch.randn(3000, generator=noise).to(dtype) * ~still
        optimizer.step()
    assert torch.equal(param[still], start[still])
    assert not optimizer.state[param][CORRECTION][still].any()
    assert not torch.equal(param[~still], start[~still])

    other = make([param], lr=1e-3, weight_decay=0.0, write=name)
    param.grad = torch.zeros_like(param)
    other.step()
    other.state[param][CORRECTION].copy_(optimizer.state[param][CORRECTION])
    before = param.detach().clone(), other.state[param][CORRECTION].clone()
    for _ in range(50):
        param.grad = torch.zeros_like(param)
        other.step()
    assert torch.equal(param, before[0])
    assert torch.equal(other.state[param][CORRECTION], before[1])


@pytest.mark.parametrize(("name", "extra"), [("nearest", 0), ("split24", 1), ("split32", 2)])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
def test_bytes(name, extra, dtype) -> None:
    params = [Parameter(torch.ones(s, dtype=dtype)) for s in ((61, 83), (129,), (), (0,))]
    optimizer = make(params, {"exp_avg": "bf16", "exp_avg_sq": "bf16"}, write=name)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    numel = 61 * 83 + 129 + 1
    expected = numel * (4 + (extra if dtype in HALVES else 0)) + 4 * 4
    assert state_bytes(optimizer) == expected
    assert predicted_state_bytes(optimizer) == expected
    kept = extra > 0 and dtype in HALVES
    assert all((CORRECTION in optimizer.state[param]) == kept for param in params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", WRITES)
def test_wider_parameters_are_written_as_usual(name, dtype) -> None:
    assert parameter_write(name, dtype) == Nearest(dtype)
    param = Parameter(torch.ones(5, dtype=dtype))
    optimizer = make([param], write=name)
    assert torch.equal(master_weights(optimizer, param), param.detach())
    assert master_weights(optimizer, param).dtype == dtype


@splits
@halves
def test_layouts_step_alike(name, dtype) -> None:
    data = torch.randn(4, 6, 5, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    layouts = [
        data.clone(),
        data.to(memory_format=torch.channels_last),
        torch.cat([data, data], 3)[..., ::2].copy_(data),
    ]
    masters = []
    for layout in layouts:
        param = Parameter(layout)
        optimizer = make([param], lr=1e-3, write=name, rounding_seed=3)
        for t in range(3):
            grad = torch.randn(data.shape, generator=torch.Generator().manual_seed(t))
            param.grad = grad.to(dtype)
            optimizer.step()
        assert optimizer.state[param][CORRECTION].shape == data.shape
        masters.append(master_weights(optimizer, param))
    bound = 0 if name == "split32" else 3 * torch.finfo(dtype).eps / 128
    for master in masters[1:]:
        torch.testing.assert_close(master, masters[0], rtol=bound, atol=bound / 64)


def trained(write: str, dtype=torch.bfloat16, steps: int = 3):
    noise = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(s, generator=noise).to(dtype)) for s in ((61, 83), (129,), ())]
    optimizer = make(params, CODED, write=write)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=noise).to(dtype)
        optimizer.step()
    return params, optimizer


def loaded(params, write: str, state_dict, formats=CODED) -> CodedOptimizer:
    optimizer = make(params, formats, write=write)
    optimizer.load_state_dict(state_dict)
    return optimizer


@splits
def test_a_checkpoint_keeps_the_correction(name) -> None:
    params, source = trained(name)
    state_dict = copy.deepcopy(source.state_dict())
    for formats in (CODED, EXACT):
        target = loaded(params, name, state_dict, formats)
        for param in params:
            got, expected = target.state[param][CORRECTION], source.state[param][CORRECTION]
            assert torch.equal(got, expected)
            assert got.data_ptr() != expected.data_ptr()
            assert torch.equal(master_weights(target, param), master_weights(source, param))


def test_widths_convert() -> None:
    params, wide = trained("split32")
    narrow = loaded(params, "split24", wide.state_dict())
    back = loaded(params, "split32", narrow.state_dict())
    for param in params:
        assert narrow.state[param][CORRECTION].dtype == torch.int8
        exact, near = master_weights(wide, param), master_weights(narrow, param)
        # half a unit, or a whole one where half would be another parameter's
        error = (near.double() - exact.double()).abs() / exact.double().abs()
        assert 0 < error.max() <= 2.0**-15
        assert (error > 2.0**-16).double().mean() < 0.01
        assert torch.equal(master_weights(back, param), near)


def test_none_was_saved_means_the_parameter_as_it_is() -> None:
    params, nearest = trained("nearest")
    exact = torch.optim.AdamW(params)
    exact.step()
    for state_dict in (nearest.state_dict(), exact.state_dict(), nearest.full_state_dict()):
        target = loaded(params, "split32", state_dict)
        for param in params:
            assert not target.state[param][CORRECTION].any()
            assert torch.equal(master_weights(target, param), param.detach().float())


def test_none_is_kept_is_said() -> None:
    params, source = trained("split24")
    with pytest.warns(UserWarning, match="master weights of 3 parameters.*write='nearest'") as seen:
        target = loaded(params, "nearest", source.state_dict())
    assert seen[0].filename == __file__
    assert all(CORRECTION not in target.state[p] for p in params)
    target.step()


def test_a_full_state_dict_is_torchs() -> None:
    params, source = trained("split24")
    full = source.full_state_dict()
    assert all(set(state) == {"step", "exp_avg", "exp_avg_sq"} for state in full["state"].values())
    back = torch.optim.AdamW(params)
    back.load_state_dict(full)
    back.step()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.zeros(61, 83), "must be a tensor of dtype int8 or int16"),
        ("none", "must be a tensor of dtype int8 or int16"),
        (torch.zeros(4, dtype=torch.int8), r"shape \(4,\), must be \(61, 83\)"),
    ],
)
def test_a_bad_correction_is_named_and_changes_nothing(value, words) -> None:
    _, optimizer = trained("split24")
    before = copy.deepcopy(optimizer.state_dict())
    bad = copy.deepcopy(before)
    bad["state"][0][CORRECTION] = value
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(bad)
    for number, state in before["state"].items():
        after = optimizer.state_dict()["state"][number]
        assert all(torch.equal(v, after[k]) for k, v in state.items())


def test_parameters_cast_after_a_step_get_a_correction() -> None:
    layer = torch.nn.Linear(8, 8)
    optimizer = make(layer.parameters(), write="split24")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        layer.to(dtype)
        for param in layer.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
        assert all(torch.isfinite(p).all() for p in layer.parameters())
        assert (CORRECTION in optimizer.state[layer.weight]) == (dtype != torch.float32)


def test_master_weights_before_a_step_and_of_strangers() -> None:
    param = Parameter(torch.randn(5).bfloat16())
    optimizer = make([param], write="split24")
    value = master_weights(optimizer, param)
    assert value.dtype == torch.float32
    assert torch.equal(value, param.detach().float())
    value.add_(1)
    assert not torch.equal(value, param.detach().float())
    with pytest.raises(KeyError, match="not a parameter"):
        master_weights(optimizer, Parameter(torch.ones(5)))

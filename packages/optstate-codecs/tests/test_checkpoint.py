"""Packed and full state dicts, torch.optim's, and what is refused."""

import copy
import io

import pytest
import torch
from subjects import EXACT, SECOND
from torch.nn import Parameter

from optstate_codecs import Adam, CodedOptimizer, decode_state

CODED = {"exp_avg": "dynamic8", "exp_avg_sq": SECOND}
SHAPES = ((61, 83), (129,), ())


def trained(make, steps: int = 3):
    noise = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=noise)) for shape in SHAPES]
    optimizer = make(params)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=noise)
        optimizer.step()
    return params, optimizer


def coded(params, formats=CODED, **options):
    return CodedOptimizer(params, Adam(decoupled=True), formats, **options)


def test_packed_is_plain_and_small() -> None:
    params, optimizer = trained(coded)
    state_dict = optimizer.state_dict()
    for state in state_dict["state"].values():
        assert all(isinstance(v, torch.Tensor) for v in state.values())
    file = io.BytesIO()
    torch.save(state_dict, file)
    payload = sum(2 * p.numel() for p in params)
    assert len(file.getvalue()) < payload + 10000
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded["param_groups"][0]["formats"]["exp_avg"] == "dynamic8"


def test_torch_and_back() -> None:
    params, exact = trained(torch.optim.AdamW)
    ours = coded(params)
    ours.load_state_dict(exact.state_dict())
    assert float(decode_state(ours, params[0])["step"]) == 3
    for key, bound in (("exp_avg", 0.02), ("exp_avg_sq", 0.04)):
        expected = exact.state[params[0]][key]
        error = (decode_state(ours, params[0])[key] - expected).norm() / expected.norm()
        assert float(error) < bound
    back = torch.optim.AdamW(params)
    back.load_state_dict(ours.full_state_dict())
    for param in params:
        decoded = decode_state(ours, param)
        assert all(torch.equal(back.state[param][key], decoded[key]) for key in decoded)
    back.step()


def test_exact_formats_exchange_with_torch_bit_for_bit() -> None:
    params, exact = trained(torch.optim.AdamW)
    ours = coded(params, EXACT)
    ours.load_state_dict(exact.state_dict())
    for param in params:
        for key, value in exact.state[param].items():
            assert torch.equal(ours.state[param][key], value)


def test_other_formats_are_encoded_anew_and_the_own_are_kept() -> None:
    params, source = trained(coded)
    small = {**CODED, "exp_avg": "dynamic8(block_size=64)"}
    for formats in (EXACT, small):
        target = coded(params, formats)
        target.load_state_dict(source.state_dict())
        assert target.param_groups[0]["formats"]["exp_avg"] == formats["exp_avg"]
        before, after = decode_state(source, params[0]), decode_state(target, params[0])
        assert float((before["exp_avg"] - after["exp_avg"]).abs().max()) < 0.01


def test_options_come_from_the_checkpoint() -> None:
    _, source = trained(lambda p: coded(p, lr=0.5, betas=(0.5, 0.6), rounding_seed=7))
    params, target = trained(coded)
    source.param_groups[0]["initial_lr"] = 0.25
    groups = target.param_groups[0]
    target.load_state_dict(source.state_dict())
    assert target.param_groups[0] is groups
    assert groups["lr"] == 0.5
    assert groups["betas"] == (0.5, 0.6)
    assert groups["rounding_seed"] == 7
    assert groups["initial_lr"] == 0.25
    assert groups["params"][0] is params[0]


def test_loading_aliases_nothing_and_casts_nothing() -> None:
    _, source = trained(coded)
    params = [Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in SHAPES]
    target = coded(params)
    state_dict = source.state_dict()
    target.load_state_dict(state_dict=state_dict)
    for number, param in enumerate(params):
        for key, value in state_dict["state"][number].items():
            got = target.state[param][key]
            assert got.dtype == value.dtype
            assert got.data_ptr() != value.data_ptr()


def test_an_optimizer_without_state_round_trips() -> None:
    _, fresh = trained(coded, steps=0)
    fresh.load_state_dict(fresh.state_dict())
    assert not fresh.state


def test_layout_of_the_parameter_may_differ() -> None:
    data = torch.randn(4, 6, 5, 8, generator=torch.Generator().manual_seed(0))
    source_param = Parameter(data.clone().to(memory_format=torch.channels_last))
    target_param = Parameter(data.clone())
    source, target = coded([source_param]), coded([target_param])
    source_param.grad = target_param.grad = data
    source.step()
    target.load_state_dict(source.state_dict())
    before, after = decode_state(source, source_param), decode_state(target, target_param)
    assert before["exp_avg"].is_contiguous(memory_format=torch.channels_last)
    for key in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(before[key], after[key], rtol=0.1, atol=1e-5)


@pytest.mark.parametrize("there", [CODED, {"exp_avg": "fp32", "exp_avg_sq": "fp32"}])
@pytest.mark.parametrize("shape", [(4, 6, 5, 8), (3, 5, 3, 7)])
def test_layout_may_differ_where_codes_share_bytes(there, shape) -> None:
    """Packed codes have no strides of their own to show in which order they lie."""
    four = {"exp_avg": "minifloat(signed=True, mantissa_bits=1)", "exp_avg_sq": "minifloat"}
    data = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    source_param = Parameter(data.clone().to(memory_format=torch.channels_last))
    source = coded([source_param], four)
    source_param.grad = data
    source.step()
    before = decode_state(source, source_param)
    for formats in (four, there):
        for memory_format in (torch.channels_last, torch.contiguous_format):
            target_param = Parameter(data.clone().to(memory_format=memory_format))
            target = coded([target_param], formats)
            target.load_state_dict(copy.deepcopy(source.state_dict()))
            after = decode_state(target, target_param)
            same = formats == four and memory_format == torch.channels_last
            for key in ("exp_avg", "exp_avg_sq"):
                error = (before[key] - after[key]).norm() / before[key].norm()
                assert error == 0 if same else error < 0.3
            target_param.grad = data
            target.step()


def test_hooks_see_the_load() -> None:
    _, optimizer = trained(coded)
    seen = []
    optimizer.register_load_state_dict_pre_hook(lambda o, s: seen.append("before"))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("after"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before", "after"]


def drop(key):
    return lambda s: s["state"][0].pop(key)


def put(key, value):
    return lambda s: s["state"][0].__setitem__(key, value)


def group(key, value):
    return lambda s: s["param_groups"][0].__setitem__(key, value)


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (lambda s: s.pop("state"), KeyError, "missing key 'state'"),
        (lambda s: s.pop("param_groups"), KeyError, "missing key 'param_groups'"),
        (lambda s: s["param_groups"].clear(), ValueError, "0 groups, must be 1"),
        (lambda s: s["param_groups"][0]["params"].pop(), ValueError, "2 parameters, must be 3"),
        (lambda s: s["param_groups"][0].pop("betas"), KeyError, "missing key 'betas'"),
        (lambda s: s["state"].__setitem__(9, {}), KeyError, "unknown parameter 9"),
        (drop("exp_avg_codes"), KeyError, "missing key 'exp_avg_codes'"),
        (drop("step"), KeyError, "missing key 'step'"),
        (put("exp_avg_absmax", torch.zeros(1)), KeyError, "unknown key 'exp_avg_absmax'"),
        (put("dim_order", 2), ValueError, r"\['dim_order'\]=2: must be from 0 to 1"),
        (put("exp_avg_codes", torch.zeros(4, dtype=torch.uint8)), ValueError, r"shape \(4,\)"),
        (put("exp_avg_codes", torch.zeros(61, 83)), ValueError, "dtype torch.float32, must be"),
        (put("exp_avg_codes", "codes"), ValueError, "='codes': must be a tensor"),
        (put("exp_avg_scale", torch.full((3,), float("nan"))), ValueError, "finite"),
        (put("exp_avg_scale", torch.full((3,), float("inf"))), ValueError, "finite"),
        (put("step", torch.tensor(-1.0)), ValueError, "must be a whole number"),
        (put("step", torch.tensor(float("nan"))), ValueError, "must be a whole number"),
        (group("lr", -1.0), ValueError, "lr=-1.0: must be finite"),
        (group("formats", {"exp_avg": "int3"}), ValueError, "format='int3': must be one of"),
        (group("formats", {"exp_avg": "fp32"}), KeyError, "moment 'exp_avg_sq' is not in both"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(spoil, error, words) -> None:
    _, optimizer = trained(coded)
    before = copy.deepcopy(optimizer.state_dict())
    bad = copy.deepcopy(before)
    spoil(bad)
    with pytest.raises(error, match=words):
        optimizer.load_state_dict(bad)
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for number, state in before["state"].items():
        assert all(torch.equal(v, after["state"][number][k]) for k, v in state.items())


def test_a_foreign_optimizer_is_refused() -> None:
    _, sgd = trained(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    _, optimizer = trained(coded)
    with pytest.raises(KeyError, match="missing key 'betas'"):
        optimizer.load_state_dict(sgd.state_dict())

"""State that others write to: plain moments, entries of their own, loaders that write in place.

Beside each case ``torch.optim.AdamW`` does the same.
"""

import copy
import io
import pickle
from collections import defaultdict

import pytest
import torch
from subjects import EXACT, SECOND
from torch import Tensor
from torch.nn import Parameter

from optstate_codecs import Adam, CodedOptimizer, decode_state, offload

CODED = {"exp_avg": "dynamic8(block_size=64)", "exp_avg_sq": SECOND}
UNITS = {"exp_avg": "dynamic8(block_size=64, units=update)", "exp_avg_sq": SECOND}
FORMATS = {"fp32": EXACT, "dynamic8": CODED, "update": UNITS}


def exact(params, **options):
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.0, **options)


def ours(params, formats=CODED, **options):
    rule = Adam(decoupled=True)
    return CodedOptimizer(params, rule, formats, lr=0.01, weight_decay=0.0, **options)


def gradient(shape, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stepped(make, shape=(32, 48), steps: int = 3):
    param = Parameter(torch.ones(shape))
    optimizer = make([param])
    for seed in range(steps):
        param.grad = gradient(shape, seed)
        optimizer.step()
    return param, optimizer


def near(mine: Tensor, theirs: Tensor, formats, bound: float = 0.05) -> None:
    error = float((mine - theirs).detach().norm() / theirs.detach().norm())
    assert error < (1e-6 if formats is EXACT else bound), error


@pytest.mark.parametrize("formats", FORMATS.values(), ids=FORMATS)
def test_state_built_by_hand_is_encoded(formats) -> None:
    source, theirs = stepped(exact)
    param = Parameter(source.detach().clone())
    optimizer = ours([param], formats)
    optimizer.state[param] = {key: v.clone() for key, v in theirs.state[source].items()}
    decoded = decode_state(optimizer, param)
    assert float(decoded["step"]) == 3
    for key in ("exp_avg", "exp_avg_sq"):
        near(decoded[key], theirs.state[source][key], formats)
    if formats is not EXACT:
        assert optimizer.state[param]["exp_avg_codes"].dtype == torch.uint8
        assert "exp_avg" not in optimizer.state[param]
    for seed in (3, 4):
        source.grad = gradient(source.shape, seed)
        param.grad = source.grad.clone()
        theirs.step()
        optimizer.step()
    near(param - 1, source - 1, formats)
    assert float(optimizer.state[param]["step"]) == 5


def test_a_step_count_built_by_hand_may_be_a_number() -> None:
    param = Parameter(torch.ones(8))
    optimizer = ours([param], EXACT)
    moments = {"exp_avg": torch.zeros(8), "exp_avg_sq": torch.ones(8)}
    optimizer.state[param] = {"step": 7, **moments}
    assert optimizer.state_dict()["state"][0]["step"].dtype == torch.float32
    param.grad = torch.ones(8)
    optimizer.step()
    assert float(optimizer.state[param]["step"]) == 8


@pytest.mark.parametrize("formats", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(
    "keys", [("exp_avg",), ("exp_avg_sq",), ("exp_avg", "exp_avg_sq")], ids=str
)
@pytest.mark.parametrize("offloaded", [False, True])
def test_an_assigned_moment_takes_the_place_of_its_codes(formats, keys, offloaded) -> None:
    """As ReLoRA's reset assigns zeros, and others other numbers."""
    source, theirs = stepped(exact)
    param, optimizer = stepped(lambda p: ours(p, formats))
    if offloaded:
        offload(optimizer)
    before = decode_state(optimizer, param)
    for key in keys:
        value = gradient(param.shape, 9).square() * 0.5
        theirs.state[source][key] = value.clone()
        optimizer.state[param][key] = value.clone()
    decoded = decode_state(optimizer, param)
    for key in ("exp_avg", "exp_avg_sq"):
        near(decoded[key], theirs.state[source][key] if key in keys else before[key], formats)
    start, begun = param.detach().clone(), source.detach().clone()
    source.grad, param.grad = torch.zeros_like(source), torch.zeros_like(param)
    theirs.step()
    optimizer.step()
    near(param - start, source - begun, formats, 0.08)


def test_what_no_moment_can_be_is_refused_and_changes_nothing() -> None:
    param, optimizer = stepped(ours)
    other = Parameter(torch.ones(5))
    optimizer.add_param_group({"params": [other]})
    param.grad, other.grad = torch.ones_like(param), torch.ones(5)
    codes = optimizer.state[param]["exp_avg_codes"]
    before = param.detach().clone()
    for value, error, words in (
        (torch.zeros(3), RuntimeError, r"state\['exp_avg'\]: size mismatch: shape \(3,\)"),
        ("zeros", TypeError, r"state\['exp_avg'\]='zeros': must be a tensor, got str"),
        (torch.zeros(32, 48, dtype=torch.int64), TypeError, "dtype torch.int64, must be floating"),
    ):
        optimizer.state[param]["exp_avg"] = value
        for action in (optimizer.step, optimizer.state_dict):
            with pytest.raises(error, match=words):
                action()
        assert other not in optimizer.state
    del optimizer.state[param]["exp_avg"]
    del optimizer.state[param]["exp_avg_scale"]
    with pytest.raises(KeyError, match="missing key 'exp_avg_scale'"):
        optimizer.step()
    assert torch.equal(param, before)
    assert optimizer.state[param]["exp_avg_codes"] is codes


@pytest.mark.parametrize(
    ("make", "offloaded"),
    [(exact, False), (ours, False), (ours, True)],
    ids=["torch", "ours", "offloaded"],
)
def test_entries_of_others_are_kept(make, offloaded: bool) -> None:
    """A number under a text, a table under a text, and tensors beside the optimizer's own."""
    param, optimizer = stepped(make)
    slow, table = torch.full_like(param, 2.0), {"s": torch.ones(3), "step_count": 4}
    optimizer.state[param]["slow"] = slow
    optimizer.state[param]["calls"] = 7
    optimizer.state["test"] = 1
    optimizer.state["trac"] = table
    if offloaded:
        offload(optimizer)
    for seed in (3, 4):
        param.grad = gradient(param.shape, seed)
        optimizer.step()
    assert optimizer.state[param]["slow"] is slow
    assert optimizer.state["trac"] is table
    saved = optimizer.state_dict()
    assert saved["state"][0]["slow"] is slow
    assert saved["state"]["test"] == 1
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    target = make([Parameter(param.detach().clone())])
    target.load_state_dict(torch.load(file, weights_only=True))
    (mine,) = target.param_groups[0]["params"]
    copies = [target, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    for other in copies:
        (mine,) = other.param_groups[0]["params"]
        assert torch.equal(other.state[mine]["slow"], slow)
        assert other.state[mine]["calls"] == 7
        assert other.state["test"] == 1
        assert other.state["trac"]["step_count"] == 4
        mine.grad = gradient(mine.shape, 5)
        other.step()
        assert float(other.state[mine]["step"]) == 6
    if make is ours:
        full = optimizer.full_state_dict()
        back = exact([Parameter(param.detach().clone())])
        back.load_state_dict(full)
        assert back.state["test"] == 1


def test_a_lookahead_that_keeps_its_weights_in_the_state() -> None:
    results = {}
    for name, make in (("torch", exact), ("ours", lambda p: ours(p, EXACT))):
        param = Parameter(torch.ones(32, 48))
        optimizer = make([param])
        for seed in range(1, 13):
            param.grad = gradient(param.shape, seed)
            optimizer.step()
            if seed % 3 == 0:
                slow = optimizer.state[param].setdefault("slow", torch.ones_like(param))
                slow.add_(param.detach() - slow, alpha=0.5)
                param.data.copy_(slow)
        results[name] = param.detach()
    torch.testing.assert_close(results["ours"], results["torch"], rtol=1e-6, atol=1e-7)


def test_only_foreign_entries_are_no_state() -> None:
    param = Parameter(torch.ones(8))
    optimizer = ours([param])
    optimizer.state[param]["slow"] = torch.ones(8)
    assert decode_state(optimizer, param) == {}
    assert list(optimizer.state_dict()["state"][0]) == ["slow"]
    param.grad = torch.ones(8)
    optimizer.step()
    assert float(optimizer.state[param]["step"]) == 1
    assert torch.equal(optimizer.state[param]["slow"], torch.ones(8))


@pytest.mark.parametrize("fused", [None, True])
def test_loading_in_place_restores_the_step_count_too(fused) -> None:
    """As ``torch.distributed.checkpoint.load`` fills the tensors of a state dict."""
    source, before = stepped(lambda p: ours(p, fused=fused), steps=5)
    saved = copy.deepcopy(before.state_dict())
    param, optimizer = stepped(lambda p: ours(p, fused=fused), steps=2)
    param.data.copy_(source)
    for key, value in optimizer.state_dict()["state"][0].items():
        value.copy_(saved["state"][0][key])
    assert float(optimizer.state[param]["step"]) == 5
    for one, other in ((source, before), (param, optimizer)):
        one.grad = gradient(one.shape, 7)
        other.step()
    assert torch.equal(param, source)
    for key, value in before.state[source].items():
        assert torch.equal(optimizer.state[param][key], value)


def test_loading_in_place_from_another_layout() -> None:
    shape = (8, 16, 3, 5)
    source, before = stepped(ours, shape)
    param, optimizer = stepped(ours, shape, steps=1)
    param.data = param.data.to(memory_format=torch.channels_last)
    optimizer.state_dict()
    wanted = decode_state(before, source)
    saved = copy.deepcopy(before.state_dict())
    for key, value in optimizer.state_dict()["state"][0].items():
        value.copy_(saved["state"][0][key])
    got = decode_state(optimizer, param)
    assert float(got["step"]) == 3
    for key in ("exp_avg", "exp_avg_sq"):
        near(got[key], wanted[key], CODED)


def test_a_state_dict_without_strides_or_numbers_is_still_read_rightly() -> None:
    """As safetensors stores tensors, and as loaders rename parameters."""
    four = {"exp_avg": "int4(block_size=64)", "exp_avg_sq": "minifloat"}
    shape = (8, 6, 3, 5)
    for formats in (four, CODED):
        source = Parameter(torch.ones(shape).to(memory_format=torch.channels_last))
        before = ours([source], formats)
        source.grad = gradient(shape, 0)
        before.step()
        wanted = decode_state(before, source)
        saved = copy.deepcopy(before.state_dict())
        (group,) = saved["param_groups"]
        group["params"] = ["conv.weight"]
        saved["state"] = {
            "conv.weight": {key: v.contiguous().clone() for key, v in saved["state"][0].items()}
        }
        for layout in (torch.channels_last, torch.contiguous_format):
            param = Parameter(torch.ones(shape).to(memory_format=layout))
            optimizer = ours([param], formats)
            optimizer.load_state_dict(saved)
            got = decode_state(optimizer, param)
            for key in ("exp_avg", "exp_avg_sq"):
                if layout is torch.channels_last:
                    assert torch.equal(got[key], wanted[key])
                else:
                    error = float((got[key] - wanted[key]).norm() / wanted[key].norm())
                    assert error < 0.3


def test_loading_under_inference_mode() -> None:
    param, optimizer = stepped(ours)
    saved = copy.deepcopy(optimizer.state_dict())
    with torch.inference_mode():
        optimizer.load_state_dict(saved)
    before = param.detach().clone()
    optimizer.step()
    assert not torch.equal(param, before)


def test_the_first_step_under_inference_mode() -> None:
    param = Parameter(torch.ones(32, 48))
    optimizer = ours([param])
    param.grad = torch.ones_like(param)
    with torch.inference_mode():
        optimizer.step()
    optimizer.step()
    assert float(optimizer.state[param]["step"]) == 2


@pytest.mark.parametrize("offloaded", [False, True])
def test_setstate_changes_what_it_names_and_no_more(offloaded: bool) -> None:
    param = Parameter(torch.ones(8, 64, dtype=torch.bfloat16))
    options = {"write": "stochastic", "max_grad_norm": 1.0, "skip_nonfinite": True}
    optimizer = ours([param], backend="eager", **options)
    if offloaded:
        offload(optimizer)
    session, how = optimizer.executor, optimizer.offloaded
    param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.step()
    optimizer.__setstate__({"state": defaultdict(dict)})
    optimizer.step()
    assert float(optimizer.state[param]["step"]) == 1
    for name, value in {
        **options,
        "backend": "eager",
        "executor": session,
        "offloaded": how,
    }.items():
        assert getattr(optimizer, name) is value


def test_checkpoints_from_before_the_order_was_an_entry() -> None:
    """They have it in their groups, by number, where codes share bytes."""
    formats = {"exp_avg": "int4(block_size=64)", "exp_avg_sq": "minifloat"}
    shape = (8, 6, 3, 5)
    source = Parameter(torch.ones(shape).to(memory_format=torch.channels_last))
    before = ours([source], formats)
    source.grad = gradient(shape, 0)
    before.step()
    saved = copy.deepcopy(before.state_dict())
    del saved["state"][0]["dim_order"]
    saved["param_groups"][0]["orders"] = {0: [0, 2, 3, 1]}
    optimizer = ours([Parameter(source.detach().clone())], formats)
    optimizer.load_state_dict(saved)
    (param,) = optimizer.param_groups[0]["params"]
    got, wanted = decode_state(optimizer, param), decode_state(before, source)
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)
    assert "orders" not in optimizer.param_groups[0]

"""Moments in other formats than an optimizer's own: by name, for all groups or one."""

import copy
import pickle

import pytest
import torch
from torch.nn import Parameter

import lowbit_adam
from lowbit_adam import Adam4bit, AdamW4bit, AdamW8bit
from optstate_codecs import FP32, Adam, CodedOptimizer, Minifloat, decode_state, state_bytes
from optstate_codecs.testing import Trainer, assert_close

CLASSES = [getattr(lowbit_adam, name) for name in lowbit_adam.__all__ if name.startswith("Adam")]
RANK1 = "linear4(normalization=rank1)"


def matrix() -> Parameter:
    return Parameter(torch.ones(32, 48))


@pytest.mark.parametrize("optimizer_class", CLASSES)
def test_named_moments_replace_the_default(optimizer_class) -> None:
    """With fp32 for both, bit for bit what exact Adam does."""
    formats = {"exp_avg": "fp32", "exp_avg_sq": FP32()}
    named = Trainer(lambda p: optimizer_class(p, lr=0.1, weight_decay=0.1, formats=formats))
    theirs = torch.optim.AdamW if "W" in optimizer_class.__name__ else torch.optim.Adam
    exact = Trainer(lambda p: theirs(p, lr=0.1, weight_decay=0.1))
    ours, expected = named.run(10).tensors(), exact.run(10).tensors()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in ours.items())


@pytest.mark.parametrize("optimizer_class", CLASSES)
def test_the_others_stay_as_they_were(optimizer_class) -> None:
    default = optimizer_class([matrix()])
    first = default.group_formats(default.param_groups[0])["exp_avg"]
    optimizer = optimizer_class([matrix()], formats={"exp_avg_sq": RANK1}, amsgrad=True)
    found = optimizer.group_formats(optimizer.param_groups[0])
    assert list(found) == ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
    assert found["exp_avg"] == first
    assert found["exp_avg_sq"].spec == found["max_exp_avg_sq"].spec == RANK1
    optimizer = optimizer_class([matrix()], formats={"max_exp_avg_sq": "bf16"}, amsgrad=True)
    found = optimizer.group_formats(optimizer.param_groups[0])
    assert found.pop("max_exp_avg_sq").spec == "bf16"
    assert found == default.group_formats(default.param_groups[0])


def test_groups_have_their_own() -> None:
    params = [matrix(), matrix(), matrix()]
    groups = [
        {"params": params[:1]},
        {"params": params[1:2], "formats": {"exp_avg_sq": Minifloat.second_moment8(64)}},
        {"params": params[2:], "formats": {}},
    ]
    optimizer = AdamW4bit(groups, formats={"exp_avg": "bf16", "exp_avg_sq": RANK1})
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    beside = ("step", "dim_order")
    sizes = [
        sum(v.numel() * v.element_size() for k, v in optimizer.state[p].items() if k not in beside)
        for p in params
    ]
    n = 32 * 48
    int4, minifloat4, minifloat8 = n // 2 + 2 * n // 128, n // 2 + 2 * n // 128, n + 4 * n // 64
    assert sizes == [2 * n + n // 2 + 4 * (32 + 48), int4 + minifloat8, int4 + minifloat4]


def test_a_checkpoint_does_not_say_how_to_store() -> None:
    first, second = matrix(), matrix()
    source = AdamW4bit([first], formats={"exp_avg_sq": RANK1})
    for step in range(3):
        first.grad = torch.randn(32, 48, generator=torch.Generator().manual_seed(step))
        source.step()
    saved = source.state_dict()
    assert saved["param_groups"][0]["formats"]["exp_avg_sq"] == RANK1
    assert saved["param_groups"][0]["formats"]["exp_avg"].startswith("int4(")
    assert source.param_groups[0]["formats"] == {"exp_avg_sq": RANK1}

    same = AdamW4bit([second], formats={"exp_avg_sq": RANK1})
    same.load_state_dict(copy.deepcopy(saved))
    assert all(torch.equal(v, source.state[first][k]) for k, v in same.state[second].items())
    plain = AdamW4bit([second])
    plain.load_state_dict(copy.deepcopy(saved))
    assert plain.param_groups[0]["formats"] == {}
    assert plain.group_formats(plain.param_groups[0])["exp_avg_sq"].name == "minifloat"
    expected = decode_state(source, first)["exp_avg_sq"]
    assert_close("second moment", expected, decode_state(plain, second)["exp_avg_sq"], 0.2)
    same.load_state_dict(plain.state_dict())
    assert same.param_groups[0]["formats"] == {"exp_avg_sq": RANK1}
    exact = torch.optim.AdamW([second])
    exact.load_state_dict(source.full_state_dict())
    assert "formats" not in exact.param_groups[0]
    same.load_state_dict(exact.state_dict())
    assert torch.equal(decode_state(same, second)["exp_avg_sq"], expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_keep_them(copied) -> None:
    optimizer = Adam4bit([matrix()], formats={"exp_avg_sq": RANK1})
    twin = copied(optimizer)
    for each in (optimizer, twin):
        each.param_groups[0]["params"][0].grad = torch.ones(32, 48)
        each.step()
    assert state_bytes(twin) == state_bytes(optimizer)
    assert twin.group_formats(twin.param_groups[0])["exp_avg_sq"].spec == RANK1


BAD = [
    ({"exp_avg_sqr": "bf16"}, ValueError, r"formats\['exp_avg_sqr'\]: unknown moment, must be one"),
    ({"exp_avg": "int3"}, ValueError, "format='int3': must be one of"),
    ({"exp_avg": "int8(block=3)"}, ValueError, "option 'block' must be one of block_size"),
    ({"exp_avg_sq": "int8"}, ValueError, r"formats\['exp_avg_sq'\]='int8': rounds small second"),
    ({"exp_avg": "linear4"}, ValueError, r"formats\['exp_avg'\]='linear4': holds no negative"),
    ({"exp_avg": 8}, TypeError, "format=8: must be a Format or its text, got int"),
    ("fp32", TypeError, "formats='fp32': must map names of moments to formats, got str"),
]


@pytest.mark.parametrize(("formats", "error", "words"), BAD)
def test_what_is_refused_changes_nothing(formats, error, words) -> None:
    with pytest.raises(error, match=words):
        AdamW8bit([matrix()], formats=formats)
    optimizer = AdamW8bit([matrix()])
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=words):
        optimizer.add_param_group({"params": [matrix()], "formats": formats})
    assert optimizer.state_dict() == before


def test_it_is_the_base_optimizer_with_these_formats() -> None:
    formats = {"exp_avg": "dynamic8(block_size=64)", "exp_avg_sq": RANK1}
    ours = Trainer(lambda p: Adam4bit(p, formats=formats)).run(6).tensors()
    base = Trainer(lambda p: CodedOptimizer(p, Adam(), formats)).run(6).tensors()
    assert all(torch.equal(value, base[key]) for key, value in ours.items())

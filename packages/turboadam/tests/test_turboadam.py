"""TurboAdam's arguments, documented bytes, and checkpoints."""

import copy
import inspect

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import Parameter

from optstate_codecs import decode_state, memory_report, predicted_state_bytes, state_bytes
from optstate_codecs.testing import Trainer, assert_close
from turboadam import TurboAdam

M_BITS, V_BITS = (1, 2, 3, 4, 6), (2, 3, 4, 6, 8)
ADAMW = {"mode": "adamw"}
GPT2 = [(50257, 768), (1024, 768), (768,), (768,)] + 12 * [
    *[(768,), (768,), (768, 2304), (2304,), (768, 768), (768,)],
    *[(768,), (768,), (768, 3072), (3072,), (3072, 768), (768,)],
]


def stepped(shape, steps: int = 1, dtype=torch.float32, **options):
    noise = torch.Generator().manual_seed(0)
    param = Parameter(torch.randn(shape, generator=noise).to(dtype))
    optimizer = TurboAdam([param], **options)
    for _ in range(steps):
        param.grad = torch.randn(shape, generator=noise).to(dtype)
        optimizer.step()
    return param, optimizer


def unmade(*shapes, **options) -> TurboAdam:
    """An optimizer of tensors that take no memory."""
    return TurboAdam([Parameter(torch.empty(s, device="meta")) for s in shapes], **options)


def test_arguments_by_position_are_those_that_users_know() -> None:
    known = list(inspect.signature(TurboAdam).parameters.values())
    by_position = {p.name: p.default for p in known if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert list(by_position.items())[1:] == [
        ("lr", 1e-3),
        ("betas", (0.9, 0.999)),
        ("eps", 1e-8),
        ("weight_decay", 0.0),
        ("block_size", None),
        ("v_bits", None),
        ("compress_m", True),
        ("compress_v", True),
        ("null_pct", 0.0),
        ("amp_pct", None),
        ("error_feedback", None),
        ("capturable", False),
        ("min_m_compress_elements", 4096),
    ]


@pytest.mark.parametrize("switches", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("v_bits", V_BITS)
@pytest.mark.parametrize("m_bits", M_BITS)
def test_bits_per_parameter(m_bits: int, v_bits: int, switches) -> None:
    compress_m, compress_v = switches
    options = {"m_bits": m_bits, "v_bits": v_bits, "block_size": 64}
    optimizer = unmade((4096, 4096), compress_m=compress_m, compress_v=compress_v, **options)
    bits = (m_bits + 16 / 64 if compress_m else 32) + (v_bits + 16 / 64 if compress_v else 32)
    # the step count, and the order of dimensions that blocks follow
    assert predicted_state_bytes(optimizer) == bits * 4096**2 / 8 + 4 + 8 * any(switches)


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ({}, 5.5),
        ({"m_bits": 1}, 4.5),
        ({"block_size": 128}, 5.25),
        (ADAMW, 7.25),
        ({**ADAMW, "m_bits": 1}, 4.25),
        ({**ADAMW, "m_bits": 2}, 5.25),
    ],
)
def test_default_and_smallest_are_stored_in_what_is_said(options, bits: float) -> None:
    _, optimizer = stepped((4096, 4096), **options)
    assert memory_report(optimizer).state_bytes == bits * 4096**2 / 8 + 4 + 8


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (2, 3, 64, True)),
        ({"mode": "feedback"}, (2, 3, 64, True)),
        (ADAMW, (4, 3, 128, False)),
        ({"m_bits": 4, "error_feedback": False, "block_size": 128}, (4, 3, 128, False)),
        ({**ADAMW, "m_bits": 2, "error_feedback": True, "block_size": 64}, (2, 3, 64, True)),
        ({"v_bits": 8}, (2, 8, 64, True)),
        # nothing is rounded off, so there is nothing to feed back
        ({"compress_m": False}, (2, 3, 64, False)),
    ],
)
def test_arguments_win_over_the_mode(options, expected) -> None:
    optimizer = unmade((5000,), **options)
    for group in (optimizer.defaults, optimizer.param_groups[0]):
        assert "mode" not in group
        found = (group["m_bits"], group["v_bits"], group["block_size"])
        assert (*found, optimizer.rule.error_feedback) == expected


def test_the_mode_is_its_arguments() -> None:
    """Steps and checkpoints are those of the same arguments given one by one."""
    spelled = {"m_bits": 2, "v_bits": 3, "block_size": 64, "error_feedback": True}
    conservative = {"m_bits": 4, "v_bits": 3, "block_size": 128, "error_feedback": False}
    for mode, options in (("feedback", spelled), ("adamw", conservative)):
        param, optimizer = stepped((5000,), 3, mode=mode)
        other, explicit = stepped((5000,), 3, **options)
        assert torch.equal(param, other)
        found, expected = optimizer.state_dict(), explicit.state_dict()
        assert found["param_groups"] == expected["param_groups"]
        assert all(torch.equal(v, found["state"][0][k]) for k, v in expected["state"][0].items())


@pytest.mark.parametrize(("saved", "loaded"), [("adamw", "feedback"), ("feedback", "adamw")])
def test_checkpoints_of_the_other_mode_are_encoded_anew(saved: str, loaded: str) -> None:
    """What loads one keeps its own mode, and goes on as from the same moments in float32."""
    param, optimizer = stepped((5000,), 5, mode=saved)
    others = [Parameter(param.detach().clone()) for _ in range(2)]
    packed, full = (TurboAdam([p], mode=loaded) for p in others)
    packed.load_state_dict(optimizer.state_dict())
    full.load_state_dict(optimizer.full_state_dict())
    fresh = unmade((5000,), mode=loaded)
    assert {**packed.param_groups[0], "params": []} == {**fresh.param_groups[0], "params": []}
    assert packed.rule == fresh.rule
    bits = {"feedback": 5.5, "adamw": 7.25}[loaded]
    assert state_bytes(packed) == predicted_state_bytes(packed)
    assert state_bytes(packed) == pytest.approx(bits * 5000 / 8, rel=0.01)
    expected, found = decode_state(optimizer, param), decode_state(packed, others[0])
    assert found["step"] == 5
    error = {"feedback": 0.4, "adamw": 0.15}[loaded]
    assert_close("first moment", expected["exp_avg"], found["exp_avg"], error)
    assert_close("second moment", expected["exp_avg_sq"], found["exp_avg_sq"], 0.5)
    for step in range(2):
        for p, o in zip(others, (packed, full), strict=True):
            p.grad = torch.randn(5000, generator=torch.Generator().manual_seed(step))
            o.step()
    assert torch.equal(*others)


def test_odd_sizes_end_with_a_group_and_a_block() -> None:
    _, optimizer = stepped((4099,), m_bits=3, v_bits=2, block_size=128)
    blocks = -(-4099 // 128)
    assert state_bytes(optimizer) == 3 * 513 + 1025 + 2 * 2 * blocks + 4
    _, optimizer = stepped((9, 3), m_bits=6, min_m_compress_elements=0)
    assert state_bytes(optimizer) == 3 * 7 + 2 + 4 * 27 + 4 + 8


@pytest.mark.parametrize(
    ("options", "bits"), [({}, 5.5), (ADAMW, 7.25), ({**ADAMW, "m_bits": 1, "v_bits": 2}, 3.25)]
)
def test_gpt2_as_a_whole(options, bits: float) -> None:
    """Vectors stay in float32 and are a thousandth of it."""
    total = predicted_state_bytes(unmade(*GPT2, **options))
    sizes = [torch.Size(shape).numel() for shape in GPT2]
    coded = sum(n for n in sizes if n >= 4096)
    assert sum(sizes) == 124_439_808
    matrices = sum(len(shape) > 1 for shape in GPT2)
    beside = 4 * len(sizes) + 8 * matrices
    assert total == coded * bits / 8 + 8 * (sum(sizes) - coded) + beside
    assert 8 * total / sum(sizes) < bits + 0.06


def test_what_is_small_stays_in_float32() -> None:
    sizes = {"min_m_compress_elements": 100, "min_v_compress_elements": 200}
    for numel, coded in ((99, []), (100, ["exp_avg"]), (200, ["exp_avg", "exp_avg_sq"])):
        param, optimizer = stepped((numel,), **sizes, **ADAMW)
        found = optimizer.state[param]
        assert {k.removesuffix("_codes") for k in found if k.endswith("_codes")} == set(coded)
        assert state_bytes(optimizer) == predicted_state_bytes(optimizer)


def test_small_tensors_step_as_torchs_do() -> None:
    param, _ = stepped((4095,), 20, weight_decay=0.1, backend="eager")
    noise = torch.Generator().manual_seed(0)
    exact = Parameter(torch.randn(4095, generator=noise))
    reference = torch.optim.AdamW([exact], weight_decay=0.1)
    for _ in range(20):
        exact.grad = torch.randn(4095, generator=noise)
        reference.step()
    assert torch.equal(param, exact)


def test_settings_of_groups() -> None:
    groups = [
        {"block_size": 64, "m_bits": 6, "v_bits": 8},
        {"compress_m": False, "v_bits": 2},
        {"compress_v": False, "m_bits": 4, "amp_pct": 0.7, "null_pct": 0.2},
        {"min_m_compress_elements": 6000},
        {},
    ]
    params = [Parameter(torch.ones(5120)) for _ in groups]
    named = [{"params": [p], **group} for p, group in zip(params, groups, strict=True)]
    optimizer = TurboAdam(named, m_bits=2, block_size=128, min_v_compress_elements=0)
    for step in range(2):
        for param in params:
            param.grad = torch.randn(5120, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    bits = [14.5, 32 + 2.125, 4.125 + 32, 32 + 3.125, 5.25]
    for param, expected in zip(params, bits, strict=True):
        stored = [v for k, v in optimizer.state[param].items() if k != "step"]
        assert sum(v.numel() * v.element_size() for v in stored) == expected * 5120 / 8
    chosen = optimizer.group_formats(optimizer.param_groups[2])["exp_avg"]
    assert (chosen.amp_pct, chosen.null_pct) == (0.7, 0.2)


FED_BACK = {"error_feedback": True}


@pytest.mark.parametrize(
    ("options", "levels"),
    [
        ({}, "normal"),
        (ADAMW, "even"),
        ({"m_rounding": "nearest"}, "normal"),
        *((({**FED_BACK, "m_bits": bits}), "normal") for bits in (1, 2, 3, 4)),
        ({**ADAMW, **FED_BACK}, "normal"),
        # settings that only even levels have
        ({**FED_BACK, "m_bits": 6}, "even"),
        ({**FED_BACK, "amp_pct": 0.8}, "even"),
        ({"m_bits": 4, "null_pct": 0.1}, "even"),
        ({**FED_BACK, "m_rounding": "stochastic"}, "even"),
    ],
)
def test_error_feedback_selects_the_levels(options: dict, levels: str) -> None:
    _, optimizer = stepped((5000,), **options)
    assert optimizer.group_formats(optimizer.param_groups[0])["exp_avg"].levels == levels


def test_checkpoints_of_other_levels_are_encoded_anew() -> None:
    """Those of error feedback with stochastic rounding, too: the default was another once."""
    param, optimizer = stepped((5000,), 5, error_feedback=True, m_rounding="stochastic")
    other = TurboAdam([param], error_feedback=True)
    other.load_state_dict(optimizer.state_dict())
    assert "m_rounding" not in optimizer.param_groups[0]
    assert other.param_groups[0]["m_rounding"] is None
    expected, found = (decode_state(o, param)["exp_avg"] for o in (optimizer, other))
    assert not torch.equal(expected, found)
    assert_close("first moment", expected, found, 0.3)
    param.grad = torch.ones(5000)
    other.step()


def test_flattened_checkpoints_of_other_levels_are_refused() -> None:
    """Flattening drops the formats, and codes have the same size."""
    module = torch.nn.Linear(80, 80, bias=False)
    options = StateDictOptions(flatten_optimizer_state_dict=True)

    def optimizer(**given) -> TurboAdam:
        optimizer = TurboAdam(module.parameters(), **given)
        module.weight.grad = torch.ones(80, 80)
        optimizer.step()
        return optimizer

    nearest, stochastic = optimizer(), optimizer(error_feedback=False)
    for ours, theirs in ((nearest, stochastic), (stochastic, nearest)):
        saved = get_optimizer_state_dict(module, theirs, options=options)
        with pytest.raises((KeyError, ValueError), match=r"m_rounding|exp_avg_\w*codes"):
            set_optimizer_state_dict(module, ours, saved, options=options)


def test_null_is_zero_and_a_share_of_what_there_is() -> None:
    shares = []
    for null_pct in (0.0, 0.3):
        options = {"m_bits": 6, "null_pct": null_pct, "compress_v": False, "betas": (0.0, 0.999)}
        options |= ADAMW
        param, optimizer = stepped((1 << 16,), **options)
        # with one step u is the gradient's sign; this one has a second moment of ones
        state = optimizer.state_dict()
        full = optimizer.full_state_dict()["state"][0]
        normal = torch.randn(1 << 16, generator=torch.Generator().manual_seed(3))
        state = optimizer.full_state_dict()
        state["state"][0] = {**full, "exp_avg": normal, "exp_avg_sq": torch.ones(1 << 16)}
        optimizer.load_state_dict(state)
        decoded = decode_state(optimizer, param)["exp_avg"]
        shares.append(float((decoded == 0).float().mean()))
    assert shares[0] < 0.1
    assert shares[1] == pytest.approx(0.3, abs=0.03)


def test_checkpoints_are_encoded_anew() -> None:
    """What is saved says how it was stored; what loads it keeps its own way."""
    param, optimizer = stepped((5000,), 5, m_bits=6, v_bits=8, block_size=64)
    saved = optimizer.state_dict()
    other = TurboAdam([param], min_m_compress_elements=5001, v_bits=6, mode="adamw")
    other.load_state_dict(copy.deepcopy(saved))
    group = other.param_groups[0]
    assert (group["m_bits"], group["v_bits"], group["block_size"]) == (4, 6, 128)
    assert group["min_m_compress_elements"] == 5001
    assert state_bytes(other) == predicted_state_bytes(other) == 5000 * 38 / 8 + 2 * 40 + 4
    expected, found = decode_state(optimizer, param), decode_state(other, param)
    assert torch.equal(found["exp_avg"], expected["exp_avg"])
    assert_close("second moment", expected["exp_avg_sq"], found["exp_avg_sq"], 0.1)
    optimizer.load_state_dict(other.state_dict())
    assert decode_state(optimizer, param)["step"] == 5
    saved["param_groups"][0]["formats"]["exp_avg"] = "costate(bits=2)"
    with pytest.raises(ValueError, match="size mismatch: shape"):
        other.load_state_dict(saved)


def test_from_torch_and_back() -> None:
    param = Parameter(torch.linspace(-1, 1, 5000))
    exact = torch.optim.AdamW([param])
    for step in range(5):
        param.grad = torch.randn(5000, generator=torch.Generator().manual_seed(step))
        exact.step()
    ours = TurboAdam([param], m_bits=6, v_bits=8, mode="adamw")
    ours.load_state_dict(exact.state_dict())
    ours.step()
    back = torch.optim.AdamW([param])
    back.load_state_dict(ours.full_state_dict())
    assert not set(TurboAdam.storage_options) & set(back.param_groups[0])
    expected = exact.state[param]["exp_avg"] * 0.9 + param.grad * 0.1
    assert_close("first moment", expected, back.state[param]["exp_avg"], 0.1)
    back.step()


def test_amsgrad_adds_one_second_moment() -> None:
    param, optimizer = stepped((4096,), amsgrad=True)
    assert state_bytes(optimizer) == 4096 * (5.5 + 3.25) / 8 + 4
    assert decode_state(optimizer, param)["max_exp_avg_sq"].shape == (4096,)


@pytest.mark.parametrize("flags", [{"capturable": True}, {"fused": True}, {"foreach": False}])
def test_flags_change_no_number(flags) -> None:
    plain = Trainer(lambda p: TurboAdam(p, lr=0.1)).run(6).tensors()
    flagged = Trainer(lambda p: TurboAdam(p, lr=0.1, **flags)).run(6).tensors()
    assert all(torch.equal(value, flagged[key]) for key, value in plain.items())


def test_bfloat16_keeps_small_steps() -> None:
    """One hundred steps of 1e-4, each far below the precision of 1.0 in bfloat16."""
    moved = {}
    for name, option in {"plain": {}, "stochastic": {"bf16_stochastic_round": True}}.items():
        param = Parameter(torch.ones(20000, dtype=torch.bfloat16))
        optimizer = TurboAdam([param], lr=1e-4, **option)
        for _ in range(100):
            param.grad = torch.ones_like(param)
            optimizer.step()
        moved[name] = 1 - float(param.detach().float().mean())
    assert moved["plain"] == 0
    assert abs(moved["stochastic"] - 0.01) < 1e-3


BAD = [
    ({"v_bits": 5}, ValueError, "v_bits=5: must be one of 2, 3, 4, 6, 8"),
    ({"v_bits": 4.0}, TypeError, "v_bits=4.0: must be an int"),
    ({"m_bits": 7}, ValueError, "m_bits=7: must be one of 1, 2, 3, 4, 6"),
    ({"m_bits": True}, TypeError, "m_bits=True: must be an int"),
    ({"block_size": 100}, ValueError, "block_size=100: must be a power of two"),
    ({"compress_m": 1}, TypeError, "compress_m=1: must be True or False"),
    ({"compress_v": None}, TypeError, "compress_v=None: must be True or False"),
    ({"null_pct": 1.0}, ValueError, "null_pct=1.0: must be"),
    ({"null_pct": "few"}, TypeError, "null_pct='few': must be a number"),
    ({"null_pct": 0.1, "m_bits": 2}, ValueError, "null_pct=0.1: must be 0 with m_bits=2"),
    ({"amp_pct": 0.0}, ValueError, "amp_pct=0.0: must be"),
    ({"amp_pct": 1.5, "compress_m": False}, ValueError, "amp_pct=1.5: must be"),
    ({"amp_pct": 0.9, "m_bits": 1}, ValueError, "amp_pct=0.9: must be None with m_bits=1"),
    ({"m_rounding": "up"}, ValueError, "m_rounding='up': must be one of 'stochastic', 'nearest'"),
    (
        {"m_rounding": "nearest", "m_bits": 6},
        ValueError,
        "m_rounding='nearest': must be None or 'stochastic' with m_bits=6",
    ),
    (
        {"m_rounding": "nearest", "amp_pct": 0.7},
        ValueError,
        "m_rounding='nearest': must be None or 'stochastic' with amp_pct=0.7",
    ),
    ({"min_m_compress_elements": -1}, ValueError, "min_m_compress_elements=-1: must be from 0"),
    ({"min_v_compress_elements": 0.5}, TypeError, "min_v_compress_elements=0.5: must be an int"),
    ({"master_weight_bits": 16}, ValueError, "master_weight_bits=16: must be None, 24 or 32"),
    ({"betas": (0.9, 2)}, ValueError, r"betas\[1\]=2"),
    ({"nesterov": True}, TypeError, "nesterov: unknown argument"),
]
BAD_IN_GROUPS = [
    ({"mode": "adamw"}, ValueError, "mode='adamw': must be an argument of the optimizer"),
    ({"error_feedback": False}, ValueError, "error_feedback=False: must be an argument of the"),
]
BAD_AT_ONCE = [
    ({"mode": "lion"}, ValueError, "mode='lion': must be one of 'feedback', 'adamw'"),
    ({"mode": None}, ValueError, "mode=None: must be one of 'feedback', 'adamw'"),
    ({"error_feedback": 1}, TypeError, "error_feedback=1: must be True or False"),
    (
        {"error_feedback": True, "compress_m": False},
        ValueError,
        "error_feedback=True: must be False with compress_m=False",
    ),
    ({"bf16_stochastic_round": 1}, TypeError, "bf16_stochastic_round=1: must be True"),
    ({"formats": {"exp_avg": "fp32"}}, TypeError, "formats"),
]


@pytest.mark.parametrize(("options", "error", "words"), BAD + BAD_AT_ONCE)
def test_bad_arguments(options, error, words) -> None:
    with pytest.raises(error, match=words):
        TurboAdam([Parameter(torch.ones(3))], **options)


@pytest.mark.parametrize(("options", "error", "words"), BAD[:17] + BAD_IN_GROUPS)
def test_bad_groups_change_nothing(options, error, words) -> None:
    optimizer = TurboAdam([Parameter(torch.ones(3))])
    with pytest.raises(error, match=words):
        optimizer.add_param_group({"params": [Parameter(torch.ones(3))], **options})
    assert len(optimizer.param_groups) == 1

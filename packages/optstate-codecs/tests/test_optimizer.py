"""CodedOptimizer: what torch and its users expect of an optimizer."""

import copy

import pytest
import torch
from subjects import EXACT, SECOND
from torch.nn import Parameter

from optstate_codecs import Adam, CodedOptimizer, Dynamic8, decode_state
from optstate_codecs.parameters import check_grad

CODED = {"exp_avg": "dynamic8", "exp_avg_sq": SECOND}


def make(params, formats=CODED, **options):
    return CodedOptimizer(params, Adam(), formats, **options)


def a_param(numel: int = 40) -> Parameter:
    param = Parameter(torch.ones(numel))
    param.grad = torch.linspace(-1, 1, numel)
    return param


def test_closure_runs_once_with_gradients_on() -> None:
    param = Parameter(torch.ones(5))
    optimizer, calls = make([param]), []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 5.0
    assert calls == [True]
    assert not torch.equal(param, torch.ones(5))


def test_hooks_fire_once() -> None:
    optimizer, seen = make([a_param(), a_param()]), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.step()
    assert seen == ["before", "after"]


def test_named_parameters_keep_their_names() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = make(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


def test_groups_have_their_own_formats_and_rates() -> None:
    first, second = a_param(), a_param()
    groups = [{"params": [first], "lr": 0.0}, {"params": [second], "formats": EXACT}]
    optimizer = make(groups, lr=0.1)
    optimizer.step()
    assert "exp_avg_codes" in optimizer.state[first]
    assert "exp_avg" in optimizer.state[second]
    assert torch.equal(first, torch.ones(40))
    assert not torch.equal(second, torch.ones(40))


@pytest.mark.parametrize("value", [0.1, torch.tensor(0.1), torch.tensor([0.1])])
def test_lr_may_be_a_number_or_a_tensor(value) -> None:
    params = [a_param(), a_param()]
    make([params[0]], lr=0.1).step()
    make([params[1]], lr=value).step()
    torch.testing.assert_close(params[0], params[1], rtol=1e-6, atol=1e-7)


def test_a_filled_tensor_lr_takes_effect() -> None:
    param, lr = a_param(), torch.tensor(0.1)
    optimizer = make([param], lr=lr)
    lr.fill_(0.0)
    optimizer.step()
    assert torch.equal(param, torch.ones(40))


def test_zero_lr_and_zero_gradients_make_state_and_change_nothing() -> None:
    """torch.distributed.checkpoint initialises state with such a step."""
    for dtype in (torch.float32, torch.bfloat16):
        param = Parameter(torch.randn(100, generator=torch.Generator().manual_seed(0)).to(dtype))
        before = param.detach().clone()
        param.grad = torch.zeros_like(param)
        optimizer = make([param], lr=0.0, weight_decay=0.1, write="stochastic")
        optimizer.step()
        assert torch.equal(param, before)
        assert set(optimizer.state[param]) > {"step", "exp_avg_codes"}


def test_fused_honours_the_scaler() -> None:
    """With fused=True GradScaler leaves unscaling and skipping to the step."""
    plain, scaled = a_param(), a_param()
    make([plain]).step()
    optimizer = make([scaled], fused=True)
    assert optimizer._step_supports_amp_scaling
    scaled.grad = scaled.grad * 1024
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(scaled, torch.ones(40))
    assert float(optimizer.state[scaled]["step"]) == 0
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert torch.equal(scaled, plain)


def test_grad_scaler_skips_without_fused() -> None:
    param = a_param()
    optimizer = make([param])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    param.grad = torch.full((40,), float("inf"))
    scaler.step(optimizer)
    assert torch.equal(param, torch.ones(40))


def test_decode_state_tracks_exact_adam() -> None:
    ours, exact = a_param(), a_param()
    optimizer, reference = make([ours]), torch.optim.Adam([exact])
    assert decode_state(optimizer, ours) == {}
    for _ in range(3):
        optimizer.step()
        reference.step()
    decoded, expected = decode_state(optimizer, ours), reference.state[exact]
    assert float(decoded["step"]) == 3
    for key in ("exp_avg", "exp_avg_sq"):
        error = (decoded[key] - expected[key]).abs().max()
        assert float(error) < 0.05 * float(expected[key].abs().max())
    with pytest.raises(KeyError, match="not a parameter of this optimizer"):
        decode_state(optimizer, a_param())


def test_deepcopy_shares_nothing() -> None:
    param = a_param()
    optimizer = make([param])
    optimizer.step()
    copied = copy.deepcopy(optimizer)
    before = {k: v.clone() for k, v in copied.state[copied.param_groups[0]["params"][0]].items()}
    optimizer.step()
    after = copied.state[copied.param_groups[0]["params"][0]]
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"lr": -1}, ValueError, "lr=-1: must be finite and at least 0"),
        ({"lr": float("inf")}, ValueError, "lr=inf: must be finite"),
        ({"lr": "1e-3"}, TypeError, "lr='1e-3': must be a number, got str"),
        ({"lr": True}, TypeError, "lr=True: must be a number"),
        ({"lr": torch.ones(2)}, ValueError, "lr: must be a number or a one-element real tensor"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\]=1.0: must be in \[0, 1\)"),
        ({"betas": (-0.1, 0.9)}, ValueError, r"betas\[0\]=-0.1: must be in \[0, 1\)"),
        ({"betas": (0.9,)}, ValueError, r"betas=\(0.9,\): must be two numbers"),
        ({"eps": float("nan")}, ValueError, "eps=nan: must be finite"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay=-0.1"),
        ({"amsgrad": 1}, TypeError, "amsgrad=1: must be True or False"),
        ({"maximize": "yes"}, TypeError, "maximize='yes': must be True or False"),
        ({"rounding_seed": -1}, ValueError, "rounding_seed=-1: must be from 0"),
        ({"rounding_seed": 0.5}, TypeError, "rounding_seed=0.5: must be an int"),
        ({"write": "up"}, ValueError, "write='up': must be one of 'nearest', 'stochastic'"),
        ({"skip_nonfinite": None}, TypeError, "skip_nonfinite=None"),
        ({"max_grad_norm": 0}, ValueError, "max_grad_norm=0: must be finite and above 0"),
        ({"max_grad_norm": float("inf")}, ValueError, "max_grad_norm=inf: must be finite"),
        ({"max_grad_norm": "1"}, TypeError, "max_grad_norm='1': must be a number, got str"),
        ({"max_grad_norm": torch.ones(())}, TypeError, "max_grad_norm: must be a number, got"),
        (
            {"momentum": 0.9},
            TypeError,
            "momentum: unknown argument of CodedOptimizer; known are rule",
        ),
        ({"differentiable": True}, ValueError, "differentiable=True: not supported"),
        ({"formats": {"exp_avg": "fp32"}}, ValueError, "formats: needs one for 'exp_avg_sq'"),
        ({"amsgrad": True}, ValueError, "formats: needs one for 'max_exp_avg_sq'"),
        ({"formats": {"exp_avg": 8, "exp_avg_sq": 8}}, TypeError, "format=8: must be a Format"),
        (
            {"formats": {"exp_avg": "fp32", "exp_avg_sq": "int8"}},
            ValueError,
            r"formats\['exp_avg_sq'\]='int8': rounds small second moments to zero",
        ),
        (
            {"formats": {"exp_avg": "fp32", "exp_avg_sq": Dynamic8()}},
            ValueError,
            "use an unsigned format",
        ),
    ],
)
def test_bad_arguments(options, error, words) -> None:
    with pytest.raises(error, match=words):
        make([a_param()], **options)


def test_bad_parameters() -> None:
    for bad in (torch.zeros(3, dtype=torch.complex64), torch.zeros(3, dtype=torch.int32)):
        with pytest.raises(TypeError, match=r"params\[0\]: dtype .*must be one of float16"):
            make([bad])
    with pytest.raises(TypeError, match="rule=None: must be an instance of Rule"):
        CodedOptimizer([a_param()], None, CODED)
    with pytest.raises(ValueError, match="empty parameter list"):
        make([])


def test_a_refused_group_leaves_the_optimizer_as_it_was() -> None:
    optimizer = make([a_param()])
    with pytest.raises(ValueError, match="eps=-1"):
        optimizer.add_param_group({"params": [a_param()], "eps": -1})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [a_param()], "eps": 1})
    optimizer.step()


def test_bad_hyper_parameters_at_a_step_change_nothing() -> None:
    first, second = a_param(), a_param()
    optimizer = make([{"params": [first]}, {"params": [second]}])
    optimizer.param_groups[1]["lr"] = float("nan")
    with pytest.raises(ValueError, match="lr=nan"):
        optimizer.step()
    assert torch.equal(first, torch.ones(40))
    assert not optimizer.state


@pytest.mark.parametrize(
    ("grad", "error", "words"),
    [
        (torch.zeros(4).to_sparse(), TypeError, "layout torch.sparse_coo, must be dense"),
        (torch.zeros(4, dtype=torch.complex64), TypeError, "dtype torch.complex64, must be real"),
        (torch.zeros(4, device="meta"), ValueError, "on meta, must be on cpu"),
        (torch.zeros(5), ValueError, r"shape \(5,\), must be \(4,\)"),
    ],
)
def test_bad_gradients_are_named(grad, error, words) -> None:
    with pytest.raises(error, match=f"gradient of parameter 3: {words}"):
        check_grad(3, torch.zeros(4), grad)


def test_meta_parameters_give_the_state_that_real_ones_would() -> None:
    sizes = {}
    for device in ("meta", "cpu"):
        param = Parameter(torch.ones(61, 83, device=device))
        param.grad = torch.ones_like(param)
        optimizer = make([param])
        optimizer.step()
        sizes[device] = {k: (tuple(v.shape), v.dtype) for k, v in optimizer.state[param].items()}
    assert sizes["meta"] == sizes["cpu"]

"""The wrapper is an optimizer: groups, hooks, closures, the scaler, copies."""

import copy
import io
import pickle

import numpy
import pytest
import torch
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_pre_hook

from optstate_wrap import (
    AdaptiveWarmupPolicy,
    ConfigurablePolicy,
    CPUOffloadOptimizer,
    Int8MomentumCodec,
    OptimizerWrapper,
    WarmupPolicy,
    wrap,
)

EXACT = ConfigurablePolicy({})
CODED = ConfigurablePolicy({"exp_avg": "int8", "exp_avg_sq": "minifloat(rounding=stochastic)"})


def adamw(policy=EXACT, chunk_size=256, **options):
    return lambda groups: wrap(torch.optim.AdamW(groups, lr=1e-2, **options), policy, chunk_size)


def test_shares_what_the_inner_optimizer_has(problem) -> None:
    optimizer = problem(adamw()).optimizer
    inner = optimizer.inner
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.defaults is inner.defaults
    optimizer.add_param_group({"params": [Parameter(torch.ones(3))], "lr": 0.5})
    assert inner.param_groups[-1]["lr"] == 0.5
    with pytest.raises(ValueError, match="some parameters appear"):
        optimizer.add_param_group({"params": inner.param_groups[0]["params"]})
    assert len(optimizer.param_groups) == 3


def test_state_is_a_view(problem) -> None:
    run = problem(adamw(CODED))
    optimizer = run.optimizer
    assert not optimizer.state
    run.run(2)
    assert optimizer.state
    param = run.params[0]
    state = optimizer.state[param]
    assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert state["exp_avg"].shape == param.shape
    assert optimizer.state[param] is state
    assert optimizer.state[Parameter(torch.ones(2))] == {}
    del optimizer.state[param]
    assert param not in optimizer.state
    optimizer.state = {param: state}
    assert list(optimizer.state) == [param]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_decoded_state_has_the_dtype_the_optimizer_gave_it(problem, dtype) -> None:
    run = problem(adamw(CODED, eps=1e-4), dtype).run(4)
    for param in run.params:
        state = run.optimizer.state[param]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == dtype
        assert state["step"].dtype == torch.float32
        assert torch.isfinite(param).all()


def test_hooks_fire_once_wherever_they_were_registered(problem) -> None:
    run = problem(adamw())
    fired = []
    run.optimizer.inner.register_step_pre_hook(lambda *_: fired.append("inner pre"))
    run.optimizer.register_step_pre_hook(lambda *_: fired.append("pre"))
    run.optimizer.register_step_post_hook(lambda *_: fired.append("post"))
    handle = register_optimizer_step_pre_hook(lambda *_: fired.append("global"))
    try:
        run.run(2)
    finally:
        handle.remove()
    assert fired == ["global", "inner pre", "pre", "post"] * 2


def test_closure_is_called_once_with_gradients(problem, same) -> None:
    plain, ours = problem(adamw()).run(3), problem(adamw())
    for _ in range(3):
        calls = []

        def closure(calls=calls):
            assert torch.is_grad_enabled()
            calls.append(None)
            ours.set_gradients()
            return torch.tensor(2.5)

        with torch.no_grad():
            assert ours.optimizer.step(closure) == 2.5
        assert len(calls) == 1
    same(plain, ours)


def scaled_steps(run, found: list[bool]) -> None:
    """Steps as a loop with a scaler takes them; some gradients overflow."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    for overflow in found:
        run.set_gradients()
        for param in run.params:
            if param.grad is not None:
                param.grad.mul_(scaler.get_scale())
                if overflow and param.grad.numel():
                    param.grad.view(-1)[0] = float("inf")
        scaler.step(run.optimizer)
        scaler.update()


@pytest.mark.parametrize("fused", [False, True], ids=["scaler unscales", "fused"])
@pytest.mark.parametrize("policy", [EXACT, CODED], ids=["exact", "coded"])
def test_grad_scaler(problem, same, fused, policy) -> None:
    plain = problem(lambda groups: torch.optim.AdamW(groups, lr=1e-2, fused=fused))
    ours = problem(adamw(policy, fused=fused))
    assert getattr(ours.optimizer, "_step_supports_amp_scaling", False) == fused
    for run in (plain, ours):
        scaled_steps(run, [False, True, False, False])
    if policy is EXACT:
        same(plain, ours)
    before = ours.tensors()
    packed = copy.deepcopy(ours.optimizer.packed_state_dict())
    scaled_steps(ours, [True, True])
    for name, value in ours.tensors().items():
        assert torch.equal(value, before[name]), name
    parts = ours.optimizer.packed_state_dict()["state"]
    for number, state in packed["state"].items():
        codes = state["parts"][0].get("exp_avg", {})
        if isinstance(codes, dict) and codes:
            assert torch.equal(codes["parts"][0], parts[number]["parts"][0]["exp_avg"]["parts"][0])
    assert not hasattr(ours.optimizer.inner, "found_inf")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("policy", [EXACT, CODED], ids=["exact", "coded"])
def test_copies_go_on_equally(problem, same, policy, copied) -> None:
    run = problem(adamw(policy)).run(3)
    run.make = None  # a lambda, which does not pickle
    twin = copied(run)
    assert twin.optimizer.param_groups[0]["params"][0] is twin.params[0]
    run.run(3)
    same(run, twin.run(3))


def test_gradients_that_are_missing_leave_codes_alone(problem) -> None:
    run = problem(adamw(CODED)).run(2)
    before = run.optimizer.engine.store.records(run.params[0])
    run.set_gradients()
    run.params[0].grad = None
    run.optimizer.step()
    assert run.optimizer.engine.store.records(run.params[0])[0] is before[0]


def test_zero_grad_and_set_to_none(problem) -> None:
    run = problem(adamw()).run(1)
    before = run.tensors()
    run.optimizer.zero_grad()
    assert all(param.grad is None for param in run.params)
    run.optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in run.tensors().items())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chunk_size": 100}, "chunk_size=100: must be at least 256"),
        ({"chunk_size_on_cuda": 0}, "chunk_size_on_cuda=0"),
        ({"initial_chunk_size": 0}, "initial_chunk_size=0"),
        ({"store": "moon"}, "store='moon': must be one of"),
        ({"policy": "int8"}, "policy='int8'"),
        ({"rounding_seed": -1}, "rounding_seed=-1"),
        ({"strict": 1}, "strict=1"),
    ],
)
def test_bad_arguments_are_named(options, words) -> None:
    inner = torch.optim.AdamW([Parameter(torch.ones(3))])
    with pytest.raises((TypeError, ValueError), match=words.replace("(", r"\(")):
        wrap(inner, **options)


def test_a_wrapper_is_not_wrapped_again() -> None:
    inner = wrap(torch.optim.AdamW([Parameter(torch.ones(3))]))
    with pytest.raises(TypeError, match="not wrapped"):
        OptimizerWrapper(inner)


def test_default_policy_codes_momenta_after_warm_up(problem) -> None:
    policy = WarmupPolicy(2, momentum_key=("exp_avg", "momentum_buffer"), min_int8_elements=500)
    run = problem(
        lambda groups: wrap(torch.optim.SGD(groups, lr=0.1, momentum=0.9), policy),
        shapes=((900,), (8,)),
    )
    records = run.optimizer.engine.store.records
    run.run(2)
    assert isinstance(records(run.params[0])[0]["momentum_buffer"], torch.Tensor)
    run.run(1)
    assert records(run.params[0])[0]["momentum_buffer"].format == Int8MomentumCodec().stored
    assert isinstance(records(run.params[1])[0]["momentum_buffer"], torch.Tensor)


def test_sparse_gradients_of_split_tensors_are_refused(problem) -> None:
    ours = problem(
        lambda groups: wrap(torch.optim.SGD(groups, lr=0.1), EXACT, 256), shapes=((600,),)
    )
    ours.params[0].grad = torch.ones(600).to_sparse()
    with pytest.raises(RuntimeError, match="must be dense, or chunk_size at least 600"):
        ours.optimizer.step()


def test_numpy_numbers_are_kept_and_saved_as_plain_ones() -> None:
    param = Parameter(torch.ones(4, 4))
    inner = torch.optim.AdamW([param], lr=numpy.float64(0.125), weight_decay=numpy.float64(0.5))
    policy = WarmupPolicy(numpy.int64(1), min_int8_elements=numpy.int32(0))
    wrapped = wrap(inner, policy, chunk_size=numpy.int64(256), initial_chunk_size=numpy.uint8(1))
    param.grad = torch.ones(4, 4)
    wrapped.step()
    wrapped.step()
    saved = wrapped.packed_state_dict()
    assert type(saved["param_groups"][0]["lr"]) is float
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["param_groups"] == saved["param_groups"]
    assert (type(policy.warmup_steps), type(policy.min_int8_elements)) == (int, int)

    adaptive = AdaptiveWarmupPolicy(patience=numpy.int64(2), tol=numpy.float32(0.5))
    assert (type(adaptive.patience), adaptive.tol, type(adaptive.tol)) == (int, 0.5, float)
    with pytest.raises(ValueError, match="chunk_size=0: must be at least"):
        wrap(torch.optim.SGD([param]), chunk_size=numpy.int64(0))


def test_a_numpy_flag_asks_for_the_host() -> None:
    param = Parameter(torch.ones(4, 4))
    policy = WarmupPolicy(device_resident=numpy.bool_(False))
    assert wrap(torch.optim.SGD([param], momentum=0.5), policy).engine.store.name == "host"


def test_cpu_offload_takes_numpy_numbers() -> None:
    param = Parameter(torch.ones(4, 4))
    optimizer = CPUOffloadOptimizer(
        [param], minimal_size=numpy.int64(8), offload_gradients=numpy.bool_(False)
    )
    assert (type(optimizer.minimal_size), optimizer.offload_gradients) == (int, False)
    assert type(optimizer.offload_gradients) is bool


@pytest.mark.parametrize("fused", [True, False])
def test_a_second_moment_that_underflows_costs_its_block_nothing(fused) -> None:
    """In float16 a gradient of 1e-4 has a second moment of zero, beside a first that is not."""
    codecs = {
        "exp_avg": "dynamic8(block_size=256, units=update)",
        "exp_avg_sq": "dynamic8(block_size=256, signed=False, domain=sqrt)",
    }
    found = []
    for policy in (EXACT, ConfigurablePolicy(codecs)):
        param = Parameter(torch.zeros(256, dtype=torch.float16))
        inner = torch.optim.AdamW([param], lr=1e-2, eps=1e-3, weight_decay=0)
        optimizer = wrap(inner, policy, fused=fused)
        for _ in range(3):
            param.grad = torch.linspace(0.5, 1, 256).to(torch.float16)
            param.grad[7] = 1e-4
            optimizer.step()
        found.append((optimizer.state[param]["exp_avg"].float(), param.detach().float()))
    (exact, due), (coded, got) = found
    assert exact[7] != 0
    assert (coded - exact).norm() <= 0.02 * exact.norm()
    assert (got - due).norm() <= 0.02 * due.norm()

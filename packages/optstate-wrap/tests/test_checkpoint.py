"""State dicts both ways: plain and packed, strict, and resumed bit for bit."""

import copy
import io

import pytest
import torch
from torch.nn import Parameter

from optstate_wrap import AdaptiveWarmupPolicy, ConfigurablePolicy, WarmupPolicy, wrap

CODECS = {
    "exact": {},
    "int8": {"exp_avg": "int8", "exp_avg_sq": "fp32"},
    "fp16": {"exp_avg": "fp16", "exp_avg_sq": "bf16"},
    "4 bits": {
        "exp_avg": "int4(rounding=paired, units=update)",
        "exp_avg_sq": "minifloat(domain=sqrt, rounding=stochastic)",
    },
    "update units beside exact": {"exp_avg": "dynamic8(units=update)"},
    "oneq": {"exp_avg": "costate", "exp_avg_sq": "oneq(bits=3)"},
    "rank 1": {"exp_avg_sq": "linear4(normalization=rank1)"},
}


@pytest.fixture(params=CODECS)
def codecs(request):
    return CODECS[request.param]


def adamw(codecs, chunk_size=256, **options):
    policy = ConfigurablePolicy(codecs)
    return lambda groups: wrap(torch.optim.AdamW(groups, lr=1e-2), policy, chunk_size, **options)


def reloaded(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def twin_of(run, problem, make):
    twin = problem(make, run.dtype)
    for ours, theirs in zip(twin.params, run.params, strict=True):
        ours.data.copy_(theirs.data)
    twin.step = run.step
    return twin


@pytest.mark.parametrize("store", ["device", "host"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_resumes_bit_for_bit(problem, same, codecs, dtype, store) -> None:
    make = adamw(codecs, store=store)
    run = problem(make, dtype).run(4)
    saved = reloaded(run.optimizer.packed_state_dict())
    twin = twin_of(run, problem, make)
    twin.optimizer.load_state_dict(saved)
    run.run(3)  # what was loaded must not alias what it came from
    same(run, twin.run(3))


def test_packed_loads_into_another_cut(problem, codecs) -> None:
    run = problem(adamw(codecs)).run(4)
    twin = twin_of(run, problem, adamw(codecs, 1 << 20))
    twin.optimizer.load_state_dict(run.optimizer.packed_state_dict())
    for name, value in twin.tensors().items():
        before = run.tensors()[name]
        torch.testing.assert_close(value, before, rtol=0.6, atol=0.3 * float(before.abs().sum()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_plain_goes_both_ways(problem, same, configuration, dtype) -> None:
    cls, options, _ = configuration
    if options.get("fused"):
        pytest.skip("as without")
    make = lambda groups: cls(groups, lr=1e-2, **options)  # noqa: E731
    wrapped = lambda groups: wrap(make(groups), ConfigurablePolicy({}), 256)  # noqa: E731
    ours, plain = problem(wrapped, dtype).run(4), problem(make, dtype).run(4)
    into_plain, into_ours = twin_of(ours, problem, make), twin_of(plain, problem, wrapped)
    into_plain.optimizer.load_state_dict(reloaded(ours.optimizer.state_dict()))
    into_ours.optimizer.load_state_dict(reloaded(plain.optimizer.state_dict()))
    for run in (into_plain, into_ours, ours):
        run.run(3)
        for group in run.optimizer.param_groups:
            group.setdefault("decoupled_weight_decay", False)
    same(ours, into_ours)
    if dtype == torch.float32 or cls not in (torch.optim.ASGD, torch.optim.NAdam):
        # on loading, torch rounds what these keep in 0-d float32 tensors to bfloat16
        same(into_plain, into_ours)


@pytest.mark.parametrize("kind", ["state_dict", "packed_state_dict"])
def test_state_of_another_dtype_is_loaded_as_torch_loads_it(problem, same, kind, codecs) -> None:
    run = problem(adamw(codecs, fused=False)).run(4)
    ours, plain = (
        problem(make, torch.bfloat16)
        for make in (adamw({}, fused=False), lambda groups: torch.optim.AdamW(groups, lr=1e-2))
    )
    plain.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    ours.optimizer.load_state_dict(getattr(run.optimizer, kind)())
    for group in plain.optimizer.param_groups:
        group.setdefault("decoupled_weight_decay", False)
    same(plain.run(2), ours.run(2))


def test_coded_state_dict_loads_into_torch(problem, codecs) -> None:
    run = problem(adamw(codecs)).run(4)
    plain = twin_of(run, problem, lambda groups: torch.optim.AdamW(groups, lr=1e-2))
    plain.optimizer.load_state_dict(run.optimizer.state_dict())
    for name, value in run.tensors().items():
        assert torch.equal(value, plain.tensors()[name])
    plain.run(1)


def test_packed_is_as_small_as_the_state(problem) -> None:
    codecs = {"exp_avg": "int8", "exp_avg_sq": "oneq(bits=8)"}
    run = problem(adamw(codecs, 1 << 16), shapes=((512, 512),))
    run.run(2)
    file = io.BytesIO()
    torch.save(run.optimizer.packed_state_dict(), file)
    assert file.tell() < 2.1 * 512 * 512


def test_a_saved_dict_is_a_snapshot(problem) -> None:
    run = problem(adamw({"exp_avg": "int8"})).run(2)
    saved = {k: run.optimizer.__getattribute__(k)() for k in ("state_dict", "packed_state_dict")}
    before = copy.deepcopy(saved)
    run.run(2)
    for kind, value in saved.items():
        for number, state in value["state"].items():
            flat = state if kind == "state_dict" else state["parts"][0]
            old = before[kind]["state"][number]
            old = old if kind == "state_dict" else old["parts"][0]
            for key, tensor in flat.items():
                if torch.is_tensor(tensor):
                    assert torch.equal(tensor, old[key])


def test_progress_of_policies_is_saved(problem) -> None:
    def make(groups):
        return wrap(torch.optim.AdamW(groups), AdaptiveWarmupPolicy(50, patience=2), 256)

    run = problem(make).run(3)
    policy = run.optimizer.policy
    assert [policy.update_on_loss(loss) for loss in (1.0, 0.5, 0.5)] == [False] * 3
    for saved in (run.optimizer.state_dict(), run.optimizer.packed_state_dict()):
        twin = problem(make)
        twin.optimizer.load_state_dict(reloaded(saved))
        assert twin.optimizer.engine.encoder.steps == 3
        assert not twin.optimizer.policy.active
        assert twin.optimizer.policy.update_on_loss(0.5)


def test_warm_up_of_a_plain_checkpoint_is_over(problem) -> None:
    plain = problem(lambda groups: torch.optim.AdamW(groups)).run(7)
    ours = problem(lambda groups: wrap(torch.optim.AdamW(groups), WarmupPolicy(5)))
    ours.optimizer.load_state_dict(plain.optimizer.state_dict())
    assert ours.optimizer.engine.encoder.steps >= 5


def spoiled(spoil):
    def apply(saved):
        spoil(saved)
        return saved

    return apply


PLAIN_FAULTS = {
    "missing key 'state'": lambda s: s.pop("state"),
    "missing key 'param_groups'": lambda s: s.pop("param_groups"),
    "unknown parameter 99": lambda s: s["state"].update({99: {}}),
    "1 groups, must be 2": lambda s: s["param_groups"].pop(),
    "1 parameters, must be": lambda s: s["param_groups"][0].update(params=[0]),
    "missing key 'exp_avg'": lambda s: s["state"][0].pop("exp_avg"),
    "missing key 'exp_avg'; it has 'exp_avgs'": lambda s: s["state"][0].update(
        exp_avgs=s["state"][0].pop("exp_avg")
    ),
    "missing key 'exp_avg'; it has 'momentum_buffer'": lambda s: s["state"].update(
        {number: {"momentum_buffer": torch.ones(())} for number in s["state"]}
    ),
    r"\['exp_avg'\]: shape \(3,\)": lambda s: s["state"][6].update(exp_avg=torch.ones(3)),
}
PACKED_FAULTS = {
    "missing key 'parts'": lambda s: s["state"][0].pop("parts"),
    "missing key 'exp_avg'": lambda s: s["state"][0]["parts"][0].pop("exp_avg"),
    "missing key 'format'|must be": lambda s: s["state"][6]["parts"][0]["exp_avg"]["parts"].pop(),
    "a component of shape": lambda s: s["state"][6]["parts"][0]["exp_avg"]["parts"].__setitem__(
        0, torch.ones(3)
    ),
    "must be one of": lambda s: s["state"][6]["parts"][0]["exp_avg"].update(format="int99"),
    r"\['exp_avg'\]: shape \(256,\), must be \(16, 16\)": lambda s: s["state"][6]["parts"][0][
        "exp_avg"
    ].update(shape=[256], order=[0]),
    r"\['exp_avg_sq'\]: shape \(8, 32\), must be \(16, 16\)": lambda s: s["state"][6]["parts"][
        0
    ].update(exp_avg_sq=torch.ones(8, 32)),
    r"\['order'\]=\[0, 0\]: must have each of the 2 dimensions": lambda s: s["state"][0].update(
        order=[0, 0]
    ),
}


@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_what_does_not_fit_is_refused_by_name_and_changes_nothing(problem, same, kind) -> None:
    faults = PLAIN_FAULTS if kind == "plain" else PACKED_FAULTS
    run = problem(adamw({"exp_avg": "int8"})).run(3)
    other = problem(adamw({"exp_avg": "int8"})).run(4).optimizer
    other.param_groups[0]["lr"] = 0.5
    before = copy.deepcopy(run)
    for words, spoil in faults.items():
        saved = other.state_dict() if kind == "plain" else other.packed_state_dict()
        saved = copy.deepcopy(saved)
        spoil(saved)
        with pytest.raises((KeyError, ValueError), match=words):
            run.optimizer.load_state_dict(saved)
        same(before, run)
        assert run.optimizer.engine.encoder.steps == 3


def test_saving_after_zero_grad_changes_nothing(problem) -> None:
    run = problem(adamw({})).run(2)
    before = copy.deepcopy(run.optimizer.state_dict())
    run.optimizer.zero_grad()
    after = run.optimizer.state_dict()
    for number, state in before["state"].items():
        for key, value in state.items():
            assert torch.equal(value, after["state"][number][key])


def test_load_by_keyword_and_before_the_first_step(problem, same) -> None:
    ours, plain = problem(adamw({})), problem(adamw({}))
    ours.optimizer.load_state_dict(state_dict=ours.optimizer.state_dict())
    same(ours.run(2), plain.run(2))


def test_float32_state_beside_bfloat16_parameters_stays_float32() -> None:
    class Fat(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.1})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for param in group["params"]:
                    if param.grad is not None:
                        state = self.state[param]
                        mean = state.setdefault("mean", torch.zeros(param.shape))
                        mean.lerp_(param.grad.float(), 0.1)
                        param.sub_(mean, alpha=group["lr"])

    param = Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    optimizer = wrap(Fat([param]), ConfigurablePolicy({}))
    param.grad = torch.full_like(param, 0.3)
    optimizer.step()
    before = optimizer.state[param]["mean"]
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[param]["mean"].dtype == torch.float32
    assert torch.equal(optimizer.state[param]["mean"], before)

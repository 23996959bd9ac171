"""State dicts that no wrapped optimizer makes: refused by name, and nothing changes."""

import copy

import pytest
import torch

from optstate_wrap import ConfigurablePolicy, wrap

CODECS = {"exp_avg": "int8(units=update)", "exp_avg_sq": "dynamic8(signed=False)"}


def adamw(groups):
    return wrap(torch.optim.AdamW(groups, lr=1e-3), ConfigurablePolicy(CODECS))


def coded(key, value, name="exp_avg"):
    """A change of an encoded tensor's entry: a value, or a function of the present one."""

    def change(saved):
        entry = saved["state"][6]["parts"][0][name]
        entry[key] = value(entry[key]) if callable(value) else value

    return change


def record(key, value):
    def change(saved):
        entry = saved["state"][6]["parts"][0]
        entry[key] = value(entry[key]) if callable(value) else value

    return change


def progress(**changes):
    return lambda saved: saved["optstate_wrap"].update(changes)


def group(key, value):
    return lambda saved: saved["param_groups"][0].update({key: value})


def first(change):
    return lambda parts: [change(parts[0]), *parts[1:]]


def scale(change):
    return lambda parts: [parts[0], change(parts[1])]


HOSTILE = {
    "state a list": (lambda s: s.update(state=[]), r"\['state'\]=\[\]: must be a dict"),
    "groups a text": (lambda s: s.update(param_groups="x"), "must be a list or tuple"),
    "a state a list": (lambda s: s["state"].update({0: [1]}), r"\[0\]=\[1\]: must be a dict"),
    "parameter twice": (group("params", [0, 0, 2]), "parameter 0 is there twice"),
    "progress a list": (lambda s: s.update(optstate_wrap=[1]), "must be a dict"),
    "progress a tensor": (lambda s: s.update(optstate_wrap=torch.ones(3)), "must be a dict"),
    "steps a text": (progress(steps="3"), r"\['steps'\]='3': must be an int"),
    "steps negative": (progress(steps=-1), r"\['steps'\]=-1: must be from 0"),
    "steps huge": (progress(steps=2**64), r"\['steps'\]=18446744073709551616: must be from 0"),
    "policy a list": (progress(policy=[1]), r"\['policy'\]=\[1\]: must be a dict"),
    "parts a text": (lambda s: s["state"][6].update(parts="x"), r"\['parts'\]='x': must be a list"),
    "parts of numbers": (lambda s: s["state"][6].update(parts=[1]), "must be a list of dicts"),
    "dtype a function": (coded("dtype", "load"), r"\['dtype'\]='load': must be one of float16"),
    "dtype a module": (coded("dtype", "hub"), r"\['dtype'\]='hub': must be one of"),
    "dtype an int": (coded("dtype", "int64"), r"\['dtype'\]='int64': must be one of"),
    "negative shape": (coded("shape", [-16, -16]), r"\['shape'\]=\[-16, -16\]: must be sizes"),
    "huge shape": (coded("shape", [2**40, 2**40]), "a component of shape|malformed"),
    "shape of texts": (coded("shape", ["16", "16"]), r"\['shape'\].*must be sizes"),
    "order twice": (coded("order", [0, 0]), r"\['order'\]=\[0, 0\]: must have each dimension"),
    "order outside": (coded("order", [0, 7]), r"\['order'\]=\[0, 7\]: must have each dimension"),
    "order differs": (coded("order", [1, 0]), "differ in shape or order"),
    "root a dict": (coded("root", {}), r"\['root'\]=\{\}: must be text"),
    "root unknown": (coded("root", "gone"), r"\['root'\]='gone': is no coded moment"),
    "root itself": (coded("root", "exp_avg"), r"\['root'\]='exp_avg': must be the key"),
    "root missing": (coded("root", ""), r"\['root'\]='': must be the key of a second moment"),
    "root of another": (
        coded("root", "step", "exp_avg_sq"),
        r"\['root'\]='exp_avg_sq': is no coded moment",
    ),
    "components a dict": (coded("parts", {}), r"\['parts'\]=\{\}: must be a list of tensors"),
    "components texts": (coded("parts", ["a", "b"]), r"\['parts'\]: 'a', must be tensors"),
    "component sparse": (coded("parts", first(lambda t: t.to_sparse())), "must be dense"),
    "component on meta": (coded("parts", first(lambda t: t.to("meta"))), "is on meta"),
    "scale NaN": (coded("parts", scale(lambda t: t * float("nan"))), "must be finite"),
    "scale negative": (coded("parts", scale(lambda t: -1 - t)), "at least 0 in format int8"),
    "format too long": (coded("format", f"int8(block_size={'(' * 999})"), "has 999 characters"),
    "key a number": (
        lambda s: record(0, s["state"][6]["parts"][0]["exp_avg"])(s),
        "key 0: must be",
    ),
    "moment a dict": (record("exp_avg", {}), "must be a tensor"),
    "step coded": (lambda s: record("step", s["state"][6]["parts"][0]["exp_avg"])(s), "step"),
    "step of two": (record("step", torch.ones(2)), r"\['step'\]=tensor.*whole number"),
    "step NaN": (record("step", torch.tensor(float("nan"))), r"\['step'\]=tensor\(nan\)"),
    "step on meta": (record("step", lambda t: t.to("meta")), "is on meta"),
    "rate nested": (
        group("lr", torch.ones(1).to_sparse()),
        r"\['lr'\]: is torch.sparse_coo, must be dense",
    ),
    "eps on meta": (group("eps", torch.ones((), device="meta")), "eps: is on meta"),
    "betas one number": (group("betas", 0.5), "AdamW cannot step with these values"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_packed_state_dicts(name, problem, same) -> None:
    spoil, words = HOSTILE[name]
    run, other = problem(adamw).run(2), problem(adamw).run(3).optimizer
    before = copy.deepcopy(run)
    content = copy.deepcopy(other.packed_state_dict())
    spoil(content)
    with pytest.raises((TypeError, ValueError, KeyError), match=words):
        run.optimizer.load_state_dict(content)
    same(before, run)
    assert run.optimizer.engine.encoder.steps == 2


@pytest.mark.parametrize(
    "step",
    [
        3,
        torch.tensor(3, dtype=torch.int16),
        torch.tensor([3.0]),
        torch.tensor(3.0).to(torch.float8_e4m3fn),
    ],
)
@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_step_counts_of_any_kind_are_those_of_the_optimizer(kind, step, problem, same) -> None:
    """Counts in another dtype or shape loaded, and the next step failed."""
    run, other = problem(adamw).run(3), problem(adamw).run(3)
    saved = run.optimizer.state_dict() if kind == "plain" else run.optimizer.packed_state_dict()
    good, saved = saved, copy.deepcopy(saved)
    for state in saved["state"].values():
        entries = state if kind == "plain" else state["parts"][0]
        assert entries["step"].dtype == torch.float32
        if int(entries["step"]) == 3:
            entries["step"] = step
    other.optimizer.load_state_dict(saved)
    run.optimizer.load_state_dict(good)
    same(run.run(1), other.run(1))

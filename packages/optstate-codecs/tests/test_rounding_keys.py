"""Which number keys the random numbers of a parameter: its index, a hash of its name, or a key."""

import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from subjects import FIRST, SECOND
from torch import nn

from optstate_codecs import Adam, CodedOptimizer
from optstate_codecs.rounding_keys import rounding_keys

FORMATS = {"exp_avg": FIRST, "exp_avg_sq": SECOND}
NUMEL = 512


def make(params, **options):
    options = {"lr": 1e-2, "write": "stochastic", **options}
    return CodedOptimizer(params, Adam(), FORMATS, **options)


def parameter(seed=0):
    values = torch.randn(NUMEL, generator=torch.Generator().manual_seed(seed))
    return nn.Parameter(values.bfloat16())


def grads(count):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(NUMEL, generator=generator).bfloat16() for _ in range(count)]


def train(optimizer, count=4):
    """Step with the same gradients for each parameter; all results as one list of tensors."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for grad in grads(count):
        for param in params:
            param.grad = grad.clone()
        optimizer.step()
    state = [value for p in params for value in optimizer.state[p].values()]
    return [*[p.detach().clone() for p in params], *state]


def same(one, other):
    return all(map(torch.equal, one, other))


def test_numbers_of_names_stay_the_same():
    """Checkpoints rely on them."""
    groups = [
        {"params": [0, 1, 2], "param_names": ["weight", "größe", "weight"]},
        {"params": [3], "rounding_key": "encoder"},
        {"params": [4, 5], "rounding_key": 7, "param_names": ["weight", "bias"]},
        {"params": [6]},
    ]
    assert rounding_keys(groups) == GOLDEN


GOLDEN = [
    1715998880313072859,
    8981365853703474552,
    91494536292839437,
    2732317391804447342,
    171117138135197733,
    9077071672584537034,
    6,
]


@pytest.mark.parametrize("backend", ["eager", "compile"])
@pytest.mark.parametrize("options", [{}, {"write": "split24"}], ids=["stochastic", "split24"])
def test_two_optimizers_of_one_named_parameter_draw_other_noise(backend, options):
    first, second = (
        make([(name, parameter())], backend=backend, **options) for name in ("a.weight", "b.weight")
    )
    again = make([("a.weight", parameter())], backend=backend, **options)
    results = [train(optimizer) for optimizer in (first, second, again)]
    assert not torch.equal(results[0][0], results[1][0]) or options
    assert not same(results[0], results[1])
    assert same(results[0], results[2])


@pytest.mark.parametrize("keys", [("a", "b"), (0, 1), (1, "a")], ids=str)
def test_two_optimizers_of_one_parameter_with_keys_draw_other_noise(keys):
    results = [train(make([parameter()], rounding_key=key)) for key in keys]
    assert not same(*results)
    assert same(results[0], train(make([parameter()], rounding_key=keys[0])))


def test_without_names_and_keys_the_index_counts():
    one, two = train(make([parameter()])), train(make([parameter()]))
    assert same(one, two)
    both = make([parameter(), parameter()])
    assert rounding_keys(both.param_groups) == [0, 1]
    after = train(both)
    assert torch.equal(after[0], one[0])
    assert not torch.equal(after[0], after[1])


def test_parameters_of_one_name_or_one_key_draw_other_noise():
    named = make([{"params": [("w", parameter())]}, {"params": [("w", parameter())]}])
    keyed = make([parameter(), parameter()], rounding_key="k")
    apart = make([{"params": [parameter()]}, {"params": [parameter()]}], rounding_key="k")
    for optimizer in (named, keyed, apart):
        assert len(set(rounding_keys(optimizer.param_groups))) == 2
        first, second, *_ = train(optimizer)
        assert not torch.equal(first, second)


def test_names_follow_the_parameter_to_another_place():
    together = make([("a", parameter(1)), ("b", parameter(2))])
    turned = make([("b", parameter(2)), ("a", parameter(1))])
    alone = make([("b", parameter(2))])
    results = [train(optimizer) for optimizer in (together, turned, alone)]
    assert torch.equal(results[0][1], results[1][0])
    assert torch.equal(results[0][1], results[2][0])


def test_a_key_per_group_and_a_key_set_later():
    one = train(make([{"params": [parameter()], "rounding_key": "x"}], rounding_key="y"))
    assert same(one, train(make([parameter()], rounding_key="x")))
    late = make([parameter()])
    late.param_groups[0]["rounding_key"] = "x"
    assert same(one, train(late))
    # after steps, when everything is cached
    changed, kept = (make([parameter()], rounding_key="x") for _ in range(2))
    assert same(train(changed), train(kept))
    changed.param_groups[0]["rounding_key"] = "y"
    assert not same(train(changed), train(kept))


def test_names_set_later_are_seen():
    named, late = make([("w", parameter())]), make([parameter()])
    late.step()
    late.param_groups[0]["param_names"] = ["w"]
    assert same(train(named), train(late))


@pytest.mark.parametrize("options", [{"names": True}, {"rounding_key": "k"}], ids=str)
def test_resume_with_names_and_keys_is_bit_for_bit(options):
    options = dict(options)
    named = options.pop("names", False)

    def build(param):
        return make([("w", param)] if named else [param], **options)

    param, copy = parameter(), parameter()
    optimizer = build(param)
    train(optimizer)
    with torch.no_grad():
        copy.copy_(param)
    resumed = build(copy)
    resumed.load_state_dict(optimizer.state_dict())
    assert same(train(optimizer), train(resumed))
    # the key is saved with the group, and so are names
    with torch.no_grad():
        copy.copy_(param)
    bare = make([copy])
    bare.load_state_dict(optimizer.state_dict())
    assert same(train(optimizer), train(bare))


def test_old_checkpoints_without_names_load_into_named_parameters():
    optimizer = make([parameter()])
    train(optimizer)
    saved = optimizer.state_dict()
    assert not {"rounding_key", "param_names"} & saved["param_groups"][0].keys()
    named = make([("w", parameter())], rounding_key="k")
    named.load_state_dict(saved)
    group = named.param_groups[0]
    assert (group["param_names"], group["rounding_key"]) == (["w"], "k")
    # draws of the name, from now on
    train(named)


def test_plain_moments_are_encoded_with_the_key():
    """In a loaded state dict, and where a moment is assigned by hand."""
    formats = {"exp_avg": "dynamic8(rounding=stochastic)", "exp_avg_sq": SECOND}
    generator = torch.Generator().manual_seed(1)
    moment = torch.randn(NUMEL, generator=generator)
    codes, loaded = [], []
    for key in (None, "a", "b"):
        optimizer = CodedOptimizer([parameter()], Adam(), formats, rounding_key=key)
        param = optimizer.param_groups[0]["params"][0]
        saved = optimizer.full_state_dict()
        assert "rounding_key" not in saved["param_groups"][0]
        saved["state"] = {0: {"step": 3.0, "exp_avg": moment, "exp_avg_sq": moment**2}}
        optimizer.load_state_dict(saved)
        loaded.append(optimizer.state[param]["exp_avg_codes"].clone())
        optimizer.state[param]["exp_avg"] = moment
        optimizer.state_dict()
        codes.append(optimizer.state[param]["exp_avg_codes"].clone())
    for found in (codes, loaded):
        assert not torch.equal(found[0], found[1])
        assert not torch.equal(found[1], found[2])
    assert all(map(torch.equal, codes, loaded))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_apply_optimizer_in_backward_with_a_key_for_each_parameter():
    from torch.distributed.optim import _apply_optimizer_in_backward

    model = nn.Module()
    model.a, model.b = parameter(), parameter()
    for name, param in model.named_parameters():
        _apply_optimizer_in_backward(make, [param], {"rounding_key": name})
    for grad in grads(4):
        ((model.a + model.b).float() * grad.float()).sum().backward()
    assert not torch.equal(model.a, model.b)
    expected = [train(make([parameter()], rounding_key=name))[0] for name in "ab"]
    assert torch.equal(model.a, expected[0])
    assert torch.equal(model.b, expected[1])


def test_offloaded_state_draws_the_same(tmp_path):
    from optstate_codecs import offload

    expected = train(make([("w", parameter())]))
    for more in ({}, {"store": "disk", "path": tmp_path / "state"}):
        assert same(expected, train(offload(make([("w", parameter())]), **more)))


def test_numbers_do_not_depend_on_the_process():
    code = (
        "from optstate_codecs.rounding_keys import rounding_keys;"
        "print(rounding_keys([{'params': [0], 'param_names': ['weight']}])[0])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) == GOLDEN[0]


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("", ValueError, "rounding_key='': must be None, an int or text that is not empty"),
        (-1, ValueError, "rounding_key=-1: must be from 0"),
        (2**63, ValueError, "rounding_key=.*: must be from 0"),
        (0.5, TypeError, "rounding_key=0.5: must be None, an int or text, got float"),
        (True, TypeError, "rounding_key=True: must be None, an int or text, got bool"),
        (("a",), TypeError, "rounding_key=.*: must be None, an int or text, got tuple"),
    ],
    ids=str,
)
def test_keys_that_are_refused(value, error, message):
    with pytest.raises(error, match=message):
        make([parameter()], rounding_key=value)
    optimizer = make([parameter()])
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [parameter()], "rounding_key": value})
    assert len(optimizer.param_groups) == 1


def test_names_in_a_checkpoint_that_are_refused():
    optimizer = make([("a", parameter()), ("b", parameter())])
    train(optimizer)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["param_names"] = 3
    other = make([("a", parameter()), ("b", parameter())])
    with pytest.raises(TypeError, match="param_names=3: must be a list, got int"):
        other.load_state_dict(saved)
    assert other.param_groups[0]["param_names"] == ["a", "b"]
    assert not other.state


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"], []], ids=str)
def test_names_that_are_not_one_for_each_parameter_do_not_count(names):
    params = [parameter(), parameter()]
    optimizer = make([{"params": params, "param_names": names}])
    assert rounding_keys(optimizer.param_groups) == [0, 1]
    assert same(train(optimizer), train(make([parameter(), parameter()])))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("named", [True, False], ids=["names", "key"])
def test_distributed_state_dicts_keep_names_and_keys(named, flat):
    from torch.distributed.checkpoint import state_dict as dcp

    def build(model):
        if named:
            return make(list(model.named_parameters()))
        return make(list(model.parameters()), rounding_key="k")

    model, other = nn.Module(), nn.Module()
    model.a, model.b = parameter(1), parameter(2)
    optimizer = build(model)
    train(optimizer)
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
    saved = deepcopy(dcp.get_optimizer_state_dict(model, optimizer, options=options))
    other.a, other.b = (nn.Parameter(p.detach().clone()) for p in (model.a, model.b))
    resumed = build(other)
    dcp.set_optimizer_state_dict(other, resumed, saved, options=options)
    assert rounding_keys(resumed.param_groups) == rounding_keys(optimizer.param_groups)
    assert same(train(optimizer), train(resumed))


@pytest.mark.parametrize("in_place", [False, True], ids=["group", "list"])
def test_parameters_that_are_added_later_have_their_own_names(in_place):
    optimizer = make([("a", parameter())])
    train(optimizer)
    if in_place:
        optimizer.param_groups[0]["params"].append(parameter())
        optimizer.param_groups[0]["param_names"].append("b")
    else:
        optimizer.add_param_group({"params": [("b", parameter())]})
    added = [p for group in optimizer.param_groups for p in group["params"]][1]
    train(optimizer)
    expected = train(make([("b", parameter())]))
    assert torch.equal(added, expected[0])

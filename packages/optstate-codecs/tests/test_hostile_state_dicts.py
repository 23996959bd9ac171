"""State dicts that are nested or filled as no optimizer would: refused by name, nothing changed."""

import copy

import pytest
import torch
from subjects import adam
from torch.nn import Parameter

from optstate_codecs.formats import parse_format

SHAPES = ((12, 30), (5,), (3, 64))
FORMATS = ("dynamic8", "linear4")


def trained(steps=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    params = [Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = adam(*FORMATS, lr=0.01, backend="eager")(params)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return params, optimizer


def group(key, value):
    return lambda saved: saved["param_groups"][0].update({key: value})


def state(key, change):
    """A change of an entry of parameter 0: a value, or a function of the present one."""

    def apply(saved):
        entries = saved["state"][0]
        entries[key] = change(entries[key]) if callable(change) else change

    return apply


def top(key, value):
    return lambda saved: saved.update({key: value})


def quantized(value):
    return torch.quantize_per_tensor(value.to(torch.float32), 0.1, 0, torch.qint8)


def _cyclic(saved):
    deep = []
    deep.append(deep)
    saved["param_groups"][0]["betas"] = deep


def _deep(saved):
    deep = []
    for _ in range(10_000):
        deep = [deep]
    saved["param_groups"][0]["mine"] = deep


CODES, SCALE, SECOND = "exp_avg_codes", "exp_avg_scale", "exp_avg_sq_scale"
HOSTILE = {
    "state a list": (top("state", []), r"state_dict\['state'\]=\[\]: must be a dict"),
    "state a text": (top("state", "x"), r"\['state'\]='x': must be a dict"),
    "groups a dict": (top("param_groups", {}), r"\['param_groups'\]=\{\}: must be a list"),
    "group a text": (top("param_groups", ["x"]), r"\['param_groups'\]\[0\]='x': must be a dict"),
    "parameters a number": (group("params", 3), r"\['params'\]=3: must be a list"),
    "parameter a list": (group("params", [[0], 1, 2]), r"\['params'\]: item=\[0\]: must be a int"),
    "parameter twice": (group("params", [0, 0, 2]), "parameter 0 is there twice"),
    "a state a tensor": (top("state", {0: torch.ones(3)}), r"\['state'\]\[0\]=tensor"),
    "a state a number": (top("state", {0: 5}), r"\['state'\]\[0\]=5: must be a dict"),
    "formats a number": (group("formats", 5), r"\['formats'\]=5: must be a dict"),
    "formats of numbers": (group("formats", {"exp_avg": 5}), r"\['exp_avg'\]=5: must be a str"),
    "format unknown": (group("formats", {"exp_avg": "../int8"}), "must be one of"),
    "format of an option too long": (
        group("formats", {"exp_avg": f"int8(block_size={'-' * 100_000}1)"}),
        "option 'block_size' has 100001 characters",
    ),
    "format of a huge block": (group("formats", {"exp_avg": "int8(block_size=2)"}), "block_size=2"),
    "format of many bits": (
        group("formats", {"exp_avg": "minifloat(exponent_bits=9999)"}),
        "exponent_bits",
    ),
    "orders a number": (group("orders", 5), r"\['orders'\]=5: must be a dict"),
    "rate a meta tensor": (group("lr", torch.ones((), device="meta")), "lr: is on meta"),
    "betas on meta": (group("betas", (torch.ones((), device="meta"), 0.9)), "betas: is on meta"),
    "rate a nested tensor": (
        group("lr", torch.ones(1).to_sparse()),
        r"\['lr'\]: is torch.sparse_coo, must be dense",
    ),
    "rate too large": (group("lr", 10**400), "lr=|too large"),
    "eps an int too large": (group("eps", 10**30), "eps=10+: must be finite"),
    "decay without a float32": (
        group("weight_decay", 1e300),
        r"weight_decay=1e\+300: must be finite and at least 0 and at most 2\*\*60",
    ),
    "flag a tensor": (group("capturable", torch.ones(3)), "capturable=tensor.*must be True, False"),
    "betas cyclic": (_cyclic, "nested too deep"),
    "values nested deeply": (_deep, "nested too deep"),
    "order a fraction": (state("dim_order", torch.tensor(0.5)), "must be from 0 to 1"),
    "order NaN": (state("dim_order", torch.tensor(float("nan"))), "must be from 0 to 1"),
    "step of three": (state("step", torch.ones(3)), r"\['step'\]=tensor.*must be a whole number"),
    "step complex": (state("step", torch.ones((), dtype=torch.complex64)), r"\['step'\]=tensor"),
    "step on meta": (state("step", torch.ones((), device="meta")), r"\['step'\]=.*whole number"),
    "step too large": (state("step", 10**400), r"\['step'\]=1000"),
    "step 1e300": (state("step", 1e300), r"\['step'\]=1e\+300: must be a whole number"),
    "step a text": (state("step", "3"), r"\['step'\]='3': must be a whole number"),
    "codes sparse": (state(CODES, lambda t: t.to_sparse()), r"is torch.sparse_coo, must be dense"),
    "codes on meta": (state(CODES, lambda t: t.to("meta")), r"_codes'\]: is on meta"),
    "codes quantized": (state(SCALE, quantized), "is quantized, must be dense"),
    "codes nested": (
        state(CODES, lambda t: torch.nested.nested_tensor([t])),
        "state_dict.*nested|state_dict: malformed.*Nested",
    ),
    "codes of another dtype": (state(CODES, lambda t: t.float()), "dtype torch.float32, must be"),
    "codes complex": (state(CODES, lambda t: t.to(torch.complex64)), "dtype torch.complex64"),
    "codes huge": (
        state(CODES, lambda t: torch.zeros((), dtype=t.dtype).expand(2**31, 2**31)),
        r"shape \(2147483648, 2147483648\)",
    ),
    "codes a list": (state(CODES, lambda t: t.tolist()), "must be a tensor, got list"),
    "scale NaN": (state(SCALE, lambda t: t * float("nan")), r"_scale'\]: must be finite"),
    "scale -inf": (state(SCALE, lambda t: t - float("inf")), r"_scale'\]: must be finite"),
    "scale negative": (state(SECOND, lambda t: -1 - t), "at least 0 in format linear4"),
    "keys swapped": (
        lambda saved: saved["state"][0].update(exp_avg_codes=saved["state"][0][SCALE]),
        "shape|dtype",
    ),
}


# torch warns of its own quantized and nested tensors
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_state_dicts(name):
    spoil, words = HOSTILE[name]
    _, optimizer = trained()
    _, twin = trained()
    saved = trained(3, 1)[1].state_dict()
    spoil(saved)
    with pytest.raises((TypeError, ValueError, KeyError), match=words):
        optimizer.load_state_dict(saved)
    before, after = twin.state_dict(), optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for number, entries in before["state"].items():
        assert all(torch.equal(value, after["state"][number][k]) for k, value in entries.items())


def test_another_optimizers_orders_are_permutations():
    _, optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    for entries in saved["state"].values():
        entries.pop("dim_order", None)
    for order in ([0, 0], [1], [5, 6], ["a", "b"], []):
        saved["param_groups"][0]["orders"] = {0: order}
        with pytest.raises((ValueError, TypeError), match=r"order|not supported"):
            optimizer.load_state_dict(saved)


EAGER = ("dynamic8", "fp8", "int8", "int4", "fp16", "costate(bits=3)", "costate(bits=1)")
EAGER += ("minifloat(mantissa_bits=1, signed=True)",)
# building a kernel takes seconds
COMPILED = ("dynamic8", "int4", "costate(bits=3)")


@pytest.mark.parametrize(
    ("spec", "backend"),
    [*((spec, "eager") for spec in EAGER), *((spec, "compile") for spec in COMPILED)],
)
def test_every_code_is_a_number_or_nan(spec, backend):
    """All bytes in place of codes: no read outside of a table, and nothing leaves its parameter."""
    second = {"fp8": "oneq(bits=3)", "int8": "minifloat(signed=False)", "fp16": "linear4"}
    formats = spec, second.get(spec, "dynamic8(signed=False)")

    def stepped(fill):
        params = [Parameter(torch.ones(64, 8)), Parameter(torch.ones(64, 8))]
        optimizer = adam(*formats, lr=0.01, backend=backend)(params)
        for _ in range(2):
            for p in params:
                p.grad = torch.linspace(-1, 1, 512).view(64, 8)
            optimizer.step()
        if fill:
            saved = optimizer.state_dict()
            for key, value in saved["state"][0].items():
                if key.endswith("codes"):
                    raw = value.view(-1).view(torch.uint8)
                    raw.copy_(torch.arange(raw.numel(), dtype=torch.int64) % 256)
            optimizer.load_state_dict(saved)
            optimizer.step()
        else:
            optimizer.step()
        return params

    ours, theirs = stepped(True), stepped(False)
    assert torch.equal(ours[1], theirs[1])
    if spec != "fp16":
        assert ours[0].isfinite().any()


def test_options_are_read_only_if_short():
    with pytest.raises(ValueError, match="option 'block_size' has 65 characters"):
        parse_format(f"int8(block_size={'(' * 65})")
    with pytest.raises((ValueError, TypeError), match="block_size"):
        parse_format("int8(block_size={[]})")

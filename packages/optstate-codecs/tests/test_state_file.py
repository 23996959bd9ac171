"""Packed state as a safetensors file: round trips, and files that are not what they should be."""

import json
import re
import struct
import sys

import pytest
import torch
from subjects import FIRST, FIRST4, RANK1, SECOND
from torch import nn

from optstate_codecs import (
    Adam,
    CodedOptimizer,
    __version__,
    load_safetensors,
    offload,
    save_safetensors,
)

safetensors_torch = pytest.importorskip("safetensors.torch")

FORMATS = {
    "fp32": ("fp32", "fp32"),
    "bf16": ("bf16", "fp32"),
    "dynamic8": (FIRST, SECOND),
    "int4": (FIRST4, "minifloat(exponent_bits=4, mantissa_bits=4, signed=False, domain=sqrt)"),
    "rank1": (FIRST4, RANK1),
    "costate": ("costate(bits=3)", "oneq(bits=3)"),
}


def make(params, formats="dynamic8", **options):
    first, second = FORMATS[formats]
    chosen = {"exp_avg": first, "exp_avg_sq": second, "max_exp_avg_sq": second}
    return CodedOptimizer(params, Adam(), chosen, **{"lr": 1e-2, **options})


def net(seed=0, dtype=torch.float32, memory_format=torch.channels_last):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 5))
    model.scale = nn.Parameter(torch.tensor(1.5))
    return model.to(dtype, memory_format=memory_format)


def train(optimizer, steps=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                grad = torch.randn(p.shape, generator=generator)
                p.grad = torch.empty_like(p).copy_(grad)
        optimizer.step()


def everything(optimizer):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [*params, *(v for p in params for _, v in sorted(optimizer.state[p].items()))]


def assert_same(one, other):
    ours, theirs = everything(one), everything(other)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        assert torch.equal(a, b)


def copied(model, **options):
    other = net(1, **options)
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("write", ["nearest", "split24"])
def test_round_trip_continues_bit_for_bit(formats, write, tmp_path):
    dtype = torch.float32 if write == "nearest" else torch.bfloat16
    model = net(dtype=dtype)
    optimizer = make(model.parameters(), formats, write=write, amsgrad=formats == "dynamic8")
    train(optimizer)
    save_safetensors(optimizer, tmp_path / "state.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]

    twin = make(copied(model, dtype=dtype).parameters(), formats, write=write)
    load_safetensors(twin, str(tmp_path / "state.safetensors"))
    assert twin.param_groups[0]["amsgrad"] == (formats == "dynamic8")
    assert_same(optimizer, twin)
    train(optimizer, seed=1)
    train(twin, seed=1)
    assert_same(optimizer, twin)


@pytest.mark.parametrize("formats", ["dynamic8", "costate", "rank1"])
def test_another_memory_format_is_encoded_anew(formats, tmp_path):
    model = net()
    optimizer = make(model.parameters(), formats)
    train(optimizer)
    save_safetensors(optimizer, tmp_path / "file")
    other = copied(model, memory_format=torch.contiguous_format)
    assert not other[0].weight.is_contiguous(memory_format=torch.channels_last)
    loaded, expected = make(other.parameters(), formats), make(other.parameters(), formats)
    load_safetensors(loaded, tmp_path / "file")
    expected.load_state_dict(optimizer.state_dict())
    assert_same(loaded, expected)


def test_the_file_says_what_it_is(tmp_path):
    model = net()
    groups = [
        {"params": list(model[0].named_parameters("conv")), "lr": torch.tensor(0.5)},
        {"params": list(model[2].named_parameters("linear")), "betas": (0.5, 0.75), "mine": "x"},
    ]
    optimizer = make(groups, rounding_key="k")
    train(optimizer)
    optimizer.state[model[0].bias]["notes"] = {"a": (1, 2.5, None), "t": torch.ones(2)}
    save_safetensors(optimizer, tmp_path / "file")
    tensors = safetensors_torch.load_file(tmp_path / "file")
    codes = tensors["state.conv.weight.exp_avg_codes"]
    assert torch.equal(codes, optimizer.state[model[0].weight]["exp_avg_codes"])
    with safetensors_open(tmp_path / "file") as file:
        metadata = file.metadata()
    header = json.loads(metadata["optstate"])
    assert metadata["format"] == "pt"
    assert header["format_version"] == 1
    assert header["package"] == f"optstate-codecs {__version__}"
    assert header["optimizer"] == "CodedOptimizer"
    assert header["shapes"] == [[8, 3, 3, 3], [8], [5, 128], [5]]
    saved = dict(header["param_groups"][1]["dict"])
    assert saved["param_names"] == ["linear.weight", "linear.bias"]
    assert dict(saved["formats"]["dict"])["exp_avg"].startswith("dynamic8(")
    assert saved["betas"] == {"tuple": [0.5, 0.75]}

    other = net(3)
    groups = [
        {"params": list(other[0].named_parameters("conv"))},
        {"params": list(other[2].named_parameters("linear"))},
    ]
    loaded = make(groups)
    load_safetensors(loaded, tmp_path / "file")
    first, second = loaded.param_groups
    assert (float(first["lr"]), second["betas"], second["mine"]) == (0.5, (0.5, 0.75), "x")
    assert first["rounding_key"] == second["rounding_key"] == "k"
    notes = loaded.state[other[0].bias]["notes"]
    assert notes["a"] == (1, 2.5, None)
    assert torch.equal(notes["t"], torch.ones(2))


def safetensors_open(path):
    from safetensors import safe_open

    return safe_open(path, framework="pt")


def test_before_the_first_step_and_other_entries(tmp_path):
    model = net()
    optimizer = make(model.parameters())
    optimizer.state["counter"] = {"n": 3}
    save_safetensors(optimizer, tmp_path / "file")
    loaded = make(net().parameters())
    train(loaded)
    load_safetensors(loaded, tmp_path / "file")
    assert dict(loaded.state) == {"counter": {"n": 3}}


@pytest.mark.parametrize("store", ["host", "disk"])
def test_offloaded_state(store, tmp_path):
    where = {"path": tmp_path / "store"} if store == "disk" else {}
    model = net()
    optimizer = offload(make(model.parameters()), store=store, chunk_bytes=2**12, **where)
    train(optimizer)
    save_safetensors(optimizer, tmp_path / "file")
    resident = make(copied(model).parameters())
    load_safetensors(resident, tmp_path / "file")
    assert_same(optimizer, resident)
    more = {"path": tmp_path / "more"} if store == "disk" else {}
    other = offload(make(copied(model).parameters()), store=store, chunk_bytes=2**12, **more)
    load_safetensors(other, tmp_path / "file")
    for each in (optimizer, resident, other):
        train(each, seed=1)
    assert_same(optimizer, resident)
    assert_same(other, resident)


def test_one_tensor_under_two_keys(tmp_path):
    model = net()
    optimizer = make(model.parameters())
    train(optimizer)
    both = torch.ones(4)
    optimizer.state[model.scale] |= {"one": both, "two": both}
    save_safetensors(optimizer, tmp_path / "file")
    loaded = make(copied(model).parameters())
    load_safetensors(loaded, tmp_path / "file")
    assert_same(optimizer, loaded)


# --- files that are not what they should be


@pytest.fixture
def saved(tmp_path):
    model = net()
    optimizer = make([{"params": [model[0].weight, model[0].bias]}, {"params": [model.scale]}])
    train(optimizer)
    path = tmp_path / "file"
    save_safetensors(optimizer, path)
    return path


def other_optimizer():
    model = net(2)
    optimizer = make([{"params": [model[0].weight, model[0].bias]}, {"params": [model.scale]}])
    train(optimizer, 1)
    return optimizer


def parts(path):
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def rewrite(path, outer, data):
    text = json.dumps(outer).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit(path, change):
    """Rewrite the file with its own header changed by ``change(header)``."""
    outer, data = parts(path)
    header = json.loads(outer["__metadata__"]["optstate"])
    changed = change(header)
    outer["__metadata__"]["optstate"] = json.dumps(header if changed is None else changed)
    rewrite(path, outer, data)


def refuses(path, error, message):
    optimizer = other_optimizer()
    before = [t.clone() for t in everything(optimizer)]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    with pytest.raises(error, match=message) as caught:
        load_safetensors(optimizer, path)
    assert str(path) in str(caught.value)
    after = everything(optimizer)
    assert len(before) == len(after)
    assert all(map(torch.equal, before, after))
    assert groups == [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


def test_truncated_files(saved):
    raw = saved.read_bytes()
    for length in (0, 4, 8, 60, len(raw) // 2, len(raw) - 1):
        saved.write_bytes(raw[:length])
        refuses(saved, ValueError, "truncated, or no safetensors file")
    saved.write_bytes(raw + b"x")
    refuses(saved, ValueError, "truncated, or no safetensors file")


def test_foreign_files(saved):
    safetensors_torch.save_file({"weight": torch.ones(3)}, saved)
    refuses(
        saved, ValueError, "not written by save_safetensors: its header has no entry 'optstate'"
    )
    safetensors_torch.save_file({"weight": torch.ones(3)}, saved, metadata={"format": "pt"})
    refuses(saved, ValueError, "not written by save_safetensors")
    torch.save({"state": {}}, saved)
    refuses(saved, ValueError, "truncated, or no safetensors file")
    saved.unlink()
    refuses(saved, FileNotFoundError, "no such file")


def set_to(key, value):
    def change(header):
        header[key] = value

    return change


def without(key):
    def change(header):
        del header[key]

    return change


def in_group(key, value, number=0):
    def change(header):
        pairs = header["param_groups"][number]["dict"]
        pairs[:] = [pair for pair in pairs if pair[0] != key]
        if value is not None:
            pairs.append([key, value])

    return change


def in_state(key, value, entry=0):
    def change(header):
        pairs = header["state"][entry][1]["dict"]
        pairs[:] = [[k, value if k == key else v] for k, v in pairs]

    return change


HOSTILE = {
    "version": (set_to("format_version", 2), ValueError, "format_version=2: must be 1; written by"),
    "no version": (without("format_version"), ValueError, "format_version=None: must be 1"),
    "list": (lambda header: [1], ValueError, r"header: \[1\]: must be a table"),
    "no state": (without("state"), KeyError, "header: missing key 'state'"),
    "no groups": (without("param_groups"), KeyError, "header: missing key 'param_groups'"),
    "state of another type": (set_to("state", "x"), ValueError, "state='x': must be a list"),
    "shape": (set_to("shapes", [[8, 3, 3, 4], [8], []]), ValueError, "parameter 0: shape"),
    "shapes": (set_to("shapes", [[8, 3, 3, 3]]), ValueError, "with 1 shapes, must be"),
    "shapes of another type": (set_to("shapes", 7), ValueError, "shapes=7: must be a list"),
    "groups": (set_to("param_groups", []), ValueError, r"\[\] parameters .* must be \[2, 1\]"),
    "group": (set_to("param_groups", [1, 2]), ValueError, r"param_groups\[0\]: must be a dict"),
    "params": (in_group("params", [[0], 1]), ValueError, "params must be numbers"),
    "count": (in_group("params", [0]), ValueError, r"\[1, 1\] parameters"),
    "numbers": (in_group("params", [7, 8]), KeyError, "unknown parameter 0"),
    "lr": (in_group("lr", "fast"), ValueError, "lr='fast': must be a number"),
    "no lr": (in_group("lr", None), KeyError, "missing key 'lr'"),
    "formats": (in_group("formats", 5), ValueError, "formats|int"),
    "format": (in_group("formats", {"dict": [["exp_avg", "int9"]]}), ValueError, "int9"),
    "code": (in_group("lr", {"eval": ["1"]}), ValueError, "not a value"),
    "two kinds": (in_group("lr", {"tuple": [], "dict": []}), ValueError, "not a value"),
    "empty kind": (in_group("lr", {}), ValueError, "not a value"),
    "pairs": (in_group("lr", {"dict": [[[], 1]]}), ValueError, "not a value"),
    "missing tensor": (
        in_state("exp_avg_codes", {"tensor": "gone"}),
        KeyError,
        r"state\[0\]\['exp_avg_codes'\]: missing tensor 'gone'",
    ),
    "tensor twice": (
        in_state("exp_avg_codes", {"tensor": "state.0.step"}),
        ValueError,
        "tensor 'state.0.step' is used twice",
    ),
    "extra tensor": (in_state("exp_avg_codes", 1), KeyError, "unknown tensor"),
    "entry twice": (
        lambda header: header["state"].append([0, 1]),
        ValueError,
        "not an entry, or there twice",
    ),
    "unknown parameter": (
        lambda header: header["state"].append([9, {"dict": []}]),
        KeyError,
        "unknown parameter 9",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_edited_headers(name, saved):
    change, error, message = HOSTILE[name]
    edit(saved, change)
    refuses(saved, error, message)


def test_header_that_is_no_json_or_too_deep(saved):
    outer, data = parts(saved)
    good = outer["__metadata__"]["optstate"]
    for text in ("{", "", good[:-5], "[" * 100_000):
        outer["__metadata__"]["optstate"] = text
        rewrite(saved, outer, data)
        refuses(saved, ValueError, "header: not JSON")
    deep = sys.getrecursionlimit()
    value = '{"tuple": [' * deep + "]}" * deep
    outer["__metadata__"]["optstate"] = good.replace('"state": [', f'"state": [["x", {value}], ', 1)
    rewrite(saved, outer, data)
    refuses(saved, ValueError, "header: (not JSON|nested too deep)")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [216]}, "shape"),
        ({"dtype": "I8"}, "dtype torch.int8, must be torch.uint8"),
    ],
    ids=["shape", "dtype"],
)
def test_tensors_of_another_shape_or_dtype(change, message, saved):
    outer, data = parts(saved)
    outer["state.0.exp_avg_codes"] |= change
    rewrite(saved, outer, data)
    refuses(saved, ValueError, message)


def test_missing_and_extra_tensors(saved):
    tensors = safetensors_torch.load_file(saved)
    with safetensors_open(saved) as file:
        metadata = file.metadata()
    rest = {key: value for key, value in tensors.items() if key != "state.1.exp_avg_sq_scale"}
    safetensors_torch.save_file(rest, saved, metadata=metadata)
    refuses(saved, KeyError, "missing tensor 'state.1.exp_avg_sq_scale'")
    safetensors_torch.save_file({**tensors, "more": torch.ones(1)}, saved, metadata=metadata)
    refuses(saved, KeyError, "unknown tensor 'more'")


def test_names_that_differ(tmp_path):
    def named(*names):
        return make([(name, nn.Parameter(torch.ones(4, 4))) for name in names])

    optimizer = named("a", "b")
    train(optimizer)
    save_safetensors(optimizer, tmp_path / "file")
    other = named("b", "a")
    message = r"param_groups\[0\]: parameter 'a' in the place of 'b'"
    with pytest.raises(ValueError, match=message):
        load_safetensors(other, tmp_path / "file")
    assert not other.state
    load_safetensors(make([nn.Parameter(torch.ones(4, 4)) for _ in "ab"]), tmp_path / "file")


# --- writing


class Unwritable:
    pass


def test_a_value_that_cannot_be_written(tmp_path, saved):
    before = saved.read_bytes()
    optimizer = make(net().parameters())
    optimizer.param_groups[0]["mine"] = Unwritable()
    with pytest.raises(TypeError, match=r"param_groups\.0\.mine: Unwritable: must be a tensor"):
        save_safetensors(optimizer, saved)
    optimizer.param_groups[0]["mine"] = {(1, 2): 3}
    with pytest.raises(TypeError, match=r"mine: key \(1, 2\): must be text or an int"):
        save_safetensors(optimizer, saved)
    assert saved.read_bytes() == before
    assert list(tmp_path.iterdir()) == [saved]


def test_a_failed_write_leaves_the_old_file(tmp_path, saved, monkeypatch):
    before = saved.read_bytes()

    def fails(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors_torch, "save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        save_safetensors(other_optimizer(), saved)
    assert saved.read_bytes() == before
    assert list(tmp_path.iterdir()) == [saved]
    load_safetensors(other_optimizer(), saved)


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(OSError, match="gone"):
        save_safetensors(other_optimizer(), tmp_path / "gone" / "file")


def test_without_safetensors(monkeypatch, saved):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    message = re.escape("pip install 'optstate-codecs[safetensors]'")
    for call in (save_safetensors, load_safetensors):
        with pytest.raises(ImportError, match=message):
            call(other_optimizer(), saved)


def test_optimizers_of_other_libraries(saved):
    exact = torch.optim.Adam(net().parameters())
    for call in (save_safetensors, load_safetensors):
        with pytest.raises(TypeError, match="optimizer=Adam: must be an optimizer of the family"):
            call(exact, saved)


@pytest.fixture
def one_process(tmp_path):
    dist = torch.distributed
    store = dist.FileStore(str(tmp_path / "rendezvous"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_dtensors_are_refused(one_process, saved):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    param = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
    optimizer = make([param])
    for call in (save_safetensors, load_safetensors):
        with pytest.raises(TypeError, match=r"parameter 0: is a DTensor.*torch.distributed.check"):
            call(optimizer, saved)

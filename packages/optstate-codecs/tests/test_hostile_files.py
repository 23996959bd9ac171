"""Files that somebody has made to do harm: manifests, links, pipes, headers, pickles.

Each is refused with an error that names the fault. Nothing changes in the optimizer, in the folder
and outside of it.
"""

import gc
import hashlib
import io
import json
import os
import pickle
import re
import struct

import pytest
import torch
from files import make
from offloads import run
from torch.nn import Parameter

from optstate_codecs import load_safetensors, save_safetensors
from optstate_codecs.files import parse_json
from optstate_codecs.offloading import offload
from optstate_codecs.offloading.manifest import write_manifest

SHAPES = ((40, 30), (5,), (), (64, 160))
# so small that the last parameter has parts
CHUNK = 1 << 13


def fresh(seed: int = 0, steps: int = 0):
    generator = torch.Generator().manual_seed(seed)
    params = [Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = make(params)
    for time in range(steps):
        run(params, optimizer, time, missing=False)
    return params, optimizer


def content(folder):
    """Every file under a folder, by its path: bytes, or where a link leads."""
    return {
        str(found.relative_to(folder)): os.readlink(found)
        if found.is_symlink()
        else hashlib.sha256(found.read_bytes()).hexdigest()
        for found in sorted(folder.rglob("*"))
        if found.is_symlink() or found.is_file()
    }


def bits(params, optimizer):
    """Parameters, state and groups, to the bit."""
    found = [p.detach().clone() for p in params]
    for group in optimizer.param_groups:
        found.append({key: value for key, value in group.items() if key != "params"})
        for p in group["params"]:
            found.append({k: v.clone() for k, v in optimizer.state[p].items()})
    return found


def same(first, second):
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict) and first.keys() == second.keys():
        return all(same(value, second[key]) for key, value in first.items())
    return first == second


def refuses(load, errors, words, folder):
    """Raise unless ``load`` refuses what it is given, and changes nothing."""
    params, optimizer = fresh(1, 1)
    before, files = bits(params, optimizer), content(folder)
    with pytest.raises(errors, match=words):
        load(optimizer)
    after = bits(params, optimizer)
    assert len(before) == len(after)
    assert all(map(same, before, after))
    assert content(folder) == files


def resume(path):
    return lambda optimizer: offload(optimizer, "disk", path=path, resume=True)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The content of a state file and of its manifest, by name."""
    path = tmp_path_factory.mktemp("original") / "state"
    params, optimizer = fresh()
    offload(optimizer, "disk", path=path, chunk_bytes=CHUNK)
    for time in range(2):
        run(params, optimizer, time, missing=False)
    del optimizer
    gc.collect()
    return {found.name: found.read_bytes() for found in path.parent.iterdir()}


@pytest.fixture
def stored(original, tmp_path):
    """A state file with its manifest, alone in a folder; beside it is one with the same content."""
    for folder in ("store", "outside"):
        (tmp_path / folder).mkdir()
        for name, raw in original.items():
            (tmp_path / folder / name).write_bytes(raw)
    return tmp_path / "store" / "state"


# --- manifests


def top(**changes):
    return lambda manifest: manifest.update(changes)


def first(name, **changes):
    """Changes of the first entry, or of the first parameter's: entries are in order of slabs."""

    def change(manifest):
        _by_number(manifest)
        manifest[name][0].update(changes)

    return change


def _by_number(manifest):
    manifest["parameters"].sort(key=lambda entry: entry["number"])
    return manifest["parameters"]


def _twice(manifest):
    manifest["slabs"][1].update(manifest["slabs"][0])


def _others_twice(manifest):
    slab = manifest["slabs"][0]
    slab["others"] = [slab["offset"]]


def _starts_twice(manifest):
    starts = _by_number(manifest)[0]["starts"]
    starts["exp_avg_codes"] = starts["exp_avg_sq_codes"]


def _another_parameters(manifest):
    one, other = _by_number(manifest)[:2]
    assert one["slab"] == other["slab"]
    other["starts"]["exp_avg_codes"] = one["starts"]["exp_avg_codes"]


def _number_twice(manifest):
    manifest["parameters"].append(dict(_by_number(manifest)[0]))


def _parts(manifest):
    _by_number(manifest)[0]["parts"] = 2


MANIFESTS = {
    "id of another kind": (top(id="../../etc/passwd"), "id: '../../etc/passwd', must be 32 hex"),
    "id as long as ours": (top(id="#!/bin/sh" + 23 * "x"), "id: .*must be 32 hexadecimal digits"),
    "id in two halves": (top(id="\ud800" * 32), "id: .*must be 32 hexadecimal digits"),
    "negative size": (top(bytes=-4096), "bytes: -4096, must be a multiple"),
    "no size": (top(bytes=0), "bytes: 0, must be a multiple"),
    "odd size": (top(bytes=4097), "bytes: 4097, must be a multiple"),
    "size that overflows": (top(bytes=2**64), "cut off"),
    "huge size": (top(bytes=4096 * 10**30), "cut off"),
    "size True": (top(bytes=True), "bytes: True, must be a whole number"),
    "size as text": (top(bytes="4096"), "bytes: '4096', must be a whole number"),
    "chunk 0": (top(chunk_bytes=0), "chunk_bytes: 0, must be from 1"),
    "chunk negative": (top(chunk_bytes=-1), "chunk_bytes: -1, must be from 1"),
    "chunk huge": (top(chunk_bytes=2**63), "chunk_bytes: .*, must be from 1 to"),
    "slab over the header": (first("slabs", offset=0), r"slabs\[0\]: byte 0 is in the header too"),
    "slab before the file": (first("slabs", offset=-4096), "the header: byte 0 is in slabs"),
    "slab behind the file": (first("slabs", offset=2**40), "a slab of .* at byte 1099511627776"),
    "slab behind 2**63": (
        first("slabs", offset=2**64),
        "a slab of .* at byte 18446744073709551616",
    ),
    "slab of negative size": (first("slabs", bytes=-1), "slab of -1 bytes|is in"),
    "slab of huge size": (first("slabs", bytes=2**62), "is in|a slab of"),
    "slab twice": (_twice, r"slabs\[1\]: byte \d+ is in slabs\[0\] too"),
    "memory twice": (_others_twice, r"slabs\[0\]: byte \d+ is in slabs\[0\] too"),
    "others True": (first("slabs", others=[True]), "others: True, must be a whole number"),
    "others a path": (first("slabs", others=["/dev/mem"]), "others: '/dev/mem', must be a whole"),
    "slab -1": (first("parameters", slab=-1), r"parameters\[0\]: slab -1, of"),
    "slab 99": (first("parameters", slab=99), r"parameters\[0\]: slab 99, of"),
    "number -1": (first("parameters", number=-1), "parameter -1"),
    "number twice": (_number_twice, "parameter 0: of 4, each once"),
    "huge shape": (first("parameters", shape=[2**40, 2**40]), "parameter 0: shape"),
    "negative shape": (first("parameters", shape=[-40, -30]), "parameter 0: shape"),
    "step NaN": (first("parameters", step=float("nan")), "step nan, must be a whole number"),
    "step inf": (first("parameters", step=float("inf")), "step inf, must be a whole number"),
    "step -1": (first("parameters", step=-1.0), "step -1.0, must be a whole number"),
    "step .5": (first("parameters", step=0.5), "step 0.5, must be a whole number"),
    "step 1e300": (first("parameters", step=1e300), r"step 1e\+300, must be a whole number"),
    "parts 0": (first("parameters", parts=0), r"parameters\[0\]: parts 0, must be 1"),
    "parts -1": (first("parameters", parts=-1), r"parameters\[0\]: parts -1, must be 1"),
    "parts of a shared slab": (_parts, "parts 2, must be 1, or more if alone in its slab"),
    "components share bytes": (_starts_twice, "shares bytes with"),
    "parameters share bytes": (_another_parameters, "shares bytes with"),
    "start -128": (first("parameters", starts={"exp_avg_codes": -128}), "stored as|does not fit"),
    "start a text": (first("parameters", starts={"a": "b"}), "starts: 'a': 'b', must be a whole"),
    "rate NaN": (first("param_groups", lr=float("nan")), "lr=nan"),
    "rate without a float": (
        first("param_groups", lr=10**400),
        "param_groups.*(lr=1000|too large)",
    ),
    "rate a text": (first("param_groups", lr="__import__('os')"), "lr="),
    "betas": (first("param_groups", betas=[2, -1]), "betas"),
    "parameters": (first("param_groups", params=10**9), "1000000000 parameters, must be 4"),
    "parameters negative": (first("param_groups", params=-4), "-4 parameters, must be 4"),
    "seed": (first("param_groups", rounding_seed=-1), "rounding_seed=-1"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests(name, stored, tmp_path):
    change, words = MANIFESTS[name]
    path = stored.with_name("state.json")
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    refuses(resume(stored), ValueError, words, tmp_path)


TEXTS = {
    "nothing": (b"", "not a manifest"),
    "half": (None, "not a manifest"),
    "not UTF-8": (b"\xff\xfe\x00", "not a manifest"),
    "deep": (b"[" * 200_000, "not a manifest: nested too deep"),
    "number of too many digits": (b'{"bytes": ' + b"9" * 100_000 + b"}", "not a manifest"),
    "a key twice": (b'{"id": "a", "id": "b"}', "not a manifest: key 'id' is there twice"),
    "pickle": (pickle.dumps({"id": "a"}), "not a manifest"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_in_place_of_a_manifest(name, stored, tmp_path):
    raw, words = TEXTS[name]
    path = stored.with_name("state.json")
    path.write_bytes(path.read_bytes()[:200] if raw is None else raw)
    refuses(resume(stored), ValueError, words, tmp_path)


def test_a_manifest_larger_than_any(stored, tmp_path):
    with stored.with_name("state.json").open("r+b") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    params, optimizer = fresh(1, 1)
    before = bits(params, optimizer)
    with pytest.raises(ValueError, match="1099511627776 bytes, must be at most"):
        resume(stored)(optimizer)
    assert all(map(same, before, bits(params, optimizer)))


# --- links, pipes and devices


def _link(path, target):
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def _fifo(path):
    path.unlink()
    os.mkfifo(path)


def _folder(path):
    path.unlink()
    path.mkdir()


REPLACED = {
    "absolute link": lambda path: _link(path, path.parents[1].absolute() / "outside" / path.name),
    "climbing link": lambda path: _link(path, f"../outside/{path.name}"),
    "link to itself": lambda path: _link(path, path.name),
    "link to nothing": lambda path: _link(path, "../outside/gone"),
    "link to a device": lambda path: _link(path, "/dev/zero"),
    "pipe": _fifo,
    "folder": _folder,
}


@pytest.mark.parametrize("name", ["state", "state.json"])
@pytest.mark.parametrize("kind", REPLACED)
def test_something_else_in_place_of_a_file(kind, name, stored, tmp_path):
    """The manifest's id is right where a link leads, so nothing but the link tells it."""
    REPLACED[kind](stored.with_name(name))
    words = "symbolic link, must be a regular file" if "link" in kind else "regular|directory"
    refuses(resume(stored), OSError, f"{re.escape(name)}.*({words})|({words}).*{name}", tmp_path)


@pytest.mark.parametrize("target", ["outside/state", "outside/gone"])
def test_a_new_state_file_is_not_made_through_a_link(target, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "state").write_bytes(b"precious")
    _link(tmp_path / "new", tmp_path / target)
    refuses(
        lambda optimizer: offload(optimizer, "disk", path=tmp_path / "new"),
        FileExistsError,
        "there already",
        tmp_path,
    )


def test_a_manifest_is_not_written_through_a_link(stored, tmp_path):
    """A link under the name of the new manifest, before the rename, led elsewhere."""
    outside = content(tmp_path / "outside")
    params, optimizer = fresh()
    resume(stored)(optimizer)
    _link(stored.with_name("state.json.new"), tmp_path / "outside" / "state")
    run(params, optimizer, 2)
    dict(optimizer.state)
    assert content(tmp_path / "outside") == outside
    del optimizer
    gc.collect()
    assert sorted(found.name for found in stored.parent.iterdir()) == ["state", "state.json"]
    assert json.loads(stored.with_name("state.json").read_text())["parameters"][0]["step"] == 3


def test_what_a_manifest_may_not_replace(tmp_path):
    (tmp_path / "m.json.new").mkdir()
    with pytest.raises(OSError, match=r"m\.json\.new"):
        write_manifest(tmp_path / "m.json", {}, False)
    assert sorted(found.name for found in tmp_path.iterdir()) == ["m.json.new"]


def test_a_folder_that_is_a_link_is_the_users_own_choice(stored, tmp_path):
    _link(tmp_path / "elsewhere", stored.parent)
    params, optimizer = fresh()
    resume(tmp_path / "elsewhere" / "state")(optimizer)
    run(params, optimizer, 2)


def test_a_file_without_its_end(stored, tmp_path):
    raw = stored.read_bytes()
    for length in (0, 31, 4095, 4096, len(raw) - 1):
        stored.write_bytes(raw[:length])
        refuses(resume(stored), ValueError, "another file|cut off", tmp_path)


def test_a_file_of_another_id(stored, tmp_path):
    raw = stored.read_bytes()
    stored.write_bytes(b"f" * 32 + raw[32:])
    refuses(resume(stored), ValueError, "the manifest of another file", tmp_path)


# --- safetensors


def _rewrite(path, change):
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    outer = json.loads(raw[8 : 8 + length])
    inner = json.loads(outer["__metadata__"]["optstate"])
    text = change(outer, inner)
    outer["__metadata__"]["optstate"] = json.dumps(inner) if text is None else text
    header = json.dumps(outer).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])


def tensor(key="state.0.exp_avg_codes", **changes):
    def change(outer, inner):
        outer[key].update(changes)

    return change


def metadata(**changes):
    def change(outer, inner):
        inner.update(changes)

    return change


def _same_key(outer, inner):
    inner["param_groups"][0]["dict"].append(["lr", 1.0])


def _same_name(outer, inner):
    return json.dumps(inner)[:-1] + ', "state": []}'


def _swapped(outer, inner):
    outer["state.0.exp_avg_codes"], outer["state.0.exp_avg_scale"] = (
        outer["state.0.exp_avg_scale"],
        outer["state.0.exp_avg_codes"],
    )


HEADERS = {
    "negative shape": (tensor(shape=[-40, 30]), "truncated, or no safetensors file"),
    "huge shape": (tensor(shape=[2**62, 2**62]), "truncated, or no safetensors file"),
    "shape that overflows": (tensor(shape=[2**64, 1]), "truncated, or no safetensors file"),
    "offsets backwards": (tensor(data_offsets=[8, 0]), "truncated, or no safetensors file"),
    "offsets outside": (tensor(data_offsets=[0, 2**40]), "truncated, or no safetensors file"),
    "negative offsets": (tensor(data_offsets=[-8, 0]), "truncated, or no safetensors file"),
    "unknown dtype": (tensor(dtype="X9"), "truncated, or no safetensors file"),
    "signed codes": (tensor(dtype="I8"), "dtype torch.int8, must be torch.uint8"),
    "codes of 8-bit floats": (tensor(dtype="F8_E4M3"), "dtype torch.float8"),
    "swapped tensors": (_swapped, "shape|dtype"),
    "a key twice": (_same_key, "a key is there twice"),
    "a field twice": (_same_name, "key 'state' is there twice"),
    "version": (metadata(format_version=[1]), r"format_version=\[1\]: must be 1"),
    "shapes": (metadata(shapes=[[40, 30], [5], [], [2**40, 2**40]]), "parameter 3: shape"),
    "groups nested": (metadata(param_groups=[[[]]]), r"param_groups\[0\]: must be a dict"),
    "state nested": (metadata(state=[[[[]]]]), "not an entry, or there twice"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_safetensors_headers(name, tmp_path):
    pytest.importorskip("safetensors")
    change, words = HEADERS[name]
    _, optimizer = fresh(0, 1)
    save_safetensors(optimizer, tmp_path / "file")
    _rewrite(tmp_path / "file", change)
    load = lambda other: load_safetensors(other, tmp_path / "file")  # noqa: E731
    refuses(load, (ValueError, KeyError), words, tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to nothing"])
def test_something_else_in_place_of_a_safetensors_file(kind, tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    path.touch()
    REPLACED[kind](path)
    load = lambda other: load_safetensors(other, path)  # noqa: E731
    refuses(load, FileNotFoundError, "no such file", tmp_path)


def test_safetensors_are_not_written_through_a_link(tmp_path):
    pytest.importorskip("safetensors")
    (tmp_path / "store").mkdir()
    (tmp_path / "precious").write_bytes(b"precious")
    for name in ("file", f"file.{os.getpid()}.new"):
        _link(tmp_path / "store" / name, "../precious")
    _, optimizer = fresh(0, 1)
    save_safetensors(optimizer, tmp_path / "store" / "file")
    assert (tmp_path / "precious").read_bytes() == b"precious"
    (saved,) = (tmp_path / "store").iterdir()
    assert not saved.is_symlink()
    load_safetensors(fresh(1)[1], saved)


def test_keys_of_json_are_unique_at_every_depth():
    assert parse_json('{"a": {"b": 1}, "c": [{"b": 2}]}') == {"a": {"b": 1}, "c": [{"b": 2}]}
    with pytest.raises(ValueError, match="key 'b' is there twice"):
        parse_json('{"a": [{"b": 1, "b": 1}]}')


# --- pickles


class Runs:
    """A pickle that makes a folder when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["state", "param_groups", "beside"])
def test_code_in_a_pickle_does_not_run(place, tmp_path):
    _, optimizer = fresh(0, 1)
    saved = optimizer.state_dict()
    code = Runs(tmp_path / "made")
    if place == "state":
        saved["state"][0]["more"] = code
    elif place == "param_groups":
        saved["param_groups"][0]["more"] = code
    else:
        saved["more"] = code
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError, match="mkdir"):
        torch.load(file, weights_only=True)
    assert not (tmp_path / "made").exists()
    file.seek(0)
    torch.load(file, weights_only=False)  # what it would have done
    assert (tmp_path / "made").exists()

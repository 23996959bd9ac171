"""State in a file: going on from it, and what is said where that, or a write, is not possible."""

import copy
import gc
import json

import pytest
import torch
from files import files, make, refused, reopened
from offloads import Pair, params, run
from subjects import adam

from optstate_codecs import CodedOptimizer
from optstate_codecs.offloading import disk, manifest, offload
from optstate_codecs.rules import SGD


@pytest.fixture
def pair(path):
    return Pair(make, store="disk", path=path, chunk_bytes=9000).run(3)


def test_resume_goes_on_bit_for_bit(pair, path):
    for group in (o.param_groups[0] for o in pair.optimizers):
        group["lr"], group["betas"], group["weight_decay"] = 0.003, (0.8, 0.95), 0.1
    pair.run(2)
    pair = reopened(pair, make, path)
    group = pair.optimizers[1].param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.003, (0.8, 0.95), 0.1)
    assert pair.optimizers[1].offloaded.chunk_bytes == 9000
    pair.check("as resumed")
    pair.run(3).check("after steps")
    reopened(pair, make, path).run(2).check("a second time")
    assert files(path) == ["state", "state.json"]


def test_a_relative_path_is_that_of_the_working_directory_then(path, monkeypatch):
    """The process may have changed its directory when it writes a manifest, or ends."""
    monkeypatch.chdir(path.parent)
    pair = Pair(make, store="disk", path=path.name, chunk_bytes=9000).run(1)
    (elsewhere := path.parent / "elsewhere").mkdir()
    monkeypatch.chdir(elsewhere)
    pair.run(2)
    reopened(pair, make, path).run(2).check()
    assert not list(elsewhere.iterdir())


def test_resume_of_groups_tensors_and_moments_that_came_later(path):
    def build(given):
        groups = [{"params": given[:3], "lr": torch.tensor(0.1)}, {"params": given[3:]}]
        return make(groups, amsgrad=False, centralization=0.5, fused=True)

    pair = Pair(build, store="disk", path=path, chunk_bytes=9000).run(2)
    for _, optimizer in pair.each():
        optimizer.param_groups[0]["lr"].fill_(0.05)
        optimizer.param_groups[1]["amsgrad"] = True
    del optimizer
    pair.run(2)
    reopened(pair, build, path)
    assert float(pair.optimizers[1].param_groups[0]["lr"]) == pytest.approx(0.05)
    pair.run(3).check()


def test_resume_of_rules_without_state(path):
    def build(given):
        return CodedOptimizer(given, SGD(), {"momentum_buffer": "int8"}, lr=0.1)

    pair = Pair(build, store="disk", path=path).run(3)
    reopened(pair, build, path).run(2).check()


def test_all_state_is_in_the_file(path):
    """Also what was loaded, or was there before, of parameters that have no gradient since."""

    def step(pair, frozen):
        for ours, optimizer in pair.each():
            for index, param in enumerate(ours):
                param.requires_grad_(index not in frozen)
            run(ours, optimizer, pair.time, missing=False)
        pair.time += 1

    pair = Pair(make).run(2, missing=False)
    pair.optimizers = pair.optimizers[0], make(pair.params[1])
    pair.optimizers[1].load_state_dict(copy.deepcopy(pair.optimizers[0].state_dict()))
    offload(pair.optimizers[1], "disk", path=path, chunk_bytes=9000)
    step(pair, [0, 1])
    reopened(pair, make, path).check("there before")
    early = copy.deepcopy(pair.optimizers[0].state_dict())
    step(pair, [])
    step(pair, [])
    for _, optimizer in pair.each():
        optimizer.load_state_dict(early)
    step(pair, [0, 1, 4])
    del optimizer
    reopened(pair, make, path).check("loaded")
    for ours, optimizer in pair.each():
        del optimizer.state[ours[0]], optimizer.state[ours[1]], optimizer.state[ours[3]]
    del optimizer
    step(pair, [0, 1, 6])
    reopened(pair, make, path).check("deleted")
    pair.run(3).check()


def test_an_optimizer_that_is_gone_has_kept_its_last_step(pair, path):
    """No wait, no settling: dropping it is enough, many times over."""
    for _ in range(10):
        pair.run(1)
        reopened(pair, make, path)
    pair.check()


def test_a_fresh_file_is_not_made_over_another(pair, path):
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="resume=True"):
        offload(make(params()), "disk", path=path)
    with pytest.raises(OSError, match="in use by another"):
        offload(make(params()), "disk", path=path, resume=True)
    assert path.read_bytes() == before
    pair.run(2).check()


def test_resume_needs_a_file_and_a_step(path):
    with pytest.raises(FileNotFoundError):
        offload(make(params()), "disk", path=path, resume=True)
    assert files(path) == []
    optimizer = offload(make(params()), "disk", path=path)
    del optimizer
    with pytest.raises(FileNotFoundError, match="no step was completed"):
        offload(make(params()), "disk", path=path, resume=True)


def _edited(**changes):
    def edit(content):
        return {**content, **changes}

    return edit


def _entry(name, **changes):
    def edit(content):
        content[name][0] = {**content[name][0], **changes}
        return content

    return edit


BROKEN = {
    "not JSON": (lambda content: None, "not a manifest"),
    "a list": (lambda content: [content], "not a manifest"),
    "empty": (lambda content: {}, "version|not a manifest"),
    "version": (_edited(version=99), "version 99, must be 1"),
    "id": (_edited(id="0" * 32), "manifest of another file"),
    "bytes": (_edited(bytes="many"), "not a manifest: bytes"),
    "too many bytes": (_edited(bytes=1 << 40), "cut off"),
    "slabs": (_edited(slabs=[]), "not a manifest"),
    "offset": (_entry("slabs", offset=5), "in the header too"),
    "unaligned offset": (_entry("slabs", offset=(1 << 30) + 5), "slab of"),
    "far offset": (_entry("slabs", offset=1 << 40), "slab of"),
    "others": (_entry("slabs", others=["x"]), "not a manifest"),
    "number": (_entry("parameters", number=77), "parameter 77"),
    "shape": (_entry("parameters", shape=[3, 3]), "shape"),
    "order": (_entry("parameters", order=[1, 0]), "order"),
    "step": (_entry("parameters", step="x"), "not a manifest"),
    "starts": (_entry("parameters", starts={"exp_avg": 0}), "stored as"),
    "groups": (_edited(param_groups=[]), "0 groups, must be 1"),
    "group": (_edited(param_groups=["x"]), "not a manifest"),
    "lr": (_entry("param_groups", lr=-1.0), "lr"),
    "params": (_entry("param_groups", params=3), "3 parameters, must be 7"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_manifests_that_are_wrong(name, pair, path):
    edit, words = BROKEN[name]
    pair.optimizers = pair.optimizers[0], None
    gc.collect()
    manifest_path = manifest.manifest_path(path)
    good = manifest_path.read_text()
    content = edit(json.loads(good))
    manifest_path.write_text("{nonsense" if content is None else json.dumps(content))
    refused(pair.params[1], make, path, words)
    manifest_path.write_text(good)
    reopened(pair, make, path).check()


OTHERS = {
    "formats": (lambda given: adam("int8", "fp32")(given), "formats|stored as"),
    "fewer": (lambda given: make(given[:4]), "7 parameters, must be 4"),
    "groups": (
        lambda given: make([{"params": given[:3]}, {"params": given[3:]}]),
        "1 groups, must be 2",
    ),
    "write": (lambda given: make([p.bfloat16() for p in given], write="split24"), "stored as"),
    "transposed": (
        lambda given: make([given[0].data.t().contiguous().t().requires_grad_(), *given[1:]]),
        "order",
    ),
    "shape": (lambda given: make([given[0].data.view(-1).requires_grad_(), *given[1:]]), "shape"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_optimizers_are_refused(name, pair, path):
    build, words = OTHERS[name]
    pair.optimizers = pair.optimizers[0], None
    gc.collect()
    with torch.no_grad():
        other = build(pair.params[1])
    with pytest.raises(ValueError, match=words):
        offload(other, "disk", path=path, resume=True)
    assert other.offloaded is None
    reopened(pair, make, path).run(2).check()


def test_the_wrong_arguments(path):
    optimizer = make(params())
    for options, words in (
        ({"store": "tape"}, "store"),
        ({"store": "disk"}, "path"),
        ({"path": path}, "path"),
        ({"resume": True}, "resume"),
        ({"sync": True}, "sync"),
        ({"chunk_bytes": 0}, "chunk_bytes"),
        ({"resident_bytes": -1}, "resident_bytes"),
        ({"store": "disk", "path": path, "resident_bytes": 5}, "resident_bytes"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            offload(optimizer, **options)
    with pytest.raises(TypeError, match="OffloadOptimizer"):
        offload(torch.optim.SGD(params()))
    assert files(path) == []
    with pytest.raises(ValueError, match="offloaded already"):
        offload(offload(optimizer))


def test_synced(path):
    pair = Pair(make, store="disk", path=path, chunk_bytes=30_000, sync=True).run(2)
    reopened(pair, make, path, sync=True).run(1).check()
    assert disk.HEADER % 4096 == 0

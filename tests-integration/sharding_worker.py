"""One process of ``test_sharding.py``: what to do, rank, workers, folder, device type.

Gradients are those of the global tensors, the same for any number of workers, so that results can
be compared bit by bit. The first worker saves what it found.
"""

import sys
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.nn import Parameter
from torch.optim import Optimizer

import stochbf16
from lowbit_adam import AdamW4bit, AdamW8bit, AdamWFp8, Lion8bit, SGD8bit
from optstate_codecs import (
    Adam,
    CodedOptimizer,
    GradientRelease,
    decode_state,
    master_weights,
    memory_report,
    offload,
    predicted_state_bytes,
    snapshot,
    state_bytes,
)
from optstate_wrap import ConfigurablePolicy, wrap, wrap_low_memory_adamw
from turboadam import TurboAdam

Make = Callable[[Any], Optimizer]
EXACT = {"exp_avg": "fp32", "exp_avg_sq": "fp32"}
torch_adamw = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1, foreach=False)
exact = partial(CodedOptimizer, rule=Adam(decoupled=True), formats=EXACT, lr=1e-2, weight_decay=0.1)
FAMILY: dict[str, Make] = {
    "AdamW8bit": partial(AdamW8bit, lr=1e-2),
    "AdamW4bit": partial(AdamW4bit, lr=1e-2),
    "AdamWFp8": partial(AdamWFp8, lr=1e-2),
    "Lion8bit": partial(Lion8bit, lr=1e-3),
    "SGD8bit": partial(SGD8bit, lr=1e-2, momentum=0.9),
    "TurboAdam": partial(TurboAdam, lr=1e-2, mode="adamw"),
    "TurboAdam-3-4": partial(TurboAdam, lr=1e-2, mode="adamw", m_bits=3, v_bits=4),
    "TurboAdam-flush": partial(TurboAdam, lr=1e-2),
    "stochbf16.AdamW": partial(stochbf16.AdamW, lr=1e-2),
    "split24": partial(AdamW8bit, lr=1e-2, master_weight_bits=24),
}
WRAPPED: dict[str, Any] = {
    "8 bits": {"exp_avg": "int8(rounding=stochastic, units=update)", "exp_avg_sq": "oneq(bits=8)"},
    "4 bits": {"exp_avg": "int4(block_size=128)", "exp_avg_sq": "oneq(bits=4)"},
    "16 bits": {"exp_avg": "fp16", "exp_avg_sq": "bf16(rounding=stochastic)"},
    "from the third step": None,
    "exact": {},
}
SAVED = {
    name: FAMILY[name]
    for name in ("AdamW8bit", "AdamW4bit", "TurboAdam-3-4", "TurboAdam-flush", "split24")
}
HALF = ("stochbf16.AdamW", "split24")
DEVICE = "cpu"


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Rows that workers cannot share evenly, of lengths that blocks fit and do not fit."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(256, 96), nn.Linear(96, 48), nn.Linear(300, 20), nn.Conv2d(32, 18, 3)]
        return nn.Sequential(*layers, nn.Linear(7, 3)).to(DEVICE, dtype)


def sharded(make: Make, dtype: torch.dtype = torch.float32, mesh: Any = None) -> Any:
    model = make_model(dtype)
    mesh = mesh or init_device_mesh(DEVICE, (dist.get_world_size(),))
    for layer in (*model, model):
        fully_shard(layer, mesh=mesh)
    return model, make(model.parameters())


def placed(value: Tensor, param: Any) -> Any:
    if not isinstance(param, DTensor):
        return value.to(param)
    return distribute_tensor(
        value.to(param.device, param.dtype), param.device_mesh, param.placements
    )


def train(
    params: Iterable[Any], optimizer: Optimizer, steps: Iterable[int], **options: Any
) -> None:
    params = list(params)
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = placed(torch.randn(param.shape, generator=generator), param)
        optimizer.step()


def whole(value: Any) -> Any:
    value = value.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).cpu().clone()


def results(params: Iterable[Any], optimizer: Any) -> list[Any]:
    """Parameters, master weights and decoded state, as wholes."""
    found = []
    for param in params:
        state = decode_state(optimizer, param)
        master = master_weights(optimizer, param)
        found.append([whole(param), whole(master), *(whole(v) for v in state.values())])
    return found


def dtype_of(name: str) -> torch.dtype:
    return torch.bfloat16 if name in HALF else torch.float32


def message_of(function: Callable[[], object]) -> str:
    try:
        function()
    except (Exception, CheckpointException) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


# what is to be the same for any number of workers


def steps(folder: Path) -> dict[str, Any]:
    """Five steps of each optimizer under FSDP2; of the exact one, torch's beside it."""
    found: dict[str, Any] = {}
    for name, make in FAMILY.items():
        model, optimizer = sharded(make, dtype_of(name))
        train(model.parameters(), optimizer, range(5))
        found[name] = results(model.parameters(), optimizer)
        local = state_bytes(optimizer)
        assert local == predicted_state_bytes(optimizer)  # type: ignore[arg-type]
    ours, theirs = sharded(exact), sharded(torch_adamw)
    for model, optimizer in (ours, theirs):
        train(model.parameters(), optimizer, range(5))
    found["exact"] = [whole(p) for p in ours[0].parameters()]
    found["torch"] = [whole(p) for p in theirs[0].parameters()]
    found["counted"] = memory_report(ours[1]).parameters
    return found


def stores(folder: Path) -> dict[str, Any]:
    """State on the host, in a file, in a snapshot; released gradients; each as resident state."""
    found = {}
    for name in ("AdamW8bit", "TurboAdam"):
        model, optimizer = sharded(FAMILY[name])
        train(model.parameters(), optimizer, range(4))
        expected = results(model.parameters(), optimizer)
        rank = dist.get_rank()
        path = folder / f"{name}-{dist.get_world_size()}-{rank}"
        for store in ("host", "disk"):
            place = {"path": path} if store == "disk" else {}
            other, away = sharded(FAMILY[name])
            away = offload(away, store, chunk_bytes=1 << 12, **place)
            train(other.parameters(), away, range(2))
            with snapshot(away) as taken:
                train(other.parameters(), away, range(2, 4))
                found[name, store] = results(other.parameters(), away)
                saved = taken.state_dict()
            third, resumed = sharded(FAMILY[name])
            third.load_state_dict(other.state_dict())
            resumed.load_state_dict(saved)
            found[name, store, "snapshot"] = all(
                torch.equal(whole(decode_state(resumed, p)["step"]), torch.tensor(2.0))
                for p in third.parameters()
            )
        found[name, "resident"] = expected
    return found


def released(folder: Path) -> dict[str, Any]:
    """Real backwards, with and without GradientRelease; both clipped as torch clips."""
    found = {}

    def run(release: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 5)).to(DEVICE)
        for layer in (model[0], model[2], model):
            fully_shard(layer)
        optimizer = AdamW8bit(model.parameters(), lr=1e-2)
        manager = GradientRelease(optimizer, bucket_bytes=0)
        if release:
            manager.attach()
        for step in range(4):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(step)
            model(torch.randn(8, 64, generator=generator).to(DEVICE)).square().mean().backward()
            optimizer.step()
        return [whole(p) for p in model.parameters()]

    found["released"] = all(map(torch.equal, run(True), run(False)))
    norms, ends = [], []
    for make in (partial(exact, max_grad_norm=0.5), torch_adamw):
        model, optimizer = sharded(make)
        train(model.parameters(), _Clipping(optimizer, model), range(3))
        norms.append(float(getattr(optimizer, "grad_norm", 0) or 0))
        ends.append([whole(p) for p in model.parameters()])
    found["clipped"] = max(float((a - b).abs().max()) for a, b in zip(*ends, strict=True))
    generator = torch.Generator().manual_seed(2)
    grads = [torch.randn(p.shape, generator=generator) for p in make_model().parameters()]
    found["norm"] = norms[0] / float(torch.cat([g.flatten() for g in grads]).norm())

    model, optimizer = sharded(partial(AdamW8bit, skip_nonfinite=True))
    before = [whole(p) for p in model.parameters()]
    for param in model.parameters():
        param.grad = placed(torch.ones(param.shape), param)
    if dist.get_rank() == dist.get_world_size() - 1:
        next(iter(model.parameters())).grad.to_local()[-1:] = torch.nan
    optimizer.step()
    found["skipped"] = all(map(torch.equal, before, [whole(p) for p in model.parameters()]))
    return found


class _Clipping:
    """torch's own clipping before the steps of torch's optimizer."""

    def __init__(self, optimizer: Any, model: nn.Module) -> None:
        self.optimizer, self.model = optimizer, model

    def step(self) -> None:
        if type(self.optimizer).__module__.startswith("torch."):
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        self.optimizer.step()


def placements(folder: Path) -> dict[str, Any]:
    """Other placements than FSDP2's: columns, replicas, a mesh of two dimensions."""
    world = dist.get_world_size()
    line = init_device_mesh(DEVICE, (world,))
    kinds: dict[str, tuple[Any, Any]] = {
        "rows": (line, [Shard(0)]),
        "columns": (line, [Shard(1)]),
        "replicas": (line, [Replicate()]),
    }
    if world == 4:
        square = init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("a", "b"))
        kinds["hybrid"] = (square, [Replicate(), Shard(0)])
        kinds["both"] = (square, [Shard(0), Shard(1)])
    found: dict[str, Any] = {}
    for kind, (mesh, where) in kinds.items():
        for name, make in {"exact": exact, **SAVED}.items():
            generator = torch.Generator().manual_seed(1)
            dtype = dtype_of(name)
            values = [
                torch.randn(shape, generator=generator).to(DEVICE, dtype)
                for shape in ((7, 256), (64, 128), (3, 7), (2, 1024))
            ]
            params = [Parameter(distribute_tensor(value, mesh, where)) for value in values]
            optimizer = make(params)
            train(params, optimizer, range(4))
            found[kind, name] = results(params, optimizer)
            # every replica has stepped alike
            for param in params:
                alike = param.to_local().detach().float().sum().repeat(1)
                gathered = [torch.zeros_like(alike) for _ in range(world)]
                dist.all_gather(gathered, alike)
                if kind == "replicas":
                    assert all(torch.equal(g, gathered[0]) for g in gathered)
    generator = torch.Generator().manual_seed(1)
    shapes = ((7, 256), (64, 128), (3, 7), (2, 1024))
    params = [Parameter(torch.randn(shape, generator=generator).to(DEVICE)) for shape in shapes]
    train(params, torch_adamw(params), range(4))
    found["torch"] = [whole(param) for param in params]
    return found


def refusals(folder: Path) -> dict[str, Any]:
    """What cannot be stepped, by name and before anything changes."""
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    value = torch.ones(64, 128, device=DEVICE)
    part = Parameter(DTensor.from_local(value, mesh, [Partial()]))
    found = {"partial": message_of(lambda: AdamW8bit([part]))}
    param = Parameter(distribute_tensor(value, mesh, [Shard(0)]))
    formats = {"exp_avg": "fp32", "exp_avg_sq": "linear4(normalization=rank1)"}
    whole_format = CodedOptimizer([param], Adam(), formats)
    param.grad = placed(value, param)
    found["rank1"] = message_of(whole_format.step)
    found["unchanged"] = torch.equal(whole(param), value.cpu())
    # a trainer shards the model after its optimizer was made
    plain = Parameter(value.clone())
    swapped = AdamW8bit([plain], lr=1e-2)
    train([plain], swapped, range(1))
    swapped.param_groups[0]["params"][0] = param
    swapped.state[param] = swapped.state.pop(plain)
    found["foreign"] = message_of(swapped.step)
    swapped.state.clear()
    swapped.step()
    found["swapped"] = float(decode_state(swapped, param)["step"])
    return found


# checkpoints

COMBINATIONS = {
    "plain": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
}


def saving(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, make in SAVED.items():
        model, optimizer = sharded(make, dtype_of(name))
        train(model.parameters(), optimizer, range(3))
        for kind, options in COMBINATIONS.items():
            state = {
                "model": model.state_dict(),
                "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
            }
            if kind == "flat":
                dcp.save(state, checkpoint_id=folder / f"{name}-{kind}")
            else:
                dcp.async_save(state, checkpoint_id=folder / f"{name}-{kind}").result()
        full = StateDictOptions(full_state_dict=True, cpu_offload=True)
        gathered = get_optimizer_state_dict(model, optimizer, options=full)
        own = folder / f"{name}-of-{dist.get_rank()}"
        torch.save(optimizer.state_dict(), own)
        other, resumed = sharded(make, dtype_of(name))
        other.load_state_dict(model.state_dict())
        resumed.load_state_dict(torch.load(own, weights_only=True))
        train(other.parameters(), resumed, range(3, 6))
        found[name, "by rank"] = results(other.parameters(), resumed)
        weights = {key: whole(value) for key, value in model.state_dict().items()}
        if dist.get_rank() == 0:
            torch.save({"model": weights, "optimizer": gathered}, folder / f"{name}-full")
        found[name, "saved"] = results(model.parameters(), optimizer)
        train(model.parameters(), optimizer, range(3, 6))
        found[name, "continued"] = results(model.parameters(), optimizer)
    model, optimizer = sharded(torch_adamw)
    train(model.parameters(), optimizer, range(3))
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder / "torch")
    found["torch"] = [
        {key: whole(value) for key, value in optimizer.state[param].items()}
        for param in model.parameters()
    ]
    return found


def loading(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, make in SAVED.items():
        for kind in (*COMBINATIONS, "full"):
            model, optimizer = sharded(make, dtype_of(name))
            if kind == "full":
                options = StateDictOptions(full_state_dict=True)
                state = torch.load(folder / f"{name}-full", weights_only=True)
                for param, value in zip(model.parameters(), state["model"].values(), strict=True):
                    param.data.copy_(placed(value, param))
            else:
                options = COMBINATIONS[kind]
                state = {
                    "model": model.state_dict(),
                    "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
                }
                dcp.load(state, checkpoint_id=folder / f"{name}-{kind}")
            set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
            found[name, kind, "saved"] = results(model.parameters(), optimizer)
            train(model.parameters(), optimizer, range(3, 6))
            found[name, kind, "continued"] = results(model.parameters(), optimizer)
    # between shards and plain tensors
    for name, make in SAVED.items():
        plain = make_model(dtype_of(name))
        single = make(plain.parameters())
        if dist.get_rank() == 0:
            state = torch.load(folder / f"{name}-full", weights_only=True)
            names = {key: number for number, (key, _) in enumerate(plain.named_parameters())}
            numbered = {names[key]: value for key, value in state["optimizer"]["state"].items()}
            groups = single.state_dict()["param_groups"]
            single.load_state_dict({"state": numbered, "param_groups": groups})
            found[name, "single"] = results(plain.parameters(), single)
        plain = make_model(dtype_of(name))
        single = make(plain.parameters())
        train(plain.parameters(), single, range(3))
        model, optimizer = sharded(make, dtype_of(name))
        optimizer.load_state_dict(single.state_dict())
        found[name, "of single"] = results(model.parameters(), optimizer)
        found[name, "single's"] = results(plain.parameters(), single)
    # torch's own checkpoint, into the family and back
    model, optimizer = sharded(torch_adamw)
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder / "torch")
    for name, make in {"exact": exact, "AdamW8bit": FAMILY["AdamW8bit"]}.items():
        model, optimizer = sharded(make)
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        found["from torch", name] = [
            [whole(v) for v in decode_state(optimizer, p).values()]  # type: ignore[arg-type]
            for p in model.parameters()
        ]
        back = torch_adamw(model.parameters())
        back.load_state_dict(optimizer.full_state_dict())  # type: ignore[attr-defined]
        found["back", name] = [
            [whole(back.state[p][key]) for key in ("step", "exp_avg", "exp_avg_sq")]
            for p in model.parameters()
        ]
    return found


# wrapped optimizers of torch


def make_wrapped(name: str, params: Any, **options: Any) -> Any:
    codecs = WRAPPED[name]
    if codecs is None:
        return wrap_low_memory_adamw(params, 1e-2, warmup_steps=2, min_int8_elements=16)
    return wrap(torch_adamw(params), ConfigurablePolicy(codecs), **options)


def wrapped_results(params: Iterable[Any], optimizer: Any) -> list[Any]:
    return [[whole(p), *(whole(v) for v in optimizer.state[p].values())] for p in params]


def wrapped(folder: Path) -> dict[str, Any]:
    """Five steps of wrapped optimizers under FSDP2."""
    found: dict[str, Any] = {}
    for name in WRAPPED:
        model, optimizer = sharded(partial(make_wrapped, name))
        train(model.parameters(), optimizer, range(5))
        found[name] = wrapped_results(model.parameters(), optimizer)
    return found


PACKED = ("8 bits", "4 bits", "16 bits", "exact")


def wrapped_state(model: Any, optimizer: Any, options: Any) -> dict[str, Any]:
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    return {"model": model.state_dict(), "optimizer": saved}


def wrapped_saving(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in PACKED:
        model, optimizer = sharded(partial(make_wrapped, name, packed_checkpoints=True))
        train(model.parameters(), optimizer, range(3))
        dcp.save(wrapped_state(model, optimizer, None), checkpoint_id=folder / f"{name}-dcp")
        own = {"model": model.state_dict(), "own": optimizer.packed_state_dict(per_rank=True)}
        dcp.save(own, checkpoint_id=folder / f"{name}-own")
        full = StateDictOptions(full_state_dict=True, cpu_offload=True)
        gathered = get_optimizer_state_dict(model, optimizer, options=full)
        weights = {key: whole(value) for key, value in model.state_dict().items()}
        if dist.get_rank() == 0:
            torch.save({"model": weights, "optimizer": gathered}, folder / f"{name}-full")
        found[name, "saved"] = wrapped_results(model.parameters(), optimizer)
        train(model.parameters(), optimizer, range(3, 6))
        found[name, "continued"] = wrapped_results(model.parameters(), optimizer)
    return found


def wrapped_loading(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in PACKED:
        for kind in ("dcp", "full", "own"):
            model, optimizer = sharded(partial(make_wrapped, name, packed_checkpoints=True))
            before = wrapped_results(model.parameters(), optimizer)
            if kind == "full":
                options = StateDictOptions(full_state_dict=True)
                state = torch.load(folder / f"{name}-full", weights_only=True)
                for param, value in zip(model.parameters(), state["model"].values(), strict=True):
                    param.data.copy_(placed(value, param))
                set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
            elif kind == "dcp":
                state = wrapped_state(model, optimizer, None)
                dcp.load(state, checkpoint_id=folder / f"{name}-dcp")
                set_optimizer_state_dict(model, optimizer, state["optimizer"])
            else:
                train(model.parameters(), optimizer, range(1))
                state = {"own": optimizer.packed_state_dict(per_rank=True)}
                state["model"] = model.state_dict()
                load = partial(dcp.load, state, checkpoint_id=folder / f"{name}-own")
                found[name, kind, "message"] = message_of(load)
                if dist.get_world_size() != 2:
                    continue
                optimizer.load_state_dict(state["own"])
            assert len(before) == len(list(model.parameters()))
            found[name, kind, "saved"] = wrapped_results(model.parameters(), optimizer)
            train(model.parameters(), optimizer, range(3, 6))
            found[name, kind, "continued"] = wrapped_results(model.parameters(), optimizer)
        # in a plain process
        model = make_model()
        optimizer = make_wrapped(name, model.parameters())
        state = torch.load(folder / f"{name}-full", weights_only=True)
        names = {key: number for number, (key, _) in enumerate(model.named_parameters())}
        numbered = {names[key]: value for key, value in state["optimizer"]["state"].items()}
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": numbered, "param_groups": groups})
        model.load_state_dict(state["model"])
        found[name, "plain", "saved"] = wrapped_results(model.parameters(), optimizer)
    return found


def wrapped_placements(folder: Path) -> dict[str, Any]:
    """Packed state of any placement, into the same placement and into every other."""
    world = dist.get_world_size()
    mesh = init_device_mesh(DEVICE, (world,))
    kinds: dict[str, Any] = {
        "rows": (mesh, [Shard(0)]),
        "columns": (mesh, [Shard(1)]),
        "replicas": (mesh, [Replicate()]),
    }
    if world == 4:
        kinds["hybrid"] = init_device_mesh(DEVICE, (2, 2)), [Replicate(), Shard(0)]
    shapes = ((7, 256), (64, 128), (3, 7), (6, 96), (2, 1024))

    def make(name: str, kind: str) -> tuple[list[Any], Any]:
        generator, (on, where) = torch.Generator().manual_seed(1), kinds[kind]
        values = [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]
        params = [Parameter(distribute_tensor(value, on, where)) for value in values]
        return params, make_wrapped(name, params)

    found: dict[str, Any] = {}
    for name in ("8 bits", "4 bits"):
        for kind in kinds:
            params, optimizer = make(name, kind)
            train(params, optimizer, range(3))
            saved = optimizer.packed_state_dict()
            found[name, kind, kind, "expected"] = wrapped_results(params, optimizer)
            for other in kinds:
                others, resumed = make(name, other)
                resumed.load_state_dict(saved)
                for ours, theirs in zip(others, params, strict=True):
                    ours.data.copy_(placed(whole(theirs).to(DEVICE), ours))
                found[name, kind, other, "loaded"] = wrapped_results(others, resumed)
                train(others, resumed, range(3, 5))
                found[name, kind, other, "continued"] = wrapped_results(others, resumed)
            train(params, optimizer, range(3, 5))
            # of the same placement, to the bit
            found[name, kind, kind, "went on"] = wrapped_results(params, optimizer)
    return found


def main() -> None:
    global DEVICE
    work, rank, world, folder, DEVICE = sys.argv[1:]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if DEVICE == "cuda":
        torch.cuda.set_device(int(rank))
    dist.init_process_group(
        "gloo" if DEVICE == "cpu" else "cpu:gloo,cuda:nccl",
        init_method=f"file://{folder}/store-{work}-{world}",
        rank=int(rank),
        world_size=int(world),
    )
    works = (steps, stores, released, placements, refusals, saving, loading)
    works += (wrapped, wrapped_saving, wrapped_loading, wrapped_placements)
    found = next(w for w in works if w.__name__ == work)(Path(folder))
    if rank == "0":
        torch.save(found, Path(folder) / f"{work}-{world}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

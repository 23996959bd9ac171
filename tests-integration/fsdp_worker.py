"""One of the two processes of ``test_fsdp.py``: rank, folder. It writes what it found there.

The oracle is torch's own optimizer in the same place.
"""

import json
import sys
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.optim import Optimizer

from lowbit_adam import AdamW4bit, AdamW8bit
from optstate_codecs import Adam, CodedOptimizer, GradientRelease, memory_report, offload
from optstate_wrap import ConfigurablePolicy, wrap, wrap_low_memory_adamw
from turboadam import TurboAdam

EXACT = {"exp_avg": "fp32", "exp_avg_sq": "fp32"}
# without blocks, which would be longer than the rows of this model
CODED = {"exp_avg": "bf16(rounding=stochastic)", "exp_avg_sq": "bf16(rounding=stochastic)"}
Make = Callable[[Any], Optimizer]

OPTIONS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
torch_adamw = partial(torch.optim.AdamW, **OPTIONS)
exact = partial(CodedOptimizer, rule=Adam(decoupled=True), formats=EXACT, **OPTIONS)


def make_model() -> nn.Module:
    """Of rows that two workers cannot share evenly; of the last, one worker has none."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 33), nn.Tanh(), nn.Linear(33, 7), nn.Linear(7, 1))


def backward(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(2 * step + dist.get_rank())
    model(torch.randn(4, 16, generator=generator)).square().mean().backward()


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def message_of(function: Callable[[], object]) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[k], theirs[k]) for k in theirs)
    return torch.equal(ours, theirs)


def cloned(value: Any) -> Any:
    """Tensors with memory of their own: on a CPU, those that FSDP1 gathers share theirs."""
    if isinstance(value, dict):
        return {key: cloned(item) for key, item in value.items()}
    return value.clone() if isinstance(value, torch.Tensor) else value


# FSDP2


def sharded(make: Make) -> tuple[nn.Module, Optimizer]:
    model = make_model()
    for layer in (model[0], model[2], model[3], model):
        fully_shard(layer)
    return model, make(model.parameters())


def whole(model: nn.Module) -> list[torch.Tensor]:
    return [param.full_tensor().detach() for param in model.parameters()]


def stored(tensors: Iterable[Any]) -> int:
    """Bytes of shards, with what pads them, and of plain tensors."""
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    storages = [t.untyped_storage() for t in local]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def flat_difference(ours: Iterable[torch.Tensor], theirs: Iterable[torch.Tensor]) -> torch.Tensor:
    pairs = zip(ours, theirs, strict=True)
    return torch.cat([(a.double() - b.double()).flatten() for a, b in pairs])


def wrapped(make: Make, codecs: dict[str, str], params: Any) -> Optimizer:
    return wrap(make(params), ConfigurablePolicy(codecs))


def fsdp2() -> dict[str, Any]:
    model, optimizer = sharded(torch_adamw)
    train(model, optimizer, range(5))
    expected, found = whole(model), {}
    report = memory_report(optimizer)
    found["parameters"] = report.parameters
    found["bytes"] = [report.parameter_bytes, report.gradient_bytes, report.state_bytes]
    params: Any = list(model.parameters())
    tensors = [p.detach() for p in params], [p.grad for p in params], optimizer.state.values()
    found["expected bytes"] = [
        stored(tensors[0]),
        stored(tensors[1]),
        stored(v for state in tensors[2] for v in state.values()),
    ]

    low_memory = partial(wrap_low_memory_adamw, warmup_steps=2, min_int8_elements=16, **OPTIONS)
    for name, make in {
        "exact": partial(wrapped, torch_adamw, {}),
        "coded": partial(wrapped, torch_adamw, CODED),
        "preset": low_memory,
    }.items():
        model, optimizer = sharded(make)
        train(model, optimizer, range(5))
        off = flat_difference(whole(model), expected).norm()
        found[name] = float(off / flat_difference(expected, make_model().parameters()).norm())

    # after the last of them, coded, whose checkpoint goes on in another
    saved = cloned(get_optimizer_state_dict(model, optimizer))
    other, resumed = sharded(make)
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, resumed, saved)
    for pair in ((model, optimizer), (other, resumed)):
        train(*pair, range(5, 8))
    found["checkpoint"] = all(map(torch.equal, whole(model), whole(other)))

    clipped = []
    for make in (torch_adamw, partial(wrapped, torch_adamw, {})):
        model, optimizer = sharded(make)
        backward(model, 0)
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        clipped.append(whole(model))
    found["clipped"] = all(map(torch.equal, *clipped))

    model, optimizer = sharded(partial(wrapped, torch_adamw, {}))
    with GradientRelease(optimizer, bucket_bytes=0):
        for step in range(5):
            backward(model, step)
            found["clip"] = message_of(
                lambda model=model: nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            )
            optimizer.step()
    found["released"] = all(map(torch.equal, whole(model), expected))

    for name, make in {"family": AdamW8bit, "exact family": exact}.items():
        model, optimizer = sharded(partial(make, **OPTIONS) if name == "family" else make)
        train(model, optimizer, range(5))
        off = flat_difference(whole(model), expected).norm()
        found[name] = float(off / flat_difference(expected, make_model().parameters()).norm())
    # a trainer shards the model after its optimizer was made
    model = make_model()
    optimizer = AdamW8bit(model.parameters(), **OPTIONS)
    fully_shard(model)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    train(model, optimizer, range(5))
    off = flat_difference(whole(model), expected).norm()
    found["swapped"] = float(off / flat_difference(expected, make_model().parameters()).norm())
    return found


def accumulated() -> float:
    """What 300 gradients of one add up to, as the accumulator's error advises under FSDP2."""
    layer = nn.Linear(1, 8, bias=False, dtype=torch.bfloat16)
    fully_shard(layer, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    for batch in range(300):
        layer.set_requires_gradient_sync(batch == 299)
        layer(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
    grad: Any = layer.weight.grad
    return float(grad.full_tensor().max())


# FSDP1


def flat(make: Make, use_orig_params: bool) -> tuple[nn.Module, Optimizer]:
    cpu = torch.device("cpu")
    model = FullyShardedDataParallel(make_model(), use_orig_params=use_orig_params, device_id=cpu)
    return model, make(model.parameters())


def there_and_back(make: Make, use_orig_params: bool, full: Callable[[Any], Any]) -> Any:
    """Train, gather the state, go on from it in another optimizer; the state and the weights."""
    model, optimizer = flat(make, use_orig_params)
    train(model, optimizer, range(3))
    gather = FullyShardedDataParallel.optim_state_dict
    saved = cloned(gather(model, optimizer, full(optimizer)))
    other, resumed = flat(make, use_orig_params)
    other.load_state_dict(model.state_dict())
    load = FullyShardedDataParallel.optim_state_dict_to_load
    resumed.load_state_dict(cloned(load(other, resumed, saved)))
    train(other, resumed, range(3, 6))
    return saved["state"], [param.detach().clone() for param in other.parameters()]


def fsdp1(use_orig_params: bool) -> dict[str, Any]:
    build = partial(flat, use_orig_params=use_orig_params)
    found: dict[str, Any] = {}
    theirs = there_and_back(torch_adamw, use_orig_params, lambda o: o.state_dict())
    ours = there_and_back(exact, use_orig_params, lambda o: o.full_state_dict())
    found["state"] = same(ours[0], theirs[0])
    found["resumed"] = all(map(torch.equal, ours[1], theirs[1]))

    for name, make in {
        "AdamW8bit": AdamW8bit,
        "AdamW4bit": AdamW4bit,
        "TurboAdam": TurboAdam,
        "offload": lambda params: offload(AdamW8bit(params)),
    }.items():
        model, optimizer = build(make)
        train(model, optimizer, range(2))
        gather = partial(FullyShardedDataParallel.optim_state_dict, model, optimizer)
        checkpoint = partial(get_optimizer_state_dict, model, optimizer)
        found[name] = [message_of(gather), message_of(checkpoint)]
        full = gather(optimizer.full_state_dict())["state"]
        found[name].append(sorted(list(s["exp_avg"].shape) for s in full.values()))

    # each worker its own
    model, optimizer = build(AdamW8bit)
    train(model, optimizer, range(3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        saved = [optimizer.state_dict(), optimizer.state_dict()][0]
    found["warnings"] = [str(w.message) for w in caught if "FSDP1" in str(w.message)]
    other, resumed = build(AdamW8bit)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved)
    for pair in ((model, optimizer), (other, resumed)):
        train(*pair, range(3, 6))
    found["own"] = all(map(torch.equal, model.parameters(), other.parameters()))
    found["norm"] = message_of(lambda: build(partial(AdamW8bit, max_grad_norm=1.0)))
    return found


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    # of FSDP1 and its checkpoints, which torch means to replace
    warnings.simplefilter("ignore")
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    results = {
        "fsdp2": fsdp2(),
        "accumulated": accumulated(),
        "flat": fsdp1(False),
        "original": fsdp1(True),
    }
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Times the addition of a micro-batch's gradients in bfloat16; errors of sums of 512.

    python benchmarks/accumulate.py --layout llama1b --device cuda
    python benchmarks/accumulate.py --layout tiny --device cpu --batches 16

"add" is the addition alone, of existing gradients: read a sum and a gradient, write
a sum, 6 bytes a parameter; "share" is that over the bandwidth of a copy, measured in the same run.
"backward" is a whole backward that makes each parameter a gradient and adds it, hooks included.
Times are as in step_time.py. The errors are those of sums against float64, over elements: the norm
of the difference, and its part along the sum (the bias), both over the norm of the sum.
Results are printed and written as JSON.
"""

import argparse
import importlib
import json
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from layouts import LAYOUTS
from step_time import RESULTS
from torch import Tensor, nn

from optstate.bench.timing import copy_bandwidth, milliseconds, surroundings, temporary_bytes
from stochbf16 import StochasticAccumulator
from stochbf16.pending import Addition, Pending

BYTES = 6
BUCKET = 64 * 2**20
# mean and deviation of an element's gradients, over their mean magnitude
GRADIENTS = {"steady": (0.8, 0.04), "noisy": (0.1, 1.0)}

Add = Callable[[], Any]
Attach = Callable[[nn.Module], AbstractContextManager[Any]]


def peer() -> Any:
    """torchastic, the other package with such an accumulator, or None."""
    try:
        return importlib.import_module("torchastic").StochasticAccumulator
    except Exception:  # a peer that does not import here is a peer that is not installed
        return None


@contextmanager
def torchastic(module: nn.Module) -> Any:
    """Its hooks for as long as the context lasts; its sums in ``p.grad`` after that."""
    accumulator = peer()
    hooks = accumulator.assign_hooks(module)
    yield
    for hook in hooks:
        hook.remove()
    accumulator.reassign_grad_buffer(module)


def attachments() -> dict[str, Attach]:
    """By name, contexts in which a backward adds gradients."""
    found: dict[str, Attach] = {
        "stochbf16": StochasticAccumulator,
        "stochbf16 at once": partial(StochasticAccumulator, bucket_bytes=0),
        "torch": lambda module: nullcontext(),
    }
    if peer() is not None:
        found["torchastic"] = torchastic
    return found


def additions(sums: list[nn.Parameter], news: list[Tensor]) -> dict[str, Add]:
    """By name, functions that add existing gradients: each call adds all of ``news``."""

    def ours(limit: int) -> None:
        pending = Pending(sums[0].device)
        for number, (param, new) in enumerate(zip(sums, news, strict=True)):
            total = param.grad
            assert total is not None
            pending.append(Addition(param, number, 1, total, new, total._version), 0)
            if pending.bytes >= limit:
                pending.add(0)
        pending.add(0)

    def theirs() -> None:
        for param, new in zip(sums, news, strict=True):
            total, param.grad = param.grad, new
            param.acc_grad = total
            peer().stochastic_grad_accum(param)
            param.grad = param.acc_grad

    found: dict[str, Add] = {
        "stochbf16": partial(ours, BUCKET),
        "stochbf16 at once": partial(ours, 0),
        "torch": lambda: torch._foreach_add_([p.grad for p in sums], news),
    }
    if peer() is not None:
        found["torchastic"] = theirs
    return found


def module_of(shapes: Iterable[tuple[int, ...]], device: torch.device) -> nn.ParameterList:
    """Parameters with a first gradient each."""
    zeros = [torch.zeros(shape, dtype=torch.bfloat16, device=device) for shape in shapes]
    module = nn.ParameterList(nn.Parameter(zero) for zero in zeros)
    for param in module:
        param.grad = torch.zeros_like(param)
    return module


def timed(device: torch.device, call: Add, repeats: int) -> dict[str, Any]:
    """The times of a call, and its temporary memory."""
    milliseconds(device, call, 3)
    temporary = temporary_bytes(device, call)
    times = milliseconds(device, call, repeats)
    return {
        "device_ms": times[0],
        "host_ms": times[1],
        "whole_ms": times[2],
        "temporary_bytes": temporary,
    }


def backward(params: Iterable[Tensor]) -> None:
    """Bring every parameter a gradient, as cheaply as autograd can."""
    torch.stack([param.sum() for param in params]).sum().backward()


def times(layout: str, device: torch.device, repeats: int, bandwidth: float) -> Iterable[Any]:
    """Rows of times: additions alone, then backwards."""
    shapes = LAYOUTS[layout]()
    module = module_of(shapes, device)
    params = list(module)
    news = [torch.randn(p.shape, dtype=p.dtype, device=device) for p in params]
    sizes = {"layout": layout, "parameters": sum(p.numel() for p in params), "tensors": len(params)}
    for name, call in additions(params, news).items():
        row = {"what": "add", "name": name, **sizes, **timed(device, call, repeats)}
        moved = BYTES * sizes["parameters"]
        share = moved / row["device_ms"] * 1e3 / bandwidth
        yield {**row, "moved_bytes": moved, "copy_share": share}
    del news
    for name, attach in attachments().items():
        module = module_of(shapes, device)
        with attach(module):
            row = timed(device, partial(backward, list(module)), repeats)
        yield {"what": "backward", "name": name, **sizes, **row}


def errors(kind: str, device: torch.device, batches: int, numel: int) -> Iterable[Any]:
    """Rows of the errors of sums of many gradients."""
    level, deviation = GRADIENTS[kind]
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, numel, device=device, generator=generator)
    mean = level * torch.sign(draw())
    grads = [(mean + deviation * draw()).to(torch.bfloat16) for _ in range(batches)]
    exact = torch.zeros(numel, dtype=torch.float64, device=device)
    single = torch.zeros(numel, device=device)
    for grad in grads:
        exact += grad
        single += grad
    sums = {"float32": single, "float32, rounded once": single.to(torch.bfloat16)}
    for name, attach in attachments().items():
        if name == "stochbf16 at once":
            continue  # the same bits
        module = nn.ParameterList([torch.zeros(numel, dtype=torch.bfloat16, device=device)])
        with attach(module):
            for grad in grads:
                (module[0] * grad).sum().backward()
        sums[name] = module[0].grad
    for name, total in sums.items():
        lost = total.double() - exact
        yield {
            "kind": kind,
            "name": name,
            "batches": batches,
            "error": float(lost.norm() / exact.norm()),
            "bias": float(lost @ exact / (exact @ exact)),
        }


def table(report: dict[str, Any]) -> str:
    """The errors as the docs quote them."""
    lines = ["| gradients | sum in | error | bias |", "|---|---|---|---|"]
    for row in report["errors"]:
        error, bias = f"{100 * row['error']:.3g} %", f"{100 * row['bias']:+.2g} %"
        lines.append(f"| {row['kind']} | {row['name']} | {error} | {bias} |")
    return "\n".join(lines)


def main() -> None:
    """Measures times on every chosen layout, and errors."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layout", choices=LAYOUTS, action="append")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--batches", type=int, default=512)
    parser.add_argument("--numel", type=int, default=1 << 16, help="elements of the sums")
    parser.add_argument("--out", type=Path, default=RESULTS / "accumulate.json")
    args = parser.parse_args()
    device = torch.device(args.device)
    bandwidth = copy_bandwidth(device)
    report: dict[str, Any] = {
        **surroundings(device, args.repeats, bandwidth),
        "torchastic": metadata.version("torchastic") if peer() is not None else None,
        "bucket_bytes": BUCKET,
        "times": [],
        "errors": [],
    }
    print(f"{report['device']}, torch {torch.__version__}, copy {bandwidth / 1e9:.0f} GB/s")
    print(f"{'':9}{'':18}{'layout':10}  device    host   whole  share   temp")
    for layout in args.layout or ["llama1b"]:
        for row in times(layout, device, args.repeats, bandwidth):
            report["times"].append(row)
            share = f"{100 * row['copy_share']:6.1f}%" if "copy_share" in row else " " * 7
            print(
                f"{row['what']:9}{row['name']:18}{layout:10}{row['device_ms']:8.3f}"
                f"{row['host_ms']:8.3f}{row['whole_ms']:8.3f}{share}"
                f"{(row['temporary_bytes'] or 0) / 2**20:7.1f}",
                flush=True,
            )
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for kind in GRADIENTS:
        report["errors"] += errors(kind, device, args.batches, args.numel)
    print(table(report))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

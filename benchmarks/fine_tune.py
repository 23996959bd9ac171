"""Counts, and on a GPU measures, the memory that fine-tuning Llama 3 8B takes with 24 GB.

    python benchmarks/fine_tune.py count
    python benchmarks/fine_tune.py run

`count` runs forward and backward on tensors without memory, and finds the most bytes of tensors
that exist at once, gradients freed as soon as they are complete. To these it adds what the library
keeps on the device beside them. It needs no GPU, and its numbers are the same on every machine.
`run` trains with random weights on a GPU on which torch may allocate 24 GB and no more, and reports
peaks and times. A configuration that runs out of memory is a result too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import Any
from weakref import finalize

import torch
from llama import CONFIGS, Llama
from offload_common import allocated, clean, forget_peak, host_bytes, reserved
from offload_train import paced, train_step
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from lowbit_adam import AdamW4bit, AdamW8bit
from optstate.bench.timing import surroundings, synchronize
from optstate.estimate.count import BUCKET
from optstate_codecs import CodedOptimizer, GradientRelease, offload, predicted_state_bytes
from optstate_codecs.offloading import CHUNK_BYTES
from optstate_codecs.offloading.copies import SLOTS
from optstate_codecs.offloading.ring import WAITING
from turboadam import TurboAdam

RESULTS = Path(__file__).parent / "results"
COUNTED, MEASURED = RESULTS / "fine_tune.json", RESULTS / "fine_tune_gpu.json"
CARD = 24 * 10**9
TOKENS = (512, 1024, 2048, 4096, 8192)
# tokens whose logits exist at once; None: all of them
LOSS_TOKENS = (None, 512)
OPTIMIZERS = {"AdamW8bit": AdamW8bit, "AdamW4bit": AdamW4bit, "TurboAdam": TurboAdam}


class PeakBytes(TorchDispatchMode):
    """Records the most bytes of tensors, made by operations within the context, at one time.

    Args:
        known: tensors that do not count.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = WeakIdKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self._seen:
                storage = tensor.untyped_storage()
                self._seen[storage] = True
                self._add(storage.nbytes())
                finalize(storage, self._add, -storage.nbytes())
        return made

    def _add(self, nbytes: int) -> None:
        self.now += nbytes
        self.peak = max(self.peak, self.now)


def free_gradient(param: Tensor) -> None:
    """What a step during the backward pass does to a gradient."""
    param.grad = None


def peak_of(model: str, tokens: int, loss_tokens: int | None) -> int:
    """The most bytes beside the parameters in forward and backward with checkpointed layers."""
    with FakeTensorMode():
        network = Llama(CONFIGS[model], "cpu", checkpointed=True, loss_tokens=loss_tokens)
        params = list(network.parameters())
        for param in params:
            param.register_post_accumulate_grad_hook(free_gradient)
        text = torch.zeros(1, tokens, dtype=torch.int64, device="cpu")
        with PeakBytes([*params, text]) as peak:
            network(text).backward()
    return peak.peak


def count(model: str) -> dict[str, Any]:
    """The parts of the device's memory, and state by optimizer."""
    params = list(Llama(CONFIGS[model], "meta").parameters())
    return {
        "model": model,
        "parameters": sum(p.numel() for p in params),
        "parameter_bytes": sum(p.nbytes for p in params),
        "largest_gradient_bytes": max(p.nbytes for p in params),
        "ring_bytes": SLOTS * CHUNK_BYTES,
        # gradients whose state is being loaded, and those of the bucket that is being filled
        "waiting_bytes": WAITING + BUCKET,
        "state_bytes": {
            name: predicted_state_bytes(make(params, lr=1e-5)) for name, make in OPTIMIZERS.items()
        },
        "rows": [
            {"tokens": tokens, "loss_tokens": part, "peak_bytes": peak_of(model, tokens, part)}
            for part in LOSS_TOKENS
            for tokens in TOKENS
        ],
    }


def total(report: dict[str, Any], row: dict[str, Any]) -> int:
    """All bytes on the device while state is on the host."""
    parts = ("parameter_bytes", "ring_bytes", "waiting_bytes")
    return sum(report[part] for part in parts) + row["peak_bytes"]


def table(report: dict[str, Any]) -> str:
    """The counts as Markdown."""
    return "\n".join(lines(report))


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The lines of the table: a row for each number of tokens, two columns for each loss."""
    yield "| tokens | activations, GB | in all, GB | activations, loss in parts, GB | in all, GB |"
    yield "|---|---|---|---|---|"
    for tokens in TOKENS:
        rows = [row for row in report["rows"] if row["tokens"] == tokens]
        cells = [n for row in rows for n in (row["peak_bytes"], total(report, row))]
        yield f"| {tokens:,} | {' | '.join(f'{n / 1e9:.1f}' for n in cells)} |"


def measured(report: dict[str, Any]) -> str:
    """The runs as Markdown."""
    head = "| optimizer | state on | at most on the device, GB | state on the host, GB | ms |"
    found = [head, "|---|---|---|---|---|"]
    for row in report["rows"]:
        where = row["store"]
        if row["resident_bytes"]:
            where += f", {row['resident_bytes'] / 1e9:.0f} GB on the device"
        cells = ["out of memory", "", ""]
        if "error" not in row:
            cells = [f"{row[key] / 1e9:.1f}" for key in ("peak_bytes", "host_bytes")]
            cells.append(f"{row['ms']:,.0f}")
        found.append(f"| `{row['optimizer']}` | {where} | {' | '.join(cells)} |")
    return "\n".join(found)


@dataclass(frozen=True)
class Case:
    """A configuration to run.

    Attributes:
        optimizer: a name of ``OPTIMIZERS``.
        store: "host", or "device" for resident state.
        resident: bytes of state that stay on the device.
    """

    optimizer: str
    store: str = "host"
    resident: int = 0


CASES = (
    Case("AdamW8bit"),
    Case("AdamW4bit"),
    Case("TurboAdam"),
    Case("TurboAdam", resident=2 * 10**9),
    Case("TurboAdam", "device"),
)


def run(case: Case, model: str, device: torch.device, tokens: int, steps: int) -> dict[str, Any]:
    """Train a few steps; peaks are those of steps after the first."""
    torch.manual_seed(0)
    network = Llama(CONFIGS[model], device, checkpointed=True, loss_tokens=512)
    params = list(network.parameters())
    text = torch.randint(CONFIGS[model].vocabulary, (1, tokens), device=device)
    optimizer: CodedOptimizer = OPTIMIZERS[case.optimizer](
        params, lr=1e-5, bf16_stochastic_round=True
    )
    if case.store == "host":
        offload(optimizer, resident_bytes=case.resident)
    with GradientRelease(optimizer):
        begin = perf_counter()
        train_step(network, text, optimizer)
        synchronize(device)
        first = perf_counter() - begin
        first_peak = allocated(device, True)
        forget_peak(device)
        ms, _ = paced(network, text, optimizer, device, steps)
    return {
        "tokens": tokens,
        "peak_bytes": max(first_peak, allocated(device, True)),
        "reserved_bytes": reserved(device),
        "host_bytes": host_bytes(optimizer),
        "ms": ms,
        "first_s": first,
    }


def measure(model: str, device: torch.device, tokens: int, steps: int) -> list[dict[str, Any]]:
    """Every case, on a device that torch may fill up to ``CARD`` bytes."""
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CARD / whole), device)
    rows = []
    for case in CASES:
        row = {"optimizer": case.optimizer, "store": case.store, "resident_bytes": case.resident}
        with clean(device):
            try:
                row |= run(case, model, device, tokens, steps)
            # GradientRelease and a failed step raise their own, from torch's
            except RuntimeError as error:
                row["error"] = str(error)[:200]
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    """Counts or measures, and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("count", "run"))
    parser.add_argument("--model", choices=CONFIGS, default="8b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=2048, help="of run")
    parser.add_argument("--steps", type=int, default=5, help="of run, after the first")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.what == "count":
        time = datetime.now(timezone.utc).isoformat(timespec="seconds")
        report = {"time": time, "torch": torch.__version__, **count(args.model)}
        print(table(report))
    else:
        setup = {**surroundings(device, args.steps, 0.0), "limit_bytes": CARD, "model": args.model}
        del setup["copy_bandwidth_gb_s"]
        report = {**setup, "rows": measure(args.model, device, args.tokens, args.steps)}
        print(measured(report))
    out: Path = args.out or (COUNTED if args.what == "count" else MEASURED)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

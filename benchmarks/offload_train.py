"""Training steps of whole models with the state of their optimizer away."""

from __future__ import annotations

from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import Any

import torch
from llama import CONFIGS, Llama
from offload_common import (
    FORMATS,
    Contestant,
    Sizes,
    allocated,
    clean,
    contestants,
    forget_peak,
    host_bytes,
    reserved,
    streamed,
)
from step_time import synchronize
from torch import Tensor
from torch.optim import Optimizer


def text(sizes: Sizes, vocabulary: int, sequences: int, tokens: int) -> Tensor:
    """Random tokens."""
    shape = (1, 16) if sizes.small else (sequences, tokens)
    generator = torch.Generator(sizes.device).manual_seed(1)
    return torch.randint(vocabulary, shape, generator=generator, device=sizes.device)


def train_step(model: Llama, tokens: Tensor, optimizer: Optimizer | None) -> None:
    """Forward, backward, step."""
    model.zero_grad(set_to_none=True)
    model(tokens).backward()
    if optimizer is not None:
        optimizer.step()


def paced(
    model: Llama, tokens: Tensor, optimizer: Optimizer | None, device: torch.device, steps: int
) -> tuple[float, float]:
    """Median and mean milliseconds from one step's end to the next's, without waiting between."""
    synchronize(device)
    begin = perf_counter()
    marks: list[Any] = []

    def mark() -> None:
        if device.type == "cuda":
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(perf_counter())

    mark()
    for _ in range(steps):
        train_step(model, tokens, optimizer)
        mark()
    synchronize(device)
    mean = 1e3 * (perf_counter() - begin) / steps
    pairs = list(pairwise(marks))
    if device.type == "cuda":
        return median(one.elapsed_time(two) for one, two in pairs), mean
    return median(1e3 * (two - one) for one, two in pairs), mean


def train_row(one: Contestant | None, sizes: Sizes, tokens: Tensor) -> dict[str, Any]:
    """One optimizer; None: forward and backward alone."""
    device = sizes.device
    torch.manual_seed(0)
    model = Llama(CONFIGS["tiny" if sizes.small else "1b"], device)
    begin = perf_counter()
    optimizer = None if one is None else one.make(list(model.parameters()), sizes)
    forget_peak(device)
    train_step(model, tokens, optimizer)
    synchronize(device)
    first = perf_counter() - begin
    for _ in range(2):
        train_step(model, tokens, optimizer)
    first_peak = allocated(device, True)
    forget_peak(device)
    ms, mean = paced(model, tokens, optimizer, device, 3 if sizes.small else 10)
    numel = sum(param.numel() for param in model.parameters())
    return {
        "ms": ms,
        "mean_ms": mean,
        "first_s": first,
        "peak_bytes": allocated(device, True),
        "peak_bytes_first_steps": first_peak,
        "reserved_bytes": reserved(device),
        "host_bytes_per_parameter": 0 if optimizer is None else host_bytes(optimizer) / numel,
        "parameters": numel,
        "tokens": tokens.numel(),
    }


def run_train(sizes: Sizes, only: list[str]) -> list[Any]:
    """A model of 1.1e9 parameters and 4,096 tokens, with every optimizer."""
    tokens = text(sizes, CONFIGS["tiny" if sizes.small else "1b"].vocabulary, 2, 2048)
    rows: list[dict[str, Any]] = []
    print(f"{'train':37}      ms    mean  / AdamW8bit  peak GB  host B/p")
    everyone: dict[str, Contestant | None] = {"no optimizer": None}
    resident_first = sorted(contestants().values(), key=lambda one: one.place != "device")
    everyone |= {one.name: one for one in resident_first}
    resident_ms = None
    for name, one in everyone.items():
        if only and name not in only:
            continue
        with clean(sizes.device):
            try:
                row = train_row(one, sizes, tokens)
            except Exception as error:  # a failure is a result, not the end of the run
                row = {"error": repr(error)[:500]}
        rows.append({"optimizer": name, **row})
        if "error" in row:
            print(f"{name:37}{row['error'][:90]}", flush=True)
            continue
        if name == "AdamW8bit":
            resident_ms = row["ms"]
        if resident_ms:
            rows[-1]["times_resident"] = row["ms"] / resident_ms
        print(
            f"{name:37}{row['ms']:8.1f}{row['mean_ms']:8.1f}"
            f"{rows[-1].get('times_resident', 0):13.3f}{row['peak_bytes'] / 1e9:9.2f}"
            f"{row['host_bytes_per_parameter']:10.2f}",
            flush=True,
        )
    return rows


def run_finetune(sizes: Sizes, name: str) -> dict[str, Any]:
    """Steps of a model of 7e9 parameters, checkpointed, and the most memory with and without."""
    with clean(sizes.device):
        try:
            row = finetune(sizes, name)
        except Exception as error:
            row = {"error": repr(error)[:500]}
            print(f"finetune7b: {row['error']}", flush=True)
    return {"format": name, **row}


def finetune(sizes: Sizes, name: str) -> dict[str, Any]:
    """The peak may be that of a run without an optimizer and half a gigabyte."""
    device, config = sizes.device, CONFIGS["tiny" if sizes.small else "7b"]
    torch.manual_seed(0)
    model = Llama(config, device, checkpointed=True)
    tokens = text(sizes, config.vocabulary, 1, 2048)
    params = list(model.parameters())
    held = sum(param.nbytes for param in params)
    train_step(model, tokens, None)
    forget_peak(device)
    without, _ = paced(model, tokens, None, device, 2)
    fixed, plain = 2 * held, allocated(device, True)
    begin = perf_counter()
    optimizer = streamed(FORMATS[name], params, sizes)
    forget_peak(device)
    train_step(model, tokens, optimizer)
    synchronize(device)
    first = perf_counter() - begin
    ms, _ = paced(model, tokens, optimizer, device, 3)
    peak = allocated(device, True)
    numel = sum(param.numel() for param in params)
    row = {
        "parameters": numel,
        "tokens": tokens.numel(),
        "parameter_and_gradient_bytes": fixed,
        "activation_bytes": plain - fixed,
        "peak_bytes_without_optimizer": plain,
        "peak_bytes": peak,
        "reserved_bytes": reserved(device),
        "margin_bytes": plain + 5 * 10**8 - peak,
        "within_half_a_gigabyte": peak <= plain + 5 * 10**8,
        "ms": ms,
        "ms_without_optimizer": without,
        "first_s": first,
        "host_bytes": host_bytes(optimizer),
    }
    print(
        f"finetune {numel / 1e9:.2f}e9, {name} on the host: {ms:.0f} ms a step "
        f"({without:.0f} without), parameters and gradients {fixed / 1e9:.2f} GB, activations "
        f"{row['activation_bytes'] / 1e9:.2f}, peak {peak / 1e9:.2f}, "
        f"margin {row['margin_bytes'] / 1e9:.3f}, host {row['host_bytes'] / 1e9:.2f} GB",
        flush=True,
    )
    return row

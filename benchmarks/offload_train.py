"""Training steps of whole models with offloaded optimizer state."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
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
    unhook,
)
from torch import Tensor
from torch.optim import Optimizer

from optstate.bench.timing import synchronize
from optstate_codecs import GradientRelease


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
    """Median and mean milliseconds from one step's end to the next's, without waits between."""
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


RELEASED = ", released"
SOME = ("no optimizer", "AdamW8bit", "int8 offloaded")
# of gradients that are stepped together: large enough that the host is not what limits
BUCKET = 1 << 27


def stepped_in_backward(optimizer: Optimizer | None, released: bool) -> AbstractContextManager[Any]:
    """A context for training steps: ``released`` steps during the backward pass."""
    if not released or optimizer is None:
        return nullcontext()
    return GradientRelease(optimizer, bucket_bytes=BUCKET)


def train_row(
    one: Contestant | None, released: bool, sizes: Sizes, tokens: Tensor
) -> dict[str, Any]:
    """The results of one optimizer; None: forward and backward alone."""
    device = sizes.device
    torch.manual_seed(0)
    model = Llama(CONFIGS["tiny" if sizes.small else "1b"], device)
    begin = perf_counter()
    optimizer = None if one is None else one.make(list(model.parameters()), sizes)
    forget_peak(device)
    with stepped_in_backward(optimizer, released):
        train_step(model, tokens, optimizer)
        synchronize(device)
        first = perf_counter() - begin
        for _ in range(2):
            train_step(model, tokens, optimizer)
        first_peak = allocated(device, True)
        forget_peak(device)
        ms, mean = paced(model, tokens, optimizer, device, 3 if sizes.small else 10)
    numel = sum(param.numel() for param in model.parameters())
    unhook(model.parameters())
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
    """A model of 1.1e9 parameters, 4,096 tokens with every optimizer and 8,192 with some."""
    rows = run_tokens(sizes, only, 2)
    return rows if sizes.small else rows + run_tokens(sizes, only or SOME, 4)


def run_tokens(sizes: Sizes, only: Sequence[str], sequences: int) -> list[Any]:
    """Results with so many sequences of 2,048 tokens a step."""
    tokens = text(sizes, CONFIGS["tiny" if sizes.small else "1b"].vocabulary, sequences, 2048)
    rows: list[dict[str, Any]] = []
    print(f"{f'train, {tokens.numel()} tokens':37}      ms    mean  / AdamW8bit  peak GB  host B/p")
    everyone: dict[str, Contestant | None] = {"no optimizer": None}
    resident_first = sorted(contestants().values(), key=lambda one: one.store != "device")
    everyone |= {one.name: one for one in resident_first}
    everyone |= {one.name + RELEASED: one for one in resident_first if one.family}
    resident_ms = None
    for name, one in everyone.items():
        if only and name.removesuffix(RELEASED) not in only:
            continue
        with clean(sizes.device):
            try:
                row = train_row(one, name.endswith(RELEASED), sizes, tokens)
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


def run_finetune(sizes: Sizes, name: str) -> list[Any]:
    """Steps of a checkpointed model of 7e9 parameters; peak memory with and without a step."""
    rows = []
    for released in (False, True):
        with clean(sizes.device):
            try:
                row = finetune(sizes, name, released)
            except Exception as error:
                row = {"error": repr(error)[:500]}
                print(f"finetune7b: {row['error']}", flush=True)
        rows.append({"format": name, "released": released, **row})
    return rows


def finetune(sizes: Sizes, name: str, released: bool) -> dict[str, Any]:
    """Fine-tune with offloaded state; the peak may exceed a plain run's by half a gigabyte."""
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
    with stepped_in_backward(optimizer, released):
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
        f"finetune {numel / 1e9:.2f}e9, {name} on the host{RELEASED * released}: {ms:.0f} ms "
        f"a step ({without:.0f} without), parameters and gradients {fixed / 1e9:.2f} GB, "
        f"activations {row['activation_bytes'] / 1e9:.2f}, peak {peak / 1e9:.2f}, "
        f"margin {row['margin_bytes'] / 1e9:.3f}, host {row['host_bytes'] / 1e9:.2f} GB",
        flush=True,
    )
    return row

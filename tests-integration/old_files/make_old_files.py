"""Optimizers with a small model, and the files that version 0.1.0 wrote of them.

The files beside this one were written by this script with the code of commit 5646429 (torch 2.13.0
on an x86-64 CPU), before the modules were moved into folders. They stay as they are: the tests load
them with the code of today. To write files of another commit, run this script into a new folder
with ``PYTHONPATH`` set to that commit's ``packages/*/src``::

    python make_old_files.py FOLDER

Each file holds, by the name of an optimizer, a record of the optimizer after three steps:
``optimizer`` (its state dict), ``params``, ``decoded`` (each parameter's moments in float32 and
its master weight), and ``after`` (the parameters after two more steps).
"""

import copy
import io
import lzma
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

import lowbit_adam as lowbit
import stochbf16
from optstate_codecs import Int4, Minifloat, decode_state, master_weights, offload, synchronize
from optstate_wrap import ConfigurablePolicy, wrap, wrap_low_memory_adamw
from turboadam import TurboAdam

SAVED, LAST = 3, 5  # steps before and after the file was written
OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)

small = {"min_m_compress_elements": 100, "min_v_compress_elements": 100}
#: every optimizer with its own state dict
FAMILY = {
    "Adam8bit": partial(lowbit.Adam8bit, weight_decay=0.1),
    "AdamW8bit": lowbit.AdamW8bit,
    "AdamW8bit, amsgrad": partial(lowbit.AdamW8bit, block_size=64, amsgrad=True),
    "AdamW8bit, 24-bit weights": partial(lowbit.AdamW8bit, block_size=64, master_weight_bits=24),
    "AdamFp8": lowbit.AdamFp8,
    "AdamWFp8": partial(lowbit.AdamWFp8, block_size=64, bf16_stochastic_round=True),
    "Adam4bit": lowbit.Adam4bit,
    "AdamW4bit": partial(lowbit.AdamW4bit, block_size=64),
    "AdamW4bit, rank 1": partial(
        lowbit.AdamW4bit, formats={"exp_avg_sq": "linear4(normalization=rank1)"}
    ),
    "Lion8bit": partial(lowbit.Lion8bit, block_size=64),
    "SGD8bit": partial(lowbit.SGD8bit, block_size=64, momentum=0.9),
    "TurboAdam": partial(TurboAdam, mode="adamw"),
    "TurboAdam, 2 + 4 bits": partial(
        TurboAdam,
        mode="adamw",
        m_bits=2,
        v_bits=4,
        error_feedback=True,
        m_rounding="stochastic",
        block_size=64,
        **small,
    ),
    "stochbf16.AdamW": partial(stochbf16.AdamW, weight_decay=0.1, centralization=1.0),
    "stochbf16.AdamW, 32-bit weights": partial(stochbf16.AdamW, master_weight_bits=32),
    "stochbf16.SGD": partial(stochbf16.SGD, momentum=0.9),
    "stochbf16.Lion": stochbf16.Lion,
}
#: those whose state dict is written flat and under parameters' names
FLAT = {name: FAMILY[name] for name in ("AdamW8bit", "TurboAdam, 2 + 4 bits")}
#: those whose state is in a file of its own
DISK = {
    "dynamic8": partial(lowbit.AdamW8bit, block_size=64),
    "split": partial(stochbf16.AdamW, master_weight_bits=24),
}


def int8(groups, lr):
    """AdamW with int8 first and bfloat16 second moments after one exact step."""
    return wrap_low_memory_adamw(groups, lr, warmup_steps=1, min_int8_elements=100)


def four_bits(groups, lr, **options):
    """AdamW with both moments in 4 bits."""
    formats = {"exp_avg": Int4.first_moment(64), "exp_avg_sq": Minifloat.second_moment4(64)}
    return wrap(torch.optim.AdamW(groups, lr), ConfigurablePolicy(formats), **options)


WRAPPED = {
    "int8": int8,
    "4 bits": four_bits,
    "4 bits, chunked": partial(four_bits, fused=False, chunk_size=256),
}


def numbers(shape, seed):
    """Exact binary fractions between -1 and 1, the same on every machine."""
    count = torch.Size(shape).numel()
    return (((torch.arange(count) * 7919 + seed * 104729) % 2003 - 1001) / 1024).reshape(shape)


class Model(nn.Module):
    """Three parameters: a matrix, a channels_last convolution's weight, and a bfloat16 vector."""

    def __init__(self, rows=16):
        super().__init__()
        conv = numbers((4, 3, 3, 3), 2).contiguous(memory_format=torch.channels_last)
        self.matrix = nn.Parameter(numbers((rows, 20), 1))
        self.conv = nn.Parameter(conv)
        self.vector = nn.Parameter(numbers((37,), 3).bfloat16())

    def groups(self):
        """Two param groups; one has what a scheduler adds."""
        first = {"params": [self.matrix, self.vector], "lr": 0.01, "initial_lr": 0.02}
        return [first, {"params": [self.conv]}]

    def values(self):
        return [p.detach().clone() for p in self.parameters()]

    def set(self, values):
        with torch.no_grad():
            for param, value in zip(self.parameters(), values, strict=True):
                param.copy_(value)

    def train(self, optimizer, steps):
        for step in steps:
            for number, param in enumerate(self.parameters()):
                param.grad = torch.empty_like(param).copy_(numbers(param.shape, 10 * step + number))
            optimizer.step()


def make(build, rows=16, **options):
    """A model and its optimizer, with plain torch operations where there is a choice."""
    model = Model(rows)
    return model, build(model.groups(), lr=0.005, **options)


def rows(name):
    """One matrix is large enough for TurboAdam's own thresholds."""
    return 205 if name == "TurboAdam" else 16


def decoded(optimizer, model):
    """What the stored state says: moments and master weights, by parameter."""
    return [
        {**decode_state(optimizer, p), "master": master_weights(optimizer, p)}
        for p in model.parameters()
    ]


def state(optimizer, model):
    """The state of a wrapped optimizer, by parameter."""
    return [dict(optimizer.state[p]) for p in model.parameters()]


def record(model, optimizer, state_dict, moments):
    """What a file says of one optimizer; it takes two more steps."""
    found = copy.deepcopy(
        {"optimizer": state_dict, "params": model.values(), "decoded": moments(optimizer, model)}
    )
    model.train(optimizer, range(SAVED, LAST))
    return {**found, "after": model.values()}


def family():
    """Packed state dicts."""
    for name, build in FAMILY.items():
        model, optimizer = make(build, rows(name), backend="eager")
        model.train(optimizer, range(SAVED))
        yield name, record(model, optimizer, optimizer.state_dict(), decoded)


def flat():
    """State dicts of ``torch.distributed.checkpoint``: flat, with parameters' names."""
    for name, build in FLAT.items():
        model, optimizer = make(build, backend="eager")
        model.train(optimizer, range(SAVED))
        state_dict = get_optimizer_state_dict(model, optimizer, options=OPTIONS)
        yield name, record(model, optimizer, state_dict, decoded)


def wrapped():
    """Packed state dicts of wrapped optimizers, and plain ones, which are encoded when loaded."""
    for name, build in WRAPPED.items():
        model, optimizer = make(build)
        model.train(optimizer, range(SAVED))
        plain, values = copy.deepcopy(optimizer.state_dict()), model.values()
        yield f"{name}, packed", record(model, optimizer, optimizer.packed_state_dict(), state)
        model, optimizer = make(build)
        model.set(values)
        optimizer.load_state_dict(plain)
        yield f"{name}, plain", record(model, optimizer, plain, state)


def disk(folder):
    """Files of state and their manifests."""
    for name, build in DISK.items():
        path = folder / "state.bin"
        model, optimizer = make(build, backend="eager")
        offload(optimizer, "disk", path=path)
        model.train(optimizer, range(SAVED))
        synchronize(optimizer)
        files = {file.name: file.read_bytes() for file in folder.iterdir()}
        yield name, record(model, optimizer, files, decoded)
        del optimizer
        for file in folder.iterdir():
            file.unlink()


def write(path, records):
    file = io.BytesIO()
    torch.save(dict(records), file)
    path.write_bytes(lzma.compress(file.getvalue(), preset=9 | lzma.PRESET_EXTREME))


def read(path):
    return torch.load(io.BytesIO(lzma.decompress(path.read_bytes())), weights_only=True)


if __name__ == "__main__":
    import tempfile

    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    write(target / "family.pt.xz", family())
    write(target / "flat.pt.xz", flat())
    write(target / "wrapped.pt.xz", wrapped())
    with tempfile.TemporaryDirectory() as folder:
        write(target / "disk.pt.xz", disk(Path(folder)))

"""The optimizers that are measured: ours, torch's, and every peer that is installed."""

import importlib
from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import Any

import torch

Make = Callable[..., torch.optim.Optimizer]

ADAMW: dict[str, Any] = {"mode": "adamw"}
# each is a module, the distribution it comes from, the name of the class, and its arguments
KNOWN: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "torch fused": ("torch.optim", "torch", "AdamW", {"fused": True}),
    "torch foreach": ("torch.optim", "torch", "AdamW", {"foreach": True}),
    "AdamW8bit": ("lowbit_adam", "lowbit-adam", "AdamW8bit", {}),
    "AdamW8bit eager": ("lowbit_adam", "lowbit-adam", "AdamW8bit", {"backend": "eager"}),
    "AdamW8bit-256": ("lowbit_adam", "lowbit-adam", "AdamW8bit", {"block_size": 256}),
    "AdamWFp8": ("lowbit_adam", "lowbit-adam", "AdamWFp8", {}),
    "AdamW4bit": ("lowbit_adam", "lowbit-adam", "AdamW4bit", {}),
    "Lion8bit": ("lowbit_adam", "lowbit-adam", "Lion8bit", {}),
    "SGD8bit": ("lowbit_adam", "lowbit-adam", "SGD8bit", {"momentum": 0.9}),
    "AdamW8bit + 24": ("lowbit_adam", "lowbit-adam", "AdamW8bit", {"master_weight_bits": 24}),
    "bitsandbytes": ("bitsandbytes.optim", "bitsandbytes", "AdamW8bit", {}),
    "torchao": ("torchao.optim", "torchao", "AdamW8bit", {}),
    "torchao-fp8": ("torchao.optim", "torchao", "AdamWFp8", {}),
    "torchao-4bit": ("torchao.optim", "torchao", "AdamW4bit", {}),
    "flashoptim": ("flashoptim", "flashoptim", "FlashAdamW", {}),
    "flashoptim-32": ("flashoptim", "flashoptim", "FlashAdamW", {"master_weight_bits": None}),
    "optimi": ("optimi", "torch-optimi", "AdamW", {}),
    "torchastic": ("torchastic", "torchastic", "AdamW", {}),
    "turboadam-0.2": ("turboadam", "turboadam", "TurboAdam", {}),
    # result files have the names that these had when mode "adamw" was the default
    "TurboAdam": ("turboadam", "turboadam", "TurboAdam", ADAMW),
    "TurboAdam 2 + 3, flush": ("turboadam", "turboadam", "TurboAdam", {}),
    "TurboAdam 2 + 3": ("turboadam", "turboadam", "TurboAdam", {**ADAMW, "m_bits": 2}),
    "TurboAdam 3 + 4": ("turboadam", "turboadam", "TurboAdam", {**ADAMW, "m_bits": 3, "v_bits": 4}),
    "stochbf16 AdamW": ("stochbf16", "stochbf16", "AdamW", {}),
    "stochbf16 AdamW + 24": ("stochbf16", "stochbf16", "AdamW", {"master_weight_bits": 24}),
    "stochbf16 centred": ("stochbf16", "stochbf16", "AdamW", {"centralization": 1.0}),
    "stochbf16 Compass": ("stochbf16", "stochbf16", "Compass", {}),
    "stochbf16 LPFAdamW": ("stochbf16", "stochbf16", "LPFAdamW", {}),
    "stochbf16 RMSProp": ("stochbf16", "stochbf16", "RMSProp", {}),
    "stochbf16 Lion": ("stochbf16", "stochbf16", "Lion", {}),
    "stochbf16 SGD": ("stochbf16", "stochbf16", "SGD", {"momentum": 0.9}),
    "stochbf16 SGD plain": ("stochbf16", "stochbf16", "SGD", {}),
}


OURS = {"lowbit-adam", "turboadam", "stochbf16", "optstate-codecs"}
CHOSEN = (
    "torch fused",
    "torch foreach",
    "stochbf16 AdamW",
    "AdamW8bit",
    "AdamWFp8",
    "AdamW4bit",
    "TurboAdam",
    "TurboAdam 2 + 3, flush",
)
"""Those that ``optstate bench`` times unless it is told otherwise, and then every peer."""


def is_peer(name: str) -> bool:
    """Whether a contestant is another library's, and not torch's."""
    return name == "turboadam-0.2" or KNOWN[name][1] not in {"torch", *OURS}


def _exact() -> Make:
    codecs = importlib.import_module("optstate_codecs")
    formats = dict.fromkeys(("exp_avg", "exp_avg_sq"), "fp32")
    return partial(codecs.CodedOptimizer, rule=codecs.Adam(decoupled=True), formats=formats)


def contestants() -> dict[str, tuple[Make, str]]:
    """Every optimizer that can be imported here, with its version."""
    found: dict[str, tuple[Make, str]] = {}
    for name, (module, distribution, attribute, arguments) in KNOWN.items():
        try:
            make = getattr(importlib.import_module(module), attribute)
        except Exception:  # a peer that does not import here is a peer that is not installed
            continue
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            version = getattr(importlib.import_module(module.split(".")[0]), "__version__", "?")
        # two distributions have this name; the other's versions are below 1
        if module == "turboadam" and (name == "turboadam-0.2") != version.startswith("0."):
            continue
        found[name] = (partial(make, **arguments), version)
    version = importlib.import_module("optstate_codecs").__version__
    found["codecs fp32"] = (_exact(), version)
    return found

"""Short names of optimizers on the command line. Imports nothing, so that ``--help`` is fast."""

SHORT_NAMES = {
    full.rpartition(".")[2].lower(): full
    for full in (
        "torch.optim.Adam",
        "torch.optim.AdamW",
        "torch.optim.SGD",
        "lowbit_adam.Adam8bit",
        "lowbit_adam.Adam4bit",
        "lowbit_adam.AdamFp8",
        "lowbit_adam.AdamW8bit",
        "lowbit_adam.AdamW4bit",
        "lowbit_adam.AdamWFp8",
        "lowbit_adam.Lion8bit",
        "lowbit_adam.SGD8bit",
        "turboadam.TurboAdam",
    )
}
"""Names that need no module, in lower case; any other optimizer is named module.Class."""

CHOICES = ", ".join(full.rpartition(".")[2] for full in SHORT_NAMES.values())
"""The short names, spelled as their classes."""

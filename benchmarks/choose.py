"""Prints the tables of choices in the docs from the results of the other scripts.

Run after those; `tests-integration` compares what it prints with the pages: first the tutorial's,
then that of the page on choosing.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
LR = 1e-3
BETA2 = 0.999
LAYOUT = "llama1b"

# what the rows are called: here, in the convergence study, in the fidelity lab, in the timings
ROWS = (
    ("`torch.optim.AdamW`", "AdamW", None, "torch fused"),
    ("the same, `foreach=True`", "AdamW foreach", None, None),
    ("`AdamW8bit`", "AdamW8bit", "8-bit", "AdamW8bit"),
    ("`AdamWFp8`", "AdamWFp8", "FP8", "AdamWFp8"),
    ("`AdamW4bit`", "AdamW4bit", "4-bit", "AdamW4bit"),
)

# the same for the page on choosing, with the files of the study and of the timings: parameters are
# bfloat16 where they are timed; and the format in the count of what fits
FAMILY = (
    (
        "`torch.optim.AdamW`",
        ("gpt_stochbf16", "AdamW bf16"),
        ("h200_llama1b", "torch fused"),
        "bf16",
    ),
    ("`stochbf16.AdamW`", ("gpt_stochbf16", None), ("h200_llama1b", None), "bf16"),
    ("`AdamW8bit`", ("gpt", None), ("h200_llama1b", None), "8-bit"),
    ("`AdamWFp8`", ("gpt", None), ("h200_llama1b", None), "8-bit"),
    ("`AdamW4bit`", ("gpt", None), ("h200_llama1b", None), "4-bit"),
    (
        '`TurboAdam(mode="adamw")`',
        ("gpt_turboadam", "TurboAdam"),
        ("h200_llama1b", "TurboAdam"),
        "TurboAdam, mode adamw",
    ),
    ("`TurboAdam`", None, ("h200_llama1b", "TurboAdam 2 + 3, flush"), "TurboAdam"),
)


def load(name: str) -> dict[str, Any]:
    """One result file."""
    report: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return report


def learnt(report: dict[str, Any], name: str) -> list[str]:
    """Bits of state in the GPT study, and the held-out loss beside AdamW's."""
    row = next(r for r in report["summary"] if (r["optimizer"], r["lr"]) == (name, LR))
    gap = f"{row['difference']:+.4f} +- {row['difference_spread']:.4f}" if row["difference"] else ""
    return [f"{row['state_bits_per_parameter']:.2f}", gap]


def followed(report: dict[str, Any], name: str | None) -> list[str]:
    """The longest step of any run of the fidelity lab, and the error of the plainest."""
    rows = [r for r in report["rows"] if r["arrangement"] == name]
    if not rows:
        return ["", ""]
    plain = next(r for r in rows if (r["gradients"], r["beta2"]) == ("dense", BETA2))
    return [f"{max(r['longest'] for r in rows):.1f} lr", f"{100 * plain['error']:.0f} %"]


def timed(report: dict[str, Any], name: str | None, dtype: str = "float32") -> list[str]:
    """The whole step for parameters of this dtype."""
    key = (name, LAYOUT, dtype)
    found = [
        r["whole_ms"] for r in report["rows"] if (r["optimizer"], r["layout"], r["dtype"]) == key
    ]
    return [f"{found[0]:.2f} ms" if found else ""]


def table() -> str:
    """Markdown, as the tutorial has it."""
    study, lab, times = map(load, ("convergence_gpt", "fidelity", "step_time_h200"))
    heads = ("", "bits", "difference of held-out loss", "longest step", "noise", "step")
    lines = [heads, ["---"] * len(heads)]
    for title, run, arrangement, timing in ROWS:
        cells = [*learnt(study, run), *followed(lab, arrangement), *timed(times, timing)]
        lines.append([title, *cells])
    return markdown(lines)


def overview() -> str:
    """Markdown, as the page on choosing has it."""
    heads = ("", "bits", "8B model, GB", "held-out loss", "step")
    lines = [heads, ["---"] * len(heads)]
    fits = load("fits")["rows"]
    for title, study, (file, timing), format_ in FAMILY:
        name = title.strip("`").replace(".", " ")
        key = ("8b", format_, "device")
        (found,) = (r for r in fits if (r["model"], r["format"], r["place"]) == key)
        state = found["state_bytes"]
        # what this study has not trained: the bits of the model beside it
        bits, gap = f"{8 * state / found['parameters']:.2f}", ""
        if study is not None:
            bits, gap = learnt(load(f"convergence_{study[0]}"), study[1] or name)
        (ms,) = timed(load(f"step_time_{file}"), timing or name, "bfloat16")
        lines.append([title, bits, f"{state / 1e9:.1f}", gap, ms])
    return markdown(lines)


def markdown(lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table(), overview(), sep="\n\n")

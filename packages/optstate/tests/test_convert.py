"""Checkpoints from other libraries to ours, between ours, and back to torch.optim."""

import lzma
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import json_of, run

from lowbit_adam import AdamW4bit, AdamW8bit, Lion8bit
from optstate_codecs import CodedOptimizer, decode_state, load_safetensors, save_safetensors
from turboadam import TurboAdam

PEERS = Path(__file__).parent / "peers"
SHAPES = ((64, 72), (5,))


def peer(name: str, folder: Path) -> Path:
    """A checkpoint that the library itself has written, with torch's state as ``exact``."""
    path = folder / f"{name}.pt"
    path.write_bytes(lzma.decompress((PEERS / f"{name}.pt.xz").read_bytes()))
    return path


def params(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in SHAPES]


def stepped(make: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """An optimizer after two steps with gradients from a seed."""
    generator = torch.Generator().manual_seed(1)
    owned = params(dtype)
    optimizer = make(owned, lr=1e-3, **options)
    for _ in range(2):
        for param in owned:
            param.grad = torch.randn(param.shape, generator=generator).to(dtype)
        optimizer.step()
    return optimizer


def params_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def assert_goes_on(path: Path, optimizer: torch.optim.Optimizer, key: str | None = None) -> None:
    """A state dict in a file loads, and a step with it works."""
    saved = torch.load(path, weights_only=True)
    optimizer.load_state_dict(saved if key is None else saved[key])
    for param in params_of(optimizer):
        param.grad = torch.ones_like(param)
    optimizer.step()
    for param in params_of(optimizer):
        assert float(optimizer.state[param]["step"]) > 2
        assert param.isfinite().all()


@pytest.mark.parametrize(
    ("name", "library", "cosine"),
    [
        ("bitsandbytes", "bitsandbytes", 0.999),
        ("torchastic", "torchastic", 0.999),
        # 2 bits of update, rounded in each of three steps
        ("turboadam", "turboadam-0.2", 0.75),
    ],
)
def test_from_other_libraries(name: str, library: str, cosine: float, tmp_path: Path) -> None:
    source, target = peer(name, tmp_path), tmp_path / "torch.pt"
    exact = torch.load(source, weights_only=True)["exact"]["state"]
    result = json_of("convert", source, target, "--to", "torch")
    assert (result["from"], result["key"], result["parameters"]) == (library, "optimizer", 2)
    written = torch.load(target, weights_only=True)
    # the rest of the checkpoint is there as it was
    assert written["epoch"] == 7
    for number, entry in exact.items():
        found = written["optimizer"]["state"][number]
        assert float(found["step"]) == 3
        for moment in ("exp_avg", "exp_avg_sq"):
            assert found[moment].dtype == torch.float32
            a, b = found[moment].flatten(), entry[moment].flatten()
            assert a @ b / a.norm() / b.norm() > cosine, (number, moment)
    assert_goes_on(target, torch.optim.AdamW(params(), lr=1e-3), "optimizer")
    code, _ = run("convert", source, tmp_path / "ours.pt", "--to", "AdamW8bit", "--from", library)
    assert code == 0
    assert_goes_on(tmp_path / "ours.pt", AdamW8bit(params(), lr=1e-3), "optimizer")


def test_torchaos_tensors_need_torchao(tmp_path: Path) -> None:
    """With torchao they are decoded; without it, nothing of the file is executed."""
    source, target = peer("torchao", tmp_path), tmp_path / "torch.pt"
    try:
        import torchao.optim  # noqa: F401
    except ImportError:
        code, output = run("convert", source, target, "--to", "torch")
        assert code == 2
        assert "torchao's, which is needed to read them: pip install torchao" in output
        assert not target.exists()
    else:
        assert json_of("convert", source, target, "--to", "torch")["from"] == "torchao"
        assert_goes_on(target, torch.optim.AdamW(params(), lr=1e-3), "optimizer")


@pytest.mark.parametrize("make", [AdamW8bit, AdamW4bit, TurboAdam], ids=lambda cls: cls.__name__)
def test_from_torch_and_back(make: Any, tmp_path: Path) -> None:
    exact = stepped(torch.optim.AdamW)
    weights = {str(number): param.detach() for number, param in enumerate(params_of(exact))}
    saved = {"model": weights, "optimizer": exact.state_dict()}
    torch.save(saved, tmp_path / "torch.pt")
    result = json_of("convert", tmp_path / "torch.pt", tmp_path / "ours.pt", "--to", make.__name__)
    assert result["from"] == "torch"
    assert result["bytes_after"] < 0.3 * result["bytes_before"]
    ours = make(params(), lr=1e-3)
    ours.load_state_dict(torch.load(tmp_path / "ours.pt", weights_only=True)["optimizer"])
    # the weights in the file tell shapes that codes do not
    json_of("convert", tmp_path / "ours.pt", tmp_path / "back.pt", "--to", "torch")
    written = torch.load(tmp_path / "back.pt", weights_only=True)
    assert all(torch.equal(value, weights[name]) for name, value in written["model"].items())
    back = written["optimizer"]
    for number, param in enumerate(params_of(ours)):
        decoded = decode_state(ours, param)
        for key, value in decoded.items():
            assert torch.equal(back["state"][number][key], value), key
    group, wanted = back["param_groups"][0], exact.state_dict()["param_groups"][0]
    assert set(group) <= {*wanted, "params"}
    assert (group["lr"], group["betas"]) == (wanted["lr"], wanted["betas"])
    assert_goes_on(tmp_path / "back.pt", torch.optim.AdamW(params()), "optimizer")


def test_between_ours_with_master_weights(tmp_path: Path) -> None:
    """Packed state and corrections move without a loss where formats and bits are equal."""
    before = stepped(AdamW8bit, torch.bfloat16, master_weight_bits=24)
    torch.save({"optim": before.state_dict()}, tmp_path / "a.pt")
    to = ("--to", "AdamW8bit(master_weight_bits=24)")
    json_of("convert", tmp_path / "a.pt", tmp_path / "b.pt", *to)
    after = torch.load(tmp_path / "b.pt", weights_only=True)["optim"]
    for number, entry in before.state_dict()["state"].items():
        assert set(entry) == set(after["state"][number])
        assert all(torch.equal(value, after["state"][number][key]) for key, value in entry.items())
    code, output = run("convert", tmp_path / "a.pt", tmp_path / "c.pt", "--to", "torch")
    assert code == 0
    assert "master weights were dropped" in output


def test_as_safetensors_and_back(tmp_path: Path) -> None:
    exact = stepped(torch.optim.AdamW)
    torch.save(exact.state_dict(), tmp_path / "torch.pt")
    file = tmp_path / "ours.safetensors"
    json_of("convert", tmp_path / "torch.pt", file, "--to", "AdamW4bit")
    ours = AdamW4bit(params(), lr=1e-3)
    load_safetensors(ours, file)
    json_of("convert", file, tmp_path / "back.pt", "--to", "torch")
    assert_goes_on(tmp_path / "back.pt", torch.optim.AdamW(params()))
    code, output = run("convert", file, tmp_path / "x.safetensors", "--to", "torch")
    assert code == 2
    assert "packed state only; torch.optim's goes to a torch file" in output


def test_codes_that_do_not_tell_the_shape(tmp_path: Path) -> None:
    """Of a last dimension that blocks do not divide, 4-bit codes are in one dimension."""
    shapes = [(65, 67), (3,)]
    owned = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    for param in owned:
        param.grad = torch.ones_like(param)
    optimizer = AdamW4bit(owned, lr=1e-3)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "ours.pt")
    command = ("convert", tmp_path / "ours.pt", tmp_path / "torch.pt", "--to", "torch")
    code, output = run(*command)
    assert code == 2
    assert "parameter 0: its codes do not tell its shape; name the model with --shapes" in output
    weights = {str(n): torch.zeros(shape) for n, shape in enumerate(shapes)}
    torch.save(weights, tmp_path / "model.pt")
    json_of(*command, "--shapes", tmp_path / "model.pt")
    back = torch.load(tmp_path / "torch.pt", weights_only=True)
    assert back["state"][0]["exp_avg"].shape == (65, 67)
    assert torch.equal(back["state"][0]["exp_avg"], decode_state(optimizer, owned[0])["exp_avg"])
    code, output = run(*command, "--shapes", "gpt2", "--force")
    assert code == 2
    assert "'gpt2': 148 parameters, must be the checkpoint's 2" in output


def test_parameters_without_state_stay_without(tmp_path: Path) -> None:
    owned = params()
    owned[0].grad = torch.ones_like(owned[0])
    exact = torch.optim.AdamW(owned)
    exact.step()
    torch.save(exact.state_dict(), tmp_path / "torch.pt")
    json_of("convert", tmp_path / "torch.pt", tmp_path / "ours.pt", "--to", "AdamW8bit")
    ours = torch.load(tmp_path / "ours.pt", weights_only=True)
    assert list(ours["state"]) == [0]
    AdamW8bit(params()).load_state_dict(ours)


def test_momentum_of_sgd(tmp_path: Path) -> None:
    exact = stepped(torch.optim.SGD, momentum=0.9)
    torch.save(exact.state_dict(), tmp_path / "sgd.pt")
    to = ("--to", "SGD8bit(momentum=0.9)")
    json_of("convert", tmp_path / "sgd.pt", tmp_path / "ours.pt", *to)
    json_of("convert", tmp_path / "ours.pt", tmp_path / "back.pt", "--to", "torch")
    back = torch.load(tmp_path / "back.pt", weights_only=True)["state"]
    for number, entry in exact.state_dict()["state"].items():
        wanted = entry["momentum_buffer"]
        error = (back[number]["momentum_buffer"] - wanted).norm() / wanted.norm()
        assert error < 0.03


def test_torchastics_state_keeps_its_names_for_stochbf16(tmp_path: Path) -> None:
    source = peer("torchastic", tmp_path)
    json_of("convert", source, tmp_path / "ours.pt", "--to", "stochbf16.AdamW")
    theirs = torch.load(source, weights_only=True)["optimizer"]["state"]
    ours = torch.load(tmp_path / "ours.pt", weights_only=True)["optimizer"]["state"]
    for number, entry in theirs.items():
        # bfloat16 both, so that no bit is lost
        assert torch.equal(ours[number]["ema"], entry["ema"])
        assert torch.equal(ours[number]["ema_squared"], entry["ema_squared"])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "torch.pt"
    torch.save({"optimizer": stepped(torch.optim.AdamW).state_dict()}, path)
    return path


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--to", "torchao"], "'torchao': only read, not written"),
        (["--to", "Adamant"], "'Adamant': no such optimizer"),
        (["--to", "torch.optim.AdamW"], "AdamW: must be torch, or a class of the family"),
        (["--to", "Lion8bit"], "unknown key 'exp_avg_sq'; known are step, exp_avg"),
        (["--to", "AdamW8bit", "--from", "bitsandbytes"], "has a state dict of torch"),
        (["--to", "AdamW8bit", "--from", "keras"], "'keras': must be one of torch, torchao"),
        (["--to", "AdamW8bit", "--key", "model"], "no entry 'model'; has ['optimizer']"),
        (["--to", "AdamW8bit", "--key", "optimizer.state"], "is no optimizer's state dict"),
        (["--to", "AdamW8bit(block_size=100)"], "block_size=100: must be a power of two"),
        ([], "Missing option '--to'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_write_nothing(
    saved: Path, options: list[str], complaint: str, tmp_path: Path
) -> None:
    code, output = run("convert", saved, tmp_path / "new" / "target.pt", *options)
    assert code == 2
    assert "Usage: optstate convert" in output
    assert complaint in output
    assert [path.name for path in tmp_path.iterdir()] == ["torch.pt"]


def test_nothing_is_overwritten_without_force(saved: Path, tmp_path: Path) -> None:
    target = tmp_path / "there.pt"
    target.write_text("mine")
    code, output = run("convert", saved, target, "--to", "AdamW8bit")
    assert (code, target.read_text()) == (2, "mine")
    assert "there already; --force overwrites it" in output
    assert run("convert", saved, target, "--to", "AdamW8bit", "--force")[0] == 0
    assert_goes_on(target, AdamW8bit(params()), "optimizer")


def test_state_that_torch_has_no_class_for_says_so(tmp_path: Path) -> None:
    torch.save(stepped(Lion8bit).state_dict(), tmp_path / "lion.pt")
    code, output = run("convert", tmp_path / "lion.pt", tmp_path / "x.pt", "--to", "torch")
    assert code == 2
    assert "torch.optim has no Lion, whose state this is" in output


def test_packed_state_of_a_wrapper_says_what_to_do(tmp_path: Path) -> None:
    from optstate_wrap import wrap

    wrapped = stepped(lambda owned, lr: wrap(torch.optim.AdamW(owned, lr), packed_checkpoints=True))
    torch.save(wrapped.state_dict(), tmp_path / "wrapped.pt")
    code, output = run("convert", tmp_path / "wrapped.pt", tmp_path / "x.pt", "--to", "torch")
    assert code == 2
    assert "set packed_checkpoints=False" in output


def test_a_file_of_safetensors_of_another_program(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    code, output = run("convert", tmp_path / "a.safetensors", tmp_path / "x.pt", "--to", "torch")
    assert code == 2
    assert "not written by save_safetensors" in output
    optimizer = stepped(AdamW8bit)
    assert isinstance(optimizer, CodedOptimizer)
    save_safetensors(optimizer, tmp_path / "a.safetensors")
    assert run("convert", tmp_path / "a.safetensors", tmp_path / "x.pt", "--to", "torch")[0] == 0

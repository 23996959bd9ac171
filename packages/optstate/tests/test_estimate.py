"""Estimated bytes against bytes that a step allocates, and against arithmetic."""

import pytest
import torch
from commands import json_of, run

from optstate.estimate.command import byte_count, card_size
from optstate.estimate.count import BUCKET, count, placed
from optstate.estimate.optimizers import DEFAULTS
from optstate.models.families import GPT2, ViT, named_shapes
from optstate.models.model import Model
from optstate.optimizers import parse
from optstate_codecs import memory_report, offload

SHAPES = {
    "gpt2": GPT2(128, 2, vocabulary=515, context=32).shapes(),
    "vit": ViT(96, 2, 200, patch=7, image=28, classes=10).shapes(),
}
MASTERS = "AdamW8bit(master_weight_bits=24)"
FUSED = "torch.optim.AdamW(fused=true)"


def stepped(shapes, make, dtype=torch.bfloat16):
    """An optimizer that has really stepped parameters of these shapes."""
    params = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = make(params)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", [*DEFAULTS, MASTERS, FUSED])
@pytest.mark.parametrize("shapes", SHAPES)
def test_bytes_are_those_that_a_step_allocates(name: str, shapes: str) -> None:
    model = Model.of_shapes(shapes, SHAPES[shapes], torch.bfloat16)
    counted = count(model, parse(name))
    report = memory_report(stepped(SHAPES[shapes], parse(name)))
    assert counted.parameters == report.parameter_bytes
    assert counted.gradients == report.gradient_bytes
    assert counted.stored == report.state_bytes
    assert counted.master == (model.parameters if name == MASTERS else 0)


def test_bytes_in_a_file_are_those_of_the_file(tmp_path) -> None:
    shapes = [(1024, 1024), (1024,)]
    make = parse("AdamW4bit")
    counted = count(Model.of_shapes("two", shapes, torch.bfloat16), make)
    path = tmp_path / "state"
    optimizer = stepped(shapes, lambda params: offload(make(params), "disk", path=path))
    written = path.stat().st_size
    del optimizer
    assert placed(counted, "disk", False).file == pytest.approx(written, rel=0.01)


def test_llama_2_7b_is_what_arithmetic_says() -> None:
    """8 bits a moment, and a float32 scale for each block of 2048; vectors have two blocks."""
    shapes = named_shapes("llama-2-7b")
    counted = count(Model.of_shapes("7b", shapes, torch.bfloat16), parse("AdamW8bit"))
    numel = 2 * 32000 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096
    assert numel == 6_738_415_616
    assert counted.parameters == counted.gradients == 2 * numel
    assert counted.state == pytest.approx(2 * (numel + 4 * numel / 2048), rel=1e-4)
    exact = count(Model.of_shapes("7b", shapes, torch.float32), torch.optim.AdamW)
    assert exact.stored == 8 * numel + 4 * 291
    # one chunk of three of 64 MiB; gradients of the embedding and 512 MiB that wait
    host = placed(counted, "host", True)
    assert host.device == 2 * numel + 2 * 32000 * 4096 + 2**29 + 3 * 2**26
    assert host.host == counted.stored


def test_vit_h_is_what_arithmetic_says() -> None:
    """4 bits a moment of large tensors, with 4 bytes of scale for 128 elements of each moment."""
    shapes = named_shapes("vit-h")
    counted = count(Model.of_shapes("vit-h", shapes, torch.bfloat16), parse("AdamW4bit"))
    n, inside = 1280, 5120
    matrices = 32 * (4 * n**2 + 2 * n * inside) + 257 * n + n * 3 * 14**2 + 1000 * n
    vectors = 32 * (9 * n + inside) + 4 * n + 1000
    assert matrices + vectors == 632_045_800
    assert counted.parameters == 2 * (matrices + vectors)
    bits = 8 * counted.state / 632_045_800
    assert bits == pytest.approx(8.25, rel=0.01)
    assert placed(counted, "device", True).gradients == BUCKET


def test_gradients_that_are_released_never_take_more_than_all() -> None:
    counted = count(read := Model.of_shapes("small", [(8, 8)], torch.float32), torch.optim.AdamW)
    for store in ("device", "host", "disk"):
        assert placed(counted, store, True).gradients == read.parameter_bytes == 256


def test_json_has_every_optimizer_store_and_release() -> None:
    report = json_of("estimate", "gpt2", "--activations", "1GB", "--card", "2", "--card", "24GB")
    assert report["parameters"] == 124_439_808
    assert report["cards_gb"] == [2, 24]
    keys = {(row["optimizer"], row["store"], row["gradients"]) for row in report["rows"]}
    assert len(keys) == len(report["rows"]) == 2 * (2 + 3 * 7)
    for row in report["rows"]:
        parts = ("parameter_bytes", "gradient_bytes", "transfer_bytes")
        state = row["state_bytes"] + row["master_bytes"] if row["store"] == "device" else 0
        assert row["device_bytes"] == sum(row[part] for part in parts) + state
        assert row["total_bytes"] == row["device_bytes"] + 10**9
        assert row["fits_gb"] == [card for card in (2, 24) if row["total_bytes"] <= card * 10**9]


def test_tables_say_what_json_says() -> None:
    args = ("estimate", "llama-3-8b", "--optimizer", "AdamW8bit", "--store", "host")
    code, output = run(*args, "--master-weights", "24")
    (kept, released) = json_of(*args, "--master-weights", "24")["rows"]
    assert code == 0
    assert kept["master_bytes"] == 8_030_261_248
    for key in ("parameter_bytes", "state_bytes", "master_bytes", "total_bytes", "host_bytes"):
        assert f" {kept[key] / 1e9:.2f} " in output
    assert f" {released['total_bytes'] / 1e9:.2f} " in output
    assert "Activations are not counted" in output
    assert "rel. rel. yes yes yes yes yes" in output


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        ([], "Missing argument 'MODEL'"),
        (["lama"], "MODEL: 'lama': no model; must be a name, a count"),
        (["gpt2", "--optimizer", "Adamant"], "'Adamant': no such optimizer; use one of"),
        (["gpt2", "--optimizer", "AdamW8bit(block_size=100)"], "block_size=100: must be a power"),
        (["gpt2", "--optimizer", "AdamW8bit(block_size=64"], "must be Name or Name(argument"),
        (["gpt2", "--store", "tape"], "'tape' is not one of 'device', 'host', 'disk'"),
        (["gpt2", "--dtype", "int8"], "'int8' is not one of 'bfloat16', 'float16', 'float32'"),
        (["gpt2", "--activations", "much"], "'much': must be bytes, such as 4GB"),
        (["gpt2", "--card", "big"], "'big': must be GB of memory, such as 24"),
        (["gpt2", "--master-weights", "16"], "16: must be 24 or 32"),
        (["gpt2", "--key", "model"], "key='model': only for a torch checkpoint"),
        (["gpt2", "--layers", "0"], "--layers"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_print_usage(args: list[str], complaint: str) -> None:
    code, output = run("estimate", *args)
    assert code == 2
    assert "Usage: optstate estimate" in output
    assert complaint in output


def test_sizes_in_words() -> None:
    assert byte_count("4GB") == 4 * 10**9
    assert byte_count("1.5 GiB") == 3 * 2**29
    assert byte_count("512mib") == 2**29
    assert byte_count("1e9") == byte_count("1G") == 10**9
    assert card_size("24GB") == card_size("24") == 24


def test_a_default_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "turboadam", None)
    report = json_of("estimate", "1M")
    assert not [row for row in report["rows"] if "Turbo" in row["optimizer"]]
    assert any("TurboAdam: turboadam is not installed" in text for text in report["notes"])
    code, output = run("estimate", "1M", "--optimizer", "TurboAdam")
    assert code == 1
    assert 'pip install "optstate[turboadam]"' in output

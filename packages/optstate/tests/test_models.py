"""Models from names, counts, files and factories."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from optstate.models.families import NAMED, named_shapes, numel
from optstate.models.sources import parameter_count, read_model

# as the models' publishers state them, or their model cards to two figures
KNOWN = {
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen3-8b": 8_190_735_360,
    "vit-h": 632_045_800,
}


@pytest.mark.parametrize("name", KNOWN)
def test_named_models_have_the_parameters_that_they_are_known_for(name: str) -> None:
    assert numel(named_shapes(name)) == KNOWN[name]
    assert read_model(name.upper()).parameters == KNOWN[name]


def test_fewer_layers() -> None:
    whole, small = read_model("gpt2"), read_model("gpt2", layers=2)
    assert whole.parameters - small.parameters == 10 * (12 * 768**2 + 13 * 768)
    with pytest.raises(ValueError, match="layers=2: only for a named model"):
        read_model("8B", layers=2)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("8B", 8_000_000_000),
        ("7e9", 7_000_000_000),
        ("124M", 124_000_000),
        ("1.5b", 1_500_000_000),
        ("124_439_808", 124_439_808),
        ("300", 300),
    ],
)
def test_counts(text: str, count: int) -> None:
    assert parameter_count(text) == count
    assert read_model(text).parameters == count


def weights() -> dict[str, torch.Tensor]:
    return {
        "a.weight": torch.zeros(8, 4, dtype=torch.bfloat16),
        "a.bias": torch.zeros(8),
        "seen": torch.zeros(1, dtype=torch.int64),
    }


def test_safetensors_file_and_folder(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "one.safetensors")
    model = read_model(str(tmp_path / "one.safetensors"))
    assert sorted((one.name, one.shape) for one in model.entries) == [
        ("a.bias", (8,)),
        ("a.weight", (8, 4)),
    ]
    assert model.parameter_bytes == 2 * 32 + 4 * 8
    assert "1 tensors are left out" in model.notes[0]
    assert read_model(str(tmp_path)).parameters == 40
    # an index says which of the files are the model's
    save_file({"b": torch.zeros(3)}, tmp_path / "other.safetensors")
    index = {"weight_map": dict.fromkeys(weights(), "one.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_model(str(tmp_path)).parameters == 40
    assert read_model(str(tmp_path), torch.float32).parameter_bytes == 4 * 40


def test_torch_checkpoint_counts_tied_weights_once(tmp_path: Path) -> None:
    tensors = weights()
    tied = {**tensors, "head.weight": tensors["a.weight"]}
    torch.save({"step": 3, "model": tied}, tmp_path / "last.pt")
    torch.save({"net": {"ema": tied}}, tmp_path / "deep.pt")
    assert read_model(str(tmp_path / "last.pt")).parameters == 40
    assert read_model(str(tmp_path / "deep.pt"), key="net.ema").parameters == 40
    with pytest.raises(ValueError, match=r"no entry 'net.raw'; has \['ema'\]"):
        read_model(str(tmp_path / "deep.pt"), key="net.raw")
    with pytest.raises(ValueError, match="no tensors that are parameters; --key"):
        read_model(str(tmp_path / "deep.pt"))


def test_files_that_are_something_else(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("no weights here")
    (tmp_path / "text.safetensors").write_text("no weights here either")
    (tmp_path / "empty").mkdir()
    torch.save({"model": Path("code")}, tmp_path / "object.pt")
    for name, reason in {
        "text.pt": "text.pt: ",
        "text.safetensors": "not a safetensors file",
        "empty": "no *.safetensors in it",
        "object.pt": "torch.load(weights_only=True) refuses it",
    }.items():
        with pytest.raises(ValueError, match=re.escape(reason)):
            read_model(str(tmp_path / name))


def test_a_factory_is_called_on_the_meta_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_model.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.frozen = torch.nn.Linear(2**18, 2**18).requires_grad_(False)\n"
        "        self.head = torch.nn.Linear(10, 2)\n"
        "def count(): return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    model = read_model("my_model:Net")
    assert model.parameters == 2**36 + 2**18 + 22
    assert model.trained_parameters == 22
    assert model.dtypes == "float32"
    for text, reason in {
        "my_model:Nothing": "AttributeError",
        "no_such_module:Net": "ModuleNotFoundError",
        "my_model:count": "returned int; must be",
    }.items():
        with pytest.raises(ValueError, match=reason):
            read_model(text)


def test_unknown_models_are_told_what_there_is() -> None:
    with pytest.raises(ValueError, match="did you mean llama-3-8b"):
        read_model("llama3-8b")
    with pytest.raises(ValueError, match="names are gpt2, "):
        read_model("zzz")
    assert len(NAMED) > 20

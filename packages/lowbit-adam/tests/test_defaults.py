"""Torch's default dtype and device change no number; what is right comes from exact arithmetic."""

from functools import partial

import pytest
import torch
from torch.nn import Parameter

from lowbit_adam import AdamW4bit, AdamW8bit, AdamWFp8
from lowbit_adam.convert import from_bitsandbytes, from_torchao
from optstate_codecs import decode_state
from optstate_codecs.testing import DEFAULTS, tensors_in, torch_defaults
from optstate_codecs.testing.subject import assert_same

MAKES = {
    "8-bit": AdamW8bit,
    "FP8": AdamWFp8,
    "4-bit": AdamW4bit,
    "8-bit, amsgrad": partial(AdamW8bit, amsgrad=True),
}
EACH = pytest.mark.parametrize(
    ("dtype", "device"), DEFAULTS, ids=lambda v: str(v).removeprefix("torch.")
)


def moved(param: Parameter, optimizer, steps: int, *defaults) -> None:
    """Steps with gradients of mean 0.3 and deviation 1, made where torch's defaults are its own."""
    noise = torch.Generator().manual_seed(0)
    for _ in range(steps):
        grad = torch.randn(param.shape, generator=noise) + 0.3
        param.grad = grad.to(param.dtype)
        with torch_defaults(*defaults):
            optimizer.step()


@EACH
@pytest.mark.parametrize("name", MAKES)
def test_moments_are_those_of_exact_adam(name, dtype, device) -> None:
    """4,096 elements after 300 steps, against ``torch.optim.AdamW`` in float64."""
    exact = Parameter(torch.zeros(4, 1024, dtype=torch.float64))
    reference = torch.optim.AdamW([exact], lr=1e-3, amsgrad="amsgrad" in name)
    moved(exact, reference, 300, torch.float32)
    theirs = reference.state[exact]

    param = Parameter(torch.zeros(4, 1024))
    with torch_defaults(dtype, device):
        optimizer = MAKES[name]([param], lr=1e-3)
    moved(param, optimizer, 300, dtype, device)
    with torch_defaults(dtype, device):
        found = decode_state(optimizer, param)
        full = optimizer.full_state_dict()["state"][0]
    assert {part.dtype for part in full.values()} == {torch.float32}
    assert float(found["step"]) == 300
    for key in theirs.keys() - {"step", "exp_avg"}:
        ratio = found[key].double().sqrt().mean() / theirs[key].sqrt().mean()
        assert float(ratio) == pytest.approx(1, abs=0.03)
    assert float(found["exp_avg"].double().mean() / theirs["exp_avg"].mean()) == pytest.approx(
        1, abs=0.05
    )
    assert float(param.detach().double().sum() / exact.detach().sum()) == pytest.approx(1, abs=0.03)


@EACH
@pytest.mark.parametrize("name", ["8-bit", "4-bit"])
def test_torchs_own_state_is_loaded_alike(name, dtype, device) -> None:
    """Step counts of an AdamW that was made under float64 are float64."""

    def loaded(*defaults):
        with torch_defaults(*defaults[:1]):
            theirs = torch.optim.AdamW([Parameter(torch.ones(70, 70, dtype=torch.float32))])
        moved(theirs.param_groups[0]["params"][0], theirs, 3, *defaults[:1])
        param = Parameter(torch.ones(70, 70))
        with torch_defaults(*defaults):
            ours = MAKES[name]([param])
            ours.load_state_dict(theirs.state_dict())
        moved(param, ours, 2, *defaults)
        return {"param": param.detach(), **tensors_in("state", ours.state_dict()["state"])}

    assert_same("loaded", loaded(torch.float32), loaded(dtype, device))


@EACH
def test_converted_states(dtype, device) -> None:
    """bfloat16 has no step 1001."""
    noise = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (2, 300), generator=noise, dtype=torch.uint8)
    qmap, scales = torch.linspace(-1, 1, 256), torch.rand(3, generator=noise)
    coded = {
        f"{key}{n}": value
        for n in (1, 2)
        for key, value in (
            ("state", codes),
            ("qmap", qmap.abs() if n == 2 else qmap),
            ("absmax", scales),
        )
    }
    plain = {"exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}
    groups = [{"params": [0], "lr": torch.tensor(1e-3)}]
    for convert, state in ((from_bitsandbytes, coded), (from_torchao, plain)):
        theirs = {"state": {0: {"step": 1001, **state}}, "param_groups": groups}
        with torch_defaults(dtype, device):
            found = convert(theirs)
        assert float(found["state"][0]["step"]) == 1001
        assert_same("converted", tensors_in("", convert(theirs)), tensors_in("", found))

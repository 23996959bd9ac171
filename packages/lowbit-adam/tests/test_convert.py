"""States of other libraries, in their layouts, against what they were made from."""

from dataclasses import dataclass

import pytest
import torch

from lowbit_adam import AdamW8bit
from lowbit_adam.convert import from_bitsandbytes, from_torchao
from optstate_codecs import decode_state

QMAP = torch.cat([-torch.logspace(0, -6, 128), torch.logspace(-6, 0, 128)])
SHAPES = ((64, 80), (7,))


def quantised(x: torch.Tensor, block: int, qmap: torch.Tensor):
    """Nearest codes under each block's largest magnitude; the tail is a block too."""
    pad = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % block)).view(-1, block)
    scale = pad.abs().amax(1).clamp_min(1e-20)
    distance = (pad / scale[:, None]).view(-1, 1) - qmap
    codes = distance.abs().argmin(1)[: x.numel()].to(torch.uint8)
    return codes.view(x.shape), scale


@dataclass
class Coded:
    """What torchao's state tensors offer: codes, and to decode themselves."""

    codes: torch.Tensor
    scale: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        values = QMAP[self.codes.flatten().long()].view(-1, 256) * self.scale.view(-1, 1)
        return values.view(self.codes.shape)


def moments():
    noise = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        first = torch.randn(shape, generator=noise) * 1e-3
        yield first, first.square() + 1e-8


GROUP = {"betas": (0.9, 0.95), "eps": 1e-7, "weight_decay": 0.1, "params": [0, 1]}


def bitsandbytes_state(wrapped: bool) -> dict:
    state = {}
    for number, (first, second) in enumerate(moments()):
        if first.numel() < 4096:
            state[number] = {"step": 5, "state1": first, "state2": second}
            continue
        parts = {}
        for suffix, value in (("1", first), ("2", second)):
            qmap = QMAP if suffix == "1" else torch.logspace(-8, 0, 256)
            codes, scale = quantised(value, 256, qmap)
            parts |= {f"state{suffix}": codes, f"absmax{suffix}": scale, f"qmap{suffix}": qmap}
        state[number] = {"step": 5, "__bnb_optimizer_quant_state__": parts}
        if not wrapped:
            state[number] = {"step": 5, **parts}
    group = {**GROUP, "lr": 3e-4, "alpha": 0.0, "t_beta3": None}
    return {"state": state, "param_groups": [group]}


def torchao_state() -> dict:
    state = {}
    for number, (first, second) in enumerate(moments()):
        big = first.numel() >= 4096
        state[number] = {
            "step": torch.tensor(5.0),
            "exp_avg": Coded(*quantised(first, 256, QMAP)) if big else first,
            "exp_avg_sq": Coded(*quantised(second, 256, QMAP)) if big else second,
        }
    group = {**GROUP, "lr": torch.tensor(3e-4), "amsgrad": False}
    return {"state": state, "param_groups": [group]}


@pytest.mark.parametrize(
    "converted",
    [
        lambda: from_bitsandbytes(bitsandbytes_state(True)),
        lambda: from_bitsandbytes(bitsandbytes_state(False)),
        lambda: from_torchao(torchao_state()),
    ],
    ids=["bitsandbytes", "bitsandbytes-older", "torchao"],
)
def test_training_goes_on_from_it(converted) -> None:
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    optimizer = AdamW8bit(params, lr=1.0)
    optimizer.load_state_dict(converted())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (pytest.approx(3e-4), (0.9, 0.95), 1e-7)
    for param, (first, second) in zip(params, moments(), strict=True):
        decoded = decode_state(optimizer, param)
        assert float(decoded["step"]) == 5
        update = decoded["exp_avg"] / decoded["exp_avg_sq"].sqrt()
        exact = first / second.sqrt()
        assert float((update - exact).norm() / exact.norm()) < 0.1
        param.grad = torch.zeros_like(param)
    optimizer.step()
    plain = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(s)) for s in SHAPES])
    plain.load_state_dict(
        {**converted(), "param_groups": [{**plain.state_dict()["param_groups"][0]}]}
    )


def test_lost_second_moments_make_no_long_steps() -> None:
    state = torchao_state()
    lost = state["state"][1]
    lost["exp_avg_sq"] = torch.zeros(7)
    converted = from_torchao(state)["state"][1]
    assert torch.equal(converted["exp_avg_sq"], lost["exp_avg"].square())


def test_what_is_missing_is_named() -> None:
    state = bitsandbytes_state(False)
    del state["state"][0]["absmax2"]
    with pytest.raises(KeyError, match="missing key 'absmax2'; only block-wise"):
        from_bitsandbytes(state)
    state["state"][0]["absmax2"] = torch.ones(3)
    with pytest.raises(ValueError, match="3 scales for 5120 elements"):
        from_bitsandbytes(state)
    state = torchao_state()
    del state["state"][1]["exp_avg"]
    with pytest.raises(KeyError, match=r"\[1\]: missing key 'exp_avg'"):
        from_torchao(state)
    del (state := torchao_state())["state"][1]["step"]
    with pytest.raises(KeyError, match="missing key 'step'"):
        from_torchao(state)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("qmap1", QMAP[:7], r"\['qmap1'\]: 7 values, must be 256"),
        ("qmap1", [0.0] * 256, r"\['qmap1'\]=.*must be a tensor"),
        ("state1", "codes", r"\['state1'\]='codes': must be a tensor"),
        ("absmax2", None, r"\['absmax2'\]=None: must be a tensor"),
        ("step", "x", "could not convert"),
        ("__bnb_optimizer_quant_state__", [1], "quant_state__'.: must be a dict"),
    ],
)
def test_hostile_states_are_refused(key, value, words) -> None:
    """A table with fewer values than codes ended the CUDA context of the process."""
    state = bitsandbytes_state(False)
    state["state"][0][key] = value
    with pytest.raises((TypeError, ValueError), match=words):
        from_bitsandbytes(state)


@pytest.mark.parametrize("convert", [from_bitsandbytes, from_torchao])
def test_states_that_are_nested_in_another_way(convert) -> None:
    for state in ({"state": [], "param_groups": []}, {"state": {0: 5}, "param_groups": [GROUP]}):
        with pytest.raises(TypeError, match="must be a dict"):
            convert(state)
    with pytest.raises(KeyError, match="is in no group"):
        convert({**torchao_state(), "param_groups": []})

"""States of turboadam 0.2, by hand and its own, against what they stand for."""

import math
import os
import subprocess
import sys

import pytest
import torch

from optstate_codecs import decode_state
from turboadam import TurboAdam, from_turboadam

# The other distribution has this one's name: its own decoding is compared with where this names a
# folder that it is unpacked in.
PEER = os.environ.get("TURBOADAM_0_2")
GROUP = {
    "lr": 3e-4,
    "betas": (0.9, 0.95),
    "eps": 1e-7,
    "weight_decay": 0.1,
    "block_size": 8,
    "v_bits": 3,
    "compress_m": True,
    "m_block_size": 4,
    "params": [0, 1],
}


def packed(codes: list[int], bits: int) -> torch.Tensor:
    """One long number, lowest code first, as bytes."""
    number = sum(code << bits * place for place, code in enumerate(codes))
    return torch.tensor(list(number.to_bytes(-(-len(codes) * bits // 8), "little"))).byte()


def by_hand() -> dict:
    """Ten elements in blocks of 8, the means' of 4, and a tensor that it leaves in float32."""
    codes = [0, 3, 1, 2, 3, 3, 0, 0, 2, 1] + [0] * 6
    indices = [0, 7, 3, 1, 7, 7, 2, 0, 5, 7] + [0] * 6
    coded = {
        "step": 5,
        "_use_ustate": True,
        "_use_v_state": True,
        "ustate": {
            "codes": packed(codes, 2),
            "means": torch.tensor([0.5, -0.25, 0.125], dtype=torch.bfloat16),
            "decode_step": torch.tensor([0.75]),
            "original_numel": 10,
            "mean_block_size": 4,
            "storage_block_size": 8,
        },
        "v_state": {
            "indices": packed(indices, 3),
            "scales": torch.tensor([[-14.0, -7.0], [-69.0625, -20.0]], dtype=torch.float16),
            "n_bits": 3,
            "original_shape": (2, 5),
            "original_length": 10,
            "block_size": 8,
        },
    }
    plain = {
        "step": 5,
        "_use_ustate": False,
        "_use_v_state": False,
        "exp_avg": torch.ones(3),
        "exp_avg_sq": torch.full((3,), 2.0),
    }
    return {"state": {0: coded, 1: plain}, "param_groups": [GROUP]}


def test_decoded_as_counted_by_hand() -> None:
    decoded = from_turboadam(by_hand())
    assert set(decoded["param_groups"][0]) == {"params", "lr", "betas", "eps", "weight_decay"}
    assert torch.equal(decoded["state"][1]["exp_avg_sq"], torch.full((3,), 2.0))
    state = decoded["state"][0]
    logs = [-14, -7, -11, -13, -7, -7, -12, -14, -69.0625 + 5 / 7 * 49.0625, -20]
    second = torch.tensor(logs).exp().view(2, 5)
    torch.testing.assert_close(state["exp_avg_sq"], second)
    # levels in steps: -1.5 1.5 -.5 .5 | 1.5 1.5 -1.5 -1.5 | .5 -.5, each block's mean 0
    levels = torch.tensor([-1.5, 1.5, -0.5, 0.5, 1.5, 1.5, -1.5, -1.5, 0.5, -0.5])
    means = torch.tensor([0.5] * 4 + [-0.25] * 4 + [0.125] * 2)
    update = (means + 0.75 * levels).view(2, 5)
    divisor = second.sqrt() / math.sqrt(1 - 0.95**5) + 1e-7
    expected = (1 - 0.9**5) * update * divisor
    torch.testing.assert_close(state["exp_avg"], expected)


def test_what_eps_outweighs_is_cut_to_what_gradients_can_have_made() -> None:
    """In units of the root of such a second moment it would drown its block."""
    state = by_hand()
    state["param_groups"] = [{**GROUP, "eps": 1.0}]
    found, raw = from_turboadam(state)["state"][0], from_turboadam(by_hand())["state"][0]
    limit = 0.1 / math.sqrt(0.05 * (1 - 0.81 / 0.95)) * found["exp_avg_sq"].sqrt()
    torch.testing.assert_close(found["exp_avg"].abs(), limit)
    assert torch.equal(found["exp_avg"].sign(), raw["exp_avg"].sign())


def test_what_never_had_a_gradient_stays_still() -> None:
    """There the lowest codes are noise under a second moment of next to nothing."""
    state = by_hand()
    state["state"][0]["v_state"]["scales"][:] = math.log(1e-30)
    decoded = from_turboadam(state)["state"][0]
    assert not decoded["exp_avg"].any()
    assert not decoded["exp_avg_sq"].any()


def test_training_goes_on_from_it() -> None:
    params = [torch.nn.Parameter(torch.zeros(2, 5)), torch.nn.Parameter(torch.zeros(3))]
    optimizer = TurboAdam(params, m_bits=6, v_bits=8, min_v_compress_elements=0)
    optimizer.load_state_dict(from_turboadam(by_hand()))
    assert optimizer.param_groups[0]["lr"] == 3e-4
    assert optimizer.param_groups[0]["v_bits"] == 8
    expected = from_turboadam(by_hand())["state"]
    for number, param in enumerate(params):
        found = decode_state(optimizer, param)
        assert float(found["step"]) == 5
        second = expected[number]["exp_avg_sq"]
        torch.testing.assert_close(found["exp_avg_sq"].amax(), second.amax(), rtol=0.05, atol=0)
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert all(param.isfinite().all() and param.any() for param in params)


@pytest.mark.parametrize("missing", ["ustate", "v_state", "step"])
def test_what_is_missing_is_named(missing: str) -> None:
    state = by_hand()
    del state["state"][0][missing]
    with pytest.raises(KeyError, match=rf"\[0\]: missing key '{missing}'"):
        from_turboadam(state)


TRAIN = """
import sys
import torch
from turboadam import TurboAdam
from turboadam.quantize import decompress_v_state
from turboadam.ustate import reconstruct_first_moment

cases = []
for v_bits in (2, 3, 4, 6, 8):
    params = [torch.nn.Parameter(torch.zeros(s)) for s in ((70, 61), (4099,), (7,))]
    optimizer = TurboAdam(params, lr=1e-3, v_bits=v_bits)
    noise = torch.Generator().manual_seed(0)
    for _ in range(6):
        for p in params:
            p.grad = torch.randn(p.shape, generator=noise) * torch.linspace(0.1, 10, p.shape[-1])
        optimizer.step()
    expected = []
    for p in params[:2]:
        s = optimizer.state[p]
        second = decompress_v_state(s["v_state"])
        first = reconstruct_first_moment(s["ustate"], second, s["step"], 0.9, 0.999, 1e-8)
        expected.append((first, second))
    cases.append((optimizer.state_dict(), expected))
torch.save(cases, sys.argv[1])
"""


@pytest.mark.skipif(PEER is None, reason="TURBOADAM_0_2 names no folder that it is unpacked in")
def test_decoded_as_the_peer_does(tmp_path) -> None:
    file = tmp_path / "states.pt"
    environment = {**os.environ, "PYTHONPATH": str(PEER)}
    subprocess.run([sys.executable, "-c", TRAIN, file], check=True, env=environment)
    for saved, expected in torch.load(file, weights_only=True):
        state = from_turboadam(saved)["state"]
        assert torch.equal(state[2]["exp_avg"], saved["state"][2]["exp_avg"])
        for number, (first, second) in enumerate(expected):
            torch.testing.assert_close(state[number]["exp_avg_sq"], second)
            torch.testing.assert_close(state[number]["exp_avg"], first)


HOSTILE = {
    "sizes of another tensor": ("ustate", "mean_block_size", 10**12, "means of 1000000000000"),
    "no elements a mean": ("ustate", "mean_block_size", 0, "means of 0 elements"),
    "a negative number": ("ustate", "original_numel", -1, "for -1 elements"),
    "too many elements": ("ustate", "original_numel", 10**13, "for 10000000000000 elements"),
    "no bits": ("v_state", "n_bits", 0, "n_bits=0: must be from 1 to 8"),
    "many bits": ("v_state", "n_bits", 10**9, "n_bits=1000000000: must be from 1 to 8"),
    "a huge shape": ("v_state", "original_shape", [2**40, 2**40], "state_dict: malformed"),
    "codes of text": ("ustate", "codes", "x", "state_dict: malformed"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_states_make_no_huge_tensors(name: str) -> None:
    part, key, value, words = HOSTILE[name]
    state = by_hand()
    assert key in state["state"][0][part]
    state["state"][0][part][key] = value
    with pytest.raises((ValueError, TypeError), match=words):
        from_turboadam(state)

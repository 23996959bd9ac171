"""``packed_checkpoints=True``: trainers call ``state_dict`` only, and resume bit for bit."""

import copy
import io

import pytest
import torch
from torch import nn

from optstate_wrap import AdaptiveWarmupPolicy, ConfigurablePolicy, OffloadOptimizer, wrap

CODED = {"exp_avg": "int8(rounding=stochastic)", "exp_avg_sq": "oneq(bits=8)"}
DTYPES = [torch.float32, torch.bfloat16]


def build(packed: bool = True, dtype=torch.float32, make=wrap, policy=None, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(48, 65), nn.Tanh(), nn.Linear(65, 40)).to(dtype)
    inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
    policy = policy or ConfigurablePolicy(CODED)
    return model, make(inner, policy, packed_checkpoints=packed, **options)


def train(model, optimizer, steps) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


def reloaded(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed_alike(run, other) -> bool:
    other[0].load_state_dict(run[0].state_dict())
    for pair in (run, other):
        train(*pair, range(4, 8))
    return all(map(torch.equal, run[0].parameters(), other[0].parameters()))


@pytest.mark.parametrize("make", [wrap, OffloadOptimizer], ids=["wrap", "offload"])
@pytest.mark.parametrize("chunk_size", [None, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_state_dict_resumes_bit_for_bit(dtype, chunk_size, make) -> None:
    options = {"dtype": dtype, "make": make, "chunk_size": chunk_size}
    run, other, decoded = build(**options), build(**options), build(False, **options)
    train(*run, range(4))
    saved = reloaded(run[1].state_dict())
    other[1].load_state_dict(saved)
    # only the option makes the difference
    decoded[0].load_state_dict(run[0].state_dict())
    run[1].packed_checkpoints = False
    decoded[1].load_state_dict(run[1].state_dict())
    train(*decoded, range(4, 8))
    assert resumed_alike(run, other)
    assert not all(map(torch.equal, run[0].parameters(), decoded[0].parameters()))


def test_it_is_the_packed_state_in_size_and_values() -> None:
    model, optimizer = build()
    train(model, optimizer, range(2))
    saved, packed = optimizer.state_dict(), optimizer.packed_state_dict()
    for state in saved["state"].values():
        assert state.pop("optstate_wrap") == packed["optstate_wrap"]
    assert saved.keys() == packed.keys()
    assert saved["param_groups"] == packed["param_groups"]
    for number, state in packed["state"].items():
        assert state.keys() == saved["state"][number].keys()
    assert copy.deepcopy(optimizer).packed_checkpoints


def test_progress_survives_the_loss_of_all_other_keys() -> None:
    """``torch.distributed.checkpoint`` keeps ``state`` and ``param_groups`` only."""
    runs = []
    for _ in range(2):
        policy = AdaptiveWarmupPolicy(100, momentum_codec="int8(rounding=stochastic)", patience=1)
        runs.append(build(policy=policy))
    run, other = runs
    train(*run, range(4))
    run[1].policy.activate_compression()
    train(*run, range(4, 6))
    saved = run[1].state_dict()
    other[1].load_state_dict({key: saved[key] for key in ("state", "param_groups")})
    assert other[1].policy.active
    assert resumed_alike(run, other)


@pytest.mark.parametrize("packed", [False, True])
def test_torchs_own_checkpoints_load_either_way(packed) -> None:
    run, (model, optimizer) = build(packed), build(packed)
    exact = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, exact, range(3))
    run[1].load_state_dict(exact.state_dict())
    assert float(run[1].state[run[0][0].weight]["step"]) == 3
    # and one that is decoded, and one that is packed, of a wrapper
    train(*run, range(2))
    for option in (False, True):
        run[1].packed_checkpoints = option
        optimizer.load_state_dict(run[1].state_dict())
        for ours, theirs in zip(model.parameters(), run[0].parameters(), strict=True):
            for key, value in run[1].state[theirs].items():
                off = (optimizer.state[ours][key] - value).abs().max()
                assert off <= (0 if option else 0.02 * float(value.abs().max()))


def test_hooks_see_what_is_returned() -> None:
    _, optimizer = build()
    calls = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append(o))
    optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "mine": 1})
    assert optimizer.state_dict()["mine"] == 1
    assert calls == [optimizer]


def test_wrong_arguments_are_named() -> None:
    with pytest.raises((TypeError, ValueError), match="packed_checkpoints='yes'"):
        build("yes")
    _, optimizer = build()
    with pytest.raises((TypeError, ValueError), match="per_rank=2"):
        optimizer.packed_state_dict(per_rank=2)


def test_flat_parameters_of_fsdp1_are_refused() -> None:
    model, optimizer = build()
    train(model, optimizer, range(1))
    model[0].weight._fsdp_flattened = True
    with pytest.raises(ValueError, match=r"packed_checkpoints=True: FSDP1 .*=False, or FSDP2"):
        optimizer.state_dict()
    optimizer.packed_checkpoints = False
    optimizer.state_dict()

"""Classes of wrapped optimizers, which trainers call with their own param groups."""

import copy
import pickle

import pytest
import torch
from torch.optim import SGD, AdamW

from optstate_codecs.typed import typed_arguments
from optstate_wrap import (
    AdaptiveWarmupPolicy,
    ConfigurablePolicy,
    OptimizerWrapper,
    WarmupPolicy,
    wrap,
    wrapped_class,
)
from optstate_wrap.offload.host import HostStore


def params() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (600, 7)]


def groups(params: list[torch.nn.Parameter]) -> list[dict]:
    decays = zip(params, (0.1, 0.0), strict=True)
    return [{"params": [p], "weight_decay": decay} for p, decay in decays]


def stepped(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    for _ in range(5):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = param.detach().cos()
        optimizer.step()
    return [p.detach() for group in optimizer.param_groups for p in group["params"]]


def test_makes_what_wrap_makes() -> None:
    cls = wrapped_class(AdamW, WarmupPolicy(2, min_int8_elements=64), chunk_size=256)
    made = cls(groups(params()), lr=0.01)
    inner = AdamW(groups(params()), lr=0.01)
    expected = wrap(inner, WarmupPolicy(2, min_int8_elements=64), 256)
    assert type(made) is OptimizerWrapper
    assert [group["weight_decay"] for group in made.param_groups] == [0.1, 0.0]
    for ours, theirs in zip(stepped(made), stepped(expected), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("store", ["device", "host"])
def test_has_the_bits_of_the_class_with_exact_state(store) -> None:
    cls = wrapped_class(SGD, ConfigurablePolicy({}), store=store)
    arguments = {"lr": 0.1, "momentum": 0.9}
    pairs = zip(
        stepped(cls(params(), **arguments)), stepped(SGD(params(), **arguments)), strict=True
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_is_a_class_of_optimizers_with_the_arguments_of_its_own() -> None:
    cls = wrapped_class(AdamW)
    assert issubclass(cls, torch.optim.Optimizer)
    assert cls.__name__ == "WrappedAdamW"
    assert typed_arguments(cls, "lr=1e-2,betas=0.9,0.95") == {"lr": 0.01, "betas": (0.9, 0.95)}


def test_reads_text_and_positional_arguments() -> None:
    cls = wrapped_class(AdamW)
    made = cls(params(), lr="1e-4", betas="(0.9, 0.95)", foreach="none")
    (group,) = made.param_groups
    assert (group["lr"], group["betas"], group["foreach"]) == (1e-4, (0.9, 0.95), None)
    assert cls(params(), 0.5).param_groups[0]["lr"] == 0.5
    with pytest.raises(ValueError, match="lr='fast': must be a number"):
        cls(params(), lr="fast")


def test_each_optimizer_has_a_policy_of_its_own() -> None:
    policy = AdaptiveWarmupPolicy()
    cls = wrapped_class(AdamW, policy)
    made = [cls(params()) for _ in range(2)]
    assert len({id(one) for one in (policy, *(m.policy for m in made))}) == 3


def test_is_copied_and_pickled() -> None:
    made = wrapped_class(AdamW, ConfigurablePolicy({"exp_avg": "bf16"}))(params())
    stepped(made)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert type(other) is OptimizerWrapper
        assert type(other.inner) is AdamW


@pytest.mark.parametrize("given", [OptimizerWrapper, AdamW(params()), torch.nn.Linear, "AdamW"])
def test_refuses_all_but_classes_of_optimizers(given) -> None:
    with pytest.raises(TypeError, match=r"^optimizer_class: .*, must be a subclass of torch"):
        wrapped_class(given)


def test_refuses_unknown_options_at_once() -> None:
    message = "chunksize: unknown argument of OptimizerWrapper .did you mean chunk_size"
    with pytest.raises(TypeError, match=message):
        wrapped_class(AdamW, chunksize=256)
    with pytest.raises(TypeError, match="lr: unknown argument of OptimizerWrapper"):
        wrapped_class(AdamW, lr=0.1)


def test_refuses_policies_and_stores_that_it_cannot_use_at_once() -> None:
    with pytest.raises(TypeError, match="policy='int8': must be a Policy, got str"):
        wrapped_class(AdamW, "int8")
    with pytest.raises(TypeError, match=r"store=.*must be 'device', 'host' or None"):
        wrapped_class(AdamW, store=HostStore())

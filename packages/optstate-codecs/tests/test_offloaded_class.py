"""Classes of offloaded optimizers, which trainers call with their own param groups."""

import copy
import pickle

import pytest
import torch

from optstate_codecs import Adam, CodedOptimizer, Dynamic8, offload, offloaded_class
from optstate_codecs.typed import typed_arguments


class Coded(CodedOptimizer):
    """Adam with 8-bit moments."""

    rule_type = Adam

    def __init__(self, params, lr: float = 1e-3, weight_decay: float = 0.0, **options) -> None:
        formats = {"exp_avg": Dynamic8.first_moment(64), "exp_avg_sq": Dynamic8.second_moment(64)}
        super().__init__(params, Adam(), formats, lr=lr, weight_decay=weight_decay, **options)


def params() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (300, 7)]


def groups(params: list[torch.nn.Parameter]) -> list[dict]:
    decays = zip(params, (0.1, 0.0), strict=True)
    return [{"params": [p], "weight_decay": decay} for p, decay in decays]


def stepped(optimizer: CodedOptimizer) -> list[torch.Tensor]:
    for _ in range(3):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = param.detach().cos()
        optimizer.step()
    return [p.detach() for group in optimizer.param_groups for p in group["params"]]


def test_makes_what_offload_makes() -> None:
    cls = offloaded_class(Coded, chunk_bytes=512)
    made = cls(groups(params()), lr=0.01)
    expected = offload(Coded(groups(params()), lr=0.01), chunk_bytes=512)
    assert type(made) is Coded
    assert made.offloaded == expected.offloaded
    assert [group["weight_decay"] for group in made.param_groups] == [0.1, 0.0]
    for ours, theirs in zip(stepped(made), stepped(expected), strict=True):
        assert torch.equal(ours, theirs)


def test_is_a_class_of_optimizers_with_the_arguments_of_its_own() -> None:
    cls = offloaded_class(Coded)
    assert issubclass(cls, Coded)
    assert cls.__name__ == "OffloadedCoded"
    assert typed_arguments(cls, "lr=1e-2,maximize=yes") == {"lr": 0.01, "maximize": True}


def test_reads_text_and_positional_arguments() -> None:
    cls = offloaded_class(Coded)
    (group,) = cls(params(), lr="1e-4", weight_decay="0.1").param_groups
    assert (group["lr"], group["weight_decay"]) == (1e-4, 0.1)
    assert cls(params(), 0.5).param_groups[0]["lr"] == 0.5
    with pytest.raises(ValueError, match="lr='fast': must be a number"):
        cls(params(), lr="fast")


def test_is_copied_and_pickled() -> None:
    made = offloaded_class(Coded)(params())
    stepped(made)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert type(other) is Coded
        assert other.offloaded == made.offloaded


def test_takes_a_file(tmp_path) -> None:
    cls = offloaded_class(Coded, "disk", path=tmp_path / "state.bin")
    made = cls(params())
    stepped(made)
    assert made.offloaded.store == "disk"
    assert (tmp_path / "state.bin").exists()


@pytest.mark.parametrize("given", [torch.optim.AdamW, Coded(params()), "AdamW8bit", None])
def test_refuses_all_but_classes_of_the_family(given) -> None:
    with pytest.raises(
        TypeError, match=r"^optimizer_class: .*, must be a class of optimizers of the"
    ):
        offloaded_class(given)


def test_refuses_unknown_options_at_once() -> None:
    message = "chunk_byte: unknown argument of offload .did you mean chunk_bytes"
    with pytest.raises(TypeError, match=message):
        offloaded_class(Coded, chunk_byte=512)
    with pytest.raises(TypeError, match="lr: unknown argument of offload"):
        offloaded_class(Coded, lr=0.1)


def test_values_of_options_are_checked_when_an_optimizer_is_made() -> None:
    with pytest.raises(ValueError, match="store='moon'"):
        offloaded_class(Coded, "moon")(params())

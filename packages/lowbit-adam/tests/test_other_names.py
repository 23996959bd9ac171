"""The names that other libraries do not take for optimizers of bitsandbytes."""

import pytest
import torch

from lowbit_adam import SGD8, Adam8, Adam8bit, AdamW8, AdamW8bit, Lion8, Lion8bit, SGD8bit

PAIRS = [(AdamW8, AdamW8bit), (Adam8, Adam8bit), (Lion8, Lion8bit), (SGD8, SGD8bit)]


def trained(cls: type, optimizer_state=None, param=None, steps: int = 3):
    param = torch.nn.Parameter(torch.linspace(-1, 1, 600)) if param is None else param
    momentum = {"momentum": 0.9} if issubclass(cls, SGD8bit) else {}
    optimizer = cls([param], lr=0.01, weight_decay=0.1, **momentum)
    if optimizer_state is not None:
        optimizer.load_state_dict(optimizer_state)
    for _ in range(steps):
        param.grad = param.detach().sin() + 0.1
        optimizer.step()
    return param, optimizer


@pytest.mark.parametrize(("cls", "original"), PAIRS, ids=lambda cls: cls.__name__)
def test_is_the_same_optimizer_under_another_name(cls, original) -> None:
    assert issubclass(cls, original)
    assert not cls.__name__.lower().endswith("8bit")
    assert torch.equal(trained(cls)[0], trained(original)[0])


@pytest.mark.parametrize(("cls", "original"), PAIRS, ids=lambda cls: cls.__name__)
def test_state_dicts_are_exchanged(cls, original) -> None:
    for source, target in ((cls, original), (original, cls)):
        param, optimizer = trained(source)
        copy = torch.nn.Parameter(param.detach().clone())
        continued, _ = trained(target, optimizer.state_dict(), copy)
        assert torch.equal(continued, trained(source, steps=6)[0])

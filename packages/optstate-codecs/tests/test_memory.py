"""Byte accounting against sums written by hand."""

from typing import Any

import pytest
import torch
from torch.nn import Parameter

from optstate_codecs import Adam, CodedOptimizer, memory_report, predicted_state_bytes, state_bytes


def test_report_of_a_torch_optimizer() -> None:
    param = Parameter(torch.ones(1000))
    param.grad = torch.ones(1000)
    optimizer = torch.optim.AdamW([param])
    optimizer.step()
    report = memory_report(optimizer)
    assert (report.parameters, report.parameter_bytes, report.gradient_bytes) == (1000, 4000, 4000)
    assert report.state_bytes == 8004
    assert report.state_bits_per_parameter == 64.032


def test_predicted_is_counted_by_hand() -> None:
    params = [Parameter(torch.ones(100, 33)), Parameter(torch.ones(5))]
    formats = {"exp_avg": "int8(block_size=16)", "exp_avg_sq": "bf16"}
    optimizer = CodedOptimizer(params, Adam(), formats)
    blocks = (3300 + 15) // 16 + 1
    expected = 3305 + 4 * blocks + 2 * 3305 + 2 * 4 + 8
    assert predicted_state_bytes(optimizer) == expected
    assert state_bytes(optimizer) == 0
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert state_bytes(optimizer) == expected


def test_small_tensors_stay_in_fp32_where_a_format_says_so() -> None:
    """Through a checkpoint that was saved with another threshold too."""
    params = [Parameter(torch.ones(99)), Parameter(torch.ones(10, 10)), Parameter(torch.ones(()))]

    def stepped(min_elements: int) -> CodedOptimizer:
        coded = f"int8(block_size=16, min_elements={min_elements})"
        optimizer = CodedOptimizer(params, Adam(), {"exp_avg": coded, "exp_avg_sq": "bf16"})
        for param in params:
            param.grad = torch.full_like(param, 2.0)
        optimizer.step()
        assert state_bytes(optimizer) == predicted_state_bytes(optimizer)
        return optimizer

    some, coded = stepped(100), stepped(0)
    assert predicted_state_bytes(some) == 4 * 100 + (100 + 4 * 7) + 2 * 200 + 3 * 4 + 8
    assert some.state[params[0]]["exp_avg"].dtype == torch.float32
    assert "exp_avg_codes" in some.state[params[1]]
    before = {key: value.clone() for key, value in some.state[params[0]].items()}
    coded.load_state_dict(some.state_dict())
    expected = 200 + 4 * (7 + 7 + 1) + 400 + 12 + 8
    assert state_bytes(coded) == predicted_state_bytes(coded) == expected
    some.load_state_dict(some.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in some.state[params[0]].items())
    some.load_state_dict(coded.state_dict())
    assert some.state[params[0]].keys() == before.keys()
    for optimizer in (some, coded):
        optimizer.step()
    with pytest.raises(ValueError, match=r"formats\['exp_avg'\]: min_elements=-1: must be from 0"):
        stepped(-1)


def test_shared_storage_counts_once_and_whole() -> None:
    param = Parameter(torch.ones(10))
    optimizer = torch.optim.SGD([param], lr=0.1)
    base = torch.zeros(100)
    optimizer.state[param] = {"a": base[:10], "b": [base[50:]], "c": {"d": base}, "e": 3}
    assert state_bytes(optimizer) == 400


def test_subclasses_count_as_what_they_hold() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    param = Parameter(torch.ones(10))
    optimizer = torch.optim.SGD([param], lr=0.1)
    optimizer.state[param] = {"both": TwoTensor(torch.zeros(100), torch.zeros(100))}
    assert state_bytes(optimizer) == 800


def test_tensors_inside_objects_count() -> None:
    class Quantized:
        def __init__(self, numel: int) -> None:
            self.codes = torch.zeros(numel, dtype=torch.uint8)
            self.scales = {"fp16": torch.zeros(numel // 32, dtype=torch.float16)}
            self.owner = self

    optimizer = torch.optim.SGD([Parameter(torch.ones(64))], lr=0.1)
    (param,) = optimizer.param_groups[0]["params"]
    optimizer.state[param] = {"exp_avg": Quantized(64), "step": torch.zeros(()), "kind": Quantized}
    assert state_bytes(optimizer) == 64 + 2 * 2 + 4


def test_only_the_family_is_predicted() -> None:
    optimizer: Any = torch.optim.SGD([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(TypeError, match=r"optimizer: SGD, must be .* of the family"):
        predicted_state_bytes(optimizer)

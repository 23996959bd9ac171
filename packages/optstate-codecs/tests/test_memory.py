"""Byte accounting against sums written by hand."""

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
    expected = 3305 + 4 * blocks + 2 * 3305 + 2 * 4
    assert predicted_state_bytes(optimizer) == expected
    assert state_bytes(optimizer) == 0
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert state_bytes(optimizer) == expected


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

"""The memory for copies that undo a step: values, layouts, and how much of it there is."""

import pytest
import torch

from optstate_wrap.step.scratch import BLOCK, Scratch


def total(scratch: Scratch) -> int:
    return sum(block.numel() for blocks in scratch._blocks.values() for block in blocks)


def test_copies_have_values_dtypes_and_strides() -> None:
    tensors = [
        torch.randn(3, 5).t(),
        torch.tensor(4.0),
        torch.arange(7, dtype=torch.int16),
        torch.empty(0, 3),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(6, 4)[:, ::2],
        torch.randn(9).bfloat16(),
    ]
    before = [tensor.clone() for tensor in tensors]
    copies = Scratch().copies_of(tensors)
    for tensor in tensors:
        tensor.zero_()
    for copy, old, tensor in zip(copies, before, tensors, strict=True):
        assert torch.equal(copy, old)
        assert (copy.dtype, copy.shape) == (tensor.dtype, tensor.shape)
        assert copy.data_ptr() != tensor.data_ptr() or not tensor.numel()


def test_copies_stay_until_reset() -> None:
    scratch, given = Scratch(), [torch.full((n,), float(n)) for n in (300_000, 5, 400_000, 9)]
    copies = [scratch.copies_of([tensor])[0] for tensor in given]
    for copy, tensor in zip(copies, given, strict=True):
        assert torch.equal(copy, tensor)


@pytest.mark.parametrize("sizes", [(3, 4, 5), (5, 4, 3), (4, 5, 3)], ids=str)
def test_batches_of_different_sizes_share_one_block(sizes) -> None:
    scratch = Scratch()
    for _ in range(2):
        for size in sizes:
            scratch.copies_of([torch.zeros(size * BLOCK // 4)])
            scratch.reset()
    assert total(scratch) == 5 * BLOCK

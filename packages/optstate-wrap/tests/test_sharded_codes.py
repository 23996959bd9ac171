"""What makes codes of a shard those of the whole tensor: where blocks and random numbers begin."""

import pytest
import torch

from optstate_codecs.formats import as_format
from optstate_codecs.rounding import Counter
from optstate_wrap.state.record import encode_state

ROWS, COLUMNS = 6, 96


def codes(value, spec: str, offset: int) -> torch.Tensor:
    """The codes of ``exp_avg`` in a format, with random numbers counted from ``offset``."""
    record = encode_state(
        {"exp_avg": value}, value, {"exp_avg": as_format(spec)}, Counter(0, 1, 0, offset)
    )
    return record["exp_avg"].parts[0]


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("block_size", [32, 128])
@pytest.mark.parametrize("from_global", [True, False], ids=["global", "local"])
def test_shards_have_the_codes_of_the_whole(workers, rounding, block_size, from_global) -> None:
    """Only with blocks that end at every border, and random numbers of the global tensor."""
    spec = f"int8(block_size={block_size}, rounding={rounding})"
    whole = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    rows = ROWS // workers
    shards = [
        codes(part, spec, number * rows * COLUMNS if from_global else 0)
        for number, part in enumerate(whole.split(rows))
    ]
    ends = rows * COLUMNS % block_size == 0
    drawn = rounding == "nearest" or from_global
    assert torch.equal(torch.cat(shards), codes(whole, spec, 0)) == (ends and drawn)

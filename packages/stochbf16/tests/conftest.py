"""Makes ``micro_batches`` importable, counts launches, and skips what cannot run here."""

import sys
from pathlib import Path

import pytest
import torch

from optstate_codecs.triton_lib import HAS_TRITON, INTERPRETED
from stochbf16 import pending

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _can_run(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.node.get_closest_marker("interpret") and not (HAS_TRITON and INTERPRETED):
        pytest.skip("needs triton and TRITON_INTERPRET=1")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many gradients each launch added."""
    counts: list[int] = []
    original = pending.round_

    def counting(targets, *args, **options) -> None:
        counts.append(len(targets))
        original(targets, *args, **options)

    monkeypatch.setattr(pending, "round_", counting)
    return counts

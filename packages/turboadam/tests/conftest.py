"""Skips what cannot run here."""

import pytest
import torch

from optstate_codecs.triton_lib import HAS_TRITON, INTERPRETED


@pytest.fixture(autouse=True)
def _can_run(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.node.get_closest_marker("interpret") and not (HAS_TRITON and INTERPRETED):
        pytest.skip("needs triton and TRITON_INTERPRET=1")

"""Makes ``subjects`` importable by the tests of this folder, and skips what cannot run here."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from optstate_codecs.triton_lib import HAS_TRITON, INTERPRETED

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _can_run(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.node.get_closest_marker("interpret") and not (HAS_TRITON and INTERPRETED):
        pytest.skip("needs triton and TRITON_INTERPRET=1")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file to keep state in, which is not there."""
    return tmp_path / "state"


@pytest.fixture(params=["host", "disk"])
def where(request: pytest.FixtureRequest, path: Path) -> dict[str, Any]:
    """The arguments of ``offload`` that say where state is to be."""
    return {"store": "host"} if request.param == "host" else {"store": "disk", "path": path}

"""Every backend steps TurboAdam's tensors, coded and in float32, as the reference does."""

from functools import partial

import pytest
import torch
from torch.nn import Parameter

from optstate_codecs.testing import Subject, Trainer, resume
from turboadam import TurboAdam

# coded, coded with a tail, the first moment alone coded, both in float32
SHAPES = ((12, 16), (131,), (90,), (33,), ())
SETTINGS = {
    "feedback": {},
    "adamw": {"mode": "adamw"},
    "flushed": {"mode": "adamw", "error_feedback": True},
    "smallest": {"m_bits": 1, "v_bits": 2},
    "first-only": {"compress_v": False, "mode": "adamw", "m_bits": 2},
    "second-only": {"compress_m": False, "v_bits": 6},
}
make = partial(TurboAdam, lr=1e-2, min_m_compress_elements=64, min_v_compress_elements=100)


def devices() -> list:
    interpreter = pytest.param("cpu", "triton", marks=pytest.mark.interpret, id="interpreter")
    on_cuda = pytest.param("cuda", "triton", marks=pytest.mark.cuda, id="cuda")
    return [interpreter, on_cuda, pytest.param("cpu", "compile", id="compile")]


@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow)")
@pytest.mark.parametrize(("device", "backend"), devices())
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_same_codes(settings, device: str, backend: str) -> None:
    reference = Trainer(partial(make, backend="eager", **settings), SHAPES)
    other = Trainer(partial(make, backend=backend, **settings), SHAPES, device=device)
    for _ in range(3):
        expected, found = reference.run(1).tensors(), other.run(1).tensors()
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            if key.endswith("_codes"):
                assert int((found[key].cpu() != value).sum()) <= 1, key
            else:
                torch.testing.assert_close(found[key].cpu(), value, rtol=1e-2, atol=2e-6)
        other.optimizer.load_state_dict(reference.optimizer.state_dict())
        for ours, theirs in zip(reference.params, other.params, strict=True):
            theirs.data.copy_(ours.data)


@pytest.mark.cuda
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_graph_replays_steps(settings) -> None:
    """With what is coded and what is small in one graph, and a rate that changes."""
    sides = []
    for capturable in (True, False):
        params = [Parameter(torch.ones(shape, device="cuda")) for shape in ((65, 64), (90,))]
        for number, param in enumerate(params):
            noise = torch.Generator().manual_seed(number)
            param.grad = torch.randn(param.shape, generator=noise).cuda()
        lr = torch.tensor(1e-2, device="cuda") if capturable else 1e-2
        sides.append((params, TurboAdam(params, lr=lr, capturable=capturable, **settings)))
    (recorded, in_graph), (plain, stepped) = sides
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        in_graph.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        in_graph.step()
    stepped.step()
    for _ in range(4):
        graph.replay()
        stepped.step()
    for ours, theirs in zip(recorded, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
        assert float(in_graph.state[ours]["step"]) == 5


@pytest.mark.cuda
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_run_resumes_bit_for_bit(settings) -> None:
    resume(Subject("resumed", partial(make, **settings), device="cuda"))

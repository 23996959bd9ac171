"""Gradient centralization: against gradients centred beforehand, on every path and layout."""

from functools import partial

import pytest
import torch
from torch.nn import Parameter

from optstate_codecs import Adam, CodedOptimizer
from optstate_codecs.gradients.centralization import mean_layout
from optstate_codecs.state.layout import FlatView, storage_order

EXACT = {"exp_avg": "fp32", "exp_avg_sq": "fp32"}
FP8 = {"exp_avg": "fp8(block_size=64)", "exp_avg_sq": "fp8(block_size=64, signed=False)"}
SHAPES = ((48, 96), (7, 5, 3), (16, 3, 8, 8), (2100,), (1, 33), (65, 1), (3, 0), ())


def devices() -> list:
    interpreter = pytest.param("cpu", "triton", marks=pytest.mark.interpret, id="interpreter")
    on_cuda = pytest.param("cuda", "triton", marks=pytest.mark.cuda, id="cuda")
    cpu = [pytest.param("cpu", backend, id=backend) for backend in ("eager", "compile")]
    return [*cpu, interpreter, on_cuda]


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers, in another order in memory."""
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "first_inside" and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "first_between" and tensor.dim() == 3:
        return tensor.permute(1, 0, 2).contiguous().permute(1, 0, 2)
    return tensor


LAYOUTS = ("contiguous", "channels_last", "first_inside", "first_between")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_place_of_an_element_gives_its_first_index(layout) -> None:
    for shape in ((4, 6), (7, 5, 3), (2, 3, 4, 5)):
        first = torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1)).expand(shape).clone()
        tensor = laid_out(first, layout)
        inside, outside = mean_layout(tensor)
        flat = FlatView(tensor, storage_order(tensor)).read(0, tensor.numel())
        assert torch.equal(flat, torch.arange(tensor.numel()) // inside % outside)


def centred(grad: torch.Tensor, share: float) -> torch.Tensor:
    if grad.dim() < 2 or not grad.numel():
        return grad
    rows = grad.flatten(1).double()
    return (rows - share * (rows.sum(1, keepdim=True) / rows.shape[1])).view(grad.shape).float()


@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow)")
@pytest.mark.parametrize(("device", "backend"), devices())
@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_if_gradients_were_centred_before(layout, device, backend) -> None:
    noise = torch.Generator().manual_seed(0)
    start = [laid_out(torch.randn(shape, generator=noise), layout) for shape in SHAPES]
    sides = []
    for share, where, path in ((0.7, device, backend), (0.0, "cpu", "eager")):
        params = [Parameter(tensor.to(where, copy=True)) for tensor in start]
        make = partial(CodedOptimizer, formats=EXACT, backend=path, max_grad_norm=50.0)
        groups = [
            {"params": params[:2], "centralization": share},
            {"params": params[2:], "centralization": share and 1.0},
        ]
        sides.append((params, make(groups, Adam(decoupled=True), lr=1e-2)))
    (ours, optimizer), (theirs, reference) = sides
    for _ in range(3):
        grads = [laid_out(torch.randn(p.shape, generator=noise) + 1, layout) for p in start]
        norm = torch.cat([grad.flatten() for grad in grads]).norm()
        for number, grad in enumerate(grads):
            ours[number].grad = grad.to(device)
            # what is clipped is the gradient as it was
            factor = min(1.0, 50.0 / (float(norm) + 1e-6))
            theirs[number].grad = laid_out(
                centred(grad, 0.7 if number < 2 else 1.0) * factor, layout
            )
        reference.max_grad_norm = None
        optimizer.step()
        reference.step()
    for number, (expected, got) in enumerate(zip(theirs, ours, strict=True)):
        torch.testing.assert_close(
            got.cpu(), expected, rtol=1e-5, atol=2e-6, msg=lambda m, n=number: f"{n}: {m}"
        )
    if backend == "triton":
        assert all(not plan.fallback for plan in optimizer.executor._plans.values())


@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow)")
@pytest.mark.parametrize(("device", "backend"), devices())
def test_the_share_may_change_between_steps_and_formats_may_be_any(device, backend) -> None:
    sides = []
    for where, path in ((device, backend), ("cpu", "eager")):
        param = Parameter(torch.ones(32, 64, device=where))
        sides.append((param, CodedOptimizer([param], Adam(), FP8, lr=1e-2, backend=path)))
    noise = torch.Generator().manual_seed(0)
    for share in (0.0, 1.0, 0.25, 0.0):
        grad = torch.randn(32, 64, generator=noise) + 0.5
        for param, optimizer in sides:
            optimizer.param_groups[0]["centralization"] = share
            param.grad = grad.to(param.device)
            optimizer.step()
    (ours, _), (theirs, _) = sides
    torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), "half", torch.tensor(0.5)])
def test_what_is_no_share_is_refused(share) -> None:
    with pytest.raises((TypeError, ValueError), match="centralization"):
        CodedOptimizer([Parameter(torch.ones(3))], Adam(), EXACT, centralization=share)


def test_an_older_checkpoint_has_no_share() -> None:
    param = Parameter(torch.ones(3, 3))
    optimizer = CodedOptimizer([param], Adam(), EXACT, centralization=0.5)
    param.grad = torch.ones(3, 3)
    optimizer.step()
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["centralization"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["centralization"] == 0.5

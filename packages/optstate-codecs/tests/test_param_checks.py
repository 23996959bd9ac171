"""Parameters that cannot be stepped are refused by name, before anything changes."""

import shutil

import pytest
import torch
from subjects import EXACT, FIRST, SECOND
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter
from torch.testing._internal.two_tensor import TwoTensor

from optstate_codecs import Adam, CodedOptimizer, GradientRelease, offload, snapshot, state_bytes
from optstate_codecs.memory import predicted_state_bytes

CODED = {"exp_avg": FIRST, "exp_avg_sq": SECOND}
COMPILER = any(map(shutil.which, ("g++", "clang++", "c++")))
# prototypes of torch warn that they are
pytestmark = pytest.mark.filterwarnings("ignore:.*prototype")


def make(params, formats=EXACT, **options):
    return CodedOptimizer(params, Adam(decoupled=True), formats, lr=1e-2, **options)


def make_offloaded(params, **options):
    return offload(make(params, **options), chunk_bytes=256)


WAYS = {
    "eager": lambda params: make(params, backend="eager"),
    "compile": pytest.param(
        lambda params: make(params, backend="compile"),
        marks=pytest.mark.skipif(not COMPILER, reason="no C++ compiler"),
    ),
    "offload": make_offloaded,
    "offload, skip": lambda params: make_offloaded(params, skip_nonfinite=True, max_grad_norm=1.0),
}
every_way = pytest.mark.parametrize(
    "build",
    [way if callable(way) else way.values[0] for way in WAYS.values()],
    ids=WAYS,
)


def tensors(params, optimizer) -> list[torch.Tensor]:
    states = [optimizer.state.get(param, {}) for param in params]
    return [t.detach().clone() for t in [*params, *(v for s in states for v in s.values())]]


def give_gradients(params) -> None:
    for number, param in enumerate(params):
        generator = torch.Generator().manual_seed(number)
        param.grad = torch.randn(param.shape, generator=generator)


def assert_refused(params, optimizer, error, words) -> None:
    """The step raises, and leaves everything as it was."""
    before = tensors(params, optimizer)
    with pytest.raises(error, match=words):
        optimizer.step()
    assert all(map(torch.equal, tensors(params, optimizer), before))
    assert len(before) == len(tensors(params, optimizer))


# memory that is shared


@pytest.mark.parametrize("begun", [False, True])
@every_way
def test_a_parameter_whose_elements_share_memory_is_refused(build, begun) -> None:
    """As torch refuses it, but before the parameters in front of it are stepped."""
    params = [Parameter(torch.ones(40)), Parameter(torch.ones(30, 20))]
    optimizer = build(params)
    if begun:
        give_gradients(params)
        optimizer.step()
    shared = Parameter(torch.ones(1, 3).expand(50, 3))
    params.append(shared)
    optimizer.add_param_group({"params": [shared]})
    give_gradients(params)
    words = r"parameter 2: shape \(50, 3\) with strides \(0, 1\), so that several elements share"
    assert_refused(params, optimizer, ValueError, words)
    with pytest.raises(RuntimeError, match="more than one element"):
        torch.optim.AdamW([shared]).step()
    # without a gradient it is no matter
    shared.grad = None
    before = params[0].detach().clone()
    optimizer.step()
    assert not torch.equal(params[0], before)


def test_release_refuses_shared_memory_when_it_is_attached() -> None:
    params = [Parameter(torch.ones(40)), Parameter(torch.ones(1).expand(50))]
    with pytest.raises(ValueError, match="parameter 1: shape"):
        GradientRelease(make(params))
    params[1].requires_grad_(False)
    GradientRelease(make(params)).attach().detach()


@pytest.mark.parametrize("options", [{}, {"centralization": 1.0}, {"max_grad_norm": 1.0}], ids=str)
@every_way
def test_a_gradient_whose_elements_share_memory_is_stepped(build, options) -> None:
    results = []
    for expanded in (True, False):
        params = [Parameter(torch.ones(40)), Parameter(torch.ones(30, 20))]
        optimizer = build(params)
        for name, value in options.items():
            setattr(optimizer, name, value)
            optimizer.param_groups[0][name] = value
        for step in range(3):
            ones = torch.full((1,), 1.0 + step)
            params[0].grad = ones.expand(40)
            params[1].grad = torch.linspace(-1, 2, 20).expand(30, 20)
            if not expanded:
                for param in params:
                    param.grad = param.grad.clone()
            optimizer.step()
        results.append(tensors(params, optimizer))
    # sums over them are added up in another order
    rtol = 1e-5 if options or optimizer.max_grad_norm else 0.0
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)


def test_the_gradient_of_a_sum_is_that_of_torch() -> None:
    """Which is one number, expanded."""
    results = []
    for build in (make, torch.optim.AdamW):
        param = Parameter(torch.linspace(-1, 1, 400).view(20, 20))
        optimizer = build([param], lr=1e-2) if build is not make else make([param])
        for _ in range(3):
            (param.grad,) = torch.autograd.grad(param.sum(), param)
            assert param.grad.stride() == (0, 0)
            optimizer.step()
        results.append(param)
    assert torch.equal(*results)


# memory that cannot be written


@every_way
def test_parameters_made_under_inference_mode_are_refused(build) -> None:
    params = [Parameter(torch.ones(40))]
    with torch.inference_mode():
        params.append(torch.ones(50))
    optimizer = build(params)
    give_gradients(params)
    assert_refused(params, optimizer, RuntimeError, "parameter 1: was made under torch.inference")


def test_under_inference_mode_its_parameters_are_stepped() -> None:
    """As torch steps them."""
    results = []
    for build in (make, lambda params: torch.optim.AdamW(params, lr=1e-2)):
        with torch.inference_mode():
            params = [torch.ones(40)]
            give_gradients(params)
            build(params).step()
        results.append(params[0])
    assert torch.equal(*results)


# no plain memory


def masked() -> torch.Tensor:
    return torch.masked.masked_tensor(torch.ones(4, 4), torch.eye(4).bool())


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(4, 4)


def nested(layout: torch.layout) -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(3, 4), torch.ones(2, 4)], layout=layout)


WRAP = r"use optstate_wrap\.wrap\(torch\.optim\.AdamW"
KINDS = {
    "masked": (masked, f"is a MaskedTensor, a subclass of Tensor .* {WRAP}"),
    "two": (lambda: TwoTensor(torch.ones(4, 4), torch.ones(4, 4)), f"is a TwoTensor.* {WRAP}"),
    "fake": (fake, "is a FakeTensor.* use device='meta'"),
    "nested": (lambda: nested(torch.strided), "is a nested tensor, must be dense"),
    "jagged": (lambda: nested(torch.jagged), "is a NestedTensor"),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.quint8),
        "dtype torch.quint8, must be one of float16",
    ),
    "mkldnn": (lambda: torch.ones(4, 4).to_mkldnn(), "layout torch._mkldnn, must be dense"),
}


@pytest.mark.filterwarnings("ignore:.*quantize")
@pytest.mark.parametrize(("kind", "words"), KINDS.values(), ids=KINDS)
def test_tensors_without_plain_memory_are_refused(kind, words) -> None:
    ours = kind()
    with pytest.raises(TypeError, match=rf"params\[1\]: {words}"):
        make([torch.ones(3), ours])
    optimizer = make([Parameter(torch.ones(3))])
    with pytest.raises(TypeError, match=rf"params\[0\]: {words}"):
        optimizer.add_param_group({"params": [ours]})
    assert len(optimizer.param_groups) == 1


@every_way
def test_one_that_took_the_place_of_a_parameter_is_refused_by_the_step(build) -> None:
    params = [Parameter(torch.ones(40)), Parameter(torch.ones(30, 20))]
    optimizer = build(params)
    give_gradients(params)
    optimizer.step()
    other = TwoTensor(torch.ones(30, 20), torch.ones(30, 20))
    other.grad = TwoTensor(torch.ones(30, 20), torch.ones(30, 20))
    optimizer.param_groups[0]["params"][1] = other
    before = tensors(params, optimizer)
    with pytest.raises(TypeError, match=r"parameter 1: is a TwoTensor"):
        optimizer.step()
    assert all(map(torch.equal, tensors(params, optimizer), before))
    assert other not in optimizer.state
    for refused in (predicted_state_bytes, snapshot):
        with pytest.raises(TypeError, match=r"parameter 1: is a TwoTensor"):
            refused(optimizer)


def test_a_gradient_without_plain_memory_is_refused() -> None:
    param = Parameter(torch.ones(40))
    param.grad = TwoTensor(torch.ones(40), torch.ones(40))
    optimizer = make([param])
    with pytest.raises(TypeError, match="gradient of parameter 0: is a TwoTensor"):
        optimizer.step()
    assert not optimizer.state


class Marked(torch.Tensor):
    """A subclass with plain memory, as many libraries have them."""


class Special(Parameter):
    """A parameter that a library tells from others."""


@pytest.mark.parametrize(
    "kind", [lambda t: t.as_subclass(Marked).requires_grad_(), Special], ids=["tensor", "parameter"]
)
def test_subclasses_with_plain_memory_are_stepped(kind) -> None:
    ours, theirs = kind(torch.ones(40)), Parameter(torch.ones(40))
    give_gradients([ours, theirs])
    theirs.grad = ours.grad.as_subclass(torch.Tensor).clone()
    make([ours]).step()
    torch.optim.AdamW([theirs], lr=1e-2).step()
    assert torch.equal(ours.detach().as_subclass(torch.Tensor), theirs)


def test_lazy_parameters_are_stepped_once_they_are_there() -> None:
    layer = nn.LazyLinear(4)
    optimizer = make(layer.parameters())
    optimizer.step()
    layer(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert optimizer.state[layer.weight]["exp_avg"].shape == (4, 3)


# meta


@pytest.mark.parametrize("formats", [EXACT, CODED], ids=["exact", "coded"])
@pytest.mark.parametrize(
    "options",
    [
        {"fused": True},
        {"capturable": True},
        {"fused": True, "skip_nonfinite": True, "max_grad_norm": 1.0},
        {"skip_nonfinite": True},
        {"max_grad_norm": 1.0, "centralization": 1.0},
        {"amsgrad": True},
    ],
    ids=str,
)
def test_a_step_on_meta_makes_the_state_that_a_real_one_would(formats, options) -> None:
    formats = {**formats, "max_exp_avg_sq": formats["exp_avg_sq"]}
    sizes = {}
    for device in ("meta", "cpu"):
        params = [Parameter(torch.ones(61, 83, device=device)) for _ in range(2)]
        optimizer = make(params, formats, **options)
        assert predicted_state_bytes(optimizer) > 0
        for _ in range(2):
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.step()
        assert state_bytes(optimizer) == predicted_state_bytes(optimizer)
        assert all(state["step"] == 2 for state in optimizer.state.values())
        sizes[device] = [
            {k: (tuple(v.shape), v.dtype) for k, v in optimizer.state[p].items()} for p in params
        ]
    assert sizes["meta"] == sizes["cpu"]


def test_gradient_release_on_meta() -> None:
    params = [Parameter(torch.ones(61, 83, device="meta")) for _ in range(2)]
    optimizer = make(params, CODED, fused=True)
    with GradientRelease(optimizer, bucket_bytes=0):
        sum(param.sum() for param in params).backward()
        optimizer.step()
    assert state_bytes(optimizer) == predicted_state_bytes(optimizer)


def test_offload_refuses_meta() -> None:
    optimizer = make([Parameter(torch.ones(3)), Parameter(torch.ones(3, device="meta"))])
    with pytest.raises(ValueError, match="parameter 1: on meta, must be on a device"):
        offload(optimizer)
    assert optimizer.offloaded is None

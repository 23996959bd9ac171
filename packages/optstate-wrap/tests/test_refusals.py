"""What cannot be stepped is refused by name before anything changes; all else steps as torch's."""

import copy

import pytest
import torch
from host_nets import pretends
from torch.nn import Parameter

from optstate_codecs import GradientRelease
from optstate_wrap import ConfigurablePolicy, CPUOffloadOptimizer, StepError, wrap

SHAPES = ((20, 33), (300,), (12, 25))
CODED = {"exp_avg": "int8", "exp_avg_sq": "oneq(bits=8)", "momentum_buffer": "int8"}


def adamw(params):
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)


def wrapped(codecs, cls=adamw, **options):
    return lambda params: wrap(cls(params), ConfigurablePolicy(codecs), 256, **options)


OURS = {
    "exact": wrapped({}),
    "coded": wrapped(CODED, fused=False),
    "fused": wrapped(CODED),
    "half fused": wrapped(CODED, fused=True),
    "exact on the host": wrapped({}, store="host"),
    "fused on the host": wrapped(CODED, store="host"),
    "CPUOffloadOptimizer": lambda p: CPUOffloadOptimizer(p, lr=1e-2, weight_decay=0.1),
    "stepped on the host": lambda p: pretends(p, weight_decay=0.1),
    "gradients on the host": lambda p: pretends(p, weight_decay=0.1, offload_gradients=True),
}


@pytest.fixture(params=OURS)
def make(request):
    return OURS[request.param]


def parameters(shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def step(params, optimizer, count=1) -> None:
    for _ in range(count):
        for param in params:
            # all far from zero, where a code is about as fine as what it stands for
            signs = 1 - 2 * (torch.arange(param.numel()) % 3 % 2)
            grad = signs * torch.linspace(0.5, 1, param.numel())
            param.grad = grad.view(param.shape).to(param.dtype)
        optimizer.step()


def refused(params, optimizer, words: str, error: type = RuntimeError) -> None:
    """A step raises, and nothing has changed; also torch's optimizer raises."""
    before = [param.detach().clone() for param in params]
    saved = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=words) as caught:
        optimizer.step()
    assert not isinstance(caught.value, StepError)
    assert all(map(torch.equal, before, params))
    now = optimizer.state_dict()
    assert now["state"].keys() == saved["state"].keys()
    for number, state in now["state"].items():
        for key, value in state.items():
            assert torch.equal(value, saved["state"][number][key])
    assert getattr(getattr(optimizer, "engine", None), "steps", 0) in (0, 2)


def torch_raises(params, state=None) -> None:
    plain = adamw(params)
    if state is not None:
        plain.load_state_dict(state)
        # which looks at no shape
        plain.param_groups[0]["fused"] = False
    with pytest.raises(RuntimeError):
        plain.step()


def test_elements_that_share_memory(make) -> None:
    """Of a parameter that comes last: none before it is stepped."""
    for last in (
        torch.ones(1, 40).expand(30, 40),
        torch.ones(40, 1).expand(40, 30),
        torch.ones(()).expand(300),
    ):
        params = [*parameters(), Parameter(last)]
        optimizer = make(params)
        for param in params:
            param.grad = torch.ones(param.shape)
        refused(params, optimizer, "parameter 3: several of its elements are one place in memory")
        torch_raises([params[3]])
        params[3].grad = None
        optimizer.step()
        # those of which nothing is shared, however they are made
        other = Parameter(torch.ones(1, 300)[:1].expand(1, 300))
        step([other], make([other]))


def test_inference_tensors(make) -> None:
    params = parameters()
    with torch.inference_mode():
        params.append(Parameter(torch.ones(12, 25)))
    optimizer = make(params)
    for param in params:
        param.grad = torch.ones(param.shape)
    refused(params, optimizer, "parameter 3: is an inference tensor, which cannot be updated in")
    torch_raises([params[3]])


@pytest.mark.parametrize("kind", ["state_dict", "packed_state_dict"])
def test_what_is_loaded_under_inference_mode_can_be_stepped(make, kind) -> None:
    mine, theirs = parameters(), parameters()
    ours, twin = make(mine), make(theirs)
    if not hasattr(ours, kind):
        pytest.skip("has no packed state dict")
    step(mine, ours, 2)
    step(theirs, twin, 2)
    saved = copy.deepcopy(getattr(ours, kind)())
    with torch.inference_mode():
        ours.load_state_dict(saved)
    twin.load_state_dict(saved)
    for params, optimizer in ((mine, ours), (theirs, twin)):
        step(params, optimizer, 2)
        for state in optimizer.state_dict()["state"].values():
            assert not any(value.is_inference() for value in state.values())
    assert all(map(torch.equal, mine, theirs))


def test_gradients_of_another_shape(make) -> None:
    for data in (torch.ones(40, 33), torch.ones(1, 33), torch.ones(33), torch.ones(33, 20)):
        params = parameters()
        optimizer = make(params)
        step(params, optimizer, 2)
        saved = optimizer.state_dict()
        for param in params:
            param.grad = torch.ones_like(param)
        params[0].data = data
        refused(params, optimizer, r"gradient of parameter 0: shape \(20, 33\), must be")
        torch_raises(params, saved)


def test_state_of_another_shape(make) -> None:
    """As many elements in another shape, fewer and more; the last of several parameters."""
    for data in (torch.ones(25, 12), torch.ones(300), torch.ones(6, 25), torch.ones(24, 25)):
        params = parameters()
        optimizer = make(params)
        step(params, optimizer, 2)
        saved = optimizer.state_dict()
        params[2].data = data
        for param in params:
            param.grad = torch.ones(param.shape)
        shape = str(tuple(data.shape)).replace("(", r"\(").replace(")", r"\)")
        refused(params, optimizer, rf"of parameter 2: shape \(12, 25\), must be {shape}")
        torch_raises(params, saved)
        # its state may be read, and deleted
        assert optimizer.state[params[2]]["exp_avg"].shape == (12, 25)
        del optimizer.state[params[2]]
        optimizer.step()
        assert optimizer.state[params[2]]["step"] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_state_of_another_dtype(make, dtype, request) -> None:
    params = parameters()
    optimizer = make(params)
    step(params, optimizer, 2)
    saved = optimizer.state_dict()
    for param in params[1:]:
        param.data = param.data.to(dtype)
    for param in params:
        param.grad = torch.ones_like(param)
    refused(params, optimizer, f"of parameter 1: torch.float32, while the parameter is {dtype}")
    plain = adamw(params)
    plain.load_state_dict(saved)
    plain.param_groups[0]["fused"] = False
    for param in params[1:]:
        plain.state[param]["exp_avg"] = plain.state[param]["exp_avg"].float()
        plain.state[param]["exp_avg_sq"] = plain.state[param]["exp_avg_sq"].float()
    with pytest.raises(RuntimeError, match="expected"):
        plain.step()


@pytest.mark.parametrize("store", ["device", "host"])
@pytest.mark.parametrize("codecs", [{}, CODED], ids=["exact", "coded"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_an_optimizer_that_steps_another_dtype_does(dtype, codecs, store) -> None:
    """torch's SGD does."""
    ends = []
    sgd = lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9)  # noqa: E731
    for make in (sgd, wrapped(codecs, sgd, store=store, fused=None)):
        params = parameters()
        optimizer = make(params)
        step(params, optimizer, 2)
        for param in params:
            param.data = param.data.to(dtype)
        step(params, optimizer, 2)
        ends.append(params)
    for a, b in zip(*ends, strict=True):
        assert b.dtype == dtype
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
        assert codecs or torch.equal(a, b)


def test_state_on_another_device() -> None:
    params = parameters()
    optimizer = wrapped({})(params)
    step(params, optimizer, 2)
    before = [param.detach().clone() for param in params]
    optimizer.state[params[2]]["exp_avg"] = torch.ones(12, 25, device="meta")
    with pytest.raises(RuntimeError, match="'exp_avg' of parameter 2: on meta, must be on cpu"):
        optimizer.step()
    assert all(map(torch.equal, before, params))
    optimizer.state[params[2]]["exp_avg"] = torch.ones(12, 25)
    optimizer.step()


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["exact", "coded", "fused", "exact on the host"])
def test_on_a_gpu_without_its_state(kind) -> None:
    """A parameter that goes to another device, as by model.cuda() after a step."""
    params = parameters()
    optimizer = OURS[kind](params)
    step(params, optimizer, 2)
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.ones_like(param)
    params[2].data = params[2].cuda()
    with pytest.raises(RuntimeError, match="gradient of parameter 2: on cpu, must be on cuda"):
        optimizer.step()
    params[2].grad = None
    params[2].grad = torch.ones_like(params[2])
    with pytest.raises(RuntimeError, match="of parameter 2: on cpu, must be on cuda"):
        optimizer.step()
    assert all(map(torch.equal, before[:2], params[:2]))
    assert optimizer.state[params[0]]["step"] == 2


def relaid(param) -> torch.Tensor:
    """The same numbers in the other order in memory."""
    return param.detach().t().contiguous().t() if param.dim() == 2 else param.detach().clone()


@pytest.mark.parametrize("chunk", [256, 1 << 20])
@pytest.mark.parametrize("kind", [*OURS])
def test_a_parameter_that_moves_goes_on(kind, chunk, monkeypatch) -> None:
    """To another address, into another order of its dimensions, and into a view with gaps."""
    ends = []
    for make in (adamw, OURS[kind]):
        params = parameters()
        optimizer = make(params)
        if chunk > 256 and hasattr(optimizer, "engine"):
            optimizer.engine.encoder.chunk_size = chunk
        step(params, optimizer, 2)
        gaps = lambda p: torch.stack([p, p], -1)[..., 0]  # noqa: E731
        for move in (torch.clone, relaid, relaid, gaps, relaid):
            for param in params:
                param.data = move(param.detach())
            step(params, optimizer, 2)
        ends.append((params, optimizer))
    (theirs, plain), (mine, ours) = ends
    exact = kind not in ("coded", "fused", "half fused", "fused on the host")
    for a, b in zip(theirs, mine, strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 if exact else 5e-3)
        # oneq rounds stochastically, by an eighth of what there is at most each time
        for key, coarse in (("exp_avg", 0.02), ("exp_avg_sq", 0.3)):
            expected = plain.state[a][key]
            apart = (1e-5 if exact else coarse) * float(expected.abs().max())
            torch.testing.assert_close(ours.state[b][key], expected, rtol=0, atol=apart)
        assert ours.state[b]["step"] == 12


@pytest.mark.parametrize("chunk", [256, 1 << 20])
def test_a_parameter_that_is_transposed_where_it_lies_goes_on(make, chunk) -> None:
    """At its old address and of its old shape."""
    ends = []
    for maker in (adamw, make):
        params = parameters(((24, 24),))
        optimizer = maker(params)
        if chunk > 256 and hasattr(optimizer, "engine"):
            optimizer.engine.encoder.chunk_size = chunk
        for _ in range(3):
            step(params, optimizer, 2)
            params[0].data = params[0].data.t()
        ends.append(params[0])
    torch.testing.assert_close(*ends, rtol=0, atol=2e-3)


def test_parts_that_were_cut_by_another_order_are_read_and_loaded_by_it() -> None:
    params = parameters()
    optimizer = wrapped({})(params)
    step(params, optimizer, 2)
    expected = optimizer.state[params[0]]["exp_avg"].clone()
    packed = copy.deepcopy(optimizer.packed_state_dict())
    params[0].data = relaid(params[0])
    optimizer.engine.states.discard_read_states()
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], expected)
    optimizer.load_state_dict(packed)
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], expected)
    twin = wrapped({})([Parameter(relaid(param)) for param in params])
    twin.load_state_dict(optimizer.packed_state_dict())
    assert torch.equal(twin.state[twin.param_groups[0]["params"][0]]["exp_avg"], expected)
    twin.state[twin.param_groups[0]["params"][0]]["exp_avg"].mul_(2)
    twin.engine.states.write_back()
    twin.engine.states.discard_read_states()
    assert torch.equal(twin.state[twin.param_groups[0]["params"][0]]["exp_avg"], 2 * expected)


def test_a_frozen_parameter_may_have_another_shape() -> None:
    for kind in ("exact", "fused", "CPUOffloadOptimizer"):
        params = parameters()
        optimizer = OURS[kind](params)
        step(params, optimizer, 2)
        params[0].grad, params[0].data = None, torch.ones(50, 33)
        step(params[1:], optimizer, 2)
        assert optimizer.state[params[0]]["exp_avg"].shape == (20, 33)
        assert optimizer.state[params[1]]["step"] == 4


def test_released_gradients_of_what_cannot_be_stepped() -> None:
    params = [*parameters(), Parameter(torch.ones(1, 40).expand(30, 40))]
    optimizer = wrapped({})(params)
    with (
        GradientRelease(optimizer, bucket_bytes=1 << 30),
        pytest.raises(RuntimeError, match="parameter 3: several of its elements"),
    ):
        sum(param.sum() for param in params).backward()


def test_an_offloaded_gradient_goes_along_with_its_parameter() -> None:
    """As torch keeps the gradients of a model that becomes another dtype."""
    ends = []
    for make in (lambda p: torch.optim.SGD(p, lr=0.1), None):
        module = torch.nn.Linear(33, 20, bias=False)
        module.weight.data = parameters()[0].detach()
        optimizer = (
            pretends([module.weight], torch.optim.SGD, lr=0.1, offload_gradients=True)
            if make is None
            else make([module.weight])
        )
        module.weight.square().sum().backward()
        module.to(torch.float64)
        optimizer.step()
        ends.append(module.weight)
    assert torch.equal(*ends)
    assert ends[1].dtype == torch.float64
    param = Parameter(torch.ones(20, 33))
    optimizer = pretends([param], offload_gradients=True)
    param.sum().backward()
    param.data = torch.ones(10, 33)
    with pytest.raises(RuntimeError, match=r"gradient of parameter 0: shape \(20, 33\), must be"):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"offloaded gradient: shape \(20, 33\), must be"):
        optimizer.clip_grad_norm_(1.0)
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(param, torch.ones(10, 33))

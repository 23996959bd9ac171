"""The cases that need a GPU: capturable steps, two devices at once, scalers, loading."""

import copy

import pytest
import torch
from accounting import Refused, over
from expected import AMSGRAD_WITH_TENSORS, NO_SUCH_ARGUMENT
from family import FAMILY
from problems import SHAPES, Problem, assert_equal, compare
from torch_inputs import Case, cases

pytestmark = [
    pytest.mark.cuda,
    # of some releases of torch, whose steps there depend on what is stepped together
    pytest.mark.filterwarnings("ignore:Adagrad cannot be stepped in chunks:UserWarning"),
]
#: the kernel's roots and sums differ from torch's in a last place here and there
ROUNDED = (1e-3,)
DEVICE = "cuda"
BOTH = {"devices": (DEVICE, "cpu"), "shapes": SHAPES * 2}


@pytest.fixture(autouse=True)
def _can_run() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


ON_THE_HOST = {
    ("CPUOffload-NAdam-copies", "*capturable*"): Refused("capturable=True", (AssertionError,))
}


@over(
    lambda subject: cases(subject.like, "cuda"), NO_SUCH_ARGUMENT, AMSGRAD_WITH_TENSORS, ON_THE_HOST
)
def test_steps_are_torchs(subject, case) -> None:
    """As on a CPU, and with ``capturable``."""
    kwargs = {**case.kwargs, **subject.plus}
    # steps on the host are torch's own there, not its steps on a GPU
    rounded = subject.coded or subject.error or subject.name.startswith("CPUOffload")
    compare(
        subject,
        lambda p: subject.make(p, **kwargs),
        lambda p: subject.exact(p, **kwargs),
        slack=ROUNDED if rounded else (0.0,),
        devices=(DEVICE,),
    )


ONE_DEVICE = {("wrap-LBFGS", "*"): "torch's LBFGS steps on one device"}


@over(lambda subject: [Case("both devices", {})], ONE_DEVICE)
def test_devices_together(subject, case) -> None:
    """Each parameter is stepped where it is."""
    compare(
        subject,
        lambda p: subject.make(p, **subject.plus),
        lambda p: subject.exact(p, **subject.plus),
        # what is stepped together differs, and with it last places of torch's own steps, which
        # take so much from float64's
        slack=(5e-3,),
        **BOTH,
    )


MOVES = [
    Case("from the CPU", {"first": "cpu", "second": DEVICE}),
    Case("to the CPU", {"first": DEVICE, "second": "cpu"}),
]


@over(lambda subject: MOVES)
def test_loads_on_another_device(subject, case) -> None:
    """State goes where the parameters are, and decodes to what it was; training goes on."""
    first = Problem(subject, subject.make, devices=(case.kwargs["first"],)).run(3)
    state_dict = copy.deepcopy(first.optimizer.state_dict())
    second = Problem(subject, subject.make, devices=(case.kwargs["second"],))
    second.optimizer.load_state_dict(state_dict)
    loaded = second.optimizer.state_dict()["state"]
    if subject.coded or not subject.error:
        assert_equal(moved(loaded, "cpu"), moved(state_dict["state"], "cpu"), "state")
    second.run(2)
    assert all(bool(param.isfinite().all()) for param in second.params)


def moved(value, device):
    """A state with all of its tensors on one device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(v, device) for key, v in value.items()}
    return [moved(v, device) for v in value] if isinstance(value, (list, tuple)) else value


SCALED = [Case("plain", {}), Case("fused", {"fused": True})]
# torch's fused Adagrad is one of the CPU
FUSED = [s for s in FAMILY if s.coded or s.like in ("Adam", "AdamW", "SGD")]


@over(lambda subject: SCALED, subjects=FUSED)
def test_grad_scaler(subject, case) -> None:
    """With autocast, an overflow skips the step, on the device where it is fused."""
    problem = Problem(subject, lambda p: subject.make(p, **case.kwargs), devices=(DEVICE,))
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    matrix = problem.params[0]
    for overflow in (1.0, float("inf"), 1.0):
        before = problem.values()
        with torch.autocast("cuda", torch.float16):
            loss = (matrix @ matrix.t()).float().mean() + problem.params[1].square().mean()
        problem.optimizer.zero_grad()
        scaler.scale(loss * overflow).backward()
        scaler.step(problem.optimizer)
        scaler.update()
        same = all(map(torch.equal, problem.values(), before))
        assert same is (overflow != 1.0)
    assert scaler.get_scale() == 512.0

"""Steps, schedulers, groups, closures and gradient scaling, as torch tests them."""

import copy

import torch
from accounting import account_for, over
from expected import NO_SUCH_ARGUMENT, ONE_GROUP
from problems import Problem, after, assert_equal, compare, normal
from torch.nn import Parameter
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch_inputs import Case, cases, schedulers


class Regression:
    """Torch's little problem: a matrix and a column that take a vector to zero."""

    def __init__(self, subject, make, strided=False) -> None:
        matrix, column = normal((10, 5, 2), 1).float(), normal((10, 1, 2), 2).float()
        if strided:
            self.params = [Parameter(matrix[..., 0]), Parameter(column[..., 0])]
        else:
            self.params = [Parameter(v[..., 0].contiguous()) for v in (matrix, column)]
        assert self.params[0].is_contiguous() is not strided
        self.x = normal((5, 1), 3).float()
        self.sparse = subject.sparse
        self.optimizer = make(self.params)

    def loss(self) -> torch.Tensor:
        return (self.params[0] @ self.x + self.params[1]).square().sum()

    def closure(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        if self.sparse:
            for param in self.params:
                param.grad = param.grad.to_sparse()
        return loss.detach()

    def run(self, steps, schedulers=()) -> list[float]:
        """The losses before, between and after the steps."""
        losses = []
        for _ in range(steps):
            losses.append(float(self.optimizer.step(self.closure)))
            for scheduler in schedulers:
                plateau = isinstance(scheduler, ReduceLROnPlateau)
                scheduler.step(losses[-1]) if plateau else scheduler.step()
        return [*losses, float(self.loss().detach())]


def inputs(subject):
    """With contiguous parameters, and the first also with strided ones."""
    found = cases(subject.like)
    return [*found, Case(f"{found[0].name}, strided", {**found[0].kwargs, "strided": True})]


@over(inputs, NO_SUCH_ARGUMENT)
def test_loss_goes_down(subject, case) -> None:
    """Or up, with ``maximize``."""
    kwargs = dict(case.kwargs)
    problem = Regression(subject, lambda p: subject.make(p, **kwargs), kwargs.pop("strided", False))
    losses = problem.run(4)
    change = losses[-1] - losses[0]
    assert change > 0 if kwargs.get("maximize") else change < 0, losses


def combinations(subject):
    return [Case(f"schedulers {n}", {"makers": m}) for n, m in enumerate(schedulers(subject.like))]


def grouped(make):
    """The optimizer with the second parameter in a group of its own."""
    return lambda p: make([{"params": p[:1]}, {"params": p[1:], "lr": 2.0**-7}], lr=2.0**-6)


@over(combinations, ONE_GROUP)
def test_schedulers(subject, case) -> None:
    """Rates of two groups are torch's, step for step, and the loss goes down."""
    seen = []
    for make in (subject.make, subject.inside):
        problem = Regression(subject, grouped(make))
        made = [make_scheduler(problem.optimizer) for make_scheduler in case.kwargs["makers"]]
        assert (losses := problem.run(4, made))[-1] < losses[0]
        seen.append([group["lr"] for group in problem.optimizer.param_groups])
    assert seen[0] == seen[1]


GROUPS = [
    Case("lr", {"lr": 2.0**-5}),
    Case("weight_decay", {"weight_decay": 0.5}),
    Case("maximize", {"maximize": True}),
]
WITHOUT = {
    ("wrap-Muon", "maximize"): "torch's Muon has no maximize",
    ("wrap-Rprop", "weight_decay"): "torch's Rprop has no weight_decay",
    ("wrap-SparseAdam", "weight_decay"): "torch's SparseAdam has no weight_decay",
}


@over(lambda subject: GROUPS, ONE_GROUP, WITHOUT)
def test_groups_have_their_own(subject, case) -> None:
    """A group's value counts for its parameters, the default for the others'."""
    [(key, value)] = case.kwargs.items()

    def groups(make):
        return lambda p: make([{"params": p[:1]}, {"params": p[1:], key: value}], **subject.plus)

    seen = []

    def between(optimizer) -> None:
        seen.append([group[key] for group in optimizer.param_groups])

    compare(subject, groups(subject.make), groups(subject.exact), between=between)
    assert all(values[1] == value != values[0] for values in seen)


@over(lambda subject: cases(subject.like), NO_SUCH_ARGUMENT)
def test_no_gradient_no_step(subject, case) -> None:
    """Parameters without a gradient stay what they are, and ours have no state."""
    problem = Problem(subject, lambda p: subject.make(p, **case.kwargs))
    before = problem.values()
    for _ in range(2):
        problem.optimizer.step((lambda: 0.0) if subject.needs_closure else None)
    assert_equal(problem.values(), before, "params")
    # torch's Adagrad, for one, has state from the start
    if subject.coded:
        assert not any(problem.optimizer.state.values())


MOVES = {("wrap-ASGD", "*"): "torch's ASGD decays parameters by lambd whatever the gradient is"}


@over(lambda subject: cases(subject.like), NO_SUCH_ARGUMENT, MOVES)
def test_zero_gradient_no_step(subject, case) -> None:
    """Gradients of zero move nothing, without weight decay."""
    kwargs = dict(case.kwargs)
    if subject.like not in ("Rprop", "SparseAdam", "LBFGS", "ASGD"):
        kwargs["weight_decay"] = 0.0
    problem = Problem(subject, lambda p: subject.make(p, **kwargs))
    before = problem.values()

    def zero() -> float:
        for param in problem.params:
            grad = torch.zeros_like(param)
            param.grad = grad.to_sparse() if subject.sparse else grad
        return 0.0

    for _ in range(2):
        zero()
        problem.optimizer.step(zero if subject.needs_closure else None)
    assert_equal(problem.values(), before, "params")


@over()
def test_closure(subject, case) -> None:
    """It is called with gradients on, once, and its loss is returned."""
    problem = Problem(subject, subject.make)
    modes = []

    def closure() -> torch.Tensor:
        modes.append(torch.is_grad_enabled())
        return problem.evaluate()

    first = problem.evaluate()
    with torch.no_grad():
        loss = problem.optimizer.step(closure)
    assert float(loss) == float(first)
    assert modes == [True] * len(modes)
    assert len(modes) == 1 or subject.needs_closure
    assert_equal(problem.values(), after(subject, 1), "params")


@over()
def test_zero_grad(subject, case) -> None:
    """It drops gradients, or sets them to zero where they are."""
    problem = Problem(subject, subject.make)
    problem.evaluate()
    grads = [param.grad for param in problem.params]
    problem.optimizer.zero_grad(set_to_none=False)
    assert [param.grad for param in problem.params] == grads or subject.sparse
    assert all(not param.grad.to_dense().any() for param in problem.params)
    problem.optimizer.zero_grad()
    assert [param.grad for param in problem.params] == [None, None]


SCALED = [Case("scaled", {}), Case("scaled, fused", {"fused": True})]
CLOSURES = {("wrap-LBFGS", "*"): "torch's GradScaler takes no closure"}
NO_FUSED = {
    (f"wrap-{like}", "*fused"): f"torch's {like} has no fused step"
    for like in (
        *("Adadelta", "Adafactor", "Adamax", "ASGD", "Muon", "NAdam", "RAdam"),
        *("RMSprop", "Rprop", "SparseAdam"),
    )
} | {("CPUOffload-NAdam*", "*fused"): "torch's NAdam has no fused step"}


@over(lambda subject: SCALED, CLOSURES, NO_FUSED)
def test_grad_scaler(subject, case) -> None:
    """Scaled by a power of two, gradients step as they are; an overflow skips the step."""
    plain, scaled = (Problem(subject, lambda p: subject.make(p, **case.kwargs)) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))

    def step(factor: float = 1.0) -> None:
        scaled.evaluate()
        for param in scaled.params:
            param.grad = param.grad * (scaler.get_scale() * factor)
        scaler.step(scaled.optimizer)
        scaler.update()

    step()
    step()
    for _ in range(2):
        plain.evaluate()
        plain.optimizer.step()
    assert_equal(scaled.values(), plain.values(), "params")
    state = copy.deepcopy(scaled.optimizer.state_dict()["state"])
    assert_equal(state, plain.optimizer.state_dict()["state"], "state")
    step(float("inf"))
    assert scaler.get_scale() == 512.0
    assert_equal(scaled.values(), plain.values(), "params")
    assert_equal(scaled.optimizer.state_dict()["state"], state, "state")


def test_every_case_is_accounted_for() -> None:
    account_for(__name__)

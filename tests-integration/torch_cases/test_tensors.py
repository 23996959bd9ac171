"""Parameters and gradients of every dtype, shape and layout; complex and sparse ones."""

from dataclasses import replace

import pytest
import torch
from accounting import Refused, account_for, over
from family import FAMILY, ROOTS
from problems import Problem, after, assert_equal, compare
from torch_inputs import Case

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: four matrices for each
MIXED = {"shapes": ((20, 15),) * 4, "dtypes": DTYPES}
#: what rounding a parameter to its dtype is worth after steps of a sixteenth
ROUNDED = (0.02, 0.1, 1e-5, 1e-5)


@over()
def test_dtypes_together(subject, case) -> None:
    """Each parameter is stepped as its dtype asks, whatever dtypes the others have."""
    kwargs = {"lr": 2.0**-4, **subject.plus}
    exact = not subject.coded and not subject.error
    compare(
        subject,
        lambda p: subject.make(p, **kwargs),
        lambda p: subject.exact(p, **kwargs),
        slack=(0.0,) if exact else ROUNDED,
        **MIXED,
    )


MATRICES = {("wrap-Muon", "*"): "torch's Muon takes matrices only"}
SHAPES = [
    Case("no dimensions", {"shapes": ((), (3,))}),
    Case("no elements", {"shapes": ((0,), (2, 3), (3, 0))}),
    Case("one element", {"shapes": ((1,), (1, 1, 1))}),
    Case("more than a chunk", {"shapes": ((257,), (3, 5, 31))}),
]
ELEMENTS = {("wrap-Adafactor", "no elements"): "torch's Adafactor divides by their number"}


def along(subject, **options) -> None:
    compare(
        subject,
        lambda p: subject.make(p, **subject.plus),
        lambda p: subject.exact(p, **subject.plus),
        **options,
    )


@over(lambda subject: SHAPES, MATRICES, ELEMENTS)
def test_shapes(subject, case) -> None:
    """Also of no dimensions, no elements and odd sizes."""
    along(subject, **case.kwargs)


def strided(values):
    room = torch.zeros(*values.shape, 2, dtype=values.dtype, device=values.device)
    room[..., 0] = values
    return room[..., 0]


#: what steps them fused by default; alone, torch's fused steps on a CPU would fill the gaps
FUSED = ("CPUOffload-AdamW", "CPUOffload-Adam-copies")


def layouts(subject):
    gaps = {"lay": strided, "lay_exact": torch.clone if subject.name in FUSED else strided}
    last = {"lay": lambda values: values.to(memory_format=torch.channels_last)}
    return [
        Case("transposed", {"lay": lambda values: values.t().contiguous().t()}),
        Case("strided", gaps),
        Case("channels last", {"shapes": ((3, 4, 5, 2),), **last}),
    ]


NOT_VIEWED = {
    ("wrap-LBFGS", which): "torch's LBFGS takes contiguous gradients only"
    for which in ("transposed", "channels last")
}


@over(layouts, {("wrap-Muon", "channels*"): MATRICES["wrap-Muon", "*"]}, NOT_VIEWED)
def test_layouts(subject, case) -> None:
    """Dense or with gaps, in any order of dimensions."""
    if subject.like == "SparseAdam":
        # the strides of its intermediate tensors decide which of torch's roots it takes, and
        # on some processors these differ by an ulp
        subject = replace(subject, error=ROOTS)
    along(subject, **case.kwargs)


COMPLEX = {
    (f"wrap-{like}", "*"): f"torch's {like} takes no complex numbers"
    for like in ("Adafactor", "Muon", "SparseAdam")
} | {
    (subject.name, "*"): Refused(r"params\[0\]: dtype torch.complex64, must be one of float16")
    for subject in FAMILY
    if subject.coded
}


@over(lambda subject: [Case("complex", {})], COMPLEX)
def test_complex(subject, case) -> None:
    """Ours refuse complex parameters by name; torch's step them in a wrapper as they do alone."""
    along(subject, dtypes=(torch.complex64,))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@over(lambda subject: [Case("sparse", {})])
def test_sparse_gradients(subject, case) -> None:
    """Ours refuse them by name, before anything changes; torch's take them where they do alone."""
    shapes = ((7, 3), (5, 4))
    takes = not subject.coded and subject.like in ("SGD", "Adagrad", "SparseAdam", "LBFGS")
    if takes:
        along(subject, shapes=shapes, sparse=True)
        return
    problem = Problem(subject, subject.make, shapes=shapes)
    problem.run()
    before, problem.sparse = problem.values(), True
    state = problem.optimizer.state_dict()["state"]
    says = "layout torch.sparse_coo, must be dense" if subject.coded else "sparse"
    with pytest.raises((TypeError, RuntimeError), match=says):
        problem.run()
    assert_equal(problem.values(), before, "params")
    assert_equal(problem.optimizer.state_dict()["state"], state, "state")


DEFAULTS = [Case(str(d).removeprefix("torch."), {"dtype": d}) for d in DTYPES if d.itemsize != 4]


@over(lambda subject: DEFAULTS)
def test_default_dtype_changes_nothing(subject, case) -> None:
    """Steps are those under float32; of torch's optimizer inside, what it makes of it."""
    before = torch.get_default_dtype()
    own = subject.coded or subject.error
    expected = after(subject, 2) if own else []
    torch.set_default_dtype(case.kwargs["dtype"])
    try:
        ours = Problem(subject, subject.make).run(2).values()
        expected = expected or Problem(subject, subject.exact).run(2).values()
    finally:
        torch.set_default_dtype(before)
    assert_equal(ours, expected, "params")


def test_every_case_is_accounted_for() -> None:
    account_for(__name__)

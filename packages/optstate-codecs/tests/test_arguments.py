"""Arguments by name and type: text turned into values, and the error for unknown ones."""

import inspect
import re

import pytest
import torch
from subjects import EXACT

from optstate_codecs import Adam, CodedOptimizer, typed_arguments
from optstate_codecs.arguments import ELSEWHERE, arguments_of
from optstate_codecs.rules import SGD, Lion, Rule


class Coded(CodedOptimizer):
    """Hands options through, as the packages' classes do."""

    rule_type = Lion

    def __init__(self, params, lr: float = 1e-4, *, size: int | None = 3, **options) -> None:
        super().__init__(params, Lion(), {"exp_avg": "fp32"}, lr=lr, **options)


class Plain(torch.optim.SGD):
    def __init__(self, params, lr=0.5, steps=3, on=False, pair=(1.0, 2.0), maybe=None) -> None:
        super().__init__(params, lr)


def test_arguments_are_those_of_the_signature_its_bases_and_the_rule() -> None:
    names = list(arguments_of(Coded))
    assert names[:2] == ["lr", "size"]
    assert {"backend", "rounding_seed", "skip_nonfinite", "max_grad_norm"} < set(names)
    assert {"betas", "weight_decay", "maximize", "centralization", "capturable"} < set(names)
    # what the subclass decides, and what is no argument by keyword
    assert not {"params", "rule", "formats", "write", "self", "options"} & set(names)
    assert arguments_of(Coded)["lr"] is float
    assert {"momentum", "nesterov"} < set(arguments_of(CodedOptimizer, SGD))
    assert set(arguments_of(CodedOptimizer)) == set(arguments_of(CodedOptimizer, Rule))


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_arguments_of_torch_are_those_of_its_signature(cls) -> None:
    expected = set(inspect.signature(cls).parameters) - {"params"}
    assert set(arguments_of(cls)) == expected


def test_the_rule_is_of_the_type_that_the_class_names() -> None:
    class Wrong(Coded):
        rule_type = SGD

    with pytest.raises(TypeError, match=r"rule=Lion.*: must be an instance of SGD, got Lion"):
        Wrong([torch.nn.Parameter(torch.ones(2))])


SECOND = "minifloat(signed=False, rounding=stochastic)"
FORMATS = {"exp_avg": "bf16", "exp_avg_sq": SECOND}
TYPED = [
    (torch.optim.AdamW, "lr=3e-4,betas=(0.9,0.95)", {"lr": 3e-4, "betas": (0.9, 0.95)}),
    (torch.optim.AdamW, "betas=0.9, 0.95,eps=1e-6", {"betas": (0.9, 0.95), "eps": 1e-6}),
    (torch.optim.AdamW, " betas = [0.9, .95] , ", {"betas": (0.9, 0.95)}),
    (torch.optim.AdamW, "fused=none,amsgrad=Yes", {"fused": None, "amsgrad": True}),
    (torch.optim.AdamW, "fused=0,capturable=true", {"fused": False, "capturable": True}),
    (torch.optim.AdamW, "weight_decay=0", {"weight_decay": 0.0}),
    (torch.optim.AdamW, "", {}),
    (Coded, "rounding_seed=12,max_grad_norm=None", {"rounding_seed": 12, "max_grad_norm": None}),
    (Coded, "backend='eager',size=none", {"backend": "eager", "size": None}),
    (Coded, {"skip_nonfinite": "No", "size": 4}, {"skip_nonfinite": False, "size": 4}),
    (Coded, {"lr": torch.float64, "betas": None}, {"lr": torch.float64, "betas": None}),
    (CodedOptimizer, f"formats={{exp_avg: bf16, exp_avg_sq: {SECOND}}}", {"formats": FORMATS}),
    (CodedOptimizer, f"formats=exp_avg:bf16,exp_avg_sq:{SECOND}", {"formats": FORMATS}),
    (CodedOptimizer, {"formats": '"exp_avg": "fp32"'}, {"formats": {"exp_avg": "fp32"}}),
    (Plain, "steps=5,on=true,pair=3,4.5", {"steps": 5, "on": True, "pair": (3.0, 4.5)}),
    (Plain, "maybe=none", {"maybe": None}),
]


@pytest.mark.parametrize(("cls", "given", "expected"), TYPED)
def test_text_becomes_values_of_the_annotated_types(cls, given, expected) -> None:
    found = typed_arguments(cls, given)
    assert found == expected
    assert list(map(repr, found.values())) == list(map(repr, expected.values()))


REFUSED = [
    ("lr=fast", ValueError, "lr='fast': must be a number"),
    ("lr=", ValueError, "lr='': must be a number"),
    ("lr=none", ValueError, "lr='none': must be a number"),
    ("lr=1,lr=2", ValueError, "lr: given twice in 'lr=1,lr=2'"),
    ("rounding_seed=1.5", ValueError, "rounding_seed='1.5': must be an int"),
    ("rounding_seed=1e3", ValueError, "rounding_seed='1e3': must be an int"),
    ("skip_nonfinite=maybe", ValueError, "skip_nonfinite='maybe': must be one of true, yes, 1"),
    ("betas=0.9", ValueError, "betas='0.9': must be 2 values, separated by commas"),
    ("betas=(0.9,high)", ValueError, "betas[1]='high': must be a number"),
    ("amsgrad", ValueError, "'amsgrad': must be name=value, separated by commas"),
    ("formats={exp_avg}", ValueError, "must be {name: value, ...}, got 'exp_avg'"),
    ("rule=adam", TypeError, "rule='adam': cannot be given as text"),
    ("roundingseed=1", TypeError, "(did you mean rounding_seed?); known are rule, formats"),
    ("params=1", TypeError, "params: unknown argument"),
]


class CodedAdam(CodedOptimizer):
    rule_type = Adam


@pytest.mark.parametrize(("given", "error", "words"), REFUSED)
def test_text_of_no_such_type_is_refused_by_name(given, error, words) -> None:
    with pytest.raises(error, match=re.escape(words)):
        typed_arguments(CodedAdam, given)


def test_values_that_are_no_text_are_checked_by_name_too() -> None:
    with pytest.raises(TypeError, match="foo: unknown argument of Coded; known are lr, size"):
        typed_arguments(Coded, {"foo": 3})


def test_unknown_arguments_name_all_that_there_are() -> None:
    param = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError) as caught:
        Coded([param], foo=1)
    start, _, known = str(caught.value).partition("; known are ")
    assert start == "foo: unknown argument of Coded"
    assert known.split(", ") == list(arguments_of(Coded))
    with pytest.raises(TypeError, match=r"weightdecay.*\(did you mean weight_decay\?\); known"):
        CodedOptimizer([param], Adam(), EXACT, weightdecay=0.1)


def test_names_of_other_libraries_are_none_of_this_one() -> None:
    for cls in (Coded, CodedAdam, CodedOptimizer):
        assert not set(ELSEWHERE) & set(arguments_of(cls))

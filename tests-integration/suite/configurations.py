"""Public optimizers with the arguments and the bounds that the suite checks them with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch.nn import Parameter

from optstate_codecs import CodedOptimizer, Rule, rules
from optstate_codecs.arguments import arguments_of
from optstate_codecs.formats import format_names, parse_format
from optstate_codecs.param_checks import check_formats
from suite.bounds import BOUNDS, GENERIC, RECIPES, VARIANTS
from suite.discovery import Public, public_optimizers

__all__ = ["Configuration", "configurations"]

# variants of law 1 for SGD, which has no amsgrad
SGD_VARIANTS: tuple[dict[str, Any], ...] = (
    {"momentum": 0.0},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "dampening": 0.3},
)
#: the formats that rules other than Adam are checked with
FEW = ("fp32", "bf16", "dynamic8")


@dataclass(frozen=True, eq=False)
class Configuration:
    """A public optimizer and its arguments.

    Attributes:
        name: of the optimizer, and of the arguments after a "+".
        public: the optimizer.
        make: builds it from parameters and hyper-parameters.
        coded: whether it is a ``CodedOptimizer``.
        rule: the name of its rule's class, "Adam" for wrapped ones.
        write: the name of its parameter write, "" for wrapped ones.
        error_feedback: whether its rule compensates the rounding of a moment.
        fields: of ``Subject``: bounds and oracles.
    """

    name: str
    public: Public
    make: Callable[..., Any]
    coded: bool = False
    rule: str = "Adam"
    write: str = ""
    error_feedback: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def variant(self) -> str:
        """The name of the arguments, "" for the defaults."""
        return self.name[len(self.public.name) + 1 :]


def configurations(publics: Iterable[Public] | None = None) -> list[Configuration]:
    """Every configuration of these public optimizers, or of all."""
    found = public_optimizers() if publics is None else publics
    return [
        _completed(Configuration(public.name + suffix, public, partial(_packing, make)))
        for public in found
        for suffix, make in _makes(public)
    ]


def _completed(given: Configuration) -> Configuration:
    """What an optimizer says of itself: its rule, its write and whether its state is exact."""
    optimizer = given.make([Parameter(torch.zeros(4, dtype=torch.float32))])
    bounds = next((b for pattern, b in BOUNDS.items() if fnmatchcase(given.name, pattern)), {})
    if not isinstance(optimizer, CodedOptimizer):
        return replace(given, fields=bounds)
    fields = {**_oracles(optimizer), **bounds}
    rule = optimizer.rule
    return replace(
        given,
        coded=True,
        rule=type(rule).__name__,
        write=optimizer.write,
        error_feedback=rule.has_error_feedback,
        fields=fields,
    )


def _oracles(optimizer: CodedOptimizer) -> dict[str, Any]:
    """The classes of torch that an optimizer is compared with."""
    rule = optimizer.rule
    if isinstance(rule, rules.SGD):
        group = optimizer.param_groups[0]
        kept = {key: group[key] for key in ("momentum", "dampening", "nesterov")}
        near = partial(torch.optim.SGD, **kept)
        if _stores_exactly(optimizer, momentum=0.9):
            return {"near": near, "exact": torch.optim.SGD, "variants": SGD_VARIANTS}
        if kept["momentum"]:
            return {"near": near}
        # without momentum there is no state to round
        return {"near": near, "exact": torch.optim.SGD, "variants": SGD_VARIANTS[:1]}
    if not isinstance(rule, rules.Adam):
        return {"near": None}
    if not _stores_exactly(optimizer):
        return {"near": torch.optim.Adam}
    return {"exact": torch.optim.AdamW if rule.decoupled else torch.optim.Adam}


def _stores_exactly(optimizer: CodedOptimizer, **options: Any) -> bool:
    """Whether all moments are float32, for tensors as small as the laws'."""
    formats = optimizer.group_formats({**optimizer.param_groups[0], **options}).values()
    return all(format.name == "fp32" or format.min_elements > 10**6 for format in formats)


def _makes(public: Public) -> Iterator[tuple[str, Callable[..., Any]]]:
    """How a public optimizer is built, by the name of the arguments."""
    if public.takes != "params":
        variants = {"": {}, **VARIANTS.get(public.name, {})}
        yield from (
            (_suffix(name), partial(_around, public, given)) for name, given in variants.items()
        )
    elif public.make is CodedOptimizer:
        yield from _assembled()
    else:
        yield "", public.make
        if public.base is None:
            for name, given in _variants(public).items():
                yield _suffix(name), partial(public.make, **given)


def _suffix(name: str) -> str:
    return f"+{name}" if name else ""


def _variants(public: Public) -> dict[str, dict[str, Any]]:
    own = VARIANTS.get(public.name, {})
    if not isinstance(public.make, type) or not issubclass(public.make, CodedOptimizer):
        return own
    known = arguments_of(public.make)
    return {**{n: given for n, given in GENERIC.items() if set(given) <= set(known)}, **own}


def _around(public: Public, given: dict[str, Any], params: Any, **options: Any) -> Any:
    """A wrapper around torch's AdamW, or a store around the family's own Adam."""
    wants_coded = public.inner is not None and issubclass(public.inner, CodedOptimizer)
    inner: Callable[..., Any] = _Adam8 if wants_coded else torch.optim.AdamW
    if public.takes == "optimizer_class":
        return public.make(inner, **given)(params, **options)
    return public.make(inner(params, **options), **given)


def _packing(make: Callable[..., Any], params: Any, **options: Any) -> Any:
    """The optimizer, which saves state as it is stored: decoded state is rounded once more."""
    made = make(params, **options)
    if hasattr(made, "packed_checkpoints"):
        made.packed_checkpoints = True
    return made


class _Adam8(CodedOptimizer):
    """A class that takes parameters only."""

    def __init__(self, params: Any, **options: Any) -> None:
        first, second, _ = RECIPES["dynamic8-update"]
        formats = {"exp_avg": first, "exp_avg_sq": second, "max_exp_avg_sq": second}
        super().__init__(params, rules.Adam(), formats, **options)


def _formats(rule: Rule, name: str) -> dict[str, str]:
    """The format of this name for each moment, fp32 for those that it cannot hold."""
    hyper = {**rule.defaults(), **{k: True for k in ("amsgrad",) if k in rule.defaults()}}
    hyper |= {k: 0.9 for k in ("momentum",) if k in hyper}
    moments = rule.moments(rule.hyper(hyper))
    return {moment.name: _spec(moment, name) for moment in moments}


def _spec(moment: Any, name: str) -> str:
    for spec in (name, f"{name}(signed=True)", f"{name}(signed=False)"):
        try:
            format = parse_format(spec)
            check_formats([moment], {moment.name: format})
        except ValueError:
            continue
        return spec
    return "fp32"


def _assembled() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every rule with every format or some of them, and every write."""
    classes = [getattr(rules, name) for name in rules.__all__]
    for cls in classes:
        if not issubclass(cls, Rule) or cls is Rule:
            continue
        rule = cls()
        for name in format_names() if cls is rules.Adam else FEW:
            formats = _formats(rule, name)
            yield f"+{cls.__name__}+{name}", partial(CodedOptimizer, rule=rule, formats=formats)
    sgd = partial(CodedOptimizer, rule=rules.SGD(), formats={"momentum_buffer": "fp32"})
    yield "+SGD+fp32-momentum", partial(sgd, momentum=0.9)
    for name, (first, second, options) in RECIPES.items():
        formats = {"exp_avg": first, "exp_avg_sq": second, "max_exp_avg_sq": second}
        given = {"rule": rules.Adam(), **options}
        yield f"+Adam+{name}", partial(CodedOptimizer, formats=formats, **given)

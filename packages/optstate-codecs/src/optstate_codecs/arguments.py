"""Finds the arguments that an optimizer's class takes, and makes the error for unknown ones.

A constructor with ``**options`` passes them to its base, so the keyword-only arguments of the base
count too. Positional arguments of a base (``rule``, ``formats``, ``write``) do not: its subclasses
choose them. Last come the ``shared_options`` of ``CodedOptimizer`` and the hyper-parameters of the
rule, given by ``rule_type``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import is_dataclass
from difflib import get_close_matches
from typing import Any, get_type_hints

__all__ = ["arguments_of", "unknown_argument"]


def arguments_of(cls: type, rule_type: type | None = None) -> dict[str, Any]:
    """The type of each argument that a class takes by keyword, except the parameters.

    Args:
        cls: of the family, or any optimizer whose constructor has annotations or defaults.
        rule_type: the rule's class, if ``cls`` has no ``rule_type``.

    Examples:
        >>> arguments_of(torch.optim.SGD)["nesterov"]
        <class 'bool'>
    """
    found: dict[str, Any] = {}
    constructors = [base for base in cls.__mro__ if "__init__" in vars(base)]
    for depth, base in enumerate(constructors):
        signature = inspect.signature(vars(base)["__init__"], eval_str=True)
        parameters = list(signature.parameters.values())[1:]
        for parameter in parameters:
            own = depth == 0 and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            if (own or parameter.kind is parameter.KEYWORD_ONLY) and parameter.name != "params":
                found.setdefault(parameter.name, _type_of(parameter))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return found
        if "shared_options" in vars(base):
            break
    rule_type = rule_type or getattr(cls, "rule_type", None)
    shared = {name: _type_by(value) for name, value in getattr(cls, "shared_options", {}).items()}
    more = {**_hyper_parameters(rule_type), **shared}
    return {**found, **{k: v for k, v in more.items() if k not in found}}


def _type_of(parameter: inspect.Parameter) -> Any:
    if parameter.annotation is not parameter.empty:
        return parameter.annotation
    return Any if parameter.default is parameter.empty else _type_by(parameter.default)


def _type_by(default: Any) -> Any:
    """The type of an argument without an annotation, from its default; None: a flag."""
    return bool | None if default is None else type(default)


def _hyper_parameters(rule_type: Any) -> dict[str, Any]:
    """The types of a rule's hyper-parameters, the fields of its ``hyper_type``."""
    hyper_type = getattr(rule_type, "hyper_type", None)
    return get_type_hints(hyper_type) if is_dataclass(hyper_type) else {}


_CLASS = (("", "the class: AdamW8bit decouples weight decay, Adam8bit does not"),)
#: arguments of other libraries, each with pairs of an argument of ours and advice; the first pair
#: whose argument the class takes applies, and "" always does
ELSEWHERE: Mapping[str, tuple[tuple[str, str], ...]] = {
    "adam_w_mode": _CLASS,
    "args": (("", "keyword arguments; optstate_codecs.typed_arguments reads them from text"),),
    "block_wise": (("block_size", "always, in blocks of block_size elements"), ("", "no blocks")),
    "compress_state_dict": (("", "always: state_dict() is packed, full_state_dict() is not"),),
    "decoupled_weight_decay": _CLASS,
    "is_paged": (("", "optstate_codecs.offload(optimizer), which keeps state on the host"),),
    "master_bytewidth": (("master_weight_bits", "master_weight_bits, 24 or 32"),),
    "max_unorm": (("max_grad_norm", "max_grad_norm, which limits the gradient, not the update"),),
    "min_8bit_size": (
        ("min_m_compress_elements", "min_m_compress_elements and min_v_compress_elements"),
        ("formats", "min_elements of each of formats, such as 'dynamic8(min_elements=4096)'"),
        ("", "0: tensors of every size are compressed"),
    ),
    "optim_bits": (
        ("m_bits", "m_bits and v_bits"),
        ("", "the class, such as AdamW8bit and AdamW4bit of lowbit_adam"),
    ),
    "percentile_clipping": (("max_grad_norm", "max_grad_norm, which is a norm, not a percentile"),),
    "quantize": (("", "always"),),
}


def unknown_argument(cls: Callable[..., Any], name: str, known: Iterable[str]) -> TypeError:
    """The error for an argument that ``cls`` does not take, with a suggestion and all arguments.

    Args:
        cls: the optimizer's class, or a function.
        name: of the argument.
        known: the names of the arguments that it takes.
    """
    known = list(known)
    here = next((text for has, text in ELSEWHERE.get(name, ()) if not has or has in known), None)
    near = get_close_matches(name, known, n=1)
    hint = f" (here: {here})" if here else f" (did you mean {near[0]}?)" if near else ""
    return TypeError(
        f"{name}: unknown argument of {cls.__name__}{hint}; known are {', '.join(known)}"
    )

"""TurboAdam: AdamW with CoState for its first moment and 1Q for its second."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from optstate_codecs import FP32, Adam, CodedOptimizer, Format, Rule, checks
from optstate_codecs.formats import CoState, OneQ
from optstate_codecs.writes import write_named

__all__ = ["TurboAdam"]

M_BITS, V_BITS = (1, 2, 3, 4, 6), (2, 3, 4, 6, 8)
#: what each mode sets where an argument is None
MODES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "feedback": {"m_bits": 2, "v_bits": 3, "block_size": 64, "error_feedback": True},
        "adamw": {"m_bits": 4, "v_bits": 3, "block_size": 128, "error_feedback": False},
    }
)


class TurboAdam(CodedOptimizer):
    """AdamW with ``m_bits + v_bits + 32 / block_size`` bits of state per parameter; default 5.5.

    The first moment is stored in update units as *CoState*, a sign and a costate (null, phase or
    amplitude); the second as *1Q*, its root on a logarithmic grid. Decoding uses stored state only,
    and the step on decoded moments is exact AdamW. Weight decay is decoupled.

    ``mode`` sets ``m_bits``, ``v_bits``, ``block_size`` and ``error_feedback`` where these are
    None:

    - "feedback", the default: 2, 3, 64 and True, which is 5.5 bits. The sum of all steps is
      AdamW's, and the timing differs: a step includes what rounding took from the next ones. Small
      corrections are lost in bfloat16 and float16 parameters that are rounded to nearest, so use
      ``bf16_stochastic_round`` or ``master_weight_bits`` with these.
    - "adamw": 4, 3, 128 and False, which is 7.25 bits. Each step is AdamW's within rounding that
      is unbiased.

    Arguments up to ``min_m_compress_elements`` can be positional. Those from ``block_size`` on,
    except ``error_feedback``, ``capturable`` and ``mode``, define how moments are stored. They can
    be set per group. A checkpoint with other settings, such as those of the other mode, is encoded
    again when it is loaded; the optimizer keeps its own settings.

    Args:
        params: tensors, ``named_parameters()``, or dicts of param groups; float16, bfloat16,
            float32 or float64.
        lr: learning rate, at least 0; a float or one-element tensor.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the root of the second moment, at least 0.
        weight_decay: the parameter is multiplied by ``1 - lr * weight_decay``; at least 0.
        block_size: elements that share a scale, a power of two from 16 to 8192. None: 64 in mode
            "feedback", 128 in mode "adamw".
        v_bits: bits per element of the second moment: 2, 3, 4, 6 or 8. None: 3.
        compress_m: False keeps the first moment in float32.
        compress_v: False keeps the second moment in float32.
        null_pct: share of a normal block's smallest first moments that is encoded as null, that
            is zero; from 0 to below 1. Must be 0 with ``m_bits`` of 1 or 2.
        amp_pct: share of a normal block's magnitudes below the amplitude costate, above 0 and
            below 1. It sets the distance of levels; magnitudes above the highest level are
            clipped. None means 0.8 with ``m_bits=2``; with more bits the largest magnitude becomes
            the highest level. Must be None with ``m_bits=1``.
        error_feedback: apply the rounding error of the first moment to the parameter at once, so
            that the sum of all steps stays AdamW's. It needs no memory. It selects
            ``m_rounding="nearest"``; a ``block_size`` of 64 is recommended with it. None: the
            mode's, and False with ``compress_m=False``.
        capturable: allow a CUDA graph to record steps.
        min_m_compress_elements: tensors with fewer elements keep the first moment in float32.
        m_bits: bits per element of the first moment: 1, 2, 3, 4 or 6. None: 2 in mode "feedback",
            4 in mode "adamw". With 2 bits, no ``error_feedback`` and a large vocabulary the loss
            ends higher, since rows of an embedding get gradients rarely.
        min_v_compress_elements: tensors with fewer elements keep the second moment in float32.
        m_rounding: "stochastic": evenly spaced levels, unbiased rounding. "nearest": levels of the
            smallest squared error and a least-squares scale, for ``m_bits`` of 1 to 4 without
            ``null_pct`` and ``amp_pct``; it is biased, so it needs ``error_feedback``. None:
            "nearest" with ``error_feedback`` where these allow it, else "stochastic".
        mode: "feedback" or "adamw", see above. Arguments that are given win over it.
        bf16_stochastic_round: round bfloat16 parameters stochastically, so that steps below
            their precision are kept in the mean.
        master_weight_bits: 24 or 32 keeps the rounding error of bfloat16 and float16 parameters,
            in 1 or 2 bytes each; not together with ``bf16_stochastic_round``.
        **options: ``rounding_seed``, ``backend``, ``skip_nonfinite``, ``max_grad_norm`` (see
            ``CodedOptimizer``), ``maximize``, ``amsgrad`` (``v_bits`` more per parameter) and the
            flags ``foreach``, ``fused``, ``differentiable``.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value, or conflicts with another;
            the message names it.

    Examples:
        >>> optimizer = TurboAdam(model.parameters(), lr=3e-4, weight_decay=0.1)
    """

    rule_type = Adam
    storage_options = (
        "block_size",
        "v_bits",
        "compress_m",
        "compress_v",
        "null_pct",
        "amp_pct",
        "min_m_compress_elements",
        "m_bits",
        "min_v_compress_elements",
        "m_rounding",
    )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        block_size: int | None = None,
        v_bits: int | None = None,
        compress_m: bool = True,
        compress_v: bool = True,
        null_pct: float = 0.0,
        amp_pct: float | None = None,
        error_feedback: bool | None = None,
        capturable: bool = False,
        min_m_compress_elements: int = 4096,
        *,
        m_bits: int | None = None,
        min_v_compress_elements: int = 4096,
        m_rounding: str | None = None,
        mode: str = "feedback",
        bf16_stochastic_round: bool = False,
        master_weight_bits: int | None = None,
        **options: Any,
    ) -> None:
        checks.one_of("mode", mode, tuple(MODES))
        given = {"block_size": block_size, "v_bits": v_bits, "m_bits": m_bits}
        storage: dict[str, Any] = {k: MODES[mode][k] if n is None else n for k, n in given.items()}
        compress_m = checks.flag("compress_m", compress_m)
        if error_feedback is None:
            error_feedback = compress_m and MODES[mode]["error_feedback"]
        error_feedback = checks.flag("error_feedback", error_feedback)
        if error_feedback and not compress_m:
            raise ValueError(
                "error_feedback=True: must be False with compress_m=False, since nothing is "
                "rounded off"
            )
        super().__init__(
            params,
            Adam(decoupled=True, error_feedback=error_feedback),
            formats=None,
            write=write_named(bf16_stochastic_round, master_weight_bits),
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            compress_m=compress_m,
            compress_v=compress_v,
            null_pct=null_pct,
            amp_pct=amp_pct,
            capturable=capturable,
            min_m_compress_elements=min_m_compress_elements,
            min_v_compress_elements=min_v_compress_elements,
            **storage,
            **_rounding_option(m_rounding, error_feedback),
            **options,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; an invalid one leaves the optimizer unchanged."""
        for name in ("mode", "error_feedback"):
            if name in param_group:
                raise ValueError(
                    f"{name}={param_group[name]!r}: must be an argument of the optimizer, which "
                    "holds for all groups"
                )
        super().add_param_group(param_group)

    def group_formats(self, group: Mapping[str, Any]) -> dict[str, Format]:
        formats = {"exp_avg": _first_moment(group, self.rule), "exp_avg_sq": _second_moment(group)}
        if group["amsgrad"]:
            formats["max_exp_avg_sq"] = formats["exp_avg_sq"]
        return formats


def _first_moment(group: Mapping[str, Any], rule: Rule) -> Format:
    bits, amp_pct, null_pct = group["m_bits"], group["amp_pct"], group["null_pct"]
    _check_storage(group, "m", M_BITS)
    if bits == 1 and amp_pct is not None:
        raise ValueError(f"amp_pct={amp_pct!r}: must be None with m_bits=1, which has one costate")
    if checks.share("null_pct", null_pct) and bits <= 2:
        raise ValueError(
            f"null_pct={null_pct!r}: must be 0 with m_bits={bits}, which has no code for null"
        )
    coded = CoState(
        bits=bits,
        block_size=group["block_size"],
        amp_pct=amp_pct,
        null_pct=null_pct,
        levels="normal" if _rounds_to_nearest(group, rule) else "even",
        min_elements=group["min_m_compress_elements"],
    )
    return coded if group["compress_m"] else FP32()


def _rounding_option(rounding: str | None, error_feedback: bool) -> dict[str, Any]:
    """The group option ``m_rounding``, or none, which means "stochastic".

    Groups without it are those of versions before it, whose flattened checkpoints load with exactly
    their keys.
    """
    if rounding == "stochastic" or (rounding is None and not error_feedback):
        return {}
    return {"m_rounding": rounding}


def _rounds_to_nearest(group: Mapping[str, Any], rule: Rule) -> bool:
    """Whether the first moment is rounded to the nearest of levels for a normal distribution."""
    rounding = group.get("m_rounding", "stochastic")
    excluded = {
        "m_bits": group["m_bits"] > 4,
        "amp_pct": group["amp_pct"] is not None,
        "null_pct": group["null_pct"] != 0,
    }
    if rounding is None:
        return rule.has_error_feedback and not any(excluded.values())
    checks.one_of("m_rounding", rounding, ("stochastic", "nearest"))
    if rounding == "nearest" and any(excluded.values()):
        name = next(name for name, excludes in excluded.items() if excludes)
        raise ValueError(
            f"m_rounding='nearest': must be None or 'stochastic' with {name}={group[name]!r}"
        )
    return bool(rounding == "nearest")


def _second_moment(group: Mapping[str, Any]) -> Format:
    _check_storage(group, "v", V_BITS)
    coded = OneQ(
        bits=group["v_bits"],
        block_size=group["block_size"],
        min_elements=group["min_v_compress_elements"],
    )
    return coded if group["compress_v"] else FP32()


def _check_storage(group: Mapping[str, Any], moment: str, allowed: tuple[int, ...]) -> None:
    """Raise unless the storage options of ``moment``, "m" or "v", are valid."""
    name = f"{moment}_bits"
    bits = checks.whole_number(name, group[name])
    if bits not in allowed:
        raise ValueError(f"{name}={bits}: must be one of {', '.join(map(str, allowed))}")
    checks.flag(f"compress_{moment}", group[f"compress_{moment}"])
    min_elements = f"min_{moment}_compress_elements"
    checks.whole_number(min_elements, group[min_elements])

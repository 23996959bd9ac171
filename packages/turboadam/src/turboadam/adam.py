"""TurboAdam: AdamW with CoState for its first moment and 1Q for its second."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from optstate_codecs import FP32, Adam, CodedOptimizer, Format, Rule, checks
from optstate_codecs.formats import CoState, OneQ
from optstate_codecs.writes import write_named

__all__ = ["TurboAdam"]

M_BITS, V_BITS = (1, 2, 3, 4, 6), (2, 3, 4, 6, 8)


class TurboAdam(CodedOptimizer):
    """AdamW with ``m_bits + v_bits + 32 / block_size`` bits of state per parameter; default 7.25.

    The first moment is stored in update units as *CoState*, a sign and a costate (null, phase or
    amplitude); the second as *1Q*, its root on a logarithmic grid. Decoding uses stored state only,
    and the step on decoded moments is exact AdamW. Weight decay is decoupled.

    Arguments up to ``min_m_compress_elements`` can be positional. Those from ``block_size`` on,
    except ``error_feedback`` and ``capturable``, define how moments are stored. They can be set per
    group, and a checkpoint with other settings is encoded again when it is loaded.

    Args:
        params: tensors, ``named_parameters()``, or dicts of param groups; float16, bfloat16,
            float32 or float64.
        lr: learning rate, at least 0; a float or one-element tensor.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the root of the second moment, at least 0.
        weight_decay: the parameter is multiplied by ``1 - lr * weight_decay``; at least 0.
        block_size: elements that share a scale, a power of two from 16 to 8192.
        v_bits: bits per element of the second moment: 2, 3, 4, 6 or 8.
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
            ``m_rounding="nearest"``; a ``block_size`` of 64 is recommended with it.
        capturable: allow a CUDA graph to record steps.
        min_m_compress_elements: tensors with fewer elements keep the first moment in float32.
        m_bits: bits per element of the first moment: 1, 2, 3, 4 or 6. With 2 bits and large
            vocabularies the loss ends higher, since rows of an embedding get gradients rarely; use
            4 for the embedding's group.
        min_v_compress_elements: tensors with fewer elements keep the second moment in float32.
        m_rounding: "stochastic": evenly spaced levels, unbiased rounding. "nearest": levels of the
            smallest squared error and a least-squares scale, for ``m_bits`` of 1 to 4 without
            ``null_pct`` and ``amp_pct``; it is biased, so it needs ``error_feedback``. None:
            "nearest" with ``error_feedback`` where these allow it, else "stochastic".
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
        block_size: int = 128,
        v_bits: int = 3,
        compress_m: bool = True,
        compress_v: bool = True,
        null_pct: float = 0.0,
        amp_pct: float | None = None,
        error_feedback: bool = False,
        capturable: bool = False,
        min_m_compress_elements: int = 4096,
        *,
        m_bits: int = 4,
        min_v_compress_elements: int = 4096,
        m_rounding: str | None = None,
        bf16_stochastic_round: bool = False,
        master_weight_bits: int | None = None,
        **options: Any,
    ) -> None:
        error_feedback = checks.flag("error_feedback", error_feedback)
        if error_feedback and not checks.flag("compress_m", compress_m):
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
            block_size=block_size,
            v_bits=v_bits,
            compress_m=compress_m,
            compress_v=compress_v,
            null_pct=null_pct,
            amp_pct=amp_pct,
            capturable=capturable,
            min_m_compress_elements=min_m_compress_elements,
            m_bits=m_bits,
            min_v_compress_elements=min_v_compress_elements,
            **_rounding_option(m_rounding, error_feedback),
            **options,
        )

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
    if bits <= 2 and null_pct != 0:
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

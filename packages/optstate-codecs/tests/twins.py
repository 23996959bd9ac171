"""An optimizer on the reference path and its twin on another, held to the same steps."""

from collections.abc import Callable

from optstate_codecs import Adam, CodedOptimizer
from optstate_codecs.testing import Trainer

Compare = Callable[[Trainer, Trainer], tuple[int, int]]


def pair(backend, formats: tuple[str, str, str], shapes, dtype, device="cpu", **options):
    """The reference on the CPU and ``backend`` on ``device``, over equal parameters.

    ``formats`` are those of first moments, of second moments and of ``smoothing``.
    """
    chosen = dict.fromkeys(("exp_avg", "momentum_buffer", "ema"), formats[0])
    chosen |= dict.fromkeys(("exp_avg_sq", "max_exp_avg_sq", "ema_squared"), formats[1])
    chosen["smoothing"] = formats[2]
    rule = options.pop("rule", None) or Adam(decoupled=options.pop("decoupled", True))

    def make(backend):
        return lambda params: CodedOptimizer(params, rule, chosen, backend=backend, **options)

    reference = Trainer(make("eager"), shapes, dtype)
    return reference, Trainer(make(backend), shapes, dtype, device)


def synchronise(reference: Trainer, twin: Trainer) -> None:
    twin.optimizer.load_state_dict(reference.optimizer.state_dict())
    for theirs, ours in zip(reference.params, twin.params, strict=True):
        ours.data.copy_(theirs.data)


def run(compare: Compare, reference: Trainer, twin: Trainer, steps: int = 4) -> None:
    """Step both; ``compare`` counts elements and differing codes, which may be 1 in 10,000."""
    total = different = 0
    for _ in range(steps):
        reference.run(1)
        twin.run(1)
        counts = compare(reference, twin)
        total, different = total + counts[0], different + counts[1]
        synchronise(reference, twin)
    assert different <= max(2, 1e-4 * total)

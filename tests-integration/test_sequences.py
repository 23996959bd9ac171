"""Sequences of random operations for one optimizer of each kind; ``sequences`` has the machine."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from sequences import Sequences, Subject

import lowbit_adam
import stochbf16
from optstate_codecs import Adam, CodedOptimizer
from optstate_codecs.rules import SGD
from optstate_wrap import ConfigurablePolicy, wrap
from turboadam import TurboAdam

EXACT = dict.fromkeys(("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"), "fp32")
FLOAT32 = (torch.float32,)


def torch_adamw(params, **options):
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.01, **options)


def exact(rule, twin, **options):
    make = partial(CodedOptimizer, rule=rule, formats=EXACT, **options)
    return Subject(make, twin, torch_class=twin, dtypes=FLOAT32, exact=True)


def coded(make, *others, torch_class=None, **options):
    return Subject(make, make, others=(make, *others) if others else (), torch_class=torch_class)


def wrapped(inner, policy, **options):
    def make(params):
        found = wrap(inner(params), policy, chunk_size=256, **options)
        # decoded checkpoints are rounded once more
        found.packed_checkpoints = True
        return found

    return make


CODES = {"exp_avg": "int8(rounding=stochastic, units=update)", "exp_avg_sq": "oneq(bits=8)"}
eight_wrapped = wrapped(torch_adamw, ConfigurablePolicy(CODES))
eight = partial(lowbit_adam.AdamW8bit, lr=1e-2, block_size=64)
four = partial(lowbit_adam.AdamW4bit, lr=1e-2, block_size=32)
turbo = partial(
    TurboAdam,
    lr=1e-2,
    mode="adamw",
    min_m_compress_elements=100,
    min_v_compress_elements=200,
    block_size=32,
)
SUBJECTS = {
    "exact-adamw": exact(Adam(decoupled=True), torch_adamw, lr=1e-2, weight_decay=0.01),
    "exact-adam-amsgrad": exact(
        Adam(), partial(torch.optim.Adam, lr=1e-2, amsgrad=True), lr=1e-2, amsgrad=True
    ),
    "exact-sgd": exact(
        SGD(), partial(torch.optim.SGD, lr=1e-2, momentum=0.9), lr=1e-2, momentum=0.9
    ),
    "8-bit": coded(eight, partial(eight, block_size=256), four, torch_class=torch_adamw),
    "8-bit-compiled": coded(partial(eight, backend="compile")),
    "4-bit": coded(four, partial(four, block_size=64), torch_class=torch_adamw),
    "8-bit-master": replace(coded(partial(eight, master_weight_bits=24)), dtypes=(torch.bfloat16,)),
    "turbo": coded(turbo, partial(turbo, m_bits=2, v_bits=4), torch_class=torch_adamw),
    "turbo-flushed": coded(partial(turbo, m_bits=1, error_feedback=True)),
    "stochbf16-adamw": coded(partial(stochbf16.AdamW, lr=1e-2)),
    "stochbf16-sgd": coded(partial(stochbf16.SGD, lr=1e-2, momentum=0.9)),
    "wrapped": Subject(eight_wrapped, eight_wrapped, dtypes=FLOAT32),
    "wrapped-in-chunks": Subject(
        *(2 * [wrapped(torch_adamw, ConfigurablePolicy(CODES), fused=False)]), dtypes=FLOAT32
    ),
    "wrapped-exact": Subject(
        wrapped(torch_adamw, ConfigurablePolicy({}), store="host"),
        torch_adamw,
        dtypes=FLOAT32,
        exact=True,
    ),
    "lion-8bit": coded(partial(lowbit_adam.Lion8bit, lr=1e-3, block_size=64)),
}
THOROUGH = settings.get_current_profile_name() == "thorough"
FEW = settings(
    max_examples=1000 if THOROUGH else 5,
    stateful_step_count=40 if THOROUGH else 20,
    derandomize=not THOROUGH,
    deadline=None,
    database=None,
    # explaining takes minutes
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)


# wrapped optimizers do not look for numbers that are not finite
CASES = [(name, False) for name in SUBJECTS] + [
    (name, True) for name in SUBJECTS if not name.startswith("wrapped")
]


@pytest.mark.parametrize(
    ("name", "skipping"), CASES, ids=lambda value: {True: "skipping", False: ""}.get(value, value)
)
def test_sequences(name: str, skipping: bool, tmp_path: Path) -> None:
    subject = SUBJECTS[name]
    if skipping:
        make = partial(subject.make, skip_nonfinite=True)
        subject = replace(subject, make=make, others=())
    machine = type(
        name, (Sequences,), {"subject": subject, "skipping": skipping, "folder": tmp_path}
    )
    run_state_machine_as_test(machine, settings=FEW)

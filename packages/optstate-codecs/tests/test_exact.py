"""Operations that round once everywhere, and what is asked of torch's own."""

import hashlib
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy
import pytest
import torch

from optstate_codecs import exact, parse_format
from optstate_codecs.rounding import Counter

FORMATS = (
    "dynamic8(block_size=64, signed=False, domain=sqrt)",
    "dynamic8(base=10, block_size=64, rounding=stochastic)",
    "minifloat(block_size=64, domain=sqrt, rounding=stochastic)",
    "oneq(block_size=64)",
    "costate(bits=1, block_size=64)",
    "costate(bits=2, block_size=64)",
    "int8",
    "int4",
    "fp8",
)
# those of torch's instruction sets that this processor has for certain
CAPABILITIES = ["default"]
if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
    CAPABILITIES.append("avx2")


def numbers(count: int, seed: int = 0) -> torch.Tensor:
    # not normal ones, whose last bits depend on the processor
    generator = torch.Generator().manual_seed(seed)
    power = torch.randint(-60, 60, (count,), generator=generator)
    return (torch.rand(count, generator=generator) - 0.5) * torch.exp2(power.float())


def fused(x: float, factor: float, offset: float) -> float:
    """The float32 nearest to the exact sum; ties to even."""
    due = Fraction(x) * Fraction(factor) + Fraction(offset)
    near = numpy.float32(float(due))
    around = [numpy.nextafter(near, way * numpy.float32(numpy.inf)) for way in (-1, 1)]
    apart = {abs(Fraction(float(n)) - due): n for n in (*around, near)}
    best = min(apart)
    tied = [n for n in (*around, near) if abs(Fraction(float(n)) - due) == best]
    return float(min(tied, key=lambda n: int(n.view(numpy.int32)) & 1))


def test_square_roots_are_rounded_correctly() -> None:
    x = numbers(20_000).abs()
    special = torch.tensor([0.0, -0.0, 1e-45, 3e-39, 4.0, float("inf"), 3.4e38])
    for values in (x, special, x[:7], x[::3], x[0]):
        due = values.double().sqrt().float()
        assert torch.equal(exact.sqrt(values), due)
    assert exact.sqrt(torch.tensor([-1.0, float("nan"), -float("inf")])).isnan().all()
    assert torch.equal(exact.sqrt(x.clone().requires_grad_()), x.double().sqrt().float())
    wide = x.double()
    assert torch.equal(exact.sqrt(wide).square().float(), x)


@pytest.mark.parametrize("once", [True, False], ids=["torch-fuses", "torch-does-not"])
def test_a_product_and_a_sum_are_rounded_once(once, monkeypatch) -> None:
    if once and not (exact.rounds_once("add") and exact.rounds_once("add", exact.TAIL)):
        pytest.skip("torch rounds twice on this processor")
    monkeypatch.setattr(exact, "rounds_once", lambda *_: once)
    step = 2.0**-23
    # the last ones are rounded twice in float64: to a tie, and from there the wrong way
    cases = [(x, 1 / 7, 6 / 7) for x in numbers(300).tolist()]
    cases += [(x, 3.0, -1.0) for x in (1 / 3, -1 / 3, 2.0**-26, 0.0)]
    cases += [(side * (1 - step) / 2**24, 1 + step, side * (1 + step)) for side in (1, -1)]
    for x, factor, offset in cases:
        x, factor, offset = (float(numpy.float32(n)) for n in (x, factor, offset))
        got = exact.multiply_add(torch.tensor([x]), factor, offset)
        assert float(got) == fused(x, factor, offset), (x, factor, offset)
    infinite = torch.tensor([float("inf"), -float("inf"), float("nan")])
    out = torch.empty(3)
    assert exact.multiply_add(infinite, 2.0, 1.0, out=out) is out
    torch.testing.assert_close(out, infinite, equal_nan=True)


def test_rows_are_added_up_in_one_order() -> None:
    generator = torch.Generator().manual_seed(0)
    for columns in (1, 2, 3, 7, 64, 100, 129):
        x = torch.rand(5, columns, generator=generator)
        assert exact.row_sums(x).shape == (5, 1)
        torch.testing.assert_close(exact.row_sums(x), x.sum(1, keepdim=True))
        alone = torch.cat([exact.row_sums(row[None]) for row in x])
        assert torch.equal(exact.row_sums(x), alone)
    assert exact.row_sums(torch.empty(0, 1)).shape == (0, 1)


def codes() -> str:
    """A digest of what each format stores of some numbers, and of what that decodes to."""
    found = []
    for spec in FORMATS:
        format = parse_format(spec)
        x = numbers(3000) if format.keeps_sign else numbers(3000).abs()
        parts = [torch.zeros(c.length(3000), dtype=c.dtype) for c in format.components]
        format.encode(x, parts, Counter(0, 5, 0).stream(1))
        digest = hashlib.sha256()
        for part in [*parts, format.decode(parts)]:
            digest.update(part.view(torch.uint8).numpy().tobytes())
        found.append(f"{spec}: {digest.hexdigest()}")
    return "\n".join(found)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_codes_do_not_depend_on_the_processor(capability) -> None:
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    script += "import test_exact; print(test_exact.codes())"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == codes()

"""One run: it learns, it repeats, and what it records is what happened."""

from dataclasses import replace

import pytest
import torch
from rich.console import Console

from lowbit_adam import AdamW8bit
from optstate.demo.compare import compare
from optstate.demo.data import Corpus
from optstate.demo.record import Run
from optstate.demo.settings import Settings
from optstate.demo.train import FLOOR, build_model, evaluation_steps, schedule, train
from optstate.optimizers import check_usable, with_arguments
from optstate_codecs.testing import DEFAULTS, torch_defaults


def test_it_learns(corpus: Corpus, settings: Settings) -> None:
    run = train("AdamW", torch.optim.AdamW, corpus, replace(settings, steps=40))
    assert run.validation_loss < 0.75 * run.train[0]


def test_equal_seeds_give_equal_losses(corpus: Corpus, settings: Settings) -> None:
    first = train("first", torch.optim.AdamW, corpus, settings)
    torch.manual_seed(1234)
    second = train("second", torch.optim.AdamW, corpus, settings)
    other = train("other", torch.optim.AdamW, corpus, replace(settings, seed=1))
    assert first.train == second.train
    assert first.validation == second.validation
    assert first.train != other.train


def test_a_run_leaves_the_global_generator_alone(settings: Settings) -> None:
    before = torch.random.get_rng_state()
    build_model(settings)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_torchs_default_dtype_changes_no_loss(
    corpus: Corpus, settings: Settings, dtype: torch.dtype
) -> None:
    expected = train("usual", torch.optim.AdamW, corpus, settings)
    with torch_defaults(dtype):
        found = train("other", torch.optim.AdamW, corpus, settings)
    assert found.train == expected.train
    assert found.validation == expected.validation


@pytest.mark.parametrize(("dtype", "device"), DEFAULTS)
def test_torchs_defaults_change_no_weight(
    settings: Settings, dtype: torch.dtype, device: str | None
) -> None:
    expected = build_model(settings)
    with torch_defaults(dtype, device):
        found = build_model(settings)
        check_usable("AdamW8bit", AdamW8bit, 1e-3)
    assert all(map(torch.equal, found.parameters(), expected.parameters()))
    assert all(map(torch.equal, found.buffers(), expected.buffers()))


def test_a_run_records_every_step(corpus: Corpus, settings: Settings) -> None:
    seen: list[int] = []
    run = train(
        "SGD", torch.optim.SGD, corpus, settings, lambda so_far: seen.append(len(so_far.train))
    )
    assert seen == [1, 2, 3, 4, 5, 6]
    assert len(run.step_ms) == len(run.update_ms) == 6
    assert all(whole > update > 0 for whole, update in zip(run.step_ms, run.update_ms, strict=True))
    assert [step for step, _ in run.validation] == [3, 6]
    assert run.parameters == sum(p.numel() for p in build_model(settings).parameters())


def test_summaries() -> None:
    run = Run("made up", parameters=10, train=[9.0] * 18 + [1.0, 2.0], step_ms=[100.0, 1.0, 2.0])
    run.validation = [(10, 4.0), (20, 3.0)]
    assert run.train_loss == 1.5
    assert run.validation_loss == 3.0
    assert run.ms_per_step == 2.0


@pytest.mark.parametrize("steps", [1, 2, 5, 300])
def test_schedule_rises_then_falls(steps: int) -> None:
    share = schedule(steps)
    shares = [share(done) for done in range(steps)]
    peak = shares.index(1.0)
    assert shares[: peak + 1] == sorted(shares[: peak + 1])
    assert shares[peak:] == sorted(shares[peak:], reverse=True)
    assert min(shares) > 0
    assert share(steps) == pytest.approx(FLOOR if steps > 1 else 1.0)


@pytest.mark.parametrize(
    ("steps", "evaluations", "expected"),
    [(300, 6, {50, 100, 150, 200, 250, 300}), (1, 6, {1}), (4, 3, {2, 3, 4})],
)
def test_last_step_is_always_validated(steps: int, evaluations: int, expected: set[int]) -> None:
    assert evaluation_steps(steps, evaluations) == expected


def test_arguments_reach_what_is_compared(corpus: Corpus, settings: Settings) -> None:
    given = [
        (text, with_arguments(AdamW8bit, text)) for text in ("", "block_size=64,betas=(0.9,0.95)")
    ]
    usual, smaller = compare(given, corpus, settings, Console(quiet=True)).runs
    # two float32 scales for 64 elements in place of 2,048
    difference = smaller.state_bytes_per_parameter - usual.state_bytes_per_parameter
    assert difference == pytest.approx(8 / 64 - 8 / 2048, rel=0.1)
    assert smaller.train[0] == usual.train[0]
    assert smaller.train[-1] != usual.train[-1]

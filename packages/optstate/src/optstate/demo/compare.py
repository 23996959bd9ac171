"""Trains with all optimizers of a comparison, and shows the progress of each run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from optstate.demo.data import Corpus
from optstate.demo.record import Run
from optstate.demo.settings import Settings
from optstate.demo.train import evaluation_steps, train


@dataclass(frozen=True)
class Comparison:
    """Finished runs, the baseline first, and the settings that they share."""

    settings: Settings
    runs: tuple[Run, ...]

    @property
    def baseline(self) -> Run:
        """The run to which the others are compared."""
        return self.runs[0]

    def loss_difference(self, run: Run) -> float:
        """Validation loss against the baseline's, in percent; above 0 is worse."""
        return 100 * (run.validation_loss / self.baseline.validation_loss - 1)

    def state_share(self, run: Run) -> float | None:
        """State bytes in percent of the baseline's, or None if the baseline keeps no state."""
        if not run.memory or not self.baseline.memory or not self.baseline.memory.state:
            return None
        return 100 * run.memory.state / self.baseline.memory.state


def compare(
    optimizers: Sequence[tuple[str, Callable[..., torch.optim.Optimizer]]],
    corpus: Corpus,
    settings: Settings,
    console: Console,
) -> Comparison:
    """Trains with every optimizer in turn.

    Args:
        optimizers: Full names and classes (called with parameters and ``lr``), baseline first.
        corpus: The text.
        settings: Shared by all runs.
        console: Output of progress: a live bar in a terminal, or a line at each validation in a
            file or a pipe.
    """
    width = max(len(short(name)) for name, _ in optimizers)
    columns = (
        TextColumn(f"{{task.description:<{width}}}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    runs = []
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for name, make in optimizers:
            task = progress.add_task(short(name), total=settings.steps, figures="")
            watcher = _Watcher(progress, task, settings)
            runs.append(train(name, make, corpus, settings, watcher))
    return Comparison(settings, tuple(runs))


class _Watcher:
    """Shows a run's progress after every step."""

    def __init__(self, progress: Progress, task: TaskID, settings: Settings) -> None:
        self._progress = progress
        self._task = task
        self._milestones = evaluation_steps(settings.steps, settings.evaluations)

    def __call__(self, run: Run) -> None:
        figures = f"loss {run.train_loss:.3f}  {steps_per_second(run):.1f} steps/s"
        self._progress.update(self._task, completed=len(run.train), figures=figures)
        if self._progress.disable and len(run.train) in self._milestones:
            self._progress.console.print(
                f"{short(run.name)}: step {len(run.train)}, {figures},"
                f" validation {run.validation_loss:.3f}",
                highlight=False,
                soft_wrap=True,
            )


def steps_per_second(run: Run, recent: int = 20) -> float:
    """Mean speed of the last few steps."""
    window = run.step_ms[-recent:]
    return 1e3 * len(window) / sum(window)


def short(name: str) -> str:
    """The class name, such as ``AdamW8bit``, with its module if torch has a class of that name."""
    module, _, alone = name.rpartition(".")
    return name if module != "torch.optim" and hasattr(torch.optim, alone) else alone

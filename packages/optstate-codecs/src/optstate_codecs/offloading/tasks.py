"""Tasks on a thread pool that keep their work until it succeeds."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future, wait
from contextlib import suppress
from threading import Lock

__all__ = ["Task"]


class Task:
    """Work on a thread pool that is done again, when its result is asked for, if it failed.

    The data that the work needs is kept until then: data that a full disk refused is written once
    there is room. A task may wait for tasks that were submitted to the pool before it.

    Args:
        pool: its threads hold no reference to the task once it has succeeded.
        work: a function that may be called twice.
    """

    def __init__(self, pool: Executor, work: Callable[[], object]) -> None:
        self._work: Callable[[], object] | None = work
        self._lock = Lock()
        try:
            self._future = pool.submit(self._try)
        except RuntimeError:
            # no thread can be started, or the interpreter exits: as if the work had failed once
            self._future = Future()
            self._future.set_result(None)

    def _do(self) -> None:
        with self._lock:
            if self._work is not None:
                self._work()
                self._work = None

    def _try(self) -> None:
        # errors are ignored here: ``result`` tries again and raises
        with suppress(Exception):
            self._do()

    @property
    def failed(self) -> bool:
        """Whether the work has been tried and must be done again."""
        return self._future.done() and self._work is not None

    def done(self) -> bool:
        """Whether ``result`` would return without waiting."""
        return self._future.done()

    def wait(self) -> None:
        """Wait until the work has been tried."""
        wait([self._future])

    def result(self) -> None:
        """Wait for the work, and do it again if it failed; raises its error if that fails too."""
        self.wait()
        self._do()

"""Work on other threads that is not lost where it fails."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, wait
from contextlib import suppress
from threading import Lock

__all__ = ["Task"]


class Task:
    """Work given to a pool, which whoever asks for its result does again where it has failed.

    What it works on stays until it has succeeded: what a full disk did not take is written once
    there is room. A task may wait for those that were given to the pool before it.

    Args:
        pool: whose threads hold no reference to the task once it has succeeded.
        work: that may be done twice.
    """

    def __init__(self, pool: Executor, work: Callable[[], object]) -> None:
        self._work: Callable[[], object] | None = work
        self._lock = Lock()
        self._future = pool.submit(self._try)

    def _do(self) -> None:
        with self._lock:
            if self._work is not None:
                self._work()
                self._work = None

    def _try(self) -> None:
        # who asks for the result gets the exception
        with suppress(Exception):
            self._do()

    @property
    def failed(self) -> bool:
        """Whether it has been tried, and has to be again."""
        return self._future.done() and self._work is not None

    def done(self) -> bool:
        """Whether ``result`` would not wait."""
        return self._future.done()

    def wait(self) -> None:
        """Wait until it has been tried."""
        wait([self._future])

    def result(self) -> None:
        """Wait for it; raises what it does if it fails once more."""
        self.wait()
        self._do()

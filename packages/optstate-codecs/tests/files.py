"""Optimizers whose state is in a file, opened again."""

import copy
import os
import traceback
import warnings
from collections.abc import Callable

import pytest
import torch
from offloads import assert_alike, run
from subjects import adam
from torch.nn import Parameter

from optstate_codecs.offloading import offload

DYNAMIC = ("dynamic8(units=update)", "dynamic8(signed=False, rounding=stochastic)")


def make(given, **options):
    return adam(*DYNAMIC, **{"lr": 0.01, "backend": "eager", **options})(given)


def files(path):
    """The names of the files beside it."""
    return sorted(p.name for p in path.parent.iterdir())


def reopened(pair, make, path, **options):
    """The second optimizer of a pair, gone and made anew from its file."""
    pair.optimizers = pair.optimizers[0], None
    again = offload(make(pair.params[1]), "disk", path=path, resume=True, **options)
    pair.optimizers = pair.optimizers[0], again
    return pair


def refused(given, make, path, words):
    """Raise unless resuming raises ``words`` and leaves an optimizer with state as it was."""
    mine = [Parameter(p.detach().clone()) for p in given]
    optimizer = make(mine)
    run(mine, optimizer, 0)
    before = copy.deepcopy((optimizer.state_dict(), mine))
    with pytest.raises(ValueError, match=words):
        offload(optimizer, "disk", path=path, resume=True)
    assert optimizer.offloaded is None
    again = make(before[1])
    again.load_state_dict(before[0])
    run(mine, optimizer, 1)
    run(before[1], again, 1)
    assert_alike((mine, before[1]), (optimizer, again))


def forked(work: Callable[[int], object]) -> tuple[int, int]:
    """A process that does the work with a pipe to write to: its number, and the pipe to read."""
    reads, writes = os.pipe()
    with warnings.catch_warnings():
        # some versions warn of the threads that there are, which the child has no use for
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            os.close(reads)
            torch.set_num_threads(1)
            work(writes)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(writes)
    return child, reads

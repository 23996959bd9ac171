"""Device functions for tiles whose rows are blocks: pieces of rows, and reductions over rows."""

from __future__ import annotations

from optstate_codecs.triton_lib.arithmetic import MAGNITUDE, as_bits
from optstate_codecs.triton_lib.core import INTERPRET, jit, tl

__all__ = ["piece_starts", "row_amax", "row_max", "row_sum", "spread"]


@jit
def _nan_max(a, b):  # type: ignore[no-untyped-def]
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@jit
def piece_starts(LENGTH: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first offset of each of a tile's pieces of LENGTH elements.

    Rows follow each other in memory. The result has the first pieces of all rows, then the second
    pieces, and so on.
    """
    piece = tl.arange(0, PIECES)
    return (piece % ROWS) * (LENGTH * (PIECES // ROWS)) + (piece // ROWS) * LENGTH


@jit
def by_rows(x, rows):  # type: ignore[no-untyped-def]
    """Reshape a tile from [pieces, elements] to [pieces of a row, rows, elements]."""
    return tl.reshape(x, [x.shape[0] // rows.shape[0], rows.shape[0], x.shape[1]])


@jit
def spread(number, offsets):  # type: ignore[no-untyped-def]
    """Expand one number for each row to each of its pieces, [pieces, 1]."""
    if offsets.shape[0] == number.shape[0]:
        return number[:, None]
    else:
        fold: tl.constexpr = offsets.shape[0] // number.shape[0]
        every = tl.broadcast_to(number[None, :], [fold, number.shape[0]])
        return tl.reshape(every, [offsets.shape[0]])[:, None]


@jit
def row_max(x, rows):  # type: ignore[no-untyped-def]
    """Each row's largest integer."""
    if x.shape[0] == rows.shape[0]:
        return tl.max(x, axis=1)
    else:
        return tl.max(tl.max(by_rows(x, rows), axis=0), axis=1)


@jit
def row_sum(x, rows):  # type: ignore[no-untyped-def]
    """Each row's sum."""
    if x.shape[0] == rows.shape[0]:
        return tl.sum(x, axis=1)
    else:
        return tl.sum(tl.sum(by_rows(x, rows), axis=0), axis=1)


@jit
def row_amax(x, rows, SIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The bits of each row's largest magnitude: at least ``INF_BITS`` where a row is not finite.

    Without SIGNED, ``x`` has no negative numbers.
    """
    if INTERPRET:
        return row_max(as_bits(x) & MAGNITUDE, rows)
    else:
        x = tl.abs(x) if SIGNED else x
        if x.shape[0] != rows.shape[0]:
            # all pieces of a row lie in the same threads, so that they exchange nothing
            x = tl.reduce(by_rows(x, rows), 0, _nan_max)
        return as_bits(tl.reduce(x, 1, _nan_max)) & MAGNITUDE

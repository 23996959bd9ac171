"""A session for units whose state is away: it comes to the device chunk by chunk, and goes back.

The engine steps twins of the units, whose state is in the slots of a ring; what a twin is does not
change from step to step, so the engine's plans and tables stay what they are. A step is one job in
stages, one for each chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import compress

import torch
from torch import Tensor

from optstate_codecs.engine.capture import capturing
from optstate_codecs.engine.request import StepRequest, layout_of
from optstate_codecs.errors import StepError
from optstate_codecs.offloading.placement import CHUNK_BYTES, HERE, Placement, bank_of
from optstate_codecs.offloading.slabs import Part, PlacementEntry, in_order

__all__ = ["CHUNK_BYTES", "StreamingExecutor"]

# bytes of gradients that may wait for state that is on its way, of steps taken apart
WAITING = 1 << 29


class StreamingExecutor(Placement):
    """Runs jobs whose units' state a place keeps: a ``Placement`` that steps."""

    def step(self, request: StepRequest) -> None:
        """Step every unit of the job.

        Raises:
            RuntimeError: a CUDA graph is being recorded.
            ValueError, OSError: the place cannot keep what a step makes; nothing has changed.
            StepError: from what went wrong in the step; it says what has been stepped.
        """
        if capturing():
            raise RuntimeError("CUDA graph capture: state that is streamed cannot be part of it")
        if not request.param_steps:
            return
        self.place.check()
        if not self._begun:
            # what a scheduler has set since the last step belongs to its end
            self.place.restate()
        for ring in self._rings.values():
            ring.store_rest()
        self._look_for_changes(request.param_steps)
        param_steps = list(request.param_steps)
        if self.every is not None and not self._begun:
            given = set(map(id, param_steps))
            param_steps += [
                param_step for param_step in self.every() if id(param_step) not in given
            ]
            param_steps.sort(key=lambda param_step: (param_step.index, param_step.offset))
            self._forget_others(param_steps)
        self._seat(param_steps, request.grad_means is None)
        self._begun = True
        entries = [
            self._entries[param_step.index, param_step.offset] for param_step in request.param_steps
        ]
        parts = [(place, part) for place, entry in enumerate(entries) for part in entry.parts]
        device_views = self._device_views(request, parts)
        self._count_alike(entries)
        order = sorted({device_view.stage for device_view in device_views.param_steps} - {HERE})
        for slab in map(self._slab_of.__getitem__, order):
            if slab.target is None:
                # a snapshot may have it that memory is to be made: before anything changes
                self.place.target(slab)
        self._pending = self._pending or bool(order)
        try:
            with ExitStack() as stack:
                for device, ring in self._rings.items():
                    if mine := [c for n in order if (c := self._chunks[n]).device == device]:
                        ring.expect(mine)
                for ring in self._rings.values():
                    stack.enter_context(ring.working())
                self._executor.step(device_views)
        except Exception as error:
            done = set(map(id, device_views.done))
            counts = [
                sum(id(part.device_view) in done for part in entry.parts) for entry in entries
            ]
            whole = [
                count == len(entry.parts) for count, entry in zip(counts, entries, strict=True)
            ]
            request.done += compress(request.param_steps, whole)
            numbers = [param_step.index for param_step in request.param_steps]
            raise StepError.of(
                error,
                "",
                compress(numbers, whole),
                compress(numbers, [not count for count in counts]),
                compress(numbers, [c and not w for c, w in zip(counts, whole, strict=True)]),
            ) from error
        else:
            request.done += request.param_steps
        finally:
            # of those too that were not stepped: several counts have one version
            for bank in {id(bank_of(param_step)) for param_step in request.param_steps}:
                for entry in self._parted.get(bank, ()):
                    entry.version = entry.param_step.state["step"]._version
            if request.asynchronous:
                self._hold(request, device_views)
            else:
                self.join()

    def _hold(self, *requests: StepRequest) -> None:
        """Keep what a step reads until the current stream, which may reuse it, has waited."""
        marks = [(ring.device, ring.mark()) for ring in self._rings.values()]
        nbytes = sum(grad.nbytes for grad in requests[0].grads)
        self._behind.append((marks, nbytes, requests))
        while sum(size for _, size, _ in self._behind) > WAITING and len(self._behind) > 1:
            for device, mark in self._behind.popleft()[0]:
                if mark is not None:
                    torch.cuda.current_stream(device).wait_event(mark)

    def _device_views(self, request: StepRequest, parts: Sequence[tuple[int, Part]]) -> StepRequest:
        param_steps, grads, addresses, layouts = [], [], [], []
        flat: dict[int, Tensor] = {}
        for place, part in parts:
            param_step, grad = request.param_steps[place], request.grads[place]
            device_view = part.device_view
            assert device_view is not None
            if device_view.param is not param_step.param:
                if place not in flat:
                    # once for all parts: where it does not lie like the parameter, it is a copy
                    flat[place] = in_order(grad, param_step.param)
                grad = flat[place][part.start : part.stop]
                addresses.append(grad.data_ptr())
                layouts.append((grad.dtype, part.stop - part.start))
            else:
                addresses.append(request.addresses[place])
                layouts.append(request.layouts[place] if request.layouts else layout_of(grad))
            param_steps.append(device_view)
            grads.append(grad)
        means = request.grad_means
        if means is not None:
            means = replace(means, starts=[means.starts[place] for place, _ in parts])
        return replace(
            request,
            param_steps=param_steps,
            grads=grads,
            addresses=addresses,
            layouts=layouts,
            grad_means=means,
            done=[],
            counted=[],
            staging=self._around,
        )

    @contextmanager
    def _around(self, stage: int) -> Iterator[None]:
        if stage == HERE:
            yield
            return
        chunk = self._chunks[stage]
        ring = self._rings[chunk.device]
        ring.enter(chunk)
        slab = self._slab_of[stage]
        if slab.target is None:
            slab.target = self.place.target(slab)
        ring.hold(chunk)
        chunk.memory = slab.target
        try:
            yield
        finally:
            # what has not been stepped is as it was: the chunk as a whole is right either way
            ring.leave(chunk)

    def _count_alike(self, entries: Sequence[PlacementEntry]) -> None:
        """Give the parts of a unit its count, where somebody else has changed that."""
        for entry in entries:
            step = entry.param_step.state["step"]
            if len(entry.parts) > 1 and entry.version != step._version:
                for part in entry.parts[1:]:
                    assert part.device_view is not None
                    part.device_view.state["step"].copy_(step)

    def finish(self, complete: bool = True) -> None:
        """What was stored takes the place of what was there.

        Args:
            complete: all that the step is to change has changed, as what is kept may say.
        """
        self.join()
        self._begun = False
        if not complete:
            # what cannot be now is with the next step; what went wrong has been raised already
            with suppress(Exception):
                self._swap()
            return
        self._swap()
        self._pending = True
        self.place.commit(self.describe)

"""An executor for offloaded state: chunks come to the device, are stepped there, and go back.

The engine steps device views of the parameters, whose state is in the slots of a ring. A view
stays the same from step to step, so the engine's plans and tables stay valid. A step is one
request in stages, one stage for each chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import compress

from torch import Tensor

from optstate_codecs.engine.capture import capturing
from optstate_codecs.engine.executor import ResidentExecutor
from optstate_codecs.engine.request import ParamStep, StepRequest, layout_of
from optstate_codecs.errors import StepError
from optstate_codecs.offloading.manifest import describe
from optstate_codecs.offloading.placement import RESIDENT, Placement
from optstate_codecs.offloading.slabs import Part, PlacementEntry, in_order

__all__ = ["StreamingExecutor"]


class StreamingExecutor:
    """Runs step requests for parameters whose state a store keeps; see ``engine.Executor``.

    Args:
        backend: of the engine, see ``ResidentExecutor``.
        placement: where each parameter's state is; empty at first.

    Attributes:
        all_param_steps: gives the parameters of all state that exists, when a step is to leave all
            of it in the store; None where state may stay elsewhere until it is stepped.
    """

    def __init__(self, backend: str, placement: Placement) -> None:
        self.backend = backend
        self.placement = placement
        self.store = placement.store
        self.all_param_steps: Callable[[], Sequence[ParamStep]] | None = None
        self._executor = ResidentExecutor(backend)
        self._generation = 0
        self._begun = False

    def step(self, request: StepRequest) -> None:
        """Step every parameter of the request.

        Raises:
            RuntimeError: a CUDA graph is being recorded, or this process was forked from the one
                that has the state.
            ValueError, OSError: the store cannot keep the step's result; nothing has changed.
            StepError: raised from the error of a step that failed part-way; it names the
                parameters that were stepped.
        """
        if capturing():
            raise RuntimeError("CUDA graph capture: state that is streamed cannot be part of it")
        if not request.param_steps:
            return
        placement = self.placement
        self.store.check_process()
        entries = self._place(request)
        numbered = [(number, part) for number, entry in enumerate(entries) for part in entry.parts]
        device_views = self._device_views(request, numbered)
        placement.copy_counts(entries)
        stages = sorted({view.stage for view in device_views.param_steps} - {RESIDENT})
        for slab in map(placement.slab_of.__getitem__, stages):
            if slab.target is None:
                # if a snapshot holds the slab, this allocates memory: before anything changes
                self.store.target(slab)
        placement.pending = placement.pending or bool(stages)
        try:
            placement.rings.expect([placement.chunks[stage] for stage in stages])
            with placement.rings.working():
                self._executor.run(device_views)
        except Exception as error:
            raise _step_error(error, request, entries, device_views) from error
        else:
            request.done += request.param_steps
        finally:
            placement.note_counts(request.param_steps)
            if request.asynchronous:
                nbytes = sum(grad.nbytes for grad in request.grads)
                placement.rings.hold((request, device_views), nbytes)
            else:
                self.join()

    def _place(self, request: StepRequest) -> list[PlacementEntry]:
        """Have the state of the request's parameters in the store, and find their entries."""
        placement = self.placement
        self.store.check()
        if not self._begun:
            # values that a scheduler has set since the last step belong to that step
            self.store.restate()
        for ring in placement.rings.values():
            ring.store_rest()
        placement.reload_edited(request.param_steps)
        param_steps = list(request.param_steps)
        if self.all_param_steps is not None and not self._begun:
            given = set(map(id, param_steps))
            param_steps += [one for one in self.all_param_steps() if id(one) not in given]
            param_steps.sort(key=lambda param_step: (param_step.index, param_step.offset))
            placement.keep_only(param_steps)
        # centralization needs the whole gradient
        placement.place(param_steps, cut=request.grad_means is None)
        if self._generation != placement.generation:
            self._executor = ResidentExecutor(self.backend)
            self._generation = placement.generation
        self._begun = True
        return [placement.entry(param_step) for param_step in request.param_steps]

    def _device_views(self, request: StepRequest, parts: Sequence[tuple[int, Part]]) -> StepRequest:
        """The request for the device views of parts, each with its parameter's number in it."""
        views = request.part([number for number, _ in parts])
        param_steps, grads, addresses = [], list(views.grads), list(views.addresses)
        layouts = list(views.layouts or map(layout_of, grads))
        flat: dict[int, Tensor] = {}
        for index, (number, part) in enumerate(parts):
            param, device_view = request.param_steps[number].param, part.device_view
            assert device_view is not None
            param_steps.append(device_view)
            if device_view.param is not param:
                if number not in flat:
                    # once for all parts: a gradient in another order is copied
                    flat[number] = in_order(request.grads[number], param)
                grads[index] = grad = flat[number][part.start : part.stop]
                addresses[index] = grad.data_ptr()
                layouts[index] = (grad.dtype, part.stop - part.start)
        return replace(
            views,
            param_steps=param_steps,
            grads=grads,
            addresses=addresses,
            layouts=layouts,
            done=[],
            torn=[],
            counted=[],
            staging=self._staged,
        )

    @contextmanager
    def _staged(self, stage: int) -> Iterator[None]:
        """Step a stage in the body, with its chunk on the device."""
        if stage == RESIDENT:
            yield
            return
        chunk = self.placement.chunks[stage]
        ring = self.placement.rings[chunk.device]
        ring.enter(chunk)
        slab = self.placement.slab_of[stage]
        if slab.target is None:
            slab.target = self.store.target(slab)
        ring.hold(chunk)
        chunk.memory = slab.target
        try:
            yield
        finally:
            # parameters that were not stepped are unchanged: the whole chunk is valid either way
            ring.leave(chunk)

    def join(self) -> None:
        """Have the current stream wait for partial steps."""
        self.placement.rings.join()

    def finish(self, complete: bool = True) -> None:
        """End a step: its result becomes the kept state.

        Args:
            complete: whether the step was not broken off; only then a manifest may name its result.
        """
        self.join()
        self._begun = False
        if not complete:
            # errors are ignored here: the step has raised its own, and the next step tries again
            with suppress(Exception):
                self.placement.keep_targets()
            return
        self.placement.keep_targets()
        self.placement.pending = True
        self.store.commit(lambda: describe(self.placement))

    def supersede(self) -> None:
        """State and group values are about to be replaced; the next complete step commits them."""
        self.synchronize()
        self.store.supersede()

    def synchronize(self) -> None:
        """Wait until all state is stored where ``optimizer.state`` shows it."""
        self.placement.synchronize()


def _step_error(
    error: Exception,
    request: StepRequest,
    entries: Sequence[PlacementEntry],
    device_views: StepRequest,
) -> StepError:
    """The error of a step that failed part-way; ``request.done`` gets what was stepped whole."""
    done, begun = set(map(id, device_views.done)), set(map(id, device_views.torn))
    counts = [sum(id(part.device_view) in done for part in entry.parts) for entry in entries]
    whole = [count == len(entry.parts) for count, entry in zip(counts, entries, strict=True)]
    request.done += compress(request.param_steps, whole)
    numbers = [param_step.index for param_step in request.param_steps]
    some = [
        bool(count) or any(id(part.device_view) in begun for part in entry.parts)
        for count, entry in zip(counts, entries, strict=True)
    ]
    torn = [started and not all_done for started, all_done in zip(some, whole, strict=True)]
    stepped, unstepped = compress(numbers, whole), compress(numbers, [not one for one in some])
    return StepError.of(error, "", stepped, unstepped, compress(numbers, torn))

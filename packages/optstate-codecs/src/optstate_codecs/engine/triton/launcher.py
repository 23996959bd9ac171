"""Launches of a kernel whose compile-time arguments stay the same.

``kernel[grid](...)`` examines every argument to find the compiled kernel. With the seventy of the
step kernel that takes longer than everything else that a step does on the host. A compiled kernel
can be launched directly too, with the same arguments. It is the right one as long as the
compile-time arguments are the same, and addresses are multiples of 16 where they were before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from optstate_codecs.engine.triton.work_tables import on
from optstate_codecs.triton_lib import HAS_TRITON, INTERPRETED

__all__ = ["Launcher"]

if HAS_TRITON:
    import triton
    from triton.compiler import CompiledKernel

    # before, compiled kernels took other arguments than the kernel
    DIRECT = not INTERPRETED and tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)


class Launcher:
    """Launches one kernel on one device.

    Args:
        kernel: takes tensors, then compile-time arguments.
        constants: the compile-time arguments that are always the same, and compiler options.
    """

    def __init__(self, kernel: Any, constants: Mapping[str, Any]) -> None:
        self._kernel = kernel
        self._constants = constants
        # compiled kernels, each with its compile-time arguments
        self._compiled: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}

    def __call__(
        self, programs: int, tensors: Sequence[Tensor | None], **constants: int | bool
    ) -> None:
        """Launch the kernel.

        Args:
            programs: how many, at least 1.
            tensors: the kernel's first arguments, always of the same dtypes; the first is not None.
            constants: further compile-time arguments, always with the same names.
        """
        assert tensors[0] is not None
        with on(tensors[0].device):
            aligned = [tensor is None or tensor.data_ptr() % 16 == 0 for tensor in tensors]
            given = [tensor is None for tensor in tensors]
            key = (*aligned, *given, *constants.values())
            found = self._compiled.get(key)
            if found is not None and not self._kernel.pre_run_hooks:
                compiled, values = found
                compiled[(programs, 1, 1)](*tensors, *values)
                return
            constants = {**self._constants, **constants}
            compiled = self._kernel[(programs,)](*tensors, **constants)
            if DIRECT and isinstance(compiled, CompiledKernel):
                names = self._kernel.arg_names[len(tensors) :]
                self._compiled[key] = compiled, [constants[name] for name in names]

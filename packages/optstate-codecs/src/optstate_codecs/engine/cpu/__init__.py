"""The step on a CPU as compiled loops: tracing, lowering, loop fusion and C code generation.

The engine has one definition of a step, the torch reference in ``engine.eager``. This package
compiles it, so that a new format or rule needs no C of its own:

1. ``record`` traces the reference: it runs it once and notes every torch operation.
2. ``lower`` turns the trace into a data-flow graph of scalar ``value`` nodes, with the C++ form of
   each operation from ``operations``. Views disappear and equal expressions are shared.
3. ``peephole`` replaces slow operations by cheaper ones that give the same bits under
   assumptions. The generated code checks those before it stores anything, and falls back to a
   second function without them.
4. ``schedule`` assigns the values of a block to as few loops as possible (loop fusion) and decides
   which of them are kept in arrays in between; ``loop`` writes one loop.
5. ``emit`` adds the function that steps all blocks of all tensors in a table, on several threads.
   ``prelude`` and ``vectors`` hold what all generated code starts with, and ``torch_root`` torch's
   own square root.
6. ``build`` compiles the C++ and caches the library on disk.

``kernels`` runs these for a ``KernelSpec``. ``choice`` decides when, and compares a kernel with the
reference before its first use. ``compiled`` steps requests, with the ``calls`` of kernels or with
the reference; ``rounding`` rounds gradients.
"""

"""The step on a GPU: one multi-tensor Triton kernel for all formats, rules and writes."""

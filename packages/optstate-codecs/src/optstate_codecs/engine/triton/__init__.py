"""The fast path on GPUs: one multi-tensor kernel, assembled from formats, rules and writes."""

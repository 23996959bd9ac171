"""``optstate estimate``: memory of training by optimizer, store of state and gradient release.

Bytes are counted, not guessed: optimizers are built on the meta device, and their formats declare
what they store.
"""

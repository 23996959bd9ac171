"""Offload any optimizer's state to host memory, and step it on the device."""

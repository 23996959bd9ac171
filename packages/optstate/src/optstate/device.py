"""Checks before training that a device exists."""

import torch


def check_device(name: str) -> None:
    """Raises unless tensors can be made on a device.

    Args:
        name: ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ValueError: The device is of another type, or this machine does not have it.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name!r}: must be cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ValueError(f"{name!r}: this machine has {count} CUDA devices for torch; use cpu")

"""Whether a device can be trained on, asked before training."""

import torch


def check_device(name: str) -> None:
    """Passes if tensors can be made there.

    Args:
        name: ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ValueError: Another kind of device, or one that this machine does not have.
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

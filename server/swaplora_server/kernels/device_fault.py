"""A GPU that a kernel left unable to compute. CUDA keeps such a fault until the process ends, whoever asks next."""

import torch


def fault_of(device: torch.device) -> str | None:
    """What the device says where it computes nothing any more in this process; None for one that does."""
    if device.type != "cuda":
        return None
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None

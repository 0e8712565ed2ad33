"""Random number generators of this process: read without drawing from them, set back last of all.

Per rank. numpy's is read only if the trainer imported it.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

from backstay.errors import IntegrityError


def read() -> tuple[Any, dict[str, torch.Tensor]]:
    """State of all generators: a plain value (python, numpy) and uint8 tensors by kind (``torch``, ``cuda-0``…).

    CUDA states are 16 bytes of seed and offset kept by the host: no synchronisation.
    """
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        device = torch.cuda.current_device()  # other devices belong to other ranks
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    plain: dict[str, Any] = {"python": random.getstate()}
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        plain["numpy"] = numpy_random.get_state(legacy=False)
    return plain, tensors


def write(plain: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Set the generators to what :func:`read` gave.

    Raises:
        IntegrityError: if the snapshot has a generator that this process lacks (a CUDA state without a GPU).
    """
    if "numpy" in plain:
        import numpy as np

        np.random.set_state(plain["numpy"])
    random.setstate(plain["python"])
    if "cuda" in tensors:
        if not torch.cuda.is_available():
            raise IntegrityError("the snapshot has a CUDA generator, this process has no GPU", reason="missing_device")
        torch.cuda.set_rng_state(tensors["cuda"], torch.cuda.current_device())
    torch.set_rng_state(tensors["torch"])

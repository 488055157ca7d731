"""The CUDA or HIP runtime that torch uses, for what torch does not offer."""

import ctypes
from typing import Any

import torch


def call_runtime(function: str, *args: Any) -> int:
    """Call a function of the runtime, "GetLastError" of cudaGetLastError, and return its status."""
    runtime = ctypes.CDLL(torch._C.__file__)  # symbols of a library's dependencies count
    status: int = getattr(runtime, ("hip" if torch.version.hip else "cuda") + function)(*args)
    return status

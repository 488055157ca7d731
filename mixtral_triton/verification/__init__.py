"""verify: the runtime against torch on the user's own weights: operations, layers, logits and loaded tensors."""

from .compare import launch_calls, verify
from .report import Report, Row

__all__ = ["Report", "Row", "launch_calls", "verify"]

"""transformers' models on this package's operations: by `apply`, or by name."""

from functools import cache

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.moe import ExpertsInterface
from transformers.quantizers.auto import register_quantization_config, register_quantizer

from . import attention, experts, masks
from .drop_in import applied, apply, check_model, revert, runs_here, warn_without_kernels
from .experts import NAME
from .quantizer import ExpertsConfig, ExpertsQuantizer
from .stored import stored_config

__all__ = ["ExpertsConfig", "applied", "apply", "check_model", "register", "revert", "runs_here", "stored_config"]


def register() -> None:
    """Make "mixtral_triton" a name of transformers' experts, attention, masks and quantizers, once a process.

    `from_pretrained(name, experts_implementation="mixtral_triton", attn_implementation="mixtral_triton")`,
    `set_experts_implementation`, `set_attn_implementation` and the config's fields take it then, for any model. Experts
    of another layout or activation, and attention that needs more than a causal mask, are ValueErrors at their first
    forward, which name the module and the reason. Where no kernel can run, a warning says once that plain torch does.
    """
    _register()
    warn_without_kernels()


@cache
def _register() -> None:
    ExpertsInterface.register(NAME, experts.experts)
    AttentionInterface.register(NAME, attention.attention)
    AttentionMaskInterface.register(NAME, masks.interval_mask)
    register_quantization_config(NAME)(ExpertsConfig)
    register_quantizer(NAME)(ExpertsQuantizer)


_register()  # transformers looks an ExpertsConfig and the functions of a model that `apply` changed up by their name

"""The experts inside vLLM: `LLM(folder, quantization="mixtral_triton", additional_config={"mixtral_triton": {...}})`,
where the dict has keys of `OPTIONS`. vLLM imports this module as a plugin, and nothing else does. Sharding,
collectives, attention, norms, the cache, the scheduler and sampling stay vLLM's.
"""

import warnings
from typing import Any

import torch
import vllm
from torch import Tensor, nn

from . import ops
from .checkpoint.config import check_value, error_prefix
from .quantize import BITS, FLOATS, quantize

NAME = "mixtral_triton"
VERSIONS = "0.31", "0.32", "0.33"  # of vLLM; the extra [vllm] of pyproject.toml names the same range
TESTED = ".".join(vllm.__version__.split(".")[:2]) in VERSIONS
# The default first. weights: the format in which the experts are quantized while loading; route: `ops.route` in place
# of vLLM's router; deterministic: what the experts make of a token does not depend on the batch, to the bit.
OPTIONS = {"weights": (None, *BITS), "route": (False, True), "deterministic": (False, True)}

if TESTED:
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers import fused_moe, quantization
    from vllm.model_executor.layers.fused_moe import FusedMoEExpertsModular, RoutedExperts, UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExpertsMonolithic
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization import QuantizationConfig
    from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
else:  # another version may lack these names; `register` warns, and nothing uses the classes below
    FusedMoEExpertsModular = FusedMoEExpertsMonolithic = UnquantizedFusedMoEMethod = QuantizationConfig = object


def register() -> None:
    """Make the name known to vLLM, in each of its processes; warn where this version is not tested."""
    if TESTED:
        quantization.register_quantization_config(NAME)(ExpertsConfig)
    else:
        warnings.warn(f"{NAME} needs vLLM {', '.join(VERSIONS)}, got {vllm.__version__}: not registered", stacklevel=2)


def read_options() -> dict[str, Any]:
    """Return the options of the engine that is being built. ValueError for an unknown key or value."""
    config = get_current_vllm_config().additional_config
    given = config.get(NAME, {}) if isinstance(config, dict) else {}
    right = isinstance(given, dict) and all(
        any(type(value) is type(allowed) and value == allowed for allowed in OPTIONS.get(key, ()))  # 1 is not True
        for key, value in given.items()
    )
    needs = "; ".join(f"{key}: {', '.join(map(repr, values))}" for key, values in OPTIONS.items())
    check_value(f"vLLM's additional_config[{NAME!r}]", given, f"a dict of {needs}", right)
    return {key: values[0] for key, values in OPTIONS.items()} | given


class ExpertsConfig(QuantizationConfig):
    """Give the routed experts of a model `ExpertsMethod`, and every other layer vLLM's own method."""

    get_name = staticmethod(lambda: NAME)
    get_supported_act_dtypes = staticmethod(lambda: [*FLOATS])
    get_min_capability = staticmethod(lambda: 80)
    get_config_filenames = staticmethod(lambda: list[str]())
    from_config = classmethod(lambda cls, config: cls())

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None) -> None:
        """Refuse a quantized checkpoint, which vLLM loads by its own methods."""
        where, method = f"quantization={NAME!r}: the checkpoint's quant_method", hf_quant_cfg.get("quant_method")
        needs = "none; `vllm serve FOLDER` without --quantization serves it, `mixtral-triton generate FOLDER` runs it"
        check_value(where, method, needs, user_quant != NAME)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        if isinstance(layer, RoutedExperts):
            return ExpertsMethod(layer)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


class ExpertsMethod(UnquantizedFusedMoEMethod):
    """Load the experts as vLLM does without quantization: w13 [E, 2I, H], gate rows first, and w2 [E, H, I] already
    have the layout of `ops.expert_swiglu`. To be quantized, a layer is materialized once all its weights are read."""

    def __init__(self, layer: Any) -> None:
        super(UnquantizedFusedMoEMethod, self).__init__(moe := layer.moe_config)  # without vLLM's choice of kernels
        self.unquantized_backend = fused_moe.oracle.unquantized.UnquantizedMoeBackend.TRITON  # which pads nothing
        self.options = options = read_options()
        self.uses_meta_device = options["weights"] is not None
        self.experts_cls = cls = RoutingExperts if options["route"] else Experts
        _, why = cls.is_supported_config(cls, moe, None, None, cls.activation_format())
        clamp = layer.swiglu_limit or layer.swiglu_alpha or layer.swiglu_beta
        grouped = options["route"] and (layer.use_grouped_topk or layer.routed_scaling_factor != 1.0)
        if moe.has_bias or clamp or grouped or layer.apply_router_weight_on_input:
            why = "kernel does not support a bias, a clamp, a scaled input or a router with groups or a factor"
        check_value(f"quantization={NAME!r}: options", options, f"another model or setting: {why}", why is None)

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        with torch.device("meta") if self.uses_meta_device else torch.get_default_device():
            super().create_weights(layer, *args, **kwargs)
        if self.uses_meta_device:
            initialize_online_processing(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        dense = layer._parameters.keys() & {"w13_weight", "w2_weight"}  # none at the second call, after all layers
        for name in dense if self.uses_meta_device else ():
            with error_prefix(f"quantization={NAME!r}: {layer.layer_name}.{name}"):
                weight: Any = quantize(layer._parameters.pop(name).data, self.options["weights"])
            weight.weight_loader = layer.weight_loader  # skips other ranks' experts, which may follow
            setattr(layer, name, weight)
        self._init_moe_kernel(layer)


class _Experts:
    """What vLLM's `is_supported_config` asks, and the call of the operation."""

    activation_format = staticmethod(lambda: fused_moe.FusedMoEActivationFormat.Standard)
    _supports_current_device = staticmethod(lambda: True)
    _supports_no_act_and_mul = staticmethod(lambda: False)
    _supports_quant_scheme = staticmethod(lambda *keys: keys == (None, None))
    _supports_activation = staticmethod(lambda activation: activation == fused_moe.MoEActivation.SILU)
    _supports_parallel_config = staticmethod(lambda c: c.dp_size == 1 and not (c.use_all2all_kernels or c.enable_eplb))
    _supports_batch_invariance = staticmethod(lambda: read_options()["deterministic"])

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.options = read_options()

    def experts(self, x: Tensor, w13: Any, w2: Any, ids: Tensor, weights: Tensor, expert_map: Tensor | None) -> Tensor:
        if [getattr(weight, "format", None) for weight in (w13, w2)] != [self.options["weights"]] * 2:
            raise RuntimeError(f"quantization={NAME!r} with {self.options}: vLLM did not quantize the experts")
        if expert_map is not None:  # an expert of another rank is -1, which contributes nothing
            ids = expert_map[ids]
            if ids.device.type == "cpu":  # where an id out of range is an error
                weights, ids = weights * (ids >= 0), ids.clamp(min=0)
        return ops.expert_swiglu.unchecked(x, w13, w2, ids, weights, deterministic=self.options["deterministic"])


class Experts(_Experts, FusedMoEExpertsModular):
    """`ops.expert_swiglu` of the experts that vLLM's router chose."""

    workspace_shapes = staticmethod(lambda M, N, K, *_: ((0,), (0,), (M, K)))  # the operation allocates its own
    finalize_weight_and_reduce_impl = staticmethod(lambda: fused_moe.topk_weight_and_reduce.TopKWeightAndReduceNoOP())

    def apply(self, output: Tensor, hidden_states: Tensor, w1: Any, w2: Any, **kwargs: Any) -> None:
        output.copy_(
            self.experts(hidden_states, w1, w2, kwargs["topk_ids"], kwargs["topk_weights"], kwargs["expert_map"])
        )


class RoutingExperts(_Experts, FusedMoEExpertsMonolithic):
    """`ops.route`, whose softmax and top-k have the result of both methods, and `ops.expert_swiglu`."""

    _supports_routing_method = staticmethod(lambda method, *keys: method.name in ("Renormalize", "RenormalizeNaive"))
    _supports_router_logits_dtype = staticmethod(lambda dtype, method: dtype in FLOATS)

    def apply(self, hidden_states: Tensor, w1: Any, w2: Any, router_logits: Tensor, **kwargs: Any) -> Tensor:
        weights, ids = ops.route.unchecked(router_logits, self.moe_config.experts_per_token)
        return self.experts(hidden_states, w1, w2, ids, weights, kwargs["expert_map"])

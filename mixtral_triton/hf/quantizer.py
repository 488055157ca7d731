"""`ExpertsConfig`: transformers' `from_pretrained` quantizes the experts of any family while it reads them."""

import copy
import itertools
import json
import sys
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, __version__
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoint.config import INDEX_FILE, SINGLE_FILE, check_one_source, check_value, error_prefix
from ..kernels.weights.formats import BITS
from ..kernels.weights.quantized import QuantizedWeight, QuantSpec
from ..quantize import quantize_into
from ..quantize.hub import warn_unused
from .experts import NAME, PROJECTIONS, check_experts, is_experts
from .saved import compressed_state
from .stored import StoredPlan, converter_like, merges_experts, plan_stored, put_weight


class ExpertsConfig(QuantizationConfigMixin):
    """`quantization_config` of `from_pretrained`: the experts in "int4", "int8" or "fp8", run by "mixtral_triton"."""

    def __init__(self, weights: str = "int4", *, quant_method: Any = NAME, stored: Any = None, **unknown: Any) -> None:
        right = weights in tuple(BITS) if stored is None else weights == "stored"  # `stored_config` has made it
        check_value("ExpertsConfig: weights", weights, f"one of {', '.join(BITS)}", right)
        check_value("ExpertsConfig: argument", ", ".join(unknown), "weights alone", not unknown)
        self.quant_method, self.weights, self.stored = quant_method, weights, stored
        self.saved: dict[str, Any] | None = None  # the `quantization_config` of what `save_pretrained` writes

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy({"quant_method": NAME, "weights": self.weights} if self.saved is None else self.saved)


class ExpertsQuantizer(HfQuantizer):
    """What transformers calls while it loads a model with an ExpertsConfig. Everything but the experts stays dense."""

    is_trainable = True  # what is around the experts
    is_compileable = True
    quantization_config: ExpertsConfig
    plan: StoredPlan | None = None  # of a checkpoint that is quantized already
    conversions: Any = None  # transformers' own; None: a release before 5.17, which quantizes after them

    def validate_environment(self, device_map: Any = None, **kwargs: Any) -> None:
        devices = device_map.values() if isinstance(device_map, dict) else ()
        check_value(
            "ExpertsConfig: device_map", device_map, "no disk: quantized experts stay in memory", "disk" not in devices
        )

    def update_attn_implementation(self, config: Any) -> Any:
        """Select the experts' implementation, before the model is built. ValueError where another one was asked for."""
        plan = getattr(config, "distributed_config", None)
        check_value(
            "ExpertsConfig: distributed_config", plan, "None: a device_map spreads layers over GPUs", plan is None
        )
        name = config._experts_implementation
        check_value("ExpertsConfig: experts_implementation", name, f"None or {NAME!r}", name in (None, NAME))
        config._experts_implementation = NAME
        return config

    update_ep_plan = update_attn_implementation  # which releases before 5.24 call instead

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """ValueError, before any tensor is read, for a model without experts, or with others than `ops` computes."""
        self.model, self.files, stored = model, kwargs.get("checkpoint_files"), self.quantization_config.stored
        if stored is None:
            check_dense_checkpoint(self.files)
        else:
            needs = "5.17 or newer for stored_config"
            check_value("transformers", __version__, needs, hasattr(HfQuantizer, "update_weight_conversions"))
        experts = {name: module for name, module in model.named_modules() if is_experts(module)}
        self.paths = {*experts}
        needs = "a model with experts that transformers marks with use_experts_implementation"
        check_value("ExpertsConfig: model", type(model).__name__, needs, bool(experts))
        for name, module in experts.items():
            check_experts(module, name, 'a 16-bit checkpoint and experts_implementation="grouped_mm"')
            for key in PROJECTIONS if stored is None else ():
                with error_prefix(f"{name}.{key}"):
                    QuantSpec.default_for(self.quantization_config.weights, getattr(module, key).shape[-1])
            module.register_forward_pre_hook(check_selected)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        path, _, key = param_name.rpartition(".")
        return self.plan is None and path in self.paths and key in PROJECTIONS

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        spec = None if self.plan is None else self.plan.specs.get(param_name)
        if spec is None and (self.plan is not None or not self.param_needs_quantization(model, param_name)):
            return param.element_size()
        return BITS[self.quantization_config.weights if spec is None else spec.format] / 8

    def get_quantize_ops(self) -> ConversionOps:
        return QuantizeExperts(self.quantization_config.weights)

    def update_weight_conversions(self, conversions: list[Any], model: Any = None) -> list[Any]:
        """Quantize, or read, expert by expert where transformers would stack the experts of a checkpoint and join gate
        and up. Errors of a plan reach the user from here."""
        self.conversions = conversions
        if (stored := self.quantization_config.stored) is not None:
            self.plan = plan = plan_stored(self.model, self.files, stored, conversions)
            self.pre_quantized = False  # transformers then reads a parameter's tensors when their turn comes
            self.model._keys_to_ignore_on_load_unexpected = {
                *(self.model._keys_to_ignore_on_load_unexpected or ()),
                *plan.ignored,
            }
            return plan.conversions
        return [
            converter_like(conversion, [*conversion.source_patterns], self.get_quantize_ops())
            if merges_experts(conversion)
            else conversion
            for conversion in conversions
        ]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Raise the error of a linear that could not be read, and ValueError for what the files lack or is not finite,
        which transformers leaves random or takes. Let the model save by transformers' conversions."""
        if (plan := self.plan) is None:
            for path, key in itertools.product(sorted(self.paths), PROJECTIONS):
                read = isinstance(getattr(model.get_submodule(path), key), QuantizedWeight)
                check_value(f"ExpertsConfig: {path}.{key} in the files", "missing", "those of the config", read)
        else:
            if plan.fault is not None:
                raise plan.fault
            if plan.unused:
                warn_unused(plan.folder, plan.unused, stacklevel=5)
            if not plan.specs:
                warnings.warn(f"{plan.folder}: its experts are not quantized one by one: all is dense", stacklevel=5)
                self.remove_quantization_config(model)
        for name, x in model.state_dict().items():
            finite = not x.is_floating_point() or x.is_meta or bool(x.sum().isfinite() or x.isfinite().all())
            check_value(f"{name} in {x.dtype}", "not finite everywhere", "finite numbers in the files", finite)
        used = () if self.conversions is None else model.__dict__.pop("_weight_conversions", ())
        if any("".join(conversion.target_patterns).endswith(PROJECTIONS) for conversion in used):
            model._weight_conversions = [x for x in self.conversions if merges_experts(x) or x.was_used()]
        self.model = self.plan = self.conversions = None

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[Any, dict[str, str]]:
        """Return what `save_pretrained` writes of the model, whose config it has described before it is written."""
        if getattr(model, "_hf_peft_config_loaded", False):  # which saves the adapter alone
            return None, {}
        state, model.config.quantization_config.saved = compressed_state(model)
        caller = sys._getframe(1)
        for name in (SINGLE_FILE, INDEX_FILE) if writes_checkpoint(caller) else ():
            (Path(caller.f_locals["save_directory"]) / name).unlink(missing_ok=True)
        return state, {}


def writes_checkpoint(caller: FrameType) -> bool:
    """Whether a frame is transformers' `save_pretrained`, by which this process replaces a folder's checkpoint.

    That function leaves a single file beside new shards, and passes a quantizer no folder. A method of the instance
    would know it, but would refer to the model, which `del` then no longer frees.
    """
    call, name = caller.f_locals, (caller.f_globals["__name__"], caller.f_code.co_name)
    if name != (PreTrainedModel.__module__, "save_pretrained"):
        return False
    beside = call.get("variant") is not None or call.get("distributed_checkpoint", False)  # files of other names
    return bool(call.get("save_on_this_rank", call["is_main_process"])) and not beside


def check_dense_checkpoint(files: Any) -> None:
    """Raise ValueError that names what the folder of these files says of quantization; files of dense experts have
    nothing, and transformers would read the codes of a method that it does not know as weights. ValueError for a single
    file beside shards, too."""
    if files:
        check_one_source(Path(files[0]).parent)
    for name in ("config.json", "hf_quant_config.json") if files else ():
        raw = json.loads(path.read_text()) if (path := Path(files[0]).parent / name).is_file() else {}
        for part in (raw, *(value for value in raw.values() if isinstance(value, dict))):
            stored = part.get("quantization_config", part.get("quantization"))
            own = isinstance(stored, dict) and stored.get("quant_method") == NAME
            check_value(f"ExpertsConfig: quantization of {path}", stored, "none, dense experts", stored is None or own)


def check_selected(module: Any, args: Any) -> None:
    """Raise ValueError where another implementation than this package's was selected for quantized experts."""
    name, needs = module.config._experts_implementation, f"{NAME!r}: no other one reads quantized experts"
    check_value(f"mixtral_triton: experts_implementation of {type(module).__name__}", name, needs, name == NAME)


class QuantizeExperts(ConversionOps):
    """Put a QuantizedWeight in the place of a parameter of experts, which transformers is about to fill."""

    def __init__(self, format: str) -> None:
        self.format = format

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """input_dict: one tensor [E,N,K]; or a list of E tensors [n,K] of each source, whose rows follow each other."""
        name, order = kwargs["full_layer_name"], dict.fromkeys((*kwargs["source_patterns"], *input_dict))
        sources = [input_dict[source] for source in order if source in input_dict]  # gate first
        if not sources:  # the conversion of a checkpoint's experts has done it
            return {}
        path, _, key = name.rpartition(".")
        module = kwargs["model"].get_submodule(path)
        E, N, K = shape = tuple(module._parameters[key].shape)
        parts = [source[0] if isinstance(source, list) and source[0].dim() == 3 else source for source in sources]
        for part in parts:
            found, need = {(len(part), len(rows)) for rows in part}, (E, N // len(parts))
            check_value(f"{name}: (experts, rows) in the checkpoint", found, f"{need} by the config", found == {need})
        weight = QuantSpec.default_for(self.format, K).empty(shape, parts[0][0].device)
        for expert in range(E):
            rows = torch.cat([part[expert] for part in parts]) if len(parts) > 1 else parts[0][expert]
            check_value(f"{name}: shape of expert {expert}", tuple(rows.shape), f"({N}, {K})", rows.shape == (N, K))
            check_value(f"{name}: expert {expert}", "not finite", "finite numbers", bool(rows.isfinite().all()))
            quantize_into(weight[expert], rows)
        if kwargs.get("missing_keys") is not None:
            kwargs["missing_keys"].discard(name)
        put_weight(module, key, weight)
        return {}

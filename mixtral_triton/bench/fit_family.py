"""The command `fit`, for any family: one that the own model does not run is built by transformers on the meta device,
whose parameters and cache have the sizes. No weight is read.

K experts a token, H hidden, I intermediate
"""

from __future__ import annotations

import argparse
from bisect import bisect_right
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..checkpoint.config import check_value, checkpoint_folder, read_json_object
from ..checkpoint.families import FAMILIES
from ..kernels.weights.formats import BITS
from ..kernels.weights.quantized import QuantSpec
from ..model.memory_plan import LOGIT_BYTES, usable_bytes, weight_bytes
from ..quantize.layouts import read_scheme
from ..terminal import check_range
from . import fit
from .fit import STORED, MemoryPlan, QuantSpecs, free_bytes
from .gpus import GPU


def run(args: argparse.Namespace) -> int:
    """Run the command -> exit status, as `fit.run`."""
    name = str(args.model)
    if Path(name).is_dir() or "/" in name:
        try:
            folder = checkpoint_folder(name, tensors=False)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; {', '.join(fit.KNOWN)} need no network") from error
        values = read_json_object(file) if (file := folder / "config.json").is_file() else {}
        if values.get("model_type", "mixtral") not in FAMILIES:
            return fit.run(args, FamilyRequest.of(args, folder))
    return fit.run(args)


@dataclass(frozen=True)
class FamilyRequest:
    """model   on the meta device
    specs   by format, of the parameters that are quantized then
    layers  of the cache: bytes a token, bytes a sequence beside them, and the window
    K       0 where there are no experts
    """

    name: str
    model: Any
    specs: Mapping[str, QuantSpecs]
    layers: list[tuple[int, int, int | None]]
    K: int
    batch: int
    context: int
    title = "The most tokens of a sequence, by format"
    has_speeds = False
    note = caption = (
        "The formats are the experts', by ExpertsConfig; the workspace is an estimate of transformers' prefill."
    )

    @classmethod
    def of(cls, args: argparse.Namespace, folder: Path) -> FamilyRequest:
        """ValueError for a wrong option, and for a model that transformers does not know as a causal one."""
        if args.cache_dtype is not None:
            raise ValueError(f"--cache-dtype is {args.cache_dtype}, needs a family of the own model")
        model, specs = _model_and_specs(folder)
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", 0)
        check_range(f"{folder}: max_position_embeddings", positions, 1)
        context = positions if args.context is None else args.context
        check_range("--batch", args.batch, 1)
        check_range("--context", context, 1, positions, "the model's positions")
        return cls(str(args.model), model, specs, *_cache_and_experts(model), args.batch, context)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(x.shape) for name, x in self.model.named_parameters()}

    @cached_property
    def experts(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, shape in self.shapes.items() if ".experts." in name and len(shape) == 3}

    @cached_property
    def weights(self) -> dict[str, int]:
        """Bytes by format."""
        return {format: weight_bytes(self.shapes, specs, self.model.dtype) for format, specs in self.specs.items()}

    def memory_need(self, format: str, context: int) -> dict[str, int]:
        """As `fit.memory_need`."""
        dtype, (V, H) = self.model.dtype, self.model.get_input_embeddings().weight.shape
        I = max((shape[-1] for name, shape in self.experts.items() if name.endswith("down_proj")), default=4 * H)
        cache = sum(token * min(context, window or context) + beside for token, beside, window in self.layers)
        need = {"weights": self.weights[format], "cache": self.batch * cache}
        need["workspace"] = self.batch * context * dtype.itemsize * (4 * H + max(1, self.K) * (H + I))
        need["logits"] = LOGIT_BYTES * self.batch * V
        return need | {"total": sum(need.values())}

    def memory_plan(self, format: str, gpu: GPU) -> MemoryPlan:
        need, limit = self.memory_need(format, self.context), usable_bytes(free_bytes(gpu))
        positions = self.model.config.get_text_config().max_position_embeddings
        longest = bisect_right(
            range(1, positions + 1), limit, key=lambda context: self.memory_need(format, context)["total"]
        )
        verdict, weights = "fits" if need["total"] <= limit else "no", None if format == STORED else format
        return MemoryPlan(format, weights, need, verdict, longest, None, None)

    def plan_dict(self, plan: MemoryPlan, gpu: GPU) -> dict[str, Any]:
        """As `fit.Request.plan_dict`; transformers launches what is around the experts."""
        return vars(plan)

    def as_dict(self) -> dict[str, Any]:
        total = sum(map(prod, self.shapes.values()))
        idle = sum((shape[0] - self.K) * prod(shape[1:]) for shape in self.experts.values()) if self.K else 0
        values = {"model": self.name, "parameters": total, "active_parameters": total - idle}
        return values | {"batch": self.batch, "context": self.context}

    __str__ = fit.Request.__str__

    def cell(self, plan: MemoryPlan) -> str:
        """As `fit.Request.cell`."""
        return f"{plan.longest_context:,}" if plan.longest_context else ""

    def command(self, plan: MemoryPlan) -> str:
        """Return how the model is loaded in this format."""
        option = f', quantization_config=ExpertsConfig("{plan.weights}")' if plan.weights else ""
        option = f', config=stored_config("{self.name}")' if not plan.weights and self.specs[STORED] else option
        return f'AutoModelForCausalLM.from_pretrained("{self.name}"{option})'


def _model_and_specs(folder: Path) -> tuple[Any, dict[str, QuantSpecs]]:
    """Build a folder's model on the meta device. ValueError for a quantized checkpoint that `stored_config` refuses, or
    whose tensors are not in the folder."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from ..hf.experts import NAME, PROJECTIONS, check_experts, is_experts
    from ..hf.stored import plan_stored, stored_config

    scheme = read_scheme(folder)
    config = AutoConfig.from_pretrained(folder) if scheme is None else stored_config(folder)
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    check_value(f"{folder}: model_type", config.model_type, "a causal model of transformers", causal)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    columns = dict[str, int]()
    model.set_experts_implementation("batched_mm")  # which needs no values
    with suppress(ValueError):
        for name, module in model.named_modules():
            if is_experts(module):
                check_experts(module, name)
                columns |= {f"{name}.{key}": getattr(module, key).shape[-1] for key in PROJECTIONS}
        model.set_experts_implementation(NAME)
    if scheme is not None:
        files, conversions = sorted(folder.glob("*.safetensors")), get_model_conversion_mapping(model)
        return model, {STORED: plan_stored(model, files, config.quantization_config["stored"], conversions).specs}
    specs: dict[str, QuantSpecs] = {STORED: {}}
    for format in BITS if columns and model.config._experts_implementation == NAME else ():
        with suppress(ValueError):  # int4, whose groups have to divide the columns
            specs[format] = {name: QuantSpec.default_for(format, K) for name, K in columns.items()}
    return model, specs


@torch.no_grad()
def _cache_and_experts(model: Any) -> tuple[list[tuple[int, int, int | None]], int]:
    """Return FamilyRequest's layers and K, by forwards of one token and of two."""
    from ..hf.experts import is_experts
    from ..hf.masks import CACHE

    counts, sizes, windows = [0], list[list[int]](), list[Any]()
    for module in filter(is_experts, model.modules()):
        module.register_forward_pre_hook(lambda module, args: counts.append(args[1].shape[-1]))
    for tokens in (1, 2):
        try:
            cache = model(torch.zeros(1, tokens, dtype=torch.int64, device="meta"), use_cache=True)[CACHE]
        except Exception as error:  # of any model's code
            got = f"a forward on the meta device, by which fit knows its cache, failed: {type(error).__name__}: {error}"
            raise ValueError(f"fit: of {type(model).__name__} {got}") from error
        leaves = [tree_leaves(vars(layer)) for layer in cache.layers]
        sizes.append([sum(x.nbytes for x in of_layer if isinstance(x, Tensor)) for of_layer in leaves])
        windows = [getattr(layer, "sliding_window", None) for layer in cache.layers]
    layers = [(two - one, 2 * one - two, window) for one, two, window in zip(*sizes, windows, strict=True)]
    return layers, max(counts)

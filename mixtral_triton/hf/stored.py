"""Quantized checkpoints of any family in transformers: experts stay as stored, and every other linear becomes dense.

transformers' own loop reads what is dense. A conversion of this file takes the place of each that merges experts: it
gets one part of each linear, which shows the device, and reads all parts by `quantize/hub.py`.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.utils import cached_file

from ..checkpoint import tensors as checkpoint
from ..checkpoint.config import check_value, read_json_object
from ..checkpoint.tensors import Destination, Stored
from ..kernels.weights.quantized import QuantizedWeight, QuantSpec
from ..quantize import hub
from ..quantize.hub import Linear
from ..quantize.layouts import FLOATS, MODELOPT_FILE, parse_scheme
from .experts import NAME, PROJECTIONS

DENSE = "or load the original 16-bit checkpoint with ExpertsConfig"
HUB = "revision", "cache_dir", "token", "subfolder", "local_files_only", "force_download"  # arguments of cached_file


def stored_config(name: str | Path, **kwargs: Any) -> Any:
    """Return the config of a quantized checkpoint, with which `from_pretrained` leaves its experts as they are stored.

    `AutoModelForCausalLM.from_pretrained(name, config=stored_config(name))`. kwargs: AutoConfig's. ValueError for a
    dense checkpoint, and one line that names what no QuantizedWeight holds.
    """
    config = AutoConfig.from_pretrained(name, **kwargs)
    stored = getattr(config, "quantization_config", getattr(config.get_text_config(), "quantization_config", None))
    if stored is None:
        settings = {key: value for key, value in kwargs.items() if key in HUB}
        file = cached_file(name, MODELOPT_FILE, _raise_exceptions_for_missing_entries=False, **settings)
        found = None if file is None else read_json_object(Path(file)).get("quantization")
        stored = {"quant_method": "modelopt", **found} if isinstance(found, Mapping) else found
    need = f"one: {name} is dense, and loads with quantization_config=ExpertsConfig(...)"
    check_value("stored_config: quantization_config", stored, need, stored is not None)
    parse_scheme(stored, f"stored_config: {name}", DENSE)
    config.quantization_config = {"quant_method": NAME, "weights": "stored", "stored": stored}
    return config


def merges_experts(conversion: Any) -> bool:
    """Whether a conversion of transformers stacks experts, and perhaps joins gate and up."""
    operations = [type(op) for op in getattr(conversion, "operations", ())]
    targets = "".join(conversion.target_patterns).endswith(PROJECTIONS)
    return targets and operations in ([MergeModulelist], [MergeModulelist, Concatenate])


def converter_like(conversion: Any, sources: list[str], operation: ConversionOps) -> WeightConverter:
    """Return a conversion of other sources into the same targets."""
    converter = WeightConverter(sources, [*conversion.target_patterns], [operation])
    converter.scope_prefix, converter.base_model_prefix = conversion.scope_prefix, conversion.base_model_prefix
    return converter


@dataclass
class StoredPlan:
    """Which quantized linears of a checkpoint fill which parameters of a model.

    linears      by the parameter's name
    specs        of the experts that stay as stored; the other parameters become dense
    conversions  for transformers' loop, which reads what is dense
    ignored      patterns of names that transformers shall not report as unexpected
    """

    folder: Path
    linears: dict[str, list[Linear]]
    specs: dict[str, QuantSpec]
    unused: set[str]
    conversions: list[Any]
    ignored: set[str]
    fault: Exception | None = None


class Names:
    """How transformers' conversions name a checkpoint's tensors in a model, which is on the meta device."""

    def __init__(self, model: Any, conversions: list[Any]) -> None:
        self.model, self.state, self.filled = model, model.state_dict(), set[str]()
        self.renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
        self.converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
        self.by_pattern = {pattern: x for x in self.converters for pattern in x.source_patterns}

    def find(self, name: str) -> tuple[str, Any, str | None]:
        """Return a tensor's key in the model's state, the conversion that changes the tensor, and its pattern."""
        prefix, state = self.model.base_model_prefix, self.state
        key, pattern = rename_source_key(name, self.renamings, self.converters, prefix, state)
        if key not in state and name in state:  # as transformers' own loop does
            key, pattern = rename_source_key(name, [], [], prefix, state)
        conversion = self.by_pattern.get(pattern or "")
        targets = [""] if conversion is None else conversion.target_patterns
        self.filled |= {key.replace(targets[0], target) for target in targets}
        return key, conversion, pattern

    def dense(self, name: str, stored: Stored) -> dict[str, Destination]:
        """Return where a dense tensor goes, by its name; nothing where the model has no place for it."""
        key, conversion, pattern = self.find(name)
        shape = tuple(getattr(self.state.get(key), "shape", ()))
        if conversion is not None and merges_experts(conversion) and key in self.state:
            return {name: _destination(name.removesuffix(".weight"), key, shape, conversion, pattern)}
        return {name: Destination(key, (), stored.shape if conversion else shape, ())} if key in self.state else {}

    def missing(self) -> set[str]:
        """Return the keys of the model that no tensor fills, which transformers would leave random."""
        tied: dict[str, str] = self.model.all_tied_weights_keys
        filled = self.filled.union(*({*pair} for pair in tied.items() if self.filled.intersection(pair)))
        known = re.compile("|".join(self.model._keys_to_ignore_on_load_missing or ["(?!)"]))
        return {key for key in self.state.keys() - filled if not known.search(key)}


def plan_stored(model: Any, files: Any, stored: Any, conversions: list[Any]) -> StoredPlan:
    """Return the plan, from the headers alone. ValueError in one line for tensors that config and layouts do not need,
    for those that are missing, and for what no QuantizedWeight holds. model: on the meta device."""
    paths = [str(file) for file in files or ()]
    right = bool(paths) and all(path.endswith(".safetensors") for path in paths)
    check_value("stored_config: files", paths[:1], "safetensors of a folder", right)
    folder = Path(paths[0]).parent
    scheme = parse_scheme(stored, folder, DENSE)
    headers, names = checkpoint.read_headers(folder, scheme), Names(model, conversions)
    modules, unused = hub.group_by_linear(headers)
    skipped = re.compile("|".join(model._keys_to_ignore_on_load_unexpected or ["(?!)"]))
    linears: dict[str, list[Linear]] = defaultdict(list)
    dense, need, got = dict[str, Destination](), dict[str, Any](), dict[str, Any]()
    for prefix, parts in modules.items():
        layout = replace(scheme.layout(prefix), advice=f"; {DENSE}")
        codes = parts.get(layout.codes.name)
        if codes is None or codes.dtype in FLOATS:
            odd = parts.keys() & {plane.name for plane in (layout.codes, layout.scales, layout.zeros) if plane}
            check_value(f"{folder}: {prefix}: parts", sorted(odd), f"{layout.codes.name} of codes", odd <= {"weight"})
            for part, tensor in parts.items():
                dense |= names.dense(f"{prefix}.{part}", tensor)
            continue
        key, conversion, pattern = names.find(f"{prefix}.weight")
        if key not in names.state and skipped.search(key):  # as layers that only predict more tokens
            continue
        check_value(f"{folder}: {prefix}", "quantized", "a linear that the model has", key in names.state)
        target = _destination(prefix, key, tuple(names.state[key].shape), conversion, pattern)
        if "bias" in parts and key.removesuffix("weight") + "bias" in names.state:  # transformers reads it
            dense |= names.dense(f"{prefix}.bias", parts["bias"])
            parts = {part: tensor for part, tensor in parts.items() if part != "bias"}
        linears[key].append(linear := Linear(prefix, target, parts, layout))
        need |= hub.required_shapes(folder, linear)
        got |= {f"{prefix}.{part}": tensor.shape for part, tensor in parts.items()}
    need |= {name: target.shape for name, target in dense.items()} | dict.fromkeys(names.missing())
    got |= {name: headers.tensors[name].shape for name in dense}
    checkpoint.compare(str(folder), f"the config ({scheme.name})", need, got)
    specs = {key: hub.common_spec(folder, x, dense) for key, x in linears.items() if key.endswith(PROJECTIONS)}
    filling = defaultdict[str, list[Destination]](list)
    for target in (*dense.values(), *(linear.target for linears_of in linears.values() for linear in linears_of)):
        if target.index:
            filling[target.parameter].append(target)
    for key, targets in filling.items():
        rows, all_rows = sum(target.shape[0] for target in targets), names.state[key].shape[:2].numel()
        right = rows == all_rows and len({str(target.index) for target in targets}) == len(targets)
        check_value(f"{folder}: rows of all experts for {key}", rows, f"{all_rows} by the config", right)
    plan = StoredPlan(folder, linears, specs, unused, [], set())
    _convert_by(plan, conversions, dense)
    return plan


def _destination(prefix: str, key: str, shape: Any, conversion: Any, pattern: str | None) -> Destination:
    """Return where a linear goes in the parameter `key` of this shape; ValueError where a conversion changes it."""
    if conversion is None and len(shape) == 2:
        return Destination(key, (), shape, tuple((slice(0, size),) for size in shape))
    operations = [type(op).__name__ for op in getattr(conversion, "operations", ())]
    need = "one tensor an expert, or a linear that the model has as it is"
    right = conversion is not None and merges_experts(conversion) and len(shape) == 3
    check_value(f"{prefix}: stored for {key} {list(shape)} by", operations, need, right)
    E, N, K = shape
    sources, expert = conversion.source_patterns, re.findall(r"\.(\d+)(?=\.)", prefix + ".")[-1]
    check_value(f"{prefix}: expert", expert, f"0 to {E - 1} by the config", expert in map(str, range(E)))
    rows = N // len(sources)
    start = sources.index(pattern) * rows
    return Destination(key, (int(expert), slice(start, start + rows)), (rows, K), ((slice(0, rows),), (slice(0, K),)))


def _convert_by(plan: StoredPlan, conversions: list[Any], dense: Mapping[str, Destination]) -> None:
    """Set the conversions of the plan, and what transformers shall not report."""
    dense_keys, parts = {target.parameter for target in dense.values()}, set[str]()
    for conversion in conversions:
        if isinstance(conversion, WeightConverter) and merges_experts(conversion):
            keys = [key for key in {*plan.specs, *dense_keys} if key.endswith(tuple(conversion.target_patterns))]
            names = {linear.layout.scales.name for key in keys for linear in plan.linears.get(key, ())}
            sources = [re.sub("weight$", name, pattern) for pattern in conversion.source_patterns for name in names]
            if dense_keys.intersection(keys) or not names:
                sources += conversion.source_patterns
            conversion = converter_like(conversion, sources, ReadStored(plan, conversion))
        plan.conversions.append(conversion)
    codes = {"weight", *(linear.layout.codes.name for filling in plan.linears.values() for linear in filling)}
    plan.conversions.append(WeightConverter([rf"\.{name}$" for name in sorted(codes)], [".weight"], [ReadStored(plan)]))
    for filling in plan.linears.values():
        parts.update(*(linear.parts for linear in filling))
    parts |= {name.rpartition(".")[2] for name in plan.unused}
    plan.ignored = {rf"\.({'|'.join(sorted(parts - {'weight', 'bias'}))})$", r"\.experts\.\d+\.\w+\.(weight|bias)$"}


class ReadStored(ConversionOps):
    """Fill a parameter from the plan's linears; of one that has none do what `conversion` does."""

    def __init__(self, plan: StoredPlan, conversion: Any = None) -> None:
        self.plan, self.conversion = plan, conversion

    def __deepcopy__(self, memo: Any) -> "ReadStored":  # transformers copies a conversion for each of its targets
        return self

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """input_dict: lists of tensors, of which the first shows the device."""
        name, plan = kwargs["full_layer_name"], self.plan
        path, _, key = name.rpartition(".")
        module = kwargs["model"].get_submodule(path)
        parameter, device = getattr(module, key), next(iter(input_dict.values()))[0].device
        if (linears := plan.linears.get(name)) is None:
            if self.conversion is None:
                return {name: next(iter(input_dict.values()))[0].to(parameter.dtype)}
            for operation in self.conversion.operations:
                kwargs["source_patterns"] = self.conversion.source_patterns
                input_dict = operation.convert(input_dict, **kwargs)
            return input_dict
        spec, shape = plan.specs.get(name), tuple(parameter.shape)
        weight: Any
        if spec is None:
            weight = torch.empty(shape, dtype=parameter.dtype, device=device)
        else:
            put_weight(module, key, weight := spec.empty(shape, device))
            kwargs["missing_keys"].discard(name)
        try:
            with hub.opened_files(linears) as files:
                for linear in linears if plan.fault is None else ():
                    hub.fill(weight[linear.target.index], linear, files, spec is not None)
        except (ValueError, OSError) as error:  # transformers would only log it
            plan.fault = error
        return {name: weight} if spec is None else {}


def put_weight(module: Any, key: str, weight: QuantizedWeight) -> None:
    """Replace a parameter by `weight`, which transformers then leaves as it is."""
    del module._parameters[key]
    setattr(module, key, weight)
    initialized: Any
    for initialized in (weight, *weight.buffers()):
        initialized._is_hf_initialized = True

"""Read checkpoints: dense tensors, perhaps quantized meanwhile, and those that are quantized already: each linear's
codes, scales and zeros exactly into its QuantizedWeight, or, where a caller asks for other formats, its values.

As in `checkpoint/tensors.py`, names and shapes on disk are checked in full before data are read.
"""

import itertools
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import tensors as checkpoint
from ..checkpoint.config import MixtralConfig, checkpoint_folder, error_prefix
from ..checkpoint.shard import UNSHARDED, Shard
from ..checkpoint.tensors import Destination, Headers, Stored
from ..kernels.weights.formats import FORMATS
from ..kernels.weights.quantized import QuantizedWeight
from . import QUANTIZED_PARTS, Formats, QuantSpec, piece_rows, put, quantize_into, select_specs
from .layouts import FLOATS, HubLayout, read_scheme

# Last parts of the names of scales of activations and caches, which stay in 16 bits here.
UNUSED = {f"{what}_scale" for what in ("input", "output", "activation", "q", "k", "v", "kv")} | {"input_zero_point"}


@dataclass(frozen=True)
class Linear:
    """A quantized linear of the checkpoint, with its tensors by the last part of their names."""

    name: str
    target: Destination
    parts: Mapping[str, Stored]
    layout: HubLayout


@dataclass(frozen=True)
class LoadPlan:
    """Where the tensors of a checkpoint go."""

    linears: list[Linear]
    specs: dict[str, QuantSpec]  # of the model's parameters
    dense: dict[str, Destination]  # of tensors that are not quantized in the files
    unused: set[str]  # tensors
    requantized: frozenset[str]  # parameters whose linears are dequantized, and quantized anew where they have a spec


def read_headers(folder: checkpoint.Folder) -> Headers:
    """Read the headers of a folder, quantized or not, and its scheme."""
    path = checkpoint_folder(folder)
    return checkpoint.read_headers(path, read_scheme(path))


def plan_load(
    headers: Headers, config: MixtralConfig, shard: Shard = UNSHARDED, quantization: Formats = None
) -> LoadPlan:
    """Return the plan of a folder; ValueError unless names, dtypes and shapes are those of the config and the layouts.

    quantization: None, where every parameter is read exactly, or refused; else the formats of what is quantized anew,
    and of the others, those that no QuantizedWeight holds exactly become dense.
    """
    scheme, folder = headers.scheme, headers.folder
    if scheme is None:
        dense = checkpoint.check(headers, config, shard)
        return LoadPlan([], select_specs(quantization, checkpoint.parameter_shapes(config)), dense, set(), frozenset())
    by_linear, unused = group_by_linear(headers)
    by_parameter: dict[str, list[Linear]] = defaultdict(list)
    dense = {}
    need: dict[str, Any] = {}
    for name, target in checkpoint.destinations(headers, config, shard).items():
        prefix = name.removesuffix(".weight")
        linear = Linear(prefix, target, by_linear[prefix], layout := scheme.layout(prefix))
        quantizable = any(target.parameter.endswith(names) for names in QUANTIZED_PARTS.values())
        codes = linear.parts.get(layout.codes.name)
        if not quantizable or codes is None or codes.dtype in FLOATS:
            dense[name], need[name] = target, target.shape
            continue
        by_parameter[target.parameter].append(linear)
        need |= required_shapes(folder, linear)
    if config.tie_word_embeddings and checkpoint.HEAD in headers.tensors:
        need[checkpoint.HEAD] = need[checkpoint.EMBEDDING]
    shapes = {name: stored.shape for name, stored in headers.tensors.items() if name not in unused}
    checkpoint.compare(str(folder), f"the config ({scheme.name})", need, shapes)
    checkpoint.one_dtype(folder, {name: headers.tensors[name] for name in dense})
    specs = select_specs(quantization, checkpoint.parameter_shapes(config))
    requantized = by_parameter.keys() & specs.keys()
    for name, linears in by_parameter.items():
        # Act-order's groups may be scattered, which only the data show.
        if quantization is not None and any(linear.layout.reordered for linear in linears):
            requantized.add(name)
        elif name not in requantized:
            try:
                specs[name] = common_spec(folder, linears, dense)
            except ValueError:
                if quantization is None:
                    raise
                requantized.add(name)
    return LoadPlan([*itertools.chain(*by_parameter.values())], specs, dense, unused, frozenset(requantized))


def group_by_linear(headers: Headers) -> tuple[dict[str, dict[str, Stored]], set[str]]:
    """Return each module's tensors by the last part of their names, and the names of tensors that are not used."""
    unused = {name for name in headers.tensors if name.rpartition(".")[2] in UNUSED}
    by_linear: dict[str, dict[str, Stored]] = defaultdict(dict)
    for name, stored in headers.tensors.items():
        if name not in unused:
            prefix, _, part = name.rpartition(".")
            by_linear[prefix][part] = stored
    return by_linear, unused


def required_shapes(folder: Path, linear: Linear) -> dict[str, tuple[int, ...]]:
    """Return the tensors that a linear needs by name, with the stored shape where it is allowed."""
    need = {}
    with error_prefix(f"{folder}: {linear.name}"):
        for name, (dtypes, shapes, required) in linear.layout.parts(*linear.target.shape).items():
            stored = linear.parts.get(name)
            if stored is not None and stored.dtype not in dtypes:
                raise ValueError(f"{name} is stored as {stored.dtype}, needs {' or '.join(dtypes)}")
            if stored is not None or required:
                shape = shapes[0] if stored is None or stored.shape not in shapes else stored.shape
                need[f"{linear.name}.{name}"] = shape
    return need


def common_spec(folder: Path, linears: list[Linear], dense: Mapping[str, Destination]) -> QuantSpec:
    """Return the spec of the parameter that the linears fill; ValueError unless they agree."""
    first, name = linears[0], linears[0].target.parameter
    other = next((tensor for tensor, target in dense.items() if target.parameter == name), None)
    if other is not None:
        raise ValueError(f"{folder}: {name} needs one format, {first.name} is quantized, {other} dense")
    specs = []
    for linear in linears:
        with error_prefix(f"{folder}: {linear.name}"):
            dtype = checkpoint.DTYPES[linear.parts[linear.layout.scales.name].dtype]
            specs.append(linear.layout.spec(linear.target.shape[-1], dtype))
        if specs[-1] != specs[0]:
            got, need = (f"{x.format}:{x.group} with scales in {x.scales}" for x in (specs[-1], specs[0]))
            raise ValueError(f"{folder}: {name} needs one format, {linear.name} has {got}, {first.name} {need}")
    return specs[0]


def read_weights(
    headers: Headers,
    plan: LoadPlan,
    config: MixtralConfig,
    parameters: Mapping[str, Any],
    progress: checkpoint.Progress = checkpoint.ignore_progress,
    shard: Shard = UNSHARDED,
) -> None:
    """Fill the parameters of a model that has the specs of `plan`, from what the shard keeps. `config` is the unsharded
    model's. Raises as `checkpoint.fill` does, and ValueError for a differing tied head, for a NaN or infinite scale or
    fp8 code, and for values a layout rejects (act-order, if not dequantized). One warning names unused tensors."""
    if plan.unused:
        warn_unused(headers.folder, plan.unused, stacklevel=5)
        progress(sum(headers.tensors[name].nbytes for name in plan.unused))
    checkpoint.fill(headers.tensors, plan.dense, parameters, progress, quantize_into)
    checkpoint.check_tied_head(headers, config, parameters["embed_tokens"].device, progress, shard)
    with opened_files(plan.linears) as files:
        for linear in plan.linears:
            target, parameter = linear.target, parameters[linear.target.parameter]
            if target.is_kept and parameter.device.type != "meta":
                fill(parameter[target.index], linear, files, target.parameter not in plan.requantized)
                size = sum(stored.nbytes for stored in linear.parts.values())
                kept = math.prod(runs[0].stop - runs[0].start for runs in target.kept)
                progress(size * kept // math.prod(target.shape))


def warn_unused(folder: Path, unused: set[str], stacklevel: int) -> None:
    """Name the kinds of the unused tensors of a folder in one warning."""
    kinds = ", ".join(sorted({name.rpartition(".")[2] for name in unused}))
    text = f"{len(unused)} scales of activations or caches ({kinds}) are not used: both stay in 16 bits here"
    warnings.warn(f"{folder}: {text}", stacklevel=stacklevel)


@contextmanager
def opened_files(linears: list[Linear]) -> Iterator[dict[Path, Any]]:
    """Open the files of the linears, for `fill`."""
    with torch.no_grad(), torch.device("cpu"), ExitStack() as stack:
        paths = {stored.file for linear in linears for stored in linear.parts.values()}
        yield {path: stack.enter_context(checkpoint.opened_file(path)) for path in paths}


def fill(weight: Any, linear: Linear, files: Mapping[Path, Any], exact: bool) -> None:
    """Read what this rank keeps of a linear into `weight` [N,K], some rows at a time, unpacked on its device. exact:
    codes, scales and zeros; else values, which are quantized anew unless `weight` is a tensor."""
    layout, (N, K), (rows, (columns,)) = linear.layout, linear.target.shape, linear.target.kept

    def read(part: str, *index: slice) -> Tensor:
        name, file = f"{linear.name}.{part}", files[linear.parts[part].file]
        return (file.get_slice(name)[index] if index else file.get_tensor(name)).to(weight.device)

    with error_prefix(f"{linear.parts[layout.codes.name].file}: {linear.name}"):
        groups = layout.check(read, N, K, linear.parts, exact)
        for piece, kept_rows in checkpoint.cut(rows, piece_rows(K, weight.device)):
            codes, scales, zeros = layout.rows(read, piece, columns if exact else slice(0, K), K)
            if not torch.isfinite(scales).all():
                raise ValueError("a scale is NaN or infinite: this file is damaged")
            if fault := FORMATS[layout.format].fault(codes):
                raise ValueError(f"{fault}: this file is damaged")
            destination = weight[kept_rows]
            if exact:
                put(destination, codes, scales, zeros)
                continue
            values = layout.values((codes, scales, zeros), groups)
            if isinstance(weight, QuantizedWeight) and checkpoint.one_scale_a_row(weight, K):
                quantize_into(destination, values, columns)
            elif isinstance(weight, QuantizedWeight):
                quantize_into(destination, values[:, columns])
            elif not torch.isfinite(destination.copy_(values[:, columns])).all():
                raise ValueError(f"{destination.dtype} cannot hold a value")

"""Read quantized checkpoints of the hub exactly: each linear's codes, scales and zeros into its QuantizedWeight.

Names and shapes on disk are checked in full before data are read, as in `weights.py`.
"""

from __future__ import annotations

import itertools
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import weights
from ..config import MixtralConfig, checkpoint_folder
from ..kernels.quantized import QuantizedWeight
from ..parallel import UNSHARDED, Shard
from ..weights import Headers, Stored, Target
from .layouts import Layout, Part
from .schemes import read_scheme
from .spec import PARTS, QuantSpec, put

PIECE = 1 << 22  # codes that are unpacked at once
ROWS = 8  # packed together, at most
QUANTIZABLE = {name for names in PARTS.values() for name in names}
# Last parts of the names of scales of activations and caches, which stay in 16 bits here.
UNUSED = {f"{what}_scale" for what in ("input", "output", "activation", "q", "k", "v", "kv")} | {"input_zero_point"}


@dataclass(frozen=True)
class Linear:
    """A quantized linear of the checkpoint, with its tensors by the last part of their names."""

    name: str
    target: Target
    parts: Mapping[str, Stored]

    @property
    def nbytes(self) -> int:
        """Stored bytes of what this rank keeps."""
        (rows,), (columns,) = self.target.kept
        kept, (N, K) = (rows.stop - rows.start) * (columns.stop - columns.start), self.target.shape
        return sum(stored.nbytes for stored in self.parts.values()) * kept // (N * K)


@dataclass(frozen=True)
class Plan:
    """Where the tensors of a quantized checkpoint go.

    layout   the layout of each quantized linear
    specs    the quantization of the parameters that these fill
    dense    the other tensors by name
    unused   names of tensors that are not needed
    """

    layout: Layout
    linears: list[Linear]
    specs: dict[str, QuantSpec]
    dense: dict[str, Target]
    unused: set[str]


def read_headers(folder: weights.Folder) -> Headers:
    """Read the headers of a folder, quantized or not, and its scheme."""
    return weights.read_headers(folder, read_scheme(checkpoint_folder(folder)))


def plan(headers: Headers, config: MixtralConfig, shard: Shard = UNSHARDED) -> Plan:
    """Return the plan of a quantized folder; ValueError unless names, dtypes and shapes are those of its layout."""
    scheme, folder = headers.scheme, headers.folder
    found = _by_linear(headers)
    unused = {name for name in headers.tensors if name.rpartition(".")[2] in UNUSED}
    linears: list[Linear] = []
    dense: dict[str, Target] = {}
    need: dict[str, Any] = {}
    for name, target in weights.targets(headers, config, shard).items():
        linear = name.removesuffix(".weight")
        parts = found.get(linear, {})
        quantizable = target.parameter.rpartition(".")[2] in QUANTIZABLE
        if not quantizable or not scheme.layout.has({part: stored.dtype for part, stored in parts.items()}):
            dense[name], need[name] = target, target.shape
            continue
        if scheme.ignored(linear):
            raise ValueError(f"{folder}: {linear} is quantized, and its config says that it is not")
        linears.append(Linear(linear, target, parts))
        need |= _needed(folder, linear, parts, scheme.layout, target.shape)
    if config.tie_word_embeddings and weights.HEAD in headers.tensors:
        need[weights.HEAD] = need[weights.EMBEDDING]
    got = {name: stored.shape for name, stored in headers.tensors.items() if name not in unused}
    weights.compare(str(folder), f"the config ({scheme.name})", need, got)
    weights.one_dtype(folder, {name: headers.tensors[name] for name in dense})
    return Plan(scheme.layout, linears, _specs(folder, scheme.layout, linears, dense), dense, unused)


def _by_linear(headers: Headers) -> dict[str, dict[str, Stored]]:
    """Return the tensors by the name of their linear, then by the last part of their name."""
    found: dict[str, dict[str, Stored]] = defaultdict(dict)
    for name, stored in headers.tensors.items():
        linear, _, part = name.rpartition(".")
        if part not in UNUSED:
            found[linear][part] = stored
    return found


def _needed(
    folder: Path, linear: str, found: Mapping[str, Stored], layout: Layout, shape: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
    """Return the tensors that a linear of `shape` needs, with the shape that each has or should have."""
    try:
        parts: dict[str, Part] = layout.parts(*shape)
    except ValueError as error:
        raise ValueError(f"{folder}: {linear}: {error}") from None
    need = {}
    for name, part in parts.items():
        stored = found.get(name)
        if stored is not None and stored.dtype not in part.dtypes:
            needs = " or ".join(part.dtypes)
            raise ValueError(f"{stored.file}: {linear}.{name} is stored as {stored.dtype}, needs {needs}")
        if stored is not None or part.needed:
            fits = stored is not None and stored.shape in part.shapes
            need[f"{linear}.{name}"] = stored.shape if stored is not None and fits else part.shapes[0]
    return need


def _specs(folder: Path, layout: Layout, linears: list[Linear], dense: Mapping[str, Target]) -> dict[str, QuantSpec]:
    specs: dict[str, QuantSpec] = {}
    plain = {target.parameter: name for name, target in dense.items()}
    for linear in linears:
        name = linear.target.parameter
        if name in plain:
            raise ValueError(f"{folder}: {linear.name} is quantized and {plain[name]} is not, but both are of {name}")
        spec = layout.spec(linear.target.shape[-1], weights.DTYPES[linear.parts[layout.scale].dtype])
        if specs.setdefault(name, spec) != spec:
            raise ValueError(
                f"{folder}: {linear.name} has scales in {spec.scales}, others of {name} in {specs[name].scales}"
            )
    return specs


def load(
    headers: Headers,
    found: Plan,
    config: MixtralConfig,
    parameters: Mapping[str, Any],
    progress: weights.Progress = None,
    shard: Shard = UNSHARDED,
) -> None:
    """Fill the parameters of a model that has the specs of the plan `found`.

    Only what the shard keeps is read. Raises as `weights.load` does, and ValueError for a NaN or infinite scale or fp8
    code, and for what a layout refuses (act-order). One warning names unused tensors.
    """
    if found.unused:
        kinds = ", ".join(sorted({name.rpartition(".")[2] for name in found.unused}))
        warnings.warn(
            f"{headers.folder}: {len(found.unused)} scales of activations or caches ({kinds}) are left aside: both "
            "stay in 16 bits here",
            stacklevel=4,
        )
        if progress:
            progress(sum(headers.tensors[name].nbytes for name in found.unused))
    weights.fill(headers.tensors, found.dense, parameters, progress)
    if (
        weights.HEAD in headers.tensors
        and config.tie_word_embeddings
        and parameters["embed_tokens"].device.type != "meta"
    ):
        weights.check_tied_head(headers, progress, shard.vocabulary(config))
    with torch.no_grad(), torch.device("cpu"), _opened(found.linears) as opened:
        for linear in found.linears:
            parameter = parameters[linear.target.parameter]
            if linear.target.here and parameter.device.type != "meta":
                _fill(parameter[linear.target.index], found.layout, linear, opened)
                if progress:
                    progress(linear.nbytes)


def read(found: Plan, linear: Linear) -> QuantizedWeight:
    """Return one linear [N,K], on the CPU."""
    weight = found.specs[linear.target.parameter].empty(linear.target.shape, "cpu")
    with _opened([linear]) as opened:
        _fill(weight, found.layout, linear, opened)
    return weight


@contextmanager
def _opened(linears: list[Linear]) -> Iterator[dict[Path, Any]]:
    """Open the files that hold the linears."""
    with ExitStack() as stack:
        files = {stored.file for linear in linears for stored in linear.parts.values()}
        yield {file: stack.enter_context(weights.opened_file(file)) for file in files}


def _fill(weight: QuantizedWeight, layout: Layout, linear: Linear, opened: Mapping[Path, Any]) -> None:
    """Read the rows of one linear into `weight` [N,K]."""
    file = linear.parts[layout.marker].file
    try:
        for start, stop, codes, scales, zeros in _decode(layout, linear, opened, weight.device):
            if not torch.isfinite(scales).all():
                raise ValueError("a scale is NaN or infinite: this file is damaged")
            if weight.format == "fp8" and ((codes & 127) == 127).any():
                raise ValueError("a weight is NaN (0x7F or 0xFF in fp8): this file is damaged")
            put(weight[start:stop], codes, scales, zeros)
    except ValueError as error:
        raise ValueError(f"{file}: {linear.name}: {error}") from None


def _decode(
    layout: Layout, linear: Linear, opened: Mapping[Path, Any], device: torch.device
) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor | None]]:
    """Yield a few rows of a linear at a time: start, stop, codes uint8 [n,K], scales [n,G], zeros uint8 [n,G].

    Stored data are moved to `device` and unpacked there.
    """
    N, K = linear.target.shape
    (rows,), (columns,) = linear.target.kept
    width = columns.stop - columns.start
    axes = _kept_columns(layout, linear)

    def read(part: str, *index: slice) -> Tensor:
        stored = linear.parts[part]
        name = f"{linear.name}.{part}"
        file = opened[stored.file]
        return (file.get_slice(name)[index] if index else file.get_tensor(name)).to(device)

    def read_kept(part: str, *index: slice) -> Tensor:
        if part not in axes:
            return read(part, *index)
        at = [*index, *(slice(None) for _ in range(len(index), len(linear.parts[part].shape)))]
        axis, run = axes[part]
        at[axis] = run
        return read(part, *at)

    layout.check(read, N, K, linear.parts)
    bounds = [*range(rows.start, rows.stop, max(128, PIECE // width // 128 * 128)), rows.stop]
    for start, stop in itertools.pairwise(bounds):
        first, last = start // ROWS * ROWS, min(N, -(-stop // ROWS) * ROWS)
        inside = slice(start - first, stop - first)
        codes, scales, zeros = layout.rows(read_kept, N, width, first, last)
        zeros = None if zeros is None else zeros[inside]
        yield start - rows.start, stop - rows.start, codes[inside], scales[inside], zeros


def _kept_columns(layout: Layout, linear: Linear) -> dict[str, tuple[int, slice]]:
    """Return by part the axis of its columns and the run that a rank keeps; empty where it keeps all.

    ValueError where the columns begin or end within a group, or within what is packed together.
    """
    (N, K), columns = linear.target.shape, linear.target.kept[1][0]
    width = columns.stop - columns.start
    if width == K:
        return {}
    found = {}
    try:
        less = layout.parts(N, width)
    except ValueError as error:
        raise ValueError(f"a mesh leaves a rank {width} of its {K} columns: {error}") from None
    for name, part in layout.parts(N, K).items():
        if (stored := linear.parts.get(name)) is None:
            continue
        shape = less[name].shapes[part.shapes.index(stored.shape)]
        for axis, (size, kept) in enumerate(zip(stored.shape, shape, strict=True)):
            if size == kept:
                continue
            step = K // size
            if K % size or columns.start % step or columns.stop % step:
                raise ValueError(f"a mesh cuts its {K} columns at {columns.start}, needs a multiple of {step}")
            found[name] = axis, slice(columns.start // step, columns.stop // step)
    return found

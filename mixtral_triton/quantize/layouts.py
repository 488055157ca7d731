"""How a checkpoint is quantized: its Scheme, read from config.json, and how a quantized linear is stored: which tensors
it has on disk, and its rows as codes, scales and zeros.

N rows, K columns (the depth of the sum), G groups of columns that share a scale, C = K or G. An int32 element holds
eight values of 4 bits or four of 8, the first in the lowest bits.
"""

import itertools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.config import Field, check_value, is_size, read_json_object
from ..kernels.weights.formats import FORMATS, find_format
from . import QuantSpec

Read = Callable[..., Tensor]  # read(part, *index) returns a part of the linear, or a slice of it
# The dtypes (safetensors' names) and the shapes that a tensor of a linear may have, and whether it is required.
Part = tuple[tuple[str, ...], tuple[tuple[int, ...], ...], bool]
Rows = tuple[Tensor, Tensor, Tensor | None]  # codes uint8 [n,K], scales [n,G], zeros uint8 [n,G]

FLOATS, INTEGERS, I32 = ("F32", "BF16", "F16"), ("I32", "I64"), ("I32",)
ANEW = '; or quantize it anew with weights="int8"'
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # field of an int32 that holds each of eight neighbouring columns
Config = Mapping[str, Any]
MODELOPT_FILE = "hf_quant_config.json"  # describes modelopt's quantization where config.json does not
ALTERNATIVE = 'or load the original bf16 checkpoint with weights="int4"'

FLAG = (None, True, False)
GROUP = Field(lambda size: size == -1 or is_size(size), "a positive integer, or -1 for a scale per row")
BLOCK = Field(lambda x: isinstance(x, list) and len(x) == 2 and all(map(is_size, x)), "[rows, columns]")
NAMES = Field(lambda x: isinstance(x, list) and all(isinstance(name, str) for name in x), "a list of names")
# The check of a value that is not null, or the values that a key may have. None: the key may be missing.
Rules = dict[str, Field | tuple[Any, ...]]
COMMON: Rules = {"dynamic": (None, False), "group_size": GROUP, "block_structure": BLOCK}
EIGHT_BITS: Rules = {"num_bits": (8,), "type": (None, "int", "float"), "symmetric": (None, True), **COMMON}
EIGHT_BITS |= {"strategy": ("channel", "tensor", "block")}
PACKED: Rules = {"num_bits": (4, 8), "type": (None, "int"), "symmetric": FLAG, **COMMON}
PACKED |= {"strategy": ("group", "channel")}
RULES = {"pack-quantized": PACKED}
RULES |= dict.fromkeys(("float-quantized", "int-quantized", "naive-quantized"), EIGHT_BITS)
FP8: Rules = {"weight_block_size": BLOCK}
MODELOPT: Rules = {"quant_algo": ("FP8",)}
GPTQ: Rules = {"is_marlin_format": (None, False), "checkpoint_format": ("gptq", "gptq_v2"), "bits": (4,)}
GPTQ |= {"sym": FLAG, "group_size": GROUP}
AWQ: Rules = {"version": (None, "gemm", "GEMM"), "bits": (4,), "zero_point": (None, True), "group_size": GROUP}


@dataclass(frozen=True)
class Plane:
    """On disk: a tensor that stores a matrix [N,C] of codes, scales or zeros."""

    name: str
    dtypes: tuple[str, ...]
    rows: int = 1  # of the block of values in one element: packed in an int32, or equal to a float
    columns: int = 1
    transposed: bool = False  # the tensor is [C,N]
    ordered: bool = False  # the values in an int32 are in AWQ's order
    any_shape: bool = False  # a scale per row [N,1] or [N], or one scale for all rows, [] or [1]

    def part(self, N: int, C: int) -> Part:
        shape = -(-N // self.rows), -(-C // self.columns)
        alternatives = ((), (1,), (N,)) if self.any_shape else ()
        return self.dtypes, (shape[::-1] if self.transposed else shape, *alternatives), True

    def read(self, read: Read, rows: slice, columns: slice) -> Tensor:
        """Return these rows and columns of the matrix."""
        if self.any_shape:
            x = read(self.name).reshape(-1, 1)
            return x[rows] if len(x) > 1 else x.expand(rows.stop - rows.start, 1)
        index = enclosing_blocks(rows, self.rows), enclosing_blocks(columns, self.columns)
        x = read(self.name, *(index[::-1] if self.transposed else index))
        x = x.t() if self.transposed else x
        if x.dtype != torch.int32:
            x = x.repeat_interleave(self.rows, 0) if self.rows > 1 else x
        elif self.rows > 1:
            x = unpack(x.t(), 32 // self.rows, self.ordered).t()
        else:
            x = unpack(x, 32 // self.columns, self.ordered)
        row, column = rows.start % self.rows, columns.start % self.columns
        return x[row : row + rows.stop - rows.start, column : column + columns.stop - columns.start]


def enclosing_blocks(run: slice, size: int) -> slice:
    """Return the blocks of `size` that hold the run."""
    return slice(run.start // size, -(-run.stop // size))


def unpack(x: Tensor, bits: int, ordered: bool = False) -> Tensor:
    """Unpack int32 [..., n] -> uint8 [..., n * 32 / bits]."""
    data = x.clone(memory_format=torch.contiguous_format).view(torch.uint8)  # a stride of 1, also of a single element
    if bits == 4:
        data = torch.stack((data & 15, data >> 4), dim=-1).flatten(-2)
    return data.unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2) if ordered else data


@dataclass(frozen=True)
class HubLayout:
    """On disk: how each quantized linear [N,K] is stored."""

    format: str  # the QuantizedWeight's
    codes: Plane
    scales: Plane
    zeros: Plane | None = None  # None: not stored, the format's
    group: int | None = None  # columns that share a scale; None or -1: a scale per row
    symmetric: bool = True  # every zero is 8
    zero_offset: int = 0  # what is subtracted from a zero before it is stored: 1 in GPTQ's first version
    reordered: bool = False  # the config says that the groups are scattered over the columns
    extras: tuple[str, ...] = ()  # names of other parts
    advice: str = ANEW  # ends an error where the linear can be read, and not as it is stored

    def group_columns(self, K: int) -> int:
        """Return the columns of a group, K where a row has one scale."""
        size = K if self.group is None or self.group == -1 else self.group
        check_value("the group size", size, f"a divisor of {K} columns", K % size == 0)
        return size

    def parts(self, N: int, K: int) -> dict[str, Part]:
        """Return the tensors of a linear by the last part of their names."""
        G = K // self.group_columns(K)
        planes = (self.codes, K), (self.scales, G), (self.zeros, G)
        parts = {plane.name: plane.part(N, C) for plane, C in planes if plane is not None}
        extras: dict[str, Part] = dict.fromkeys(("g_idx", "weight_g_idx"), (INTEGERS, ((K,),), self.reordered))
        extras |= {"weight_shape": (INTEGERS, ((2,),), True), "bias": (FLOATS, ((N,),), False)}
        return parts | {name: extras[name] for name in self.extras}

    def spec(self, K: int, scales: torch.dtype) -> QuantSpec:
        """Return the QuantizedWeight's spec; ValueError where none has these groups."""
        group = self.group_columns(K)
        groups = sorted(FORMATS[self.format].stored_groups)
        need = f"{', '.join(map(str, groups))} or a scale per row{self.advice}"
        check_value("the group size", group, need, group == K or group in groups)
        return QuantSpec(self.format, group, scales, not self.symmetric)

    def check(self, read: Read, N: int, K: int, parts: Collection[str], exact: bool = True) -> Tensor:
        """Return the group of each column. ValueError where one of the `extras` among the linear's parts changes its
        values, or, if `exact`, the groups of its columns."""
        extras = {name: read(name) for name in self.extras if name in parts}
        shape = extras["weight_shape"].tolist() if "weight_shape" in extras else [N, K]
        check_value("weight_shape", shape, f"the config's {[N, K]}", shape == [N, K])
        largest = extras["bias"].abs().max().item() if "bias" in extras else 0
        check_value("the largest bias", largest, "0: the model has none", largest == 0)
        indices = extras.get("g_idx", extras.get("weight_g_idx"))
        groups = torch.arange(K) // (size := self.group_columns(K))
        if indices is None or torch.equal(indices := indices.long().cpu(), groups):
            return groups
        if exact:
            raise ValueError(
                f"the weight is in act-order (g_idx scatters the groups), needs desc_act false{self.advice}"
            )
        least, most = torch.stack(torch.aminmax(indices)).tolist()
        check_value("g_idx", [least, most], f"groups in 0..{K // size - 1}", least >= 0 and most < K // size)
        return indices

    def rows(self, read: Read, rows: slice, columns: slice, K: int) -> Rows:
        """Return rows of these columns: whole groups, or a part of a row that is one group."""
        groups = enclosing_blocks(columns, self.group_columns(K))
        codes, scales = self.codes.read(read, rows, columns).view(torch.uint8), self.scales.read(read, rows, groups)
        if self.codes.columns > 1:  # elements of int32
            codes = codes ^ FORMATS[self.format].offset_bit
        if self.zeros is None:
            return codes, scales, None
        zeros = self.zeros.read(read, rows, groups)
        if self.zero_offset and (zeros == 15).any():
            raise ValueError("a stored zero is 15: some readers of gptq take it as 16, others as 0; needs gptq_v2")
        zeros = zeros + self.zero_offset
        if not self.symmetric:
            return codes, scales, zeros
        if (zeros != 8).any():
            raise ValueError("a zero is not 8, but the config says that the weight is symmetric")
        return codes, scales, None

    def values(self, rows: Rows, groups: Tensor) -> Tensor:
        """Return `rows` of all K columns as values, fp32 [n,K], given the group of each column."""
        codes, scales, zeros = rows
        groups = groups.to(codes.device)
        zeros = None if zeros is None else zeros.float()[:, groups]
        return FORMATS[self.format].values(codes, zeros) * scales.float()[:, groups]


COLUMN_SCALES = Plane("scales", FLOATS, transposed=True)


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint is quantized. The tensors, not the config's lists of exceptions, show which linears are."""

    name: str  # of the format, for messages
    # Layouts by patterns of the linears' names; the first is also that of all others.
    groups: Sequence[tuple[Sequence[str], HubLayout]]

    def layout(self, name: str) -> HubLayout:
        """Return the layout of the linear of this name on disk."""
        layouts = (
            layout for patterns, layout in self.groups if any(_matches_regex(name, pattern) for pattern in patterns)
        )
        return next(layouts, self.groups[0][1])


def read_scheme(folder: Path) -> Scheme | None:
    """Return the folder's scheme, None for a dense checkpoint; ValueError names the file, the key and the value."""
    path = folder / "config.json"
    values = read_json_object(path) if path.is_file() else {}
    config = values.get("quantization_config")
    if config is None and (folder / MODELOPT_FILE).is_file():
        path = folder / MODELOPT_FILE
        config = read_json_object(path).get("quantization", {})
        config = {"quant_method": "modelopt", **config} if isinstance(config, Mapping) else config
    return None if config is None else parse_scheme(config, path)


def parse_scheme(config: Any, path: object, advice: str = ALTERNATIVE) -> Scheme:
    """Return the scheme of a `quantization_config`; ValueError names `path`, the key and the value, with an advice."""
    try:
        check_value("the value", config, "a JSON object", isinstance(config, Mapping))
        method = str(config.get("quant_method"))
        check_value("quant_method", method, f"one of {', '.join(READERS)}", method in READERS)
        return READERS[method](config)
    except ValueError as error:
        raise ValueError(f"{path}: quantization_config: {error}; {advice}") from None


def _check(config: Config, rules: Rules) -> None:
    for key, rule in rules.items():
        value = config.get(key)
        if isinstance(rule, Field):
            check_value(key, value, rule.need, value is None or rule.check(value))
        else:
            need = " or ".join(str(allowed) for allowed in rule if allowed is not None)
            check_value(key, value, need, any(type(value) is type(allowed) and value == allowed for allowed in rule))


def _compressed_tensors(config: Config) -> Scheme:
    for name, key in (("transform_config", "config_groups"), ("sparsity_config", "format")):
        other = config.get(name)
        unused = not isinstance(other, Mapping) or other.get(key) in (None, {}, "dense")
        check_value(name, other, "to be absent", unused)
    groups: Any = config.get("config_groups")
    right = isinstance(groups, Mapping) and all(isinstance(group, Mapping) for group in groups.values())
    check_value("config_groups", groups, "an object of groups", right and bool(groups))
    layouts, formats = [], dict[str, None]()
    for group in groups.values():
        weights, format = group.get("weights"), str(group.get("format") or config.get("format"))
        check_value("config_groups", groups, "groups with weights", isinstance(weights, Mapping))
        _check({**config, **group, "format": format}, {"format": tuple(RULES), "targets": NAMES})
        _check(weights, RULES[format])
        layouts.append((group.get("targets") or (), _group_layout(format, weights)))
        formats[format] = None
    # A class of modules is the last choice, for linears that no name matches.
    layouts.sort(key=lambda item: "Linear" not in item[0])
    for pattern in itertools.chain(*(targets for targets, _ in layouts)):
        _matches_regex("", pattern)  # raises ValueError
        # The time that a match takes grows with the power of the repeats, and without bound where a group repeats.
        operators = re.sub(r"\\.|\(\?", "(", pattern) if pattern.startswith("re:") else ""
        right = len(re.findall("[*+?{|]", operators)) <= 8 and not re.search(r"\)[*+{]|([*+{].*){5}", operators)
        check_value("a pattern of targets", pattern, "at most 4 repeats, none of a group", right)
    return Scheme(f"compressed-tensors, {' and '.join(formats)}", layouts)


def _group_layout(format: str, weights: Config) -> HubLayout:
    """Return the layout of a group of compressed-tensors with these arguments of its weights."""
    bits, symmetric, strategy = weights["num_bits"], weights.get("symmetric"), weights["strategy"]
    group, block = weights.get("group_size"), weights.get("block_structure")
    if format == "pack-quantized":
        check_value("symmetric", symmetric, "true for 8 bits", bits == 4 or symmetric is not False)
        codes, scales = Plane("weight_packed", I32, columns=32 // bits), Plane("weight_scale", FLOATS)
        zeros = Plane("weight_zero_point", I32, rows=8) if symmetric is False else None
        reordered = weights.get("actorder") in ("group", "dynamic", True)
        form = find_format(bits), codes, scales, zeros, group if strategy == "group" else None
        return HubLayout(*form, zeros is None, reordered=reordered, extras=("weight_shape", "weight_g_idx"))
    check_value("block_structure", block, BLOCK.need, strategy != "block" or block is not None)
    block = block if strategy == "block" else None
    return _eight_bits(weights.get("type") == "float", block=block)


def _eight_bits(floats: bool, scale: str = "weight_scale", block: Sequence[int] | None = None) -> HubLayout:
    """Return the layout of codes [N,K], floats (e4m3) or int8, with a scale a tensor, row or block [rows, columns]."""
    format, codes = find_format(8, floats), Plane("weight", ("F8_E4M3",) if floats else ("I8",))
    if block is None:
        return HubLayout(format, codes, Plane(scale, FLOATS, any_shape=True))
    return HubLayout(format, codes, Plane(scale, FLOATS, rows=block[0]), group=block[1])


def _matches_regex(name: str, pattern: str) -> bool:
    """Match as compressed-tensors does: a full name, or a regular expression after "re:"."""
    try:
        return bool(re.match(pattern[3:], name)) if pattern.startswith("re:") else name == pattern
    except re.error as error:
        got = f"targets has the pattern {pattern!r:.80}"
        raise ValueError(f"{got}, needs a regular expression: {error}") from None


def _fp8(config: Config) -> Scheme:
    """AutoFP8 has a scale per tensor; DeepSeek's and transformers' checkpoints have one per block."""
    _check(config, FP8)
    block = config.get("weight_block_size")
    name, scale = ("fp8", "weight_scale") if block is None else ("fp8 in blocks", "weight_scale_inv")
    return Scheme(name, [((), _eight_bits(True, scale, block))])


def _modelopt(config: Config) -> Scheme:
    _check(config, MODELOPT)
    return Scheme("modelopt FP8", [((), _eight_bits(True))])


def _gptq(config: Config) -> Scheme:
    config = {"checkpoint_format": config.get("format", "gptq"), **config}
    _check(config, GPTQ)
    group, version = config.get("group_size"), config["checkpoint_format"]
    codes = Plane("qweight", I32, columns=8, transposed=True)
    zeros = Plane("qzeros", I32, rows=8, transposed=True)
    symmetric, reordered = config.get("sym") is not False, config.get("desc_act") is True and group not in (None, -1)
    form = find_format(4), codes, COLUMN_SCALES, zeros, group, symmetric, int(version == "gptq")
    return Scheme(version, [((), HubLayout(*form, reordered, ("g_idx", "bias")))])


def _awq(config: Config) -> Scheme:
    _check(config, AWQ)
    codes, zeros = (Plane(name, I32, rows=8, transposed=True, ordered=True) for name in ("qweight", "qzeros"))
    form = find_format(4), codes, COLUMN_SCALES, zeros, config["group_size"]
    layout = HubLayout(*form, symmetric=False, extras=("bias",))
    return Scheme("awq", [((), layout)])


READERS = {"compressed-tensors": _compressed_tensors, "fp8": _fp8, "modelopt": _modelopt, "gptq": _gptq, "awq": _awq}

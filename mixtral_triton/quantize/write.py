"""Writing a checkpoint whose experts are quantized, in compressed-tensors' layouts, a few rows in memory at a time.

int4 and int8: pack-quantized. fp8: float-quantized, for engines that quantize activations as well, token by token.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from .. import weights
from ..config import MixtralConfig, parse_json_object
from ..inputs import usable_device
from ..kernels.quantized import BITS
from ..weights import Headers, Stored, Target
from .quantizers import encode, pieces
from .spec import FORMATS, QuantSpec, select_specs

Tensors = dict[str, tuple[str, tuple[int, ...]]]  # dtype and shape by name

NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}
BYTES = {"I64": 8, "I32": 4, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1}
LEFT = ("*.safetensors", "*.gguf", "config.json", weights.INDEX_FILE, *weights.PICKLED, ".*")  # not copied


@dataclass(frozen=True)
class Made:
    """Tensors of the new checkpoint that are made of one old tensor, or of a part of it.

    lead, start  the part: its place in the leading dimensions, and its first row
    form         None: the one tensor is a copy
    tensors      dtype and shape by name: of the codes, scales and shape of a quantized linear, in this order
    """

    source: str
    stored: Stored
    tensors: Tensors
    spec: QuantSpec | None = None
    lead: tuple[slice, ...] = ()
    start: int = 0


def write(
    folder: weights.Folder,
    out: weights.Folder,
    format: str,
    device: torch.device | str | None = None,
    progress: weights.Progress = None,
) -> int:
    """The checkpoint in `folder` with its experts in `format` into `out`, which is new or empty -> bytes of tensors.

    Files, but for their tensors and config.json, are copied. `device` is where the weights are quantized, None: the GPU
    if there is one. Raises as loading does, and ValueError for a folder that is quantized already and for an `out` that
    holds anything; OSError names the file that could not be written. What an error leaves unfinished is removed.
    """
    config, headers, place = MixtralConfig.from_pretrained(folder), weights.read_headers(folder), usable_device(device)
    if headers.scheme is not None:
        raise ValueError(f"quantize: {headers.folder} is quantized already ({headers.scheme.name})")
    targets = weights.check(headers, config)
    if format not in FORMATS:
        raise ValueError(f"quantize: format is {format!r}, needs one of {', '.join(FORMATS)}")
    specs = select_specs(format, weights.parameter_shapes(config))
    if format == "int4":  # the format has one size of groups for all
        specs = {name: replace(spec, group=min(spec.group for spec in specs.values())) for name, spec in specs.items()}
    with torch.no_grad(), torch.device("cpu"), _folder(Path(out)) as (to, made):
        return _write(headers, config, targets, specs, to, made, place, progress)


@contextmanager
def _folder(out: Path) -> Iterator[tuple[Path, list[Path]]]:
    """`out`, empty, and the list of files to remove if an error ends the work."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"quantize: {out} is there already and not an empty folder")
    new, made = not out.exists(), list[Path]()
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield out, made
    except BaseException:
        for file in made:
            file.unlink(missing_ok=True)
        if new:
            out.rmdir()
        raise


def _write(
    headers: Headers,
    config: MixtralConfig,
    targets: Mapping[str, Target],
    specs: Mapping[str, QuantSpec],
    out: Path,
    made: list[Path],
    device: torch.device,
    progress: weights.Progress,
) -> int:
    by_file: dict[Path, list[Made]] = {}
    for name, stored in headers.tensors.items():
        spec = specs.get(targets[name].parameter) if name in targets else None
        by_file.setdefault(stored.file, []).extend(_made(name, stored, spec, config))
    for source, parts in by_file.items():
        made.append(out / source.name)
        with _named(out / source.name) as file, weights.opened_file(source) as opened:
            _write_file(file, parts, opened, device, progress)
    total = sum(_nbytes(*tensor) for parts in by_file.values() for one in parts for tensor in one.tensors.values())
    _write_rest(headers.folder, by_file, next(iter(specs.values())), total, out, made)
    return total


def _made(name: str, stored: Stored, spec: QuantSpec | None, config: MixtralConfig) -> Iterator[Made]:
    """What becomes of a tensor: itself, or of every linear in it codes, scales and, where packed, the shape."""
    if spec is None:
        kept = name.replace(".mlp.gate.", ".block_sparse_moe.gate.")
        yield Made(name, stored, {kept: (stored.dtype, stored.shape)})
        return
    for linear, lead, start, N in _linears(name, stored, config):
        K = stored.shape[-1]
        scale = NAMES[spec.scales], (N, K // spec.group)
        tensors: Tensors = {f"{linear}.weight": ("F8_E4M3", (N, K)), f"{linear}.weight_scale": scale}
        if spec.format != "fp8":
            words = -(-K * BITS[spec.format] // 32)
            tensors = {f"{linear}.weight_packed": ("I32", (N, words)), f"{linear}.weight_scale": scale}
            tensors[f"{linear}.weight_shape"] = ("I64", (2,))
        yield Made(name, stored, tensors, spec, lead, start)


def _linears(name: str, stored: Stored, config: MixtralConfig) -> Iterator[tuple[str, tuple[slice, ...], int, int]]:
    """The linears in a tensor of experts: the name of each, its expert there, its first row, its rows."""
    if len(stored.shape) == 2:
        yield name.removesuffix(".weight"), (), 0, stored.shape[0]
        return
    experts, inner = f"{name.partition('.mlp.')[0]}.block_sparse_moe.experts", config.intermediate_size
    for expert in range(stored.shape[0]):
        lead = (slice(expert, expert + 1),)
        if name.endswith("down_proj"):
            yield f"{experts}.{expert}.w2", lead, 0, stored.shape[1]
        else:
            yield f"{experts}.{expert}.w1", lead, 0, inner
            yield f"{experts}.{expert}.w3", lead, inner, inner


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * BYTES[dtype]


def _write_file(
    file: BinaryIO, parts: list[Made], opened: Any, device: torch.device, progress: weights.Progress
) -> None:
    """A file of safetensors: the header, then each tensor where it says; wide types first, so that all align."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    tensors = {name: tensor for one in parts for name, tensor in one.tensors.items()}
    end = 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -BYTES[item[1][0]]):
        start, end = end, end + _nbytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    file.write(len(header).to_bytes(8, "little") + header)
    for one in parts:
        places = [8 + len(header) + entries[name]["data_offsets"][0] for name in one.tensors]
        if one.spec is None:
            _copy(file, one, places[0], opened, progress)
        else:
            _quantize(file, one, one.spec, places, opened, device, progress)


def _copy(file: BinaryIO, one: Made, place: int, opened: Any, progress: weights.Progress) -> None:
    file.seek(place)
    for at, _ in weights.chunks(one.stored):
        rows = _finite(opened.get_slice(one.source)[at], one)
        file.write(_bytes(rows))
        if progress:
            progress(rows.nbytes)


def _quantize(
    file: BinaryIO,
    one: Made,
    spec: QuantSpec,
    places: list[int],
    opened: Any,
    device: torch.device,
    progress: weights.Progress,
) -> None:
    """A few rows at a time, each part to its place."""
    N, K = next(iter(one.tensors.values()))[1][0], one.stored.shape[-1]
    codes_at, scales_at, *shape_at = places
    for own in pieces(N, K, device):
        rows = slice(one.start + own.start, one.start + own.stop)
        x = _finite(opened.get_slice(one.source)[one.lead + (rows,)], one).view(-1, K)  # noqa: RUF005 (Python 3.10)
        codes, scales = (part.cpu() for part in encode(x.to(device), spec.format, spec.group))
        for at, part in ((codes_at, _words(codes, spec.format)), (scales_at, scales.to(spec.scales))):
            data = _bytes(part)
            file.seek(at + own.start * (len(data) // len(x)))
            file.write(data)
        if progress:
            progress(x.nbytes)
    for at in shape_at:
        file.seek(at)
        file.write(_bytes(torch.tensor([N, K])))


def _finite(x: Tensor, one: Made) -> Tensor:
    if not torch.isfinite(x).all():
        raise ValueError(f"{one.stored.file}: {one.source} is not finite everywhere: this file is damaged")
    return x


def _words(codes: Tensor, format: str) -> Tensor:
    """codes uint8 [n,K] -> the bytes of a row of int32, what is beyond K 0; or of fp8."""
    if format == "fp8":
        return codes
    if format == "int8":
        return nn.functional.pad(codes ^ 128, (0, -codes.shape[1] % 4))
    codes = nn.functional.pad(codes, (0, -codes.shape[1] % 8))
    return codes[:, 0::2] | codes[:, 1::2] << 4


def _bytes(x: Tensor) -> bytes:
    return x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@contextmanager
def _named(path: Path) -> Iterator[BinaryIO]:
    """The file, to be written; an error of the system tells its name, as a full disk does not by itself."""
    try:
        with path.open("wb") as file:
            yield file
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _write_rest(
    folder: Path, by_file: Mapping[Path, list[Made]], spec: QuantSpec, total: int, out: Path, made: list[Path]
) -> None:
    """The index if there was one, what stands beside the weights, and last config.json: without it nothing is read."""
    files = {name: source.name for source, parts in by_file.items() for one in parts for name in one.tensors}
    if set(files.values()) != {weights.SINGLE_FILE}:
        _write_json(out / weights.INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": files}, made)
    for file in sorted(folder.iterdir()):
        if file.is_file() and not any(file.match(pattern) for pattern in LEFT):
            made.append(out / file.name)
            with file.open("rb") as source, _named(out / file.name) as copy:
                shutil.copyfileobj(source, copy)
    config = parse_json_object((folder / "config.json").read_bytes(), str(folder / "config.json"))
    plain = [name.removesuffix(".weight") for parts in by_file.values() for one in parts for name in one.tensors]
    linears = (".q_proj", ".k_proj", ".v_proj", ".o_proj", ".gate", "lm_head")
    ignore = sorted(name for name in plain if name.endswith(linears))
    _write_json(out / "config.json", config | {"quantization_config": _config(spec, ignore)}, made)


def _write_json(path: Path, value: Any, made: list[Path]) -> None:
    made.append(path)
    with _named(path) as file:
        file.write(json.dumps(value, indent=2).encode())


def _config(spec: QuantSpec, ignore: list[str]) -> dict[str, Any]:
    """compressed-tensors' `quantization_config`."""
    kind = {"num_bits": 4 if spec.format == "int4" else 8, "type": "float" if spec.format == "fp8" else "int"}
    row = {"strategy": "channel", "group_size": None}
    shared = {"strategy": "group", "group_size": spec.group} if spec.format == "int4" else row
    weight = {**kind, "symmetric": True, "dynamic": False, **shared}
    tokens = {**kind, "symmetric": True, "dynamic": True, "strategy": "token"} if spec.format == "fp8" else None
    group = {"targets": ["Linear"], "weights": weight, "input_activations": tokens, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "float-quantized" if spec.format == "fp8" else "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ignore,
        "kv_cache_scheme": None,
    }

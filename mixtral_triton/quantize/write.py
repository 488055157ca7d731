"""Write a quantized checkpoint, in compressed-tensors' layouts, with one shard in memory at a time.

Integers: pack-quantized. Floats: float-quantized, for engines that also quantize activations, token by token.
"""

import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checkpoint import tensors as checkpoint
from ..checkpoint.arguments import usable_device
from ..checkpoint.config import MixtralConfig, checkpoint_folder, read_json_object
from ..checkpoint.tensors import Destination
from ..kernels.weights.formats import FORMATS
from ..kernels.weights.quantized import QuantizedWeight
from . import QUANTIZED_PARTS, QuantSpec, encode, hub, pieces, select_specs

# A README is of the format that the folder had.
NOT_COPIED = ("*.safetensors", "*.gguf", "README*", "config.json", checkpoint.INDEX_FILE, *checkpoint.PICKLED, ".*")
LINEARS = (".q_proj", ".k_proj", ".v_proj", ".o_proj", ".gate", "lm_head")
# Patterns of the linears of each of QUANTIZED_PARTS, where their formats differ.
TARGETS = {"experts": [r"re:.*\.experts\..*"], "linear": [r"re:.*\.self_attn\..*_proj", "lm_head"]}


class Kind(NamedTuple):
    """How compressed-tensors stores a linear: columns of a group (None: a scale a row), zeros, rows of a block."""

    format: str
    group: int | None
    zeros: bool = False
    rows: int = 1


def write(
    folder: checkpoint.Folder,
    out: checkpoint.Folder,
    quantization: str | Mapping[str, str],
    device: torch.device | str | None = None,
    progress: checkpoint.Progress = checkpoint.ignore_progress,
) -> int:
    """Write the checkpoint in `folder` into `out`, new or empty, quantized; return bytes of tensors.

    quantization: as `weights` of `Mixtral.from_pretrained`, "int4" or {"experts": "int4", "linear": "int8"}.
    Files other than tensors and config.json are copied. `device` is where weights are quantized, None: the GPU if there
    is one. Raises as loading does; ValueError for a folder that is quantized already and an `out` that is not empty;
    OSError names the file that could not be written. Unfinished files are removed after an error.
    """
    folder = checkpoint_folder(folder)
    config, headers = MixtralConfig.from_pretrained(folder), hub.read_headers(folder)
    target_device = usable_device(device)
    if target_device.type == "meta":
        raise ValueError("quantize: device is 'meta', which holds no numbers, needs cpu or cuda")
    if headers.scheme is not None:
        raise ValueError(f"quantize: {headers.folder} is quantized already ({headers.scheme.name})")
    targets, per_expert = checkpoint.check(headers, config), checkpoint.table(config, "per_expert")
    checkpoint.check_tied_head(headers, config, torch.device("cpu"))
    specs = select_specs(quantization, checkpoint.parameter_shapes(config), "quantize")
    part_specs: dict[str, QuantSpec] = {}
    for part, names in QUANTIZED_PARTS.items():
        if members := {name: spec for name, spec in specs.items() if name.endswith(names)}:
            part_specs[part] = min(members.values(), key=lambda spec: spec.group)
            if FORMATS[part_specs[part].format].groups:  # compressed-tensors has one size of a part's groups
                specs |= dict.fromkeys(members, part_specs[part])
    if "experts" not in part_specs:
        raise ValueError(f"quantize: weights is {quantization!r}, needs a format of the experts")
    total, files = 0, dict[str, str]()
    with torch.no_grad(), torch.device("cpu"), _new_folder(Path(out)) as new:
        for source, items in itertools.groupby(headers.tensors.items(), key=lambda item: item[1].file):
            tensors: dict[str, Tensor] = {}
            with checkpoint.opened_file(source) as opened:
                for name, _ in items:
                    read = partial(_read, opened.get_slice(name), f"{source}: {name}", progress)
                    target = targets.get(name)  # None: a tied head
                    if target is not None and target.parameter in specs:
                        fused = {expert: to for expert, to in per_expert.items() if to.parameter == target.parameter}
                        linears = {name: replace(target, index=())} if name in per_expert else fused
                        for linear, destination in linears.items():
                            parts = _quantize(read, destination, specs[target.parameter], target_device)
                            tensors |= {linear.removesuffix("weight") + part: x for part, x in parts.items()}
                    else:
                        tensors[name.replace(".mlp.gate.", f".{config.family.module}.gate.")] = read(slice(None))
            try:
                save_file(tensors, new / source.name, metadata={"format": "pt"})
            except SafetensorError as error:  # a full disk
                raise OSError(f"{new / source.name}: {error}") from error
            total += sum(tensor.nbytes for tensor in tensors.values())
            files |= dict.fromkeys(tensors, source.name)
        _write_other_files(headers.folder, new, files, total, part_specs)
    return total


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Create `out`, which must be new or empty; after an error, leave it as it was."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"quantize: {out} is there already and not an empty folder")
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield out
    except BaseException:
        for file in out.iterdir():
            file.unlink()
        if new:
            out.rmdir()
        raise


def _read(part: Any, name: str, progress: checkpoint.Progress, index: Any) -> Tensor:
    """Read a part of a stored tensor; ValueError unless it is finite."""
    x = part[index]
    if not torch.isfinite(x).all():
        raise ValueError(f"{name} is not finite everywhere: this file is damaged")
    progress(x.nbytes)
    return x


def _quantize(
    read: Callable[[Any], Tensor], linear: Destination, spec: QuantSpec, device: torch.device
) -> dict[str, Tensor]:
    """Return codes, scales and shape of a linear of a stored tensor, quantized some rows at a time. linear: its shape
    [N,K], and as index its expert and first rows, where the tensor holds several linears."""
    (N, K), index, planes = linear.shape, linear.index, []
    first = next((run.start for run in index if isinstance(run, slice)), 0)
    for piece in pieces(N, K, device):
        x = read((*index[:1], slice(first + piece.start, first + piece.stop)))
        codes, scales = (plane.cpu() for plane in encode(x.to(device), spec.format, spec.group))
        planes.append((_pack(codes, spec.format), scales.to(spec.scales)))
    codes, scales = map(torch.cat, zip(*planes, strict=True))
    return _parts(codes, scales, spec.format, [N, K])


def pack_linear(weight: QuantizedWeight, kind: Kind) -> dict[str, Tensor]:
    """Return the tensors of a linear [N,K] as its kind stores them: the weight's bits."""
    scales, zeros = weight.scales.cpu()[:: kind.rows].contiguous(), weight.zeros
    parts = _parts(_pack(weight.codes.cpu(), kind.format), scales, kind.format, [*weight.shape])
    if zeros is not None:
        packed = _pack((zeros.float() - 128).to(torch.uint8).cpu().t().contiguous(), kind.format)
        parts["weight_zero_point"] = packed.flatten().view(torch.int32).view(len(packed), -1).t().contiguous()
    return parts


def _parts(codes: Tensor, scales: Tensor, format: str, shape: list[int]) -> dict[str, Tensor]:
    """Return the tensors of a linear by the last part of their names. codes: as `_pack` returns them."""
    if (floats := FORMATS[format].float_dtype) is not None:
        return {"weight": codes.contiguous().view(floats), "weight_scale": scales}
    return {"weight_packed": codes.view(torch.int32), "weight_scale": scales, "weight_shape": torch.tensor(shape)}


def _pack(codes: Tensor, format: str) -> Tensor:
    """Pack codes uint8 [n,K] into bytes: those of int32 rows, padded with 0, or of floats. int8 is packed, too: readers
    of 16-bit activations take that."""
    kind = FORMATS[format]
    if kind.float_dtype is not None:
        return codes
    codes = nn.functional.pad(codes ^ kind.offset_bit, (0, -codes.shape[1] % (32 // kind.bits)))
    return codes if kind.bits == 8 else codes[:, 0::2] | codes[:, 1::2] << 4


def _write_other_files(
    folder: Path, out: Path, files: Mapping[str, str], total: int, specs: Mapping[str, QuantSpec]
) -> None:
    """Copy the other files, write the index if there was one, and last config.json, which makes the rest readable."""
    texts = {}
    if set(files.values()) != {checkpoint.SINGLE_FILE}:
        texts[checkpoint.INDEX_FILE] = {"metadata": {"total_size": total}, "weight_map": files}
    for file in sorted(folder.iterdir()):
        if file.is_file() and not any(map(file.match, NOT_COPIED)):
            shutil.copyfile(file, out / file.name)
    config = read_json_object(folder / "config.json")
    quantized = {name.rpartition(".")[0] for name in files if name.endswith(".weight_scale")}
    # A tied head is in no file, and is a Linear of its readers nevertheless.
    linears = {"lm_head", *(name.removesuffix(".weight") for name in files if name.endswith(".weight"))}
    dense = sorted(name for name in linears - quantized if name.endswith(LINEARS))
    groups = []
    for part, spec in specs.items():
        targets = ["Linear"] if len(specs) == 1 else [target for target in TARGETS[part] if target not in dense]
        groups.append(config_group(Kind(spec.format, spec.group if FORMATS[spec.format].groups else None), targets))
    texts["config.json"] = config | {"quantization_config": quantization_config(groups, dense)}
    for name, value in texts.items():
        (out / name).write_text(json.dumps(value, indent=2), encoding="utf-8")


def kind_of(weight: QuantizedWeight, linears: Iterable[QuantizedWeight]) -> Kind:
    """Return how compressed-tensors stores a weight of these linears."""
    group, rows = None if weight.group == weight.shape[-1] else weight.group, 1
    if weight.group in weight.kind.groups:
        group = weight.group
    if weight.kind.float_dtype is not None and group:  # the scales of blocks, which a QuantizedWeight has for each row
        scales = [linear.scales for linear in linears]
        square = all(torch.equal(x, x[::group].repeat_interleave(group, 0)[: len(x)]) for x in scales)
        rows = group if square else 1
    return Kind(weight.format, group, weight.zeros is not None, rows)


def config_group(kind: Kind, targets: list[str]) -> dict[str, Any]:
    """Return the group of compressed-tensors' `config_groups` for linears of a kind with these patterns of names."""
    stored = FORMATS[kind.format]
    type = "int" if stored.float_dtype is None else "float"
    form = {"num_bits": stored.bits, "type": type}  # as compressed-tensors names them
    strategy, block = ("group" if kind.group else "channel"), {}
    if type == "float" and kind.group:
        strategy, block = "block", {"block_structure": [kind.rows, kind.group]}
    weights = {**form, "symmetric": not kind.zeros, "dynamic": False, "group_size": kind.group if not block else None}
    inputs = {**form, "symmetric": True, "dynamic": True, "strategy": "token"}
    return {
        "targets": targets,
        "weights": weights | {"strategy": strategy} | block,
        "input_activations": inputs if type == "float" else None,
        "output_activations": None,
        "format": "pack-quantized" if type == "int" else "float-quantized",
    }


def quantization_config(groups: Sequence[Mapping[str, Any]], ignore: list[str]) -> dict[str, Any]:
    """Return compressed-tensors' `quantization_config`. ignore: the names of dense linears."""
    formats = {group["format"] for group in groups}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "mixed-precision" if len(formats) > 1 else formats.pop(),
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        "ignore": ignore,
        "kv_cache_scheme": None,
    }

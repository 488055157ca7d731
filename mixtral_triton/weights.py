"""A checkpoint's weights: the tensors that it must hold, where each goes, and reading them.

This file lists the parameters of the model (`parameter_shapes`) and the tensors of both layouts on disk (`table`).
Headers are checked in full before data are read. Data go from the mapped file into the parameters in chunks, without a
second copy. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import MixtralConfig, checkpoint_folder, parse_json_object, refuse_gguf
from .kernels.quantized import GROUPS, QuantizedWeight
from .parallel import UNSHARDED, Shard

Layout = Literal["per_expert", "fused"]
Shape = tuple[int, ...]
Runs = tuple[slice, ...]
Folder = str | os.PathLike[str]
Progress = Callable[[int], object] | None
# Quantizes rows into a weight of the same rows, and of the columns that the slice keeps.
Quantizer = Callable[[Any, Tensor, Any], None]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLED = ("pytorch_model*.bin*", "*.pt", "*.pth")
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
CODES = {"F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64}  # if quantized
CHUNK_BYTES = 16 * 2**20
NAMED = 4  # tensors that an error lists before it only counts
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Target:
    """A stored tensor of `shape` goes into `parameters[parameter][index]`.

    kept  per dimension the runs that this rank keeps, concatenated; all of it without a mesh
    """

    parameter: str
    index: tuple[int | slice, ...]
    shape: Shape
    kept: tuple[Runs, ...]

    @property
    def here(self) -> bool:
        """Whether this rank keeps a part of it."""
        return all(self.kept)


@dataclass(frozen=True)
class Stored:
    """A tensor on disk: its file, safetensors' name of its dtype, its shape, its position in the file."""

    file: Path
    dtype: str
    shape: Shape
    place: int

    @property
    def itemsize(self) -> int:
        return (DTYPES | CODES)[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True)
class Headers:
    """The checked headers of all tensors in a checkpoint folder, by name.

    scheme  how it is quantized (quantize.schemes); None where it is not
    """

    folder: Path
    tensors: Mapping[str, Stored]
    scheme: Any = None


def parameter_shapes(config: MixtralConfig, shard: Shard = UNSHARDED) -> dict[str, Shape]:
    """Return name and shape of each parameter of the model, or of a rank's part. A tied head has no `lm_head`."""
    hidden, inner, experts = config.hidden_size, _length(shard.inner(config)), _length(shard.experts(config))
    rows = qkv_rows(shard.config(config))
    layer_shapes: dict[str, Shape] = {
        "input_layernorm": (hidden,),
        "qkv_proj": (rows["v"].stop, hidden),
        "o_proj": (hidden, rows["q"].stop),
        "post_attention_layernorm": (hidden,),
        "gate": (config.num_local_experts, hidden),
        "gate_up_proj": (experts, 2 * inner, hidden),
        "down_proj": (experts, hidden, inner),
    }
    shapes: dict[str, Shape] = {"embed_tokens": (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in layer_shapes.items()}
    shapes["norm"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head"] = (_length(shard.vocabulary(config)), hidden)
    return shapes


def table(config: MixtralConfig, layout: Layout, shard: Shard = UNSHARDED) -> dict[str, Target]:
    """Return each tensor of a checkpoint of this layout by its name on disk, and where it goes."""
    hidden, vocabulary, E, I = config.hidden_size, config.vocab_size, config.num_local_experts, config.intermediate_size
    experts, inner = shard.experts(config), shard.inner(config)
    kept_rows, rows = shard.qkv_rows(config), qkv_rows(shard.config(config))
    gate, up = slice(0, _length(inner)), slice(_length(inner), 2 * _length(inner))
    targets: dict[str, Target] = {}

    def put(name: str, parameter: str, shape: Shape, *index: int | slice, **kept: Runs) -> None:
        """`kept`: the runs of the dimension "first", or of the last two, "rows" and "columns"."""
        names = ("first", "rows", "columns")[-len(shape) :] if len(shape) > 1 else ("",)
        runs = (kept.get(dimension, (slice(0, size),)) for dimension, size in zip(names, shape, strict=True))
        targets[name] = Target(parameter, index, shape, tuple(runs))

    put(EMBEDDING, "embed_tokens", (vocabulary, hidden))
    put("model.norm.weight", "norm", (hidden,))
    if not config.tie_word_embeddings:
        put(HEAD, "lm_head", (vocabulary, hidden), rows=(shard.vocabulary(config),))
    for layer in range(config.num_hidden_layers):
        disk, here = f"model.layers.{layer}", f"layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            put(f"{disk}.{norm}.weight", f"{here}.{norm}", (hidden,))
        for projection, stored in qkv_rows(config).items():
            shape, run = (_length(stored), hidden), kept_rows[projection]
            put(f"{disk}.self_attn.{projection}_proj.weight", f"{here}.qkv_proj", shape, rows[projection], rows=(run,))
        shape = (hidden, _length(qkv_rows(config)["q"]))
        put(f"{disk}.self_attn.o_proj.weight", f"{here}.o_proj", shape, columns=(kept_rows["q"],))
        moe = f"{disk}.mlp" if layout == "fused" else f"{disk}.block_sparse_moe"
        put(f"{moe}.gate.weight", f"{here}.gate", (E, hidden))
        if layout == "fused":
            runs = (inner, slice(I + inner.start, I + inner.stop))
            put(f"{moe}.experts.gate_up_proj", f"{here}.gate_up_proj", (E, 2 * I, hidden), first=(experts,), rows=runs)
            put(f"{moe}.experts.down_proj", f"{here}.down_proj", (E, hidden, I), first=(experts,), columns=(inner,))
            continue
        for expert in range(E):
            at, kept = expert - experts.start, (inner,) if experts.start <= expert < experts.stop else ()
            put(f"{moe}.experts.{expert}.w1.weight", f"{here}.gate_up_proj", (I, hidden), at, gate, rows=kept)
            put(f"{moe}.experts.{expert}.w3.weight", f"{here}.gate_up_proj", (I, hidden), at, up, rows=kept)
            put(f"{moe}.experts.{expert}.w2.weight", f"{here}.down_proj", (hidden, I), at, columns=kept)
    return targets


def _length(run: slice) -> int:
    return run.stop - run.start


def qkv_rows(config: MixtralConfig) -> dict[str, slice]:
    """Return the rows of `qkv_proj` that hold each of the three projections."""
    query, value = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return {"q": slice(0, query), "k": slice(query, query + value), "v": slice(query + value, query + 2 * value)}


def read_headers(folder: Folder, scheme: Any = None) -> Headers:
    """Read the headers of `model.safetensors`, or of the shards that `model.safetensors.index.json` names.

    `scheme`: how the folder is quantized; it then may hold integers and fp8 (`quantize.hub.read_headers` finds it).
    Raises FileNotFoundError for missing files; ValueError for pickled weights, an index that disagrees with its shards
    or points out of the folder, a truncated or padded file, a dtype other than F32, BF16 or F16, mixed dtypes.
    """
    path = checkpoint_folder(folder)
    refuse_gguf(path)
    dtypes = DTYPES if scheme is None else DTYPES | CODES
    if os.path.lexists(path / SINGLE_FILE):  # preferred over an index, as in transformers
        tensors = _read_header(path / SINGLE_FILE, dtypes)
    elif os.path.lexists(path / INDEX_FILE):
        tensors = _read_shards(path / INDEX_FILE, dtypes)
    elif pickled := sorted(file.name for pattern in PICKLED for file in path.glob(pattern)):
        raise ValueError(f"{path}: {some(pickled)}: pickle can run any code and is never read; safetensors is needed")
    else:
        raise FileNotFoundError(f"{path}: holds neither {SINGLE_FILE} nor {INDEX_FILE}")
    if not tensors:
        raise ValueError(f"{path}: the checkpoint holds no tensor")
    if scheme is None:
        one_dtype(path, tensors)
    return Headers(path, tensors, scheme)


def one_dtype(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Raise ValueError unless all tensors are stored in the same dtype."""
    usual = Counter(stored.dtype for stored in tensors.values()).most_common(1)[0][0]
    odd = [f"{name} is {stored.dtype}" for name, stored in tensors.items() if stored.dtype != usual]
    if odd:
        raise ValueError(f"{path}: tensors of one dtype are needed; most are {usual}, but {some(odd)}")


def stored_dtype(headers: Headers) -> torch.dtype:
    """Return the dtype of the tensors that are not quantized."""
    return DTYPES[headers.tensors[EMBEDDING].dtype]


def total_bytes(headers: Headers) -> int:
    """Return the bytes of all stored tensors, to which `progress` of `load` adds up."""
    return sum(stored.nbytes for stored in headers.tensors.values())


def check(headers: Headers, config: MixtralConfig, shard: Shard = UNSHARDED) -> dict[str, Target]:
    """Return the table of the layout that the names show; ValueError names missing, unknown and misshapen tensors.

    It is cheap for any config: run it before allocating.
    """
    tensors, found = headers.tensors, targets(headers, config, shard)
    need = {name: target.shape for name, target in found.items()}
    if config.tie_word_embeddings and HEAD in tensors:
        need[HEAD] = need[EMBEDDING]  # allowed if equal to the embedding, which `load` checks
    compare(str(headers.folder), "the config", need, {name: stored.shape for name, stored in tensors.items()})
    return found


def targets(headers: Headers, config: MixtralConfig, shard: Shard = UNSHARDED) -> dict[str, Target]:
    """Return the table of the layout that the names on disk show; ValueError for a config far beyond them."""
    tensors = headers.tensors
    layout: Layout = "fused" if any(".mlp.experts." in name for name in tensors) else "per_expert"
    least = config.num_hidden_layers * (config.num_local_experts if layout == "per_expert" else 1)
    if least > len(tensors):  # before a broken config makes the table endless
        raise ValueError(f"{headers.folder}: holds {len(tensors)} tensors, the config asks for {least} or more")
    return table(config, layout, shard)


def load(
    headers: Headers,
    found: Mapping[str, Target],
    config: MixtralConfig,
    parameters: Mapping[str, Any],
    progress: Progress = None,
    shard: Shard = UNSHARDED,
    quantizer: Quantizer | None = None,
) -> None:
    """Fill `parameters` (names and shapes of `parameter_shapes`, any float dtype and device) with what `check` `found`.

    `config` is the unsharded model's. Only what the shard keeps is read, except rows that get one scale. `quantizer`
    fills a QuantizedWeight among the parameters from a few rows at a time. Parameters on the meta device stay unset.
    `progress` gets the number of bytes just loaded.
    Raises only ValueError or OSError, for values not finite in the parameter's dtype and for a differing tied head.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    compare("parameters", "the config", parameter_shapes(config, shard), shapes)
    fill(headers.tensors, found, parameters, progress, quantizer)
    check_tied_head(headers, config, parameters, progress, shard)


def fill(
    tensors: Mapping[str, Stored],
    targets: Mapping[str, Target],
    parameters: Mapping[str, Any],
    progress: Progress,
    quantizer: Quantizer | None = None,
) -> None:
    """Read each tensor that has a target into its parameter, in the order of files."""
    order = sorted(tensors.items(), key=lambda item: (item[1].file, item[1].place))
    # Inside a caller's `with torch.device("meta")`, safetensors would return meta tensors: hence the second context.
    with torch.no_grad(), torch.device("cpu"):
        for file, items in itertools.groupby(order, key=lambda item: item[1].file):
            with opened_file(file) as opened:
                for name, stored in items:
                    target = targets.get(name)
                    if target and target.here and parameters[target.parameter].device.type != "meta":
                        destination = parameters[target.parameter][target.index]
                        for count in _fill(opened.get_slice(name), name, stored, target, destination, quantizer):
                            if progress:
                                progress(count)


def _fill(part: Any, name: str, stored: Stored, target: Target, destination: Any, quantizer: Any) -> Iterator[int]:
    """Read one tensor in chunks, and yield the bytes of each."""
    kept, columns, K = target.kept, None, stored.shape[-1]
    if isinstance(destination, QuantizedWeight) and (destination.format != "int4" or K in GROUPS):
        kept, (columns,) = (*kept[:-1], (slice(0, K),)), kept[-1]  # a row has one scale, for all of its columns
    for at, place in chunks(stored, kept):
        copied = source = part[at]
        if isinstance(destination, Tensor):
            copied = destination[place]
            copied.copy_(source)
        else:
            quantizer(destination[place], source, columns)
        # A sum of NaN or infinity is never finite: a finite one proves the chunk in one pass, without temporaries.
        # A sum may overflow by itself: then each value is checked.
        if not torch.isfinite(copied.sum()) and not torch.isfinite(copied).all():
            raise _not_finite(name, stored, at, source, copied)
        yield source.nbytes


def _not_finite(name: str, stored: Stored, at: tuple[slice, ...], source: Tensor, copied: Tensor) -> ValueError:
    damaged = not torch.isfinite(source).all()
    local = torch.isfinite(source if damaged else copied).logical_not().nonzero()[0].tolist()
    first = [piece.start + along for piece, along in zip(at, local, strict=False)] + local[len(at) :]
    why = "weights must be finite, this file is damaged" if damaged else f"{copied.dtype} cannot hold it"
    return ValueError(f"{stored.file}: {name} holds {source[tuple(local)].item()} at {first}: {why}")


def check_tied_head(
    headers: Headers, config: MixtralConfig, parameters: Mapping[str, Any], progress: Progress, shard: Shard
) -> None:
    """Raise ValueError where a stored head differs from the embedding that the model uses in its place."""
    head, embedding, rows = headers.tensors.get(HEAD), headers.tensors[EMBEDDING], shard.vocabulary(config)
    if head is None or not config.tie_word_embeddings or parameters["embed_tokens"].device.type == "meta":
        return
    with torch.device("cpu"), opened_file(head.file) as head_file, opened_file(embedding.file) as embedding_file:
        for at, _ in chunks(head, ((rows,), (slice(0, head.shape[1]),))):
            if not torch.equal(part := head_file.get_slice(HEAD)[at], embedding_file.get_slice(EMBEDDING)[at]):
                raise ValueError(f"{head.file}: {HEAD} differs from {EMBEDDING}, but tie_word_embeddings is true")
            if progress:
                progress(part.nbytes)


def chunks(stored: Stored, kept: tuple[Runs, ...] | None = None) -> Iterator[tuple[Runs, Runs]]:
    """Yield indices that cut what is kept of a tensor (None: all) into rows of at most CHUNK_BYTES, at least one row.

    Of each pair the first indexes the stored tensor, the second one that holds only what is kept.
    """
    kept = kept or tuple((slice(0, size),) for size in stored.shape)
    rows = max(0, len(kept) - 2)
    leading, columns = kept[:rows], [run for (run,) in kept[rows + 1 :]]
    row_bytes = math.prod(map(_length, columns)) * stored.itemsize
    step = max(1, CHUNK_BYTES // row_bytes)
    for outer in itertools.product(
        *(enumerate(i for run in runs for i in range(run.start, run.stop)) for runs in leading)
    ):
        before = tuple(slice(i, i + 1) for _, i in outer), tuple(slice(i, i + 1) for i, _ in outer)
        place = 0
        for run in kept[rows]:
            for start in range(run.start, run.stop, step):
                count = min(step, run.stop - start)
                yield (*before[0], slice(start, start + count), *columns), (*before[1], slice(place, place + count))
                place += count


@contextmanager
def opened_file(file: Path) -> Iterator[Any]:
    """Map the file: slices are views, so reading takes no memory. Library errors become ValueError."""
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            yield opened
    except (SafetensorError, RuntimeError) as error:
        size = file.stat().st_size
        raise ValueError(f"{file}: cut off, damaged or not safetensors ({size} bytes): {error}") from error


def _read_shards(index: Path, dtypes: Mapping[str, torch.dtype]) -> dict[str, Stored]:
    """Return the tensors of all files of `weight_map` (tensor name -> plain name of a file beside the index)."""
    weight_map = parse_json_object(index.read_bytes(), str(index)).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index}: weight_map is missing; an object of tensor name to file name is needed")
    shards: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        # Checks the name, not a link's target: the hub's cache links to ../../blobs. Windows' rules are stricter.
        if not isinstance(file, str) or PureWindowsPath(file).name != file or file == "..":
            raise ValueError(f"{index}: {name!r} is in {file!r}; a plain file name inside the folder is needed")
        if not file.endswith(".safetensors"):
            raise ValueError(f"{index}: {name!r} is in {file!r}; only .safetensors is read, pickled files never are")
        shards.setdefault(file, []).append(name)
    tensors: dict[str, Stored] = {}
    for file, names in shards.items():
        shard = _read_header(index.parent / file, dtypes)
        compare(str(index.parent / file), index.name, dict.fromkeys(names), dict.fromkeys(shard))
        tensors |= shard
    return tensors


def compare(holder: str, source: str, need: Mapping[str, Shape | None], got: Mapping[str, Shape | None]) -> None:
    """Raise ValueError unless `got` has the names and the shapes of `need`; None stands for any shape."""
    names = {"missing": need.keys() - got.keys(), "unknown": got.keys() - need.keys()}
    wrong = [f"{len(named)} {what} ({some(sorted(named))})" for what, named in names.items() if named]
    if not wrong:
        wrong = [f"{name} has shape {got[name]}, not {shape}" for name, shape in need.items() if shape != got[name]]
    if wrong:
        raise ValueError(f"{holder}: not the tensors that {source} asks for: {some(wrong)}")


def some(names: list[str]) -> str:
    """Return the first names and the count of the others."""
    text = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
    return text.encode("ascii", "backslashreplace").decode()  # a broken file's names may not be printable


def _read_header(file: Path, dtypes: Mapping[str, torch.dtype]) -> dict[str, Stored]:
    """Return the tensors of a safetensors file; the library checks that they fill it exactly."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file, though the checkpoint needs it")
    found = {}
    with opened_file(file) as opened:
        for place, name in enumerate(opened.offset_keys()):
            part = opened.get_slice(name)
            dtype = part.get_dtype()
            if dtype not in dtypes:
                raise ValueError(f"{file}: {name!r} is stored as {dtype!r}; one of {', '.join(dtypes)} is needed")
            found[name] = Stored(file, dtype, tuple(part.get_shape()), place)
    with file.open("rb") as raw:
        # The library takes the last of two tensors of one name.
        parse_json_object(raw.read(int.from_bytes(raw.read(8), "little")), f"{file} (header)")
    return found

"""A checkpoint's weights: the tensors that it must hold, where each goes, and reading them.

This file lists the parameters of the model (`parameter_shapes`) and the tensors of both layouts on disk (`table`).
Headers are checked in full before data are read. Data go from the mapped file into the parameters in chunks, without a
second copy. Format: https://github.com/huggingface/safetensors#format
"""

import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..kernels.weights.quantized import QuantizedWeight, QuantSpec
from .config import INDEX_FILE, SINGLE_FILE, MixtralConfig, check_one_source, checkpoint_folder, escape, read_index
from .shard import UNSHARDED, Shard

KeyLayout = Literal["per_expert", "fused"]
Shape = tuple[int, ...]
Runs = tuple[slice, ...]
Folder = str | os.PathLike[str]
Progress = Callable[[int], object]  # called with the number of bytes just read
# Quantizes rows into a weight of the same rows, and of the columns that the slice keeps.
Quantizer = Callable[[Any, Tensor, Any], None]

PICKLED = ("pytorch_model*.bin*", "*.pt", "*.pth")
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
CODES = {"F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64}  # if quantized
CHUNK_BYTES = 16 * 2**20
NAMED = 4  # tensors that an error lists before it only counts
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Destination:
    """A stored tensor of `shape` goes into `parameters[parameter][index]`.

    kept  per dimension the runs that this rank keeps, concatenated; all of it without a mesh
    """

    parameter: str
    index: tuple[int | slice, ...]
    shape: Shape
    kept: tuple[Runs, ...]

    @property
    def is_kept(self) -> bool:
        """Whether this rank keeps a part of the tensor."""
        return all(self.kept)


@dataclass(frozen=True)
class Stored:
    """A tensor on disk: its file, safetensors' name of its dtype, its shape."""

    file: Path
    dtype: str
    shape: Shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * (DTYPES | CODES)[self.dtype].itemsize


@dataclass(frozen=True)
class Headers:
    """The checked headers of all tensors in a checkpoint folder, by name, in the order of the files.

    scheme  how it is quantized (quantize.layouts); None where it is not
    """

    folder: Path
    tensors: Mapping[str, Stored]
    scheme: Any = None


def parameter_shapes(config: MixtralConfig, shard: Shard = UNSHARDED) -> dict[str, Shape]:
    """Return name and shape of each parameter of the model, or of a rank's part. A tied head has no `lm_head`."""
    shapes: dict[str, Shape] = {}
    for target in table(config, "fused", shard).values():
        rows, *sizes = (sum(map(_length, runs)) for runs in target.kept)
        if target.parameter in shapes:  # the second or third projection of qkv_proj
            rows += shapes[target.parameter][0]
        shapes[target.parameter] = (rows, *sizes)
    return shapes


def table(config: MixtralConfig, layout: KeyLayout, shard: Shard = UNSHARDED) -> dict[str, Destination]:
    """Return each tensor of a checkpoint of this layout by its name on disk, and where it goes."""
    hidden, E, I = config.hidden_size, config.num_local_experts, config.intermediate_size
    experts, inner = shard.experts(config), shard.inner(config)
    kept_rows, rows = shard.qkv_rows(config), qkv_rows(shard.config(config))
    family, (gate, up, down_name) = config.family, config.family.projections
    halves = {gate: slice(0, _length(inner)), up: slice(_length(inner), 2 * _length(inner))}
    destinations: dict[str, Destination] = {}

    def put(name: str, parameter: str, shape: Shape, *index: int | slice, **kept: Runs) -> None:
        """`kept`: the runs of the dimension "experts", or of the last two, "rows" and "columns"."""
        names = ("experts", "rows", "columns")[-len(shape) :] if len(shape) > 1 else ("",)
        runs = (kept.get(dimension, (slice(0, size),)) for dimension, size in zip(names, shape, strict=True))
        destinations[name] = Destination(parameter, index, shape, tuple(runs))

    put(EMBEDDING, "embed_tokens", (config.vocab_size, hidden))
    for layer in range(config.num_hidden_layers):
        stored, parameters = f"model.layers.{layer}", f"layers.{layer}"
        put(f"{stored}.input_layernorm.weight", f"{parameters}.input_layernorm", (hidden,))
        for name, run in qkv_rows(config).items():
            projection, shape = f"{stored}.self_attn.{name}_proj.weight", (_length(run), hidden)
            put(projection, f"{parameters}.qkv_proj", shape, rows[name], rows=(kept_rows[name],))
            if family.norms and name != "v":
                norm = _length(rows[name]) if family.norms == "row" else config.head_dim
                put(f"{stored}.self_attn.{name}_norm.weight", f"{parameters}.{name}_norm", (norm,))
        shape = (hidden, _length(qkv_rows(config)["q"]))
        put(f"{stored}.self_attn.o_proj.weight", f"{parameters}.o_proj", shape, columns=(kept_rows["q"],))
        put(f"{stored}.post_attention_layernorm.weight", f"{parameters}.post_attention_layernorm", (hidden,))
        gate_up, down = f"{parameters}.gate_up_proj", f"{parameters}.down_proj"
        if layout == "fused":
            put(f"{stored}.mlp.gate.weight", f"{parameters}.gate", (E, hidden))
            kept = {"experts": (experts,), "rows": (inner, slice(I + inner.start, I + inner.stop))}
            put(f"{stored}.mlp.experts.gate_up_proj", gate_up, (E, 2 * I, hidden), **kept)
            put(f"{stored}.mlp.experts.down_proj", down, (E, hidden, I), experts=(experts,), columns=(inner,))
            continue
        put(f"{stored}.{family.module}.gate.weight", f"{parameters}.gate", (E, hidden))
        for expert in range(E):
            name, index = f"{stored}.{family.module}.experts.{expert}", expert - experts.start
            runs = (inner,) if experts.start <= expert < experts.stop else ()
            for half, part in halves.items():
                put(f"{name}.{half}.weight", gate_up, (I, hidden), index, part, rows=runs)
            put(f"{name}.{down_name}.weight", down, (hidden, I), index, columns=runs)
    put("model.norm.weight", "norm", (hidden,))
    if not config.tie_word_embeddings:
        put(HEAD, "lm_head", (config.vocab_size, hidden), rows=(shard.vocabulary(config),))
    return destinations


def _length(run: slice) -> int:
    return run.stop - run.start


def qkv_rows(config: MixtralConfig) -> dict[str, slice]:
    """Return the rows of `qkv_proj` that hold each of the three projections."""
    query, value = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return {"q": slice(0, query), "k": slice(query, query + value), "v": slice(query + value, query + 2 * value)}


def read_headers(folder: Folder, scheme: Any = None) -> Headers:
    """Read the headers of `model.safetensors`, or of the shards that `model.safetensors.index.json` names.

    `scheme`: how the folder is quantized; it then may hold integers and fp8 (`quantize.hub.read_headers` finds it).
    Raises FileNotFoundError for missing files; ValueError for both, an index that disagrees with its shards
    or points out of the folder, a truncated or padded file, a dtype other than F32, BF16 or F16, mixed dtypes.
    """
    path = checkpoint_folder(folder)
    check_one_source(path)
    names = read_index(path / INDEX_FILE) if os.path.lexists(path / INDEX_FILE) else {SINGLE_FILE: list[str]()}
    tensors: dict[str, Stored] = {}
    for file, expected in names.items():
        header = _read_header(path / file, DTYPES if scheme is None else DTYPES | CODES)
        if expected:
            compare(str(path / file), INDEX_FILE, dict.fromkeys(expected), dict.fromkeys(header))
        tensors |= header
    if scheme is None:
        one_dtype(path, tensors)
    return Headers(path, tensors, scheme)


def one_dtype(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Raise ValueError unless all tensors are stored in the same dtype."""
    usual = Counter(stored.dtype for stored in tensors.values()).most_common(1)
    if odd := [f"{escape(name)} is {stored.dtype}" for name, stored in tensors.items() if stored.dtype != usual[0][0]]:
        raise ValueError(f"{path}: tensors of one dtype are needed; most are {usual[0][0]}, but {summarize(odd)}")


def total_bytes(headers: Headers) -> int:
    """Return the bytes of all stored tensors, to which `progress` of a loader adds up."""
    return sum(stored.nbytes for stored in headers.tensors.values())


def check(headers: Headers, config: MixtralConfig, shard: Shard = UNSHARDED) -> dict[str, Destination]:
    """Return the table of the layout that the names show; ValueError names missing, unknown and misshapen tensors.
    It is cheap for any config: run it before allocating."""
    tensors, targets = headers.tensors, destinations(headers, config, shard)
    need = {name: target.shape for name, target in targets.items()}
    if config.tie_word_embeddings and HEAD in tensors:
        need[HEAD] = need[EMBEDDING]  # allowed if equal to the embedding: `check_tied_head`
    compare(str(headers.folder), "the config", need, {name: stored.shape for name, stored in tensors.items()})
    return targets


def destinations(headers: Headers, config: MixtralConfig, shard: Shard = UNSHARDED) -> dict[str, Destination]:
    """Return the table of the layout that the names on disk show; ValueError for a config far beyond them."""
    tensors = headers.tensors
    fused = any(name.endswith(".mlp.experts.gate_up_proj") for name in tensors)
    layout: KeyLayout = "fused" if fused else "per_expert"
    least = config.num_hidden_layers * (config.num_local_experts if layout == "per_expert" else 1)
    if least > len(tensors):  # before a broken config makes the table endless
        raise ValueError(f"{headers.folder}: holds {len(tensors)} tensors, the config asks for {least} or more")
    return table(config, layout, shard)


def ignore_progress(size: int) -> None:
    """Show nothing."""


def fill(
    tensors: Mapping[str, Stored],
    destinations: Mapping[str, Destination],
    parameters: Mapping[str, Any],
    progress: Progress,
    quantizer: Quantizer,
) -> None:
    """Read each tensor that has a target into its parameter, file by file. `quantizer` fills a QuantizedWeight among
    them from a few rows at a time. Raises only ValueError or OSError, also for values that are not finite in the
    parameter's dtype. Parameters on the meta device stay unset. `progress` gets the number of bytes just read."""
    # Inside a caller's `with torch.device("meta")`, safetensors would return meta tensors: hence the second context.
    with torch.no_grad(), torch.device("cpu"):
        for file, items in itertools.groupby(tensors.items(), lambda item: item[1].file):
            with opened_file(file) as opened:
                for name, stored in items:
                    target = destinations.get(name)
                    if target and target.is_kept and parameters[target.parameter].device.type != "meta":
                        parameter = parameters[target.parameter]
                        destination = getattr(parameter, "memory", parameter)[target.index]  # `empty_on_host`
                        _fill(opened.get_slice(name), name, stored, target, destination, progress, quantizer)


def _fill(
    part: Any,
    name: str,
    stored: Stored,
    target: Destination,
    destination: Any,
    progress: Progress,
    quantizer: Quantizer,
) -> None:
    """Read one tensor in chunks."""
    kept, columns, K = target.kept, None, stored.shape[-1]
    quantized = isinstance(destination, QuantizedWeight) and destination.format != "dense"  # dense: offload.py
    if quantized and one_scale_a_row(destination, K):
        kept, (columns,) = (*kept[:-1], (slice(0, K),)), kept[-1]
    for index, kept_index in chunks(stored, kept):
        copied = source = part[index]
        if quantized:
            quantizer(destination[kept_index], source, columns)
        else:
            copied = destination[kept_index]
            copied.copy_(source)
        # A sum of NaN or infinity is never finite: a finite one proves the chunk in one pass, without temporaries.
        # A sum may overflow by itself: then each value is checked.
        if not torch.isfinite(copied.sum()) and not torch.isfinite(copied).all():
            damaged = not torch.isfinite(source).all()
            why = "weights must be finite, this file is damaged" if damaged else f"{copied.dtype} cannot hold it"
            raise ValueError(f"{stored.file}: {name} is not finite everywhere: {why}")
        progress(source.nbytes)


def one_scale_a_row(weight: QuantizedWeight, K: int) -> bool:
    """Whether quantizing gives a full row of K columns one scale, of which `weight` may hold a part."""
    return QuantSpec.default_for(weight.format, K).group == K


def check_tied_head(
    headers: Headers,
    config: MixtralConfig,
    device: torch.device,
    progress: Progress = ignore_progress,
    shard: Shard = UNSHARDED,
) -> None:
    """Raise ValueError where a stored head differs from the embedding that a model on `device` uses in its place."""
    head, embedding, rows = headers.tensors.get(HEAD), headers.tensors[EMBEDDING], shard.vocabulary(config)
    if head is None or not config.tie_word_embeddings or device.type == "meta":
        return
    with torch.device("cpu"), opened_file(head.file) as head_file, opened_file(embedding.file) as embedding_file:
        stored = head_file.get_slice(HEAD)[rows]
        if not torch.equal(stored, embedding_file.get_slice(EMBEDDING)[rows]):
            raise ValueError(f"{head.file}: {HEAD} differs from {EMBEDDING}, but tie_word_embeddings is true")
        progress(stored.nbytes)


def chunks(stored: Stored, kept: tuple[Runs, ...]) -> Iterator[tuple[Runs, Runs]]:
    """Yield indices that cut what is kept of a tensor into rows of at most CHUNK_BYTES, at least one row.

    Of each pair the first indexes the stored tensor, the second one that holds only what is kept.
    """
    last = max(1, len(kept) - 1)  # the dimension of the columns; a vector has none
    columns = [run for (run,) in kept[last:]]
    row_bytes = math.prod(map(_length, columns)) * DTYPES[stored.dtype].itemsize
    steps = [*[1] * (last - 1), max(1, CHUNK_BYTES // row_bytes)]
    for pieces in itertools.product(*map(cut, kept[:last], steps)):
        yield (*(source for source, _ in pieces), *columns), tuple(destination for _, destination in pieces)


def cut(runs: Runs, step: int) -> Iterator[tuple[slice, slice]]:
    """Yield pieces of the runs, and where each is among all of them."""
    kept_start = 0
    for run in runs:
        for start in range(run.start, run.stop, step):
            stop = min(start + step, run.stop)
            yield slice(start, stop), slice(kept_start, kept_start + stop - start)
            kept_start += stop - start


@contextmanager
def opened_file(file: Path) -> Iterator[Any]:
    """Map the file: slices are views, so reading takes no memory. Library errors become ValueError."""
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            yield opened
    except torch.OutOfMemoryError as error:  # of the device that the tensors go to
        raise ValueError(f"no memory is left for the weights: {error}") from error
    except (SafetensorError, RuntimeError) as error:
        size = file.stat().st_size
        raise ValueError(f"{file}: cut off, damaged or not safetensors ({size} bytes): {error}") from error


def compare(holder: str, source: str, need: Mapping[str, Shape | None], got: Mapping[str, Shape | None]) -> None:
    """Raise ValueError unless `got` has the names and shapes of `need`."""
    names = {"missing": need.keys() - got.keys(), "unknown": got.keys() - need.keys()}
    wrong = [f"{len(named)} {what} ({summarize(sorted(map(escape, named)))})" for what, named in names.items() if named]
    wrong = wrong or [
        f"{escape(name)} has shape {got[name]}, not {shape}" for name, shape in need.items() if shape != got[name]
    ]
    if wrong:
        raise ValueError(f"{holder}: not the tensors that {source} asks for: {summarize(wrong)}")


def summarize(names: list[str]) -> str:
    """Return the first names and the count of the others."""
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _read_header(file: Path, dtypes: Mapping[str, torch.dtype]) -> dict[str, Stored]:
    """Return the tensors of a safetensors file; the library checks that they fill it exactly."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file, needs what transformers' save_pretrained writes")
    header = {}
    with opened_file(file) as opened:
        for name in opened.offset_keys():
            part = opened.get_slice(name)
            if (dtype := part.get_dtype()) not in dtypes:
                raise ValueError(f"{file}: {name!r:.80} is stored as {dtype!r:.80}, needs one of {', '.join(dtypes)}")
            header[name] = Stored(file, dtype, tuple(part.get_shape()))
    return header

"""A second reader of a checkpoint folder, config.json and every layout of the hub, without code of those it checks.

N rows, K columns (the depth of the sum), G groups of columns that share a scale
"""

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .report import Row, worst_rows

LAYER = re.compile(r"model\.layers\.(\d+)\.")
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # the column of each 4 bits of a word, lowest first (AutoAWQ's GEMM)
UNUSED = ("_scale", "_zero_point")  # ends of names of what quantizes activations and caches
LAYER_EXPERT = re.compile(r"\D*\.(\d+)\..*\.experts\.(\d+)\.(\w+)\.weight")
# A linear of an expert by its name in any family, and its place among gate, up and down.
LINEARS = {"w1": 0, "gate_proj": 0, "fc1": 0, "w3": 1, "up_proj": 1, "fc3": 1, "w2": 2, "down_proj": 2, "fc2": 2}
# Fields of other families' config.json by the names of Mixtral's, and what they are where they are missing.
NAMES = {"num_experts": "num_local_experts", "norm_topk_prob": "renormalize"}
OTHERS: dict[str, Any] = {
    "qwen3_moe": (NAMES | {"moe_intermediate_size": "intermediate_size"}, {"rms_norm_eps": 1e-6, "eos_token_id": None}),
    "olmoe": (NAMES, {"eos_token_id": 50279}),
}


class Source:
    """The tensors of a folder by layer (None: outside of them) and name: each one's opened files by stored name."""

    def __init__(self, folder: Any) -> None:
        self.folder = Path(folder)
        self.config = self.read_json("config.json")
        modelopt = self.read_json("hf_quant_config.json", optional=True)
        self.quantization = self.config.get("quantization_config") or modelopt.get("quantization")
        names = ["model.safetensors"]
        if not (self.folder / "model.safetensors").exists():
            names = sorted(set(self.read_json("model.safetensors.index.json")["weight_map"].values()))
        self.files = [self.folder / name for name in names]
        modules: dict[str, dict[str, Any]] = defaultdict(dict)
        for path in self.files:
            opened = safe_open(path, framework="pt", device="cpu")
            for name in opened.keys():  # noqa: SIM118 (it is no dictionary)
                modules[name.rpartition(".")[0]][name] = opened
        self.layers: dict[int | None, dict[str, dict[str, Any]]] = defaultdict(dict)
        for module, files in modules.items():
            layer, weight = LAYER.match(f"{module}."), f"{module}.weight"
            tensors = self.layers[int(layer[1]) if layer else None]
            codes = {f"{module}.qweight", f"{module}.weight_packed"} & files.keys()
            if codes or (weight in files and files[weight].get_slice(weight).get_dtype() in ("F8_E4M3", "I8")):
                tensors[weight] = files
            else:
                tensors |= {name: {name: file} for name, file in files.items() if not name.endswith(UNUSED)}

    def read_json(self, name: str, optional: bool = False) -> Any:
        """The object in a file of the folder; an empty one where an optional file is not there."""
        file = self.folder / name
        return {} if optional and not file.is_file() else json.loads(file.read_text(encoding="utf-8"))

    def read(self, files: dict[str, Any], device: Any, expert: Any = ...) -> Tensor:
        """A tensor on the device, or one expert of [E,N,K]; a quantized linear is decoded there, fp32 [N,K]."""
        if expert is not ...:
            ((name, file),) = files.items()
            return file.get_slice(name)[expert].to(device)
        parts = {name.rpartition(".")[2]: file.get_tensor(name).to(device) for name, file in files.items()}
        if len(parts) == 1:
            return next(iter(parts.values()))
        return decode(parts, self.quantization, next(iter(files)).rpartition(".")[0])


def decode(parts: dict[str, Tensor], quantization: Any, module: str = "") -> Tensor:
    """(code - zero) * scale in fp32 [N,K], of the tensors of a linear and the folder's `quantization_config`."""
    groups = list(quantization.get("config_groups", {}).values())  # compressed-tensors
    targets = ((group, target.removeprefix("re:")) for group in groups for target in group.get("targets", ()))
    named = [group for group, target in targets if re.match(target, module)] or groups
    rules: dict[str, Any] = named[0]["weights"] if named else {}
    block = quantization.get("weight_block_size") or (rules.get("strategy") == "block" and rules["block_structure"])
    order, zeros = parts.get("g_idx", parts.get("weight_g_idx")), torch.zeros(())
    if "qweight" in parts and quantization["quant_method"] == "awq":
        codes, zeros = (unpack(parts[name], 4, AWQ_COLUMNS).t() for name in ("qweight", "qzeros"))
        scales = parts["scales"].t()
    elif "qweight" in parts:
        codes, zeros = unpack(parts["qweight"].t(), bits := quantization["bits"]), unpack(parts["qzeros"], bits).t()
        if quantization.get("checkpoint_format", quantization.get("format", "gptq")) == "gptq":
            zeros = zeros + 1  # the first version stores zero - 1
        scales = parts["scales"].t()
    elif "weight_packed" in parts:
        (rows, columns), bits = parts["weight_shape"].tolist(), rules["num_bits"]
        codes, zeros = unpack(parts["weight_packed"], bits)[:, :columns], zeros + (1 << (bits - 1))
        if "weight_zero_point" in parts:
            zeros = unpack(parts["weight_zero_point"].t(), bits).t()[:rows]
        scales = parts["weight_scale"]
    else:
        codes, scales = parts["weight"], parts["weight_scale" if "weight_scale" in parts else "weight_scale_inv"]
        scales = scales.repeat_interleave(block[0], 0)[: len(codes)] if block else scales.reshape(-1, 1)
    (N, K), G = codes.shape, scales.shape[1]
    if order is None:
        order = torch.arange(K, device=codes.device) // (block[1] if block else K // G)
    scales, zeros = (x.to(codes.device).float().expand(N, G)[:, order.long()] for x in (scales, zeros))
    return (codes.float() - zeros) * scales


def unpack(words: Tensor, bits: int, columns: Sequence[int] = ()) -> Tensor:
    """int32 [R,n], 32 / bits values in each, lowest first -> int32 [R, n * 32 / bits], each word's in these columns."""
    fields = [columns.index(position) if columns else position for position in range(32 // bits)]
    return torch.stack([words >> bits * field & (1 << bits) - 1 for field in fields], -1).flatten(-2)


def declared_fields(source: Source, config: Any) -> dict[str, Any]:
    """Read what a folder declares of the fields of `config`. Theta and the ids that end a text are sets, since they may
    stand in several places."""
    raw, generation = source.config, source.read_json("generation_config.json", optional=True)
    names, missing = OTHERS.get(raw["model_type"], (NAMES, {}))
    raw = {**missing, **raw, **{names[name]: raw[name] for name in names.keys() & raw}}
    if not raw.get("use_sliding_window", True):
        raw["sliding_window"] = None
    ropes = (raw, raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {})
    defaults = {"rms_norm_eps": 1e-5, "sliding_window": None, "tie_word_embeddings": False}
    fields = defaults | {name: value for name, value in raw.items() if hasattr(config, name)}
    fields |= {name: None for name, value in fields.items() if value == -1}
    fields["rope_theta"] = {rope["rope_theta"] for rope in ropes if rope.get("rope_theta") is not None}
    fields["sliding_window"] = fields["sliding_window"] or None
    fields["head_dim"] = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    fields["dtype"] = str(raw.get("dtype", raw.get("torch_dtype"))).removeprefix("torch.")
    return fields | {"eos_token_id": _ids(raw.get("eos_token_id", 2), generation.get("eos_token_id"))}


def _ids(*fields: Any) -> set[int]:
    ids = (token for value in fields for token in (value if isinstance(value, (list, tuple)) else [value]))
    return {token for token in ids if token not in (None, -1)}


def config_row(source: Source, model: Any) -> Row:
    """The row of the fields of the model's config against config.json."""
    raw = declared_fields(source, model.config)
    used = {name: [getattr(model.config, name)] for name in raw}
    used |= {"rope_theta": [{model.config.rope_theta}], "dtype": [str(model.config.dtype)]}
    used["eos_token_id"] = [_ids(model.config.eos_token_id)]
    used["tie_word_embeddings"].append(model.lm_head is model.embed_tokens)
    differing = ((name, x) for name in used for x in used[name] if x != raw[name])
    name, x = next(differing, ("values", None))
    note = "" if name == "values" else f"the model has {x!r}, declared is {raw[name]!r}"
    return Row.exact(None, "config", name, not note, note)


def linear_of_expert(module: Any, expert: int, name: str) -> Any:
    """Return the part of gate_up_proj or down_proj that a linear of one of LINEARS' names fills."""
    part, I = LINEARS[name], module.down_proj.shape[-1]
    return module.down_proj[expert] if part == 2 else module.gate_up_proj[expert][part * I : (part + 1) * I]


def check_stored(experts: Mapping[int | None, Any], folder: Any) -> list[Row]:
    """The rows of modules of experts as stored, by the numbers of their layers, against the files of any family."""
    source, rows = Source(folder), list[Row]()
    missing = {layer: 3 * len(module.down_proj) for layer, module in experts.items()}  # gate, up and down
    for name, files in (item for tensors in source.layers.values() for item in tensors.items()):
        place = LAYER_EXPERT.fullmatch(name)
        if place is None or (layer := int(place[1])) not in experts or place[3] not in LINEARS:
            continue
        module, expert = experts[layer], int(place[2])
        from_file = source.read(files, module.down_proj.device).float()
        known = expert < len(module.down_proj)
        same = known and torch.equal(linear_of_expert(module, expert, place[3]).dequantize(), from_file)
        rows.append(Row.exact(layer, "weights", "as stored", same, f"{name} is another in the files" * (not same)))
        missing[layer] -= 1
    rows += [Row.exact(layer, "weights", "as stored", count == 0) for layer, count in missing.items()]
    return worst_rows(rows)

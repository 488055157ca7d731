"""The sizes of a checkpoint's model, as the letters of operations."""

from __future__ import annotations

from ...config import MixtralConfig
from ...kernels.op import Shape, Sizes, switches


def letters(model: MixtralConfig) -> dict[str, int]:
    """What a config.json says: widths, experts, heads, layers, vocabulary, positions and the window (0: none)."""
    return {
        "H": model.hidden_size,
        "I": model.intermediate_size,
        "E": model.num_local_experts,
        "K": model.num_experts_per_tok,
        "Hq": model.num_attention_heads,
        "Hkv": model.num_key_value_heads,
        "D": model.head_dim,
        "L": model.num_hidden_layers,
        "V": model.vocab_size,
        "P": model.max_position_embeddings,
        "window": model.sliding_window or 0,
    }


def resized(sizes: Sizes, model: MixtralConfig) -> Shape | None:
    """The sizes of a case of Mixtral 8x7B as `model` has them; None where it has no such case."""
    own = letters(model)
    positions, held = own["P"], own["window"] or own["P"]
    if not switches(sizes).causal:
        return None
    if not {"S", "C"} & set(sizes) and sizes["T"] + sizes.get("past", 0) > positions:
        return None
    small = Shape(sizes) | {letter: own[letter] for letter in sizes if letter in own}
    if "N" in sizes:
        small |= _product(sizes["N"], own)
    if "L" in sizes:  # a decode step: the positions that its cache holds, and one layer or several
        small |= {"L": min(sizes["L"], own["L"]), "S": min(sizes["S"], held)}
    elif "S" in sizes:
        small["S"] = min(sizes["S"], positions)
        small["T"] = small["S"] if sizes["T"] == sizes["S"] else min(sizes["T"], small["S"])
    if "C" in sizes:
        small["C"] = min(sizes["C"], held)
        small |= {"T": min(sizes["T"], small["C"]), "past": min(sizes["past"], small["C"] - 1)}
    return small


def _product(columns: int, own: Sizes) -> dict[str, int]:
    """The matrix product that has `columns` results in Mixtral 8x7B: into queries, keys and values, out of heads, or
    into the vocabulary."""
    heads = own["Hq"] * own["D"]
    if columns == 4096:
        return {"H": heads, "N": own["H"]}
    return {"N": heads + 2 * own["Hkv"] * own["D"] if columns == 6144 else own["V"]}

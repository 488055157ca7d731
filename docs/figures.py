"""The figures of README.md and docs/mixtral.md, drawn from the code that they explain.

    python docs/figures.py [FOLDER]

Writes layer-light.svg, layer-dark.svg, window.svg, heads.svg and route.svg into FOLDER, docs/figures if none is given.
Needs matplotlib: pip install ".[plot]".
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mixtral_triton import SMALL, KVCache, Mixtral, reference
from mixtral_triton.bench.fit import KNOWN
from mixtral_triton.checkpoint.tensors import parameter_shapes
from mixtral_triton.cli.trace import token_texts
from mixtral_triton.hf.masks import CACHE
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.quantize import select_specs

try:
    from matplotlib import rcParams
    from matplotlib.figure import Figure
except ImportError:
    sys.exit('docs/figures.py needs matplotlib: pip install ".[plot]"')

TOKENS, WINDOW, LAYERS = 14, 4, 3  # of the window's figure
TEXT = "The return statement leaves the current function call"
rcParams["svg.hashsalt"] = "the same file from the same code"
SAME = {"Date": None}  # no date in it, for the same reason


def our_kernels(name: str) -> int:
    """Count the device kernels of a layer in a decode step of a model that `fit` knows."""

    def count(layers: int) -> int:
        model = Mixtral(replace(KNOWN[name], num_hidden_layers=layers), "meta")
        cache = KVCache(model.config, 1, 8192, "meta")
        with record_launches() as launches:
            model.hidden(torch.zeros((1, 1), dtype=torch.int64, device="meta"), cache)
        return len(launches)

    return count(3) - count(2)


def their_kernels(name: str, experts: str) -> int:
    """Count those of transformers' model: torch's operations that compute, without reads of the host. Their number
    depends on the experts, not on sizes, so this one is small."""
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

    known = KNOWN[name]
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "head_dim": 16}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": known.num_experts_per_tok}
    sizes |= {known.family.name_of("num_local_experts"): known.num_local_experts, "norm_topk_prob": True}

    def count(layers: int) -> int:
        config = AutoConfig.for_model(known.model_type, **sizes, num_hidden_layers=layers)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        model.set_experts_implementation(experts)
        past: Any = {CACHE: DynamicCache(config=config)}
        with torch.no_grad():
            model(torch.zeros((1, 8), dtype=torch.int64), **past)
            with record_launches() as launches:
                model(torch.zeros((1, 1), dtype=torch.int64), **past)
        return sum(launch.kernel != "aten::_local_scalar_dense" for launch in launches)

    return count(3) - count(2)


def bytes_read(name: str, weights: Any = None) -> int:
    """Return the bytes of a layer's weights that a decode step of one token reads: those of K of E experts."""
    config = KNOWN[name]
    shapes = {at: shape for at, shape in parameter_shapes(config).items() if at.startswith("layers.0.")}
    specs, total = select_specs(weights, shapes), 0.0
    for at, shape in shapes.items():
        size = specs[at].empty(shape, "meta").nbytes if at in specs else 2 * torch.Size(shape).numel()
        total += size * config.num_experts_per_tok / config.num_local_experts if len(shape) == 3 else size
    return int(total)


def layer(file: Path, dark: bool = False) -> None:
    """Device kernels and bytes of weights of a layer in a decode step: transformers beside this package."""
    text = "#e6edf3" if dark else "#1f2328"
    colours = ["#8b949e", "#6e7781", "#2f81f7", "#3fb950"]
    names = {"mixtral-8x7b": "Mixtral 8x7B", "qwen3-30b-a3b": "Qwen3-30B-A3B"}
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = [(f"{label}\n{who}", name, who) for name, label in names.items() for who in ("eager", "grouped_mm", "ours")]
    counts = [our_kernels(name) if who == "ours" else their_kernels(name, who) for _, name, who in rows]
    left.barh(range(6), counts, color=[colours[who == "ours" and 2] for *_, who in rows])
    left.set_yticks(range(6), [label for label, *_ in rows])
    left.set_title("device kernels of a decode layer")
    formats = {"16 bits": None, "int4, linear int8": {"experts": "int4", "linear": "int8"}}
    bars = [(f"{label}\n{format}", bytes_read(name, value) / 1e6) for name, label in names.items()
            for format, value in formats.items()]  # fmt: skip
    right.barh(range(4), [size for _, size in bars], color=[colours[2 * (index % 2)] for index in range(4)])
    right.set_yticks(range(4), [label for label, _ in bars])
    right.set_title("MB of weights it reads for a token")
    for axes, values in ((left, counts), (right, [size for _, size in bars])):
        for place, value in enumerate(values):
            axes.text(value, place, f" {value:,.0f}", va="center", color=text, fontsize=10)
        axes.invert_yaxis()
        axes.set(xticks=[], xlim=(0, 1.2 * max(values)))
        axes.title.set_color(text)
        axes.title.set_fontsize(10)
        axes.tick_params(colors=text, labelsize=9, length=0)
        axes.spines[:].set_visible(False)
    figure.savefig(file, metadata=SAME, transparent=True)


def visible(tokens: int, window: int) -> torch.Tensor:
    """Which key each query sees, [T,T] bool: where attention over values of one key alone gives something."""
    q = torch.zeros(1, tokens, 1, tokens)
    values = torch.eye(tokens).view(1, tokens, 1, tokens)
    return reference.attention(q, q, values, window=window, scale=1.0).view(tokens, tokens) > 0


def window(file: Path) -> None:
    """Left: what one layer sees. Right: what reaches the last token through several of them."""
    one = visible(TOKENS, WINDOW)
    reach = [torch.eye(TOKENS, dtype=torch.bool)[-1]]
    for _ in range(LAYERS):
        reach.append((reach[-1].float() @ one.float()) > 0)
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(one.numpy(), cmap="Blues", vmax=1.6)
    left.set(xlabel="key position", ylabel="query position", title=f"one layer, window W = {WINDOW}")
    right.imshow(torch.stack(reach).numpy(), cmap="Blues", vmax=1.6, aspect="auto")
    names = ["the last token", *(f"through {n} layer{'s' * (n > 1)}" for n in range(1, LAYERS + 1))]
    right.set(xlabel="token position", yticks=range(LAYERS + 1), yticklabels=names)
    right.set_title(f"L layers reach L (W - 1) tokens back: {LAYERS} x {WINDOW - 1} = {LAYERS * (WINDOW - 1)}")
    figure.savefig(file, metadata=SAME)


def heads(file: Path, Hq: int = 32, Hkv: int = 8) -> None:
    """Query heads and the key/value head that each reads, as Mixtral 8x7B has them."""
    figure = Figure(figsize=(10, 2.4), layout="constrained")
    axes = figure.subplots()
    group = Hq // Hkv
    for head in range(Hq):
        shared = head // group
        axes.plot([head, (shared + 0.5) * group - 0.5], [1, 0], color=f"C{shared % 10}", lw=1)
        axes.text(head, 1.08, str(head), ha="center", va="bottom", fontsize=8)
    for shared in range(Hkv):
        axes.text((shared + 0.5) * group - 0.5, -0.08, str(shared), ha="center", va="top", color=f"C{shared % 10}")
    axes.set(ylim=(-0.4, 1.4), yticks=[0, 1], yticklabels=["key/value head", "query head"], xticks=[])
    axes.set_title(f"{Hq} query heads, {Hkv} key/value heads: {group} read the same keys, and one load serves them")
    axes.spines[:].set_visible(False)
    figure.savefig(file, metadata=SAME)


def route(file: Path) -> None:
    """The experts of each token of a sentence, layer by layer, in the small checkpoint."""
    model = Mixtral.from_pretrained(SMALL, device="cpu")
    ids = model.tokenizer(TEXT).input_ids
    experts = model.trace(torch.tensor(ids)).ids
    first = experts[:, :, 0]
    figure = Figure(figsize=(1.2 + 0.75 * len(ids), 3), layout="constrained")
    axes = figure.subplots()
    axes.imshow(first.numpy(), cmap="Set2", vmin=0, vmax=7, aspect="auto")
    for layer, row in enumerate(experts.tolist()):
        for place, (one, other) in enumerate(row):
            axes.text(place, layer, f"{one}, {other}", ha="center", va="center", fontsize=9)
    axes.set(ylabel="layer", yticks=range(len(first)), xticks=range(len(ids)))
    axes.set_xticklabels([token.strip() for token in token_texts(model.tokenizer, TEXT)], rotation=30, ha="right")
    axes.set_title("the two experts of each token, the first choice coloured (the small checkpoint)")
    figure.savefig(file, metadata=SAME)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for draw in (window, heads, route):
        draw(folder / f"{draw.__name__}.svg")
    for name, dark in (("light", False), ("dark", True)):
        layer(folder / f"layer-{name}.svg", dark)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "figures")

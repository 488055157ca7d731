"""The figures of docs/mixtral.md, drawn from the code that they explain.

    python docs/figures.py [FOLDER]

Writes window.svg, heads.svg and route.svg into FOLDER, docs/figures if none is given. Needs matplotlib:
pip install ".[plot]".
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from mixtral_triton import SMALL, Mixtral, reference
from mixtral_triton.cli.trace import token_texts, trace

try:
    from matplotlib import rcParams
    from matplotlib.figure import Figure
except ImportError:
    sys.exit('docs/figures.py needs matplotlib: pip install ".[plot]"')

TOKENS, WINDOW, LAYERS = 14, 4, 3  # of the window's figure
TEXT = "The return statement leaves the current function call"
rcParams["svg.hashsalt"] = "the same file from the same code"
SAME = {"Date": None}  # no date in it, for the same reason


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
    found: Any = trace(model, torch.tensor(ids), token_texts(model.tokenizer, TEXT))
    first = found.experts[:, :, 0]
    figure = Figure(figsize=(1.2 + 0.75 * len(ids), 3), layout="constrained")
    axes = figure.subplots()
    axes.imshow(first.numpy(), cmap="Set2", vmin=0, vmax=7, aspect="auto")
    for layer, row in enumerate(found.experts.tolist()):
        for place, (one, other) in enumerate(row):
            axes.text(place, layer, f"{one}, {other}", ha="center", va="center", fontsize=9)
    axes.set(ylabel="layer", yticks=range(len(first)), xticks=range(len(ids)))
    axes.set_xticklabels([token.strip() for token in found.tokens], rotation=30, ha="right")
    axes.set_title("the two experts of each token, the first choice coloured (the small checkpoint)")
    figure.savefig(file, metadata=SAME)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for draw in (window, heads, route):
        draw(folder / f"{draw.__name__}.svg")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "figures")

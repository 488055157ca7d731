"""trace: which experts each token took, layer by layer (Jiang et al. 2024, section 5 and figure 8).

L layers, T tokens, E experts, K experts per token
"""

from __future__ import annotations

import argparse
import colorsys
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.console import Console, Group
from rich.style import Style
from rich.table import Table
from rich.text import Text

from .plotting import check_plot

if TYPE_CHECKING:
    from .model import Mixtral

SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Trace:
    """tokens: the text of each, T of them; experts int [L,T,K], a token's first choice first; of num_experts."""

    tokens: tuple[str, ...]
    experts: torch.Tensor
    num_experts: int

    def share(self) -> torch.Tensor:
        """[L,E]: of the choices made in a layer, the part that fell on each expert."""
        L = len(self.experts)
        counts = torch.zeros(L, self.num_experts)
        counts.scatter_add_(1, self.experts.reshape(L, -1).long(), torch.ones(L, self.experts[0].numel()))
        return counts / self.experts[0].numel()

    def kept(self) -> tuple[list[float], list[float]]:
        """By layer, how many of the consecutive tokens keep an expert: their first choice, or any of their choices."""
        now, then = self.experts[:, 1:], self.experts[:, :-1]
        first = (now[..., 0] == then[..., 0]).double().mean(1)
        either = (now[..., None] == then[..., None, :]).flatten(2).any(2).double().mean(1)
        return first.tolist(), either.tolist()

    def chance(self) -> tuple[float, float]:
        """What `kept` would be if every token chose its experts at random."""
        E, K = self.num_experts, self.experts.shape[2]
        return 1 / E, 1 - math.comb(E - K, K) / math.comb(E, K)

    def as_dict(self) -> dict[str, Any]:
        (first, either), (by_chance, either_by_chance) = self.kept(), self.chance()
        return {
            "tokens": list(self.tokens),
            "experts": self.experts.tolist(),
            "share": self.share().tolist(),
            "kept": {"first": first, "either": either},
            "chance": {"first": by_chance, "either": either_by_chance},
        }

    def shown(self, layers: Sequence[int]) -> Group:
        """The text once a layer of `layers`, coloured and numbered by first choice, and a line a layer of figures."""
        legend = Text("first choice: ")
        for expert in range(self.num_experts):
            legend.append(f" {expert} ", self._style(expert)).append(" ")
        texts = [part for layer in layers for part in (Text(f"\nlayer {layer}", style="bold"), self._coloured(layer))]
        return Group(legend, *texts, Text(), self._table())

    def _coloured(self, layer: int) -> Text:
        text = Text()
        for token, expert in zip(self.tokens, self.experts[layer, :, 0].tolist(), strict=True):
            word = token.rstrip("\n")
            mark = str(expert).translate(SUPERSCRIPTS)
            text.append(word or ("⏎" if token else "…"), self._style(expert)).append(mark, "dim").append(
                token[len(word) :]
            )
        return text

    def _table(self) -> Table:
        title = "% of a layer's choices by expert, and % of consecutive tokens that keep their first, or any"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in ("layer", *map(str, range(self.num_experts)), "first", "any"):
            table.add_column(name, justify="right", no_wrap=True)
        percent = "{:.0f}".format
        for layer, (shares, *kept) in enumerate(zip(self.share().tolist(), *self.kept(), strict=True)):
            cells = [Text(percent(100 * share), style="bold" if share == max(shares) else "") for share in shares]
            table.add_row(str(layer), *cells, *(percent(100 * share) for share in kept))
        even = [f"{100 / self.num_experts:.3g}"] * self.num_experts
        table.add_row("chance", *even, *(f"{100 * share:.3g}" for share in self.chance()), style="dim")
        return table

    def _style(self, expert: int) -> Style:
        red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(expert / self.num_experts, 0.45, 1.0))
        return Style(color="black", bgcolor=f"rgb({red},{green},{blue})")

    def plot(self, file: Path, title: str) -> None:
        """Left: who was chosen, layers x experts. Right, layer by layer: consecutive tokens that keep an expert."""
        from matplotlib.figure import Figure

        L, E = len(self.experts), self.num_experts
        figure = Figure(figsize=(5.5 + 0.4 * E, 2.6 + 0.28 * max(L, 6)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(max(E, 6), 6))
        figure.suptitle(title, fontsize=10)
        shares = 100 * self.share().numpy()
        image = left.imshow(shares, aspect="auto", cmap="viridis", vmin=0)
        figure.colorbar(image, ax=left, label=f"% of the layer's choices (even: {100 / E:.1f} %)")
        left.set(xlabel="expert", ylabel="layer", xticks=range(E), yticks=range(0, L, -(-L // 16)))
        left.set_title("who was chosen", fontsize=10)
        if E * L <= 300:
            for layer, row in enumerate(shares.tolist()):
                for expert, value in enumerate(row):
                    color = "white" if value < 0.6 * float(shares.max()) else "black"
                    left.text(expert, layer, f"{value:.0f}", ha="center", va="center", fontsize=8, color=color)
        names = ("same first choice", "an expert in common")
        for name, values, by_chance, color in zip(names, self.kept(), self.chance(), ("C0", "C1"), strict=True):
            right.plot([100 * value for value in values], range(L), "o-", color=color, label=name)
            right.axvline(100 * by_chance, color=color, ls="--", label=f"by chance: {100 * by_chance:.1f} %")
        right.set(xlabel="% of pairs of consecutive tokens", xlim=(0, 100))
        right.set_title("consecutive tokens that keep an expert", fontsize=10)
        right.grid(alpha=0.3)
        figure.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=2, fontsize=8)
        figure.savefig(file, dpi=150)


def trace(model: Mixtral, ids: torch.Tensor, tokens: Sequence[str]) -> Trace:
    """Run the text, ids int64 [T] with the text of each, and note every layer's routes."""
    from .routes import Routes

    with torch.no_grad(), Routes() as routes:
        model(ids[None])
    return Trace(tuple(tokens), torch.stack(routes.ids).cpu(), model.config.num_local_experts)


def pieces(tokenizer: Any, text: str, ids: Sequence[int]) -> list[str]:
    """The text of each of `ids`: the part of `text` that it stands for; before those, the name of a token (<s>)."""
    offsets = tokenizer.encode(text, add_special_tokens=False).offsets
    special = [tokenizer.id_to_token(token) or str(token) for token in ids[: len(ids) - len(offsets)]]
    reached = [0, *accumulate((end for _, end in offsets), max)]  # a character of several tokens belongs to the first
    return special + [text[max(begin, past) : end] for (begin, end), past in zip(offsets, reached, strict=False)]


def run(args: argparse.Namespace, out: Console, load: Callable[[], tuple[Mixtral, Any, torch.Tensor]]) -> int:
    """The command. `load` gives the model, its tokenizer and the prompt's tokens [T]."""
    if args.plot is not None:
        check_plot(args.plot)
    model, tokenizer, ids = load()
    L = model.config.num_hidden_layers
    layers = sorted({0, L // 2, L - 1}) if args.layers is None else args.layers
    if not all(0 <= layer < L for layer in layers):
        raise ValueError(f"--layers is {' '.join(map(str, layers))}, needs layers of 0..{L - 1}")
    if len(ids) < 2:
        raise ValueError("--prompt is one token: give at least two, since consecutive ones are compared")
    found = trace(model, ids, pieces(tokenizer, args.prompt, ids.tolist()))
    if args.json:
        print(json.dumps({"folder": str(args.folder), "prompt": args.prompt, **found.as_dict()}))
    else:
        out.print(found.shown(layers))
    if args.plot is not None:
        what = f"{len(ids)} tokens, {found.experts.shape[2]} of {found.num_experts} experts each"
        found.plot(args.plot, f"{shorten(args.prompt, 60)}: {what}")
        out.print(f"plot: {args.plot}", soft_wrap=True)
    return 0

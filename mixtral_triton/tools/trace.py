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
from rich.console import Console, ConsoleOptions, RenderResult
from rich.style import Style
from rich.table import Table
from rich.text import Text

from ..inputs import check_vocabulary
from .plotting import check_plot, save
from .routes import Routes

if TYPE_CHECKING:
    from ..model import Mixtral

SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def _named(layers: Sequence[int]) -> str:
    """Ascending numbers, neighbours drawn together: "1, 3-15"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


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

    def shown(self, layers: Sequence[int]) -> Shown:
        """The text once a layer of `layers`, coloured and numbered by first choice, and a line a layer of figures."""
        return Shown(self, tuple(layers))

    def coloured(self, layer: int, plain: bool) -> Text:
        """The text, each token with its first choice. `plain`: in ASCII."""
        text = Text()
        for token, expert in zip(self.tokens, self.experts[layer, :, 0].tolist(), strict=True):
            word = token.rstrip("\n")
            mark = f"[{expert}]" if plain else str(expert).translate(SUPERSCRIPTS)
            no_word = (r"\n" if plain else "⏎") if token else "~"  # "~": a part of the character before
            text.append(word or no_word, self.style(expert)).append(mark, "dim").append(token[len(word) :])
        return text

    def table(self, experts: range) -> Table:
        """A line a layer of what fell on these experts; after the last one, how many tokens keep theirs."""
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        ends = experts.stop == self.num_experts
        for name in ("layer", *map(str, experts), *(("first", "any") if ends else ())):
            table.add_column(name, justify="right", no_wrap=True)
        percent = "{:.0f}".format
        for layer, (shares, *kept) in enumerate(zip(self.share().tolist(), *self.kept(), strict=True)):
            cells = [Text(percent(100 * share), style="bold" if share == max(shares) else "") for share in shares]
            rest = [percent(100 * share) for share in kept] if ends else []
            table.add_row(str(layer), *cells[experts.start : experts.stop], *rest)
        even, by_chance = f"{100 / self.num_experts:.3g}", [f"{100 * share:.3g}" for share in self.chance()]
        table.add_row("chance", *[even] * len(experts), *(by_chance if ends else ()), style="dim")
        return table

    def style(self, expert: int) -> Style:
        red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(expert / self.num_experts, 0.45, 1.0))
        return Style(color="black", bgcolor=f"rgb({red},{green},{blue})")

    def plot(self, file: Path, title: str) -> None:
        """Left: who was chosen, layers x experts. Right, layer by layer: consecutive tokens that keep an expert."""
        from matplotlib.figure import Figure

        L, E = len(self.experts), self.num_experts
        figure = Figure(figsize=(5.5 + 0.4 * E, 3.0 + 0.28 * max(L, 6)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(max(E, 6), 6))
        figure.suptitle(title, fontsize=10, parse_math=False)
        shares = 100 * self.share().numpy()
        image = left.imshow(shares, aspect="auto", cmap="viridis", vmin=0)
        bar = figure.colorbar(
            image, ax=left, location="bottom", aspect=30
        )  # at the side it would reach the right panel
        bar.set_label(f"% of the layer's choices (even: {100 / E:.1f} %)", fontsize=8)
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
        save(figure, file)


@dataclass(frozen=True)
class Shown:
    """A trace for a terminal of any width and encoding: its table goes on in another one where a line is too short."""

    trace: Trace
    layers: tuple[int, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        trace = self.trace
        legend = Text("first choice: ")
        for expert in range(trace.num_experts):
            legend.append(f" {expert} ", trace.style(expert)).append(" ")
        yield legend
        for layer in self.layers:
            yield Text(f"\nlayer {layer}", style="bold")
            yield trace.coloured(layer, options.ascii_only)
        if left_out := sorted(set(range(len(trace.experts))) - set(self.layers)):
            layers = f"layer{'s' if len(left_out) > 1 else ''} {_named(left_out)}"
            yield Text(f"\nleft out: the text of {layers}, see --layers", style="dim")
        yield Text("\n% of a layer's choices by expert, and % of consecutive tokens that keep their first, or any")
        yield from self._tables(console, options)

    def _tables(self, console: Console, options: ConsoleOptions) -> list[Table]:
        """As few as the width allows."""
        E, unbound = self.trace.num_experts, options.update(max_width=1 << 16)
        for count in range(1, E + 1):
            step = -(-E // count)
            tables = [self.trace.table(range(at, min(at + step, E))) for at in range(0, E, step)]
            if max(console.measure(table, options=unbound).maximum for table in tables) <= options.max_width:
                break
        return tables


class _Told(Routes):
    """Routes that tell `progress` how many layers have been noted."""

    def __init__(self, progress: Callable[[int, int], None], layers: int) -> None:
        super().__init__()
        self.progress, self.layers = progress, layers

    def __torch_dispatch__(self, *call: Any) -> Any:
        out = super().__torch_dispatch__(*call)
        self.progress(len(self.ids), self.layers)
        return out


def trace(
    model: Mixtral,
    ids: torch.Tensor,
    tokens: Sequence[str],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Trace:
    """Run the text, ids int64 [T] with the text of each, and note every layer's routes.

    `progress` is called with (layers done, layers).
    """
    with torch.no_grad(), _Told(progress, model.config.num_hidden_layers) as routes:
        model(ids[None])
    return Trace(tuple(tokens), torch.stack(routes.ids).cpu(), model.config.num_local_experts)


def pieces(tokenizer: Any, text: str, ids: Sequence[int]) -> list[str]:
    """The text of each of `ids`: the part of `text` that it stands for; before those, the name of a token (<s>)."""
    offsets = tokenizer.encode(text, add_special_tokens=False).offsets
    special = [tokenizer.id_to_token(token) or str(token) for token in ids[: len(ids) - len(offsets)]]
    reached = [0, *accumulate((end for _, end in offsets), max)]  # a character of several tokens belongs to the first
    return special + [text[max(begin, past) : end] for (begin, end), past in zip(offsets, reached, strict=False)]


def run(
    args: argparse.Namespace,
    out: Console,
    load: Callable[[], tuple[Mixtral, Any, torch.Tensor]],
    bar: Callable[[str, int], Any],
) -> int:
    """The command. `load` gives the model, its tokenizer and the prompt's tokens [T]; `bar` shows progress."""
    if args.plot is not None:
        check_plot(args.plot)
    model, tokenizer, ids = load()
    L = model.config.num_hidden_layers
    layers = sorted({0, L // 2, L - 1}) if args.layers is None else args.layers
    if not all(0 <= layer < L for layer in layers):
        raise ValueError(f"--layers is {' '.join(map(str, layers))}, needs layers of 0..{L - 1}")
    if len(ids) < 2:
        raise ValueError("--prompt is one token: give at least two, since consecutive ones are compared")
    if len(ids) > (limit := model.config.max_position_embeddings):
        raise ValueError(f"--prompt is {len(ids)} tokens, needs at most max_position_embeddings, {limit}")
    check_vocabulary(ids, model.config.vocab_size)  # of a tokenizer that is another model's
    with bar("tracing", L) as progress:
        found = trace(model, ids, pieces(tokenizer, args.prompt, ids.tolist()), progress.of)
    if args.json:
        print(json.dumps({"folder": str(args.folder), "prompt": args.prompt, **found.as_dict()}))
    else:
        out.print(found.shown(layers))
    if args.plot is not None:
        what = f"{len(ids)} tokens, {found.experts.shape[2]} of {found.num_experts} experts each"
        found.plot(args.plot, f"{shorten(args.prompt, 60)}: {what}")
        out.print(f"plot: {args.plot}", soft_wrap=True)
    return 0

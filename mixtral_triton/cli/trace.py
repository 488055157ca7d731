"""The command `trace`: which experts each token took, layer by layer (Jiang et al. 2024, figure 8)."""

import argparse
import colorsys
import json
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.style import Style
from rich.text import Text

from ..model.mixtral import Mixtral
from ..terminal import Bar, print_message


@dataclass(frozen=True)
class Trace:
    """The routes of a text, which print as each layer's text, coloured and numbered by first choice."""

    tokens: tuple[str, ...]  # the text of each of T
    experts: torch.Tensor  # int [L,T,K], a token's first choice first
    num_experts: int

    def style(self, expert: int) -> Style:
        red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(expert / self.num_experts, 0.45, 1.0))
        return Style(color="black", bgcolor=f"rgb({red},{green},{blue})")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        experts = ((f" {expert} ", self.style(expert)) for expert in range(self.num_experts))
        yield Text.assemble("first choice: ", *(part for expert in experts for part in (expert, " ")))
        for layer, first in enumerate(self.experts[:, :, 0].tolist()):
            text = Text.assemble((f"\nlayer {layer}\n", "bold"))
            for token, expert in zip(self.tokens, first, strict=True):
                word = token.rstrip("\n")
                no_word = r"\n" if token else "~"  # "~": part of the one before
                text.append(word or no_word, self.style(expert)).append(f"[{expert}]", "dim").append(token[len(word) :])
            yield text


def token_texts(tokenizer: Any, text: str) -> list[str]:
    """Return each token's part of `text`, the name of one that the tokenizer adds (<s>)."""
    encoding = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False)
    # A character of several tokens belongs to the first.
    reached = [0, *accumulate((end for _, end in encoding.offset_mapping), max)]
    tokens = zip(encoding.input_ids, encoding.special_tokens_mask, reached, reached[1:], strict=False)
    name = tokenizer.convert_ids_to_tokens
    return [(name(token) or str(token)) if added else text[begin:end] for token, added, begin, end in tokens]


def run(args: argparse.Namespace, model: Mixtral, prompt: list[int], note: str) -> int:
    """Run the command on the prompt's tokens -> exit status. `note` precedes the work."""
    ids = torch.tensor(prompt, device=model.device)
    tokens = token_texts(model.tokenizer, args.prompt)
    print_message(note)
    with Bar("tracing", model.config.num_hidden_layers) as progress:
        routes = model.trace(ids, progress.update)
    if args.json:
        about = {"folder": str(args.folder), "prompt": args.prompt, "tokens": tokens}
        print(json.dumps(about | {"experts": routes.ids.tolist(), "weights": routes.weights.tolist()}))
    else:
        Console(highlight=False).print(Trace(tuple(tokens), routes.ids.cpu(), model.config.num_local_experts))
    return 0

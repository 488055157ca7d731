"""What `generate`, `chat` and `generate --batch` share: sampling, the stream of tokens, stop strings, speed."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..model.ahead import launch_text
from ..model.cache import KVCache
from ..model.generate import eos_ids
from ..model.mixtral import Mixtral
from ..model.sampling import Logprobs
from ..terminal import check_range, compile_shown, print_message
from .prompt import encode, print_stream, select_options, speed_of

NEW_TOKENS = 64  # the most of a text, where neither an option nor a file says more


def check_options(args: argparse.Namespace) -> None:
    """Raise ValueError for options that no model is needed to refuse."""
    check_range("--seed", args.seed, -(1 << 63), (1 << 64) - 1)
    if "" in args.stop:
        raise ValueError("--stop is empty: give at least one character")
    if args.logprobs is not None and not (args.json or getattr(args, "batch", None)):
        raise ValueError("--logprobs is given, and prints numbers for a program: needs --json, or --batch")


class Writer:
    """A model that continues texts with the options of a command.

    notes  lines to print before the first text: `note`, and what generation_config.json sets
    limit  the most new tokens of a text: --max-new-tokens, else generation_config.json's, else None
    """

    def __init__(self, args: argparse.Namespace, model: Mixtral, note: str) -> None:
        self.args, self.model, self.tokenizer = args, model, model.tokenizer
        self.eos, self.dtype = eos_ids(None, model.config), args.cache_dtype or model.dtype
        sampling, self.limit, notes = select_options(args)
        generator = torch.Generator(model.device).manual_seed(args.seed)
        self.options = sampling | {"generator": generator, "logprobs": args.logprobs}
        self.notes = [*filter(None, (note, *notes))]

    def encode(self, text: str, template: bool = False) -> list[int]:
        """Return the tokens of a prompt, or of the text of a chat template."""
        return encode(self.tokenizer, text, self.model.config.vocab_size, add_special_tokens=not template)

    @property
    def new_tokens(self) -> int:
        return NEW_TOKENS if self.limit is None else self.limit

    def stream(self, rows: Sequence[list[int]], n: int, cache: KVCache | None = None) -> Iterator[list[dict[str, Any]]]:
        """Return an iterator over what `--json` prints of the next token of each text, at most n; the arguments are
        checked at once."""
        return map(
            read_step, self.model.stream(rows, n, **self.options, cache=cache, cache_dtype=self.args.cache_dtype)
        )

    def begin(self, B: int, T: int, slots: int, held: int = 0) -> None:
        """Print the notes once, and compile what B texts of T tokens, `held` of them in a cache, launch with so many
        slots."""
        print_message("\n".join(self.notes))
        self.notes = []
        compile_shown(launch_text, self.model, T, slots - T, self.args.cache_dtype, B, min(held, T - 1))

    def write(self, ids: list[int], shown: str | None) -> tuple[dict[str, Any], str]:
        """Continue a prompt, which is printed as `shown` (None: not) -> as `print_text`."""
        steps = self.stream([ids], self.new_tokens)
        self.begin(1, len(ids), len(ids) + self.new_tokens)
        return self.print_text(steps, len(ids), shown, ids[-1:], self.new_tokens)

    def print_text(
        self,
        steps: Iterator[list[dict[str, Any]]],
        length: int,
        shown: str | None,
        after: list[int],
        n: int,
        reused: Callable[[], int] = lambda: 0,
        interruptible: bool = False,
    ) -> tuple[dict[str, Any], str]:
        """Print the steps of a text as they come -> what `--json` prints of it, and the line of its speed. length: of
        the prompt; reused: how many of its tokens a cache held. The other arguments are those of `print_stream`."""
        entries = list[dict[str, Any]]()

        def tokens() -> Iterator[int]:
            for (entry,) in steps:
                entries.append(entry)
                yield entry["token"]

        found = print_stream(tokens(), self.tokenizer, shown, after, n, self.args.stop, self.eos, interruptible)
        speed, line = speed_of(found.times, length, self.model.device, reused() if entries else 0)
        end = {"finish_reason": found.finish_reason}
        logprobs = {"logprobs": entries[: len(found.tokens)]} if "logprob" in (entries or [{}])[0] else {}
        line = f"{line}; finish_reason: {found.finish_reason}"
        return {"text": found.text, "tokens": found.tokens, **end, **logprobs, **speed}, line


def read_step(step: Any) -> list[dict[str, Any]]:
    """Return what `--json` prints of each text's token in a step of `Mixtral.stream`, by one copy to the host."""
    if not isinstance(step, Logprobs):
        return [{"token": token} for token in step.tolist()]
    columns = step.ids[:, None], step.logprobs[:, None], step.top_ids, step.top_logprobs
    rows = torch.cat([column.double() for column in columns], dim=1).tolist()  # fp64 holds ids and fp32
    entries, N = [], step.top_ids.shape[1]
    for token, logprob, *top in rows:
        pairs = [{"token": int(id), "logprob": value} for id, value in zip(top[:N], top[N:], strict=True)]
        entries.append({"token": int(token), "logprob": logprob, "top": pairs})
    return entries

"""What `generate`, `chat` and `generate --batch` share: sampling, the stream of tokens, stop strings, speed."""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..model.cache import KVCache
from ..model.mixtral import Mixtral
from ..model.precompile import launch_text, precompile
from ..model.sampling import Logprobs, SamplingOptions
from ..terminal import Bar, check_range, print_message
from .prompt import decode, encode, read_sampling, speed_of

NEW_TOKENS = 64  # the most of a text, where neither an option nor a file says more


def check_options(args: argparse.Namespace) -> None:
    """Raise ValueError for options that no model is needed to refuse."""
    check_range("--seed", args.seed, -(1 << 63), (1 << 64) - 1)
    if "" in args.stop:
        raise ValueError("--stop is empty: give at least one character")
    if args.logprobs is not None and not (args.json or getattr(args, "batch", None)):
        needs = "--json or --batch" if "batch" in args else "--json"
        raise ValueError(f"--logprobs is given, and prints numbers for a program: needs {needs}")


def compile_shown(launch: Callable[..., object], model: Mixtral, *args: Any) -> None:
    """Compile on a GPU what `launch(model, *args)` launches on the meta device; show the progress."""
    with Bar("compiling") as progress:
        precompile(model, lambda: launch(model, *args), progress.set)


class Writer:
    """A model that continues texts with the options of a command.

    notes    lines to print before the first text: `note`, and what is ignored of generation_config.json
    options  how a text goes on
    limit    the most new tokens of a text: --max-new-tokens, else generation_config.json's, else None
    """

    def __init__(self, args: argparse.Namespace, model: Mixtral, note: str) -> None:
        self.args, self.model, self.tokenizer = args, model, model.tokenizer
        sampling, self.limit, ignored = read_sampling(args)
        self.new_tokens = NEW_TOKENS if self.limit is None else self.limit
        generator = torch.Generator(model.device).manual_seed(args.seed)
        of_args = {"generator": generator, "cache_dtype": args.cache_dtype, "logprobs": args.logprobs}
        self.options = SamplingOptions(self.new_tokens, **sampling, **of_args)
        self.eos = self.options.stops(model.config)
        self.notes = [*filter(None, (note, ignored))]

    def encode(self, text: str, template: bool = False) -> list[int]:
        """Return the tokens of a prompt, or of the text of a chat template."""
        return encode(self.tokenizer, text, self.model.config.vocab_size, add_special_tokens=not template)

    def stream(self, rows: Sequence[list[int]], n: int, cache: KVCache | None = None) -> Iterator[list[dict[str, Any]]]:
        """Return an iterator over what `--json` prints of the next token of each text, at most n; the arguments are
        checked at once."""
        options = vars(replace(self.options, max_new_tokens=n))
        return map(read_step, self.model.stream(rows, **options, cache=cache))

    def begin(self, B: int, T: int, slots: int, held: int = 0) -> None:
        """Print the notes once, and compile what B texts of T tokens, `held` of them in a cache, launch with so many
        slots."""
        print_message("\n".join(self.notes))
        self.notes = []
        compile_shown(launch_text, self.model, T, slots - T, self.args.cache_dtype, B, min(held, T - 1))

    def print_text(
        self,
        steps: Iterator[list[dict[str, Any]]],
        length: int,
        shown: str | None,
        after: list[int],
        reused: Callable[[], int] = lambda: 0,
        interruptible: bool = False,
    ) -> tuple[dict[str, Any], str]:
        """Print the steps of a text as they come, behind `shown` (None: they are not printed) -> what `--json` prints
        of it, and the line of its speed.

        length         of the prompt
        after          the tokens before the text, as in `Text`
        reused         how many of the prompt's tokens a cache held
        interruptible  Ctrl-C ends the text
        """
        text, times, printed = Text(self, after), [time.perf_counter()], 0
        out = io.StringIO() if shown is None else sys.stdout
        print(shown or "", end="", file=out, flush=True)
        try:
            for (entry,) in steps:
                times.append(time.perf_counter())
                if text.add(entry):
                    break
                part = text.final_part()
                print(part[printed:], end="", file=out, flush=True)
                printed = max(printed, len(part))
            print(text.text[printed:], end="", file=out)
        except KeyboardInterrupt:
            if not interruptible:
                raise
            text.finish_reason = "interrupted"
        finally:
            print(file=out, flush=True)
        speed, line = speed_of(times, length, reused() if text.entries else 0)
        return text.as_dict() | speed, f"{line}; finish_reason: {text.finish_reason}"


class Text:
    """A text as its tokens come, behind the tokens `after`, up to an EOS or a text of --stop. Only those are decoded
    again whose text may change: the last ones, where they end in half a character, and as many before them. tokenizers'
    DecodeStream does not serve: it raises behind bytes that are no character, and never gives the last half of one.

    text           that of the tokens, without the stop string
    finish_reason  "stop": an EOS or a stop string, "length", or "interrupted"
    """

    def __init__(self, writer: Writer, after: list[int]) -> None:
        self.args, self.eos, self.tokenizer = writer.args, writer.eos, writer.tokenizer
        self.entries, self.text, self.finish_reason = list[dict[str, Any]](), "", "length"
        self.decoded, self.before, self.tail = "", after, list[int]()  # text, its last tokens, and those after it

    def add(self, entry: dict[str, Any]) -> bool:
        """Add what `--json` prints of a token -> whether the text ends with it."""
        self.tail.append(entry["token"])
        whole = self.decoded + (end := decode(self.tokenizer, self.before, self.tail))
        if end and not end.endswith("\ufffd"):
            self.decoded, self.before, self.tail = whole, self.tail, []
        ends = [whole.index(stop) for stop in self.args.stop if stop in whole]
        self.text = whole[: min(ends, default=len(whole))]
        self.entries.append(entry)  # last: Ctrl-C meanwhile leaves no token whose text is missing
        if ends or entry["token"] in self.eos:
            self.finish_reason = "stop"
        return self.finish_reason == "stop"

    def final_part(self) -> str:
        """Return the text without what may become a stop string, and without half a character."""
        text = self.text
        held = max((n for stop in self.args.stop for n in range(len(stop)) if text.endswith(stop[:n])), default=0)
        return text[: len(text) - held].rstrip("\ufffd")

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        tokens = [entry["token"] for entry in self.entries]
        values = {"text": self.text, "tokens": tokens, "finish_reason": self.finish_reason}
        return values | ({} if self.args.logprobs is None else {"logprobs": self.entries})


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

"""What `generate`, `chat` and `generate --batch` share: sampling, the stream of tokens, stop strings, speed."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, tee
from typing import Any

import torch

from ..cache import KVCache
from ..config import read_generation_config
from ..generate import eos_ids
from ..model import Mixtral
from ..sampling import Logprobs
from .offline import launch_text
from .processes import is_first
from .prompt import cut_at_stop, decode, print_stream, select_sampling, speed_of
from .terminal import print_message


def check_options(args: argparse.Namespace) -> None:
    """Raise ValueError for options that no model is needed to refuse."""
    if not -(1 << 63) <= args.seed < 1 << 64:
        raise ValueError(f"--seed is {args.seed}, needs an integer of 64 bits")
    if "" in args.stop:
        raise ValueError("--stop is empty: give at least one character")
    if args.logprobs is not None and not (args.json or getattr(args, "batch", None)):
        raise ValueError("--logprobs is given, and prints numbers for a program: needs --json, or --batch")


class Writer:
    """A model that continues texts with the options of a command.

    notes    lines to print before the first text: `note`, and what generation_config.json sets
    encode   encode(text, template=False) -> the tokens of a prompt, or of the text of a chat template
    compile  compile(launch, model, *args) compiles ahead what `launch(model, *args)` launches on the meta device
    """

    def __init__(
        self,
        args: argparse.Namespace,
        model: Mixtral,
        tokenizer: Any,
        note: str,
        encode: Callable[..., list[int]],
        compile: Callable[..., None],
    ) -> None:
        self.args, self.model, self.tokenizer, self.encode, self.compile = args, model, tokenizer, encode, compile
        self.eos, self.dtype = eos_ids(None, model.config), args.cache_dtype or model.dtype
        sampling, notes = select_sampling(args, read_generation_config(args.folder))
        generator = torch.Generator(model.device).manual_seed(args.seed)
        self.options = sampling | {"generator": generator, "logprobs": args.logprobs}
        self.notes = [*filter(None, (note, *notes))]

    def stream(self, rows: Sequence[list[int]], n: int, cache: KVCache | None = None) -> Iterator[Any]:
        """Return `Mixtral.stream` of texts by at most n tokens, the arguments checked."""
        return self.model.stream(rows, n, **self.options, cache=cache, cache_dtype=self.args.cache_dtype)

    def begin(self, B: int, T: int, n: int, held: int = 0) -> None:
        """Print the notes once, and compile what B texts of T tokens, `held` of them in a cache, and n more launch."""
        print_message("\n".join(self.notes) if is_first() else "")
        self.notes = []
        self.compile(launch_text, self.model, T, n, self.args.cache_dtype, B, min(held, T - 1))

    def write(
        self, ids: list[int], shown: str | None, after: list[int], n: int, cache: KVCache | None = None, **options: Any
    ) -> tuple[dict[str, Any], str]:
        """Continue a text by at most n tokens, printed behind `shown` (None: not) -> what `--json` prints of it, and
        the line of its speed. after, options: as in `print_stream`. cache: as in `Mixtral.stream`."""
        with warning_lines(self.args.command):
            steps, again = tee(self.stream([ids], n, cache))
            (known,) = (cache and cache.held()) or [[]]
            self.begin(1, len(ids), n, len(known))
            tokens, text, times = print_stream(steps, self.tokenizer, shown, after, n, self.args.stop, **options)
        speed, line = speed_of(times, len(ids), self.model.device, cache.reused[0] if cache and tokens else 0)
        return {"text": text, "tokens": tokens, **logprobs_of(list(islice(again, len(tokens)))), **speed}, line

    def write_batch(self, rows: Sequence[list[int]], afters: Sequence[list[int]]) -> list[dict[str, Any]]:
        """Continue texts together -> what is written of each. Those that stop early wait for the others."""
        steps, ended = list[Any](), [False] * len(rows)
        written: list[dict[str, Any]] = [{"text": "", "tokens": []} for _ in rows]
        for step in self.stream(rows, self.args.max_new_tokens):
            steps.append(step)
            for b, token in enumerate((step.ids if isinstance(step, Logprobs) else step).tolist()):
                if not ended[b]:
                    tokens = written[b]["tokens"]
                    tokens.append(token)
                    text = decode(self.tokenizer, afters[b], tokens) if self.args.stop else ""
                    ended[b] = token in self.eos or cut_at_stop(text, self.args.stop)[1]
            if all(ended):
                break
        for b, each in enumerate(written):
            each["text"] = cut_at_stop(decode(self.tokenizer, afters[b], each["tokens"]), self.args.stop)[0]
            each |= logprobs_of(steps[: len(each["tokens"])], b)
        return written


@contextmanager
def warning_lines(command: str) -> Iterator[None]:
    """Print warnings as lines of the command."""

    def show(message: Any, *rest: Any, **options: Any) -> None:
        print_message(f"mixtral-triton {command}: {message}" if is_first() else "")

    with warnings.catch_warnings():
        warnings.simplefilter("always", RuntimeWarning)
        warnings.showwarning = show
        yield


def logprobs_of(steps: Sequence[Any], row: int = 0) -> dict[str, Any]:
    """Return {"logprobs": one object a token} of a sequence in steps with log probabilities; else {}."""
    found = []
    for step in steps if steps and isinstance(steps[0], Logprobs) else ():
        token, logprob, top_ids, top_logprobs = (each[row].tolist() for each in step)
        top = [{"token": id, "logprob": value} for id, value in zip(top_ids, top_logprobs, strict=True)]
        found.append({"token": token, "logprob": logprob, "top": top})
    return {"logprobs": found} if found else {}

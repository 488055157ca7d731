"""The command `perplexity`: how well a model predicts a text, and what its formats cost beside the model as stored."""

from __future__ import annotations

import argparse
import gc
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..model.mixtral import Mixtral
from ..terminal import Bar, check_range, console, print_message, table_of

WINDOW = 2048  # the most tokens of a window that is not given
# Options that change the model's numbers.
STORED: dict[str, Any] = {"weights": None, "cache_dtype": None, "activations": None}
COLUMNS = {"tokens": "tokens", "nats": "nats a token", "perplexity": "perplexity", "bits_per_byte": "bits a byte"}
Span = tuple[int, int, int]


def windows(tokens: int, window: int, stride: int) -> Iterator[Span]:
    """Yield each window's first token, the first that it counts, and its end. Each token counts once, in the first
    window that reaches it; the first of all has nothing before it, and does not count."""
    counted = 0
    for start in range(0, tokens, stride):
        end = min(start + window, tokens)
        yield start, max(counted, start + 1), end
        if end == tokens:
            return
        counted = end


def measure(
    model: Mixtral, ids: list[int], size: int, spans: list[Span], cache_dtype: Any, label: str
) -> dict[str, Any]:
    """Return what `--json` prints of a text of `size` bytes."""
    nats, tokens = list[float](), 0
    with Bar(label, sum(end - start for start, _, end in spans)) as progress:
        for start, counted, end in spans:
            scores = model.score([ids[start:end]], cache_dtype=cache_dtype)[0]
            nats.append(-float(scores[counted - start - 1 :].double().sum()))
            tokens += end - counted
            progress.update(end - start)
    mean = math.fsum(nats) / tokens
    bits = math.fsum(nats) / math.log(2) / size
    return {"tokens": tokens, "nats": mean, "perplexity": math.exp(min(mean, 700)), "bits_per_byte": bits}


def run(
    args: argparse.Namespace, text: str, ids: list[int], limit: int, load: Callable[..., Mixtral], note: str
) -> int:
    """Measure a text with the model of the options, and as stored where they change it -> exit status. limit: the
    model's positions; load(args) returns a model."""
    window = min(limit, WINDOW) if args.window is None else args.window
    stride = max(1, window // 2) if args.stride is None else args.stride
    check_range("--window", window, 2, limit, "the model's positions")
    check_range("--stride", stride, 1, window - 1, "since each token has one before it in its window")
    if len(ids) < 2:
        raise ValueError("--text is one token, needs at least two: the first has nothing before it")
    spans, size, results = list(windows(len(ids), window, stride)), len(text.encode()), dict[str, Any]()
    changes = {name: getattr(args, name) for name in STORED if getattr(args, name) != STORED[name]}
    model, models = None, {"with these options": args} if changes else {}
    models["as stored"] = argparse.Namespace(**vars(args) | STORED)
    print_message(note)
    for number, (name, options) in enumerate(models.items()):
        if model is None or changes.keys() != {"cache_dtype"}:
            model = None
            gc.collect()  # the memory is the next model's
            try:
                model = load(options)
            except ValueError as error:
                if number == 0:
                    raise
                print_message(f"mixtral-triton perplexity: no baseline: {error}")
                break
        cache_dtype = torch.int8 if options.cache_dtype else None
        results[name] = measure(model, ids, size, spans, cache_dtype, f"perplexity {name}")
    result, *baseline = results.values()
    if args.json:
        print(json.dumps(result | ({"baseline": [*baseline, None][0]} if changes else {})))
    else:
        rows = []
        for name, values in results.items():
            cells = {"": name}
            cells |= {title: f"{values[key]:,.{0 if key == 'tokens' else 4}f}" for key, title in COLUMNS.items()}
            if baseline:
                cost = values["perplexity"] / baseline[0]["perplexity"] - 1
                cells["cost"] = f"{cost:+.2%}" if values is result else ""
            rows.append((cells, ""))
        console().print(table_of(f"{len(spans)} windows of {window} tokens, every {stride} tokens", rows))
    return 0

"""The command `perplexity`: how well a model predicts a text, in several formats and beside other models."""

from __future__ import annotations

import argparse
import gc
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..checkpoint.config import MixtralConfig
from ..checkpoint.tokenizer import load_tokenizer
from ..model.mixtral import Mixtral
from ..quantize import formats_text
from ..terminal import Bar, check_range, console, print_message, table_of
from .prompt import encode

WINDOW = 2048  # the most tokens of a window that is not given
# Options that change the model's numbers, and the row of a model without them.
CHANGES: dict[str, Any] = {"weights": None, "cache_dtype": None, "activations": None}
STORED = "as stored"
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


def select_models(args: argparse.Namespace) -> dict[str, argparse.Namespace]:
    """Return the options of each model by the name of its row: the folder's in each format, as stored, and the others'
    as stored. The last one is what the others are compared with."""
    options, models, formats = vars(args), dict[str, argparse.Namespace](), args.weights or [None]
    for weights in formats if any(options[name] is not None for name in CHANGES) else ():
        name = f"weights {formats_text(weights)}" if len(formats) > 1 else "with these options"
        models[name] = argparse.Namespace(**options | {"weights": weights})
    stored = options | CHANGES
    models[f"{args.folder}" if args.against and not models else STORED] = argparse.Namespace(**stored)
    return models | {str(folder): argparse.Namespace(**stored | {"folder": folder}) for folder in args.against}


def run(args: argparse.Namespace, text: str, load: Callable[..., Mixtral], note: str) -> int:
    """Measure a text with the models of the options -> exit status. load(options) returns one of them."""
    models = select_models(args)
    configs = {options.folder: MixtralConfig.from_pretrained(options.folder) for options in models.values()}
    ids = {folder: encode(load_tokenizer(folder), text, x.vocab_size) for folder, x in configs.items()}
    limit = min(config.max_position_embeddings for config in configs.values())
    window = min(limit, WINDOW) if args.window is None else args.window
    stride = max(1, window // 2) if args.stride is None else args.stride
    check_range("--window", window, 2, limit, "the model's positions")
    check_range("--stride", stride, 1, window - 1, "since each token has one before it in its window")
    if min(map(len, ids.values())) < 2:
        raise ValueError("--text is one token, needs at least two: the first has nothing before it")
    model, loaded, results, size = None, None, dict[str, Any](), len(text.encode())
    print_message(note)
    for name, options in models.items():
        of_model, tokens = (options.folder, options.weights, options.activations), ids[options.folder]
        try:
            if model is None or of_model != loaded:  # a cache in 8 bits is of the same model
                model = None
                gc.collect()  # the memory is the next model's
                model, loaded = load(options), of_model
        except ValueError as error:
            if name != STORED or not results:
                raise
            print_message(f"mixtral-triton perplexity: no baseline: {error}")
            results[name] = None
            continue
        cache_dtype = torch.int8 if options.cache_dtype else None
        spans = [*windows(len(tokens), window, stride)]
        results[name] = measure(model, tokens, size, spans, cache_dtype, f"perplexity {name}")
    _print(results, f"windows of {window} tokens, every {stride} tokens", args.json)
    return 0


def _print(results: dict[str, Any], title: str, as_json: bool) -> None:
    """Print the results, each with the difference of its perplexity from the last one's, as a table or a document."""
    *others, last = results.values()
    for values in others if last else ():
        if values["tokens"] == last["tokens"]:  # of other tokenizers bits a byte compare
            values["difference"] = values["perplexity"] / last["perplexity"] - 1
    if as_json:
        first, baseline = next(iter(results.values())), {"baseline": results[STORED]} if STORED in results else {}
        print(json.dumps(first | (baseline | {"models": results} if others else {})))
        return
    rows = []
    for name, values in results.items():
        if values is not None:
            cells = {"": name}
            cells |= {title: f"{values[key]:,.{0 if key == 'tokens' else 4}f}" for key, title in COLUMNS.items()}
            cells |= {"difference": f"{values['difference']:+.2%}" if "difference" in values else ""} if others else {}
            rows.append((cells, ""))
    console().print(table_of(title, rows))

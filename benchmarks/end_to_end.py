"""The whole model beside transformers' eager Mixtral, on the plain CPU way (or on a GPU): prefill, and decode.

    python benchmarks/end_to_end.py [--rounds 15] [--threads 2] [--json]

A model of about 100 M random parameters. The two take turns, so that a change of the machine's speed hits both; a
figure is the median over the rounds, a ratio the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mixtral_triton import KVCache, Mixtral
from mixtral_triton.hf.release import cache_keyword
from mixtral_triton.tools.bench.timing import paired

PROMPT = 256
SIZES = {
    "vocab_size": 8000,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": None,
    "max_position_embeddings": 1024,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
Pair = tuple[Callable[[], object], Callable[[], object]]


def models(device: torch.device) -> tuple[Mixtral, transformers.MixtralForCausalLM]:
    """The same random weights in both."""
    torch.manual_seed(0)
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    theirs = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, **eager)).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = Mixtral.from_pretrained(folder, device=device)
    return ours, theirs.to(device)


def prefill(ours: Mixtral, theirs: transformers.MixtralForCausalLM, ids: torch.Tensor) -> Pair:
    return lambda: ours(ids), lambda: theirs(ids, use_cache=False)


def decode(ours: Mixtral, theirs: transformers.MixtralForCausalLM, ids: torch.Tensor) -> Pair:
    """One token after the prompt, and the next, on a cache that grows alike in both."""
    cache = KVCache(ours.config, 1, 1024, device=ours.device, dtype=ours.dtype)
    ours(ids, cache=cache)
    kept = theirs(ids, use_cache=True).past_key_values
    name = cache_keyword()
    token = ids[:, :1]
    return lambda: ours(token, cache=cache), lambda: theirs(token, use_cache=True, **{name: kept})


def seconds(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ours, theirs = models(device)
    ids = torch.randint(SIZES["vocab_size"], (1, PROMPT), device=device)  # type: ignore[call-overload]
    rows = []
    with torch.no_grad():
        for name, (mine, peer) in (
            (f"prefill of {PROMPT} tokens", prefill(ours, theirs, ids)),
            ("decode of one token", decode(ours, theirs, ids)),
        ):
            mine(), peer()
            rounds = range(args.rounds)
            shown = rounds if args.json else track(rounds, name, console=Console(stderr=True), transient=True)
            own, other, ratio = paired(mine, peer, partial(seconds, device=device), shown)
            rows.append({"work": name, "ours_ms": own * 1e3, "transformers_ms": other * 1e3, "ratio": ratio})
    parameters = sum(p.numel() for p in ours.parameters()) / 1e6
    about = {"device": str(device), "threads": args.threads, "parameters_m": parameters, "torch": torch.__version__}
    about["transformers"] = transformers.__version__
    if args.json:
        print(json.dumps({**about, "rows": rows}))
        return
    table = Table(title=", ".join(f"{key} {value}" for key, value in about.items()), title_justify="left")
    for column in ("work", "ours, ms", "transformers eager, ms", "transformers / ours"):
        table.add_column(column, justify="left" if column == "work" else "right")
    for row in rows:
        table.add_row(row["work"], f"{row['ours_ms']:.1f}", f"{row['transformers_ms']:.1f}", f"{row['ratio']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()

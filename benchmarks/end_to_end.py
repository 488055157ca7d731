"""Time the whole model beside transformers' eager Mixtral, with the torch backend (or on a GPU): prefill and decode.

    python benchmarks/end_to_end.py [--rounds 15] [--threads 2] [--json]

The model has about 100 M random parameters. The two alternate, so that a change of the machine's speed hits both; a
figure is the median over the rounds, a ratio the median of the rounds' ratios.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own path holds only its folder
from benchmarks.common import hf_model, hf_step, options, our_model, our_step, report, rounds
from mixtral_triton.tools.bench.measure import paired, wall_seconds

PROMPT = 256
SIZES = {"vocab_size": 8000, "hidden_size": 512, "intermediate_size": 1024, "max_position_embeddings": 1024}


def main() -> None:
    parser = options(__doc__, rounds=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hf = hf_model(**SIZES)
    ours, theirs = our_model(hf, device), hf.to(device)
    ids = torch.randint(SIZES["vocab_size"], (1, PROMPT), device=device)
    rows = []
    with torch.no_grad():
        pairs = {
            f"prefill of {PROMPT} tokens": (lambda: ours(ids), lambda: theirs(ids, use_cache=False)),
            "decode of one token": (our_step(ours, ids), hf_step(theirs, ids)),
        }
        for name, pair in pairs.items():
            for call in pair:
                call()
            times = paired(*pair, partial(wall_seconds, device=device), rounds(args.rounds, args.json, name))
            rows.append({"work": name, "ours_ms": times[0] * 1e3, "transformers_ms": times[1] * 1e3, "ratio": times[2]})
    parameters = sum(p.numel() for p in ours.parameters()) / 1e6
    about = {"device": str(device), "threads": args.threads, "parameters_m": parameters}
    columns = {"work": "work", "ours_ms": "ours, ms", "transformers_ms": "transformers eager, ms"}
    report(args.json, about, columns | {"ratio": "transformers / ours"}, rows)


if __name__ == "__main__":
    main()

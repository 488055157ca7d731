"""Time the experts of one layer with int4 weights on a CPU: torch's product of packed codes, and dequantized weights.

One token takes two experts of 8x7B's shapes, in bf16. Each round times both ways, one after the other; the ratio is the
median over the rounds. The first call packs the codes and is timed apart.
"""

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path
from time import perf_counter

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own path holds only its folder
from mixtral_triton import ops
from mixtral_triton.kernels.launch import INTERPRETED
from mixtral_triton.tools.bench.measure import wall_seconds

CPU, LEAST = torch.device("cpu"), 40  # the ratio for 8x7B's shapes


@torch.inference_mode()
def measure(H: int, I: int, rounds: int) -> dict[str, float]:
    """Return seconds of a layer by way, the first call's, and the ratio of the ways."""
    op = ops.expert_swiglu.op
    case = {"T": 1, "H": H, "I": I, "E": 2, "K": 2, "gate_up": "int4:128", "down": "int4:128"}
    args = op.inputs(case, torch.bfloat16, CPU, torch.Generator().manual_seed(0))
    calls = {"dequantized": partial(op.call_reference, **args), "packed": partial(ops.expert_swiglu, **args)}
    begin = perf_counter()
    got = calls["packed"]()
    first, want = perf_counter() - begin, calls["dequantized"]()
    assert (got - want).abs().max() <= 0.02 * want.abs().max(), "the two ways differ"
    times = [{name: wall_seconds(call, CPU) for name, call in calls.items()} for _ in range(rounds)]
    found = {name: statistics.median(each[name] for each in times) for name in calls}
    return found | {"first": first, "ratio": statistics.median(each["dequantized"] / each["packed"] for each in times)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if INTERPRETED:
        print("cpu_int4: TRITON_INTERPRET is set, needs plain torch: unset it", file=sys.stderr)
        return 2
    found = measure(args.hidden, args.intermediate, args.rounds)
    if args.json:
        print(json.dumps(found | {"threads": torch.get_num_threads()}))
    else:
        text = "dequantized {dequantized:.4f} s, packed {packed:.4f} s (first call {first:.4f} s): {ratio:.1f} times"
        print(f"{text.format_map(found)}, needs {LEAST} for 8x7B's shapes; {torch.get_num_threads()} threads")
    return 0


if __name__ == "__main__":
    sys.exit(main())

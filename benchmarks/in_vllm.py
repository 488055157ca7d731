"""Time vLLM's engine with its own experts, or with these: prefill and decode of a model with Mixtral's sizes.

    python benchmarks/in_vllm.py [--quantization mixtral_triton] [--weights int4] [--layers 4] [--small]

The weights are random and the prompts, too. A step of decode is the difference between two numbers of new tokens. The
figures are a line of JSON; each engine needs a process of its own.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import MixtralConfig

SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 8, "head_dim": 32, "vocab_size": 256}
BATCHES, PROMPT, NEW = (1, 32), 4096, 65


def measure(llm: Any, vocabulary: int, prompt: int, new: int) -> dict[str, float]:
    """Return the prefill's tokens per second, and microseconds of a decode step by batch."""
    from vllm import SamplingParams

    generator, figures = torch.Generator().manual_seed(0), dict[str, float]()

    def seconds(batch: int, length: int, tokens: int) -> float:
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        ids = torch.randint(vocabulary, (batch, length), generator=generator).tolist()
        start = time.perf_counter()
        llm.generate([{"prompt_token_ids": row} for row in ids], sampling, use_tqdm=False)
        return time.perf_counter() - start

    def least(*case: int) -> float:
        return min(seconds(*case) for _ in range(3))  # the first also compiles

    figures[f"prefill of {prompt} tokens, tokens/s"] = prompt / least(1, prompt, 1)
    for batch in BATCHES:
        step = (least(batch, 16, new) - least(batch, 16, 1)) / (new - 1)
        figures[f"decode step, batch {batch}, us"] = 1e6 * step
    return figures


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Print the figures, and return them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quantization", help="vLLM's: mixtral_triton for these experts; none: its own, in bf16")
    parser.add_argument("--weights", choices=("int4", "int8", "fp8"), help="with mixtral_triton: quantize the experts")
    parser.add_argument("--layers", type=int, default=4, help="of Mixtral 8x7B, which has 32")
    parser.add_argument("--small", action="store_true", help="tiny sizes, a short prompt and few tokens")
    args = parser.parse_args(argv)
    prompt, new = (48, 5) if args.small else (PROMPT, NEW)
    config = MixtralConfig(num_hidden_layers=args.layers, dtype="bfloat16", **(SMALL if args.small else {}))
    config.architectures = ["MixtralForCausalLM"]
    engine: dict[str, Any] = {"load_format": "dummy", "skip_tokenizer_init": True, "enable_prefix_caching": False}
    engine |= {"max_model_len": prompt + new, "max_num_batched_tokens": prompt + new, "max_num_seqs": max(BATCHES)}
    engine |= {"enforce_eager": True} if args.small else {}
    if args.quantization == "mixtral_triton":
        options = {"weights": args.weights, "route": True}
        engine |= {"quantization": args.quantization, "additional_config": {"mixtral_triton": options}}
    from vllm import LLM  # not for --help

    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        figures = measure(LLM(folder, **engine), config.vocab_size, prompt, new)
    experts = f"{args.quantization or 'vLLM'} {args.weights or 'bf16'}"
    found = {"kind": "check", "check": f"in vLLM, experts of {experts}", "layers": args.layers, **figures}
    print("\n" + json.dumps(found), flush=True)
    return found


if __name__ == "__main__":
    main()

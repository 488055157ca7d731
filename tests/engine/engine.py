"""A vLLM engine in a process of its own: `python -m tests.engine.engine`, its case as JSON on stdin, what it made as
JSON on a line of stdout, amid vLLM's logs.

options   additional_config["mixtral_triton"]; None: vLLM without the plugin
engine    further arguments of vllm.LLM
model     the checkpoint's folder; None: the package's
prompts   lists of token ids
new       tokens to generate
halved    halve what the experts return
"""

import gc
import json
import sys
from typing import Any

import torch
from torch import Tensor, nn
from vllm import LLM, SamplingParams

from mixtral_triton import SMALL
from mixtral_triton import vllm as plugin
from mixtral_triton.kernels.launching import launch

ENGINE = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "seed": 0, "disable_log_stats": True}
ENGINE |= {"max_num_seqs": 3, "max_num_batched_tokens": 32}


def experts_of(model: nn.Module) -> dict[str, Any]:
    """Return the bytes of the experts' weights, and how many tensors of a dense projection are alive."""
    layers = [module for module in model.modules() if type(module).__name__ == "RoutedExperts"]
    tensors = [x for layer in layers for x in (*layer.parameters(), *layer.buffers()) if x.dim() == 3]
    shapes = {tuple(getattr(layer, name).shape) for layer in layers for name in ("w13_weight", "w2_weight")}
    alive = [x for x in gc.get_objects() if isinstance(x, Tensor) and tuple(x.shape) in shapes and not x.is_meta]
    return {"bytes": sum(x.nbytes for x in tensors), "dense": len(alive)}


def main() -> None:
    case = json.load(sys.stdin)
    launches, run = [], launch.interpret
    launch.interpret = lambda *args, **kwargs: (launches.append(args[0]), run(*args, **kwargs))[1]  # type: ignore
    if case["halved"]:
        whole = plugin._Experts.experts
        plugin._Experts.experts = lambda *args: whole(*args) / 2  # type: ignore[method-assign]
    options = case["options"]
    ours = {"quantization": "mixtral_triton", "additional_config": {"mixtral_triton": options}}
    llm = LLM(case["model"] or str(SMALL), **ENGINE | (ours if options is not None else {}) | case["engine"])
    found = experts_of(llm.apply_model(lambda model: model)[0]) if not case["engine"] else {}
    sampling = SamplingParams(temperature=0.0, max_tokens=case["new"], logprobs=0, ignore_eos=True)
    prompts: Any = [{"prompt_token_ids": ids} for ids in case["prompts"]]
    texts = [request.outputs[0] for request in llm.generate(prompts, sampling, use_tqdm=False)]
    found["ids"] = [[*text.token_ids] for text in texts]
    found["logprobs"] = [
        [step[token].logprob for token, step in zip(text.token_ids, text.logprobs, strict=True)] for text in texts
    ]
    print("\n" + json.dumps(found | {"launches": len(launches), "torch": torch.__version__}))


if __name__ == "__main__":  # vLLM's workers import this module
    main()

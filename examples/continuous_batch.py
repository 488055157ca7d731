"""transformers' own continuous batching, alone and with `apply`: the same texts.

python examples/continuous_batch.py [FOLDER]
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

from mixtral_triton import SMALL, apply

folder = sys.argv[1] if len(sys.argv) > 1 else SMALL
prompts = ["The return statement", "A list is", "When an exception is raised in the body of the loop,"]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
config = GenerationConfig(max_new_tokens=16, do_sample=False, eos_token_id=1, pad_token_id=1)
pages = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=256)  # by default they take 90 % of the free memory


def texts() -> list[str]:
    outputs = model.generate_batch(tokenizer(prompts).input_ids, config, pages, progress_bar=False)
    return sorted(tokenizer.decode([*out.prompt_ids, *out.generated_tokens]) for out in outputs.values())


before = texts()
apply(model, attention=False)  # which stays transformers': it reads keys and values in pages
print(*(after := texts()), sep="\n")
print("the same texts before and after apply:", before == after)

"""Several prompts at once: left-padded through transformers with `apply`, and ragged through this package's own model.

python examples/batch.py [FOLDER]
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixtral_triton import SMALL, Mixtral, apply

folder = sys.argv[1] if len(sys.argv) > 1 else SMALL
prompts = ["The return statement", "A list is", "When an exception is raised in the body of the loop,"]
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", pad_token="</s>")

model = apply(AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval())
padded = tokenizer(prompts, return_tensors="pt", padding=True)
rows = model.generate(**padded, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.pad_token_id)

mixtral = Mixtral.from_pretrained(folder, dtype=torch.float32)
ragged = [torch.tensor(tokenizer(prompt).input_ids, device=mixtral.device) for prompt in prompts]
lists = mixtral.generate(ragged, max_new_tokens=16)

for row, ids in zip(rows, lists, strict=True):
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (row, ids)]
    print(texts[0])
    print("  the same from both:", texts[0] == texts[1])

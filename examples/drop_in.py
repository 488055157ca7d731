"""transformers' Mixtral, the same with `apply`, and after `revert`: the same text three times.

python examples/drop_in.py [FOLDER]
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from mixtral_triton import SMALL, apply, revert

folder = sys.argv[1] if len(sys.argv) > 1 else SMALL
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
prompt = tokenizer("The return statement", return_tensors="pt")


def text() -> str:
    return tokenizer.decode(model.generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=1)[0])


before = text()
apply(model)  # this instance only
print(during := text())
revert(model)  # bit for bit what it was
print("the same text before, with and after apply:", before == during == text())

"""Fine-tune LoRA over experts in 4 bits by PEFT, save the adapter, and load it beside experts in 8 bits.

python -m examples.qlora [FOLDER]
"""

import sys
import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixtral_triton import SMALL, ExpertsConfig

TEXT = "The return statement leaves the current function call with the expression list as return value."


def load(folder: str, weights: str) -> torch.nn.Module:
    settings = {"quantization_config": ExpertsConfig(weights), "attn_implementation": "mixtral_triton"}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings)


def main() -> None:
    folder = sys.argv[1] if len(sys.argv) > 1 else str(SMALL)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(TEXT, return_tensors="pt")
    torch.manual_seed(0)
    model = get_peft_model(load(folder, "int4"), LoraConfig(r=8, target_modules=["q_proj", "v_proj"])).train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(**batch, labels=batch["input_ids"], use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print("losses", *(f"{loss:.3f}" for loss in losses))
    print("the loss falls:", losses[-1] < losses[0])
    with tempfile.TemporaryDirectory() as adapter:
        model.save_pretrained(adapter)
        tuned = PeftModel.from_pretrained(load(folder, "int8"), adapter).eval()
    prompt = {name: x[:, :4] for name, x in batch.items()}
    ids = tuned.generate(**prompt, max_new_tokens=16, do_sample=False, pad_token_id=1)
    print("with experts in 8 bits:", tokenizer.decode(ids[0]))


if __name__ == "__main__":
    main()

"""Train the small checkpoint of the package on the documentation that every Python carries: --out DIR."""

import argparse
import ast
import math
import random
import re
import shutil
import sysconfig
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from rich.progress import track
from tokenizers import Tokenizer
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

SMALL = Path(__file__).parents[1] / "mixtral_triton" / "small"  # its configuration and tokenizer are used again
SEED, STEPS, HELD_OUT_SHARE = 0, 3000, 0.04
BATCH_SIZE, SEQUENCE_LENGTH = 8, 256  # four times the sliding window, so that the window is in force while training
PEAK_LR, WARMUP_STEPS = 2e-3, 100
# Folders of the standard library that hold no documentation of it: tests, examples, boilerplate, installed packages.
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "encodings", "turtledemo", "ensurepip"}


def clean(text: str) -> str:
    """Return the prose of `text`: no grammar, sessions, underlines, repeated paragraphs or quotes around code words."""
    lines = re.sub(r"(?m)^(?=.*([=*~^#\"_+-])\1{3})[ =*~^#\"_+-]+$", "", text.expandtabs()).split("\n")
    # Sources mark code words in different ways, or not at all; indented lines are code, where a quote has a meaning.
    text = "\n".join(line.rstrip() if line.startswith("   ") else re.sub(r"[\"`]|\s+$", "", line) for line in lines)
    paragraphs = (paragraph.strip("\n") for paragraph in re.split(r"\n{2,}", text))
    return "\n\n".join(dict.fromkeys(p for p in paragraphs if p and "::=" not in p and ">>>" not in p))


def module_text(source: str) -> str:
    """Return the docstrings of a module, the outermost first, and then its blocks of comments."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    texts += [re.sub(r"(?m)^[ \t]*#+ ?", "", block) for block in re.findall(r"(?m)(?:^[ \t]*#.*\n)+", source)]
    # The shortest are left out: they are mostly names over again, not sentences.
    return clean("\n\n".join(text for text in texts if len(text) >= 60))


def documents() -> Iterator[list[str]]:
    """Yield two lists of documents: the topics of `help()`, and the modules of the standard library."""
    yield [clean(text) for _, text in sorted(topics.items())]
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in sorted(root.rglob("*.py")) if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts)]
    yield [text for path in paths if (text := module_text(path.read_text("utf-8")))]


def hold_out(kind: list[str]) -> tuple[list[str], list[str]]:
    """Split whole documents of one kind into those to train on and those that are held out."""
    train, held_out, shuffled = [], [], list(kind)
    random.Random(SEED).shuffle(shuffled)
    remaining = HELD_OUT_SHARE * sum(map(len, kind))
    for document in shuffled:
        fits = len(document) <= remaining
        (held_out if fits else train).append(document)
        remaining -= fits * len(document)
    return train, held_out


def training_texts() -> list[str]:
    """Hold out documents of each kind, and return the others without their paragraphs, which topics quote at length."""
    train, held_out = (list(chain(*part)) for part in zip(*map(hold_out, documents()), strict=True))
    known = {" ".join(paragraph.split()) for document in held_out for paragraph in document.split("\n\n")}
    train = ["\n\n".join(p for p in document.split("\n\n") if " ".join(p.split()) not in known) for document in train]
    return [document for document in train if document]


def encode(tokenizer: Tokenizer, documents: list[str]) -> list[int]:
    """Return the tokens of all documents, one after the other, <s> before each and </s> behind it."""
    eos = tokenizer.token_to_id("</s>")
    return [token for encoding in tokenizer.encode_batch(documents) for token in (*encoding.ids, eos)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    folder = parser.parse_args().out
    torch.set_num_threads(1)  # the order of the sums, and so the result, then does not hang on the number of cores
    torch.manual_seed(SEED)
    train = torch.tensor(encode(Tokenizer.from_file(str(SMALL / "tokenizer.json")), training_texts()))
    model = MixtralForCausalLM(MixtralConfig.from_pretrained(SMALL))
    groups = [{"params": [p], "weight_decay": 0.1 * (p.ndim > 1)} for p in model.parameters()]  # matrices decay only
    optimizer, spans = torch.optim.AdamW(groups, betas=(0.9, 0.95)), train.unfold(0, SEQUENCE_LENGTH + 1, 1)
    losses: list[float] = []
    for step in track(range(STEPS), "training"):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min(1, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * (step / STEPS))) / 2
        windows = spans[torch.randint(len(spans), (BATCH_SIZE,))]
        output = model(windows[:, :-1], output_router_logits=True, use_cache=False)
        loss = F.cross_entropy(output.logits.mT, windows[:, 1:])
        # Layer by layer: transformers' own aux_loss pools the layers, which lets one layer starve an expert.
        balance = sum(load_balancing_loss_func((logits,), 8, 2) for logits in output.router_logits)
        (loss + model.config.router_aux_loss_coef * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    for parameter in model.parameters():  # not model.to(): the frequencies of the rotary embedding stay fp32
        parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "heldout.json"):
        shutil.copy(SMALL / name, folder)
    (folder / "generation_config.json").unlink()  # it says no more than config.json
    print(f"loss in training {sum(losses[-200:]) / 200:.3f}, of {len(train)} tokens")


if __name__ == "__main__":
    main()

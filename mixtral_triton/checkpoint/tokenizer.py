"""The tokenizer of a checkpoint's folder, which is transformers'."""

from __future__ import annotations

import os
from typing import Any


def load_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """Return the AutoTokenizer of a folder. ValueError for one that transformers cannot read."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # of a folder without one transformers makes it
            raise ValueError("it has no words")
        return tokenizer
    except Exception as error:  # the tokenizers library raises nothing narrower
        got = f"{folder}: transformers cannot read the tokenizer: {' '.join(str(error).split()):.200}"
        raise ValueError(f"{got}: needs the checkpoint's tokenizer.json and tokenizer_config.json") from error

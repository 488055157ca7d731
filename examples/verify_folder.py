"""Verify a checkpoint folder against torch, then transformers' model of it against transformers' own modules.

python examples/verify_folder.py [FOLDER]
"""

import os
import sys

import torch
from transformers import AutoModelForCausalLM

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the import below: interprets the kernels
from mixtral_triton import SMALL, verify

folder = sys.argv[1] if len(sys.argv) > 1 else SMALL
report = verify(folder)
print(report)

drop_in = verify(AutoModelForCausalLM.from_pretrained(folder).eval())
print(drop_in.verdict, f"({drop_in.backend}, compared with {drop_in.peer})")
worst = max(drop_in.rows, key=lambda row: row.share)
print(f"nearest to its limit: {worst.where}: {worst.error:.1e} of {worst.limit:.1e}")
sys.exit(0 if report.ok and drop_in.ok else 1)

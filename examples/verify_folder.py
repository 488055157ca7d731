"""Verify a checkpoint folder against torch, then transformers' model of it against transformers' own modules.

python examples/verify_folder.py [FOLDER]
"""

import sys

from transformers import AutoModelForCausalLM

from mixtral_triton import verify
from mixtral_triton.cli import SMALL

folder = sys.argv[1] if len(sys.argv) > 1 else SMALL
report = verify(folder)
print(report)

drop_in = verify(AutoModelForCausalLM.from_pretrained(folder).eval())
print(drop_in.verdict, f"({drop_in.backend}, compared with {drop_in.peer})")
worst = max(drop_in.rows, key=lambda row: row.share)
print(f"nearest to its limit: {worst.where} ({worst.case}): {worst.error:.1e} of {worst.limit:.1e}")
sys.exit(1 if report.wrong or drop_in.wrong else 0)

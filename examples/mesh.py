"""One model on several processes, each of which keeps a part of it: its heads and a part of each expert.

    torchrun --nproc-per-node 2 examples/mesh.py [FOLDER]

Each process has a GPU of its own, over NCCL; without GPUs all run on the CPU, over gloo.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from mixtral_triton import SMALL, Mixtral

if "WORLD_SIZE" not in os.environ:
    sys.exit("torchrun starts the processes: torchrun --nproc-per-node 2 examples/mesh.py [FOLDER]")
folder = sys.argv[1] if len(sys.argv) > 1 else SMALL
device = "cuda" if torch.cuda.is_available() else "cpu"
mesh = init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),), mesh_dim_names=("tp",))
model = Mixtral.from_pretrained(folder, mesh=mesh)
prompt = model.tokenizer("The return statement", return_tensors="pt").to(model.device)
text = model.generate(**prompt, max_new_tokens=32)  # the same on every rank
if dist.get_rank() == 0:
    print(model.tokenizer.decode(text[0]))
dist.destroy_process_group()

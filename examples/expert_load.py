"""Draw how many tokens of a text each expert of each layer takes, beside an equal share.

python examples/expert_load.py [FOLDER] [TEXT_FILE] [PICTURE]
"""

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

from mixtral_triton import SMALL, Mixtral

folder, source, picture = (*sys.argv[1:], *(SMALL, __file__, "expert_load.png")[len(sys.argv) - 1 :])
model = Mixtral.from_pretrained(folder)
text = Path(source).read_text(encoding="utf-8")
ids = torch.tensor(
    model.tokenizer(text, verbose=False).input_ids[: model.config.max_position_embeddings], device=model.device
)
routes = model.trace(ids)  # ids and routing weights, [L, T, K] each
E = model.config.num_local_experts
load = torch.stack([layer.flatten().long().bincount(minlength=E) for layer in routes.ids]) / routes.ids[0].numel() * E

figure = Figure(figsize=(max(6, 2 + 0.3 * E), 1.5 + 0.3 * len(load)), layout="constrained")
axes = figure.subplots()
image = axes.imshow(load.cpu().numpy(), cmap="RdBu_r", vmin=0, vmax=2, aspect="auto")
axes.set(xlabel="expert", ylabel="layer", yticks=range(0, len(load), max(1, len(load) // 8)))
axes.set_title(f"slots of an expert beside an equal share, of {len(ids):,} tokens")
figure.colorbar(image, extend="max")
figure.savefig(picture, dpi=150)
print(f"{picture}: the fullest expert of a layer has {float(load.max()):.2f} times an equal share")

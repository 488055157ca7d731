"""Mixtral: the model of model.py, read from a checkpoint, with what its users call."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch

from ..checkpoint.arguments import reject_unknown
from ..checkpoint.tokenizer import load_tokenizer
from .generate import generate, stream
from .load import load
from .memory_plan import MemoryRequest
from .model import Model
from .parallel import Ranks
from .score import score
from .trace import trace

LOAD_HINTS = {  # what does here what an argument of transformers does there
    "torch_dtype": "dtype",
    "device_map": "device, or mesh for several GPUs, or offload for experts in host memory",
    "quantization_config": "weights: 'int4', 'int8' or 'fp8'",
    "load_in_4bit": "weights='int4'",
    "load_in_8bit": "weights='int8'",
    "revision": "the folder as 'NAME@REVISION'",
}


class Mixtral(Model):
    """A Mixtral language model for inference. `Mixtral(config)` allocates the parameters unset (`Model` explains its
    arguments); `Mixtral.from_pretrained` fills them."""

    _tokenizer: Any = None
    generate = generate
    stream = stream
    score = score
    trace = trace

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        weights: str | Mapping[str, str] | None = None,
        mesh: Any = None,
        deterministic: bool = False,
        offload: int | str = 0,
        progress: Callable[[int], None] | None = None,
        context: int | None = None,
        cache_dtype: torch.dtype | None = None,
        activations: str | None = None,
        **unknown: Any,
    ) -> Mixtral:
        """Load a Hugging Face checkpoint (config.json and safetensors; checkpoint/tensors.py says what is rejected).

        folder         a local one, or a name on the hub, `mistralai/Mixtral-8x7B-v0.1`, perhaps with `@revision`
        device         None: the GPU if there is one and nothing is interpreted, else the CPU; "meta": headers only
        dtype          None or "auto": as stored; a torch dtype or its name, "bfloat16"
        weights        None: as stored, quantized or not. "int4", "int8" or "fp8": quantize the experts while loading.
                       {"experts": "int4", "linear": "int8"}: attention's projections and the head, too; a tied head
                       stays dense, like the gate and the norms. A checkpoint that is quantized already is quantized
                       anew there, with a warning
        mesh           a torch DeviceMesh with dimensions "tp" or "ep", or both. Every rank calls this, reads its part
                       (parallel.py), and calls the model with the same tokens. A failure on one rank raises on all
        deterministic  see the class
        offload        so many experts of each layer stay in pinned host memory, where kernels read them in place, its
                       last ones; "auto": the fewest of the whole model that have to, with one sequence of `context`
                       tokens (None: 4,096) and its cache of `cache_dtype` (None: dtype), and the untied embedding, as
                       a warning tells
        progress       is called with the number of bytes just read
        activations    None: products take activations of 16 bits, or fp32. "fp8": in a forward of more than 64 rows,
                       with `deterministic` in any, the layers' products with fp8 weights that have one scale a row
                       quantize their activations to e4m3, one scale a row, found anew each time: static scales of a
                       checkpoint are not used. It needs such weights, and a GPU from sm_89 on or a CPU; the head's
                       products, of few rows in `generate`, stay. Not with a mesh, whose ranks would each scale their
                       own columns
        """
        reject_unknown("Mixtral.from_pretrained", unknown, LOAD_HINTS)
        allowed = (None, "fp8") if mesh is None else (None,)
        if activations not in allowed:
            need = "None or, without a mesh, 'fp8'"
            raise ValueError(f"Mixtral.from_pretrained: activations is {activations!r}, needs {need}")
        if not isinstance(deterministic, bool):
            raise ValueError(f"Mixtral.from_pretrained: deterministic is {deterministic!r}, needs True or False")
        request = MemoryRequest(offload, context, cache_dtype, activations)
        ranks = None if mesh is None else Ranks(mesh)
        with nullcontext() if ranks is None else ranks.raise_on_any_rank():
            return load(cls, folder, device, dtype, weights, deterministic, request, progress, ranks)

    @property
    def tokenizer(self) -> Any:
        """The AutoTokenizer of the model's folder, read at first use. ValueError for a model without a folder."""
        if self._tokenizer is None:
            if self.folder is None:
                raise ValueError("Mixtral.tokenizer: the model was read from no folder, needs Mixtral.from_pretrained")
            self._tokenizer = load_tokenizer(self.folder)
        return self._tokenizer


Mixtral.written_as = Mixtral

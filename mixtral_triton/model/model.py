"""Mixtral (Jiang et al. 2024): its parameters, and a forward from ids to logits. Its layers are in layer.py.

B batch, T tokens, H hidden, D head size, P positions, V vocabulary
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import ops
from ..checkpoint import tensors as checkpoint
from ..checkpoint.arguments import check_dtype, check_ids, check_lengths, check_positions, reject_unknown
from ..checkpoint.config import PREFILL_CHUNK, MixtralConfig
from ..checkpoint.shard import UNSHARDED
from ..kernels.launching.launch import pdl_region
from ..kernels.operation.call import reject_transforms, transformed, untraced
from ..kernels.operation.checks import check_values
from ..kernels.ops.cache_args import rope_tables
from ..quantize import OffloadedWeight, QuantizedWeight, QuantSpec
from .cache import KVCache
from .conversation import Conversation, Identity
from .layer import ForwardContext, Layer, WeightTensor
from .memory_plan import RESIDENT, Placement, offloaded_weights
from .parallel import Ranks

if TYPE_CHECKING:
    from typing_extensions import Self

# Rows of a forward up to which activations="fp8" keeps 16 bits: its products are then bound by the weights' bytes.
SIXTEEN_BIT_ROWS = 64
FORWARD_HINTS = {  # what does here what an argument of transformers does there
    "attention_mask": "lengths, with a cache and padding on the right; generate and score take prompts of any lengths",
    "labels": "model.score(texts): the log probability of each token",
    "output_hidden_states": "model.layers[i].register_forward_hook: a layer returns its hidden state and the next norm",
    "past_key_values": "cache, a KVCache",
    "use_cache": "cache, a KVCache",
    "position_ids": "cache and lengths, from which positions follow",
}


@cache
def _method_names(kind: type[nn.Module]) -> frozenset[str]:
    """Return the attributes of an instance with which a caller replaces what its class does in a forward."""
    methods = {name for name in dir(kind) if callable(getattr(kind, name))}
    return frozenset(methods | {"_compiled_call_impl"})  # None until `compile` sets it


class Model(nn.Module):
    """The forward of a Mixtral language model, for inference.

    The parameters are allocated unset, and the loader fills them. Their names and shapes are
    `checkpoint.parameter_shapes(config)`; those named in `specs` are QuantizedWeights. Gradients and training mode
    raise ValueError.

    deterministic  a sequence's bits do not depend on the rest of the batch. The price: one tile for any number of
                   tokens in every matrix product, sorted experts even for one token, and a fixed split of the keys
    ranks          the model is one rank's part of a mesh: `config` has the rank's heads
    placement      what lies in pinned host memory and is read in place
    """

    embed_tokens: Tensor  # [V, H]
    norm: Tensor  # [H]
    lm_head: WeightTensor  # [V, H]
    cos: Tensor  # [P, D/2] fp32
    sin: Tensor
    layers: Sequence[Layer]
    activations: str | None = None  # "fp8": see `from_pretrained`
    sixteen_bit_rows: int = SIXTEEN_BIT_ROWS
    requantized: frozenset[str] = frozenset()  # tensors on disk that were dequantized, and perhaps quantized anew
    folder: Path | None = None  # which `from_pretrained` read
    written_as: ClassVar[type[nn.Module]]  # the class itself: of a subclass's forward nothing is known
    prefill_chunk: int = PREFILL_CHUNK  # tokens that `generate` reads of a prompt at once

    def __init__(
        self,
        config: MixtralConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.bfloat16,
        deterministic: bool = False,
        specs: Mapping[str, QuantSpec] | None = None,
        ranks: Ranks | None = None,
        placement: Placement = RESIDENT,
    ) -> None:
        super().__init__()
        self.deterministic, self.ranks = deterministic, ranks
        shapes = checkpoint.parameter_shapes(config, UNSHARDED if ranks is None else ranks.shard)
        self.config = config = config if ranks is None else ranks.shard.config(config)
        specs = specs or {}
        layers: list[dict[str, Any]] = [{} for _ in range(config.num_hidden_layers)]
        for name, shape in shapes.items():
            weight = placement.empty_weight(name, shape, specs.get(name), dtype, device)
            if name.startswith("layers."):
                _, index, short = name.split(".")
                layers[int(index)][short] = weight
            else:
                setattr(self, name, weight)
        if config.tie_word_embeddings:
            self.lm_head = self.embed_tokens
        self.layers = nn.ModuleList(Layer(config, parameters) for parameters in layers)  # type: ignore[assignment]
        OffloadedWeight.stage_in_turn(list(offloaded_weights(self)))
        self._set_tables(device)
        super().train(False)

    def _set_tables(self, device: torch.device | str | None) -> None:
        """Compute the rotary tables, which no state_dict holds."""
        config = self.config
        cos, sin = rope_tables(config.rope_theta, config.max_position_embeddings, config.head_dim, device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.dtype

    def quantizes_activations(self, rows: int) -> bool:
        """Return whether a forward of so many rows, B * T, quantizes activations (`from_pretrained`)."""
        return self.activations is not None and (self.deterministic or rows > self.sixteen_bit_rows)

    def forward(
        self, input_ids: Tensor, cache: KVCache | None = None, lengths: Tensor | None = None, **unknown: Any
    ) -> Tensor:
        """input_ids int64 [B,T] -> logits fp32 [B,T,V].

        With `cache`, the tokens continue each of its sequences. `lengths` int [B]: only the first lengths[b] tokens of
        row b exist (a right-padded chunk); logits of padding are undefined.

        An id outside the vocabulary, lengths outside 0..T and a sequence beyond the cache's `max_len` raise ValueError
        on a CPU. On a GPU nothing is read back, so the call can be captured in a CUDA graph: all logits of such a
        sequence are NaN, and so are later ones while they see these tokens in the cache. Others are unaffected.
        """
        reject_unknown("Mixtral", unknown, FORWARD_HINTS)
        self._check(input_ids, cache, lengths)
        return self.hidden(input_ids, cache, lengths, self.head)

    def hidden(
        self,
        input_ids: Tensor,
        cache: KVCache | None = None,
        lengths: Tensor | None = None,
        head: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """`forward` without the head, on checked arguments: [B,T] -> [B,T,H], normed.

        `head` maps that to the result, before `cache` counts the tokens: a call that fails, which a caller may repeat
        with the same tokens, then leaves them uncounted.
        """
        B, T = input_ids.shape
        if self.ranks is not None and not untraced() and self.device.type != "meta":
            # The operators' checks do not know other ranks' experts.
            raise ValueError("Mixtral: on a mesh a model cannot be compiled, traced or observed by a dispatch mode")
        eps = self.config.rms_norm_eps
        num_new = None if lengths is None else lengths.to(torch.int32).contiguous()
        options = self.ranks, self.deterministic, self.quantizes_activations(B * T)
        context = ForwardContext(self.config, (self.cos, self.sin), (B, T), *options, cache, num_new)
        new, limit = context.num_new if lengths is None else lengths, self.config.max_position_embeddings
        bounds = context.cache_lengths, new, limit if cache is None else cache.max_len
        norm = self.layers[0].input_layernorm
        h, x = ops.embed_rms_norm.unchecked(input_ids, self.embed_tokens, norm, eps, *bounds)
        next_norms = [*(layer.input_layernorm for layer in self.layers), self.norm][1:]
        kv_caches = [None] * len(next_norms) if cache is None else zip(cache.keys, cache.values, strict=True)
        # No PDL with several ranks (collectives run on other streams), or while tracing.
        pdl = self.ranks is None and not torch.compiler.is_compiling() and self.find_change() is None
        try:
            with pdl_region() if pdl else nullcontext():
                for layer, next_norm, kv_cache in zip(self.layers, next_norms, kv_caches, strict=True):
                    h, x = layer(h, x, next_norm, kv_cache, context)
            out = h if head is None else head(h)
        except BaseException:
            if cache is not None:
                cache.note_failure()
            raise
        if cache is not None:
            cache.advance(context.num_new, T if lengths is None else 0)
        return out

    def find_change(self) -> str | None:
        """Return where a caller's code runs in the layers; None where each is exactly as this class made it.

        Such code may write weights, so no launch is then dependent, and a replay of a graph would not call it. Hooks of
        the model itself do neither: they run around `forward`.
        """
        if _has_any_global_hook():
            return "all modules have a hook"
        methods = {kind: _method_names(kind) for kind in (Model, Layer)}
        for index, module in enumerate((self, *self.layers)):
            kind, hooked = Layer if index else Model, index and (module._forward_hooks or module._forward_pre_hooks)
            # A parametrization makes a subclass of its own.
            subclass = type(module) is not (Layer if index else self.written_as)
            if hooked or subclass or not methods[kind].isdisjoint(module.__dict__):
                return f"{f'layer {index - 1}' if index else 'the model'} has a hook, or methods of its own"
        return None

    def head(self, h: Tensor) -> Tensor:
        """[..., H] -> logits fp32 [..., V]."""
        logits = ops.linear.unchecked(h, self.lm_head, deterministic=self.deterministic)
        if self.ranks is not None and self.lm_head is not self.embed_tokens:  # every rank has the whole embedding
            logits = self.ranks.all_gather(logits, self.config.vocab_size)
        return logits.float()

    def named_weights(self) -> dict[str, Any]:
        """Return every Parameter and QuantizedWeight by the names of `checkpoint.parameter_shapes`."""
        quantized = {name: module for name, module in self.named_modules() if isinstance(module, QuantizedWeight)}
        return dict(self.named_parameters()) | quantized

    def _check(self, input_ids: Tensor, cache: KVCache | None, lengths: Tensor | None) -> None:
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            raise ValueError("Mixtral is for inference only: its parameters cannot require gradients")
        if untraced() and transformed():
            reject_transforms("Mixtral", (input_ids, *self.parameters()))
        check_dtype("Mixtral: dtype", self.dtype)  # the model may have been converted
        check_ids("Mixtral", input_ids, self.config.vocab_size, self.device)
        B, T = input_ids.shape
        if cache is None and lengths is not None:
            raise ValueError("Mixtral: argument 'lengths' is given without a cache, needs a cache")
        if cache is None:
            check_positions(f"Mixtral: {T} tokens", T, self.config)
        if cache is not None:
            self._check_cache(cache, B)
            if lengths is not None:
                check_lengths("Mixtral", lengths, B, self.device)
                check_values("Mixtral", "lengths", lengths, 0, T)
            if torch.compiler.is_compiling():
                if cache.conversation is not None:
                    cache.conversation.texts = None
                return
            conversation, identity = Conversation.of(cache), self.identity()
            if conversation.is_of_another(cache, identity):
                got = "keys that another model filled in, or this one in another dtype"
                raise ValueError(f"Mixtral: argument 'cache' has {got}, needs a new cache, or lengths of 0")
            cache.reserve(T if lengths is None else lengths)
            conversation.note_forward(cache, identity, input_ids, lengths)

    def identity(self) -> Identity:
        """Return what a cache keeps of the model that filled it."""
        return weakref.ref(self), self.dtype

    def _check_cache(self, cache: KVCache, B: int) -> None:
        """Raise ValueError unless `cache` is one of this model, for B sequences."""
        if not isinstance(cache, KVCache):
            raise ValueError(f"Mixtral: argument 'cache' is a {type(cache).__name__}, needs a KVCache")
        check_lengths("KVCache", cache.lengths, None, None)  # a caller may have set them
        # Identity first: a compiler cannot compare a config whose numbers it has made symbols.
        same = cache.config is self.config or cache.config == self.config
        fields = () if same else vars(cache.config).items()
        for what, got, need in (
            ("batch", cache.batch, B),
            ("device", cache.lengths.device, self.device),
            ("dtype", self.dtype if cache.dtype is torch.int8 else cache.dtype, self.dtype),
            *((f"config.{name}", value, getattr(self.config, name)) for name, value in fields),
        ):
            if got != need:
                raise ValueError(f"Mixtral: argument 'cache' has {what} {got}, needs {need}")

    def train(self, mode: bool = True) -> Self:
        if mode:
            raise ValueError("Mixtral is for inference only: there is no training mode")
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move and convert; the rotary tables stay fp32, since rounded angles would change the logits, and are set
        after `to_empty`, too. Offloaded experts refuse before anything has changed."""
        for weight in offloaded_weights(self):
            weight._apply(fn)
        cos, sin = self.cos, self.sin
        super()._apply(fn, recurse)
        if cos.is_meta:
            self._set_tables(self.cos.device)
        else:
            self.cos, self.sin = cos.to(self.cos.device), sin.to(self.sin.device)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        """Load a state_dict's own part, which comes first: offloaded experts refuse before anything has changed."""
        for weight in offloaded_weights(self):
            weight._refuse()
        super()._load_from_state_dict(*args)
        if self.cos.is_meta:  # assign=True has moved the parameters
            self._set_tables(self.device)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        if requires_grad:
            raise ValueError("Mixtral is for inference only: its parameters cannot require gradients")
        return super().requires_grad_(False)


Model.written_as = Model

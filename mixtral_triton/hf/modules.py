"""The subclasses of transformers' modules that `apply` uses: they keep parameters, names, hooks and signatures.

B batch, T tokens, H hidden, D head size
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mixtral import modeling_mixtral as modeling

from .. import ops
from ..kernels.operation.checks import FLOATS
from .attention import attention
from .experts import NAME, experts, fused
from .masks import CACHE, IntervalMask, causal_mask, check_dense

PARTS_ATTRIBUTE = "_mixtral_triton"  # attribute of each module of these classes: the instance's Parts
ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "cache", "inputs_embeds", "use_cache")  # MixtralModel's


@dataclass
class Parts:
    """Which parts of a model use this package: one object, shared by all modules of an applied instance."""

    attention: bool | None  # None: not applied; False: another one, by transformers' set_attn_implementation
    experts: bool | None
    rope: bool


class Applied:
    """The base of classes that replace a class of transformers, their `original`.

    Who calls the class with arguments gets an instance of `original`, and a pickle of an instance names `original`.
    """

    original: ClassVar[Any]
    _mixtral_triton: Parts

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not issubclass(cls.__bases__[-1], Applied):
            cls.original = cls.__bases__[-1]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.original(*args, **kwargs) if args or kwargs else super().__new__(cls)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return rebuild, (self.original,), *super().__reduce_ex__(protocol)[2:]


def rebuild(kind: Any) -> Any:
    """Return, for pickle, an instance of what `kind` of transformers' becomes, without a state."""
    return Applied.__new__(applied_class(kind))


class TritonRMSNorm(Applied, modeling.MixtralRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        run = fused(ops.rms_norm, hidden_states, weight := self.weight)
        return super().forward(hidden_states) if run is None else run(hidden_states, weight, self.variance_epsilon)


class TritonRouter(Applied, modeling.MixtralTopKRouter):
    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if (run := fused(ops.gate_route, hidden_states, weight := self.weight)) is None:
            return super().forward(hidden_states)
        logits, routing_weights, ids = run(hidden_states.reshape(-1, self.hidden_dim), weight, self.top_k)
        return logits, routing_weights, ids.long()  # int64, as hooks of the gate expect


class TritonExperts(Applied, modeling.MixtralExperts):
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        routed = hidden_states, top_k_index, top_k_weights
        return experts(self, *routed) if self._mixtral_triton.experts else super().forward(*routed)


class Angles(tuple):
    """(cos, sin), each [B,T,D] in the model's dtype as in transformers, and `tables`, which `ops.rope` reads:
    cos and sin fp32 [P,D/2], a row per token, and the rows' numbers [B,T]."""

    tables: tuple[Tensor, ...] | None = None  # None: a hook made this, whose values count

    def to(self, device: Any, non_blocking: bool = False) -> Angles:
        """Move the tables, too: accelerate calls this between GPUs, and would lose them otherwise."""
        moved = Angles(x.to(device, non_blocking=non_blocking) for x in self)
        moved.tables = self.tables and tuple(x.to(device, non_blocking=non_blocking) for x in self.tables)
        return moved


def token_tables(cos: Tensor, sin: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """transformers' cos and sin [B or 1,T,D] -> `Angles.tables`."""
    rows, half = cos.shape[0] * cos.shape[1], cos.shape[2] // 2
    numbers = torch.arange(rows, device=cos.device).view(cos.shape[:2]).expand(batch, cos.shape[1])
    cos, sin = (part[..., :half].reshape(rows, half).float() for part in (cos, sin))
    return cos, sin, numbers


class TritonRotaryEmbedding(Applied, modeling.MixtralRotaryEmbedding):
    """Any kind of rotary embedding -> `Angles`. transformers looks for "RotaryEmbedding" in the class's name."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = super().forward(x.new_empty(0, dtype=torch.float32), position_ids)  # reads only the dtype of x
        angles = Angles((cos.to(x.dtype), sin.to(x.dtype)))
        angles.tables = token_tables(cos, sin, x.shape[0])
        return angles


class TritonAttention(Applied, modeling.MixtralAttention):
    """transformers' attention with `ops.rope`, with `ops.attention`, or with both."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,  # the cache's name before 5.24
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        parts, config, tokens = self._mixtral_triton, self.config, hidden_states.shape[:-1]
        cache = past_key_values if cache is None else cache
        heads = *tokens, -1, self.head_dim
        q, k = self.q_proj(hidden_states).view(heads), self.k_proj(hidden_states).view(heads)
        v = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        rotate = fused(ops.rope, q, k) if parts.rope else None
        if rotate is not None:
            tables = getattr(position_embeddings, "tables", None) or token_tables(*position_embeddings, tokens[0])
            q, k = rotate(q, k, *tables)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        if rotate is None:
            q, k = modeling.apply_rotary_pos_emb(q, k, *position_embeddings)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx, kwargs=kwargs)
        attend: Any = attention
        if not parts.attention:
            selected, eager = config._attn_implementation, modeling.eager_attention_forward
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(selected, eager)
        dropout = self.attention_dropout if self.training else 0.0
        settings = {"scaling": self.scaling, "dropout": dropout, "sliding_window": config.sliding_window}
        out, weights = attend(self, q, k, v, attention_mask, **settings, **kwargs)
        return self.o_proj(out.reshape(*tokens, -1)), weights


class ImplementationsMixin(Applied):
    """A model whose implementations transformers' own methods select. Its config never names this package's."""

    base_model: Any

    def set_attn_implementation(self, attn_implementation: str | dict[str, str], *args: Any, **kwargs: Any) -> None:
        select = partial(super().set_attn_implementation, attn_implementation, *args, **kwargs)  # type: ignore[misc]
        self._select("attention", attn_implementation, select)

    def set_experts_implementation(self, experts_implementation: str | dict[str, str]) -> None:
        select = partial(super().set_experts_implementation, experts_implementation)  # type: ignore[misc]
        self._select("experts", experts_implementation, select)

    def _uses(self, part: str) -> bool | None:
        return getattr(getattr(self.base_model, PARTS_ATTRIBUTE, None), part, None)

    def _select(self, part: str, name: str | dict[str, str], select: Callable[[], None]) -> None:
        selected, is_applied = name.get("") if isinstance(name, dict) else name, self._uses(part) is not None
        if selected != NAME or not is_applied:
            select()
        if selected is not None and is_applied:
            setattr(getattr(self.base_model, PARTS_ATTRIBUTE), part, selected == NAME)


class GenerateMixin(ImplementationsMixin):
    def create_masks_for_generate(self, config: Any, **kwargs: Any) -> Any:
        """Return the mask of a step on a static cache, which `generate` makes before the compiled forward."""
        if not self._uses("attention"):
            return getattr(super(), "create_masks_for_generate", create_masks_for_generate)(config=config, **kwargs)
        args = (kwargs.get(name) for name in ("attention_mask", "position_ids", CACHE))
        return causal_mask(config, kwargs["inputs_embeds"], *args)

    def _optimize_model_for_decode(self) -> AbstractContextManager[None]:
        """transformers' switch of the config's experts during `generate`, which `_select` would take for a user's."""
        return nullcontext() if self._uses("experts") else super()._optimize_model_for_decode()  # type: ignore[misc]

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        if self._uses("attention"):
            got = "continuous batching (generate_batch) reads keys and values in pages, which fused attention cannot"
            raise ValueError(f"mixtral_triton: {got}; apply(model, attention=False), or revert(model)")
        return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]


class Backbone(ImplementationsMixin):
    """MixtralModel: makes the mask."""

    @wraps(modeling.MixtralModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.dtype not in FLOATS:  # type: ignore[attr-defined]
            got = f"the model was converted to {self.dtype}"  # type: ignore[attr-defined]
            raise ValueError(f"mixtral_triton: {got}, needs fp32, bf16 or fp16; or revert(model)")
        if self._mixtral_triton.attention:
            args, kwargs = with_mask(self.config, args, kwargs)  # type: ignore[attr-defined]
        return super().forward(*args, **kwargs)  # type: ignore[misc]


def with_mask(config: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of the backbone's forward with the mask that `attention` reads."""
    get = (dict(zip(ARGUMENTS, args, strict=False)) | kwargs).get
    tokens = get("input_ids") if get("inputs_embeds") is None else get("inputs_embeds")
    if "output_attentions" not in kwargs and config.output_attentions:
        kwargs = kwargs | {"output_attentions": True}
    if tokens is None:  # transformers raises the error
        return args, kwargs
    mask, cache = get("attention_mask"), get("past_key_values") if get("cache") is None else get("cache")
    if isinstance(mask, Tensor) and mask.dim() == 4 and IntervalMask.decode(mask) is None:
        check_dense(mask)
    use_cache = config.use_cache if get("use_cache") is None else get("use_cache")
    packed = None if use_cache else get("position_ids")  # a cache, even an empty one, holds one sequence per row
    mask = causal_mask(config, tokens, mask, packed, cache, get("is_causal"))
    if len(args) > 1:
        return (args[0], mask, *args[2:]), kwargs
    return args, kwargs | {"attention_mask": mask}


@functools.cache
def applied_class(kind: Any) -> Any:
    """Return the class that replaces `kind`; a model's keeps name and module, by which transformers looks it up."""
    for block in (TritonRMSNorm, TritonRouter, TritonExperts, TritonRotaryEmbedding, TritonAttention):
        if block.original is kind:
            return block
    bases = (Backbone, modeling.MixtralModel), (GenerateMixin, GenerationMixin)
    mixins = [mixin for mixin, base in bases if issubclass(kind, base)] or [ImplementationsMixin]
    return type(kind.__name__, (*mixins, kind), {name: getattr(kind, name) for name in ("__module__", "__qualname__")})

"""What `apply` makes of transformers' modules: subclasses that keep parameters, names, hooks and signatures.

Transformers is an optional dependency: only `hf` imports this file, and pickle, for an applied model.

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
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mixtral import modeling_mixtral as theirs

from .attention import attention, operations
from .mask import CACHE, NAME, PAGED, causal_mask

PARTS = "_mixtral_triton"  # attribute of each module that is ours: the instance's Parts
LAYOUT = 2  # of an applied model's pickle
ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "cache", "inputs_embeds", "use_cache")  # MixtralModel's


@dataclass
class Parts:
    """Which parts of a model are ours: one object, shared by all of an applied instance's modules."""

    attention: bool | None  # None: transformers', False: transformers' by its set_attn_implementation
    experts: bool | None
    rope: bool


class Applied:
    """A class that a module takes on in place of `theirs`. Calling it makes one of those; a pickle names that, too."""

    theirs: ClassVar[Any]
    _mixtral_triton: Parts

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not issubclass(cls.__bases__[-1], Applied):
            cls.theirs = cls.__bases__[-1]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.theirs(*args, **kwargs) if args or kwargs else super().__new__(cls)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return rebuild, (LAYOUT, self.theirs), *super().__reduce_ex__(protocol)[2:]


def rebuild(layout: int, kind: Any) -> Any:
    """For pickle: an instance of what `kind` of transformers' becomes, still without a state."""
    if layout != LAYOUT:
        raise other_version()
    return Applied.__new__(applied_class(kind))


def other_version() -> ValueError:
    return ValueError(
        "mixtral_triton: this model was applied and pickled by another version of the package: load its folder with "
        "from_pretrained and apply again, or unpickle it with that version and call revert(model) first"
    )


class TritonRMSNorm(Applied, theirs.MixtralRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return operations().rms_norm(hidden_states, self.weight, self.variance_epsilon)


class TritonRouter(Applied, theirs.MixtralTopKRouter):
    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = hidden_states.reshape(-1, self.hidden_dim)
        logits, weights, ids = operations().gate_route(rows, self.weight, self.top_k)
        return logits, weights, ids.long()  # int64, as whoever hooks the gate expects


class TritonExperts(Applied, theirs.MixtralExperts):
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T,H], top_k_index and top_k_weights [T,K] -> [T,H]."""
        if not self._mixtral_triton.experts:
            return super().forward(hidden_states, top_k_index, top_k_weights)
        check_unhooked(self._modules["act_fn"], "mixtral_triton: act_fn of the experts")  # type: ignore[arg-type]
        args = (self.gate_up_proj, self.down_proj, top_k_index, top_k_weights.float())
        return operations().expert_swiglu(hidden_states, *args)


def check_unhooked(act_fn: nn.Module, name: str) -> None:
    """ValueError where hooks wait for a call that fused experts do not make."""
    if act_fn._forward_hooks or act_fn._forward_pre_hooks:
        raise ValueError(
            f"{name} has hooks, and fused experts never call it; hook the experts, or apply(model, experts=False)"
        )


class Angles(tuple):
    """(cos, sin), each [B,T,D] in the model's dtype as transformers has them, and `tables`, which `ops.rope` reads:
    cos and sin fp32 [P,D/2], a row a token, and the rows' numbers [B,T]."""

    tables: tuple[Tensor, Tensor, Tensor]

    def to(self, device: Any, non_blocking: bool = False) -> Angles:
        """What accelerate calls between GPUs, and what would lose the tables otherwise."""
        moved = Angles(part.to(device, non_blocking=non_blocking) for part in self)
        cos, sin, numbers = (table.to(device, non_blocking=non_blocking) for table in self.tables)
        moved.tables = cos, sin, numbers
        return moved


def rope_tables(cos: Tensor, sin: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """transformers' cos and sin [B or 1,T,D] -> `Angles.tables`."""
    rows, half = cos.shape[0] * cos.shape[1], cos.shape[2] // 2
    numbers = torch.arange(rows, device=cos.device).view(cos.shape[:2]).expand(batch, cos.shape[1])
    cos, sin = (part[..., :half].reshape(rows, half).float() for part in (cos, sin))
    return cos, sin, numbers


class TritonRotaryEmbedding(Applied, theirs.MixtralRotaryEmbedding):
    """Whatever kind of rotary embedding the config asks for. transformers finds it by its name, "RotaryEmbedding"."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """-> cos and sin [B,T,D] in x's dtype, in `Angles`."""
        cos, sin = super().forward(x.new_empty(0, dtype=torch.float32), position_ids)  # of x it takes the dtype only
        angles = Angles((cos.to(x.dtype), sin.to(x.dtype)))
        angles.tables = rope_tables(cos, sin, x.shape[0])
        return angles


class TritonAttention(Applied, theirs.MixtralAttention):
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
        parts = self._mixtral_triton
        cache = past_key_values if cache is None else cache
        tokens = hidden_states.shape[:-1]
        shape = (*tokens, -1, self.head_dim)
        q, k = self.q_proj(hidden_states).view(shape), self.k_proj(hidden_states).view(shape)
        if parts.rope:
            angles = position_embeddings
            tables = angles.tables if isinstance(angles, Angles) else rope_tables(*angles, tokens[0])
            q, k = operations().rope(q, k, *tables)
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        else:
            q, k = theirs.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *position_embeddings)
        v = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx, kwargs=kwargs)
        config = self.config
        attend: Any = attention
        if not parts.attention:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, theirs.eager_attention_forward)
        settings = {"scaling": self.scaling, "dropout": 0.0, "sliding_window": config.sliding_window}
        out, weights = attend(self, q, k, v, attention_mask, **settings, **kwargs)
        return self.o_proj(out.reshape(*tokens, -1)), weights


class Selecting(Applied):
    """A model of which transformers' own methods select other implementations again. Its config never names ours."""

    base_model: Any

    def set_attn_implementation(self, attn_implementation: str | dict[str, str], *args: Any, **kwargs: Any) -> None:
        choose = partial(super().set_attn_implementation, attn_implementation, *args, **kwargs)  # type: ignore[misc]
        self._choose("attention", attn_implementation, choose)

    def set_experts_implementation(self, experts_implementation: str | dict[str, str]) -> None:
        choose = partial(super().set_experts_implementation, experts_implementation)  # type: ignore[misc]
        self._choose("experts", experts_implementation, choose)

    def get_experts_implementation(self) -> dict[str, str | None]:
        return {"": NAME} if self._running("experts") else super().get_experts_implementation()  # type: ignore[misc]

    def _running(self, part: str) -> bool | None:
        return getattr(getattr(self.base_model, PARTS, None), part, None)

    def _choose(self, part: str, name: str | dict[str, str], choose: Callable[[], None]) -> None:
        chosen = name.get("") if isinstance(name, dict) else name
        here = self._running(part) is not None
        if chosen == NAME and not here:
            raise ValueError(f"mixtral_triton's {part} is not part of this model: apply(model, {part}=True)")
        if chosen != NAME:
            choose()
        if chosen is not None and here:
            setattr(getattr(self.base_model, PARTS), part, chosen == NAME)


class Generating(Selecting):
    """A model with transformers' `generate`."""

    def create_masks_for_generate(self, config: Any, **given: Any) -> Any:
        """The mask of a step on a static cache, which `generate` makes ahead of the compiled forward."""
        if self._running("attention"):
            tokens, mask = given["inputs_embeds"], given.get("attention_mask")
            return causal_mask(config, tokens, mask, given.get("position_ids"), given.get(CACHE))
        make = getattr(super(), "create_masks_for_generate", create_masks_for_generate)
        return make(config=config, **given)

    def _optimize_model_for_decode(self) -> AbstractContextManager[None]:
        """transformers' change of experts for the time of `generate`, which at first asked nobody but the config."""
        if self._running("experts"):
            return nullcontext()
        return super()._optimize_model_for_decode()  # type: ignore[misc]

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        if self._running("attention"):
            raise ValueError(f"mixtral_triton: {PAGED}")
        return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]


class Backbone(Selecting):
    """MixtralModel: refuses what could not be honoured before anything runs, and brings its own mask."""

    @wraps(theirs.MixtralModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.training:  # type: ignore[attr-defined]
            raise ValueError("mixtral_triton.apply is for inference only: call model.eval(), or revert(model) to train")
        if self._mixtral_triton.attention:
            args, kwargs = masked(self.config, args, kwargs)  # type: ignore[attr-defined]
        return super().forward(*args, **kwargs)  # type: ignore[misc]


def masked(config: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the backbone's forward with the mask that `attention` reads."""
    given = dict(zip(ARGUMENTS, args, strict=False)) | kwargs
    tokens = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
    if "output_attentions" not in kwargs and config.output_attentions:
        kwargs = kwargs | {"output_attentions": True}
    if tokens is None:  # transformers says so
        return args, kwargs
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    cache = given.get("past_key_values") if given.get("cache") is None else given["cache"]
    if isinstance(mask, Tensor) and mask.dim() == 2 and cache is None and mask.shape != tokens.shape[:2]:
        need = list(tokens.shape[:2])
        raise ValueError(
            f"mixtral_triton: attention_mask is of shape {list(mask.shape)}, needs {need}, one value a token"
        )
    use_cache = config.use_cache if given.get("use_cache") is None else given["use_cache"]
    packed = None if use_cache else positions  # a cache, even an empty one, holds one sequence a row
    mask = causal_mask(config, tokens, mask, packed, cache, given.get("is_causal"))
    if len(args) > 1:
        return (args[0], mask, *args[2:]), kwargs
    return args, kwargs | {"attention_mask": mask}


BLOCKS = {
    kind.theirs: kind for kind in (TritonRMSNorm, TritonRouter, TritonExperts, TritonRotaryEmbedding, TritonAttention)
}


@functools.cache
def applied_class(kind: Any) -> Any:
    """What an instance of `kind`, one of transformers' blocks or models, becomes.

    A model's class has the name and place of its own: transformers looks classes up by what they are called.
    """
    if kind in BLOCKS:
        return BLOCKS[kind]
    mixins = [
        m for m, base in ((Backbone, theirs.MixtralModel), (Generating, GenerationMixin)) if issubclass(kind, base)
    ]
    place = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (*(mixins or [Selecting]), kind), place)

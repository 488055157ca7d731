"""The targets of verify: a Mixtral, whose reference is plain torch, and a transformers model, whose own modules are.

B batch, T tokens, V vocabulary, H hidden
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from ..checkpoint.config import SIZES, MixtralConfig
from ..kernels.registry import dispatched
from ..kernels.weights.fp8 import with_fp8_activations
from ..model.cache import KVCache
from .calls import LayerCheck, single_layer_model
from .report import TORCH, Row
from .tolerance import Args, Tolerance

UNCACHED, CHUNKS, TOKENS, ALONE = "whole text", "in chunks", "token by token", "one sequence"
ERROR_LENGTH = 200  # characters of a raised error in a row
SEPARATE_TOKENS = 2  # tokens that are read one at a time, after the chunks
PADDING = 3  # tokens of right padding behind all chunks but the first
WINDOW_FRACTION = 4  # a window as long as the text is reduced by this factor, so that the ring wraps around
# A call of a forward: its case, the tokens of the text [R,n] (see `LayerProbe.start`), False for padding [R,n], the
# cache, other arguments.
ForwardCall = tuple[str, Tensor, Tensor, Any, dict[str, Tensor]]
STATIC = "left padding, static cache"
MIN_TOKENS = 24  # of a text whose rounding errors set a limit for attention and experts alone


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Take a model's modules out of training mode, and afterwards back."""
    trains = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in trains:
            module.training = True


class ModelUnderTest:
    """A Mixtral as `verify` uses it: the weights for torch's computation, and the model's own forward."""

    output, peer = "logits", TORCH  # what the model's head gives; what the model is compared with
    trains = False  # a model of transformers may, with our experts
    is_mixtral = True  # its forward takes chunks of unequal length, and it has `generate`
    quantized = False  # keys and values: every forward reads them from a cache of 8 bits, and so does torch
    activations: str | None = None  # of the layers' products, in every forward: `Mixtral.activations`

    def __init__(self, model: Any, cache_dtype: torch.dtype | None = None) -> None:
        self.model, self.config, self.layers = model, model.config, model.layers
        self.quantized, self.generate_options = cache_dtype is torch.int8, dict[str, Any](cache_dtype=cache_dtype)
        self.activations = model.activations
        if self.activations is not None:  # one reference for forwards of any number of rows
            self.model = copy.copy(model)
            self.model.sixteen_bit_rows = 0
        self.embed_tokens, self.norm, self.lm_head = model.embed_tokens, model.norm, model.lm_head
        self.tables = {"cos": model.cos, "sin": model.sin}

    @property
    def coarse(self) -> bool:
        """Whether a rounding of fp32 may change a code of the cache or of activations."""
        return self.quantized or self.activations is not None

    def reference_layer(self, layer: Any) -> Any:
        """The weights of a layer as torch multiplies with them: those that quantize activations where the model's do.
        `local`: the layer."""
        if self.activations is None:
            return layer
        weights = {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_children())}
        return SimpleNamespace(local=layer, **{name: with_fp8_activations(weight) for name, weight in weights.items()})

    def check(self, layer: Any, x: Tensor, config: Any) -> LayerCheck:
        """Compute a layer with torch on x [B,T,H]."""
        attend = reference.uncached_attention(config.sliding_window, **self.tables, quantized=self.quantized)
        layer = self.reference_layer(layer)
        check = LayerCheck(reference.block(layer, config, x, attend), layer, config, self.tables, self.quantized)
        check.coarse = self.coarse
        return check

    def probe_config(self, tokens: int) -> Any:
        """The config with a window that is shorter than the text."""
        window = self.config.sliding_window
        if window is None or window < tokens:
            return self.config
        # In transformers a cache with a window of one key does not fit its own masks.
        return replace(self.config, sliding_window=max(2, tokens // WINDOW_FRACTION))

    def forward_calls(self, config: Any, B: int, T: int) -> Iterator[ForwardCall]:
        """The forwards that read a text [B,T], whole and in chunks over a cache, of unequal lengths."""
        whole = self.make_cache(config, B, T) if self.quantized else None
        yield UNCACHED, (text := torch.arange(T).expand(B, T)), text >= 0, whole, {}
        cache, behind = self.make_cache(config, B, T + PADDING), torch.arange(B)
        num_separate = min(SEPARATE_TOKENS, T - 1) or 1
        bounds = sorted({0, -(-2 * (T - num_separate) // 5), T - num_separate})
        ends = [(bound - behind * (index % 2)).clamp(min=0) for index, bound in enumerate(bounds)]
        ends += [ends[-1] + index for index in range(1, num_separate + 1)]
        for index, (begin, end) in enumerate(pairwise(ends)):
            is_chunk, counts = index + num_separate < len(ends) - 1, end - begin
            columns = torch.arange(int(counts.max()) + (PADDING if begin[0] and is_chunk else 0))
            valid = columns < counts[:, None]
            tokens = torch.where(valid, begin[:, None] + columns, 0)
            if counts.any():
                lengths = {} if valid.all() else {"lengths": counts.int()}
                yield CHUNKS if is_chunk else TOKENS, tokens, valid, cache, lengths
        cache = self.make_cache(config, 1, T + PADDING)  # alone, where a step has one row
        for part in (text[:1, : min(2, T - 1)], text[:1, min(2, T - 1) : 3]):
            if part.numel():
                yield ALONE, part, part >= 0, cache, {}

    def logits(self, ids: Tensor, probe: Any) -> Tensor:
        """The logits [B,T,V] of a text [B,T] over a cache."""
        with self.forward(self.config, probe) as forward:
            return forward(ids, self.make_cache(self.config, *ids.shape))

    @contextmanager
    def catch_faults(self, record: Callable[[str], None]) -> Iterator[None]:
        """Pass the message of an error that the runtime raises to `record`, but not that of a lack of memory."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            record(f"{type(error).__name__}: {' '.join(str(error).split())}"[:ERROR_LENGTH])

    def measure(self, layer: int | None, op: str, case: str, args: Args) -> list[Row]:
        expected, rows = Tolerance(op, args), list[Row]()
        with self.catch_faults(lambda note: rows.append(Row.exact(layer, op, case, False, note))):
            rows.append(Row(layer, op, case, *expected.measure(dispatched(op, args))))
        return rows

    def make_cache(self, config: Any, batch: int, slots: int) -> Any:
        return KVCache(config, batch, slots, self.model.device, torch.int8 if self.quantized else self.model.dtype)

    @contextmanager
    def forward(self, config: Any, probe: Any, probe_layers: bool = False) -> Iterator[Callable[..., Tensor]]:
        """A copy of the model on the same weights, whose routes, or also layers' inputs, `probe` replaces."""

        def route(forward: Callable[..., Any], *args: Any) -> tuple[Tensor, ...]:
            h, x, weights, ids = forward(*args)
            return h, x, *probe.replace_routes(weights, ids)

        model, layers = copy.copy(self.model), [copy.copy(layer) for layer in self.model.layers]
        for index, layer in enumerate(layers):
            layer.config, layer.route = config, partial(route, layer.route)
            for name in ("forward", "attention", "experts") if probe_layers else ():
                setattr(layer, name, partial(getattr(probe, name), index, getattr(layer, name)))
        model._modules, model.config = {**model._modules, "layers": nn.ModuleList(layers)}, config
        yield model

    def head(self, x: Tensor, convert: Callable[[Any], Any] = lambda weight: weight) -> Tensor:
        """The final norm and the head in torch on x [...,H]; `convert` is applied to the weights."""
        h = reference.rms_norm(x, convert(self.norm), self.config.rms_norm_eps)
        return h if self.lm_head is None else reference.linear(h, convert(self.lm_head))


def model_in_fp32(model: Any, layer: Any, x: Tensor) -> Any:
    """`model` with only this layer, its weights in fp32, and the rows of x [B,T,H] as the embedding."""
    config = replace(model.config, num_hidden_layers=1, vocab_size=x[..., 0].numel())
    frozen = partial(nn.Parameter, requires_grad=False)
    # Not by way of fp64, in which all experts of a layer would take twice the memory.
    fp32 = {name: frozen(weight.float()) for name, weight in layer.named_parameters(recurse=False)}
    fp32 |= {name: frozen(weight.dequantize()) for name, weight in layer.named_children()}
    outer = {"embed_tokens": (rows := frozen(x.float().flatten(0, 1))), "lm_head": rows}
    outer |= {"norm": frozen(model.norm.float()), "cos": model.cos, "sin": model.sin}
    return single_layer_model(model, config, fp32, outer)


class TransformersUnderTest(ModelUnderTest):
    """A transformers Mixtral, applied or not, which is left as it was. Its own forward is that of `apply`."""

    peer, is_mixtral = "transformers' own modules", False

    def __init__(self, model: Any) -> None:
        from transformers.models.mixtral import modeling_mixtral

        from ..hf import applied, check_mixtral

        check_mixtral("verify", model)
        self.modeling = modeling_mixtral
        self.backbone: Any = next(
            module for module in model.modules() if isinstance(module, self.modeling.MixtralModel)
        )
        self.trains = model.training
        if self.trains and not applied(model):
            raise ValueError("verify: the model is in training mode, needs inference, model.eval(), or apply(model)")
        self.model, self.layers = model, self.backbone.layers
        wrapped = {type(part).__name__ for layer in self.layers for part in (layer.mlp.experts, layer.mlp.gate)}
        if "ParamWrapper" in wrapped:  # the adapted parameters exist only during its forward
            raise ValueError("verify: model has PEFT's target_parameters, needs them merged: model.merge_and_unload()")
        self.embed_tokens, self.norm = self.backbone.embed_tokens.weight, self.backbone.norm.weight
        self.lm_head = model.lm_head.weight if hasattr(model, "lm_head") else None
        self.model_head = getattr(model, "lm_head", nn.Identity())
        self.output = "hidden" if self.lm_head is None else "logits"
        attn, eps = self.layers[0].self_attn, self.backbone.norm.variance_epsilon
        config = {name: getattr(attn.config, name) for name in SIZES} | {"head_dim": attn.head_dim, "rms_norm_eps": eps}
        config["rope_theta"] = attn.config.rope_parameters["rope_theta"]
        self.config = MixtralConfig(**config, sliding_window=getattr(attn.config, "sliding_window", None))

    def first_layer_in_fp32(self) -> ModelUnderTest:
        """The model with its first layer alone, in fp32, which shows what 16 bits hide: a call hands all the same."""
        backbone = copy.copy(self.backbone)
        backbone._modules = {**backbone._modules, "layers": nn.ModuleList(self.layers[:1])}
        return TransformersUnderTest(copy.deepcopy(backbone).float())

    def check(self, block: Any, x: Tensor, config: MixtralConfig) -> LayerCheck:
        """Compute a decoder layer with transformers' eager functions on x [B,T,H]."""
        modeling, attn, moe, (B, T, H) = self.modeling, block.self_attn, block.mlp, x.shape
        x = x.to(block.input_layernorm.weight.device)
        positions, norm = torch.arange(T, device=x.device), modeling.MixtralRMSNorm.forward
        rotary = partial(
            modeling.MixtralRotaryEmbedding.forward, self.backbone.rotary_emb, position_ids=positions[None]
        )
        normed, projections = norm(block.input_layernorm, x), (attn.q_proj, attn.k_proj, attn.v_proj)
        q, k, v = (project(normed).view(B, T, -1, attn.head_dim) for project in projections)
        rq, rk = modeling.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *rotary(x))
        hidden = (positions > positions[:, None]) | (positions <= positions[:, None] - (config.sliding_window or T))
        mask = torch.zeros(T, T, dtype=x.dtype, device=x.device).masked_fill_(hidden, torch.finfo(x.dtype).min)
        heads = modeling.eager_attention_forward(attn, rq, rk, v.transpose(1, 2), mask, attn.scaling)[0].flatten(2)
        attn_output = attn.o_proj(heads)
        h = norm(block.post_attention_layernorm, x + attn_output).view(B * T, H)
        logits, weights, ids = modeling.MixtralTopKRouter.forward(moe.gate, h)
        loop_over_experts = inspect.unwrap(modeling.MixtralExperts.forward)  # without the dispatch to implementations
        y = loop_over_experts(moe.experts, h, ids, weights).view_as(x)
        output = x + attn_output + y
        values = reference.Values(x, normed, q, k, v, heads, attn_output, h, logits, weights, ids.int(), y, output)
        norms = {name: getattr(block, name).weight for name in ("input_layernorm", "post_attention_layernorm")}
        experts = {name: getattr(moe.experts, name) for name in ("gate_up_proj", "down_proj")}
        qkv_proj = torch.cat([project.weight for project in projections])
        layer = SimpleNamespace(**norms, qkv_proj=qkv_proj, o_proj=attn.o_proj.weight, gate=moe.gate.weight, **experts)
        cos, sin = (part[0, :, : attn.head_dim // 2].contiguous() for part in rotary(x.float()))
        return LayerCheck(values, layer, config, {"cos": cos, "sin": sin})

    def logits(self, ids: Tensor, probe: Any) -> Tensor:
        with self.forward(self.config, probe) as forward:
            return self.model_head(forward(ids))  # type: ignore[no-any-return]

    def forward_calls(self, config: Any, B: int, T: int) -> Iterator[ForwardCall]:
        """The forwards that read a text [B,T], whole, two sequences packed in one row, and in chunks over a dynamic
        cache; and two rows of it, the second shorter and padded on the left, whole and in chunks over a static cache:
        the masks are those that the user's version of transformers makes."""
        from transformers import DynamicCache, StaticCache

        text, both = torch.arange(T).expand(B, T), torch.arange(2 * T)[None]
        yield UNCACHED, text, text >= 0, None, {}
        yield "packed", both, both >= 0, None, {"position_ids": both % T}
        tokens = torch.arange(T) - torch.tensor([[0], [min(PADDING, T - 1)]])
        valid, tokens = tokens >= 0, tokens.clamp(min=0)
        yield "left padding", tokens, valid, None, {"attention_mask": valid.long(), "position_ids": tokens}
        dynamic = DynamicCache(config=self.backbone.config)
        static = StaticCache(config=self.backbone.config, max_cache_len=T + PADDING)
        for begin, end in pairwise(sorted({0, T // 2, T - 1, T})):
            part, case = slice(begin, end), CHUNKS if end < T else TOKENS
            yield case, text[:, part], text[:, part] >= 0, dynamic, {}
            read = {"attention_mask": valid[:, :end].long(), "position_ids": tokens[:, part]}
            yield STATIC, tokens[:, part], valid[:, part], static, read

    @contextmanager
    def forward(self, config: Any, probe: Any, probe_layers: bool = False) -> Iterator[Callable[..., Tensor]]:
        from .. import hf
        from ..hf.masks import CACHE
        from .families import short_windows

        def enter(index: int, layer: Any, args: Any) -> Any:
            return probe.enter(index, args[0]), *args[1:]

        def leave(index: int, layer: Any, args: Any, out: Tensor) -> Tensor:
            return probe.leave(index, out)

        def record(index: int, name: str, module: Any, args: Any, out: Any) -> None:
            probe.record(index, name, out[0] if isinstance(out, tuple) else out)

        def route(gate: Any, args: Any, out: Any) -> Any:
            return out[0], *probe.replace_routes(*out[1:])

        def forward(ids: Tensor, cache: Any = None, **kwargs: Any) -> Tensor:
            return self.backbone(ids, use_cache=cache is not None, **{CACHE: cache}, **kwargs).last_hidden_state

        with ExitStack() as stack:
            if not hf.applied(self.model):
                hf.apply(self.model)
                stack.callback(hf.revert, self.model)
            if config.sliding_window is not None:
                stack.enter_context(short_windows(self.model, config.sliding_window))
            for index, layer in enumerate(self.layers):
                stack.enter_context(layer.mlp.gate.register_forward_hook(route))
                if not probe_layers:
                    continue
                stack.enter_context(layer.register_forward_pre_hook(partial(enter, index)))
                stack.enter_context(layer.register_forward_hook(partial(leave, index)))
                enough = probe.layers[index].x[..., 0].numel() >= MIN_TOKENS
                for name, module in (("attn_output", layer.self_attn), ("y", layer.mlp)) if enough else ():
                    stack.enter_context(module.register_forward_hook(partial(record, index, name)))
            yield forward

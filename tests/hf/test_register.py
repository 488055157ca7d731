"""The names of `register()`: what its experts and attention compute, and what they refuse by name."""

import ast
import functools
import inspect
import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import masking_utils

from mixtral_triton import Mixtral, ops, reference
from mixtral_triton.hf import attention, experts, masks
from mixtral_triton.hf.experts import NAME, check_experts
from mixtral_triton.kernels.launching.launch import INTERPRETED
from mixtral_triton.quantize import quantize
from mixtral_triton.verification.families import eager_experts
from tests.cli.commands import python
from tests.support.families import MODELS, VERSION, build, by_name, experts_of

GENERATOR = torch.Generator().manual_seed(0)
once = pytest.mark.skipif(INTERPRETED, reason="about modules and masks, whatever the backend: run once")
newest = pytest.mark.skipif(VERSION < (5, 24), reason="about what the newest transformers has")


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


@pytest.mark.slow
@once
def test_the_names_are_known_after_register_and_after_a_second_one() -> None:
    code = "import mixtral_triton, sys; assert 'transformers' not in sys.modules; mixtral_triton.register()\n"
    code += "from transformers import AttentionInterface as A, AttentionMaskInterface as M, AutoConfig\n"
    code += "from transformers.integrations.moe import ExpertsInterface as E\n"
    code += "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as Q\nmixtral_triton.register()\n"
    code += "print(*('mixtral_triton' in x for x in (A._global_mapping, M._global_mapping, E._global_mapping, Q)))"
    done = python("-c", code)
    assert done.stdout.split() == ["True"] * 4, done.stderr


@pytest.fixture
def module() -> Any:
    found = next(iter(experts_of(build("olmoe", num_hidden_layers=1)).values()))
    found.config._experts_implementation = NAME
    return found.requires_grad_(False)


def routed(module: Any, tokens: int = 5, K: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.stack([torch.randperm(len(module.down_proj), generator=GENERATOR)[:K] for _ in range(tokens)])
    return draw(tokens, module.down_proj.shape[1]), ids, draw(tokens, K).softmax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_routing_weights_of_any_dtype(dtype: torch.dtype, module: Any) -> None:
    x, ids, weights = routed(module)
    want = eager_experts(module, x, ids, weights.to(dtype).float())
    assert ids.dtype == torch.int64
    assert torch.allclose(module(x, ids, weights.to(dtype)), want, atol=1e-5)


def test_experts_of_other_ranks_contribute_nothing(module: Any) -> None:
    """Expert parallelism maps them to num_experts, or above."""
    x, ids, weights = routed(module)
    weights[1, 0], weights[2] = 0.0, 0.0
    want = eager_experts(module, x, ids, weights)
    ids[1, 0], ids[2] = len(module.down_proj), len(module.down_proj) + 3
    assert torch.allclose(module(x, ids, torch.where(ids < 8, weights, 5.0)), want, atol=1e-5)


@once
@pytest.mark.parametrize("format", [None, "int4"])
def test_experts_compile_without_a_graph_break(format: str | None, module: Any) -> None:
    if format is not None:
        for key in experts.PROJECTIONS:
            weight = quantize(module._parameters.pop(key), format)
            setattr(module, key, weight)
    x, ids, weights = routed(module)
    want = module(x, ids, weights)
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x, ids, weights), want)


def own_gate(module: Any) -> None:
    module.__class__ = type("Clamped", (type(module),), {"_apply_gate": lambda self, x: x.clamp(max=7.0)})


def unread(module: Any) -> None:
    module.gate_up_proj._is_hf_initialized = True  # but not down_proj
    module.config.quantization_config = SimpleNamespace(quant_method="gptq")


UNFIT: dict[str, Any] = {
    "OlmoeExperts has experts without a gate": lambda m: setattr(m, "has_gate", False),
    "OlmoeExperts has a bias": lambda m: setattr(m, "has_bias", True),
    "OlmoeExperts has transposed weights": lambda m: setattr(m, "is_transposed", True),
    "OlmoeExperts has interleaved rows of gate and up": lambda m: setattr(m, "is_concatenated", False),
    "OlmoeExperts has a norm behind each expert": lambda m: setattr(m, "has_post_expert_norm", True),
    "Clamped has an activation of its own, Clamped._apply_gate": own_gate,
    "OlmoeExperts has the activation GELU(approximate='none')": lambda m: setattr(m, "act_fn", nn.GELU()),
    "OlmoeExperts has hooks on act_fn": lambda m: m.act_fn.register_forward_hook(print),
    "OlmoeExperts has hooks on act_fn, which": lambda m: m.act_fn.register_forward_pre_hook(print),
    "OlmoeExperts has random weights: transformers did not read them from the gptq checkpoint": unread,
    "OlmoeExperts has a DTensor": lambda m: setattr(m.down_proj, "__class__", type("DTensor", (nn.Parameter,), {})),
}


@once
@pytest.mark.parametrize("message", UNFIT)
def test_other_experts_are_refused_by_name(message: str, module: Any) -> None:
    x, ids, weights = routed(module)
    UNFIT[message](module)
    with pytest.raises(ValueError, match=re.escape(f"mixtral_triton: {message}")) as found:
        module(x, ids, weights)
    assert str(found.value).endswith('or experts_implementation="grouped_mm"')
    with pytest.raises(ValueError, match=r"mixtral_triton: model\.layers\.0 has "):
        check_experts(module, "model.layers.0")


LAYER: Any = type("Attention", (nn.Module,), {"is_causal": True, "layer_idx": 3, "training": False})
REFUSED: dict[str, dict[str, Any]] = {
    "sinks": {"sinks": torch.zeros(4)},
    "a soft cap of scores": {"softcap": 50.0},
    "a position bias": {"position_bias": torch.zeros(1)},
    "keys that an index chooses": {"indices": torch.zeros(1)},
    "dropout of 0.1 in training": {"dropout": 0.1, "training": True},
    "attention that is not causal": {"is_causal": False},
    "heads of 272 and values of 272 columns": {"D": 272},
}


@once
@pytest.mark.parametrize("what", REFUSED)
def test_other_attention_is_refused_by_name(what: str) -> None:
    kwargs = dict(REFUSED[what])
    module, D = LAYER(), kwargs.pop("D", 16)
    module.training = kwargs.pop("training", False)
    q, k, v = (draw(1, heads, 4, D) for heads in (4, 2, 2))
    with pytest.raises(ValueError, match=f"mixtral_triton: Attention of layer 3 has {what}, needs causal attention"):
        attention.attention(module, q, k, v, None, scaling=0.25, **kwargs)
    if "is_causal" in kwargs:
        module.is_causal = False
        with pytest.raises(ValueError, match="not causal"):
            attention.attention(module, q, k, v, None, scaling=0.25)


@once
def test_keys_of_another_length_than_the_mask_says_are_refused() -> None:
    q, k = draw(1, 4, 3, 16), draw(1, 2, 7, 16)
    for offset, valid in ((0, None), (2, torch.tensor([[False, True, True, True, True]]))):
        size = 3 + offset
        call = {"q_offset": offset, "attention_mask": valid, "device": "cpu"}
        mask = masks.interval_mask(1, 3, size, **call)
        with pytest.raises(ValueError, match=f"Attention has 7 keys, needs {size}, as its mask says"):
            attention.attention(LAYER(), q, k, k, mask, scaling=0.25)
        attention.attention(LAYER(), q, k[:, :, :size], k[:, :, :size], mask, scaling=0.25)


@pytest.mark.parametrize("columns", [16, 8])
@pytest.mark.parametrize("mask", ["none", "left", "right", "hole in one row", "user's"])
def test_every_kind_of_mask_with_a_scale_and_with_fewer_columns_of_values(mask: str, columns: int) -> None:
    """As latent attention has them. A hole in one row of a mask is a dense mask for all."""
    T, module = 7, nn.Module()
    module.num_key_value_groups, module.training = 2, False  # type: ignore[assignment]
    q, k, v = draw(2, 4, T, 16), draw(2, 2, T, 16), draw(2, 2, T, columns)
    valid = torch.ones(2, T, dtype=torch.bool)
    at = {"left": slice(3), "right": slice(4, T), "hole in one row": slice(3, 4)}.get(mask, slice(0))
    valid[1, at] = False
    seen = valid[:, None, None] & torch.ones(T, T, dtype=torch.bool).tril()
    call = {"attention_mask": valid, "mask_function": masking_utils.causal_mask_function, "device": "cpu"}
    made: Any = {"none": None, "user's": seen}.get(mask, masks.interval_mask(2, T, T, **call))
    assert (made is not None and made.dtype == masks.MARK) == (mask in ("left", "right"))
    got = attention.attention(module, q, k, v, made, scaling=0.4)[0]
    scores = (0.4 * q @ k.repeat_interleave(2, 1).mT).masked_fill(~seen, -1e9)
    want = (scores.softmax(-1) @ v.repeat_interleave(2, 1)).transpose(1, 2)
    if mask == "right":  # padding sees the text
        every = (0.4 * q @ k.repeat_interleave(2, 1).mT)[..., :4].softmax(-1) @ v.repeat_interleave(2, 1)[:, :, :4]
        assert torch.allclose(got[1, 4:], every.transpose(1, 2)[1, 4:], atol=1e-5)
    assert got.shape == want.shape and torch.allclose(got[valid], want[valid], atol=1e-5)


@once
def test_a_users_mask_of_integers_is_refused_by_name_with_and_without_gradients() -> None:
    model = by_name("olmoe", num_hidden_layers=1)
    for dtype, T, grad in itertools.product((torch.int32, torch.int64), (2, 3, 9), (False, True)):
        mask = torch.ones(T, T, dtype=dtype).tril()[None, None]
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=f"attention_mask is {dtype} of shape"):
            model(torch.arange(2, 2 + T)[None], attention_mask=mask)
    mask = torch.zeros(1, 1, 9, 9, dtype=masks.MARK)  # of no shape that an encoded mask has
    with pytest.raises(ValueError, match=f"attention_mask is {masks.MARK} of shape"):
        model(torch.arange(2, 11)[None], attention_mask=mask)


@once
def test_a_choice_of_keys_that_a_model_writes_into_its_mask_counts() -> None:
    model = build("doge", keep_window_size=4)
    ids, valid = torch.arange(2, 22).view(2, 10), torch.arange(10) >= torch.tensor([[0], [3]])
    with torch.no_grad():
        want = model(ids, attention_mask=valid).logits
        model.set_attn_implementation(NAME)
        assert torch.allclose(model(ids, attention_mask=valid).logits[valid], want[valid], atol=1e-4)


@once
@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "deepseek_v3", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast_without_gradients(family: str, dtype: torch.dtype) -> None:
    """Weights of other dtypes than autocast's, as in an evaluation by Trainer: within sdpa's and grouped_mm's error."""
    ids, logits = torch.arange(2, 22).view(2, 10), list[Tensor]()
    for kind, names in ((torch.float64, ("eager", "eager")), (dtype, ("sdpa", "grouped_mm")), (dtype, (NAME, NAME))):
        model = by_name(family, kind, *names)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind != torch.float64):
            logits.append(model(ids).logits.double())
    exact, baseline, got = logits
    assert (got - exact).norm() <= 2 * (baseline - exact).norm()


@pytest.mark.parametrize(("format", "compiled"), [("fp8", False), pytest.param("int4", True, marks=once)])
def test_quantized_experts_compute_in_the_dtype_of_autocast(
    format: str, compiled: bool, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of x in fp32, as the norms of `prepare_model_for_kbit_training` return it."""
    for key in experts.PROJECTIONS:
        setattr(module, key, quantize(module._parameters.pop(key), format))
    (x, ids, weights), run, dtypes = routed(module), ops.expert_swiglu, list[torch.dtype]()
    want = module(x.bfloat16(), ids, weights).float()
    monkeypatch.setattr(ops, "expert_swiglu", lambda x, *args: dtypes.append(x.dtype) or run(x, *args))
    forward = torch.compile(module, fullgraph=True, backend="eager") if compiled else module
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert torch.equal(forward(x, ids, weights), want)
    assert dtypes == [torch.bfloat16]


@once
@pytest.mark.parametrize("family", [None, pytest.param("olmoe", marks=pytest.mark.slow)])
def test_padding_of_12_lengths_takes_few_graphs(family: str | None) -> None:
    """Two of the mask alone, and of a model."""
    graphs = list[Any]()

    def forward(ids: Tensor, attention_mask: Tensor) -> Tensor:
        call = {"attention_mask": attention_mask, "mask_function": masking_utils.causal_mask_function, "device": "cpu"}
        return masks.interval_mask(*ids.shape, ids.shape[1], **call)

    if family is not None:
        forward = functools.partial(by_name(family, num_hidden_layers=1).forward, use_cache=False)
    torch._dynamo.reset()
    compiled = torch.compile(forward, backend=lambda graph, _: graphs.append(graph) or graph)
    with torch.no_grad():
        for T in range(4, 16):
            ids = torch.arange(2, 2 + 2 * T).view(2, T)
            compiled(ids, attention_mask=ids > 3)
    assert len(graphs) == 2


TEXTS = [[[1, 1, 1]] * 2, [[0, 1, 1], [1, 1, 1]], [[1, 1, 0], [0, 1, 0]], [[1, 0, 1], [1, 1, 1]]]


@once
@pytest.mark.parametrize("text", TEXTS, ids=["full", "left padding", "right padding", "a hole"])
def test_the_host_reads_a_mask_once(text: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    valid, reads = torch.tensor(text, dtype=torch.bool), list[Tensor]()
    for name in ("tolist", "item", "__bool__", "__int__"):
        read = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda x, read=read: (reads.append(x), read(x))[1])
    plain, first = masks.first_key(valid)
    mask = masks.interval_mask(2, 3, 3, q_offset=0, attention_mask=valid, device="cpu") if plain else None
    assert len(reads) == (2 if plain else 1)  # each call once
    monkeypatch.undo()
    assert plain == (text != TEXTS[3]) and (first is None) == (text == TEXTS[0])
    if mask is not None and first is not None:
        assert mask[:, 0, :, 0].tolist() == ([[0, 2, 3], [1, 2, 3]] if first.dim() == 2 else [[1, 3], [0, 3]])


@once
def test_a_window_of_the_mask_alone_is_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2-MoE makes a mask with a window, and does not pass the window on."""
    model = build("qwen2_moe", use_sliding_window=True, sliding_window=3, max_window_layers=0)
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        want = model(ids).logits
        model.set_attn_implementation(NAME)
        assert torch.allclose(model(ids).logits, want, atol=1e-4)
        for module in model.modules():
            module.__dict__.pop("sliding_window", None)
        assert torch.allclose(model(ids).logits, want, atol=1e-4)
        monkeypatch.setattr(model.config, "sliding_window", None)
        q = draw(1, 4, 3, 16)
        with pytest.raises(ValueError, match="has no sliding_window, and its mask has one"):
            attention.attention(LAYER(), q, q, q, masks.interval_mask(1, 3, 3, device="cpu", local_size=2))


@once
@pytest.mark.parametrize("kind", ["chunked", "blocks", "blocks, padding"])
def test_patterns_that_are_not_causal_alone_become_a_dense_mask(kind: str) -> None:
    ids, valid = torch.arange(2, 12).expand(2, 10), torch.arange(10) >= torch.tensor([[0], [3]])
    config: Any = SimpleNamespace(_attn_implementation=NAME, attention_chunk_size=4, sliding_window=4, is_causal=True)
    call = {"inputs_embeds": torch.zeros(*ids.shape, 1), "attention_mask": None, masks.CACHE: None}
    if kind == "chunked":
        create, more = masking_utils.create_chunked_causal_mask, {}
    else:
        create, more = masking_utils.create_causal_mask, {"block_sequence_ids": (ids >= 8).int() - 1}
        call["attention_mask"] = valid if "padding" in kind else None
    if not {*more} <= inspect.signature(create).parameters.keys():
        pytest.skip("this transformers has no blocks")
    ours = create(config, **call, **more)
    config._attn_implementation = "sdpa"
    assert ours.dtype == torch.bool and torch.equal(ours, create(config, **call, **more))


KNOWN = {"attention_mask", "scaling", "dropout", "sliding_window", "is_causal", "output_attentions", "position_ids"}
KNOWN |= {"query", "key", "value", "s_aux", "deterministic"}  # the last: of random dropout
KNOWN |= {f"{name}_{at}" for name in ("cu_seq_lens", "max_length") for at in "qk"}  # of flash attention, beside a mask


@newest
@once
@pytest.mark.slow
def test_every_keyword_that_a_model_passes_to_attention_is_known() -> None:
    """A new one may change the result, and would be lost in silence."""
    found = set[str]()
    for file in MODELS.glob("*/modeling_*.py"):
        if "attention_interface(" in (text := file.read_text()):
            calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
            calls = [call for call in calls if getattr(call.func, "id", None) == "attention_interface"]
            found |= {str(keyword.arg) for call in calls for keyword in call.keywords} - {"None"}
    assert {"s_aux", "softcap", "scaling"} <= found
    assert found <= KNOWN | {*attention.ADDED}, found - KNOWN


@once
def test_the_loader_names_register_for_another_family(tmp_path: Path) -> None:
    build("deepseek_v3").config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model_type is 'deepseek_v3', needs one of .*mixtral_triton\.register\(\)"):
        Mixtral.from_pretrained(tmp_path)


@once
@pytest.mark.parametrize("mask", ["causal", "padding", "dense"])
def test_sinks_are_those_of_eager_attention_with_gradients_and_weights(mask: str) -> None:
    module, dense = LAYER(), torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    module.num_key_value_groups = 2
    q, k, v, sinks = draw(2, 4, 5, 16), draw(2, 2, 5, 16), draw(2, 2, 5, 16), draw(4)
    valid = torch.arange(5) >= torch.tensor([[0], [2]])
    dense &= valid[:, None, None] if mask == "padding" else torch.tensor(True)
    interval = masks.interval_mask(2, 5, 5, device=q.device, attention_mask=valid, mask_function=None)
    given = {"causal": None, "padding": interval, "dense": dense}[mask]
    leaves = [x.clone().requires_grad_() for x in (q, k, v, sinks)]
    added = torch.zeros(2, 1, 5, 5).masked_fill(~dense, torch.finfo(torch.float32).min)
    scores = leaves[0] @ leaves[1].repeat_interleave(2, 1).mT * 0.25 + added
    scores = torch.cat((scores, leaves[3].view(1, -1, 1, 1).expand(2, 4, 5, 1)), -1)
    weights = scores.softmax(-1)[..., :-1]
    want = (weights @ leaves[2].repeat_interleave(2, 1)).transpose(1, 2)
    seen = valid if mask == "padding" else torch.ones_like(valid)
    with torch.no_grad():
        out, found = attention.attention(module, q, k, v, given, scaling=0.25, output_attentions=True, s_aux=sinks)
        assert torch.allclose(out[seen], want[seen], atol=1e-5)
        assert torch.allclose(found.transpose(1, 2)[seen], weights.transpose(1, 2)[seen], atol=1e-6)
    gradients = torch.autograd.grad(want[seen].square().sum(), leaves)
    ours = [x.clone().requires_grad_() for x in (q, k, v, sinks)]
    recorded = attention.attention(module, *ours[:3], given, scaling=0.25, s_aux=ours[3])[0]
    for x, y in zip(torch.autograd.grad(recorded[seen].square().sum(), ours), gradients, strict=True):
        assert torch.allclose(x, y, atol=1e-5)


def clamped(self: Any, x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate.clamp(max=self.limit)) * up.clamp(-self.limit, self.limit)


GATES: dict[str, Any] = {  # with an attribute limit of 0.5
    "clamped_silu:0.5": clamped,
    "gelu_tanh": lambda self, x: F.gelu(x.chunk(2, -1)[0], approximate="tanh") * x.chunk(2, -1)[1],
    "reads more": lambda self, x: F.silu(x.chunk(2, -1)[0].clamp(max=self.other)) * x.chunk(2, -1)[1],
    "another limit": lambda self, x: clamped(SimpleNamespace(limit=0.75), x),
}


@once
@pytest.mark.parametrize("name", GATES)
def test_an_own_gate_is_known_by_what_it_computes(name: str) -> None:
    found = experts.own_gate(GATES[name], "silu", (0.5, None, None, None))
    assert found == (None if " " in name else name)


@once
def test_the_limit_of_an_own_gate_is_read_in_each_call(module: Any) -> None:
    x, ids, weights = routed(module)
    module.__class__, results = type("Clamped", (type(module),), {"_apply_gate": clamped}), []
    for module.limit in (0.5, 0.25):
        call = x, module.gate_up_proj, module.down_proj, ids, weights
        results.append(reference.expert_swiglu(*call, f"clamped_silu:{module.limit}"))
        assert torch.allclose(module(x, ids, weights), results[-1], atol=1e-5)
    assert not torch.allclose(*results, atol=1e-2)

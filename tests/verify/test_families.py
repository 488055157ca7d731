"""verify of transformers' models: right ones are right, a fault in one layer is named by its module's path."""

from collections.abc import Callable
from functools import partial, wraps
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, MambaConfig, MambaForCausalLM
from transformers.integrations.moe import ExpertsInterface

from mixtral_triton import ExpertsConfig, apply, hf, ops, register, verify
from mixtral_triton.hf import masks, replaced
from mixtral_triton.hf.experts import NAME
from mixtral_triton.kernels.launching.launch import INTERPRETED
from mixtral_triton.kernels.operation import call
from mixtral_triton.verification import families
from mixtral_triton.verification.families import nonfinite_rows
from mixtral_triton.verification.originals import in_fp64
from tests.support.families import NAMED, NOT_TRIED, build, by_name, experts_of, marked_families, with_int4_experts

register()
pytestmark = pytest.mark.skipif(INTERPRETED, reason="about modules and masks, whatever the backend: run once")
DTYPES = torch.float32, torch.bfloat16


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "family", ["qwen3_moe", *(name for name in NAMED if name != "qwen3_moe"), "qwen3_next", "jamba"]
)
def test_right_model_is_right_and_stays_as_it_was(family: str) -> None:
    for dtype in DTYPES:
        model = by_name(family, dtype, **({"sliding_window": 20} if family == "mixtral" else {}))
        config = model.config.to_dict()
        before = {name: (x.dtype, x.clone()) for name, x in model.state_dict().items()}
        report = verify(model)
        assert report.ok, report
        found = {(row.op, row.layer) for row in report.rows if row.layer is not None}
        wanted = {("experts", int(name.split(".")[2])) for name in experts_of(model)}
        assert wanted <= found and any(op == "attention" for op, _ in found)
        logits = {row.case for row in report.rows if row.op == "logits"}
        cases = {*families.CASES[: 5 if model._can_compile_fullgraph else 4]}
        assert logits == cases or (family == "jamba" and "logits; in fp64" in str(report))
        after = model.state_dict()
        assert all(after[name].dtype == kind and torch.equal(after[name], x) for name, (kind, x) in before.items())
        assert model.config.to_dict() == config


@pytest.mark.exhaustive
@pytest.mark.parametrize("format", ["int4", "int8", "fp8"])
def test_quantized_experts_are_judged_beside_their_dequantized_values(format: str, tmp_path: Path) -> None:
    build("olmoe").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=ExpertsConfig(format), dtype="bfloat16")
    report = verify(model)
    assert report.ok and {row.op for row in report.rows} == {"experts", "logits"}, report
    weight = model.model.layers[1].mlp.experts.down_proj
    weight.scales.mul_(1.5)  # of both ways: no fault of ours
    assert verify(model).ok


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_of_transformers_is_judged_by_the_logits_of_any_text(attention: str) -> None:
    """Padding in fp64 under eager's softmax in fp32, and texts that are too short for chunks."""
    model = by_name("qwen3_moe", attention=attention)
    for dtype in DTYPES:
        for ids in (None, *(torch.arange(2 * T).view(2, T) for T in (1, 2, 3))):
            report = verify(model.to(dtype), ids)
            assert report.ok and "logits" in {row.op for row in report.rows}, report


Inject = Callable[[pytest.MonkeyPatch, Any], None]


def in_layer(index: int, interface: Any, change: Callable[..., Any]) -> Inject:
    """change(*arguments, **keywords), what this package's function gets in the layer."""

    def inject(patch: pytest.MonkeyPatch, model: Any) -> None:
        function, faulty = interface._global_mapping[NAME], {*map(id, model.model.layers[index].modules())}

        def run(module: Any, *args: Any, **kwargs: Any) -> Any:
            if id(module) in faulty:
                args, kwargs = change(*args, **kwargs)
            return function(module, *args, **kwargs)

        patch.setitem(interface._global_mapping, NAME, run)

    return inject


def without_window(q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> Any:
    return (q, k, v, mask[:, :1]), kwargs


def short_text(q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> Any:
    """Without its last key, the text before padding on the right."""
    if mask.shape[2] == 3:
        mask = (mask.view(torch.int32) - torch.tensor([[0], [1], [0]])).int().view(torch.uint32)
    return (q, k, v, mask), kwargs


def empty_slots_are_seen(patch: pytest.MonkeyPatch, model: Any) -> None:
    make = AttentionMaskInterface._global_mapping[NAME]
    faulty = lambda **call: make(**call | ({"q_offset": call["q_offset"] + 1} if is_static(call) else {}))  # noqa: E731
    is_static = lambda call: isinstance(call["q_offset"], torch.Tensor)  # noqa: E731
    patch.setitem(AttentionMaskInterface._global_mapping, NAME, faulty)


def a_window_more(q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> Any:
    mask = mask.expand(-1, 2, -1, -1) if mask.dtype == torch.uint32 else mask  # the other is one of True and False
    return (q, k, v, mask), kwargs | {"sliding_window": 12}


FAULTS: dict[str, tuple[str, Inject]] = {
    "halved routing weights": (
        "experts in layer 1 (model.layers.N.mlp.experts): model.layers.1.mlp.experts: error",
        in_layer(1, ExpertsInterface, lambda x, ids, weights: ((x, ids, weights / 2), {})),
    ),
    "routes of the next token": (
        "experts in layer 0 (model.layers.N.mlp.experts): model.layers.0.mlp.experts: error",
        in_layer(0, ExpertsInterface, lambda x, ids, weights: ((x, ids.roll(1, 0), weights.roll(1, 0)), {})),
    ),
    "no window": (
        "attention in layer 1 (model.layers.N.self_attn): model.layers.1.self_attn: error",
        in_layer(1, AttentionInterface, without_window),
    ),
    "padding is seen": (
        "attention in layer 0 (model.layers.N.self_attn): model.layers.0.self_attn: error",
        lambda patch, model: patch.setattr(masks, "first_key", lambda valid: (True, None)),
    ),
    "the last key before padding on the right": (
        "attention in layer 0 (model.layers.N.self_attn): model.layers.0.self_attn: error",
        in_layer(0, AttentionInterface, short_text),
    ),
    "empty slots of a static cache": (
        "attention in layer 0 (model.layers.N.self_attn): model.layers.0.self_attn: error",
        empty_slots_are_seen,
    ),
    "a window where the layer has none": (
        "attention in layer 0 (model.layers.N.self_attn): model.layers.0.self_attn: error",
        in_layer(0, AttentionInterface, a_window_more),
    ),
    "another scale": (
        "attention in layer 0 (model.layers.N.self_attn): model.layers.0.self_attn: error",
        in_layer(0, AttentionInterface, lambda *args, **kw: (args, kw | {"scaling": 1.1 * kw["scaling"]})),
    ),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_in_a_layer_is_named_by_its_path(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    line, inject = FAULTS[fault]
    model = by_name("qwen3_moe", use_sliding_window=fault == "no window", sliding_window=40, max_window_layers=0)
    assert verify(model).ok
    inject(monkeypatch, model)
    report = verify(model)
    assert not report.ok and line in " ".join(str(report).split()), report


ROWS = {"rms_norm": "rms_norm", "gate_route": "gate_route", "rope": "rope", "attention": "attention"}
ROWS |= {"expert_swiglu": "experts"}  # the rows of an operation
QUICK = "mixtral", "qwen3_moe"
# Their masks are dense, which torch's attention takes.
DENSE_MASKS = "axk2", "deepseek_v32", "deepseek_v4", "dots3_note_text", "glm_moe_dsa", "hy_v4"
DENSE = {family: {"attention"} for family in DENSE_MASKS}


@pytest.mark.parametrize(
    "family",
    [pytest.param(x, marks=[] if x in QUICK else pytest.mark.slow) for x in marked_families() if x not in NOT_TRIED],
)
def test_a_fault_of_each_operation_is_named(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the largest element, by 3 %, of a model that verify itself applies, and reverts."""
    run, ran = call.call_unchecked, set[str]()

    def faulty(name: str, op: Any, *args: Any) -> Any:
        out = run(op, *args)
        if op.name == name:
            ran.add(name)
            first = out[0] if isinstance(out, tuple) else out
            largest = first.abs() == first.abs().max()
            first.copy_(torch.where(largest, 1.03 * first, first))
        return out

    model = build(family).requires_grad_(False)
    report = verify(model)
    assert report.ok and not hf.runs_here(model), report
    served = {row.op for row in report.rows}
    assert f"{type(model.get_input_embeddings()).__name__}, " in report.not_run[0]
    for op, row in ROWS.items():
        monkeypatch.setattr(call, "call_unchecked", partial(faulty, op))
        wrong = {row.op for row in verify(model).wrong}
        assert row in wrong if op in ran else not wrong, op
    assert ran == {op for op, row in ROWS.items() if row in served} - DENSE.get(family, set())


ROUTER_FAULTS: dict[str, Any] = {"scoring": "softmax", "renormalize": False, "groups": None, "scale": 1.0, "bias": None}


@pytest.mark.parametrize("argument", ROUTER_FAULTS)
def test_a_wrong_argument_of_a_router_is_named(argument: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if `apply` had found another one for DeepSeek-V3's class."""
    wrong = {argument: ROUTER_FAULTS[argument]}
    run = ops.gate_route.unchecked
    monkeypatch.setattr(ops.gate_route, "unchecked", lambda *args, **kwargs: run(*args, **kwargs | wrong))
    report = verify(build("deepseek_v3").requires_grad_(False))
    assert {row.op for row in report.wrong} == {"gate_route"}, report


def test_packed_texts_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "is_causal_pattern", lambda function: True)
    wrong = {(row.op, row.case) for row in verify(build("olmoe").requires_grad_(False)).wrong}
    assert wrong == {("attention", "model.layers.N.self_attn"), ("logits", "packed")}


CHANGES: dict[str, Callable[..., Any]] = {
    "gate_route": lambda run, *args, **kwargs: (lambda logits, w, ids: (logits, w, ids.roll(1, 0)))(
        *run(*args, **kwargs)
    ),
    "rms_norm": lambda run, x, weight, eps, *args: run(x, weight, 1000 * eps, *args),
}


@pytest.mark.parametrize("op", CHANGES)
def test_routes_of_the_next_token_and_another_eps_are_wrong(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no flip of a route."""
    fused = replaced.fused
    faulty = lambda run, *x: partial(CHANGES[op], fused(run, *x)) if run.__name__ == op else fused(run, *x)  # noqa: E731
    monkeypatch.setattr(replaced, "fused", faulty)
    assert {row.op for row in verify(build("qwen3_moe").requires_grad_(False)).wrong} == {op, "logits"} - (
        {"logits"} if op == "gate_route" else set()
    )


@pytest.mark.parametrize("scale", [1.0, 1.1])
def test_an_error_of_eager_that_is_small_by_chance_is_no_fault(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no route of experts that are transformers' own flips by rounding to bf16; a fault is still one."""
    run, calls = families.FamilyUnderTest._logits, count()

    def lucky(self: Any, *args: Any) -> Any:
        if (call := next(calls)) == 1:  # of eager in bf16
            with in_fp64(self.model):
                return {case: x.bfloat16() for case, x in run(self, *args[:2], *self._eager()).items()}
        return {case: x if call else x * scale for case, x in run(self, *args).items()}

    monkeypatch.setattr(families.FamilyUnderTest, "_logits", lucky)
    report = verify(by_name("qwen3_moe", torch.bfloat16))
    errors = [row.error for row in report.rows if row.op == "logits"]
    assert report.ok == (scale == 1) and max(errors) > families.END_RATIO * families.token_floor(torch.bfloat16, False)


def test_a_model_of_states_alone_is_judged_without_a_cache() -> None:
    """It has no positions, by which texts are limited, and takes no chunk of several tokens behind another."""
    config = MambaConfig(vocab_size=99, hidden_size=32, state_size=4, num_hidden_layers=2)
    report = verify(apply(MambaForCausalLM(config).eval()))
    assert report.ok and {row.op for row in report.rows} >= {"rms_norm"}
    assert {line.split(";")[0] for line in report.not_run} >= {"in chunks", "static cache"}


def test_a_model_that_is_not_judged_says_why() -> None:
    with pytest.raises(ValueError, match=r"^verify: input_ids is texts, .*: the model has no folder with a tokenizer$"):
        verify(by_name("olmoe"), ["a text"])


def test_in_training_mode_gradients_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in DTYPES:
        model = by_name("olmoe", dtype).train().requires_grad_(False)
        report = verify(model)
        assert report.ok and all(module.training for module in model.modules()), report
        judged = [(row.op, row.layer) for row in report.rows if row.op.startswith("gradient")]
        assert judged == [(f"gradient of {name}", layer) for layer in (0, 1) for name in ("x", "routing weights")]
    right = ops.expert_swiglu_backward

    def faulty(grad: Any, x: Any, gate_up: Any, down: Any, *route: Any) -> Any:
        factor = 2 if down is model.model.layers[1].mlp.experts.down_proj else 1
        return tuple(factor * out for out in right(grad, x, gate_up, down, *route))

    monkeypatch.setattr(ops, "expert_swiglu_backward", faulty)
    report = verify(model)
    assert {(row.op, row.layer) for row in report.wrong} == {("gradient of x", 1), ("gradient of routing weights", 1)}
    assert "model.layers.1.mlp.experts: error" in str(report)
    with pytest.raises(ValueError, match="experts that require gradients"):
        verify(by_name("olmoe").train())


def subclassed(model: Any) -> None:
    for path in ("mlp.experts", "self_attn"):
        module = model.model.layers[1].get_submodule(path)
        kind: Any = type(module)
        forward = lambda self, *args, kind=kind, **kwargs: kind.forward(self, *args, **kwargs)  # noqa: E731
        module.__class__ = type("Mine", (kind,), {"forward": forward})


def patch_class(name: str, patch: Callable[..., Any]) -> Callable[[Any], Any]:
    """A change of the class of a layer's module, of which this instance has a copy under the same name."""

    def change(module: Any) -> None:
        kind: Any = type(module)
        forward = patch(kind.forward)
        module.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})

    return on_layer(name, change)


def tenth_more(forward: Any) -> Any:
    return wraps(forward)(lambda self, *args, **kwargs: forward(self, *args, **kwargs) * 1.1)


def on_layer(path: str, change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda model: change(model.model.layers[1].get_submodule(path))


def dropping(module: Any) -> None:
    forward = module.forward
    module.forward = lambda x, ids, weights: torch.nn.functional.pad(forward(x, ids, weights)[:-1], (0, 0, 0, 1))


FOREIGN: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "the last token is dropped": ("mlp.experts is 'a forward of its own'", on_layer("mlp.experts", dropping)),
    "nothing is dispatched": (
        "mlp.experts is 'a forward of its own'",
        on_layer("mlp.experts", lambda experts: setattr(experts, "forward", lambda x, ids, weights: 0 * x)),
    ),
    "a hook on experts": (
        "mlp.experts is 'the hook ",
        on_layer("mlp.experts", lambda m: m.register_forward_hook(lambda m, args, out: out * 1.1)),
    ),
    "a hook before attention": (
        "self_attn is 'the hook ",
        on_layer("self_attn", lambda m: m.register_forward_pre_hook(print)),
    ),
    "a class patched by a wrapper": (
        "mlp.experts is 'the forward of OlmoeExperts'",
        patch_class("mlp.experts", tenth_more),
    ),
    "a class that dispatches nothing": (
        "mlp.experts is 'the forward of OlmoeExperts'",
        patch_class("mlp.experts", lambda _: lambda self, x, ids, weights: 0 * x),
    ),
    "attention that dispatches nothing": (
        "self_attn is 'the forward of OlmoeAttention'",
        patch_class("self_attn", lambda _: lambda self, hidden_states, **kwargs: (hidden_states, None)),
    ),
    "a class of its own": ("self_attn is 'the forward of Mine'", subclassed),
}


@pytest.mark.parametrize("fault", FOREIGN)
def test_what_runs_around_this_package_is_refused_by_path(fault: str) -> None:
    model = by_name("olmoe")
    message, change = FOREIGN[fault]
    change(model)
    with pytest.raises(ValueError, match=rf"verify: model\.layers\.1\.{message}"):
        verify(model)


def test_accelerates_and_transformers_own_hooks_are_taken_and_adapters_of_experts_are_refused() -> None:
    from accelerate import hooks

    model = by_name("olmoe")
    for name in ("mlp.experts", "self_attn"):
        hooks.add_hook_to_module(model.model.layers[1].get_submodule(name), hooks.AlignDevicesHook("cpu"))
    model(torch.arange(2, 8)[None], output_attentions=True)
    assert verify(model).ok
    peft = pytest.importorskip("peft")
    settings = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
    adapted = peft.get_peft_model(by_name("olmoe"), peft.LoraConfig(r=4, **settings)).eval()
    with pytest.raises(ValueError, match=r"mlp\.experts has PEFT's target_parameters, needs them merged"):
        verify(adapted)


def test_a_selected_module_that_never_ran_is_listed_and_the_verdict_says_so() -> None:
    model = by_name("olmoe")
    model.model.layers[1].mlp.forward = lambda x: x
    report = verify(model)
    assert "not run: model.layers.1.mlp.experts; the model never called it" in str(report)
    assert report.verdict.endswith("within their limits; selected modules that never ran: 1")


PATHS = "layers.1.mlp.experts.down_proj", "layers.0.self_attn.q_proj.weight", "norm.weight"


@pytest.mark.parametrize("path", [*PATHS, f"{PATHS[0]}.scales"])
def test_a_weight_that_is_not_finite_is_named(path: str, tmp_path: Path) -> None:
    model = by_name("olmoe", torch.bfloat16)
    model = with_int4_experts(model, tmp_path) if "scales" in path else model
    model.model.get_parameter_or_buffer(path).data.flatten()[-1] = float("nan")
    rows = nonfinite_rows(model)
    if path == PATHS[-1]:
        report = verify(model)
        assert report.verdict.startswith("WRONG")
        rows = report.rows
    assert rows[0].note == f"model.{path} has values that are not finite"


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3"])
def test_after_training_with_adapters_in_fp32_and_the_loss_of_routers(kind: str) -> None:
    """What PEFT and TRL's SFTTrainer leave."""
    peft = pytest.importorskip("peft")
    model = by_name(kind, torch.bfloat16)
    model.config.output_router_logits = True
    settings: Any = {"target_modules": ["q_proj", "q_b_proj", "kv_b_proj"], "init_lora_weights": False}
    torch.manual_seed(41)  # of adapters with which torch's error of a gradient in qwen3_moe is small by chance
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, use_dora=kind == "qwen3_moe", **settings))
    assert {x.dtype for name, x in adapted.named_parameters() if "lora_" in name} == {torch.float32}
    before = {name: (x.dtype, x.clone()) for name, x in adapted.state_dict().items()}
    for target in (adapted.eval(), adapted.train()):
        report = verify(target)
        assert report.ok and {*families.CASES} <= {row.case for row in report.rows}, report
    assert model.config.output_router_logits is True
    after = adapted.state_dict()
    assert all(after[name].dtype == kind and torch.equal(after[name], x) for name, (kind, x) in before.items())

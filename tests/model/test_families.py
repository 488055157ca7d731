"""Each family of checkpoint/families.py, from files that transformers writes: logits, texts and launches beside its own
model, the hub's layouts under its names, wrong norms and routes, and what is refused by the file's own names."""

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from mixtral_triton import Mixtral, MixtralConfig, ops, reference, verify
from mixtral_triton.checkpoint.families import FAMILIES
from mixtral_triton.checkpoint.shard import Shard
from mixtral_triton.kernels.launching.launch import INTERPRETED
from mixtral_triton.model.layer import Layer
from mixtral_triton.quantize.write import write
from tests.model.test_model import close
from tests.ops import test_launches
from tests.quantize.test_quantize_hub import differs
from tests.support import hub
from tests.support.models import check_loaded, random_model, tokens
from tests.support.selection import slow_interpreted

V, NEW = 48, 3 if INTERPRETED else 8
SIZES: dict[str, Any] = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 6, "num_experts_per_tok": 2}
SIZES |= {"max_position_embeddings": 64, "initializer_range": 0.2, "eos_token_id": None, "pad_token_id": None}
QWEN3: dict[str, Any] = {"moe_intermediate_size": 24, "head_dim": 16}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3Moe", QWEN3 | {"norm_topk_prob": True}),
    "olmoe": ("Olmoe", {}),
    "qwen3_moe, not renormalized": ("Qwen3Moe", QWEN3 | {"norm_topk_prob": False, "tie_word_embeddings": True}),
    "qwen3_moe, window": ("Qwen3Moe", QWEN3 | {"use_sliding_window": True, "sliding_window": 5, "rms_norm_eps": 0.01}),
    "olmoe, renormalized": ("Olmoe", {"norm_topk_prob": True, "num_key_value_heads": 4, "num_experts_per_tok": 6}),
}
Made = tuple[Path, Any]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    """The name of a config -> the folder and the model of transformers, in fp32."""
    built: dict[str, Made] = {}

    def make_once(name: str, dtype: torch.dtype = torch.float32) -> Made:
        if (key := f"{name} {dtype}") not in built:
            torch.manual_seed(0)
            kind, changes = CONFIGS[name]
            config = getattr(transformers, f"{kind}Config")(**SIZES | changes)
            model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
            for parameter in (weight for at, weight in model.named_parameters() if "norm" in at):
                parameter.data += 0.3 * torch.randn_like(parameter)
            built[key] = tmp_path_factory.mktemp("family"), model.to(dtype)
            model.save_pretrained(built[key][0])
        return built[key]

    return make_once


def load(folder: Path, device: torch.device, **options: Any) -> Mixtral:
    return Mixtral.from_pretrained(folder, device, **options)


@slow_interpreted
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_texts_and_scores_equal_transformers(name: str, make: Any, device: torch.device) -> None:
    folder, theirs = make(name)
    model, ids = load(folder, device), tokens(1 if INTERPRETED else 2, 20, vocabulary=V)
    with torch.no_grad():
        want = theirs(ids).logits
    close(model(ids.to(device)), want, 1e-4 if INTERPRETED else 1e-5)
    close(reference.forward(model, ids.to(device)), want, 1e-5)
    prompts = [tokens(T, seed=T, vocabulary=V) for T in (9, 4)]
    for prompt, text in zip(prompts, model.generate([x.to(device) for x in prompts], NEW), strict=True):
        settings = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones(1, len(prompt))}
        assert text.tolist() == theirs.generate(prompt[None], **settings)[0].tolist()
    with torch.no_grad():
        logprobs = theirs(prompts[0][None]).logits[0, :-1].log_softmax(-1).gather(1, prompts[0][1:, None])[:, 0]
    assert torch.allclose(model.score([prompts[0].to(device)])[0].cpu(), logprobs, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe"])
def test_options_of_a_mixtral_work(name: str, make: Any, device: torch.device, tmp_path: Path) -> None:
    """An 8-bit cache, int4 experts with int8 linear layers, deterministic mode, and a checkpoint written so."""
    folder, prompt = make(name)[0], tokens(1, 6, device=device, vocabulary=V)
    plain = load(folder, device)
    text = plain.generate(prompt, NEW)
    assert torch.equal(load(folder, device, deterministic=True).generate(prompt, NEW), text)
    assert plain.generate(prompt, NEW, cache_dtype=torch.int8).shape == text.shape
    weights = {"experts": "int8", "linear": "int8"}
    quantized = load(folder, device, weights=weights)
    close(quantized(prompt).cpu(), reference.forward(quantized, prompt).cpu(), 1e-4)
    write(folder, tmp_path / "out", weights, "cpu")
    written = load(tmp_path / "out", device)
    assert torch.equal(written(prompt), quantized(prompt)) and written.config == quantized.config
    assert all(row.ok for row in check_loaded(tmp_path / "out", written))


@pytest.mark.compiled
@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", [name for name in hub.LAYOUTS if name != "ct act-order"])
def test_each_layout_loads_exactly_under_the_names_of_qwen3(layout: str, tmp_path: Path) -> None:
    meaning = hub.write(tmp_path, *hub.LAYOUTS[layout], family="qwen3_moe")
    assert differs(tmp_path, meaning) == []
    assert all(row.ok for row in check_loaded(tmp_path, load(tmp_path, torch.device("cpu"))))


@pytest.mark.compiled
@pytest.mark.parametrize(("model_type", "more"), [("qwen3_moe", 0), ("olmoe", 2)])
@pytest.mark.parametrize(("phase", "T", "most", "total"), test_launches.PHASES)
def test_launches_per_layer(phase: str, T: int, most: int, total: int, model_type: str, more: int, covers: Any) -> None:
    """A norm of each head is part of other launches; one of all heads is two more. Of few tokens and many experts,
    `route` is a launch of its own."""
    more += phase == "decode"
    config = {"model_type": model_type, "num_key_value_heads": 4, "head_dim": 128, "hidden_size": 2048}
    config |= {"intermediate_size": 768, "num_local_experts": 128, "num_experts_per_tok": 8}
    for B in (1, 32):
        found = test_launches.of_a_layer(partial(test_launches.record, B, T, config=config))
        triton = sum(count for kernel, count in found.items() if "::" not in kernel)
        assert triton <= most + more and found.total() <= total + more, found
        covers(
            "launches", f"{model_type}, {phase}: at most {triton} Triton, {found.total()} in all, a layer, batch {B}"
        )


class SwappedNorms(Layer):
    def attention(self, *args: Any) -> Tensor:
        norms = self._parameters["q_norm"], self._parameters["k_norm"]
        self._parameters["k_norm"], self._parameters["q_norm"] = norms
        try:
            return super().attention(*args)
        finally:
            self._parameters["q_norm"], self._parameters["k_norm"] = norms


def other_eps(monkeypatch: pytest.MonkeyPatch) -> None:
    for op in (ops.rope, ops.rms_norm):  # of each head; of all heads, and a layer's own
        whole = op.unchecked
        wrong = lambda *args, whole=whole: whole(*args[:-1], 0.02) if len(args) in (3, 8) else whole(*args)  # noqa: E731
        monkeypatch.setattr(op, "unchecked", wrong)


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "norms of queries and keys are swapped": lambda patch: patch.setattr(Layer, "attention", SwappedNorms.attention),
    "weights are renormalized, or are not": lambda patch: patch.setattr(
        ops.rms_norm_gate_route,
        "unchecked",
        lambda *args, renormalize, real=ops.rms_norm_gate_route.unchecked, **kwargs: real(
            *args, renormalize=not renormalize, **kwargs
        ),
    ),
    "another eps of the norms of heads": other_eps,
}


@pytest.mark.exhaustive
@pytest.mark.compiled
@pytest.mark.parametrize("fault", ["", *FAULTS])
@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe"])
def test_verify_finds_wrong_norms_and_routes(name: str, fault: str, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault:
        FAULTS[fault](monkeypatch)
    report = verify(load(make(name)[0], torch.device("cpu"), dtype=torch.float32), quick=True, tokens=24)
    assert bool(report.wrong) == bool(fault), str(report)


def random_of_family(seed: int) -> tuple[Mixtral, Tensor]:
    draw = random.Random(seed)
    groups, experts = draw.choice([1, 2]), draw.choice([2, 5, 8, 16])
    sizes: dict[str, Any] = {
        "model_type": draw.choice(["qwen3_moe", "olmoe"]),
        "renormalize": draw.choice([True, False]),
        "gain": draw.choice([0.5, 1.0, 2.0]),
        "hidden_size": draw.choice([24, 32, 48, 64]),
        "intermediate_size": draw.choice([16, 40, 64]),
        "num_hidden_layers": draw.choice([1, 2]),
        "num_attention_heads": groups * draw.choice([1, 2, 3]),
        "num_key_value_heads": groups,
        "head_dim": draw.choice([8, 16, 20, 32]),
        "num_local_experts": experts,
        "num_experts_per_tok": draw.randint(1, min(experts, 4)),
        "tie_word_embeddings": draw.choice([True, False]),
    }
    ids = tokens(draw.randint(1, 2), draw.randint(1, 12 if INTERPRETED else 40), seed=seed)
    return random_model("cpu", draw.choice([torch.float32, torch.bfloat16]), seed, **sizes), ids


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [range(start, start + 10) for start in range(0, 20 if INTERPRETED else 200, 10)])
def test_verify_calls_no_right_model_wrong(seeds: range) -> None:
    for seed in seeds:
        report = verify(*random_of_family(seed), quick=True)
        assert not report.wrong, f"{seed}: {report}"


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "experts": ("qwen3_moe", {"num_local_experts": 0}, "num_local_experts|num_experts is 0, needs"),
    "inner": ("qwen3_moe", {"moe_intermediate_size": "x"}, "moe_intermediate_size is 'x', needs an integer"),
    "routes": ("olmoe", {"norm_topk_prob": 1}, "norm_topk_prob is 1, needs true or false"),
    "no routes": ("olmoe", {"norm_topk_prob": ...}, "norm_topk_prob is missing and has no safe default"),
    "no inner": ("qwen3_moe", {"moe_intermediate_size": ...}, "moe_intermediate_size is missing"),
    "dense layers": (
        "qwen3_moe",
        {"mlp_only_layers": [1]},
        r"mlp_only_layers is \[1\], needs .*every layer has experts",
    ),
    "sparse step": ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2, needs 1: every layer"),
    "bias": ("qwen3_moe", {"attention_bias": True}, "attention_bias is True, needs False"),
    "clip": ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0, needs None: queries, keys and values are not clipped"),
    "window": ("olmoe", {"sliding_window": 5}, "sliding_window is 5, needs None: the family has no window"),
    **{f"not causal {x}": (x, {"is_causal": False}, "is_causal is False, needs True") for x in ("qwen3_moe", "olmoe")},
    "scaling": (
        "qwen3_moe",
        {"rope_scaling": {"rope_type": "yarn"}},
        "rope_scaling.rope_type is 'yarn', needs",
    ),
    "other": ("qwen2_moe", {}, "model_type is 'qwen2_moe', needs one of mixtral, qwen3_moe, olmoe: .*register"),
    "mixtral": ("mixtral", {"norm_topk_prob": False}, "norm_topk_prob is False, needs True: the weights"),
}


@pytest.mark.compiled
@pytest.mark.parametrize("case", REFUSED)
def test_a_config_is_refused_by_the_names_of_its_file(case: str, make: Any) -> None:
    model_type, changes, message = REFUSED[case]
    values = json.loads((make(model_type if model_type in CONFIGS else "qwen3_moe")[0] / "config.json").read_text())
    values = {name: x for name, x in (values | changes).items() if x is not ...} | {"model_type": model_type}
    with pytest.raises(ValueError, match=f"config: ({message})"):
        MixtralConfig.from_dict(values)


@pytest.mark.compiled
def test_a_norm_of_all_heads_is_refused_on_a_mesh(make: Any) -> None:
    config = MixtralConfig.from_pretrained(make("olmoe")[0])
    Shard(tp=1).check(config)
    with pytest.raises(ValueError, match="mesh has tp 2 x ep 1 = 2 ranks: model_type is olmoe, needs no norm"):
        Shard(tp=2).check(config)


@pytest.mark.compiled
def test_both_spellings_and_a_window_that_is_switched_off(make: Any) -> None:
    values = json.loads((make("qwen3_moe")[0] / "config.json").read_text())
    config = MixtralConfig.from_dict(values)
    experts = values.pop("num_local_experts", None) or values.pop("num_experts")
    for name in ("num_experts", "num_local_experts"):
        assert MixtralConfig.from_dict(values | {name: experts}) == config
    values["num_experts"] = experts
    assert MixtralConfig.from_dict(values | {"sliding_window": 4096, "use_sliding_window": False}) == config
    assert MixtralConfig.from_dict(values | {"sliding_window": 7, "use_sliding_window": True}).sliding_window == 7
    assert (config.intermediate_size, config.renormalize, config.eos_token_id) == (24, True, None)
    del values["rms_norm_eps"]  # its default is not a Mixtral's
    assert MixtralConfig.from_dict(values).rms_norm_eps == transformers.Qwen3MoeConfig().rms_norm_eps == 1e-6
    assert [*FAMILIES] == ["mixtral", "qwen3_moe", "olmoe"]

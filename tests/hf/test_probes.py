"""What `apply` finds out about the routers of transformers: at the sizes of published models, and faults."""

import importlib
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixtral_triton.hf.probes import ARGUMENT, Router, router_of
from tests.support.families import NAMED

pytestmark = pytest.mark.compiled
BIAS = "e_score_correction_bias"
QWEN3 = {"num_experts": 128, "num_experts_per_tok": 8, "hidden_size": 2048, "norm_topk_prob": True}
SIGMOID = {"scoring": "sigmoid"}
# By module and class: what its config is made of, and what is found but for defaults. Without more a published model's.
ROUTERS: dict[tuple[str, str], tuple[dict[str, Any], dict[str, Any], str | None]] = {
    ("mixtral", "MixtralTopKRouter"): ({}, {}, None),
    ("qwen3_moe", "Qwen3MoeTopKRouter"): (QWEN3, {}, None),
    ("olmoe", "OlmoeTopKRouter"): ({}, {"renormalize": False}, None),
    ("deepseek_v3", "DeepseekV3TopkRouter"): ({}, SIGMOID | {"groups": (8, 4), "scale": 2.5}, BIAS),
    ("glm4_moe", "Glm4MoeTopkRouter"): ({}, SIGMOID, BIAS),
    ("minimax_m2", "MiniMaxM2TopKRouter"): ({}, SIGMOID, ARGUMENT),
}
DEFAULTS = {"scoring": "softmax", "renormalize": True, "groups": None, "scale": 1.0}


def build(router: tuple[str, str]) -> Any:
    module, name = router
    if module not in NAMED and module != "minimax_m2":
        pytest.skip("unknown to this transformers")
    file = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    configuration = importlib.import_module(f"transformers.models.{module}.configuration_{module}")
    configs = (x for key, x in vars(configuration).items() if key.endswith("Config") and x.__module__.endswith(module))
    found = getattr(file, name)(next(configs)(**ROUTERS[router][0]))
    if "topk" not in inspect.getsource(type(found).forward):
        pytest.skip("in this transformers the layer selects, and its router computes logits alone")
    return found


@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: router[0])
def test_routers_of_published_sizes_are_recognized(router: tuple[str, str]) -> None:
    """In bf16 some of their logits are equal, between which torch's top-k and the operation choose as they like."""
    found, (_, options, bias) = router_of(build(router)), ROUTERS[router]
    assert isinstance(found, Router) and dict(found.options) == DEFAULTS | options and found.bias == bias


def weighs(module: Any, x: Tensor) -> Any:
    logits, weights, ids = module.original(x)
    return logits, weights + 0.01 * module.e_score_correction_bias[ids], ids


def fills_with_zero(module: Any, x: Tensor) -> Any:
    """As A.X K2: a score below 0 loses to experts of the other groups."""
    logits = x.float() @ module.weight.float().t()
    scores = logits.sigmoid()
    choice = (scores + module.e_score_correction_bias).unflatten(-1, (module.num_group, -1))
    best = choice.topk(2).values.sum(-1).topk(module.topk_group).indices
    kept = torch.zeros(choice.shape[:2], dtype=torch.bool).scatter(1, best, True)[..., None]
    ids = torch.where(kept, choice, 0.0).flatten(-2).topk(module.top_k).indices
    weights = scores.gather(1, ids)
    return logits, weights / weights.sum(-1, keepdim=True) * module.routed_scaling_factor, ids


def shuffles(module: Any, x: Tensor) -> Any:
    logits, weights, ids = module.original(x)
    return logits, weights.flip(-1), ids


def one_less(module: Any, x: Tensor) -> Any:
    logits, weights, ids = module.original(x)
    return logits, weights, ids.where(ids != ids.amax(-1, keepdim=True), (ids + 1) % logits.shape[-1])


@pytest.mark.parametrize("fault", [weighs, fills_with_zero, shuffles, one_less])
def test_another_router_is_not_replaced(fault: Any) -> None:
    module = build(("deepseek_v3", "DeepseekV3TopkRouter"))
    kind = type(module)
    original = lambda self, x: kind.forward(self, x)  # noqa: E731
    module.__class__ = type("Faulty", (kind,), {"forward": fault, "original": original})
    assert router_of(module) is None


def test_a_bias_in_a_submodule_is_not_taken_for_none() -> None:
    """As Ernie 4.5: random numbers would not reach it."""
    module = build(("mixtral", "MixtralTopKRouter"))
    module.statics = nn.Identity()
    assert router_of(module) is None

"""`route` beside the routers of transformers: each class's own forward, in fp64, on random numbers."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mixtral_triton import ops
from mixtral_triton.kernels import reference
from mixtral_triton.kernels.launching.launch import INTERPRETED

E, H, K = 32, 12, 5
SIZES: dict[str, Any] = {"hidden_size": H, "num_experts_per_tok": K, "moe_k": K, "n_group": 4, "topk_group": 2}
SIZES |= dict.fromkeys(("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts"), E)
SIZES |= {"moe_topk": K, "route_scale": 1.5, "router_scaling_factor": 1.5, "routed_scaling_factor": 2.5}
SCALED = {"scoring": "sigmoid", "scale": 2.5}
GROUPED = SCALED | {"groups": (4, 2)}
# By module and class, the arguments of `route` that give what the class gives, a bias aside.
ROUTERS: dict[tuple[str, str], dict[str, Any]] = {
    ("deepseek_v3", "DeepseekV3TopkRouter"): GROUPED,
    ("glm4_moe", "Glm4MoeTopkRouter"): GROUPED,
    ("dots1", "Dots1TopkRouter"): GROUPED | {"renormalize": False},
    ("ernie4_5_moe", "Ernie4_5_MoeTopKRouter"): {},
    ("minimax_m2", "MiniMaxM2TopKRouter"): {"scoring": "sigmoid"},
    ("afmoe", "AfmoeTokenChoiceRouter"): {"scoring": "sigmoid", "scale": 1.5},
    ("hy_v3", "HYV3TopKRouter"): {"scoring": "sigmoid", "scale": 1.5},
    ("exaone_moe", "ExaoneMoeTopkRouter"): GROUPED,
    ("mistral4", "Mistral4TopkRouter"): {"groups": (4, 2), "scale": 2.5},
}


class Widened(TorchFunctionMode):
    """Computes in fp64 what a function computes in fp32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        wide = lambda x: torch.float64 if x is torch.float32 else x  # noqa: E731
        return func(*map(wide, args), **{name: wide(x) for name, x in (kwargs or {}).items()})


def build(module: str, name: str, renormalize: bool) -> Any:
    try:
        file = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
        configuration = importlib.import_module(f"transformers.models.{module}.configuration_{module}")
        kind = getattr(file, name)
    except (ImportError, AttributeError, ValueError) as error:  # some versions refuse some versions of `kernels`
        pytest.skip(f"{name} of this version of transformers: {error}")
    configs = (x for key, x in vars(configuration).items() if key.endswith("Config") and x.__module__.endswith(module))
    config = next(iter(configs))()
    for key, value in {**SIZES, "norm_topk_prob": renormalize}.items():
        setattr(config, key, value)
    return kind(config).double()


def call(router: Any, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The class's logits, weights and ids, the larger weight to select by first."""
    takes_bias = router.forward.__code__.co_argcount > 2
    for buffer in () if takes_bias else router.buffers():
        buffer.copy_(bias.view_as(buffer))
    for parameter in router.parameters():
        if parameter.shape == (E, H):
            parameter.data.normal_()
        elif parameter.numel() == E:  # Ernie's bias
            parameter.data.copy_(bias.view_as(parameter))
    with Widened():
        return router(x[None] if type(router).__name__.startswith("Afmoe") else x, *([bias] if takes_bias else []))


@pytest.mark.parametrize("kind", ROUTERS, ids=lambda kind: kind[1])
@torch.no_grad()
def test_route_gives_what_the_class_gives(kind: tuple[str, str]) -> None:
    """In fp64 by the reference, in fp32 by kernels. Two scores may be nearer to each other than fp32 tells."""
    torch.manual_seed(0)
    arguments = ROUTERS[kind]
    router = build(*kind, arguments.get("renormalize", True))
    for _ in range(2 if INTERPRETED else 10):
        x, bias = torch.randn(20, H).double(), torch.randn(E).double() * 0.2
        logits, weights, ids = call(router, x, bias)
        bias = {} if kind[0] == "mistral4" else {"bias": bias}
        got = {"fp64": reference.route(logits, K, **arguments, **bias)}
        narrow = {name: value.float() for name, value in bias.items()}
        got["fp32"] = ops.route(logits.float(), K, **arguments, **narrow)
        for dtype, (got_weights, got_ids) in got.items():
            assert torch.equal(got_ids.long().sort(-1).values, ids.sort(-1).values), dtype
            in_order = lambda values, by: values.gather(-1, by.argsort(-1))  # noqa: E731
            error = in_order(got_weights.double(), got_ids.long()) - in_order(weights, ids)
            assert error.abs().max() <= (1e-14 if dtype == "fp64" else 2e-6) * weights.max()


WRONG = [
    ({"scoring": "tanh"}, "route: argument 'scoring' is 'tanh', needs 'softmax' or 'sigmoid'"),
    ({"groups": (3, 2)}, r"argument 'groups' is \(3, 2\), needs two integers \(n, k\), k of n groups of 8 / n experts"),
    ({"groups": (4, 1)}, "that hold 3 experts"),
    ({"groups": (8, 8)}, "2 at the least"),
    ({"groups": 4}, "argument 'groups' is 4, needs two integers"),
    ({"scale": 0.0}, "argument 'scale' is 0.0, needs a finite number above 0"),
    ({"bias": torch.zeros(7)}, r"argument 'bias' is of shape \[7\], needs \[E\] with E = 8"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_arguments_raise_value_error(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.route(torch.zeros(2, 8), 3, **arguments)
    with pytest.raises(ValueError, match=message.replace("route: ", "gate_route: ")):
        ops.gate_route(torch.zeros(2, 4), torch.zeros(8, 4), 3, **arguments)


def test_special_logits_and_ties(device: torch.device) -> None:
    """Ids are distinct, ties go to the lower id, and NaN is -inf: a score of 0, with the bias its choice."""
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([[0.0, -0.0, 1.0, 1.0, nan, nan], [inf, inf, nan, -inf, 0.0, 1.0], [nan] * 6]).to(device)
    for scoring in ("softmax", "sigmoid"):
        for bias in (None, torch.tensor([0.0, 0.0, 0.0, 0.0, 9.0, -9.0]), torch.full((6,), nan)):
            bias = bias if bias is None else bias.to(device)
            for groups in (None, (3, 2)):
                arguments = {"scoring": scoring, "bias": bias, "groups": groups, "scale": 2.0}
                weights, ids = ops.route(logits, 3, **arguments)
                on_cpu = arguments | {"bias": bias if bias is None else bias.cpu()}
                want_weights, want_ids = reference.route(logits.cpu(), 3, **on_cpu)
                assert torch.equal(ids.cpu(), want_ids), arguments
                assert torch.allclose(weights.cpu(), want_weights, atol=1e-6)


def test_a_bias_that_weighs_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault: weights of the scores that select."""
    route = reference.route

    def faulty(logits: Tensor, top_k: int, *args: Any, bias: Any = None, **more: Any) -> Any:
        return route((logits.sigmoid() + bias).logit(eps=1e-6), top_k, *args, **more)

    monkeypatch.setattr(reference, "route", faulty)
    with pytest.raises(AssertionError):
        test_route_gives_what_the_class_gives(("deepseek_v3", "DeepseekV3TopkRouter"))

"""What a class of transformers computes: its own forward on random numbers beside the reference of an operation.

A probe runs on a CPU, on a copy of a module with random weights, once for each class and its settings. It compares with
`kernels.reference` and never with `ops`, which compute nothing on the driver of a simulated GPU.

B batch, T tokens, H hidden, E experts, D head size, R rotated columns of a head
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from functools import cache, wraps
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..kernels import reference

DTYPES = torch.float32, torch.bfloat16
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6}  # of a result, where two roundings may stand for one
# The arguments of `gate_route` that a router's class may compute: add here what the operation learns.
ROUTES: tuple[dict[str, Any], ...] = ({"renormalize": True}, {"renormalize": False})
PLAIN = bool, int, float, str, type(None)  # types of attributes that may decide what a forward computes


class Norm(NamedTuple):
    """`rms_norm`: the attribute of a module that is its eps, and what is added to the weight."""

    eps: str
    offset: float


class Router(NamedTuple):
    """`gate_route` with these keyword arguments; wide: of x and weight in fp32, by which other experts may be the
    largest; logits: their dtype, None: that of the product."""

    options: tuple[tuple[str, Any], ...]
    wide: bool
    logits: torch.dtype | None


class Rotation(NamedTuple):
    """`rope` with the columns of q and k in another order: each column of the first half stands beside its partner of
    the second in the arguments (`pairs`), in the results (`paired`), and in cos and sin (`tables`: "halves", "pairs",
    or "once" where they have each angle once). partial: columns beyond cos and sin stay."""

    pairs: bool
    paired: bool
    tables: str
    partial: bool


def on_cpu(probe: Callable[..., Any]) -> Callable[..., Any]:
    """Run a probe with random numbers of its own, outside of the caller's modes. What a class's own code raises on
    random numbers means None."""

    @wraps(probe)
    def run(*args: Any) -> Any:
        with _disable_current_modes(), torch.device("cpu"), torch.no_grad():
            try:
                return probe(*args, torch.Generator().manual_seed(0))
            except Exception:  # a model's own code may raise anything where its arguments are not those of a model
                return None

    return run


def settings_of(module: nn.Module) -> tuple[Any, ...]:
    """What decides, beside the class, what a module's forward computes."""
    plain = {
        name: x for name, x in vars(module).items() if isinstance(x, PLAIN) and name not in ("training", "layer_idx")
    }
    tensors = {name: tuple(x.shape) for name, x in (*module.named_parameters(), *module.named_buffers())}
    return type(module), *sorted((name, repr(x)) for name, x in (plain | tensors).items())


def by_settings(probe: Callable[..., Any]) -> Callable[[nn.Module], Any]:
    """Keep a probe's result for each class and its settings."""
    results = dict[Any, Any]()

    def probed(module: nn.Module) -> Any:
        if (key := settings_of(module)) not in results:
            results[key] = probe(module)
        return results[key]

    return probed


def stand_in(module: nn.Module, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Any:
    """A copy of a module without submodules, with random parameters and buffers on the CPU."""
    same = copy.copy(module)
    for kind in ("_parameters", "_buffers"):
        held = {name: x for name, x in vars(module)[kind].items() if x is not None}
        vars(same)[kind] = {name: torch.rand(x.shape, generator=generator).to(dtype) + 0.5 for name, x in held.items()}
    vars(same)["training"] = False
    return same


def agree(got: Tensor, want: Any, dtype: torch.dtype) -> bool:
    """Whether each row of a probe's result is that of the reference, but for rounding."""
    if not isinstance(want, Tensor) or got.shape != want.shape:
        return False
    got, want = got.float(), want.float()
    return bool(((got - want).abs() <= ROUNDING[dtype] * want.abs().amax(-1, keepdim=True)).all())


@by_settings
@on_cpu
def norm_of(module: nn.Module, generator: torch.Generator) -> Norm | None:
    """Return the `rms_norm` that a module of one weight [H] computes, also where eps counts, in both DTYPES."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 1 or len(module._parameters) + len(module._modules) + len(module._buffers) > 1:
        return None
    eps = [name for name, x in vars(module).items() if isinstance(x, float) and 0 < x < 0.1]

    def fits(norm: Norm) -> bool:
        value = getattr(module, norm.eps)
        for dtype in DTYPES:
            same, scales = stand_in(module, generator, dtype), torch.tensor([1.0, value, 0.3 * value]).sqrt()[:, None]
            x = (torch.randn(2, 3, len(weight), generator=generator) * scales).to(dtype)
            got, want = type(module).forward(same, x), reference.rms_norm(x, same.weight, value, offset=norm.offset)
            if got.dtype != dtype or not agree(got, want, dtype):
                return False
        return True

    return next((norm for norm in map(Norm._make, product(eps, (0.0, 1.0))) if fits(norm)), None)


@by_settings
@on_cpu
def router_of(module: Any, generator: torch.Generator) -> Router | None:
    """Return the `gate_route` that a module with a weight [E,H] and a `top_k` computes, in both DTYPES."""
    if [*module._parameters] != ["weight"] or module.weight.dim() != 2 or not hasattr(module, "top_k"):
        return None
    results = list[tuple[Tensor, Tensor, Any]]()
    for dtype in DTYPES:
        same = stand_in(module, generator, dtype)
        x = torch.randn(16, same.weight.shape[1], generator=generator).to(dtype)
        same.weight.copy_(torch.randn(same.weight.shape, generator=generator) * same.weight.shape[1] ** -0.5)
        results.append((x, same.weight, type(module).forward(same, x)))
    logits = results[1][2][0]
    wide = not torch.equal(logits.float(), logits.bfloat16().float())

    def fits(options: dict[str, Any]) -> bool:
        for x, weight, (logits, weights, ids) in results:
            inputs = (x.float(), weight.float()) if wide else (x, weight)
            want_logits, want_weights, want_ids = reference.gate_route(*inputs, module.top_k, **options)
            order, want_order = ids.argsort(-1), want_ids.argsort(-1)
            same_ids = torch.equal(ids.gather(-1, order), want_ids.gather(-1, want_order).long())
            pairs = (logits, want_logits), (weights.gather(-1, order), want_weights.gather(-1, want_order))
            if not same_ids or not all(agree(*pair, x.dtype) for pair in pairs):
                return False
        return True

    converted = torch.float32 if logits.dtype == torch.float32 and not wide else None
    return next((Router(tuple(options.items()), wide, converted) for options in ROUTES if fits(options)), None)


def half_columns(x: Tensor, tables: str) -> Tensor:
    """cos or sin with every angle once."""
    return x if tables == "once" else x[..., ::2] if tables == "pairs" else x[..., : x.shape[-1] // 2]


@by_settings
@on_cpu
def tables_of(module: Any, generator: torch.Generator) -> str | None:
    """Return how a rotary embedding's cos and sin hold their angles, a value of `Rotation.tables`; None where it gives
    no pair of them, and "mixed" where its types of layers differ."""
    forward, same = inspect.unwrap(type(module).forward), stand_in(module, generator)
    per_layer = "layer_type" in inspect.signature(forward).parameters
    kinds = set[str]()
    for layer_type in {*module.config.layer_types} if per_layer else [None]:
        pair = forward(same, torch.zeros(1, 3, 1), torch.arange(1, 4)[None], *([layer_type] if per_layer else []))
        if not isinstance(pair, tuple) or pair[0].dim() != 3:
            return None
        equal = [
            kind
            for kind in ("halves", "pairs")
            if all(torch.equal(x, repeated(half_columns(x, kind), kind)) for x in pair)
        ]
        kinds.add(equal[0] if equal else "once")
    return kinds.pop() if len(kinds) == 1 else "mixed"


def repeated(x: Tensor, tables: str) -> Tensor:
    """The inverse of `half_columns`."""
    return x if tables == "once" else x.repeat_interleave(2, -1) if tables == "pairs" else torch.cat((x, x), -1)


def split_pairs(x: Tensor) -> Tensor:
    """Neighbouring columns -> halves."""
    return torch.cat((x[..., ::2], x[..., 1::2]), -1)


def join_pairs(x: Tensor) -> Tensor:
    """Halves -> neighbouring columns."""
    return torch.stack(x.chunk(2, -1), -1).flatten(-2)


def rotate(run: Callable[..., Any], q: Tensor, k: Tensor, kind: Rotation, columns: int) -> tuple[Tensor, Tensor]:
    """Rotate the first columns of q and k by `run`, which rotates halves."""
    heads = [x if x.shape[-1] == columns else x[..., :columns] for x in (q, k)]
    heads = run(*map(split_pairs, heads) if kind.pairs else heads)
    heads = [join_pairs(x) for x in heads] if kind.paired else heads
    if q.shape[-1] == columns:
        return heads[0], heads[1]
    return torch.cat((heads[0], q[..., columns:]), -1), torch.cat((heads[1], k[..., columns:]), -1)


@cache
@on_cpu
def rotation_of(function: Any, tables: str, generator: torch.Generator) -> Rotation | None:
    """Return the rotation that a function of q, k, cos and sin computes, given tables of that kind."""
    known, D = inspect.signature(function).parameters, 16

    def fits(kind: Rotation, R: int) -> bool:
        for dtype, dim in product(DTYPES, (1, 2) if "unsqueeze_dim" in known else (1,)):
            q, k = (torch.randn(2, 3, heads, D, generator=generator).to(dtype) for heads in (4, 2))
            angles = 3 * torch.rand(2, 3, R // 2, generator=generator)
            cos, sin = (x.to(dtype) for x in (1.1 * angles.cos(), 1.1 * angles.sin()))
            rows = [x.float().flatten(0, 1) for x in (cos, sin)]
            run = lambda q, k, rows=rows: reference.rope(q, k, rows[0], rows[1], torch.arange(6).view(2, 3))  # noqa: E731
            want = rotate(run, q, k, kind, R)
            heads = (q, k) if dim == 2 else (q.transpose(1, 2), k.transpose(1, 2))
            dims = {"unsqueeze_dim": dim} if "unsqueeze_dim" in known else {}
            got = function(*heads, *(repeated(x, tables) for x in (cos, sin)), **dims)
            got = got if dim == 2 else tuple(x.transpose(1, 2) for x in got)
            if not all(x.dtype == dtype and agree(x, y, dtype) for x, y in zip(got, want, strict=True)):
                return False
        return True

    for pairs, paired in product((False, True), (False, True)):
        if fits(kind := Rotation(pairs, paired, tables, False), D):
            return kind._replace(partial=bool(on_cpu(lambda _, kind=kind: fits(kind, D // 2))()))
    return None


def rotary_functions(kind: type[nn.Module]) -> Iterator[tuple[str, Any]]:
    """The functions of q, k, cos and sin that a class's forward calls, by their global names."""
    forward = inspect.unwrap(kind.forward)
    for name in getattr(forward, "__code__", rotary_functions.__code__).co_names:
        function = forward.__globals__.get(name)
        if inspect.isfunction(function) and [*inspect.signature(function).parameters][:4] == ["q", "k", "cos", "sin"]:
            yield name, function

"""What a class of transformers computes: its own forward on random numbers beside the reference of an operation.

A probe runs on a CPU, on a copy of a module with random weights, once for each class and its settings. It compares with
`kernels.reference` and never with `ops`, which compute nothing on the driver of a simulated GPU.

B batch, T tokens, H hidden, E experts, D head size, R rotated columns of a head
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import wraps
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..kernels import reference

# By dtype of a probe, what two roundings instead of one may change of a result.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6}
ARGUMENT = "argument"  # in the place of a name, of a bias that a router's forward is given
UNREAD = "training", "layer_idx"
PLAIN = bool, int, float, str, list, tuple, type(None)  # types of what may decide what a forward computes
D = 16  # of probes


class Norm(NamedTuple):
    """`rms_norm`: the attribute of a module that is its eps, and what is added to the weight."""

    eps: str
    offset: float


class Router(NamedTuple):
    """`gate_route` with these keyword arguments. bias: the attribute that is its bias, ARGUMENT, or None; wide: of x
    and weight in fp32, by which other experts may be the largest; logits: their dtype, None: that of the product;
    flattens: takes x [B,T,H], too."""

    options: tuple[tuple[str, Any], ...]
    bias: str | None
    wide: bool
    logits: torch.dtype | None
    flattens: bool


class Rotation(NamedTuple):
    """`rope` with the columns of q and k in another order: each column of the first half stands beside its partner of
    the second in the arguments (`pairs`), in the results (`paired`), and in cos and sin (`tables`: "halves", "pairs",
    or "once" where they have each angle once). partial: columns beyond cos and sin stay."""

    pairs: bool
    paired: bool
    tables: str
    partial: bool


Rotations = tuple[tuple[str, tuple[Rotation, ...]], ...]  # by the name of the function, of whole and partial columns


def probe(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run a probe outside of the caller's modes, once for its arguments, a module by its class and settings. What a
    class's own code raises on random numbers, which may be anything, means None."""
    known = dict[Any, Any]()

    @wraps(function)
    def run(*args: Any) -> Any:
        key = tuple(settings_of(x) if isinstance(x, nn.Module) else x for x in args)
        if key not in known:
            with _disable_current_modes(), torch.device("cpu"), torch.no_grad():
                try:
                    known[key] = function(*args, torch.Generator().manual_seed(0))
                except Exception:
                    known[key] = None
        return known[key]

    return run


def settings_of(module: nn.Module) -> tuple[Any, ...]:
    """What decides what a module's forward computes. The function, too: a user may have patched the class since."""
    own: dict[str, Any] = {name: tuple(x.shape) for name, x in (*module.named_parameters(), *module.named_buffers())}
    config = getattr(vars(module).get("config"), "__dict__", {})
    held = {f"config.{name}": x for name, x in config.items()} | vars(module)
    own |= {name: x for name, x in held.items() if isinstance(x, PLAIN) and name not in UNREAD}
    own |= {name: type(x) for name, x in module._modules.items()}
    return type(module), type(module).forward, *sorted((name, repr(x)) for name, x in own.items())


def stand_in(module: nn.Module, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Any:
    """A copy of a module with random parameters and buffers on the CPU, whose rows are of length 1."""
    same = copy.copy(module)
    for kind in ("_parameters", "_buffers"):
        held = {name: x for name, x in vars(module)[kind].items() if x is not None}
        held = {name: torch.randn(x.shape, generator=generator) * x.shape[-1] ** -0.5 for name, x in held.items()}
        vars(same)[kind] = {name: (x if x.dim() > 1 else x + 1).to(dtype) for name, x in held.items()}
    vars(same)["training"] = False
    return same


def agree(got: Tensor, want: Tensor, dtype: torch.dtype) -> bool:
    """Whether each row of a class's result is that of the reference, but for rounding."""
    error = (got.float() - want.float()).abs()
    return got.shape == want.shape and bool(
        (error <= ROUNDING[dtype] * want.float().abs().amax(-1, keepdim=True)).all()
    )


@probe
def norm_of(module: nn.Module, generator: torch.Generator) -> Norm | None:
    """Return the `rms_norm` that a module of one weight [H] computes, also where eps counts."""
    if len(module._parameters) + len(module._modules) + len(module._buffers) > 1:
        return None

    def fits(eps: float, offset: float) -> bool:
        for dtype in ROUNDING:
            same, scales = stand_in(module, generator, dtype), torch.tensor([1.0, eps, 0.3 * eps]).sqrt()[:, None]
            x = (torch.randn(2, 3, len(same.weight), generator=generator) * scales).to(dtype)
            got = type(module).forward(same, x)
            if got.dtype != dtype or not agree(got, reference.rms_norm(x, same.weight, eps, offset=offset), dtype):
                return False
        return True

    known = (name for name, x in vars(module).items() if isinstance(x, float) and 0 < x < 0.1)
    pairs = product(known, (0.0, 1.0))
    return next((Norm(name, offset) for name, offset in pairs if fits(getattr(module, name), offset)), None)


def routes_of(module: Any, experts: int) -> Iterator[dict[str, Any]]:
    """The arguments of `gate_route` that a router's class may compute, the simplest first: its numbers are those of the
    module's attributes. Add here what the operation learns."""
    counts = [1, *(x for x in vars(module).values() if type(x) is int)]
    scales = [1.0, *(x for x in vars(module).values() if type(x) is float and x > 0)]
    groups = [(n, k) for n, k in product(counts, counts) if 0 < k < n and experts % n == 0 and 2 * n <= experts]
    groups = [(n, k) for n, k in groups if experts * k // n >= module.top_k]
    for limit, scale in product([None, *groups], scales):
        for scoring, renormalize in product(("softmax", "sigmoid"), (True, False)):
            yield {"scoring": scoring, "renormalize": renormalize, "groups": limit, "scale": scale}


@probe
def router_of(module: Any, generator: torch.Generator) -> Router | None:
    """Return the `gate_route` that a module with a weight [E,H], a `top_k`, and a bias [E] at most computes. Experts of
    equal logits, of which bf16 has many, may stand for each other."""
    E, H = module.weight.shape
    signature = [*inspect.signature(inspect.unwrap(type(module).forward)).parameters]
    others = [name for name in (*module._parameters, *module._buffers) if name != "weight"]
    biases = others + [ARGUMENT for name in signature[2:] if "bias" in name]
    if module._modules or len(biases) > 1 or len(signature) > 2 + (biases == [ARGUMENT]):
        return None
    results = list[tuple[Any, ...]]()
    for dtype in ROUNDING:
        same, x = stand_in(module, generator, dtype), torch.randn(16, H, generator=generator).to(dtype)
        bias = torch.randn(E, generator=generator).to(dtype) if biases else None  # of both signs
        for held in (same._parameters, same._buffers):
            held.update({name: bias for name in held if name in biases})
        args = (x, bias) if biases == [ARGUMENT] else (x,)
        results.append((x, same.weight, bias, *type(module).forward(same, *args)))
    logits, flattens = results[1][3], type(module).forward(same, x[None], *args[1:])[0].dim() == 2
    wide = not torch.equal(logits.float(), logits.bfloat16().float())
    converted = torch.float32 if logits.dtype == torch.float32 and not wide else None
    wanted = [reference.linear(*((x.float(), weight.float()) if wide else (x, weight))) for x, weight, *_ in results]
    if not all(agree(got[3], want, got[0].dtype) for got, want in zip(results, wanted, strict=True)):
        return None

    def fits(options: dict[str, Any], selects: bool) -> bool:
        for (x, _, bias, _, weights, ids), want in zip(results, wanted, strict=True):
            want_weights, want_ids = reference.route(want, module.top_k, bias=bias if selects else None, **options)
            order, want_order = ids.argsort(-1), want_ids.argsort(-1)
            same = (ids.gather(-1, order) == want_ids.gather(-1, want_order)).all(-1)
            tied = want.gather(-1, ids).sort(-1).values == want.gather(-1, want_ids.long()).sort(-1).values
            by_id, want_by_id = weights.gather(-1, order)[same], want_weights.gather(-1, want_order)[same]
            if not (same.any() and (same | tied.all(-1)).all() and agree(by_id, want_by_id, x.dtype)):
                return False
        return True

    for name, options in product(dict.fromkeys((None, *biases)), routes_of(module, E)):
        if fits(options, name is not None):
            return Router(tuple(options.items()), name, wide, converted, flattens)
    return None


def half_columns(x: Tensor, tables: str) -> Tensor:
    """cos or sin with every angle once."""
    return x if tables == "once" else x[..., ::2] if tables == "pairs" else x[..., : x.shape[-1] // 2]


def repeated(x: Tensor, tables: str) -> Tensor:
    """The inverse of `half_columns`."""
    return x if tables == "once" else x.repeat_interleave(2, -1) if tables == "pairs" else torch.cat((x, x), -1)


@probe
def tables_of(module: Any, generator: torch.Generator) -> frozenset[str]:
    """Return how a rotary embedding's cos and sin hold their angles, as `Rotation.tables`, for all types of layers."""
    forward, same = inspect.unwrap(type(module).forward), stand_in(module, generator)
    typed = "layer_type" in inspect.signature(forward).parameters
    kinds = set[str]()
    for layer_type in {*module.config.layer_types} if typed else [None]:
        cos, _ = forward(same, torch.zeros(1, 3, 1), torch.arange(1, 4)[None], *([layer_type] if typed else []))
        equal = [kind for kind in ("halves", "pairs") if torch.equal(cos, repeated(half_columns(cos, kind), kind))]
        kinds.add((*equal, "once")[0])
    return frozenset(kinds)


def rotate(run: Callable[..., Any], q: Tensor, k: Tensor, kind: Rotation, columns: int) -> Any:
    """Rotate the first columns of q and k by `run`, which rotates halves."""
    heads = [x[..., :columns] for x in (q, k)] if kind.partial else [q, k]
    if kind.pairs:
        heads = [torch.cat((x[..., ::2], x[..., 1::2]), -1) for x in heads]
    heads = run(*heads)
    if kind.paired:
        heads = [torch.stack(x.chunk(2, -1), -1).flatten(-2) for x in heads]
    return [torch.cat((y, x[..., columns:]), -1) for x, y in zip((q, k), heads, strict=True)] if kind.partial else heads


def parameters_of(function: Any) -> Any:
    """The parameters of a function, or of the module that the package `kernels` makes of one (0.19); none without."""
    with suppress(TypeError, ValueError):  # what has no signature
        return inspect.signature(function.forward if isinstance(function, nn.Module) else function).parameters
    return {}


@probe
def rotates(function: Any, kind: Rotation, generator: torch.Generator) -> bool:
    """Whether a function of q, k, cos and sin computes this rotation."""
    R, known = D // 2 if kind.partial else D, parameters_of(function)
    for dtype, dim in product(ROUNDING, (1, 2) if "unsqueeze_dim" in known else (1,)):
        q, k = (torch.randn(2, 3, heads, D, generator=generator).to(dtype) for heads in (4, 2))
        angles = 3 * torch.rand(2, 3, R // 2, generator=generator)
        cos, sin = (x.to(dtype) for x in (1.1 * angles.cos(), 1.1 * angles.sin()))
        rows = [x.float().flatten(0, 1) for x in (cos, sin)]
        run = lambda q, k, rows=rows: reference.rope(q, k, rows[0], rows[1], torch.arange(6).view(2, 3))  # noqa: E731
        tables, dims = (repeated(x, kind.tables) for x in (cos, sin)), {"unsqueeze_dim": 2} if dim == 2 else {}
        heads = (q, k) if dim == 2 else (q.transpose(1, 2), k.transpose(1, 2))
        for got, want in zip(function(*heads, *tables, **dims), rotate(run, q, k, kind, R), strict=True):
            if got.dtype != dtype or not agree(got if dim == 2 else got.transpose(1, 2), want, dtype):
                return False
    return True


def rotations_of(kind: type[nn.Module], tables: str) -> Rotations:
    """The functions of q, k, cos and sin that a class's forward calls, by their global names, and what they compute."""
    forward, found = inspect.unwrap(kind.forward), list[tuple[str, tuple[Rotation, ...]]]()
    for name in forward.__code__.co_names:
        function = forward.__globals__.get(name)
        if callable(function) and [*parameters_of(function)][:4] == ["q", "k", "cos", "sin"]:
            kinds = (Rotation(x, y, tables, partial) for x, y, partial in product((False, True), repeat=3))
            if fits := tuple(kind for kind in kinds if rotates(function, kind)):
                found.append((name, fits))
    return tuple(found)

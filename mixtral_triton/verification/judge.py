"""Judges operations as a forward calls them, with the arguments that the model passes.

A dispatch mode sees each call. `Judge` compares it with the reference, `CallsInFp64` computes the reference in fp64
in its place. The forward goes on with the reference's result: a fault in one operation reaches no other.

N rows, K experts a row, E experts
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..kernels.launching.launch import target_arch
from ..kernels.operation.torch_operator import unflatten_args
from ..kernels.ops.experts.tiles import decode_tokens
from ..kernels.registry import OPS, dispatched
from ..kernels.weights.composite_args import first_part
from ..kernels.weights.weight_args import Weight
from .report import Row
from .tolerance import Args, Tolerance, fp64_args, to_fp64

Call = tuple[str, str, Args]  # operation, case, arguments
ERROR_LENGTH = 200  # characters of a raised error in a row


class Calls(TorchDispatchMode):
    """Calls function(operation, arguments by name) in the place of each operation."""

    def __init__(self, function: Callable[[Any, Args], Any]) -> None:
        super().__init__()
        self.function = function

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "mixtral_triton":
            return self.call_torch(func, args, kwargs or {})
        op = OPS[func._opname]
        return self.function(op, op.bind_by_name(*unflatten_args(op.arguments, args)))

    def call_torch(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)


class CallsInFp64(Calls):
    """Computes each operation by its reference in fp64; what else a caller's layer does with its weights, too."""

    def __init__(self) -> None:
        super().__init__(lambda op, args: op.call_reference(**fp64_args(args)))

    def call_torch(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        if not func._schema.is_mutable and any(x.dtype == torch.float64 for x in tensors):
            args = tree_map_only(torch.Tensor, to_fp64, args)
        return func(*args, **kwargs)


@contextmanager
def catch_faults(record: Callable[[str], object]) -> Iterator[None]:
    """Pass the message of an error that the runtime raises to `record`, but not that of a lack of memory."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        record(f"{type(error).__name__}: {' '.join(str(error).split())}"[:ERROR_LENGTH])


class Judge:
    """Compares the calls of forwards of a model, and calls that no forward makes. On the meta device they only run."""

    def __init__(self, model: Any) -> None:
        self.rows: list[Row] = []
        self.layer: int | None = None  # whose calls come: None outside the layers
        self.case, self.with_others = "", False  # whether `other_calls` are judged, too
        self.positions: Collection[int] | None = None  # of the calls of a forward that are judged; None: all
        self.count = 0
        # Of its linears, and of norms of queries and keys: the first part of a weight is the same in each view of it.
        self.weights = {id(first_part(weight)): name for name, weight in model.named_weights().items()}

    def start(self, case: str, with_others: bool = False, positions: Collection[int] | None = None) -> None:
        """Begin a forward."""
        self.layer = None
        self.case, self.with_others, self.positions, self.count = case, with_others, positions, 0

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Judge the calls of forwards of a model, by layers."""
        enter: Any = lambda index, *_: setattr(self, "layer", index)  # noqa: E731
        with ExitStack() as stack, Calls(self):
            for index, layer in enumerate(model.layers):
                stack.enter_context(layer.register_forward_pre_hook(partial(enter, index)))
                stack.enter_context(layer.register_forward_hook(partial(enter, None)))
            yield

    def __call__(self, op: Any, args: Args) -> Any:
        first, position, self.count = args[op.names[0]], self.count, self.count + 1
        if first.is_meta:
            out = op.run(**args)
        else:
            if self.positions is None or position in self.positions:
                self.measure(op.name, self._weight_name(op.name, args) + self.case, args)
            out = op.call_reference(**args)
        if self.with_others:
            for call in other_calls(op.name, args, out, self.layer == 0 or first.device.type != "cpu"):
                self.measure(*call)
        return out

    def measure(self, op: str, case: str, args: Args) -> None:
        """Append the row of a call. Arguments that do not fit are a fault of the caller, where the error goes."""
        OPS[op].check(**args)
        if args[OPS[op].names[0]].is_meta:
            OPS[op].run(**args)
            return
        expected = Tolerance(op, args)
        with catch_faults(lambda note: self.rows.append(Row.exact(self.layer, op, case, False, note))):
            self.rows.append(Row(self.layer, op, case, *expected.measure(dispatched(op, args))))

    def _weight_name(self, op: str, args: Args) -> str:
        """Return the start of the case of a linear, or of a norm of queries or keys; of other operations nothing."""
        name = self.weights.get(id(first_part(args.get("weight"))), "another").rpartition(".")[2]
        return f"{name.removesuffix('_proj')}, " if op == "linear" or name in ("q_norm", "k_norm") else ""


def other_calls(op: str, args: Args, out: Any, slow: bool) -> Iterator[Call]:
    """The calls that no forward of `generate` makes, of an operation's arguments and results in one that reads a text.
    slow: also those that take long on a CPU, once."""
    if op in ("attention", "cached_attention") and args["k"] is not None:
        q, keys = args["q"], {name: args[name] for name in ("k", "v", "window")}
        B, T = q.shape[:2]
        ends = (T - torch.arange(B, device=q.device)).clamp(min=1).int()
        if op != "attention":
            yield "attention", "prefill", {"q": q, **keys}
        yield "attention", "decode", {"q": q[:, -1:], **keys}
        yield "attention", "padded", {"q": q, **keys, "starts": ends // 3, "lengths": ends}
    if op == "rms_norm_gate_route":
        norm, top_k = ({name: args[name] for name in names} for names in (("weight", "eps"), ("top_k", "renormalize")))
        yield "rms_norm", "input", {"x": args["residual"], **norm}
        yield "add_rms_norm", "with residual", {"x": args["x"], "residual": args["residual"], **norm}
        yield "gate_route", "all tokens", {"x": out[0], "gate": args["gate"], **top_k}
        yield "route", "all tokens", {"logits": out[2], **top_k}
    if op == "experts_add_rms_norm":
        experts = {name: args[name] for name in ("x", "gate_up_proj", "down_proj", "ids", "weights")}
        yield "sort_by_expert", "all tokens", {"ids": args["ids"], "num_experts": len(args["down_proj"])}
        yield "expert_swiglu_backward", "all tokens", {"grad": args["x"], **experts}
        for case, some in every_expert(experts, slow):
            yield "expert_swiglu", f"every expert, {case}", {**experts, **some}


def every_expert(experts: Args, slow: bool) -> Iterator[tuple[str, Args]]:
    """Rows whose routes take every expert, in the sizes that launch other kernels."""
    x, (N, K), E = experts["x"], experts["ids"].shape, len(experts["down_proj"])
    gate_up, down = (Weight.of(experts[name]).name for name in ("gate_up_proj", "down_proj"))
    limit = decode_tokens(gate_up, down, K, x.dtype, target_arch(x.device))
    sizes = {"decode": min(limit, -(-E // K))}
    if slow:
        sizes |= {"prefill": limit + E, **({} if gate_up is None else {"decode in several tiles": limit})}
    for case, size in sizes.items():
        if not size:  # fp8 codes are sorted, however few
            continue
        ids = torch.arange(size * K, device=x.device).view(size, K) % E
        if case != "decode":  # each group ends with few rows of a tile: the grid needs all the tiles of its bound
            ids = ids[:1].repeat(size, 1)
            ids[: E - K, -1] = torch.arange(K, E, device=ids.device)[:size]
        rows = torch.arange(size, device=x.device) % N
        yield case, {"x": x[rows], "ids": ids.int(), "weights": experts["weights"][rows]}

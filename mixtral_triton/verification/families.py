"""`verify` of a transformers model of any family that runs this package's operations, by `apply` or by name.

The name stands in turn for this package's functions, for the model's own eager ones in its dtype, and for these in
fp64, and so do the classes of norms, routers and modules that rotate. A call is compared on the activations that the
model gave it, and the logits with the first run's routes.

B batch, T tokens
"""

import inspect
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, StaticCache
from transformers.integrations.moe import ExpertsInterface
from transformers.utils import cached_file

from ..hf.experts import NAME, PROJECTIONS, is_experts
from ..hf.masks import CACHE
from ..hf.probes import Norm
from ..hf.replaced import OURS, Replaced
from ..kernels.weights.quantized import QuantizedWeight
from .originals import (
    eager_attention,
    eager_experts,
    fp32_mask,
    in_fp64,
    originals,
    own_classes,
    run_original,
    selected_modules,
    short_windows,
)
from .report import END_RATIO, UNCALLED, Row
from .stored_tensors import check_stored
from .tolerance import FLOOR, PERTURBED, RATIO, Fp64Reference, largest, perturb, token_floor

CASES = "whole text", "right padding", "packed", "in chunks", "static cache"  # the first three without a cache
GRADIENTS = "x", "routing weights"  # of the experts
Results = tuple[Tensor, Tensor, Tensor]  # of this package, of eager in the model's dtype, and of eager in fp64
Calls = dict[nn.Module, list[tuple[Any, ...]]]  # arguments and result of each call of a module


class FamilyUnderTest:
    """A transformers model that runs this package's operations, left as it is."""

    def __init__(self, model: Any) -> None:
        has_head = getattr(model, "get_output_embeddings", lambda: None)() is not None
        self.output = "logits" if has_head else "hidden"  # what the model gives of each token
        self.model = model if has_head else getattr(model, "base_model", model)
        self.paths = {module: name for name, module in model.named_modules()}
        self.selected, self.flips, self.routed = selected_modules(model), 0, 0
        # A model of states alone, as Mamba, has no positions, and takes no chunk of several tokens behind another.
        cached = hasattr(model.config.get_text_config(), "max_position_embeddings")
        self.cases = CASES[: 3 + cached * (1 + getattr(model, "_can_compile_fullgraph", False))]
        self.not_run: tuple[str, ...] = (f"{own_classes(model, self.selected)}, generate; they are transformers' own",)
        self.not_run += tuple(f"{case}; transformers has none for this family" for case in CASES[len(self.cases) :])
        self.ours: Any = tuple(kind._global_mapping[NAME] for kind in (ExpertsInterface, AttentionInterface))
        self.experts, self.attention, self.masks = Calls(), Calls(), defaultdict[nn.Module, list[Any]](list)
        self.replaced, self.rotations = Calls(), Calls()  # the latter of functions, by the module that calls them

    def compare(self, ids: Tensor) -> list[Row]:
        """The rows of experts and attention of each layer, and of the logits, on ids [B,T] with padding on the left, of
        a model in evaluation mode."""
        T, B = ids.shape[1], len(ids)
        valid = torch.arange(T, device=ids.device) >= torch.arange(B, device=ids.device)[:, None] * T // (3 * B)
        with short_windows(self.model, max(1, T // 2)):
            with self._recording_replaced():
                got = self._logits(ids, valid, *self._recording())
            with originals(self.selected):
                baseline = self._logits(ids, valid, *self._eager())
                exact, masks = dict[str, Tensor](), self.masks.copy()
                try:
                    with in_fp64(self.model):
                        exact = self._logits(ids, valid, *self._eager())
                except RuntimeError as error:  # as where a module multiplies with the weight of another
                    self.not_run += (f"logits; in fp64 the model raises {error}"[:100],)
                logits = self._logits_rows(ids, valid, got, baseline, exact)
            self.masks = masks
        called = self.experts | self.attention | self.replaced | self.rotations
        uncalled = [path for module, path in self.selected.items() if module not in called]
        self.not_run += tuple(f"{path}{UNCALLED}" for path in uncalled)
        rows, paths = nonfinite_rows(self.model) + self._stored_rows(), self.paths
        for module in self.experts:
            rows.append(worst_call("experts", paths[module], self._experts_errors(module)))
        for module in self.attention:
            rows.append(worst_call("attention", paths[module], self._attention_errors(module)))
        for module in self.replaced:
            is_norm = isinstance(module.kind, Norm)
            errors = self._norm_errors(module) if is_norm else self._router_errors(module)
            op, roundings = ("rms_norm", 2) if is_norm else ("gate_route", 1)  # ours rounds before the weight, too
            rows.append(worst_call(op, paths[module], errors, roundings))
        for module in self.rotations:
            rows.append(worst_call("rope", paths[module], self._rotation_errors(module)))
        rows.sort(key=lambda row: row.layer if row.layer is not None else -1)
        return rows + logits

    def _logits_rows(self, ids: Tensor, valid: Tensor, got: Any, baseline: Any, exact: Any) -> list[Row]:
        """The rows of logits by case. Where an error is beyond its limit, eager also runs on embeddings nearby, as its
        error may be small by chance: the routes of experts that are transformers' own flip."""
        errors, limits = token_errors(got, exact), {case: token_floor(got[case].dtype, False) for case in exact}
        dtype = got[self.cases[0]].dtype

        def nearby(module: nn.Module, args: Any, x: Tensor, seed: int) -> Tensor:
            return perturb(x.to(dtype), seed).to(x.dtype)

        for seed in range(PERTURBED + 1):
            if seed:
                with self.model.get_input_embeddings().register_forward_hook(partial(nearby, seed=seed)):
                    baseline = self._logits(ids, valid, *self._eager())
                    with in_fp64(self.model):
                        exact = self._logits(ids, valid, *self._eager())
            of_eager = token_errors(baseline, exact)
            limits = {case: max(limit, END_RATIO * of_eager[case]) for case, limit in limits.items()}
            if all(errors[case] <= limit for case, limit in limits.items()):
                break
        return [Row(None, self.output, case, errors[case], limit) for case, limit in limits.items()]

    def _stored_rows(self) -> list[Row]:
        """The rows of the experts of a stored checkpoint against its files, where they are on this machine."""
        config = self.model.config
        if getattr(getattr(config, "quantization_config", None), "stored", None) is None:
            return []
        settings: Any = {"local_files_only": True, "_raise_exceptions_for_missing_entries": False}
        settings["revision"] = getattr(config, "_commit_hash", None)
        file = cached_file(config.name_or_path, "config.json", **settings)
        experts = [module for module in self.selected if is_experts(module)]
        quantized = [x for x in experts if all(isinstance(getattr(x, key), QuantizedWeight) for key in PROJECTIONS)]
        layers = {layer_number(self.paths[module]): module for module in quantized}
        if file is None or len(layers) < len(quantized) or None in layers:
            self.not_run += ("weights against their files; needs their folder, and one module of experts a layer",)
            return []
        return check_stored(layers, Path(file).parent)

    def _recording(self) -> tuple[Any, Any, None]:
        run_experts, run_attention = self.ours

        def experts(module: nn.Module, *args: Any) -> Any:
            out = run_experts(module, *args)
            self.experts.setdefault(module, []).append((*args, out))
            return out

        def attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
            out = run_attention(module, q, k, v, attention_mask, **kwargs)
            self.attention.setdefault(module, []).append((q, k.clone(), v.clone(), kwargs, out[0]))  # of a static cache
            return out

        return experts, attention, None

    @contextmanager
    def _recording_replaced(self) -> Iterator[None]:
        """Record the calls of norms and routers, and of functions that rotate, within the block."""
        running = list[nn.Module]()

        def record(module: nn.Module, args: Any, out: Any) -> None:
            self.replaced.setdefault(module, []).append(([x.clone() for x in args], out))

        def recording(function: Any, original: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                out = function(*args, **kwargs)
                call = partial(original, **kwargs), [x.clone() for x in args], out
                self.rotations.setdefault(running[-1], []).append(call)
                return out

            return run

        replaced: list[Any] = [module for module in self.selected if isinstance(module, Replaced)]
        forwards = [inspect.unwrap(type(module).forward) for module in replaced if type(module.kind) is tuple]
        files = {name: x.__globals__ for x in forwards for name in x.__code__.co_names if name.startswith(OURS)}
        with ExitStack() as stack:
            for name, file in files.items():
                ours = recording(file[name], file[name].__wrapped__)
                stack.enter_context(mock.patch.dict(file, {name: ours}))
            for module in replaced:
                hooks = [module.register_forward_hook(record)] if type(module.kind) is not tuple else [
                    module.register_forward_pre_hook(lambda module, args: running.append(module)),
                    module.register_forward_hook(lambda *_: running.pop() and None),
                ]  # fmt: skip
                for hook in hooks:
                    stack.callback(hook.remove)
            yield

    def _eager(self) -> tuple[Any, Any, Any]:
        """Eager functions, which keep their masks, with the routes of the recorded calls."""
        counts = defaultdict[nn.Module, int](int)
        self.masks = defaultdict(list)

        def experts(module: nn.Module, x: Tensor, *routes: Tensor) -> Any:
            _, ids, weights, _ = self.experts[module][counts[module]]
            counts[module] += 1
            return eager_experts(module, x, ids, weights)

        def attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
            self.masks[module].append(attention_mask)
            return eager_attention(module, q, k, v, attention_mask, **kwargs)

        return experts, attention, fp32_mask

    def _logits(self, ids: Tensor, valid: Tensor, experts: Any, attention: Any, mask: Any) -> dict[str, Tensor]:
        """The logits [n,V] of valid tokens for each of CASES, with functions in the place of this package's."""
        interfaces: Any = ExpertsInterface, AttentionInterface, AttentionMaskInterface
        T, logits = ids.shape[1], dict[str, Tensor]()
        with ExitStack() as stack:
            for interface, function in zip(interfaces, (experts, attention, mask), strict=True):
                # Eager's mask, too: in fp64 its least number is no fp32, in which eager attention takes the softmax.
                names = [NAME, "eager"] if function is mask else [NAME]
                if function is not None:
                    stack.enter_context(mock.patch.dict(interface._global_mapping, dict.fromkeys(names, function)))
            for case, mask in zip(CASES[:2], (valid, valid.flip(1)), strict=True):
                logits[case] = self.model(ids, attention_mask=mask.long(), use_cache=False)[0][mask]
            if CASES[2] in self.cases:
                row, positions = ids.reshape(1, -1), torch.arange(T, device=ids.device).repeat(1, len(ids))
                logits[CASES[2]] = self.model(row, position_ids=positions, use_cache=False)[0]
            for case in self.cases[3:]:  # of a static cache some slots stay empty
                config, chunks = self.model.config.get_text_config(), list[Tensor]()
                cached = {} if case == CASES[3] else {CACHE: StaticCache(config=config, max_cache_len=T + 3)}
                for begin, end in pairwise(sorted({0, T // 2, T - 1, T})):
                    out = self.model(ids[:, begin:end], attention_mask=valid[:, :end].long(), use_cache=True, **cached)
                    cached = {CACHE: getattr(out, CACHE)}
                    chunks.append(out[0])
                logits[case] = torch.cat(chunks, 1)[valid]
        return logits

    def _experts_errors(self, module: nn.Module) -> Iterator[Results]:
        for x, ids, weights, out in self.experts[module]:
            yield out, eager_experts(module, x, ids, weights), eager_experts(module, x.double(), ids, weights)

    def _attention_errors(self, module: nn.Module) -> Iterator[Results]:
        for (q, k, v, kwargs, out), mask in zip(self.attention[module], self.masks[module], strict=True):
            sees = ... if mask is None else (mask == 0).any(-1)[:, 0].expand(len(q), -1)
            exact = eager_attention(module, q.double(), k.double(), v.double(), mask, **kwargs)[0]
            baseline = eager_attention(module, q, k, v, mask, **kwargs)[0]
            yield out[sees], baseline[sees], exact[sees]

    def _norm_errors(self, module: Any) -> Iterator[Results]:
        for args, out in self.replaced[module]:
            yield out, run_original(module, args), run_original(module, args, torch.float64)

    def _router_errors(self, module: Any) -> Iterator[Results]:
        """Of logits and routing weights. Another choice counts as a flip where the class's own forward takes each of
        its experts, and leaves each of the others, on some activations nearby, and else as a wrong result."""
        for args, (logits, weights, ids) in self.replaced[module]:
            baseline, exact = run_original(module, args), run_original(module, args, torch.float64)
            yield logits, baseline[0], exact[0]
            ours, torch_s, right = (_chosen(x, logits) for x in (ids, baseline[2], exact[2]))
            flipped = (ours != right).any(-1)
            self.flips, self.routed = self.flips + int(flipped.sum()), self.routed + len(ids)
            if flipped.any():
                runs = (run_original(module, (perturb(args[0], seed), *args[1:])) for seed in range(1, PERTURBED + 1))
                near = torch.stack((right, *(_chosen(run[2], logits) for run in runs)))
                if (ours & ~near.any(0) | ~ours & near.all(0)).any():
                    yield logits.new_tensor([math.inf]), logits.new_zeros(1), exact[0].new_zeros(1)
            both, order = ~flipped & (torch_s == right).all(-1), [i.argsort(-1) for i in (ids, baseline[2], exact[2])]
            by_id = (w.gather(-1, i)[both] for w, i in zip((weights, baseline[1], exact[1]), order, strict=True))
            if both.any():
                yield tuple(by_id)  # type: ignore[misc]

    def _rotation_errors(self, module: Any) -> Iterator[Results]:
        for original, args, out in self.rotations[module]:
            baseline, exact = original(*args), original(*(x.double() for x in args))
            yield from zip(out, baseline, exact, strict=True)


def _chosen(ids: Tensor, logits: Tensor) -> Tensor:
    """Whether each expert is among the ids, [T,E]."""
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, ids.long(), True)


def token_errors(got: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """The largest error of a token's logits, relative to their norm, of each case."""
    references = {case: Fp64Reference(x, 0.0, float(x.norm(dim=-1).median())) for case, x in exact.items()}
    return {case: reference.measure(got[case])[0] for case, reference in references.items()}


def worst_call(op: str, path: str, calls: Iterator[Results], roundings: int = 1) -> Row:
    """The row of the largest error of the module's calls, relative to a result's largest value. roundings: of it."""
    error, limit = 0.0, 0.0
    for got, baseline, exact in calls:
        scale = max(largest(exact), 1e-30)
        error = max(error, largest(got.double() - exact) / scale)
        limit = max(limit, RATIO * largest(baseline.double() - exact) / scale, roundings * FLOOR[got.dtype])
    note = "" if error <= limit else f"{path}: error {error:.1e}, limit {limit:.1e}"
    return Row(layer_number(path), op, re.sub(r"\.\d+\.", ".N.", path), error, limit, note)


def layer_number(path: str) -> int | None:
    """Return the number of the layer that a module's path is in."""
    layer = re.search(r"\.(\d+)\.", path)
    return int(layer[1]) if layer else None


def nonfinite_rows(model: nn.Module) -> list[Row]:
    """A row that fails for each weight with a value that is not finite, which would look like an overflow."""
    tensors = dict(model.named_parameters())
    for path, module in model.named_modules():
        tensors |= {f"{path}.{name}": x for name, x in module.named_buffers() if is_experts(module)}
    floats = {name: x for name, x in tensors.items() if x.is_floating_point() and x.numel()}
    bad = [name for name, x in floats.items() if not all(bound.isfinite() for bound in x.aminmax())]
    return [Row.exact(None, "weights", "finite", False, f"{name} has values that are not finite") for name in bad]


def gradient_rows(model: Any, ids: Tensor) -> list[Row]:
    """The rows of each experts module's gradients of x and of the routing weights, on what it gets for ids [B,T]; the
    gradient of its result is x."""
    calls, rows = dict[Any, tuple[Any, ...]](), list[Row]()

    def gradients(function: Any, call: tuple[Any, ...], dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        x, ids, weights = call
        leaves = [value.detach().to(dtype or value.dtype, copy=True).requires_grad_() for value in (x, weights)]
        with torch.enable_grad():
            out = function(leaves[0], ids, leaves[1])
        return torch.autograd.grad(out, leaves, x.to(out.dtype))

    with ExitStack() as stack:
        for module in filter(is_experts, model.modules()):
            stack.enter_context(module.register_forward_pre_hook(calls.__setitem__))
        model(ids, use_cache=False)
    paths = {module: name for name, module in model.named_modules()}
    for module, call in calls.items():
        eager = partial(eager_experts, module)

        def of_eager(call: tuple[Any, ...], eager: Any = eager) -> Any:
            return zip(gradients(eager, call), gradients(eager, call, torch.float64), strict=True)

        for index, (got, of_torch) in enumerate(zip(gradients(module, call), of_eager(call), strict=True)):
            name, results = f"gradient of {GRADIENTS[index]}", [(got, *of_torch)]
            row = worst_call(name, paths[module], iter(results))
            if not row.ok:  # the error of torch may be small by chance: on near activations it has others
                x, ids, weights = call
                near = ((perturb(x, seed), ids, perturb(weights, seed)) for seed in range(1, PERTURBED + 1))
                others = ([*of_eager(each)][index] for each in near)
                results += [(baseline, baseline, exact) for baseline, exact in others]
                row = worst_call(name, paths[module], iter(results))
            rows.append(row)
    return rows

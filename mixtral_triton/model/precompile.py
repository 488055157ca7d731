"""Compile what a model launches before it does, on all cores: recorded launches, a model on the meta device."""

import copy
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import redirect_stdout
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from ..kernels.launching.arch import ARCHS, amd
from ..kernels.launching.launch import INTERPRETED, Launch, multiprocessors, target_arch
from ..kernels.record import record_launches
from .cache import KVCache
from .cuda_graph import no_collection
from .generate import prefill
from .mixtral import Mixtral

WIDTHS = ("H", "I")  # of a model: they change no tile
Progress = Callable[[int, int], object]
Item = TypeVar("Item")


def target_of(arch: str) -> GPUTarget:
    if INTERPRETED:
        raise ValueError("compile: this process interprets its kernels, needs one with TRITON_INTERPRET unset")
    if arch not in ARCHS:
        raise ValueError(f"compile: argument 'arch' is {arch!r}, needs one of {', '.join(ARCHS)}")
    return GPUTarget("hip", arch, 64) if amd(arch) else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


@cache
def _binder(fn: Any, arch: str) -> Any:
    backend = make_backend(target_of(arch))  # first: an interpreted kernel has no signature
    return create_function_from_signature(fn.signature, fn.params, backend)


def source_of(launch: Launch, arch: str) -> ASTSource:
    """Return what Triton's JIT derives from the arguments, so that a launch finds the kernel in the cache."""
    arguments = _binder(launch.fn, arch)(**launch.args, **launch.constexprs)
    _, *types = launch.fn._pack_args(make_backend(target_of(arch)), {"enable_fp_fusion": True}, *arguments)
    return ASTSource(launch.fn, *types)


def options_of(launch: Launch) -> dict[str, Any]:
    """Return the compiler's options. FP fusion is explicit because its default differs between releases of Triton."""
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
    return options | ({"launch_pdl": True} if launch.dependent else {})


def kernel_key(launch: Launch, source: ASTSource, widths: bool = True) -> str:
    """Return a name for the kernel that is the same in every process. Which integers are multiples of 16 does not
    count; without `widths`, neither do the sizes of a model that are constants in the code."""
    names, constants = launch.fn.arg_names, sorted(source.constants.items())
    counted = [(path, value) for path, value in constants if widths or names[path[0]] not in WIDTHS]
    parts = (launch.kernel, source.signature, counted, launch.num_warps, launch.num_stages)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def build(launch: Launch, arch: str) -> Any:
    """Compile the kernel of a recorded launch into Triton's cache -> what `triton.compile` returns. ValueError for an
    unknown `arch`, or where this process interprets; the compiler raises whatever its passes do."""
    return triton.compile(source_of(launch, arch), target=target_of(arch), options=options_of(launch))


def on_all_cores(
    work: Callable[[Item], object], items: Iterable[Item], progress: Progress = lambda *numbers: None
) -> list[Any]:
    """Return the results of `work`, which compiles, or what the compiler raised. Triton's passes release the GIL, and
    ptxas is a process."""
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    # Before CPython 3.11.8 and 3.12.2, `ast.parse` fails where a collection inside it lets another thread parse.
    with no_collection(), redirect_stdout(io.StringIO()):  # where ptxas fails, Triton prints all its input
        try:
            futures = [pool.submit(work, item) for item in items]
            for done, future in enumerate(as_completed(futures), 1):
                if isinstance(error := future.exception(), OSError):
                    raise error  # a full disk, for example, is no fault of the kernel
                progress(done, len(futures))
        finally:  # after Ctrl-C or an error, only what has begun is finished
            pool.shutdown(cancel_futures=True)
    return [future.exception() or future.result() for future in futures]


def compile_launches(launches: Iterable[Launch], arch: str, progress: Progress = lambda *numbers: None) -> list[Any]:
    """Compile the kernels of recorded launches into Triton's cache, each once, on all cores -> of each what `build`
    returns, or the error of the compiler."""
    distinct = {}
    for launch in launches:  # what is known of its integers, and a dependent launch, make another kernel of it, too
        source = source_of(launch, arch)
        distinct[kernel_key(launch, source), repr(source.attrs), launch.dependent] = launch
    return on_all_cores(lambda launch: build(launch, arch), distinct.values(), progress)


def on_meta(model: Mixtral, indices: Sequence[int]) -> Any:
    """Return a copy of the model with these layers on the meta device, without a caller's hooks."""
    model = copy.copy(model)
    model._modules = {**model._modules, "layers": nn.ModuleList(model.layers[index] for index in indices)}
    model.config = replace(model.config, num_hidden_layers=len(indices))
    memo: dict[int, Any] = {id(x): x.detach().to("meta") for x in (*model.parameters(), *model.buffers())}
    model = copy.deepcopy(model, memo)
    for module in model.modules():  # which may read values
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return model


def on_meta_by_kind(model: Mixtral) -> Any:
    """Return `on_meta` with the first layer, and of those behind it one with experts in host memory and one without."""
    kinds = {(i > 0, bool(getattr(layer.down_proj, "on_host", ()))): i for i, layer in enumerate(model.layers)}
    return on_meta(model, sorted(kinds.values()))


def launch_text(
    model: Mixtral, tokens: int, new: int, cache_dtype: torch.dtype | None = None, batch: int = 1, held: int = 0
) -> None:
    """Launch on the meta device what `generate` launches for prompts of up to so many tokens, `held` of which a cache
    has, and `new` ones."""
    model = on_meta_by_kind(model)
    ids, lengths = (
        torch.empty(shape, dtype=torch.int64, device="meta") for shape in ((batch, tokens - held), (batch,))
    )
    cache = KVCache(model.config, batch, tokens + new, "meta", cache_dtype or model.dtype)
    model.head(prefill(model, cache, ids, lengths))
    model.head(model.hidden(ids[:, :1], cache)[:, 0])


def precompile(model: Mixtral, launch: Callable[[], object], progress: Progress) -> None:
    """Compile the kernels that `launch` launches on the meta device for the model's GPU, if the compiler can."""
    arch = target_arch(model.device)
    if INTERPRETED or model.device.type != "cuda" or arch not in ARCHS:
        return
    with torch.no_grad(), record_launches(arch, multiprocessors(model.device)) as records:
        launch()
    compile_launches((record for record in records if record.fn is not None), arch, progress)

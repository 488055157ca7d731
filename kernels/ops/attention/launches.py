"""What a launch of an attention kernel gets: keys and values, sizes, a configuration and a grid.

B batch, T query tokens, S key positions, Hq query heads, Hkv key/value heads, G = Hq / Hkv, D head size, C ring slots
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ...launching.kernel_args import ALIGNMENT, Heads, dense_rows
from ...launching.launch import describe, launch, multiprocessors, select_configs, target_arch
from ...operation.plan import call_key
from ...weights.composite_args import Cache
from ..cache_args import CacheArgs, HeadNorms, cache_parts
from .kernels import Bounds, Keys, Newest, attention_combine_kernel, attention_decode_kernel, attention_prefill_kernel
from .tiles import SPLIT_KEYS, AttentionSizes, configs, fits_decode


def keys_of(k: Tensor, v: Tensor, k_scales: Tensor | None = None, v_scales: Tensor | None = None) -> Keys:
    """Return k and v, [B, S, Hkv, D] each, with their strides; what is not dense along D is copied."""
    k, v = dense_rows(k), dense_rows(v)
    return Keys(k, v, k_scales, v_scales, *k.stride()[:3], *v.stride()[:3])


def slots_of(k_cache: Cache, v_cache: Cache) -> Keys:
    """Return the slots of caches, or their codes, as keys and values [B, C, Hkv, D]."""
    (k, v), scales = cache_parts(k_cache, v_cache)
    return keys_of(k.transpose(1, 2), v.transpose(1, 2), *scales)


def reach(window: int | None, S: int, T: int) -> int:
    """Return the window as kernels take it; 0, none, where it reaches every key: the kernel subtracts it in int32."""
    window = max(0, window or 0)
    return 0 if window > 2 * (S + T) else window


GROWING = ("S", *(f"keys.stride_{x}{dim}" for x in "kv" for dim in "bth"))


def growing(args: Sequence[Any]) -> tuple[tuple[Any, ...], Sequence[str], tuple[int, ...]] | None:
    """Of decode over a cache that grows by concatenation, S changes the splits alone, which double (tiles.py)."""
    q, k, v, window, causal, *rest = args
    (_, T, Hq, _), (B, S, Hkv, D) = q.shape, k.shape
    if not (causal and S and fits_decode(T, Hq, Hkv)) or torch.version.hip:  # HIP's key has the size of the memory
        return None
    window = window and reach(window, S, T)
    splits = ((min(S, window or S) - 1) // SPLIT_KEYS).bit_length()
    *k_strides, k_last = k.stride()
    *v_strides, v_last = v.stride()
    kept = B, Hkv, D, k_last, v_last, k.dtype, k.device, k.data_ptr() % ALIGNMENT, v.data_ptr() % ALIGNMENT
    return (*call_key((q, *rest)), window, splits, *kept), GROWING, (S, *k_strides, *v_strides)


def sizes_of(q: Tensor, keys: Keys, window: int | None, deterministic: bool) -> AttentionSizes:
    """Return what the tiles for q [B, T, Hq, D] and these keys depend on; a caller sets the ring's slots."""
    (B, T, Hq, D), (S, Hkv) = q.shape, keys.k_ptr.shape[1:3]
    return AttentionSizes(
        B=B,
        T=T,
        S=S,
        Hq=Hq,
        Hkv=Hkv,
        D=D,
        window=reach(window, S, T),
        C=0,
        quantized=keys.k_scales is not None,
        deterministic=deterministic,
        sms=multiprocessors(q.device),
    )


def _in_base_2(scale: float | None, D: int) -> float:
    return (D**-0.5 if scale is None else scale) * math.log2(math.e)


def launch_prefill(
    q: Tensor,
    keys: Keys,
    bounds: Bounds,
    sizes: AttentionSizes,
    cache: CacheArgs | None = None,
    causal: bool = True,
    scale: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return attention [B, T, Hq, D] by tiles of queries. `cache`: what is before a chunk, whose keys are `keys`."""
    B, T, Hq, D = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    arch, quantized = target_arch(q.device), sizes.quantized
    config = select_configs(configs, sizes, q.dtype, q.device)["attention_prefill_kernel"]
    n, d = config.constexprs["BLOCK_N"], config.constexprs["BLOCK_D"]
    pair = keys.k_ptr, keys.v_ptr
    k_desc, v_desc = (None if quantized else describe(x, (1, n, 1, d), arch) for x in pair)
    if heads_first := k_desc is None and not quantized:  # transformers' cache
        k_desc, v_desc = (describe(x.transpose(1, 2), (1, 1, n, d), arch) for x in pair)
    if k_desc is None or v_desc is None:  # both or neither: one loop reads both
        k_desc, v_desc, heads_first = None, None, False
    launch(
        attention_prefill_kernel,
        (B * Hq, triton.cdiv(T, config.constexprs["BLOCK_M"])),
        config,
        q=Heads.of(q),
        keys=keys,
        k_desc=k_desc,
        v_desc=v_desc,
        cache=cache,
        out_ptr=out,
        bounds=bounds,
        sinks_ptr=None if sinks is None else sinks.contiguous(),
        T=T,
        S=sizes.S,
        C=sizes.C,
        Hq=Hq,
        G=Hq // sizes.Hkv,
        window=sizes.window,
        scale=_in_base_2(scale, D),
        D=D,
        CACHED=cache is not None,
        CAUSAL=causal,
        WINDOWED=sizes.window > 0,
        HEADS_FIRST=heads_first,
    )
    return out


def launch_decode(
    q: Tensor,
    keys: Keys,
    bounds: Bounds,
    sizes: AttentionSizes,
    newest: Newest | None = None,
    scale: float | None = None,
    norms: HeadNorms | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return attention [B, T, Hq, D] of few queries by splits of the keys. `newest`: the key that `keys` lacks; `norms`
    are of its heads and the queries'."""
    B, T, Hq, D = q.shape
    selected = select_configs(configs, sizes, q.dtype, q.device)
    config = selected["attention_decode_kernel"]
    splits = config.constexprs["SPLITS"]
    part = out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = None
    if splits > 1:
        part = torch.empty((*q.shape[:3], splits, D), dtype=torch.float32, device=q.device)
        lse = torch.empty((*q.shape[:3], splits), dtype=torch.float32, device=q.device)
    launch(
        attention_decode_kernel,
        (splits, sizes.Hkv, B if T else 0),
        config,
        q=Heads.of(q),
        keys=keys,
        out_ptr=part,
        lse_ptr=lse,
        bounds=bounds,
        sinks_ptr=None if sinks is None else sinks.contiguous(),
        newest=newest,
        norms=norms,
        T=T,
        S=sizes.S,
        P=0 if newest is None else len(newest.tables.cos),
        Hq=Hq,
        G=Hq // sizes.Hkv,
        window=sizes.window,
        scale=_in_base_2(scale, D),
        D=D,
        WINDOWED=sizes.window > 0,
    )
    if splits > 1:
        config = selected["attention_combine_kernel"]
        args = {"part_ptr": part, "lse_ptr": lse, "out_ptr": out, "D": D, "SPLITS": splits}
        grid = B * T * Hq, triton.cdiv(D, config.constexprs["BLOCK_D"])
        launch(attention_combine_kernel, grid, config, **args)
    return out

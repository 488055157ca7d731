"""The tuner: launch configurations around the present choice, pruned by the offline compile, timed on the current GPU.

It climbs: the operation's own rivals first, then the neighbours of the best configuration so far, until none of them is
faster. A configuration gets
in where an operation asks for its choices, so that grids, partial sums and tile descriptors follow it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ...kernels.attention import tiles as attention_tiles
from ...kernels.experts import tiles as experts_tiles
from ...kernels.launch import override_configs
from ...kernels.op import Launch, LaunchConfig, Op
from ...kernels.record import record_launches
from ..offline import Compiled, compile_launch
from . import measure as bench
from .cases import Case, Oracle
from .timing import Timer

# What may vary: tiles, how many tiles share a stretch of L2, and the splits of a decode. SPLIT_K is a promise about
# bits, not a choice.
VARIED = ("BLOCK_", "GROUP_", "SPLITS")
# Tiles that must cover a full dimension, in every kernel or in one: a smaller one is wrong, a larger one idle.
FULL_DIM_TILES_OF_ALL = {"BLOCK_D", "BLOCK_E", "BLOCK_S", "BLOCK_HQ", "BLOCK_HKV", "BLOCK_HALF"}
FULL_DIM_TILES = {
    "attention_decode_kernel": {"BLOCK_M"},
    "embed_rms_norm_kernel": {"BLOCK_H"},
    "experts_down_decode_kernel": {"BLOCK_T"},
    "experts_up_decode_kernel": {"BLOCK_T"},
    "gate_route_kernel": {"BLOCK_K"},
    "linear_decode_kernel": {"BLOCK_T"},
    "rms_norm_kernel": {"BLOCK_H"},
    "route_kernel": {"BLOCK_K"},
}
# Configurations that single steps from the present choice would not reach.
EXTRA_CONFIGS = {
    "attention_prefill_kernel": attention_tiles.extra_tune_configs,
    "experts_down_kernel": experts_tiles.extra_tune_configs,
    "experts_up_kernel": experts_tiles.extra_tune_configs,
}
# Kernels that an operation launches only where `override_configs` names them, because it selects a library there.
ALTERNATIVE_KERNELS = {"linear": {"linear_decode_kernel"}}
WARPS, STAGES = (1, 16), (1, 8)
FASTER = 0.98  # of the time to beat: less would be noise
ROUNDS = 5


@dataclass(frozen=True)
class Candidate:
    """A configuration: how it compiled, its time where it was timed, or what is held against it."""

    config: LaunchConfig
    compiled: Compiled | None = None
    seconds: float | None = None
    note: str | None = None


@dataclass(frozen=True)
class Tuned:
    """All configurations tried for one kernel of one case, the present choice first, and the fastest.

    best     the present choice where nothing was timed, or nothing is faster by more than noise
    library  a library is the present choice, and what is tried first is what the kernel would be launched with
    library_s  its time, where it was timed
    """

    case: Case
    kernel: str
    arch: str
    candidates: tuple[Candidate, ...]
    best: LaunchConfig
    library: bool = False
    library_s: float | None = None


def full_dim_tiles(op: Op, kernel: str, launch: Launch | None = None) -> set[str]:
    """The tiles that do not vary; for a launch on a quantized weight also its depth, which the layout fixes."""
    tiles = FULL_DIM_TILES_OF_ALL | FULL_DIM_TILES.get(kernel, set())
    if op.name == "experts_add_rms_norm" and kernel == "experts_combine_kernel":  # its norm needs the full row
        tiles |= {"BLOCK_H"}
    quantized = launch is not None and launch.constexprs.get("LAYOUT", ("dense",))[0] != "dense"
    return tiles | ({"BLOCK_K"} if quantized else set())


def neighbours(config: LaunchConfig, fixed: set[str]) -> list[LaunchConfig]:
    """One step away from `config`: a tile doubled or halved, twice or half the warps, a stage more or less."""
    found = []
    for name, size in config.constexprs.items():
        if name.startswith(VARIED) and name not in fixed:
            sizes = [size // 2, size * 2] if size > 1 else [size * 2]
            found += [replace(config, constexprs={**config.constexprs, name: other}) for other in sizes]
    warps = [n for n in (config.num_warps // 2, config.num_warps * 2) if WARPS[0] <= n <= WARPS[1]]
    stages = [n for n in (config.num_stages - 1, config.num_stages + 1) if STAGES[0] <= n <= STAGES[1]]
    return [
        *found,
        *(replace(config, num_warps=n) for n in warps),
        *(replace(config, num_stages=n) for n in stages),
    ]


def kernel_configs(
    case: Case, arch: str, config: dict[str, LaunchConfig] | None = None
) -> dict[str, tuple[Launch, LaunchConfig]]:
    """Each kernel of a call whose configuration the operation chooses, or that it offers: its first launch, and the
    choice."""
    found = _chosen(case, arch, config or {})
    for kernel in ALTERNATIVE_KERNELS.get(case.op.name, set()) - set(found):
        other = case.op.configs(case.sizes, case.dtype, arch)[kernel]
        found |= {name: one for name, one in _chosen(case, arch, {kernel: other}).items() if name == kernel}
    return found


def _chosen(case: Case, arch: str, config: dict[str, LaunchConfig]) -> dict[str, tuple[Launch, LaunchConfig]]:
    shapes = case.inputs(torch.device("meta"))
    with override_configs(config) as made, record_launches(arch) as recorded:
        case.op.run(**shapes)
    return {launch.kernel: (launch, made[launch.kernel]) for launch in reversed(recorded) if launch.kernel in made}


def compiled_as(case: Case, kernel: str, config: LaunchConfig, arch: str, here: bool = False) -> Candidate:
    """Compile `kernel` in `config` for `arch`; `here`: its GPU is at hand, and a launch can tell the rest."""
    try:
        launch, _ = kernel_configs(case, arch, {kernel: config})[kernel]
        compiled = compile_launch(launch, arch, case.op.name)
    except ValueError:  # an architecture that the offline compiler does not know
        if not here:
            raise
        return Candidate(config)
    except Exception as error:  # the compiler raises whatever its passes do
        lines = str(error).strip().splitlines() or [""]
        return Candidate(config, note=f"does not compile: {type(error).__name__}: {lines[0][:100]}")
    return Candidate(config, compiled, note=compiled.fault)


def _code(candidates: Candidate) -> Any:
    asm = {} if candidates.compiled is None else candidates.compiled.asm
    return asm.get("cubin") or asm.get("hsaco")


def tune(
    case: Case,
    kernel: str,
    arch: str,
    timer: Timer | None = None,
    device: torch.device | None = None,
) -> Tuned:
    """Climb from the present choice. Without a timer: the present choice and its neighbours, compiled only."""
    args = case.inputs(device) if timer is not None and device is not None else {}
    judge = Oracle(case.op, args) if args else None
    found: list[Candidate] = []

    def visit(config: LaunchConfig) -> None:
        one = compiled_as(case, kernel, config, arch, here=judge is not None)
        if one.note is None and _code(one) is not None and _code(one) in map(_code, found):
            one = replace(one, note="the same code as one before")
        if one.note is None and judge is not None and timer is not None:
            with override_configs({kernel: config}), torch.no_grad():
                outcome = bench.attempt(lambda: bench.our_call(case, args), args, judge, timer)
            one = replace(one, note=outcome.note, seconds=outcome.seconds)
        found.append(one)

    launch, now = kernel_configs(case, arch)[kernel]
    library, library_s = kernel not in _chosen(case, arch, {}), None
    if library and judge is not None and timer is not None:
        library_s = bench.attempt(lambda: bench.our_call(case, args), args, judge, timer).seconds
    visit(now)
    best = found[0]
    extra = EXTRA_CONFIGS[kernel](case.sizes, case.dtype, arch) if kernel in EXTRA_CONFIGS else {}
    for _ in range(ROUNDS):
        start = best
        for config in (*extra.get(kernel, ()), *neighbours(start.config, full_dim_tiles(case.op, kernel, launch))):
            if config not in [one.config for one in found]:
                visit(config)
        for one in found:
            if one.seconds is not None and one.seconds < FASTER * (best.seconds or float("inf")):
                best = one
        if best is start:
            break
    return Tuned(case, kernel, arch, tuple(found), best.config, library, library_s)

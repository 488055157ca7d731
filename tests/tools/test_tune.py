"""The tuner: which configurations it considers, what it holds against one, how it climbs, and what it prints."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from mixtral_triton.cli import main
from mixtral_triton.kernels import launch
from mixtral_triton.kernels.launch import INTERPRETED, target_arch
from mixtral_triton.kernels.op import LaunchConfig, Shape
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.tools.bench.cases import Case, Oracle, cases
from mixtral_triton.tools.bench.measure import our_call
from mixtral_triton.tools.bench.peers import Unsupported, peers_of
from mixtral_triton.tools.bench.tune import (
    EXTRA_CONFIGS,
    FASTER,
    compile_candidate,
    full_dim_tiles,
    kernel_configs,
    literal,
    neighbours,
    tune,
)

CPU = torch.device("cpu")
compiled_way = pytest.mark.skipif(INTERPRETED, reason="compiles: needs a process without TRITON_INTERPRET")
FEW_ROWS = "linear_decode_kernel"
PREFILL = LaunchConfig({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_D": 128, "SPLIT_K": 4}, num_warps=8, num_stages=1)


def test_neighbours_are_one_step_away() -> None:
    found = neighbours(PREFILL, full_dim_tiles(OPS["attention"], "attention_prefill_kernel"))
    tiles = [(dict(one.constexprs)["BLOCK_M"], dict(one.constexprs)["BLOCK_N"]) for one in found]
    assert tiles[:4] == [(64, 64), (256, 64), (128, 32), (128, 128)]
    assert [(one.num_warps, one.num_stages) for one in found[4:]] == [(4, 1), (16, 1), (8, 2)]
    assert all((one.constexprs["BLOCK_D"], one.constexprs["SPLIT_K"]) == (128, 4) for one in found)
    assert PREFILL not in found


def test_a_tile_that_holds_a_dimension_stays() -> None:
    decode = LaunchConfig({"BLOCK_M": 16, "BLOCK_N": 64, "SPLITS": 1}, num_warps=1, num_stages=1)
    found = neighbours(decode, full_dim_tiles(OPS["attention"], "attention_decode_kernel"))
    assert {one.constexprs["BLOCK_M"] for one in found} == {16}
    assert {one.constexprs["SPLITS"] for one in found} == {1, 2} and {one.num_warps for one in found} == {1, 2}


@compiled_way
def test_the_depth_of_a_quantized_weight_s_tile_stays() -> None:
    case = Case(OPS["linear"], Shape(T=1, H=4096, N=6144, weight="int4:128"), torch.bfloat16)
    tuned = tune(case, "linear_decode_kernel", "sm_90")
    depths = {one.config.constexprs["BLOCK_K"] for one in tuned.candidates}
    assert len(depths) == 1 and len({one.config.constexprs["BLOCK_N"] for one in tuned.candidates}) == 3


@compiled_way
def test_a_kernel_is_tuned_where_a_library_is_chosen() -> None:
    case = Case(OPS["linear"], Shape(T=32, H=4096, N=4096), torch.bfloat16)
    with record_launches() as launches:
        case.op.run(**case.inputs(torch.device("meta")))
    assert [launch.kernel for launch in launches] == ["aten::mm"] and list(kernel_configs(case, "sm_90")) == [FEW_ROWS]
    tuned = tune(case, FEW_ROWS, "sm_90")
    assert tuned.library and tuned.library_s is None and len(tuned.candidates) > 5 and tuned.candidates[0].note is None
    assert not tune(Case(OPS["linear"], Shape(T=16, H=4096, N=4096), torch.bfloat16), FEW_ROWS, "sm_90").library
    assert kernel_configs(Case(OPS["linear"], Shape(T=65, H=4096, N=4096), torch.bfloat16), "sm_90") == {}


@pytest.mark.skipif(not INTERPRETED, reason="runs a kernel: needs TRITON_INTERPRET=1")
def test_beside_a_library_our_kernel_is_a_peer() -> None:
    case = Case(OPS["linear"], Shape(T=20, H=64, N=48), torch.float32)
    args = case.inputs(CPU)
    (peer,) = (peer for peer in peers_of("linear") if peer.name == FEW_ROWS)
    with record_launches() as launches:
        got = peer.build(case.op, args)(**args)
    assert [launch.kernel for launch in launches if launch.fn is not None] == [FEW_ROWS]
    assert Oracle(case.op, args).fault(lambda **_: got) is None
    with pytest.raises(Unsupported, match="already selects"):
        peer.build(case.op, Case(OPS["linear"], Shape(T=3, H=64, N=48), torch.float32).inputs(CPU))


@compiled_way
@pytest.mark.parametrize(
    ("name", "sizes", "kernel", "tiles"),
    [
        ("expert_swiglu", {"T": 512, "H": 4096, "I": 14336, "E": 8, "K": 2}, "experts_up_kernel", {64, 128, 192}),
        ("attention", Shape(B=1, T=1024, S=1024, Hq=32, Hkv=8, D=128, window=0), "attention_prefill_kernel", {64, 128}),
    ],
)
def test_rivals_are_tried_too(name: str, sizes: Any, kernel: str, tiles: set[int]) -> None:
    """Tiles with their warps and stages: no one step of a size leads there."""
    case = Case(OPS[name], sizes, torch.bfloat16)
    extra_configs = EXTRA_CONFIGS[kernel](sizes, torch.bfloat16, "sm_90")[kernel]
    _, now = kernel_configs(case, "sm_90")[kernel]
    assert now in extra_configs and {config.constexprs["BLOCK_M"] for config in extra_configs} == tiles
    steps = neighbours(now, full_dim_tiles(case.op, kernel))
    assert any(config not in steps for config in extra_configs if config != now)
    for config in extra_configs:
        assert compile_candidate(case, kernel, config, "sm_90").note is None


def small(name: str) -> list[Case]:
    """A shape with one token, and one with several."""
    op = OPS[name]
    dtype = torch.float32 if torch.float32 in op.dtypes else op.dtypes[0]
    shapes = sorted(op.test_shapes, key=lambda sizes: (sizes["T"], sum(sizes.values())))
    chosen = [shapes[0], shapes[len(shapes) // 2]]
    if name.startswith("expert"):  # their own test shapes take minutes here
        chosen = [{"T": T, "H": 40, "I": 24, "E": 2, "K": 1} for T in ((2, 66) if name == "expert_swiglu" else (2,))]
    return [Case(op, sizes, dtype) for sizes in chosen]


TILED = {"linear", "expert_swiglu", "experts_add_rms_norm", "attention", "cached_attention", "gate_route", "route"}
TILED |= {"sort_by_expert", "rms_norm", "add_rms_norm", "rms_norm_gate_route", "rope_append_attention"}


@pytest.mark.skipif(not INTERPRETED, reason="runs the kernels: needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("name", OPS)
def test_every_candidate_gives_the_right_result(name: str) -> None:
    """A tile that had to hold a whole dimension, and is not named as one, shows here."""
    for case in small(name):
        args = case.inputs(CPU)
        judge, candidates = Oracle(case.op, args), False
        for kernel, (seen, config) in kernel_configs(case, target_arch()).items():
            for other in neighbours(config, full_dim_tiles(case.op, kernel, seen)):
                if other.constexprs != config.constexprs:
                    candidates = True
                    with launch.override_configs({kernel: other}) as made:
                        assert judge.fault(our_call(case, args)) is None, (kernel, other)
                    assert made[kernel] == other
        assert candidates or name not in TILED


@pytest.mark.parametrize("name", OPS)
def test_a_configuration_gets_into_the_launch(name: str) -> None:
    for case in small(name):
        found = kernel_configs(case, "sm_90")
        assert found
        for kernel, (seen, config) in found.items():
            assert (seen.num_warps, seen.num_stages) == (config.num_warps, config.num_stages)
            other = replace(config, num_warps=2 * config.num_warps)
            changed, _ = kernel_configs(case, "sm_90", {kernel: other})[kernel]
            assert changed.num_warps == 2 * config.num_warps
    assert kernel_configs(case, "sm_90")[kernel][1] == config, "the choice is the operation's own again"


@compiled_way
def test_what_is_held_against_a_configuration() -> None:
    case = next(case for case in cases(["expert_swiglu"]) if case.sizes["T"] == 4096)
    kernel = "experts_up_kernel"
    config = kernel_configs(case, "sm_90")[kernel][1]
    spilling = replace(config, num_warps=4)
    large = replace(config, num_stages=8)
    shallow = replace(config, constexprs={**config.constexprs, "BLOCK_K": 8})
    said = [str(compile_candidate(case, kernel, one, "sm_90").note) for one in (spilling, large, shallow)]
    assert said[0].startswith("spills ") and "shared memory" in said[1] and "does not compile" in said[2], said


def chosen_now(case: Case) -> Mapping[str, LaunchConfig]:
    return launch.select_configs(case.op.configs, case.sizes, case.dtype, CPU)


def scores(case: Case, kernel: str, score: Callable[[LaunchConfig], float]) -> Callable[[Any], float]:
    """A timer that runs the call, and gives the score of the configuration that is chosen within it."""

    def timer(call: Any) -> float:
        call()
        return score(chosen_now(case)[kernel])

    return timer


@compiled_way
def test_it_climbs_to_the_fastest_and_keeps_the_present_choice_in_a_tie() -> None:
    case = Case(OPS["sort_by_expert"], {"T": 2048, "E": 8, "K": 2}, torch.int32)
    kernel = "sort_by_expert_kernel"
    now = kernel_configs(case, "sm_90")[kernel][1]

    def score(config: LaunchConfig) -> float:
        return 1.0 + abs(config.constexprs["BLOCK_N"] - 1024) / 1024 + abs(config.num_warps - 4)

    tuned = tune(case, kernel, "sm_90", scores(case, kernel, score), CPU)
    assert (now.constexprs["BLOCK_N"], now.num_warps) == (4096, 16), "two steps away in either direction"
    assert (tuned.best.constexprs["BLOCK_N"], tuned.best.num_warps) == (1024, 4)
    assert tuned.candidates[0].config == now and len({str(one.config) for one in tuned.candidates}) == len(
        tuned.candidates
    )
    flat = tune(case, kernel, "sm_90", scores(case, kernel, lambda c: 1.0 if c == now else FASTER), CPU)
    assert flat.best == now


@compiled_way
def test_a_gpu_that_the_compiler_does_not_know_is_tuned_all_the_same() -> None:
    case = Case(OPS["route"], {"T": 64, "E": 8, "K": 2}, torch.float32)

    def score(config: LaunchConfig) -> float:
        return float(config.num_warps)

    tuned = tune(case, "route_kernel", "sm_130", scores(case, "route_kernel", score), CPU)
    assert tuned.best.num_warps == 1 and all(one.compiled is None and one.note is None for one in tuned.candidates)
    with pytest.raises(ValueError, match="sm_130"):
        tune(case, "route_kernel", "sm_130")


@compiled_way
def test_a_configuration_with_a_wrong_result_is_never_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(OPS["route"], {"T": 64, "E": 8, "K": 2}, torch.float32)
    now = kernel_configs(case, "sm_90")["route_kernel"][1]

    def wrong(case: Case, args: Any) -> Any:
        chosen = chosen_now(case)["route_kernel"]
        return (
            case.op.reference if chosen == now else lambda logits, top_k: (logits[:, :2].clone(), logits[:, :2].int())
        )

    monkeypatch.setattr("mixtral_triton.tools.bench.measure.our_call", wrong)
    tuned = tune(case, "route_kernel", "sm_90", scores(case, "route_kernel", lambda c: 2.0 if c == now else 1.0), CPU)
    assert tuned.best == now and sum("wrong" in str(one.note) for one in tuned.candidates) >= 2


def test_the_literal_to_paste() -> None:
    line = literal(OPS["attention"], "attention_prefill_kernel", PREFILL)
    text, row = line.split(",  # ")
    key, value = next(iter(eval(f"{{{text}}}", {"LaunchConfig": LaunchConfig}).items()))
    assert (key, value) == ("attention_prefill_kernel", PREFILL)
    assert row == "(128, 64, 8, 1)", "as attention/tiles.py writes it: tile, warps, stages"


@compiled_way
def test_the_command_without_timing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "route", "--at", "T=64", "--arch", "sm_120"]) == 0
    out = capsys.readouterr().out
    assert "Nothing was timed" in out and "sm_120 has no table" in out and '"route_kernel": LaunchConfig(' in out
    assert main(["tune", "route", "--at", "T=64", "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sizes"]["T"] == 64 and found["kernel"] == "route_kernel" and found["tried"][0]["registers"] > 0
    assert all(one["time_us"] is None for one in found["tried"])


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("nonsense",), "nonsense"),
        (("decode_step",), "route"),
        (("route", "--at", "many"), "T=4096"),
        (("route", "--at", "T=3"), "T=3"),
        (("linear", "--at", "T=2048", "--at", "H=6144"), "nothing to tune"),
        (("route", "--at", "T=64", "--arch", "sm_12"), "sm_12"),
    ],
)
def test_bad_input_is_one_line(args: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", *args]) == 2
    error = capsys.readouterr().err
    assert named in error and len(error.splitlines()) == 1


@pytest.mark.skipif(not INTERPRETED, reason="compiles where it does not interpret")
def test_an_interpreting_process_says_that_it_cannot_compile(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "route", "--at", "T=64", "--arch", "sm_90"]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_an_unknown_architecture_is_refused_without_a_warning(
    capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    assert main(["tune", "route", "--at", "T=64", "--arch", "sm_12"]) == 2
    assert not capsys.readouterr().out and not recwarn.list

"""The tuner: the configurations it considers, the faults it finds, how it climbs, and what it prints."""

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtral_triton.kernels import launch
from mixtral_triton.kernels.launch import LaunchConfig, target_arch
from mixtral_triton.kernels.linear import LinearSizes
from mixtral_triton.kernels.op import row_letter
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.kernels.router import RouteSizes
from mixtral_triton.kernels.sort import SortSizes
from mixtral_triton.tools.bench import measure, tune
from mixtral_triton.tools.bench.cases import Case, cases
from tests.cli.commands import error_line, output, run_json

CPU = torch.device("cpu")
PREFILL = LaunchConfig({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_D": 128, "SPLIT_K": 4}, num_warps=8, num_stages=1)


def test_neighbours_are_one_step_away() -> None:
    found = tune.neighbours(PREFILL, {"BLOCK_D"})
    tiles = [(one.constexprs["BLOCK_M"], one.constexprs["BLOCK_N"]) for one in found]
    assert tiles[:4] == [(64, 64), (256, 64), (128, 32), (128, 128)] and PREFILL not in found
    assert [(one.num_warps, one.num_stages) for one in found[4:]] == [(4, 1), (16, 1), (8, 2)]
    assert all((one.constexprs["BLOCK_D"], one.constexprs["SPLIT_K"]) == (128, 4) for one in found)


def test_depth_of_a_quantized_weight_s_tile_stays() -> None:
    case = Case(OPS["linear"], LinearSizes(1, 4096, 6144, weight="int4:128"), torch.bfloat16)
    recorded, config = tune.kernel_configs(case, "sm_90")["linear_decode_kernel"]
    found = [one.constexprs for one in tune.neighbours(config, tune.fixed_tiles(recorded))]
    assert len({one["BLOCK_K"] for one in found}) == 1 and len({one["BLOCK_N"] for one in found}) == 3


def small(name: str) -> list[Case]:
    """Return a case with one token, and one with several."""
    op = OPS[name]
    rows = "T" if hasattr(op.test_shapes[0], "T") else row_letter(op.run)
    shapes = sorted(
        op.test_shapes, key=lambda s: (getattr(s, rows), sum(x for x in vars(s).values() if isinstance(x, int)))
    )
    selected = [shapes[0], shapes[len(shapes) // 2]]
    if name.startswith("expert"):  # their test shapes take minutes here
        selected = [op.case(T, H=40, I=24, E=2, K=1) for T in ((2, 66) if name == "expert_swiglu" else (2,))]
    return [Case(op, sizes, torch.float32 if torch.float32 in op.dtypes else op.dtypes[0]) for sizes in selected]


TILED = {"linear", "expert_swiglu", "experts_add_rms_norm", "attention", "cached_attention", "gate_route", "route"}
TILED |= {"sort_by_expert", "rms_norm", "add_rms_norm", "rms_norm_gate_route", "rope_append_attention"}


@pytest.mark.exhaustive
@pytest.mark.interpreted
@pytest.mark.parametrize("name", OPS)
def test_every_candidate_gives_the_right_result(name: str) -> None:
    """A tile that must cover a full dimension, and is missing in the tuner's table, fails here."""
    for case in small(name):
        args = case.inputs(CPU)
        candidates = 0
        for kernel, (recorded, config) in tune.kernel_configs(case, target_arch()).items():
            for other in tune.neighbours(config, tune.fixed_tiles(recorded)):
                if other.constexprs != config.constexprs:
                    candidates += 1
                    with launch.override_configs({kernel: other}) as used:
                        assert measure.fault(case.op, args, measure.our_call(case, args)) is None, (kernel, other)
                    assert used[kernel] == other
        assert candidates or name not in TILED


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("name", "kernel"), [("linear", "linear_decode_kernel"), ("expert_swiglu", "experts_down_decode_kernel")]
)
def test_decode_kernel_with_one_stage_can_be_built(name: str, kernel: str) -> None:
    case = next(case for case in cases([name]) if case.sizes.T == 1)
    config = replace(tune.kernel_configs(case, "sm_90")[kernel][1], num_stages=1)
    assert tune.kernel_configs(case, "sm_90", {kernel: config})[kernel][0].constexprs["PREFETCH"] > 0


@pytest.mark.compiled
def test_spills_shared_memory_and_compile_errors_have_notes() -> None:
    case = next(case for case in cases(["expert_swiglu"]) if case.sizes.T == 4096)
    kernel = "experts_up_kernel"
    config = tune.kernel_configs(case, "sm_90")[kernel][1]
    shallow = replace(config, constexprs={**config.constexprs, "BLOCK_K": 8})
    faulty = replace(config, num_warps=4), replace(config, num_stages=8), shallow
    notes = [str(fault) for fault in tune.compile_faults(case, kernel, faulty, "sm_90")]
    neighbour = replace(config, constexprs={**config.constexprs, "BLOCK_M": 2 * config.constexprs["BLOCK_M"]})
    assert neighbour in tune.neighbours(config, {"BLOCK_D"})
    (note,) = tune.compile_faults(case, kernel, [neighbour], "sm_90")
    assert note == "cannot be built: Shape element 0 must be a power of 2", note
    assert notes[0].startswith("spills ") and "shared memory" in notes[1] and "does not compile" in notes[2], notes


def timer_of(case: Case, kernel: str, score: Callable[[LaunchConfig], float]) -> Callable[[Any], float]:
    """Return a timer that runs the call, and returns the score of the configuration in use."""

    def timer(call: Any) -> float:
        call()
        return score(launch.select_configs(case.op.configs, case.sizes, case.dtype, CPU)[kernel])

    return timer


ROUTE = Case(OPS["route"], RouteSizes(64, 8, 2), torch.float32)


@pytest.mark.compiled
def test_tuner_climbs_to_the_fastest_and_keeps_the_current_in_a_tie() -> None:
    case, kernel = Case(OPS["sort_by_expert"], SortSizes(2048, 8, 2), torch.int32), "sort_by_expert_kernel"
    current = tune.kernel_configs(case, "sm_90")[kernel][1]

    def score(config: LaunchConfig) -> float:
        return 1.0 + abs(config.constexprs["BLOCK_N"] - 1024) / 1024 + abs(config.num_warps - 4)

    candidates, best = tune.tune(case, kernel, "sm_90", timer_of(case, kernel, score), CPU)
    assert (current.constexprs["BLOCK_N"], current.num_warps) == (4096, 16), "two steps away in either direction"
    assert (candidates[best].config.constexprs["BLOCK_N"], candidates[best].config.num_warps) == (1024, 4)
    configs = [str(each.config) for each in candidates]
    assert candidates[0].config == current and len(set(configs)) == len(configs)
    flat = timer_of(case, kernel, lambda config: 1.0 if config == current else tune.FASTER)
    assert tune.tune(case, kernel, "sm_90", flat, CPU)[1] == 0


@pytest.mark.compiled
def test_a_gpu_unknown_to_the_compiler_is_tuned_without_compiling() -> None:
    timer = timer_of(ROUTE, "route_kernel", lambda config: float(config.num_warps))
    candidates, best = tune.tune(ROUTE, "route_kernel", "sm_130", timer, CPU)
    assert candidates[best].config.num_warps == 1 and all(each.outcome.note is None for each in candidates)


@pytest.mark.compiled
def test_a_config_with_a_wrong_result_is_never_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    current = tune.kernel_configs(ROUTE, "sm_90")["route_kernel"][1]

    def wrong(case: Case, args: Any) -> Any:
        if launch.select_configs(case.op.configs, case.sizes, case.dtype, CPU)["route_kernel"] == current:
            return case.op.reference
        return lambda logits, top_k: (logits[:, :2].clone(), logits[:, :2].int())

    monkeypatch.setattr(measure, "our_call", wrong)
    timer = timer_of(ROUTE, "route_kernel", lambda config: 2.0 if config == current else 1.0)
    candidates, best = tune.tune(ROUTE, "route_kernel", "sm_90", timer, CPU)
    assert best == 0 and sum("wrong" in str(each.outcome.note) for each in candidates) >= 2


@pytest.mark.interpreted
def test_an_interpreting_process_compiles_nothing() -> None:
    assert "TRITON_INTERPRET is set" in error_line("tune route --at T=64 --arch sm_90")


@pytest.mark.compiled
def test_command_that_compiles_alone_claims_nothing() -> None:
    out = output("tune route --at T=64 --arch sm_120")
    assert "Nothing is timed" in out and "sm_120 has no table" in out and "fastest" not in out and "time, us" not in out
    found = run_json("tune route --at T=64 --arch sm_90")
    assert found["sizes"]["T"] == 64 and found["kernel"] == "route_kernel" and len(found["candidates"]) > 2
    assert all(one["time_us"] is None for one in found["candidates"]) and found["change"] == {}


@pytest.mark.compiled
def test_command_prints_the_new_row_and_appends_the_results(gpu: Any, monkeypatch: Any, tmp_path: Path) -> None:
    def climb(case: Case, kernel: str, *rest: Any) -> Any:
        config = tune.kernel_configs(case, "sm_90")[kernel][1]
        faster = replace(config, constexprs={**config.constexprs, "BLOCK_N": 7}, num_stages=9)
        times = (config, 2.0), (faster, 1.0)
        return [tune.Candidate(each, "", measure.Outcome(seconds)) for each, seconds in times], 1

    monkeypatch.setattr(tune, "tune", climb)
    monkeypatch.setattr(tune, "BENCHMARKS", tmp_path)
    (tmp_path / "results").mkdir()
    for _ in range(2):
        out = " ".join(output("tune linear --at T=1 --at N=6144").split())
    source = tune.results_file(torch.cuda.get_device_name()).name
    change = "kernels/linear.py: BLOCK_N=7 (now 16), num_stages=9 (now 4); "
    assert f"{change}DecodeTile(1, 16, 7, 256, 4, 9, 'measured: {source}')" in out, out
    rows = [*csv.DictReader((tmp_path / "results" / source).read_text().splitlines())]
    assert len(rows) > 4 and tuple(rows[0]) == tune.COLUMNS and {row["op"] for row in rows} == {"linear"}
    assert [float(row["us"]) for row in rows] == [2e6, 1e6] * (len(rows) // 2) and "BLOCK_N7 " in rows[1]["tile"]


TABLES = [("expert_swiglu", {}, "experts/tiles"), ("experts_add_rms_norm", {}, "experts/tiles")]
TABLES += [("expert_swiglu", {"gate_up": "int8"}, "tiles"), ("attention", {}, "attention/tiles")]


@pytest.mark.parametrize(("name", "sizes", "file"), TABLES)
def test_file_of_the_tables(name: str, sizes: dict[str, Any], file: str) -> None:
    assert tune.config_file(Case(OPS[name], replace(OPS[name].test_shapes[0], **sizes))) == f"kernels/{file}.py"


def test_candidates_begin_with_what_others_measured() -> None:
    """For the nearest card and sizes; 192 rows beside the 128 that were measured; then the neighbours."""
    layer = {"H": 4096, "I": 14336, "E": 8, "K": 2}

    def found(
        arch: str, T: int, kernel: str = "experts_up_kernel", card: str = "", **more: Any
    ) -> list[tuple[str, str]]:
        case = Case(OPS["expert_swiglu"], OPS["expert_swiglu"].case(T=T, **layer, **more), torch.bfloat16)
        tiles = []
        for each in tune.candidates_of(case, kernel, arch, card):
            c = each.config.constexprs
            rows = c.get("BLOCK_M") or c["BLOCK_T"]
            tiles.append((each.origin, f"{rows}x{c['BLOCK_N']}x{c['BLOCK_K']} w{each.config.num_warps}"))
        return tiles

    hopper = found("sm_90", 4096)
    assert hopper[:2] == [
        ("now", "192x128x64 w8"),
        ("measured: NVIDIA_H200, E 8, N 14336, 4096 tokens", "128x128x64 w8"),
    ]
    assert hopper[2] == ("128 rows", "128x128x64 w8") and {origin for origin, _ in hopper[3:]} == {"neighbour"}
    cards = {origin.split()[1] for origin, _ in found("sm_90", 4096, card="NVIDIA H100 80GB HBM3") if "meas" in origin}
    assert cards == {"NVIDIA_H100_80GB_HBM3,"}
    codes = {"gate_up": "fp8_w8a8", "down": "fp8_w8a8"}
    assert "128x256x128 w8" in dict(found("sm_90", 2048, "experts_down_kernel", **codes)).values()
    assert any(
        tile.startswith("16x") for origin, tile in found("gfx942", 48, "experts_up_decode_kernel") if "meas" in origin
    )
    assert {origin for origin, _ in found("sm_90", 512, gate_up="int4:128")} == {"now", "neighbour"}


@pytest.mark.compiled
def test_dry_lists_candidates_and_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "compile_all", None)
    sizes = "--sizes T=2048,H=4096,I=14336,E=8,K=2 --kernel experts_up --kernel experts_down"
    out = output(f"tune expert_swiglu --dry --arch sm_80 {sizes}")
    assert out.count("experts_up_kernel") == out.count("experts_down_kernel") == 1 and "note" not in out
    found = run_json(f"tune expert_swiglu --dry --arch sm_89 {sizes.removesuffix(' --kernel experts_down')}")
    assert [each["origin"].split()[0] for each in found["candidates"]][:2] == ["now", "measured:"]

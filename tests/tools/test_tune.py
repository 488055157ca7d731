"""The tuner: the configurations it considers, the faults it finds, and what it prints."""

import csv
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from benchmarks import tune
from mixtral_triton.bench import measure
from mixtral_triton.bench.cases import Case, cases
from mixtral_triton.kernels.launching import launch
from mixtral_triton.kernels.launching.launch import LaunchConfig, target_arch
from mixtral_triton.kernels.ops import tiles
from mixtral_triton.kernels.ops.experts.tiles import PREFILL as PREFILL_TILES
from mixtral_triton.kernels.ops.linear import LinearSizes
from mixtral_triton.kernels.ops.sort import SortSizes, configs
from mixtral_triton.kernels.registry import OPS

CPU = torch.device("cpu")
PREFILL = LaunchConfig({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_D": 128, "SPLIT_K": 4}, num_warps=8, num_stages=1)


def test_neighbours_are_one_step_away() -> None:
    found = tune.neighbours(PREFILL, set())
    tiles = [(one.constexprs["BLOCK_M"], one.constexprs["BLOCK_N"]) for one in found]
    assert tiles[:4] == [(64, 64), (256, 64), (128, 32), (128, 128)] and PREFILL not in found
    assert [(one.num_warps, one.num_stages) for one in found[4:]] == [(4, 1), (16, 1), (8, 2)]
    assert all((one.constexprs["BLOCK_D"], one.constexprs["SPLIT_K"]) == (128, 4) for one in found)


def test_depth_of_a_quantized_weight_s_tile_stays() -> None:
    case = Case(OPS["linear"], LinearSizes(1, 4096, 6144, weight="int4:128"), torch.bfloat16)
    recorded, config = tune.kernel_configs(case, "sm_90")["linear_decode_kernel"]
    found = [one.constexprs for one in tune.neighbours(config, tune.fixed_tiles(recorded))]
    assert len({one["BLOCK_K"] for one in found}) == 1 and len({one["BLOCK_N"] for one in found}) == 3


def rivals(arch: str, T: int, kernel: str, **formats: str) -> list[str]:
    case = Case(OPS["expert_swiglu"], replace(OPS["expert_swiglu"].bench_shapes[0], T=T, **formats))
    recorded, config = tune.kernel_configs(case, arch)[kernel]
    found = tune.rivals(case, kernel, config, arch, tune.fixed_tiles(recorded))
    return [tune.tile_text(kernel, tune.Candidate(config)) for config in found]


def test_rivals_are_what_the_nearest_card_measured_at_the_nearest_sizes() -> None:
    for kernel in ("experts_up_kernel", "experts_down_kernel"):  # of I = 7,168 and 2,048 tokens
        large = ["128x256x64 g32 w8 s4", "128x256x64 g8 w8 s4", "192x256x64 g8 w8 s4"]
        assert sorted({*rivals("sm_90", 2048, kernel)}) == sorted(large)
        assert "128x256x128 g32 w8 s3" in rivals("sm_90", 2048, kernel, gate_up="fp8_w8a8", down="fp8_w8a8")
        assert rivals("sm_80", 2048, kernel) == ["128x128x64 g16 w8 s4"]
    assert {tile.split()[0] for tile in rivals("gfx942", 16, "experts_up_decode_kernel")} == {"16x64x64"}
    assert not rivals("sm_90", 2048, "experts_up_kernel", gate_up="int4", down="int4")


def test_times_are_appended_and_the_row_is_a_tile_of_the_tables(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(tune, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    case = Case(OPS["expert_swiglu"], replace(OPS["expert_swiglu"].bench_shapes[0], T=2048))
    timed = tune.Candidate(tune.kernel_configs(case, "sm_90")["experts_up_kernel"][1], measure.Outcome(0.0015))
    for _ in range(2):
        candidates = [timed, replace(timed, outcome=measure.Outcome(note="spills"))]
        name = tune.append_times(case, "experts_up_kernel", candidates)
    assert name == "nvidia-h100-80gb-hbm3.csv"
    rows = list(csv.DictReader((tmp_path / name).open()))
    assert [(row["tile"], row["us"]) for row in rows] == [("192x256x64 g8 w8 s4", "1500.00")] * 2
    assert list(rows[0]) == ["date", "card", "driver", "triton", "torch", "op", "kernel", "sizes", "tile", "us"]
    row = eval(tune.table_row("experts_up_kernel", timed, name), {"PrefillTile": tiles.PrefillTile, "ROWS": 112})
    assert row[:6] == PREFILL_TILES["sm_90"][-1][:6] and row[-2:] == (8, 64)
    assert row.source == f"measured: {name}"


def small(name: str) -> list[Case]:
    """Return a case with one token, and one with several."""
    op = OPS[name]
    rows = "T" if hasattr(op.test_shapes[0], "T") else op.row_letter
    shapes = sorted(
        op.test_shapes, key=lambda s: (getattr(s, rows), sum(x for x in vars(s).values() if isinstance(x, int)))
    )
    selected = [shapes[0], shapes[len(shapes) // 2]]
    if name.startswith("expert"):  # their test shapes take minutes here
        selected = [op.case(T, H=40, I=24, E=2, K=1) for T in ((2, 66) if name == "expert_swiglu" else (2,))]
    return [Case(op, sizes, torch.float32 if torch.float32 in op.dtypes else op.dtypes[0]) for sizes in selected]


TILED = {"linear", "expert_swiglu", "experts_add_rms_norm", "attention", "cached_attention", "gate_route", "route"}
TILED |= {"sort_by_expert", "rms_norm", "add_rms_norm", "rms_norm_gate_route", "rope_append_attention"}


# By kernel, the tile that must cover a dimension: rows of x, columns, or a token's experts.
COVERING = {"linear_decode_kernel": "BLOCK_T", "attention_decode_kernel": "BLOCK_M"}
COVERING |= dict.fromkeys(("rms_norm_kernel", "embed_rms_norm_kernel", "experts_combine_kernel"), "BLOCK_H")
COVERING |= dict.fromkeys(("route_kernel", "gate_route_kernel"), "BLOCK_K")


@pytest.mark.exhaustive
@pytest.mark.interpreted
@pytest.mark.parametrize("name", OPS)
def test_every_candidate_gives_the_right_result_or_covers_too_little(name: str) -> None:
    """One that does is found wrong, and reads nothing outside a tensor."""
    for case in small(name):
        args = case.inputs(CPU)
        candidates = 0
        for kernel, (recorded, config) in tune.kernel_configs(case, target_arch()).items():
            for other in tune.neighbours(config, tune.fixed_tiles(recorded)):
                if other.constexprs != config.constexprs:
                    candidates += 1
                    shorter = [tile for tile, size in other.constexprs.items() if size < config.constexprs[tile]]
                    with launch.override_configs({kernel: other}) as used:
                        right = measure.check(partial(measure.our_call, case), case.op, args, []).right
                    assert right or shorter == [COVERING.get(kernel)], (kernel, other)
                    assert used[kernel] == other
        assert candidates or name not in TILED


@pytest.mark.slow
@pytest.mark.compiled
def test_spills_shared_memory_and_compile_errors_have_notes() -> None:
    case = next(case for case in cases(["expert_swiglu"]) if case.sizes.T == 4096)
    kernel = "experts_up_kernel"
    config = tune.kernel_configs(case, "sm_90")[kernel][1]
    shallow = replace(config, constexprs={**config.constexprs, "BLOCK_K": 8})
    doubled = replace(config, constexprs={**config.constexprs, "BLOCK_M": 2 * config.constexprs["BLOCK_M"]})
    faulty = replace(config, num_warps=4), replace(config, num_stages=8), shallow, doubled
    notes = [str(fault) for fault in tune.compile_faults(case, kernel, faulty, "sm_90")]
    assert doubled in tune.neighbours(config, set())
    assert notes[0].startswith("spills ") and "shared memory" in notes[1] and "does not compile" in notes[2], notes
    assert notes[3] == "cannot be built: Shape element 0 must be a power of 2"


@pytest.mark.compiled
def test_the_fastest_is_right_and_beyond_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU unknown to the compiler, too."""
    case, kernel = Case(OPS["sort_by_expert"], SortSizes(2048, 8, 2), torch.int32), "sort_by_expert_kernel"
    now = tune.kernel_configs(case, "sm_90")[kernel][1]
    monkeypatch.setattr(measure, "DEVICE", CPU)
    in_use = lambda: launch.select_configs(configs, case.sizes, case.dtype, CPU)[kernel]  # noqa: E731

    def tuned(seconds: Any) -> int:
        candidates, best = tune.tune(case, kernel, "sm_130", lambda call: call() and seconds(in_use()))
        assert candidates[0].config == now and len({str(each.config) for each in candidates}) == len(candidates) > 4
        return candidates[best].config.num_warps

    assert tuned(lambda config: 1.0 + abs(config.num_warps - 8)) == 8 != now.num_warps
    assert tuned(lambda config: 1.0 if config == now else tune.FASTER) == now.num_warps
    right = measure.our_call
    wrong = lambda logits, top_k: (logits[:, :2].clone(),)  # noqa: E731
    monkeypatch.setattr(measure, "our_call", lambda *args: right(*args) if in_use() == now else wrong)
    assert tuned(lambda config: 1.0 + (config == now)) == now.num_warps


@pytest.mark.slow
@pytest.mark.compiled
def test_what_is_only_compiled_claims_nothing(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    tune.main(["route", "--arch", "sm_120"])
    out = capsys.readouterr().out
    assert "route_kernel: route, T1 E8 K2, bfloat16, sm_120" in out and "best" not in out and "time, us" in out
    assert out.count("\n") > 5
    monkeypatch.setattr(torch.cuda, "is_available", Mock(return_value=False))
    compile_all = Mock(side_effect=AssertionError)
    monkeypatch.setattr(tune, "compile_all", compile_all)
    monkeypatch.setenv("COLUMNS", "120")
    tune.main(["expert_swiglu", "--arch", "sm_90", "--dry", "--sizes", "T=2048", "--kernel", "experts_up"])
    assert capsys.readouterr().out.count("\n") == 18
    with pytest.raises(SystemExit):
        tune.main(["rms_norm", "--arch", "sm_90", "--sizes", "Q=1"])
    assert "a name of --sizes is 'Q', needs one of T, H" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tune.main(["route"])
    assert "there is no GPU to time anything: needs --arch" in capsys.readouterr().err

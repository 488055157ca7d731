"""Every launch, compiled for GPUs that are not here: none spills, all fit shared memory. And the gate catches both."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtral_triton.kernels import offline
from mixtral_triton.kernels.launch import INTERPRETED
from mixtral_triton.kernels.offline import as_json, collect, compile_launch, compile_ops
from mixtral_triton.kernels.op import Launch
from mixtral_triton.kernels.registry import OPS

pytestmark = pytest.mark.skipif(INTERPRETED, reason="compiles: needs a process without TRITON_INTERPRET")

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
EVERY_DTYPE = "sm_90"
# sm_86, sm_89 and sm_120 run what sm_80 runs, and have less shared memory.
LEAST_OF_SM_80 = 101376
MEASURED = {"registers", "spills", "shared_bytes", "limit_bytes", "loop_spills", "loop_flop_per_instruction"}
JSON_KEYS = MEASURED | {"fault", "op", "kernel", "arch", "file", "dtype", "num_warps", "num_stages", "constexprs"}


def cases() -> Iterator[Any]:
    """Op, architecture, dtype: pieces that share out evenly. fp16 has bf16's tiles, and is compiled for sm_90 only."""
    for name, op in OPS.items():
        for arch in ARCHS:
            for dtype in op.dtypes:
                if dtype != torch.float16 or arch == EVERY_DTYPE:
                    yield pytest.param(name, arch, dtype, id=f"{name}-{arch}-{str(dtype).removeprefix('torch.')}")


@pytest.mark.parametrize(("name", "arch", "dtype"), list(cases()))
def test_no_spill_and_fits_shared_memory(name: str, arch: str, dtype: torch.dtype, covers: Any) -> None:
    compiled = [compile_launch(launch, arch) for launch in collect(OPS[name], arch, [dtype])]
    if arch == "sm_80":
        compiled = [replace(kernel, limit_bytes=LEAST_OF_SM_80) for kernel in compiled]
    covers("target", arch)
    for kernel in compiled:
        covers("compiled", str(kernel))
    assert compiled and not [(kernel.fault, kernel) for kernel in compiled if kernel.fault]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("D", [64, 256])
def test_other_head_sizes(D: int, dtype: torch.dtype) -> None:
    """Mixtral's is 128, and so it is in the bench shapes; the tiles differ by head size."""
    shapes = tuple({**sizes, "D": D} for sizes in OPS["attention"].bench_shapes if sizes["S"] == 4096)
    launches = collect(replace(OPS["attention"], bench_shapes=(shapes[0], shapes[-1])), "sm_90", [dtype])
    kernels = {launch.kernel: compile_launch(launch, "sm_90").fault for launch in launches}
    assert kernels == dict.fromkeys(("attention_prefill_kernel", "attention_decode_kernel", "attention_combine_kernel"))


def prefill(kernel: str, arch: str = "sm_90") -> Launch:
    """A bf16 kernel as 8x7B launches it for 4096 tokens."""
    op = OPS["attention" if kernel.startswith("attention") else "expert_swiglu"]
    op = replace(op, bench_shapes=tuple(sizes for sizes in op.bench_shapes if sizes["T"] == 4096)[:1])
    return next(found for found in collect(op, arch, [torch.bfloat16]) if found.kernel == kernel)


# More is better; vLLM's best expert tile has 5,191, Triton's attention tutorial 2,052.
FLOP_PER_INSTRUCTION = {"experts_up_kernel": 4600, "experts_down_kernel": 4600, "attention_prefill_kernel": 2000}


def flop_a_turn(launch: Launch) -> int:
    """Of the tiles that one turn of the main loop multiplies; attention: of the one without a mask."""
    tile = launch.constexprs
    if launch.kernel.startswith("attention"):
        return 4 * tile["BLOCK_M"] * tile["BLOCK_N"] * tile["BLOCK_D"]
    return 2 * tile["BLOCK_M"] * tile["BLOCK_N"] * tile["BLOCK_K"] * (2 if "_up_" in launch.kernel else 1)


@pytest.mark.parametrize("kernel", FLOP_PER_INSTRUCTION)
def test_main_loops_do_little_beside_their_dots(kernel: str, covers: Any) -> None:
    launch = prefill(kernel)
    compiled = compile_launch(launch, "sm_90")
    figure, least = compiled.loop_flop_per_instruction or 0.0, FLOP_PER_INSTRUCTION[kernel]
    assert max(loop.flops or 0 for loop in compiled.loops) * launch.num_warps == flop_a_turn(launch)
    assert figure >= least, f"{kernel}: {figure:.0f} FLOP per other instruction: {compiled.loops}"
    covers("main loops", f"{kernel}, sm_90: {figure:,.0f} FLOP per other instruction (bound {least:,})")


@pytest.mark.parametrize("arch", ["sm_80", "sm_100"])
@pytest.mark.parametrize("kernel", ["attention_prefill_kernel", "experts_up_kernel"])
def test_main_loops_of_other_tensor_cores(kernel: str, arch: str) -> None:
    """sm_80: a loop may end in a jump without a condition. sm_100: waits stand out of line, and FLOP are not known."""
    launch = prefill(kernel, arch)
    loops = compile_launch(launch, arch).loops
    # Attention: the interior and the right edge; the left edge, which is empty here, as far as the compiler kept it.
    assert len(loops) in ((2, 3) if kernel.startswith("attention") else (1,)) and all(loop.tensor for loop in loops)
    if arch == "sm_80":
        assert max(loop.flops or 0 for loop in loops) * launch.num_warps == flop_a_turn(launch)
    else:
        assert all(loop.flops is None for loop in loops)


def test_the_gate_catches_a_spill() -> None:
    """Half the warps for the same tiles: the accumulators alone take every register that a thread can have."""
    up, attention = prefill("experts_up_kernel"), prefill("attention_prefill_kernel")
    assert compile_launch(up, "sm_90").fault is None
    halved = [compile_launch(replace(launch, num_warps=launch.num_warps // 2), "sm_90") for launch in (up, attention)]
    assert all("spills" in str(compiled.fault) for compiled in halved)
    assert halved[0].loop_spills and f"by {halved[0].loop_spills} instructions in main loops" in str(halved[0].fault)


def test_few_bytes_outside_the_main_loops_are_no_fault() -> None:
    """The gate's two sides, on a kernel said to spill: it has no spill in its loops, and sm_90 may have 16 bytes."""
    compiled = compile_launch(prefill("experts_down_kernel"), "sm_90")
    assert compiled.loops and not compiled.loop_spills
    assert replace(compiled, spills=16).fault is None
    assert "spills 17 bytes, by 0 instructions" in str(replace(compiled, spills=17).fault)
    assert replace(compiled, spills=64, arch="sm_80").fault is None
    assert "spills" in str(replace(compiled, spills=1, arch="gfx942").fault)


def test_the_gate_catches_too_much_shared_memory() -> None:
    launch = replace(prefill("experts_up_kernel"), num_stages=6)
    assert "shared memory" in str(compile_launch(launch, "sm_90").fault)


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
@pytest.mark.parametrize("name", OPS)
def test_signatures_are_those_of_the_jit(name: str, arch: str) -> None:
    """Types, constants and divisibility are what Triton itself would find in the arguments when it launches."""
    jit = pytest.importorskip("triton.runtime.jit")
    backend = offline.make_backend(offline._target(arch))
    for launch in collect(OPS[name], arch):
        bind = jit.create_function_from_signature(launch.fn.signature, launch.fn.params, backend)
        bound, specialized, _ = bind(**launch.args, **launch.constexprs)
        options = {"enable_fp_fusion": True}
        _, signature, constants, attrs = launch.fn._pack_args(backend, options, bound, specialized, options)
        source = offline._source(launch, arch)
        assert source.signature == signature
        assert source.constants == constants
        assert {at: found for at, found in source.attrs.items() if found} == {at: a for at, a in attrs.items() if a}


def test_each_kernel_once_in_a_fixed_order(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["rope", "rms_norm", "add_rms_norm", "route", "append"]
    progress: list[tuple[int, int]] = []
    shared = [as_json(c) for c in compile_ops(names, "sm_90", progress=lambda *at: progress.append(at))]
    assert progress == [(n + 1, len(shared)) for n in range(len(shared))]
    assert len(shared) >= 32, "too few to be shared with other processes"
    monkeypatch.setattr(offline.os, "cpu_count", lambda: 1)
    assert [as_json(c) for c in compile_ops(names[::-1], "sm_90")] == shared
    assert list(dict.fromkeys(row["op"] for row in shared)) == [name for name in OPS if name in names]


def test_a_kernel_of_two_operations_is_compiled_once() -> None:
    dtypes = [torch.bfloat16]
    both = [offline._record_all(ops, "sm_90", dtypes) for ops in ([OPS["sort_by_expert"]], [OPS["expert_swiglu"]])]
    union = offline._record_all([OPS["sort_by_expert"], OPS["expert_swiglu"]], "sm_90", dtypes)
    assert len(union) < sum(map(len, both)) and set(union) == set(both[0]) | set(both[1])


@pytest.mark.parametrize(
    ("arch", "suffixes"), [("sm_90", {".ptx", ".sass", ".cubin"}), ("gfx942", {".amdgcn", ".hsaco"})]
)
def test_files_and_json(tmp_path: Path, arch: str, suffixes: set[str]) -> None:
    rows = [as_json(compiled) for compiled in compile_ops(["route"], arch, out=tmp_path / "new")]
    assert json.loads(json.dumps(rows)) == rows
    files = [Path(row["file"]) for row in rows]
    assert len(set(files)) == len(rows)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        file.with_suffix(suffix).name for file in files for suffix in suffixes
    }
    for row, file in zip(rows, files, strict=True):
        assert set(row) == JSON_KEYS
        assert file.parent == tmp_path / "new" and file.name.startswith(f"{row['kernel']}.{arch}.")
        assert file.read_bytes().startswith(b"\x7fELF")
        assert all("route_kernel" in file.with_suffix(each).read_text() for each in suffixes - {file.suffix})
    assert {row["dtype"] for row in rows} == {"fp32", "bf16", "fp16"}


def test_says_which_architectures_and_operations_there_are() -> None:
    with pytest.raises(ValueError, match=r"compile: .*'sm_70'.*sm_90"):
        compile_ops([], "sm_70")
    with pytest.raises(ValueError, match=r"compile: .*'sm_70'.*gfx942"):
        collect(OPS["route"], "sm_70")
    with pytest.raises(ValueError, match=r"compile: .*'rout'.*route"):
        compile_ops(["rope", "rout"], "sm_90")


def test_an_interpreting_process_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "INTERPRETED", True)
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        compile_ops(["route"], "sm_90")

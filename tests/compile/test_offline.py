"""Every launch, compiled for GPUs that are not here: none spills, all fit shared memory, and the gate catches both. The
command `compile`: its rows and exit status, its progress, its worker processes and how they end."""

import ast
import gc
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from triton.runtime.cache import get_cache_key

from mixtral_triton.bench import compile
from mixtral_triton.bench.compile import OUTSIDE_LOOPS, collect, compile_launch, compile_ops
from mixtral_triton.cli.commands import main
from mixtral_triton.kernels.launching.arch import ARCHS
from mixtral_triton.kernels.launching.launch import Launch
from mixtral_triton.kernels.operation.cases import OpWithCases
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.model import precompile
from tests.cli.commands import heed_interrupts

pytestmark = pytest.mark.compiled

FAMILIES = tuple(dict.fromkeys(known.family for known in ARCHS.values()))
OWN_ROWS = ("sm_120",)  # architectures that a table names beside their family
MEASURED = {"registers", "spills", "shared_bytes", "limit_bytes", "loop_spills", "loop_flop_per_instruction"}
MEASURED |= {"programs_per_sm", "loop_clocks"}
JSON_KEYS = MEASURED | {"fault", "op", "kernel", "arch", "file", "dtype", "num_warps", "num_stages", "constexprs"}


CASES = [(name, arch, dtype) for name, op in OPS.items() for arch, dtype in product(FAMILIES, op.dtypes)]
CASES.sort(key=lambda case: case[0] != "linear")  # the quick run compiles the first alone


def launches_of(op: OpWithCases, arch: str, dtype: torch.dtype | None = None, widths: bool = True) -> list[Launch]:
    """Return a launch of each kernel of `op`, in one dtype or in all; `widths` as in `collect`."""
    op = op if dtype is None else replace(op, dtypes=(dtype,))
    return [launch for _, launch in collect([op], arch, widths).values()]


def members(arch: str) -> dict[str, str]:
    """The family's `arch`, and that of its architectures with the least shared memory, which may take other tiles, each
    compiled for `arch`; and those that have rows of their own, compiled as themselves."""
    family = [name for name, known in ARCHS.items() if known.family == arch]
    least = min(family, key=lambda name: ARCHS[name].shared_bytes)
    return {arch: arch, least: arch} | {name: name for name in family if name in OWN_ROWS}


@pytest.mark.exhaustive
# fp16 has bf16's tiles, and is compiled for sm_90 only.
@pytest.mark.parametrize(
    ("name", "arch", "dtype"), [case for case in CASES if case[1] == "sm_90" or case[2] != torch.float16], ids=str
)
def test_no_spill_and_fits_shared_memory(name: str, arch: str, dtype: torch.dtype) -> None:
    """In bf16 for sm_90 the kernels of both models, otherwise one of those that differ in H and I alone."""
    widths = (arch, dtype) == ("sm_90", torch.bfloat16)
    compiled = [
        replace(compile_launch(launch, target), limit_bytes=ARCHS[member].shared_bytes)
        for member, target in members(arch).items()
        for launch in launches_of(OPS[name], member, dtype, widths)
    ]
    assert compiled and not [kernel for kernel in compiled if kernel.fault is not None]


EXPERTS = {"I": 14336, "E": 8, "K": 2}
PROMPT = {"B": 1, "T": 500, "Hq": 32, "Hkv": 8, "D": 128, "window": 0}
RING = {"C": 4096, "past": 3000}
STEP = {"B": 2, "T": 1, "Hq": 8, "Hkv": 2, "C": 4096, "window": 4096, "past": 4095}
LONG = [sizes for sizes in OPS["attention"].bench_shapes if sizes.S == 4096]
# D and T. Narrower than their tile: an assembler of CUDA 12 crashes where 64 rows or 64 columns meet 128 keys.
HEADS = [(16, 150), (32, 150), (48, 20), (48, 65), (48, 150), (72, 37), (80, 33), (96, 65), (112, 37), (192, 65)]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# Operation, sizes, architecture, dtype.
Variant = tuple[str, dict[str, Any], str, torch.dtype]
# Mixtral's is 128, and so it is in the bench shapes; the tiles differ by head size.
HEAD_SIZES: list[Variant] = []
for D, dtype, sizes in product((64, 256), (FP32, BF16), (LONG[0], LONG[-1])):
    HEAD_SIZES.append(("attention", vars(sizes) | {"D": D}, "sm_90", dtype))
for arch, (D, T) in product(("sm_90", "sm_80"), HEADS):  # keys alone, or with a ring before them
    sizes = PROMPT | {"T": T, "Hq": 4, "Hkv": 2, "D": D}
    HEAD_SIZES.append(("attention", sizes | {"S": 4096}, arch, BF16))
    HEAD_SIZES.append(("cached_attention", sizes | RING | {"past": 5000}, arch, FP16))  # compiles to bf16's code
for arch, D in product(("sm_90", "sm_80", "gfx942"), (48, 72, 80, 192)):
    HEAD_SIZES.append(("rope_append_attention", STEP | {"D": D}, arch, BF16))
    HEAD_SIZES.append(("rope_append_attention", STEP | {"D": D, "cache": "int8"}, arch, BF16))
    CODES = PROMPT | RING | {"T": 65, "Hq": 4, "Hkv": 2, "D": D, "cache": "int8"}
    HEAD_SIZES.append(("cached_attention", CODES, arch, BF16))


@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "sizes", "arch", "dtype"), HEAD_SIZES)
def test_other_head_sizes(name: str, sizes: Any, arch: str, dtype: torch.dtype) -> None:
    op = OPS[name]
    launches = launches_of(replace(op, bench_shapes=(op.case_of(sizes),)), arch, dtype)
    assert launches and not [(launch, fault) for launch in launches if (fault := compile_launch(launch, arch).fault)]


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
@pytest.mark.parametrize(
    ("name", "sizes", "rows"),
    [
        ("attention", {"S": 500}, 64),
        ("attention", {"S": 500, "window": 4096}, 64),
        ("cached_attention", RING, 64),
        ("cached_attention", RING | {"window": 4096}, 128),  # tiles of 64 rows would spill
    ],
)
def test_attention_with_no_more_tiles_than_sms(name: str, sizes: Any, rows: int, arch: str) -> None:
    op = OPS[name]
    op = replace(op, bench_shapes=(op.case_of(PROMPT | sizes),))
    (launch,) = launches_of(op, arch, torch.bfloat16)
    assert launch.constexprs["BLOCK_M"] == rows and compile_launch(launch, arch).fault is None


def prefill(kernel: str, arch: str = "sm_90") -> Launch:
    """A bf16 kernel as 8x7B launches it for 4096 tokens."""
    op = OPS["attention" if kernel.startswith("attention") else "expert_swiglu"]
    op = replace(op, bench_shapes=tuple(sizes for sizes in op.bench_shapes if sizes.T == 4096)[:1])
    return next(found for found in launches_of(op, arch, torch.bfloat16) if found.kernel == kernel)


# More is better; vLLM's best expert tile has 5,191, Triton's attention tutorial 2,052.
OLDER = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)  # it computes the places of tiles in every turn
FLOP_PER_INSTRUCTION = {("attention_prefill_kernel", "sm_90"): 2000}
for kernel in ("experts_up_kernel", "experts_down_kernel"):
    FLOP_PER_INSTRUCTION |= {(kernel, "sm_90"): 4100 if OLDER else 5500, (kernel, "sm_80"): 2600}


def flop_a_turn(launch: Launch) -> int:
    """Of the tiles that one turn of the main loop multiplies; attention: of the one without a mask."""
    tile = launch.constexprs
    if launch.kernel.startswith("attention"):
        return 4 * tile["BLOCK_M"] * tile["BLOCK_N"] * tile["BLOCK_D"]
    return 2 * tile["BLOCK_M"] * tile["BLOCK_N"] * tile["BLOCK_K"] * (2 if "_up_" in launch.kernel else 1)


@pytest.mark.parametrize(("kernel", "arch"), FLOP_PER_INSTRUCTION)
def test_main_loops_do_little_beside_their_dots(kernel: str, arch: str, covers: Any) -> None:
    launch = prefill(kernel, arch)
    compiled = compile_launch(launch, arch)
    figure, least = compiled.loop_flop_per_instruction or 0.0, FLOP_PER_INSTRUCTION[kernel, arch]
    assert max(loop.flops or 0 for loop in compiled.loops) * launch.num_warps == flop_a_turn(launch)
    assert figure >= least, f"{kernel}: {figure:.0f} FLOP per other instruction, needs larger tiles: {compiled.loops}"
    covers("main loops", f"{kernel}, {arch}: {figure:,.0f} FLOP per other instruction (bound {least:,})")


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", ["sm_80", "sm_100"])
@pytest.mark.parametrize("kernel", ["attention_prefill_kernel", "experts_up_kernel"])
def test_main_loops_of_other_tensor_cores(kernel: str, arch: str) -> None:
    """sm_80: a loop may end in a jump without a condition. sm_100: waits stand out of line, and FLOP are not known."""
    launch = prefill(kernel, arch)
    loops = compile_launch(launch, arch).loops
    # Attention: the interior and the right edge; the left edge, which is empty here, as far as the compiler kept it.
    # Experts: by TMA a whole tile, its upper part alone, a short one.
    most = (2, 3) if kernel.startswith("attention") else (1,) if arch == "sm_80" else (3,)
    assert len(loops) in most and all(loop.tensor for loop in loops)
    if arch == "sm_80":
        assert max(loop.flops or 0 for loop in loops) * launch.num_warps == flop_a_turn(launch)
    else:
        assert all(loop.flops is None for loop in loops)


# Of a loop turn on sm_80, worked out independently; the first is a tile that an A100 showed to be slower than others.
CLOCKS = {
    (64, 128, 3): (704, 512),
    (64, 256, 4): (1088, 1024),
    (128, 128, 4): (1024, 1024),
    (128, 256, 3): (1408, 2048),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("tile", CLOCKS)
def test_clocks_of_shared_memory_and_tensor_cores(tile: tuple[int, int, int]) -> None:
    rows, columns, stages = tile
    launch = prefill("experts_up_kernel", "sm_80")
    tiles = {"BLOCK_M": rows, "BLOCK_N": columns // 2, "BLOCK_K": 64}
    launch = replace(launch, constexprs={**launch.constexprs, **tiles}, num_warps=8, num_stages=stages)
    compiled = compile_launch(launch, "sm_80")
    assert compiled.loop_clocks == CLOCKS[tile]
    shared, tensor = compile_launch(launch, "sm_86").loop_clocks or (0, 0)  # half the products a clock
    assert (shared, tensor) == (CLOCKS[tile][0], 2 * CLOCKS[tile][1])


def test_clocks_are_none_where_instructions_do_not_show_both() -> None:
    """wgmma reads shared memory by itself; AMD's machine code is not counted."""
    for arch in ("sm_90", "gfx942"):
        assert compile_launch(prefill("experts_down_kernel", arch), arch).loop_clocks is None


@pytest.mark.parametrize("T", [1, 4, 24, 48, 64])
def test_decode_tiles_leave_an_sm_two_programs(T: int) -> None:
    """One alone would load nothing while it starts and ends."""
    shapes = {name: {"T": T, "H": 4096, **more} for name, more in (("linear", {"N": 6144}), ("expert_swiglu", EXPERTS))}
    for name, shape in shapes.items():
        for launch in launches_of(replace(OPS[name], bench_shapes=(OPS[name].case(**shape),)), "sm_90", BF16):
            if launch.kernel.endswith("_decode_kernel"):
                compiled = compile_launch(launch, "sm_90")
                assert compiled.programs_per_sm is not None and compiled.programs_per_sm >= 2, compiled


@pytest.mark.slow
def test_one_kernel_at_other_sizes() -> None:
    choices = {"T": [3], "H": [512, 256]}
    rows = [one.as_dict() for one in compile_ops(["linear"], "sm_90", kernel="linear_decode", choices=choices)]
    assert rows and {row["kernel"] for row in rows} == {"linear_decode_kernel"}
    assert {row["constexprs"]["H"] for row in rows} <= {256, 512}
    found = [launch.constexprs.get("H") for _, launch in collect([OPS["linear"]], "sm_90", choices=choices).values()]
    assert {256, 512} <= {*found}
    with pytest.raises(ValueError, match="--kernel is 'linear_encode_kernel', needs one of linear_decode_kernel,"):
        compile_ops(["linear"], "sm_90", kernel="linear_encode")
    with pytest.raises(ValueError, match=r"'rout'.*route"):
        compile_ops(["rope", "rout"], "sm_90")
    with pytest.raises(ValueError, match="linear: a name of --at is 'S', needs one of T, H, N"):
        compile_ops(["linear"], "sm_90", choices={"S": [3]})


@pytest.mark.slow
def test_the_gate_catches_a_spill() -> None:
    """Half the warps for the same tiles: the accumulators alone take every register that a thread can have."""
    up, attention = prefill("experts_up_kernel"), prefill("attention_prefill_kernel")
    assert compile_launch(up, "sm_90").fault is None
    halved = [compile_launch(replace(launch, num_warps=launch.num_warps // 2), "sm_90") for launch in (up, attention)]
    assert all("spills" in str(compiled.fault) for compiled in halved)
    assert halved[0].loop_spills and f"by {halved[0].loop_spills} instructions in main loops" in str(halved[0].fault)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("arch", "most"), [("sm_90", OUTSIDE_LOOPS), ("gfx942", 0)])
def test_few_spilled_bytes_outside_main_loops_are_no_fault(arch: str, most: int) -> None:
    """The gate's two sides, on a kernel said to spill: it has no spill in its loops."""
    compiled = compile_launch(prefill("experts_down_kernel", arch), arch)
    assert replace(compiled, spills=most).fault is None
    assert f"spills {most + 1} bytes, by 0 instructions" in str(replace(compiled, spills=most + 1).fault)


def test_the_gate_uses_each_gpu_s_shared_memory() -> None:
    launch = replace(prefill("experts_up_kernel", "sm_80"), num_stages=6)
    faults = {arch: compile_launch(launch, arch).fault for arch in ("sm_80", "sm_89")}
    assert faults["sm_80"] is None and "of 101376 bytes of shared memory" in str(faults["sm_89"])


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", [arch for arch, known in ARCHS.items() if arch != known.family])
def test_gpus_that_run_on_another_family_s_tiles(arch: str) -> None:
    """The kernels with the largest tiles: the rest are those of the family, compiled above."""
    for kernel in ("experts_up_kernel", "experts_down_kernel", "attention_prefill_kernel"):
        compiled = compile_launch(prefill(kernel, arch), arch)
        assert compiled.fault is None, compiled


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
@pytest.mark.parametrize("name", OPS)
def test_the_cache_key_is_that_of_triton_s_jit(name: str, arch: str) -> None:
    """Triton's key of what is compiled here is the one that its JIT makes of the same call."""
    jit = pytest.importorskip("triton.runtime.jit")
    backend = precompile.make_backend(precompile.target_of(arch))
    for launch in launches_of(OPS[name], arch):
        program = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
        call = {**launch.args, **launch.constexprs, **program, "debug": False}
        bind = jit.create_function_from_signature(launch.fn.signature, launch.fn.params, backend)
        options, *packed = launch.fn._pack_args(backend, call, *bind(**call))
        again = backend.parse_options(dict(options.__dict__))
        key = get_cache_key(precompile.ASTSource(launch.fn, *packed), backend, again, {})
        ours = backend.parse_options(precompile.options_of(launch))
        assert get_cache_key(precompile.source_of(launch, arch), backend, ours, {}) == key


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Triton's cache, empty."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.slow
def test_each_kernel_once_in_a_fixed_order(own_cache: Path) -> None:
    """Compiled by several threads, then from the cache."""
    names, progress = ["rms_norm", "append", "route"], []
    done = [c.as_dict() for c in compile_ops(names, "sm_90", progress=lambda *at: progress.append(at))]
    assert progress == [(n + 1, len(done)) for n in range(len(done))] and len(done) >= 12
    rows = [c.as_dict() for c in compile_ops(names[::-1], "sm_90")]
    assert rows == done
    order = [launch.kernel for name in OPS if name in names for launch in launches_of(OPS[name], "sm_90")]
    assert [row["kernel"] for row in rows] == order


def test_a_kernel_of_two_operations_is_compiled_once() -> None:
    ops = [OPS["sort_by_expert"], replace(OPS["expert_swiglu"], dtypes=(torch.bfloat16,))]
    first, second = (set(collect([op], "sm_90")) for op in ops)
    assert first & second and set(collect(ops, "sm_90")) == first | second


def test_a_crash_of_ptxas_is_a_fault_in_its_row(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An assembler that crashes, as it does on some kernels, and one that dislikes the code; the rest is compiled."""
    crash = own_cache.parent / "ptxas"
    crash.write_text(
        '#!/bin/sh\ncase "$*" in *--version*) echo "Cuda, release 12.9, V12.9.86";; *) kill -SEGV $$;; esac\n'
    )
    crash.chmod(0o755)
    for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
        monkeypatch.setenv(name, str(crash))
    faults = {compiled.fault for compiled in compile_ops(["append"], "sm_90")}
    assert faults == {"does not compile: `ptxas` failed with error code -11"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "suffixes"), [("sm_90", {".ptx", ".sass", ".cubin"}), ("gfx942", {".amdgcn", ".hsaco"})]
)
def test_files_and_json(tmp_path: Path, arch: str, suffixes: set[str]) -> None:
    rows = [compiled.as_dict() for compiled in compile_ops(["route"], arch, out=tmp_path / "new")]
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


def test_a_fault_is_printed_and_exit_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(compile, "build", mock.Mock(side_effect=RuntimeError("killed")))
    assert main(["compile", "append", "--arch", "sm_89"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("append, append_kernel, bf16: does not compile: killed") == 2  # over 16 bits and over 8
    assert "6 of them must not run" in out and "101,376 bytes" in out
    assert main(["compile", "append", "--arch", "sm_90", "--json"]) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 6 and all(row["fault"] and row["file"] is None for row in rows)


def test_no_collection_lets_another_thread_parse_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Triton does in each thread. Some releases of CPython fail then: "AST constructor recursion depth mismatch"."""
    source = Path(precompile.__file__).read_text()
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(4))
    collections = list[str]()
    callback = lambda phase, info: (collections.append(phase), time.sleep(0))  # noqa: E731
    gc.callbacks.append(callback)
    try:
        precompile.on_all_cores(lambda _: ast.parse(source), range(100))
    finally:
        gc.callbacks.remove(callback)
    assert gc.isenabled() and len(collections) <= 2


@pytest.mark.slow
def test_interrupt_leaves_no_process(tmp_path: Path) -> None:
    environment: dict[str, Any] = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "mixtral_triton", "compile", "--arch", "sm_90", "expert_swiglu"]
    pipe = subprocess.PIPE
    options = {"start_new_session": True, "preexec_fn": heed_interrupts}
    with subprocess.Popen(command, env=environment, text=True, stdout=pipe, stderr=pipe, **options) as process:
        while not list(tmp_path.glob("*/*.ttgir")):  # a worker is at it
            assert process.poll() is None
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)
        out, error = process.communicate(timeout=60)
        assert process.returncode == 130 and out == ""
        assert error.splitlines()[-1] == "mixtral-triton compile: interrupted" and "Traceback" not in error, error
        for _ in range(200):
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.1)
        pytest.fail("a process is left")

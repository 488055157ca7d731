"""The PTX emulator executes every kernel, compiled by Triton's JIT for sm_90 and sm_80, and a complete model."""

import itertools
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mixtral_triton import KVCache, Mixtral
from mixtral_triton.bench.compile import compile_launch
from mixtral_triton.kernels.launching.launch import override_configs
from mixtral_triton.kernels.operation.cases import OpWithCases, runs_on
from mixtral_triton.kernels.ops import linear
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.kernels.registry import OPS, dispatched
from mixtral_triton.kernels.weights import weight_args as kernel_weight
from mixtral_triton.verification.tolerance import Tolerance
from tests.compile.test_quantized_offline import FORMATS, OTHER_GROUPS, format_name
from tests.ops.test_deterministic import CASES, check
from tests.ops.test_quantized import random_weight
from tests.support.calls import inputs, inputs_without_padding, selected_configs, with_offload

from .memory import Fault
from .parser import Unmodelled

pytestmark = pytest.mark.emulator

GPU_DEVICE, BF16 = torch.device("cuda", 0), torch.bfloat16
ARCHS = ("sm_90", "sm_80")
BOUND = 0.97  # of the instructions of one variant with the tiles of 8x7B, for each kernel

MOST_TOKENS = 1000  # of a gate: its tiles of more tokens take the emulator minutes; the interpreter runs them


def check_error(op: OpWithCases, sizes: Any, dtype: torch.dtype = BF16) -> float:
    """Check that the error is at most twice that of the torch backend; return its share of this limit."""
    args = inputs_without_padding(op.name, sizes, GPU_DEVICE, dtype)
    error, limit = Tolerance(op.name, args).measure(dispatched(op.name, args))
    assert error <= limit, f"{op.name} {sizes}"
    return float(error) / max(float(limit), 1e-30)


def emulated_shapes(op: OpWithCases) -> list[Any]:
    return [sizes for sizes in op.test_shapes if "gate" not in op.name or sizes.T <= MOST_TOKENS]


def supported(op: OpWithCases, dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in op.dtypes else op.dtypes[0]


@pytest.mark.parametrize("dtype", [BF16, torch.float32, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", OPS)
def test_every_operation(name: str, arch: str, dtype: torch.dtype, ptx_emulator: Any, covers: Any) -> None:
    op = OPS[name]
    with ptx_emulator(arch):
        shapes = (sizes for sizes in emulated_shapes(op) if runs_on(sizes, arch))
        worst = max(check_error(op, sizes, supported(op, dtype)) for sizes in shapes)
    covers("errors in the PTX emulator", f"{name} {str(dtype)[6:]} {arch}: at most {worst:.0%} of the limit")


@pytest.mark.parametrize("promoted", [True, False])
def test_sums_of_fp8_products_are_as_wide_as_they_need(
    promoted: bool, ptx_emulator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over 2,048 columns of positive numbers 14 bits of a running sum are too few, and those of 128 are enough."""
    monkeypatch.setattr(kernel_weight, "sums_fp8_exactly", lambda arch: not promoted)
    with ptx_emulator("sm_90"):
        sizes = {"T": 3, "H": 2048, "N": 64, "weight": "fp8_w8a8"}
        args = inputs_without_padding("linear", sizes, GPU_DEVICE, torch.float16)
        args["x"] = args["x"].abs()
        args["weight"].data &= 0x7F7F
        error, limit = Tolerance("linear", args).measure(dispatched("linear", args))
    assert (error <= limit) == promoted


@pytest.mark.parametrize("dtype", OPS["attention"].dtypes, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("arch", ARCHS)
def test_attention_with_a_maskless_loop(arch: str, dtype: torch.dtype, ptx_emulator: Any) -> None:
    """The configs of the test shapes with so many keys that every query attends to several tiles, and long prompts."""
    with ptx_emulator(arch):
        for name in ("attention", "cached_attention"):
            for sizes in (shape for shape in emulated_shapes(OPS[name]) if shape.T > 1):
                window = 200 if sizes.window else 0
                more = {"C": window or 400, "past": 300} if hasattr(sizes, "C") else {"S": 300}
                with override_configs(selected_configs(name, sizes, dtype, arch)):
                    check_error(OPS[name], replace(sizes, window=window, **more), dtype)
        for D, window in itertools.product((64, 128), (0, 100, 200)) if dtype == BF16 else [(64, 0)]:
            sizes = {"B": 1, "T": 300, "S": 300, "Hq": 2, "Hkv": 1, "D": D, "window": window}
            check_error(OPS["attention"], sizes, dtype)


# Sizes that fill a kernel's production tiles and repeat its loops.
SMALL = {"H": 1024, "I": 512, "N": 320, "V": 100, "P": 512, "E": 2}
MANY_ROWS = {"H": 512, "I": 512, "N": 320, "E": 3}  # of experts and linears; complete units of a quantized weight
TOKENS = 384  # of experts: on average 256 rows for each of 3, with short and long last tiles
HEADS = {"Hq": 8, "Hkv": 2}  # of attention


def small(sizes: Any) -> dict[str, Any]:
    full = vars(sizes)
    most = SMALL | (HEADS if "window" in full else MANY_ROWS if full.get("T", 0) > 64 and "I" in full else {})
    reduced = {key: min(most[key], size) if key in most else size for key, size in full.items()}
    if "T" in reduced:
        tokens = 300 if "B" in reduced else TOKENS if "I" in reduced else 600 if "H" in reduced else 2048
        reduced["T"] = min(reduced["T"], tokens)
    keys = 300 if reduced.get("T", 1) > 1 else 600
    bounds = {"B": 2, "S": keys, "C": keys, "window": 200, "past": min(keys, full.get("C", 300)) - 1}
    return dict(reduced | {key: min(reduced[key], most) for key, most in bounds.items() if key in reduced})


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", OPS)
def test_production_tiles(name: str, arch: str, ptx_emulator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configs of 8x7B on small sizes: nearly all instructions of one variant of each kernel run."""
    # A library would multiply with a small weight.
    monkeypatch.setattr(linear, "use_skinny_kernel", lambda sizes, *args: sizes.T <= 64)
    op, tested, kernels = OPS[name], set(), set()
    dtype = supported(op, BF16)
    with ptx_emulator(arch) as gpu:
        shapes = [sizes for sizes in op.bench_shapes if runs_on(sizes, arch)]
        for sizes in (sizes for sizes in shapes if getattr(sizes, "H", 4096) == 4096):  # of 8x7B
            configs, reduced = selected_configs(name, sizes, dtype, arch), small(sizes)
            if (key := (str(configs), str(reduced))) in tested:
                continue
            tested.add(key)
            kernels |= configs.keys()
            with override_configs(configs):
                check_error(op, reduced, dtype)
        codes_of = gpu.driver.execute.codes
        for kernel in kernels & codes_of.keys():
            if kernel == "sort_by_expert_kernel" and name != "sort_by_expert":
                continue  # its own cases run all of it
            best = max(code.ran.mean() for code in codes_of[kernel])
            assert best >= BOUND, f"{kernel}: {best:.1%} of its instructions run"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("format", [*FORMATS, *OTHER_GROUPS], ids=format_name)
def test_every_quantized_format(format: Any, arch: str, ptx_emulator: Any) -> None:
    name, group, _ = format
    weight = f"{name}:{group}" if group else name
    with ptx_emulator(arch):
        for T in (1, 7, 40):
            sizes = {"T": T, "H": 256, "N": 80, "weight": weight}
            check_error(OPS["linear"], sizes)
            sizes = {"T": T, "H": 256, "I": 128, "E": 4, "K": 2, "gate_up": weight, "down": weight}
            check_error(OPS["expert_swiglu"], sizes)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_int4_with_zeros(dtype: torch.dtype, arch: str, ptx_emulator: Any) -> None:
    """They are stored as bf16, and subtracted from codes in x's dtype."""
    weight = random_weight("int4:64", 80, 256, zeros=True, scales=torch.bfloat16)
    with ptx_emulator(arch):
        for T in (7, 200):
            args = {"x": torch.randn(T, 256).to(dtype), "weight": weight}
            args = {name: value.to(GPU_DEVICE) for name, value in args.items()}
            error, limit = Tolerance("linear", args).measure(dispatched("linear", args))
            assert error <= limit


def test_caches_are_apart(ptx_emulator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulator's cubins are PTX: in the compiler's cache a GPU would load them, and it would read machine code."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    op, sizes = OPS["rms_norm"], OPS["rms_norm"].test_shapes[0]
    with record_launches() as launches:
        op.run(**op.inputs(sizes, BF16, "meta"))
    for _ in range(2):
        with ptx_emulator("sm_90"):
            check_error(op, sizes)
        assert compile_launch(launches[0], "sm_90").stages["cubin"].parent.parent == tmp_path
    assert all(file.read_bytes()[:4] == b"\x7fELF" for file in tmp_path.glob("[!p]*/*.cubin"))


@pytest.mark.parametrize(("name", "sizes"), CASES, ids=str)
def test_compiled_kernels_are_deterministic(name: str, sizes: Any, ptx_emulator: Any) -> None:
    with ptx_emulator("sm_90"):
        check(name, sizes, 8, supported(OPS[name], BF16), GPU_DEVICE)


ON_HOST = (0, 3)


def expert_arguments(T: int, format: str | None) -> dict[str, Any]:
    sizes = {"T": T, "H": 256, "I": 128, "E": 4, "K": 2, "gate_up": format, "down": format}
    return inputs("expert_swiglu", sizes, GPU_DEVICE, BF16)


def experts(args: dict[str, Any]) -> torch.Tensor:
    return OPS["expert_swiglu"].run(**args).held


@pytest.mark.parametrize("format", [None, "int4", "int8", "fp8"])
@pytest.mark.parametrize("arch", ARCHS)
def test_offload_gives_the_same_bits_and_reads_each_byte_once(arch: str, format: Any, ptx_emulator: Any) -> None:
    """Two memories, whose bytes are counted apart. In prefill, kernels read a copy of what lies in host memory, and
    more than once."""
    with ptx_emulator(arch) as gpu:
        for T in (1, 16, 70):
            args, loaded = expert_arguments(T, format), gpu.driver.execute.loaded
            with_host, want = with_offload(args, ON_HOST), experts(args)
            loaded.clear()
            assert torch.equal(experts(with_host), want)
            selected = set(args["ids"].held.unique().tolist())
            for name in ("gate_up_proj", "down_proj") if T < 70 else ():
                of_expert, argument = with_host[name].host[0].nbytes, name.replace("_proj", ".ptr")
                assert loaded[f"{argument} host"] == len(selected & {*ON_HOST}) * of_expert
                assert loaded[f"{argument} resident"] == len(selected - {*ON_HOST}) * of_expert
        with_host["down_proj"].host.zero_()
        assert not torch.equal(experts(with_host), want)


@triton.jit
def double_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if MASKED:
        tl.store(y_ptr + offs, 2 * tl.load(x_ptr + offs, mask=offs < N, other=0.0), mask=offs < N)
    else:
        tl.store(y_ptr + offs, 2 * tl.load(x_ptr + offs))


@triton.jit
def count_kernel(y_ptr, BLOCK: tl.constexpr):
    tl.atomic_add(y_ptr + tl.arange(0, BLOCK), 1)


def test_unmasked_access_is_a_fault_and_an_atomic_is_refused(ptx_emulator: Any) -> None:
    with ptx_emulator():
        x, y = (torch.arange(n).float().to(GPU_DEVICE) for n in (100, 100))
        double_kernel[(2,)](x, y, 100, BLOCK=64, MASKED=True)
        assert y.cpu().equal(2 * torch.arange(100).float())
        with pytest.raises(Fault, match=r"double_kernel .*illegal address.* block \(1, 0, 0\), thread"):
            double_kernel[(2,)](x, y, 100, BLOCK=64, MASKED=False)
        with pytest.raises(Unmodelled, match=r"count_kernel: not modelled: atom\.global"):
            count_kernel[(1,)](torch.zeros(64, dtype=torch.int32).to(GPU_DEVICE), BLOCK=64)


@triton.jit
def pdl_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr, WAITS: tl.constexpr, RELEASES: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    if RELEASES:
        gdc_launch_dependents()
    if WAITS == "first":
        gdc_wait()
    x = tl.load(x_ptr + offs)
    if WAITS == "before it stores":
        gdc_wait()
    tl.store(y_ptr + offs, 2 * x)
    if WAITS == "at last":
        gdc_wait()


@pytest.mark.parametrize(
    ("pdl", "reads", "waits", "message"),
    [
        (True, "written", "first", ""),
        (True, "written", "before it stores", r"before the wait for the launch that writes there: ld\.global"),
        (True, "written", "at last", "before the wait"),
        (True, "written", "never", "before the wait"),
        (False, "written", "never", ""),
        (True, "constant", "before it stores", ""),
        (True, "constant", "at last", r"before the wait .* st\.global"),
        (True, "constant", "never", r"before the wait .* st\.global"),
    ],
)
def test_pdl_launch_must_wait(pdl: bool, reads: str, waits: str, message: str, ptx_emulator: Any) -> None:
    """It must wait before it reads what the launch before it has `written`, and before it stores anything."""
    with ptx_emulator():
        constant, written, out = (torch.ones(64).to(GPU_DEVICE) for _ in range(3))
        double_kernel[(1,)](constant, written, 64, BLOCK=64, MASKED=True)
        x, want = (constant, 2.0) if reads == "constant" else (written, 4.0)
        with pytest.raises(Fault, match=message) if message else nullcontext():
            pdl_kernel[(1,)](x, out, BLOCK=64, WAITS=waits, RELEASES=False, launch_pdl=pdl)
            assert out.cpu().equal(torch.full((64,), want))


@pytest.mark.parametrize("releases", [False, True])
def test_launch_that_releases_before_it_waits_leaves_those_before_it_running(releases: bool, ptx_emulator: Any) -> None:
    with ptx_emulator():
        constant, written, other, out = (torch.ones(64).to(GPU_DEVICE) for _ in range(4))
        options: dict[str, Any] = {"BLOCK": 64, "WAITS": "before it stores", "launch_pdl": True}
        double_kernel[(1,)](constant, written, 64, BLOCK=64, MASKED=True)
        pdl_kernel[(1,)](constant, other, RELEASES=releases, **options)
        with pytest.raises(Fault, match="before the wait") if releases else nullcontext():
            pdl_kernel[(1,)](written, out, RELEASES=False, **options)


def test_small_checkpoint_generates_the_same_text(ptx_emulator: Any) -> None:
    """A prefill of 70 tokens, more than the window, and a captured decode of eight equal the torch backend."""
    ids = torch.randint(3, 2000, (1, 70), generator=torch.Generator().manual_seed(0))
    with ptx_emulator() as gpu:
        reference, model = (Mixtral.from_pretrained("small", device) for device in ("cpu", GPU_DEVICE))
        want = reference.generate(ids, max_new_tokens=8)
        assert model.generate(ids.to(GPU_DEVICE), max_new_tokens=8).cpu().equal(want)
        assert any(launched.launcher.metadata.launch_pdl for launched in gpu.driver.launches)
        assert gpu.replays > 0 and len(gpu.driver.execute.codes) >= 8
        codes = gpu.driver.execute.codes.values()
        opcodes = {inst.opcode for variants in codes for inst in variants[0].program.instructions}
        assert any(name.startswith("wgmma") for name in opcodes) and any("bulk.tensor" in name for name in opcodes)
        cache = KVCache(model.config, 1, device=GPU_DEVICE, dtype=model.dtype)
        got, logits = model(ids.to(GPU_DEVICE), cache=cache).cpu(), reference(ids)
        assert (got - logits).abs().max() <= 0.05 * logits.abs().max()

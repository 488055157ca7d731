"""Every launch by Triton's own JIT, without a GPU: binder, specialization, compiler and cache, and a launcher that
holds the launch against what CUDA would demand (tests/support/stub); and a user's call to a launch, on two GPUs:
results, devices, reads."""

import io
import json
import random
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from mixtral_triton import SMALL, KVCache, Mixtral, apply, ops, verify
from mixtral_triton.cli import batch, chat
from mixtral_triton.cli import commands as cli
from mixtral_triton.kernels.launching import launch
from mixtral_triton.kernels.launching.kernel_args import flatten
from mixtral_triton.kernels.launching.launch import Launch
from mixtral_triton.kernels.operation.declaration import Op
from mixtral_triton.kernels.ops import norm, router
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.model import precompile as compiler
from mixtral_triton.model.precompile import compile_launches
from mixtral_triton.verification import launch_calls
from mixtral_triton.verification.judge import Calls
from tests.support.calls import compilations, inputs, with_offload
from tests.support.models import WIDER_SIZES, random_model, tokens
from tests.support.stub.driver import GRID_MOST, LaunchError, check_descriptor
from tests.support.stub.tensors import Factories

pytestmark = pytest.mark.compiled

GPU_DEVICE = torch.device("cuda", 0)


def launch_as_recorded(op: Op, sizes: Any, dtype: torch.dtype, gpu: Any) -> None:
    """Launch `op` as a GPU's tensors would: the launches are those that are recorded on meta tensors."""
    gpu.driver.executes = False
    begin = len(gpu.driver.launches)
    op.run(**inputs(op.name, sizes, GPU_DEVICE, dtype))
    launched = [(each.kernel, each.grid) for each in gpu.driver.launches[begin:]]
    with record_launches() as recorded:
        op.run(**op.inputs(sizes, dtype, "meta"))
    assert launched == [(each.kernel, (*each.grid, 1, 1)[:3]) for each in recorded if each.grid]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["first", "every"])
def test_operations_at_their_test_shapes(every: bool, name: str, gpu: Any) -> None:
    """In bf16 at all of them, in other dtypes at one: by dtype tiles and descriptors differ, not shapes."""
    op = OPS[name]
    first = torch.bfloat16 if torch.bfloat16 in op.dtypes else op.dtypes[0]
    for dtype in op.dtypes if every else [first]:
        for sizes in op.test_shapes if every and dtype == first else op.test_shapes[:1]:
            launch_as_recorded(op, sizes, dtype, gpu)


@pytest.mark.exhaustive
@pytest.mark.parametrize("T", [1, 40, 70])
@pytest.mark.parametrize("format", [None, "int4", "int8", "fp8"])
def test_experts_in_host_memory(format: str | None, T: int, gpu: Any) -> None:
    """Their kernels are compiled for a table of addresses, from which no fact about an expert's memory is taken."""
    gpu.driver.executes, op = False, OPS["expert_swiglu"]
    sizes = {"T": T, "H": 128, "I": 64, "E": 4, "K": 2, "gate_up": format, "down": format}
    args = inputs("expert_swiglu", sizes, GPU_DEVICE, torch.bfloat16)
    begin, kernels = len(gpu.driver.launches), []
    for on_host in ((), (1, 3), (2,)):
        op.run(**with_offload(args, on_host) if on_host else args)
        launched = [each for each in gpu.driver.launches[begin:] if "LAYOUT" in each.args]
        kernels.append([(each.kernel, each.args["LAYOUT"].table, each.launcher) for each in launched])
        begin = len(gpu.driver.launches)
    assert kernels[1] == kernels[2], "compiled again for other experts"
    names, tables = ([[each[at] for each in one] for one in kernels[:2]] for at in (0, 1))
    assert names[0] == names[1] and tables == [[False, False], [True, True]]


@pytest.fixture
def compile_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], None]:
    """An empty cache, and a function after whose call whatever is not in it raises an error."""
    from triton.backends.nvidia.compiler import CUDABackend

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    anew = mock.Mock(side_effect=AssertionError("compiled anew"))
    return lambda: monkeypatch.setattr(CUDABackend, "make_cubin", anew)


def test_kernels_compiled_ahead_are_not_compiled_again(gpu: Any, compile_nothing: Any) -> None:
    """The day compiles offline, on all cores; its launches find the kernels, those of other divisibility too."""
    op, dtype = OPS["rms_norm"], torch.bfloat16
    shapes = [{"T": T, "H": H} for T, H in ((1, 64), (3, 64), (16, 64), (3, 72))]
    with record_launches() as recorded:
        for sizes in shapes:
            op.run(**op.inputs(sizes, dtype, "meta"))
    ahead = list(compile_launches(recorded, "sm_90"))
    assert (
        not [each for each in ahead if isinstance(each, Exception)] and len(ahead) == 2
    )  # H is a multiple of 16, or not
    compile_nothing()
    for sizes in shapes:
        launch_as_recorded(op, sizes, dtype, gpu)
    with pytest.raises(AssertionError, match="compiled anew"):
        launch_as_recorded(op, {"T": 3, "H": 256}, dtype, gpu)


def kernel_of(launched: Launch) -> tuple[Any, ...]:
    """What `compile_launches` compiles once."""
    source = compiler.source_of(launched, "sm_90")
    return launched.kernel, launched.dependent, compiler.kernel_key(launched, source), repr(source.attrs)


VERIFIED: dict[str, dict[str, Any]] = {"window": {"sliding_window": 7}, "8-bit cache": {}, "offload": {}}
VERIFIED["offload"] |= {"on_host": ((), (1,), ()), "num_hidden_layers": 3}
VERIFIED["quantized"] = {"hidden_size": 128, "intermediate_size": 128, "weights": {"experts": "int4", "linear": "int8"}}
VERIFIED["deterministic"] = {"deterministic": True, "weights": "fp8"}


@pytest.mark.slow
@pytest.mark.parametrize("case", VERIFIED)
def test_most_kernels_of_verify_are_compiled_ahead(case: str, gpu: Any) -> None:
    """Nothing is compiled here: kernels are compared."""
    model, ids = random_model("cuda", torch.bfloat16, **VERIFIED[case]), tokens(2, 33, device="cuda")
    cache_dtype, launched = torch.int8 if case == "8-bit cache" else None, set[Any]()

    def record(kernel: Any, grid: Any, args: Any, config: Any, dependent: bool) -> None:
        program = config.num_warps, config.num_stages
        launched.add(kernel_of(Launch(kernel.__name__, grid, *program, fn=kernel, args=args, dependent=dependent)))

    with torch.no_grad(), record_launches("sm_90", 132) as records:
        launch_calls(model, None, cache_dtype)
    ahead = {kernel_of(each) for each in records if each.fn is not None}
    dispatch = Calls.__torch_dispatch__

    def on_simulated_gpu(*args: Any) -> Any:
        with Factories():  # torch has disabled the mode
            return dispatch(*args)

    patch = mock.patch.object
    with patch(launch, "_launch_compiled", record), patch(Calls, "__torch_dispatch__", on_simulated_gpu):
        verify(model, ids, cache_dtype=cache_dtype)
    assert len(launched) > 40 and 3 * len(launched - ahead) <= len(launched)


COMMANDS: dict[str, tuple[str, ...]] = {
    "generate": ("--prompt", "x " * 50, "--max-new-tokens", "7"),
    "chat": ("--max-new-tokens", "40", "--context", "900"),
    "generate, nine windows": ("--batch", "-", "--batch-size", "2"),
}
COMMANDS["chat, a second turn"] = ("--max-new-tokens", "7", "--cache-dtype", "int8")


@pytest.mark.slow
@pytest.mark.parametrize("case", COMMANDS)
def test_a_command_compiles_nothing_after_what_it_compiles_ahead(
    case: str, gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, covers: Any
) -> None:
    shutil.copytree(SMALL, folder := tmp_path / "small")
    (folder / "chat_template.jinja").write_text("{% for each in messages %}{{ each.content }} {% endfor %}")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    if case == "chat":  # the cache grows
        file, config = folder / "config.json", json.loads((folder / "config.json").read_text())
        file.write_text(json.dumps(config | {"sliding_window": None}))
        monkeypatch.setattr(chat, "LEAST_SLOTS", 64)
    lines = ["x " * (3 + 7 * n % 40) for n in range(10)]
    if case == "chat, a second turn":  # over a ring
        lines = ["x " * 50, "y " * 150]
    if case == "generate, nine windows":
        monkeypatch.setattr(batch, "WINDOW", 2)
        lines = [json.dumps({"prompt": "x " * (1 + 11 * n % 90)}) for n in range(36)]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("".join(f"{line}\n" for line in lines).encode())))
    gpu.driver.executes = False  # results are undefined
    results = list[Any]()

    def compile_and_keep(*args: Any) -> Any:
        results.extend(kernels := compile_launches(*args))
        return kernels

    monkeypatch.setattr(compiler, "compile_launches", compile_and_keep)
    with compilations() as compiled:
        assert cli.main([case.partition(",")[0], str(folder), *COMMANDS[case]]) == 0
    late = [name for name, thread in compiled if thread is threading.main_thread()]
    covers("host", f"{case}: {len(compiled)} kernels compiled ahead, {len(late)} in the main thread")
    for error in results:  # one that a thread met would be late, too
        if isinstance(error, Exception):
            raise error
    assert not late, late
    assert len(compiled) > 5


def norm_launch(T: int, gpu: Any, offset: int = 0) -> tuple[Any, list[Any]]:
    """A norm of T rows, `offset` elements into their memory -> its compiled kernel, and the arguments that it took."""
    gpu.driver.executes = False
    x = torch.zeros(T * 64 + offset, dtype=torch.bfloat16).to(GPU_DEVICE)[offset:].view(T, 64)
    OPS["rms_norm"].run(x, torch.ones(64, dtype=torch.bfloat16).to(GPU_DEVICE), 1e-5)
    launched = gpu.driver.launches[-1]
    return launched.compiled(), list(launched.args.values())


def test_injected_fault_grid_or_arguments_that_the_kernel_does_not_take(gpu: Any) -> None:
    """The JIT looks at every pointer; whoever keeps a compiled kernel has to, too."""
    kernel, args = norm_launch(4, gpu)
    kernel[(1, GRID_MOST[1], 1)](*args)
    with pytest.raises(LaunchError, match=r"grid\.y is 65536, needs 1\.\.65535"):
        kernel[(1, GRID_MOST[1] + 1, 1)](*args)
    _, args = norm_launch(4, gpu, offset=4)
    with pytest.raises(LaunchError, match=r"misaligned address: x\.ptr"):
        kernel[(4, 1, 1)](*args)
    kernel, args = norm_launch(1, gpu)
    at = [parameter.name for parameter in norm.rms_norm_kernel.params].index("BLOCK_M")
    with pytest.raises(LaunchError, match="BLOCK_M is 64, and the kernel was compiled for"):
        kernel[(1, 1, 1)](*args[:at], 64, *args[at + 1 :])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"block_size": [1, 512, 1, 64]}, r"box \[1, 512, 1, 64\], needs 1\.\.256"),
        ({"block_size": [1, 128, 1, 128]}, "inner box of 256 bytes, needs at most its swizzle's 128"),
        ({"block_size": [1, 128, 1, 12]}, "inner box of 24 bytes, needs a multiple of 16"),
        ({"block_size": [128, 1, 64]}, "of 4 dimensions"),
        ({"strides": [4, 2, 1, 1]}, "strides .* needs multiples of 16 bytes"),
        ({"strides": [2**41, 128, 64, 1]}, r"below 2\^40"),
        ({"shape": [0, 40, 2, 64]}, r"sizes .* needs 1\.\.2\^32"),
        ({"shape": [1] * 6}, "rank 6, needs 1..5"),
        ({"offset": 4}, r"base 0x\w+8, needs a multiple of 16"),
    ],
)
def test_tensor_map_requirements(change: dict[str, Any], said: str) -> None:
    memory = torch.zeros(40 * 128 + 64, dtype=torch.bfloat16)
    base = memory[(-memory.data_ptr() // 2) % 8 :]
    good = {"base": base, "shape": [1, 40, 2, 64], "strides": [5120, 128, 64, 1]}
    meta = {"block_size": [1, 128, 1, 64], "swizzle": 3}
    check_descriptor("k_desc", SimpleNamespace(**good), meta)
    known = {name: change.get(name, value) for name, value in good.items()}
    known["base"] = base[change.get("offset", 0) :]
    with pytest.raises(LaunchError, match=said):
        check_descriptor("k_desc", SimpleNamespace(**known), meta | change)


KERNELS_MOST = 28  # of prompts up to 200 tokens


def kernels_of_prompts(gpu: Any, lengths: Sequence[int]) -> Counter[Any]:
    """What was compiled while a model wrote three tokens after a prompt of each length, by kernel, types and constants,
    whatever is known of the numbers it is called with."""
    gpu.driver.executes = False
    model = random_model("cuda", torch.bfloat16, **WIDER_SIZES)
    for length in lengths:
        model.generate(torch.zeros(1, length, dtype=torch.int64).to("cuda"), max_new_tokens=3)
    compiled: Counter[Any] = Counter()
    for fn in gpu.driver.kernels:
        declared = [(at,) for at, parameter in enumerate(fn.params) if parameter.is_constexpr]
        for cache, *_ in fn.device_caches.values():
            for kernel in cache.values():
                kinds = [kind for _, kind in flatten(kernel.src.signature)]
                pointers = [kind for kind in kinds if kind[0] in "*t"]
                constants = [kernel.src.constants[at] for at in declared]
                begins = getattr(kernel.metadata, "launch_pdl", False)  # before the launch in front of it has ended
                compiled[(fn.__name__, begins, *pointers, *map(str, constants))] += 1
    return compiled


@pytest.mark.slow
def test_prompts_of_any_length_share_their_kernels(gpu: Any, covers: Any) -> None:
    """Lengths, rows, slots are not compiled in: neither as 1 nor as a multiple of 16."""
    draw = random.Random(0)
    compiled = kernels_of_prompts(gpu, [draw.randint(1, 200) for _ in range(120)])
    covers("host", f"120 random prompts of up to 200 tokens: {compiled.total()} kernels compiled")
    assert not [kernel for kernel, times in compiled.items() if times > 1]
    assert compiled.total() <= KERNELS_MOST


@pytest.mark.slow
def test_injected_fault_specialized_length(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (rows,) = (parameter for parameter in router.gate_route_kernel.params if parameter.name == "T")
    monkeypatch.setattr(rows, "do_not_specialize", False)
    compiled = kernels_of_prompts(gpu, [70, 80])
    assert [kernel[0] for kernel, times in compiled.items() if times > 1] == ["gate_route_kernel"]


OTHER = torch.device("cuda", 1)  # the current one is cuda:0
IDS = torch.tensor([[3, 5, 7, 1], [2, 9, 11, 4]])


def build(device: Any) -> Mixtral:
    return random_model(device, num_hidden_layers=2, num_local_experts=2, sliding_window=3)


def run(device: Any) -> list[torch.Tensor]:
    """Logits without a cache, of a ragged chunk, and of the token after it."""
    model, ids = build(device), IDS.to(device)
    cache = KVCache(model.config, batch=2, device=device, dtype=torch.float32)
    chunk = model(ids, cache=cache, lengths=torch.tensor([4, 2], device=device))
    return [x.cpu() for x in (model(ids), chunk[0], chunk[1, :2], model(ids[:, :1], cache=cache))]


@pytest.mark.slow
def test_model_on_another_than_the_current_gpu(gpu: Any) -> None:
    got, want = run(OTHER), run("cpu")
    for ours, plain in zip(got, want, strict=True):
        assert (ours - plain).abs().max() <= 1e-4 * plain.abs().max()
    assert {launched.device for launched in gpu.driver.launches} == {1} and gpu.current == 0


def test_the_current_device_changes_only_for_another_gpu(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changing the current device costs host time: on the current one nobody does."""
    changes: list[int] = []
    monkeypatch.setattr(torch.cuda, "_exchange_device", lambda index: changes.append(index) or gpu.exchange(index))
    gpu.driver.executes = False
    for device, expected in (("cuda:0", []), ("cuda:1", [1])):
        x, weight = torch.ones(2, 16).to(device), torch.ones(16).to(device)
        changes.clear()
        ops.rms_norm(x, weight, 1e-5)
        assert changes == expected


def test_injected_fault_launch_on_the_wrong_gpu(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.ones(2, 16).to(OTHER), torch.ones(16).to(OTHER)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    with pytest.raises(LaunchError, match=r"x\.ptr is on cuda:1, the launch on cuda:0"):
        ops.rms_norm(x, weight, 1e-5)


def test_tensors_of_two_gpus_raise_value_error(gpu: Any) -> None:
    with pytest.raises(ValueError, match="argument 'weight' is on cuda:1, needs to be on cuda:0"):
        ops.rms_norm(torch.ones(2, 16).to("cuda:0"), torch.ones(16).to(OTHER), 1e-5)
    with pytest.raises(ValueError, match=r"'input_ids' is .* on cuda:0, needs .* on cuda:1"):
        build(OTHER)(IDS.to("cuda:0"))


def test_generate_reads_back_once_a_prompt_and_once_a_token(gpu: Any) -> None:
    gpu.driver.executes = False
    model = build("cuda:0")
    prompts = [row.to("cuda:0") for row in IDS]
    gpu.syncs.clear()
    model.generate(prompts, max_new_tokens=6)
    free = len([sync for sync in gpu.syncs if sync != "synchronize"])
    gpu.syncs.clear()
    model.generate(prompts, max_new_tokens=6, eos_token_id=23)
    assert free == 2, "the prompt, and the text at the end"
    assert len([sync for sync in gpu.syncs if sync != "synchronize"]) <= free + 6


@pytest.mark.slow
def test_an_applied_model_over_two_gpus(gpu: Any, make_hf: Any) -> None:
    """accelerate's hooks carry activations, masks and tables over; each layer's kernels run where its weights are."""
    accelerate = pytest.importorskip("accelerate")
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    eager = make_hf(num_local_experts=2)
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 1}
    places |= {"model.norm": 1, "lm_head": 1}
    with torch.no_grad():
        want = eager(IDS, attention_mask=mask).logits
        model = accelerate.dispatch_model(apply(make_hf(num_local_experts=2)), places)
        kwargs = {"attention_mask": mask.to("cuda:0")}
        got = model(IDS.to("cuda:0"), **kwargs).logits.cpu()
        text = model.generate(IDS.to("cuda:0"), **kwargs, max_new_tokens=2, do_sample=False).cpu()
        expected = eager.generate(IDS, attention_mask=mask, max_new_tokens=2, do_sample=False)
    assert (got - want)[mask.bool()].abs().max() <= 1e-4 * want.abs().max()
    assert torch.equal(text, expected)
    by_kernel = {(launched.kernel, launched.device) for launched in gpu.driver.launches}
    for kernel in ("attention_decode_kernel", "gate_route_kernel", "rms_norm_kernel", "rope_kernel"):
        assert {(kernel, 0), (kernel, 1)} <= by_kernel
    assert gpu.current == 0

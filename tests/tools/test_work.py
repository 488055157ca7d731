"""The work of launches: compared with costs and interpreted kernels; and the tiles that it makes the fastest."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from mixtral_triton.kernels import linear, reference
from mixtral_triton.kernels.arch import ARCHS
from mixtral_triton.kernels.experts import tiles as expert_tiles
from mixtral_triton.kernels.facts import facts_of
from mixtral_triton.kernels.launch import Launch, LaunchConfig, override_configs
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.tools.bench.cases import cases
from mixtral_triton.tools.offline import compile_launch
from mixtral_triton.tools.predict import count_work, row_tiles
from tests.compile.test_quantized_offline import instructions_a_byte
from tests.support.calls import Sizes
from tests.support.traffic import Traffic, count_traffic
from tests.tools.test_predict import BF16, LARGE, LAYER, Tile, microseconds, recorded, tiles


@pytest.mark.compiled
def test_bytes_of_launches_sum_to_the_operation_s_cost() -> None:
    """Beyond them lie the partial sums of splits, and x in sorted order."""
    for case in cases():
        args = case.inputs(torch.device("meta"))
        with record_launches() as launches, torch.no_grad():
            case.op.run(**args)
        bytes = sum(count_work(launch).memory for launch in launches)
        assert 0.9999 <= bytes / case.cost().bytes < 1.07, (case.op.name, case.as_dict())


@pytest.mark.compiled
def test_every_launch_of_the_registry_has_work() -> None:
    for op in OPS.values():
        for sizes in (*op.test_shapes, *op.bench_shapes):
            for dtype in op.dtypes:
                args = op.inputs(sizes, dtype, torch.device("meta"))
                with record_launches() as launches:
                    op.run(**args)
                for launch in launches:
                    work = count_work(launch)
                    assert work.memory > 0 and work.programs > 0 and work.loaded > 0
                    # What multiplies tiles has a formula of its own: it does not stream its tensors.
                    source = "" if launch.fn is None else launch.fn.src
                    declared = launch.fn is None or not (callable(work := facts_of(launch.kernel).work) or work is None)
                    assert declared or ("tl.dot" not in source and "add_products" not in source)
    with pytest.raises(ValueError, match=r"^count_work: kernel is 'new_kernel', needs one .*: .*aten::mm"):
        count_work(Launch("new_kernel", (1,)))


@pytest.mark.compiled
@pytest.mark.parametrize(("T", "rows"), [(7, 4), (64, 16), (300, 128)])
def test_row_tiles_are_those_of_random_routing(T: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    groups = torch.rand(2000, T, 8, generator=generator).argsort(-1)[..., :2].flatten(1)
    counts = torch.stack([(groups == expert).sum(1) for expert in range(8)])
    whole = -(-counts // rows)
    expected = float(whole.sum(0).double().mean())
    assert row_tiles(T, 2 / 8, 8, rows) == pytest.approx({rows: expected}, rel=0.01)
    assert row_tiles(T, 1.0, 2, rows) == {rows: 2 * math.ceil(T / rows)}
    half = rows // 2
    short = float(((counts % rows > 0) & (counts % rows <= half)).sum(0).double().mean())
    found = row_tiles(T, 2 / 8, 8, rows, (half, rows))
    assert found == pytest.approx({rows: expected - short, half: short}, abs=0.05)


TALL: Tile = (192, 256, 64, 8, 4)
KEYS = "q", "keys.k", "keys.v", "k", "v"  # the last two by descriptors
COUNTED = [
    ("linear", {"T": 128, "H": 256, "N": 128, "deterministic": True}, ("x", "weight"), 1.0),
    ("linear", {"T": 16, "H": 512, "N": 64}, ("x", "weight"), 1.0),
    ("linear", {"T": 16, "H": 512, "N": 64, "weight": "int4:128"}, ("x", "weight", "weight.scales"), 1.0),
    ("linear", {"T": 128, "H": 512, "N": 64, "weight": "int8"}, ("x", "weight", "weight.scales"), 1.0),
    (
        "attention",
        {"B": 1, "T": 512, "S": 512, "Hq": 2, "Hkv": 1, "D": 64, "window": 0},
        KEYS,
        1.1,
    ),
    (
        "attention",
        {"B": 1, "T": 512, "S": 512, "Hq": 2, "Hkv": 1, "D": 64, "window": 100},
        KEYS,
        1.4,
    ),
    (
        "attention",
        {"B": 2, "T": 1, "S": 1024, "Hq": 16, "Hkv": 1, "D": 64, "window": 0},
        KEYS,
        1.0,
    ),
]


@pytest.mark.interpreted
@pytest.mark.parametrize(("name", "sizes", "tensors", "most"), COUNTED)
def test_formulas_match_interpreted_kernels(name: str, sizes: Sizes, tensors: tuple[str, ...], most: float) -> None:
    """Exactly where tiles are full; of attention keys outside the mask are in the formula and not in the count."""
    args = OPS[name].inputs(sizes, BF16, "cpu", torch.Generator().manual_seed(0))
    with count_traffic() as traffic, record_launches() as launches:
        OPS[name].run(**args)
    work, kernel = count_work(launches[0]), traffic.kernels[0]
    loaded = sum(argument.loaded for key, argument in kernel.arguments.items() if key in tensors)
    assert 1.0 <= work.loaded / loaded <= most
    assert kernel.flops <= work.flops <= most * kernel.flops


def run_experts(ids: torch.Tensor, E: int, **sizes: int) -> tuple[dict[str, Any], Any, Traffic, list[Launch]]:
    """Interpret the expert layer with these routes -> its arguments, result, traffic and launches."""
    shape = {**sizes, "T": len(ids), "E": E, "K": ids.shape[1]}
    args = OPS["expert_swiglu"].inputs(shape, BF16, "cpu", torch.Generator().manual_seed(1)) | {"ids": ids}
    with count_traffic() as traffic, record_launches() as launches:
        out = OPS["expert_swiglu"].run(**args)
    return args, out, traffic, [launch for launch in launches if launch.grid]


@pytest.mark.interpreted
@pytest.mark.parametrize("T", [64, pytest.param(960, marks=pytest.mark.slow)])
def test_expert_formulas_match_interpreted_kernels(T: int) -> None:
    """Even routes, as the formulas expect of random ones."""
    *_, traffic, launches = run_experts(torch.arange(2 * T, dtype=torch.int32).view(T, 2) % 8, 8, H=256, I=256)
    checked = 0
    for launch, kernel in zip(launches, traffic.kernels, strict=True):
        if launch.kernel.startswith(("experts_up", "experts_down")):
            names, work = {"x", "h", "short", "gate_up", "down"}, count_work(launch)
            loaded = sum(one.loaded for name, one in kernel.arguments.items() if name in names)
            assert work.loaded == pytest.approx(loaded, rel=0.1)
            assert work.flops == pytest.approx(kernel.flops, rel=0.1)
            checked += 1
    assert checked == 2


GROUPS = (0, 1, 64, 65, 128, 129, 192, 193, 257, 330, 384)  # rows of an expert: short, upper part, whole, and more


@pytest.mark.interpreted
@pytest.mark.exhaustive
@pytest.mark.parametrize("block_m", [128, 192])
def test_last_tiles_of_every_height(block_m: int) -> None:
    """A group's last tile rounds up to 64 rows, or to 128 where they fit a tile's upper part; results are right."""
    ids = torch.repeat_interleave(torch.arange(len(GROUPS)), torch.tensor(GROUPS)).int()
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))][:, None]
    with override_configs(tiles((block_m, 32, 64, 8, 4), 64)):
        args, got, traffic, _ = run_experts(ids, len(GROUPS), H=64, I=48)
    wide = {name: x.double() if x.is_floating_point() else x for name, x in args.items()}
    exact, plain = reference.expert_swiglu(**wide), reference.expert_swiglu(**args)
    error, allowed = ((x.double() - exact).abs().max() for x in (got, plain))
    assert error <= 2 * allowed
    rows = sum(-(-group // 64) * 64 for group in GROUPS)  # for tiles of 128 and 192 alike
    assert traffic.flops == rows * 2 * (64 * 96 + 64 * 64)  # H x 2I, and I in a depth of 64 x H


@pytest.mark.compiled
@pytest.mark.parametrize("format", ["int4:128", None])
def test_padding_of_few_rows_is_multiplied_and_not_loaded(format: str | None) -> None:
    one, many = (count_work(recorded("linear", {"T": T, "H": 512, "N": 64, "weight": format})[0]) for T in (1, 4))
    assert many.loaded - one.loaded == one.programs * 3 * 512 * 2 and many.flops == one.flops


@pytest.mark.compiled
@pytest.mark.parametrize(("B", "T", "rows"), [(1, 128, 64), (1, 500, 64), (1, 1024, 64), (8, 512, 64), (1, 8192, 128)])
def test_attention_uses_the_faster_of_two_tiles(B: int, T: int, rows: int) -> None:
    """Two small programs an SM hide each other's softmax, and read the keys twice as often."""
    sizes = {"B": B, "T": T, "S": T, "Hq": 32, "Hkv": 8, "D": 128, "window": 0}
    (launch,) = recorded("attention", sizes)
    configs = {m: LaunchConfig({"BLOCK_M": m, "BLOCK_N": 128, "BLOCK_D": 128}, m // 16, m // 64) for m in (64, 128)}
    times = {m: microseconds("attention", sizes, attention_prefill_kernel=config) for m, config in configs.items()}
    assert launch.constexprs["BLOCK_M"] == rows == min(times, key=lambda m: times[m])


@pytest.mark.compiled
@pytest.mark.parametrize("T", [128, 256, 384, 512, 1024, 1536, 4096])
@pytest.mark.parametrize("width", [(4096, 14336), (6144, 16384)])
def test_prefill_uses_the_best_of_three_tiles(T: int, width: tuple[int, int]) -> None:
    sizes = LAYER | {"T": T, "H": width[0], "I": width[1]}
    times = [microseconds("expert_swiglu", sizes, **tiles((64, 128, 64, 4, 4)))]
    times += [microseconds("expert_swiglu", sizes, **tiles(tile, 64)) for tile in (LARGE, TALL)]
    assert microseconds("expert_swiglu", sizes) <= 1.01 * min(times)  # at T = 256 two tiles differ by less


@pytest.mark.compiled
def test_x_is_gathered_where_tma_reads_it() -> None:
    """Elsewhere a sort without x: by pointers, of quantized weights, on GPUs without TMA, and in fp32."""
    sizes = expert_tiles.ExpertSizes(
        512, **LAYER, gate_up=None, down=None, by_pointers=False, deterministic=False, norm=False
    )
    gathered = [(arch, sizes, BF16) for arch in ("sm_90", "sm_100")]
    others = replace(sizes, by_pointers=True), replace(sizes, gate_up="int8", down="int8")
    sorted_alone = [("sm_90", other, BF16) for other in others]
    sorted_alone += [("sm_80", sizes, BF16), ("gfx942", sizes, BF16), ("sm_90", sizes, torch.float32)]
    for arch, sizes, dtype in (*gathered, *sorted_alone):
        gathers = "gather_by_expert_kernel" in expert_tiles.configs(sizes, dtype, arch)
        assert gathers == ((arch, sizes, dtype) in gathered), (arch, sizes, dtype)


@pytest.mark.compiled
def test_two_programs_of_32_tokens_fit_an_sm() -> None:
    for launch in recorded("expert_swiglu", LAYER | {"T": 32})[:2]:
        assert 2 * (count_work(launch).shared + 1024) < ARCHS["sm_90"].shared_bytes + 1024


# Thread instructions that a byte of a dense weight may cost, of which an H200 has 6.0 to spare and a B200 4.4.
A_BYTE = 2.5


@pytest.mark.exhaustive
@pytest.mark.compiled
@pytest.mark.parametrize("T", [1, 9, 16, 32, 64])
def test_masks_cost_few_instructions(T: int, monkeypatch: pytest.MonkeyPatch, covers: Any) -> None:
    monkeypatch.setattr(linear, "use_skinny_kernel", lambda *sizes: True)
    for name in ("linear", "expert_swiglu"):
        sizes = {"H": 4096, "N": 6144} if name == "linear" else LAYER
        for launch in recorded(name, {"T": T, **sizes}):
            if "decode" not in launch.kernel:
                continue
            (loop,) = compile_launch(launch, "sm_90").loops
            figure = instructions_a_byte(launch, "sm_90")
            assert figure <= A_BYTE and not loop.spills, (launch.kernel, figure)
            covers("main loops", f"{launch.kernel}, T {T}: {figure:.2f} thread instructions a byte (bound {A_BYTE})")

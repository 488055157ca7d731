"""A model on a mesh of processes is compared with the same on one process and with transformers, over gloo:
the same texts and reports, and no endless wait."""

import itertools
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtral_triton import Mixtral, MixtralConfig
from mixtral_triton.checkpoint.shard import Shard
from mixtral_triton.checkpoint.tensors import qkv_rows
from mixtral_triton.cli.commands import SMALL
from mixtral_triton.quantize import QUANTIZED_PARTS
from tests.cli.commands import ROOT, python
from tests.support import hub
from tests.support import ranks as work
from tests.support.ranks import Ranks

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.compiled

# The vocabulary is no multiple of four, and there are fewer key-value heads than four ranks.
BASE: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
BASE |= {"num_attention_heads": 8, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
BASE |= {"max_position_embeddings": 32, "sliding_window": 6, "bos_token_id": 0, "eos_token_id": None}
BASE |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
CONFIGS: dict[str, dict[str, Any]] = {
    "window": {},
    "no window, tied": {"sliding_window": None, "tie_word_embeddings": True},
    "wide": {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32},  # for groups of int4
    "narrow": {"intermediate_size": 128},  # whose rows are one group of int4
    # Norms of each head, which all ranks have.
    "qwen3": {"model_type": "qwen3_moe", "moe_intermediate_size": 24, "num_experts": 4, "norm_topk_prob": True},
}
MESHES = {"tp 2": {"tp": 2}, "tp 4": {"tp": 4}, "ep 2": {"ep": 2}, "ep 4": {"ep": 4}, "ep 2 x tp 2": {"ep": 2, "tp": 2}}
IDS = torch.randint(50, (2, 10), generator=torch.Generator().manual_seed(1))
NO_ANSWER = "another rank is gone or does not answer: "
Checkpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(4, tmp_path_factory.mktemp("store") / "store")
    yield started
    started.end()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Return a folder that transformers wrote, per expert or fused, in several shards, by the name of a config."""
    built: dict[tuple[str, bool], Path] = {}

    def make(name: str = "window", per_expert: bool = True) -> Path:
        if (name, per_expert) not in built:
            torch.manual_seed(0)
            settings = {"model_type": "mixtral"} | BASE | CONFIGS[name] | {"dtype": "float32"}
            theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**settings))
            for key, weight in theirs.named_parameters():
                scale = 1.0 if "embed" in key else 2.0 * weight.shape[-1] ** -0.5
                weight.data.normal_(0, scale) if weight.dim() > 1 else weight.data.uniform_(0.7, 1.3)
            built[name, per_expert] = folder = tmp_path_factory.mktemp("checkpoint")
            theirs.save_pretrained(folder, save_original_format=per_expert, max_shard_size="60KB")
        return built[name, per_expert]

    return make


def close(got: torch.Tensor, want: torch.Tensor, limit: float = 1e-5) -> None:
    assert got.shape == want.shape and (got - want).abs().max() <= limit * want.abs().max()


def check_logits(rank: dict[str, Any], want: torch.Tensor) -> None:
    """Without a cache, over one in chunks and steps, and of one token of one sequence."""
    close(rank["logits"], want)
    close(rank["cached"], want)
    close(rank["one token"], want[:1, :1])


def expert_bytes(sizes: dict[str, int]) -> int:
    return sum(size for name, size in sizes.items() if name.endswith(("gate_up_proj", "down_proj")))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "per_expert"), [("window", True), ("no window, tied", False), ("qwen3", True)])
@pytest.mark.parametrize("mesh", MESHES)
def test_mesh_equals_one_rank(mesh: str, name: str, per_expert: bool, ranks: Ranks, checkpoint: Checkpoint) -> None:
    folder = checkpoint(name, per_expert)
    found, model = ranks(work.everything, folder, IDS, **MESHES[mesh]), Mixtral.from_pretrained(folder, "cpu")
    want = model(IDS)
    for rank in found:  # all hold the same bits, and one rank's numbers
        check_logits(rank, want)
        first = found[rank["first"]]
        assert all(torch.equal(rank[what], first[what]) for what in ("logits", "cached", "greedy"))
        assert torch.equal(rank["greedy"], model.generate(IDS[:, :4], max_new_tokens=8))
        assert torch.equal(rank["turn"], work.two_turns(model, IDS, cached=False))
        close(rank["scores"], want[:, :-1].log_softmax(-1).gather(2, IDS[:, 1:, None])[..., 0])
    settings = {"dtype": torch.float32, "attn_implementation": "eager"}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, **settings)
    with torch.no_grad():
        close(found[-1]["logits"], theirs(IDS).logits)
    n, tied = math.prod(MESHES[mesh].values()), model.config.tie_word_embeddings
    whole = {name: weight.nbytes for name, weight in model.named_weights().items()}
    for rank in found:
        # Two a layer, and the logits; nothing else.
        sums = {"all_reduce": 2 * model.config.num_hidden_layers}
        assert rank["calls"] == (sums if tied else sums | {"all_gather": 1})
        kept = sum(rank["bytes"].values())
        assert expert_bytes(rank["bytes"]) <= 1.02 / n * expert_bytes(whole) and rank["read"] <= 1.05 * kept
        assert rank["cache"] == found[0]["cache"]
    assert sum(rank["read"] for rank in found[:n]) >= sum(whole.values())  # between them they read all


def part_of(whole: torch.Tensor, name: str, shard: Shard, config: MixtralConfig) -> torch.Tensor:
    """The rank's part of a weight [...,N,K] or of what has a value for each of its elements."""
    inner, rows, all_rows = shard.inner(config), shard.qkv_rows(config), qkv_rows(config)
    if name.endswith("qkv_proj"):
        return torch.cat([whole[:, all_rows[key]][:, rows[key]] for key in rows], 1)
    if name == "lm_head":
        return whole[:, shard.vocabulary(config)]
    if name.endswith("o_proj"):
        return whole[..., rows["q"]]
    whole = whole[:, shard.experts(config)]
    if name.endswith("down_proj"):
        return whole[..., inner]
    return torch.cat([half[:, :, inner] for half in whole.chunk(2, 2)], 2)


@pytest.mark.exhaustive
@pytest.mark.parametrize("format", ["int4", "int8", "fp8"])
@pytest.mark.parametrize(
    ("mesh", "name", "per_expert"),
    [("tp 2", "wide", True), ("tp 2", "narrow", False), ("ep 2", "wide", False), ("ep 2 x tp 2", "narrow", True)],
)
def test_the_parts_are_of_what_one_process_quantizes(
    format: str, mesh: str, name: str, per_expert: bool, ranks: Ranks, checkpoint: Checkpoint
) -> None:
    """Bit for bit, also of a row that is split and has one scale: that is of the whole row. A rank keeps its part."""
    folder, weights = checkpoint(name, per_expert), {"experts": format, "linear": format}
    model = Mixtral.from_pretrained(folder, "cpu", weights=weights)
    whole, want = work.values_and_scales(model), model(IDS)
    most = 1.05 / math.prod(MESHES[mesh].values()) * expert_bytes(work.kept_bytes(model))
    for shard, found, kept, logits in ranks(work.quantized_parts, folder, IDS, weights=weights, **MESHES[mesh]):
        close(logits, want)
        assert name == "narrow" or expert_bytes(kept) <= most  # each part of a row that is split keeps its scale
        assert {part.rpartition(".")[2] for part in found} == {*itertools.chain(*QUANTIZED_PARTS.values())}
        for part, got in found.items():
            assert torch.equal(got, part_of(whole[part], part, shard, model.config)), part


CUT = "mesh cuts the 256 columns of layers.0.down_proj into 64 a rank, needs a multiple of the group, 128"
# Attention's 128 columns are one group, or block, of 128: each part of a row keeps its scale.
LAYOUTS = ["ct fp8 channel", "ct fp8 block", "autofp8", "ct int4 32 True", "ct int4 -1 True", "ct pack int8"]
LAYOUTS += ["gptq 64 0", "gptq 128 1", "awq 32", "awq 128"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoints_of_the_hub(layout: str, ranks: Ranks, tmp_path: Path) -> None:
    hub.write(tmp_path, *hub.LAYOUTS[layout])
    ids = IDS % hub.SIZES["vocab_size"]
    want = Mixtral.from_pretrained(tmp_path, "cpu", torch.float32)(ids)
    for mesh in ({"tp": 2}, {"ep": 2}):
        for (got,) in ranks(work.logits, tmp_path, [ids], dtype=torch.float32, **mesh):
            close(got, want)
        assert all(read <= 1.05 * kept for read, kept in ranks(work.read_and_kept, tmp_path, **mesh))


@pytest.mark.filterwarnings("ignore:.*quantized anew")
def test_a_rank_quantizes_anew_what_one_process_does(ranks: Ranks, tmp_path: Path) -> None:
    hub.write(tmp_path, hub.gptq(64, reorder=True), hub.gptq_config(64, desc_act=True))
    ids, options = IDS % hub.SIZES["vocab_size"], {"dtype": torch.float32, "weights": "int8"}
    want = Mixtral.from_pretrained(tmp_path, "cpu", **options)(ids)
    for (got,) in ranks(work.logits, tmp_path, [ids], tp=2, **options):
        close(got, want)


def test_a_group_is_never_cut(ranks: Ranks, checkpoint: Checkpoint) -> None:
    said = ranks(work.refusal, checkpoint("wide"), weights="int4", tp=4)  # 256 columns in groups of 128
    assert set(said) == {f"Mixtral.from_pretrained: {CUT}"}


@pytest.mark.parametrize("mesh", ["tp 4", "ep 2 x tp 2"])
def test_deterministic(mesh: str, ranks: Ranks, checkpoint: Checkpoint) -> None:
    """With four ranks the order of an all-reduce would depend on the size of the batch."""
    texts = [IDS, IDS[:1], IDS[1:]]
    want = Mixtral.from_pretrained(checkpoint(), "cpu")(IDS)
    for whole, *alone in ranks(work.logits, checkpoint(), texts, deterministic=True, **MESHES[mesh]):
        close(whole, want)
        assert torch.equal(torch.cat(alone), whole)


SIZES = [
    ({"num_attention_heads": 6, "num_key_value_heads": 2}, {"tp": 4}, "num_attention_heads is 6, needs a multiple of"),
    ({"num_attention_heads": 12, "num_key_value_heads": 6}, {"tp": 4}, "num_key_value_heads is 6, needs a multiple or"),
    ({"num_local_experts": 6}, {"ep": 4}, "num_local_experts is 6, needs a multiple of 4"),
    ({"intermediate_size": 23}, {"tp": 2}, "intermediate_size is 23, needs a multiple of 2"),
    ({"vocab_size": 3}, {"tp": 2, "ep": 2}, "vocab_size is 3, needs at least 4"),
]


@pytest.mark.parametrize(("sizes", "mesh", "message"), SIZES, ids=[message for _, _, message in SIZES])
def test_sizes_that_the_ranks_do_not_divide(sizes: dict[str, int], mesh: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"mesh has tp .* ranks: {message}"):
        Shard(**mesh).check(MixtralConfig(**{"rope_theta": 1e4, "head_dim": 4} | sizes))


@pytest.mark.slow
def test_what_is_refused(ranks: Ranks, checkpoint: Checkpoint) -> None:
    folder = checkpoint()
    for said in ranks(work.refusal, folder, given="tp", tp=2):
        assert "mesh is 'tp', needs a torch.distributed.device_mesh.DeviceMesh with this rank, of dimensions" in said
    for said in ranks(work.refusal, folder, root=True, tp=2):
        assert "mesh is DeviceMesh(" in said and "replica" in said
    assert all("device" in said and "cuda" in said for said in ranks(work.refusal, folder, device="cuda", tp=2))
    assert all("dispatch mode" in said for said in ranks(work.watched, folder, IDS, tp=2))


@pytest.mark.slow
@pytest.mark.parametrize("reason", ["no such file", "cut off", "num_attention_heads"])
def test_what_is_bad_for_one_rank_ends_all(reason: str, ranks: Ranks, checkpoint: Checkpoint, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(checkpoint(), bad)
    shard, config = next(bad.glob("*00002*.safetensors")), bad / "config.json"
    if reason == "no such file":
        shard.unlink()
    elif reason == "cut off":
        shard.write_bytes(shard.read_bytes()[:-4])
    else:
        config.write_text(config.read_text().replace('"num_attention_heads": 8', '"num_attention_heads": 9'))
    for said in ranks(work.refusal, checkpoint(), bad={2: bad}, tp=4):
        assert said.startswith("rank 2 of 4: ") and reason in said and "\n" not in said


@pytest.mark.slow
def test_a_rank_that_does_not_come_or_is_never_done(ranks: Ranks, checkpoint: Checkpoint) -> None:
    for rank, said in enumerate(ranks(work.silent, checkpoint(), IDS, tp=4)[:3]):
        assert said.startswith(f"rank {rank} of 4: {NO_ANSWER}")
    for rank, said in enumerate(ranks(work.stuck, checkpoint(), tp=4)):
        assert said == f"rank {rank} of 4: {NO_ANSWER}its part of an all-reduce did not arrive"


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("fault", "mesh"),
    [
        (work.swap_gate_and_up, "tp 2"),
        (work.swap_gate_and_up, "ep 2"),
        (work.shift_heads, "tp 4"),
        (work.shift_experts, "ep 2"),
        (work.halve_sums, "tp 2"),
        (work.keep_single_rows, "ep 2"),
    ],
)
def test_a_fault_of_one_rank_shows_beside_one_process(fault: Any, mesh: str, ranks: Ranks, checkpoint: Any) -> None:
    found = ranks(work.everything, checkpoint(), IDS, fault=fault, **MESHES[mesh])[-1]
    with pytest.raises(AssertionError):
        check_logits(found, Mixtral.from_pretrained(checkpoint(), "cpu")(IDS))


def test_verify_refuses_a_mesh_by_name(ranks: Ranks, checkpoint: Checkpoint) -> None:
    needs = "needs a Mixtral of one process, or its folder"
    for rank, said in enumerate(ranks(work.verified, checkpoint(), tp=4)):
        assert said == f"verify: target is a Mixtral on a mesh (rank {rank} of 4), {needs}"


@pytest.mark.slow
def test_ranks_draw_the_tokens_of_the_first(ranks: Ranks, checkpoint: Checkpoint) -> None:
    for fault in (None, work.skip_broadcast):
        first, second, *_ = ranks(work.drawn, checkpoint(), IDS, fault=fault, tp=2)
        assert torch.equal(first, second) == (fault is None)


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "deterministic"), [("tp 2", False), ("ep 2 x tp 2", True)])
def test_decode_step_is_a_graph(mesh: str, deterministic: bool, ranks: Ranks, checkpoint: Checkpoint) -> None:
    """What the ranks send is in it, and goes when it is replayed."""
    folder = checkpoint()
    want = Mixtral.from_pretrained(folder, "cpu").generate(IDS[:, :4], max_new_tokens=8)
    for text, replays, calls in ranks(work.replayed, folder, IDS[:, :4], deterministic=deterministic, **MESHES[mesh]):
        assert torch.equal(text, want) and replays == 6
        sums = "all_gather" if deterministic else "all_reduce"
        layers = BASE["num_hidden_layers"]
        # The prompt, the first step, and the replays: in the capture itself nothing is sent.
        assert calls["broadcast"] == 2 + replays and calls[sums] >= 2 * layers * (2 + replays)


THREADS = """
import atexit, sys
from pathlib import Path

def threads():
    return sum("gloo" in task.read_text() for task in Path("/proc/self/task").glob("*/comm"))

counts = []
atexit.register(lambda: print(*counts, threads()))  # before the imports, since what is registered first runs last

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))

from mixtral_triton import SMALL, Mixtral  # which takes longer than a thread to name itself

counts.append(threads())
model = Mixtral.from_pretrained(SMALL, mesh=mesh)
counts.append(threads())
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_thread_of_a_group_outlives_the_program(tmp_path: Path) -> None:
    """A gloo thread that frees a tensor while the interpreter shuts down aborts the process; the model lives until
    then."""
    before, during, after = map(int, python("-c", THREADS, tmp_path / "store", GLOO_SOCKET_IFNAME="lo").stdout.split())
    assert after <= before < during


@pytest.mark.slow
def test_the_example_prints_one_text_of_two_processes(tmp_path: Path) -> None:
    theirs = transformers.MixtralForCausalLM.from_pretrained(SMALL, dtype=torch.float32)
    theirs.save_pretrained(tmp_path)  # sums of 16 bits would depend on how many processes add
    transformers.AutoTokenizer.from_pretrained(SMALL).save_pretrained(tmp_path)
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", 2)
    run = python(*torchrun, ROOT / "examples" / "mesh.py", tmp_path, GLOO_SOCKET_IFNAME="lo", CUDA_VISIBLE_DEVICES="")
    assert run.returncode == 0, run.stderr
    model = Mixtral.from_pretrained(tmp_path, "cpu")
    prompt = model.tokenizer("The return statement", return_tensors="pt")
    assert run.stdout == f"{model.tokenizer.decode(model.generate(**prompt, max_new_tokens=32)[0])}\n"

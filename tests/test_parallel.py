"""A model on a mesh of processes beside the same on one, and beside transformers: gloo, on this CPU."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtral_triton import Mixtral, MixtralConfig
from mixtral_triton.cli import SMALL, main
from mixtral_triton.kernels.launch import INTERPRETED
from mixtral_triton.parallel import Shard, traffic
from tests import hub
from tests.ranks import Ranks, everything, logits, read_and_kept, refusal, renamed, replayed, silent, stuck, watched

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(
    INTERPRETED or sys.platform == "win32", reason="about what ranks keep and send: run once, without the interpreter"
)

BASE: dict[str, Any] = {
    "vocab_size": 50,  # no multiple of four
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,  # fewer than four ranks
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
    "sliding_window": 6,
    "bos_token_id": 0,
    "eos_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "window": {},
    "no window, tied": {"sliding_window": None, "tie_word_embeddings": True},
    "wide": {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32},  # for groups of int4
}
MESHES = {"tp 2": {"tp": 2}, "tp 4": {"tp": 4}, "ep 2": {"ep": 2}, "ep 4": {"ep": 4}, "ep 2 x tp 2": {"ep": 2, "tp": 2}}
IDS = torch.randint(50, (2, 10), generator=torch.Generator().manual_seed(1))
Checkpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(4, tmp_path_factory.mktemp("store") / "store")
    yield started
    started.end()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """By the name of a config: a folder that transformers wrote, per expert or fused, in several shards."""
    made: dict[tuple[str, bool], Path] = {}

    def make(name: str = "window", per_expert: bool = True) -> Path:
        if (name, per_expert) not in made:
            torch.manual_seed(0)
            config = transformers.MixtralConfig(**BASE | CONFIGS[name] | {"dtype": "float32"})
            theirs = transformers.MixtralForCausalLM(config)
            for key, weight in theirs.named_parameters():
                scale = 1.0 if "embed" in key else 2.0 * weight.shape[-1] ** -0.5
                weight.data.normal_(0, scale) if weight.dim() > 1 else weight.data.uniform_(0.7, 1.3)
            made[name, per_expert] = folder = tmp_path_factory.mktemp("checkpoint")
            theirs.save_pretrained(folder, save_original_format=per_expert, max_shard_size="60KB")
        return made[name, per_expert]

    return make


def close(got: torch.Tensor, want: torch.Tensor, limit: float = 1e-5) -> None:
    assert got.shape == want.shape and (got - want).abs().max() <= limit * want.abs().max()


def whole_bytes(model: Mixtral, *parts: str) -> int:
    return sum(place.nbytes for name, place in model.places().items() if name.endswith(parts))


def alike(found: list[dict[str, Any]], model: Mixtral, limit: float = 1e-5) -> None:
    """All ranks hold the same bits, and one rank's numbers."""
    want = model(IDS)
    for rank in found:
        close(rank["logits"], want, limit)
        close(rank["cached"], want, limit)
        first = found[rank["first"]]
        assert all(torch.equal(rank[what], first[what]) for what in ("logits", "cached", "greedy", "drawn"))
        assert torch.equal(rank["greedy"], model.generate(IDS[:, :4], max_new_tokens=8))


@pytest.mark.parametrize(("name", "per_expert"), [("window", True), ("no window, tied", False)])
@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_is_one_rank_and_transformers(
    mesh: str, name: str, per_expert: bool, ranks: Ranks, checkpoint: Checkpoint
) -> None:
    folder = checkpoint(name, per_expert)
    found, model = ranks(everything, folder, IDS, **MESHES[mesh]), Mixtral.from_pretrained(folder, "cpu")
    alike(found, model)
    theirs = transformers.MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        close(found[-1]["logits"], theirs(IDS).logits)
    n, tied = MESHES[mesh].get("tp", 1) * MESHES[mesh].get("ep", 1), model.config.tie_word_embeddings
    experts = whole_bytes(model, "gate_up_proj", "down_proj")
    for rank in found:
        # Two a layer, and the logits; nothing else.
        sums = {"all_reduce": 2 * model.config.num_hidden_layers}
        assert rank["calls"] == (sums if tied else sums | {"all_gather": 1})
        kept = sum(rank["bytes"].values())
        own = sum(size for key, size in rank["bytes"].items() if key.endswith(("gate_up_proj", "down_proj")))
        assert own <= 1.02 / n * experts and rank["read"] <= 1.05 * kept
        assert rank["cache"] == found[0]["cache"]
    assert sum(rank["read"] for rank in found[:n]) >= whole_bytes(model, "")  # between them they read all


@pytest.mark.parametrize("weights", ["int4", "int8", "fp8", {"experts": "int4", "linear": "int4"}], ids=str)
@pytest.mark.parametrize("mesh", ["tp 2", "ep 2"])
def test_quantized_while_it_is_read(mesh: str, weights: Any, ranks: Ranks, checkpoint: Checkpoint) -> None:
    """int4: the same codes as on one rank. A row of int8 or fp8 that is split has a scale in each part."""
    folder = checkpoint("wide")
    found = ranks(everything, folder, IDS, weights=weights, **MESHES[mesh])
    model = Mixtral.from_pretrained(folder, "cpu", weights=weights)
    split = mesh == "tp 2" and weights in ("int8", "fp8")
    if split:
        close(found[0]["logits"], model(IDS), 0.1)
        assert all(torch.equal(rank["logits"], found[0]["logits"]) for rank in found)
        exact = Mixtral.from_pretrained(folder, "cpu")(IDS)
        error, one = ((logits - exact).square().mean() for logits in (found[0]["logits"], model(IDS)))
        assert error < 1.5 * one
    else:
        alike(found, model)
    experts = whole_bytes(model, "gate_up_proj", "down_proj")
    for rank in found:
        own = sum(size for name, size in rank["bytes"].items() if name.endswith(("gate_up_proj", "down_proj")))
        assert own <= (1.05 if split else 1.02) / 2 * experts  # twice the scales


CUT = "mesh cuts the 256 columns of layers.0.down_proj into 64 a rank, needs a multiple of the group, 128"
# Those in groups or blocks of 128 with their experts alone: attention's 128 columns cannot be cut.
LAYOUTS = {"ct fp8 channel": "", "ct fp8 block": "experts", "autofp8": "", "ct int4 32 True": "", "ct int4 -1 True": ""}
LAYOUTS |= {"gptq 64 0": "", "gptq 128 1": "experts", "awq 32": "", "ct pack int8": ""}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoints_of_the_hub(layout: str, ranks: Ranks, tmp_path: Path) -> None:
    hub.write(tmp_path, *hub.LAYOUTS[layout], only=LAYOUTS[layout])
    ids = IDS % hub.SIZES["vocab_size"]
    want = Mixtral.from_pretrained(tmp_path, "cpu", torch.float32)(ids)
    for mesh in ({"tp": 2}, {"ep": 2}):
        for (got,) in ranks(logits, tmp_path, [ids], dtype=torch.float32, **mesh):
            close(got, want)
        assert all(read <= 1.05 * kept for read, kept in ranks(read_and_kept, tmp_path, **mesh))


def test_a_group_is_never_cut(ranks: Ranks, checkpoint: Checkpoint, tmp_path: Path) -> None:
    hub.write(tmp_path, *hub.LAYOUTS["awq 128"])
    assert all("leaves a rank 64 of its 128 columns: groups of 128" in said for said in ranks(refusal, tmp_path, tp=2))
    said = ranks(refusal, checkpoint("wide"), weights="int4", tp=4)  # 256 columns in groups of 128
    assert set(said) == {f"Mixtral.from_pretrained: {CUT}"}


@pytest.mark.parametrize("mesh", ["tp 4", "ep 2 x tp 2"])
def test_deterministic(mesh: str, ranks: Ranks, checkpoint: Checkpoint) -> None:
    """With four ranks the order of an all-reduce would depend on the size of the batch."""
    texts = [IDS, IDS[:1], IDS[1:]]
    want = Mixtral.from_pretrained(checkpoint(), "cpu")(IDS)
    for whole, *alone in ranks(logits, checkpoint(), texts, deterministic=True, **MESHES[mesh]):
        close(whole, want)
        assert torch.equal(torch.cat(alone), whole)


SIZES = [
    (
        {"num_attention_heads": 6, "num_key_value_heads": 2},
        {"tp": 4},
        "num_attention_heads is 6, needs a multiple of 4",
    ),
    ({"num_attention_heads": 12, "num_key_value_heads": 6}, {"tp": 4}, "num_key_value_heads is 6, needs a multiple or"),
    ({"num_local_experts": 6}, {"ep": 4}, "num_local_experts is 6, needs a multiple of 4"),
    ({"intermediate_size": 23}, {"tp": 2}, "intermediate_size is 23, needs a multiple of 2"),
    ({"vocab_size": 3}, {"tp": 2, "ep": 2}, "vocab_size is 3, needs at least 4"),
]


@pytest.mark.parametrize(("sizes", "mesh", "message"), SIZES, ids=[message for _, _, message in SIZES])
def test_sizes_that_the_ranks_do_not_divide(sizes: dict[str, int], mesh: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"mesh has tp .* ranks: {message}"):
        Shard(**mesh).check(MixtralConfig(**{"rope_theta": 1e4, "head_dim": 4} | sizes))


def test_what_is_refused(ranks: Ranks, checkpoint: Checkpoint) -> None:
    folder = checkpoint()
    for said in ranks(refusal, folder, given="tp", tp=2):
        assert "mesh is 'tp', needs a torch.distributed.device_mesh.DeviceMesh whose dimensions are named" in said
    assert all("mesh has dimensions named ('replica', 'tp')" in said for said in ranks(renamed, folder, tp=2))
    assert all("device" in said and "cuda" in said for said in ranks(refusal, folder, device="cuda", tp=2))
    for verified, watched_ in ranks(watched, folder, IDS, tp=2):
        assert "of a mesh, with a part of each weight" in verified and "dispatch mode" in watched_


def missing(folder: Path) -> str:
    next(folder.glob("*00002*.safetensors")).unlink()
    return "no such file"


def cut_off(folder: Path) -> str:
    shard = next(folder.glob("*00002*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-4])
    return "cut off"


def another_config(folder: Path) -> str:
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"num_attention_heads": 8', '"num_attention_heads": 9'))
    return "num_attention_heads"


@pytest.mark.parametrize("damage", [missing, cut_off, another_config])
def test_what_is_bad_for_one_rank_ends_all(
    damage: Callable[[Path], str], ranks: Ranks, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(checkpoint(), bad)
    why = damage(bad)
    for said in ranks(refusal, checkpoint(), bad={2: bad}, tp=4):
        assert said.startswith("rank 2 of 4: ") and why in said and "\n" not in said


def test_a_rank_that_does_not_come(ranks: Ranks, checkpoint: Checkpoint) -> None:
    *others, _ = ranks(silent, checkpoint(), IDS, tp=4)
    for rank, said in enumerate(others):
        assert said.startswith(f"rank {rank} of 4: another rank does not answer: ")


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("mesh", ["tp 2", "ep 2 x tp 2"])
def test_a_decode_step_is_a_graph_here_too(
    mesh: str, deterministic: bool, ranks: Ranks, checkpoint: Checkpoint
) -> None:
    """What the ranks send is in it: the host sends for the prompt, and for the first step, which is not replayed."""
    folder = checkpoint()
    want = Mixtral.from_pretrained(folder, "cpu").generate(IDS[:, :4], max_new_tokens=8)
    for text, replays, calls in ranks(replayed, folder, IDS[:, :4], deterministic=deterministic, **MESHES[mesh]):
        assert torch.equal(text, want) and replays == 6
        sums = "all_gather" if deterministic else "all_reduce"
        layers = BASE["num_hidden_layers"]
        # The prompt, the first step, and the capture of the others, in which nothing is sent yet.
        assert calls["broadcast"] == 2 + replays and calls[sums] >= 2 * layers * (2 + replays)


def test_a_wait_for_a_card_that_is_never_done_ends(ranks: Ranks, checkpoint: Checkpoint) -> None:
    for rank, said in enumerate(ranks(stuck, checkpoint(), tp=4)):
        assert said == f"rank {rank} of 4: another rank does not answer: its part of a sum did not come"


PROMPT = ("--device", "cpu", "--dtype", "float32", "--prompt", "The return statement", "--temperature", "0.8", "--json")


def test_torchrun_writes_the_same_text(capsys: pytest.CaptureFixture[str]) -> None:
    command = ("generate", str(SMALL), *PROMPT, "--max-new-tokens", "8")
    start = ("torch.distributed.run", "--nproc-per-node", "2", "-m", "mixtral_triton")
    run = subprocess.run(
        (sys.executable, "-m", *start, *command, "--ep", "2"),
        capture_output=True,
        text=True,
        timeout=100,
        env=one_thread(),
    )
    assert run.returncode == 0, run.stderr
    assert main(command) == 0
    alone, several = (json.loads(text) for text in (capsys.readouterr().out, run.stdout))
    assert alone["tokens"] == several["tokens"] and alone["text"] == several["text"]


def one_thread(**more: str) -> dict[str, str]:
    paths = os.pathsep.join(filter(None, sys.path))
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": paths, **more}


def test_a_killed_rank_ends_the_others() -> None:
    command = (sys.executable, "-m", "mixtral_triton", "generate", str(SMALL), *PROMPT[:-1], "--tp", "2")
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    first, second = (
        subprocess.Popen((*command, "--max-new-tokens", "1000"), env=one_thread(RANK=str(rank), **common), **pipes)
        for rank in range(2)
    )
    try:
        assert first.stdout is not None and first.stdout.read(len("The return statement") + 1)  # it writes
        second.send_signal(signal.SIGKILL)
        start = time.monotonic()
        _, stderr = first.communicate(timeout=60)
        assert time.monotonic() - start < 30 and first.returncode == 2
        assert "mixtral-triton generate: rank 0 of 2: rank 1 is gone: " in stderr.splitlines()[-1]
    finally:
        for one in (first, second):
            one.kill()
            one.communicate()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


ASKED = [
    (("--tp", "2"), {}, "--tp 2 times --ep 1 needs 2 processes, and torchrun started 1: torchrun --nproc-per-node 2"),
    (("--tp", "2"), {"WORLD_SIZE": "3", "RANK": "1"}, "rank 1 of 3: --tp 2 times --ep 1 needs 2 processes"),
    ((), {"WORLD_SIZE": "2", "RANK": "0"}, "rank 0 of 2: --tp 1 times --ep 1 needs 1 processes"),
    (("--ep", "0"), {}, "--ep is 0, needs at least 1"),
    (("--tp", "2", "--device", "cuda:1"), {"WORLD_SIZE": "2", "RANK": "1"}, "--device is 'cuda:1', needs cpu or cuda"),
]


@pytest.mark.parametrize(("options", "environment", "message"), ASKED, ids=[message for _, _, message in ASKED])
def test_processes_that_do_not_fit(
    options: tuple[str, ...],
    environment: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["generate", "--prompt", "x", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_traffic() -> None:
    """Of 8x7B over four: a ring sends 3/4 of a sum's 4096 numbers twice, two sums a layer; 3/4 of 32000 logits."""
    config = MixtralConfig(rope_theta=1e6)
    assert traffic(config, tp=2, ep=2) == traffic(config, tp=4)
    assert (traffic(config, tp=4).layer, traffic(config, tp=4).head) == (2 * 2 * 3 * 1024 * 2, 3 * 8000 * 2)
    assert (traffic(config).layer, traffic(config).head) == (0, 0)


def test_fit_prints_the_traffic(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "mixtral-8x7b", "--memory", "80", "--gpus", "4", "--context", "4096"]) == 0
    assert "a card sends 24.6 kB a layer, and 48.0 kB of logits." in capsys.readouterr().out
    assert main(["fit", "mixtral-8x7b", "--memory", "80", "--gpus", "4", "--context", "4096", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["sends_a_token"] == {"layer": 24576, "head": 48000}

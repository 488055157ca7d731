"""fit with experts in host memory: how many, their predicted speed across the link, and the command to run."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from mixtral_triton import KVCache, Mixtral
from mixtral_triton.cli import parser
from mixtral_triton.inputs import WEIGHT_FORMATS as FORMATS
from mixtral_triton.kernels.launch import INTERPRETED
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.tools.fit import format_specs
from mixtral_triton.tools.gpus import LINKS, find_gpu
from mixtral_triton.tools.work import count_work
from tests.tools.test_fit import SMALLER, fit

pytestmark = pytest.mark.skipif(INTERPRETED, reason="about sizes: run once, without the interpreter")

# Predicted, not measured: the least tokens/s of one sequence of 4,096 tokens, cautiously.
OFFLOADED = {
    ("rtx4080", "int4, linear int8"): (4, 7),
    ("rtx4090", "int4, linear int8"): (1, 25),
    ("rtx3090", "int4, linear int8"): (1, 20),
    ("rtx5090", "fp8"): (4, 7),
    ("h100", "as stored"): (2, 8),
}


@pytest.mark.parametrize(("gpu", "format"), OFFLOADED)
def test_experts_in_host_memory(gpu: str, format: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(fit(capsys, "--gpu", gpu, "--context", "4096", "--json")[1])
    one = next(one for one in found["formats"] if one["format"] == format)
    experts, least = OFFLOADED[gpu, format]
    offload, width = one["offload"], {"as stored": 2, "fp8": 1}.get(format, 0.5)
    assert (offload["experts"], offload["of"]) == (experts, 8)
    assert offload["host_bytes"] == experts * 32 * 3 * 4096 * 14336 * width
    assert least <= offload["tokens_per_second"][0] < offload["tokens_per_second"][1]
    # No quicker than the link at its full rate: 2 of 8 experts a token and layer, chosen uniformly.
    assert offload["tokens_per_second"][1] < LINKS[offload["link"]] / (offload["host_bytes"] / 4)
    # The fewest: one less does not fit.
    limit, each = 0.98 * find_gpu(gpu).bytes, offload["host_bytes"] / experts
    assert one["bytes"]["total"] - experts * each < limit < one["bytes"]["total"] - (experts - 1) * each


def test_offloading_is_the_command_to_run(capsys: pytest.CaptureFixture[str]) -> None:
    status, text = fit(capsys, "mixtral-8x7b", "--gpu", "rtx4090", "--context", "4096")
    command = "mixtral-triton generate FOLDER --weights experts=int4,linear=int8 --offload 1\n"
    assert status == 1 and text.endswith(f"NO FORMAT FITS\nWith experts in host memory: {command}")
    assert re.search(r"^int4, linear int8, 1 of 8 offloaded: \d+-\d+ tokens/s predicted", text, re.M)
    arguments = parser().parse_args(command.split()[1:])
    assert (arguments.weights, arguments.offload) == (FORMATS["int4, linear int8"], 1)
    text = fit(capsys, "--memory", "24", "--context", "4096")[1]
    assert text.endswith(command) and "1 of 8 offloaded: no prediction" in text


@pytest.mark.parametrize("T", [1, 3, 100])
@pytest.mark.parametrize("format", ["as stored", "int4"])
def test_work_of_offloaded_experts(T: int, format: str) -> None:
    """Decode reads the expected chosen experts across the link in place of device memory; prefill copies all once."""
    works = []
    for on_host in ((), [range(6, 8)]):
        config = replace(SMALLER, num_hidden_layers=1)
        model = Mixtral(config, "meta", specs=format_specs(config)[format], on_host=on_host)
        with record_launches("sm_89") as launches, torch.no_grad():
            model.hidden(torch.zeros(1, T, dtype=torch.int64, device="meta"), KVCache(config, 1, 128, "meta"))
        works.append(
            [count_work(one) for one in launches if "experts_up" in one.kernel or "experts_down" in one.kernel]
        )
    each = 3 * 4096 * 14336 * (2 if format == "as stored" else 0.5)
    resident, offloaded = (sum(one.memory for one in each) for each in works)
    host, share = sum(one.host for one in works[1]), 2 * (1.0 if T > 64 else 1 - 0.75**T)
    assert host == pytest.approx(share * each) and not any(one.host for one in works[0])
    assert offloaded == pytest.approx(resident + (host if T > 64 else -host))


def test_host_memory_and_link_limit_what_is_offloaded(capsys: pytest.CaptureFixture[str]) -> None:
    def offloads(*args: str) -> dict[str, Any]:
        found = json.loads(fit(capsys, "--gpu", "rtx4090", "--context", "4096", "--json", *args)[1])["formats"]
        return {one["format"]: one["offload"] for one in found if one["offload"]}

    assert list(offloads("--host-memory", "4")) == ["int4, linear int8"]
    slow, fast = (offloads("--link", link)["int4"]["tokens_per_second"][0] for link in ("pcie3x8", "pcie5x16"))
    assert 4 * slow < fast


def test_all_gpus_list_what_each_offloads(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpus = {gpu["name"]: gpu["offload"] for gpu in json.loads(fit(capsys, "--json", "--context", "4096")[1])["gpus"]}
    assert {format: one["experts"] for format, one in gpus["H100 80GB"].items()} == {"as stored": 2}
    assert all(one["tokens_per_second"] for name in gpus if name[:5] == "RTX 4" for one in gpus[name].values())
    assert gpus["H200"] == {} and gpus["A40"]["as stored"]["tokens_per_second"] == []

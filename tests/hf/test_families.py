"""Every family that transformers marks with its decorator of experts, from tiny configs: experts and attention by name
beside transformers' eager functions, int4 beside the dequantized model, or the refusal that names the reason."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.moe import ExpertsInterface

from mixtral_triton import ExpertsConfig, apply, register, revert
from mixtral_triton.hf.experts import NAME
from mixtral_triton.kernels.launching.launch import INTERPRETED
from tests.cli.commands import ROOT
from tests.support.families import (
    ATTENTION_REFUSED,
    EXPERTS_REFUSED,
    LIMIT,
    NAMED,
    NOT_TRIED,
    VERSION,
    build,
    experts_of,
    marked_families,
    table,
    with_int4_experts,
)
from tests.support.selection import slow_interpreted

register()
OTHERS = [name for name in marked_families() if name not in NAMED and name not in NOT_TRIED]
LENGTHS, NEW = ((4, 1, 3, 2), 1) if INTERPRETED else ((9, 4, 7, 2), 4)  # of ragged prompts
TEXTS = [torch.randint(2, 64, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
IDS = torch.stack([torch.nn.functional.pad(text, (max(LENGTHS) - len(text), 0)) for text in TEXTS])
MASK = torch.stack([(torch.arange(max(LENGTHS)) >= max(LENGTHS) - n).long() for n in LENGTHS])


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS, attention_mask=MASK, use_cache=False).logits[MASK.bool()]


def greedy(model: Any) -> Tensor:
    return model.generate(IDS, attention_mask=MASK, max_new_tokens=NEW, do_sample=False)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, interface: Any) -> Iterator[list[Any]]:
    """The modules that call this package's function of an interface within the block."""
    function, modules = interface._global_mapping[NAME], list[Any]()

    def record(module: Any, *args: Any, **kwargs: Any) -> Any:
        modules.append(module)
        return function(module, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setitem(interface._global_mapping, NAME, record)
        yield modules


def check_family(family: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Compare a family, and return a line of errors relative to the largest logit."""
    model, line = build(family), f"{family:20}"
    want, tokens, scale = logits(model), greedy(model), float(logits(model).abs().max())
    modules = experts_of(model)
    assert modules
    for part, interface, refused in (
        ("experts", ExpertsInterface, EXPERTS_REFUSED),
        ("attn", AttentionInterface, ATTENTION_REFUSED),
    ):
        select = getattr(model, f"set_{part}_implementation")
        select(NAME)
        if family in refused:
            with pytest.raises(ValueError, match=rf"mixtral_triton: \w+ .*has .*{refused[family]}.*, needs"):
                logits(model)
            select("eager")
            line += f" {part}: {refused[family]};"
            continue
        with counted(monkeypatch, interface) as called:
            error = float((logits(model) - want).abs().max()) / scale
        assert {*map(id, modules.values())} <= {*map(id, called)} if part == "experts" else called
        assert error <= LIMIT, (part, error)
        line += f" {part} {error:.0e}"
    assert torch.equal(greedy(model), tokens)
    whole = build(family)
    before = logits(whole)
    error = float((logits(apply(whole)) - want).abs().max()) / scale
    assert error <= LIMIT and torch.equal(greedy(whole), tokens)
    assert torch.equal(logits(revert(whole)), before)
    line += f" apply {error:.0e}"
    return f"{line} tokens identical {check_quantized(family, model, folder)}"


def check_quantized(family: str, model: Any, folder: Path) -> str:
    """Load with int4 experts, and compare with the model whose experts have the dequantized values."""
    attention = "eager" if family in ATTENTION_REFUSED else NAME
    if family in EXPERTS_REFUSED:
        model.save_pretrained(folder)
        for file in folder.glob("*.safetensors"):  # refused before any tensor is read
            file.write_bytes(file.read_bytes()[: 8 + int.from_bytes(file.read_bytes()[:8], "little")])
        with pytest.raises(ValueError, match=rf"experts.* has .*{EXPERTS_REFUSED[family]}"):
            AutoModelForCausalLM.from_pretrained(folder, quantization_config=ExpertsConfig("int4"))
        return ""
    quantized = with_int4_experts(model, folder, attention)
    want = logits(model)
    error = float((logits(quantized) - want).abs().max() / want.abs().max())
    assert error <= LIMIT
    assert torch.equal(greedy(quantized), greedy(model))
    return f"int4 {error:.0e}"


QUICK = () if INTERPRETED else ("qwen3_moe", "olmoe", "deepseek_v3")
FAMILIES = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in NAMED]


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, covers: Any) -> None:
    assert family not in EXPERTS_REFUSED and family not in ATTENTION_REFUSED
    if family not in marked_families():
        pytest.skip("this transformers keeps its experts in another way")
    covers("families", check_family(family, tmp_path, monkeypatch))


@slow_interpreted
@pytest.mark.parametrize("family", OTHERS)
def test_any_other_family(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, covers: Any) -> None:
    covers("families", check_family(family, tmp_path, monkeypatch))


@pytest.mark.skipif(VERSION < (5, 25), reason="the table is that of a newer transformers")
@pytest.mark.slow
def test_the_table_of_families_is_in_the_documents() -> None:
    """`python -m tests.support.families` prints it."""
    lines = table()
    assert lines in (ROOT / "docs" / "drop_in.md").read_text()
    rows = [line.split(" | ") for line in lines.splitlines()]
    assert lines.count("| all |") >= 40 and sum(row[-1] == "yes |" for row in rows) >= 38

"""Documents: links, kernels and files that they name exist, quoted code is the reference's, their programs run, and the
command line takes their commands."""

import inspect
import re
import shlex
import shutil
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mixtral_triton import MixtralConfig, reference
from mixtral_triton.cli.commands import SMALL, parser
from mixtral_triton.kernels.registry import OPERATIONS
from mixtral_triton.quantize.write import write
from tests.cli.commands import ROOT, output, python

pytestmark = pytest.mark.compiled
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks/results/README.md", SMALL / "README.md"]
OUTPUT = {  # of the examples
    "drop_in.py": ["The return statement", "the same text before, with and after apply: True"],
    "batch.py": ["A list is", "the same from both: True"],
    "continuous_batch.py": ["A list is", "the same texts before and after apply: True"],
    "expert_load.py": ["expert_load.png: the fullest expert of a layer has 1."],
    "qlora.py": ["the loss falls: True", "with experts in 8 bits: "],
    "qwen3.py": ["QuantizedWeight(int4, [8, 128, 64]", "RIGHT"],
    "mixtral.py": ["The return statement"],
    "verify_folder.py": ["RIGHT: all", "nearest to its limit"],
}
MACHINES = {  # how a program runs: what Python gets before its file
    "no GPU": (),
    "simulated GPU": ("-m", "tests.support.stub", "--executes"),
    "interpreted beside a GPU": ("-m", "tests.support.fake_gpu"),
}


def python_blocks(document: str | Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), re.S)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_named_files_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    links = [path.parent / link for link in re.findall(r"\]\(([^)#:]+)\)", text)]
    names = re.findall(r"\b((?:benchmarks|tests|kernels|mixtral_triton)/[\w/]+\.py)\b", text)
    assert not [each for each in (*links, *(ROOT / name for name in names)) if not each.exists()]


def test_named_kernels_exist_and_quoted_code_is_in_the_reference() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "kernels").rglob("*.py"))
    text = (ROOT / "docs" / "mixtral.md").read_text(encoding="utf-8")
    assert all(f"def {kernel}(" in source for kernel in re.findall(r"`(\w+_kernel)`", text))
    reference = {line.strip() for line in (ROOT / "kernels" / "reference.py").read_text(encoding="utf-8").splitlines()}
    quoted = [line for block in python_blocks("docs/mixtral.md") for line in block.splitlines()]
    assert len(quoted) > 7 and set(quoted) <= reference


def test_readme_is_short_and_begins_with_verify() -> None:
    first, second = re.findall(r"```bash\n(.*?)```", README, re.S)[:2]
    assert len(README.splitlines()) <= 120
    assert "mixtral-triton verify\n" in first
    assert "pytest" in second and "TRITON_INTERPRET=1" in second


def run_program(how: str, program: Path, *args: Any) -> str:
    """Run a program on a machine of that kind -> what it prints."""
    switch = {"TRITON_INTERPRET": "1"} if how == "interpreted beside a GPU" else {}
    done = python(*MACHINES[how], program, *args, **switch)
    assert done.returncode == 0 and ": False" not in done.stdout, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def checkpoint(make_hf: Any, tmp_path: Path) -> Path:
    """One small layer of random weights, with the tokenizer of the package's checkpoint."""
    config = MixtralConfig.from_pretrained(SMALL)
    sizes = {"vocab_size": config.vocab_size, "bos_token_id": config.bos_token_id}
    make_hf(num_hidden_layers=1, **sizes).save_pretrained(tmp_path / "checkpoint")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SMALL / name, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.mark.slow
@pytest.mark.parametrize("how", MACHINES)
def test_python_blocks_of_readme_print_right(how: str, checkpoint: Path, tmp_path: Path) -> None:
    """Those that change a model of transformers, on models of its own; and the own model, which interprets where Triton
    is not imported yet."""
    write(checkpoint, quantized := tmp_path / "quantized", "int8", "cpu")
    swaps, own = python_blocks("README.md")
    first, *rest = swaps.splitlines(keepends=True)
    theirs = f"model, name = AutoModelForCausalLM.from_pretrained({str(checkpoint)!r}), {str(quantized)!r}\n"
    end = "from mixtral_triton import verify\nprint(verify(model))\n"
    swaps = "".join([first, theirs, *rest, end]).replace("Qwen/Qwen3-30B-A3B", str(checkpoint)).replace("int4", "int8")
    own = re.sub(r"(max_new_tokens\W+)\d+", r"\g<1>4", own.replace('"small"', repr(str(checkpoint))))
    out = []
    for number, block in enumerate((swaps, own)):
        (tmp_path / f"{number}.py").write_text(block)
        out.append(run_program(how, tmp_path / f"{number}.py"))
        ran = "" if "Triton" in out[-1] else " (plain torch; no kernel ran)"
        assert out[-1].splitlines()[-1].startswith(f"RIGHT{ran}: all")
    assert ("Triton on NVIDIA H100" if how == "simulated GPU" else "Triton, interpreted") in out[1]
    assert out[1].startswith("<s>The return statement")


@pytest.mark.slow
@pytest.mark.parametrize("how", MACHINES)
def test_example_runs(how: str, checkpoint: Path) -> None:
    for name, texts in OUTPUT.items():
        # transformers asks any GPU that it sees for its memory, and PEFT loads adapters to it.
        needs_gpu = {"continuous_batch.py"} | ({"qlora.py"} if how == "interpreted beside a GPU" else set())
        if how == "no GPU" or name not in needs_gpu:
            out = run_program(
                how, ROOT / "examples" / name, *([checkpoint] if name not in ("qlora.py", "qwen3.py") else [])
            )
            assert all(text in out for text in texts)
    # The tests of `bench --peer` run `my_experts.py`, those of operations `expert_swiglu.py`, of meshes `mesh.py`.
    assert {*OUTPUT, "my_experts.py", "expert_swiglu.py", "mesh.py", "__init__.py"} == {
        path.name for path in (ROOT / "examples").glob("*.py")
    }


@pytest.mark.slow
def test_the_model_of_the_example_writes_the_text_of_the_command() -> None:
    text = python("-m", "examples.mixtral", SMALL, "A list is", CUDA_VISIBLE_DEVICES="")
    assert text.returncode == 0, text.stderr
    assert text.stdout == output("generate --device cpu --prompt", "A list is")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "need"), [("mesh", "torchrun --nproc-per-node 2"), ("expert_swiglu", "TRITON_INTERPRET=1")]
)
def test_example_says_in_one_line_what_it_needs(name: str, need: str) -> None:
    done = python("-m", f"examples.{name}", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1 and need in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("how", MACHINES)
def test_python_blocks_of_other_documents_run(how: str, tmp_path: Path) -> None:
    """Those of mixtral.md quote the reference, those of bench.md and drop_in.md have tests of their own. NCCL has no
    simulation: a mesh is of one rank, on the CPU."""
    with_code = {path.name for path in DOCUMENTS if python_blocks(path.relative_to(ROOT))}
    whole = "weights.md", "scaling.md", "ops.md", "generate.md"  # the blocks of each are one program
    assert with_code == {"README.md", "mixtral.md", "bench.md", "drop_in.md", *whole}
    prelude = "import os\n"
    prelude += "os.environ |= {'MASTER_ADDR': 'localhost', 'MASTER_PORT': '0', 'RANK': '0', 'WORLD_SIZE': '1'}\n"
    for name in whole:
        program = "\n".join(python_blocks(f"docs/{name}")).replace('"cuda", (2, 2)', '"cpu", (1, 1)')
        (tmp_path / f"{name}.py").write_text(prelude + program)
        run_program(how, tmp_path / f"{name}.py")


def program_of(document: str) -> dict[str, Any]:
    """Run a document's blocks of Python as one program -> its names."""
    names: dict[str, Any] = {}
    exec("\n".join(python_blocks(document)), names)
    return names


OPS_PAGE = ROOT / "docs" / "ops.md"


def ops_page() -> str:
    """Return docs/ops.md with its reference made anew from signatures and docstrings."""
    page = "".join(OPS_PAGE.read_text(encoding="utf-8").partition("## Reference\n")[:2])
    for name, function in OPERATIONS.items():
        parameters = [each.replace(annotation=each.empty) for each in inspect.signature(function).parameters.values()]
        what, *paragraphs = (" ".join(text.split()) for text in str(inspect.getdoc(function)).split("\n\n"))
        (returns,) = (text.partition(" Raises ")[0] for text in paragraphs if text.startswith("Returns "))
        what, returns = (textwrap.fill(text, 120, break_long_words=False) for text in (what, returns))
        page += f"\n### {name}\n\n    {name}{inspect.Signature(parameters)}\n\n{what}\n\n{returns}\n"
    return page


def test_ops_page_is_that_of_the_docstrings() -> None:
    need = "run `python -m tests.docs.test_docs`, which writes docs/ops.md"
    assert OPS_PAGE.read_text(encoding="utf-8") == ops_page(), need


def test_recipes_of_other_routers_compute_what_they_say() -> None:
    """DeepSeek-V3's gate (arXiv 2412.19437, equations 12 to 16), OLMoE's, and a shared expert beside routed ones."""
    torch.manual_seed(0)
    found = program_of("docs/ops.md")
    x, gate, bias, K = (found[name] for name in ("x", "gate", "bias", "K"))
    experts, scores = (found["gate_up_proj"], found["down_proj"]), torch.sigmoid(x @ gate.T)
    assert not torch.equal(found["ids"], scores.topk(K).indices)  # the bias decides
    chosen = torch.stack([(row + bias).argsort(descending=True)[:K] for row in scores])
    weights = torch.stack([row[ids] / row[ids].sum() for row, ids in zip(scores, chosen, strict=True)])
    deepseek = reference.expert_swiglu(x, *experts, chosen, 2.5 * weights)
    assert torch.allclose(found["deepseek"], deepseek, atol=1e-5)
    weights, chosen = (x @ gate.T).softmax(-1).sort(-1, descending=True)
    olmoe = reference.expert_swiglu(x, *experts, chosen[:, :K], weights[:, :K])
    assert torch.allclose(found["olmoe"], olmoe, atol=1e-5) and (weights[:, :K].sum(-1) < 0.999).all()
    gate, up = (x @ found["shared_gate_up"].T).chunk(2, -1)
    shared = deepseek + F.silu(gate) * up @ found["shared_down"].T
    assert torch.allclose(found["shared"], shared, atol=1e-5) and not torch.allclose(deepseek, shared, atol=0.1)


@pytest.mark.slow
def test_figures_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import figures

    figures.main(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (ROOT / "docs" / "figures").iterdir()}
    kernels = {(who, name): figures.their_kernels(name, who) for name in ("mixtral-8x7b", "qwen3-30b-a3b")
               for who in ("eager", "grouped_mm")}  # fmt: skip
    assert kernels == {
        ("eager", "mixtral-8x7b"): 70,
        ("grouped_mm", "mixtral-8x7b"): 58,
        ("eager", "qwen3-30b-a3b"): 145,
        ("grouped_mm", "qwen3-30b-a3b"): 74,
    }
    assert (figures.our_kernels("mixtral-8x7b"), figures.our_kernels("qwen3-30b-a3b")) == (8, 9)
    mixed = {"experts": "int4", "linear": "int8"}
    found = [figures.bytes_read(name, x) // 10**6 for name in ("mixtral-8x7b", "qwen3-30b-a3b") for x in (None, mixed)]
    assert found == [788, 223, 113, 38]
    assert figures.visible(5, 2).int().tolist()[3] == [0, 0, 1, 1, 0]


@pytest.mark.slow
def test_recipe_for_a_kernel_runs_and_finds_a_wrong_one(tmp_path: Path) -> None:
    (recipe,) = python_blocks("docs/bench.md")
    assert "TRITON_INTERPRET" in recipe and len(recipe.splitlines()) < 16
    wrong = recipe.replace("swiglu(*args.values())", "1.01 * swiglu(*args.values())")
    for code, word in ((recipe, "right"), (wrong, "WRONG")):
        done = python("-c", code)
        lines = done.stdout.splitlines()
        assert done.returncode == 0 and len(lines) == 3 and all(line.endswith(f" {word}") for line in lines), (
            done.stdout + done.stderr
        )


PROGRAMS = r"(?:TRITON_INTERPRET=1\s+)?(?:mixtral-triton|python|pytest|torchrun)\s"
# A line of a block, or text in backticks.
LINE = re.compile(rf"^ *({PROGRAMS}[^`\n]+)$|(?<!`)`({PROGRAMS}[^`]+)`", re.MULTILINE)
# What a user puts there.
PLACEHOLDERS = {"[FOLDER]": "FOLDER", "TEXT": "'A list'", "MODEL": "mixtral-8x7b", "GPU": "h100", "OP": "route"}


def commands() -> list[list[str]]:
    """Return the distinct commands as words, with values for the placeholders."""
    pattern = re.compile("|".join(rf"(?<![\w/-]){re.escape(name)}(?![\w/])" for name in PLACEHOLDERS))
    texts = "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    lines = {pattern.sub(lambda match: PLACEHOLDERS[match[0]], match[1] or match[2]) for match in LINE.finditer(texts)}
    words = sorted(shlex.split(line, comments=True) for line in lines)
    return [line[1:] if line[0].startswith("TRITON_INTERPRET") else line for line in words]


def test_commands_have_arguments_that_exist() -> None:
    """The command line's parser takes ours, and files that others name exist. Each command has tests of its own."""
    found = commands()
    assert len(found) > 30
    for program, *rest in found:
        if program == "mixtral-triton" and rest[1:] and "--help" not in rest:  # one word names a command
            parser().parse_args(rest)
        paths = [word for word in rest if re.fullmatch(r"(tests|benchmarks|docs|examples)/[\w/.]*", word)]
        assert all((ROOT / path).exists() for path in paths), rest


if __name__ == "__main__":
    OPS_PAGE.write_text(ops_page(), encoding="utf-8")

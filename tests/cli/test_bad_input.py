"""Bad input: options, and files, names and texts of a checkpoint that do harm. Exit status 2, one line that names what
is wrong and what would do, and never a hang or a crash."""

import io
import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixtral_triton.bench.fit import KNOWN
from mixtral_triton.checkpoint.tokenizer import load_tokenizer
from mixtral_triton.cli import prompt
from mixtral_triton.cli.commands import SMALL
from tests.cli.commands import error_line
from tests.tools.conftest import change

pytestmark = pytest.mark.compiled
PROMPT, TRACE = "generate --prompt x", "trace --device cpu --prompt"
JOBS, PERPLEXITY = SMALL / "config.json", f"perplexity --device cpu --text {SMALL / 'config.json'}"
# The command, and a pattern of its one line.
BAD_INPUT = {
    "verify --nonsense": r"--nonsense.* \(see mixtral-triton --help\)",
    "verfy": "did you mean verify\\?",
    "bench rms_nrm": "did you mean rms_norm\\?",
    "compile rope --arch sm_91": "did you mean sm_90\\?",
    "compile rope --arch sm_75": "'sm_75' needs one of sm_80",
    "compile rope --arch rtx4900": "needs one of .*; did you mean rtx4090\\?",
    "bench rope --gpu h100 --gpu a100": "--gpu: is given twice, as h100 and a100",
    "verify --load-in-4bit": r"--load-in-4bit \(here --weights experts=int4\)",
    "verify ./missing": "missing: no such folder, needs a local checkpoint",
    "verify --device cuda": r"needs cpu, or cuda, cuda:1, \.\.\. \(CUDA or ROCm\) of 0 GPUs",
    "generate --promt x": r"arguments: --promt; did you mean --prompt\? \(see mixtral-triton --help\)",
    "generate --prompt x --top_p=0.9": r"did you mean --top-p\?",
    "chat --batch x": r"arguments: --batch \(see",
    "generate --prompt x --max-tokens 5": r"did you mean --max-new-tokens\?",
    "generate --prompt x --- a": "unrecognized arguments: ---",
    "fit --gpu rtx4900": "did you mean RTX 4090\\?",
    "verify --weights int3": "--weights.*'int3' needs one of int4, int8, fp8, in a form like int4, or experts=int4,",
    **{
        f"verify --weights {text}": f"--weights: '{text}' needs one of int4, int8, fp8"
        for text in ("expert=int4", "experts=int4,experts=int8", "experts=int4,", "=")
    },
    "verify --weights experts=int3": r"'experts=int3' needs one of .*; did you mean experts=int4\?",
    "verify --device gpu": "'gpu' does not exist here: needs cpu, or cuda, cuda:1, ...",
    "verify no/such/folder": "no/such/folder",
    **{f"verify {name}": "only the command fit takes this name.*, needs a local" for name in KNOWN},
    "verify --device cuda:99": "cuda:99",
    "verify --device cpu --tokens 4096": "needs 2 to 2048",
    **{f"{name} --device meta": "meta" for name in ("verify", "generate --prompt x", "trace --prompt x")},
    "generate": "--prompt is given 0 times",
    "generate --prompt ''": "--prompt is empty",
    "generate --prompt -": "--prompt - is empty",
    f"generate --prompt-file {SMALL / 'tokenizer.bin'}": "No such file",
    "generate --prompt-file 'a\nb'": r"No such file or directory: .a\\nb",
    "generate '--a\nb'": "unrecognized arguments: --a b",
    "generate --prompt a --prompt b": "--prompt is given 2 times: needs one text, -",
    "generate --prompt a --system b": "--system is a message of a chat: needs --chat",
    f"{PROMPT} --out no/such/file": "--out is an option of a batch: needs --batch FILE",
    f"{PROMPT} --batch-size 3": "--batch-size is an option of a batch: needs --batch FILE",
    f"{PROMPT} --max-new-tokens 5000": "max_position_embeddings",
    f"{PROMPT} --seed {1 << 64}": "--seed",
    f"{PROMPT} --temperature -1": "mixtral-triton generate: temperature is -1.0, needs",
    f"{PROMPT} --interpret --device cuda": "mixtral-triton generate: --interpret runs",
    f"{PROMPT} --stop ''": "--stop is empty",
    f"{PROMPT} --logprobs 2": "--logprobs is given.*needs --json or --batch$",
    f"{PROMPT} --context 64": r"context is 64 and offload is 0, needs offload='auto' \(--offload auto\)",
    f"{PROMPT} --context 0 --offload auto": "context is 0, needs 1 to 1024, the model's positions, or None",
    f"{PROMPT} --offload x": "number of experts, or auto",
    f"{TRACE} ''": "--prompt is empty",
    f"generate --batch {JOBS} --out {JOBS}": "is the file of --batch, needs another",
    f"generate --batch {JOBS} --prompt x": "needs neither --prompt",
    "generate --batch no/such/file": "No such file",
    f"generate --batch {JOBS} --batch-size 0": "needs a number of prompts, or auto",
    f"{PERPLEXITY} --window 1": "--window is 1, needs 2 to 1024, the model's positions",
    f"{PERPLEXITY} --window 2000": "--window is 2000",
    f"{PERPLEXITY} --window 10 --stride 10": "--stride is 10, needs 1 to 9, since each token has one before it",
    f"{PERPLEXITY} --stride 0": "--stride is 0",
    "fit --gpu abacus": "abacus.*H100 80GB.*MI300X",
    "fit --gpu v100": "v100.*sm_80 or later",
    "fit --gpu h100 --memory 5": "--gpu is given, and --memory",
    "fit --memory 0": "--memory is 0",
    "fit --memory inf": "--memory is inf",
    "fit --batch 0": "--batch is 0",
    "fit --context 32769": "--context is 32769.*32768",
    "fit mixtral-9x9": "mixtral-9x9: no such folder, needs one, a name on the hub, or mixtral-8x7b or",
    "quantize small no/such/out --weights int8 --device meta": "device is 'meta', which holds no numbers",
    f"quantize small {SMALL} --weights int4": f"{SMALL} is there already and not an empty folder$",
    "bench --sizes T=3": "--sizes",
    "bench --peer a:b": "goes with the one operation",
    "bench route --sizes many": "T=4096",
    "bench route --sizes T=3,H=4": "--sizes is 'H', needs one of T, E, K",
    "bench decode_step --sizes cache=int4": "needs int8, or no cache=",
    "bench route --sizes T=x": "needs tensors that can be",
    "bench linear --sizes H=128,weight=int4:48": "group is 48",
    "bench decode_step --sizes offload=8": "offload of --sizes is 8, needs 0 to 7",
    "bench route --sizes T=3,E=8,K=9": "K of --sizes is 9, needs 0 to 8",
    **{f"bench linear --gpu h100 --sizes T={T},H={T},N=64": "--sizes is 'T=99999" for T in ("9" * 10, "9" * 30)},
    **{
        f"compile {at} --arch sm_90": "needs tensors that can be" for at in ("route --at E=x", "linear --at weight=foo")
    },
    "compile rope --arch sm_90 --at T=0": "rope: no kernel runs at these sizes, needs larger ones of --at",
    "compile attention --arch sm_90 --at D=300": "head size 300, needs a head size of at most 256",
    "compile route --arch sm_90 --at K=99": "K of --at is 99, needs 0 to 8",
    "bench sort_by_expert --dtype float16": "is .float16., needs one of int32, int64",
    "bench --plot roofline.txt": r"\.png",
    "bench --plot no/such/folder/a.png": "no/such/folder",
    f"compile append --arch sm_90 --out {SMALL / 'config.json'}": "File exists: .*config.json",
}


@pytest.mark.parametrize("command", BAD_INPUT)
def test_bad_input_is_one_line_on_stderr(command: str, recwarn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    line = error_line(command)
    assert re.search(BAD_INPUT[command], line) and not recwarn.list, line


@pytest.fixture
def seconds() -> Iterator[None]:
    """A test that hangs fails after 20 seconds."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(20)
    yield
    signal.alarm(0)


GENERATE = "generate --device cpu --prompt x --max-new-tokens 1"
CHAT, VERIFY = f"{GENERATE} --chat", "verify --device cpu"
MODEL, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
GENERATION, UNREADABLE = "generation_config.json", "transformers cannot read the tokenizer"
Harm = Callable[[Path], object]


def holds(name: str, content: bytes) -> Harm:
    return lambda folder: (folder / name).write_bytes(content)


def values(name: str, **changes: Any) -> Harm:
    return lambda folder: change(folder / name, **changes)


def template(text: str) -> Harm:
    return holds("chat_template.jinja", text.encode())


def targeting(pattern: str) -> Harm:
    kind = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    groups = {"group_0": {"targets": [f"re:{pattern}"], "weights": kind, "format": "int-quantized"}}
    return values(CONFIG, quantization_config={"quant_method": "compressed-tensors", "config_groups": groups})


# What is wrong in the folder, the command, and a part of its one line. tests/model has what else can be wrong.
HARM: list[tuple[Harm, str, str]] = [
    (lambda folder: (folder / MODEL).rename(folder / "model.gguf"), VERIFY, "is of GGUF, which llama.cpp runs, needs"),
    (
        lambda folder: (folder / CONFIG).rename(folder / "adapter_config.json"),
        VERIFY,
        "is an adapter of PEFT, needs a whole model: PEFT's merge_and_unload",
    ),
    (holds(MODEL, (SMALL / MODEL).read_bytes()[: 10**6]), VERIFY, MODEL),
    (holds(GENERATION, b"[1]"), GENERATE, "generation_config.json: the value is [1], needs a JSON object"),
    (holds(GENERATION, b"\xff"), GENERATE, "generation_config.json: not readable as JSON"),
    (holds(GENERATION, b'{"max_new_tokens": "x"}'), GENERATE, "generation_config.json: transformers cannot read it"),
    (holds(TOKENIZER, b"version https://git-lfs.github.com/spec/v1"), GENERATE, UNREADABLE),
    (values(TOKENIZER, model={"type": "BPE", "vocab": {"a": 0}, "merges": ["bad"]}), GENERATE, UNREADABLE),
    (lambda folder: (folder / TOKENIZER).unlink(), GENERATE, UNREADABLE),
    (template("{% if %}"), CHAT, "the chat template fails with TemplateSyntaxError"),
    (template("{{ raise_exception('no: never') }}"), CHAT, "the chat template fails with TemplateError: no: never"),
    (template("{{ 1 / 0 }}"), CHAT, "the chat template fails with ZeroDivisionError"),
    (template("{{ messages.__class__.__mro__ }}"), CHAT, "fails with SecurityError"),
    (template("{{ messages[-1].content }}"), f"{CHAT} --system s", "leaves the system message out"),
    (
        lambda folder: (folder / "chat_template.jinja").unlink(missing_ok=True),
        CHAT,
        "the chat template fails with ValueError",
    ),
]
WORD = {"model": {"type": "WordLevel", "vocab": {"x": 5000}, "unk_token": "x"}, "added_tokens": []}
for _command in (GENERATE, f"{TRACE} x"):
    _harm = values(TOKENIZER, post_processor=None, pre_tokenizer=None, **WORD)
    HARM.append((_harm, _command, "the tokenizer makes token 5000 of 'x', needs at least one, of 0..2047, the model's"))
for _pattern in ("(a+)+$", "(a|a)*b", ".*" * 9 + "x"):
    HARM.append((targeting(_pattern), GENERATE, "a pattern of targets is 're:"))


@pytest.mark.parametrize(("harm", "command", "message"), HARM)
def test_a_harmful_folder_is_one_line(
    harm: Harm, command: str, message: str, folder: Path, seconds: None, capfd: Any
) -> None:
    harm(folder)
    line = error_line(command, folder)
    assert message in line and str(folder) in line and not capfd.readouterr().err


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe"])
def test_a_folder_without_a_tokenizer_has_not_that_of_its_family(family: str, tmp_path: Path) -> None:
    """transformers makes one, of no words but a few special ones."""
    (tmp_path / CONFIG).write_text(json.dumps({"model_type": family}))
    with pytest.raises(ValueError, match=f"{UNREADABLE}: it has no words: needs the checkpoint's tokenizer.json"):
        load_tokenizer(tmp_path)


def test_a_prompt_without_an_end_or_of_other_bytes_is_refused(tmp_path: Path, monkeypatch: Any, seconds: None) -> None:
    monkeypatch.setattr(prompt, "PROMPT_CHARACTERS", 1000)
    monkeypatch.setattr("sys.stdin", None)  # as Python sets it where the descriptor is closed
    assert "--prompt - is empty" in error_line("generate --prompt -")
    line = error_line("generate --prompt-file /dev/zero --device cpu")
    assert "--prompt-file /dev/zero is longer than 1,000 characters" in line
    (tmp_path / "bytes").write_bytes(b"\xff")
    assert "holds bytes that are no text in UTF-8" in error_line("generate --prompt-file", tmp_path / "bytes")


def test_what_files_say_is_escaped_and_cut(folder: Path) -> None:
    """Names of tensors, types of the rope, texts of templates: none reaches the terminal as it is."""
    name = f"\x1b]0;title\x07\x9b31m{'n' * 5000}"
    tensors = load_file(folder / "model.safetensors") | {name: torch.zeros(1, dtype=torch.bfloat16)}
    save_file(tensors, folder / "model.safetensors")
    lines = [error_line(GENERATE, folder)]
    template("{{ raise_exception('" + name + "') }}")(folder)
    lines.append(error_line(GENERATE, "--chat", folder))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: name}}))
    (folder / "model.safetensors").unlink()
    lines.append(error_line(GENERATE, folder))
    change(folder / "config.json", rope_parameters={"rope_theta": 1e4, "rope_type": name})
    lines.append(error_line("fit", folder))
    for line in lines:
        assert line.isprintable() and r"\x1b]0;title\x07\x9b31m" in line and len(line) < 600

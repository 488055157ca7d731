"""Prompts: chat templates against transformers' `apply_chat_template`, standard input, files, and the BOS token."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mixtral_triton import Mixtral
from mixtral_triton.cli import SMALL, main
from mixtral_triton.tools.prompt import ChatTemplate, encode, load_tokenizer, read_prompts

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.usefixtures("in_process"),
]
# What the first and the present template of Mixtral-8x7B-Instruct-v0.1 render: the first has no system message.
OLD = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
NEW = """{%- if messages[0]["role"] == "system" %}
    {%- set system = messages[0]["content"] %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}

{{- bos_token }}
{%- for turn in turns %}
    {%- if (turn["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("After the system message, roles must alternate") }}
    {%- endif %}
    {%- if turn["role"] == "user" %}
        {%- if loop.first and system is defined %}
            {{- " [INST] " + system + "\\n\\n" + turn["content"] + " [/INST]" }}
        {%- else %}
            {{- " [INST] " + turn["content"] + " [/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + turn["content"] + eos_token }}
    {%- endif %}
{%- endfor %}
"""
TEMPLATES = {
    "old": OLD,
    "new": NEW,
    "other": "{% for m in messages %}{{ m | tojson }}\n  {% endfor %}\n{% if add_generation_prompt %}>{% endif %}",
}
TURNS = [{"role": "user", "content": "What is a <window>?"}, {"role": "assistant", "content": "A view."}]
TURNS += [{"role": "user", "content": "Überall?"}]
SYSTEM = [{"role": "system", "content": "Be short."}]


def chat_folder(folder: Path, template: Any, place: str = "config", weights: bool = False) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", *(["model.safetensors"] * weights)):
        shutil.copy(SMALL / name, folder / name)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if place == "jinja":
        (folder / "chat_template.jinja").write_text(template)
        template = "not this one"
    config |= {"chat_template": template, "bos_token": {"content": "<s>", "__type": "AddedToken"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("messages", [TURNS[:1], TURNS, SYSTEM + TURNS[:1], SYSTEM + TURNS], ids=len)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("place", ["config", "jinja", "named"])
def test_tokens_equal_those_of_transformers(tmp_path: Path, template: str, place: str, messages: Any) -> None:
    transformers = pytest.importorskip("transformers")
    text: Any = TEMPLATES[template]
    text = [{"name": "rag", "template": "-"}, {"name": "default", "template": text}] if place == "named" else text
    folder = chat_folder(tmp_path, text, place)
    ours, theirs = ChatTemplate(folder), transformers.AutoTokenizer.from_pretrained(folder)
    if template == "old" and messages[0]["role"] == "system":
        with pytest.raises(ValueError, match=r"fails with .*alternate: .* leave --system out"):
            ours.render(messages)
        return
    want = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert load_tokenizer(folder).encode(ours.render(messages), add_special_tokens=False).ids == want


def generate(capsys: Any, *args: str) -> tuple[dict[str, Any], str]:
    assert main(["generate", *args, "--device", "cpu", "--max-new-tokens", "5", "--json"]) == 0
    out, error = capsys.readouterr()
    return json.loads(out), error


def test_command_answers_each_turn_of_a_chat(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    folder = chat_folder(tmp_path, NEW, weights=True)
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(folder), Mixtral.from_pretrained(folder, "cpu")
    monkeypatch.setattr("sys.stdin", io.StringIO("What is a window?"))
    (tmp_path / "second.txt").write_text("And a door?\n")
    found, _ = generate(capsys, str(folder), "--chat", "--prompt", "-", "--prompt-file", str(tmp_path / "second.txt"))
    messages: list[dict[str, str]] = []
    for text in ("What is a window?", "And a door?"):
        messages.append({"role": "user", "content": text})
        ids = tokenizer.apply_chat_template(messages, return_dict=False, return_tensors="pt")
        tokens = model.generate(ids, max_new_tokens=5)[0, ids.shape[1] :]
        messages.append({"role": "assistant", "content": tokenizer.decode(tokens, skip_special_tokens=True)})
    assert found["tokens"] == tokens.tolist() and found["messages"] == messages
    assert found["prompt"] == tokenizer.decode(ids[0]) and found["prompt_tokens"] == ids.shape[1]
    assert found["prefill_tokens_per_second"] > 0 < found["decode_tokens_per_second"] and found["peak_bytes"] > 1e7
    options = ["--device", "cpu", "--max-new-tokens", "5", "--system", "Be short.", "--prompt", "x"]
    assert main(["generate", str(folder), "--chat", *options]) == 0
    out, error = capsys.readouterr()
    assert "[INST]" not in out and error.count("tokens/s") == 2 and "peak of memory" in error


FAILURES: dict[str, tuple[Any, list[str], str]] = {
    "no template": (None, [], "--chat needs a template, and neither chat_template.jinja nor a chat_template in"),
    "no default": ([{"name": "rag", "template": "x"}], [], "--chat needs a template"),
    "syntax": ("{% if %}", [], "tokenizer_config.json: the chat template is not readable"),
    "raises": ("{{ raise_exception('no: never') }}", [], "the chat template fails with ValueError: no: never"),
    "undefined": ("{{ nothing.at.all }}", [], "the chat template fails with UndefinedError"),
    "division": ("{{ 1 / 0 }}", [], "the chat template fails with ZeroDivisionError"),
    "escape": ("{{ messages.__class__.__mro__ }}", [], "fails with SecurityError"),
    "changes": ("{{ messages.append(1) }}", [], "fails with SecurityError"),
    "system": ("{{ messages[-1]['content'] }}", ["--system", "Be short."], "leaves the system message out"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_bad_template_is_one_line(tmp_path: Path, case: str, capsys: Any) -> None:
    template, args, message = FAILURES[case]
    folder = chat_folder(tmp_path, template)
    assert main(["generate", str(folder), "--device", "cpu", "--chat", "--prompt", "x", *args]) == 2
    error = capsys.readouterr().err
    assert str(folder) in error and message in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt", "-"], "--prompt - is empty"),
        (["--prompt-file", "{bytes}"], "holds bytes that are no text in UTF-8"),
        (["--prompt-file", "{absent}"], "No such file"),
        (["--prompt", "a", "--prompt", "b"], "need --chat"),
        (["--prompt", "a", "--system", "b"], "need --chat"),
    ],
)
def test_bad_prompt_is_one_line(args: list[str], message: str, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    (tmp_path / "bytes").write_bytes(b"\xff")
    args = [text.format(bytes=tmp_path / "bytes", absent=tmp_path / "absent") for text in args]
    assert main(["generate", "--device", "cpu", *args]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


def test_ranks_do_not_share_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--prompt - reads standard input, which several processes share"):
        read_prompts(["-"])


def test_the_tokenizer_s_bos_is_not_doubled(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(SMALL)
    plain, warning = encode(tokenizer, "The return", 0)
    assert plain[0] == 0 and plain.count(0) == 1 and warning == ""
    ids, warning = encode(tokenizer, "<s>The return", 0)
    assert ids == plain and "the prompt holds <s>" in warning and "no second one" in warning
    ids, warning = encode(tokenizer, "The <s> return", 0)
    assert ids[0] == 0 and ids.count(0) == 2 and "holds <s>" in warning and "second" not in warning
    assert encode(tokenizer, "x", None)[0][0] != 0
    found, error = generate(capsys, "--prompt", "<s>The return")
    assert found["prompt_tokens"] == len(plain) and "mixtral-triton generate: the prompt holds <s>" in error


def test_a_space_before_the_first_token_is_kept(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """SentencePiece's decoder drops it at the beginning of a text."""
    words = ["<unk>", "▁a", "▁b"]
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    monkeypatch.setattr("mixtral_triton.cli.load_tokenizer", lambda folder: tokenizer)
    monkeypatch.setattr(Mixtral, "stream", lambda *_, **options: iter(torch.tensor([[2], [1]])))
    assert generate(capsys, "--prompt", "a")[0]["text"] == " b a"
    assert main(["generate", "--device", "cpu", "--prompt", "a"]) == 0
    assert capsys.readouterr().out == "a b a\n"

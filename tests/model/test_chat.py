"""Prompts and texts: chat templates against transformers' `apply_chat_template`, standard input, files, the BOS token;
generation_config.json: the ids that end a text, defaults of the command's sampling, wrong files; stop strings."""

import io
import json
import os
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mixtral_triton import Mixtral, MixtralConfig
from mixtral_triton.cli import SMALL
from mixtral_triton.tools.prompt import ChatTemplate, encode, load_tokenizer, print_stream
from tests.cli.commands import error_line, output, run, run_json

pytestmark = pytest.mark.compiled
# What the first and the present template of Mixtral-8x7B-Instruct-v0.1 render: the first has no system message.
OLD = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
PRESENT = """{%- if messages[0].role == "system" %}{%- set system, turns = messages[0].content, messages[1:] %}
{%- else %}{%- set turns = messages %}{%- endif %}

{{- bos_token }}
{%- for turn in turns %}
    {%- if (turn.role == "user") != (loop.index0 % 2 == 0) %}{{- raise_exception("roles must alternate") }}{%- endif %}
    {%- if turn.role == "user" %}
        {{- " [INST] " + (system + "\\n\\n" if loop.first and system is defined else "") + turn.content + " [/INST]" }}
    {%- else %}
        {{- " " + turn.content + eos_token }}
    {%- endif %}
{%- endfor %}
"""
TEMPLATES = {"old": OLD, "new": PRESENT}
TEMPLATES["other"] = (
    "{% for m in messages %}{{ m | tojson }}\n  {% endfor %}\n{% if add_generation_prompt %}>{% endif %}"
)
TURNS = [{"role": "user", "content": "What is a <window>?"}, {"role": "assistant", "content": "A view."}]
TURNS += [{"role": "user", "content": "Überall?"}]
ANSWER = "generate --device cpu --max-new-tokens 5"
SYSTEM = [{"role": "system", "content": "Be short."}]


def set_template(folder: Path, template: Any, place: str = "config") -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if place == "jinja":
        (folder / "chat_template.jinja").write_text(template)
        template = "not this one"
    config |= {"chat_template": template, "bos_token": {"content": "<s>", "__type": "AddedToken"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("messages", [TURNS[:1], TURNS, SYSTEM + TURNS[:1], SYSTEM + TURNS], ids=len)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("place", ["config", "jinja", "named"])
def test_tokens_equal_those_of_transformers(folder: Path, template: str, place: str, messages: Any) -> None:
    transformers = pytest.importorskip("transformers")
    text: Any = TEMPLATES[template]
    text = [{"name": "rag", "template": "-"}, {"name": "default", "template": text}] if place == "named" else text
    set_template(folder, text, place)
    chat, original = ChatTemplate(folder), transformers.AutoTokenizer.from_pretrained(folder)
    if template == "old" and messages[0]["role"] == "system":
        with pytest.raises(ValueError, match=r"fails with .*alternate: .* leave --system out"):
            chat.render(messages)
        return
    want = original.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert load_tokenizer(folder).encode(chat.render(messages), add_special_tokens=False).ids == want


def test_command_answers_each_turn_of_a_chat(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    set_template(folder, PRESENT)
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(folder), Mixtral.from_pretrained(folder, "cpu")
    monkeypatch.setattr("sys.stdin", io.StringIO("What is a window?"))
    (folder / "second.txt").write_text("And a door?\n")
    found = run_json(f"{ANSWER} --chat --prompt - --prompt-file", folder / "second.txt", folder)
    messages: list[dict[str, str]] = []
    for text in ("What is a window?", "And a door?"):
        messages.append({"role": "user", "content": text})
        ids = tokenizer.apply_chat_template(messages, return_dict=False, return_tensors="pt")
        tokens = model.generate(ids, max_new_tokens=5)[0, ids.shape[1] :]
        messages.append({"role": "assistant", "content": tokenizer.decode(tokens, skip_special_tokens=True)})
    assert found["tokens"] == tokens.tolist() and found["messages"] == messages
    assert found["prompt"] == tokenizer.decode(ids[0]) and found["prompt_tokens"] == ids.shape[1]
    assert found["prefill_tokens_per_second"] > 0 < found["decode_tokens_per_second"] and found["peak_bytes"] > 1e7
    _, out, error = run(f"{ANSWER} --chat --prompt x --system 'Be short.'", folder)
    assert "[INST]" not in out and error.count("tokens/s") == 2 and "peak of memory" in error


def test_the_tokenizer_s_bos_is_not_doubled() -> None:
    tokenizer = load_tokenizer(SMALL)
    plain, warning = encode(tokenizer, "The return", 0)
    assert plain[0] == 0 and plain.count(0) == 1 and warning == ""
    ids, warning = encode(tokenizer, "<s>The return", 0)
    assert ids == plain and "the prompt holds <s>" in warning and "no second one" in warning
    ids, warning = encode(tokenizer, "The <s> return", 0)
    assert ids[0] == 0 and ids.count(0) == 2 and "holds <s>" in warning and "second" not in warning
    assert encode(tokenizer, "x", None)[0][0] != 0
    status, out, error = run(f"{ANSWER} --json --prompt '<s>The return'")
    assert status == 0 and json.loads(out)["prompt_tokens"] == len(plain)
    assert "mixtral-triton generate: the prompt holds <s>" in error


def test_a_space_before_the_first_token_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """SentencePiece's decoder drops it at the beginning of a text."""
    words = ["<unk>", "▁a", "▁b"]
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    monkeypatch.setattr("mixtral_triton.cli.load_tokenizer", lambda folder: tokenizer)
    monkeypatch.setattr(Mixtral, "stream", lambda *_, **options: iter(torch.tensor([[2], [1]])))
    assert run_json(f"{ANSWER} --prompt a")["text"] == " b a"
    assert output(f"{ANSWER} --prompt a") == "a b a\n"


PROMPT, NEW = "The return statement", 12
GENERATE = f"generate --device cpu --max-new-tokens {NEW} --prompt '{PROMPT}'"


def write(folder: Path, **values: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps(values))


def generate(folder: Path, *args: str) -> tuple[list[int], str, str]:
    """Return the tokens, the text and what is printed on stderr."""
    status, out, error = run(f"{GENERATE} --json", folder, *args)
    assert status == 0, error
    found = json.loads(out)
    return found["tokens"], found["text"], error


def test_ids_of_both_files_end_a_text(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    plain, *_ = generate(folder)
    end = plain[4]
    write(folder, eos_token_id=[1, end])
    assert set(MixtralConfig.from_pretrained(folder).eos_token_id) == {1, end}
    original = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([[0, *load_tokenizer(folder).encode(PROMPT, add_special_tokens=False).ids]])
    want = original.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=1)[0].tolist()
    assert Mixtral.from_pretrained(folder, "cpu").generate([ids[0]], NEW)[0].tolist() == want
    assert generate(folder)[0] == want[ids.shape[1] :] == plain[: plain.index(end) + 1]
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": plain[2]}
    (folder / "config.json").write_text(json.dumps(config))
    assert generate(folder)[0] == plain[: plain.index(plain[2]) + 1]


def test_chat_stops_at_the_end_of_turn_of_generation_config(folder: Path) -> None:
    set_template(folder, "{{ messages[-1].content }}")
    plain = run_json(f"{GENERATE} --chat", folder)
    write(folder, eos_token_id=plain["tokens"][5])
    found = run_json(f"{GENERATE} --chat", folder)
    length = plain["tokens"].index(plain["tokens"][5]) + 1
    assert found["tokens"] == plain["tokens"][:length] and found["messages"][-1]["content"] == found["text"]
    assert output(f"{GENERATE} --chat", folder) == found["text"] + "\n" != plain["text"] + "\n"


def test_sampling_of_generation_config_is_the_default_of_the_command_line(folder: Path) -> None:
    greedy, _, error = generate(folder)
    assert "generation_config.json" not in error
    options = ["--temperature", "0.9", "--top-k", "7", "--top-p", "0.8", "--min-p", "0.02"]
    sampled, _, error = generate(folder, *options)
    assert sampled != greedy and "generation_config.json" not in error
    write(folder, do_sample=True, temperature=0.9, top_k=7, top_p=0.8, min_p=0.02, repetition_penalty=1.1)
    tokens, _, error = generate(folder)
    assert tokens == sampled
    assert error.count("generation_config.json sets temperature 0.9, top_k 7, top_p 0.8, min_p 0.02\n") == 1
    assert error.count("repetition_penalty 1.1 of generation_config.json is ignored") == 1
    tokens, _, error = generate(folder, "--temperature", "0")
    assert tokens == greedy and "sets" not in error
    tokens, _, error = generate(folder, *options[:2])
    assert tokens == sampled and "sets top_k 7, top_p 0.8, min_p 0.02\n" in error
    ids = torch.tensor([0, *load_tokenizer(folder).encode(PROMPT, add_special_tokens=False).ids])
    library = Mixtral.from_pretrained(folder, "cpu").generate([ids], NEW)[0]
    assert library[len(ids) :].tolist() == greedy, "the library is greedy by default"
    write(folder, do_sample=False, temperature=0.9, repetition_penalty=1.0, top_k=0)
    tokens, _, error = generate(folder)
    assert tokens == greedy and "generation_config.json" not in error
    write(folder, do_sample=True)
    assert "sets temperature 1.0\n" in generate(folder)[2]


NAN = float("nan")
WRONG: dict[str, tuple[Any, ...]] = {
    "eos_token_id": ("2", 2.0, [[1]], [1, "2"], [], 1 << 30, [1, 1 << 30], True, -2, NAN, {}),
    "temperature": ("hot", NAN, -0.5, [1], True, float("inf")),
    "top_p": ("a", 0, 1.5, NAN),
    "top_k": ("5", -1, 2.5, NAN, True),
    "min_p": ("a", -0.1, 1.5, NAN),
    "do_sample": (1, "true", 0.0),
    "repetition_penalty": ("a", 0, NAN),
}
CASES = [(name, value) for name, values in WRONG.items() for value in values]


@pytest.mark.parametrize(("name", "value"), CASES, ids=str)
def test_a_wrong_field_is_one_line(name: str, value: Any, folder: Path) -> None:
    write(folder, **{name: value})
    line = error_line(GENERATE, folder)
    assert all(part in line for part in (str(folder / "generation_config.json"), f"{name} is ", "needs")), line


FILES: dict[str, Callable[[Path], object]] = {
    "1 GB": lambda file: file.touch() or os.truncate(file, 10**9),
    "FIFO": os.mkfifo,
    "folder": Path.mkdir,
    "dangling link": lambda file: file.symlink_to("absent"),
    "device": lambda file: file.symlink_to("/dev/zero"),
    **{text.decode("latin-1"): lambda file, text=text: file.write_bytes(text) for text in (b"{", b"[1]", b"\xff")},
}


@pytest.mark.parametrize("kind", FILES)
def test_a_wrong_file_is_one_line(kind: str, folder: Path) -> None:
    FILES[kind](folder / "generation_config.json")
    assert str(folder / "generation_config.json") in error_line(GENERATE, folder)


STOPPED: dict[str, tuple[list[bytes], list[str], str, int]] = {
    "in one token": ([b"a", b"b END c", b"d"], ["END"], "ab ", 2),
    "over tokens": ([b"a", b"E", b"N", b"D", b"x"], ["END"], "a", 4),
    "begins and fails": ([b"a", b"EN", b"x", b"EN"], ["END"], "aENxEN", 4),
    "begins again": ([b"aE", b"ENE", b"ND"], ["END"], "aEEN", 3),
    "the first of two": ([b"one\n", b"\nUs", b"er: x"], ["User:", "\n\n"], "one", 2),
    "half a character": ([b"\xc3", b"\xbc", b"EN", b"D"], ["END"], "ü", 4),
    "in the middle of a character": ([b"x", b"\xe2", b"\x82", b"\xac", b"y"], ["€"], "x", 4),
    "none": ([b"a", b"b"], [], "ab", 2),
}


@pytest.mark.parametrize("case", STOPPED)
@pytest.mark.parametrize("shown", ["> ", None])
def test_no_part_of_a_stop_string_is_shown(case: str, shown: str | None, capsys: Any) -> None:
    parts, stop, want, count = STOPPED[case]
    times: list[str] = []

    def tokens() -> Any:
        for number in range(len(parts)):
            times.append(capsys.readouterr().out)
            yield torch.tensor([number])

    # A tokenizer whose tokens are the parts of a text, of which some are half a character.
    words = SimpleNamespace(decode=lambda ids, **_: b"".join(parts[id] for id in ids).decode(errors="replace"))
    found, text, _ = print_stream(tokens(), words, shown, [], len(parts), stop)
    times.append(capsys.readouterr().out)
    assert found == list(range(count)) and text == want
    assert "".join(times) == ("" if shown is None else f"> {want}\n")
    for so_far in accumulate(times[:-1]):
        assert f"> {want}".startswith(so_far), "nothing is printed that is not of the text"


def test_command_ends_before_a_stop_string(folder: Path) -> None:
    plain, text, _ = generate(folder)
    tokens, cut, _ = generate(folder, "--stop", "never", "--stop", stop := text[9:13])
    assert cut == text[: text.index(stop)] and tokens == plain[: len(tokens)] != plain
    assert output(GENERATE, folder, "--stop", stop) == f"{PROMPT}{cut}\n"

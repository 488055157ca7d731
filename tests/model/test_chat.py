"""Prompts and texts: chat templates against transformers' `apply_chat_template`, standard input, files, the BOS token;
generation_config.json: the ids that end a text, defaults of the command's sampling, wrong files; stop strings."""

import io
import json
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mixtral_triton import Mixtral
from mixtral_triton.checkpoint.tokenizer import load_tokenizer
from mixtral_triton.cli.commands import SMALL
from mixtral_triton.cli.prompt import decode, encode, read_text
from mixtral_triton.cli.text_stream import Text, Writer
from mixtral_triton.verification import verify
from mixtral_triton.verification.compare import token_ids
from tests.cli.commands import error_line, output, run, run_json

pytestmark = pytest.mark.compiled
# What the present template of Mixtral-8x7B-Instruct-v0.1 renders.
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
ANSWER = "generate --device cpu --max-new-tokens 5"
SYSTEM = [{"role": "system", "content": "Be short."}]


def set_template(folder: Path, template: Any, place: str = "config") -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if place == "jinja":
        (folder / "chat_template.jinja").write_text(template)
        template = "not this one"
    config |= {"chat_template": template, "bos_token": {"content": "<s>", "__type": "AddedToken"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_command_answers_in_the_chat_template(folder: Path) -> None:
    set_template(folder, PRESENT)
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(folder), Mixtral.from_pretrained(folder, "cpu")
    (folder / "prompt.txt").write_text("And a door?\n")
    found = run_json(f"{ANSWER} --chat --system 'Be short.' --prompt-file", folder / "prompt.txt", folder)
    messages = [*SYSTEM, {"role": "user", "content": "And a door?"}]
    ids = tokenizer.apply_chat_template(messages, return_dict=False, return_tensors="pt")
    tokens = model.generate(ids, max_new_tokens=5)[0, ids.shape[1] :]
    messages.append({"role": "assistant", "content": tokenizer.decode(tokens, skip_special_tokens=True)})
    assert found["tokens"] == tokens.tolist() and found["messages"] == messages
    assert found["prompt"] == tokenizer.decode(ids[0]) and found["prompt_tokens"] == ids.shape[1]
    assert found["prefill_tokens_per_second"] > 0 < found["decode_tokens_per_second"]
    _, out, error = run(f"{ANSWER} --chat --prompt x", folder)
    assert "[INST]" not in out and error.count("tokens/s") == 2


def test_texts_stand_for_their_tokens() -> None:
    model, texts = Mixtral.from_pretrained(SMALL, "cpu"), ["The return statement", "A list", "The"]
    original = transformers.AutoModelForCausalLM.from_pretrained(SMALL)
    ids = [model.tokenizer(text).input_ids for text in texts]
    for got, want in zip(model.generate(texts, 3), model.generate(ids, 3), strict=True):
        assert torch.equal(got, want)
    for got, want in zip(model.score(texts), model.score(ids), strict=True):
        assert torch.equal(got, want)
    for target in (model, original):
        assert (
            token_ids(target, texts[:1]).tolist() == ids[:1]
            and token_ids(target, [texts[1]] * 2).tolist() == [ids[1]] * 2
        )
        for wrong in (texts, "The", [], [1]):
            with pytest.raises(ValueError, match=r"verify: input_ids is .*, needs int64 .B, T. or a list of texts"):
                verify(target, wrong)
    assert verify(model, texts[:1], quick=True).routed == verify(model, torch.tensor(ids[:1]), quick=True).routed > 0


def test_a_token_that_the_text_holds_and_the_tokenizer_adds_is_reported(folder: Path) -> None:
    tokenizer = load_tokenizer(SMALL)
    plain = encode(tokenizer, "The return", 2048)
    assert plain[0] == 0 and plain.count(0) == 1
    with pytest.warns(UserWarning, match="the prompt begins with <s>, which the tokenizer adds"):
        assert (ids := encode(tokenizer, "<s>The return", 2048)) == [0, *plain]
    assert encode(tokenizer, "<s>The return", 2048, add_special_tokens=False) == plain
    status, out, error = run(f"{ANSWER} --json --prompt '<s>The return'")
    assert status == 0 and json.loads(out)["prompt_tokens"] == len(ids)
    assert "note: the prompt begins with <s>" in error
    set_template(folder, PRESENT)  # writes <s> itself
    assert "the prompt begins" not in run(f"{ANSWER} --chat --prompt x", folder)[2]


def test_a_prompt_is_encoded_whole_as_by_auto_tokenizer(folder: Path) -> None:
    """With the first and the last token of the post-processor, whatever the file says of truncation and padding."""
    parts = [{"SpecialToken": {"id": "</s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokens = {name: {"id": name, "ids": [at], "tokens": [name]} for at, name in enumerate(("<s>", "</s>"))}
    values = {"type": "TemplateProcessing", "single": parts[::-1], "pair": parts, "special_tokens": tokens}
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 41}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
    text = "The return <s>\n"
    for changes in ({}, {"post_processor": values, "truncation": cut, "padding": padding}):
        file = folder / "tokenizer.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        want = transformers.AutoTokenizer.from_pretrained(folder)(text).input_ids
        assert len(want) == 6 and want[-1] == (1 if changes else want[-1]) and want[0] == (want[0] if changes else 0)
        assert run_json(f"{ANSWER} --prompt", text, folder)["prompt_tokens"] == len(want)
        shown = run_json("trace --device cpu --prompt", text, folder)["tokens"]
        assert shown == [*["<s>"] * (not changes), "The", " return", " ", "<s>", "\n", *["</s>"] * bool(changes)]


def test_a_text_is_read_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its carriage returns; a prompt without the newline at its end."""
    content = "one\r\ntwo\rthree\n\r\n"
    (tmp_path / "text").write_bytes(content.encode())
    for strip, want in ((False, content), (True, content[:-2])):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
        assert read_text(tmp_path / "text", "--text", strip) == read_text("-", "--text", strip) == want


def test_a_space_before_the_first_token_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """SentencePiece's decoder drops it at the beginning of a text."""
    words = ["<unk>", "▁a", "▁b"]
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    whole = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    monkeypatch.setattr(Mixtral, "tokenizer", whole)
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


@pytest.mark.slow
def test_sampling_of_generation_config_is_the_default_of_the_command_line(folder: Path) -> None:
    greedy, _, error = generate(folder)
    assert "generation_config.json" not in error
    options = ["--temperature", "0.9", "--top-k", "7", "--top-p", "0.8", "--min-p", "0.02"]
    sampled, _, error = generate(folder, *options)
    assert sampled != greedy
    write(folder, do_sample=True, temperature=0.9, top_k=7, top_p=0.8, min_p=0.02, num_beams=2)
    tokens, _, error = generate(folder)
    assert tokens == sampled
    assert error.count("generation_config.json sets what is not supported and is ignored: num_beams\n") == 1
    assert generate(folder, "--temperature", "0")[0] == greedy and generate(folder, *options[:2])[0] == sampled
    ids = torch.tensor([0, *load_tokenizer(folder)(PROMPT, add_special_tokens=False).input_ids])
    library = Mixtral.from_pretrained(folder, "cpu").generate([ids], NEW)[0]
    assert library[len(ids) :].tolist() == greedy, "the library is greedy by default"
    write(folder, do_sample=False, temperature=0.9, repetition_penalty=1.0, top_k=0)
    tokens, _, error = generate(folder)
    assert tokens == greedy and "generation_config.json" not in error
    write(folder, do_sample=True)
    assert generate(folder)[0] == generate(folder, "--temperature", "1", "--top-k", "50")[0]
    every, _, _ = generate(folder, "--top-k", "0")
    write(folder, do_sample=True, top_k=0)
    assert generate(folder)[0] == every == generate(folder, "--temperature", "1")[0]
    write(folder, repetition_penalty=1.3)
    assert generate(folder)[0] == generate(folder, "--repetition-penalty", "1.3", "--temperature", "0")[0] != greedy
    assert generate(folder, "--repetition-penalty", "1")[0] == greedy


IGNORED: dict[str, Any] = {"suppress_tokens": [5], "begin_suppress_tokens": [5], "forced_eos_token_id": 1}
IGNORED |= {"bad_words_ids": [[5]], "min_new_tokens": 3, "min_length": 3, "no_repeat_ngram_size": 2, "num_beams": 2}
IGNORED |= {"encoder_repetition_penalty": 1.1, "sequence_bias": [[[5], -9.0]], "guidance_scale": 2.0, "typical_p": 0.9}
IGNORED |= {"epsilon_cutoff": 1e-4, "eta_cutoff": 1e-4, "stop_strings": ["x"], "max_length": 4096, "use_cache": False}
IGNORED |= {"a_new\x1b_field": 1}


def test_every_field_that_is_not_honoured_is_named(folder: Path) -> None:
    """In one line; none that has transformers' default, whatever transformers' next version adds to its file."""
    config = transformers.GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=1)
    defaults = getattr(config, "_get_default_generation_params", dict)()
    write(folder, **config.to_dict() | defaults | {"temperature": 0.5, "_from_model_config": True})
    assert "generation_config.json" not in generate(folder)[2]
    write(folder, **defaults | IGNORED)
    (line,) = (line for line in generate(folder)[2].splitlines() if "generation_config.json" in line)
    assert {*line.partition("ignored: ")[2].split(", ")} == {name.replace("\x1b", r"\x1b") for name in IGNORED}


WRONG = {"eos_token_id": 1 << 30, "temperature": "hot", "top_p": 1.5, "max_new_tokens": -1, "repetition_penalty": 0}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_field_is_one_line(name: str, folder: Path) -> None:
    write(folder, **{"do_sample": True, name: WRONG[name]})
    line = error_line(f"generate --device cpu --prompt '{PROMPT}'", folder)
    assert name in line and str(WRONG[name]) in line, line


STOPPED: dict[str, tuple[list[bytes], list[str], str, int]] = {
    "in one token": ([b"a", b"b END c", b"d"], ["END"], "ab ", 2),
    "over tokens": ([b"a", b"E", b"N", b"D", b"x"], ["END"], "a", 4),
    "begins and fails": ([b"a", b"EN", b"x", b"EN"], ["END"], "aENxEN", 4),
    "begins again": ([b"aE", b"ENE", b"ND"], ["END"], "aEEN", 3),
    "the first of two": ([b"one\n", b"\nUs", b"er: x"], ["User:", "\n\n"], "one", 2),
    "the later first in the list": ([b"one\n\nUser: x"], ["User:", "\n\n"], "one", 1),
    "half a character": ([b"\xc3", b"\xbc", b"EN", b"D"], ["END"], "ü", 4),
    "in the middle of a character": ([b"x", b"\xe2", b"\x82", b"\xac", b"y"], ["€"], "x", 4),
    "ends with half a character": ([b"a", b"b\xe2", b"c\xe2"], [], "ab\ufffdc\ufffd", 3),
    "none": ([b"a", b"b"], [], "ab", 2),
}


ENDS_LAST = ("begins again", "half a character", "the first of two", "the later first in the list")  # at the last token


@pytest.mark.parametrize("case", STOPPED)
@pytest.mark.parametrize("shown", ["> ", None])
def test_no_part_of_a_stop_string_is_shown(case: str, shown: str | None, capsys: Any) -> None:
    parts, stop, want, count = STOPPED[case]
    times: list[str] = []

    def steps() -> Any:
        for number in range(len(parts)):
            times.append(capsys.readouterr().out)
            yield [{"token": number}]

    # A tokenizer whose tokens are the parts of a text, of which some are half a character.
    words = SimpleNamespace(decode=lambda ids, **_: b"".join(parts[id] for id in ids).decode(errors="replace"))
    options = SimpleNamespace(stop=stop, logprobs=None)
    writer: Any = SimpleNamespace(tokenizer=words, eos=(), args=options)
    found, _ = Writer.print_text(writer, steps(), 1, shown, [])
    assert found["finish_reason"] == ("stop" if count < len(parts) or case in ENDS_LAST else "length")
    times.append(capsys.readouterr().out)
    assert found["tokens"] == list(range(count)) and found["text"] == want
    assert "".join(times) == ("" if shown is None else f"> {want}\n")
    for so_far in accumulate(times[:-1]):
        assert f"> {want}".startswith(so_far), "nothing is printed that is not of the text"


def test_text_decoded_token_by_token_is_that_of_all_tokens(folder: Path) -> None:
    """With special tokens and parts of characters between; of a long text only the last tokens are decoded."""
    tokenizer, calls = load_tokenizer(folder), list[int]()
    ids = tokenizer("Überall 两个 <s>naïve</s> 🙂 " * 40).input_ids[1:]
    words = SimpleNamespace(decode=lambda ids, **options: (calls.append(len(ids)), tokenizer.decode(ids, **options))[1])
    writer: Any = SimpleNamespace(tokenizer=words, eos=(), args=SimpleNamespace(stop=[]))
    text = Text(writer, [])
    for count, token in enumerate(ids, 1):
        text.add({"token": token})
        assert text.text.rstrip("\ufffd") == decode(tokenizer, [], ids[:count]).rstrip("\ufffd")
    assert "两个" in text.text and max(calls) < 16


def test_command_ends_before_a_stop_string(folder: Path) -> None:
    plain, text, _ = generate(folder)
    tokens, cut, _ = generate(folder, "--stop", "never", "--stop", stop := text[9:13])
    assert cut == text[: text.index(stop)] and tokens == plain[: len(tokens)] != plain
    assert output(GENERATE, folder, "--stop", stop) == f"{PROMPT}{cut}\n"

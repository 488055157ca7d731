"""The commands `chat` and `generate --batch`: turns that share a cache, lines that are wrong, Ctrl-C, files that are
continued."""

import copy
import io
import json
import os
import select
import subprocess
import sys
import time
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from mixtral_triton import KVCache, Mixtral
from mixtral_triton.checkpoint.config import SMALL
from mixtral_triton.checkpoint.tokenizer import load_tokenizer
from mixtral_triton.cli import chat
from mixtral_triton.cli.prompt import speed_of
from mixtral_triton.cli.text_stream import Writer
from mixtral_triton.model import generate
from mixtral_triton.model.layer import Layer
from tests.cli.commands import ROOT, error_line, heed_interrupts, output, run, run_json
from tests.support.models import random_model
from tests.tools.conftest import TEMPLATE, change

pytestmark = pytest.mark.compiled
TURNS = ["What is a function?", "And a return?", "The list", "a class", "print", "str", "Why?", "if x", "else", "end"]
CHAT = "chat --device cpu --max-new-tokens 6"


def talk(folder: Path, lines: list[str] | bytes, *more: str) -> tuple[list[Any], str]:
    """Give the lines to `chat --json`, which answers each -> its documents but those of commands, and stderr."""
    text = lines if isinstance(lines, bytes) else "".join(f"{line}\n" for line in lines).encode()
    with mock.patch("sys.stdin", io.TextIOWrapper(io.BytesIO(text))):
        status, out, error = run(CHAT, folder, "--json", *more)
    assert status == 0, error
    assert out.count("\n") == text.count(b"\n") + (not text.endswith(b"\n"))
    return [each for each in map(json.loads, out.splitlines()) if "message" not in each], error


def answers(found: list[Any]) -> list[Any]:
    """Tokens and log probabilities of what `--json` prints."""
    return [(turn["tokens"], [each["logprob"] for each in turn["logprobs"]]) for turn in found]


def answers_from_scratch(folder: Path, turns: list[str], **settings: Any) -> list[Any]:
    """The answer of each turn in fp32, computed at once from all before it, which stays as it was written."""
    model = Mixtral.from_pretrained(folder, "cpu", torch.float32)
    tokenizer, generator = load_tokenizer(folder), torch.Generator().manual_seed(0)
    ids, answers = list[int](), list[Any]()
    for turn in turns:
        text = f"</s>[user] {turn} [/]" if ids else f"<s>[user] {turn} [/]"
        ids = ids + tokenizer(text, add_special_tokens=False).input_ids
        found = model.generate([ids], 6, generator=generator, logprobs=0, **settings)
        whole, logprobs = found.ids[0].tolist(), found.logprobs[0].tolist()
        answers.append((whole[len(ids) :], pytest.approx(logprobs, abs=1e-3)))
        ids = whole[:-1] if whole[-1] == 1 else whole
    return answers


def test_ten_turns_compute_new_tokens_alone_and_write_the_text_of_a_chat_from_scratch(
    whole_folder: Path, appended: list[int]
) -> None:
    """The ring of 64 slots moves on in the fourth turn. Sampled tokens are not those that the tokenizer has for their
    text."""
    options = ("--deterministic", "--dtype", "float32", "--temperature", "50", "--logprobs", "0")
    found, error = talk(whole_folder, TURNS, *options)
    assert len(found) == 10 and "computed from its start" not in error
    for before, turn in pairwise(found):
        held = before["prompt_tokens"] + len(before["tokens"]) - 1  # all but the newest
        assert turn["reused"] == held and turn["computed"] == turn["prompt_tokens"] - held
    assert sum(appended) == sum(turn["computed"] + len(turn["tokens"]) - 1 for turn in found)
    assert sum(appended) == found[-1]["prompt_tokens"] + len(found[-1]["tokens"]) - 1, "each token once"
    assert answers(found) == answers_from_scratch(whole_folder, TURNS, temperature=50.0)


def test_a_turn_that_fails_inside_the_model_does_not_end_the_chat(chat_folder: Path, monkeypatch: Any) -> None:
    """The ring has lost the keys of the first turn when it is continued."""
    experts, failing = Layer.experts, [False, True, False]

    def fail(layer: Layer, h: Any, *rest: Any) -> Any:
        if len(h) > 1 and failing and failing.pop(0):
            raise RuntimeError("a fault")
        return experts(layer, h, *rest)

    monkeypatch.setattr(Layer, "experts", fail)
    first, failed, again = talk(
        chat_folder, ["Hi " * 30, "There " * 30, "You"], "--dtype", "float32", "--logprobs", "0"
    )[0]
    assert failed == {"error": "a fault"} and not failing and again["reused"] == 0
    assert answers([first, again]) == answers_from_scratch(chat_folder, ["Hi " * 30, "You"])


def test_options_of_the_command_line_reach_generate(chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds draw other tokens, and one the same; the tokens do not show the cache's dtype."""
    dtypes, cache = list[Any](), KVCache.__init__
    monkeypatch.setattr(KVCache, "__init__", lambda kv, *args: (dtypes.append(args[4]), cache(kv, *args))[1])
    command, texts = "generate --device cpu --prompt x --max-new-tokens 8 --temperature 2 --seed", list[Any]()
    for options in ("1", "2", "2 --cache-dtype int8", "1"):
        texts.append(run_json(f"{command} {options}", chat_folder)["tokens"])
    assert texts[0] == texts[3] != texts[1] and [dtype == torch.int8 for dtype in dtypes] == [0, 0, 1, 0]


def test_what_is_wrong_with_a_line_ends_in_a_line(chat_folder: Path) -> None:
    """Control characters are text. A turn that fails leaves no message behind."""
    paste = "long " * 200_000
    lines = [
        "Hi",
        "fail",
        "\x1b[2J\x00\x07\ttext",
        paste,
        "",
        "/nothing",
        "/save no/such/file",
        "/undo",
        "/undo",
        "/undo",
    ]
    text = "".join(f"{line}\n" for line in lines).encode() + b"\xff\xfe\nagain\r\n"
    saved = chat_folder / "saved.json"
    found, _ = talk(chat_folder, text + f"/save {saved}\n/help\n/reset\nHi".encode())
    first, failed, control, long, unknown, save, none, not_text, again, reset = found
    assert "no turn 3" in failed["error"] and "/nothing is no command" in unknown["error"]
    assert control["reused"] == first["prompt_tokens"] + len(first["tokens"]) - 1
    assert "tokens long, and fewer than 1,024 are possible: /reset" in long["error"]
    assert "no/such/file" in save["error"] and "no turn" in none["error"] and "UTF-8" in not_text["error"]
    assert again["text"] and reset["tokens"] == first["tokens"]
    (message, answer) = json.loads(saved.read_text())["messages"]
    assert message == {"role": "user", "content": "again"} and answer["content"] == again["text"]


def test_commands_change_the_chat(chat_folder: Path) -> None:
    long = "Hi " * 40  # more than the ring holds
    plain, *_ = talk(chat_folder, [long, "There"])
    found, error = talk(chat_folder, [long, "Other", "/undo", "There", "/system Be short.", "There"])
    for name in ("tokens", "prompt_tokens"):
        assert [each[name] for each in (found[0], found[2])] == [each[name] for each in plain]
    assert "\nnote: generate: a text is computed from its start: other tokens are in the cache" in error
    assert found[3]["prompt_tokens"] > found[2]["prompt_tokens"] + 6
    want, _ = talk(chat_folder, ["Hi"], "--system", "Be short.", "--logprobs", "2")
    assert answers(want) == answers(talk(chat_folder, ["/system Be short.", "Hi"], "--logprobs", "2")[0])
    assert [len(each["top"]) for each in want[0]["logprobs"]] == [2] * len(want[0]["tokens"])
    assert talk(chat_folder, ["/system fail", "Hi"])[0][0]["error"].endswith("leave --system out")


def test_the_small_checkpoint_has_a_template() -> None:
    found, error = talk(SMALL, ["The return statement", "and"], "--max-new-tokens", "3")
    assert [each["reused"] for each in found] == [0, found[0]["computed"] + 2], error


def test_a_chat_ends_with_its_context(chat_folder: Path) -> None:
    found, _ = talk(chat_folder, ["Hi", "There", "More", "/reset", "Hi"], "--context", "32")
    used = found[0]["prompt_tokens"] + len(found[0]["tokens"])
    assert found[0]["left"] == 32 - used
    assert any("fewer than 32 are possible" in each.get("error", "") for each in found) and used < 32
    assert found[-1]["tokens"] == found[0]["tokens"]
    tight, _ = talk(chat_folder, ["Hi"], "--context", str(found[0]["prompt_tokens"] + 2))
    assert (tight[0]["tokens"], tight[0]["left"]) == (found[0]["tokens"][:2], 0)
    assert "--context is 2000, needs 1 to 1024" in error_line(CHAT, chat_folder, "--context", "2000")
    assert "--logprobs is given" in (line := error_line(CHAT, chat_folder, "--logprobs", "2"))
    assert line.endswith("needs --json")


def test_commands_say_what_they_did_and_a_saved_chat_goes_on(chat_folder: Path, tmp_path: Path) -> None:
    saved, wrong = tmp_path / "saved.json", tmp_path / "wrong.json"
    wrong.write_text(json.dumps({"messages": [{"role": "user", "content": "x"}]}))
    lines = ["Hi", f"/save {saved}", "There", "/retry", "/undo", "   ", f"/save {saved}", "/system Be short.", "/reset"]
    lines += [f"/load {saved}", "There", "/undo", "/undo", "/retry", f"/load {wrong}", "/load /dev/zero", "/save"]
    lines += ["/load no/such.json", "/retry there"]
    with mock.patch("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines) + "exit\nmore\n")):
        out = output(CHAT, chat_folder, "--json").splitlines()
    first, save, there, again, undo, blank, over, system, reset, load, loaded, *rest = map(json.loads, out)
    assert save["message"] == f"2 messages written to {saved}" and len(out) == len(lines)
    assert again["tokens"] == there["tokens"] and again["computed"] == 1  # the prompt's last token
    assert undo["message"] == "forgotten: There" and blank["message"] == ""
    assert over["error"] == f"/save writes a new file, and {saved} exists: needs another name"
    assert json.loads(saved.read_text())["messages"][1]["content"] == first["text"], "the first file is untouched"
    assert (system["message"], reset["message"]) == ("the system message is set", "all turns are forgotten")
    assert load["message"] == f"2 messages read from {saved}" and loaded["text"] == there["text"]
    assert rest[0]["message"] == "forgotten: There" and rest[1]["message"] == "forgotten: Hi"
    faults = ["no turn", "needs a file that /save", "needs a file that /save", "/save needs a file"]
    faults += ["no/such.json does not exist", "/retry is given 'there', needs nothing behind it"]
    for found, fault in zip(rest[2:], faults, strict=True):
        assert fault in found["error"]


@pytest.mark.parametrize("temperature", ["0", "0.5"])
def test_a_greedy_retry_says_that_its_text_is_the_same(chat_folder: Path, temperature: str) -> None:
    with mock.patch("sys.stdin", io.StringIO("Hi\n/retry\n")):
        error = run(CHAT, chat_folder, "--temperature", temperature)[2]
    assert error.count("the text is the same") == (temperature == "0")


def test_a_cache_that_does_not_grow_ends_the_turn(chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It once began empty streams for ever."""
    monkeypatch.setattr(chat, "LEAST_SLOTS", 32)
    monkeypatch.setattr(KVCache, "grow", lambda cache, slots: None)
    config = json.loads((chat_folder / "config.json").read_text())
    (chat_folder / "config.json").write_text(json.dumps({**config, "sliding_window": None}))
    found, _ = talk(chat_folder, ["Hi"], "--max-new-tokens", "40")
    assert "beyond the cache's slots, 32: needs" in found[0]["error"]


def test_what_ends_a_chat_is_text_behind_a_space(chat_folder: Path) -> None:
    assert [each["finish_reason"] for each in talk(chat_folder, [" /quit", " exit"])[0]] == ["length"] * 2
    for line in ("/quit", "/exit", "exit", "exit "):
        with mock.patch("sys.stdin", io.StringIO(f"{line}\nHi\n")):
            assert output(CHAT, chat_folder, "--json") == ""


def test_a_retry_that_fails_keeps_the_answer(chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, calls = Writer.stream, list[int]()

    def fail(writer: Writer, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("a fault")
        return stream(writer, *args)

    monkeypatch.setattr(Writer, "stream", fail)
    first, failed, again = talk(chat_folder, ["Hi", "/retry", "There"])[0]
    assert failed == {"error": "a fault"} and again["prompt_tokens"] > first["prompt_tokens"] + len(first["tokens"])


def test_an_answer_takes_what_the_context_leaves_and_says_why_it_ends(whole_folder: Path) -> None:
    command, chat = CHAT.replace(" --max-new-tokens 6", ""), "generate --device cpu --chat --prompt Hi"

    def answer(command: str, *options: str) -> tuple[Any, str]:
        with mock.patch("sys.stdin", io.StringIO("Hi\n")):
            status, out, error = run(command, whole_folder, "--json", *options)
        assert status == 0, error
        return json.loads(out), error

    found, error = answer(command, "--context", "120")
    assert "the chat has room for 120 tokens" in error
    assert (found["finish_reason"], found["left"]) == ("length", 0) and len(found["tokens"]) > 64
    end = found["tokens"][3]
    tokens = found["tokens"][: found["tokens"].index(end) + 1]
    config = whole_folder / "generation_config.json"
    config.write_text(json.dumps({"eos_token_id": end}))
    assert answer(command)[0]["finish_reason"] == "stop"
    with mock.patch("sys.stdin", io.StringIO("Hi\n")):
        left = f"{1024 - found['prompt_tokens'] - len(tokens):,} of 1,024 tokens are left"
        assert f"finish_reason: stop; {left}" in run(command, whole_folder)[2]
    config.write_text(json.dumps({"max_new_tokens": 2}))
    for other in (command, chat):
        found, _ = answer(other)
        assert (found["finish_reason"], found["tokens"]) == ("length", tokens[:2])
    assert len(answer(chat, "--max-new-tokens", "3")[0]["tokens"]) == 3


@pytest.mark.parametrize("eos", ["{{ eos_token }}", ""])
def test_after_an_eos_the_next_turn_has_what_the_template_has(eos: str, chat_folder: Path, monkeypatch: Any) -> None:
    """A template without an EOS leaves that of the answer out, too."""
    change(chat_folder / "tokenizer_config.json", chat_template=TEMPLATE.replace("{{ eos_token }}", eos))
    sample, tokenizer = generate.sample, load_tokenizer(chat_folder)
    letters = [tokenizer(letter, add_special_tokens=False).input_ids[0] for letter in "The"]  # one token, as a text
    drawn = iter(answer := [*letters, 1])
    draw = lambda *args: torch.tensor([token]) if (token := next(drawn, None)) else sample(*args)  # noqa: E731
    monkeypatch.setattr(generate, "sample", draw)
    first, second = talk(chat_folder, ["Hi", "There"], "--dtype", "float32")[0]
    assert first["finish_reason"] == "stop" and first["tokens"] == answer and first["text"] == "The"
    ids = tokenizer("<s>[user] Hi [/]", add_special_tokens=False).input_ids + first["tokens"][:-1]
    ids += tokenizer(f"{'</s>' * bool(eos)}[user] There [/]", add_special_tokens=False).input_ids
    assert second["prompt_tokens"] == len(ids) and second["reused"] == first["prompt_tokens"] + 3
    want = Mixtral.from_pretrained(chat_folder, "cpu", torch.float32).generate([ids], 6)[0].tolist()[len(ids) :]
    assert second["tokens"] == want


def test_the_prefill_rate_counts_computed_tokens_alone() -> None:
    speed, line = speed_of([0.0, 2.0, 3.0], 100, reused=90)
    assert speed["prefill_tokens_per_second"] == 5.0 and "prefill: 10 tokens and 90 reused, 5.0 tokens/s" in line
    assert speed["decode_tokens_per_second"] == 1.0


def test_a_cache_grows_to_the_limit_and_starts_again_where_no_memory_is_left(
    chat_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer by layer; what is compiled ahead knows all its sizes. The text is that of a cache of the whole context."""
    monkeypatch.setattr(chat, "LEAST_SLOTS", 16)
    change(chat_folder / "config.json", sliding_window=None)
    sizes, grow, compiled = list[int](), KVCache.grow, list[int]()
    monkeypatch.setattr(KVCache, "grow", lambda kv, n: (grow(kv, n), sizes.append(kv.max_len))[0])
    monkeypatch.setattr(Writer, "begin", lambda w, B, T, slots, held=0: compiled.append(slots))
    options = ("--context", "100", "--dtype", "float32", "--logprobs", "0", "--max-new-tokens", "30")
    found, _ = talk(chat_folder, ["Hi", "There"], *options)
    assert sizes == [32, 64, 100] and compiled == [16, 32, 64, 100, 64] and found[1]["reused"] > 30
    monkeypatch.setattr(chat, "LEAST_SLOTS", 1024)
    assert answers(talk(chat_folder, ["Hi", "There"], *options)[0]) == answers(found)
    monkeypatch.setattr(chat, "LEAST_SLOTS", 16)

    def fail(cache: KVCache, shape: Any, device: Any) -> Any:
        if shape[2] > 64:
            raise torch.OutOfMemoryError("no memory")
        return zeros(cache, shape, device)

    zeros = KVCache._zeros
    monkeypatch.setattr(KVCache, "_zeros", fail)
    (first, failed, again), _ = talk(chat_folder, ["Hi", "There", "/reset", "Hi"], *options)
    assert first["tokens"] == again["tokens"] == found[0]["tokens"]
    assert "no memory is left on cpu for a cache of 100 tokens: /reset begins" in failed["error"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_a_cache_grows_layer_by_layer(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the new slots are the old ones of one layer at most."""
    model, zeros = random_model(sliding_window=None, num_hidden_layers=3), KVCache._zeros
    cache = KVCache(model.config, 2, 8, "cpu", dtype)
    ids = torch.arange(12).view(2, 6)
    model(ids, cache=cache)
    want = model(ids[:, :1], cache=copy.deepcopy(cache))
    old, most = [weakref.ref(each) for each in (*cache.keys, *cache.values)], list[int]()

    def count(cache: KVCache, shape: Any, device: Any) -> Any:
        most.append(sum(each() is not None for each in old))
        return zeros(cache, shape, device)

    monkeypatch.setattr(KVCache, "_zeros", count)
    cache.grow(20)
    assert (cache.slots, cache.max_len, cache.keys[2].shape[2]) == (20, 20, 20) and most == [*range(6, 0, -1)]
    assert torch.equal(model(ids[:, :1], cache=cache), want) and cache.conversation.held_tokens(cache) == [
        [*row, row[0]] for row in ids.tolist()
    ]


def test_offload_auto_plans_the_context_of_a_chat(chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixtral_triton.model.memory_plan.AUTO_CONTEXT", 100)
    monkeypatch.setattr(chat, "Chat", made := mock.Mock(side_effect=ValueError))
    for options, want in (("--offload auto", 100), ("", 1024), ("--offload auto --context 50", 50)):
        assert run(f"{CHAT} {options}", chat_folder)[0] == 2 and made.call_args.args[2] == want


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs a pseudo-terminal")
def test_ctrl_c_ends_the_answer_and_ctrl_d_the_chat_on_a_terminal(whole_folder: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0", "TERM": "dumb"}
    options = "--device cpu --max-new-tokens 900 --deterministic"  # an answer that takes longer than a signal
    command = [sys.executable, "-m", "mixtral_triton", "chat", whole_folder, *options.split()]
    terminal = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = subprocess.Popen(command, env=environment, preexec_fn=_lead, **terminal)
    os.close(theirs)
    shown = ""

    def read_until(text: str, again: bytes = b"") -> str:
        """Return what the terminal shows up to `text`; the rest is for the next call. "": 30 characters.
        Where nothing comes for a second, the keys `again` are pressed again."""
        nonlocal shown
        end = time.monotonic() + 120
        while text not in shown if text else len(shown) < 30:
            assert time.monotonic() < end and process.poll() is None, shown
            if select.select([ours], [], [], 1.0)[0]:
                shown += os.read(ours, 1 << 16).decode(errors="replace")
            elif again:
                os.write(ours, again)
        seen, _, shown = shown.partition(text or shown)
        return seen

    try:
        read_until("> ")
        os.write(ours, b"What is a function?\n")
        read_until("function?\r\n")
        read_until("")  # of the answer
        os.write(ours, b"\x03")
        assert "decode: 899 tokens" not in read_until("tokens/s; finish")
        read_until("> ")
        os.write(ours, b"/undo\n")
        read_until("> ")
        os.write(ours, b"\x03")
        read_until("> ", again=b"\x03")  # CPython sees one that comes between prompt and wait only with the next key
        os.write(ours, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(ours)


def _lead() -> None:
    """Make the terminal that of a session of its own, so that Ctrl-C reaches it."""
    import fcntl
    import termios

    heed_interrupts()
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)

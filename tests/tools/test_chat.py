"""The commands `chat` and `generate --batch`: turns that share a cache, lines that are wrong, Ctrl-C, files that are
continued."""

import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixtral_triton import KVCache, Mixtral
from mixtral_triton.config import SMALL
from mixtral_triton.layer import Layer
from mixtral_triton.load import MARGIN
from mixtral_triton.tools import batch
from mixtral_triton.tools.prompt import load_tokenizer
from mixtral_triton.tools.writer import Writer
from tests.cli.commands import ROOT, error_line, heed_interrupts, output, run, run_json

pytestmark = pytest.mark.compiled
# An answer stands in the next turn as it was written. The third turn fails where its text says so.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}{{ eos_token }}{% else %}"
    "{% if 'fail' in m.content %}{{ raise_exception('no turn 3') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }} [/]{% endif %}{% endfor %}"
)
TURNS = ["What is a function?", "And a return?", "The list", "a class", "print", "str", "Why?", "if x", "else", "end"]
CHAT = "chat --device cpu --max-new-tokens 6"


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def whole_folder(folder: Path) -> Path:
    """The small checkpoint with a chat template."""
    change(folder / "tokenizer_config.json", chat_template=TEMPLATE)
    return folder


@pytest.fixture
def chat_folder(whole_folder: Path) -> Path:
    """The same with one layer."""
    change(whole_folder / "config.json", num_hidden_layers=1)
    tensors = load_file(whole_folder / "model.safetensors")
    kept = {name: x for name, x in tensors.items() if ".layers." not in name or ".layers.0." in name}
    save_file(kept, whole_folder / "model.safetensors")
    return whole_folder


def talk(folder: Path, lines: list[str] | bytes, *more: str) -> tuple[list[Any], str]:
    """Give the lines to `chat --json` -> its documents, and what is on stderr."""
    text = lines if isinstance(lines, bytes) else "".join(f"{line}\n" for line in lines).encode()
    with mock.patch("sys.stdin", io.TextIOWrapper(io.BytesIO(text))):
        status, out, error = run(CHAT, folder, "--json", *more)
    assert status == 0, error
    return [json.loads(line) for line in out.splitlines()], error


@pytest.fixture
def appended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens that each forward of a model appends."""
    counts, hidden = list[int](), Mixtral.hidden

    def count(model: Mixtral, ids: Any, cache: Any = None, lengths: Any = None, *rest: Any) -> Any:
        counts.append(ids.numel() if lengths is None else int(lengths.sum()))
        return hidden(model, ids, cache, lengths, *rest)

    monkeypatch.setattr(Mixtral, "hidden", count)
    return counts


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
        ids = ids + tokenizer.encode(text, add_special_tokens=False).ids
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
    prompts = [part for turn in TURNS for part in ("--prompt", turn)]
    scratch = run_json(CHAT.replace("chat", "generate --chat"), whole_folder, *options, *prompts)
    texts = [message["content"] for message in scratch["messages"] if message["role"] == "assistant"]
    assert texts == [turn["text"] for turn in found] and scratch["reused"] == found[-1]["reused"]


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
    assert "/save" in save["error"] and "no turn to forget" in none["error"] and "UTF-8" in not_text["error"]
    assert again["text"] and reset["tokens"] == first["tokens"]
    (message, answer) = json.loads(saved.read_text())["messages"]
    assert message == {"role": "user", "content": "again"} and answer["content"] == again["text"]


def test_commands_change_the_chat(chat_folder: Path) -> None:
    long = "Hi " * 40  # more than the ring holds
    plain, *_ = talk(chat_folder, [long, "There"])
    found, error = talk(chat_folder, [long, "Other", "/undo", "There", "/system Be short.", "There"])
    for name in ("tokens", "prompt_tokens"):
        assert [each[name] for each in (found[0], found[2])] == [each[name] for each in plain]
    assert "mixtral-triton chat: generate: a text is computed from its start: other tokens are in the cache" in error
    assert found[3]["prompt_tokens"] > found[2]["prompt_tokens"] + 6
    want, _ = talk(chat_folder, ["Hi"], "--system", "Be short.", "--logprobs", "2")
    assert want == talk(chat_folder, ["/system Be short.", "Hi"], "--logprobs", "2")[0][:0] + want
    assert [len(each["top"]) for each in want[0]["logprobs"]] == [2] * len(want[0]["tokens"])
    assert talk(chat_folder, ["/system fail", "Hi"])[0][0]["error"].endswith("leave --system out")


def test_the_small_checkpoint_has_a_template() -> None:
    found, error = talk(SMALL, ["The return statement", "and"], "--max-new-tokens", "3")
    assert [each["reused"] for each in found] == [0, found[0]["computed"] + 2], error


def test_the_chat_says_so_before_its_positions_end(chat_folder: Path) -> None:
    found, error = talk(chat_folder, ["Hi", "There", "More", "/reset", "Hi"], "--context", "32")
    used = found[0]["prompt_tokens"] + len(found[0]["tokens"])
    assert found[0]["left"] == 32 - used and error.count("/reset") == 0
    with mock.patch("sys.stdin", io.StringIO("Hi\n")):
        shown = run(CHAT, chat_folder, "--context", "26")[2]
    assert f"; {26 - used} of 26 tokens are left: /reset begins a new chat" in shown
    assert any("fewer than 32 are possible" in each.get("error", "") for each in found) and used < 32
    assert found[-1]["tokens"] == found[0]["tokens"]
    tight, _ = talk(chat_folder, ["Hi"], "--context", str(found[0]["prompt_tokens"] + 2))
    assert (tight[0]["tokens"], tight[0]["left"]) == (found[0]["tokens"][:2], 0)
    assert "--context is 2000, needs 1 to 1024" in error_line(CHAT, chat_folder, "--context", "2000")
    assert "--logprobs is given" in error_line(CHAT, chat_folder, "--logprobs", "2")
    change(chat_folder / "tokenizer_config.json", chat_template=None)
    assert "--chat needs a template" in error_line(CHAT, chat_folder)


def test_a_cache_without_a_window_grows_with_the_chat(chat_folder: Path, appended: list[int]) -> None:
    change(chat_folder / "config.json", sliding_window=None)
    for options in ((), ("--cache-dtype", "int8")):
        appended.clear()
        found, _ = talk(chat_folder, TURNS[:5], "--dtype", "float32", "--logprobs", "0", *options)
        assert sum(appended) == found[-1]["prompt_tokens"] + len(found[-1]["tokens"]) - 1
        dtype = torch.int8 if options else None
        assert answers(found) == answers_from_scratch(chat_folder, TURNS[:5], cache_dtype=dtype)
    stop = found[0]["text"][2:5]
    shorter, _ = talk(chat_folder, TURNS[:5], "--cache-dtype", "int8", "--stop", stop)
    assert shorter[0]["text"] == found[0]["text"].partition(stop)[0] and shorter[1]["reused"] > 5


def start(*words: Any) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "mixtral_triton", *map(str, words)]
    pipes: dict[str, Any] = {"stdin": -1, "stdout": -1, "stderr": -1, "text": True, "bufsize": 0}
    return subprocess.Popen(command, env=environment, preexec_fn=heed_interrupts, **pipes)


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
        assert "decode: 899 tokens" not in read_until("tokens/s; peak")
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


BATCH = "generate --device cpu --max-new-tokens 5 --deterministic --batch-size 3"


def write_jobs(folder: Path, count: int = 40) -> Path:
    """Jobs of several lengths, of which two are wrong."""
    lines = [{"id": f"a{i}", "prompt": "The return " * (1 + 7 * i % 5)} for i in range(count)]
    lines[4], lines[9] = {"messages": [{"role": "user", "content": "Hi"}]}, {"id": 9, "prompt": 7}
    texts = [json.dumps(line) for line in lines]
    texts[11] = "{nothing"
    (folder / "jobs.jsonl").write_text("\n".join(texts) + "\n\n")
    return folder / "jobs.jsonl"


def test_batch_writes_each_line_s_result_in_order(chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, out, sizes = write_jobs(chat_folder, 16), chat_folder / "out.jsonl", list[int]()
    stream = Mixtral.stream
    monkeypatch.setattr(
        Mixtral, "stream", lambda m, rows, *a, **o: (sizes.append(len(rows)), stream(m, rows, *a, **o))[1]
    )
    status, text, _ = run(BATCH, chat_folder, "--batch", jobs, "--out", out, "--logprobs", "2")
    assert (status, text) == (1, "") and max(sizes) == 3 and sum(sizes) == 14
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [each["id"] for each in found[:6]] == ["a0", "a1", "a2", "a3", 5, "a5"] and len(found) == 16
    assert [index for index, each in enumerate(found) if "error" in each] == [9, 11]
    assert "line 10 " in found[9]["error"] and "line 12 is no JSON" in found[11]["error"]
    alone = run_json(BATCH.replace(" --batch-size 3", ""), chat_folder, "--prompt", "The return " * 3)
    same = next(each for each in found if each["id"] == "a4" or each.get("tokens") == alone["tokens"])
    assert same["text"] == alone["text"]
    assert all([each["token"] for each in line["logprobs"]] == line["tokens"] for line in found if "tokens" in line)
    chat = run_json(BATCH.replace(" --batch-size 3", ""), chat_folder, "--chat", "--prompt", "Hi")
    assert found[4]["text"] == chat["text"] and found[4]["tokens"] == chat["tokens"]
    stop = alone["text"][3:5]
    stopped = output(BATCH, chat_folder, "--batch", jobs, "--stop", stop, status=1).splitlines()
    assert len(stopped) == 16
    for line, each in zip(map(json.loads, stopped), found, strict=True):
        assert line.get("text") == (each["text"].partition(stop)[0] if "text" in each else None)


@pytest.mark.slow
def test_an_interrupted_batch_is_continued(chat_folder: Path, appended: list[int], monkeypatch: Any) -> None:
    jobs, out = write_jobs(chat_folder), chat_folder / "out.jsonl"
    long = BATCH.replace("--max-new-tokens 5", "--max-new-tokens 40")  # the rest takes longer than a signal
    whole = output(long, chat_folder, "--batch", jobs, status=1)
    process = start(*long.split(), chat_folder, "--batch", jobs, "--out", out)
    while not out.exists() or out.read_bytes().count(b"\n") < 12:  # a window's lines are written one by one
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    written = out.read_text()
    assert whole.startswith(written) and 12 <= len(written.splitlines()) < 40
    out.write_text(written + '{"id": "a12", "te')  # half a line
    appended.clear()
    assert output(long, chat_folder, "--batch", jobs, "--out", out, status=1) == ""
    assert out.read_text() == whole
    tokenizer, rest = load_tokenizer(chat_folder), [json.loads(line) for line in whole.splitlines()]
    prompts = [json.loads(line) for line in jobs.read_text().splitlines()[len(written.splitlines()) :] if line]
    lengths = [len(tokenizer.encode(each["prompt"]).ids) for each in prompts if isinstance(each.get("prompt"), str)]
    rest = rest[len(written.splitlines()) :]
    assert sum(appended) == sum(lengths) + sum(len(each["tokens"]) - 1 for each in rest if "tokens" in each)
    appended.clear()
    assert output(long, chat_folder, "--batch", jobs, "--out", out, status=1) == "" and not appended


WRONG: dict[str, tuple[str, ...]] = {
    "is not of the job in its place": ("--batch", "{jobs}", "--out", "{other}"),
    "is the file of --batch, needs another": ("--batch", "{jobs}", "--out", "{jobs}"),
    "needs neither --prompt": ("--batch", "{jobs}", "--prompt", "x"),
    "No such file": ("--batch", "no/such/file"),
    "needs a number of prompts, or auto": ("--batch", "{jobs}", "--batch-size", "0"),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_batch_is_one_line(message: str, chat_folder: Path) -> None:
    (chat_folder / "other.jsonl").write_text('{"id": "b0", "text": ""}\n')
    files = {"jobs": write_jobs(chat_folder), "other": chat_folder / "other.jsonl"}
    command = BATCH.replace(" --batch-size 3", "") if "--batch-size" in WRONG[message] else BATCH
    assert message in error_line(command, chat_folder, *(word.format(**files) for word in WRONG[message]))


def test_lines_that_no_job_is_in() -> None:
    lines = [
        b"[1]",
        b'{"prompt": ""}',
        b'{"prompt": "a", "messages": []}',
        b'{"messages": []}',
        b'{"prompt": "a", "x": 1}',
    ]
    lines += [b'{"messages": [{"role": "user"}]}', b'{"prompt": "\\ud800"}', b"\xff", b"[" * 100_000, b"{}"]
    for line in lines:
        assert batch._read_job(3, line).error.startswith("line 3 "), line


def test_a_batch_is_as_large_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Mixtral.from_pretrained(SMALL, "cpu")
    writer: Any = mock.Mock(model=model, dtype=model.dtype, args=mock.Mock(max_new_tokens=5))
    lengths = dict(enumerate([9, 30, 3, 500, 4, 900]))
    assert list(batch._batches(writer, lengths, 4)) == [[2, 4, 0, 1], [3, 5]]
    need = batch.running_bytes(model.config, 2, 35, model.prefill_chunk, model.dtype)
    free = need["graph"] / (1 - MARGIN) + 1.1 * (sum(need.values()) - need["graph"])
    monkeypatch.setattr(batch, "free_memory", lambda device: int(free))
    assert list(batch._batches(writer, lengths, 4)) == [[2, 4], [0, 1], [3], [5]]


@pytest.mark.parametrize("tokens", [5, 6])
def test_a_job_may_take_all_positions_and_no_more(tokens: int) -> None:
    writer = mock.Mock(args=mock.Mock(max_new_tokens=3), encode=lambda text: [*range(tokens)])
    writer.model.config.max_position_embeddings = 8
    with nullcontext() if tokens == 5 else pytest.raises(ValueError, match="max_position_embeddings, 8"):
        assert batch._encode(writer, [], batch.Job(0, "x"))[1] == [tokens - 1]


def test_a_sequence_of_a_batch_ends_before_the_others() -> None:
    """With its EOS, or at a stop string."""
    texts = {1: "", 5: "a", 6: "EN", 7: "D", 8: "b"}
    words = mock.Mock(decode=lambda ids, **_: "".join(texts[id] for id in ids))
    steps = [torch.tensor(step) for step in ([5, 5, 5], [1, 6, 8], [1, 7, 8], [1, 8, 8])]
    writer: Any = mock.Mock(tokenizer=words, eos={1}, args=mock.Mock(stop=["END"], max_new_tokens=4))
    writer.stream = lambda rows, n: iter(steps)
    found = Writer.write_batch(writer, [[5]] * 3, [[]] * 3)
    assert [each["tokens"] for each in found] == [[5, 1], [5, 6, 7], [5, 8, 8, 8]]
    assert [each["text"] for each in found] == ["a", "a", "abbb"]

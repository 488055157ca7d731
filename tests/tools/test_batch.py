"""The command `generate --batch`: wrong lines, files that are continued and those that are not ours, memory."""

import json
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from mixtral_triton import Mixtral
from mixtral_triton.config import SMALL
from mixtral_triton.load import MARGIN
from mixtral_triton.sampling import Logprobs
from mixtral_triton.tools import batch
from mixtral_triton.tools.prompt import load_tokenizer
from mixtral_triton.tools.writer import Writer, read_step
from tests.cli.commands import error_line, output, run, run_json
from tests.tools.test_chat import start

pytestmark = pytest.mark.compiled
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
    lengths = [len(tokenizer(each["prompt"]).input_ids) for each in prompts if isinstance(each.get("prompt"), str)]
    rest = rest[len(written.splitlines()) :]
    assert sum(appended) == sum(lengths) + sum(len(each["tokens"]) - 1 for each in rest if "tokens" in each)
    appended.clear()
    assert output(long, chat_folder, "--batch", jobs, "--out", out, status=1) == "" and not appended


WRONG: dict[str, tuple[str, ...]] = {
    "line 1 is not of this job": ("--batch", "{jobs}", "--out", "{other}"),
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
        b'{"prompt": "a", "text": 1}',
        b'{"prompt": "a", "id": NaN}',
        b'{"prompt": "a", "id": 1e400}',
        b'{"prompt": "a", "prompt": "b"}',
    ]
    lines += [b'{"messages": [{"role": "user"}]}', b'{"prompt": "\\ud800"}', b"\xff", b"[" * 100_000, b"{}"]
    for line in lines:
        assert batch._read_job(3, line).error.startswith("line 3 "), line


def test_a_batch_is_as_large_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Mixtral.from_pretrained(SMALL, "cpu")
    writer: Any = mock.Mock(model=model, dtype=model.dtype, new_tokens=5)
    lengths = dict(enumerate([9, 30, 3, 500, 4, 900]))
    assert list(batch._batches(writer, lengths, 4)) == [[2, 4, 0, 1], [3, 5]]
    need = batch.running_bytes(model.config, 2, 35, model.prefill_chunk, model.dtype)
    free = need["graph"] / (1 - MARGIN) + 1.1 * (sum(need.values()) - need["graph"])
    monkeypatch.setattr(batch, "free_memory", lambda device: int(free))
    assert list(batch._batches(writer, lengths, 4)) == [[2, 4], [0, 1], [3], [5]]


@pytest.mark.parametrize("tokens", [5, 6])
def test_a_job_may_take_all_positions_and_no_more(tokens: int) -> None:
    writer = mock.Mock(new_tokens=3, encode=lambda text: [*range(tokens)])
    writer.model.config.max_position_embeddings = 8
    with nullcontext() if tokens == 5 else pytest.raises(ValueError, match="max_position_embeddings, 8"):
        assert batch._encode(writer, batch.Job(0, "x", ""))[1] == [tokens - 1]


def test_a_sequence_of_a_batch_ends_before_the_others() -> None:
    """With its EOS, or at a stop string."""
    texts = {1: "", 5: "a", 6: "EN", 7: "D", 8: "b"}
    words = mock.Mock(decode=lambda ids, **_: "".join(texts[id] for id in ids))
    steps = [[{"token": token} for token in step] for step in ([5, 5, 5], [1, 6, 8], [1, 7, 8], [1, 8, 8])]
    writer: Any = mock.Mock(tokenizer=words, eos={1}, args=mock.Mock(stop=["END"], logprobs=None))
    writer.stream = lambda rows, n: iter(steps)
    found = Writer.write_batch(writer, [[5]] * 3, [[]] * 3)
    assert [each["tokens"] for each in found] == [[5, 1], [5, 6, 7], [5, 8, 8, 8]]
    assert [each["text"] for each in found] == ["a", "a", "abbb"]
    assert [each["finish_reason"] for each in found] == ["stop", "stop", "length"]


def test_a_step_is_copied_to_the_host_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, copies = torch.tensor([3, (1 << 31) + 1]), list[Any]()
    step = Logprobs(ids, torch.tensor([-0.1, -2.5e-8]), torch.tensor([[3, 4], [5, 6]]), torch.rand(2, 2))
    want = [each.tolist() for each in step]
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: copies.append(x.shape) or tolist(x))
    found = read_step(step)
    assert len(copies) == 1 and [each["token"] for each in found] == want[0]
    assert [each["logprob"] for each in found] == want[1]
    tops = [[[each[name] for each in row["top"]] for row in found] for name in ("token", "logprob")]
    assert tops == want[2:]

"""The command `generate --batch`: wrong lines, files that are continued and those that are not ours, memory."""

import io
import json
import os
import re
import signal
import subprocess
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from mixtral_triton import Mixtral
from mixtral_triton.cli import batch
from mixtral_triton.cli.text_stream import read_step
from mixtral_triton.model.sampling import Logprobs
from tests.cli.commands import error_line, heed_interrupts, output, run, run_json
from tests.cli.test_cli import command

pytestmark = pytest.mark.compiled
BATCH = "generate --device cpu --max-new-tokens 5 --deterministic --batch-size 3"


def write_jobs(folder: Path, count: int = 40) -> Path:
    """Jobs of several lengths; of at least twelve, two are wrong."""
    lines = [{"id": f"a{i}", "prompt": "The return " * (1 + 7 * i % 5)} for i in range(count)]
    if count > 11:
        lines[4], lines[9] = {"messages": [{"role": "user", "content": "Hi"}]}, {"id": 9, "prompt": 7}
    texts = [json.dumps(line) for line in lines]
    if count > 11:
        texts[11] = "{nothing"
    (folder / "jobs.jsonl").write_text("\n".join(texts) + "\n\n")
    return folder / "jobs.jsonl"


def test_batch_writes_each_line_s_result_in_order(chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, out, sizes = write_jobs(chat_folder, 16), chat_folder / "out.jsonl", list[int]()
    stream = Mixtral.stream
    monkeypatch.setattr(
        Mixtral, "stream", lambda m, rows, *a, **o: (sizes.append(len(rows)), stream(m, rows, *a, **o))[1]
    )
    status, text, error = run(BATCH, chat_folder, "--batch", jobs, "--out", out, "--logprobs", "2")
    assert error.splitlines()[-1] == "2 of 16 lines ended in an error"
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
    words = command(*long.split(), *map(str, (chat_folder, "--batch", jobs, "--out", out)), TRITON_INTERPRET="0")
    process = subprocess.Popen(**words, preexec_fn=heed_interrupts, stdout=-1, stderr=-1, text=True)
    while not out.exists() or out.read_bytes().count(b"\n") < 12:  # a window's lines are written one by one
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    written = out.read_text()
    assert whole.startswith(written) and 12 <= len(written.splitlines()) < 40
    out.write_text(whole[: len(written) + 40])  # half a line more
    total = sum(appended)
    appended.clear()
    assert output(long, chat_folder, "--batch", jobs, "--out", out, status=1) == ""
    assert out.read_text() == whole and 0 < sum(appended) < total
    appended.clear()
    assert output(long, chat_folder, "--batch", jobs, "--out", out, status=1) == "" and not appended


def test_only_a_half_line_of_the_same_job_is_ever_cut(chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of somebody else without a newline, as json.dump writes it, stays to the byte, and no model is loaded."""
    jobs, out = write_jobs(chat_folder, 4), chat_folder / "out.jsonl"
    whole = output(BATCH, chat_folder, "--batch", jobs, "--out", out) or out.read_bytes()
    lines = whole.splitlines(keepends=True)
    load = Mixtral.from_pretrained
    monkeypatch.setattr(Mixtral, "from_pretrained", lambda *_, **__: pytest.fail("the model is loaded"))
    other = b"".join([lines[0], lines[1].replace(b'"digest": "', b'"digest": "0')])
    for content in (b'{"my": "data"}', b"{", b"\n", lines[0][:9], other, b"".join([*lines, lines[0]]), whole + b"x"):
        out.write_bytes(content)
        assert "is not of this job, needs results of the same" in error_line(
            BATCH, chat_folder, "--batch", jobs, "--out", out
        )
        assert out.read_bytes() == content
    assert "--out /dev/zero is a pipe, a device" in error_line(
        BATCH, chat_folder, "--batch", jobs, "--out", "/dev/zero"
    )
    monkeypatch.setattr(Mixtral, "from_pretrained", load)
    for content in (lines[0] + lines[1][:40], lines[0] + lines[1][:5], lines[0][:40], b""):
        out.write_bytes(content)
        assert output(BATCH, chat_folder, "--batch", jobs, "--out", out) == "" and out.read_bytes() == whole


def test_results_of_another_job_are_refused(chat_folder: Path) -> None:
    """Another prompt at the same place, an option that changes texts, another checkpoint in the folder. The size of a
    batch and where it runs do not."""
    jobs, out = chat_folder / "jobs.jsonl", chat_folder / "out.jsonl"
    jobs.write_text('{"prompt": "The return", "source": "docs"}\n{"prompt": "A list"}\n')
    words = ("--batch", jobs, "--out", out)
    assert output(BATCH, chat_folder, *words) == ""
    before = out.read_bytes()
    found = [json.loads(line) for line in before.splitlines()]
    assert found[0]["source"] == "docs" and [each["finish_reason"] for each in found] == ["length"] * 2
    status, _, error = run(BATCH.replace("--batch-size 3", "--batch-size 1"), chat_folder, *words)
    assert status == 0 and "2 results kept\n" in error and out.read_bytes() == before
    for options in ("--seed 1", "--weights int8", "--logprobs 0", "--stop x", "--max-new-tokens 4", "--temperature 1"):
        line = error_line(f"{BATCH} {options}", chat_folder, *words)
        assert "line 1 is not of this job" in line and line.endswith(
            f"; it was written with another {options.split()[0]}"
        )
    jobs.write_text(jobs.read_text().replace("A list", "A tuple"))
    assert re.search("line 2 is not of this job.*with another prompt$", error_line(BATCH, chat_folder, *words))
    jobs.write_text(jobs.read_text().replace("A tuple", "A list"))
    assert output(BATCH, chat_folder, *words) == "" and out.read_bytes() == before
    os.utime(chat_folder / "model.safetensors", ns=(1, 1))
    assert re.search("line 1 is not of this job.*with another folder$", error_line(BATCH, chat_folder, *words))


def test_errors_are_tried_again_and_stand_in_their_place(chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of memory that had run out, for example. Until all are there, the file keeps what it had."""
    jobs, out, stream = write_jobs(chat_folder, 9), chat_folder / "out.jsonl", Mixtral.stream
    want = output(BATCH, chat_folder, "--batch", jobs)

    def fail(model: Mixtral, rows: Any, *args: Any, **options: Any) -> Any:
        if len(rows[0]) > 8:
            raise torch.OutOfMemoryError("no memory")
        return stream(model, rows, *args, **options)

    monkeypatch.setattr(Mixtral, "stream", fail)
    status, _, error = run(BATCH, chat_folder, "--batch", jobs, "--out", out)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    errors = sum("error" in each for each in found)
    assert status == 1 and 0 < errors < len(found) and "no memory is left for" in error
    assert f"{errors} of 9 lines ended in an error\n" in error
    monkeypatch.setattr(Mixtral, "stream", stream)
    status, _, error = run(BATCH, chat_folder, "--batch", jobs, "--out", out)
    assert status == 0 and f"{len(found) - errors} results kept, {errors} errors tried again\n" in error
    assert out.read_text() == want


def test_a_batch_that_memory_is_not_enough_for_is_halved(chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once: what worked stays. The error is that of torch, or the one that explains it."""
    jobs, stream, sizes = write_jobs(chat_folder, 8), Mixtral.stream, list[int]()

    def fail(model: Mixtral, rows: Any, *args: Any, **options: Any) -> Any:
        sizes.append(len(rows))
        if len(rows) > 2:
            raise ValueError("generate: no memory is left") from torch.OutOfMemoryError("no memory")
        return stream(model, rows, *args, **options)

    large = BATCH.replace("--batch-size 3", "--batch-size 7")
    want = output(large, chat_folder, "--batch", jobs)
    monkeypatch.setattr(Mixtral, "stream", fail)
    status, out, error = run(large, chat_folder, "--batch", jobs)
    assert (status, out) == (0, want) and sizes == [7, 4, 2, 2, 2, 2]
    assert "no memory is left for 7 sequences: at most 4 from here on" in error


def test_jobs_come_from_standard_input(chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = write_jobs(chat_folder, 4)
    want = output(BATCH, chat_folder, "--batch", jobs)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(jobs.read_bytes())))
    assert output(BATCH, chat_folder, "--batch", "-") == want
    monkeypatch.setattr("sys.stdin", None)
    assert "--batch - reads standard input, which is closed" in error_line(BATCH, chat_folder, "--batch", "-")


def test_a_wrong_line_that_was_mended_is_answered_in_its_place(chat_folder: Path) -> None:
    jobs, out = chat_folder / "jobs.jsonl", chat_folder / "out.jsonl"
    jobs.write_text('{"prompt": "The return"}\n{"promt": "A list"}\n{"prompt": ""}\n')
    status, _, error = run(BATCH, chat_folder, "--batch", jobs, "--out", out)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert status == 1 and "line 3 has an empty prompt" in found[2]["error"] and "line 2 is {" in found[1]["error"]
    jobs.write_text('{"prompt": "The return"}\n{"text": "A list"}\n{"text": "A tuple"}\n')
    status, _, error = run(BATCH, chat_folder, "--batch", jobs, "--out", out)
    assert status == 0 and "1 results kept, 2 errors tried again\n" in error
    assert out.read_text() == output(BATCH, chat_folder, "--batch", jobs)
    out.write_text('{"error": "of another program"}\n')
    assert "line 1 is not of this job" in error_line(BATCH, chat_folder, "--batch", jobs, "--out", out)


def test_lines_that_no_job_is_in() -> None:
    lines = [
        b"[1]",
        b'{"prompt": ""}',
        b'{"text": ""}',
        b'{"text": 1}',
        b'{"text": "a", "messages": []}',
        b'{"prompt": "a", "messages": []}',
        b'{"messages": []}',
        b'{"prompt": "a", "text": 1}',
        b'{"prompt": "a", "id": NaN}',
        b'{"prompt": "a", "id": 1e400}',
    ]
    lines += [b'{"messages": [{"role": "user"}]}', b'{"prompt": "\\ud800"}', b"\xff", b"[" * 100_000, b"{}"]
    for line in lines:
        assert batch._read_job(3, line).error.startswith("line 3 "), line


@pytest.mark.parametrize("tokens", [5, 6])
def test_a_job_may_take_all_positions_and_no_more(tokens: int) -> None:
    writer = mock.Mock(new_tokens=3, encode=lambda text: [*range(tokens)])
    writer.model.config.max_position_embeddings = 8
    with nullcontext() if tokens == 5 else pytest.raises(ValueError, match="max_position_embeddings, 8"):
        assert batch._encode(writer, batch.Job(0, "x", "", {}))[1] == [tokens - 1]


def test_a_sequence_of_a_batch_ends_before_the_others() -> None:
    """With its EOS, or at a stop string."""
    texts = {1: "", 5: "a", 6: "EN", 7: "D", 8: "b"}
    words = mock.Mock(decode=lambda ids, **_: "".join(texts[id] for id in ids))
    steps = [[{"token": token} for token in step] for step in ([5, 5, 5], [1, 6, 8], [1, 7, 8], [1, 8, 8])]
    writer: Any = mock.Mock(tokenizer=words, eos={1}, args=mock.Mock(stop=["END"], logprobs=None))
    writer.stream = lambda rows, n: iter(steps)
    found = batch.write_batch(writer, [[5]] * 3, [[]] * 3)
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

"""The command `generate --batch`: prompts of a file of JSON lines, answered in batches of similar length."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..checkpoint.arguments import check_positions
from ..checkpoint.config import CONFIG_FILES, TEXT_FILES
from ..terminal import Bar, check_writable, print_message
from .prompt import render
from .text_stream import Text, Writer

BATCH = 32  # the most sequences of a batch without --batch-size
CPU_BATCH = 8
WINDOW = 4  # batches of which lengths are sorted: so many are lost where the command is interrupted
JUDGED = 16  # digits of a digest that decide; those behind them say what differs
MOST_BYTES = 1 << 30  # of the prompts
# Fields of a result, which no line of --batch may have; and options on which no text depends but by rounding.
RESULT = ("digest", "text", "tokens", "finish_reason", "logprobs", "error")
FREE_OPTIONS = {"command", "json", "folder", "batch", "out", "batch_size", "prompt", "chat", "system"}
FREE_OPTIONS |= {"device", "interpret", "offload", "context"}


class Job(NamedTuple):
    """A line of --batch."""

    id: Any
    prompt: str | list[dict[str, str]] | None  # a text, or messages
    digest: str  # of the line, the folder and the options, by which its result is known again
    extra: dict[str, Any]  # fields that pass through
    error: str = ""


def read_jobs(args: argparse.Namespace) -> list[Job]:
    """Return the jobs of --batch FILE, one a line that is not blank. What is wrong with a line is its error."""
    if args.prompt or args.chat or args.system is not None:
        raise ValueError("--batch FILE has the prompts and messages: needs neither --prompt, --chat nor --system")
    if isinstance(args.batch, str):
        if sys.stdin is None:  # as Python has it where it is closed
            raise ValueError("--batch - reads standard input, which is closed: needs a file")
        opened: Any = nullcontext(sys.stdin.buffer)
    else:
        if args.out is not None and args.out.exists() and args.out.samefile(args.batch):
            raise ValueError(f"--out {args.out} is the file of --batch, needs another")
        opened = args.batch.open("rb")
    with opened as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"--batch {args.batch} has more than {MOST_BYTES} bytes, needs several files")
    settings, lines = _settings(args), enumerate(data.split(b"\n"), 1)
    same, hashes = json.dumps(settings).encode(), "".join(map(_digits, settings.values()))
    return [
        _read_job(number, line, f"{hashlib.sha256(same + line.strip()).hexdigest()[:JUDGED]}-{hashes}")
        for number, line in lines
        if line.strip()
    ]


def _settings(args: argparse.Namespace) -> dict[str, str]:
    """Return the options on which texts depend, and the folder with its files' states, as texts by name."""
    names = {*CONFIG_FILES, *TEXT_FILES}
    files = [file for file in sorted(args.folder.iterdir()) if file.name in names or file.suffix == ".safetensors"]
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    values = {f"--{name.replace('_', '-')}": x for name, x in sorted(vars(args).items()) if name not in FREE_OPTIONS}
    values["folder"] = [args.folder.resolve(), states]
    return {name: json.dumps(value, sort_keys=True, default=str) for name, value in values.items()}


def _digits(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:2]


def _difference(args: argparse.Namespace, line: bytes) -> str:
    """Return what tells a result's line from this job's, by the hashes in its digest; "" for any other line."""
    settings, match = _settings(args), re.match(rb'\{"digest": "[0-9a-f]+-([0-9a-f]*)"', line)
    if match is None or len(match[1]) != 2 * len(settings):
        return ""
    hashes = (match[1].decode()[start : start + 2] for start in range(0, len(match[1]), 2))
    differing = [name for name, hash in zip(settings, hashes, strict=True) if hash != _digits(settings[name])]
    return f"; it was written with another {', '.join(differing) or 'prompt'}"


def _read_job(number: int, line: bytes, digest: str = "") -> Job:
    try:
        values = json.loads(line)
        json.dumps(values, ensure_ascii=False, allow_nan=False).encode()  # fails for half a surrogate pair, and for NaN
    except (ValueError, RecursionError) as error:
        return Job(number, None, digest, {}, f"line {number} is no JSON in UTF-8: {' '.join(str(error).split())}")
    fields = dict(values) if isinstance(values, dict) else {}
    if "text" in fields and not {"prompt", "messages"} & fields.keys():  # the usual name in data sets
        fields["prompt"] = fields.pop("text")
    extra = {name: value for name, value in fields.items() if name not in ("id", "prompt", "messages")}
    id, prompt, messages = fields.get("id", number), fields.get("prompt"), fields.get("messages")
    if taken := next((name for name in RESULT if name in extra), None):
        return Job(id, None, digest, {}, f"line {number} has a field {taken!r}, which a result has: needs another name")
    if "messages" not in fields and isinstance(prompt, str) and prompt:
        return Job(id, prompt, digest, extra)
    if "prompt" not in fields and isinstance(messages, list) and messages and all(map(is_message, messages)):
        return Job(id, messages, digest, extra)
    if prompt == "":
        return Job(id, None, digest, extra, f"line {number} has an empty prompt, needs at least one character")
    need = 'an object with a "prompt" or "text", a text, or "messages", objects with a role and a content'
    return Job(id, None, digest, extra, f"line {number} is {line.decode():.60}, needs {need}")


def is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in ("role", "content"))


def read_done(args: argparse.Namespace, jobs: Sequence[Job]) -> tuple[list[dict[str, Any]], int]:
    """Return the results that the file of --out has, and the bytes of their lines: behind these may be a line that was
    not written to its end. ValueError for a file with anything else."""
    if (file := args.out) is None:
        return [], 0
    if file.exists() and not file.is_file():  # it may never end
        need = "a regular file; without --out the results go to standard output"
        raise ValueError(f"--out {file} is a pipe, a device or a folder, needs {need}")
    check_writable("--out", file)
    whole, done = file.read_bytes() if file.exists() else b"", list[dict[str, Any]]()
    *lines, last = whole.split(b"\n")
    starts = [f'{{"digest": "{job.digest[:JUDGED]}'.encode() for job in jobs]
    try:
        for line, start in zip(lines, starts[: len(lines)], strict=True):
            result = json.loads(line)
            # An error belongs to what stands in its place now: a line that was mended has another digest.
            if not line.startswith(start) and not (line.startswith(b'{"digest": ') and "error" in result):
                break
            done.append(result)
        same = len(done) == len(lines)
    except ValueError:  # more lines than jobs, or no JSON
        same = False
    start = starts[len(done)] if len(done) < len(starts) else b""
    if not same or (last and not (start and (last.startswith(start) or (done and start.startswith(last))))):
        need = "results of the same prompts, folder and options, to be continued, or a new file"
        need += _difference(args, lines[len(done)] if len(done) < len(lines) else b"")
        raise ValueError(f"--out {file}: line {len(done) + 1} is not of this job, needs {need}")
    return done, len(whole) - len(last)


def run(args: argparse.Namespace, writer: Writer, jobs: Sequence[Job], done: list[dict[str, Any]], size: int) -> int:
    """Answer the jobs that are not done or ended in an error, and write the results in the order of the jobs -> exit
    status. size: of the lines of the output file that stay."""
    again = [index for index, result in enumerate(done) if "error" in result]
    if done:
        print_message(f"{len(done) - len(again)} results kept{f', {len(again)} errors tried again' * bool(again)}")
    with ExitStack() as stack:
        out = sys.stdout
        if args.out:
            out = stack.enter_context(args.out.open("a", encoding="utf-8"))
            out.truncate(size)
        pending, failed = [*again, *range(len(done), len(jobs))], 0
        progress = stack.enter_context(Bar("generating", len(pending)))
        for index, result in _answers(args, writer, jobs, pending):
            line = {"digest": jobs[index].digest, "id": jobs[index].id, **jobs[index].extra, **result}
            failed += "error" in result
            if index < len(done):
                done[index] = line
                if index == again[-1]:
                    _replace(args.out, done)
                    out = stack.enter_context(args.out.open("a", encoding="utf-8"))
            else:
                print(json.dumps(line), file=out, flush=True)
            progress.update(1)
    print_message(f"{failed} of {len(jobs)} lines ended in an error" if failed else "")
    return int(failed > 0)


def _replace(file: Path, results: Sequence[dict[str, Any]]) -> None:
    """Write all results anew, at once: at no time is there a file with fewer."""
    whole = file.resolve()
    with tempfile.NamedTemporaryFile("w", dir=whole.parent, delete=False, encoding="utf-8") as part:
        part.writelines(f"{json.dumps(result)}\n" for result in results)
    shutil.copymode(whole, part.name)
    os.replace(part.name, whole)


def _answers(
    args: argparse.Namespace, writer: Writer, jobs: Sequence[Job], indices: Sequence[int]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the results of these jobs in their order. Where memory runs out, the batches become smaller and stay so."""
    auto = CPU_BATCH if writer.model.device.type == "cpu" else BATCH
    size = auto if args.batch_size == "auto" else args.batch_size
    waiting = [*indices]
    while waiting:
        window, waiting = waiting[: WINDOW * size], waiting[WINDOW * size :]
        rows, results = dict[int, Any](), dict[int, Any]()
        for index in window:
            try:
                rows[index] = _encode(writer, jobs[index])
            except ValueError as error:
                results[index] = {"error": " ".join(str(error).split())}
        pending = sorted(rows, key=lambda index: len(rows[index][0]))  # sequences of a batch have similar lengths
        for batch in (pending[start : start + size] for start in range(0, len(pending), size)):
            longest = len(rows[batch[-1]][0])
            writer.begin(len(batch), longest, longest + writer.new_tokens)
        while pending:
            batch, failure = pending[:size], ""
            try:
                results |= zip(batch, write_batch(writer, *zip(*(rows[i] for i in batch), strict=True)), strict=True)
            except (ValueError, RuntimeError) as error:
                out_of_memory = any(isinstance(exc, torch.OutOfMemoryError) for exc in (error, error.__cause__))
                if not out_of_memory:
                    raise
                failure = " ".join(str(error).split())
            if failure and writer.model.device.type == "cuda":
                torch.cuda.empty_cache()  # here, where the error no longer holds what the batch allocated
            if failure and len(batch) > 1:
                size = (len(batch) + 1) // 2
                print_message(f"no memory is left for {len(batch)} sequences: at most {size} from here on")
                continue
            if failure:
                results[batch[0]] = {"error": failure}
            pending = pending[len(batch) :]
            while window and window[0] in results:
                index = window.pop(0)
                yield index, results[index]
        for index in window:
            yield index, results[index]


def write_batch(writer: Writer, rows: Sequence[list[int]], afters: Sequence[list[int]]) -> list[dict[str, Any]]:
    """Continue texts together -> what is written of each. Those that stop early wait for the others."""
    texts, running = [Text(writer, after) for after in afters], set(range(len(rows)))
    for step in writer.stream(rows, writer.new_tokens):
        running -= {b for b in running if texts[b].add(step[b])}
        if not running:
            break
    return [text.as_dict() for text in texts]


def _encode(writer: Writer, job: Job) -> tuple[list[int], list[int]]:
    """Return a job's tokens, and those of them after which its text is decoded; ValueError for a wrong job."""
    if job.prompt is None:
        raise ValueError(job.error)
    if isinstance(job.prompt, str):
        ids = writer.encode(job.prompt)
    else:
        ids = writer.encode(render(writer.tokenizer, job.prompt), template=True)
    n = writer.new_tokens
    check_positions(f"a prompt of {len(ids)} tokens and {n} new ones", len(ids) + n, writer.model.config)
    return ids, ids[-1:] if isinstance(job.prompt, str) else []

"""The command `generate --batch`: prompts of a file of JSON lines, answered in batches of similar length."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..arguments import free_memory
from ..load import running_bytes, usable_bytes
from .processes import is_first
from .prompt import ChatTemplate
from .terminal import bar, check_writable
from .writer import Writer, warning_lines

BATCH = 32  # the most sequences of a batch without --batch-size
CPU_BATCH = 8
WINDOW = 4  # batches of which lengths are sorted: so many are lost where the command is interrupted


class Job(NamedTuple):
    id: Any
    prompt: str | list[dict[str, str]] | None  # a text, or messages
    error: str = ""


def read_jobs(args: argparse.Namespace) -> list[Job]:
    """Return the jobs of --batch FILE, one a line that is not blank. What is wrong with a line is its error."""
    if args.prompt or args.chat or args.system is not None:
        raise ValueError("--batch FILE has the prompts and messages: needs neither --prompt, --chat nor --system")
    if args.out is not None and args.out.exists() and args.out.samefile(args.batch):
        raise ValueError(f"--out {args.out} is the file of --batch, needs another")
    lines = args.batch.read_bytes().split(b"\n")
    return [_read_job(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _read_job(number: int, line: bytes) -> Job:
    try:
        values = json.loads(line.decode())
        json.dumps(values, ensure_ascii=False).encode()  # fails for half a surrogate pair
    except (ValueError, RecursionError) as error:
        return Job(number, None, f"line {number} is no JSON in UTF-8: {' '.join(str(error).split())}")
    fields = values if isinstance(values, dict) else {}
    id, prompt, messages = fields.get("id", number), fields.get("prompt"), fields.get("messages")
    if fields.keys() <= {"id", "prompt"} and isinstance(prompt, str) and prompt:
        return Job(id, prompt)
    if (
        fields.keys() <= {"id", "messages"}
        and isinstance(messages, list)
        and messages
        and all(map(_is_message, messages))
    ):
        return Job(id, messages)
    need = 'an object with a "prompt", a text, or "messages", objects with a role and a content, and perhaps an "id"'
    return Job(id, None, f"line {number} is {line.decode():.60}, needs {need}")


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in ("role", "content"))


def read_done(file: Path | None, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Return the results that an output file has, and cut a line that was not written to its end. ValueError for a file
    of other jobs."""
    if file is None:
        return []
    check_writable("--out", file)
    whole, done = file.read_bytes() if file.exists() else b"", list[dict[str, Any]]()
    lines = whole[: whole.rfind(b"\n") + 1].splitlines()
    for number, line in enumerate(lines):
        try:
            done.append(json.loads(line.decode()))
            same = done[-1]["id"] == jobs[number].id
        except (ValueError, LookupError, TypeError, RecursionError):
            same = False
        if not same:
            need = "the result of the same --batch, to be continued, or a new file"
            raise ValueError(f"--out {file}: line {number + 1} is not of the job in its place, needs {need}")
    if is_first() and whole:
        os.truncate(file, whole.rfind(b"\n") + 1)
    return done


def run(args: argparse.Namespace, writer: Writer, jobs: list[Job], done: list[dict[str, Any]]) -> int:
    """Answer the jobs that are not done, and write the results in the order of the jobs -> exit status."""
    size = args.batch_size or (CPU_BATCH if writer.model.device.type == "cpu" else BATCH)
    failed, encode = any("error" in each for each in done), partial(_encode, writer, [])
    writer.begin(size, writer.model.prefill_chunk, args.max_new_tokens)
    with ExitStack() as stack:
        out = stack.enter_context(args.out.open("a", encoding="utf-8")) if args.out and is_first() else sys.stdout
        progress = stack.enter_context(bar("generating", len(jobs)))
        stack.enter_context(warning_lines(args.command))
        for start in range(len(done), len(jobs), WINDOW * size):
            window, rows, results = jobs[start : start + WINDOW * size], dict[int, Any](), dict[int, Any]()
            for index, job in enumerate(window):
                try:
                    rows[index] = encode(job)
                except ValueError as error:
                    results[index] = {"error": " ".join(str(error).split())}
            for batch in _batches(writer, {index: len(ids) for index, (ids, _) in rows.items()}, size):
                written = writer.write_batch(*zip(*(rows[index] for index in batch), strict=True))
                results |= zip(batch, written, strict=True)
                progress.update(start + len(results), len(jobs))
            for index, job in enumerate(window):
                failed |= "error" in results[index]
                if is_first():
                    print(json.dumps({"id": job.id, **results[index]}), file=out, flush=True)
    return int(failed)


def _encode(writer: Writer, templates: list[ChatTemplate], job: Job) -> tuple[list[int], list[int]]:
    """Return a job's tokens, and those of them after which its text is decoded; ValueError for a wrong job."""
    if job.prompt is None:
        raise ValueError(job.error)
    if isinstance(job.prompt, str):
        ids = writer.encode(job.prompt)
    else:
        if not templates:
            templates.append(ChatTemplate(writer.args.folder))
        ids = writer.encode(templates[0].render(job.prompt), template=True)
    n, limit = writer.args.max_new_tokens, writer.model.config.max_position_embeddings
    if len(ids) + n > limit:
        raise ValueError(f"a prompt of {len(ids)} tokens and {n} new ones go beyond max_position_embeddings, {limit}")
    return ids, ids[-1:] if isinstance(job.prompt, str) else []


def _batches(writer: Writer, lengths: dict[int, int], size: int) -> Iterator[list[int]]:
    """Yield the jobs of each batch, the shortest first: at most `size`, and no more than a GPU's free memory is for."""
    model, batch = writer.model, list[int]()
    for index in sorted(lengths, key=lambda index: lengths[index]):
        free, length = free_memory(model.device), lengths[index] + writer.args.max_new_tokens
        need = running_bytes(model.config, len(batch) + 1, length, model.prefill_chunk, writer.dtype)
        if batch and (len(batch) == size or (free is not None and sum(need.values()) > usable_bytes(free))):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch

"""The command line: `mixtral-triton` and `python -m mixtral_triton`.

Exit 0: done and right. 1: ran, and found a mismatch. 2: bad input, one line on stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from .kernels.arch import ARCHS

if TYPE_CHECKING:
    import torch

    from .model import Mixtral

SMALL = Path(__file__).parent / "small"  # the checkpoint that ships with the package
CARDS = "a100, h100, h200, b200, b300, a10, l40s, rtx5090, mi300x"  # of kernels/roofline.py, which imports torch
SILENT = 10.0  # seconds of work without a word where stderr is no terminal


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """Of the whole command line."""
    parser = _Parser(prog="mixtral-triton", description=__doc__.split("\n")[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.add_argument("--json", action="store_true", help="print JSON for a program to read")
        return sub

    def model_options(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "folder", nargs="?", default=SMALL, help="checkpoint folder; none: the small one of the package"
        )
        sub.add_argument("--device", help="cpu, cuda, cuda:1, ...; none: the GPU if there is one")
        sub.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="none: as stored")

    verify = command(
        "verify", "compare the loaded tensors with the files, and every operation and layer with plain torch"
    )
    model_options(verify)
    verify.add_argument("--peer", choices=("transformers",), help="its logits, on the same files, have to be the same")
    verify.add_argument("--prompt", help="text to run; none: fixed pseudo-random tokens")
    generate = command("generate", "stream the continuation of a prompt")
    model_options(generate)
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--max-new-tokens", type=int, default=64)
    generate.add_argument("--temperature", type=float, default=0.0, help="0 (the default) is greedy")
    generate.add_argument("--top-p", type=float, default=1.0)
    generate.add_argument("--seed", type=int, default=0, help="of the sampling")
    trace = command("trace", "which experts each token of a prompt took, layer by layer")
    model_options(trace)
    trace.add_argument("--prompt", required=True)
    trace.add_argument("--layers", type=int, nargs="+", metavar="N", help="to print; none: first, middle and last")
    trace.add_argument("--plot", type=Path, metavar="FILE", help="draw layers x experts (.png, .svg, .pdf)")
    bench = command("bench", "each operation, and a decode step, beside its peers and its floor")
    bench.add_argument("ops", nargs="*", metavar="OP", help="none: all, and decode_step")
    bench.add_argument("--quick", action="store_true", help="a few cases an operation, of 8x7B")
    bench.add_argument(
        "--at", action="append", default=[], metavar="T=N", help="only the cases of this size; repeatable"
    )
    bench.add_argument(
        "--sizes", action="append", default=[], metavar="T=N,...", help="a case of these sizes instead; repeatable"
    )
    bench.add_argument("--model", type=Path, metavar="FOLDER", help="take the sizes from a checkpoint's config.json")
    bench.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="none: bfloat16")
    bench.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        help="your own function beside the one OP, called with its arguments in its order, by position; it is checked "
        "before it is timed, and exit 1 if wrong; repeatable",
    )
    bench.add_argument("--first", type=int, default=0, metavar="N", help="leave the N cases before this one out")
    bench.add_argument("--without", action="append", default=[], metavar="PEER", help="leave a peer out; repeatable")
    bench.add_argument("--plot", type=Path, metavar="FILE", help="draw floors and times (.png, .svg, .pdf)")
    bench.add_argument("--card", help=f"measure nothing: floors by a data sheet ({CARDS})")
    tune = command(
        "tune", "launch configurations around the present ones: what compiles, what is fastest, what to paste"
    )
    tune.add_argument("ops", nargs="*", metavar="OP", help="none: all")
    tune.add_argument(
        "--at", action="append", default=[], metavar="T=N", help="only the cases of this size; repeatable"
    )
    tune.add_argument("--arch", help="time nothing, compile for this one; none: the GPU there is, else sm_90")
    tune.add_argument("--dry-run", action="store_true", help="time nothing")
    compile = command("compile", "compile every kernel for a GPU that need not be there")
    compile.add_argument("ops", nargs="*", metavar="OP", help="none: all")
    compile.add_argument("--arch", required=True, help=", ".join(ARCHS))
    compile.add_argument("--out", type=Path, help="folder that keeps .ptx, .cubin and .sass (AMD: .amdgcn, .hsaco)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command -> exit status."""
    args = parser().parse_args(argv)
    try:
        commands = {"verify": _verify, "generate": _generate, "trace": _trace, "bench": _bench, "tune": _tune}
        return {**commands, "compile": _compile}[args.command](args)
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
        print(f"mixtral-triton {args.command}: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"mixtral-triton {args.command}: interrupted", file=sys.stderr)
        return 130


def _choose_way(args: argparse.Namespace, out: Console) -> None:
    """Without a GPU, interpret the kernels. Before any of them is imported: Triton reads the switch as it decorates."""
    import torch

    wants_cpu = args.device is not None and args.device.startswith("cpu")
    if "TRITON_INTERPRET" in os.environ or (torch.cuda.is_available() and not wants_cpu):
        return
    os.environ["TRITON_INTERPRET"] = "1"
    reason = "--device cpu" if wants_cpu else "No GPU found"
    out.print(f"{reason}: the Triton kernels run interpreted, on the CPU. Right, and slow.")


class _Bar:
    """Progress: `more` of the total, or `of` a total told later."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self.progress, self.task = progress, task

    def more(self, done: int) -> None:
        self.progress.update(self.task, advance=done)

    def of(self, done: int, total: int) -> None:
        self.progress.update(self.task, completed=done, total=total)


@contextmanager
def _bar(label: str, total: int | None, *columns: ProgressColumn) -> Iterator[_Bar]:
    """Progress on stderr: a bar where that is a terminal, else a line every SILENT seconds, so none of quick work.

    `total` None: told later.
    """
    console = Console(stderr=True)
    shown = (TextColumn(label), BarColumn(), *columns, TimeRemainingColumn())
    with Progress(*shown, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = _Bar(progress, progress.add_task(label, total=total))
        with nullcontext() if console.is_terminal else _now_and_then(bar, label, columns):
            yield bar


@contextmanager
def _now_and_then(bar: _Bar, label: str, columns: Sequence[ProgressColumn]) -> Iterator[None]:
    """While the block runs: what the columns show, and the seconds left at the speed so far."""
    ended, start = threading.Event(), time.monotonic()

    def say() -> None:
        while not ended.wait(SILENT):
            task, words = bar.progress.tasks[0], ["starting"]
            if task.total is not None:
                words = [str(column(task)).strip() for column in columns]
            if task.completed and task.remaining is not None:
                words.append(f"{(time.monotonic() - start) * task.remaining / task.completed:.0f} s left")
            print(f"{label}: {', '.join(words)}", file=sys.stderr, flush=True)

    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _load(args: argparse.Namespace) -> Mixtral:
    import torch

    from .inputs import usable_device
    from .model import Mixtral
    from .weights import read_headers, total_bytes

    device = usable_device(args.device)
    if device.type == "meta":
        raise ValueError("--device is 'meta', which holds no numbers, needs cpu or cuda")
    dtype = getattr(torch, args.dtype) if args.dtype else None
    with _bar("loading", total_bytes(read_headers(args.folder)), DownloadColumn()) as progress:
        return Mixtral.from_pretrained(args.folder, device=device, dtype=dtype, progress=progress.more)


def _tokenizer(folder: str | Path) -> Any:
    from tokenizers import Tokenizer

    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: a prompt needs the checkpoint's tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception on a bad file
        raise ValueError(f"{path} is not a tokenizer that the tokenizers library can read: {error}") from error


def _encode(tokenizer: Any, text: str, model: Mixtral) -> torch.Tensor:
    """The prompt's tokens [T], after the beginning-of-sequence token where the model has one."""
    import torch

    if not text:
        raise ValueError("--prompt is empty: give at least one character")
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    bos = model.config.bos_token_id
    return torch.tensor(([] if bos is None else [bos]) + ids, device=model.device)


def _verify(args: argparse.Namespace) -> int:
    out = Console(stderr=args.json)
    _choose_way(args, out)
    from .verification import verify

    model = _load(args)
    ids = None if args.prompt is None else _encode(_tokenizer(args.folder), args.prompt, model)[None]
    with _bar("verifying", None, MofNCompleteColumn()) as progress:
        report = verify(model, ids, progress.of, folder=args.folder, peer=args.peer)
    if args.json:
        print(json.dumps({"folder": str(args.folder), **report.as_dict()}))
    else:
        out.print(report)
    return 0 if report.ok else 1


def _generate(args: argparse.Namespace) -> int:
    out = Console(stderr=args.json, highlight=False)
    _choose_way(args, out)
    import torch

    from .generate import eos_ids, stream

    model, tokenizer = _load(args), _tokenizer(args.folder)
    prompt = _encode(tokenizer, args.prompt, model)
    if not -(1 << 63) <= args.seed < 1 << 64:
        raise ValueError(f"--seed is {args.seed}, needs an integer of 64 bits")
    generator = torch.Generator(model.device).manual_seed(args.seed)
    sampling = (args.max_new_tokens, args.temperature, args.top_p, eos_ids(None, model.config), generator)
    steps = stream(model, [prompt], *sampling)
    tokens: list[int] = []
    start = time.perf_counter()
    if not args.json:
        print(args.prompt, end="", flush=True)
    shown = ""
    for step in steps:
        tokens.append(int(step[0]))
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if not args.json and not text.endswith("\ufffd"):  # half a character: wait for the rest
            print(text[len(shown) :], end="", flush=True)
            shown = text
    seconds = time.perf_counter() - start
    rate = len(tokens) / seconds
    if args.json:
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        print(json.dumps({"prompt": args.prompt, "text": text, "tokens": tokens, "tokens_per_second": rate}))
    else:
        print(flush=True)
        out.print(f"{len(tokens)} tokens in {seconds:.1f} s, {rate:.1f} tokens/s (prompt of {len(prompt)} included)")
    return 0


def _trace(args: argparse.Namespace) -> int:
    out = Console(stderr=args.json, highlight=False)
    _choose_way(args, out)
    from .trace import run

    def load() -> tuple[Mixtral, Any, torch.Tensor]:
        model, tokenizer = _load(args), _tokenizer(args.folder)
        return model, tokenizer, _encode(tokenizer, args.prompt, model)

    return run(args, out, load)


def _bench(args: argparse.Namespace) -> int:
    from .bench_command import run

    return run(args, lambda label, total: _bar(label, total, MofNCompleteColumn()))


def _tune(args: argparse.Namespace) -> int:
    from .tune_command import run

    return run(args, lambda label, total: _bar(label, total, MofNCompleteColumn()))


def _compile(args: argparse.Namespace) -> int:
    from .kernels.offline import as_json, compile_ops
    from .kernels.roofline import table_note
    from .resources import resources_table
    from .tables import console

    rows: list[dict[str, Any]] = []
    with _bar(f"compiling for {args.arch}", None, MofNCompleteColumn()) as progress:
        # JSON streams; the table has the registry's order.
        for compiled in compile_ops(args.ops, args.arch, out=args.out, progress=progress.of, as_done=args.json):
            rows.append(as_json(compiled))
            if args.json:
                print(json.dumps(rows[-1]), flush=True)
    bad = [row for row in rows if row["fault"]]
    if not args.json:
        out = console()
        if note := table_note(args.arch):
            out.print(note)
        out.print(resources_table(args.arch, rows))
        for row in bad:
            out.print(f"{row['op']}, {row['kernel']}, {row['dtype']}: {row['fault']}", style="red", markup=False)
        limit = ARCHS[args.arch].shared_bytes
        verdict = f"{len(bad)} of them must not run" if bad else "none spills in its main loop, all fit"
        style = "bold red" if bad else "bold green"
        out.print(f"{len(rows)} kernels; shared memory of a block: {limit:,} bytes at most. [{style}]{verdict}[/]")
    return 1 if bad else 0

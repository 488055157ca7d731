"""The command line: `mixtral-triton` and `python -m mixtral_triton`.

Exit 0: done and right. 1: ran, and found a mismatch, or that nothing fits. 2: bad input, one line on stderr.
130: Ctrl-C. 141: whoever read the output has gone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import DownloadColumn, MofNCompleteColumn

from . import __version__
from .kernels.arch import ARCHS
from .tools.arguments import Parser, weights
from .tools.backend import choose, with_verify_time
from .tools.processes import is_first, mesh_of
from .tools.terminal import bar, ended, say, settle

if TYPE_CHECKING:
    import torch

    from .model import Mixtral

FORMATS = ("int4", "int8", "fp8")  # of quantize/spec.py, which imports torch
SMALL = Path(__file__).parent / "small"  # the checkpoint that ships with the package
GPUS = "a100, h100, h200, b200, b300, a10, l40s, rtx5090, mi300x"  # of tools/roofline.py, which imports torch


def parser() -> argparse.ArgumentParser:
    """Of the whole command line."""
    parser = Parser(prog="mixtral-triton", description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.add_argument("--json", action="store_true", help="print JSON for a program to read")
        return sub

    def mesh_options(sub: argparse.ArgumentParser) -> None:
        split = {"tp": "GPUs over which each expert is split", "ep": "GPUs that the experts are dealt to"}
        for name, what in split.items():
            sub.add_argument(f"--{name}", type=int, default=1, metavar="N", help=f"{what}; with torchrun")

    def model_options(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "folder", nargs="?", default=SMALL, help="checkpoint folder; none: the small one of the package"
        )
        sub.add_argument("--device", help="cpu, cuda, cuda:1, ...; none: the GPU if there is one")
        sub.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="none: as stored")
        sub.add_argument(
            "--weights",
            type=weights,
            metavar="FORMAT",
            help="int4, int8 or fp8: quantize the experts' while loading; experts=int4,linear=int8: those of attention "
            "and the head, too; none: as stored",
        )

    verify = command(
        "verify", "compare the loaded tensors with the files, and every operation and layer with plain torch"
    )
    model_options(verify)
    verify.add_argument("--peer", choices=("transformers",), help="its logits, on the same files, have to be the same")
    verify.add_argument("--prompt", help="text to run; none: fixed pseudo-random tokens")
    mesh_options(verify)
    generate = command("generate", "stream the continuation of a prompt")
    model_options(generate)
    generate.add_argument("--prompt", required=True, help="text to continue")
    generate.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="fewer where the text ends")
    generate.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy")
    generate.add_argument("--top-k", type=int, metavar="N", help="sample from the N likeliest tokens; none: all")
    generate.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="of those, the fewest with this probability together"
    )
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling")
    generate.add_argument("--interpret", action="store_true", help="the Triton kernels, interpreted on the CPU")
    mesh_options(generate)
    trace = command("trace", "which experts each token of a prompt took, layer by layer")
    model_options(trace)
    trace.add_argument("--prompt", required=True, help="text to run")
    trace.add_argument("--layers", type=int, nargs="+", metavar="N", help="to print; none: first, middle and last")
    trace.add_argument("--plot", type=Path, metavar="FILE", help="draw layers x experts (.png, .svg, .pdf)")
    trace.add_argument("--interpret", action="store_true", help="the Triton kernels, interpreted on the CPU")
    quantize = command("quantize", "write a checkpoint whose experts are quantized, as compressed-tensors has it")
    quantize.add_argument("folder", help="checkpoint folder, not quantized")
    quantize.add_argument("out", type=Path, help="folder to write, new or empty")
    quantize.add_argument("--weights", choices=FORMATS, required=True, help="int4: in groups of 128 columns, or fewer")
    quantize.add_argument("--device", help="where to compute: cpu, cuda, ...; none: the GPU if there is one")
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
    mesh_options(bench)
    bench.add_argument("--gpu", help=f"measure nothing: floors and predicted times by a data sheet ({GPUS})")
    tune = command(
        "tune", "launch configurations around the present ones: what compiles, what is fastest, what to paste"
    )
    tune.add_argument("ops", nargs="*", metavar="OP", help="none: all")
    tune.add_argument(
        "--at", action="append", default=[], metavar="T=N", help="only the cases of this size; repeatable"
    )
    tune.add_argument("--arch", help="time nothing, compile for this one; none: the GPU there is, else sm_90")
    tune.add_argument("--dry-run", action="store_true", help="time nothing")
    fit = command("fit", "what fits a GPU's memory: weights by format, cache, workspace, the longest text")
    fit.add_argument(
        "model",
        nargs="?",
        default="mixtral-8x7b",
        metavar="MODEL",
        help="a folder with a config.json, mixtral-8x22b, ...; none: mixtral-8x7b",
    )
    gpu = fit.add_mutually_exclusive_group()
    gpu.add_argument(
        "--gpu", metavar="NAME", help="h100, rtx4090, ...; none: the GPU there is, else all that are known"
    )
    gpu.add_argument("--memory", type=float, metavar="GIB", help="a GPU of so many GiB; none: see --gpu")
    fit.add_argument("--gpus", type=int, metavar="N", help="so many GPUs; none: 1")
    fit.add_argument(
        "--scaling", nargs="?", const="", metavar="FORMAT", help="predicted times on 1 to 16 GPUs, by tp and ep"
    )
    fit.add_argument("--batch", type=int, default=1, metavar="B", help="sequences at a time")
    fit.add_argument("--context", type=int, metavar="S", help="tokens a sequence; none: all the model's positions")
    compile = command("compile", "compile every kernel for a GPU that need not be there")
    compile.add_argument("ops", nargs="*", metavar="OP", help="none: all")
    compile.add_argument("--arch", required=True, help=", ".join(ARCHS))
    compile.add_argument("--out", type=Path, help="folder that keeps .ptx, .cubin and .sass (AMD: .amdgcn, .hsaco)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command -> exit status."""
    args = argparse.Namespace(command=None)
    settle()
    try:
        try:
            parser().parse_args(argv, args)
            commands = {"verify": _verify, "generate": _generate, "trace": _trace, "quantize": _quantize}
            commands |= {"bench": _bench, "tune": _tune, "compile": _compile, "fit": _fit}
            return commands[args.command](args)
        finally:
            sys.stdout.flush()  # here, where it can still be told that nobody reads it, or that a disk is full
    except BaseException as error:
        return ended(error, args.command)


def _load(args: argparse.Namespace, mesh: Any = None) -> Mixtral:
    import torch

    from .inputs import usable_device
    from .model import Mixtral
    from .weights import read_headers, total_bytes

    device = None if mesh is not None else usable_device(args.device)  # a rank has its own
    if device is not None and device.type == "meta":
        raise ValueError("--device is 'meta', which holds no numbers, needs cpu or cuda")
    dtype = getattr(torch, args.dtype) if args.dtype else None
    total = None if mesh is not None else total_bytes(read_headers(args.folder))
    loading = bar("loading", total, DownloadColumn(), silent=not is_first())
    with warnings.catch_warnings(record=True) as told, loading as progress:
        model = Mixtral.from_pretrained(args.folder, device, dtype, args.weights, mesh, progress=progress.more)
    for warning in told if is_first() else ():
        say(f"mixtral-triton {args.command}: {warning.message}")
    return model


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
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):  # of bytes, by Python
        raise ValueError("--prompt holds bytes that are no text in UTF-8")
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    bos = model.config.bos_token_id
    return torch.tensor(([] if bos is None else [bos]) + ids, device=model.device)


def _verify(args: argparse.Namespace) -> int:
    note = choose(args, interpret=True)
    from .verification import check_peer

    check_peer(args.peer, args.tp * args.ep > 1)
    with mesh_of(args) as mesh:
        return _verified(args, mesh, note)


def _verified(args: argparse.Namespace, mesh: Any, note: str) -> int:
    from .verification import verify
    from .verification.verdict import text_or_default

    model = _load(args, mesh)
    given = None if args.prompt is None else _encode(_tokenizer(args.folder), args.prompt, model)[None]
    ids = text_or_default(given, model.config, model.device)
    if is_first():
        say(with_verify_time(note, model.config, str(model.dtype), ids.numel()))
    with bar("verifying", None, MofNCompleteColumn(), silent=not is_first()) as progress:
        report = verify(model, ids, progress.of, folder=args.folder, peer=args.peer)
    if not is_first():
        return 0 if report.ok else 1
    if args.json:
        print(json.dumps({"folder": str(args.folder), **report.as_dict()}))
    else:
        Console().print(report)
    return 0 if report.ok else 1


def _generate(args: argparse.Namespace) -> int:
    note = choose(args, interpret=False)
    with mesh_of(args) as mesh:
        return _generated(args, mesh, note)


def _generated(args: argparse.Namespace, mesh: Any, note: str) -> int:
    out = Console(stderr=args.json, highlight=False)
    import torch

    from .generate import eos_ids, stream

    model, tokenizer = _load(args, mesh), _tokenizer(args.folder)
    prompt = _encode(tokenizer, args.prompt, model)
    if not -(1 << 63) <= args.seed < 1 << 64:
        raise ValueError(f"--seed is {args.seed}, needs an integer of 64 bits")
    generator = torch.Generator(model.device).manual_seed(args.seed)
    sampling = (args.max_new_tokens, args.temperature, args.top_p, eos_ids(None, model.config), generator, args.top_k)
    steps = stream(model, [prompt], *sampling)
    if not is_first():
        deque(steps, maxlen=0)
        return 0
    say(note)
    start = time.perf_counter()
    tokens = (
        _counted(steps, args.max_new_tokens) if args.json else _streamed(steps, tokenizer, args.prompt, len(prompt))
    )
    seconds = time.perf_counter() - start
    rate = len(tokens) / seconds
    if args.json:
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        print(json.dumps({"prompt": args.prompt, "text": text, "tokens": tokens, "tokens_per_second": rate}))
    else:
        out.print(f"{len(tokens)} tokens in {seconds:.1f} s, {rate:.1f} tokens/s (prompt of {len(prompt)} included)")
    return 0


def _counted(steps: Iterable[torch.Tensor], total: int) -> list[int]:
    """Run all steps -> the tokens."""
    tokens = []
    with bar("generating", total, MofNCompleteColumn()) as progress:
        for step in steps:
            tokens.append(int(step[0]))
            progress.more(1)
    return tokens


def _streamed(steps: Iterator[torch.Tensor], tokenizer: Any, prompt: str, length: int) -> list[int]:
    """Print the text as it comes -> its tokens. Its line is ended even where an error or Ctrl-C ends the work."""
    with bar("reading the prompt", length, MofNCompleteColumn()):
        first = list(islice(steps, 1))
    tokens: list[int] = []
    shown = ""
    try:
        print(prompt, end="", flush=True)
        for step in chain(first, steps):
            tokens.append(int(step[0]))
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            if not text.endswith("\ufffd"):  # half a character: wait for the rest
                print(text[len(shown) :], end="", flush=True)
                shown = text
    finally:
        print(flush=True)
    return tokens


def _trace(args: argparse.Namespace) -> int:
    out = Console(stderr=args.json, highlight=False)
    note = choose(args, interpret=False)
    from .tools.trace import run

    def load() -> tuple[Mixtral, Any, torch.Tensor]:
        model, tokenizer = _load(args), _tokenizer(args.folder)
        return model, tokenizer, _encode(tokenizer, args.prompt, model)

    def progress(label: str, total: int) -> Any:
        say(note)  # nothing is wrong with the arguments
        return bar(label, total, MofNCompleteColumn())

    return run(args, out, load, progress)


def _quantize(args: argparse.Namespace) -> int:
    from .quantize.write import write
    from .weights import read_headers, total_bytes

    before = total_bytes(read_headers(args.folder))
    with bar("quantizing", before, DownloadColumn()) as progress:
        after = write(args.folder, args.out, args.weights, args.device, progress.more)
    if args.json:
        sizes = {"bytes_before": before, "bytes": after}
        print(json.dumps({"folder": str(args.folder), "out": str(args.out), "weights": args.weights, **sizes}))
    else:
        say_size = f"{after / 1e9:,.3g} GB, of {before / 1e9:,.3g} GB in {args.folder}"
        Console(highlight=False).print(f"{args.out}: {say_size}", markup=False, soft_wrap=True)
    return 0


def _bench(args: argparse.Namespace) -> int:
    from .tools.bench import command

    with mesh_of(args) as ranks:
        if ranks is not None:
            return command.run_on_mesh(args, ranks)
    return command.run(args, lambda label, total: bar(label, total, MofNCompleteColumn()))


def _tune(args: argparse.Namespace) -> int:
    if args.arch is not None and args.arch not in ARCHS:
        raise ValueError(f"--arch is {args.arch!r}, needs one of {', '.join(ARCHS)}")
    from .tools.bench.tune import run

    return run(args, lambda label, total: bar(label, total, MofNCompleteColumn()))


def _fit(args: argparse.Namespace) -> int:
    from .tools.fit_command import run

    return run(args)


def _compile(args: argparse.Namespace) -> int:
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {str(args.out)!r} is a file, needs a folder")
    from .tools.offline import as_json, compile_ops
    from .tools.resources import resources_table
    from .tools.roofline import table_note
    from .tools.tables import console

    rows: list[dict[str, Any]] = []
    with bar(f"compiling for {args.arch}", None, MofNCompleteColumn()) as progress:
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

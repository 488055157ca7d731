"""The command line: `mixtral-triton` and `python -m mixtral_triton`.

Exit 0: done and right. 1: a mismatch, or nothing fits. 2: bad input, one line on stderr. 130: Ctrl-C. 141: closed pipe.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.progress import DownloadColumn

from . import __version__
from .kernels.arch import ARCHS
from .tools.gpus import RATED
from .tools.processes import is_first, open_mesh, select_backend
from .tools.terminal import bar, check_plot, exit_status, say, set_output_encoding

if TYPE_CHECKING:
    import torch

    from .model import Mixtral

FORMATS = ("int4", "int8", "fp8")  # of quantize/spec.py, which imports torch
SMALL = Path(__file__).parent / "small"  # the checkpoint that ships with the package


class Help(argparse.HelpFormatter):
    """Help that prints the default of each option whose own text does not say it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        silent = not action.option_strings or action.nargs == 0 or action.default in (None, [])
        return text if silent or "default: " in text else f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """An argparse parser that reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parse_weights(text: str) -> str | dict[str, str]:
    """`--weights` as `Mixtral.from_pretrained` takes it: a format, or a format for each part of the model."""
    if "=" not in text:
        return text
    pairs = [part.partition("=") for part in text.split(",")]
    formats = {name: format for name, _, format in pairs}
    if len(formats) < len(pairs) or not all(formats.values()):
        raise argparse.ArgumentTypeError(f"{text!r} needs a form like int4, or experts=int4,linear=int8")
    return formats


def parser() -> argparse.ArgumentParser:
    parser = Parser(prog="mixtral-triton", description=(__doc__ or "").split("\n")[0], formatter_class=Help)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, *groups: Callable[[Any], None]) -> Callable[..., Any]:
        sub = commands.add_parser(name, help=help, description=help, formatter_class=Help)
        sub.add_argument("--json", action="store_true", help="print JSON for a program to read")
        for add_group in groups:
            add_group(sub.add_argument)
        sub.set_defaults(run=globals()[f"_{name}"])
        return sub.add_argument

    def mesh(option: Any) -> None:
        option("--tp", type=int, default=1, metavar="N", help="GPUs over which each expert is split; with torchrun")
        option("--ep", type=int, default=1, metavar="N", help="GPUs that share the experts; with torchrun")

    def model(option: Any) -> None:
        option("folder", nargs="?", default=SMALL, help="checkpoint folder; default: the small one of the package")
        option("--device", help="cpu, cuda, cuda:1, ...; default: the GPU if there is one")
        option("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
        text = "int4, int8 or fp8: quantize the experts' while loading; experts=int4,linear=int8: those of attention "
        option("--weights", type=parse_weights, metavar="FORMAT", help=f"{text}and the head, too; default: as stored")

    def plot(option: Any) -> None:
        option("--plot", type=Path, metavar="FILE", help="draw the result (.png, .svg, .pdf)")

    def ops(option: Any) -> None:
        option("ops", nargs="*", metavar="OP", help="default: all")

    def at(option: Any) -> None:
        option("--at", action="append", default=[], metavar="T=N", help="only the cases of this size; repeatable")

    def prompt(option: Any) -> None:
        option("--prompt", required=True, help="text to run")
        option("--interpret", action="store_true", help="the Triton kernels, interpreted on the CPU")

    option = command("verify", "compare tensors with files, and operations and layers with plain torch", model, mesh)
    option("--peer", choices=("transformers",), help="compare with its model of the files, layer by layer, too")
    option("--prompt", help="text to run; default: fixed pseudo-random tokens")
    option("--tokens", type=int, metavar="N", help="of the text and of the longest call; default: 144, on a GPU 2048")
    option("--deterministic", action="store_true", help="the mode in which a row's bits do not depend on the batch")
    text = "leave out layers in fp32; default for the small checkpoint without a GPU"
    option("--quick", action=argparse.BooleanOptionalAction, help=text)

    option = command("generate", "stream the continuation of a prompt", model, mesh, prompt)
    option("--max-new-tokens", type=int, default=64, metavar="N", help="fewer where the text ends")
    option("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy")
    option("--top-k", type=int, metavar="N", help="sample from the N likeliest tokens; default: all")
    option("--top-p", type=float, default=1.0, metavar="P", help="of those, the fewest with this total probability")
    option("--seed", type=int, default=0, metavar="N", help="of the sampling")

    option = command("trace", "which experts each token of a prompt took, by layer", model, plot, prompt)
    option("--layers", type=int, nargs="+", metavar="N", help="to print; default: first, middle and last")

    option = command("quantize", "write a checkpoint whose experts are quantized, as compressed-tensors has it")
    option("folder", help="checkpoint folder, not quantized")
    option("out", type=Path, help="folder to write, new or empty")
    option("--weights", choices=FORMATS, required=True, help="int4: in groups of 128 columns, or fewer")
    option("--device", help="where to compute: cpu, cuda, ...; default: the GPU if there is one")

    option = command("bench", "each operation, and a decode step, beside its peers and its floor", ops, at, plot, mesh)
    option("--quick", action="store_true", help="a few cases an operation, of 8x7B")
    option("--sizes", action="append", default=[], metavar="T=N,...", help="a case of these sizes instead; repeatable")
    option("--model", type=Path, metavar="FOLDER", help="take the sizes from a checkpoint's config.json")
    option("--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16")
    text = "your function beside the one OP, called by position, checked before it is timed; repeatable"
    option("--peer", action="append", default=[], metavar="MODULE:FUNCTION", help=text)
    option("--first", type=int, default=0, metavar="N", help="leave the N cases before this one out")
    option("--without", action="append", default=[], metavar="PEER", help="leave a peer out; repeatable")
    option("--gpu", metavar="NAME", help=f"measure nothing, predict by a data sheet: {', '.join(RATED)}")

    option = command("tune", "launch configurations around the present ones: which compile, fit, are fastest", ops, at)
    option("--arch", help="time nothing, compile for this one; default: the GPU there is, else sm_90")
    option("--dry-run", action="store_true", help="time nothing")

    option = command("fit", "what fits a GPU's memory: weights by format, cache, workspace, the longest text")
    text = "a folder, or mixtral-8x22b; default: mixtral-8x7b"
    option("model", nargs="?", default="mixtral-8x7b", metavar="MODEL", help=text)
    option("--gpu", metavar="NAME", help="h100, rtx4090, ...; default: the GPU there is, else all that are known")
    option("--memory", type=float, metavar="GIB", help="a GPU of so many GiB; default: see --gpu")
    option("--gpus", type=int, metavar="N", help="so many GPUs; default: 1")
    option("--scaling", nargs="?", const="", metavar="FORMAT", help="predicted times on 1 to 16 GPUs, by tp and ep")
    option("--batch", type=int, default=1, metavar="B", help="sequences at a time")
    option("--context", type=int, metavar="S", help="tokens a sequence; default: all the model's positions")

    option = command("compile", "compile every kernel for a GPU that need not be there", ops)
    option("--arch", required=True, help=", ".join(ARCHS))
    option("--out", type=Path, help="folder that keeps .ptx, .cubin and .sass (AMD: .amdgcn, .hsaco)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command -> exit status."""
    args = argparse.Namespace(command=None)
    set_output_encoding()
    try:
        try:
            parser().parse_args(argv, args)
            return args.run(args)
        finally:
            sys.stdout.flush()  # here, where a closed pipe or a full disk can still be reported
    except BaseException as error:
        return exit_status(error, args.command)


def _load(args: argparse.Namespace, mesh: Any = None) -> Mixtral:
    import torch

    from .inputs import usable_device
    from .model import Mixtral
    from .quantize.hub import read_headers
    from .weights import total_bytes

    device = None if mesh is not None else usable_device(args.device)  # each rank of a mesh has its own
    if device is not None and device.type == "meta":
        raise ValueError("--device is 'meta', which holds no numbers, needs cpu or cuda")
    dtype = getattr(torch, args.dtype) if args.dtype else None
    total = None if mesh is not None else total_bytes(read_headers(args.folder))
    loading = bar("loading", total, DownloadColumn(), silent=not is_first())
    with warnings.catch_warnings(record=True) as caught, loading as progress:
        fixed = getattr(args, "deterministic", False)
        model = Mixtral.from_pretrained(args.folder, device, dtype, args.weights, mesh, fixed, progress.advance)
    for warning in caught if is_first() else ():
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
    if any("\ud800" <= character <= "\udfff" for character in text):  # Python's stand-ins for bytes that are no UTF-8
        raise ValueError("--prompt holds bytes that are no text in UTF-8")
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    bos = model.config.bos_token_id
    return torch.tensor(([] if bos is None else [bos]) + ids, device=model.device)


def _verify(args: argparse.Namespace) -> int:
    note = select_backend(args, interpret=True)
    from .verification import check_peer, default_text, verify

    check_peer(args.peer, args.tp * args.ep > 1)
    with open_mesh(args) as mesh:
        model = _load(args, mesh)
        prompt = None if args.prompt is None else _encode(_tokenizer(args.folder), args.prompt, model)[None]
        if prompt is not None and args.tokens is not None and prompt.shape[1] < args.tokens:
            raise ValueError(f"--prompt has {prompt.shape[1]} tokens, fewer than --tokens {args.tokens}")
        ids = default_text(prompt, model.config, model.device, args.tokens)
        quick = args.folder == SMALL and model.device.type == "cpu" if args.quick is None else args.quick
        if is_first():
            say(note)
        with bar("verifying", None, silent=not is_first()) as progress:
            options = {"folder": args.folder, "peer": args.peer, "quick": quick, "tokens": args.tokens}
            report = verify(model, ids[:, : args.tokens], progress.update, **options)
        if is_first() and args.json:
            print(json.dumps({"folder": str(args.folder), **report.as_dict()}))
        elif is_first():
            Console().print(report)
        return 0 if report.ok else 1


def _generate(args: argparse.Namespace) -> int:
    note = select_backend(args, interpret=False)
    with open_mesh(args) as mesh:
        import torch

        from .generate import eos_ids, stream

        model, tokenizer = _load(args, mesh), _tokenizer(args.folder)
        prompt = _encode(tokenizer, args.prompt, model)
        if not -(1 << 63) <= args.seed < 1 << 64:
            raise ValueError(f"--seed is {args.seed}, needs an integer of 64 bits")
        generator = torch.Generator(model.device).manual_seed(args.seed)
        limits = args.max_new_tokens, args.temperature, args.top_p
        steps = stream(model, [prompt], *limits, eos_ids(None, model.config), generator, args.top_k)
        if not is_first():
            deque(steps, maxlen=0)
            return 0
        say(note)
        start, tokens = time.perf_counter(), []
        if args.json:
            with bar("generating", args.max_new_tokens) as progress:
                for step in steps:
                    tokens.append(int(step[0]))
                    progress.advance(1)
        else:
            tokens = _print_stream(steps, tokenizer, args.prompt, len(prompt))
        seconds = time.perf_counter() - start
        rate = len(tokens) / seconds
        if args.json:
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            print(json.dumps({"prompt": args.prompt, "text": text, "tokens": tokens, "tokens_per_second": rate}))
        else:
            print(f"{len(tokens)} tokens in {seconds:.1f} s, {rate:.1f} tokens/s (prompt of {len(prompt)} included)")
        return 0


def _print_stream(steps: Iterator[torch.Tensor], tokenizer: Any, prompt: str, length: int) -> list[int]:
    """Print the text as it comes -> its tokens. Its line ends even where an error or Ctrl-C ends the work."""
    with bar("reading the prompt", length):
        first = list(islice(steps, 1))
    tokens: list[int] = []
    printed = ""
    try:
        print(prompt, end="", flush=True)
        for step in chain(first, steps):
            tokens.append(int(step[0]))
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            if not text.endswith("\ufffd"):  # half a character: wait for the rest
                print(text[len(printed) :], end="", flush=True)
                printed = text
    finally:
        print(flush=True)
    return tokens


def _trace(args: argparse.Namespace) -> int:
    note = select_backend(args, interpret=False)
    from .tools.trace import run

    if args.plot is not None:
        check_plot(args.plot)
    model, tokenizer = _load(args), _tokenizer(args.folder)
    return run(args, model, tokenizer, _encode(tokenizer, args.prompt, model), note)


def _quantize(args: argparse.Namespace) -> int:
    from .quantize.hub import read_headers
    from .quantize.write import write
    from .weights import total_bytes

    before = total_bytes(read_headers(args.folder))
    with bar("quantizing", before, DownloadColumn()) as progress:
        after = write(args.folder, args.out, args.weights, args.device, progress.advance)
    if args.json:
        sizes = {"bytes_before": before, "bytes": after}
        print(json.dumps({"folder": str(args.folder), "out": str(args.out), "weights": args.weights, **sizes}))
    else:
        print(f"{args.out}: {after / 1e9:,.3g} GB, of {before / 1e9:,.3g} GB in {args.folder}")
    return 0


def _bench(args: argparse.Namespace) -> int:
    from .tools.bench import command

    with open_mesh(args) as ranks:
        if ranks is not None:
            return command.run_on_mesh(args, ranks)
    return command.run(args)


def _tune(args: argparse.Namespace) -> int:
    if args.arch is not None and args.arch not in ARCHS:
        raise ValueError(f"--arch is {args.arch!r}, needs one of {', '.join(ARCHS)}")
    from .tools.bench.tune import run

    return run(args)


def _fit(args: argparse.Namespace) -> int:
    from .tools import fit, scaling

    return fit.run(args) if args.scaling is None else scaling.run(args)


def _compile(args: argparse.Namespace) -> int:
    from .tools.offline import run

    return run(args)

"""The command line: `mixtral-triton` and `python -m mixtral_triton`.

Exit 0: done and right. 1: a mismatch, or nothing fits. 2: bad input, one line on stderr. 130: Ctrl-C. 141: closed pipe.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .. import __version__
from ..bench.gpus import GPUS, find_gpu
from ..checkpoint.config import DTYPES, SMALL, MixtralConfig, checkpoint_folder
from ..checkpoint.tokenizer import load_tokenizer
from ..kernels.launching.arch import ARCHS
from ..kernels.weights.names import FORMAT_NAMES
from ..terminal import Bar, check_range, console, did_you_mean, exit_status, print_message, select_backend
from .prompt import encode, read_prompt, read_text, render

if TYPE_CHECKING:
    from ..model.mixtral import Mixtral

# Texts of the help.
FOLDER = "checkpoint folder, or a name on the hub with or without @revision"
QUANTIZE = f"{', '.join(FORMAT_NAMES[:-1])} or {FORMAT_NAMES[-1]} for the experts', or experts=int4,linear=int8: "
QUANTIZE += "those of attention and the head, too"
ACTIVATIONS = "prefill products of fp8 weights quantize their activations, too; default: they do not"
OFFLOAD = "experts of each layer in pinned host memory; auto: the fewest of all layers that have to; default: 0"
PROMPT = "text to run, or - to read standard input"
OF_LOADING = "deterministic", "offload", "context", "cache_dtype", "activations"  # keywords of from_pretrained
# What other programs call an option.
SAME_OPTIONS = {"--load-in-4bit": "--weights experts=int4", "--load-in-8bit": "--weights experts=int8"}
# Modules whose `run` is the command; the others are functions below.
TOOLS = {"bench": "bench.command", "fit": "bench.fit_family", "compile": "bench.compile"}


class StoreOnce(argparse._StoreAction):
    """The action of an option that changes what is compared: a second value is refused, not taken in silence."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if getattr(namespace, self.dest) not in (self.default, values):
            raise argparse.ArgumentError(self, f"is given twice, as {getattr(namespace, self.dest)} and {values}")
        super().__call__(parser, namespace, values, option_string)


class Parser(argparse.ArgumentParser):
    """An argparse parser that reports an error in one line, with what may have been meant."""

    def error(self, message: str) -> NoReturn:
        for option, same in SAME_OPTIONS.items():
            message = re.sub(rf"{option}\b", f"{option} (here {same})", message)
        subs = (action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction))
        options = {name: None for choices in subs for sub in choices.values() for name in sub._option_string_actions}
        line = did_you_mean(" ".join(message.split()), options)
        self.exit(2, f"{self.prog}: {line} (see {self.prog} --help)\n")


def parse_weights(text: str) -> str | dict[str, str]:
    """Read `--weights` for `Mixtral.from_pretrained`: a format, or a format for each part of the model."""
    parts = (text if "=" in text else f"experts={text}").split(",")
    formats = {name: format for name, _, format in (part.partition("=") for part in parts)}
    known = formats.keys() <= {"experts", "linear"} and {*formats.values()} <= {*FORMAT_NAMES}
    if not known or len(formats) < len(parts):
        form = f"one of {', '.join(FORMAT_NAMES)}, in a form like int4, or experts=int4,linear=int8"
        raise argparse.ArgumentTypeError(f"{text!r} needs {form}")
    return formats if "=" in text else text


def parse_arch(text: str) -> str:
    """Return an architecture by its name or by a GPU's that `fit` knows."""
    if (gpu := find_gpu(text)) is None and text not in ARCHS:
        known = ARCHS if text.startswith(("sm", "gfx")) else GPUS  # of what was meant
        raise argparse.ArgumentTypeError(f"{text!r} needs one of {', '.join(known)}")
    return text if gpu is None else gpu.arch


def count_or_auto(noun: str, least: int) -> Callable[[str], int | str]:
    """Return what reads an option that is a number of `noun` or "auto"."""

    def parse(text: str) -> int | str:
        if text != "auto" and not (text.isdecimal() and int(text) >= least):
            raise argparse.ArgumentTypeError(f"{text!r} needs a number of {noun}, or auto")
        return text if text == "auto" else int(text)

    return parse


def parse_source(text: str) -> str | Path:
    return text if text == "-" else Path(text)


# Options of several commands.
OPTIONS: dict[str, dict[str, Any]] = {
    "folder": {"nargs": "?", "default": SMALL, "help": f"{FOLDER}; default: small, the package's"},
    "--device": {"help": "cpu, cuda, cuda:1, ...; default: the GPU if there is one"},
    "--dtype": {"choices": DTYPES, "help": "default: as stored"},
    "--weights": {"type": parse_weights, "metavar": "FORMAT", "help": f"{QUANTIZE}; default: as stored"},
    "--activations": {"choices": ("fp8",), "help": ACTIVATIONS},
    "--offload": {"type": count_or_auto("experts", 0), "default": 0, "metavar": "N|auto", "help": OFFLOAD},
    "--context": {"type": int, "metavar": "S", "help": "tokens that --offload auto has room for; default: 4096"},
    "--cache-dtype": {"choices": ("int8",), "help": "keys and values in 8 bits; default: the model's dtype"},
    "ops": {"nargs": "*", "metavar": "OP", "help": "default: all"},
    "--prompt": {"action": "append", "default": [], "metavar": "TEXT", "help": PROMPT},
    "--prompt-file": {"dest": "prompt", "action": "append", "type": Path, "metavar": "FILE", "help": "text to run"},
    "--interpret": {"action": "store_true", "help": "the Triton kernels, interpreted on the CPU"},
}
MODEL, PROMPTS = "folder --device --dtype --weights --activations ", "--prompt --prompt-file --interpret "
MEMORY, CACHE = "--offload --context ", "--cache-dtype "
Command = Callable[..., Callable[..., Any]]  # command(name, help, names of OPTIONS) -> add_argument


def parser() -> argparse.ArgumentParser:
    parser = Parser(prog="mixtral-triton", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, names: str = "") -> Callable[..., Any]:
        sub = commands.add_parser(name, help=help, description=help, conflict_handler="resolve")
        form = "JSON lines" if name in ("bench", "compile") else "one JSON document"
        sub.add_argument("--json", action="store_true", help=f"print {form} for a program to read")
        for option in names.split():
            sub.add_argument(option, **OPTIONS[option])
        return sub.add_argument

    _add_verify(command)
    _add_generate_and_chat(command)
    _add_other_readers(command)
    _add_tools(command)
    return parser


def _add_verify(command: Command) -> None:
    option = command("verify", "compare tensors with files, operations and layers with torch", MODEL + MEMORY + CACHE)
    text = "of the fixed pseudo-random text, default: 66, and of the longest call: 144, GPU: 8192"
    option("--tokens", type=int, metavar="N", help=text)
    option("--deterministic", action="store_true", help="the mode in which a row's bits do not depend on the batch")
    option("--quick", action=argparse.BooleanOptionalAction, default=False, help="no layers in fp64")


def _add_generate_and_chat(command: Command) -> None:
    stored = "default: generation_config.json's, else"
    for name, help, names in (
        ("generate", "stream the continuation of a prompt", "--prompt --prompt-file"),
        ("chat", "talk with an instruction-tuned checkpoint", ""),
    ):
        option = command(name, help, f"{MODEL} {MEMORY} {CACHE} {names} --interpret")
        option("--system", metavar="TEXT", help="the system message of the chat; default: none")
        most = "what the context leaves" if name == "chat" else 64
        text = f"fewer where the text ends; {stored} {most}"
        option("--max-new-tokens", type=int, metavar="N", help=text)
        option("--temperature", type=float, metavar="X", help=f"0 is greedy; {stored} 0")
        option("--top-k", type=int, metavar="N", help=f"sample from the N likeliest tokens, 0: all; {stored} 0")
        option("--top-p", type=float, metavar="P", help=f"of those, the likeliest of this total; {stored} 1")
        option("--min-p", type=float, metavar="P", help=f"of those, at least P times the likeliest; {stored} 0")
        text = f"divides the logits of tokens that the text has; {stored} 1"
        option("--repetition-penalty", type=float, metavar="X", help=text)
        option("--stop", action="append", default=[], metavar="TEXT", help="end before this text, left out; repeatable")
        option("--seed", type=int, default=0, metavar="N", help="of the sampling; default: 0")
        outputs = "--json" if name == "chat" else "--json or --batch"
        text = f"with {outputs}: the log probability of each token, and of the N likeliest"
        option("--logprobs", type=int, metavar="N", help=text)
        option("--deterministic", action="store_true", help="the mode in which bits do not depend on the batch")
        if name == "chat":
            text = "tokens of the chat; default: the model's positions, with --offload auto at most 4096"
            option("--context", type=int, metavar="S", help=text)
        else:
            option("--chat", action="store_true", help="answer the prompt in the checkpoint's chat template")
            text = 'JSON lines with a "prompt" or "messages": print one with a "text" for each'
            option("--batch", type=parse_source, metavar="FILE", help=f"{text}; - reads standard input")
            option("--out", type=Path, metavar="FILE", help="of --batch: write there; results of the same job are kept")
            text = "prompts of --batch at a time, fewer where no memory is left; auto, the default: 32, CPU: 8"
            option("--batch-size", type=count_or_auto("prompts", 1), default="auto", metavar="N|auto", help=text)


def _add_other_readers(command: Command) -> None:
    """Add the other commands that read a checkpoint's weights."""
    option = command("perplexity", "how well the model predicts a text", MODEL + MEMORY + CACHE + "--interpret")
    text = "a text in UTF-8, or - for standard input"
    option("--text", required=True, type=parse_source, metavar="FILE", help=text)
    option("--window", type=int, metavar="N", help="tokens that are seen at once; default: all positions, at most 2048")
    option("--stride", type=int, metavar="N", help="tokens from window to window; default: half a window")
    option("--weights", **OPTIONS["--weights"] | {"action": "append", "help": f"{QUANTIZE}; repeatable: a row each"})
    text = f"another {FOLDER}, as stored: a row of the same text; repeatable"
    option("--against", action="append", default=[], metavar="FOLDER", help=text)

    command("trace", "which experts each token of a prompt took, by layer", MODEL + MEMORY + PROMPTS)

    option = command("quantize", "write a checkpoint with quantized experts, as compressed-tensors has it", "--device")
    option("folder", help=f"{FOLDER}, not quantized")
    option("out", type=Path, help="folder to write, new or empty")
    text = f"{QUANTIZE}; int4: in groups of 128, 64 or 32"
    option("--weights", type=parse_weights, required=True, metavar="FORMAT", help=text)


def _add_tools(command: Command) -> None:
    """Add the commands of TOOLS."""
    option = command("bench", "operations and a decode step by peers and floors", "ops --weights")
    option("--dtype", **OPTIONS["--dtype"] | {"help": "default: bfloat16", "action": StoreOnce})
    option("--plot", type=Path, metavar="FILE", help="draw the result (.png, .svg, .pdf)")
    text = "a case of these sizes instead, the others as in Mixtral 8x7B; repeatable"
    option("--sizes", action="append", default=[], metavar="T=N,...", help=text)
    option("--only", action=StoreOnce, metavar="T=N,...", help="of the usual cases those of these sizes")
    text = "of a decode step: the sizes of a model that fit knows; default: mixtral-8x7b"
    option("--model", action=StoreOnce, metavar="NAME", help=text)
    text = "torch, transformers, or your function, checked before it is timed; repeatable; default: the first two"
    option("--peer", action="append", default=[], metavar="NAME", help=text)
    text = "measure nothing, floors by a data sheet: h100, ..., as in fit"
    option("--gpu", action=StoreOnce, metavar="NAME", help=text)
    option("--floors", action="store_true", help="of a decode step: each launch of a layer, its programs and floor")

    option = command("fit", "what fits a GPU's memory: weights by format, cache, the longest text", "--cache-dtype")
    text = "a folder, a name on the hub, mixtral-8x22b, qwen3-30b-a3b or olmoe-1b-7b; default: mixtral-8x7b"
    option("model", nargs="?", default="mixtral-8x7b", metavar="MODEL", help=text)
    text = "h100, rtx4090, ...; repeatable; default: the GPU there is, else all that are known"
    option("--gpu", action="append", metavar="NAME", help=text)
    option("--memory", type=float, metavar="GIB", help="a GPU of so many GiB; default: see --gpu")
    option("--batch", type=int, default=1, metavar="B", help="sequences at a time; default: 1")
    option("--context", type=int, metavar="S", help="tokens a sequence; default: all the positions")

    option = command("compile", "compile every kernel for a GPU that need not be there", "ops")
    text = f"{', '.join(ARCHS)}, or a GPU: h100, rtx4090, ..., as in fit; repeatable"
    option("--arch", required=True, action="append", type=parse_arch, metavar="ARCH", help=text)
    option("--kernel", metavar="NAME", help="this kernel alone")
    option("--at", action="append", default=[], metavar="T=N", help="a size in place of Mixtral's; repeatable")
    option("--out", type=Path, help="folder that keeps .ptx, .cubin and .sass (AMD: .amdgcn, .hsaco)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command -> exit status."""
    args = argparse.Namespace(command=None)
    for stream in (sys.stdout, sys.stderr):  # what a terminal cannot show is "?"
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        if sys.stdout is None:  # as Python has it where it is closed
            raise ValueError("standard output is closed, and results go there")
        try:
            parser().parse_args((sys.argv[1:] if argv is None else argv) or ["--help"], args)
            if getattr(args, "folder", None) is not None:
                args.folder = checkpoint_folder(args.folder)
            if args.command in TOOLS:
                return import_module(f"..{TOOLS[args.command]}", __package__).run(args)
            with warnings.catch_warnings():  # as lines of the command
                warnings.simplefilter("always", RuntimeWarning)
                warnings.showwarning = lambda text, *_, **__: print_message(f"note: {text}")
                return globals()[f"_{args.command}"](args)
        finally:
            sys.stdout.flush()  # here, where a closed pipe or a full disk can still be reported
    except BaseException as error:
        return exit_status(error, args.command)


def _load(args: argparse.Namespace) -> Mixtral:
    import torch

    from ..checkpoint.arguments import usable_device
    from ..checkpoint.tensors import total_bytes
    from ..model.mixtral import Mixtral
    from ..quantize.hub import read_headers

    device = usable_device(args.device, meta=False)
    if device.type == "meta":
        raise ValueError("--device is 'meta', which holds no numbers, needs cpu or cuda")
    args.cache_dtype = torch.int8 if getattr(args, "cache_dtype", None) else None
    options: dict[str, Any] = {name: getattr(args, name) for name in OF_LOADING if name in args}
    with Bar("loading", total_bytes(read_headers(args.folder)), "B") as progress:
        options["progress"] = progress.update
        model = Mixtral.from_pretrained(args.folder, device, args.dtype, args.weights, **options)
    if device.type == "cpu" and options.get("offload"):
        print_message("--offload moves nothing on a CPU, where all memory is the host's")
    return model


def _verify(args: argparse.Namespace) -> int:
    note = select_backend(args, interpret=True)
    from ..verification import launch_calls, verify
    from .text_stream import compile_shown

    model = _load(args)
    print_message(note)
    compile_shown(launch_calls, model, args.tokens, args.cache_dtype)
    options = {name: getattr(args, name) for name in ("folder", "quick", "tokens", "cache_dtype")}
    with Bar("verifying") as progress:
        report = verify(model, None, progress.set, **options)
    if args.json:
        print(json.dumps({"folder": str(args.folder), **report.as_dict()}, allow_nan=False))
    else:
        console().print(report)
    return int(not report.ok)


def _generate(args: argparse.Namespace) -> int:
    note = select_backend(args, interpret=False)
    from . import batch
    from .chat import system_message
    from .text_stream import Writer, check_options

    check_options(args)
    if args.batch is not None:
        jobs = batch.read_jobs(args)
        done, size = batch.read_done(args, jobs)
        return batch.run(args, Writer(args, _load(args), note), jobs, done, size)
    for name, given in (("--out", args.out is not None), ("--batch-size", args.batch_size != "auto")):
        if given:
            raise ValueError(f"{name} is an option of a batch: needs --batch FILE")
    text = prompt = read_prompt(args.prompt)
    if args.system is not None and not args.chat:
        raise ValueError("--system is a message of a chat: needs --chat")
    messages = [*system_message(args.system), {"role": "user", "content": text}]
    if args.chat:
        prompt = render(load_tokenizer(args.folder), messages)
    writer = Writer(args, _load(args), note)
    ids = writer.encode(prompt, template=args.chat)
    # A continuation follows the prompt on its line, an answer stands alone.
    shown, after = ("", []) if args.chat else (text, ids[-1:])
    steps = writer.stream([ids], writer.new_tokens)
    writer.begin(1, len(ids), len(ids) + writer.new_tokens)
    result, line = writer.print_text(steps, len(ids), None if args.json else shown, after)
    if args.json:
        answer = {"role": "assistant", "content": result["text"]}
        print(json.dumps({"prompt": prompt, **result, **({"messages": [*messages, answer]} if args.chat else {})}))
    else:
        print_message(line)
    return 0


def _chat(args: argparse.Namespace) -> int:
    note = select_backend(args, interpret=False)
    from ..model.memory_plan import AUTO_CONTEXT
    from .chat import Chat, check_system, run
    from .text_stream import Writer, check_options

    check_options(args)
    limit = MixtralConfig.from_pretrained(args.folder).max_position_embeddings
    check_system(load_tokenizer(args.folder), args.system)
    check_range("--context", limit if args.context is None else args.context, 1, limit, "the model's positions")
    context, auto = args.context, args.offload == "auto"
    limit = context or (min(AUTO_CONTEXT, limit) if auto else limit)  # tokens that loading leaves memory for
    args.context = context if auto else None
    writer = Writer(args, _load(args), note)
    writer.notes.append(f"the chat has room for {limit:,} tokens")
    return run(args, Chat(writer, args.system, limit))


def _perplexity(args: argparse.Namespace) -> int:
    note = select_backend(args, interpret=False)
    from .perplexity import run

    args.against = [checkpoint_folder(folder) for folder in args.against]
    return run(args, read_text(args.text, f"--text {args.text}"), _load, note)


def _trace(args: argparse.Namespace) -> int:
    note = select_backend(args, interpret=False)
    from .trace import run

    text = read_prompt(args.prompt)
    model, args.prompt = _load(args), text
    return run(args, model, encode(model.tokenizer, args.prompt, model.config.vocab_size), note)


def _quantize(args: argparse.Namespace) -> int:
    from ..checkpoint.tensors import total_bytes
    from ..quantize.hub import read_headers
    from ..quantize.write import write

    before = total_bytes(read_headers(args.folder))
    with Bar("quantizing", before, "B") as progress:
        after = write(args.folder, args.out, args.weights, args.device, progress.update)
    if args.json:
        sizes = {"bytes_before": before, "bytes": after}
        print(json.dumps({"folder": str(args.folder), "out": str(args.out), "weights": args.weights, **sizes}))
    else:
        print(f"{args.out}: {after / 1e9:,.3g} GB, of {before / 1e9:,.3g} GB in {args.folder}")
    return 0

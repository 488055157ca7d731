"""Text of the command line: prompts, a checkpoint's tokenizer and chat template, generated text; no import of torch."""

import datetime
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ..config import read_file, read_json_object, refuse_lfs_pointer, shown
from .terminal import bar

TEMPLATE_SECONDS, TEMPLATE_BYTES = 10, 1 << 28  # that a chat template may take
TEMPLATE_FILE, CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"
PROMPT_CHARACTERS = 1 << 25  # more than any context holds; a device such as /dev/zero has no end


def read_prompts(prompts: Sequence[str | Path]) -> list[str]:
    """Return the texts of `--prompt TEXT`, `--prompt -` (standard input) and `--prompt-file FILE` (a Path). One newline
    at the end of an input or a file is not part of the text. ValueError where there is none, or an empty one."""
    if not prompts:
        raise ValueError("--prompt is missing: give a text, - to read standard input, or --prompt-file FILE")
    return list(map(_read_prompt, prompts))


def _read_prompt(prompt: str | Path) -> str:
    if isinstance(prompt, Path):
        return read_text(prompt, f"--prompt-file {prompt}", strip=True)
    return read_text("-", "--prompt -", strip=True) if prompt == "-" else _check_text(prompt, "--prompt")


def read_text(source: str | Path, name: str, strip: bool = False) -> str:
    """Return the text of a file, or of standard input ("-"), without a newline at its end if `strip`. `name` is the
    option in errors. ValueError for one that is empty, too long, or no text in UTF-8."""
    if not isinstance(source, Path) and (int(os.environ.get("WORLD_SIZE", 1)) > 1 or sys.stdin is None):
        fault = "is closed" if sys.stdin is None else "several processes share"
        raise ValueError(
            f"{name} reads standard input, which {fault}: needs a file{' (--prompt-file)' if strip else ''}"
        )
    try:
        with source.open(encoding="utf-8") if isinstance(source, Path) else nullcontext(sys.stdin) as opened:
            text = opened.read(PROMPT_CHARACTERS + 1)
    except UnicodeError:
        raise ValueError(f"{name} holds bytes that are no text in UTF-8") from None
    return _check_text(text.removesuffix("\n") if strip else text, name)


def _check_text(text: str, name: str) -> str:
    try:
        text.encode()  # fails for Python's stand-ins for bytes that are no UTF-8
    except UnicodeError:
        raise ValueError(f"{name} holds bytes that are no text in UTF-8") from None
    if not text or len(text) > PROMPT_CHARACTERS:
        fault = f"longer than {PROMPT_CHARACTERS:,} characters, the most of a prompt"
        raise ValueError(f"{name} is {fault if text else 'empty: give at least one character'}")
    return text


class FileTokenizer:
    """A tokenizer without truncation and padding, whose errors and panics are ValueErrors that name the file."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        self.path = path
        self._tokenizer = self._call(Tokenizer.from_file, str(path))
        self.no_truncation()
        self.no_padding()

    def __getattr__(self, name: str) -> Any:
        return partial(self._call, getattr(self._tokenizer, name))

    def _call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        with suppress(OSError), open(os.dup(2), "wb") as saved, open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)  # where Rust prints a panic's backtrace
            try:
                return function(*args, **kwargs)
            except BaseException as error:
                if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                    raise
                need = "is not a tokenizer that the tokenizers library can use"
                raise ValueError(f"{self.path} {need}: {error}") from None
            finally:
                os.dup2(saved.fileno(), 2)
        return function(*args, **kwargs)  # without a standard error


def load_tokenizer(folder: str | Path) -> Any:
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: a prompt needs the checkpoint's tokenizer.json")
    refuse_lfs_pointer(path)
    return FileTokenizer(path)


def encode(tokenizer: Any, text: str, vocab_size: int, add_special_tokens: bool = True) -> tuple[list[int], str]:
    """Return the text's tokens as transformers' `AutoTokenizer` has them, whose first and last are those of
    tokenizer.json's post-processor, and a warning where the text itself holds one that was added (<s>). The text of a
    chat template has them already. ValueError for a text without tokens, or with one that the model does not have."""
    encoding = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    if not (ids := encoding.ids) or max(ids) >= vocab_size:
        made, need = f"token {max(ids)}" if ids else "no token", f"at least one, of 0..{vocab_size - 1}, the model's"
        raise ValueError(f"{tokenizer.path} makes {made} of {text!r:.40}, needs {need}")
    marked = list(zip(ids, encoding.special_tokens_mask, strict=True))
    twice = {token for token, added in marked if added} & {token for token, added in marked if not added}
    names = ", ".join(tokenizer.id_to_token(token) for token in sorted(twice))
    return ids, f"the prompt holds {names}, which the tokenizer adds, too" if twice else ""


class ChatTemplate:
    """A folder's chat template, in jinja's sandbox as transformers has it. ValueError for a missing or broken one."""

    def __init__(self, folder: str | Path) -> None:
        import jinja2.sandbox

        self.file, file = Path(folder) / CONFIG_FILE, Path(folder) / TEMPLATE_FILE
        config = read_json_object(self.file) if self.file.is_file() else {}
        template = config.get("chat_template")
        if isinstance(template, list):  # several with names
            named = (each for each in template if isinstance(each, dict) and each.get("name") == "default")
            template = next(named, {}).get("template")
        if file.is_file():
            try:
                self.file, template = file, read_file(file).decode()
            except UnicodeError:
                raise ValueError(f"{file}: the chat template holds bytes that are no text in UTF-8") from None
        if not isinstance(template, str):
            files = f"neither {TEMPLATE_FILE} nor a chat_template in {CONFIG_FILE} is there"
            raise ValueError(f"{folder}: --chat needs a template, and {files}: an instruction-tuned checkpoint has one")
        special = ((name, config.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token"))
        tokens = {name: token.get("content") if isinstance(token, dict) else token for name, token in special}
        self.tokens = {name: token for name, token in tokens.items() if token is not None}
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _generation_tag()]
        )
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # jinja's own escapes HTML
        environment.globals |= {"raise_exception": _raise, "strftime_now": datetime.datetime.now().strftime}
        self._compile = partial(environment.from_string, template)
        self._limited(lambda: str(self._compile()), "is not readable:")

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """Return the text up to the assistant's next message; ValueError for a failure or a lost system message."""
        arguments = {"messages": list(messages), "tools": None, "documents": None, "add_generation_prompt": True}
        system = messages[0]["content"] if messages[0]["role"] == "system" else ""
        hint = ": it may have no system message; leave --system out" if system else ""
        text = self._limited(lambda: self._compile().render(**arguments, **self.tokens), "fails with", hint)
        if system.strip() not in text:
            raise ValueError(f"{self.file}: the chat template leaves the system message out{hint}")
        return text

    def _limited(self, function: Callable[[], str], fault: str, hint: str = "") -> str:
        """Run `function` in a child process: a template may never end or take all memory, even while it is compiled."""

        def child() -> None:
            import resource

            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + TEMPLATE_BYTES,) * 2)
            try:
                sender.send((function(), ""))
            except Exception as error:
                sender.send(("", f"{type(error).__name__}: {error}"))

        fork = multiprocessing.get_context("fork")
        receiver, sender = fork.Pipe(duplex=False)
        process = fork.Process(target=child, daemon=True)
        process.start()
        sender.close()
        text, reason = "", f"no end after {TEMPLATE_SECONDS} s"
        try:
            if receiver.poll(TEMPLATE_SECONDS):
                text, reason = receiver.recv()
        except EOFError:
            reason = "the end of its process"
        finally:
            process.kill()
        if reason:
            raise ValueError(f"{self.file}: the chat template {fault} {shown(reason, 200)}{hint}")
        return text


def _generation_tag() -> type:
    """Return jinja's extension of {% generation %}, which marks an assistant's text for training and renders it."""
    import jinja2.ext

    def parse(tag: Any, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(tag.call_method("render"), [], [], body, lineno=line)

    methods = {"tags": {"generation"}, "parse": parse, "render": lambda tag, caller: caller()}
    return type("Generation", (jinja2.ext.Extension,), methods)


def _raise(message: str) -> None:
    raise ValueError(message)


PENALTY = "repetition_penalty"
SAMPLING: dict[str, Any] = {"temperature": 0.0, "top_k": None, "top_p": 1.0, "min_p": 0.0, PENALTY: 1.0}  # defaults
# Fields of generation_config.json that change a text as they do in transformers, or change none.
HONOURED = {*SAMPLING, "do_sample", "eos_token_id", "bos_token_id", "pad_token_id", "transformers_version"}
# What transformers takes for a field that is missing, where it is not off: False, 0, an empty list.
DEFAULTS: dict[str, Any] = {"max_length": 20, "num_assistant_tokens": 20, "num_assistant_tokens_schedule": "constant"}
DEFAULTS |= {"assistant_confidence_threshold": 0.4, "assistant_lookbehind": 10, "target_lookbehind": 10}
DEFAULTS |= dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "use_cache", "guidance_scale"), 1)
DEFAULTS |= dict.fromkeys(("typical_p", "length_penalty", "encoder_repetition_penalty"), 1.0)


def select_sampling(args: Any, stored: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the options of sampling, given, `stored` in generation_config.json or default, and notes on the stored:
    which were taken, and the names of those that change transformers' texts and none here."""
    explicit = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    # transformers' own defaults of sampling, where the file does not say more
    taken = {"temperature": 1.0, "top_k": 50} | stored if stored.get("do_sample") else stored | {"temperature": 0.0}
    found = {name: taken[name] for name in SAMPLING if name in taken and name not in explicit}
    options = SAMPLING | found | explicit
    effective = {name for name in found if (found[name] != 1 if name == PENALTY else options["temperature"])}
    used = ", ".join(f"{name} {value}" for name, value in found.items() if name in effective)
    notes = [f"generation_config.json sets {used}"] if used else []
    others = {name: value for name, value in stored.items() if name not in HONOURED and not name.startswith("_")}
    changed = (name for name, value in others.items() if (value != DEFAULTS[name] if name in DEFAULTS else value))
    if ignored := shown(", ".join(changed), 400):
        notes.append(f"generation_config.json sets what is not supported and is ignored: {ignored}")
    return options | {"top_k": options["top_k"] or None}, notes  # 0: of all tokens


def speed_of(times: Sequence[float], prompt_tokens: int, device: Any, reused: int = 0) -> tuple[dict[str, Any], str]:
    """Return tokens per second (None without a token), and peak_bytes, which torch allocated on the GPU or the process
    had resident; and a line that says so. times: of the start, and of each token. reused: the prompt's tokens that a
    cache held."""
    import resource

    import torch

    count, computed = len(times) - 1, prompt_tokens - reused
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident
    prefill = computed / (times[1] - times[0]) if count > 0 else None
    decode = (count - 1) / (times[-1] - times[1]) if count > 1 else None
    speed: dict[str, Any] = {"prompt_tokens": prompt_tokens, "computed": computed, "reused": reused}
    speed |= {"tokens_per_second": count / (times[-1] - times[0]) if count > 0 else None}
    speed |= {"prefill_tokens_per_second": prefill, "decode_tokens_per_second": decode, "peak_bytes": peak}
    first = f"prefill: {computed} tokens{f' and {reused} reused' if reused else ''}, {prefill or 0:.1f} tokens/s"
    rest = f"decode: {max(0, count - 1)} tokens, {decode or 0:.1f} tokens/s"
    return speed, f"{first}; {rest}; peak of memory: {peak / 1e9:.2f} GB"


def decode(tokenizer: Any, after: list[int], tokens: list[int], special: bool = False) -> str:
    """Return the text of `tokens` behind the tokens `after`, without which a decoder drops a space before the first.
    special: with the text of special tokens."""
    start, whole = (tokenizer.decode(each, skip_special_tokens=not special) for each in (after, [*after, *tokens]))
    return whole[len(start) :]  # type: ignore[no-any-return]


def cut_at_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """Return the text before the first of the texts `stop`, and whether there is one."""
    ends = [text.index(each) for each in stop if each in text]
    return text[: min(ends, default=len(text))], bool(ends)


def print_stream(
    steps: Iterator[Any],
    tokenizer: Any,
    prefix: str | None,
    after: list[int],
    total: int,
    stop: Sequence[str] = (),
    interruptible: bool = False,
) -> tuple[list[int], str, list[float]]:
    """Return the tokens of one sequence of `Mixtral.stream`; their text behind the tokens `after` and up to `stop`,
    printed behind `prefix` as it comes (None: it is not); and the times of the start and of each token. interruptible:
    Ctrl-C ends the text."""
    tokens, times, printed, answer = list[int](), [time.perf_counter()], 0, ""

    def read() -> Iterator[str]:
        """Yield the text after each token, up to where it ends or may end, and last all of it."""
        for step in steps:
            tokens.append(int(step[0]))  # waits for the GPU
            times.append(time.perf_counter())
            whole = decode(tokenizer, after, tokens) if stop or prefix is not None else ""
            text, ended = cut_at_stop(whole, stop)
            if ended:
                yield text
                return
            # What may become a stop string, or is half a character, is not printed until it cannot be more.
            held = max((n for each in stop for n in range(len(each)) if text.endswith(each[:n])), default=0)
            yield text[: len(text) - held].rstrip("\ufffd")
        yield decode(tokenizer, after, tokens)

    parts, progress_bar = read(), bar("generating", total) if prefix is None else bar("reading the prompt", None)
    try:
        with progress_bar as progress:
            for text in islice(parts, None if prefix is None else 1):
                answer = text
                progress.update(len(tokens), total)
        print(prefix or "", end="", flush=True)
        for text in chain([answer], parts):
            answer = text
            if prefix is not None:
                print(text[printed:], end="", flush=True)
                printed = max(printed, len(text))
    except KeyboardInterrupt:
        if not interruptible:
            raise
        answer = decode(tokenizer, after, tokens)
    finally:
        print(end="" if prefix is None else "\n", flush=True)
    return tokens, answer, times

"""Text of the command line: prompts, a checkpoint's tokenizer, chat template and sampling, which are transformers'. No
import of torch or transformers before they are used."""

import io
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..checkpoint.config import GENERATION_FILE, escape

PROMPT_CHARACTERS = 1 << 25  # more than any context holds; a device such as /dev/zero has no end


def read_prompt(prompts: Sequence[str | Path]) -> str:
    """Return the text of `--prompt TEXT`, `--prompt -` (standard input) or `--prompt-file FILE` (a Path), without one
    newline at the end of an input or a file. ValueError unless one is given, which is not empty."""
    if len(prompts) != 1:
        raise ValueError(f"--prompt is given {len(prompts)} times: needs one text, - (standard input) or --prompt-file")
    (prompt,) = prompts
    if isinstance(prompt, Path):
        return read_text(prompt, f"--prompt-file {prompt}", strip=True)
    return read_text(prompt, "--prompt -", strip=True) if prompt == "-" else _check(prompt, "--prompt")


def read_text(source: str | Path, name: str, strip: bool = False) -> str:
    """Return the text of a file, or of standard input ("-"), as it is, without a newline at its end if `strip`. `name`
    is the option in errors. ValueError for one that is empty, too long, or no text in UTF-8."""
    if source == "-" and isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(newline="")  # a carriage return is part of a text
    stdin = sys.stdin or io.StringIO()  # None: it is closed
    try:
        with source.open(encoding="utf-8", newline="") if isinstance(source, Path) else nullcontext(stdin) as file:
            text = file.read(PROMPT_CHARACTERS + 1)
    except UnicodeError:
        text = "\udcff"  # as Python reads what is no text, in an argument
    return _check(text.removesuffix("\n").removesuffix("\r") if strip and text.endswith("\n") else text, name)


def _check(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeError:
        raise ValueError(f"{name} holds bytes that are no text in UTF-8") from None
    if not text or len(text) > PROMPT_CHARACTERS:
        fault = f"longer than {PROMPT_CHARACTERS:,} characters, the most of a prompt"
        raise ValueError(f"{name} is {fault if text else 'empty: give at least one character'}")
    return text


def encode(tokenizer: Any, text: str, vocab_size: int, add_special_tokens: bool = True) -> list[int]:
    """Return the text's tokens, those of a chat template without added ones. Warn where the text itself begins
    with the one that the tokenizer adds (<s>). ValueError for no token, or for one that the model does not have."""
    ids: list[int] = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False).input_ids
    if not ids or max(ids) >= vocab_size:
        made, need = f"token {max(ids)}" if ids else "no token", f"at least one, of 0..{vocab_size - 1}, the model's"
        raise ValueError(f"{tokenizer.name_or_path}: the tokenizer makes {made} of {text!r:.40}, needs {need}")
    if add_special_tokens and ids[:2] == [tokenizer.bos_token_id] * 2:
        warnings.warn(f"the prompt begins with {escape(tokenizer.bos_token)}, which the tokenizer adds", stacklevel=2)
    return ids


def render(tokenizer: Any, messages: Sequence[dict[str, str]]) -> str:
    """Return the chat template's text up to the assistant's next message. ValueError for a template that is
    not there or fails, and for one that leaves the system message out."""
    folder = tokenizer.name_or_path
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    hint = ": it may have no system message; leave --system out" if system else ""
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template may raise anything
        reason = escape(f"{type(error).__name__}: {error}", 200)
        raise ValueError(f"{folder}: the chat template fails with {reason}{hint}") from error
    if system.strip() not in text:
        raise ValueError(f"{folder}: the chat template leaves the system message out{hint}")
    return text


# Fields of generation_config.json that are options of the command line, and others that change a text as they do in
# transformers, or change none.
SAMPLING = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
HONOURED = {"max_new_tokens", "do_sample", "eos_token_id", "bos_token_id", "pad_token_id", "transformers_version"}


def read_sampling(args: Any) -> tuple[dict[str, Any], int | None, str]:
    """Return the arguments of `SamplingOptions` that are given or in the folder's generation_config.json; the most new
    tokens, or None; and a note with the names of what changes transformers' texts and none here. ValueError for a file
    that transformers refuses."""
    stored, defaults, file = dict[str, Any](), dict[str, Any](), Path(args.folder) / GENERATION_FILE
    if file.is_file():
        from transformers import GenerationConfig, logging

        logging.set_verbosity_error()  # it warns of fields that have no effect
        try:
            config = GenerationConfig.from_pretrained(args.folder)
            stored = {name: value for name, value in config.to_dict().items() if value is not None and name[0] != "_"}
        except Exception as error:  # it compares and calls what the file holds
            reason = escape(f"{type(error).__name__}: {error}", 200)
            raise ValueError(f"{file}: transformers cannot read it: {reason}") from error
        defaults = config._get_default_generation_params()
    given = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    taken = defaults | stored if stored.get("do_sample") else stored | {"temperature": 0.0}
    options = {name: taken[name] for name in SAMPLING if name in taken} | given
    options["top_k"] = options.get("top_k") or None  # 0: of all tokens
    limit = stored.get("max_new_tokens") if args.max_new_tokens is None else args.max_new_tokens
    unsupported = {name: value for name, value in stored.items() if name not in HONOURED | SAMPLING}
    changed = (name for name, value in unsupported.items() if (value != defaults[name] if name in defaults else value))
    ignored = escape(", ".join(changed), 400)
    return options, limit, f"{GENERATION_FILE} sets what is not supported and is ignored: {ignored}" if ignored else ""


def speed_of(times: Sequence[float], prompt_tokens: int, reused: int = 0) -> tuple[dict[str, Any], str]:
    """Return the counts of a prompt's tokens and tokens per second, None without a token; and a line that says so.
    times: of the start, and of each token. reused: the prompt's tokens that a cache held."""
    count, computed = len(times) - 1, prompt_tokens - reused
    prefill = computed / (times[1] - times[0]) if count > 0 else None
    decode = (count - 1) / (times[-1] - times[1]) if count > 1 else None
    speed: dict[str, Any] = {"prompt_tokens": prompt_tokens, "computed": computed, "reused": reused}
    speed |= {"prefill_tokens_per_second": prefill, "decode_tokens_per_second": decode}
    first = f"prefill: {computed} tokens{f' and {reused} reused' if reused else ''}, {prefill or 0:.1f} tokens/s"
    return speed, f"{first}; decode: {max(0, count - 1)} tokens, {decode or 0:.1f} tokens/s"


def decode(tokenizer: Any, after: list[int], tokens: list[int], special: bool = False) -> str:
    """Return the text of `tokens` behind the tokens `after`, without which a decoder drops a space before the first.
    special: with the text of special tokens."""
    start, whole = (tokenizer.decode(ids, skip_special_tokens=not special) for ids in (after, [*after, *tokens]))
    return whole[len(start) :]  # type: ignore[no-any-return]

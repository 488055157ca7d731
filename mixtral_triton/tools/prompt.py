"""Prompts of the command line: their text, a checkpoint's tokenizer and its chat template. It imports no torch."""

from __future__ import annotations

import datetime
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import parse_json_object, refuse_lfs_pointer

Message = dict[str, str]  # role and content
TEMPLATE_FILE, CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"


def read_prompts(prompts: Sequence[str | Path]) -> list[str]:
    """Return the texts of `--prompt TEXT`, `--prompt -` (standard input) and `--prompt-file FILE` (a Path). One newline
    at the end of an input or a file is not part of the text. ValueError where there is none, or an empty one."""
    if not prompts:
        raise ValueError("--prompt is missing: give a text, - to read standard input, or --prompt-file FILE")
    texts = []
    for prompt in prompts:
        name = f"--prompt-file {prompt}" if isinstance(prompt, Path) else "--prompt -" if prompt == "-" else "--prompt"
        if name == "--prompt -" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("--prompt - reads standard input, which several processes share: needs --prompt-file")
        try:
            text = str(prompt)
            if name != "--prompt":
                text = prompt.read_text("utf-8") if isinstance(prompt, Path) else sys.stdin.read()
                text = text.removesuffix("\n")
            text.encode()  # fails for Python's stand-ins for bytes that are no UTF-8
        except UnicodeError:
            raise ValueError(f"{name} holds bytes that are no text in UTF-8") from None
        if not text:
            raise ValueError(f"{name} is empty: give at least one character")
        texts.append(text)
    return texts


def load_tokenizer(folder: str | Path) -> Any:
    from tokenizers import Tokenizer

    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: a prompt needs the checkpoint's tokenizer.json")
    refuse_lfs_pointer(path)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception on a bad file
        raise ValueError(f"{path} is not a tokenizer that the tokenizers library can read: {error}") from error


def encode(tokenizer: Any, text: str, bos: int | None) -> tuple[list[int], str]:
    """Return the text's tokens after `bos`, unless the text begins with it, and a warning where the text holds it."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    warning = ""
    if bos in ids:
        name, added = tokenizer.id_to_token(bos), "one more is" if ids[0] != bos else "no second one is"
        warning = f"the prompt holds {name}, the beginning-of-sequence token: {added} added"
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids], warning


class ChatTemplate:
    """A checkpoint's chat template, in jinja's sandbox as transformers has it."""

    def __init__(self, folder: str | Path) -> None:
        """Read the folder's template; ValueError that names the files where there is none, and for a broken one."""
        import jinja2
        import jinja2.sandbox

        folder = Path(folder)
        self.file, file = folder / CONFIG_FILE, folder / TEMPLATE_FILE
        config = parse_json_object(self.file.read_bytes(), str(self.file)) if self.file.is_file() else {}
        template = config.get("chat_template")
        if isinstance(template, list):  # several with names
            named = [each for each in template if isinstance(each, dict) and each.get("name") == "default"]
            template = named[0].get("template") if named else None
        if file.is_file():
            self.file, template = file, file.read_text("utf-8")
        if not isinstance(template, str):
            raise ValueError(
                f"{folder}: --chat needs a template, and neither {TEMPLATE_FILE} nor a chat_template in {CONFIG_FILE} "
                "is there: an instruction-tuned checkpoint has one"
            )
        self.tokens = {name: config.get(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        self.tokens = {
            name: token.get("content") if isinstance(token, dict) else token for name, token in self.tokens.items()
        }
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json  # jinja's own escapes HTML
        environment.globals |= {"raise_exception": _raise, "strftime_now": datetime.datetime.now().strftime}
        try:
            self.template = environment.from_string(template)
        except jinja2.TemplateError as error:
            raise ValueError(f"{self.file}: the chat template is not readable: {error}") from None

    def render(self, messages: Sequence[Message]) -> str:
        """Return the text that continues with the assistant's next message; ValueError where the template fails, and
        where it leaves a system message out."""
        tokens = {name: token for name, token in self.tokens.items() if token is not None}
        arguments = {"messages": list(messages), "tools": None, "documents": None, "add_generation_prompt": True}
        system = messages[0]["content"] if messages[0]["role"] == "system" else ""
        hint = ": it may have no system message; leave --system out" if system else ""
        try:
            text = self.template.render(**arguments, **tokens)
        except Exception as error:  # a template is a program
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{self.file}: the chat template fails with {reason}{hint}") from None
        if system.strip() not in text:
            raise ValueError(f"{self.file}: the chat template leaves the system message out{hint}")
        return text


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> None:
    raise ValueError(message)

"""The command `chat`, and the turns of `generate --chat`: a conversation that one cache serves."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..cache import KVCache
from .prompt import PROMPT_CHARACTERS, ChatTemplate, decode
from .terminal import check_writable, print_message
from .writer import Writer

HELP = """A line is a turn of the chat. Ctrl-C ends an answer, Ctrl-D the chat. A space before / makes it text.
/system TEXT  set the system message; without TEXT remove it
/reset        forget all turns
/undo         forget the last turn
/save FILE    write the messages as a line for generate --batch
/help         print this"""


def system_message(text: str | None) -> list[dict[str, str]]:
    return [{"role": "system", "content": text}] if text else []


def check_system(template: ChatTemplate, text: str | None, message: str = "x") -> None:
    """Raise ValueError where the template fails with the system message `text`, or with none."""
    template.render([*system_message(text), {"role": "user", "content": message}])


class Conversation:
    """Messages, and the cache and the tokens of what the model has read and written of them.

    prompt  the template's text of the last turn
    limit   the most tokens, at which an answer ends; None: `Mixtral.stream` refuses what is too long
    """

    def __init__(self, writer: Writer, template: ChatTemplate, system: str | None, limit: int | None = None) -> None:
        self.writer, self.template, self.limit, self.prompt = writer, template, limit, ""
        self.messages = system_message(system)
        self.cache: KVCache | None = None
        self._turns: list[tuple[str, list[int]]] = []  # the text and the tokens up to the end of each answer

    def turn(self, text: str, shown: str | None, **options: Any) -> tuple[dict[str, Any], str]:
        """Answer a message -> as `Writer.write`. One that fails, or that Ctrl-C ends before a token, is forgotten."""
        messages = [*self.messages, {"role": "user", "content": text}]
        self.prompt, most = self.template.render(messages), self.writer.args.max_new_tokens
        ids = self._encode(self.prompt)
        n = most if self.limit is None else min(most, self.limit - len(ids))
        if n < min(1, most):
            got = f"this turn makes the chat {len(ids):,} tokens long, and fewer than {self.limit:,} are possible"
            raise ValueError(f"{got}: /reset begins a new one, /undo forgets the last turn")
        try:
            written, line = self.writer.write(ids, shown, [], n, self._reserve(len(ids) + n), **options)
        finally:
            try:
                if self.cache is not None:
                    self.cache.check_intact()
            except ValueError:  # a ring that a prompt was being written to when it ended
                self.cache.lengths.zero_()  # type: ignore[union-attr]
        if (tokens := written["tokens"]) or not n:
            self.messages = [*messages, {"role": "assistant", "content": written["text"]}]
            kept = tokens[:-1] if tokens and tokens[-1] in self.writer.eos else tokens
            self._turns.append((self.prompt + decode(self.writer.tokenizer, ids[-1:], kept, special=True), ids + kept))
        if self.limit is not None:
            written["left"] = left = self.limit - len(ids) - len(tokens)
            if left < written["computed"] + most:  # of another turn like this
                line += f"; {left:,} of {self.limit:,} tokens are left: /reset begins a new chat"
        return written, line

    def undo(self) -> None:
        if not self._turns:
            raise ValueError("/undo has no turn to forget")
        self._turns.pop()
        del self.messages[-2:]

    def reset(self) -> None:
        self.messages = [each for each in self.messages if each["role"] == "system"]
        self._turns.clear()

    def set_system(self, text: str) -> None:
        """Change the system message; ValueError where the template has none."""
        check_system(self.template, text)
        self.messages = system_message(text) + [each for each in self.messages if each["role"] != "system"]

    def _encode(self, text: str) -> list[int]:
        """Return the tokens of the chat's text. Those of an answer stay as they were written, although a tokenizer may
        have others for its text, unless the template changes the text before its end."""
        before, ids = self._turns[-1] if self._turns else ("", [])
        if not text.startswith(before) or text == before:
            before, ids = "", []
        return ids + self.writer.encode(text[len(before) :], template=True)

    def _reserve(self, length: int) -> KVCache:
        """Return the cache, with at least `length` slots."""
        model = self.writer.model
        cache = self.cache or KVCache(model.config, 1, length, model.device, self.writer.dtype)
        if length > cache.max_len:  # twice as many, so that few turns copy it
            cache = cache.grown(max(length, 2 * cache.max_len))
        self.cache = cache
        return cache


def read_line(prompt: str) -> str:
    """Return a line of standard input, with history and arrow keys on a terminal. EOFError at its end, ValueError for
    what is no text."""
    try:
        if sys.stdin is not None and sys.stdin.isatty():
            with suppress(ImportError):
                import readline  # noqa: F401  (input() then uses it)
            text = input(prompt)
        else:
            line = "" if sys.stdin is None else getattr(sys.stdin, "buffer", sys.stdin).readline(PROMPT_CHARACTERS)
            if not line:
                raise EOFError
            text = line.decode() if isinstance(line, bytes) else line
        text.encode()  # fails for Python's stand-ins for bytes that are no UTF-8
    except UnicodeError:
        raise ValueError("the line holds bytes that are no text in UTF-8") from None
    return text.removesuffix("\n").removesuffix("\r")


def run(args: argparse.Namespace, chat: Conversation) -> int:
    """Answer lines of standard input until it ends. What is wrong with one is a line, and the chat goes on."""
    print_message("\n".join([*chat.writer.notes, HELP.partition("\n")[0]]))
    chat.writer.notes = []
    while True:
        try:
            text = read_line("" if args.json else "> ")
            if text.startswith("/"):
                _command(chat, text)
            elif text:
                _answer(args, chat, text)
        except EOFError:
            return 0
        except KeyboardInterrupt:
            if sys.stdin is None or not sys.stdin.isatty():
                raise
            print_message("\n")
        except (ValueError, RuntimeError, MemoryError, OSError) as error:
            if isinstance(error, OSError) and not error.filename:  # of standard output
                raise
            message = " ".join(str(error).split()) or type(error).__name__
            if args.json:
                print(json.dumps({"error": message}), flush=True)
            else:
                print_message(f"mixtral-triton chat: {message}")


def _answer(args: argparse.Namespace, chat: Conversation, text: str) -> None:
    written, line = chat.turn(text, None if args.json else "", interruptible=True)
    if args.json:
        print(json.dumps(written), flush=True)
    else:
        print_message(line)


def _command(chat: Conversation, line: str) -> None:
    name, _, text = line.partition(" ")
    text = text.strip()
    if name == "/system":
        chat.set_system(text)
    elif name == "/reset":
        chat.reset()
    elif name == "/undo":
        chat.undo()
    elif name == "/save":
        check_writable("/save", Path(text))
        Path(text).write_text(json.dumps({"messages": chat.messages}, ensure_ascii=False) + "\n", encoding="utf-8")
    elif name == "/help":
        print_message(HELP)
    else:
        raise ValueError(f"{name:.40} is no command: /help prints them, and a space before / makes it text")

"""The command `chat`: a conversation that one cache serves."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..model.cache import KVCache
from ..model.conversation import Conversation
from ..terminal import print_message
from .batch import is_message
from .prompt import PROMPT_CHARACTERS, decode, read_text, render
from .text_stream import Writer

HELP = """A line is a turn of the chat. Ctrl-C ends an answer, Ctrl-D the chat. A space before / makes it text.
/system TEXT  set the system message; without TEXT remove it
/reset        forget all turns
/undo         forget the last turn
/retry        answer the last turn again
/save FILE    write the messages to a new file, as a line for generate --batch
/load FILE    go on from the messages of such a file
/quit, /exit  end the chat
/help         print this"""
ALONE = ("/retry", "/undo", "/reset", "/help")  # commands without a text
ENDS = ("/quit", "/exit", "exit")
LEAST_SLOTS = 1024  # of a chat's cache, which doubles where a window does not size it


def system_message(text: str | None) -> list[dict[str, str]]:
    return [{"role": "system", "content": text}] if text else []


def check_system(tokenizer: Any, text: str | None) -> None:
    """Raise ValueError where the template fails with the system message `text`, or with none."""
    render(tokenizer, [*system_message(text), {"role": "user", "content": "x"}])


class Chat:
    """Messages, and the cache and the tokens of what the model has read and written of them. limit: the most tokens, at
    which an answer ends."""

    def __init__(self, writer: Writer, system: str | None, limit: int) -> None:
        self.writer, self.limit = writer, limit
        self.messages = system_message(system)
        self.cache: KVCache | None = None
        self._turns: list[tuple[str, list[int]]] = []  # the text and the tokens up to the end of each answer
        self._reused = 0  # tokens of the last turn's text that were in the cache

    def turn(self, text: str, shown: str | None, again: bool = False) -> tuple[dict[str, Any], str]:
        """Answer a message, with `again` in place of the last turn -> as `Writer.print_text`. One that fails, or that
        Ctrl-C ends before a token, changes nothing."""
        kept, turns = (self.messages[:-2], self._turns[:-1]) if again else (self.messages, self._turns)
        messages, most = [*kept, {"role": "user", "content": text}], self.writer.limit
        prompt = render(self.writer.tokenizer, messages)
        ids = self._encode(prompt, turns)
        n = self.limit - len(ids) if most is None else min(most, self.limit - len(ids))
        if n < (1 if most is None else min(1, most)):
            got = f"this turn makes the chat {len(ids):,} tokens long, and fewer than {self.limit:,} are possible"
            raise ValueError(f"{got}: /reset begins a new one, /undo forgets the last turn")
        try:
            self._compile(ids)
            steps = self._steps(ids, n)
            written, line = self.writer.print_text(steps, len(ids), shown, [], lambda: self._reused, True)
        finally:
            try:
                if self.cache is not None:
                    self.cache.check_intact()
            except ValueError:  # a ring that a prompt was being written to when it ended
                self.cache.lengths.zero_()  # type: ignore[union-attr]
        if (tokens := written["tokens"]) or not n:
            self.messages = [*messages, {"role": "assistant", "content": written["text"]}]
            answer = tokens[:-1] if tokens and tokens[-1] in self.writer.eos else tokens
            whole = prompt + decode(self.writer.tokenizer, ids[-1:], answer, special=True)
            self._turns = [*turns, (whole, ids + answer)]
        written["left"] = left = self.limit - len(ids) - len(tokens)
        return written, f"{line}; {left:,} of {self.limit:,} tokens are left"

    def last_message(self) -> str:
        """Return the message of the last turn; ValueError where there is none."""
        if not self._turns:
            raise ValueError("there is no turn")
        return self.messages[-2]["content"]

    def undo(self) -> None:
        """Forget the last turn."""
        self.messages, self._turns = self.messages[:-2], self._turns[:-1]

    def reset(self) -> None:
        self.messages = [message for message in self.messages if message["role"] == "system"]
        self._turns = []

    def set_system(self, text: str) -> None:
        """Change the system message; ValueError where the template has none."""
        check_system(self.writer.tokenizer, text)
        self.messages = system_message(text) + [message for message in self.messages if message["role"] != "system"]

    def save(self, file: Path) -> None:
        """Write the messages to a new file; ValueError for one that exists."""
        if file.exists():
            raise ValueError(f"/save writes a new file, and {file} exists: needs another name")
        with file.open("x", encoding="utf-8") as opened:
            opened.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")

    def load(self, file: Path) -> None:
        """Go on from the messages that `save` wrote; ValueError for another file, FileNotFoundError for none."""
        if not file.exists():
            raise FileNotFoundError(f"/load reads a file that /save wrote, and {file} does not exist")
        try:
            messages = json.loads(read_text(file, f"/load {file}"))["messages"]
            roles = [message["role"] if is_message(message) else "" for message in messages]
        except (LookupError, TypeError, ValueError, RecursionError, OSError):
            messages, roles = [], [""]
        pairs = roles[1:] if roles[:1] == ["system"] else roles
        if pairs != ["user", "assistant"] * (len(pairs) // 2):
            raise ValueError(f"/load {file} needs a file that /save wrote: messages of a user and an assistant in turn")
        self.messages, self._turns = messages, [("", [])] * (len(pairs) // 2)

    def _encode(self, text: str, turns: list[tuple[str, list[int]]]) -> list[int]:
        """Return the tokens of the chat's text, which begins with these turns. Those of an answer stay as they were
        written, although a tokenizer may have others for its text, unless the template changes the text before its
        end."""
        before, ids = turns[-1] if turns else ("", [])
        if not text.startswith(before) or text == before:
            before, ids = "", []
        return ids + self.writer.encode(text[len(before) :], template=True)

    def _steps(self, ids: list[int], n: int) -> Iterator[Any]:
        """Yield `Writer.stream` of an answer of at most n tokens, for which the cache grows."""
        text, end = [*ids], len(ids) + n
        while len(text) < end:
            cache = self._reserve(len(text) + 1)
            steps = self.writer.stream([text], max(1, min(end, cache.max_len) - len(text)), cache)
            for step in steps:
                if len(text) == len(ids):
                    self._reused = cache.reused[0]
                text.append(step[0]["token"])
                yield step
            if text[-1] in self.writer.eos:
                return

    def _compile(self, ids: list[int]) -> None:
        """Compile ahead what the turn launches, in the first one over each size that the cache may grow to."""
        model, sizes = self.writer.model, [self._slots(len(ids) + 1)] if self.cache is None else []
        while sizes and sizes[-1] < self.limit and model.config.window is None:
            sizes.append(self._slots(sizes[-1] + 1))
        cache = self._reserve(len(ids) + 1)
        (held,) = Conversation.of(cache).begin(cache, model.identity(), [ids])
        self.writer.begin(1, len(ids), cache.max_len, held)
        for slots in sizes[1:]:
            self.writer.begin(1, len(ids), slots, len(ids) - 1)

    def _slots(self, length: int) -> int:
        """Return the slots of a cache for so many tokens: a power of 2, at most the limit."""
        slots = LEAST_SLOTS
        while slots < length:
            slots *= 2
        return min(slots, self.limit)

    def _reserve(self, length: int) -> KVCache:
        """Return the cache for at least `length` tokens. ValueError where no memory is left for one that large."""
        model, slots = self.writer.model, self._slots(length)
        cache, self.cache = self.cache, None  # one whose growth fails is lost
        try:
            if cache is None:
                cache = KVCache(model.config, 1, slots, model.device, self.writer.options.cache_dtype or model.dtype)
            elif length > cache.max_len:
                cache.grow(slots)
        except torch.OutOfMemoryError:
            got = f"no memory is left on {model.device} for a cache of {slots:,} tokens"
            raise ValueError(f"{got}: /reset begins a new chat, and --context N bounds one") from None
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


def run(args: argparse.Namespace, chat: Chat) -> int:
    """Answer lines of standard input until it ends. What is wrong with one is a line, and the chat goes on."""
    print_message("\n".join([*chat.writer.notes, HELP.partition("\n")[0]]))
    chat.writer.notes = []
    while True:
        try:
            text = read_line("" if args.json else "> ")
            if text.rstrip() in ENDS:
                return 0
            answer, line = _answer(args, chat, text)
            print(json.dumps(answer), flush=True) if args.json else print_message(line)
        except EOFError:
            return 0
        except KeyboardInterrupt:
            if sys.stdin is None or not sys.stdin.isatty():
                raise
            print_message("\n")
        except (ValueError, RuntimeError, MemoryError, OSError) as error:
            if isinstance(error, OSError) and error.errno and not error.filename:  # of standard output
                raise
            message = " ".join(str(error).split()) or type(error).__name__
            if args.json:
                print(json.dumps({"error": message}), flush=True)
            else:
                print_message(f"mixtral-triton chat: {message}")


def _answer(args: argparse.Namespace, chat: Chat, line: str) -> tuple[dict[str, Any], str]:
    """Answer a line, a turn or a command -> what `--json` prints, and what else is shown on stderr."""
    shown = None if args.json else ""
    name, _, text = line.partition(" ") if line.startswith("/") else ("", "", line)
    text = text if not name else text.strip()
    if not name and not text.strip():
        return {"message": ""}, ""
    if not name:
        return chat.turn(text, shown)
    if text and name in ALONE:
        raise ValueError(
            f"{name} is given {text!r:.40}, needs nothing behind it: a turn of its own is a line of its own"
        )
    if name == "/retry":
        answer, line = chat.turn(chat.last_message(), shown, again=True)
        greedy = chat.writer.options.temperature == 0.0
        return answer, f"{line}; the text is the same: --temperature is 0" if greedy else line
    message = _command(chat, name, text)
    return {"message": message}, message


def _command(chat: Chat, name: str, text: str) -> str:
    """Run a command that answers nothing -> what it did."""
    if name == "/system":
        chat.set_system(text)
        return "the system message is set" if text else "there is no system message"
    if name == "/reset":
        chat.reset()
        return "all turns are forgotten"
    if name == "/undo":
        message = chat.last_message()
        chat.undo()
        return f"forgotten: {message:.60}"
    if name in ("/save", "/load"):
        if not text:
            raise ValueError(f"{name} needs a file")
        file = Path(text).expanduser()
        (chat.save if name == "/save" else chat.load)(file)
        return f"{len(chat.messages)} messages {'written to' if name == '/save' else 'read from'} {file}"
    if name == "/help":
        return HELP
    raise ValueError(f"{name:.40} is no command: /help prints them, and a space before / makes it text")

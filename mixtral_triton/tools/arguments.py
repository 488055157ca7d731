"""How the command line reads its arguments: one line for what is wrong, and in the help a default for each."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn


class Help(argparse.HelpFormatter):
    """Help that tells every default. An option without a value for it says what none means: "none: the GPU"."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if "none: " in text:
            return text.replace("none: ", "default: ")
        if not action.option_strings or action.dest in ("help", "version"):
            return text
        return f"{text} (required)" if action.required else f"{text} (default: {_default(action.default)})"


def _default(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None or value == [] else str(value).replace("%", "%%")


class Parser(argparse.ArgumentParser):
    """An argparse parser that says one line of what is wrong."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": Help} | settings)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def weights(text: str) -> str | dict[str, str]:
    """What `--weights` says, as `Mixtral.from_pretrained` takes it: a format, or parts each with its own."""
    if "=" not in text:
        return text
    pairs = [part.partition("=") for part in text.split(",")]
    found = {name: format for name, _, format in pairs}
    if len(found) < len(pairs) or not all(format for _, _, format in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} needs a form like int4, or experts=int4,linear=int8")
    return found

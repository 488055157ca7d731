"""The command line: commands.py has the options, every other file a command or what commands share."""

from .commands import SMALL as SMALL
from .commands import main as main
from .commands import parser as parser

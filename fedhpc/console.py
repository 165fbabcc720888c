"""The command `fedhpc`: `fedhpc run ...` is `python -m fedhpc.main ...`, and so on.

It imports nothing heavy itself; each command is the module's own `python -m` form, run as the main program.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedhpc import __version__
from fedhpc.errors import UserError, nearest

DONE, REFUSED = 0, 2
UNREAD = 141  # 128 + SIGPIPE, what a shell says of any program that `head` has cut off


@dataclass(frozen=True)
class Command:
    """What a command does: the module behind it, one line of help and an example."""

    module: str
    help: str
    example: str


COMMANDS = {
    "run": Command("fedhpc.main", "start, resume or check a run", "fedhpc run mine.yaml client.lr=0.1 --ranks 3"),
    "report": Command("fedhpc.report", "tables and plots of one run, or a comparison", "fedhpc report runs/mine"),
    "watch": Command("fedhpc.watch", "follow runs from another terminal", "fedhpc watch runs/mine"),
    "evaluate": Command(
        "fedhpc.evaluate", "test a run or a base on any data, without training", "fedhpc evaluate runs/mine other.yaml"
    ),
    "export": Command(
        "fedhpc.export",
        "what a run trained as a model folder or an adapter, of a client or a round",
        "fedhpc export runs/mine --merge mine-model --dtype bfloat16",
    ),
    "sweep": Command("fedhpc.sweep", "run a grid of configurations and compare them", "fedhpc sweep grid.yaml --list"),
    "bench": Command("fedhpc.bench", "measure the speed on this machine", "fedhpc bench --quick"),
    "config": Command("fedhpc.config", "every key of the configuration, its default and meaning", "fedhpc config"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command in this process; the exit code where it gives one back."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return DONE if words else REFUSED
    if words[0] == "--version":
        print(__version__)
        return DONE
    try:
        command = _command(words[0])
    except UserError as error:
        print(f"fedhpc: error: {error}", file=sys.stderr)
        return REFUSED
    sys.argv = [f"fedhpc {words[0]}", *words[1:]]
    try:
        try:
            runpy.run_module(command.module, run_name="__main__", alter_sys=True)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # who reads has had enough, as with `fedhpc config | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python, which flushes once more
        return UNREAD
    return DONE


def usage() -> str:
    """The help: a line and an example for each command."""
    width = max(map(len, COMMANDS))
    lines = ["usage: fedhpc COMMAND [arguments]    (fedhpc COMMAND --help says more)", ""]
    for name, command in COMMANDS.items():
        lines += [f"  {name:<{width}}  {command.help}", f"  {'':<{width}}    {command.example}"]
    return "\n".join(lines)


def _command(word: str) -> Command:
    """The command called `word`; UserError with the nearest one where there is none."""
    if word in COMMANDS:
        return COMMANDS[word]
    if Path(word).is_file() or "=" in word:
        raise UserError(f"command line: '{word}' is no command; a run is started by: fedhpc run {word}")
    raise UserError(f"command line: unknown command '{word}'; {nearest(word, list(COMMANDS))}")


if __name__ == "__main__":
    sys.exit(main())

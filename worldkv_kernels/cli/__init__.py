"""The worldkv command. Each subcommand is a module with add_arguments(parser) and run(args) -> exit status."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import NoReturn

from .. import __version__

COMMANDS = {
    "world": "a trained world model that turns away and comes back: what it remembers with each kind of memory",
    "recall": "a photograph seen by a panning camera, remembered and recalled through the real ops",
    "rollout": "a model over a camera trajectory or a player's actions: speed, bytes, tokens, what was retrieved",
    "bench": "each op beside its rivals, against this machine's own ceilings; or two result files side by side",
    "plan": "what a model and its memory take of a GPU, and how much of a world fits, before anything is allocated",
    "tune": "which backend of segment_attention is the fastest on this machine's GPU, for auto to take",
    "doctor": "what this machine has, and which backend each op would use, and why",
}


_LONGEST_LINE = 600  # characters of an error


class _Parser(argparse.ArgumentParser):
    """Says what was wrong in one line, without the usage of every argument before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {brief(message)}\n")


def brief(error: object) -> str:
    """An error's first line, without the middle of one too long to be read."""
    lines = str(error).splitlines()
    line = lines[0] if lines else type(error).__name__
    half = _LONGEST_LINE // 2
    return line if len(line) <= _LONGEST_LINE else f"{line[:half]} ... {line[-half:]}"


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand. Only that one is imported, and with it torch: --help and --version answer at once.

    Bad input is one line on stderr and exit status 2; Ctrl-C, from the first moment on, is one line and 130. Where
    nobody reads stdout any more, it ends with 141 and no line, as a program does that the system's signal ends.
    """
    parser = _Parser(prog="worldkv", description="World memory for video world models.")
    parser.add_argument("--version", action="version", version=f"worldkv_kernels {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    argv = sys.argv[1:] if argv is None else argv
    said = "worldkv"  # at the start of a line on stderr
    try:
        for name, summary in COMMANDS.items():
            subparser = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
            if name in argv:
                command = importlib.import_module(f".{name}", __package__)
                command.add_arguments(subparser)
                subparser.set_defaults(run=command.run)
        args = parser.parse_args(argv)
        said = f"worldkv {args.command}"
        from ..ops.backends import forced
        from . import report

        forced()  # a backend that there is not is no fault of any argument
        report.begin(quiet=getattr(args, "quiet", False))
        report.writable("--json", args.json)  # of every command, so that none works for nothing
        status = args.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        started = "\n" if sys.stderr.isatty() else ""  # of a line of progress
        print(f"{started}{said}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes it once more
        return 141
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error).__name__ != "OutOfMemoryError":  # torch's
            raise
        print(f"{said}: {brief(error)}", file=sys.stderr)
        return 2

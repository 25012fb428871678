"""The worldkv command. Each subcommand is a module with add_arguments(parser) and run(args) -> exit status."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import NoReturn

import torch

from .. import __version__
from . import report

COMMANDS = {
    "recall": "a photograph seen by a panning camera, remembered and recalled through the real ops",
    "rollout": "a model over a camera trajectory or a player's actions: speed, bytes, tokens, what was retrieved",
    "bench": "each op beside its rivals, against this machine's own ceilings; or two result files side by side",
    "doctor": "what this machine has, and which backend each op would use, and why",
}


class _Parser(argparse.ArgumentParser):
    """Says what was wrong in one line, without the usage of every argument before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {report.brief(message)}\n")


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand.

    Bad input is one line on stderr and exit status 2; Ctrl-C is one line and 130. Where nobody reads stdout any more,
    it ends with 141 and no line, as a program does that the system's signal ends.
    """
    parser = _Parser(prog="worldkv", description="World memory for video world models.")
    parser.add_argument("--version", action="version", version=f"worldkv_kernels {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    argv = sys.argv[1:] if argv is None else argv
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name in argv:  # the others stay unimported, so that --help answers at once
            command = importlib.import_module(f".{name}", __package__)
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)
    args = parser.parse_args(argv)
    report.begin(quiet=getattr(args, "quiet", False))
    try:
        report.writable("--json", args.json)  # of every command, so that none works for nothing
        status = args.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        started = "\n" if sys.stderr.isatty() else ""  # of a line of progress
        print(f"{started}worldkv {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes it once more
        return 141
    except (ValueError, TypeError, OSError, ImportError, torch.OutOfMemoryError) as error:
        print(f"worldkv {args.command}: {report.brief(error)}", file=sys.stderr)
        return 2

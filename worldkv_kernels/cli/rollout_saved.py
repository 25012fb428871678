"""worldkv rollout --save and --resume: a rollout of one mode, put by and gone on with."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ..memory.config import MemoryConfig
from ..memory.room import has_places
from ..memory.saving import WHERE_ROWS_LIE, differences
from ..models.rollout import Rollout, WorldModel, resume
from . import report
from .rollout_models import Motion


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--save", metavar="FILE", help="put the rollout by when it ends or is interrupted, to be resumed")
    add("--resume", metavar="FILE",
        help="go on with what --save has put by, along the same trajectory or a longer one; its arguments for the "
             "memory and the seed are needed again")  # fmt: skip


def check(args: argparse.Namespace, modes: Sequence[str]) -> None:
    """Raises ValueError naming an argument that does not go with --save or --resume."""
    for name in ("save", "resume"):
        if getattr(args, name) is not None and len(modes) != 1:
            raise ValueError(f"--{name} must go with one of --modes, got {', '.join(modes)}")
    if args.resume is not None:
        for name, has_it in (("picture", "shows a rollout from its start"), ("conditions", "are in its FILE")):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name} must be left out with --resume, since they {has_it}, got "
                                 f"{getattr(args, name)!r}")  # fmt: skip
    report.writable("--save", args.save)
    report.different_files(save=args.save, picture=args.picture, json=args.json, save_latents=args.save_latents)


def resumed(
    args: argparse.Namespace, model: WorldModel, asked: MemoryConfig, along: Motion, *, derived: Sequence[str]
) -> Rollout:
    """What --resume names, along a motion of which it has made the beginning, with a bank as `asked`, or where that has
    no room and no number was asked for, as it was.

    Raises ValueError where the arguments ask for another memory, but for the fields that are `derived` of others, for
    another seed or another trajectory.
    """
    options: dict[str, Any] = dict(actions=along.actions, backend=args.backend, graph=args.graph)
    if asked.has_bank:
        options["bank"] = asked.bank
    enough = {"bank_chunks": asked.bank_chunks} if has_places(asked) else {}

    def opened(**places: Any) -> Rollout:
        return resume(args.resume, model, *along.controls, **options, **places)

    with report.naming("--resume", "Rollout.load", "resume"), report.waiting(f"reading {args.resume}"):
        try:
            rolling = opened(**enough)
        except ValueError:
            if args.bank_chunks or not asked.has_bank:
                raise
            rolling = opened()  # which says what else is wrong
    if rolling.seed != args.seed:
        raise ValueError(f"--seed must be {rolling.seed}, as in {args.resume}, got {args.seed}")
    for name, kept, wanted in differences(rolling.memory.configured, asked, but=(*WHERE_ROWS_LIE, *derived)):
        option = "modes" if name == "mode" else name.replace("_", "-")
        raise ValueError(f"--{option} must be {kept}, as in {args.resume}, got {wanted}")
    return rolling

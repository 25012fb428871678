"""The models that worldkv rollout can run: their sizes, their weights, and what steers them."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..actions import SCALES, ActionIntegrator, Actions, ActionScales, parse_actions
from ..memory.pool import free_bytes
from ..models.checkpoint import read_config, read_layout, read_tensors
from ..models.lingbot_camera import longest_step
from ..models.lingbot_config import LingBotConfig
from ..models.lingbot_world_fast import LingBotConditions, LingBotWorldFast
from ..models.matrix_game_2 import MatrixGame2, MatrixGameConditions
from ..models.matrix_game_config import MatrixGameConfig
from ..models.rollout import WorldModel
from ..models.small_world import WEIGHTS, SmallWorld, SmallWorldConfig
from ..poses import convention_hint
from ..trajectory import DEFAULT_INTRINSICS, latent_poses, load
from . import report

Config = SmallWorldConfig | LingBotConfig | MatrixGameConfig

# Of each model, the variants and their sizes; the first is the default.
MODELS = {
    "small_world": {"small_world": SmallWorldConfig},
    "lingbot_world_fast": {
        "fast": LingBotConfig.fast, "v2-14b": LingBotConfig.v2_14b, "v2-1.3b": LingBotConfig.v2_1_3b,
    },
    "matrix_game_2": {
        "universal": MatrixGameConfig.universal, "gta_drive": MatrixGameConfig.gta_drive,
        "templerun": MatrixGameConfig.templerun,
    },
}  # fmt: skip

# Away and back again, far longer than the window, so that there is something to choose.
DEFAULT_TRAJECTORY = "right*60,left*60,forward*36,right*60,forward*36,back*36,left*60,back*36,right*56"
DEFAULT_ACTIONS = {
    "universal": "W*24,L*60,Q*8,J*60,S*24",
    "gta_drive": "W*24,W+D*60,Q*8,S+A*60,S*24",
    "templerun": "Q*24,Z*24,W*12,D*12,S*12,C*24,Q*24",
}
_CLASSES = {"small_world": SmallWorld, "lingbot_world_fast": LingBotWorldFast, "matrix_game_2": MatrixGame2}
_MOST_ROWS = 1024  # of tokens, or columns: 16,384 pixels
_COUNTED_LAYERS = 48  # of which weights are counted one by one; any past that are like the last
STRIDE = 4  # video frames to a latent frame, of all these models' autoencoders


class Motion(NamedTuple):
    """What steers a rollout."""

    kind: str  # "trajectory" or "actions"
    name: str
    video_frames: int
    poses: np.ndarray  # camera-to-world of the latent frames [n, 4, 4]
    intrinsics: np.ndarray  # fx, fy, cx, cy in pixels, [n, 4]
    actions: Actions | None
    integrator: ActionIntegrator | None  # that made the poses of the actions

    @property
    def latent_frames(self) -> int:
        return len(self.poses)

    @property
    def controls(self) -> tuple[np.ndarray, np.ndarray]:
        """Poses and intrinsics."""
        return self.poses, self.intrinsics

    def until(self, latent_frames: int) -> Motion:
        """The first so many latent frames."""
        return self._replace(poses=self.poses[:latent_frames], intrinsics=self.intrinsics[:latent_frames])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that choose a model and its motion."""
    add = parser.add_argument
    add("--model", default="small_world", help=f"{', '.join(MODELS)} (default: %(default)s)")
    of_real = [f"{name}: {', '.join(variants)}" for name, variants in MODELS.items() if len(variants) > 1]
    add("--variant", help=f"of the model; {'; '.join(of_real)} (default: the first)")
    add("--random", action="store_true", help="random weights, drawn on the device")
    add("--weights", metavar="FOLDER",
        help="a folder with .safetensors files, of the other models the published checkpoint (default: the trained "
             "weights of small_world that come with the package)")  # fmt: skip
    add("--conditions", metavar="FILE",
        help="a .safetensors file of the encoded prompt and image: text and image of lingbot_world_fast, image_tokens "
             "and image_latents of matrix_game_2, in the shapes of their conditions (default: stand-ins)")  # fmt: skip
    add("--compile", action="store_true", help="a block's norms, gates and residuals by torch.compile, one kernel each")
    add("--fp8", action="store_true", help="linear layers in FP8, for bfloat16 on Hopper and newer GPUs")
    add("--layers", type=report.integer(1), help="so many instead of all; with --random alone")
    add("--grid", type=grid, metavar="H,W", help="tokens of a latent frame instead of the model's own")
    add("--trajectory", metavar="FOLDER|MOVES",
        help="for small_world and lingbot_world_fast: a folder with poses.npy and intrinsics.npy, or moves such as "
             "right*90,left*90,forward*10 (default: moves that look away, wander and come back)")  # fmt: skip
    add("--actions", metavar="KEYS",
        help="for matrix_game_2: keys held for video frames, such as W*24,L*12,W+J*8; W S A D walk, I K J L look, Q "
             "nothing (gta_drive: A D steer; templerun: W S Z C A D) "
             f"(default: {DEFAULT_ACTIONS['universal']})")  # fmt: skip
    add("--scales", metavar="NAME=NUMBER,...",
        help="how far actions go, such as yaw=10,walk=5: yaw, pitch in degrees a unit of mouse, walk, run in units a "
             "frame, turn in degrees a frame (default: guesses; yaw=15,pitch=15,walk=12.35)")  # fmt: skip
    add("--stride", type=report.integer(1), help=f"video frames of a trajectory to a latent frame (default: {STRIDE})")


def model_config(args: argparse.Namespace) -> Config:
    """The sizes asked for. Raises ValueError when arguments are unknown or do not go together."""
    if args.model not in MODELS:
        raise ValueError(f"--model must be one of {', '.join(MODELS)}, got {args.model!r}")
    variants = MODELS[args.model]
    if args.variant is None:
        args.variant = next(iter(variants))
    if args.variant not in variants:
        raise ValueError(f"--variant must be one of {', '.join(variants)} for {args.model}, got {args.variant!r}")
    if args.weights is not None and args.random:
        raise ValueError(f"--weights must be left out with --random, got {args.weights!r}")
    if args.weights is None and not args.random and args.model != "small_world":
        raise ValueError(f"--model {args.model} must have --weights FOLDER or --random, got neither")
    if args.layers and not args.random:
        raise ValueError(f"--layers must go with --random, since all other weights have their own, got {args.layers}")
    changes: dict[str, Any] = {}
    if args.grid:
        changes["grid"] = args.grid
    if args.layers:
        changes["num_layers"] = args.layers
        if args.model == "matrix_game_2":
            changes["action_layers"] = tuple(range(min(args.layers, len(MatrixGameConfig.action_layers))))
    if args.model == "small_world" and not args.random:  # its folders say all of it
        with report.naming("--weights", "checkpoint"):
            return SmallWorldConfig.from_published(read_config(_folder(args)), **changes)
    return replace(variants[args.variant](), **changes)


def weights_name(args: argparse.Namespace) -> str:
    """What is said of the weights."""
    return "random" if args.random else args.weights or "the package's"


def motion(args: argparse.Namespace) -> Motion:
    """What the model is steered by. Raises ValueError on an argument of another model, or one that is misspelled."""
    if args.model != "matrix_game_2":
        for name in ("actions", "scales"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name} must go with --model matrix_game_2, got --model {args.model}")
        with report.naming("--trajectory", "trajectory"):
            trajectory = load(DEFAULT_TRAJECTORY if args.trajectory is None else args.trajectory)
        of_folder = args.trajectory is not None and os.path.isdir(args.trajectory)
        hint = convention_hint(trajectory.poses) if of_folder else None
        if hint is not None:
            print(f"hint: --trajectory: {hint}", file=sys.stderr)
        # LingBot-World's pipelines spread the latent frames of whole chunks over the clip.
        chunk_frames = LingBotConfig.chunk_frames if _CLASSES[args.model] is LingBotWorldFast else 1
        poses, intrinsics = latent_poses(trajectory, args.stride or STRIDE, chunk_frames=chunk_frames)
        return Motion("trajectory", trajectory.name, len(trajectory.poses), poses, intrinsics, None, None)
    for name in ("trajectory", "stride"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} must be left out with --model matrix_game_2, which goes by --actions, "
                             f"got {getattr(args, name)!r}")  # fmt: skip
    text = DEFAULT_ACTIONS[args.variant] if args.actions is None else args.actions
    with report.naming("--actions", "parse_actions"):
        actions = parse_actions(text, args.variant)
    rows = len(actions.keyboard)
    whole = actions.until(1 + (rows - 1) // STRIDE * STRIDE)  # rows that end a latent frame
    integrator = ActionIntegrator(_scales(args), args.variant)
    poses = integrator.poses(whole)
    return Motion("actions", text, rows, poses, np.tile(DEFAULT_INTRINSICS, (len(poses), 1)), actions, integrator)


def check_weights(args: argparse.Namespace, config: Config, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ValueError when the checkpoint cannot be read, or the weights do not fit the device's free memory."""
    if not args.random:
        with report.naming("--weights", "checkpoint"):
            read_layout(_folder(args))
    _, needed = count_weights(args.model, config, dtype)
    free = free_bytes(device)
    if needed > free:
        changes = ["--layers", "--device"] if args.random else ["--device"]
        changes += ["--dtype"] if dtype.itemsize > 2 else []
        raise ValueError(
            f"--model {args.model} must fit the {report.size(free)} that are free on {device}, got "
            f"{report.size(needed)} of weights; change {' or '.join(changes)}"
        )


def check_fp8(fp8: bool, dtype: torch.dtype) -> None:
    """Raise ValueError where linear layers cannot be made FP8."""
    if fp8 and dtype != torch.bfloat16:
        raise ValueError(f"--fp8 must go with --dtype bfloat16, got {str(dtype).removeprefix('torch.')}")


def make_model(
    args: argparse.Namespace, config: Config, device: torch.device, dtype: torch.dtype
) -> tuple[WorldModel, dict[str, Any]]:
    """The model, and what its weights are, ready for JSON. Raises as from_pretrained does, and ValueError for FP8 in
    another dtype than bfloat16."""
    check_fp8(args.fp8, dtype)
    options = dict(device=device, dtype=dtype)
    made_of = _CLASSES[args.model]
    count, _ = count_weights(args.model, config, dtype)
    started = time.perf_counter()
    with report.waiting(f"{'drawing' if args.random else 'loading'} {count / 1e6:,.1f} million parameters"):
        if args.random:
            model = made_of.random(config, args.seed, **options)
        else:
            model = made_of.from_pretrained(_folder(args), config=config, **options)
        if args.compile:
            model.compile_elementwise()
        if args.fp8:
            model.to_fp8()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    stored = list(model.state_dict().values())
    return model, {
        "weights": weights_name(args),
        "parameters": count,
        "weight_bytes": sum(tensor.nbytes for tensor in stored),
        "compiled": args.compile,
        "fp8": args.fp8,
        "seconds_to_load": time.perf_counter() - started,
    }


def conditions(args: argparse.Namespace, poses: np.ndarray) -> Any:
    """Of the rollout: what the file of --conditions holds, else stand-ins for prompt and image; and the scale that
    LingBot-World takes a clip's steps in."""
    given = dict(args.given)
    if args.model == "lingbot_world_fast":
        return LingBotConditions(**given, translation_scale=longest_step(poses))
    return MatrixGameConditions(**given) if given else None


def read_conditions(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """The tensors of --conditions. Raises ValueError where there are others than the model's conditions, or none."""
    if args.conditions is None:
        return {}
    wanted = {
        "lingbot_world_fast": ("text", "image"), "matrix_game_2": ("image_tokens", "image_latents")
    }.get(args.model)  # fmt: skip
    if wanted is None:
        raise ValueError(f"--conditions must go with --model lingbot_world_fast or matrix_game_2, got {args.model}")
    try:
        given = read_tensors(args.conditions)
    except (OSError, ValueError) as error:
        raise ValueError(f"--conditions must be a .safetensors file: {error}") from error
    if not given or not set(given) <= set(wanted):
        raise ValueError(f"--conditions must hold {' or '.join(wanted)} or both, got {', '.join(given) or 'nothing'}")
    return given


def on_meta(name: str, config: Config, dtype: torch.dtype) -> WorldModel:
    """A model that has sizes and no storage."""
    return _CLASSES[name](config, device="meta", dtype=dtype)


@cache
def count_weights(name: str, config: Config, dtype: torch.dtype, fp8: bool = False) -> tuple[int, int]:
    """How many parameters a model has, and their bytes, in FP8 where it is made so, from its sizes alone."""
    counted = replace(config, num_layers=min(config.num_layers, _COUNTED_LAYERS))
    model = on_meta(name, counted, dtype)
    more = config.num_layers - counted.num_layers
    count = sum(of.numel() for of in model.parameters()) + more * sum(
        of.numel() for of in model.blocks[-1].parameters()
    )
    if fp8:
        model.to_fp8()
    whole, last = (module.state_dict().values() for module in (model, model.blocks[-1]))
    return count, sum(of.nbytes for of in whole) + more * sum(of.nbytes for of in last)


def _folder(args: argparse.Namespace) -> str | Path:
    """Of the weights, where they are not random."""
    return WEIGHTS if args.weights is None else args.weights


def _scales(args: argparse.Namespace) -> ActionScales:
    names = [field.name for field in fields(ActionScales) if field.name != "pitch_limits"]
    given = {}
    for part in [] if args.scales is None else args.scales.split(","):
        name, _, number = (piece.strip() for piece in part.partition("="))
        try:
            given[name] = float(number)
        except ValueError:
            name = None
        if name not in names:
            raise ValueError(f"--scales must be numbers of {', '.join(names)}, such as yaw=10,walk=5, got {part!r}")
    with report.naming("--scales", "ActionScales"):
        return replace(SCALES[args.variant], **given)


def grid(text: str) -> tuple[int, int]:
    sizes = [part.strip() for part in text.split(",")]
    if len(sizes) != 2 or not all(re.fullmatch("[0-9]{1,9}", size) and 0 < int(size) <= _MOST_ROWS for size in sizes):
        raise argparse.ArgumentTypeError(f"must be height,width of 1 to {_MOST_ROWS} tokens each, got {text!r:.60}")
    return int(sizes[0]), int(sizes[1])

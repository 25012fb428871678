"""What a player does, mouse and keys a video frame, and the camera poses that come of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from .checks import as_number, bad_type, bad_value, is_number
from .poses import as_float64, look_rotation

MOUSE_STEP = 0.1  # of one look key, as in the published examples of Matrix-Game-2

# Poses are counted in integers, so that opposite actions cancel to the last bit, and a turn wraps without rounding.
_TURN = 1 << 48  # 360 degrees
_UNIT = 1 << 40  # of length

# Of each scale: far more than any game's, and far less than what the integers' conversion from floats can take.
LARGEST_SCALE = 1e6
MOST_ROWS = 100_000  # of spelled actions

_EXAMPLE = "actions such as W*24,L*12,W+J*8"


class Actions(NamedTuple):
    """What a player did, a row a video frame: latent frame f is steered by rows 4f - 3 .. 4f, frame 0 by row 0."""

    mouse: np.ndarray | None  # [video frames, 2]
    keyboard: np.ndarray | None  # [video frames, keys]

    def until(self, video_frames: int) -> Actions:
        """The first `video_frames` rows."""
        return self.rows(slice(video_frames))

    def of_frames(self, start_frame: int, latent_frames: int) -> Actions:
        """The rows of `latent_frames` latent frames from `start_frame` on: four a frame, but one for frame 0."""
        first = video_frames(start_frame) if start_frame else 0
        return self.rows(slice(first, video_frames(start_frame + latent_frames)))

    def rows(self, rows: slice) -> Actions:
        """Those rows of both."""
        return Actions(*(array if array is None else array[rows] for array in self))


def video_frames(latent_frames: int) -> int:
    """How many video frames so many latent frames from the start stand for: one, then four each."""
    return 4 * latent_frames - 3


class Layout(NamedTuple):
    """How a game's actions are laid out, and the letters that spell them.

    The letters are those of Matrix-Game-2's published interface. At most one letter of each group is held at a time; Q,
    in every game, is no action.
    """

    mouse: bool  # [vertical, horizontal], up and right positive; without it Actions.mouse is None
    keyboard: tuple[str, ...]  # what each column means
    idle: int | None  # the column that is 1 while nothing is held
    groups: tuple[dict[str, tuple[str, float]], ...]  # letter: the column's meaning, "pitch" or "yaw", and the value


LAYOUTS = {
    # W S A D walk; I K J L look up, down, left, right.
    "universal": Layout(True, ("forward", "back", "left", "right"), None, (
        {"W": ("forward", 1), "S": ("back", 1)}, {"A": ("left", 1), "D": ("right", 1)},
        {"I": ("pitch", MOUSE_STEP), "K": ("pitch", -MOUSE_STEP)},
        {"J": ("yaw", -MOUSE_STEP), "L": ("yaw", MOUSE_STEP)},
    )),
    # W S drive; A D steer, by the mouse.
    "gta_drive": Layout(True, ("forward", "back"), None, (
        {"W": ("forward", 1), "S": ("back", 1)}, {"A": ("yaw", -MOUSE_STEP), "D": ("yaw", MOUSE_STEP)},
    )),
    # W jump, S slide, Z C turn left and right, A D step to the left and right; one at a time.
    "templerun": Layout(False, ("none", "jump", "slide", "turn_left", "turn_right", "left", "right"), 0, (
        {"W": ("jump", 1), "S": ("slide", 1), "Z": ("turn_left", 1), "C": ("turn_right", 1),
         "A": ("left", 1), "D": ("right", 1)},
    )),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ActionScales:
    """How far each action goes. No model publishes its own: measure them where the ratio of turns to steps matters.

    `yaw`, `pitch`: degrees a unit of mouse. `walk`: units of length a row of a held key; `run`: units forward
    on every row, held keys or not. `turn`: degrees a row of a turn key. `pitch_limits`: the lowest and highest look, in
    degrees, with 0 between them.

    The defaults are what Matrix-Game 3.0's code integrates its actions by, which have the same form: 1.5 degrees
    a frame at a mouse step of 0.1, 12.35 units a frame; the pitch limits, which it has not, are guessed.
    Retrieval by pose divides by the farthest candidate, so the unit of length is free.

    Raises TypeError on what is no number, or no pair of them; ValueError on a number that is not finite or beyond
    -1,000,000 .. 1,000,000, or limits outside -90 .. 90 or without 0.
    """

    yaw: float = 15.0
    pitch: float = 15.0
    walk: float = 12.35
    run: float = 0.0
    turn: float = 0.0
    pitch_limits: tuple[float, float] = (-85.0, 85.0)

    def __post_init__(self) -> None:
        for field in fields(self):
            got = getattr(self, field.name)
            is_pair = field.name == "pitch_limits"
            given = got if is_pair else (got,)
            if not (isinstance(given, (tuple, list)) and len(given) == 1 + is_pair and all(map(is_number, given))):
                wanted = "a pair of numbers, the lowest and the highest look" if is_pair else "a number"
                raise bad_type("ActionScales", field.name, wanted, got)
            numbers = tuple(as_number("ActionScales", field.name, number) for number in given)
            if not all(map(math.isfinite, numbers)):
                raise bad_value("ActionScales", field.name, "finite", got)
            if not is_pair and abs(numbers[0]) > LARGEST_SCALE:
                bounds = f"from {-LARGEST_SCALE:.0f} to {LARGEST_SCALE:.0f}"
                raise bad_value("ActionScales", field.name, bounds, got)
            object.__setattr__(self, field.name, numbers if is_pair else numbers[0])
        low, high = self.pitch_limits
        if not -90 <= low <= 0 <= high <= 90:
            raise ValueError(f"ActionScales: pitch_limits must be -90 <= low <= 0 <= high <= 90, got {low:g}, {high:g}")


# Guesses all: of universal see ActionScales; gta_drive as if a car steered like a walker looks; templerun as if a turn
# key held for a block of 12 rows, as the published examples hold it, took a corner of 90 degrees.
SCALES = {
    "universal": ActionScales(),
    "gta_drive": ActionScales(),
    "templerun": ActionScales(run=12.35, turn=7.5),
}


class IntegratorState(NamedTuple):
    """Where an ActionIntegrator is: the rows taken, angles in 2**-48 turns, positions in 2**-40 units."""

    rows: int = 0
    yaw: int = 0  # -2**47 .. 2**47 - 1, to the right
    pitch: int = 0  # up
    x: int = 0
    z: int = 0


class ActionIntegrator:
    """Turns mouse and keyboard actions into camera poses, all at once or as they come.

    A row turns the camera by its mouse, then walks by its keys on the level, whatever the pitch, along the yaw halfway
    through the turn; two directions at once go no farther than one. Opposite keys cancel. The world starts at
    the identity, in OpenCV coordinates (x right, y down, z forward). Every row counts, row 0 of frame 0 too;
    latent frame f is where row 4f ends.

    Angles and positions are counted in integers: actions undone in reverse order (each by its opposite) end bit for
    bit where they began, after any number of frames and turns. The pitch stops at its limits, as it does in games: a
    look that ran into a limit and is undone ends elsewhere, short of its start by what the limit took.

    Args:
        scales: how far each action goes; None for the layout's in SCALES, which are guesses.
        layout: one of LAYOUTS, "universal", "gta_drive" or "templerun".

    Raises ValueError on another layout, TypeError on scales that are no ActionScales.
    """

    def __init__(self, scales: ActionScales | None = None, layout: str = "universal") -> None:
        self.layout = _layout("ActionIntegrator", layout)
        self.layout_name = layout
        if not (scales is None or isinstance(scales, ActionScales)):
            raise TypeError(f"ActionIntegrator: scales must be ActionScales or None, got {scales!r:.60}")
        self.scales = SCALES[layout] if scales is None else scales
        self.reset()

    @property
    def state(self) -> IntegratorState:
        """Where it is, for `restore`."""
        return self._state

    def restore(self, state: IntegratorState) -> None:
        """Go back to what `state` was."""
        self._state = state

    def reset(self) -> None:
        """Start again, before frame 0 at the identity."""
        self._state = IntegratorState()

    def fresh(self) -> ActionIntegrator:
        """Another of the same scales and layout, at the start."""
        return ActionIntegrator(self.scales, self.layout_name)

    @property
    def pose(self) -> np.ndarray:
        """Camera-to-world after the rows taken so far, float64 [4, 4]."""
        state = self._state
        pose = np.eye(4)
        pose[:3, :3] = look_rotation(state.yaw * (2 * math.pi / _TURN), state.pitch * (2 * math.pi / _TURN))
        pose[0, 3], pose[2, 3] = state.x / _UNIT, state.z / _UNIT
        return pose

    def poses(self, actions: Actions) -> np.ndarray:
        """Camera-to-world of a whole video's latent frames, float64 [latent frames, 4, 4]; changes no state.

        Takes 4 n - 3 rows for n frames. Raises what `advance` does.
        """
        return self.fresh().advance(*actions)

    def advance(self, mouse: object, keyboard: object) -> np.ndarray:
        """Take the next rows, and return the poses of the latent frames that they end, float64 [frames, 4, 4].

        Args: mouse [rows, 2] and keyboard [rows, keys], arrays or tensors (of a GPU: copied, which synchronises); mouse
        None where the layout has none. From the start 4 n - 3 rows for n frames, later 4 n.

        Raises ValueError when a shape or the number of rows is another or a number is not finite, TypeError on
        what is no array; the state is then as before.
        """
        mouse, keyboard = as_actions("ActionIntegrator", (mouse, keyboard), self.layout_name)
        rows = len(keyboard)
        of_first = 0 if self._state.rows else 1
        if not rows or (rows - of_first) % 4:
            wanted = "4 n - 3 from the start" if of_first else "4 n after the start"
            raise ValueError(f"ActionIntegrator: actions must be {wanted} rows for n latent frames, got {rows}")
        poses = []
        for step in self._steps(mouse, keyboard):
            self._state = self._after(*step)
            if self._state.rows % 4 == 1:
                poses.append(self.pose)
        return np.stack(poses)

    def _steps(self, mouse: np.ndarray | None, keyboard: np.ndarray) -> list[list[float]]:
        """Of each row: yaw and pitch in degrees, and the way to the right and forward in units."""
        scales, names = self.scales, self.layout.keyboard

        def held(positive: str, negative: str) -> np.ndarray:
            of_both = [keyboard[:, names.index(key)] if key in names else 0.0 for key in (positive, negative)]
            return np.broadcast_to(of_both[0] - of_both[1], len(keyboard))

        yaw, pitch = scales.turn * held("turn_right", "turn_left"), np.zeros(len(keyboard))
        if mouse is not None:
            yaw, pitch = yaw + scales.yaw * mouse[:, 1], scales.pitch * mouse[:, 0]
        right, forward = held("right", "left"), held("forward", "back")
        pace = scales.walk / np.maximum(np.hypot(right, forward), 1.0)
        return np.stack([yaw, pitch, pace * right, pace * forward + scales.run], axis=1).tolist()

    def _after(self, yaw: float, pitch: float, right: float, forward: float) -> IntegratorState:
        """The state one row on."""
        state, low_high = self._state, self.scales.pitch_limits
        yaw_step, pitch_step, low, high = (round(angle / 360 * _TURN) for angle in (yaw, pitch, *low_high))
        # Twice the yaw halfway, brought into one range: the way back meets the same number, and so the same sine.
        halfway = (2 * state.yaw + yaw_step) % (2 * _TURN) * (math.pi / _TURN)
        sin, cos = math.sin(halfway), math.cos(halfway)
        return IntegratorState(
            rows=state.rows + 1,
            yaw=(state.yaw + yaw_step + _TURN // 2) % _TURN - _TURN // 2,
            pitch=min(max(state.pitch + pitch_step, low), high),
            x=state.x + round((right * cos + forward * sin) * _UNIT),
            z=state.z + round((forward * cos - right * sin) * _UNIT),
        )


def as_state(op: str, numbers: object, rows: int) -> IntegratorState:
    """Check where an integrator stood after so many rows, of any scales and layout, and return it.

    Raises ValueError naming `op` where no integrator can have stood there, TypeError on what is not five integers.
    """
    if not (isinstance(numbers, tuple) and len(numbers) == 5 and all(type(number) is int for number in numbers)):
        raise bad_type(op, "integrator", "the five integers of an IntegratorState", numbers)
    state = IntegratorState(*numbers)
    farthest = 2 * LARGEST_SCALE * _UNIT * rows  # walking and running
    turned = -_TURN // 2 <= state.yaw < _TURN // 2 and abs(state.pitch) <= _TURN // 4
    if state.rows != rows or not turned or max(abs(state.x), abs(state.z)) > farthest:
        raise bad_value(op, "integrator", f"a state after {rows} rows", state)
    return state


def as_actions(op: str, actions: object, layout: str, rows: int | None = None) -> Actions:
    """Check a pair of mouse and keyboard rows in a layout, and return them as float64.

    Raises ValueError naming `op` when a shape is wrong or a number is not finite, TypeError on what is no such pair.
    """
    wanted = _layout(op, layout)
    if not (isinstance(actions, (tuple, list)) and len(actions) == 2):
        raise TypeError(f"{op}: actions must be an Actions of mouse and keyboard, got {type(actions).__name__}")
    mouse, keyboard = actions
    if not wanted.mouse and mouse is not None:
        raise ValueError(f"{op}: actions of layout {layout!r} must have mouse None, got {type(mouse).__name__}")
    keyboard = _as_rows(op, "keyboard", keyboard, rows, len(wanted.keyboard), layout)
    return Actions(_as_rows(op, "mouse", mouse, len(keyboard), 2, layout) if wanted.mouse else None, keyboard)


def parse_actions(text: str, layout: str = "universal") -> Actions:
    """Spell actions: `W*24,L*12,W+J*8` holds W for 24 video frames, then looks right for 12, then does both for 8.

    The letters are those of the layout, in either case, joined by + where they are held together, at most one of each
    group. In "universal": W S (forward, back), A D (left, right), I K (look up, down), J L (look left, right). In
    "gta_drive": W S, A D (steer left, right). In "templerun" one at a time: W S (jump, slide), Z C (turn left, right),
    A D (step to the left, right). Q is no action. A look is MOUSE_STEP of the mouse.

    The first row stands twice, as the published examples have it: for frame 0, then for the frames counted; so
    the counts' sum plus one is the number of rows. Mouse and keyboard are float32, as the models take them.

    Raises ValueError on another layout, an unknown letter, two of a group, a count that is not a positive integer, or
    counts of more than 100,000 together; TypeError on what is no string.
    """
    wanted = _layout("parse_actions", layout)
    if not isinstance(text, str):
        raise TypeError(f"parse_actions: text must be {_EXAMPLE}, got {text!r:.60}")
    rows: list[np.ndarray] = []
    for item in text.split(","):
        held, _, count = (piece.strip() for piece in item.partition("*"))
        if not (count.isascii() and count.isdigit() and count.strip("0")):
            raise ValueError(
                f"parse_actions: an action's count must be a positive integer, as in {_EXAMPLE}, got {item.strip()!r}"
            )
        if len(count) > len(str(MOST_ROWS)) or len(rows) + int(count) > MOST_ROWS:
            raise ValueError(f"parse_actions: counts must be at most {MOST_ROWS} together, got {text!r:.60}")
        row = _row(wanted, [letter.strip().upper() for letter in held.split("+")], layout)
        rows += [row] * (int(count) + (not rows))
    array = np.stack(rows).astype(np.float32)
    return Actions(array[:, :2] if wanted.mouse else None, array[:, 2:])


def _row(layout: Layout, letters: list[str], name: str) -> np.ndarray:
    """Mouse, then keyboard, of the letters held, [2 + keys]."""
    columns = ("pitch", "yaw", *layout.keyboard)
    row = np.zeros(len(columns))
    known = [letter for group in layout.groups for letter in group]
    for letter in letters:
        if letter not in (*known, "Q"):
            raise ValueError(f"parse_actions: keys of {name!r} must be of {', '.join(known)} or Q, got {letter!r}")
    for group in (*layout.groups, {"Q"}):
        of_group = [letter for letter in letters if letter in group]
        if len(of_group) > 1 or ("Q" in of_group and len(letters) > 1):
            raise ValueError(
                f"parse_actions: keys held together must be one of each of "
                f"{', '.join('/'.join(group) for group in layout.groups)}, got {'+'.join(letters)}"
            )
        for letter in set(of_group) - {"Q"}:
            column, value = group[letter]
            row[columns.index(column)] = value
    if layout.idle is not None and not row.any():
        row[2 + layout.idle] = 1
    return row


def _layout(op: str, name: str) -> Layout:
    if not isinstance(name, str) or name not in LAYOUTS:
        raise ValueError(f"{op}: layout must be one of {', '.join(LAYOUTS)}, got {name!r}")
    return LAYOUTS[name]


def _as_rows(op: str, name: str, given: object, rows: int | None, columns: int, layout: str) -> np.ndarray:
    wanted = f"[{'rows' if rows is None else rows}, {columns}] for layout {layout!r}"
    try:
        array = as_float64(given)
    except OverflowError as error:
        raise bad_value(op, name, f"an array {wanted} of numbers that a float can hold", given) from error
    except (TypeError, ValueError) as error:
        raise TypeError(f"{op}: {name} must be an array {wanted}, got {type(given).__name__}") from error
    if array.ndim != 2 or array.shape[1] != columns or (rows is not None and len(array) != rows):
        raise ValueError(f"{op}: {name} must be {wanted}, got {None if given is None else list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{op}: {name} must be finite, got {array[~np.isfinite(array)][0]}")
    return array

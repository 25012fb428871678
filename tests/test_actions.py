"""Actions: what the integrator makes of them against plain loops, undone turns, the pitch's limits, spelled keys."""

import cmath
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worldkv_kernels.actions import (
    LAYOUTS,
    SCALES,
    ActionIntegrator,
    Actions,
    ActionScales,
    IntegratorState,
    as_actions,
    parse_actions,
    video_frames,
)

fuzz = settings(max_examples=60, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**31)
layouts = st.sampled_from(sorted(LAYOUTS))


def random_actions(seed: int, layout: str, rows: int) -> Actions:
    """Keys held for a while, and looks in steps of 0.1, up to three at a time."""
    rng = np.random.default_rng(seed)
    keys = len(LAYOUTS[layout].keyboard)
    if layout == "templerun":
        return Actions(None, np.eye(keys)[rng.integers(keys, size=rows)])
    return Actions(rng.integers(-3, 4, size=(rows, 2)) * 0.1, rng.integers(2, size=(rows, keys)).astype(float))


def random_scales(seed: int) -> ActionScales:
    rng = np.random.default_rng(seed)
    low, high = rng.uniform(-90, -5), rng.uniform(5, 90)
    yaw, pitch, walk, run, turn = rng.uniform((5, 5, 0.1, 0, 0), (40, 40, 20, 3, 9))
    return ActionScales(yaw=yaw, pitch=pitch, walk=walk, run=run, turn=turn, pitch_limits=(low, high))


def plain(actions: Actions, scales: ActionScales, layout: str) -> np.ndarray:
    """Poses after every row, [rows, 4, 4], by float64 degrees and a complex position, x + iz."""
    yaw = pitch = 0.0
    position = 0j
    poses = []
    for row, keys in enumerate(actions.keyboard):
        turn = 0.0
        if layout == "templerun":
            _, _, _, left_turn, right_turn, left, right = keys
            forward = back = 0.0
            turn = scales.turn * (right_turn - left_turn)
        else:
            up, to_right = actions.mouse[row]
            forward, back, left, right = (*keys, 0.0, 0.0) if layout == "gta_drive" else keys
            turn = scales.yaw * to_right
            pitch = max(scales.pitch_limits[0], min(scales.pitch_limits[1], pitch + scales.pitch * up))
        way = complex(right - left, forward - back)  # right, ahead
        if abs(way) > 1:
            way /= abs(way)
        way = scales.walk * way + 1j * scales.run
        position += way * cmath.exp(-1j * math.radians(yaw + turn / 2))  # to the right is from z to x
        yaw += turn
        a, b = math.radians(yaw), math.radians(pitch)
        ahead = np.array([math.sin(a) * math.cos(b), -math.sin(b), math.cos(a) * math.cos(b)])
        to_the_right = np.array([math.cos(a), 0.0, -math.sin(a)])
        pose = np.eye(4)
        pose[:3, :3] = np.stack([to_the_right, np.cross(ahead, to_the_right), ahead], axis=1)
        pose[:3, 3] = position.real, 0.0, position.imag
        poses.append(pose)
    return np.stack(poses)


def undone(actions: Actions) -> Actions:
    """The opposites in reverse order."""
    swapped = actions.keyboard[::-1, [1, 0, 3, 2]]
    return Actions(-actions.mouse[::-1], swapped)


# --- the integrator ---


@fuzz
@given(seeds, layouts, st.integers(1, 30))
def test_poses_are_those_of_a_plain_loop(seed, layout, frames):
    actions, scales = random_actions(seed, layout, video_frames(frames)), random_scales(seed)
    integrator = ActionIntegrator(scales, layout)
    got = integrator.poses(actions)
    assert got.shape == (frames, 4, 4) and got.dtype == np.float64
    assert np.abs(got - plain(actions, scales, layout)[::4]).max() < 1e-9
    assert integrator.state == IntegratorState()  # all at once leaves it at the start


@fuzz
@given(seeds, layouts, st.lists(st.integers(1, 4), min_size=1, max_size=8))
def test_chunks_of_any_sizes_give_what_all_at_once_gives(seed, layout, chunks):
    actions = random_actions(seed, layout, video_frames(sum(chunks)))
    integrator = ActionIntegrator(random_scales(seed), layout)
    whole, got, start = integrator.poses(actions), [], 0
    for frames in chunks:
        of_chunk = actions.of_frames(start, frames)
        before = integrator.state
        integrator.advance(*random_actions(seed + 1, layout, len(of_chunk.keyboard)))  # a chunk that is taken back
        integrator.restore(before)
        got.append(integrator.advance(*of_chunk))
        assert (integrator.pose == got[-1][-1]).all()
        start += frames
    assert (np.concatenate(got) == whole).all()
    integrator.reset()
    assert (integrator.poses(actions) == whole).all() and (integrator.pose == np.eye(4)).all()


def test_axes_and_signs():
    """Right and up are positive; the camera looks along z, with x to its right and y down."""
    scales = ActionScales(yaw=90, pitch=45, walk=2, turn=90, run=3)
    universal = ActionIntegrator(scales)

    def after(mouse, keys):
        return universal.poses(Actions(np.array([mouse]), np.array([keys])))[0].round(12)

    assert after((0, 0), (1, 0, 0, 0))[:3, 3].tolist() == [0, 0, 5]
    assert after((0, 0), (0, 1, 0, 0))[:3, 3].tolist() == [0, 0, 1]
    assert after((0, 0), (0, 0, 1, 0))[:3, 3].tolist() == [-2, 0, 3]
    assert after((0, 0), (0, 0, 0, 1))[:3, 3].tolist() == [2, 0, 3]
    assert after((0, 1), (0, 0, 0, 0))[:3, 2].tolist() == [1, 0, 0]  # ahead is what was to the right
    assert after((0, -1), (0, 0, 0, 0))[:3, 2].tolist() == [-1, 0, 0]
    half = math.sqrt(0.5)
    assert after((1, 0), (0, 0, 0, 0))[:3, 2] == pytest.approx([0, -half, half])  # y is down
    assert after((1, 0), (1, 0, 0, 0))[:3, 3].tolist() == [0, 0, 5]  # walks on the level
    runner = ActionIntegrator(scales, "templerun")
    for column, (x, yaw) in enumerate([(0, 0), (0, 0), (0, 0), (0, -1), (0, 1), (-2, 0), (2, 0)]):
        pose = runner.poses(Actions(None, np.eye(7)[[column]]))[0]
        assert pose[:3, 2] == pytest.approx([yaw, 0, 1 - abs(yaw)])
        assert pose[:3, 3] == pytest.approx([x + 3 * half * yaw, 0, 3 * (half if yaw else 1)])


def test_two_keys_go_as_far_as_one_and_opposite_keys_nowhere():
    integrator = ActionIntegrator(ActionScales(walk=1))

    def way(keys):
        return integrator.poses(Actions(np.zeros((1, 2)), np.array([keys], dtype=float)))[0][:3, 3]

    assert way((1, 0, 0, 1)) == pytest.approx([math.sqrt(0.5), 0, math.sqrt(0.5)])
    assert way((1, 1, 0, 0)).tolist() == way((1, 1, 1, 1)).tolist() == [0, 0, 0]
    assert way((0.25, 0, 0, 0)).tolist() == [0, 0, 0.25]


@pytest.mark.parametrize("step", [0.1, np.float32(0.1), 1 / 3, 7.7])
@pytest.mark.parametrize("rows", [60, 10_000])
def test_turned_left_and_back_right_is_where_it_was(step, rows):
    """Through many wraps of the yaw, from a pose that is nothing round."""
    integrator = ActionIntegrator(ActionScales(yaw=13.7))
    integrator.advance(*random_actions(3, "universal", 41))
    start = integrator.pose
    turn = np.zeros((rows, 2))
    turn[:, 1] = step
    integrator.advance(-turn, np.zeros((rows, 4)))
    turned = integrator.pose
    assert np.abs(turned - start).max() > 0.1
    integrator.advance(turn, np.zeros((rows, 4)))
    assert (integrator.pose == start).all()
    integrator.advance(turn, np.zeros((rows, 4)))
    integrator.advance(-turn, np.zeros((rows, 4)))
    assert (integrator.pose == start).all()


def test_a_whole_turn_is_where_it_was():
    integrator = ActionIntegrator()
    integrator.advance(np.zeros((1, 2)), np.zeros((1, 4)))
    for turns in range(1, 40):
        integrator.advance(np.tile((0.0, 0.1), (240, 1)), np.zeros((240, 4)))  # 240 * 1.5 degrees
        assert np.abs(integrator.pose - np.eye(4)).max() < 1e-9, turns
        assert -(2**47) <= integrator.state.yaw < 2**47


@fuzz
@given(seeds, st.integers(1, 400))
def test_a_walk_undone_ends_where_it_began_to_the_last_bit(seed, frames):
    """Turning while walking, over thousands of units."""
    integrator = ActionIntegrator(ActionScales(yaw=31.7, walk=12.35))
    integrator.advance(*random_actions(seed, "universal", 41))
    start = integrator.state
    actions = random_actions(seed + 1, "universal", 4 * frames)
    actions.mouse[:, 0] = 0
    integrator.advance(*actions)
    integrator.advance(*undone(actions))
    assert integrator.state._replace(rows=0) == start._replace(rows=0)


def test_the_pitch_stops_at_its_limits_and_an_undone_look_ends_short():
    integrator = ActionIntegrator(ActionScales(pitch=10, pitch_limits=(-20, 30)))
    look = np.zeros((8, 2))
    look[:, 0] = 0.5  # 40 degrees

    def pitch():
        return math.degrees(math.asin(-integrator.pose[1, 2]))

    integrator.advance(np.zeros((1, 2)), np.zeros((1, 4)))
    integrator.advance(look, np.zeros((8, 4)))
    assert pitch() == pytest.approx(30)
    integrator.advance(-look, np.zeros((8, 4)))
    assert pitch() == pytest.approx(-10)
    integrator.advance(-look, np.zeros((8, 4)))
    assert pitch() == pytest.approx(-20)
    integrator.advance(look[:4], np.zeros((4, 4)))
    assert pitch() == pytest.approx(0)  # inside the limits it is undone
    integrator.advance(-look[:4], np.zeros((4, 4)))
    assert pitch() == pytest.approx(-20)


def test_arrays_and_tensors_of_any_dtype():
    actions = random_actions(0, "universal", 9)
    want = ActionIntegrator().poses(actions)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 0.02)):  # units, of steps of 12.35
        tensors = Actions(*(torch.from_numpy(array).to(dtype) for array in actions))
        assert 0 < np.abs(ActionIntegrator().poses(tensors) - want).max() <= tolerance
    lists = Actions(*(array.tolist() for array in actions))
    assert (ActionIntegrator().poses(lists) == want).all()


# --- rows ---


def test_rows_of_frames_are_the_published_ones():
    """Frame 0 has row 0, frame f rows 4 f - 3 .. 4 f."""
    actions = Actions(None, np.arange(41)[:, None])
    assert actions.of_frames(0, 1).keyboard.ravel().tolist() == [0]
    assert actions.of_frames(0, 3).keyboard.ravel().tolist() == list(range(9))
    assert actions.of_frames(3, 3).keyboard.ravel().tolist() == list(range(9, 21))
    assert actions.of_frames(10, 1).keyboard.ravel().tolist() == [37, 38, 39, 40]
    assert actions.until(7).keyboard.ravel().tolist() == list(range(7)) and actions.until(7).mouse is None
    assert [video_frames(frames) for frames in (1, 2, 15)] == [1, 5, 57]


# --- spelled ---


def test_keys_of_universal():
    actions = parse_actions("W*2, s*1,A*1,D*1,I*1,K*1,J*1,L*1,Q*1,w + d+i +j*1")
    assert actions.mouse.dtype == actions.keyboard.dtype == np.float32
    assert actions.keyboard.tolist() == [
        [1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1],
        *[[0, 0, 0, 0]] * 5, [1, 0, 0, 1],
    ]  # fmt: skip
    step = np.float32(0.1).item()
    assert actions.mouse.tolist() == [
        *[[0, 0]] * 6, [step, 0], [-step, 0], [0, -step], [0, step], [0, 0], [step, -step],
    ]  # fmt: skip


def test_keys_of_the_other_games():
    gta = parse_actions("W+A*1,S+D*1,Q*1", "gta_drive")
    step = np.float32(0.1).item()
    assert gta.keyboard.tolist() == [[1, 0], [1, 0], [0, 1], [0, 0]]
    assert gta.mouse.tolist() == [[0, -step], [0, -step], [0, step], [0, 0]]
    runner = parse_actions("Q*1,W*1,S*1,Z*1,C*1,A*1,D*1", "templerun")
    assert runner.mouse is None
    assert runner.keyboard.tolist() == np.eye(7)[[0, 0, 1, 2, 3, 4, 5, 6]].tolist()


@pytest.mark.parametrize(
    "text, layout, message",
    [
        ("W*24,X*2", "universal", "keys of 'universal' must be of W, S, A, D, I, K, J, L or Q, got 'X'"),
        ("J*2", "gta_drive", "keys of 'gta_drive' must be of W, S, A, D or Q, got 'J'"),
        ("W++A*2", "universal", "must be of .*, got ''"),
        ("W+S*2", "universal", "must be one of each of W/S, A/D, I/K, J/L, got W\\+S"),
        ("I+W+I*2", "universal", "got I\\+W\\+I"),
        ("W+Q*2", "universal", "got W\\+Q"),
        ("Q+Q*2", "universal", "got Q\\+Q"),
        ("W+A*2", "templerun", "must be one of each of W/S/Z/C/A/D, got W\\+A"),
        ("W", "universal", "count must be a positive integer, as in .*, got 'W'"),
        ("W*0", "universal", "count must be a positive integer, as in .*, got 'W\\*0'"),
        ("W*2,", "universal", "count must be a positive integer, as in .*, got ''"),
        ("W*1.5", "universal", "count must be a positive integer"),
        ("W*00", "universal", "count must be a positive integer, as in .*, got 'W\\*00'"),
        ("W*9999999", "universal", "counts must be at most 100000 together, got 'W\\*9999999'"),
        ("W*60000,S*40001", "universal", "counts must be at most 100000 together, got 'W\\*60000,S\\*40001'"),
        pytest.param("W*" + "9" * 5000, "universal", "counts must be at most 100000 together", id="5000 digits"),
        ("W*2", ["universal"], "layout must be one of universal, gta_drive, templerun, got \\['universal'\\]"),
        ("W*2", "minecraft", "layout must be one of universal, gta_drive, templerun, got 'minecraft'"),
    ],
)
def test_spelling_errors(text, layout, message):
    with pytest.raises(ValueError, match=f"parse_actions: .*{message}"):
        parse_actions(text, layout)


# --- errors ---


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("yaw", math.nan, "yaw must be finite, got nan"),
        ("walk", math.inf, "walk must be finite, got inf"),
        ("pitch_limits", (5, 80), "pitch_limits must be -90 <= low <= 0 <= high <= 90, got 5, 80"),
        ("pitch_limits", (-91, 80), "pitch_limits must be .*, got -91, 80"),
        ("pitch_limits", (-80, -1), "pitch_limits must be .*, got -80, -1"),
        ("pitch_limits", (-80, math.nan), "pitch_limits must be finite"),
        ("yaw", 1e300, r"yaw must be from -1000000 to 1000000, got 1e\+300"),
        ("walk", -1e308, r"walk must be from -1000000 to 1000000, got -1e\+308"),
        ("run", 10**400, "run must be .* that a float can hold, got 1000"),
        ("pitch_limits", (-(10**400), 0), "pitch_limits must be a number that a float can hold, got -1000"),
        ("yaw", "x", "yaw must be a number, got 'x'"),
        ("turn", None, "turn must be a number, got None"),
        ("pitch", (1, 2), r"pitch must be a number, got \(1, 2\)"),
        ("walk", True, "walk must be a number, got True"),
        ("pitch_limits", 5, "pitch_limits must be a pair of numbers, the lowest and the highest look, got 5"),
        ("pitch_limits", (-80, 0, 80), r"pitch_limits must be a pair of numbers, .*, got \(-80, 0, 80\)"),
        ("pitch_limits", (None, 80), r"pitch_limits must be a pair of numbers, .*, got \(None, 80\)"),
    ],
)
def test_scales_errors(field, value, message):
    error = TypeError if "a number, got" in message or "a pair" in message else ValueError
    with pytest.raises(error, match=f"ActionScales: {message}"):
        ActionScales(**{field: value})


def test_the_largest_scales_can_be_integrated():
    """For the longest spelled actions: positions and angles are integers, and these have room."""
    largest = {field: 1e6 for field in ("yaw", "pitch", "walk", "run", "turn")}
    integrator = ActionIntegrator(ActionScales(**largest, pitch_limits=[-90, np.float32(90)]))
    integrator.restore(IntegratorState(rows=100_000, x=100_000 * 10**6 << 40, z=-(100_000 * 10**6) << 40))
    poses = integrator.advance(np.ones((4, 2)), np.ones((4, 4)))
    assert np.isfinite(poses).all() and poses[0, 0, 3] == pytest.approx(1e11, rel=1e-4)


@pytest.mark.parametrize("scales", [5, {"yaw": 3}, ActionScales])
def test_what_is_no_scales(scales):
    with pytest.raises(TypeError, match="ActionIntegrator: scales must be ActionScales or None, got "):
        ActionIntegrator(scales)


@pytest.mark.parametrize("text", [None, 5, ["W*3"], b"W*3"])
def test_actions_that_are_no_string(text):
    with pytest.raises(TypeError, match=r"parse_actions: text must be actions such as W.*, got "):
        parse_actions(text)


def test_every_layout_has_scales_and_its_letters_name_its_columns():
    assert set(SCALES) == set(LAYOUTS)
    for layout in LAYOUTS.values():
        columns = {column for group in layout.groups for column, _ in group.values()}
        looks = {"pitch", "yaw"} if layout.mouse else set()
        assert columns <= set(layout.keyboard) | looks
    with pytest.raises(ValueError, match=r"ActionIntegrator: layout must be one of universal, .*, got 'x'"):
        ActionIntegrator(layout="x")


@pytest.mark.parametrize("rows, started", [(0, False), (2, False), (4, False), (0, True), (1, True), (9, True)])
def test_rows_that_end_no_frame(rows, started):
    integrator = ActionIntegrator()
    if started:
        integrator.advance(np.zeros((5, 2)), np.zeros((5, 4)))
    before = integrator.state
    wanted = "4 n after the start" if started else "4 n - 3 from the start"
    with pytest.raises(ValueError, match=f"ActionIntegrator: actions must be {wanted} rows for n latent .* got {rows}"):
        integrator.advance(np.zeros((rows, 2)), np.zeros((rows, 4)))
    assert integrator.state == before


@pytest.mark.parametrize(
    "mouse, keyboard, layout, error, message",
    [
        (np.zeros((5, 2)), np.zeros((5, 2)), "universal", ValueError, r"keyboard must be \[rows, 4\] .* got \[5, 2\]"),
        (np.zeros((5, 2)), np.zeros((5, 4)), "gta_drive", ValueError, r"keyboard must be \[rows, 2\] .* 'gta_drive'"),
        (np.zeros((4, 2)), np.zeros((5, 4)), "universal", ValueError, r"mouse must be \[5, 2\] .* got \[4, 2\]"),
        (np.zeros(5), np.zeros((5, 4)), "universal", ValueError, r"mouse must be \[5, 2\] .* got \[5\]"),
        (None, np.zeros((5, 4)), "universal", ValueError, r"mouse must be \[5, 2\] .* got None"),
        (np.zeros((5, 2)), np.zeros((5, 7)), "templerun", ValueError, "'templerun' must have mouse None, got ndarray"),
        (None, None, "templerun", ValueError, r"keyboard must be \[rows, 7\] .* got None"),
        (np.zeros((5, 2)), "wasd", "universal", TypeError, r"keyboard must be an array \[rows, 4\] .* got str"),
        (np.full((5, 2), np.nan), np.zeros((5, 4)), "universal", ValueError, "mouse must be finite, got nan"),
        (np.zeros((5, 2)), np.full((5, 4), np.inf), "universal", ValueError, "keyboard must be finite, got inf"),
    ],
)
def test_actions_of_another_shape(mouse, keyboard, layout, error, message):
    integrator = ActionIntegrator(layout=layout)
    with pytest.raises(error, match=f"ActionIntegrator: .*{message}"):
        integrator.advance(mouse, keyboard)
    assert integrator.state == IntegratorState()


@pytest.mark.parametrize("actions", [None, np.zeros((5, 6)), (np.zeros((5, 2)),)])
def test_what_is_no_pair(actions):
    with pytest.raises(TypeError, match="op: actions must be an Actions of mouse and keyboard, got"):
        as_actions("op", actions, "universal")

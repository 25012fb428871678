"""What a memory is between two chunks, as a tree of values and rows: to be saved, loaded and forked from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..actions import ActionIntegrator, ActionScales, IntegratorState, as_state, video_frames
from ..checks import DTYPES
from ..poses import as_intrinsics, as_poses
from ..rope import Rope3D
from ..saved import Rows, Saved, StoredRows
from .config import MemoryConfig, changed
from .plan import leaving
from .received import Received, shares_of
from .retrieval import (
    ActionRetrieval,
    ContentRetrieval,
    FovRetrieval,
    OfficialPoseRetrieval,
    PoseRetrieval,
    RetrievalPolicy,
    goes_by_content,
    make_policy,
)
from .room import has_places
from .slots import COUNTED
from .views import View

if TYPE_CHECKING:
    from .world_memory import WorldMemory

KIND = "memory"
_OP = "WorldMemory.load"
_MOST_CHUNKS = 2**31 - 1  # of a memory without a rope: frames of so many are numbers of 64 bits
WHERE_ROWS_LIE = ("bank", "bank_chunks", "device_slots", "prefetch")  # of MemoryConfig: they change no result
_CHANGEABLE = ("retrieved_chunks", "keep_ratio", "recent_frames")  # WorldMemory.change
# Policies of this package, and what they are made of.
_POLICIES: dict[type, tuple[str, ...]] = {
    PoseRetrieval: ("diversity",),
    FovRetrieval: ("depth_range", "image_size", "diversity", "samples"),
    ActionRetrieval: ("integrator", "diversity"),
    ContentRetrieval: ("skip_newest", "diversity"),
    OfficialPoseRetrieval: (),
}


def file_tree(op: str, memory: WorldMemory) -> dict[str, Any]:
    """All that a file holds of it. Raises as `tree_of`, and TypeError where its rope is none that a file can name."""
    return {"config": config_tree(memory.configured), **tree_of(op, memory)}


def tree_of(op: str, memory: WorldMemory) -> dict[str, Any]:
    """Its state, but for the config. Rows are named where they lie: to be read before the memory is used again.

    Raises RuntimeError naming `op` while a chunk is begun.
    """
    memory._check_between(op)
    bank = memory._bank
    if memory.device.type == "cuda":
        torch.cuda.synchronize(memory.device)  # pruning, and copies to the host
    memory._last_content()  # read, where it was not
    tree = {
        "changed": {name: getattr(memory.config, name) for name in _CHANGEABLE},
        "places": memory._storage.places,
        "dtype": str(memory.dtype).removeprefix("torch."),
        "next_chunk": memory._next_chunk,
        "first_whole": memory._first_whole,
        "tokens_attended": memory._tokens_attended,
        "retrieved_total": memory._retrieved_total,
        "integrator": None if memory.integrator is None else tuple(memory.integrator.state),
        "last_view": _view_tree(memory._last_view),
        "descriptions": dict(memory._descriptions),
        "unbanked": sorted(memory._unbanked),
        "whole": {chunk: memory._storage.held(chunk) for chunk in _whole(memory)},
        "bank": None,
    }
    if memory._received is not None:
        tree["received"] = _received_tree(memory._received)
    if bank is not None:
        tree["bank"] = {
            "chunks": {
                chunk: (bank.description(chunk), tokens, bank.held(chunk)) for chunk, tokens in bank.tokens.items()
            },
            "pinned": list(memory.pinned),
            "num_dropped": bank.num_dropped,
            "copied": bank.copied(),
        }
    return tree


def restore(memory: WorldMemory, tree: dict[str, Any]) -> None:
    """Make a new memory, of the config and dtype that the tree is of, what the one was that it was taken from."""
    memory._configure(changed(memory.config, memory.config, **tree["changed"]))
    config, bank = memory.config, memory._bank
    memory._next_chunk = count = _count(tree, "next_chunk")
    most = min(memory._storage.max_chunks, _MOST_CHUNKS)
    if count > most:
        raise ValueError(f"{_OP}: next_chunk must be at most {most}, which the config has room for, got {count}")
    memory._first_whole = first = _count(tree, "first_whole")
    last = config.sink_chunks if config.mode == "full" else max(count, config.sink_chunks)
    if not config.sink_chunks <= first <= last or leaving(config, count, first):
        raise ValueError(f"{_OP}: first_whole must be one that {count} chunks leave, got {first}")
    memory._tokens_attended, memory._retrieved_total = _count(tree, "tokens_attended"), _count(tree, "retrieved_total")
    state, described = _state(memory, tree["integrator"]), _Described(config)
    if state is not None:
        memory.integrator.restore(state)
    memory._last_view = _view(memory, tree["last_view"], described)
    whole = _whole(memory)
    _check_keys("whole", tree["whole"], whole)
    for chunk in whole:
        _put(tree["whole"][chunk], memory._storage.held(chunk))
    _check_keys("descriptions", tree["descriptions"], _described(memory, whole))
    memory._descriptions = {chunk: described.checked(given) for chunk, given in tree["descriptions"].items()}
    will_leave = [chunk for chunk in whole if chunk >= config.sink_chunks] if bank is not None else []
    memory._unbanked = _some_of("unbanked", tree["unbanked"], will_leave)
    _restore_received(memory, tree.get("received"))
    if bank is not None:
        _restore_bank(memory, tree["bank"], whole, described)
    elif tree["bank"] is not None:
        raise ValueError(f"{_OP}: bank must be None in mode {config.mode!r}, got one")


def _restore_bank(memory: WorldMemory, tree: dict[str, Any], whole: list[int], described: _Described) -> None:
    config, bank, count, banked = memory.config, memory._bank, memory._next_chunk, tree["chunks"]
    strangers = [chunk for chunk in banked if not _may_be_banked(config, chunk, count, memory._first_whole)]
    if strangers or sorted(banked) != list(banked) or len(banked) > bank.capacity:
        raise ValueError(f"{_OP}: bank must hold up to {bank.capacity} of the chunks that have left, got {[*banked]}")
    bank.pinned.update(_some_of("pinned", tree["pinned"], [*banked, *whole]))
    for chunk, (description, tokens, rows) in banked.items():
        _put(rows, bank.adopt(chunk, described.checked(description), _integer(tokens)))
    copied = tree["copied"]
    if copied is not None:
        if sorted(copied) != sorted(COUNTED):
            raise ValueError(f"{_OP}: copied must be None or of {', '.join(COUNTED)}, got {copied!r:.200}")
        copied = {name: _count(copied, name) for name in COUNTED}
    bank.count(_count(tree, "num_dropped"), copied)


def new_of(
    make: Callable[..., WorldMemory], file: Saved, tree: dict[str, Any], *, device: Any, backend: str | None,
    retrieval: RetrievalPolicy | None, changes: dict[str, Any],
) -> WorldMemory:  # fmt: skip
    """A new memory for `restore`, of a tree that was read from a file. Raises as WorldMemory.load says."""
    unknown = [name for name in changes if name not in WHERE_ROWS_LIE]
    if unknown:
        raise TypeError(f"{_OP}: changes must be of {', '.join(WHERE_ROWS_LIE)}, got {', '.join(unknown)}")
    with file.explained():
        config = config_of(tree["config"], retrieval)
        if config.bank_chunks is None and has_places(config):
            config = replace(config, bank_chunks=_count(tree, "places"))
        dtype = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}[tree["dtype"]]
    with file.explained(malformed=()):  # of the caller's arguments, too: a TypeError stays one
        return make(replace(config, **changes), device=device, dtype=dtype, backend=backend)


def forked(memory: WorldMemory) -> WorldMemory:
    tree, config = tree_of("fork", memory), memory.configured
    if has_places(config):
        config = replace(config, bank_chunks=memory._storage.places)
    if not is_stateless(config):
        rows = [*tree["whole"].values(), *(rows for _, _, rows in (tree["bank"] or {"chunks": {}})["chunks"].values())]
        policy, tree = copy.deepcopy((config.retrieval, tree), {id(of_chunk): of_chunk for of_chunk in rows})
        config = replace(config, retrieval=policy)
    made = type(memory)(config, device=memory.device, dtype=memory.dtype, backend=memory._backend)
    restore(made, tree)
    if memory.device.type == "cuda":
        torch.cuda.current_stream(memory.device).synchronize()  # either may be used on another stream from here on
    return made


def is_stateless(config: MemoryConfig) -> bool:
    """Whether memories may share its retrieval policy."""
    return getattr(make_policy(config.retrieval), "stateless", False)


def with_own_policy(config: MemoryConfig) -> MemoryConfig:
    """For one more memory: with a copy of the policy, as it stands, where memories may not share it."""
    return config if is_stateless(config) else replace(config, retrieval=copy.deepcopy(config.retrieval))


# --- configs and policies ---


def config_tree(config: MemoryConfig) -> dict[str, Any]:
    made = {field.name: getattr(config, field.name) for field in fields(config)}
    if isinstance(config.rope, Rope3D):
        if type(config.rope) is not Rope3D:
            got = type(config.rope).__name__
            raise TypeError(f"WorldMemory.save: config.rope must be a Rope3D itself to be saved, got a {got}")
        made["rope"] = rope_tree(config.rope)
    if not isinstance(config.retrieval, str):
        made["retrieval"] = _policy_tree(config.retrieval)
    return made


def differences(one: MemoryConfig, other: MemoryConfig, *, but: Sequence[str]) -> list[tuple[str, Any, Any]]:
    """Fields in which two configs differ, but for some, and what each has there; of policies, what they are made of."""
    here, there = (
        config_tree(replace(config, retrieval=make_policy(config.retrieval), rope=config.make_rope()))
        for config in (one, other)
    )
    return [(name, here[name], there[name]) for name in here if name not in but and here[name] != there[name]]


def is_of_this_package(policy: str | RetrievalPolicy) -> bool:
    """Whether a saved memory brings it along."""
    return type(make_policy(policy)) in _POLICIES


def config_of(tree: dict[str, Any], retrieval: RetrievalPolicy | None = None) -> MemoryConfig:
    """Raises ValueError or what is MALFORMED."""
    given = dict(tree)
    if isinstance(given["rope"], dict):
        given["rope"] = Rope3D(**given["rope"])
    given["retrieval"] = _policy_of(given["retrieval"], retrieval)
    return MemoryConfig(**given)


def rope_tree(rope: Rope3D) -> dict[str, Any]:
    return {name: getattr(rope, name) for name in ("head_dim", "theta", "pairs")}


def _policy_tree(policy: RetrievalPolicy) -> dict[str, Any]:
    if type(policy) not in _POLICIES:
        return {"own": _name(policy)}
    arguments = {name: getattr(policy, name) for name in _POLICIES[type(policy)]}
    if "integrator" in arguments:
        integrator = policy.integrator
        arguments["integrator"] = {"layout": integrator.layout_name, "scales": asdict(integrator.scales)}
    return {"class": type(policy).__name__, "arguments": arguments}


def _policy_of(tree: Any, given: RetrievalPolicy | None) -> Any:
    if isinstance(tree, dict) and "own" in tree:
        if given is None or _name(given) != tree["own"]:
            got = None if given is None else _name(given)
            raise ValueError(f"{_OP}: retrieval must be a {tree['own']}, which the memory was saved with, got {got}")
        return given
    if isinstance(tree, str):
        made = tree
    else:
        arguments = dict(tree["arguments"])
        if "integrator" in arguments:
            scales, layout = (arguments["integrator"][name] for name in ("scales", "layout"))
            arguments["integrator"] = ActionIntegrator(ActionScales(**scales), layout)
        made = {policy.__name__: policy for policy in _POLICIES}[tree["class"]](**arguments)
    if given is not None and _name(make_policy(made)) != _name(given):
        own = _name(make_policy(made))
        raise ValueError(f"{_OP}: retrieval must be None or a {own}, as the memory was saved with, got {_name(given)}")
    return made if given is None else given


def _name(policy: object) -> str:
    return f"{type(policy).__module__}.{type(policy).__qualname__}"


# --- parts of the above ---


class _Described:
    """What descriptions look like: of the policies here, shapes and dtypes of arrays, and a pose that is one. Contents
    are all of one shape, and may have what is not finite where a model made it."""

    def __init__(self, config: MemoryConfig) -> None:
        policy = make_policy(config.retrieval)
        self._by_content = goes_by_content(policy)
        own = type(policy) not in _POLICIES or self._by_content
        self._wanted = None if own else _layout(policy.describe(np.eye(4)[None], np.ones((1, 4))))
        self._has_pose = isinstance(policy, PoseRetrieval | FovRetrieval)
        self._has_camera = isinstance(policy, FovRetrieval)

    def checked(self, description: Any) -> Any:
        """It, if distances can be taken of it; any, of a policy of a user's own."""
        if self._by_content:
            layout = _content_layout(description)
            self._wanted = self._wanted or layout
            if layout is None or layout != self._wanted:
                wanted = self._wanted or "fp32 [vectors, dim]"
                raise ValueError(f"{_OP}: contents must all be {wanted}, got {layout or type(description).__name__}")
            return description
        if self._wanted is None:
            return description
        got = _layout(description)
        if got != self._wanted:
            raise ValueError(f"{_OP}: descriptions must be of {self._wanted}, got {got!r:.200}")
        if self._has_pose:
            as_poses(_OP, (description if isinstance(description, np.ndarray) else description[0])[None])
        if self._has_camera:
            as_intrinsics(_OP, description[1][:4], 1)
            if not (description[1][4:] > 0).all():
                raise ValueError(f"{_OP}: descriptions must be of an image, got one of {description[1][4:]} pixels")
        return description


def _layout(description: Any) -> Any:
    if isinstance(description, tuple):
        return tuple(map(_layout, description))
    if isinstance(description, np.ndarray) and np.isfinite(description).all():
        return f"finite {description.dtype} {list(description.shape)}"
    return type(description).__name__


def _content_layout(description: Any) -> str | None:
    if isinstance(description, np.ndarray) and description.dtype == np.float32 and description.ndim == 2:
        return f"fp32 {list(description.shape)}" if description.size else None
    return None


def _view_tree(view: View) -> tuple[Any, ...]:
    return *view[:3], None if view.after_actions is None else tuple(view.after_actions)


def _view(memory: WorldMemory, tree: Any, described: _Described) -> View:
    """Of the last chunk of history, none before the first."""
    config = memory.config
    poses, intrinsics, description, after = tree
    if not memory._next_chunk:
        if any(part is not None for part in tree):
            raise ValueError(f"{_OP}: last_view must be empty before chunk 0, got one")
        return View()
    if config.has_bank and poses is None and not config.takes_contents:
        raise ValueError(f"{_OP}: last_view must have poses in mode 'worldkv', got none")
    if not config.has_bank and description is not None:
        raise ValueError(f"{_OP}: last_view must have no description in mode {config.mode!r}, got one")
    return View(
        None if poses is None else as_poses(_OP, poses, config.chunk_frames),
        None if intrinsics is None else as_intrinsics(_OP, intrinsics, config.chunk_frames),
        described.checked(description) if config.has_bank else None,
        _state(memory, after),
    )


def _state(memory: WorldMemory, tree: Any) -> IntegratorState | None:
    """Of the integrator after the chunks made, where retrieval is by action."""
    if memory.integrator is None:
        if tree is not None:
            raise ValueError(f"{_OP}: integrator must be None where retrieval is not by action, got {tree!r:.60}")
        return None
    frames = memory._next_chunk * memory.config.chunk_frames
    return as_state(_OP, tree, video_frames(frames) if frames and memory.config.has_bank else 0)


def _received_tree(received: Received) -> dict[str, Any]:
    """What is known, and what of the last window is not in that yet."""
    known, last = received.known, received.last()
    return {**known._asdict(), "last": None if last is None else last._asdict()}


def _restore_received(memory: WorldMemory, tree: Any) -> None:
    received, count = memory._received, memory._next_chunk
    if (received is None) != (tree is None):
        raise ValueError(f"{_OP}: received must be there with mass_layers, else not, got {tree!r:.60}")
    if received is not None:
        last = tree["last"]
        received.restore(shares_of(_OP, tree, count), None if last is None else shares_of(_OP, last, count))


def _put(rows: Rows | StoredRows, where: Rows) -> None:
    if isinstance(rows, StoredRows):
        rows.into(where)
    else:
        where.copy_(rows)


def _whole(memory: WorldMemory) -> list[int]:
    """The past chunks that are whole: the sink's and those that have not left."""
    sink = range(min(memory.config.sink_chunks, memory._next_chunk))
    return [*sink, *range(memory._first_whole, memory._next_chunk)]


def _described(memory: WorldMemory, whole: list[int]) -> list[int]:
    """Of the whole chunks those whose descriptions are kept for the bank."""
    config = memory.config
    if not config.has_bank:
        return []
    return [chunk for chunk in whole if chunk >= config.sink_chunks or not config.bank_sink]


def _check_keys(name: str, found: Any, wanted: list[int]) -> None:
    if type(found) is not dict or list(found) != wanted or not all(type(chunk) is int for chunk in found):
        raise ValueError(f"{_OP}: {name} must be of chunks {wanted!r:.200}, got {found!r:.200}")


def _some_of(name: str, found: Any, chunks: list[int]) -> set[int]:
    """A list of some of these chunks."""
    if type(found) is not list or not all(type(chunk) is int for chunk in found) or not set(found) <= set(chunks):
        raise ValueError(f"{_OP}: {name} must be of the chunks {chunks!r:.200}, got {found!r:.200}")
    return set(found)


def _may_be_banked(config: MemoryConfig, chunk: Any, next_chunk: int, first_whole: int) -> bool:
    if type(chunk) is not int or not 0 <= chunk < next_chunk:
        return False
    of_sink = chunk < config.sink_chunks
    return config.bank_sink if of_sink else chunk < first_whole


def _count(tree: dict[str, Any], name: str) -> int:
    count = _integer(tree[name])
    if count < 0:
        raise ValueError(f"{_OP}: {name} must be at least 0, got {count}")
    return count


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"an integer was expected, got {value!r:.60}")
    return value

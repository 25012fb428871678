"""What a memory is between two chunks, as a tree of values and rows: to be saved, loaded and forked from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..actions import ActionIntegrator, ActionScales, IntegratorState
from ..checks import DTYPES
from ..poses import as_intrinsics, as_poses
from ..rope import Rope3D
from ..saved import Rows, Saved, StoredRows
from .config import MemoryConfig, changed
from .plan import leaving
from .retrieval import (
    ActionRetrieval,
    FovRetrieval,
    OfficialPoseRetrieval,
    PoseRetrieval,
    RetrievalPolicy,
    make_policy,
)
from .room import has_places
from .views import View

if TYPE_CHECKING:
    from .world_memory import WorldMemory

KIND = "memory"
_OP = "WorldMemory.load"
WHERE_ROWS_LIE = ("bank", "bank_chunks", "device_slots", "prefetch")  # of MemoryConfig: they change no result
_CHANGEABLE = ("retrieved_chunks", "keep_ratio", "recent_frames")  # WorldMemory.change
# Policies of this package, and what they are made of.
_POLICIES: dict[type, tuple[str, ...]] = {
    PoseRetrieval: ("diversity",),
    FovRetrieval: ("depth_range", "image_size", "diversity", "samples"),
    ActionRetrieval: ("integrator", "diversity"),
    OfficialPoseRetrieval: (),
}


def tree_of(op: str, memory: WorldMemory) -> dict[str, Any]:
    """Its state. Rows are named where they lie: to be read before the memory is used again. Raises RuntimeError naming
    `op` while a chunk is begun."""
    memory._check_process(op)
    memory._check_between(op)
    bank = memory._bank
    if memory.device.type == "cuda":
        torch.cuda.synchronize(memory.device)  # pruning, and copies to the host
    tree = {
        "config": config_tree(memory._configured),
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
    memory._first_whole = first = _count(tree, "first_whole")
    if not config.sink_chunks <= first <= max(count, config.sink_chunks) or leaving(config, count, first):
        raise ValueError(f"{_OP}: first_whole must be one that {count} chunks leave, got {first}")
    memory._tokens_attended, memory._retrieved_total = _count(tree, "tokens_attended"), _count(tree, "retrieved_total")
    if memory.integrator is not None:
        memory.integrator.restore(_integrator_state(tree["integrator"]))
    memory._last_view = _view(config, tree["last_view"])
    whole = _whole(memory)
    if list(tree["whole"]) != whole:
        raise ValueError(f"{_OP}: whole must be of chunks {whole}, got {[*tree['whole']]}")
    for chunk in whole:
        _put(tree["whole"][chunk], memory._storage.held(chunk))
    if bank is not None:
        _restore_bank(memory, tree, whole)


def _restore_bank(memory: WorldMemory, tree: dict[str, Any], whole: list[int]) -> None:
    config, bank, count, of_bank = memory.config, memory._bank, memory._next_chunk, tree["bank"]
    described, descriptions, unbanked = _Described(config), tree["descriptions"], tree["unbanked"]
    will_leave = [chunk for chunk in whole if chunk >= config.sink_chunks]
    if not set(will_leave) <= set(descriptions) <= set(whole):
        raise ValueError(f"{_OP}: descriptions must be of the whole chunks {whole}, got {[*descriptions]}")
    if not set(unbanked) <= set(will_leave):
        raise ValueError(f"{_OP}: unbanked must be of the chunks {will_leave}, got {unbanked}")
    banked, pinned = of_bank["chunks"], of_bank["pinned"]
    strangers = [chunk for chunk in banked if not _may_be_banked(config, chunk, count, memory._first_whole)]
    if strangers or sorted(banked) != list(banked) or len(banked) > bank.capacity:
        raise ValueError(f"{_OP}: bank must hold up to {bank.capacity} of the chunks that have left, got {[*banked]}")
    if not set(pinned) <= {*banked, *whole}:
        raise ValueError(f"{_OP}: pinned must be of the chunks that are kept, got {pinned}")
    for description in descriptions.values():
        described.check(description)
    for chunk, (description, tokens, rows) in banked.items():
        described.check(description)
        if not 1 <= _integer(tokens) <= memory._configured.banked_tokens:
            raise ValueError(f"{_OP}: tokens of a banked chunk must be from 1 to a slot's, got {tokens}")
        _put(rows, bank.adopt(chunk, description, tokens))
    memory._descriptions, memory._unbanked = descriptions, set(unbanked)
    bank.pinned.update(pinned)
    bank.count(_count(of_bank, "num_dropped"), of_bank["copied"])


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
    return make(replace(config, **changes), device=device, dtype=dtype, backend=backend)


def forked(memory: WorldMemory) -> WorldMemory:
    tree, config = tree_of("fork", memory), memory._configured
    if has_places(config):
        config = replace(config, bank_chunks=memory._storage.places)
    if not getattr(make_policy(config.retrieval), "stateless", False):
        config = replace(config, retrieval=copy.deepcopy(config.retrieval))
    made = type(memory)(config, device=memory.device, dtype=memory.dtype, backend=memory._backend)
    restore(made, tree)
    return made


# --- configs and policies ---


def config_tree(config: MemoryConfig) -> dict[str, Any]:
    made = {field.name: getattr(config, field.name) for field in fields(config)}
    if isinstance(config.rope, Rope3D):
        made["rope"] = rope_tree(config.rope)
    if not isinstance(config.retrieval, str):
        made["retrieval"] = _policy_tree(config.retrieval)
    return made


def config_of(tree: dict[str, Any], retrieval: RetrievalPolicy | None = None) -> MemoryConfig:
    """Raises ValueError or what is MALFORMED."""
    given = dict(tree)
    if isinstance(given["rope"], dict):
        given["rope"] = Rope3D(**given["rope"])
    given["retrieval"] = _policy_of(given["retrieval"], retrieval)
    return MemoryConfig(**given)


def rope_tree(rope: Rope3D) -> dict[str, Any]:
    return {"head_dim": rope.head_dim, "theta": rope.theta, "pairs": rope.pairs}


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
    """What descriptions look like: of the policies here, shapes and dtypes of arrays."""

    def __init__(self, config: MemoryConfig) -> None:
        policy = make_policy(config.retrieval)
        pose = np.tile(np.eye(4), (config.chunk_frames, 1, 1))
        own = type(policy) not in _POLICIES
        self._wanted = None if own else _layout(policy.describe(pose, np.ones((config.chunk_frames, 4))))

    def check(self, description: Any) -> None:
        got = _layout(description)
        if self._wanted is not None and got != self._wanted:
            raise ValueError(f"{_OP}: descriptions must be of {self._wanted}, got {got!r:.200}")


def _layout(description: Any) -> Any:
    if isinstance(description, tuple):
        return tuple(map(_layout, description))
    if isinstance(description, np.ndarray) and np.isfinite(description).all():
        return f"finite {description.dtype} {list(description.shape)}"
    return type(description).__name__


def _view_tree(view: View) -> tuple[Any, ...]:
    return *view[:3], None if view.after_actions is None else tuple(view.after_actions)


def _view(config: MemoryConfig, tree: Any) -> View:
    poses, intrinsics, description, after = tree
    return View(
        None if poses is None else as_poses(_OP, poses, config.chunk_frames),
        None if intrinsics is None else as_intrinsics(_OP, intrinsics, config.chunk_frames),
        description,
        None if after is None else _integrator_state(after),
    )


def _integrator_state(tree: Any) -> IntegratorState:
    return IntegratorState(*map(_integer, tree))


def _put(rows: Rows | StoredRows, where: Rows) -> None:
    if isinstance(rows, StoredRows):
        rows.into(where)
    else:
        where.copy_(rows)


def _whole(memory: WorldMemory) -> list[int]:
    """The past chunks that are whole: the sink's and those that have not left."""
    sink = range(min(memory.config.sink_chunks, memory._next_chunk))
    return [*sink, *range(memory._first_whole, memory._next_chunk)]


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

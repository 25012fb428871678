"""The memory of an enabled model, saved and gone on with by another."""

import copy

import pytest
import small_lingbot
import torch
from small_lingbot import POSES, WORLDKV, caches, enable, make_model
from test_sessions import CHUNKS, OTHER, lingbot_alone, lingbot_chunk, lingbot_pass

from worldkv_kernels.memory.retrieval import PoseRetrieval


@pytest.fixture
def saved(tmp_path):
    """Three chunks, the last with its clean pass done."""
    model, both, file = make_model(), caches(), tmp_path / "walk.worldkv"
    with enable(model, **WORLDKV) as handle:
        for chunk in range(3):
            lingbot_chunk(model, chunk, both, 0)
        handle.save(file)
        assert handle.stats()["chunks"] == 3
    return file


@pytest.mark.parametrize("bank", ["device", "host"])
def test_another_model_goes_on_from_it(saved, bank):
    wanted, model = lingbot_alone(0), make_model()
    with enable(model, **WORLDKV, bank=bank) as handle:
        handle.load(saved)
        both = caches()  # of the prompt alone there is something in them
        made = [lingbot_chunk(model, chunk, both, 0) for chunk in range(3, CHUNKS)]
        assert all(torch.equal(a, b) for a, b in zip(made, wanted[3:], strict=True))
        assert handle.stats()["chunks"] == CHUNKS and handle.memory.config.bank == bank
        with pytest.raises(RuntimeError, match="all passes of a rollout must have one cache, got a second one"):
            lingbot_pass(model, CHUNKS, caches(), 0, 1000.0)
        handle.restart(POSES)  # and a new rollout begins as ever
        both = caches()
        assert torch.equal(lingbot_chunk(model, 0, both, 0), wanted[0])


def test_a_session_goes_on_beside_the_handle(saved):
    wanted, other = lingbot_alone(0), lingbot_alone(1)
    model = make_model()
    with enable(model, OTHER, **WORLDKV) as handle:
        session, both, of_session = handle.session(POSES), caches(), caches()
        lingbot_chunk(model, 0, both, 1)
        session.load(saved)
        for chunk in range(1, 3):
            with session:
                assert torch.equal(lingbot_chunk(model, chunk + 2, of_session, 0), wanted[chunk + 2])
            assert torch.equal(lingbot_chunk(model, chunk, both, 1), other[chunk])


def test_what_is_not_of_this_model_is_refused(saved, tmp_path):
    model = make_model()
    for fields, wanted in (
        (dict(recent_frames=6), r"lingbot.load: \S+walk.worldkv must be of recent_frames=6, .* got 3"),
        (dict(retrieval=PoseRetrieval(diversity=0.5)), r"must be of retrieval=\{'class': 'PoseRetrieval'"),
        (dict(grid=(3, 3)), r"must be of grid=\(3, 3\)"),
    ):
        with enable(model, **{**WORLDKV, **fields}) as handle, pytest.raises(ValueError, match=wanted):
            handle.load(saved)
    with enable(model, POSES[:9], **WORLDKV) as handle:
        both = caches()
        lingbot_chunk(model, 0, both, 0)
        lingbot_pass(model, 1, both, 0, 1000.0)
        with pytest.raises(RuntimeError, match="save: chunk 1 must be ended or aborted before"):
            handle.save(tmp_path / "half")
        with pytest.raises(ValueError, match="path must be a file that save wrote"):
            handle.load(tmp_path / "none")
        lingbot_pass(model, 1, both, 0, 0.0)
        assert handle.stats()["chunks"] == 2  # as it was
        hook = model.blocks[0].register_forward_pre_hook(lambda *_: handle.load(saved))
        with pytest.raises(RuntimeError, match="load must be called between passes"):
            lingbot_pass(model, 2, both, 0, 1000.0)
        hook.remove()
    with pytest.raises(RuntimeError, match="load must be called while the model has its memory"):
        handle.load(saved)


def test_a_window_that_was_changed_is_of_the_same_config(tmp_path):
    model, both, file = make_model(), caches(), tmp_path / "walk.worldkv"
    with enable(model, **WORLDKV) as handle:
        for chunk in range(3):
            lingbot_chunk(model, chunk, both, 0)
        handle.stats()
        handle.memory.change(retrieved_chunks=1)
        handle.save(file)
    with enable(model, **WORLDKV) as handle:
        handle.load(file)
        lingbot_chunk(model, 3, caches(), 0)
        assert handle.memory.config.retrieved_chunks == 1
        handle.restart(POSES)
        assert handle.memory.config.retrieved_chunks == 2
    wanted = pytest.raises(ValueError, match=r"must be of retrieved_chunks=1, as the model was given it, got 2")
    with enable(model, **{**WORLDKV, "retrieved_chunks": 1}) as handle, wanted:
        handle.load(file)
    with enable(model, **{**WORLDKV, "bank_chunks": None}) as handle:
        handle.load(file)
        assert handle._chunks.config.bank_chunks is None and handle.memory.config.bank_chunks == 9


class Stateful:
    needs_intrinsics = False

    def __init__(self):
        self.asked = 0

    def describe(self, poses, intrinsics):
        return poses.mean(axis=0)

    def select(self, current, candidates, budget):
        self.asked += 1
        return [chunk for chunk, _ in candidates][:budget]

    def drop(self, candidates):
        return candidates[0][0]


def test_sessions_do_not_share_a_policy_that_has_a_state():
    model = make_model()
    with enable(model, **WORLDKV, retrieval=Stateful()) as handle:
        other, both, of_other = handle.session(OTHER), caches(), caches()
        for chunk in range(3):
            lingbot_chunk(model, chunk, both, 0)
        with other:
            lingbot_chunk(model, 0, of_other, 1)
        policies = handle.memory.config.retrieval, other.memory.config.retrieval
        assert policies[0] is not policies[1] and [policy.asked for policy in policies] == [3, 1]


def test_sessions_left_out_of_order_change_nothing():
    model = make_model()
    with enable(model, **WORLDKV) as handle:
        first, second = handle.session(POSES), handle.session(POSES)
        first.__enter__()
        second.__enter__()
        with pytest.raises(RuntimeError, match="sessions must be left in the opposite order"):
            first.__exit__()
        second.__exit__()
        first.__exit__()
        lingbot_chunk(model, 0, caches(), 0)
        assert handle.stats()["chunks"] == 1  # the handle's own is in place again


def test_another_dtype_than_enable_was_told_is_refused(saved):
    wanted = pytest.raises(
        ValueError, match=r"must be of dtype=torch.bfloat16, as the model was given it, got torch.float32"
    )
    with enable(make_model(), **WORLDKV, dtype=torch.bfloat16) as handle, wanted:
        handle.load(saved)


def test_its_dtype_is_that_of_the_forwards(saved):
    model = make_model(torch.bfloat16)
    with enable(model, **WORLDKV) as handle:
        handle.load(saved)
        with pytest.raises(RuntimeError, match=r"must stay on cpu in torch.float32"):
            small_lingbot.forward(model, 3)
    assert copy.deepcopy(model) is not model

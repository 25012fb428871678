"""A model with a memory under torch.compile: no graph ends at the memory, and what is made is the same to the bit."""

import copy
import gc
import weakref

import pytest
import small_lingbot
import small_matrix_game
import torch
from plain_lingbot_pipeline import WanI2VFast
from small_lingbot import POSES, TOKENS, WORLDKV
from torch._dynamo.utils import counters

from worldkv_kernels import MemoryConfig, WorldMemory
from worldkv_kernels.integrations import matrix_game, named
from worldkv_kernels.integrations.chunks import Chunks
from worldkv_kernels.ops.backends import NAMESPACE

ATTEND = NAMESPACE.attend.default
CONFIG = MemoryConfig(num_layers=2, num_heads=2, head_dim=64, grid=(2, 3), bank_chunks=20, retrieved_chunks=2)


class Plain(WanI2VFast):
    """Its cross-attention's flag is of the host, as published: a tensor's would end a graph."""

    def caches(self, *sizes):
        of_self, of_text = super().caches(*sizes)
        return of_self, [{**cache, "is_init": False} for cache in of_text]


class Graphs:
    """Counts what the compiler makes; backend `name` of torch.compile."""

    def __init__(self, name="eager"):
        self.made = []
        self._compile = torch._dynamo.lookup_backend(name)

    def __call__(self, graph, inputs):
        self.made.append(graph)
        return self._compile(graph, inputs)

    def attends(self):
        return [sum("attend" in str(node.target) for node in graph.graph.nodes) for graph in self.made]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def breaks():
    return list(counters["graph_break"])


@pytest.mark.parametrize("name", ["eager", "aot_eager"])
@pytest.mark.parametrize("options", [{}, {"bank": "host"}], ids=["device", "host"])
def test_the_blocks_of_lingbot_are_one_graph_for_all(name, options):
    model = small_lingbot.make_model(num_layers=3)
    pipe, graphs = Plain(model), Graphs(name)
    handle = small_lingbot.enable(model, **WORLDKV, **options)
    wanted, retrieved = small_lingbot.generate(model, pipe=pipe), handle.stats()["chunks_retrieved"]
    for block in model.blocks:
        block.compile(fullgraph=True, backend=graphs)
    handle.restart(POSES)
    assert torch.equal(small_lingbot.generate(model, pipe=pipe), wanted)
    assert handle.stats()["chunks_retrieved"] == retrieved > 4
    assert graphs.attends() == [1, 1]  # one of the pass that fills the text's cache, one of the others, for all layers
    assert not breaks()


def test_a_pass_of_lingbot_has_no_break_but_its_own():
    model, graphs = small_lingbot.make_model(num_layers=3), Graphs()
    handle = small_lingbot.enable(model, **WORLDKV)
    wanted = small_lingbot.generate(model, pipe=Plain(model))
    handle.restart(POSES)
    compiled = torch.compile(model, backend=graphs)
    assert torch.equal(small_lingbot.generate(compiled, pipe=Plain(compiled)), wanted)
    assert max(graphs.attends()) == 3  # all layers in one graph
    assert len(breaks()) == 1 and "_local_scalar_dense" in breaks()[0]  # of unpatchify, which reads the grid's size


def test_the_blocks_of_matrix_game_have_no_break_but_those_of_the_actions():
    model, graphs = small_matrix_game.plain_model(), Graphs("aot_eager")
    given = small_matrix_game.conditions(*small_matrix_game.actions_of("universal", 6))
    pipe = small_matrix_game.pipeline(model)
    with matrix_game.enable(model, bank_chunks=12, retrieved_chunks=1) as handle:
        wanted, retrieved = small_matrix_game.latents(pipe, given, 6), handle.stats()["chunks_retrieved"]
        model.blocks[1].compile(fullgraph=True, backend=graphs)
        handle.restart()
        assert torch.equal(small_matrix_game.latents(pipe, given, 6), wanted)
        assert set(graphs.attends()) == {1} and not breaks()
        model.blocks[0].compile(backend="eager")  # with the actions, whose caches' indices are read on the host
        assert handle.stats()["chunks_retrieved"] == retrieved > 0
        handle.restart()
        assert torch.equal(small_matrix_game.latents(pipe, given, 2), wanted[:6])
    assert breaks() and not any("worldkv" in reason or "compiler.disable" in reason for reason in breaks())


def make():
    return Chunks("test", WorldMemory(CONFIG, dtype=torch.float32), POSES)


def qkv(dtype=torch.float32):
    return torch.randn(3, TOKENS, 128, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_no_call_is_dropped_none_is_made_of_two_and_their_order_stays(monkeypatch):
    chunks, layers = make(), []
    attend = WorldMemory.attend
    monkeypatch.setattr(
        WorldMemory,
        "attend",
        lambda self, layer, *rest, **options: layers.append(layer) or attend(self, layer, *rest, **options),
    )

    def one_pass(q, k, v):
        for layer in (1, 0, 1, 1):
            out = chunks.attend(layer, q, k, v)
        return out + 1

    with torch.no_grad(), chunks.model_pass(0):
        torch.compile(one_pass, fullgraph=True, backend="aot_eager")(*qkv())
    assert layers == [1, 0, 1, 1]


def test_the_op_is_as_torch_wants_it():
    chunks, q = make(), torch.randn(TOKENS, 128)
    with torch.no_grad(), chunks.model_pass(0):
        torch.library.opcheck(ATTEND, (q, q, q, None, None, chunks._names[1], 2))
    assert torch.Tag.cudagraph_unsafe in ATTEND.tags


def test_its_errors_are_those_of_attend():
    chunks = make()
    attend = torch.compile(lambda q, k, v: chunks.attend(0, q, k, v), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="test: self-attention must run inside the model's forward, got a call"):
            attend(*qkv())
        with (
            chunks.model_pass(0),
            pytest.raises(TypeError, match=r"test: the memory's dtype must be that of q, torch\.bfloat16"),
        ):
            attend(*qkv(torch.bfloat16))
        with chunks.model_pass(0), pytest.raises(ValueError, match="attend: q must have the chunk's 18 tokens, got 17"):
            attend(*qkv()[:, :17])
        with chunks.model_pass(0), pytest.raises(ValueError, match="layer must be from 0 to 1, got 2"):
            chunks.attend(2, *qkv())
        of_none = make()._names[0]
        gc.collect()
        with pytest.raises(RuntimeError, match="must run while its model is enabled, got a compiled pass of one"):
            ATTEND(*qkv(), None, None, of_none, 2)


def test_compiled_code_holds_no_memory_of_a_model_that_is_disabled():
    model, graphs = small_lingbot.make_model(), Graphs()
    handle = small_lingbot.enable(model)
    for block in model.blocks:
        block.compile(fullgraph=True, backend=graphs)
    small_lingbot.generate(model, 9, pipe=Plain(model))
    kept, count = weakref.ref(handle.memory), len(named._BY_NUMBER)
    handle.disable()
    del handle
    gc.collect()
    assert graphs.made and kept() is None and len(named._BY_NUMBER) < count
    handle = small_lingbot.enable(model)  # and the next one is found by the code compiled for it
    small_lingbot.generate(model, 9, pipe=Plain(model))
    assert handle.stats()["chunks"] == 3


def test_a_copy_has_a_number_of_its_own():
    chunks = make()
    other = copy.deepcopy(chunks)
    attend = torch.compile(lambda of, q, k, v: of.attend(0, q, k, v), fullgraph=True, backend="eager")
    with torch.no_grad(), other.model_pass(0):
        attend(other, *qkv())
        with pytest.raises(RuntimeError, match="got a call outside"):
            attend(chunks, *qkv())

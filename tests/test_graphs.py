"""Passes captured in CUDA graphs: chunks may be made of replays alone."""

import numpy as np
import pytest
import torch

from worldkv_kernels import MemoryConfig, WorldMemory
from worldkv_kernels.ops.all import OPS
from worldkv_kernels.trajectory import latent_poses, load

CHUNKS, TOKENS, DIM, LAYERS = 9, 3 * 6, 2 * 64, 2
POSES = latent_poses(load("right*60,left*60"))[0][: 3 * CHUNKS]


def make(device, **options):
    config = MemoryConfig(
        num_layers=LAYERS, num_heads=2, head_dim=64, grid=(2, 3), retrieved_chunks=2, bank_chunks=CHUNKS, **options
    )
    return WorldMemory(config, device=device, dtype=torch.float32 if device == "cpu" else torch.bfloat16)


def inputs(memory, chunk):
    generator = torch.Generator().manual_seed(chunk)
    branches = [memory.config.branches] * (memory.config.branches > 1)
    return torch.randn(LAYERS, 3, *branches, TOKENS, DIM, generator=generator).to(memory.device, memory.dtype)


def made(memory, one_pass):
    """What each chunk's last layer attends to, of a pass that is given the chunk's inputs."""
    outs = []
    for chunk in range(CHUNKS):
        memory.begin_chunk(POSES[3 * chunk : 3 * chunk + 3])
        memory.wait()
        outs.append(one_pass(inputs(memory, chunk)).clone())
        memory.end_chunk()
    return outs


def eager(memory):
    def one_pass(x):
        return [memory.attend(layer, *x[layer]) for layer in range(LAYERS)][-1]

    return one_pass


def test_a_replay_counts_as_a_pass():
    memory = make("cpu")
    memory.begin_chunk(POSES[:3])
    with pytest.raises(RuntimeError, match=r"end_chunk: chunk 0 must attend every layer, got none for layers \[0, 1\]"):
        memory.end_chunk()
    memory.replayed()
    memory.end_chunk()
    assert memory.stats()["chunks"] == 1
    memory.begin_chunk(POSES[3:6])
    with pytest.raises(RuntimeError, match="chunk 1 must attend every layer"):
        memory.end_chunk()  # a replay counts for its own chunk alone


def test_a_replay_outside_a_chunk_is_told():
    with pytest.raises(RuntimeError, match="replayed: a chunk must be begun"):
        make("cpu").replayed()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bank": "host"},
        {"mode": "full"},
        {"recent_frames": 0, "sink_frames": 0},
        {"bank_bits": 8},
        {"bank": "host", "bank_bits": 4},
        {"mass_layers": (1,)},
    ],
)
def test_warming_up_changes_nothing(options, monkeypatch):
    """And runs each op as chunks do: what is compiled, checked and chosen is theirs."""
    of_chunks, of_warm_up = {}, {}

    def noting(seen, op):
        choose = op.choose

        def noted(requested, device, kind, shape=None):
            seen.setdefault(op.op, set()).add((requested, kind, shape))
            return choose(requested, device, kind, shape)

        return noted

    device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = made(plain := make(device, **options), eager(plain))
    memory = make(device, **options)
    for layer in range(LAYERS):
        for pool in memory.pools(layer):
            pool.fill_(torch.nan)  # as storage that is not initialised may hold
    with monkeypatch.context() as patched:
        for op in OPS:
            patched.setattr(op, "choose", noting(of_warm_up, op))
        memory.warm_up()
    first = memory.begin_chunk(POSES[:3]).segments[-1][2].first_row
    memory.abort_chunk()
    for layer in range(LAYERS):
        assert not any(pool[first : first + TOKENS].any() for pool in memory.pools(layer))
    with monkeypatch.context() as patched:
        for op in OPS:
            patched.setattr(op, "choose", noting(of_chunks, op))
        got = made(memory, eager(memory))
    assert all(map(torch.equal, got, wanted))
    assert of_warm_up == of_chunks and len(of_chunks) == (
        2 if options.get("mode") == "full" else 5 if "bank_bits" in options else 3
    )
    with pytest.raises(RuntimeError, match="warm_up: the memory must be new or reset, got one at chunk 9"):
        memory.warm_up()
    memory.reset()
    memory.warm_up()
    assert all(map(torch.equal, made(memory, eager(memory)), wanted))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bank": "host"},
        {"rebase_time": True},
        {"bank_bits": 4},
        {"bank": "host", "bank_bits": 8},
        {"retrieval": "content", "recent_frames": 0},
        {"mass_layers": (1,)},
        {"branches": 2, "mass_layers": (0,)},
    ],
    ids=["device", "host", "rebase", "4 bits", "host, 8 bits", "by content", "mass", "branches"],
)
def test_chunks_made_by_replays_are_those_of_the_ops(options):
    """Of a graph captured where nothing is retrieved yet."""
    wanted = made(plain := make("cuda", **options), eager(plain))
    memory = make("cuda", **options)
    held = torch.empty_like(inputs(memory, 0))
    graph, result = torch.cuda.CUDAGraph(), []

    def one_pass(x):
        held.copy_(x)
        if not result:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                eager(memory)(held)  # compiles and checks the kernels
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph):
                result.append(eager(memory)(held))
        graph.replay()
        memory.replayed()
        return result[0]

    got = made(memory, one_pass)
    assert memory.stats()["chunks_retrieved"] > CHUNKS // 2
    assert memory.received() == plain.received() and bool(memory.received()) == ("mass_layers" in options)
    assert all(np.array_equal(*(x.float().cpu().numpy() for x in pair)) for pair in zip(got, wanted, strict=True))

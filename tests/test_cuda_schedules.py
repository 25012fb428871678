"""The CUDA kernels in any order of their threads and blocks, over any memory: on a CPU by way of cuda_on_host."""

from importlib import import_module
from unittest import mock

import pytest
import torch
from conftest import APPEND_BACKENDS, ATTENTION_BACKENDS, COMPRESS_BACKENDS, DEVICE, moved, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from worldkv_kernels import Rope3D, RopeTable, norm_rope_append
from worldkv_kernels.ops import cuda

pytestmark = pytest.mark.usefixtures("cuda_kernels")
UNTOUCHED = -77.0
PADS = st.permutations([0, 8, 16, 24])
SEEDS = st.integers(0, 2**32)


def bits(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def order_threads_by(seed):
    """On a GPU the order is the device's own."""
    getattr(import_module("worldkv_kernels._cuda"), "seed", lambda seed: None)(seed)


def surrounded(layers, rows, heads, head_dim, dtype, pad):
    """Storage full of UNTOUCHED, and a view [layers, rows, heads, head_dim] in it: `pad` sets its strides apart.

    8 KB or more follow, more than a warp that misses its end writes at a time.
    """
    shape = (layers, rows + 2 + 4096 // (heads * head_dim) + pad // 8, heads * head_dim + pad)
    storage = torch.full(shape, UNTOUCHED, dtype=dtype, device=DEVICE)
    return storage, storage[:, 2 : 2 + rows, : heads * head_dim].unflatten(2, (heads, head_dim))


def only_view_changed(storage, view):
    """Whether everything in `storage` but `view` is untouched."""
    view.fill_(UNTOUCHED)
    return bool((storage == UNTOUCHED).all())


def compress(seed, k, v, out_k, out_v, index, **arguments):
    """Launches over a workspace of garbage, with garbage around it that must stay. Returns the workspace."""
    generator = torch.Generator().manual_seed(seed)
    made = []

    def empty(words, **kwargs):
        garbage = torch.randint(-(2**31), 2**31, (words + 64,), generator=generator).to(torch.int32).to(DEVICE)
        made.append((garbage, garbage.clone(), words))
        return garbage[:words]

    order_threads_by(seed)
    with mock.patch.object(torch, "empty", empty):
        cuda.compress_chunk(k, v, out_k, out_v, index, None, **arguments)
    [(workspace, before, words)] = made
    assert torch.equal(workspace[words:], before[words:])
    return workspace[:words].cpu()


def similarities_of_keys(keys):
    """What a kernel's 32-bit keys stand for."""
    keys = keys.long() & 0xFFFFFFFF
    unsigned = torch.where(keys >= 2**31, keys - 2**31, 2**32 - 1 - keys)
    return torch.where(unsigned >= 2**31, unsigned - 2**32, unsigned).to(torch.int32).view(torch.float32)


def selected_by_sorting(keys, frames, keep, pooled, anchor):
    """Tokens by a stable sort of one layer's keys."""
    frame_tokens = len(keys) // (frames - 1)
    others = [t for t in range(frames * frame_tokens) if t // frame_tokens != anchor]
    groups = 1 if pooled else frames - 1
    kept = list(range(anchor * frame_tokens, (anchor + 1) * frame_tokens))
    for group, of_group in enumerate((keys.long() & 0xFFFFFFFF).view(groups, -1)):
        places = of_group.argsort(stable=True)[: keep * (frames - 1) // groups] + group * len(of_group)
        kept += sorted(others[place] for place in places.tolist())
    return kept


@st.composite
def chunks(draw):
    frames, frame_tokens = draw(st.integers(1, 4)), draw(st.integers(1, 45))
    return dict(
        frames=frames, frame_tokens=frame_tokens, heads=draw(st.sampled_from([1, 2, 3, 9])),
        head_dim=draw(st.sampled_from([64, 128])), layers=draw(st.integers(1, 4)),
        keep=draw(st.integers(1, frame_tokens)), pooled=draw(st.booleans()), anchor=draw(st.integers(0, frames - 1)),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])), pads=draw(PADS),
        distinct=draw(st.sampled_from([1, 3, 1000])), special=draw(st.sampled_from([0.0, 0.1])),
    )  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(chunks(), SEEDS)
def test_compress_selects_by_its_scores_and_copies_nothing_else(case, seed):
    """Ties by repeated rows, zero and NaN rows, strides of layers and rows; the selection against a stable sort."""
    frames, frame_tokens, heads, head_dim = (case[x] for x in ("frames", "frame_tokens", "heads", "head_dim"))
    layers, keep, pooled, anchor, pads = (case[x] for x in ("layers", "keep", "pooled", "anchor", "pads"))
    tokens, generator = frames * frame_tokens, torch.Generator().manual_seed(seed)
    of_row = torch.randint(0, min(case["distinct"], layers * tokens), (layers, tokens), generator=generator)
    rows = torch.randn(layers * tokens, heads, head_dim, generator=generator)
    special = torch.rand(layers, tokens, generator=generator) < case["special"]
    k_storage, k = surrounded(layers, tokens, heads, head_dim, case["dtype"], pads[0])
    v_storage, v = surrounded(layers, tokens, heads, head_dim, case["dtype"], pads[1])
    k.copy_(rows[of_row])
    k[special] = torch.tensor([0.0, float("nan")])[of_row[special] % 2].to(k)[:, None, None]
    v.copy_(torch.randn(v.shape, generator=generator))
    kept = frame_tokens + keep * (frames - 1)
    outs = [surrounded(layers, kept, heads, head_dim, case["dtype"], pad) for pad in pads[2:]]
    index = torch.full((layers + 2, kept), -1, dtype=torch.int32, device=DEVICE)
    inputs = [bits(storage).clone() for storage in (k_storage, v_storage)]

    workspace = compress(
        seed, k, v, outs[0][1], outs[1][1], index[1:-1], frames=frames, keep=keep, pooled=pooled, anchor=anchor
    )

    assert (index[0] == -1).all() and (index[-1] == -1).all()
    assert torch.equal(bits(k_storage), inputs[0]) and torch.equal(bits(v_storage), inputs[1])
    for layer in range(layers):
        chosen = index[1 + layer].tolist()
        if keep == frame_tokens or frames == 1:
            whole = list(range(tokens))
            first = whole[anchor * frame_tokens : (anchor + 1) * frame_tokens]
            assert chosen == first + [t for t in whole if t not in first]
        else:
            begin = layers * heads * head_dim + layer * (tokens - frame_tokens)
            keys = workspace[begin : begin + tokens - frame_tokens]
            assert chosen == selected_by_sorting(keys, frames, keep, pooled, anchor)
            check_scores(similarities_of_keys(keys), k[layer].cpu(), frames, anchor)
        assert torch.equal(bits(outs[0][1][layer].contiguous()), bits(k[layer][chosen]))
        assert torch.equal(bits(outs[1][1][layer].contiguous()), bits(v[layer][chosen]))
    assert all(only_view_changed(*out) for out in outs)


def check_scores(scores, k, frames, anchor):
    """Within fp32 of float64, NaN as infinity, and the same bits for the same rows."""
    k = k.double().reshape(frames, len(k) // frames, -1)
    mean = k[anchor].mean(0)
    others = k[[f for f in range(frames) if f != anchor]].flatten(0, 1)
    want = (others * mean).sum(-1) / (others.norm(dim=-1) * mean.norm() + 1e-8)
    assert torch.equal(scores.isinf(), want.isnan()) and not scores.isnan().any()
    assert ((scores - want)[~want.isnan()].abs() <= 1e-6).all()
    same = (others[:, None] == others).all(-1)
    assert (bits(scores)[:, None] == bits(scores))[same].all()


@pytest.mark.parametrize("pooled", [True, False])
def test_any_order_of_threads_gives_the_same_bits(pooled):
    """Outputs, mean keys, scores and counters, in 20 orders over 20 workspaces of garbage."""
    k, v = torch.randn(2, 3, 3 * 33, 2, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    kept = 33 + 2 * 9
    results = []
    for seed in range(20):
        out_k, out_v = torch.full((2, 3, kept, 2, 64), UNTOUCHED, dtype=k.dtype, device=DEVICE)
        index = torch.full((3, kept), -1, dtype=torch.int32, device=DEVICE)
        workspace = compress(seed, k, v, out_k, out_v, index, frames=3, keep=9, pooled=pooled, anchor=1)
        results.append([workspace, *(bits(x).cpu() for x in (out_k, out_v, index))])
    for result in results[1:]:
        assert all(torch.equal(got, want) for got, want in zip(result, results[0], strict=True))


@st.composite
def tokens_to_append(draw):
    return dict(
        grid=draw(st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 2))),
        heads=draw(st.sampled_from([(1, 1), (2, 1), (7, 7), (12, 12), (16, 2), (17, 17), (33, 11), (40, 40), (41, 1),
                                    (64, 64)])),
        head_dim=draw(st.sampled_from([64, 128])),
        dtype=draw(st.sampled_from([torch.bfloat16, torch.float16])), pads=draw(PADS),
        weights=draw(st.tuples(*[st.sampled_from(["none", "same", "float"])] * 2)),
        roped=draw(st.booleans()), on_device=draw(st.booleans()), round_before_rope=draw(st.booleans()),
        first_row=draw(st.integers(0, 5)), start_frame=draw(st.integers(0, 10**7)),
        eps=draw(st.sampled_from([1e-6, 0.5])),
    )  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(tokens_to_append(), SEEDS)
def test_append_agrees_with_the_reference_and_writes_nothing_else(case, seed):
    (heads, kv_heads), head_dim, dtype, first_row = (case[x] for x in ("heads", "head_dim", "dtype", "first_row"))
    tokens = case["grid"][0] * case["grid"][1] * case["grid"][2]
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(tokens, of * head_dim + pad, generator=generator).to(DEVICE, dtype)[:, : of * head_dim]
        for of, pad in zip((heads, kv_heads, kv_heads), case["pads"][1:], strict=True)
    )
    dtypes = {"same": dtype, "float": torch.float32}
    q_weight, k_weight = (
        torch.randn(of * head_dim, generator=generator).to(DEVICE, dtypes[kind]) if kind in dtypes else None
        for of, kind in zip((heads, kv_heads), case["weights"], strict=True)
    )
    where = dict(first_row=first_row, rope=Rope3D(head_dim), start_frame=case["start_frame"])
    if case["on_device"]:
        rope = RopeTable(where["rope"], case["grid"], device=DEVICE, start_frame=case["start_frame"])
        where = dict(first_row=torch.tensor([first_row], device=DEVICE), rope=rope)
    if not case["roped"]:
        where["rope"] = None

    def run(backend):
        order_threads_by(seed)
        stores = [
            surrounded(1, tokens + 5, of, head_dim, dtype, pad)
            for of, pad in zip((kv_heads, kv_heads, heads), case["pads"][:3], strict=True)
        ]
        norm_rope_append(
            q, k, v, stores[0][1][0], stores[1][1][0], **where, grid=case["grid"], q_weight=q_weight, k_weight=k_weight,
            round_before_rope=case["round_before_rope"], eps=case["eps"], out=stores[2][1][0, :tokens], backend=backend,
        )  # fmt: skip
        written = [stores[i][1][0, first_row : first_row + tokens] for i in range(2)] + [stores[2][1][0, :tokens]]
        results = [x.clone() for x in written]
        assert all(only_view_changed(store[0], x) for store, x in zip(stores, written, strict=True))
        return results

    got, want = run("cuda"), run("reference")
    assert torch.equal(got[1], v.reshape(got[1].shape))
    for i in (0, 2):
        assert relative_error(got[i], want[i]) <= {torch.bfloat16: 1.5e-3, torch.float16: 2e-4}[dtype]


@pytest.mark.parametrize("op", [COMPRESS_BACKENDS, APPEND_BACKENDS, ATTENTION_BACKENDS], ids=lambda op: op.op)
def test_the_check_on_first_use_passes_for_every_kind(op):
    reason = op.backends["cuda"].unavailable(DEVICE)  # of attention also on a GPU that is no Hopper
    if reason:
        pytest.skip(reason)
    for kind in op.kinds:
        if op is COMPRESS_BACKENDS and "nearest" in kind:
            assert op.backends["cuda"].unsupported(kind) == "it prunes by rule='similarity', and merges nothing"
            continue
        if op is ATTENTION_BACKENDS and kind[1:3] == (128, 64) and kind[5]:
            wanted = "it takes weights of segments where up to 24 pairs turn, not 64"
            assert op.backends["cuda"].unsupported(kind) == wanted
            continue
        assert op.backends["cuda"].unsupported(kind) is None
        assert op.disagreement("cuda", DEVICE, kind) is None, kind


def call_of_compress(**changes):
    k, v, out_k, out_v = torch.zeros(4, 1, 8, 2, 64, device=DEVICE)
    index = torch.zeros(1, 6, dtype=torch.int32, device=DEVICE)
    arguments = dict(
        k=k, v=v, out_k=out_k[:, :6], out_v=out_v[:, :6], index=index, count=None, frames=2, keep=2, pooled=True,
        anchor=0,
    )  # fmt: skip
    cuda.compress_chunk(**{**arguments, **changes})


def call_of_append(heads=2, tokens=2, **changes):
    x = torch.zeros(tokens, heads * 64, dtype=torch.bfloat16, device=DEVICE)
    pool = x.view(tokens, heads, 64)
    arguments = dict(
        q=x, k=x, v=x, k_pool=pool, v_pool=pool.clone(), q_out=pool.clone(), table=None, first_row=0,
        grid=(1, 1, 2), pairs=(0, 0, 0), q_weight=None, k_weight=None, eps=1e-6, round_before_rope=True,
    )  # fmt: skip
    cuda.norm_rope_append(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("call", "changes", "error", "message"),
    [
        (call_of_compress, {"anchor": 2}, ValueError, "frames, frame_tokens, keep and anchor must be in range"),
        (call_of_compress, {"keep": 0}, ValueError, "frames, frame_tokens, keep and anchor must be in range"),
        (call_of_compress, {"k": torch.zeros(1, 8, 2, 64).expand(65536, -1, -1, -1)}, ValueError,
         "1 to 65535 layers .*, got 65536"),
        (call_of_compress, {"k": torch.zeros(1, 8, 2, 32)}, ValueError, "1 to 128 heads with head_dim 64 or 128"),
        (call_of_compress, {"k": torch.zeros(8 * 130).as_strided((1, 8, 2, 64), (0, 130, 64, 1))}, ValueError,
         "k must have"),
        (call_of_append, {"heads": 129}, ValueError, "q must be of 1 to 64 heads with .*, got 129 with"),
        (call_of_append, {"k_pool": torch.zeros(2, 3, 64)}, ValueError, "k_pool must be of 1 to 2 heads, got 3"),
        (call_of_append, {"tokens": 0}, RuntimeError, "launch failed: invalid (configuration )?argument"),
        (call_of_append, {"q": torch.zeros(2, 128)}, ValueError, "q must be bfloat16 or float16"),
        (call_of_append, {"q_weight": torch.zeros(129)[1:]}, ValueError, "q_weight must have rows aligned to 16"),
    ],
)  # fmt: skip
def test_the_binding_refuses_what_the_kernel_does_not_take(call, changes, error, message):
    changes = {name: moved(x) if isinstance(x, torch.Tensor) else x for name, x in changes.items()}
    with pytest.raises(error, match=message):
        call(**changes)
    call()  # the next one is as good as any


def test_a_workspace_that_is_too_small_is_refused():
    module = import_module("worldkv_kernels._cuda")

    def with_a_byte_less(compress=module.compress_chunk, **arguments):
        compress(**{**arguments, "workspace_bytes": arguments["workspace_bytes"] - 1})

    shorter = mock.patch.object(module, "compress_chunk", with_a_byte_less)
    with shorter, pytest.raises(ValueError, match="workspace must be of 536 bytes, got 535"):
        call_of_compress()

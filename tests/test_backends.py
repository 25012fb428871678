"""The choice of a backend: availability, the first-use check, the fallback, and what doctor says."""

import json
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.utils.backend_registration
from conftest import DEVICE

from worldkv_kernels import Rope3D, Segment, Window, norm_rope_append, segment_attention
from worldkv_kernels.cli import doctor, main
from worldkv_kernels.ops import cuda, proven
from worldkv_kernels.ops.backends import LIBRARY, Backend, Cannot, OpBackends, on_current_device
from worldkv_kernels.ops.compress_chunk import BACKENDS as COMPRESS
from worldkv_kernels.ops.norm_rope_append import BACKENDS as APPEND
from worldkv_kernels.ops.segment_attention import BACKENDS as ATTENTION

CPU = torch.device("cpu")
GPU = torch.device("cuda:0")
KIND = (torch.float32,)


@pytest.fixture
def op(monkeypatch, tmp_path):
    """An op with three implementations that write 1, as seen from a GPU that need not be there."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    proven._lists.cache_clear()

    def writes(value):
        return lambda out: out.fill_(value)

    def small_case(device, kind):
        def call(run):
            out = torch.full((4,), float("nan"))
            run(out)
            return {"out": out}

        return call

    runs = {name: writes(1.0) for name in ("cuda", "triton", "reference")}
    backends = {name: Backend(lambda name=name: runs[name]) for name in runs}
    made = OpBackends("some_op", backends, small_case, lambda kind: 1e-6, (KIND,))
    made.runs, made.writes = runs, writes
    yield made
    proven._lists.cache_clear()


def test_an_unproven_cuda_kernel_is_not_taken_and_a_proven_one_is(op):
    assert op.choose("auto", GPU, KIND) is op.runs["triton"]
    assert "no run has proven it on sm_90" in op.passed_over("cuda", GPU, KIND)
    path = proven.record("some_op", GPU)
    assert json.loads(path.read_text()) == {"cuda": {"some_op": ["sm_90"]}}
    op.forget()
    assert op.choose("auto", GPU, KIND) is op.runs["cuda"]


@pytest.mark.parametrize("wrong", [1.1, float("nan")])
def test_a_wrong_kernel_is_passed_over_with_one_warning(op, wrong):
    op.runs["triton"] = op.writes(wrong)
    with pytest.warns(UserWarning, match="worldkv some_op: the triton kernel is not used on cuda:0: its out differs"):
        assert op.choose("auto", GPU, KIND) is op.runs["reference"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert op.choose("auto", GPU, KIND) is op.runs["reference"]
    assert "its out differs from the reference's" in op.passed_over("triton", GPU, KIND)


def test_a_kernel_that_does_not_compile_is_passed_over(op):
    def broken(out):
        raise RuntimeError("no such instruction")

    op.runs["triton"] = broken
    with pytest.warns(UserWarning, match="failed on a small case: RuntimeError: no such instruction"):
        assert op.choose("auto", GPU, KIND) is op.runs["reference"]


def test_the_check_can_be_switched_off_and_does_not_run_in_a_capture(op, monkeypatch):
    op.runs["triton"] = op.writes(2.0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert op.choose("auto", GPU, KIND) is op.runs["triton"]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("WORLDKV_SELF_CHECK", "0")
    assert op.choose("auto", GPU, KIND) is op.runs["triton"]
    op.forget()
    monkeypatch.delenv("WORLDKV_SELF_CHECK")
    with pytest.warns(UserWarning, match="is not used"):
        assert op.choose("auto", GPU, KIND) is op.runs["reference"]


def test_what_a_backend_cannot_run_is_an_error_when_asked_for_and_skipped_by_auto(op):
    op.backends["triton"] = Backend(lambda: op.runs["triton"], unsupported=lambda kind: "it takes fp16 alone")
    with pytest.raises(ValueError, match="some_op: backend must be able to run this on cuda:0, got 'triton': it takes"):
        op.choose("triton", GPU, KIND)
    assert op.choose("auto", GPU, KIND) is op.runs["reference"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"cuda": []}', '{"cuda": {"some_op": 9}}', '{"cuda": {"x": [[]]}}', "[" * 10**5]
)
def test_a_damaged_list_of_proofs_is_an_error(op, text):
    proven.user_list().parent.mkdir(parents=True)
    proven.user_list().write_text(text)
    for use in (lambda: op.passed_over("cuda", GPU, KIND), lambda: proven.record("some_op", GPU)):
        with pytest.raises(ValueError, match=r"proven.json must hold {'cuda': {op: \[architectures\]}}, got"):
            use()
    assert proven.user_list().read_text() == text


def corrupted(run, spoil):
    """`run`, and then `spoil` on what it was to write."""

    def wrong(*tensors, **options):
        run(*tensors, **options)
        spoil(tensors)

    return wrong


def test_a_backend_is_forced_where_an_op_has_it(op, monkeypatch):
    monkeypatch.setenv("WORLDKV_BACKEND", "reference")
    assert op.choose("auto", GPU, KIND) is op.runs["reference"] and op.name("auto", GPU, KIND) == "reference"
    assert op.choose("triton", GPU, KIND) is op.runs["triton"]  # what a call names goes first
    monkeypatch.setenv("WORLDKV_BACKEND", "sdpa")
    assert op.choose("auto", GPU, KIND) is op.runs["triton"]  # it has none
    for name in ("auto", ""):
        monkeypatch.setenv("WORLDKV_BACKEND", name)
        assert op.choose("auto", GPU, KIND) is op.runs["triton"]
    monkeypatch.setenv("WORLDKV_BACKEND", "tpu")
    wanted = "WORLDKV_BACKEND must be auto or one of 'cuda', 'triton', 'sdpa', 'reference', got 'tpu'"
    for name in (op.name, op.choose):
        with pytest.raises(ValueError, match=wanted):
            name("auto", GPU, KIND)
    op.backends["triton"] = Backend(lambda: op.runs["triton"], unsupported=lambda kind: "it takes fp16 alone")
    op.forget()
    monkeypatch.setenv("WORLDKV_BACKEND", "triton")
    with pytest.raises(ValueError, match="some_op: backend must be able to run this on cuda:0, got 'triton': it takes"):
        op.choose("auto", GPU, KIND)


def test_an_unmodified_call_takes_the_forced_backend(monkeypatch):
    ran = []
    for name in ("sdpa", "reference"):
        run = ATTENTION.run(name)
        monkeypatch.setitem(
            ATTENTION.loaded, name, lambda *x, run=run, name=name, **y: ran.append(name) or run(*x, **y)
        )
    monkeypatch.setenv("WORLDKV_SELF_CHECK", "0")
    ATTENTION.forget()
    pool, window = torch.randn(128, 2, 64), Window([Segment(0, 100)], device=CPU)
    for name in ("", "reference", "sdpa"):
        monkeypatch.setenv("WORLDKV_BACKEND", name)
        segment_attention(pool[:3], pool, pool, window)
    assert ran == ["sdpa", "reference", "sdpa"]
    monkeypatch.setenv("WORLDKV_BACKEND", "sdpa")
    with pytest.raises(ValueError, match="got 'sdpa': PyTorch's attention gives no softmax weight"):
        segment_attention(pool[:3], pool, pool, window, return_mass=True)
    ATTENTION.forget()


def test_strict_makes_an_error_of_a_fallback(op, monkeypatch):
    monkeypatch.setenv("WORLDKV_STRICT", "1")
    passes = "some_op: WORLDKV_STRICT=1, and auto passes over {} on cuda:0: "
    with pytest.raises(RuntimeError, match=passes.format("cuda") + "no run has proven it on sm_90"):
        op.choose("auto", GPU, KIND)
    op.backends["cuda"] = Backend(lambda: None, lambda device: "the extension is not built")
    with pytest.raises(RuntimeError, match=passes.format("cuda") + "the extension is not built"):
        op.choose("auto", GPU, KIND)
    op.backends["cuda"] = Backend(lambda: None, lambda device: Cannot("it is for another card"))
    assert op.choose("auto", GPU, KIND) is op.runs["triton"]
    op.backends["cuda"] = Backend(lambda: None, unsupported=lambda kind: "it takes fp16 alone")
    op.forget()
    assert op.choose("auto", GPU, KIND) is op.runs["triton"]
    op.runs["triton"] = op.writes(1.1)
    op.loaded.clear()
    op.forget()
    with pytest.warns(UserWarning, match="is not used"), pytest.raises(RuntimeError, match="triton on cuda:0: its out"):
        op.choose("auto", GPU, KIND)
    monkeypatch.setenv("WORLDKV_STRICT", "0")
    assert op.choose("auto", GPU, KIND) is op.runs["reference"]
    monkeypatch.setenv("WORLDKV_STRICT", "1")
    with pytest.raises(RuntimeError, match="triton on cuda:0: its out differs"):  # once chosen, too
        op.choose("auto", GPU, KIND)
    assert op.choose("reference", GPU, KIND) is op.runs["reference"]


def test_what_no_installation_changes_is_no_fallback(monkeypatch):
    """On a CPU, of every op, Triton without its interpreter included; a planted wrong kernel is one."""
    monkeypatch.setenv("WORLDKV_STRICT", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for table in (ATTENTION, APPEND, COMPRESS):
        for kind in table.kinds[:4]:
            table.choose("auto", CPU, kind)
    kind = (torch.float32, 64, 0, False, False, False, False, True, True)
    monkeypatch.setitem(ATTENTION.loaded, "sdpa", corrupted(ATTENTION.run("sdpa"), lambda x: x[OUT].mul_(1.05)))
    ATTENTION.forget()
    refused = "passes over sdpa on cpu: its out differs"
    with pytest.warns(UserWarning, match="the sdpa kernel is not used"), pytest.raises(RuntimeError, match=refused):
        ATTENTION.choose("auto", CPU, kind)
    monkeypatch.setitem(
        ATTENTION.backends, "sdpa", replace(ATTENTION.backends["sdpa"], unavailable=lambda device: "torch has none")
    )
    with pytest.raises(RuntimeError, match="passes over sdpa on cpu: torch has none"):
        ATTENTION.choose("auto", CPU, kind)
    ATTENTION.forget()


OUT, LSE, MASS = 9, 10, 11  # places among segment_attention's tensors
K_POOL, Q_OUT = 3, 5  # among those of norm_rope_append


@pytest.mark.parametrize(
    ("op", "output", "spoil"),
    [
        (ATTENTION, "out", lambda x: x[OUT].mul_(1.05)),
        (ATTENTION, "out", lambda x: x[OUT][-1].zero_()),
        (ATTENTION, "lse", lambda x: x[LSE].add_(0.02)),
        (ATTENTION, "mass", lambda x: x[MASS].copy_(x[MASS].flip(0))),
        (ATTENTION, "mass", lambda x: x[MASS].zero_()),
        (APPEND, "q", lambda x: x[Q_OUT][-1].zero_()),
        (APPEND, "k", lambda x: x[K_POOL].mul_(1.05)),
        (APPEND, "rows beside", lambda x: x[K_POOL][35].zero_()),
        (COMPRESS, "index", lambda x: x[4].add_(1)),
        (COMPRESS, "v", lambda x: x[3][1, -1].zero_()),
    ],
)
def test_the_check_looks_at_each_output_by_itself(monkeypatch, op, output, spoil):
    kind = op.kinds[0] if op is not ATTENTION else (torch.bfloat16, 128, 0, True, True, False, False, True, True)
    assert kind[0] == torch.bfloat16
    monkeypatch.setitem(op.loaded, "triton", op.run("reference"))
    assert op.disagreement("triton", CPU, kind) is None
    monkeypatch.setitem(op.loaded, "triton", corrupted(op.run("reference"), spoil))
    assert op.disagreement("triton", CPU, kind).startswith(f"its {output} differs from the reference's ")


@pytest.mark.parametrize("op", [ATTENTION, APPEND, COMPRESS], ids=lambda op: op.op)
def test_autocast_touches_neither_the_reference_nor_the_check(op):
    kind = next(kind for kind in reversed(op.kinds) if kind[0] == torch.float16)
    want = op.small_case(CPU, kind)(op.run("reference"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        case = op.small_case(CPU, kind)
        got = case(op.run("reference"))
        assert op.disagreement("reference", CPU, kind) is None
    assert all(torch.equal(got[name].nan_to_num(), x.nan_to_num()) for name, x in want.items())


def test_attention_from_pools_that_the_copy_engine_does_not_take_is_a_kind_of_its_own(monkeypatch):
    seen = []
    monkeypatch.setattr(ATTENTION, "choose", lambda *x: seen.append(x[2]) or (lambda *x, **y: None))
    window, pool = Window([Segment(0, 100)], device=CPU), torch.zeros(128, 2, 64)
    by_heads = torch.zeros(2, 128, 64).transpose(0, 1)
    for pools in ((pool, pool), (pool, by_heads), (by_heads, pool), (pool[:, :1], by_heads[:, :1])):
        segment_attention(torch.zeros(3, pools[0].shape[1], 64), *pools, window)
    assert [kind[7] for kind in seen] == [True, False, False, True]


def test_attention_from_what_the_cuda_kernel_does_not_take_is_a_kind_of_its_own(monkeypatch):
    seen = []
    monkeypatch.setattr(ATTENTION, "choose", lambda *x: seen.append(x[2]) or (lambda *x, **y: None))
    segments, pool = [Segment(0, 100)], torch.zeros(128, 2, 64, dtype=torch.float16)
    q, odd = pool[:3], torch.zeros(400, dtype=torch.float16)[1:385].view(3, 2, 64)
    window, turned = Window(segments, device=CPU), Window(segments, device=CPU, rope=Rope3D(64, pairs=(7, 20, 5)))
    segment_attention(q, pool, pool, window)
    segment_attention(odd, pool, pool, window)
    segment_attention(q, pool, pool, turned, out=odd)
    assert seen == [(torch.float16, 64, *rest) for rest in (
        (0, False, False, False, False, True, True), (0, False, False, False, False, True, False),
        (7, False, False, False, False, True, False),
    )]  # fmt: skip


def test_grouped_heads_are_kinds_of_their_own(monkeypatch):
    seen = []
    for op in (ATTENTION, APPEND):
        monkeypatch.setattr(op, "choose", lambda *x: seen.append(x[2]) or (lambda *x, **y: None))
    q, pool = torch.zeros(8, 4, 64), torch.zeros(128, 2, 64)
    segment_attention(q, pool, pool, Window([Segment(0, 100)], device=CPU))
    norm_rope_append(q.flatten(1), *torch.zeros(2, 8, 128), pool, pool.clone(), 0, rope=None, grid=(2, 2, 2))
    assert seen == [
        (torch.float32, 64, 0, False, False, False, True, True, True),
        (torch.float32, 4, 2, 64, None, None, False, True, True),
    ]


def test_the_check_of_grouped_heads_looks_at_such():
    seen = []
    for kind in [(torch.float16, 64, 0, False, False, False, grouped, True, True) for grouped in (False, True)]:
        ATTENTION.small_case(CPU, kind)(lambda q, k, v, *x, **y: seen.append((q.shape[1], k.shape[1], v.shape[1])))
    assert seen == [(2, 2, 2)] * 2 + [(4, 2, 2)] * 2  # in two windows each
    kind = (torch.float16, 4, 2, 64, None, torch.float16, True, True, True)
    APPEND.small_case(CPU, kind)(lambda q, k, v, *x, k_weight, **y: seen.append((q.shape, k.shape, len(k_weight))))
    assert seen[4:] == [((30, 256), (30, 128), 128)]


def test_the_check_of_what_is_not_aligned_looks_at_such(monkeypatch):
    aligned = []
    for is_aligned in (True, False):
        kind = (torch.float16, 64, 0, False, False, False, False, True, is_aligned)
        ATTENTION.small_case(CPU, kind)(lambda q, k, v, *x, **y: aligned.append(cuda.attention_aligned(q, k, v, q)))
    assert aligned == [True, True, False, False]


def test_the_gpu_of_the_tensors_is_made_current(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or on_current_device(GPU))
    with on_current_device(torch.device("cuda:1")):
        pass
    with on_current_device(GPU), on_current_device(torch.device("cpu")):
        pass
    assert entered == [torch.device("cuda:1")]


@pytest.mark.parametrize("op", [ATTENTION, APPEND, COMPRESS], ids=lambda op: op.op)
def test_ops_are_there_on_devices_of_every_kind(op):
    """No such device is here: torch's own table of kernels stands for it. Gradients and fakes are as on a CPU."""
    name = f"{LIBRARY.ns}::{op.op}"
    for key in ("CPU", "CUDA", "XPU", "MPS", "HPU", "PrivateUse1", "Meta"):
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, key), key
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta")  # the fake, before what is for any device
    for key in ("AutogradCPU", "AutogradPrivateUse1", "CompositeImplicitAutograd"):
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
    other = torch.device("xpu")
    assert op.name("auto", other, op.kinds[0]) == "reference"
    assert all(name == "reference" or backend.unavailable(other) for name, backend in op.backends.items())


@pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch lets no device be made in Python",
)
def test_the_ops_run_on_a_device_that_is_neither_a_cpu_nor_a_gpu():
    program = Path(__file__).parent / "other_device.py"
    done = subprocess.run([sys.executable, program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        "10 outputs on stand_in:0 of the same bits; segment_attention: q must be without requires_grad" in done.stdout
    )


def test_the_extension_says_what_it_lacks(monkeypatch):
    assert cuda.unavailable(torch.device("cpu")) == "it needs a GPU"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    monkeypatch.setitem(sys.modules, "worldkv_kernels._cuda", None)
    assert "not built" in cuda.unavailable(GPU) and cuda.architectures() == []
    monkeypatch.setattr(cuda, "missing", lambda: None)
    monkeypatch.setattr(cuda, "architectures", lambda: ["80", "90a"])
    assert cuda.unavailable(GPU) is None  # sm_80 code runs on 8.9
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    assert cuda.unavailable(GPU) == "the extension is built for 80, 90a, not 100"
    assert "bfloat16 and float16" in cuda.append_unsupported((torch.float32, 2, 2, 64, True, True, True, True))
    assert "16 bytes" in cuda.append_unsupported((torch.float16, 2, 2, 64, True, True, True, False))
    assert "not 65 heads of 128" in cuda.append_unsupported((torch.float16, 65, 65, 128, True, True, True, True))
    assert cuda.append_unsupported((torch.float16, 128, 128, 64, True, True, True, True)) is None


def test_attention_in_cuda_is_for_hopper_alone(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    built, capability = ["80", "90a"], [9, 0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: tuple(capability))
    monkeypatch.setattr(cuda, "missing", lambda: None)
    monkeypatch.setattr(cuda, "architectures", lambda: built)
    assert cuda.attention_unavailable(CPU) == "it needs a GPU"
    assert cuda.attention_unavailable(GPU) is None
    capability[:] = [8, 6]
    assert cuda.attention_unavailable(GPU) == "it is for compute capability 9.0, not 8.6"
    capability[:] = [10, 0]
    assert cuda.attention_unavailable(GPU) == "the extension is built for 80, 90a, not 100"
    capability[:], built[:] = [9, 0], ["80", "90"]
    assert cuda.attention_unavailable(GPU) == "the extension is built for 80, 90, not 90a"
    built[:] = ["90a"]
    monkeypatch.setitem(sys.modules, "worldkv_kernels.kernels.segment_attention", None)
    assert "triton cannot be imported" in cuda.attention_unavailable(GPU)
    monkeypatch.setattr(cuda, "missing", lambda: "it is not there")
    assert cuda.attention_unavailable(GPU) == "it is not there"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kinds_of_attention_that_the_cuda_kernel_takes(dtype):
    assert cuda.attention_unsupported((dtype, 128, 22, False, True, False, True, False, True)) is None
    assert "16 bytes" in cuda.attention_unsupported((dtype, 128, 22, False, True, False, False, True, False))
    wide = (torch.float32, 128, 22, False, True, False, False, True, True)
    assert cuda.attention_unsupported(wide) == "it takes bfloat16 and float16, not torch.float32"
    reason = cuda.attention_unsupported((dtype, 128, 64, False, False, True, False, True, True))
    assert reason == "it takes weights of segments where up to 24 pairs turn, not 64"
    assert cuda.attention_unsupported((dtype, 64, 32, False, False, True, False, True, True)) is None
    assert all(
        cuda.attention_unsupported(kind) is None
        for kind in ATTENTION.kinds
        if not (kind[1] == 128 and kind[2] == 64 and kind[5])
    )


@pytest.mark.parametrize(
    ("op", "plain", "other"),
    [
        *[(ATTENTION, (64, 0, False, False, False, False, True, True), (64, 0, False, False, *of, True, True))
          for of in ((True, False), (False, True), (True, True))],
        (APPEND, (2, 2, 64, None, None, True, True, True), (4, 2, 64, None, None, True, True, True)),
    ],
    ids=["weights", "grouped", "both", "append grouped"],
)  # fmt: skip
def test_kernels_with_weights_or_grouped_heads_are_proven_by_themselves(tmp_path, monkeypatch, op, plain, other):
    """A proof of the kernels without them, such as the list of an older version holds, says nothing of those."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    older = tmp_path / "older.json"
    older.write_text(json.dumps({"cuda": {op.op: ["sm_90"]}}))
    monkeypatch.setattr(proven, "REPOSITORY_LIST", older)
    monkeypatch.setenv("WORLDKV_SELF_CHECK", "0")
    monkeypatch.setattr(proven, "architecture", lambda device: "sm_90")
    monkeypatch.setitem(op.backends, "cuda", Backend(lambda: None))
    proven._lists.cache_clear()
    plain, other = ((torch.float16, *kind) for kind in (plain, other))
    assert op.passed_over("cuda", GPU, plain) is None
    assert "no run has proven it on sm_90" in op.passed_over("cuda", GPU, other)
    assert any(op.proof(kind) == op.proof(other) for kind in op.kinds)  # doctor --prove may
    proven.record(op.proof(other), GPU)
    assert op.passed_over("cuda", GPU, other) is None
    proven._lists.cache_clear()


OPS = (
    "segment_attention", "participation", "norm_rope_append", "compress_chunk", "quantize_chunk", "dequantize_chunk",
)  # fmt: skip


def test_doctor_names_every_backend_and_why(tmp_path, capsys):
    path = tmp_path / "doctor.json"
    assert main(["doctor", "--device", str(DEVICE), "--json", str(path)]) == 0
    findings = json.loads(path.read_text())
    assert {(f["op"], f["backend"]) for f in findings["backends"]} >= {
        (op, backend) for op in OPS for backend in ("triton", "reference")
    }
    for name in {f["op"] for f in findings["backends"]}:
        assert sum(f["auto"] for f in findings["backends"] if f["op"] == name) == 1
    assert all(f["why"] for f in findings["backends"])
    printed = capsys.readouterr().out
    assert "serves" in printed
    assert all(f["keys"] in printed and f["backend"] in ATTENTION.backends for f in findings["shapes"])
    assert len({(f["model"], f["extra"]) for f in findings["shapes"]}) == 12


def test_doctor_says_what_serves_on_a_cpu(tmp_path, capsys):
    path = tmp_path / "doctor.json"
    assert main(["doctor", "--device", "cpu", "--json", str(path)]) == 0
    findings = json.loads(path.read_text())
    of_attention = {f["backend"]: f for f in findings["backends"] if f["op"] == "segment_attention"}
    assert list(of_attention) == ["cuda", "triton", "sdpa", "reference"]
    assert of_attention["sdpa"]["why"] == "serves" and of_attention["reference"]["why"] == "a better one serves"
    assert {(f["extra"] == "mass", f["backend"]) for f in findings["shapes"]} == {(False, "sdpa"), (True, "reference")}
    assert re.search(r"segment_attention +sdpa +takes it +serves", capsys.readouterr().out)
    checked, disagreement = doctor._check(ATTENTION, CPU, "sdpa")
    assert checked == len([kind for kind in ATTENTION.kinds if not kind[4]]) and disagreement is None


def test_doctor_says_how_each_shape_is_launched(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(ATTENTION, "name", lambda requested, device, kind, shape: "reference" if kind[4] else "triton")
    found = doctor._shapes(torch.device("cpu"))
    assert {f["why"] for f in found} == {""}  # what cannot run here is passed over for no shape's sake
    shapes = {(f["keys"], f["extra"]): f["how"] for f in found}  # an H200's launches
    tiles = "tiles of 128 queries x 128 keys by tensor descriptors, 8 warps, 3 stages; "
    assert shapes["40 x 4680 x 32760", ""] == tiles + "1452 of 1480 items whole, 28 in 9 parts each"
    assert shapes["12 x 2640 x 27720", ""] == tiles + "252 of 252 items whole"
    assert shapes["40 x 4680 x 32760", "rebase"].startswith("tiles of 128 queries x 64 keys by tensor descriptors")
    assert shapes["40 x 4680 x 32760", "mass"] == "-"


@pytest.mark.filterwarnings("ignore:worldkv norm_rope_append. the .* kernel is not used:UserWarning")  # on a GPU
def test_doctor_fails_when_a_backend_disagrees(monkeypatch, capsys):
    monkeypatch.setattr(APPEND, "kinds", APPEND.kinds[:1])
    monkeypatch.setattr(APPEND, "disagreement", lambda name, device, kind: "it differs from the reference by 1")
    monkeypatch.setattr("worldkv_kernels.cli.doctor.OPS", (APPEND,))
    assert main(["doctor", "--device", str(DEVICE), "--check"]) == 1
    assert "it differs from the reference by 1" in capsys.readouterr().out


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a CPU stands for the GPU here")
def test_a_proof_is_noted_as_soon_as_an_op_has_it(monkeypatch, tmp_path, capsys, cuda_kernels):
    """And of CUDA kernels alone: the next op's backend that agrees no more takes nothing back."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(proven, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(doctor, "OPS", (COMPRESS, APPEND))
    for op in doctor.OPS:
        monkeypatch.setattr(op, "kinds", op.kinds[:1])
    checked, right = [], OpBackends.disagreement

    def disagreement(op, name, device, kind):
        checked.append((op.op, name))
        assert op is COMPRESS or json.loads(proven.user_list().read_text()) == {"cuda": {"compress_chunk": ["sm_90"]}}
        return right(op, name, device, kind) if op is COMPRESS else "its q differs"

    monkeypatch.setattr(OpBackends, "disagreement", disagreement)
    assert main(["doctor", "--device", str(DEVICE), "--prove"]) == 1
    assert checked == [("compress_chunk", "cuda"), ("norm_rope_append", "cuda")]
    printed = capsys.readouterr().out
    assert "compress_chunk: the CUDA kernel is proven on this machine" in printed
    assert "norm_rope_append: the CUDA kernel is proven" not in printed and "its q differs" in printed
    proven._lists.cache_clear()


def test_where_no_cuda_kernel_runs_there_is_nothing_to_prove(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "OPS", (ATTENTION,))
    assert main(["doctor", "--device", "cpu", "--prove"]) == 0
    assert "no CUDA kernel can run here, so there is nothing to prove" in capsys.readouterr().out


def test_an_extension_that_does_not_load_says_why(monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol: cudaLaunchKernelExC")

    monkeypatch.setattr(cuda.importlib, "import_module", broken)
    assert cuda.architectures() == []
    assert cuda.unavailable(GPU) == "the extension cannot be loaded: undefined symbol: cudaLaunchKernelExC"


def test_bad_input_is_one_line_and_status_2(capsys):
    assert main(["doctor", "--device", "abacus"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("worldkv doctor: --device must be cpu or a CUDA device of this machine, got 'abacus'")

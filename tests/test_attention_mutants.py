"""Bugs planted in csrc/attention are seen by the emulator: as a race, a fault, a deadlock, or a wrong result.

A few run here; `pytest -m slow` plants them all, at five seconds each.
"""

import re
import shutil
import sys
from types import SimpleNamespace

import cuda_on_host
import pytest
import torch
from attention_mutants import MUTANTS, UNSEEN, instead
from conftest import ATTENTION_BACKENDS, DEVICE
from test_segment_attention_cuda import Case, check, check_large_scores

from worldkv_kernels import Segment

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="bugs are planted in the emulator's copy")

# Two kernels instead of thirty-six: bf16, head_dim 128, tiles of 128 rows, with a turn in time and without.
ONE_OF_MANY = """template <typename T>
void launch(const AttentionParams& p, const TensorMaps& maps, cudaStream_t stream) {
    p.turned_pairs > 0 ? launch<T, 128, 128, 3, true>(p, maps, stream) : launch<T, 128, 128, 0, false>(p, maps, stream);
    if (p.num_cut > 0) merge_parts_kernel<T, 128><<<dim3(p.num_cut, kQueries / 8), 256, 0, stream>>>(p);
}

void check_tensor("""

SEGMENTS = [Segment(300, 401, 9), Segment(0, 3, 100), Segment(40, 150, 20), Segment(2, 21, -20), Segment(400, 128, -7)]
SHORT = [Segment(7 * i, 1 + 9 * i % 16, 3 * i - 100) for i in range(40)]
CASES = [
    Case(SEGMENTS, tile_rows=128, turned_pairs=22, heads=4, kv_heads=2, q_len=129, processors=5, growth=6.0),
    Case(SHORT, tile_rows=128, turned_pairs=22, heads=2, kv_heads=1, q_len=3, processors=1),
    Case([Segment(0, 40, 3)], tile_rows=128, turned_pairs=22, q_len=3, heads=5, kv_heads=5, processors=4, spare=200),
    Case(
        [Segment(0, 1300, 3), Segment(60, 700, -3)],
        tile_rows=128,
        turned_pairs=22,
        heads=1,
        kv_heads=1,
        q_len=70,
        growth=9.0,
    ),
    Case(
        [s._replace(time_shift=0) for s in SEGMENTS], tile_rows=128, with_mass=False, heads=3, kv_heads=3, processors=2
    ),
]


@pytest.fixture
def plant(host_module, build_for_host, tmp_path, monkeypatch):
    """Puts a kernel with a mutant's bug in the extension's place; all else is of the `host_module` that was built."""

    def plant(mutant=None):
        sources = tmp_path / "csrc"
        shutil.copytree(cuda_on_host.CSRC, sources)
        launches = sources / "attention" / "segment_attention.cu"
        text = launches.read_text()
        first = text.index("// With all slabs turned at head_dim 128")
        text = text[:first] + ONE_OF_MANY + text[text.index("void check_tensor(") + len("void check_tensor(") :]
        launches.write_text(re.sub(r"launch<__half>\(p, maps, stream\)", 'refuse("it is not here")', text))
        if mutant:
            file = sources / "attention" / mutant.file
            file.write_text(mutant.planted(file.read_text()))
        module = cuda_on_host.load(build_for_host(sources, folder=tmp_path, parts=build_for_host.keywords["folder"]))
        monkeypatch.setitem(sys.modules, "worldkv_kernels._cuda", module)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))

    return plant


def run_all():
    for seed in range(3):
        for case in CASES:
            check(case, orders=(seed,))
    check_large_scores(2.0**100)


def test_the_kernel_itself_passes(plant):
    plant()
    run_all()


def test_the_check_on_first_use_sees_a_bug_of_the_main_loop(plant):
    """Also one that only a window of more tiles than a ring of stages can show."""
    plant(
        instead("products with the next tile's V", "multiply(weights, before.stage)", "multiply(weights, ring.stage)")
    )
    for turned_pairs, with_mass in ((0, False), (22, True)):
        kind = (torch.bfloat16, 128, turned_pairs, False, with_mass, True, True)
        assert ATTENTION_BACKENDS.disagreement("cuda", DEVICE, kind)


def caught(plant, mutant):
    plant(mutant)
    with pytest.raises((RuntimeError, AssertionError)) as why:
        run_all()
    print(f"{mutant.name}: {str(why.value).splitlines()[0][:300]}")


QUICK = ("no wait for the next K", "totals not rescaled")


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.name in QUICK], ids=lambda mutant: mutant.name)
def test_a_few_planted_bugs_are_seen(plant, mutant):
    caught(plant, mutant)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.name not in QUICK], ids=lambda mutant: mutant.name)
def test_planted_bugs_are_seen(plant, mutant):
    caught(plant, mutant)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", UNSEEN, ids=lambda mutant: mutant.name)
def test_what_no_run_can_see(plant, mutant):
    plant(mutant)
    run_all()

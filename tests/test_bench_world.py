"""The small world's studies: what they ask is well posed, their controls do as they say, and lines are right."""

import json
import pickle
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks import train_small_world as training
from benchmarks.train_small_world import write_weights
from worldkv_kernels import WorldMemory, compress_chunk
from worldkv_kernels.cli import world as world_command
from worldkv_kernels.journeys import psnr, ssim, travel, truth, turn_and_return
from worldkv_kernels.memory import storage
from worldkv_kernels.memory.retrieval import RetrievalPolicy
from worldkv_kernels.models.small_world import SmallWorld, SmallWorldConfig
from worldkv_kernels.ops.quantize_chunk import packed_bytes
from worldkv_kernels.poses import as_poses
from worldkv_kernels.reference import compress_chunk as reference
from worldkv_kernels.worlds import photograph_world

MODEL = SmallWorldConfig(num_layers=1, num_heads=1, ffn_dim=64, frequency_dim=16, sigmas=(1.0, 0.9, 0.75, 0.5))


@pytest.fixture
def bench(load):
    return load("bench_world")


@pytest.fixture
def studies(load):
    return load("world_studies")


@pytest.fixture
def packings(load):
    return load("world_packing")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder of random ones."""
    folder = tmp_path_factory.mktemp("weights")
    write_weights(SmallWorld.random(MODEL, 0, device="cpu", dtype=torch.float32), folder)
    return str(folder)


# --- what is asked ---


def test_journeys_are_whole_chunks_with_views_seen_again(studies):
    journeys = {study.journey: study for study in studies.STUDIES}.values()  # one study of each
    for study in journeys:
        for number in (0, 5, study.worlds - 1):
            journey = study.journey(number)
            as_poses(study.name, journey.poses)
            assert len(journey.poses) % 3 == 0 and journey.given % 3 == 0 and 0 < journey.given < len(journey.poses)
            again = journey.seen_again()
            assert len(again) >= 15 and min(again) >= journey.given and min(again.values()) >= 18, study.name
        assert not np.allclose(study.journey(0).poses, study.journey(1).poses)  # each world has a way of its own


def test_journeys_cross_turn_and_repeat_as_they_say(studies):
    crossing = studies.sweeps_and_diagonal(3)
    assert crossing.given == 90 and len(crossing.poses) == 135
    pitch = np.degrees(np.arcsin(-crossing.poses[:, 1, 2]))
    np.testing.assert_allclose(pitch[:90], np.repeat([-20, 0, 20], 30), atol=1e-9)
    assert pitch[90:].min() < -19 and pitch[90:].max() > 19  # it crosses them all
    turning = studies.turns_round_and_round(3)
    turned = np.diff(np.unwrap(np.arctan2(turning.poses[:, 0, 2], turning.poses[:, 2, 2]))).sum()
    assert turned == pytest.approx(2.5 * 2 * np.pi) and turning.given >= 50  # a turn is 50 frames
    assert {round(gap / 50) for gap in turning.seen_again().values()} == {1, 2}  # turns ago
    repeated = studies.nothing_given(3)
    np.testing.assert_allclose(repeated.poses, repeated.poses[::-1])
    assert repeated.given == 3
    again = [frame for frame in repeated.seen_again() if frame >= 45]
    assert len(again) >= 30


def test_every_study_compares_memories_that_there_are(studies, packings, weights):
    model = SmallWorld.from_pretrained(weights, device="cpu", dtype=torch.float32)
    names = [study.name for study in studies.STUDIES]
    assert len(set(names)) == len(names)
    for study in studies.STUDIES:
        chunks = len(study.journey(0).poses) // 3
        of_study = [memory.name for memory in study.memories]
        assert len(set(of_study)) == len(of_study) >= 2
        assert study.against in ("the world", "the first visit") and study.worlds >= 2
        assert not study.photographs or study.worlds == 4
        for memory in study.memories:
            layers = {"mass_layers": (0,)} if "mass_layers" in memory.options else {}  # which this small a model has
            options = {"bank_chunks": chunks, **memory.options, **layers}
            config = model.config.memory(**options)
            assert all(getattr(config, name) == value for name, value in options.items())
            assert not memory.prune or (config.prune_rule, config.merge_pruned) == ("similarity", False)
            assert not memory.packing or config.bank_bits == 4
            with studies.pruning(memory.prune), packings.packing(memory.packing):
                pass
            assert memory.sigmas is None or memory.sigmas[0] == 1


def test_memories_attend_to_as_many_tokens_as_they_are_said_to(studies):
    """In the modes but full KV: as many as the window that the model was trained with, pruned chunks by half."""
    tokens = {}
    for memory in studies.MODES:
        config = MODEL.memory(bank_chunks=30, **memory.options)
        banked = config.retrieved_chunks * config.banked_tokens if config.mode == "worldkv" else 0
        tokens[memory.name] = 48 * (3 * config.sink_chunks + config.recent_frames + 3) + banked
    defaults = 48 * (3 + 6 + 3) + 6 * (48 + 2 * 12)
    want = {name: 48 * 15 for name in tokens} | dict.fromkeys([n for n in tokens if "defaults" in n], defaults)
    assert {**tokens, "full KV": None} == {**want, "full KV": None}


def test_studies_can_be_sent_to_a_process(studies):
    for study in studies.STUDIES:
        sent = pickle.loads(pickle.dumps(study))
        assert np.array_equal(sent.journey(2).poses, study.journey(2).poses)
        assert [memory.name for memory in sent.memories] == [memory.name for memory in study.memories]


# --- controls ---


def test_random_retrieval_draws_chunks_evenly(studies):
    policy = studies.RandomRetrieval()
    assert isinstance(policy, RetrievalPolicy) and not policy.stateless
    assert policy.describe(np.eye(4)[None], None) is None
    candidates = [(number, None) for number in (3, 4, 6, 9, 10)]
    counts = dict.fromkeys((3, 4, 6, 9, 10), 0)
    for _ in range(1000):
        chosen = policy.select(None, candidates, 2)
        assert len(set(chosen)) == 2 and set(chosen) <= set(counts)
        for number in chosen:
            counts[number] += 1
    assert all(340 < count < 460 for count in counts.values())  # 400 each, give or take 15
    assert sorted(policy.select(None, candidates[:2], 6)) == [3, 4]
    assert policy.select(None, candidates, 0) == policy.select(None, [], 2) == []
    assert policy.drop(candidates) == 3
    one, other = studies.RandomRetrieval(), studies.RandomRetrieval()
    assert [one.select(None, candidates, 3) for _ in range(5)] == [other.select(None, candidates, 3) for _ in range(5)]


def kept(k, **options):
    """Indices of the tokens that the published rule keeps, the anchor frame first, as the memory of a CPU has them."""
    published = dict(rule="similarity", merge=False)
    return compress_chunk(k, k, frames=3, keep_ratio=0.5, **published, **options).index.tolist()


@pytest.mark.parametrize("pooled", [True, False])
def test_pruning_keeps_other_tokens_and_then_the_published_ones(studies, pooled):
    k = torch.randn(3 * 40, 2, 64, generator=torch.Generator().manual_seed(0))
    published, right = kept(k, pooled=pooled), reference.similarities
    anchor, others = list(range(40)), set(range(40, 120))
    with studies.pruning(""):
        assert kept(k, pooled=pooled) == published
    with studies.pruning("most alike"):
        alike = kept(k, pooled=pooled)
    assert alike[:40] == anchor and set(alike[40:]) == others - set(published[40:])  # half of them: the other half
    with studies.pruning("random"):
        drawn = [kept(k, pooled=pooled) for _ in range(200)]
    assert all(one[:40] == anchor and len(one) == 80 and set(one[40:]) < others for one in drawn)
    times = np.bincount(np.concatenate([one[40:] for one in drawn]))[40:]
    assert times.min() > 65 and times.max() < 135  # 100 each, give or take 7
    with studies.pruning("random"):
        assert [kept(k, pooled=pooled) for _ in range(3)] == drawn[:3]
    with studies.pruning("random", seed=1):
        assert kept(k, pooled=pooled) != drawn[0]
    assert reference.similarities is right and kept(k, pooled=pooled) == published


def test_pruning_ends_with_an_exception_and_knows_two_controls(studies):
    right = reference.similarities
    with pytest.raises(ZeroDivisionError), studies.pruning("random"):
        raise ZeroDivisionError
    assert reference.similarities is right
    with pytest.raises(KeyError), studies.pruning("least alike"):
        pass
    assert reference.similarities is right


def packed_and_back(k, v, *, bits=4):
    """As a memory's bank does it, for which a chunk of a layer is restored where it is asked for."""
    out = torch.empty(len(k), 2, packed_bytes(*k.shape[1:], bits, k.dtype), dtype=torch.uint8)
    of_k, of_v = torch.full_like(k, float("nan")), torch.full_like(v, float("nan"))
    storage.quantize_chunk(k, v, bits=bits, out=out, backend=None)
    chosen = torch.tensor([[place, k.shape[1]] for place in reversed(range(len(k)))], dtype=torch.int32)
    storage.dequantize_chunk(out, bits=bits, chosen=chosen, out_k=of_k, out_v=of_v, backend=None)
    of_k, of_v = of_k.flip(0), of_v.flip(0)
    return of_k, of_v


def test_other_packings_are_what_they_say_and_end(packings):
    published = storage.quantize_chunk, storage.dequantize_chunk
    k, v = torch.randn(2, 3, 72, 2, 64, generator=torch.Generator().manual_seed(0))  # a group of 64 and one of 8
    k[:, 5, 1] *= 100  # a token that a scale for all tokens would not stand
    v[:, 5, 1] *= 100
    right = packed_and_back(k, v)
    for which, name in enumerate(("keys by token", "values by token")):
        with packings.packing(name):
            restored = packed_and_back(k, v)
        assert torch.equal(restored[1 - which], right[1 - which])
        by_token, x = restored[which], (k, v)[which]
        step = (x.amax(dim=3, keepdim=True) - x.amin(dim=3, keepdim=True)) / 15
        assert ((by_token - x).abs() <= 0.501 * step).all()
        assert all(len(of_head.unique()) <= 16 for of_head in by_token.flatten(0, 2))
        error, of_right = ((got - x)[:, torch.arange(72) != 5].norm() for got in (by_token, right[which]))
        assert error < 0.2 * of_right
    with packings.packing("2 bits"):
        for restored, x in zip(packed_and_back(k, v), (k, v), strict=True):
            for group in (slice(0, 64), slice(64, 72)):
                of, got = x[:, group], restored[:, group]
                step = (of.amax(dim=1, keepdim=True) - of.amin(dim=1, keepdim=True)) / 3
                assert ((got - of).abs() <= 0.501 * step).all()
                channels = got.transpose(1, 3).flatten(0, 2)
                assert all(len(channel.unique()) <= 4 for channel in channels)
    with packings.packing("groups of 32"):
        restored = packed_and_back(k, v)[1][:, :32]
    for got, is_less in ((restored, True), (right[1][:, :32], False)):
        step = (v[:, :32].amax(dim=1, keepdim=True) - v[:, :32].amin(dim=1, keepdim=True)) / 15
        assert ((got - v[:, :32]).abs() <= 0.501 * step).all() == is_less
    with packings.packing(""):
        assert all(map(torch.equal, packed_and_back(k, v), right))
    with pytest.raises(ZeroDivisionError), packings.packing("2 bits"):
        raise ZeroDivisionError
    with pytest.raises(KeyError), packings.packing("1 bit"):
        pass
    assert (storage.quantize_chunk, storage.dequantize_chunk) == published


def test_outliers_change_keys_and_nothing_that_the_model_does(bench, studies, weights):
    """Three rotary pairs of each head: a channel and its partner, 8 times larger in keys, smaller in queries."""
    plain, with_outliers = (bench._model(weights, "fp32", outliers) for outliers in (False, True))
    for block, of in zip(with_outliers.blocks, plain.blocks, strict=True):
        larger = block.self_attn.norm_k.weight / of.self_attn.norm_k.weight
        smaller = block.self_attn.norm_q.weight / of.self_attn.norm_q.weight
        torch.testing.assert_close(larger * smaller, torch.ones_like(larger))
        factors = larger.view(-1, 32, 2)
        assert torch.equal(factors[..., 0], factors[..., 1]) and set(factors.unique().tolist()) == {1.0, 8.0}
        assert ((factors[..., 0] == 8).sum(dim=1) == 3).all()
    memory = studies.Memory("16 bits", studies.TWO)
    study = studies.Study("s", "?", [memory], partial(turn_and_return, 12))
    seen, of_outliers = (bench.visit(weights, study, m, 0) for m in (memory, replace(memory, outliers=True)))
    assert of_outliers.psnr == pytest.approx(seen.psnr, abs=1e-3)


def test_the_share_of_a_banked_chunk_is_that_of_its_bytes(bench):
    """A chunk of 144 tokens of a head of 64, in bf16 18,432 bytes of K; half of it, 72 tokens, is two groups."""
    of = {
        (16, 1.0): 1, (16, 0.25): 0.5, (8, 1.0): (144 * 64 + 144 * 2) / 18_432, (8, 0.25): (72 * 64 + 72 * 2) / 18_432,
        (4, 1.0): (144 * 32 + 3 * 64 * 4) / 18_432, (4, 0.25): (72 * 32 + 2 * 64 * 4) / 18_432,
    }  # fmt: skip
    for (bits, ratio), share in of.items():
        config = MODEL.memory(bank_bits=bits, keep_ratio=ratio)
        assert bench.banked_share(config, torch.bfloat16) == pytest.approx(share)
    assert bench.banked_share(MODEL.memory(mode="full"), torch.bfloat16) is None


# --- one memory in one world ---


@pytest.fixture
def short(studies):
    """Six chunks out, six back."""
    options = {"sink_frames": 3, "recent_frames": 3, "retrieved_chunks": 2}
    published = {**options, "prune_rule": "similarity", "merge_pruned": False}  # whose choice `prune` replaces
    return studies.Study(
        "short", "Is it?",
        [studies.Memory("first", published), studies.Memory("at random", published, prune="random"),
         studies.Memory("random chunks", {**options, "retrieval": studies.RandomRetrieval()}, sigmas=(1.0,))],
        journey=partial(turn_and_return, 12), worlds=3,
    )  # fmt: skip


def test_a_visit_is_a_trip_measured_where_views_are_seen_again(bench, short, weights):
    first, at_random, of_chunks = short.memories
    seen = bench.visit(weights, short, first, 1)
    model = SmallWorld.from_pretrained(weights, device="cpu", dtype=torch.float32)
    memory = WorldMemory(model.config.memory(bank_chunks=12, **first.options), device="cpu", dtype=torch.float32)
    world, journey = bench._world(False, 1), short.journey(1)
    trip = travel(model, memory, world, journey, seed=1)
    again = list(journey.seen_again())
    assert seen.psnr == pytest.approx(psnr(trip.frames, truth(world, journey))[again].mean().item())
    assert seen.ssim == pytest.approx(float(np.mean(ssim(trip.frames, truth(world, journey))[again])))
    assert seen.tokens == np.mean([trip.plans[frame // 3].num_tokens for frame in again])
    assert seen.kept_bytes == memory.stats()["kept_bytes"] and seen.banked_share == 0.5
    assert not torch.equal(bench._world(False, 0), world)
    in_bits = replace(first, options={**first.options, "bank_bits": 4})
    changed = [at_random, of_chunks, in_bits, replace(in_bits, packing="2 bits")]
    others = [bench.visit(weights, short, memory, 1) for memory in changed]
    assert len({seen.psnr, *(other.psnr for other in others)}) == 5  # each option tells
    assert others[2].banked_share < 0.2 and others[3].banked_share is None  # of a control the format does not say
    # A policy with a state begins anew with each world, in whichever process.
    assert bench.visit(weights, short, of_chunks, 1) == others[1]


def test_against_the_first_visit_pictures_of_the_same_poses_are_compared(bench, studies, weights, monkeypatch):
    """A way back 0.05 brighter than the way out over the same poses: 26 dB, whatever the world is like."""
    study = studies.Study("s", "?", studies.MODES[:2], studies.nothing_given, against="the first visit")
    real = bench.travel

    def brighter(model, memory, world, journey, **options):
        trip = real(model, memory, world, turn_and_return(2), **options)
        pictures = 0.9 * truth(world, journey)
        pictures[45:] += 0.05
        return trip._replace(frames=pictures, plans=trip.plans * (len(pictures) // 6))  # three frames to a plan

    monkeypatch.setattr(bench, "travel", brighter)
    seen = bench.visit(weights, study, study.memories[0], 0)
    assert seen.psnr == pytest.approx(-20 * np.log10(0.05), abs=0.01) and 0.8 < seen.ssim < 1


def test_photographs_are_worlds(bench):
    pytest.importorskip("skimage", reason="scikit-image, which brings the photographs, is not installed")
    worlds = [bench._world(True, number) for number in range(4)]
    assert all(world.shape == (3, 96, 192) for world in worlds)
    for world in worlds:
        torch.testing.assert_close(world, photograph_world(world[..., :96].permute(1, 2, 0).numpy()))
    assert not torch.equal(worlds[0], worlds[1])


# --- lines and tables ---


def test_a_line_has_means_and_standard_errors_by_hand(bench, short):
    base = [bench.Seen(10, 0.5, 100, 5, 0.25), bench.Seen(14, 0.6, 200, 7), bench.Seen(12, 0.7, 300, 6)]
    seen = [bench.Seen(11, 0.5, 10, 50), bench.Seen(17, 0.6, 20, 70), bench.Seen(14, 1.0, 60, 60)]
    first = bench.line_of(short, short.memories[0], base, base)
    assert (first["psnr_db"], first["difference"]) == (12, None)
    assert first["standard_error"] == pytest.approx(2 / 3**0.5)  # of -2, 2, 0: squares of 8 over 2
    assert (first["ssim"], first["tokens_attended"], first["kept_bytes"]) == (pytest.approx(0.6), 200, 7)
    assert (first["banked_share"], first["packing"], first["outliers"]) == (0.25, "", False)
    line = bench.line_of(short, short.memories[2], seen, base)
    assert line["psnr_db"] == 14 and line["standard_error"] == pytest.approx(3 / 3**0.5)
    # Worlds are paired: 1, 3 and 2 dB more.
    assert line["difference"] == {"memory": "first", "db": 2, "standard_error": pytest.approx(1 / 3**0.5)}
    assert (line["case"], line["variant"], line["asks"], line["worlds"]) == ("short", "random chunks", "Is it?", 3)
    assert line["options"] == {
        "sink_frames": 3, "recent_frames": 3, "retrieved_chunks": 2, "retrieval": "RandomRetrieval",
    }  # fmt: skip
    assert (line["prune"], line["sigmas"], line["against"]) == ("", (1.0,), "the world")
    assert (first["sigmas"], line["psnr_db_per_world"]) == (None, [11, 17, 14])
    json.dumps(line, allow_nan=False)


def command(bench, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench_world.py", *map(str, arguments)])
    return bench.main()


def test_the_command_writes_strict_lines_and_prints_them(bench, short, weights, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "STUDIES", [short])
    path = tmp_path / "study.jsonl"
    options = ["--weights", weights, "--worlds", 2, "--jsonl", path]
    assert command(bench, monkeypatch, *options, "--processes", 1) == 0
    told = capsys.readouterr().out
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert [line["variant"] for line in lines] == ["first", "at random", "random chunks"]
    assert all((line["bench"], line["case"], line["worlds"]) == ("world", "short", 2) for line in lines)
    assert all(line["environment"]["torch"] == torch.__version__ for line in lines)
    assert [line["difference"] is None for line in lines] == [True, False, False]
    seen = [bench.visit(weights, short, short.memories[1], number) for number in range(2)]
    assert lines[1]["psnr_db_per_world"] == [round(of_world.psnr, 3) for of_world in seen]
    assert command(bench, monkeypatch, "--table", path) == 0
    assert capsys.readouterr().out == told
    assert told.startswith("short: Is it? (2 worlds)\nmemory ") and told.count("\n") == 6
    for line, row in zip(lines, told.splitlines()[3:], strict=True):
        assert row.startswith(line["variant"]) and f" {line['psnr_db']:.2f} " in row
        assert (f" {line['difference']['db']:+.2f} +- " in row) if line["difference"] else ("+- " not in row)
    # In processes of their own the same numbers come out.
    assert command(bench, monkeypatch, *options, "--processes", 2) == 0
    again = [json.loads(line) for line in path.read_text().splitlines()[3:]]
    assert [line["psnr_db_per_world"] for line in again] == [line["psnr_db_per_world"] for line in lines]


def test_one_study_of_several_is_run(bench, short, weights, monkeypatch, tmp_path):
    other = bench.Study("other", "And this?", short.memories[:2], short.journey)
    monkeypatch.setattr(bench, "STUDIES", [short, other])
    monkeypatch.setattr(bench, "visit", lambda weights, study, memory, number: bench.Seen(20.0 + number, 0.5, 10.0, 5))
    path = tmp_path / "study.jsonl"
    assert command(bench, monkeypatch, "--study", "other", "--processes", 1, "--jsonl", path) == 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["case"], line["variant"], line["worlds"]) for line in lines] == [
        ("other", "first", 32), ("other", "at random", 32),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--worlds", "1"], "argument --worlds: must be at least 2, got 1"),
        (["--processes", "0"], "argument --processes: must be at least 1, got 0"),
        (["--study", "none"], "argument --study: invalid choice: 'none'"),
    ],
)
def test_bad_arguments_are_refused(bench, monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        command(bench, monkeypatch, *arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_worlds_that_are_shown_are_none_of_the_trainings(bench):
    """A CPU's generator takes a seed's low 32 bits alone."""
    seeds = [0, training.VALIDATED, training.SHOWN, world_command._UNSEEN, bench._UNSEEN]
    streams = {tuple(torch.randn(4, generator=torch.Generator().manual_seed(seed)).tolist()) for seed in seeds}
    assert len(streams) == len(seeds)

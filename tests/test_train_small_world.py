"""The small world's training: the batched pass against a WorldMemory, clips, and stopping and going on."""

import json
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import relative_error

from benchmarks import train_small_world as training
from benchmarks.train_small_world import CHUNKS, WINDOW, Clips, Training, as_patches, denoise_clips, share_of_rate
from worldkv_kernels import WorldMemory, worlds
from worldkv_kernels.journeys import psnr
from worldkv_kernels.models import wan
from worldkv_kernels.models.rollout import Controls
from worldkv_kernels.models.small_world import SmallWorld, SmallWorldConfig, pluecker_map, ray_features

SMALL = SmallWorldConfig(num_layers=1, num_heads=1, ffn_dim=64, frequency_dim=16)


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model_of(config=SMALL):
    return SmallWorld(config, device="cpu", dtype=torch.float32).requires_grad_(True)


def training_of(*, steps=8, clips=1, moving=0.5, seed=0, config=SMALL):
    return Training(model_of(config), steps, clips, moving, seed)


def uniform_numbers(x):
    """Whether x is spread evenly over 0..1, by its deciles."""
    return np.abs(np.quantile(x, np.linspace(0, 1, 11)) - np.linspace(0, 1, 11)).max() < 0.02


# --- the batched pass ---


@pytest.mark.parametrize("walking", [False, True])
@pytest.mark.parametrize("sizes", [{"grid": (2, 3), "num_heads": 2}, {"num_layers": 1, "num_heads": 1}])
def test_the_batched_pass_is_a_rollouts_with_a_sliding_window(walking, sizes):
    config = SmallWorldConfig(**{"num_layers": 2, "ffn_dim": 96, "frequency_dim": 16, **sizes})
    model = SmallWorld(config, device="cpu", dtype=torch.float32)
    training.initialise(model, 0)
    for number, parameter in enumerate(model.parameters()):  # initialise leaves terms at zero
        parameter += 0.05 * normal(*parameter.shape, seed=number)
    clips, chunks = 2, WINDOW + 3
    frames = chunks * config.chunk_frames
    drawn = Clips(model, 1.0, seed=3)
    yaw, pitch = (angles[:, :frames] for angles in drawn._turns(clips, 6 * config.chunk_frames * 2))
    position = drawn._walks(clips, frames) * float(walking)
    poses = worlds.looking(yaw, pitch, position).double().numpy()
    intrinsics = np.tile(worlds.INTRINSICS, (frames, 1))
    rays = [pluecker_map(np.linalg.inv(of_clip[0]) @ of_clip, intrinsics, config.grid) for of_clip in poses]
    features = ray_features(torch.from_numpy(np.stack(rays)), config.ray_octaves).view(clips, chunks, -1, 54)
    shape = (clips, chunks, config.chunk_frames, *model.latent_shape)
    context, noisy, sigma = normal(*shape, seed=1), normal(*shape, seed=2), normal(clips, chunks, seed=3).sigmoid()
    with torch.no_grad():
        got = denoise_clips(model, context, noisy, sigma, features)
        for clip in range(clips):
            memory = memory_of(config)
            for chunk in range(chunks):
                rows = slice(3 * chunk, 3 * chunk + 3)
                levels = (float(sigma[clip, chunk]), 0.0)
                of_rollout = model.prepare_rollout(None, poses[clip, 0], levels)
                of_chunk = model.prepare_chunk(of_rollout, 3 * chunk, Controls(poses[clip, rows], intrinsics[rows]))
                memory.begin_chunk(poses[clip, rows])
                clean = noisy[clip, chunk] - levels[0] * model.denoise(noisy[clip, chunk], 0, of_chunk, memory)
                model.denoise(context[clip, chunk], 1, of_chunk, memory)
                memory.end_chunk()
                assert relative_error(wan.unpatchify(got[clip, chunk], config.grid), clean) < 1e-5


def memory_of(config):
    return WorldMemory(config.memory(mode="sliding", recent_frames=3 * WINDOW), device="cpu", dtype=torch.float32)


def test_patches_are_in_the_order_of_the_heads_numbers():
    model = model_of()
    latents = normal(2, 3, 3, *model.latent_shape, seed=0)
    patches = as_patches(model, latents)
    assert patches.shape == (2, 3, 3 * 6 * 8, 2 * 2 * 16)
    for clip in range(2):
        for chunk in range(3):
            assert torch.equal(wan.unpatchify(patches[clip, chunk], model.config.grid), latents[clip, chunk])


# --- clips ---


def test_clips_are_a_function_of_the_seed():
    model = model_of()
    one, same, other = (Clips(model, 0.5, seed) for seed in (4, 4, 5))
    for drawn in zip(one.draw(2), same.draw(2), other.draw(2), strict=True):
        assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(one.draw(2)[0], Clips(model, 0.5, 4).draw(2)[0])  # the next ones are others


def test_cameras_turn_within_their_limits():
    clips, frames = 400, 3 * CHUNKS
    yaw, pitch = (np.degrees(angles.numpy()) for angles in Clips(model_of(), 0.0, 0)._turns(clips, frames))
    assert yaw.shape == pitch.shape == (clips, frames)
    assert np.abs(pitch).max() <= 28 + 1e-4 and np.abs(pitch).max() > 25
    assert np.abs(np.diff(pitch)).max() <= 6 + 1e-4
    steps = np.abs(np.diff(yaw))
    within = np.arange(frames - 1) % 3 != 2
    assert steps[:, within].max() <= 16 + 1e-4  # also in clips that look somewhere else with each chunk
    hops = steps[:, ~within].max(axis=1) > 16 + 1e-4
    assert 0.22 < hops.mean() < 0.36
    assert steps[~hops].mean() > 6
    # Views come back: without hops about half of the cameras turn round at least twice.
    reversals = (np.diff(np.sign(np.diff(yaw[~hops]))) != 0).sum(axis=1)
    assert 1 < reversals.mean() < 6


def test_cameras_walk_within_the_world():
    position = Clips(model_of(), 1.0, 0)._walks(400, 3 * CHUNKS)
    assert position.shape == (400, 3 * CHUNKS, 3)
    distance = position.norm(dim=-1)
    assert 0.40 < distance.max() <= 0.45 + 1e-6
    assert position[:, -1].sub(position[:, 0]).norm(dim=-1).mean() > 0.1
    assert position[..., 1].std() < position[..., 0].std()  # mostly level


@pytest.mark.parametrize("moving", [0.0, 0.3, 1.0])
def test_a_share_of_the_cameras_walks(moving, monkeypatch):
    seen = watched(monkeypatch)
    Clips(model_of(), moving, 0).draw(100)
    walks = seen.poses[:, :, :3, 3].abs().amax(dim=(1, 2)) > 0
    assert abs(walks.float().mean() - moving) < (0.1 if 0 < moving < 1 else 1e-9)


def watched(monkeypatch):
    """What is given to `pictures`, and what it made."""
    right, seen = worlds.pictures, SimpleNamespace()

    def pictures(drawn, poses):
        seen.poses, seen.made = poses, right(drawn, poses)
        return seen.made

    monkeypatch.setattr(worlds, "pictures", pictures)
    return seen


def test_clips_are_pictures_with_their_rays_turned_by_an_angle_a_clip(monkeypatch):
    seen = watched(monkeypatch)
    model = model_of()
    latents, features = Clips(model, 1.0, 2).draw(5)
    assert torch.equal(latents, worlds.encode(seen.made).unflatten(1, (CHUNKS, 3)))
    assert features.shape == (5, CHUNKS, 3 * 48, 6 * 9)
    poses = seen.poses.flatten(0, 1).double().numpy()
    rays = pluecker_map(poses, np.tile(worlds.INTRINSICS, (len(poses), 1)), model.config.grid)
    true, told = torch.from_numpy(rays).view(5, -1, 2, 3), features[..., :6].reshape(5, -1, 2, 3)  # moments, directions
    torch.testing.assert_close(told[..., 1], true[..., 1], atol=1e-5, rtol=0)
    level = [torch.complex(of[..., 2], of[..., 0]) for of in (true, told)]
    angles = (level[1] * level[0].conj()).sum(dim=(1, 2)).angle()
    turned = level[0] * torch.polar(torch.ones(5), angles)[:, None, None]
    torch.testing.assert_close(torch.view_as_real(turned), torch.view_as_real(level[1]), atol=1e-5, rtol=0)
    assert len(set(angles.round(decimals=2).tolist())) == 5


def test_noise_levels_are_shifted_towards_noise():
    clips = Clips(model_of(), 0.0, 0)
    _, _, sigma = clips.noisy(torch.zeros(2000, 6, 1, 1, 1, 1))
    pure = sigma == 1
    assert abs(pure.float().mean() - 0.1) < 0.01
    of_rest = sigma[~pure]
    assert uniform_numbers(of_rest / (3 - 2 * of_rest))  # what SHIFT makes of even numbers, undone
    assert of_rest.median() == pytest.approx(0.75, abs=0.02)


def test_noise_is_as_large_as_it_says():
    clips = Clips(model_of(), 0.0, 0)
    latents = torch.full((100, 6, 3, 16, 12, 16), 5.0)
    context, noisy, sigma = clips.noisy(latents)
    torch.testing.assert_close(noisy.mean(dim=(2, 3, 4, 5)), 5 * (1 - sigma), atol=0.06, rtol=0)
    torch.testing.assert_close(noisy.std(dim=(2, 3, 4, 5)), sigma, atol=0.04, rtol=0)
    torch.testing.assert_close(context.mean(dim=(2, 3, 4, 5)), latents[..., 0, 0, 0, 0], atol=0.02, rtol=0)
    of_context = context.std(dim=(2, 3, 4, 5))
    noised = of_context > 0
    assert 0.42 < noised.float().mean() < 0.58 and 0.18 < of_context.max() < 0.205
    assert of_context[noised].mean() == pytest.approx(0.1, abs=0.012)


# --- the training ---


def test_share_of_rate_by_hand():
    assert [share_of_rate(step, 1000) for step in (0, 49, 99, 100, 400)] == [0.01, 0.5, 1, 1, 1]
    assert share_of_rate(700, 1000) == pytest.approx(0.5)  # half of the way from 400 to the end
    assert share_of_rate(999, 1000) == 0.02
    shares = [share_of_rate(step, 1000) for step in range(1000)]
    assert shares[:400] == sorted(shares[:400]) and shares[400:] == sorted(shares[400:], reverse=True)


def test_each_parameter_is_in_one_group():
    model = model_of(SmallWorldConfig(num_layers=2, num_heads=1, ffn_dim=64, frequency_dim=16))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muon, adam = training.optimizers_of(model)
    groups = [[names[id(p)] for p in group["params"]] for group in (*muon.param_groups, *adam.param_groups)]
    assert sorted(name for group in groups for name in group) == sorted(names.values())
    of_blocks, rest, without_decay = groups
    assert {name.split(".")[0] for name in of_blocks} == {"blocks"} and len(of_blocks) == 2 * (4 + 2 + 4)
    assert all(name.endswith(".weight") and "norm" not in name for name in of_blocks)
    assert all(name.endswith(".bias") or "norm_" in name for name in without_decay)
    assert not any(name.endswith(".bias") or "norm_" in name for name in rest)
    assert [group["weight_decay"] for group in adam.param_groups] == [training.DECAY, 0]


def test_a_model_starts_with_open_gates_and_no_modulation():
    model = training_of().model
    again = training_of(seed=0).model
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(training_of(seed=1).model.head.head.weight, model.head.head.weight)
    assert all(p.isfinite().all() for p in model.parameters())
    block = model.blocks[0]
    assert torch.equal(model._level(0.3).modulation[0, :, 0].detach(), torch.tensor([0.0, 1, 1, 0, 1, 1]))
    assert torch.equal(block.self_attn.q.weight, block.self_attn.k.weight)


def test_some_steps_lower_the_loss(monkeypatch):
    monkeypatch.setattr(training, "WARM_UP", 10)  # of 30 steps
    of_one = training_of(steps=30, clips=2)

    @torch.no_grad()
    def loss():
        return training.squared_error(of_one.model, Clips(of_one.model, 0.5, seed=99), 8, 0.5).mean().item()

    before = loss()
    losses = [of_one.advance() for _ in range(30)]
    assert of_one.step == 30 and of_one.seconds > 0 and all(math.isfinite(of_step) for of_step in losses)
    assert loss() < 0.8 * before  # .64 to .68 of it with three seeds


def test_the_loss_weighs_channels_between_latents_and_pixels(monkeypatch):
    scales = torch.tensor(worlds.SCALES)
    of_one = training_of()
    for channel in (0, 1, 15):
        error = torch.zeros(1, CHUNKS, 144, 4, 16)
        error[..., channel] = 1
        monkeypatch.setattr(training, "squared_error", lambda *args, e=error: e + 0 * of_one.model.head.head.bias.sum())
        assert of_one.advance() == pytest.approx((scales[channel] / scales.mean() / 16).item())


def test_validation_is_of_pictures_and_always_the_same(monkeypatch):
    """16 latents that are wrong by known numbers: the PSNR is that of the pictures."""
    wrong = 0.05 * normal(16, seed=0)[:, None, None]
    model = model_of()
    noise_levels = []

    def denoised(model, context, noisy, sigma, features):
        noise_levels.append(sigma)
        return as_patches(model, context + wrong * (1 + (sigma < 1)[..., None, None, None, None].float()))

    monkeypatch.setattr(training, "denoise_clips", denoised)
    of_one = Training(model, 8, 1, 0.0, 0)
    state = of_one.data.generator.get_state()
    told = of_one.validate()
    grey = worlds.decode(torch.zeros(1, *model.latent_shape))
    want, twice = (psnr(worlds.decode(factor * wrong.expand(1, *model.latent_shape)), grey).item() for factor in (1, 2))
    assert told == {
        "from_noise_db": [pytest.approx(want, abs=0.02)] * CHUNKS,
        "half_db": pytest.approx(twice, abs=0.02),
    }
    assert [set(sigma.flatten().tolist()) for sigma in noise_levels] == [{1.0}, {0.5}]
    assert torch.equal(of_one.data.generator.get_state(), state)


def test_validation_does_not_depend_on_the_seed_of_the_training():
    one, other = training_of(seed=0), training_of(seed=1)
    other.model.load_state_dict(one.model.state_dict())
    told = one.validate()
    assert told == one.validate() == other.validate()
    assert len(told["from_noise_db"]) == CHUNKS


# --- stopping and going on ---


def rates(of_one):
    return [group["lr"] for optimizer in of_one.optimizers for group in optimizer.param_groups]


def test_going_on_from_a_checkpoint_is_going_through(tmp_path):
    through = training_of()
    losses = [through.advance() for _ in range(6)]
    stopped = training_of()
    for _ in range(3):
        stopped.advance()
    stopped.save(tmp_path / "checkpoint.pt")
    resumed = training_of()
    resumed.resume(tmp_path / "checkpoint.pt")
    assert (resumed.step, resumed.seconds) == (3, stopped.seconds)
    assert [resumed.advance() for _ in range(3)] == losses[3:]
    assert rates(resumed) == rates(through) == [rate * share_of_rate(5, 8) for rate in (0.02, 2e-3, 2e-3)]
    for name, parameter in through.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], parameter), name
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize(
    "other",
    [
        {"steps": 9},
        {"clips": 2},
        {"moving": 0.0},
        {"seed": 1},
        {"config": SmallWorldConfig(num_layers=1, num_heads=1, ffn_dim=64, frequency_dim=16, ray_octaves=3)},
    ],
)
def test_a_checkpoint_of_another_recipe_is_refused(tmp_path, other):
    path = tmp_path / "checkpoint.pt"
    training_of().save(path)
    of_other = training_of(**other)
    before = {name: parameter.clone() for name, parameter in of_other.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"--out must hold no checkpoint of another recipe, got .*'steps': 8"):
        of_other.resume(path)
    assert of_other.step == 0
    assert all(torch.equal(before[name], now) for name, now in of_other.model.state_dict().items())


# --- what is written ---


def test_written_weights_are_loaded_rounded_to_bf16(tmp_path):
    model = training_of(config=SmallWorldConfig(num_layers=2, num_heads=1, ffn_dim=64, sigmas=(1.0, 0.4))).model
    training.write_weights(model, tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = SmallWorld.from_pretrained(tmp_path, device="cpu", dtype=dtype)
        assert loaded.config == model.config and loaded.sigmas == (1.0, 0.4)
        for name, parameter in model.state_dict().items():
            got = loaded.state_dict()[name]
            assert torch.equal(got.float(), parameter.to(torch.bfloat16).float()), name


def command(monkeypatch, folder, *arguments):
    monkeypatch.setattr(training, "SmallWorldConfig", partial(SmallWorldConfig, **SIZES))
    monkeypatch.setattr(training, "WORLDS", 1)
    monkeypatch.setattr(training, "MODES", {"sliding window": {"mode": "sliding", "recent_frames": 12}})
    argv = ["train_small_world.py", "--out", str(folder), "--steps", "4", "--clips", "1", *arguments]
    monkeypatch.setattr("sys.argv", argv)
    training.main()
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


SIZES = {"num_layers": 1, "num_heads": 1, "ffn_dim": 64, "frequency_dim": 16}


def test_the_command_writes_weights_that_load_and_a_log(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "new" / "folder"
    *log, table = command(monkeypatch, folder, "--moving", "0.5", "--seed", "3")
    names = {"config.json", "model.safetensors", "log.jsonl", "checkpoint.pt"}
    assert {path.name for path in folder.iterdir()} == names
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert all(line.keys() == {"step", "minutes", "loss", "from_noise_db", "half_db"} for line in log)
    assert all(json.dumps(line) in capsys.readouterr().out for line in log[:1])
    assert (folder / "model.safetensors").stat().st_size % 2 == 0
    model = SmallWorld.from_pretrained(folder, device="cpu", dtype=torch.float32)
    assert model.config == SMALL
    through = training_of(steps=4, seed=3)
    assert [round(through.advance(), 5) for _ in range(4)] == [line["loss"] for line in log]
    assert torch.equal(model.head.head.weight, through.model.head.head.weight.to(torch.bfloat16).float())
    # What its memories are worth, by weights that were not rounded and the rounded ones.
    assert table.keys() == {"psnr_db"} and table["psnr_db"].keys() == {"sliding window"}
    worth = table["psnr_db"]["sliding window"]
    assert worth == training.table({"fp32": through.model, "bf16": model})["sliding window"]
    assert worth["bf16"] == pytest.approx(worth["fp32"], abs=0.2) and 3 < worth["bf16"] < 20
    # Once more does nothing: it is done.
    assert command(monkeypatch, folder, "--moving", "0.5", "--seed", "3") == [*log, table]


def test_the_command_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(Training, "validate", lambda of_one: {})
    whole = command(monkeypatch, tmp_path / "whole")
    advance = Training.advance

    def stopped(of_one):
        if of_one.step == 2:
            raise KeyboardInterrupt
        return advance(of_one)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "advance", stopped)
        with pytest.raises(KeyboardInterrupt):
            command(patch, tmp_path / "parts")
    parts = command(monkeypatch, tmp_path / "parts")
    assert [line.get("loss") for line in parts] == [line.get("loss") for line in whole]
    assert parts[-1] == whole[-1] and "psnr_db" in whole[-1]
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("whole", "parts")]
    assert weights[0] == weights[1]


def test_one_stopped_after_its_last_checkpoint_has_its_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(Training, "validate", lambda of_one: {})
    save = Training.save

    def stopped(of_one, path):
        save(of_one, path)
        if of_one.step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Training, "save", stopped)
        with pytest.raises(KeyboardInterrupt):
            command(patch, tmp_path)
    command(monkeypatch, tmp_path)
    trained = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    written = SmallWorld.from_pretrained(tmp_path, device="cpu", dtype=torch.float32).state_dict()
    for name, parameter in trained.items():
        assert torch.equal(written[name], parameter.to(torch.bfloat16).float()), name

"""worldkv rollout --save and --resume."""

import json

import pytest
import torch

from worldkv_kernels import WorldMemory
from worldkv_kernels.cli import main
from worldkv_kernels.models.checkpoint import read_tensors
from worldkv_kernels.models.small_world import SmallWorld

RUN = ["rollout", "--random", "--layers", "1", "--device", "cpu", "--trajectory", "right*54,left*53"]
RUN += ["--modes", "worldkv", "--retrieved-chunks", "2", "--recent-frames", "3"]


def latents(path):
    return read_tensors(path)["worldkv"]


def test_two_evenings_make_the_walk_of_one(tmp_path, capsys):
    walk, files = str(tmp_path / "walk.worldkv"), [str(tmp_path / f"{i}.safetensors") for i in range(3)]
    assert main([*RUN, "--chunks", "9", "--save-latents", files[0]]) == 0
    assert main([*RUN, "--chunks", "5", "--save-latents", files[1], "--save", walk]) == 0
    assert f"wrote {walk}: 5 chunks" in capsys.readouterr().err
    options = ["--resume", walk, "--save", walk, "--bank", "host", "--json", str(tmp_path / "out.json")]
    assert main([*RUN, "--chunks", "9", "--save-latents", files[2], *options]) == 0
    told = capsys.readouterr()
    assert "resumed: 5 chunks are made" in told.out and f"wrote {walk}: 9 chunks" in told.err
    assert torch.equal(torch.cat([latents(files[1]), latents(files[2])]), latents(files[0]))
    chunks = json.loads((tmp_path / "out.json").read_text())["modes"]["worldkv"]["chunks"]
    assert [chunk["chunk"] for chunk in chunks] == [5, 6, 7, 8]


def test_an_interrupted_walk_is_put_by(tmp_path, monkeypatch, capsys):
    walk, whole, rest = (str(tmp_path / name) for name in ("walk", "whole.safetensors", "rest.safetensors"))
    assert main([*RUN, "--chunks", "6", "--save-latents", whole]) == 0
    prepare = SmallWorld.prepare_chunk

    def interrupted(self, of_rollout, start_frame, controls):
        if start_frame == 9:
            raise KeyboardInterrupt
        return prepare(self, of_rollout, start_frame, controls)

    monkeypatch.setattr(SmallWorld, "prepare_chunk", interrupted)
    first = str(tmp_path / "first.safetensors")
    assert main([*RUN, "--chunks", "6", "--save", walk, "--save-latents", first]) == 130
    assert f"wrote {walk}: 3 chunks" in capsys.readouterr().err
    monkeypatch.undo()
    assert main([*RUN, "--chunks", "6", "--resume", walk, "--save-latents", rest]) == 0
    assert torch.equal(torch.cat([latents(first), latents(rest)]), latents(whole))


DEFAULTS = RUN[: RUN.index("worldkv")]


@pytest.mark.parametrize("mode", ["worldkv", "full", "sliding"])
def test_a_longer_walk_needs_no_more_arguments(mode, tmp_path):
    """With the defaults, of which some follow the number of chunks."""
    walk, whole, rest = (str(tmp_path / name) for name in ("walk", "whole.safetensors", "rest.safetensors"))
    run = [*DEFAULTS, mode, "--save-latents"]
    assert main([*run, whole, "--chunks", "9"]) == 0
    assert main([*run, rest, "--chunks", "3", "--save", walk]) == 0
    assert main([*run, rest, "--chunks", "9", "--resume", walk]) == 0
    longer, made = read_tensors(whole)[mode][9:], read_tensors(rest)[mode]
    assert made.shape == longer.shape and made.isfinite().all()
    if mode != "worldkv":  # there the window was made for as many chunks as the first walk had
        assert torch.equal(made, longer)


def test_a_bank_with_no_room_for_all_is_resumed_as_it_was(tmp_path, monkeypatch, capsys):
    walk, load = str(tmp_path / "walk"), WorldMemory.__init__
    assert main([*RUN, "--chunks", "3", "--save", walk]) == 0

    def without_room(self, config, **options):
        if config.bank_chunks == 9:
            raise ValueError("WorldMemory: storage must fit the little that is free")
        load(self, config, **options)

    monkeypatch.setattr(WorldMemory, "__init__", without_room)
    assert main([*RUN, "--chunks", "9", "--resume", walk]) == 0
    assert main([*RUN, "--chunks", "9", "--resume", walk, "--bank-chunks", "9"]) == 2
    assert "--resume: " in (said := capsys.readouterr().err) and "storage must fit" in said


@pytest.mark.parametrize(
    "options, said",
    [
        (["--modes", "worldkv,full"], "--resume must go with one of --modes, got full, worldkv"),
        (["--modes", "full"], "--modes must be worldkv, as in {walk}, got full"),
        (["--keep-ratio", "0.5"], "--keep-ratio must be 0.25, as in {walk}, got 0.5"),
        (["--diversity", "0.5"], "--retrieval must be "),
        (["--seed", "3"], "--seed must be 0, as in {walk}, got 3"),
        (["--chunks", "3"], "--resume: trajectory must be of more than the 3 chunks made, got one of 3"),
        (["--trajectory", "forward*99"], "--resume: poses must lead through the 3 chunks made"),
        (["--layers", "2"], "--resume: {walk}: memory must be of the model's num_layers=2, got 1"),
        (["--picture", "x.svg"], "--picture must be left out with --resume"),
        (["--resume", "{walk}.not"], "--resume: path must be a file that save wrote, got {walk}.not"),
        (["--save", "{walk}/in/no/folder"], "--save must be a file that can be written"),
    ],
)
def test_what_does_not_go_with_it_is_refused(options, said, walk, capsys):
    options = [option.format(walk=walk) for option in options]
    assert main([*RUN, "--resume", walk, *options]) == 2
    assert said.format(walk=walk) in capsys.readouterr().err


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("saved") / "walk")
    assert main([*RUN, "--chunks", "3", "--save", path, "--quiet"]) == 0
    return path

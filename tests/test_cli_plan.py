"""worldkv plan: its numbers are those of the memory and the model, and the README's rows are its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli_rollout_models import SMALL
from test_memory_sizes import bytes_of

from worldkv_kernels.actions import Actions
from worldkv_kernels.cli import main, plan
from worldkv_kernels.cli.plan_activations import _NoMemory, activations
from worldkv_kernels.models.lingbot_config import LingBotConfig
from worldkv_kernels.models.lingbot_world_fast import LingBotWorldFast
from worldkv_kernels.models.matrix_game_2 import MatrixGame2
from worldkv_kernels.models.matrix_game_config import MatrixGameConfig
from worldkv_kernels.models.rollout import Controls
from worldkv_kernels.models.small_world import SmallWorld, SmallWorldConfig
from worldkv_kernels.trajectory import DEFAULT_INTRINSICS

ROOT = Path(__file__).parents[1]
GIB = 2**30
CARDS = "24,48,80,141"


def planned(capsys, *arguments: str) -> dict:
    assert main(["plan", *arguments, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def row_of(result: dict, gpu: str, ratio: float, bank: str) -> dict:
    (row,) = (r for r in result["rows"] if (r["gpu"], r["keep_ratio"], r["bank"]) == (gpu, ratio, bank))
    return row


# --- what fits ---


@pytest.mark.parametrize(
    "model, config, seconds",
    [("lingbot_world_fast", LingBotConfig.fast(), 0.75), ("matrix_game_2", MatrixGameConfig.universal(), None)],
)
def test_one_chunk_more_would_not_fit(model, config, seconds, capsys):
    result = planned(capsys, "--model", model, "--gpu", "24,80,61GiB", "--host", "40")
    fixed, host = sum(result["fixed_bytes"].values()), 40 * GIB * 15 // 16
    assert result["host"] == {"name": "40 GB", "bytes": host}
    free = planned(capsys, "--model", model, "--gpu", "24", "--host", "40GiB")["host"]
    assert free == {"name": "40 GiB free", "bytes": host}  # an arena leaves a sixteenth of that, too
    assert {row["gpu"]: row["gpu_bytes"] for row in result["rows"]} == {
        "24 GB": 24 * GIB * 15 // 16, "80 GB": 80 * GIB * 15 // 16, "61 GiB free": 61 * GIB,
    }  # fmt: skip
    assert len(result["rows"]) == 3 * 3 * 2
    fitting = [row for row in result["rows"] if row["fits"]]
    assert {row["bank"] for row in fitting} == {"device", "host"}
    for row in result["rows"]:
        memory = config.memory(keep_ratio=row["keep_ratio"], bank=row["bank"])
        least = memory.bytes(bank_chunks=6)
        if not row["fits"]:
            assert fixed + least.device > row["gpu_bytes"] or least.host > host
            assert row["device_bytes"] == fixed + least.device and row["video_frames"] is row["seconds"] is None
            continue
        sizes = memory.bytes(bank_chunks=row["bank_chunks"])
        assert (row["device_bytes"], row["host_bytes"]) == (fixed + sizes.device, sizes.host)
        assert row["memory_bytes"] == sizes.parts
        assert row["device_bytes"] <= row["gpu_bytes"] and row["host_bytes"] <= host
        more = memory.bytes(bank_chunks=row["bank_chunks"] + 1)
        assert row["is_most"] == (row["bank_chunks"] == 1000)
        assert row["is_most"] or fixed + more.device > row["gpu_bytes"] or more.host > host
        assert row["video_frames"] == 12 * row["bank_chunks"]
        assert row["seconds"] == (seconds and seconds * row["bank_chunks"])


def test_without_host_memory_said_a_host_bank_holds_all(capsys):
    row = row_of(planned(capsys, "--model", "matrix_game_2", "--gpu", "24"), "24 GB", 0.25, "host")
    assert main(["plan", "--model", "matrix_game_2", "--gpu", "24"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["24", "GB", "host", "0.25", "16", "1000", "or", "more", "12,000", "-"] in [line[:10] for line in lines]
    assert (row["bank_chunks"], row["is_most"], row["video_frames"]) == (1000, True, 12000)
    assert row["host_bytes"] == MatrixGameConfig().memory(bank="host").bytes(bank_chunks=1000).host


def test_fewer_bits_hold_more_chunks(capsys):
    result = planned(capsys, "--model", "lingbot_world_fast", "--gpu", "80", "--host", "512", "--bank-bits", "16,8, 4")
    assert [row["bank_bits"] for row in result["rows"]] == 3 * [16, 16, 8, 8, 4, 4]
    for row in result["rows"]:
        memory = LingBotConfig().memory(keep_ratio=row["keep_ratio"], bank=row["bank"], bank_bits=row["bank_bits"])
        assert row["memory_bytes"] == memory.bytes(bank_chunks=row["bank_chunks"] or 6).parts
    at = {(row["bank_bits"], row["bank"]): row["bank_chunks"] for row in result["rows"] if row["keep_ratio"] == 0.25}
    assert 1.9 < at[8, "host"] / at[16, "host"] < 2.0 and 3.5 < at[4, "host"] / at[16, "host"] < 3.6
    assert at[8, "device"] >= 2 * at[16, "device"] and at[4, "device"] >= 3.5 * at[16, "device"]
    assert main(["plan", "--model", "lingbot_world_fast", "--gpu", "80", "--bank-bits", "4"]) == 0
    parts = capsys.readouterr().out
    assert "a banked chunk, keep_ratio 0.25, 4 bits, in host memory" in parts
    packed, whole = (LingBotConfig().memory(keep_ratio=1.0, bank_bits=bits).bytes(bank_chunks=6) for bits in (4, 16))
    restores = packed.restored + packed.tables - whole.tables
    assert restores > packed.restored > 0
    assert ["and", "what", "restores", "a", "layer", "of", "those", "retrieved", f"{restores / 2**20:.1f}", "MiB"] in [
        line.split() for line in parts.splitlines()
    ]
    assert main(["plan", "--model", "lingbot_world_fast", "--gpu", "80", "--bank-bits", "16,2"]) == 2
    assert "--bank-bits must be of 16, 8, 4, joined by commas, got '16,2'" in capsys.readouterr().err


def test_no_number_of_frames_is_too_many_to_plan(capsys):
    rows = planned(capsys, "--model", "matrix_game_2", "--gpu", "80,999999", "--sink-frames", "3000",
                   "--retrieved-chunks", "1100")["rows"]  # fmt: skip
    assert {row["fits"] for row in rows if row["gpu"] == "80 GB"} == {False}
    assert {row["bank_chunks"] for row in rows if row["gpu"] != "80 GB"} == {1100}  # as many as a window retrieves


def test_what_to_change_makes_it_fit(capsys):
    result = planned(capsys, "--model", "lingbot-world-fast", "--gpu", "80", "--keep-ratio", "1", "--host", "64")
    fixed, changes = sum(result["fixed_bytes"].values()), row_of(result, "80 GB", 1, "device")["changes"]
    assert [{n: v for n, v in c.items() if not n.endswith("_bytes")} for c in changes] == [
        {"keep_ratio": 0.5}, {"bank_bits": 8}, {"retrieved_chunks": 5, "bank_chunks": 5}, {"recent_frames": 3}
    ]  # fmt: skip
    for change in changes:
        fields = {n: v for n, v in change.items() if not n.endswith("_bytes")}
        sizes = LingBotConfig().memory(**{"bank_chunks": 6, "keep_ratio": 1, **fields}).bytes()
        assert change["device_bytes"] == fixed + sizes.device <= 75 * GIB
    options = ["--retrieved-chunks", "5", "--keep-ratio", "1", "--host", "64"]
    followed = planned(capsys, "--model", "lingbot_world_fast", "--gpu", "80", *options)
    assert row_of(followed, "80 GB", 1, "device")["bank_chunks"] == 5


def test_the_text_says_what_the_document_does(capsys):
    arguments = ["plan", "--model", "lingbot_world_fast", "--gpu", "24,48,80", "--host", "128"]
    result = planned(capsys, *arguments[1:])
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "a chunk 3 of them, 12 video frames, 0.75 s at 16 frames a second" in text
    lines = [line.split() for line in text.splitlines()]
    for row in result["rows"]:
        found = [str(row["bank_chunks"]), f"{row['video_frames']:,}", f"{row['seconds']:.1f}"] if row["fits"] else (
            ["does", "not", "fit", "-", "-"])  # fmt: skip
        sizes = [f"{row[name] / GIB:.1f}" for name in ("device_bytes", "gpu_bytes", "host_bytes")]
        assert [*row["gpu"].split(), row["bank"], f"{row['keep_ratio']:g}", "16", *found, *sizes] in lines
    for part in ("weights", "activations"):
        assert [part, f"{result['fixed_bytes'][part] / GIB:.1f}", "GiB"] in lines
    taken = sum(result["fixed_bytes"].values()) / GIB
    assert "24 GB: 34.9 GiB of weights, as they are loaded, are too much; another --variant" in text
    assert "; --fp8, another --variant, a smaller --grid or a larger GPU" in text  # of 48 GB, which load the weights
    assert f"48 GB: {45 - taken:.1f} GiB are left for a memory; no one change is enough, nor are all of these: " in text
    enough = (
        "80 GB, device bank, keep_ratio 1, 16 bits: enough would be keep_ratio=0.5 (29.1 GiB) or bank_bits=8 (25.9 GiB)"
    )
    assert enough in text
    assert "15/16 of so many GiB" in text and "an H100 held 4.6 GiB in a pass" in text


@pytest.mark.parametrize(
    ("gpu", "said"),
    [
        ("1", "1 GB: the 1.0 GiB assumed for libraries are too much alone; a larger GPU"),
        (
            "1.001GiB",
            "1.001 GiB free: 1.0 GiB before any memory, 1.0 GiB of it assumed for libraries, are too much; "
            "another --variant",
        ),
    ],
)
def test_what_is_assumed_for_libraries_is_named_where_it_is_too_much(capsys, gpu, said):
    assert main(["plan", "--model", "small_world", "--dtype", "float32", "--gpu", gpu]) == 0
    assert any(line.startswith(said) for line in capsys.readouterr().out.splitlines())


def test_linear_layers_in_fp8_take_half(capsys):
    wide, narrow = (
        planned(capsys, "--model", "lingbot_world_fast", "--gpu", "80", *of) for of in ((), ("--fp8",))
    )  # fmt: skip
    assert 0.5 < narrow["fixed_bytes"]["weights"] / wide["fixed_bytes"]["weights"] < 0.52
    assert narrow["fixed_bytes"]["activations"] == wide["fixed_bytes"]["activations"]
    assert (narrow["model"]["fp8"], wide["model"]["fp8"]) == (True, False)
    assert row_of(narrow, "80 GB", 0.5, "device")["bank_chunks"] > row_of(wide, "80 GB", 0.5, "device")["bank_chunks"]
    assert main(["plan", "--model", "lingbot_world_fast", "--gpu", "24", "--fp8"]) == 0
    out = capsys.readouterr().out
    assert "bfloat16, linear layers in FP8: 18,544.3 million parameters" in out and "too much; another --variant" in out
    small = ("--grid", "16,28", "--retrieved-chunks", "1")  # which would fit, but FP8 is made of what was loaded
    rows = planned(capsys, "--model", "lingbot_world_fast", "--gpu", "32", "--fp8", *small)["rows"]
    assert all(row["device_bytes"] < row["gpu_bytes"] and not row["fits"] for row in rows)
    assert main(["plan", "--model", "lingbot_world_fast", "--gpu", "24", "--fp8", "--dtype", "float16"]) == 2
    assert "--fp8 must go with --dtype bfloat16, got float16" in capsys.readouterr().err


def test_what_else_is_on_the_card_and_other_sizes_are_counted(capsys):
    plain = planned(capsys, "--model", "matrix_game_2", "--gpu", "24", "--keep-ratio", "1")
    other = planned(capsys, "--model", "matrix_game_2", "--gpu", "24", "--keep-ratio", "1", "--other", "2.5")
    assert other["fixed_bytes"] == {**plain["fixed_bytes"], "other": 2.5 * GIB}
    each = MatrixGameConfig().memory(keep_ratio=1)
    each = each.bytes(bank_chunks=8).device - each.bytes(bank_chunks=7).device
    rows = [row_of(result, "24 GB", 1, "device") for result in (plain, other)]
    assert abs((rows[0]["bank_chunks"] - rows[1]["bank_chunks"]) * each - 2.5 * GIB) < each
    wide = planned(capsys, "--model", "matrix_game_2", "--gpu", "24", "--dtype", "float32", "--grid", "11,20")
    assert wide["model"]["grid"] == [11, 20] and wide["fixed_bytes"]["weights"] > 1.9 * plain["fixed_bytes"]["weights"]
    slots = planned(capsys, "--model", "matrix_game_2", "--gpu", "24", "--device-slots", "13", "--sink-frames", "3",
                    "--recent-frames", "6", "--retrieved-chunks", "4")  # fmt: skip
    assert slots["memory"] == dict(device_slots=13, sink_frames=3, recent_frames=6, retrieved_chunks=4)
    assert row_of(slots, "24 GB", 0.25, "host")["memory_bytes"] == (
        MatrixGameConfig().memory(bank="host", bank_chunks=1000, **slots["memory"]).bytes().parts
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "wan"], "--model must be one of small_world, lingbot_world_fast, matrix_game_2, got 'wan'"),
        (["--variant", "fast2"], "--variant must be one of fast, v2-14b, v2-1.3b for lingbot_world_fast, got 'fast2'"),
        (["--gpu", "80,"], "--gpu must be a size such as 80 .* or 79GiB .*, above 0 and at most 1048576, got ''"),
        (["--gpu", "0"], "--gpu must be a size .*, got '0'"),
        (["--gpu", "-80"], "--gpu must be a size .*, got '-80'"),
        (["--gpu", "80TB"], "--gpu must be a size .*, got '80TB'"),
        (["--gpu", "9999999"], "--gpu must be a size .*, got '9999999'"),
        (["--host", "much"], "--host must be a size .*, got 'much'"),
        (["--keep-ratio", "0.5,2"], "--keep-ratio must be numbers above 0 and at most 1, .*, got '0.5,2'"),
        (["--keep-ratio", "half"], "--keep-ratio must be numbers above 0 and at most 1, .*, got 'half'"),
        (["--dtype", "int8"], "--dtype must be one of bfloat16, float16, float32, got 'int8'"),
        (["--other", "-1"], "--other must be from 0 to 1048576 GiB, got -1.0"),
        (["--other", "nan"], "--other must be from 0 to 1048576 GiB, got nan"),
        (
            ["--device-slots", "5", "--retrieved-chunks", "6"],
            "--device-slots must be at least --retrieved-chunks 6, got 5",
        ),
        (["--json", "nope/x.json"], "--json must be a file that can be written, got 'nope/x.json': .*"),
    ],
)
def test_errors(arguments, message, capsys):
    given = {"--model": "lingbot_world_fast", "--gpu": "80", **dict(zip(arguments[::2], arguments[1::2], strict=True))}
    assert main(["plan", *(f"{name}={value}" for name, value in given.items())]) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(f"worldkv plan: {message}\n", err), err


def test_it_says_what_it_needs(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan"])
    assert ended.value.code == 2 and "the following arguments are required: --model, --gpu" in capsys.readouterr().err


def test_it_takes_no_memory_and_little_time():
    """A model of 35 GiB, in a process of less than one."""
    code = (
        "import re, sys, time, torch\n"
        "from worldkv_kernels.cli import main\n"
        "began = time.process_time()\n"
        "status = main(['plan', '--model', 'lingbot_world_fast', '--gpu', '80'])\n"
        "status_file = open('/proc/self/status').read()\n"  # getrusage begins at its parent's peak
        "most = int(re.search(r'VmHWM:\\s+(\\d+)', status_file)[1]) * 1024\n"
        "print('took', time.process_time() - began, most, torch.cuda.is_initialized())\n"
        "sys.exit(status)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    seconds, most, used_gpu = re.search(r"took (\S+) (\S+) (\S+)", done.stdout).groups()
    assert float(seconds) < 20 and int(most) < 2 * GIB and used_gpu == "False"


# --- weights and activations ---

MODELS = [
    (SmallWorld, SmallWorldConfig(num_layers=2)),
    (LingBotWorldFast, SMALL["lingbot_world_fast"]["fast"]),
    (MatrixGame2, SMALL["matrix_game_2"]["universal"]),
]
IDS = [made_of.__name__ for made_of, _ in MODELS]


@pytest.mark.parametrize("made_of, config", MODELS, ids=IDS)
def test_held_is_what_the_model_keeps(made_of, config):
    """Of a model that is computed, counted by walking what it prepares for a rollout and its first chunk."""
    model = made_of.random(config, device="cpu", dtype=torch.float32)
    frames = config.chunk_frames
    poses = np.tile(np.eye(4), (frames, 1, 1))
    actions = Actions(np.zeros((9, 2), np.float32), np.zeros((9, 4), np.float32)) if made_of is MatrixGame2 else None
    controls = Controls(poses, np.tile(DEFAULT_INTRINSICS, (frames, 1)), actions)
    with torch.no_grad():
        of_rollout = model.prepare_rollout(None, poses[0], (*model.sigmas, 0.0))
        of_chunk = model.prepare_chunk(of_rollout, 0, controls)
    kept = bytes_of([of_rollout, of_chunk, torch.empty(frames, *model.latent_shape)])
    on_meta = activations(made_of(config, device="meta", dtype=torch.float32))
    assert on_meta.held == kept
    assert activations(model, "cpu").held >= kept


@pytest.mark.parametrize("made_of, config", MODELS, ids=IDS)
def test_a_pass_takes_as_much_however_deep_the_model_is(made_of, config):
    deep = made_of.Config(**{**vars(config), "num_layers": 6})
    shallow, deep = (activations(made_of(c, device="meta", dtype=torch.bfloat16)) for c in (config, deep))
    assert shallow.passing == deep.passing > 0 and shallow.held < deep.held
    hidden = config.chunk_frames * config.grid[0] * config.grid[1] * config.ffn_dim * 2  # of the feed-forward, in bf16
    assert shallow.passing >= 2 * hidden  # before the activation function and after it


def test_a_pass_takes_what_the_profiler_sees():
    """PyTorch's own record of what the CPU's allocator gave and took back, over one pass of a model without text."""
    config = SmallWorldConfig(num_layers=3, grid=(16, 16))
    model = SmallWorld.random(config, device="cpu", dtype=torch.float32)
    poses = np.tile(np.eye(4), (3, 1, 1))
    with torch.no_grad():
        of_rollout = model.prepare_rollout(None, poses[0], (*model.sigmas, 0.0))
        of_chunk = model.prepare_chunk(of_rollout, 0, Controls(poses, np.tile(DEFAULT_INTRINSICS, (3, 1))))
        latents = torch.zeros(3, *model.latent_shape)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            model.denoise(latents, 0, of_chunk, _NoMemory(2, 64))
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    counted = activations(SmallWorld(config, device="meta", dtype=torch.float32)).passing
    assert most > 0 and counted == pytest.approx(most, rel=0.1)


def test_weights_are_those_of_the_model(capsys):
    result = planned(capsys, "--model", "matrix_game_2", "--variant", "templerun", "--gpu", "24")
    model = MatrixGame2(MatrixGameConfig.templerun(), device="meta", dtype=torch.bfloat16)
    assert result["fixed_bytes"]["weights"] == sum(p.nbytes for p in model.parameters())
    passes = activations(model)
    assert result["activations"]["held"] == passes.held and result["activations"]["passing"] == passes.passing
    assert result["fixed_bytes"]["activations"] == passes.held + 2 * passes.passing + GIB


# --- README ---

README_MODELS = {"LingBot-World-Fast": "lingbot_world_fast", "Matrix-Game-2.0": "matrix_game_2"}


def test_the_rows_of_the_readme_are_what_the_command_says(capsys):
    readme = (ROOT / "README.md").read_text()
    (command,) = set(re.findall(r"worldkv plan --model \S+ (--gpu \S+ --host \d+)", readme))
    assert command == f"--gpu {CARDS} --host 128"
    rows = {
        tuple(cells[:2]): cells[2:]
        for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in readme.splitlines())
        if cells[0] in README_MODELS and cells[1].endswith(" GB")
    }
    wanted = {}
    for name, model in README_MODELS.items():
        result = planned(capsys, "--model", model, *command.split())
        for card in CARDS.split(","):
            found = [row_of(result, f"{card} GB", ratio, bank) for bank in plan.BANKS for ratio in (1, 0.5, 0.25)]
            wanted[name, f"{card} GB"] = [readme_cell(row) for row in found]
    assert rows == wanted


def readme_cell(row: dict) -> str:
    if not row["fits"]:
        return "-"
    seconds = f", {row['seconds']:.0f} s" if row["seconds"] is not None else ""
    return f"{row['bank_chunks']}{seconds}"

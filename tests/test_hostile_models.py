"""Malformed models and checkpoints end sample.py and train.py with one line and exit code 2; nothing is written, and
memory stays small.
"""

import json
import math
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hostile import Outcome, assert_refused, damaged, outcome, safetensors, save, tree
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sample
import train
from common import read_json

UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
PROMPT = "prompt_embedding.safetensors"
CONFIGS = ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json")


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    """A copy of a model, to be spoilt."""
    return shutil.copytree(trained, tmp_path / "model")


def translate(tmp_path: Path, *options: str) -> Outcome:
    """Translates a good image with the model in tmp_path, or another one."""
    save(tmp_path / "in" / "a.png")
    arguments = [str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--steps", "1"]
    return outcome(sample.main, [*arguments, "--model", str(tmp_path / "model"), *options])


def assert_model_refused(tmp_path: Path, *words: str, options: tuple[str, ...] = ()) -> None:
    """One line, and nothing is changed on disk."""
    save(tmp_path / "in" / "a.png")
    before = tree(tmp_path)
    assert_refused(translate(tmp_path, *options), *words)
    assert tree(tmp_path) == before


def test_the_model_that_is_spoilt_here_translates(folder, tmp_path):
    assert translate(tmp_path).code == 0 and (tmp_path / "out" / "a_confidence.png").exists()


# ----------------------------------------------------------------------------------------------------------
# Safetensors

GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}  # one tensor of a header


def lying(header: object, data: int = 8, length: int | None = None) -> bytes:
    """A safetensors file with this header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return safetensors(text, bytes(data), length)


HEADERS = {
    "overlapping": lying({"a": GOOD, "b": GOOD | {"data_offsets": [4, 12]}}, 12),
    "gap": lying({"a": GOOD | {"data_offsets": [4, 12]}}, 12),
    "beyond": lying({"a": GOOD | {"shape": [2 * 10**9], "data_offsets": [0, 8 * 10**9]}}),
    "backwards": lying({"a": GOOD | {"data_offsets": [8, 0]}}),
    "wrong length": lying({"a": GOOD | {"shape": [3]}}),
    "overflow": lying({"a": GOOD | {"shape": [2**62, 2**62]}}),
    "negative shape": lying({"a": GOOD | {"shape": [-2]}}),
    "huge number": lying({"a": GOOD | {"shape": [10**30]}}),
    "text shape": lying({"a": GOOD | {"shape": "2"}}),
    "odd dtype": lying({"a": GOOD | {"dtype": "F7"}}),
    "list": lying([1, 2]),
    "no tensors": lying({}),
    "other tensors": lying({"a": GOOD}),
    "length too large": lying({"a": GOOD}, length=10**6),
    "length most": lying({"a": GOOD}, length=2**64 - 1),
    "length in the middle": lying({"a": GOOD}, length=10),
    "nested": lying(b'{"a":' * 10_000 + b"1" + b"}" * 10_000),
    "huge header": lying(b'{"' + b"a" * 10**8 + b'":1}'),
    "not UTF-8": lying(b'{"\xff":1}'),
    "escape": lying({"\x1b[2J\nerror: all is well": GOOD}),
    "empty": b"",
    "zeros": bytes(4096),
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_safetensors_file_that_lies_is_one_line(folder, tmp_path, name):
    (folder / UNET).write_bytes(HEADERS[name])
    assert_model_refused(tmp_path, "unet")


@pytest.mark.parametrize("how", ["cut", "zeros", "flipped"])
def test_a_damaged_safetensors_file_is_one_line_or_still_finite_weights(folder, tmp_path, how):
    whole = (folder / UNET).read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    for seed in range(6):
        content = damaged(whole, how, seed)
        if how != "cut":  # of the header
            content = damaged(whole[: 8 + length], how, seed) + whole[8 + length :]
        (folder / UNET).write_bytes(content)
        assert_model_refused(tmp_path, "unet")


SPOILT = {
    "NaN": lambda x: x * math.nan,
    "one infinity": lambda x: x.index_fill(0, torch.tensor([0]), math.inf),
    "flat": lambda x: x.flatten(),
    "scalar": lambda x: x.sum(),
    "empty": lambda x: x[:0],
    "another dimension": lambda x: x[None],
    "int64": lambda x: x.long(),
    "bool": lambda x: x.bool(),
    "complex64": lambda x: x.to(torch.complex64),
    "too large for float16": lambda x: x * 1e38,
}


TENSORS = {UNET: "conv_in.weight", VAE: "quant_conv.weight", PROMPT: "prompt_embedding"}


@pytest.mark.parametrize("kind", SPOILT)
@pytest.mark.parametrize("file, name", TENSORS.items())
def test_tensors_of_wrong_shape_type_or_numbers_are_one_line(folder, tmp_path, kind, file, name):
    tensors = load_file(folder / file)
    save_file(tensors | {name: SPOILT[kind](tensors[name]).contiguous()}, folder / file)
    options = ("--dtype", "float16") if "float16" in kind else ()
    assert_model_refused(tmp_path, str(tmp_path / "model"), options=options)


@pytest.mark.parametrize(
    "place", ["unet/config.json", VAE, "scheduler/scheduler_config.json", PROMPT, "file", "--unet"]
)
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "zero", "null"])
def test_what_is_no_file_never_makes_a_program_wait(folder, tmp_path, place, kind):
    path = tmp_path / "other" if place in ("file", "--unet") else folder / place
    if path.exists():
        path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"loop": path.name, "zero": "/dev/zero", "null": "/dev/null"}[kind])
    options = {"file": ("--model", str(path)), "--unet": ("--unet", str(path))}.get(place, ())
    assert_model_refused(tmp_path, options=options)


@pytest.mark.parametrize("name", ["a.ckpt", "a.pt", "a.bin", "a.PTH", "a.safetensors"])
def test_a_pickle_is_refused_unread(folder, tmp_path, name):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)

    (tmp_path / name).write_bytes(pickle.dumps(Evil()))
    problem = "not a readable safetensors" if "safetensors" in name else "is a pickle, which can run code"
    for option in ("--unet", "--model"):
        assert_model_refused(tmp_path, problem, options=(option, str(tmp_path / name)))


def test_an_index_of_shards_is_not_followed(folder, tmp_path):
    (folder / UNET).rename(tmp_path / "a.safetensors")
    (folder / f"{UNET}.index.json").write_text(json.dumps({"weight_map": {"conv_in.weight": "../../a.safetensors"}}))
    assert_model_refused(tmp_path, "no diffusion_pytorch_model.safetensors")


# ----------------------------------------------------------------------------------------------------------
# Configurations

TEXTS = {
    "empty": "", "not JSON": "{", "list": "[]", "null": "null", "deep": "[" * 10**5 + "]" * 10**5,
    "huge number": '{"in_channels": ' + "9" * 10_000 + "}", "large": '{"_x": "' + " " * 2**24 + '"}',
    "bytes": "{\"\udcff\": 1}",
}  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("file", [*CONFIGS, "model_index.json"])
def test_a_configuration_that_is_no_object_is_one_line(folder, tmp_path, file, text):
    (folder / file).write_bytes(TEXTS[text].encode(errors="surrogateescape"))
    assert_model_refused(tmp_path, file)


HUGE, WRONG = (10**9, 2**63, 10**400), (0, -(10**12), True, 1.5, math.nan, math.inf, "8", [], None)
KEYS = {
    "unet/config.json": "block_out_channels layers_per_block norm_num_groups in_channels norm_eps",
    "vae/config.json": "block_out_channels layers_per_block norm_num_groups latent_channels scaling_factor",
    "scheduler/scheduler_config.json": "num_train_timesteps beta_start beta_end prediction_type",
}
FINE = {("norm_eps", 1.5), ("norm_eps", 10**9), ("scaling_factor", 1.5), ("scaling_factor", 10**9)}


@pytest.mark.parametrize(("file", "key"), [(file, key) for file, keys in KEYS.items() for key in keys.split()])
def test_a_configuration_of_wrong_or_huge_values_is_one_line_and_takes_no_memory(folder, tmp_path, file, key):
    config = read_json(folder / file)
    values = [*HUGE, *WRONG, json.loads("[" * 200 + "]" * 200)]
    if isinstance(config[key], list):
        values += [[value] * 2 for value in (*HUGE, *WRONG)] + [[16] * 10**5]
    for value in values:
        if isinstance(value, (int, float)) and (key, value) in FINE:
            continue
        (folder / file).write_text(json.dumps(config | {key: value}))
        assert_model_refused(tmp_path)


# ----------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def run(dataset, base, tmp_path_factory) -> tuple[list[str], Path]:
    """A training that can be resumed: its options and its folder."""
    out = tmp_path_factory.mktemp("run") / "run"
    options = f"--data {dataset} --model {base} --size 16 --batch-size 2 --workers 0 --device cpu --steps 3 "
    options = (options + "--save-every 1 --validate-every 3 --validate-images 1 --validate-steps 1").split()
    assert train.main([*options, "--out", str(out)]) == 0
    return options, out


def rewrite(path: Path, header: dict | None = None, **tensors: torch.Tensor | None) -> None:
    """Changes entries of a checkpoint's header, and tensors."""
    with safe_open(path, framework="pt") as file:
        text = json.dumps(json.loads(file.metadata()["training"]) | (header or {}))
    save_file({k: v for k, v in (load_file(path) | tensors).items() if v is not None}, path, {"training": text})


CHECKPOINTS = {
    "cut": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "no header": lambda p: save_file({"a": torch.zeros(1)}, p),
    "no settings": lambda p: rewrite(p, {"settings": None}),
    "settings are a list": lambda p: rewrite(p, {"settings": []}),
    "other settings": lambda p: rewrite(p, {"settings": {}}),
    "step is a text": lambda p: rewrite(p, {"step": "3"}),
    "step is negative": lambda p: rewrite(p, {"step": -3}),
    "missing": lambda p: rewrite(p, **{"network.conv_in.weight": None}),
    "unknown": lambda p: rewrite(p, **{"network.x": torch.zeros(1)}),
    "misshapen": lambda p: rewrite(p, **{"network.conv_in.weight": torch.zeros(1)}),
    "NaN": lambda p: rewrite(p, **{"optimizer.conv_in.bias.exp_avg": torch.full((8,), math.nan)}),
    "integers": lambda p: rewrite(p, **{"optimizer.conv_in.bias.exp_avg": torch.zeros(8, dtype=torch.int64)}),
    "pipe": lambda p: (p.unlink(), os.mkfifo(p)),
    "folder": lambda p: (p.unlink(), p.mkdir()),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_spoilt_checkpoint_is_one_line_and_the_one_before_serves(run, tmp_path, kind):
    options, whole = run
    out = shutil.copytree(whole, tmp_path / "run")
    last = out / "checkpoint" / "00000003.safetensors"
    CHECKPOINTS[kind](last)
    before = tree(out)
    assert_refused(outcome(train.main, [*options, "--out", str(out), "--resume"]))
    after = tree(out)
    for path in (*out.glob("checkpoint/*"), *out.rglob("model/*/*")):
        assert before[os.fsencode(path)] == after[os.fsencode(path)]
    shutil.rmtree(last) if last.is_dir() else last.unlink()
    result = outcome(train.main, [*options, "--out", str(out), "--resume"])
    assert result.code == 0 and not result.err
    ours, theirs = (load_file(folder / "checkpoint" / last.name) for folder in (out, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("content", [b"", b"step,lo", bytes(range(256)), b"step,loss\nx,y\n\n1\n", b"step\n1\n2\n"])
def test_a_damaged_log_stops_no_run(run, tmp_path, content):
    options, whole = run
    out = shutil.copytree(whole, tmp_path / "run")
    (out / "checkpoint" / "00000003.safetensors").unlink()
    (out / "log.csv").write_bytes(content)
    result = outcome(train.main, [*options, "--out", str(out), "--resume"])
    if result.code:
        assert_refused(result, "log.csv")
    else:
        assert not result.err and (out / "summary.json").exists()

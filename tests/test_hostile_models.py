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

import numpy as np
import pytest
import torch
from hostile import Outcome, assert_refused, damaged, outcome, safetensors, save, tree
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sample
import train
from common import read_json
from unet import UNet
from vae import AutoencoderKL
from weights import build, load_scheduler, open_model, open_tensors, read_config

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


def entry(dtype: str = "F32", shape: tuple = (2,), begin: int = 0, end: int = 8) -> dict:
    """One tensor of a header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def headers() -> dict[str, bytes]:
    """Safetensors files that lie."""
    two = {"a": entry(), "b": entry(begin=4, end=12)}
    whole = {"a": entry()}
    nested = b'{"a":' * 10_000 + b"1" + b"}" * 10_000
    lies = {
        "overlapping": two, "beyond": {"a": entry(end=8 * 10**9, shape=(2 * 10**9,))},
        "gap": {"a": entry(begin=4, end=12)},
        "negative": {"a": entry(begin=-8, end=0)}, "backwards": {"a": entry(begin=8, end=0)},
        "wrong length": {"a": entry(shape=(3,))}, "overflow": {"a": entry(shape=(2**62, 2**62))},
        "negative shape": {"a": entry(shape=(-2,))}, "huge number": {"a": entry(shape=(10**30,))},
        "no dtype": {"a": {"shape": [2], "data_offsets": [0, 8]}}, "odd dtype": {"a": entry("F7")},
        "text shape": {"a": entry() | {"shape": "2"}}, "fraction": {"a": entry() | {"shape": [2.0]}},
        "list": [1, 2], "text": "a", "null": None, "entry is a list": {"a": []}, "metadata": {"__metadata__": {"a": 1}},
        "no tensors": {}, "other tensors": whole, "empty tensor": {"a": entry(shape=(0,), end=0)},
    }  # fmt: skip
    cases = {name: safetensors(json.dumps(header).encode(), bytes(12)) for name, header in lies.items()}
    text = json.dumps(whole).encode()
    return cases | {
        "empty": b"", "seven bytes": bytes(7), "length 0": bytes(8), "plain text": b"not a safetensors file",
        "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "length too large": safetensors(text, bytes(8), 10**6),
        "length huge": safetensors(text, bytes(8), 2**63), "length most": safetensors(text, bytes(8), 2**64 - 1),
        "length in the middle": safetensors(text, bytes(8), 10), "nested": safetensors(nested),
        "huge header": safetensors(b'{"' + b"a" * 10**8 + b'":1}'), "not UTF-8": safetensors(b'{"\xff":1}'),
        "twice": safetensors(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)),
        "NaN": safetensors(b'{"a":NaN}'), "zeros": bytes(4096), "pickle": pickle.dumps({"a": 1}),
        "zip": b"PK\3\4" + bytes(99),
        "escape": safetensors(json.dumps({"\x1b[2J\nerror: all is well": entry()}).encode(), bytes(8)),
    }  # fmt: skip


HEADERS = headers()


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


def change(path: Path, name: str, function) -> None:
    """Puts function(tensor) in place of a tensor of a file."""
    tensors = load_file(path)
    tensors[name] = function(tensors[name]).contiguous()
    save_file(tensors, path)


SPOILT = {
    "NaN": lambda x: x * math.nan,
    "one infinity": lambda x: x.index_fill(0, torch.tensor([0]), math.inf),
    "transposed": lambda x: x.transpose(0, 1),
    "flat": lambda x: x.flatten(),
    "scalar": lambda x: x.sum(),
    "empty": lambda x: x[:0],
    "another dimension": lambda x: x[None],
    "int64": lambda x: x.long(),
    "uint8": lambda x: x.byte(),
    "bool": lambda x: x.bool(),
    "complex64": lambda x: x.to(torch.complex64),
    "int8": lambda x: x.to(torch.int8),
}


@pytest.mark.parametrize("kind", SPOILT)
@pytest.mark.parametrize(
    ("file", "name"), [(UNET, "conv_in.weight"), (VAE, "quant_conv.weight"), (PROMPT, "prompt_embedding")]
)
def test_tensors_of_wrong_shape_type_or_numbers_are_one_line(folder, tmp_path, kind, file, name):
    if kind == "transposed" and file == VAE:
        return  # it is square
    change(folder / file, name, SPOILT[kind])
    assert_model_refused(tmp_path, "model" if file == PROMPT else file.split("/")[0])


def test_weights_too_large_for_float16_are_one_line(folder, tmp_path):
    change(folder / UNET, "conv_in.weight", lambda x: x * 1e38)
    assert_model_refused(tmp_path, "conv_in.weight", "float16", options=("--dtype", "float16"))


@pytest.mark.parametrize(
    "place", ["unet/config.json", VAE, UNET, "scheduler/scheduler_config.json", PROMPT, "file", "--unet"]
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


@pytest.mark.parametrize("name", ["a.ckpt", "a.pt", "a.bin", "a.PTH"])
def test_a_pickle_is_refused_unread(folder, tmp_path, name):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)

    (tmp_path / name).write_bytes(pickle.dumps(Evil()))
    for option in ("--unet", "--model"):
        assert_model_refused(tmp_path, "is a pickle, which can run code", options=(option, str(tmp_path / name)))
    path = (tmp_path / name).rename(tmp_path / "a.safetensors")
    assert_model_refused(tmp_path, "not a readable safetensors file", options=("--unet", str(path)))


def test_an_index_of_shards_is_not_followed(folder, tmp_path):
    (folder / UNET).rename(tmp_path / "a.safetensors")
    (folder / f"{UNET}.index.json").write_text(json.dumps({"weight_map": {"conv_in.weight": "../../a.safetensors"}}))
    assert_model_refused(tmp_path, "no diffusion_pytorch_model.safetensors")


# ----------------------------------------------------------------------------------------------------------
# Configurations

DEEP = "[" * 200 + "]" * 200
TEXTS = {
    "empty": "", "not JSON": "{", "list": "[]", "number": "1", "null": "null", "deep": "[" * 10**5 + "]" * 10**5,
    "deep objects": '{"a":' * 10**5 + "1" + "}" * 10**5, "huge number": '{"in_channels": ' + "9" * 10_000 + "}",
    "large": '{"_x": "' + " " * 2**24 + '"}', "twice": "{}{}", "comment": "// {}", "bytes": "{\"\udcff\": 1}",
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
    values = [*HUGE, *WRONG, json.loads(DEEP)]
    if isinstance(config[key], list):
        values += [[value] * 2 for value in (*HUGE, *WRONG)] + [[16] * 10**5]
    for value in values:
        if isinstance(value, (int, float)) and (key, value) in FINE:
            continue
        (folder / file).write_text(json.dumps(config | {key: value}))
        assert_model_refused(tmp_path)


def test_any_value_of_any_key_gives_a_network_or_an_error_that_names_the_file(trained, tmp_path):
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    text, numbers = st.text(max_size=3), st.integers() | st.floats() | st.sampled_from([8, 16, 32, 0.5])
    simple = st.none() | st.booleans() | numbers | text
    values = st.recursive(simple, lambda x: st.lists(x, max_size=4) | st.dictionaries(text, x, max_size=3))
    configs = {file: read_json(trained / file) for file in CONFIGS}
    networks = {"unet/config.json": UNet, "vae/config.json": AutoencoderKL}
    keys = st.sampled_from([(file, key) for file, config in configs.items() for key in config])

    @hypothesis.settings(derandomize=True, deadline=None, max_examples=100, database=None)
    @hypothesis.given(keys, values)
    def property_of_configs(where, value):
        file, key = where
        path = tmp_path / Path(file).parent.name / Path(file).name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(configs[file] | {key: value}))
        try:
            if file in networks:
                part = open_model(trained)[Path(file).parent.name]
                build(networks[file], part._replace(config=read_config(path, networks[file])))
            else:
                assert load_scheduler(tmp_path).alphas_cumprod.isfinite().all()
        except ValueError as error:
            assert file.split("/")[0] in str(error)

    property_of_configs()


def test_any_header_is_tensors_or_an_error_that_names_the_file(tmp_path):
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    numbers = st.integers(-8, 64) | st.integers()
    dtypes, offsets = st.sampled_from(["F32", "F16", "I64", "BOOL", "F8_E4M3", "x"]), st.tuples(numbers, numbers)
    fields = {"dtype": dtypes, "shape": st.lists(numbers, max_size=3), "data_offsets": offsets}
    tensor = st.fixed_dictionaries(fields)
    path = tmp_path / "a.safetensors"

    @hypothesis.settings(derandomize=True, deadline=None, max_examples=200, database=None)
    @hypothesis.given(st.dictionaries(st.text(max_size=3), tensor, max_size=3), st.integers(0, 64), st.none() | numbers)
    def property_of_headers(header, size, length):
        text = json.dumps(header).encode()
        length = None if length is None else length % 2**64
        path.write_bytes(safetensors(text, bytes(size), length))
        try:
            for tensor in open_tensors(path).values():
                assert tensor.load(torch.float32).numel() <= size
        except ValueError as error:
            assert str(path) in str(error)

    property_of_headers()


# ----------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def run(dataset, base, tmp_path_factory) -> tuple[list[str], Path]:
    """A training that can be resumed: its options and its folder."""
    out = tmp_path_factory.mktemp("run") / "run"
    options = (
        f"--data {dataset} --model {base} --size 16 --batch-size 2 --workers 0 --device cpu --steps 3 --save-every 1"
    )
    options = [*options.split(), "--validate-every", "3", "--validate-images", "1", "--validate-steps", "1"]
    assert train.main([*options, "--out", str(out)]) == 0
    return options, out


def rewrite(path: Path, header: str | None = None, **tensors: torch.Tensor | None) -> None:
    """Changes the header and tensors of a checkpoint."""
    with safe_open(path, framework="pt") as file:
        header = header if header is not None else file.metadata()["training"]
    save_file({k: v for k, v in (load_file(path) | tensors).items() if v is not None}, path, {"training": header})


GOOD = '"settings": {}'
CHECKPOINTS = {
    "empty": lambda p: p.write_bytes(b""),
    "cut": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "no header": lambda p: save_file({"a": torch.zeros(1)}, p),
    "no JSON": lambda p: rewrite(p, "{"),
    "deep": lambda p: rewrite(p, '{"a":' * 10**5 + "1" + "}" * 10**5),
    "no settings": lambda p: rewrite(p, '{"step": 3}'),
    "settings are a list": lambda p: rewrite(p, '{"step": 3, "settings": []}'),
    "step is a text": lambda p: rewrite(p, f'{{"step": "3", {GOOD}}}'),
    "step is negative": lambda p: rewrite(p, f'{{"step": -3, {GOOD}}}'),
    "other settings": lambda p: rewrite(p, f'{{"step": 3, {GOOD}}}'),
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


LOGS = {
    "empty": b"",
    "half": b"step,lo",
    "binary": np.arange(256, dtype=np.uint8).tobytes(),
    "rows": b"step,loss\nx,y\n\n1\n",
    "steps alone": b"step\n1\n2\n",
}


@pytest.mark.parametrize("kind", LOGS)
def test_a_damaged_log_stops_no_run(run, tmp_path, kind):
    options, whole = run
    out = shutil.copytree(whole, tmp_path / "run")
    (out / "checkpoint" / "00000003.safetensors").unlink()
    (out / "log.csv").write_bytes(LOGS[kind])
    result = outcome(train.main, [*options, "--out", str(out), "--resume"])
    if result.code:
        assert_refused(result, "log.csv")
    else:
        assert not result.err and (out / "summary.json").exists()

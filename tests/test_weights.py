"""Every public layout of the weights loads bit for bit; what does not fit is refused by name; what is saved opens.

Original single files are written here under the names of the original code, by rules that run the other way than those
of `original.py`. Where diffusers is installed, its own converter must agree at full size. Malformed files are in
test_hostile_models.py.
"""

import json
import os
import re
import weakref
from collections.abc import Callable
from functools import cache
from math import prod
from pathlib import Path

import pytest
import torch
from hostile import safetensors
from record_golden import CLIPS, UNETS, VAES, fill, reference
from safetensors.torch import load_file, save_file
from test_cdiffset import small_model
from test_networks import SD15_CLIP, SD21_UNET, SD_VAE, published

import original
import weights
from cdiffset import CDiffSET
from clip import CLIPTextModel
from common import read_json, write_json
from scheduler import DDPMScheduler
from unet import UNet
from vae import AutoencoderKL
from weights import File, build, load_scheduler, open_model, save_tensors

State = dict[str, torch.Tensor]
NETWORKS = {"unet": UNet, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
FILES = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "prompt": "prompt_embedding.safetensors",
}
SCHEDULE = "scheduler/scheduler_config.json"

# ----------------------------------------------------------------------------------------------------------
# Small models of both families

VAE = VAES["vae_sd"][0] | {"scaling_factor": 0.18215}
SMALL = {
    "sd1": {"unet": UNETS["unet_sd1"][0], "vae": VAE, "text_encoder": CLIPS["clip_sd1"][0]},
    "sd2": {
        "unet": UNETS["unet_sd2_cdiffset"][0] | {"in_channels": 4, "out_channels": 4},
        "vae": VAE,
        "text_encoder": CLIPS["clip_sd2"][0] | {"num_hidden_layers": 23},
    },
}
PUBLISHED = {  # what else the published config.json files say
    "unet": SD21_UNET | {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.8.0"},
    "vae": SD_VAE,
    "text_encoder": SD15_CLIP | {"architectures": ["CLIPTextModel"], "dropout": 0.0, "torch_dtype": "float32"},
    "scheduler": {
        "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "clip_sample": False, "num_train_timesteps": 1000, "prediction_type": "epsilon", "set_alpha_to_one": False,
        "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
    },
}  # fmt: skip


@cache
def network(family: str, name: str) -> torch.nn.Module:
    return fill(NETWORKS[name](**SMALL[family][name]), seed=0)


def state(family: str, name: str, dtype: torch.dtype = torch.float32) -> State:
    return {key: tensor.to(dtype) for key, tensor in network(family, name).state_dict().items()}


def write_folder(folder: Path, family: str = "sd1", dtype: torch.dtype = torch.float32, **replaced: State) -> Path:
    """A diffusers folder of a small model, with text encoder and prompt embedding."""
    for name in NETWORKS:
        write_json(folder / name / "config.json", PUBLISHED[name] | SMALL[family][name])
        save_file(replaced.get(name, state(family, name, dtype)), folder / FILES[name])
    write_json(folder / SCHEDULE, PUBLISHED["scheduler"])
    context = SMALL[family]["unet"]["cross_attention_dim"]
    save_file({"prompt_embedding": torch.randn(1, 6, context)}, folder / FILES["prompt"])
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "model")


def edit_json(path: Path, **changes: object) -> None:
    """Changes settings; `...` removes one."""
    settings = read_json(path) | changes
    write_json(path, {key: value for key, value in settings.items() if value is not ...})


def assert_equal(actual: State, expected: State) -> None:
    """The same names, dtypes and bits."""
    assert actual.keys() == expected.keys()
    for key, tensor in actual.items():
        assert tensor.dtype == expected[key].dtype and torch.equal(tensor, expected[key]), key


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).abs().max() <= 1e-4 * expected.std()


def assert_loads(path: Path, family: str, dtype: torch.dtype = torch.float32) -> None:
    """All three networks load from `path` bit for bit, with weights that were rounded to `dtype` in the file."""
    parts = open_model(path)
    assert set(parts) == set(NETWORKS)
    for name, part in parts.items():
        loaded = build(NETWORKS[name], part)
        assert not loaded.training
        assert json.dumps(loaded.config) == json.dumps(network(family, name).config)
        assert_equal(loaded.state_dict(), {key: tensor.float() for key, tensor in state(family, name, dtype).items()})


def load_all(path: Path) -> None:
    """Loads every part of a model, the text encoder too, which is not needed beside a prompt embedding."""
    for name, part in open_model(path).items():
        build(NETWORKS[name], part)
    CDiffSET.from_pretrained(path)


def assert_refused(path: Path, *words: object, load: Callable = load_all) -> None:
    """Loading must raise a ValueError whose message has all the words."""
    with pytest.raises(ValueError) as caught:
        load(path)
    assert all(str(word) in str(caught.value) for word in words), caught.value
    assert len(str(caught.value)) < 500 + len(str(path))


# ----------------------------------------------------------------------------------------------------------
# Layout 1: diffusers folders


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", SMALL)
def test_a_diffusers_folder_loads_bit_for_bit(tmp_path, family, dtype):
    assert_loads(write_folder(tmp_path, family, dtype), family, dtype)


def test_fp16_files_load_only_where_there_are_no_others(tmp_path):
    write_folder(tmp_path, dtype=torch.float16)
    for name in NETWORKS:
        path = tmp_path / FILES[name]
        path.rename(path.with_suffix(".fp16.safetensors"))
    assert_loads(tmp_path, "sd1", torch.float16)
    assert_loads(write_folder(tmp_path), "sd1")


def shard(path: Path, variant: str = "") -> list[Path]:
    """Replaces a weight file by three shards, named as diffusers names them."""
    tensors = load_file(path)
    path.unlink()
    shards = [path.with_name(f"{path.stem}{variant}-0000{i + 1}-of-00003.safetensors") for i in range(3)]
    for i, name in enumerate(shards):
        save_file({key: tensors[key] for key in sorted(tensors)[i::3]}, name)
    return shards


@pytest.mark.parametrize("variant, dtype", [("", torch.float32), (".fp16", torch.float16)])
def test_sharded_files_load(tmp_path, variant, dtype):
    write_folder(tmp_path, "sd2", dtype)
    for name in NETWORKS:
        shard(tmp_path / FILES[name], variant)
    assert_loads(tmp_path, "sd2", dtype)


def test_shards_that_are_not_one_model_are_refused(folder):
    first, second, _ = shard(folder / FILES["unet"])
    save_file(load_file(second) | {"conv_in.bias": load_file(first)["conv_in.bias"]}, second)
    assert_refused(folder, second, "another shard", "conv_in.bias")
    second.unlink()
    assert_refused(folder, folder / "unet", "missing tensors")


@pytest.mark.parametrize("convolutions", [False, True])
def test_the_older_names_of_published_folders_load(tmp_path, convolutions):
    """The VAE's attention: query, key, value, proj_attn, also as 1x1 convolutions; the text encoder with its prefix."""
    vae = {}
    for key, tensor in state("sd1", "vae").items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        matrix = convolutions and "attentions" in key and tensor.ndim == 2
        vae[key] = tensor[:, :, None, None] if matrix else tensor
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in vae
    text = {f"text_model.{key}": tensor for key, tensor in state("sd1", "text_encoder").items()}
    text["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    assert_loads(write_folder(tmp_path, vae=vae, text_encoder=text), "sd1")


@pytest.mark.parametrize("family", SMALL)
def test_folders_written_by_diffusers_and_transformers_give_their_numbers(tmp_path, family):
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    kinds = {"unet": "unet", "vae": "vae", "text_encoder": "clip"}
    theirs = {name: fill(reference(kind, **SMALL[family][name]), seed=3) for name, kind in kinds.items()}
    for name, model in theirs.items():
        model.save_pretrained(tmp_path / name)
    ours = {name: build(NETWORKS[name], part) for name, part in open_model(tmp_path).items()}
    x, context = torch.randn(1, 4, 8, 16), torch.randn(1, 6, SMALL[family]["unet"]["cross_attention_dim"])
    ids = torch.tensor([[0, 7, 49, 3]])
    with torch.no_grad():
        assert_near(ours["unet"](x, 500, context), theirs["unet"](x, 500, context).sample)
        assert_near(ours["vae"].decode(x), theirs["vae"].decode(x).sample)
        assert_near(ours["text_encoder"](ids), theirs["text_encoder"](ids).last_hidden_state)


# ----------------------------------------------------------------------------------------------------------
# Layout 2: original single files

# (pattern of our name, original name)
OLD_UNET = [  # ldm counts the blocks of each side through, three to a level
    (r"^conv_in\.", "input_blocks.0.0."),
    (r"^time_embedding\.linear_(1|2)\.", lambda m: f"time_embed.{2 * int(m[1]) - 2}."),
    (r"^conv_norm_out\.", "out.0."),
    (r"^conv_out\.", "out.2."),
    (r"^mid_block\.resnets\.(0|1)\.", lambda m: f"middle_block.{2 * int(m[1])}."),
    (r"^mid_block\.attentions\.0\.", "middle_block.1."),
    (r"^down_blocks\.(.)\.resnets\.(.)\.", lambda m: f"input_blocks.{3 * int(m[1]) + int(m[2]) + 1}.0."),
    (r"^down_blocks\.(.)\.attentions\.(.)\.", lambda m: f"input_blocks.{3 * int(m[1]) + int(m[2]) + 1}.1."),
    (r"^down_blocks\.(.)\.downsamplers\.0\.conv\.", lambda m: f"input_blocks.{3 * int(m[1]) + 3}.0.op."),
    (r"^up_blocks\.(.)\.resnets\.(.)\.", lambda m: f"output_blocks.{3 * int(m[1]) + int(m[2])}.0."),
    (r"^up_blocks\.(.)\.attentions\.(.)\.", lambda m: f"output_blocks.{3 * int(m[1]) + int(m[2])}.1."),
    (r"^up_blocks\.0\.upsamplers\.0\.conv\.", "output_blocks.2.1.conv."),  # this level has no attention
    (r"^up_blocks\.(.)\.upsamplers\.0\.conv\.", lambda m: f"output_blocks.{3 * int(m[1]) + 2}.2.conv."),
]
OLD_RESNET = [
    ("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"), ("conv2", "out_layers.3"), ("conv_shortcut", "skip_connection"),
]  # fmt: skip
OLD_VAE = [  # the decoder's levels are counted from the output side
    (r"encoder\.down_blocks\.(.)\.", r"encoder.down.\1."),
    (r"decoder\.up_blocks\.(.)\.", lambda m: f"decoder.up.{3 - int(m[1])}."),
    (r"mid_block\.resnets\.0", "mid.block_1"), (r"mid_block\.resnets\.1", "mid.block_2"), (r"resnets", "block"),
    (r"(down|up)samplers\.0", r"\1sample"), (r"conv_shortcut", "nin_shortcut"), (r"conv_norm_out", "norm_out"),
    (r"mid_block\.attentions\.0", "mid.attn_1"), (r"attn_1\.group_norm", "attn_1.norm"),
    (r"attn_1\.to_(q|k|v)\.", r"attn_1.\1."), (r"attn_1\.to_out\.0", "attn_1.proj_out"),
]  # fmt: skip
OLD_CLIP = [
    (r"embeddings\.token_embedding", "token_embedding"), (r"final_layer_norm", "ln_final"),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"), (r"layer_norm(1|2)", r"ln_\1"),
    (r"encoder\.layers", "transformer.resblocks"), (r"self_attn\.q_proj\.", "attn.in_proj_"),
    (r"self_attn", "attn"), (r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj"),
]  # fmt: skip


def old_name(key: str, rules: list) -> str:
    for new, old in rules:
        key = re.sub(new, old, key)
    return key


def original_file(family: str, states: dict[str, State]) -> State:
    """All tensors of a single file."""
    file = {}
    for key, tensor in states["unet"].items():
        rules = OLD_UNET + OLD_RESNET if ".resnets." in key else OLD_UNET
        file["model.diffusion_model." + old_name(key, rules)] = tensor
    for key, tensor in states["vae"].items():
        name = "first_stage_model." + old_name(key, OLD_VAE)
        file[name] = tensor[:, :, None, None] if ".attn_1." in name and tensor.ndim == 2 else tensor
    text = states["text_encoder"]
    if family == "sd1":
        return file | {f"cond_stage_model.transformer.text_model.{key}": tensor for key, tensor in text.items()}

    # OpenCLIP stacks q, k and v, and has one block more than is used, 23: here a second 22
    text = text | {key.replace("layers.22.", "layers.23."): t for key, t in text.items() if "layers.22." in key}
    for key, tensor in text.items():
        if "q_proj" in key:
            tensor = torch.cat([text[key.replace("q_proj", f"{name}_proj")] for name in "qkv"])
        if "k_proj" not in key and "v_proj" not in key:
            file["cond_stage_model.model." + old_name(key, OLD_CLIP)] = tensor
    bias = text["final_layer_norm.bias"]
    return file | {"cond_stage_model.model.text_projection": bias, "cond_stage_model.model.logit_scale": bias[0]}


EXTRAS = [  # what may be in a single file besides, and what need not be
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "scale_factor",
    "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
    "model_ema.decay", "model_ema.num_updates", "model_ema.diffusion_modelinput_blocks00weight",
    "cond_stage_model.transformer.text_model.embeddings.position_ids",
]  # fmt: skip
OPTIONAL = (".resblocks.23.", ".text_projection", ".logit_scale")


@cache
def single_file(family: str) -> State:
    """All tensors of a small single file, copied: safetensors writes no tensors that share memory."""
    tensors = original_file(family, {name: state(family, name) for name in NETWORKS})
    extras = {name: torch.ones(10) for name in EXTRAS if family == "sd1" or "text_model" not in name}
    return {key: tensor.clone() for key, tensor in (tensors | extras).items()}


@pytest.fixture
def small_families(monkeypatch):
    """Lets single files of the small models, with their widths, stand for Stable Diffusion 1.x and 2.x."""
    configs = {config["unet"]["cross_attention_dim"]: config for config in SMALL.values()}
    monkeypatch.setattr(original, "CONFIGS", configs)


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("kind", ["full", "half precision", "pruned"])
def test_an_original_single_file_loads_bit_for_bit(tmp_path, small_families, family, kind):
    dtype, path = torch.float16 if kind == "half precision" else torch.float32, tmp_path / "v1-5.safetensors"
    unneeded = (*EXTRAS, *OPTIONAL) if kind == "pruned" else ()
    tensors = {key: t.to(dtype) for key, t in single_file(family).items() if not any(n in key for n in unneeded)}
    save_file(tensors, path)
    assert_loads(path, family, dtype)


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A float16 safetensors file of any size whose data are a hole: only its header takes room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    path.write_bytes(safetensors(json.dumps(header).encode()))
    os.truncate(path, path.stat().st_size + end)
    return path


@pytest.mark.parametrize("family, sd", [("sd1", "SD 1.5"), ("sd2", "SD 2.1")])
def test_full_size_single_files_open_unread_as_diffusers_converts_them(tmp_path, monkeypatch, family, sd):
    monkeypatch.setattr(File, "read", None)  # no tensor is read
    expected = {"unet": published(f"unet of {sd}"), "vae": published("vae"), "text_encoder": published(f"clip of {sd}")}
    tensors = original_file(family, {name: dict(net.state_dict()) for name, net in expected.items()})
    path = write_sparse(tmp_path / "full.safetensors", {key: tuple(t.shape) for key, t in tensors.items()})
    assert path.stat().st_size > 2e9 and path.stat().st_blocks * 512 < 10e6

    parts = open_model(path)
    for name, part in parts.items():
        with torch.device("meta"):
            assert json.dumps(NETWORKS[name](**part.config).config) == json.dumps(expected[name].config)
        shapes = {key: tuple(tensor.shape) for key, tensor in expected[name].state_dict().items()}
        assert {key: tensor.shape for key, tensor in part.tensors.items()} == shapes

    converter = pytest.importorskip("diffusers.loaders.single_file_utils")
    theirs = {
        "unet": converter.convert_ldm_unet_checkpoint(tensors, {"layers_per_block": 2}),
        "vae": converter.convert_ldm_vae_checkpoint(tensors, {"down_block_types": "1234", "up_block_types": "1234"}),
    }
    if family == "sd1":
        text = converter.convert_ldm_clip_checkpoint(tensors)
        theirs["text_encoder"] = {key.removeprefix("text_model."): t for key, t in text.items()}
    for name, converted in theirs.items():
        assert converted.keys() == parts[name].tensors.keys()
        for key, tensor in converted.items():
            mine = tensors[parts[name].tensors[key].key]
            # its 1x1 convolutions have become matrices, so they are told apart by name below
            assert tensor is mine or (".attentions." in key and tensor.ndim == 2 and mine.ndim == 4), key
    for half in ("encoder", "decoder"):
        for new, old in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
            part = parts["vae"].tensors[f"{half}.mid_block.attentions.0.{new}.weight"]
            assert part.key == f"first_stage_model.{half}.mid.attn_1.{old}.weight" and len(part.shape) == 2


def test_openclip_becomes_what_diffusers_makes_of_it(tmp_path, small_families):
    converter = pytest.importorskip("diffusers.loaders.single_file_utils")
    path = tmp_path / "v2-1.safetensors"
    save_file(single_file("sd2"), path)
    theirs = converter.convert_open_clip_checkpoint(reference("clip", **SMALL["sd2"]["text_encoder"]), load_file(path))
    theirs.pop("text_projection.weight", None)
    ours = build(CLIPTextModel, open_model(path)["text_encoder"]).state_dict()
    assert_equal(ours, {key.removeprefix("text_model."): tensor for key, tensor in theirs.items()})


TO_K = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
IN_PROJ = "cond_stage_model.model.transformer.resblocks.{}.attn.in_proj_bias"
SINGLE_FILE_FAULTS = [  # what is added (a shape) or taken away (None), and the words of the error
    ("foo.bar", (1,), "unknown tensors: foo.bar"),
    ("conditioner.embedders.0.x", (1,), "unknown tensors: conditioner"),
    ("cond_stage_model.other.x", (1,), "unknown tensors: cond_stage_model.other"),
    ("cond_stage_model.transformer.text_model.x", (1,), "one text encoder"),
    ("model.diffusion_model.label_emb.weight", (1,), "unknown tensors: label_emb.weight"),
    ("first_stage_model.decoder.up.7.block.0.conv1.bias", (1,), "unknown tensors: decoder.up_blocks.-4"),
    ("model.diffusion_model.input_blocks.0.0.bias", None, "missing tensors: conv_in.bias"),
    ("model.diffusion_model.input_blocks.0.0.weight", (7, 4, 3, 3), "wrong shape: conv_in.weight (7, 4, 3, 3)"),
    ("cond_stage_model.model.ln_final.weight", None, "missing tensors: final_layer_norm.weight"),
    (IN_PROJ.format(3), (7,), "wrong shape: encoder.layers.3"),
    (IN_PROJ.format(4), (), "encoder.layers.4.self_attn.in_proj_bias"),
    (TO_K, (512, 512), "width 512; expected 768 (SD 1.x) or 1024 (SD 2.x)"),
    (TO_K, (), "width None; expected 768"),
]


@pytest.mark.parametrize("key, shape, words", SINGLE_FILE_FAULTS)
def test_a_single_file_that_does_not_fit_is_refused_by_name(tmp_path, small_families, key, shape, words):
    tensors = {name: tensor for name, tensor in single_file("sd2").items() if name != key}
    path = tmp_path / "single.safetensors"
    save_file(tensors | ({key: torch.ones(shape)} if shape is not None else {}), path)
    assert_refused(path, path, words)


def test_a_file_that_is_another_model_is_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    for tensors in ({}, {"betas": torch.ones(1)}, {"conv_in.weight": torch.ones(3, 3)}, state("sd1", "unet")):
        save_file(tensors, path)
        assert_refused(path, path, "not an original Stable Diffusion")


# ----------------------------------------------------------------------------------------------------------
# Layout 3: C-DiffSET's released U-Net


@pytest.mark.parametrize("outputs", [5, 4])
@pytest.mark.parametrize("prefix", ["", "module.", "unet.", "module.unet."])
def test_a_released_unet_takes_the_place_of_the_folders(tmp_path, prefix, outputs):
    released = fill(UNet(**SMALL["sd2"]["unet"] | {"in_channels": 8, "out_channels": outputs}), seed=1)
    path = tmp_path / "model.safetensors"
    save_file({prefix + key: tensor for key, tensor in released.state_dict().items()}, path)
    model = CDiffSET.from_pretrained(write_folder(tmp_path / "sd2", "sd2"), path)
    assert not model.from_base and model.has_variance == (outputs == 5)
    assert json.dumps(model.unet.config) == json.dumps(released.config)
    assert_equal(model.unet.state_dict(), released.state_dict())


NO_UNETS = [
    {},
    {"conv_in.weight": ()},
    {"conv_in.weight": (3,), "conv_out.weight": ()},
    {"conv_in.weight": (32, 8, 3, 3), "conv_out.weight": (5, 32, 3, 3)},
]


@pytest.mark.parametrize("shapes", NO_UNETS)
def test_a_file_that_is_no_unet_is_refused_as_one(folder, tmp_path, shapes):
    path = tmp_path / "model.safetensors"
    save_file({key: torch.ones(shape) for key, shape in shapes.items()}, path)
    for unet in (path, folder, tmp_path / "absent.safetensors"):
        assert_refused(unet, unet, load=lambda unet: CDiffSET.from_pretrained(folder, unet))


# ----------------------------------------------------------------------------------------------------------
# Memory


def test_a_network_is_filled_one_tensor_at_a_time(tmp_path, monkeypatch):
    """Where numbers are converted: while a tensor is read, no other holds on to the file."""
    last, files = [], []
    read = File.read

    def watched(self, key, rows, dtype):
        assert all(tensor() is None for tensor in last)
        tensor = read(self, key, rows, dtype)
        last[:] = [weakref.ref(tensor)]
        files.append(self.safetensors)
        return tensor

    monkeypatch.setattr(File, "read", watched)
    monkeypatch.setattr(weights, "CONVERTED_MAX", 100_000)
    path = write_folder(tmp_path, "sd2", torch.float16) / FILES["unet"]
    build(UNet, open_model(tmp_path)["unet"])
    assert 3 < len(set(map(id, files))) <= path.stat().st_size / 1e5  # the file's pages are freed in between


def test_a_loaded_network_and_its_file_do_not_change_with_one_another(tmp_path):
    """Though its weights are mapped: writing changes memory only, and a file in use is replaced as a whole."""
    path = write_folder(tmp_path) / FILES["unet"]
    before, unet = path.read_bytes(), build(UNet, open_model(tmp_path)["unet"])
    with torch.no_grad():
        unet.conv_in.bias.zero_()
    assert path.read_bytes() == before
    expected = {key: tensor.clone() for key, tensor in unet.state_dict().items()}
    save_tensors(path, unet.state_dict())  # over its own file
    assert_equal(build(UNet, open_model(tmp_path)["unet"]).state_dict(), expected)
    save_tensors(path, {key: torch.ones_like(tensor) for key, tensor in expected.items()})
    assert_equal(unet.state_dict(), expected)


def test_a_file_that_is_replaced_while_it_is_read_is_not_mixed_with_the_new_one(folder, monkeypatch):
    monkeypatch.setattr(weights, "CONVERTED_MAX", 0)
    part = open_model(folder)["unet"]
    save_tensors(folder / FILES["unet"], {key: tensor + 1 for key, tensor in state("sd1", "unet").items()})
    assert_refused(folder, "replaced in the meantime", load=lambda folder: build(UNet, part, torch.float16))


# ----------------------------------------------------------------------------------------------------------
# What does not fit is refused, with the file and the first tensors

BIAS, Q, K = "conv_norm_out.bias", "encoder.layers.0.self_attn.q_proj.bias", "encoder.mid_block.attentions.0.{}.bias"
FAULTS = [  # file, change of its tensors, words of the error
    ("unet", lambda t: t.pop(BIAS), f"missing tensors: {BIAS}"),
    ("unet", lambda t: t.update(x=torch.ones(1)), "unknown tensors: x"),
    ("unet", lambda t: [t.pop(key) for key in list(t) if "mid_block" in key], "more"),  # not all are named
    ("vae", lambda t: t.update({f"decoder.{BIAS}": torch.ones(7)}), f"wrong shape: decoder.{BIAS} (7,), not ("),
    ("vae", lambda t: t[f"decoder.{BIAS}"].fill_(-torch.inf), f"decoder.{BIAS} has values that are not finite"),
    ("vae", lambda t: t.update({K.format("key"): t[K.format("to_k")].clone()}), "twice"),  # by its old and new name
    ("text_encoder", lambda t: t[Q][-1].fill_(torch.nan), f"{Q} has values that are not finite"),
    ("text_encoder", lambda t: t.update({"text_projection.weight": torch.ones(2)}), "unknown tensors: text_projection"),
    ("prompt", lambda t: t.update(x=torch.ones(1)), "unknown tensors: x"),
    ("prompt", lambda t: t.update(prompt_embedding=torch.full((1, 6, 24), torch.nan)), "not finite"),
    (
        "prompt",
        lambda t: t.update(prompt_embedding=torch.ones(1, 6, 32)),
        "(1, 6, 32), but the U-Net's cross-attention",
    ),
    ("prompt", lambda t: t.update(prompt_embedding=torch.ones(2, 6, 24)), "needs (1, tokens, 24)"),
    ("prompt", lambda t: t.update(prompt_embedding=torch.ones(6, 24)), "(6, 24)"),
]


@pytest.mark.parametrize("name, change, words", FAULTS)
def test_tensors_that_do_not_fit_are_refused_by_name(folder, name, change, words):
    tensors = load_file(folder / FILES[name])
    change(tensors)
    save_file(tensors, folder / FILES[name])
    assert_refused(folder, folder, name, words)


def test_a_path_without_a_whole_model_is_refused(tmp_path, folder):
    assert_refused(tmp_path / "nowhere", tmp_path / "nowhere", "does not exist")
    assert_refused(tmp_path, tmp_path, "holds no model")
    (folder / FILES["vae"]).rename(folder / "vae" / "diffusion_pytorch_model.bin")
    assert_refused(
        folder, folder / "vae", "no diffusion_pytorch_model.safetensors", "pickles such as .bin are not read"
    )
    for path in (folder / "vae" / "config.json", folder / SCHEDULE):
        write_folder(folder)
        path.unlink()
        assert_refused(folder, path)
    (write_folder(folder) / FILES["prompt"]).unlink()
    (folder / "text_encoder").rename(folder / "away")
    assert_refused(folder, FILES["prompt"])


REFUSED = {  # settings that we do not implement, of a wrong type or value, or missing (...)
    "unet/config.json": [
        {"class_embed_type": "timestep"}, {"act_fn": "gelu"}, {"num_class_embeds": 1000}, {"freq_shift": 1},
        {"dual_cross_attention": True}, {"only_cross_attention": True}, {"flip_sin_to_cos": False},
        {"downsample_padding": 0}, {"mid_block_type": None}, {"center_input_sample": True}, {"something_new": [1]},
        {"attention_head_dim": [8]}, {"attention_head_dim": "8"}, {"norm_num_groups": 7},
        {"use_linear_projection": "yes"}, {"down_block_types": "DownBlock2D"},
        {"down_block_types": ["DownBlock2D"]}, {"up_block_types": [1, 2]},
    ],
    "vae/config.json": [
        {"act_fn": "gelu"}, {"use_quant_conv": False}, {"shift_factor": 0.1}, {"latents_mean": [0.0, 0.1]},
        {"scaling_factor": "0.18215"}, {"scaling_factor": None}, {"block_out_channels": {"0": 32}},
        {"scaling_factor": ..., "latent_channels": 16}, {"scaling_factor": ..., "block_out_channels": [32, 32, 64]},
    ],
    "text_encoder/config.json": [
        {"hidden_act": "relu"}, {"num_hidden_layers": "2"}, {"hidden_act": 1}, {"hidden_size": 100},
        {"num_attention_heads": ...},
    ],
    SCHEDULE: [
        {"beta_schedule": "linear"}, {"beta_schedule": "squaredcos_cap_v2"}, {"beta_schedule": None},
        {"trained_betas": [0.1, 0.2]}, {"rescale_betas_zero_snr": True}, {"prediction_type": "flow"},
        {"prediction_type": None}, {"beta_start": "small"}, {"beta_end": None}, {"num_train_timesteps": "1000"},
        {"num_train_timesteps": -1}, {"beta_start": ...}, {"beta_end": ...}, {"num_train_timesteps": ...},
    ],
}  # fmt: skip


@pytest.mark.parametrize("file, change", [(file, change) for file, changes in REFUSED.items() for change in changes])
def test_settings_that_are_not_stable_diffusions_are_refused(folder, file, change):
    edit_json(folder / file, **change)
    assert_refused(folder, (folder / file).parent)


# ----------------------------------------------------------------------------------------------------------
# What the files do not say is assumed aloud


def test_a_missing_setting_is_assumed_aloud(folder):
    assert CDiffSET.from_pretrained(folder).assumptions == []
    edit_json(folder / "vae/config.json", scaling_factor=...)
    edit_json(folder / SCHEDULE, prediction_type=...)
    model = CDiffSET.from_pretrained(folder)
    scale, prediction = model.assumptions
    assert model.vae.scaling_factor == 0.18215 and str(folder / "vae") in scale and "0.18215" in scale
    assert model.scheduler.prediction_type == "epsilon" and str(folder / SCHEDULE) in prediction
    assert "assumed epsilon (--prediction-type" in prediction
    told = CDiffSET.from_pretrained(folder, prediction_type="v_prediction")
    assert told.assumptions == [scale] and told.scheduler.prediction_type == "v_prediction"


def test_neither_a_single_file_nor_a_separate_unet_tells_what_it_predicts(folder, tmp_path, small_families):
    single, unet = tmp_path / "v2-1.safetensors", tmp_path / "released.safetensors"
    save_file(single_file("sd1"), single)
    (line,) = weights.list_assumptions(single, open_model(single)["vae"]._replace(config=VAE))
    assert str(single) in line and "assumed epsilon (--prediction-type" in line and "v_prediction" in line
    assert load_scheduler(single).config == DDPMScheduler().config
    assert load_scheduler(single, "v_prediction").prediction_type == "v_prediction"

    edit_json(folder / SCHEDULE, prediction_type="v_prediction", beta_end=0.01)
    save_file(UNet(**SMALL["sd1"]["unet"] | {"in_channels": 8}).state_dict(), unet)
    model = CDiffSET.from_pretrained(folder, unet)
    (line,) = model.assumptions
    assert str(unet) in line and "assumed v_prediction" in line
    assert model.scheduler.config == DDPMScheduler(prediction_type="v_prediction", beta_end=0.01).config


# ----------------------------------------------------------------------------------------------------------
# Saving


def assert_same(model: CDiffSET, other: CDiffSET) -> None:
    assert_equal(model.state_dict(), other.state_dict())
    assert model.scheduler.config == other.scheduler.config and model.trained_on == other.trained_on
    for name in ("vae", "unet"):
        assert json.dumps(getattr(model, name).config) == json.dumps(getattr(other, name).config)


@pytest.mark.parametrize("outputs", [5, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_saved_model_loads_bit_for_bit_with_all_its_settings(tmp_path, dtype, outputs):
    model = small_model(8, outputs).to(dtype, memory_format=torch.channels_last)
    model.scheduler = DDPMScheduler(num_train_timesteps=500, beta_end=0.02, prediction_type="v_prediction")
    model.trained_on = {"sar": "db", "stretch": (1, 99), "eo": "full"}
    model.save_pretrained(tmp_path / "new" / "model")
    loaded = CDiffSET.from_pretrained(tmp_path / "new" / "model", dtype=dtype)
    assert_same(model, loaded)
    assert loaded.vae.scaling_factor == 0.3 and loaded.assumptions == [] and not loaded.from_base
    assert not loaded.training and all(p.requires_grad for p in loaded.unet.parameters())
    assert_same(model.float(), CDiffSET.from_pretrained(tmp_path / "new" / "model"))


def test_what_a_model_was_trained_on_is_unknown_unless_its_folder_says_it(tmp_path):
    small_model().save_pretrained(tmp_path)
    assert CDiffSET.from_pretrained(tmp_path).trained_on == {}
    known = {"sar": "db", "stretch": None, "eo": "full"}
    for wrong in ([1], {"sar": "db"}, known | {"stretch": 5}, known | {"stretch": ["a", "b"]}, known | {"eo": []}):
        edit_json(tmp_path / "model_index.json", _trained_on=wrong)
        assert_refused(tmp_path, "model_index.json", "_trained_on", load=CDiffSET.from_pretrained)
    edit_json(tmp_path / "model_index.json", _trained_on=known)
    assert CDiffSET.from_pretrained(tmp_path).trained_on == known
    assert CDiffSET.from_pretrained(tmp_path, tmp_path / FILES["unet"]).trained_on == {}  # another U-Net


def test_diffusers_opens_a_saved_folder_and_gives_the_same_numbers(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    model = small_model()
    model.save_pretrained(tmp_path)
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path, subfolder="vae")
    scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    x, image = torch.randn(2, 8, 6, 10), torch.rand(1, 3, 16, 24) * 2 - 1
    context = model.prompt_embedding
    with torch.no_grad():
        assert_near(model.unet(x, 321, context), unet(x, 321, context.expand(2, -1, -1)).sample)
        latent = vae.encode(image).latent_dist.mean * vae.config.scaling_factor
        assert_near(model.encode(image), latent)
        assert_near(model.decode(latent), vae.decode(latent / vae.config.scaling_factor).sample)
    assert torch.equal(scheduler.alphas_cumprod, model.scheduler.alphas_cumprod)
    scheduler.set_timesteps(50)
    assert scheduler.timesteps.tolist() == list(range(981, 0, -20))
    assert scheduler.final_alpha_cumprod == model.scheduler.alphas_cumprod[0]
    assert not scheduler.config.clip_sample and scheduler.config.prediction_type == "epsilon"

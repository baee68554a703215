"""Every public layout of the weights loads bit for bit; what does not fit is refused by name; what is saved opens.

Original single files are written here by `original_unet`, `original_vae` and `original_openclip`, which walk through
the networks as the original code builds them, and share nothing with the rules under test. Where diffusers is
installed, its own converter must agree at full size. Malformed files are in test_hostile_models.py.
"""

import json
import os
import struct
import weakref
from copy import deepcopy
from functools import cache
from math import prod
from pathlib import Path

import pytest
import torch
from record_golden import fill, reference_clip, reference_unet, reference_vae
from safetensors.torch import load_file, save_file

import original
import weights
from cdiffset import CDiffSET
from clip import CLIPTextModel
from common import read_json, write_json
from scheduler import DDPMScheduler
from unet import UNet
from vae import AutoencoderKL
from weights import File, build, load_prompt_embedding, load_scheduler, open_model, open_unet, save_tensors

State = dict[str, torch.Tensor]
NETWORKS = {"unet": UNet, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
FILES = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}
SCHEDULE = "scheduler/scheduler_config.json"

# ----------------------------------------------------------------------------------------------------------
# Small models of both families

SMALL_VAE = {"block_out_channels": [32, 32, 32, 64], "scaling_factor": 0.18215}
SMALL_TEXT = {"vocab_size": 50, "hidden_size": 128, "intermediate_size": 96, "num_attention_heads": 2}
SMALL = {
    "sd1": {
        "unet": {
            "block_out_channels": [32, 32, 64, 64], "attention_head_dim": 8, "cross_attention_dim": 768,
            "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        },
        "vae": SMALL_VAE,
        "text_encoder": SMALL_TEXT | {"num_hidden_layers": 2, "hidden_act": "quick_gelu"},
    },
    "sd2": {
        "unet": {
            "block_out_channels": [64, 128], "attention_head_dim": [1, 2], "cross_attention_dim": 1024,
            "use_linear_projection": True, "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        },
        "vae": SMALL_VAE,
        "text_encoder": SMALL_TEXT | {"num_hidden_layers": 23, "hidden_act": "gelu"},
    },
}  # fmt: skip
# What else the published config.json files say
PUBLISHED = {
    "unet": {
        "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.8.0", "act_fn": "silu", "sample_size": 64,
        "center_input_sample": False, "downsample_padding": 1, "dual_cross_attention": False, "in_channels": 4,
        "flip_sin_to_cos": True, "freq_shift": 0, "layers_per_block": 2, "mid_block_scale_factor": 1,
        "norm_eps": 1e-5, "norm_num_groups": 32, "num_class_embeds": None, "only_cross_attention": False,
        "out_channels": 4, "upcast_attention": True,
    },
    "vae": {
        "_class_name": "AutoencoderKL", "_diffusers_version": "0.8.0", "act_fn": "silu", "in_channels": 3,
        "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3, "sample_size": 768,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "text_encoder": {
        "architectures": ["CLIPTextModel"], "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0,
        "eos_token_id": 2, "initializer_factor": 1.0, "layer_norm_eps": 1e-5, "max_position_embeddings": 77,
        "model_type": "clip_text_model", "pad_token_id": 1, "projection_dim": 512, "torch_dtype": "float32",
    },
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


def states(family: str, dtype: torch.dtype = torch.float32) -> dict[str, State]:
    return {name: state(family, name, dtype) for name in NETWORKS}


def write_folder(folder: Path, family: str = "sd1", **replaced: State) -> Path:
    """A diffusers folder of a small model."""
    for name in NETWORKS:
        write_json(folder / name / "config.json", PUBLISHED[name] | SMALL[family][name])
        save_file(replaced.get(name, state(family, name)), folder / FILES[name])
    write_json(folder / SCHEDULE, PUBLISHED["scheduler"])
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "model")


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path: Path, change) -> None:
    """Applies `change` to the dictionary of a file's tensors."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


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


def load_networks(path: Path) -> None:
    for name, part in open_model(path).items():
        build(NETWORKS[name], part)


def refused(path: Path, *words: str, load=load_networks) -> str:
    """Loading must raise a ValueError whose message has all the words."""
    with pytest.raises(ValueError) as caught:
        load(path)
    for word in words:
        assert str(word) in str(caught.value), caught.value
    return str(caught.value)


# ----------------------------------------------------------------------------------------------------------
# Layout 1: diffusers folders


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", SMALL)
def test_a_diffusers_folder_loads_bit_for_bit(tmp_path, family, dtype):
    assert_loads(write_folder(tmp_path, family, **states(family, dtype)), family, dtype)


def test_fp16_files_load_only_where_there_are_no_others(tmp_path):
    write_folder(tmp_path, "sd1", **states("sd1", torch.float16))
    for file in FILES.values():
        path = tmp_path / file
        path.rename(path.with_suffix(".fp16.safetensors"))
    assert_loads(tmp_path, "sd1", torch.float16)
    assert_loads(write_folder(tmp_path, "sd1"), "sd1")


def shard(path: Path, variant: str = "", dtype: torch.dtype = torch.float32) -> list[Path]:
    """Replaces a weight file by three shards and their index, named as diffusers names them."""
    tensors = load_file(path)
    path.unlink()
    shards, index = [], {}
    for i in range(3):
        part = {key: tensors[key].to(dtype) for key in sorted(tensors)[i::3]}
        shards.append(path.with_name(f"{path.stem}{variant}-0000{i + 1}-of-00003.safetensors"))
        save_file(part, shards[-1])
        index |= dict.fromkeys(part, shards[-1].name)
    write_json(path.with_name(f"{path.name}.index{variant}.json"), {"weight_map": index})
    return shards


@pytest.mark.parametrize("variant, dtype", [("", torch.float32), (".fp16", torch.float16)])
def test_sharded_files_load(tmp_path, variant, dtype):
    write_folder(tmp_path, "sd2")
    for file in FILES.values():
        shard(tmp_path / file, variant, dtype)
    assert_loads(tmp_path, "sd2", dtype)


def test_shards_that_are_not_one_model_are_refused(folder):
    first, second, _ = shard(folder / FILES["unet"])
    tensors = load_file(first)
    edit_tensors(second, lambda other: other.update({"conv_in.bias": tensors["conv_in.bias"]}))
    refused(folder, second, "another shard", "conv_in.bias")
    second.unlink()
    refused(folder, folder / "unet", "missing tensors")


def old_attention(vae: State, convolutions: bool) -> State:
    """The VAE as published: attention named query, key, value, proj_attn; or with its weights as 1x1 convolutions."""
    old = {}
    for key, tensor in vae.items():
        for new, name in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            if f"attentions.0.{new}." in key:
                key = key.replace(new, name)
                if convolutions and key.endswith("weight"):
                    tensor = tensor[:, :, None, None]
        old[key] = tensor
    return old


@pytest.mark.parametrize("convolutions", [False, True])
def test_published_names_of_the_vae_attention_load(tmp_path, convolutions):
    vae = old_attention(state("sd1", "vae"), convolutions)
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in vae
    assert_loads(write_folder(tmp_path, vae=vae), "sd1")


def test_text_encoders_load_with_their_prefix_and_position_ids(tmp_path):
    text = {f"text_model.{key}": tensor for key, tensor in state("sd1", "text_encoder").items()}
    text["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    assert_loads(write_folder(tmp_path, text_encoder=text), "sd1")


@pytest.mark.parametrize("family", SMALL)
def test_folders_written_by_diffusers_and_transformers_give_their_numbers(tmp_path, family):
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    makers = {"unet": reference_unet, "vae": reference_vae, "text_encoder": reference_clip}
    theirs = {name: fill(make(**SMALL[family][name]), seed=3) for name, make in makers.items()}
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


def original_unet(unet: dict) -> dict:
    """By ldm's names: every layer counted through, in the order in which ldm's constructor makes them."""
    names = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    modules = {key.rsplit(".", 1)[0] for key in unet}
    has = lambda module: any(m.startswith(module + ".") for m in [*modules, *(f"{m}." for m in modules)])  # noqa: E731
    levels = sum(has(f"down_blocks.{i}") for i in range(9))
    n = 1
    for level in range(levels):
        for layer in range(2):
            names[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{n}.0"
            names[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{n}.1"
            n += 1
        names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
        n += 1
    n = 0
    for level in range(levels):
        for layer in range(3):
            names[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{n}.0"
            names[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{n}.1"
            if layer == 2:
                position = 2 if has(f"up_blocks.{level}.attentions.2") else 1
                names[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{n}.{position}.conv"
            n += 1
    inside = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"}
    inside |= {"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    return renamed(unet, names, {name: inside for name in names if ".resnets." in name})


def original_vae(vae: dict) -> dict:
    """By ldm's names: the decoder's levels counted from the output side, attention as 1x1 convolutions."""
    names = {key: key for key in ("encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out")}
    names |= {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    levels = len({key.split(".")[2] for key in vae if key.startswith("encoder.down_blocks.")})
    for half in ("encoder", "decoder"):
        names[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        names[f"{half}.mid_block.resnets.0"] = f"{half}.mid.block_1"
        names[f"{half}.mid_block.resnets.1"] = f"{half}.mid.block_2"
        names[f"{half}.mid_block.attentions.0"] = f"{half}.mid.attn_1"
    for level in range(levels):
        opposite = levels - 1 - level
        names[f"encoder.down_blocks.{level}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"
        names[f"decoder.up_blocks.{level}.upsamplers.0.conv"] = f"decoder.up.{opposite}.upsample.conv"
        for layer in range(3):
            names[f"encoder.down_blocks.{level}.resnets.{layer}"] = f"encoder.down.{level}.block.{layer}"
            names[f"decoder.up_blocks.{level}.resnets.{layer}"] = f"decoder.up.{opposite}.block.{layer}"
    inside = {name: {"conv_shortcut": "nin_shortcut"} for name in names if ".resnets." in name}
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    inside |= {name: attention for name in names if ".attentions." in name}
    original = renamed(vae, names, inside)
    return {
        key: tensor[:, :, None, None] if ".attn_1." in key and tensor.ndim == 2 else tensor
        for key, tensor in original.items()
    }


def original_openclip(text: dict, blocks: int = 24) -> dict:
    """By OpenCLIP's names: q, k, v stacked, and one block more than is used."""
    original = {
        "token_embedding.weight": text["embeddings.token_embedding.weight"],
        "positional_embedding": text["embeddings.position_embedding.weight"],
        "ln_final.weight": text["final_layer_norm.weight"],
        "ln_final.bias": text["final_layer_norm.bias"],
        "text_projection": text["encoder.layers.0.self_attn.out_proj.weight"],
        "logit_scale": text["final_layer_norm.bias"][0],
    }
    for i in range(blocks):
        old, new = f"encoder.layers.{min(i, 22)}", f"transformer.resblocks.{i}"  # block 23 is one more 22
        for kind in ("weight", "bias"):
            stacked = torch.cat([text[f"{old}.self_attn.{name}_proj.{kind}"] for name in "qkv"])
            original[f"{new}.attn.in_proj_{kind}"] = stacked
            original[f"{new}.attn.out_proj.{kind}"] = text[f"{old}.self_attn.out_proj.{kind}"]
            original[f"{new}.mlp.c_fc.{kind}"] = text[f"{old}.mlp.fc1.{kind}"]
            original[f"{new}.mlp.c_proj.{kind}"] = text[f"{old}.mlp.fc2.{kind}"]
            original[f"{new}.ln_1.{kind}"] = text[f"{old}.layer_norm1.{kind}"]
            original[f"{new}.ln_2.{kind}"] = text[f"{old}.layer_norm2.{kind}"]
    return original


def renamed(tensors: dict, names: dict[str, str], inside: dict[str, dict[str, str]]) -> dict:
    """Replaces the module's name, and inside some modules the names of their parts."""
    original = {}
    for key, tensor in tensors.items():
        module = max((name for name in names if key.startswith(name + ".")), key=len)
        rest = key[len(module) + 1 :]
        for new, old in inside.get(module, {}).items():
            if rest.startswith(new + "."):
                rest = old + rest[len(new) :]
        original[f"{names[module]}.{rest}"] = tensor
    return original


def original_file(family: str, states: dict[str, dict], extras: bool = True) -> dict:
    """All tensors of a single file, with everything that may be in one besides."""
    file = {f"model.diffusion_model.{key}": t for key, t in original_unet(states["unet"]).items()}
    file |= {f"first_stage_model.{key}": t for key, t in original_vae(states["vae"]).items()}
    if family != "sd2":
        prefix = "cond_stage_model.transformer.text_model."
        file |= {prefix + key: t for key, t in states["text_encoder"].items()}
        ids = {prefix + "embeddings.position_ids": torch.arange(77)[None]}
    else:
        file |= {f"cond_stage_model.model.{key}": t for key, t in original_openclip(states["text_encoder"]).items()}
        ids = {}
    buffers = (
        "betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod scale_factor "
        "log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance "
        "posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2 model_ema.decay "
        "model_ema.num_updates model_ema.diffusion_modelinput_blocks00weight"
    )
    return file | ids | ({name: torch.ones(10) for name in buffers.split()} if extras else {})


@cache
def single_file(family: str) -> State:
    """All tensors of a small single file, copied: safetensors writes no tensors that share memory."""
    return {key: tensor.clone() for key, tensor in original_file(family, states(family)).items()}


@pytest.fixture
def small_families(monkeypatch):
    """Lets single files of the small models stand for Stable Diffusion 1.x and 2.x."""
    monkeypatch.setattr(original, "CONFIGS", {768: SMALL["sd1"], 1024: SMALL["sd2"]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("family", SMALL)
def test_an_original_single_file_loads_bit_for_bit(tmp_path, small_families, family, dtype):
    path = tmp_path / "v1-5.safetensors"
    save_file({k: t if t.dtype == torch.int64 else t.to(dtype) for k, t in single_file(family).items()}, path)
    assert_loads(path, family, dtype)


@pytest.mark.parametrize("absent", ["extras", "block 23"])
def test_what_a_single_file_may_hold_it_need_not_hold(tmp_path, small_families, absent):
    path = tmp_path / "pruned.safetensors"
    ours = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")
    keep = {k: t for k, t in single_file("sd2").items() if absent != "extras" or k.startswith(ours)}
    save_file({k: t for k, t in keep.items() if absent != "block 23" or ".resblocks.23." not in k}, path)
    assert_loads(path, "sd2")


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A float16 safetensors file of any size whose data are a hole: only its header takes room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


FULL_SD2 = {
    "unet": {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True},
    "vae": {},
    "text_encoder": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
        "hidden_act": "gelu",
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "family, configs, sizes",
    [
        ("sd1", dict.fromkeys(NETWORKS, {}), {"unet": 859.52e6, "vae": 83.65e6, "text_encoder": 123.06e6}),
        ("sd2", FULL_SD2, {"unet": 865.91e6, "vae": 83.65e6, "text_encoder": 340.39e6}),
    ],
)
def test_full_size_single_files_open_without_their_data_and_as_diffusers_converts_them(
    tmp_path, family, configs, sizes
):
    with torch.device("meta"):
        expected = {name: NETWORKS[name](**configs[name]) for name in NETWORKS}
        tensors = original_file(family, {name: dict(net.state_dict()) for name, net in expected.items()}, extras=False)
    path = write_sparse(tmp_path / "full.safetensors", {key: tuple(t.shape) for key, t in tensors.items()})
    assert path.stat().st_size > 2e9 and path.stat().st_blocks * 512 < 10e6

    parts = open_model(path)
    for name, part in parts.items():
        with torch.device("meta"):
            assert json.dumps(NETWORKS[name](**part.config).config) == json.dumps(expected[name].config)
        shapes = {key: tuple(tensor.shape) for key, tensor in expected[name].state_dict().items()}
        assert {key: tensor.shape for key, tensor in part.tensors.items()} == shapes
        assert abs(sum(map(prod, shapes.values())) - sizes[name]) < 0.01e6
    assert len(parts["unet"].tensors) == 686

    converter = pytest.importorskip("diffusers.loaders.single_file_utils")
    theirs = {
        "unet": converter.convert_ldm_unet_checkpoint(tensors, {"layers_per_block": 2}),
        "vae": converter.convert_ldm_vae_checkpoint(tensors, {"down_block_types": "1234", "up_block_types": "1234"}),
    }
    if family == "sd1":
        text = converter.convert_ldm_clip_checkpoint(tensors)
        theirs["text_encoder"] = {k.removeprefix("text_model."): t for k, t in text.items() if "position_ids" not in k}
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
    theirs = converter.convert_open_clip_checkpoint(reference_clip(**SMALL["sd2"]["text_encoder"]), load_file(path))
    theirs.pop("text_projection.weight", None)
    ours = build(CLIPTextModel, open_model(path)["text_encoder"]).state_dict()
    assert_equal(ours, {key.removeprefix("text_model."): tensor for key, tensor in theirs.items()})


SINGLE_FILE_FAULTS = {  # what is added (a shape) or taken away (None), and the words of the error
    "foo.bar": ((1,), "unknown tensors: foo.bar"),
    "conditioner.embedders.0.x": ((1,), "unknown tensors: conditioner"),
    "cond_stage_model.other.x": ((1,), "unknown tensors: cond_stage_model.other"),
    "cond_stage_model.transformer.text_model.x": ((1,), "one text encoder"),
    "model.diffusion_model.label_emb.weight": ((1,), "unknown tensors: label_emb.weight"),
    "first_stage_model.decoder.extra": ((1,), "unknown tensors: decoder.extra"),
    "first_stage_model.decoder.up.7.block.0.conv1.bias": ((1,), "unknown tensors: decoder.up_blocks.-4"),
    "model.diffusion_model.input_blocks.0.0.bias": (None, "missing tensors: conv_in.bias"),
    "model.diffusion_model.input_blocks.0.0.weight": ((7, 4, 3, 3), "wrong shape: conv_in.weight (7, 4, 3, 3)"),
    "cond_stage_model.model.ln_final.weight": (None, "missing tensors: final_layer_norm.weight"),
    "cond_stage_model.model.transformer.resblocks.3.attn.in_proj_bias": ((7,), "wrong shape: encoder.layers.3"),
    "cond_stage_model.model.transformer.resblocks.4.attn.in_proj_bias": ((), "encoder.layers.4.self_attn.in_proj_bias"),
    "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": ((512, 512), "width 512; expected"),
    "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight ": ((), "unknown tensors: mid_block"),
}


@pytest.mark.parametrize("key", SINGLE_FILE_FAULTS)
def test_a_single_file_that_does_not_fit_is_refused_by_name(tmp_path, small_families, key):
    shape, words = SINGLE_FILE_FAULTS[key]
    tensors = single_file("sd2") | ({key: torch.ones(shape)} if shape is not None else {})
    path = tmp_path / "single.safetensors"
    save_file({k: t for k, t in tensors.items() if shape is not None or k != key}, path)
    refused(path, path, words)


def test_a_file_that_is_another_model_is_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    for tensors in ({}, {"betas": torch.ones(1)}, {"conv_in.weight": torch.ones(3, 3)}, state("sd1", "unet")):
        save_file(tensors, path)
        refused(path, path, "not an original Stable Diffusion")
    narrow = {"model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": torch.ones(())}
    save_file(narrow | {"first_stage_model.x": torch.ones(1)}, path)
    refused(path, path, "width None; expected 768")


# ----------------------------------------------------------------------------------------------------------
# Layout 3: C-DiffSET's released U-Net


@pytest.mark.parametrize("outputs", [5, 4])
@pytest.mark.parametrize("prefix", ["", "module.", "unet.", "module.unet."])
def test_a_released_unet_loads_beside_a_folder(tmp_path, prefix, outputs):
    base = open_model(write_folder(tmp_path / "sd2", "sd2"))["unet"]
    released = fill(UNet(**SMALL["sd2"]["unet"] | {"in_channels": 8, "out_channels": outputs}), seed=1)
    path = tmp_path / "model.safetensors"
    save_file({prefix + key: tensor for key, tensor in released.state_dict().items()}, path)
    loaded = build(UNet, open_unet(path, base))
    assert (loaded.config["in_channels"], loaded.config["out_channels"]) == (8, outputs)
    assert_equal(loaded.state_dict(), released.state_dict())


@pytest.mark.parametrize(
    "shapes",
    [
        {},
        {"a": (1,)},
        {"conv_in.weight": ()},
        {"conv_in.weight": (3,), "conv_out.weight": ()},
        {"conv_in.weight": (32, 8, 3, 3), "conv_out.weight": (5, 32, 3, 3)},
    ],
)
def test_a_file_that_is_no_unet_is_refused_as_one(folder, tmp_path, shapes):
    path = tmp_path / "model.safetensors"
    save_file({key: torch.ones(shape) for key, shape in shapes.items()}, path)
    base = open_model(folder)["unet"]
    refused(path, path, load=lambda path: build(UNet, open_unet(path, base)))
    for path in (folder, tmp_path / "absent.safetensors"):
        refused(path, path, load=lambda path: open_unet(path, base))


# ----------------------------------------------------------------------------------------------------------
# Tensors stay on disk until they are needed


def test_opening_and_checking_reads_no_tensor(tmp_path, monkeypatch, small_families):
    def read(self, key, rows, dtype):
        raise AssertionError(f"read {key}")

    monkeypatch.setattr(File, "read", read)
    write_folder(tmp_path / "folder", "sd2")
    save_file(single_file("sd2"), tmp_path / "single.safetensors")
    for path in (tmp_path / "folder", tmp_path / "single.safetensors"):
        parts = open_model(path)
        del parts["unet"].tensors["conv_in.weight"]
        with pytest.raises(ValueError, match=r"missing tensors: conv_in\.weight"):
            build(UNet, parts["unet"])


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
    monkeypatch.setattr(weights, "CONVERTED_MAX", 1_000_000)
    half = state("sd2", "unet", torch.float16)
    path = write_folder(tmp_path, "sd2", unet=half) / FILES["unet"]
    unet = build(UNet, open_model(tmp_path)["unet"])
    assert_equal(unet.state_dict(), {key: tensor.float() for key, tensor in half.items()})
    assert 3 < len(set(map(id, files))) <= path.stat().st_size / 1e6  # the file's pages are freed in between


def test_a_loaded_network_and_its_file_do_not_change_with_one_another(tmp_path):
    """Though its weights are mapped: writing changes memory only, and a file in use is replaced as a whole."""
    path = write_folder(tmp_path, "sd2") / FILES["unet"]
    before, unet = path.read_bytes(), build(UNet, open_model(tmp_path)["unet"])
    expected = state("sd2", "unet") | {"conv_in.bias": torch.zeros(64)}
    with torch.no_grad():
        unet.conv_in.bias.zero_()
    assert path.read_bytes() == before
    save_tensors(path, unet.state_dict())  # over its own file
    assert_equal(build(UNet, open_model(tmp_path)["unet"]).state_dict(), expected)
    save_tensors(path, {key: torch.ones_like(tensor) for key, tensor in unet.state_dict().items()})
    assert_equal(unet.state_dict(), expected)


def test_a_file_that_is_replaced_while_it_is_read_is_not_mixed_with_the_new_one(folder, monkeypatch):
    monkeypatch.setattr(weights, "CONVERTED_MAX", 0)
    part = open_model(folder)["unet"]
    save_tensors(folder / FILES["unet"], {key: tensor + 1 for key, tensor in state("sd1", "unet").items()})
    with pytest.raises(ValueError, match="replaced in the meantime"):
        build(UNet, part, torch.float16)


# ----------------------------------------------------------------------------------------------------------
# What does not fit is refused, with the file and the first tensors


FAULTS = {
    "missing tensors: {}": lambda tensors, key: tensors.pop(key),
    "unknown tensors: {}x": lambda tensors, key: tensors.update({key + "x": torch.ones(1)}),
    "wrong shape: {} (7,), not (": lambda tensors, key: tensors.update({key: torch.ones(7)}),
    "{} has values that are not finite": lambda tensors, key: tensors[key][-1].fill_(torch.nan),
    "{} has values that are not finite in": lambda tensors, key: tensors[key][-1].fill_(-torch.inf),
}


@pytest.mark.parametrize("name, prefix", [("unet", ""), ("vae", "decoder."), ("text_encoder", "encoder.layers.0.")])
@pytest.mark.parametrize("words", FAULTS)
def test_tensors_that_do_not_fit_are_refused_by_name(folder, name, prefix, words):
    key = prefix + ("self_attn.q_proj.bias" if name == "text_encoder" else "conv_norm_out.bias")
    edit_tensors(folder / FILES[name], lambda tensors: FAULTS[words](tensors, key))
    refused(folder, folder / name, words.format(key))


def test_only_the_first_three_of_many_tensors_are_named(folder):
    keys = [key for key in state("sd1", "unet") if key.startswith("mid_block.")]
    edit_tensors(folder / FILES["unet"], lambda tensors: [tensors.pop(key) for key in keys])
    message = refused(folder, "missing tensors: mid_block.attentions.0.norm.bias, ", f"and {len(keys) - 3} more")
    assert len(message) < 500 + len(str(folder))


def test_an_unknown_tensor_beside_a_prefixed_text_encoder_is_refused(folder):
    text = {f"text_model.{key}": tensor for key, tensor in state("sd1", "text_encoder").items()}
    save_file(text | {"text_projection.weight": torch.ones(2)}, folder / FILES["text_encoder"])
    refused(folder, folder / "text_encoder", "unknown", "text_projection.weight")


def test_a_tensor_under_its_old_and_its_new_name_is_refused(folder):
    vae = state("sd1", "vae")
    save_file({key: t.clone() for key, t in (vae | old_attention(vae, False)).items()}, folder / FILES["vae"])
    refused(folder, folder / FILES["vae"], "twice", "attentions.0.key.", "attentions.0.to_k.")


def test_a_path_without_a_model_is_refused(tmp_path, folder):
    refused(tmp_path / "nowhere", tmp_path / "nowhere", "does not exist")
    refused(tmp_path, tmp_path, "holds no model")
    refused(tmp_path / "no.ckpt", "does not exist")
    (folder / FILES["vae"]).rename(folder / "vae" / "diffusion_pytorch_model.bin")
    refused(folder, folder / "vae", "no diffusion_pytorch_model.safetensors", "pickles such as .bin are not read")
    (folder / "vae" / "config.json").unlink()
    refused(folder, folder / "vae" / "config.json")


UNSUPPORTED = {  # settings that we do not implement, or of a wrong type or value
    "unet": [
        {"class_embed_type": "timestep"}, {"act_fn": "gelu"}, {"num_class_embeds": 1000}, {"freq_shift": 1},
        {"dual_cross_attention": True}, {"only_cross_attention": True}, {"flip_sin_to_cos": False},
        {"downsample_padding": 0}, {"mid_block_type": None}, {"center_input_sample": True}, {"something_new": [1]},
        {"attention_head_dim": [8]}, {"attention_head_dim": "8"}, {"norm_num_groups": 7},
        {"use_linear_projection": "yes"}, {"down_block_types": "DownBlock2D"},
        {"down_block_types": ["DownBlock2D"]}, {"up_block_types": [1, 2]},
    ],
    "vae": [
        {"act_fn": "gelu"}, {"use_quant_conv": False}, {"shift_factor": 0.1}, {"latents_mean": [0.0, 0.1]},
        {"scaling_factor": "0.18215"}, {"scaling_factor": None}, {"block_out_channels": {"0": 32}},
    ],
    "text_encoder": [{"hidden_act": "relu"}, {"num_hidden_layers": "2"}, {"hidden_act": 1}, {"hidden_size": 100}],
}  # fmt: skip


@pytest.mark.parametrize("name, change", [(name, change) for name in UNSUPPORTED for change in UNSUPPORTED[name]])
def test_a_config_that_we_do_not_implement_is_refused(folder, name, change):
    edit_json(folder / name / "config.json", **change)
    message = refused(folder, folder / name)
    assert next(iter(change)) in message or "the configuration" in message or "tensors" in message


@pytest.mark.parametrize("changes", [
    {"beta_schedule": "linear"}, {"beta_schedule": "squaredcos_cap_v2"}, {"beta_schedule": None},
    {"trained_betas": [0.1, 0.2]}, {"rescale_betas_zero_snr": True}, {"prediction_type": "flow"},
    {"prediction_type": None}, {"beta_start": "small"}, {"beta_end": None}, {"num_train_timesteps": "1000"},
    {"num_train_timesteps": -1},
])  # fmt: skip
def test_another_noise_schedule_is_refused(folder, changes):
    edit_json(folder / SCHEDULE, **changes)
    refused(folder, folder / SCHEDULE, load=load_scheduler)


def test_the_noise_schedule_is_read_from_the_folder(folder):
    edit_json(folder / SCHEDULE, prediction_type="v_prediction", beta_end=0.01)
    assert load_scheduler(folder).config == DDPMScheduler(prediction_type="v_prediction", beta_end=0.01).config
    assert load_scheduler(folder, "epsilon").prediction_type == "epsilon"
    refused(folder, "flow", load=lambda folder: load_scheduler(folder, "flow"))


# ----------------------------------------------------------------------------------------------------------
# What the files do not say is assumed aloud, or refused


def cdiffset_folder(folder: Path, family: str = "sd1") -> Path:
    """A diffusers folder with a prompt embedding, from which a whole model loads."""
    width = SMALL[family]["unet"]["cross_attention_dim"]
    save_file({"prompt_embedding": torch.randn(1, 6, width)}, folder / "prompt_embedding.safetensors")
    return folder


def remove_key(path: Path, key: str) -> None:
    path.write_text(json.dumps({k: value for k, value in json.loads(path.read_text()).items() if k != key}))


def test_a_folder_that_says_everything_gives_no_line(folder):
    assert CDiffSET.from_pretrained(cdiffset_folder(folder)).assumptions == []


def test_a_folder_without_prediction_type_is_taken_to_predict_the_noise_and_says_so(folder):
    remove_key(cdiffset_folder(folder) / SCHEDULE, "prediction_type")
    model = CDiffSET.from_pretrained(folder)
    (line,) = model.assumptions
    assert model.scheduler.prediction_type == "epsilon"
    assert line.startswith(f"{folder / SCHEDULE}: does not say") and "epsilon" in line and "--prediction-type" in line
    told = CDiffSET.from_pretrained(folder, prediction_type="v_prediction")
    assert told.assumptions == [] and told.scheduler.prediction_type == "v_prediction"


@pytest.mark.parametrize("family", SMALL)
def test_a_single_file_does_not_tell_what_it_predicts(tmp_path, family):
    path = tmp_path / "v2-1.safetensors"
    path.touch()
    vae = weights.Part(path, original.CONFIGS[768]["vae"], {})
    (line,) = weights.list_assumptions(path, vae)
    assert str(path) in line and "assumed epsilon (--prediction-type" in line and "v_prediction" in line
    assert weights.list_assumptions(path, vae, None, "v_prediction") == []
    assert load_scheduler(path).config == DDPMScheduler().config
    assert load_scheduler(path, "v_prediction").prediction_type == "v_prediction"


def test_a_separate_unet_is_taken_to_predict_what_the_model_predicts(folder, tmp_path):
    edit_json(cdiffset_folder(folder) / SCHEDULE, prediction_type="v_prediction")
    path = tmp_path / "released.safetensors"
    save_file(fill(UNet(**SMALL["sd1"]["unet"] | {"in_channels": 8}), seed=1).state_dict(), path)
    (line,) = CDiffSET.from_pretrained(folder, path).assumptions
    assert str(path) in line and "assumed v_prediction" in line


def test_a_missing_vae_scale_is_stable_diffusions_only_for_its_latents(folder):
    remove_key(cdiffset_folder(folder) / "vae/config.json", "scaling_factor")
    model = CDiffSET.from_pretrained(folder)
    (line,) = model.assumptions
    assert model.vae.scaling_factor == 0.18215 and str(folder / "vae") in line and "0.18215" in line
    for change in ({"latent_channels": 16}, {"block_out_channels": [32, 32, 64]}):
        edit_json(folder / "vae/config.json", **SMALL_VAE | change)
        remove_key(folder / "vae/config.json", "scaling_factor")
        refused(folder, folder / "vae", "scaling_factor is missing", load=CDiffSET.from_pretrained)


@pytest.mark.parametrize(
    "file, key",
    [
        (SCHEDULE, "beta_start"),
        (SCHEDULE, "beta_end"),
        (SCHEDULE, "num_train_timesteps"),
        ("text_encoder/config.json", "num_attention_heads"),
    ],
)
def test_settings_whose_defaults_in_the_format_are_not_stable_diffusions_must_be_there(folder, file, key):
    remove_key(folder / file, key)
    refused(folder, folder / file, key, "is missing", load=load_scheduler if file == SCHEDULE else load_networks)


def test_a_folder_without_schedule_prompt_or_text_encoder_is_refused(folder):
    (folder / "text_encoder").rename(folder / "away")
    refused(folder, folder, "prompt_embedding.safetensors", load=CDiffSET.from_pretrained)
    (cdiffset_folder(folder) / SCHEDULE).unlink()
    refused(folder, folder / SCHEDULE, load=CDiffSET.from_pretrained)


def test_a_prompt_embedding_that_does_not_fit_is_refused(folder):
    assert load_prompt_embedding(folder) is None
    for tensors, words in (
        ({"prompt": torch.zeros(1, 6, 768)}, "missing tensors: prompt_embedding"),
        ({"prompt_embedding": torch.full((1, 6, 768), torch.nan)}, "not finite"),
        (
            {"prompt_embedding": torch.zeros(1, 6, 1024)},
            "(1, 6, 1024), but the U-Net's cross-attention needs (1, tokens, 768)",
        ),
        ({"prompt_embedding": torch.zeros(2, 6, 768)}, "(2, 6, 768)"),
        ({"prompt_embedding": torch.zeros(6, 768)}, "(6, 768)"),
    ):
        save_file(tensors, folder / "prompt_embedding.safetensors")
        refused(folder, folder, words, load=CDiffSET.from_pretrained)


# ----------------------------------------------------------------------------------------------------------
# Saving


def small_cdiffset(family: str = "sd2") -> CDiffSET:
    """A C-DiffSET model with random weights."""
    unet = fill(UNet(**SMALL[family]["unet"] | {"in_channels": 8, "out_channels": 5}), seed=1)
    prompt = torch.randn(1, 6, unet.config["cross_attention_dim"])
    return CDiffSET(deepcopy(network(family, "vae")), unet, prompt, DDPMScheduler())


def files_under(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same(model: CDiffSET, other: CDiffSET) -> None:
    assert_equal(model.state_dict(), other.state_dict())
    assert model.scheduler.config == other.scheduler.config and model.trained_on == other.trained_on
    for name in ("vae", "unet"):
        assert json.dumps(getattr(model, name).config) == json.dumps(getattr(other, name).config)


@pytest.mark.parametrize("family", SMALL)
def test_a_saved_model_loads_bit_for_bit_with_all_its_settings(tmp_path, family):
    model = small_cdiffset(family)
    model.scheduler = DDPMScheduler(num_train_timesteps=500, beta_end=0.02, prediction_type="v_prediction")
    model.vae.config["scaling_factor"] = model.vae.scaling_factor = 0.5
    model.trained_on = {"sar": "db", "stretch": (1, 99), "eo": "full"}
    model.save_pretrained(tmp_path / "new" / "model")
    loaded = CDiffSET.from_pretrained(tmp_path / "new" / "model")
    assert_same(model, loaded)
    assert loaded.vae.scaling_factor == 0.5 and loaded.assumptions == []


def test_what_a_model_was_trained_on_is_unknown_unless_its_folder_says_it(tmp_path, folder):
    assert CDiffSET.from_pretrained(cdiffset_folder(folder)).trained_on == {}
    small_cdiffset().save_pretrained(tmp_path / "mine")
    assert "_trained_on" not in read_json(tmp_path / "mine" / "model_index.json")
    full = {"sar": "full", "stretch": None, "eo": "full"}
    for wrong in ([1], {"sar": "db"}, full | {"stretch": 5}, full | {"stretch": ["a", "b"]}, full | {"eo": []}):
        edit_json(tmp_path / "mine" / "model_index.json", _trained_on=wrong)
        refused(tmp_path / "mine", "model_index.json", "_trained_on", load=CDiffSET.from_pretrained)
    small_cdiffset("sd1").save_pretrained(folder)
    known = {"sar": "db", "stretch": None, "eo": "full"}
    edit_json(folder / "model_index.json", _trained_on=known)
    assert CDiffSET.from_pretrained(folder).trained_on == known
    assert CDiffSET.from_pretrained(folder, folder / FILES["unet"]).trained_on == {}  # another U-Net


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_model_is_saved_as_it_is(tmp_path, dtype):
    model = small_cdiffset().to(dtype)
    model.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / FILES["unet"]).values()} == {dtype}
    assert_same(model, CDiffSET.from_pretrained(tmp_path, dtype=dtype))
    assert_same(model.float(), CDiffSET.from_pretrained(tmp_path))


def test_diffusers_opens_a_saved_folder_and_gives_the_same_numbers(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    model = small_cdiffset()
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


def test_channels_last_weights_are_saved_like_others(tmp_path):
    model = small_cdiffset()
    model.save_pretrained(tmp_path / "a")
    model.to(memory_format=torch.channels_last).save_pretrained(tmp_path / "b")
    assert files_under(tmp_path / "a") == files_under(tmp_path / "b")


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_saved_files_are_those_of_a_folder_with_the_permissions_that_the_umask_leaves(tmp_path, umask, mode):
    old = os.umask(umask)
    try:
        small_cdiffset().save_pretrained(tmp_path)
    finally:
        os.umask(old)
    files = files_under(tmp_path)
    assert {str(path) for path in files} == {
        "model_index.json",
        "prompt_embedding.safetensors",
        SCHEDULE,
        "unet/config.json",
        FILES["unet"],
        "vae/config.json",
        FILES["vae"],
    }
    assert {(tmp_path / path).stat().st_mode & 0o777 for path in files} == {mode}
    assert read_json(tmp_path / "model_index.json")["unet"] == ["diffusers", "UNet2DConditionModel"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError("No space left on device")])
def test_an_interrupted_save_leaves_the_old_model(tmp_path, monkeypatch, interruption):
    model = small_cdiffset()
    model.save_pretrained(tmp_path)
    before = files_under(tmp_path)

    def half_written(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise interruption

    monkeypatch.setattr(weights, "save_file", half_written)
    with torch.no_grad():
        model.unet.conv_in.weight.add_(1)
    with pytest.raises((KeyboardInterrupt, OSError)):
        model.save_pretrained(tmp_path)
    assert files_under(tmp_path) == before

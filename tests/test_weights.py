"""Every public layout of the weights loads bit for bit, what does not fit is refused by name, and what is saved opens.

Original single files are written here by the constructive naming of `original_unet`, `original_vae` and
`original_openclip`, which walk the networks as ldm builds them and share nothing with the rules under test; where
diffusers is installed its own converter must agree, at full size.
"""

import json
import os
import shutil
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

import stored
from cdiffset import CDiffSET
from clip import CLIPTextModel
from common import read_json
from scheduler import DDPMScheduler
from stored import File, save_tensors
from unet import UNet
from vae import AutoencoderKL
from weights import build, load_prompt_embedding, load_scheduler, open_model, open_unet, save_model

State = dict[str, torch.Tensor]
NETWORKS = {"unet": UNet, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}

# ----------------------------------------------------------------------------------------------------------
# Small models, with the configurations that are published

SMALL = {
    "sd1": {
        "unet": {
            "block_out_channels": [32, 32, 64, 64],
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
            "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        },
        "text_encoder": {"num_hidden_layers": 2, "hidden_act": "quick_gelu"},
    },
    "sd2": {
        "unet": {
            "block_out_channels": [64, 128],
            "attention_head_dim": [1, 2],
            "cross_attention_dim": 1024,
            "use_linear_projection": True,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        },
        "text_encoder": {"num_hidden_layers": 23, "hidden_act": "gelu"},
    },
    "tiny": {  # where only what is wrong with a file matters
        "unet": {
            "block_out_channels": [32, 32],
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        },
        "text_encoder": {"num_hidden_layers": 2, "hidden_act": "quick_gelu"},
    },
}
FULL = {
    "sd1": {"unet": {}, "vae": {}, "text_encoder": {}},
    "sd2": {
        "unet": {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True},
        "vae": {},
        "text_encoder": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 23,
            "num_attention_heads": 16,
            "hidden_act": "gelu",
        },
    },
}
for _family in SMALL.values():
    _family["vae"] = {"block_out_channels": [32, 64]}
    _family["text_encoder"] |= {
        "vocab_size": 50,
        "hidden_size": 128,
        "intermediate_size": 96,
        "num_attention_heads": 2,
    }

# what else the published config.json files say
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
        "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
    },
    "text_encoder": {
        "architectures": ["CLIPTextModel"], "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0,
        "eos_token_id": 2, "initializer_factor": 1.0, "layer_norm_eps": 1e-5, "max_position_embeddings": 77,
        "model_type": "clip_text_model", "pad_token_id": 1, "projection_dim": 512, "torch_dtype": "float32",
    },
    "scheduler": {
        "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "clip_sample": False, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
        "steps_offset": 1, "trained_betas": None,
    },
}  # fmt: skip


@cache
def network(family: str, name: str) -> torch.nn.Module:
    return fill(NETWORKS[name](**SMALL[family][name]), seed=0)


@cache
def small_unet(family: str, outputs: int) -> UNet:
    """A U-Net of C-DiffSET, with the variance channel (5 outputs) or of stage 1 (4)."""
    return fill(UNet(**SMALL[family]["unet"] | {"in_channels": 8, "out_channels": outputs}), seed=1)


def state(family: str, name: str) -> State:
    return dict(network(family, name).state_dict())


def cast(family: str, dtype: torch.dtype) -> dict[str, State]:
    """All weights, rounded."""
    return {name: {key: tensor.to(dtype) for key, tensor in state(family, name).items()} for name in NETWORKS}


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def weight_file(folder: Path, name: str) -> Path:
    return folder / name / ("model.safetensors" if name == "text_encoder" else "diffusion_pytorch_model.safetensors")


def write_folder(folder: Path, family: str = "sd1", **states: State) -> Path:
    """A diffusers folder of a small model; states: replacements for the weights of some networks."""
    for name in NETWORKS:
        write_json(folder / name / "config.json", PUBLISHED[name] | SMALL[family][name])
        save_file(states.get(name, state(family, name)), weight_file(folder, name))
    write_json(folder / "scheduler" / "scheduler_config.json", PUBLISHED["scheduler"])
    return folder


def assert_loads(path: Path, family: str, dtype: torch.dtype = torch.float32) -> None:
    """All three networks load from `path` bit for bit, their weights rounded to `dtype` in the file."""
    for name, part in open_model(path).items():
        loaded = build(NETWORKS[name], part)
        assert not loaded.training
        assert_equal(loaded.state_dict(), {k: t.to(dtype).float() for k, t in state(family, name).items()})
    assert set(open_model(path)) == set(NETWORKS)


def assert_equal(actual: State, expected: State) -> None:
    """The same names, dtypes and bits."""
    assert actual.keys() == expected.keys()
    for key, tensor in actual.items():
        assert tensor.dtype == expected[key].dtype and torch.equal(tensor, expected[key]), key


def edited_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


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


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_a_diffusers_folder_loads_bit_for_bit(tmp_path, family):
    assert_loads(write_folder(tmp_path, family), family)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_files_of_other_precisions_load(tmp_path, dtype):
    assert_loads(write_folder(tmp_path, "sd2", **cast("sd2", dtype)), "sd2", dtype)


def test_fp16_files_load_where_there_are_no_others(tmp_path):
    write_folder(tmp_path, "sd1", **cast("sd1", torch.float16))
    for name in NETWORKS:
        path = weight_file(tmp_path, name)
        path.rename(path.with_suffix(".fp16.safetensors"))
    assert_loads(tmp_path, "sd1", torch.float16)
    write_folder(tmp_path, "sd1")  # full precision beside half: it comes first
    assert_loads(tmp_path, "sd1")


def shard(path: Path, variant: str, dtype: torch.dtype) -> Path:
    """Replaces a weight file by three shards and their index, named as diffusers names them."""
    tensors = load_file(path)
    path.unlink()
    index = {}
    for i in range(3):
        part = {key: tensors[key].to(dtype) for key in sorted(tensors)[i::3]}
        name = f"{path.stem}{variant}-0000{i + 1}-of-00003.safetensors"
        save_file(part, path.with_name(name))
        index |= dict.fromkeys(part, name)
    index_path = path.with_name(f"{path.name}.index{variant}.json")
    write_json(index_path, {"metadata": {"total_size": 1}, "weight_map": index})
    return index_path


@pytest.mark.parametrize("variant, dtype", [("", torch.float32), (".fp16", torch.float16)])
def test_sharded_files_load(tmp_path, variant, dtype):
    write_folder(tmp_path, "sd2")
    for name in NETWORKS:
        shard(weight_file(tmp_path, name), variant, dtype)
    assert_loads(tmp_path, "sd2", dtype)


def old_attention(vae: State, convolutions: bool) -> State:
    """The VAE as published: attention named query, key, value, proj_attn; if asked for, as 1x1 convolutions."""
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


def test_text_towers_load_with_their_prefix_and_position_ids(tmp_path):
    text = {f"text_model.{key}": tensor for key, tensor in state("sd1", "text_encoder").items()}
    text["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    assert_loads(write_folder(tmp_path, text_encoder=text), "sd1")


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_folders_written_by_diffusers_and_transformers_give_their_numbers(tmp_path, family):
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    config = SMALL[family]
    theirs = {
        "unet": reference_unet(**config["unet"]),
        "vae": reference_vae(**config["vae"]),
        "text_encoder": reference_clip(**config["text_encoder"]),
    }
    for name, model in theirs.items():
        fill(model, seed=3).save_pretrained(tmp_path / name)
    ours = {name: build(NETWORKS[name], part) for name, part in open_model(tmp_path).items()}
    x, context = torch.randn(1, 4, 8, 16), torch.randn(1, 6, config["unet"]["cross_attention_dim"])
    ids = torch.tensor([[0, 7, 49, 3]])
    with torch.no_grad():
        for mine, expected in (
            (ours["unet"](x, 500, context), theirs["unet"](x, 500, context).sample),
            (ours["vae"].decode(x), theirs["vae"].decode(x).sample),
            (ours["text_encoder"](ids), theirs["text_encoder"](ids).last_hidden_state),
        ):
            assert (mine - expected).abs().max() <= 1e-4 * expected.std()


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
    """All tensors of a small single file."""
    return separate(original_file(family, {name: state(family, name) for name in NETWORKS}))


def separate(tensors: State) -> State:
    """Copies, so that no tensors share memory: safetensors would not write them."""
    return {key: tensor.clone() for key, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_an_original_single_file_loads_bit_for_bit(tmp_path, family, dtype):
    path = tmp_path / "v1-5.safetensors"
    save_file({k: t if t.dtype == torch.int64 else t.to(dtype) for k, t in single_file(family).items()}, path)
    assert_loads(path, family, dtype)
    for name, part in open_model(path).items():
        built, expected = build(NETWORKS[name], part).config, network(family, name).config
        assert {k: list(v) if isinstance(v, tuple) else v for k, v in built.items()} == expected | {
            k: list(v) for k, v in expected.items() if isinstance(v, tuple)
        }
    assert load_scheduler(path).config == DDPMScheduler().config
    assert load_scheduler(path, "v_prediction").prediction_type == "v_prediction"


@pytest.mark.parametrize("absent", ["extras", "block 23"])
def test_what_a_single_file_may_hold_it_need_not_hold(tmp_path, absent):
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


@pytest.mark.parametrize(
    "family, sizes",
    [("sd1", {"unet": 859.52e6, "text_encoder": 123.06e6}), ("sd2", {"unet": 865.91e6, "text_encoder": 340.39e6})],
)
def test_full_size_single_files_open_without_their_data_and_as_diffusers_converts_them(tmp_path, family, sizes):
    with torch.device("meta"):
        states = {name: dict(NETWORKS[name](**FULL[family][name]).state_dict()) for name in NETWORKS}
        original = original_file(family, states, extras=False)
    path = write_sparse(tmp_path / "full.safetensors", {key: tuple(t.shape) for key, t in original.items()})
    assert path.stat().st_size > 2e9 and path.stat().st_blocks * 512 < 10e6

    parts = open_model(path)
    for name, part in parts.items():
        with torch.device("meta"):
            config = NETWORKS[name](**part.config).config
            expected = NETWORKS[name](**FULL[family][name]).config
        assert json.dumps(config) == json.dumps(expected)
        assert {k: t.shape for k, t in part.tensors.items()} == {k: tuple(t.shape) for k, t in states[name].items()}
        size = sizes.get(name, 83.65e6)
        assert abs(sum(prod(t.shape) for t in part.tensors.values()) - size) < 0.01e6
    assert len(parts["unet"].tensors) == 686

    converter = pytest.importorskip("diffusers.loaders.single_file_utils")
    theirs = {
        "unet": converter.convert_ldm_unet_checkpoint(original, {"layers_per_block": 2}),
        "vae": converter.convert_ldm_vae_checkpoint(original, {"down_block_types": "1234", "up_block_types": "1234"}),
    }
    for name, converted in theirs.items():
        assert converted.keys() == parts[name].tensors.keys()
        for key, tensor in converted.items():
            mine = original[parts[name].tensors[key].key]
            # its 1x1 convolutions have become matrices, so they are told apart by name below
            assert tensor is mine or (".attentions." in key and tensor.ndim == 2 and mine.ndim == 4), key
    for half in ("encoder", "decoder"):
        for new, old in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
            part = parts["vae"].tensors[f"{half}.mid_block.attentions.0.{new}.weight"]
            assert part.key == f"first_stage_model.{half}.mid.attn_1.{old}.weight" and len(part.shape) == 2

    if family == "sd1":
        text = converter.convert_ldm_clip_checkpoint(original)
        text.pop("text_model.embeddings.position_ids")
        sources = {f"text_model.{key}": original[t.key] for key, t in parts["text_encoder"].tensors.items()}
        assert {key: id(t) for key, t in text.items()} == {key: id(t) for key, t in sources.items()}


def test_openclip_becomes_what_diffusers_makes_of_it(tmp_path):
    converter = pytest.importorskip("diffusers.loaders.single_file_utils")
    reference = pytest.importorskip("transformers")
    config = reference.CLIPTextConfig(**SMALL["sd2"]["text_encoder"])
    path = tmp_path / "v2-1.safetensors"
    save_file(single_file("sd2"), path)
    theirs = converter.convert_open_clip_checkpoint(reference.CLIPTextModel(config), load_file(path))
    theirs.pop("text_projection.weight", None)
    ours = build(CLIPTextModel, open_model(path)["text_encoder"]).state_dict()
    assert_equal(ours, {key.removeprefix("text_model."): tensor for key, tensor in theirs.items()})


# ----------------------------------------------------------------------------------------------------------
# Layout 3: C-DiffSET's released U-Net


@pytest.mark.parametrize("outputs", [5, 4])
@pytest.mark.parametrize("prefix", ["", "module.", "unet.", "module.unet."])
def test_a_released_unet_loads_beside_a_folder(tmp_path, prefix, outputs):
    base = open_model(write_folder(tmp_path / "sd2", "sd2"))["unet"]
    released = small_unet("sd2", outputs)
    path = tmp_path / "model.safetensors"
    save_file({prefix + key: tensor for key, tensor in released.state_dict().items()}, path)
    loaded = build(UNet, open_unet(path, base))
    assert (loaded.config["in_channels"], loaded.config["out_channels"]) == (8, outputs)
    assert_equal(loaded.state_dict(), released.state_dict())


# ----------------------------------------------------------------------------------------------------------
# Lazily


def test_opening_and_checking_reads_no_tensor(tmp_path, monkeypatch):
    def read(self, key, rows, dtype):
        raise AssertionError(f"read {key}")

    monkeypatch.setattr(File, "read", read)
    write_folder(tmp_path / "folder", "sd2")
    save_file(single_file("sd2"), tmp_path / "single.safetensors")
    for path in (tmp_path / "folder", tmp_path / "single.safetensors"):
        parts = open_model(path)
        assert set(parts) == set(NETWORKS)
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
    monkeypatch.setattr(stored, "CONVERTED_MAX", 1_000_000)
    half = cast("sd2", torch.float16)["unet"]
    path = weight_file(write_folder(tmp_path, "sd2", unet=half), "unet")
    unet = build(UNet, open_model(tmp_path)["unet"])
    assert_equal(unet.state_dict(), {key: tensor.float() for key, tensor in half.items()})
    assert 3 < len(set(map(id, files))) <= path.stat().st_size / 1e6  # the file's pages are let go in between


def test_a_loaded_network_and_its_file_do_not_change_with_one_another(tmp_path):
    """Though its weights are mapped: they are written to in memory alone, and a file in use is replaced whole."""
    path = weight_file(write_folder(tmp_path, "sd2"), "unet")
    before, unet = path.read_bytes(), build(UNet, open_model(tmp_path)["unet"])
    with torch.no_grad():
        unet.conv_in.bias.zero_()
    assert path.read_bytes() == before
    save_tensors(path, {key: torch.zeros_like(tensor) for key, tensor in unet.state_dict().items()})
    expected = state("sd2", "unet")
    assert_equal(unet.state_dict(), expected | {"conv_in.bias": torch.zeros_like(expected["conv_in.bias"])})


# ----------------------------------------------------------------------------------------------------------
# What must fail: with the file and the first tensors


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("good"), "tiny")


@pytest.fixture
def folder(good_folder, tmp_path) -> Path:
    return Path(shutil.copytree(good_folder, tmp_path / "model"))


def rewrite(path: Path, change) -> Path:
    """Applies `change` to a dictionary of the file's tensors."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return path


def drop(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize("name, prefix", [("unet", ""), ("vae", "decoder."), ("text_encoder", "encoder.layers.0.")])
@pytest.mark.parametrize(
    "change, words",
    [
        (lambda tensors, key: tensors.pop(key), ["missing tensors: {key}"]),
        (lambda tensors, key: put(key + "x", torch.ones(1))(tensors), ["unknown tensors: {key}x"]),
        (lambda tensors, key: put(key, torch.ones(7))(tensors), ["wrong shape: {key} (7,), not ("]),
        (lambda tensors, key: tensors[key][-1].fill_(torch.nan), ["{key}", "not finite"]),
        (lambda tensors, key: tensors[key][-1].fill_(-torch.inf), ["{key}", "not finite"]),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(folder, name, prefix, change, words):
    key = prefix + ("self_attn.q_proj.bias" if name == "text_encoder" else "conv_norm_out.bias")
    rewrite(weight_file(folder, name), lambda tensors: change(tensors, key))
    refused(folder, folder / name, *(word.format(key=key) for word in words))


def test_only_the_first_three_of_many_tensors_are_named(folder):
    keys = [key for key in state("tiny", "unet") if key.startswith("mid_block.")]
    rewrite(weight_file(folder, "unet"), drop(*keys))
    message = refused(folder, "missing tensors: mid_block.attentions.0.norm.bias, ", f"and {len(keys) - 3} more")
    assert len(message) < 500 + len(str(folder))


def test_an_unknown_tensor_beside_a_prefixed_text_tower_is_refused(folder):
    text = {f"text_model.{key}": tensor for key, tensor in state("tiny", "text_encoder").items()}
    save_file(text | {"text_projection.weight": torch.ones(2)}, weight_file(folder, "text_encoder"))
    refused(folder, folder / "text_encoder", "unknown", "text_projection.weight")


def test_a_tensor_under_its_old_and_its_new_name_is_refused(folder):
    both = state("tiny", "vae") | old_attention(state("tiny", "vae"), False)
    save_file(separate(both), weight_file(folder, "vae"))
    refused(folder, weight_file(folder, "vae"), "twice", "attentions.0.key.", "attentions.0.to_k.")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a safetensors file",
        b"\xff" * 100,
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b'{"a"',
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    ],
)
def test_a_garbage_file_is_refused(folder, content):
    path = weight_file(folder, "vae")
    path.write_bytes(content)
    refused(folder, path, "not a readable safetensors file", "again")
    refused(path, path, "not a readable safetensors file")


@pytest.mark.parametrize("share", [0.1, 0.9, 0.9999])
def test_a_truncated_file_is_refused(folder, share):
    path = weight_file(folder, "unet")
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    refused(folder, path, "not a readable safetensors file")


@pytest.mark.parametrize("name", ["v1-5.ckpt", "v1-5.CKPT", "model.pt", "model.pth", "pytorch_model.bin"])
def test_a_pickle_is_refused_unopened(tmp_path, folder, name):
    path = tmp_path / name
    path.write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    refused(path, path, "convert it to safetensors first")
    base = open_model(folder)["unet"]
    refused(path, path, "convert it to safetensors first", load=lambda path: open_unet(path, base))
    weight_file(folder, "unet").unlink()
    path.rename(folder / "unet" / name)
    refused(folder, folder / "unet" / name, "convert it to safetensors first")


def test_a_path_without_a_model_is_refused(tmp_path, folder):
    refused(tmp_path / "nowhere", tmp_path / "nowhere", "does not exist")
    refused(tmp_path, tmp_path, "holds no model")
    refused(tmp_path / "no.ckpt", "does not exist")
    weight_file(folder, "vae").unlink()
    refused(folder, folder / "vae", "no diffusion_pytorch_model.safetensors")
    (folder / "vae" / "config.json").unlink()
    refused(folder, folder / "vae" / "config.json")


def test_a_folder_without_prompt_and_text_encoder_is_refused(folder):
    weight_file(folder, "text_encoder").unlink()
    (folder / "text_encoder" / "config.json").unlink()
    (folder / "text_encoder").rmdir()
    refused(folder, folder, "prompt_embedding.safetensors", load=CDiffSET.from_pretrained)


@pytest.mark.parametrize(
    "name, key, value",
    [
        ("unet", "class_embed_type", "timestep"),
        ("unet", "act_fn", "gelu"),
        ("unet", "num_class_embeds", 1000),
        ("unet", "dual_cross_attention", True),
        ("unet", "only_cross_attention", True),
        ("unet", "flip_sin_to_cos", False),
        ("unet", "freq_shift", 1),
        ("unet", "downsample_padding", 0),
        ("unet", "mid_block_type", None),
        ("unet", "center_input_sample", True),
        ("unet", "something_new", [1]),
        ("vae", "act_fn", "gelu"),
        ("vae", "use_quant_conv", False),
        ("vae", "shift_factor", 0.1),
        ("vae", "latents_mean", [0.0, 0.1]),
        ("text_encoder", "hidden_act", "relu"),
    ],
)
def test_a_config_that_we_do_not_implement_is_refused(folder, name, key, value):
    path = folder / name / "config.json"
    edited_json(path, **{key: value})
    refused(folder, folder / name, repr(value) if name != "text_encoder" else value)


@pytest.mark.parametrize(
    "name, key, value",
    [
        ("unet", "block_out_channels", "wide"),
        ("unet", "block_out_channels", None),
        ("unet", "block_out_channels", 32),
        ("unet", "block_out_channels", [32, "32"]),
        ("unet", "block_out_channels", [32, -32]),
        ("unet", "block_out_channels", []),
        ("unet", "layers_per_block", 2.0),
        ("unet", "layers_per_block", True),
        ("unet", "attention_head_dim", [8]),
        ("unet", "attention_head_dim", "8"),
        ("unet", "norm_eps", "1e-5"),
        ("unet", "norm_num_groups", 0),
        ("unet", "norm_num_groups", 7),
        ("unet", "use_linear_projection", "yes"),
        ("unet", "down_block_types", "CrossAttnDownBlock2D"),
        ("unet", "down_block_types", ["CrossAttnDownBlock2D"]),
        ("unet", "up_block_types", [1, 2]),
        ("vae", "scaling_factor", "0.18215"),
        ("vae", "scaling_factor", None),
        ("vae", "block_out_channels", {"0": 32}),
        ("text_encoder", "num_hidden_layers", "2"),
        ("text_encoder", "hidden_act", 1),
    ],
)
def test_a_config_of_wrong_types_or_values_is_refused(folder, name, key, value):
    edited_json(folder / name / "config.json", **{key: value})
    refused(folder, folder / name)


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder", "scheduler"])
@pytest.mark.parametrize("text", ["", "{", "[1]", '"a"', "\x00\xff", '{"a": 1'])
def test_a_config_that_is_no_json_object_is_refused(folder, name, text):
    path = folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json")
    path.write_bytes(text.encode("latin1"))
    refused(folder, path, load=load_scheduler if name == "scheduler" else load_networks)


@pytest.mark.parametrize("elsewhere", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "", "..", 3, None])
def test_a_shard_index_may_not_point_outside_its_folder(folder, elsewhere):
    index = shard(weight_file(folder, "unet"), "", torch.float32)
    names = json.loads(index.read_text())["weight_map"]
    edited_json(index, weight_map=names | {"conv_in.weight": elsewhere})
    refused(folder, folder / "unet")


def test_shards_that_do_not_hold_what_their_index_says_are_refused(folder):
    index = shard(weight_file(folder, "unet"), "", torch.float32)
    names = json.loads(index.read_text())["weight_map"]
    key, name = next(iter(names.items()))
    edited_json(index, weight_map={k: v for k, v in names.items() if k != key})
    refused(folder, folder / "unet" / name, "unknown", key)
    edited_json(index, weight_map=names | {"more.weight": name})
    refused(folder, folder / "unet" / name, "missing", "more.weight")
    edited_json(index, weight_map=names | {"conv_in.weight": "absent.safetensors"})
    refused(folder, folder / "unet" / "absent.safetensors")
    for wrong in ({}, [], "x", None):
        edited_json(index, weight_map=wrong)
        refused(folder, folder / "unet")


@pytest.mark.parametrize(
    "key, change, words",
    [
        ("foo.bar", put("foo.bar", torch.ones(1)), ["unknown"]),
        ("conditioner.embedders.0.x", put("conditioner.embedders.0.x", torch.ones(1)), ["unknown"]),
        ("cond_stage_model.other.x", put("cond_stage_model.other.x", torch.ones(1)), ["unknown"]),
        ("label_emb.weight", put("model.diffusion_model.label_emb.weight", torch.ones(1)), ["unknown"]),
        ("decoder.extra", put("first_stage_model.decoder.extra", torch.ones(1)), ["unknown"]),
        ("conv_in.bias", drop("model.diffusion_model.input_blocks.0.0.bias"), ["missing"]),
        ("conv_in.weight", drop("model.diffusion_model.input_blocks.0.0.weight"), ["missing"]),
        ("final_layer_norm.weight", drop("cond_stage_model.model.ln_final.weight"), ["missing"]),
        ("in_proj", put("cond_stage_model.model.transformer.resblocks.3.attn.in_proj_bias", torch.ones(7)), []),
    ],
)
def test_a_single_file_that_does_not_fit_is_refused_by_name(tmp_path, key, change, words):
    path = tmp_path / "single.safetensors"
    tensors = dict(single_file("sd2"))
    change(tensors)
    save_file(tensors, path)
    refused(path, path, *words, *([key] if words else []))


def test_a_file_that_is_another_model_is_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    for tensors in ({}, {"betas": torch.ones(1)}, {"conv_in.weight": torch.ones(3, 3)}, state("tiny", "unet")):
        save_file(tensors, path)
        refused(path, path, "not an original Stable Diffusion")
    both = single_file("tiny") | {k: t for k, t in single_file("sd2").items() if k.startswith("cond_stage_model.")}
    save_file(both, path)
    refused(path, path, "one text tower")


def test_a_cross_attention_width_of_no_stable_diffusion_is_refused(tmp_path):
    unet = UNet(**SMALL["sd2"]["unet"] | {"cross_attention_dim": 512}).state_dict()
    path = tmp_path / "other.safetensors"
    states = {name: state("sd2", name) for name in NETWORKS} | {"unet": unet}
    save_file(separate(original_file("sd2", states)), path)
    refused(path, path, "512", "768", "1024")


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"a": torch.ones(1)},
        {"conv_in.weight": torch.ones(())},
        {"conv_in.weight": torch.ones(3), "conv_out.weight": torch.ones(())},
        {"conv_in.weight": torch.ones(32, 8, 3, 3), "conv_out.weight": torch.ones(5, 32, 3, 3)},
    ],
)
def test_a_file_that_is_no_unet_is_refused_as_one(folder, tmp_path, tensors):
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    base = open_model(folder)["unet"]
    refused(path, path, load=lambda path: build(UNet, open_unet(path, base)))


def test_a_folder_or_nothing_as_unet_is_refused(folder, tmp_path):
    base = open_model(folder)["unet"]
    for path in (folder, tmp_path / "absent.safetensors"):
        refused(path, path, load=lambda path: open_unet(path, base))


# ----------------------------------------------------------------------------------------------------------
# Schedulers and prompts


@pytest.mark.parametrize(
    "changes",
    [
        {"beta_schedule": "linear"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": None},
        {"trained_betas": [0.1, 0.2]},
        {"rescale_betas_zero_snr": True},
        {"prediction_type": "flow"},
        {"beta_start": "small"},
        {"beta_end": None},
        {"num_train_timesteps": "1000"},
        {"num_train_timesteps": -1},
    ],
)
def test_another_noise_schedule_is_refused(folder, changes):
    path = folder / "scheduler" / "scheduler_config.json"
    edited_json(path, **changes)
    refused(folder, path, load=load_scheduler)


def test_the_noise_schedule_is_read_from_the_folder(folder):
    path = folder / "scheduler" / "scheduler_config.json"
    assert load_scheduler(folder).config == DDPMScheduler().config  # prediction_type may be absent
    edited_json(path, prediction_type="v_prediction", beta_end=0.01)
    assert load_scheduler(folder).config == DDPMScheduler(prediction_type="v_prediction", beta_end=0.01).config
    assert load_scheduler(folder, "epsilon").prediction_type == "epsilon"
    refused(folder, "flow", load=lambda folder: load_scheduler(folder, "flow"))


def test_a_prompt_embedding_that_does_not_fit_is_refused(folder):
    path = folder / "prompt_embedding.safetensors"
    assert load_prompt_embedding(folder) is None
    for tensors, word in (
        ({"prompt": torch.zeros(1, 6, 768)}, "missing tensors: prompt_embedding"),
        ({"prompt_embedding": torch.full((1, 6, 768), torch.nan)}, "not finite"),
        ({"prompt_embedding": torch.zeros(1, 6, 1024)}, "(1, 6, 1024)"),
        ({"prompt_embedding": torch.zeros(2, 6, 768)}, "(2, 6, 768)"),
        ({"prompt_embedding": torch.zeros(6, 768)}, "(6, 768)"),
    ):
        save_file(tensors, path)
        refused(folder, folder, word, load=CDiffSET.from_pretrained)


# ----------------------------------------------------------------------------------------------------------
# Saving


def small_cdiffset(family: str = "sd2") -> CDiffSET:
    """A C-DiffSET model with random weights."""
    unet, vae = deepcopy(small_unet(family, 5)), deepcopy(network(family, "vae"))
    return CDiffSET(vae, unet, torch.randn(1, 6, unet.config["cross_attention_dim"]), DDPMScheduler())


def assert_same(model: CDiffSET, other: CDiffSET) -> None:
    assert_equal(model.state_dict(), other.state_dict())
    assert model.scheduler.config == other.scheduler.config
    for name in ("vae", "unet"):
        assert json.dumps(getattr(model, name).config) == json.dumps(getattr(other, name).config)


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_a_saved_model_loads_bit_for_bit(tmp_path, family):
    model = small_cdiffset(family)
    model.save_pretrained(tmp_path / "new" / "model")
    assert_same(model, CDiffSET.from_pretrained(tmp_path / "new" / "model"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_model_is_saved_as_it_is(tmp_path, dtype):
    model = small_cdiffset().to(dtype)
    model.save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(weight_file(tmp_path, "unet")).values()} == {dtype}
    assert_same(model, CDiffSET.from_pretrained(tmp_path, dtype=dtype))
    assert_same(model.float(), CDiffSET.from_pretrained(tmp_path))


def test_settings_of_the_model_survive_saving(tmp_path):
    model = small_cdiffset()
    model.scheduler = DDPMScheduler(num_train_timesteps=500, beta_end=0.02, prediction_type="v_prediction")
    model.vae.config["scaling_factor"] = model.vae.scaling_factor = 0.5
    model.save_pretrained(tmp_path)
    loaded = CDiffSET.from_pretrained(tmp_path)
    assert loaded.scheduler.config == model.scheduler.config
    assert loaded.vae.scaling_factor == 0.5


def test_diffusers_opens_a_saved_folder_and_gives_the_same_numbers(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    model = small_cdiffset()
    model.save_pretrained(tmp_path)
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path, subfolder="vae")
    scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    x, image = torch.randn(2, 8, 6, 10), torch.rand(1, 3, 12, 20) * 2 - 1
    context = model.prompt_embedding
    with torch.no_grad():
        expected = unet(x, 321, context.expand(2, -1, -1)).sample
        assert (model.unet(x, 321, context) - expected).abs().max() <= 1e-4 * expected.std()
        expected = vae.encode(image).latent_dist.mean * vae.config.scaling_factor
        assert (model.encode(image) - expected).abs().max() <= 1e-4 * expected.std()
        expected = vae.decode(model.encode(image) / vae.config.scaling_factor).sample
        assert (model.decode(model.encode(image)) - expected).abs().max() <= 1e-4 * expected.std()
    assert torch.equal(scheduler.alphas_cumprod, model.scheduler.alphas_cumprod)
    scheduler.set_timesteps(50)
    assert scheduler.timesteps.tolist() == list(range(981, 0, -20))
    assert scheduler.final_alpha_cumprod == model.scheduler.alphas_cumprod[0]
    assert not scheduler.config.clip_sample and scheduler.config.prediction_type == "epsilon"


def test_channels_last_weights_are_saved_like_others(tmp_path):
    model = small_cdiffset()
    model.save_pretrained(tmp_path / "a")
    model.to(memory_format=torch.channels_last).save_pretrained(tmp_path / "b")
    for name in ("unet", "vae"):
        assert weight_file(tmp_path / "a", name).read_bytes() == weight_file(tmp_path / "b", name).read_bytes()


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_saved_files_have_the_permissions_that_the_umask_leaves(tmp_path, umask, mode):
    old = os.umask(umask)
    try:
        small_cdiffset().save_pretrained(tmp_path / "model")
    finally:
        os.umask(old)
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert len(files) == 7
    assert {path.stat().st_mode & 0o777 for path in files} == {mode}


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError("No space left on device")])
def test_an_interrupted_save_leaves_the_old_model(tmp_path, monkeypatch, interruption):
    model = small_cdiffset()
    model.save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def half_written(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise interruption

    monkeypatch.setattr(stored, "save_file", half_written)
    with torch.no_grad():
        model.unet.conv_in.weight.add_(1)
    with pytest.raises((KeyboardInterrupt, OSError)):
        model.save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_loaded_model_can_be_changed_and_saved_over_its_own_files(tmp_path):
    small_cdiffset().save_pretrained(tmp_path)
    model = CDiffSET.from_pretrained(tmp_path)
    with torch.no_grad():
        model.unet.conv_in.weight.add_(1)
    model.save_pretrained(tmp_path)
    assert_same(model, CDiffSET.from_pretrained(tmp_path))


def test_a_saved_base_model_has_no_more_files_than_it_needs(tmp_path):
    model = small_cdiffset()
    save_model(tmp_path, model.vae, model.unet, model.scheduler, model.prompt_embedding)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == {
        "model_index.json",
        "prompt_embedding.safetensors",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert read_json(tmp_path / "model_index.json")["unet"] == ["diffusers", "UNet2DConditionModel"]

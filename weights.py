"""Reads and writes whole models: no layer is defined here, only folders, configurations and tensors.

Two layouts hold a whole model: a diffusers folder (unet/, vae/, text_encoder/, scheduler/, each a config.json
and safetensors) and an original single file (`original.py`). Both become the same thing:

    path -> open_model -> {"unet": Part(source, config, tensors), "vae": ..., "text_encoder": ...} -> build -> network

The tensors are still on disk (`stored.py`), by diffusers' names, and a network is filled one tensor at a time:
peak memory is that of the model. Loading is strict: missing, unknown, misshapen and non-finite tensors raise
ValueError with the file and the first names.
"""

import hashlib
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from clip import CLIPTextModel
from common import read_json, some, write_json
from original import open_original
from scheduler import DDPMScheduler
from stored import Rule, Tensors, check_names, open_tensors, refuse_pickle, rename, save_tensors, strip
from unet import UNet
from vae import AutoencoderKL


class Part(NamedTuple):
    """One network, not loaded yet: where it comes from, its constructor's arguments, its tensors."""

    source: Path
    config: dict
    tensors: Tensors


# ----------------------------------------------------------------------------------------------------------
# Opening


def open_model(path: str | Path) -> dict[str, Part]:
    """The networks of a diffusers folder or an original single file: "unet", "vae" and, if there, "text_encoder".

    Raises ValueError if there is no model, or one that is not of the Stable Diffusion 1.x or 2.x family.
    """
    path = Path(path)
    if path.is_file():
        parts = {name: Part(path, *part) for name, part in open_original(path).items()}
    elif (path / "unet" / "config.json").is_file():
        parts = open_folder(path)
    else:
        problem = "holds no model (no unet/config.json)" if path.is_dir() else "does not exist"
        raise ValueError(f"{path} {problem}: give a diffusers folder or an original .safetensors file")
    parts["vae"] = parts["vae"]._replace(tensors=modern_vae(parts["vae"].tensors))
    return parts


def open_folder(path: Path) -> dict[str, Part]:
    """The networks of a diffusers folder, as `open_model`."""
    parts = {}
    for name, network in (("unet", UNet), ("vae", AutoencoderKL), ("text_encoder", CLIPTextModel)):
        folder = path / name
        if name != "text_encoder" or folder.is_dir():
            config = read_config(folder / "config.json", network)
            tensors = open_weights(folder, "model" if name == "text_encoder" else "diffusion_pytorch_model")
            if name == "text_encoder":
                tensors = {key: t for key, t in tensors.items() if not key.endswith("embeddings.position_ids")}
                tensors = rename(tensors, [(r"^text_model\.", "")])  # transformers 5 saves without the prefix
            parts[name] = Part(folder, config, tensors)
    return parts


def open_unet(path: str | Path, base: Part) -> Part:
    """A U-Net in a safetensors file of its own (a released checkpoint), with the configuration of `base`.

    Input and output channels are the file's; the prefixes `module.` and `unet.` are taken off.
    """
    path = Path(path)
    tensors = open_tensors(path)
    for prefix in ("module.", "unet."):
        if all(key.startswith(prefix) for key in tensors):
            tensors = strip(tensors, prefix)
    try:
        channels = {
            "in_channels": tensors["conv_in.weight"].shape[1],
            "out_channels": tensors["conv_out.weight"].shape[0],
        }
    except (KeyError, IndexError) as error:
        problem = "no conv_in.weight and conv_out.weight of convolutions"
        raise ValueError(f"{path}: not a U-Net with diffusers' names ({problem})") from error
    return Part(path, base.config | channels, tensors)


def open_weights(folder: Path, stem: str) -> Tensors:
    """The tensors of one diffusers subfolder: whole or sharded, full precision or, where that is absent, half."""
    for ending in ("safetensors", "safetensors.index.json", "fp16.safetensors", "safetensors.index.fp16.json"):
        path = folder / f"{stem}.{ending}"
        if path.is_file():
            return open_shards(path) if path.suffix == ".json" else open_tensors(path)
    for path in sorted(folder.glob("*")):
        refuse_pickle(path)
    raise ValueError(f"{folder}: no {stem}.safetensors in it; download the model again, with its safetensors files")


def open_shards(index: Path) -> Tensors:
    """The tensors of the files that an index names; they must be in its own folder and hold just what it says."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(
        isinstance(name, str) and name == Path(name).name for name in files.values()
    ):
        raise ValueError(f"{index}: weight_map must map tensor names to names of files in the same folder")
    tensors: Tensors = {}
    for name in sorted(set(files.values())):
        shard = open_tensors(index.parent / name)
        check_names(index.parent / name, expected={key for key in files if files[key] == name}, found=set(shard))
        tensors |= shard
    return tensors


OLD_ATTENTION_RULES: list[Rule] = [  # as published before diffusers renamed it
    (r"(attentions\.0)\.query\.", r"\1.to_q."),
    (r"(attentions\.0)\.key\.", r"\1.to_k."),
    (r"(attentions\.0)\.value\.", r"\1.to_v."),
    (r"(attentions\.0)\.proj_attn\.", r"\1.to_out.0."),
]


def modern_vae(tensors: Tensors) -> Tensors:
    """Old attention names to new ones; attention weights stored as 1x1 convolutions (C, C, 1, 1) to (C, C)."""
    tensors = rename(tensors, OLD_ATTENTION_RULES)
    for key, tensor in tensors.items():
        if ".attentions." in key and tensor.shape[2:] == (1, 1):
            tensors[key] = tensor._replace(shape=tensor.shape[:2])
    return tensors


# ----------------------------------------------------------------------------------------------------------
# Configurations

# Values under which the reference classes compute what ours compute. Any other value raises ValueError, and so
# does any key that is in neither this table nor our constructors, unless it is null, false or 0.
SUPPORTED = {
    UNet: {
        "flip_sin_to_cos": True, "freq_shift": 0, "act_fn": "silu", "downsample_padding": 1, "conv_in_kernel": 3,
        "mid_block_type": "UNetMidBlock2DCrossAttn", "mid_block_scale_factor": 1, "conv_out_kernel": 3,
        "transformer_layers_per_block": 1, "resnet_time_scale_shift": "default", "resnet_out_scale_factor": 1,
        "time_embedding_type": "positional", "attention_type": "default",
    },
    AutoencoderKL: {"act_fn": "silu", "use_quant_conv": True, "use_post_quant_conv": True},
}  # fmt: skip
IRRELEVANT = {  # keys that do not change what the network computes
    UNet: {"sample_size", "dropout", "upcast_attention", "addition_embed_type_num_heads"},
    AutoencoderKL: {"sample_size", "force_upcast", "down_block_types", "up_block_types"},
}


def read_config(path: Path, network: type[nn.Module]) -> dict:
    """The constructor arguments of `network` from a config.json. Raises ValueError on what we do not implement."""
    config = read_json(path)
    kinds = get_type_hints(network.__init__)
    arguments = {key: value for key, value in config.items() if key in signature(network).parameters}
    for key, value in arguments.items():
        if not is_a(value, kinds[key]):
            raise ValueError(f"{path}: {key} = {value!r} is of the wrong type, or no number above 0")
    if network is CLIPTextModel:  # a transformers config holds dozens of keys that say nothing about the network
        return arguments
    for key, value in config.items():
        if key in arguments or key in IRRELEVANT[network] or key.startswith("_"):
            continue
        accepted = (SUPPORTED[network][key],) if key in SUPPORTED[network] else (None, False)
        if value not in accepted:
            raise ValueError(f"{path}: {key} = {value!r} is not supported (only Stable Diffusion 1.x and 2.x networks)")
    return arguments


def is_a(value: Any, kind: Any) -> bool:
    """Whether a value from JSON is what an annotation such as `int | Sequence[int]` says, and numbers are above 0."""
    if get_origin(kind) is Sequence:
        return isinstance(value, list) and all(is_a(item, get_args(kind)[0]) for item in value)
    if get_args(kind):
        return any(is_a(value, alternative) for alternative in get_args(kind))
    if kind in (int, float) and type(value) in (int, float):
        return (kind is float or type(value) is int) and 0 < value < 2**63  # and no NaN
    return type(value) is kind


# ----------------------------------------------------------------------------------------------------------
# Loading


def build(network: type[nn.Module], part: Part, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The network with its weights, in evaluation mode, on the CPU.

    It is laid out on the meta device and filled from the file: no random initialisation, no second copy.
    Raises ValueError on a configuration or tensors that do not fit, and on non-finite values.
    """
    defaults = {key: p.default for key, p in signature(network).parameters.items()}
    config = defaults | part.config
    blocks = config.get("num_hidden_layers") or len(config["block_out_channels"]) * config["layers_per_block"]
    if blocks > len(part.tensors):  # a number in a file must not make us build millions of layers
        raise ValueError(f"{part.source}: the configuration has {blocks} blocks of layers, more than there are tensors")
    try:
        with torch.device("meta"):
            net = network(**part.config)
    except (TypeError, ValueError, ArithmeticError, LookupError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{part.source}: the configuration does not describe a network ({error})") from error
    shapes = {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}
    check_names(part.source, expected=set(shapes), found=set(part.tensors))
    found = {key: tensor.shape for key, tensor in part.tensors.items()}
    wrong = [f"{key} {found[key]}, not {shape}" for key, shape in shapes.items() if found[key] != shape]
    if wrong:
        raise ValueError(f"{part.source}: tensors of the wrong shape: {some(wrong)}")
    state = {key: tensor.load(dtype) for key, tensor in part.tensors.items()}
    net.load_state_dict(state, strict=True, assign=True)
    return net.eval()


def network_digest(network: AutoencoderKL | UNet) -> str:
    """What a network's output depends on: its layers, weights and (of a VAE) scaling factor, in hexadecimal."""
    digest = hashlib.sha256(repr(sorted(network.config.items())).encode())
    for name, tensor in network.state_dict().items():
        digest.update(name.encode() + tensor.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_scheduler(path: str | Path, prediction_type: str | None = None) -> DDPMScheduler:
    """The noise schedule of a model. A single file has none: SD's, predicting epsilon unless told otherwise.

    Raises ValueError on a schedule that we do not implement.
    """
    config = {"beta_schedule": "scaled_linear"}
    if Path(path).is_dir():
        path = Path(path) / "scheduler" / "scheduler_config.json"
        config = read_json(path)
    other = config.get("trained_betas") or config.get("rescale_betas_zero_snr")
    if other or config.get("beta_schedule") != "scaled_linear":
        raise ValueError(f"{path}: only Stable Diffusion's own schedule is supported (beta_schedule scaled_linear)")
    arguments = {key: config[key] for key in signature(DDPMScheduler).parameters if key in config}
    if prediction_type is not None:
        arguments["prediction_type"] = prediction_type
    try:
        return DDPMScheduler(**arguments)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{path}: {error}") from error


def load_prompt_embedding(path: str | Path) -> Tensor | None:
    """The stored embedding of the fixed prompt, (1, tokens, cross_attention_dim) float32; None if there is none."""
    file = Path(path) / "prompt_embedding.safetensors"
    if not file.is_file():
        return None
    tensors = open_tensors(file)
    check_names(file, expected={"prompt_embedding"}, found=set(tensors))
    return tensors["prompt_embedding"].load(torch.float32)


# ----------------------------------------------------------------------------------------------------------
# Saving


def save_model(
    folder: str | Path, vae: AutoencoderKL, unet: UNet, scheduler: DDPMScheduler, prompt_embedding: Tensor
) -> None:
    """Writes a diffusers folder with the prompt embedding in place of a text encoder.

    Every file is replaced atomically: a folder that is saved over by a model of the same shape stays loadable at any
    moment.
    """
    folder = Path(folder)
    levels = len(vae.config["block_out_channels"])
    block_types = {  # diffusers counts the VAE's levels by them
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    sampling = {"beta_schedule": "scaled_linear", "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}
    configs = {
        "vae/config.json": {"_class_name": "AutoencoderKL"} | vae.config | block_types,
        "unet/config.json": {"_class_name": "UNet2DConditionModel"} | unet.config,
        "scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler"} | scheduler.config | sampling,
    }
    for name, network in (("vae", vae), ("unet", unet)):
        save_tensors(folder / name / "diffusion_pytorch_model.safetensors", network.state_dict())
    save_tensors(folder / "prompt_embedding.safetensors", {"prompt_embedding": prompt_embedding})
    for name, config in configs.items():
        write_json(folder / name, config)
    index = {name.split("/")[0]: ["diffusers", config["_class_name"]] for name, config in configs.items()}
    write_json(folder / "model_index.json", {"_class_name": "CDiffSET"} | index)

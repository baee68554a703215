"""Reads and writes the public weight formats: no layer is defined here, only names, shapes and files.

Two layouts hold a whole model: a diffusers folder (unet/, vae/, text_encoder/, scheduler/, each a config.json
and safetensors) and an original single file (CompVis / Stability names). Both become the same thing:

    path -> open_model -> {"unet": (config, tensors), "vae": ..., "text_encoder": ...} -> build -> network

`tensors` maps diffusers' names to tensors that are still on disk, so renaming and checking names and shapes
costs nothing, and a network is filled one tensor at a time: peak memory is that of the model. Loading is
strict: missing, unknown, misshapen and non-finite tensors raise ValueError with the file and the first names.
"""

import json
import re
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from clip import CLIPTextModel
from files import atomic
from scheduler import DDPMScheduler
from unet import UNet
from vae import AutoencoderKL

PICKLES = {".ckpt", ".pt", ".pth", ".bin"}
CONVERT = "is a pickle, which can run code when loaded: convert it to safetensors first, or download the safetensors"


class Stored(NamedTuple):
    """A tensor on disk. rows: which rows of the stored one (None: all); shape: after selecting and reshaping."""

    file: Any  # an open safetensors file
    key: str
    shape: tuple[int, ...]
    rows: slice | None = None

    def load(self) -> Tensor:
        """Reads it, in the dtype it is stored in."""
        tensor = self.file.get_tensor(self.key) if self.rows is None else self.file.get_slice(self.key)[self.rows]
        return tensor.reshape(self.shape)


Tensors = dict[str, Stored]

# ----------------------------------------------------------------------------------------------------------
# Files


def open_tensors(path: Path) -> Tensors:
    """The tensors of one safetensors file, by their stored names. Raises ValueError if it cannot be read."""
    if path.suffix in PICKLES:
        raise ValueError(f"{path} {CONVERT}")
    try:
        file = safe_open(path, framework="pt")
        return {key: Stored(file, key, tuple(file.get_slice(key).get_shape())) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error}); download or copy it again") from error


def open_folder(folder: Path, stem: str) -> Tensors:
    """The tensors of one diffusers subfolder: whole or sharded, full precision or, where that is absent, half."""
    for name in (
        "{}.safetensors",
        "{}.safetensors.index.json",
        "{}.fp16.safetensors",
        "{}.safetensors.index.fp16.json",
    ):
        path = folder / name.format(stem)
        if path.is_file():
            return open_shards(path) if path.suffix == ".json" else open_tensors(path)
    for path in folder.glob("*"):
        if path.suffix in PICKLES:
            raise ValueError(f"{path} {CONVERT}")
    raise ValueError(f"{folder}: no {stem}.safetensors in it; download the model again, with its safetensors files")


def open_shards(index: Path) -> Tensors:
    """The tensors of the files that an index names; they must be in its own folder and hold just what it says."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(s, str) and s == Path(s).name for s in shards.values()):
        raise ValueError(f"{index}: weight_map must map tensor names to names of files in the same folder")
    tensors: Tensors = {}
    for shard in sorted(set(shards.values())):
        tensors |= open_tensors(index.parent / shard)
    check_names(index, expected=set(shards), found=set(tensors))
    return tensors


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises ValueError if it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return value


# ----------------------------------------------------------------------------------------------------------
# Names: from each layout to the names of today's diffusers files

VAE_RULES = [  # attention, as published before diffusers renamed it
    (r"(attentions\.0)\.query\.", r"\1.to_q."),
    (r"(attentions\.0)\.key\.", r"\1.to_k."),
    (r"(attentions\.0)\.value\.", r"\1.to_v."),
    (r"(attentions\.0)\.proj_attn\.", r"\1.to_out.0."),
]
SINGLE_VAE_RULES = [  # decoder levels are reversed in `from_single_file`
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.", r".up_blocks.\1.resnets."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.(q|k|v)\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
]
SINGLE_UNET_RULES = [  # two residual blocks a level, in every published file
    (r"^time_embed\.0\.", "time_embedding.linear_1."),
    (r"^time_embed\.2\.", "time_embedding.linear_2."),
    (r"^out\.0\.", "conv_norm_out."),
    (r"^out\.2\.", "conv_out."),
    (r"^input_blocks\.0\.0\.", "conv_in."),
    (r"^input_blocks\.(\d+)\.0\.op\.", lambda m: f"down_blocks.{(int(m[1]) - 1) // 3}.downsamplers.0.conv."),
    (r"^output_blocks\.(\d+)\.\d\.conv\.", lambda m: f"up_blocks.{int(m[1]) // 3}.upsamplers.0.conv."),
    (r"^input_blocks\.(\d+)\.0\.", lambda m: "down_blocks.{}.resnets.{}.".format(*divmod(int(m[1]) - 1, 3))),
    (r"^input_blocks\.(\d+)\.1\.", lambda m: "down_blocks.{}.attentions.{}.".format(*divmod(int(m[1]) - 1, 3))),
    (r"^output_blocks\.(\d+)\.0\.", lambda m: "up_blocks.{}.resnets.{}.".format(*divmod(int(m[1]), 3))),
    (r"^output_blocks\.(\d+)\.1\.", lambda m: "up_blocks.{}.attentions.{}.".format(*divmod(int(m[1]), 3))),
    (r"^middle_block\.0\.", "mid_block.resnets.0."),
    (r"^middle_block\.1\.", "mid_block.attentions.0."),
    (r"^middle_block\.2\.", "mid_block.resnets.1."),
    (r"\.in_layers\.0\.", ".norm1."),
    (r"\.in_layers\.2\.", ".conv1."),
    (r"\.emb_layers\.1\.", ".time_emb_proj."),
    (r"\.out_layers\.0\.", ".norm2."),
    (r"\.out_layers\.3\.", ".conv2."),
    (r"\.skip_connection\.", ".conv_shortcut."),
]
OPENCLIP_RULES = [
    (r"^transformer\.resblocks\.", "encoder.layers."),
    (r"\.ln_(1|2)\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"^token_embedding\.", "embeddings.token_embedding."),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^ln_final\.", "final_layer_norm."),
]
# ldm's schedule buffers and leftovers of training: the only tensors of a single file that are not ours
IGNORED = re.compile(
    r"(model_ema\..*"
    r"|betas|alphas_cumprod|alphas_cumprod_prev|sqrt_alphas_cumprod|sqrt_one_minus_alphas_cumprod"
    r"|log_one_minus_alphas_cumprod|sqrt_recip_alphas_cumprod|sqrt_recipm1_alphas_cumprod|posterior_variance"
    r"|posterior_log_variance_clipped|posterior_mean_coef1|posterior_mean_coef2|scale_factor"
    r"|cond_stage_model\.(.*\.)?(embeddings\.position_ids|logit_scale|text_projection))"
)


def rename(tensors: Tensors, rules: list) -> Tensors:
    """Applies every (pattern, replacement) to every name, in order."""
    renamed = {}
    for key, tensor in tensors.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = tensor
    return renamed


def strip(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors whose names start with `prefix`, without it."""
    return {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def modern_vae(tensors: Tensors) -> Tensors:
    """Old attention names to new ones; attention weights stored as 1x1 convolutions (C, C, 1, 1) to (C, C)."""
    tensors = rename(tensors, VAE_RULES)
    for key, tensor in tensors.items():
        if ".attentions." in key and tensor.shape[2:] == (1, 1):
            tensors[key] = tensor._replace(shape=tensor.shape[:2])
    return tensors


def modern_openclip(tensors: Tensors) -> Tensors:
    """OpenCLIP's text tower to transformers' names: q, k, v unstacked, and without the last block, unused by SD 2.x."""
    last = max(
        (int(m[1]) for m in (re.match(r"transformer\.resblocks\.(\d+)\.", key) for key in tensors) if m), default=0
    )
    renamed = {}
    for key, tensor in rename(tensors, OPENCLIP_RULES).items():
        stacked = re.fullmatch(r"(.*)\.in_proj_(weight|bias)", key)
        if key.startswith(f"encoder.layers.{last}."):
            continue
        if stacked:
            width = tensor.shape[0] // 3
            for i, name in enumerate("qkv"):
                part = tensor._replace(shape=(width, *tensor.shape[1:]), rows=slice(i * width, (i + 1) * width))
                renamed[f"{stacked[1]}.{name}_proj.{stacked[2]}"] = part
        else:
            renamed[key] = tensor
    return renamed


def from_single_file(path: Path) -> dict[str, Tensors]:
    """An original SD 1.x or 2.x file: {"unet", "vae", "text_encoder"} -> tensors by diffusers' names."""
    tensors = {key: tensor for key, tensor in open_tensors(path).items() if not IGNORED.fullmatch(key)}
    unet = rename(strip(tensors, "model.diffusion_model."), SINGLE_UNET_RULES)
    vae = rename(strip(tensors, "first_stage_model."), SINGLE_VAE_RULES)
    sd1 = strip(tensors, "cond_stage_model.transformer.text_model.")
    sd2 = strip(tensors, "cond_stage_model.model.")
    if not unet or not vae or len(unet) + len(vae) + len(sd1) + len(sd2) != len(tensors):
        known = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")
        unknown = [key for key in tensors if not key.startswith(known)]
        raise ValueError(
            f"{path}: not an original Stable Diffusion 1.x or 2.x file (unknown: {some(unknown or tensors)}); "
            "give a diffusers folder, or pass a U-Net on its own as --unet beside a --model"
        )
    levels = count(vae, "decoder.up_blocks")
    vae = {
        re.sub(r"^decoder\.up_blocks\.(\d+)", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}", key): tensor
        for key, tensor in vae.items()
    }
    return {"unet": unet, "vae": modern_vae(vae), "text_encoder": sd1 or modern_openclip(sd2)}


# ----------------------------------------------------------------------------------------------------------
# Configurations: read from config.json, or from the shapes where a single file has none

# Values under which the reference classes compute what ours compute. Any other value raises ValueError, and so
# does any key that is in neither this table nor our constructors, unless it is null or false.
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
    arguments = {key: value for key, value in config.items() if key in signature(network).parameters}
    if network is CLIPTextModel:  # a transformers config holds dozens of keys that say nothing about the network
        return arguments
    for key, value in config.items():
        if key in arguments or key in IRRELEVANT[network] or key.startswith("_") or value in (None, False):
            continue
        if SUPPORTED[network].get(key) != value:
            raise ValueError(f"{path}: {key} = {value!r} is not supported (only Stable Diffusion 1.x and 2.x networks)")
    return arguments


def count(tensors: Tensors, prefix: str) -> int:
    """How many numbered items `prefix.0`, `prefix.1`, ... the names hold."""
    return len({m[1] for m in (re.match(rf"{re.escape(prefix)}\.(\d+)\.", key) for key in tensors) if m})


def guess_configs(path: Path, parts: dict[str, Tensors]) -> dict[str, dict]:
    """The configurations of a single file's networks, by their shapes. SD 1.x or 2.x: by the cross-attention width."""
    unet, vae, text = parts["unet"], parts["vae"], parts["text_encoder"]
    try:
        levels = count(unet, "down_blocks")
        widths = [unet[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels)]
        attention = [count(unet, f"down_blocks.{i}.attentions") > 0 for i in range(levels)]
        context = unet["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape[1]
        if context not in (768, 1024):
            raise ValueError(f"{path}: cross-attention width {context}; expected 768 (SD 1.x) or 1024 (SD 2.x)")
        configs = {
            "unet": {
                "in_channels": unet["conv_in.weight"].shape[1],
                "out_channels": unet["conv_out.weight"].shape[0],
                "block_out_channels": widths,
                "attention_head_dim": 8 if context == 768 else [width // 64 for width in widths],
                "cross_attention_dim": context,
                "use_linear_projection": len(unet["mid_block.attentions.0.proj_in.weight"].shape) == 2,
                "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention],
                "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)],
            },
            "vae": {
                "latent_channels": vae["decoder.conv_in.weight"].shape[1],
                "block_out_channels": [
                    vae[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0]
                    for i in range(count(vae, "encoder.down_blocks"))
                ],
            },
        }
        if text:
            width = text["final_layer_norm.weight"].shape[0]
            configs["text_encoder"] = {
                "hidden_size": width,
                "intermediate_size": text["encoder.layers.0.mlp.fc1.weight"].shape[0],
                "num_hidden_layers": count(text, "encoder.layers"),
                "num_attention_heads": width // 64,
                "hidden_act": "quick_gelu" if context == 768 else "gelu",
                "vocab_size": text["embeddings.token_embedding.weight"].shape[0],
            }
    except (KeyError, IndexError) as error:
        raise ValueError(f"{path}: not an original Stable Diffusion file ({error} is missing)") from error
    return configs


# ----------------------------------------------------------------------------------------------------------
# Whole models


class Part(NamedTuple):
    """One network, not loaded yet: where it comes from, its constructor's arguments, its tensors."""

    source: Path
    config: dict
    tensors: Tensors


def open_model(path: str | Path) -> dict[str, Part]:
    """The networks of a diffusers folder or an original single file: "unet", "vae" and, if there, "text_encoder".

    Raises ValueError if there is no model, or one that is not of the Stable Diffusion 1.x or 2.x family.
    """
    path = Path(path)
    if path.is_file():
        tensors = from_single_file(path)
        return {name: Part(path, config, tensors[name]) for name, config in guess_configs(path, tensors).items()}
    if not (path / "unet" / "config.json").is_file():
        problem = "holds no model (no unet/config.json)" if path.is_dir() else "does not exist"
        raise ValueError(f"{path} {problem}: give a diffusers folder or an original .safetensors file")
    parts = {}
    for name, network in (("unet", UNet), ("vae", AutoencoderKL), ("text_encoder", CLIPTextModel)):
        folder = path / name
        if name != "text_encoder" or folder.is_dir():
            config = read_config(folder / "config.json", network)
            stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
            parts[name] = Part(folder, config, open_folder(folder, stem))
    parts["vae"] = parts["vae"]._replace(tensors=modern_vae(parts["vae"].tensors))
    if "text_encoder" in parts:
        tensors = {k: v for k, v in parts["text_encoder"].tensors.items() if not k.endswith("embeddings.position_ids")}
        tensors = strip(tensors, "text_model.") or tensors  # transformers 5 saves without the prefix
        parts["text_encoder"] = parts["text_encoder"]._replace(tensors=tensors)
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
    if not {"conv_in.weight", "conv_out.weight"} <= tensors.keys():
        raise ValueError(f"{path}: not a U-Net with diffusers' names (no conv_in.weight and conv_out.weight)")
    channels = {
        "in_channels": tensors["conv_in.weight"].shape[1],
        "out_channels": tensors["conv_out.weight"].shape[0],
    }
    return Part(path, base.config | channels, tensors)


def build(network: type[nn.Module], part: Part, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The network with its weights, in evaluation mode, on the CPU.

    It is laid out on the meta device and filled from the file: no random initialisation, no second copy.
    Raises ValueError on a configuration or tensors that do not fit, and on non-finite values.
    """
    try:
        with torch.device("meta"):
            net = network(**part.config)
    except (TypeError, ValueError, ArithmeticError, LookupError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{part.source}: the configuration does not describe a network ({error})") from error
    shapes = {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}
    check_names(part.source, expected=set(shapes), found=set(part.tensors))
    wrong = [f"{key} {part.tensors[key].shape}, not {shape}" for key, shape in shapes.items()
             if part.tensors[key].shape != shape]  # fmt: skip
    if wrong:
        raise ValueError(f"{part.source}: tensors of the wrong shape: {some(wrong)}")
    state = {}
    for key, stored in part.tensors.items():
        state[key] = stored.load().to(dtype)
        if not state[key].sum(dtype=torch.float32).isfinite():
            raise ValueError(f"{part.source}: {key} has values that are not finite; the file is damaged")
    net.load_state_dict(state, strict=True, assign=True)
    return net.eval()


def load_scheduler(path: str | Path, prediction_type: str | None = None) -> DDPMScheduler:
    """The noise schedule of a model. A single file has none: SD's, predicting epsilon unless told otherwise.

    Raises ValueError on a schedule that we do not implement.
    """
    config = {"beta_schedule": "scaled_linear"}
    if Path(path).is_dir():
        path = Path(path) / "scheduler" / "scheduler_config.json"
        config = read_json(path)
    if (
        config.get("beta_schedule") != "scaled_linear"
        or config.get("trained_betas")
        or config.get("rescale_betas_zero_snr")
    ):
        raise ValueError(f"{path}: only Stable Diffusion's own schedule is supported (beta_schedule scaled_linear)")
    arguments = {key: config[key] for key in signature(DDPMScheduler).parameters if key in config}
    if prediction_type is not None:
        arguments["prediction_type"] = prediction_type
    try:
        return DDPMScheduler(**arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: {error}") from error


def load_prompt_embedding(path: str | Path) -> Tensor | None:
    """The stored embedding of the fixed prompt, (1, tokens, cross_attention_dim) float32; None if there is none."""
    file = Path(path) / "prompt_embedding.safetensors"
    if not file.is_file():
        return None
    tensors = open_tensors(file)
    check_names(file, expected={"prompt_embedding"}, found=set(tensors))
    return tensors["prompt_embedding"].load().float()


def save_model(
    folder: str | Path, vae: AutoencoderKL, unet: UNet, scheduler: DDPMScheduler, prompt_embedding: Tensor
) -> None:
    """Writes a diffusers folder (layout 1) with the prompt embedding in place of a text encoder.

    Every file is replaced atomically: a folder that is saved over stays loadable at any moment.
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


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file atomically; makes the folder. Tensors may be on any device, in any memory format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, temporary, metadata)


def write_json(path: Path, value: dict) -> None:
    """Writes a JSON file atomically; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def check_names(source: Path, expected: set[str], found: set[str]) -> None:
    """Raises ValueError unless both are equal, naming the file and the first missing and unknown tensors."""
    problems = [
        f"{word} tensors: {some(names)}"
        for word, names in (("missing", sorted(expected - found)), ("unknown", sorted(found - expected)))
        if names
    ]
    if problems:
        raise ValueError(f"{source}: {'; '.join(problems)}")


def some(items) -> str:
    """The first three, and how many more there are."""
    items = list(items)
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")

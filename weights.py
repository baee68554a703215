"""Reads and writes models in the public formats: folders, configurations, tensors. No layer is defined here.

    path -> open_model -> {"unet": Part(source, config, tensors), "vae": ..., "text_encoder": ...} -> build -> network

A model is a diffusers folder (unet/, vae/, text_encoder/, each a config.json and safetensors; scheduler/) or an
original single file, which `original.py` translates. Opening reads the headers of the files. The tensors stay on disk
until `build` fills a network with them, one by one, so that the peak memory is that of the model. Loading is strict:
missing, unknown, misshapen and non-finite tensors raise ValueError with the file and the first names.
"""

import hashlib
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from clip import CLIPTextModel
from common import atomic, read_json, require_file, some, write_json
from original import convert_single_file, convert_text_encoder, convert_vae, strip
from scheduler import DDPMScheduler
from unet import UNet
from vae import AutoencoderKL

# ----------------------------------------------------------------------------------------------------------
# Tensors on disk

PICKLES = {".ckpt", ".pt", ".pth", ".bin"}
CONVERTED_MAX = 2**28  # bytes


class File:
    """An open safetensors file, mapped into memory, where every page that was read counts as memory in use.

    After each CONVERTED_MAX bytes that were read only to be converted, it is mapped anew, which frees those pages.
    """

    def __init__(self, path: Path):
        self.path, self.inode = path, path.stat().st_ino
        self.open()

    def open(self) -> None:
        """Maps the file without reading it. Raises OSError if another file has taken its place."""
        self.safetensors, self.converted = safe_open(self.path, framework="pt"), 0
        if self.path.stat().st_ino != self.inode:
            raise OSError("it was replaced in the meantime: load it again")

    def read(self, key: str, rows: slice | None, dtype: torch.dtype) -> Tensor:
        """A tensor, or some rows of it, in the mapped memory. dtype: what the caller will convert it to."""
        if self.converted > CONVERTED_MAX:
            self.open()
        tensor = self.safetensors.get_tensor(key) if rows is None else self.safetensors.get_slice(key)[rows]
        self.converted += tensor.nbytes if tensor.dtype != dtype else 0
        return tensor


class Stored(NamedTuple):
    """A tensor on disk. rows: those that are taken (None: all); shape: after taking them and reshaping."""

    file: File
    key: str
    shape: tuple[int, ...]
    rows: slice | None = None

    def load(self, dtype: torch.dtype) -> Tensor:
        """The tensor as `dtype`. Raises ValueError if it is unreadable, or if its values are not finite real numbers.

        Without conversion it is not copied but lives in the mapped file; writing to it does not change the file.
        """
        name = f"{self.file.path}: {self.key}"
        try:
            tensor = self.file.read(self.key, self.rows, dtype).reshape(self.shape)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{name} cannot be read ({error})") from error
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}: weights are floating-point numbers")
        tensor = tensor.to(dtype)
        if not tensor.sum(dtype=torch.float32).isfinite():
            raise ValueError(f"{name} has values that are not finite in {dtype}; is the file damaged?")
        return tensor


def open_tensors(path: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file, by their names. Raises ValueError if it cannot be read."""
    if path.suffix.lower() in PICKLES:
        problem = "is a pickle, which can run code when loaded"
        raise ValueError(f"{path} {problem}: convert it to safetensors first, or download the safetensors")
    require_file(path)
    try:
        file = File(path)
        names = file.safetensors.keys()
        return {key: Stored(file, key, tuple(file.safetensors.get_slice(key).get_shape())) for key in names}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error}); download or copy it again") from error


def check_names(source: Path, expected: set[str], found: set[str]) -> None:
    """Raises ValueError, with the first missing and unknown names, unless both sets are equal."""
    names = {"missing": sorted(expected - found), "unknown": sorted(found - expected)}
    if expected != found:
        problems = [f"{problem} tensors: {some(keys)}" for problem, keys in names.items() if keys]
        raise ValueError(f"{source}: {'; '.join(problems)}")


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file atomically; makes the folder. Tensors may be on any device, in any memory format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        try:
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, temporary, metadata)
        except SafetensorError as error:  # a full disk, for example
            raise OSError(f"{path}: cannot be written ({error})") from error


# ----------------------------------------------------------------------------------------------------------
# Opening a model


class Part(NamedTuple):
    """One network that is not loaded yet: the file or folder it is in, its constructor's arguments, its tensors."""

    source: Path
    config: dict
    tensors: dict[str, Stored]


def open_model(path: str | Path) -> dict[str, Part]:
    """The networks of a diffusers folder or an original single file: "unet", "vae" and, if there, "text_encoder".

    Raises ValueError if there is no model, or one that is not of the Stable Diffusion 1.x or 2.x family.
    """
    path = Path(path)
    if path.is_file():
        return {name: Part(path, *part) for name, part in convert_single_file(path, open_tensors(path)).items()}
    if not (path / "unet" / "config.json").is_file():
        problem = "holds no model (no unet/config.json)" if path.is_dir() else "does not exist"
        raise ValueError(f"{path} {problem}: give a diffusers folder or an original .safetensors file")
    parts = {
        "unet": open_part(path / "unet", UNet, "diffusion_pytorch_model"),
        "vae": open_part(path / "vae", AutoencoderKL, "diffusion_pytorch_model"),
    }
    parts["vae"] = parts["vae"]._replace(tensors=convert_vae(parts["vae"].tensors))
    if (path / "text_encoder").is_dir():
        text = open_part(path / "text_encoder", CLIPTextModel, "model")
        parts["text_encoder"] = text._replace(tensors=convert_text_encoder(text.tensors))
    return parts


def open_part(folder: Path, network: type[nn.Module], stem: str) -> Part:
    """A network's folder: its config.json and its tensors, in one file or in shards; fp16 if there is nothing else."""
    config = read_config(folder / "config.json", network)
    for name in (stem, f"{stem}.fp16"):
        files = [*folder.glob(f"{name}.safetensors")] or sorted(folder.glob(f"{name}-*-of-*.safetensors"))
        tensors: dict[str, Stored] = {}
        for file in files:
            shard = open_tensors(file)
            if twice := tensors.keys() & shard.keys():
                raise ValueError(f"{file}: holds tensors that another shard holds, too: {some(sorted(twice))}")
            tensors |= shard
        if files:
            return Part(folder, config, tensors)
    problem = f"no {stem}.safetensors in it (pickles such as .bin are not read: they can run code)"
    raise ValueError(f"{folder}: {problem}; download the model again, with its safetensors files")


def open_unet(path: str | Path, base: Part) -> Part:
    """A U-Net in a safetensors file of its own (a released checkpoint), with the configuration of `base`.

    The file decides the numbers of input and output channels. Prefixes `module.` and `unet.` are removed.
    """
    path = Path(path)
    tensors = open_tensors(path)
    for prefix in ("module.", "unet."):
        if all(key.startswith(prefix) for key in tensors):
            tensors = strip(tensors, prefix)
    try:
        inputs, outputs = tensors["conv_in.weight"].shape[1], tensors["conv_out.weight"].shape[0]
    except (KeyError, IndexError) as error:
        problem = "no conv_in.weight and conv_out.weight of convolutions"
        raise ValueError(f"{path}: not a U-Net with diffusers' names ({problem})") from error
    return Part(path, base.config | {"in_channels": inputs, "out_channels": outputs}, tensors)


# ----------------------------------------------------------------------------------------------------------
# Configurations

# Values with which the reference classes compute what ours compute. Any other value raises ValueError, and so does
# any key that is neither here nor an argument of our constructors, unless its value is null, false or 0.
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
            raise ValueError(f"{path}: {key} = {value!r} is of the wrong type, or not a number above 0")
    if network is CLIPTextModel:  # a transformers config holds dozens of keys that say nothing about the network
        if "num_attention_heads" not in config:  # shapes do not show it, and transformers' default is not ours
            raise ValueError(f"{path}: num_attention_heads is missing; download the model again")
        return arguments
    for key, value in config.items():
        if key in arguments or key in IRRELEVANT[network] or key.startswith("_"):
            continue
        accepted = (SUPPORTED[network][key],) if key in SUPPORTED[network] else (None, False)
        if value not in accepted:
            raise ValueError(f"{path}: {key} = {value!r} is not supported (only Stable Diffusion 1.x and 2.x networks)")
    return arguments


def is_a(value: Any, kind: Any) -> bool:
    """Whether a value from JSON has the annotated type, such as `int | Sequence[int]`. Numbers must be above 0."""
    if get_origin(kind) is Sequence:
        return isinstance(value, list) and all(is_a(item, get_args(kind)[0]) for item in value)
    if get_args(kind):
        return any(is_a(value, alternative) for alternative in get_args(kind))
    if kind in (int, float) and type(value) in (int, float):
        return (kind is float or type(value) is int) and 0 < value < 2**63  # and no NaN
    return type(value) is kind


def read_schedule(path: str | Path) -> tuple[Path, dict]:
    """The file that gives a model's noise schedule, and its settings.

    A single file has Stable Diffusion's schedule, and does not say what its U-Net predicts.
    """
    path = Path(path)
    if path.is_file():
        settings = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012}
        return path, settings | {"beta_schedule": "scaled_linear"}
    path = path / "scheduler" / "scheduler_config.json"
    return path, read_json(path)


def list_assumptions(
    path: str | Path, vae: Part, unet: str | Path | None = None, prediction_type: str | None = None
) -> list[str]:
    """One line for each value that a model's files do not give, and that is taken to be Stable Diffusion's.

    unet: the separate file, if any, that replaces the model's U-Net. prediction_type: what the user says, if anything.
    Raises ValueError if the VAE's scale is not given, and its latents are not those of Stable Diffusion.
    """
    lines = []
    if "scaling_factor" not in vae.config:
        config = defaults(AutoencoderKL) | vae.config
        if config["latent_channels"] != 4 or len(config["block_out_channels"]) != 4:
            problem = "scaling_factor is missing, and the VAE is not Stable Diffusion's (4 channels, factor 8)"
            raise ValueError(f"{vae.source}: {problem}; add it to vae/config.json")
        lines.append(f"{vae.source}: the VAE's scaling_factor is missing; assumed {config['scaling_factor']}")
    source, settings = read_schedule(path)
    if prediction_type is None and (unet or "prediction_type" not in settings):
        problem = f"does not say what the U-Net predicts; assumed {settings.get('prediction_type', 'epsilon')}"
        hint = "--prediction-type overrules it; SD 2.x models for 768 pixels predict v_prediction"
        lines.append(f"{unet or source}: {problem} ({hint})")
    return lines


def defaults(constructor: type) -> dict:
    """The default values of a constructor's arguments."""
    return {key: parameter.default for key, parameter in signature(constructor).parameters.items()}


# ----------------------------------------------------------------------------------------------------------
# Loading


def build(network: type[nn.Module], part: Part, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The network with its weights, in evaluation mode, on the CPU.

    It is constructed on the meta device and then filled from the file: no random initialisation, no second copy.
    Raises ValueError on a configuration or tensors that do not fit, and on non-finite values.
    """
    config = defaults(network) | part.config
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


def load_scheduler(path: str | Path, prediction_type: str | None = None) -> DDPMScheduler:
    """The noise schedule of a model. prediction_type replaces what the model says; without either, it is epsilon.

    Raises ValueError on a schedule that we do not implement.
    """
    path, settings = read_schedule(path)
    other = settings.get("trained_betas") or settings.get("rescale_betas_zero_snr")
    if other or settings.get("beta_schedule") != "scaled_linear":
        raise ValueError(f"{path}: only Stable Diffusion's own schedule is supported (beta_schedule scaled_linear)")
    settings["prediction_type"] = prediction_type or settings.get("prediction_type", "epsilon")
    try:
        return DDPMScheduler(**{key: settings[key] for key in defaults(DDPMScheduler)})
    except KeyError as error:  # diffusers' defaults are not Stable Diffusion's values
        raise ValueError(f"{path}: {error} is missing; download the model again") from error
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


def load_trained_on(path: str | Path) -> dict:
    """How the training data was read, {"sar": kind, "stretch": (low, high) or None, "eo": kind}; {} if unknown."""
    file = Path(path) / "model_index.json"
    match read_json(file).get("_trained_on", {}) if file.is_file() else {}:
        case {"sar": str(sar), "stretch": None, "eo": str(eo)}:
            return {"sar": sar, "stretch": None, "eo": eo}
        case {"sar": str(sar), "stretch": [int() | float() as low, int() | float() as high], "eo": str(eo)}:
            return {"sar": sar, "stretch": (low, high), "eo": eo}
        case {**others} if not others:
            return {}
    raise ValueError(f"{file}: _trained_on is not what train.py writes; remove it to have images read by looking")


def network_digest(network: AutoencoderKL | UNet) -> str:
    """SHA-256, in hexadecimal, of what a network's output depends on: its configuration and its weights."""
    digest = hashlib.sha256(repr(sorted(network.config.items())).encode())
    for name, tensor in network.state_dict().items():
        digest.update(name.encode() + tensor.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------
# Saving


def save_model(
    folder: str | Path,
    vae: AutoencoderKL,
    unet: UNet,
    scheduler: DDPMScheduler,
    prompt_embedding: Tensor,
    trained_on: dict | None = None,
) -> None:
    """Writes a diffusers folder with the prompt embedding in place of a text encoder.

    trained_on: JSON values that describe the training data, for `load_trained_on`. Every file is replaced atomically:
    while a model is saved over one of the same shape, the folder stays loadable.
    """
    folder = Path(folder)
    levels = len(vae.config["block_out_channels"])
    block_types = {  # from which diffusers gets the number of the VAE's levels
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
    index |= {"_trained_on": trained_on} if trained_on else {}
    write_json(folder / "model_index.json", {"_class_name": "CDiffSET"} | index)

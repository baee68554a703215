"""Records what diffusers and transformers compute on small random networks, and torchmetrics of images, for tests
without them.

    python tests/record_golden.py        writes tests/golden/*.safetensors (a few 100 KB)

Each file holds inputs and outputs of one case; the weights are not stored but made again, by `fill`, from
numpy's RandomState, whose stream is frozen. The tests import the cases and the recipe from here and put our
networks in the references' place: against the files always, against the live references where installed.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().with_name("golden")

# ----------------------------------------------------------------------------------------------------------
# Cases: constructor arguments in the words of the published config files, and input shapes

DOWN, UP = ("DownBlock2D",), ("UpBlock2D",)  # and with attention:
CROSS_DOWN, CROSS_UP = ("CrossAttnDownBlock2D",), ("CrossAttnUpBlock2D",)
SD_BLOCKS = {"down_block_types": CROSS_DOWN * 3 + DOWN, "up_block_types": UP + CROSS_UP * 3}

# name: (config, shape of x, timesteps, shape of the context)
UNETS = {
    # convolutional projections, one number of heads for all levels, scalar timestep
    "unet_sd1": (
        {
            "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32, 48, 48), "layers_per_block": 2,
            "attention_head_dim": 4, "cross_attention_dim": 24, "use_linear_projection": False, "norm_num_groups": 8,
            **SD_BLOCKS,
        },
        (2, 4, 16, 24), 801, (2, 7, 24),
    ),
    # C-DiffSET on SD 2.x: linear projections, heads by level, 8 inputs, 5 outputs, one context for the batch
    "unet_sd2_cdiffset": (
        {
            "in_channels": 8, "out_channels": 5, "block_out_channels": (16, 32, 64, 64), "layers_per_block": 2,
            "attention_head_dim": (1, 2, 4, 8), "cross_attention_dim": 40, "use_linear_projection": True,
            "norm_num_groups": 8, **SD_BLOCKS,
        },
        (3, 8, 24, 16), (981, 0, 317), (1, 6, 40),
    ),
    # the kind of small model that is trained here
    "unet_three_levels": (
        {
            "in_channels": 8, "out_channels": 4, "block_out_channels": (16, 32, 32), "layers_per_block": 1,
            "attention_head_dim": (2, 2, 4), "cross_attention_dim": 16, "use_linear_projection": True,
            "down_block_types": DOWN + CROSS_DOWN * 2, "up_block_types": CROSS_UP * 2 + UP, "norm_num_groups": 4,
        },
        (2, 8, 4, 12), (500, 1), (2, 5, 16),
    ),
    "unet_two_levels": (
        {
            "in_channels": 4, "out_channels": 5, "block_out_channels": (16, 48), "layers_per_block": 3,
            "attention_head_dim": 2, "cross_attention_dim": 24, "use_linear_projection": False,
            "down_block_types": CROSS_DOWN + DOWN, "up_block_types": UP + CROSS_UP, "norm_num_groups": 8,
            "norm_eps": 1e-4,
        },
        (1, 4, 6, 10), (999,), (1, 3, 24),
    ),
}  # fmt: skip

# name: (config, shape of the image, shape of the latent)
VAES = {
    "vae_sd": ({"block_out_channels": (16, 32, 32, 48), "norm_num_groups": 8}, (2, 3, 32, 48), (2, 4, 4, 3)),
    "vae_two_levels": (
        {
            "in_channels": 1, "out_channels": 2, "latent_channels": 3, "block_out_channels": (16, 24),
            "layers_per_block": 1, "norm_num_groups": 4,
        },
        (1, 1, 14, 20), (2, 3, 5, 8),
    ),
    "vae_three_levels_without_attention": (
        {
            "block_out_channels": (16, 16, 32), "layers_per_block": 1, "norm_num_groups": 4,
            "mid_block_add_attention": False,
        },
        (2, 3, 16, 24), (1, 4, 6, 4),
    ),
}  # fmt: skip

# name: (config, shape of the token ids)
CLIPS = {
    "clip_sd1": (
        {
            "vocab_size": 100, "max_position_embeddings": 12, "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 3, "num_attention_heads": 4, "hidden_act": "quick_gelu",
        },
        (2, 6),
    ),
    "clip_sd2": (
        {
            "vocab_size": 60, "max_position_embeddings": 16, "hidden_size": 48, "intermediate_size": 192,
            "num_hidden_layers": 4, "num_attention_heads": 2, "hidden_act": "gelu",
        },
        (3, 16),
    ),
}  # fmt: skip

NETWORKS = {**UNETS, **VAES, **CLIPS}

# ----------------------------------------------------------------------------------------------------------
# Recipe


def normal(rng: np.random.RandomState, *shape: int) -> Tensor:
    """Standard normal float32 numbers."""
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))


@torch.no_grad()
def fill(model: nn.Module, seed: int) -> nn.Module:
    """Gives every tensor random values under which activations stay near 1 and every branch contributes."""
    rng = np.random.RandomState(seed)
    for name, tensor in sorted(model.state_dict().items()):
        value = normal(rng, *tensor.shape)
        if name.endswith("bias"):
            value *= 0.3
        elif tensor.ndim == 1:  # the scale of a norm
            value = 1 + 0.3 * value
        elif not name.endswith("_embedding.weight"):  # token and position tables stay at 1
            gain = 2.0 if ".attn1." in name or "to_q" in name or "q_proj" in name else 1.2
            value *= gain / tensor[0].numel() ** 0.5
        tensor.copy_(value)
    return model.eval()


def inputs(name: str, seed: int) -> dict[str, Tensor]:
    """The input tensors of a network's case."""
    rng = np.random.RandomState(seed + 1000)
    if name in UNETS:
        _, x, t, context = UNETS[name]
        return {"x": normal(rng, *x), "t": torch.tensor(t), "context": normal(rng, *context)}
    if name in VAES:
        _, image, latent = VAES[name]
        return {"image": normal(rng, *image).clamp(-1, 1), "latent": normal(rng, *latent)}
    config, shape = CLIPS[name]
    return {"ids": torch.from_numpy(rng.randint(0, config["vocab_size"], shape).astype(np.int64))}


def norms(model: nn.Module) -> Tensor:
    """(eps, groups) of every norm, in order of name: constants that outputs near 1 hardly depend on."""
    modules = [m for _, m in sorted(model.named_modules()) if isinstance(m, nn.GroupNorm | nn.LayerNorm)]
    return torch.tensor([[m.eps, getattr(m, "num_groups", 0)] for m in modules], dtype=torch.float64)


# ----------------------------------------------------------------------------------------------------------
# References


def reference(kind: str, **config) -> nn.Module:
    """diffusers' U-Net ("unet") or VAE ("vae"), or transformers' text tower ("clip"), of that configuration."""
    if kind == "unet":
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel(**config)
    if kind == "vae":
        from diffusers import AutoencoderKL

        levels = len(config["block_out_channels"])
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
        # two layers as in all published files; diffusers' own default is 1
        return AutoencoderKL(**blocks | {"layers_per_block": 2} | config)
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**config, bos_token_id=0, eos_token_id=1))


def reference_of_case(name: str) -> nn.Module:
    return reference(name.split("_")[0], **NETWORKS[name][0])


@torch.no_grad()
def reference_outputs(name: str, model: nn.Module, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the reference makes of the inputs of a case."""
    if name in UNETS:
        context = x["context"].expand(len(x["x"]), -1, -1)  # diffusers wants one for each sample
        return {"y": model(x["x"], x["t"], context).sample}
    if name in VAES:
        posterior = model.encode(x["image"]).latent_dist
        return {"mean": posterior.mean, "logvar": posterior.logvar, "decoded": model.decode(x["latent"]).sample}
    return {"y": model(x["ids"]).last_hidden_state}


def reference_ddpm(prediction_type: str):
    from diffusers import DDPMScheduler

    return DDPMScheduler(prediction_type=prediction_type, variance_type="fixed_small", **SD_SCHEDULE)


def reference_ddim(steps: int, spacing: str, prediction_type: str):
    from diffusers import DDIMScheduler

    sampling = {"timestep_spacing": spacing, "steps_offset": 1, "set_alpha_to_one": False}
    scheduler = DDIMScheduler(prediction_type=prediction_type, **sampling, **SD_SCHEDULE)
    scheduler.set_timesteps(steps)
    return scheduler


# ----------------------------------------------------------------------------------------------------------
# Schedulers: the same calls for ours and the references

SD_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing")
CHAINS = {
    f"ddim_{prediction}_{spacing}_{steps}_eta_{eta}": (steps, spacing, prediction, eta)
    for prediction in PREDICTIONS
    for spacing in SPACINGS
    for steps, eta in ((50, 0.0), (50, 0.7), (4, 0.0), (1, 0.0))
}


def toy_model(x: Tensor, t: Tensor | int) -> Tensor:
    """Stands for the U-Net: smooth, bounded, dependent on both arguments."""
    return 0.8 * torch.sin(x + int(t) / 100)


def generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def latents(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """x_0, noise (4, 4, 6, 5) and timesteps (4,)."""
    rng = np.random.RandomState(seed)
    return normal(rng, 4, 4, 6, 5), normal(rng, 4, 4, 6, 5), torch.tensor([0, 1, 500, 999])


def ddpm_results(make_ddpm, seed: int) -> dict[str, Tensor]:
    """Everything that training needs, and posterior steps with each prediction type."""
    x, noise, t = latents(seed)
    scheduler = make_ddpm("v_prediction")
    velocity = getattr(scheduler, "get_velocity", None) or scheduler.target  # theirs or ours
    results = {
        "alphas_cumprod": scheduler.alphas_cumprod,
        "timesteps": scheduler.timesteps,
        "add_noise": scheduler.add_noise(x, noise, t),
        "velocity": velocity(x, noise, t),
    }
    for prediction in PREDICTIONS:
        scheduler = make_ddpm(prediction)
        for i in (999, 500, 1, 0):
            x_prev = scheduler.step(noise, i, x, generator=generator(i))
            results[f"step_{prediction}_{i}"] = getattr(x_prev, "prev_sample", x_prev)
    return results


def ddim_chain(scheduler, x: Tensor, eta: float = 0.0) -> Tensor:
    """Samples from pure noise with the toy model."""
    source = generator(7)
    for t in scheduler.timesteps:
        x = scheduler.step(toy_model(x, t), int(t), x, eta=eta, generator=source)
        x = getattr(x, "prev_sample", x)
    return x


def scheduler_results(make_ddpm, make_ddim, seed: int) -> dict[str, Tensor]:
    results = {f"ddpm_{key}": value for key, value in ddpm_results(make_ddpm, seed).items()}
    for key, (steps, spacing, prediction, eta) in CHAINS.items():
        results[key] = ddim_chain(make_ddim(steps, spacing, prediction), latents(seed)[1], eta)
    return results


# ----------------------------------------------------------------------------------------------------------
# Metrics


def metric_images(height: int = 40, width: int = 33) -> tuple[Tensor, Tensor]:
    """Smooth pictures with noise that grows and a saturated corner, and their truths, (3, 3, H, W) in [0, 1].

    By formula, so that the recorded numbers stay true. Rounded to 8 bits, as pictures are.
    """
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    phase = torch.arange(9.0).reshape(3, 3, 1, 1)
    truth = 0.5 + 0.4 * torch.sin(6 * x + 9 * y * y + phase) + (x + y > 1.6)
    strength = torch.tensor([0.02, 0.1, 0.3]).reshape(3, 1, 1, 1)
    image = truth + strength * torch.cos(91 * x * y + 53 * x + 7 * phase)
    image, truth = ((255 * picture.clamp(0, 1)).round() / 255 for picture in (image, truth))
    return image, truth


def reference_metrics(image: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """torchmetrics' PSNR, SSIM and SCC, each (B,), of one image at a time."""
    from torchmetrics.functional import image as reference

    pairs = list(zip(image.split(1), truth.split(1)))
    return {
        "psnr": torch.stack([reference.peak_signal_noise_ratio(*pair, data_range=1.0) for pair in pairs]),
        "ssim": torch.stack([reference.structural_similarity_index_measure(*pair, data_range=1.0) for pair in pairs]),
        "scc": torch.stack([reference.spatial_correlation_coefficient(*pair) for pair in pairs]),
    }


# ----------------------------------------------------------------------------------------------------------


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for name in NETWORKS:
        model = fill(reference_of_case(name), seed=0)
        x = inputs(name, seed=0)
        save(name, {**x, **reference_outputs(name, model, x), "norms": norms(model)})
    save("schedulers", scheduler_results(reference_ddpm, reference_ddim, seed=0))
    save("metrics", reference_metrics(*metric_images()))


def save(name: str, tensors: dict[str, Tensor]) -> None:
    path = GOLDEN / f"{name}.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()

"""C-DiffSET: SAR-to-optical (EO) translation with a fine-tuned latent diffusion model. The whole method.

Do, Lee and Kim, "C-DiffSET: Leveraging Latent Diffusion for SAR-to-EO Image Translation with Confidence-Guided
Reliable Object Generation", arXiv 2411.10788; IEEE TCSVT 2026.

    SAR image -> VAE encoder -> z_sar --+
                                        +-> U-Net -> predicted noise (4 channels), raw variance (1 channel)
    noise or noisy EO latent -> z_t ----+

1. SAR and EO images share the frozen VAE of Stable Diffusion: `CDiffSET.encode`, `CDiffSET.decode`.
2. The pretrained U-Net gets 8 input channels and a fifth output channel: `widen_input`, `add_variance_channel`.
3. Training adds noise to the EO latent, z_t = sqrt(a) z_eo + sqrt(1 - a) noise with a = alphas_cumprod[t]. The U-Net
   predicts the noise and, at each latent pixel, the variance of its own error (`denoise`, `variance`). The loss counts
   errors less where the variance is large, so objects that only one of the two images shows disturb the training
   less (`cdiff_loss`).
4. Translation starts from pure noise and denoises it with DDIM, given the SAR latent. The confidence is 1 / variance
   at the middle step: `CDiffSET.translate`.

    >>> model = CDiffSET.from_pretrained("models/tiny")
    >>> eo, confidence = model.translate(sar)      # sar (B, 3, H, W) in [-1, 1]
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weights
from clip import CLIPTextModel
from scheduler import DDIMScheduler, DDPMScheduler
from unet import UNet
from vae import AutoencoderKL

__version__ = "0.1.0"  # sample.py writes it into its results

# The fixed prompt, "electro-optical image", tokenised without padding: start, electro, -, optical, image, end
PROMPT_IDS = (49406, 23244, 268, 16822, 2867, 49407)

VARIANCE_MIN, VARIANCE_MAX = 1e-6, 10.0
VARIANCE_SHIFT = math.log(math.expm1(1.0 - VARIANCE_MIN))  # softplus of this is 1 - 1e-6

# ----------------------------------------------------------------------------------------------------------
# The loss


def variance(raw: Tensor) -> Tensor:
    """Raw fifth channel -> variance in [1e-6, 10], same shape: clamp(softplus(raw + c) + 1e-6, 1e-6, 10).

    A raw value of 0 gives variance 1, so training starts from the plain L2 objective. Source: the released code.
    """
    return (F.softplus(raw + VARIANCE_SHIFT) + VARIANCE_MIN).clamp(VARIANCE_MIN, VARIANCE_MAX)


def cdiff_loss(prediction: Tensor, raw_variance: Tensor, target: Tensor, alphas_cumprod_t: Tensor) -> Tensor:
    """The confidence-guided loss: a beta-NLL (Seitzer et al., ICLR 2022) with beta = sqrt(alphas_cumprod[t]).

    prediction, target (B, 4, h, w); raw_variance (B, 1, h, w); alphas_cumprod_t (B,) -> scalar.

        nll = ((target - prediction)^2 / var + log(var) + log(2 pi)) / 2
        loss = mean(stopgrad(var)^beta * nll)

    At little noise beta is near 1, and the weight cancels 1/var: the prediction's gradient is that of L2. At much
    noise beta is near 0, and the loss is the full likelihood: errors cost less where the network expects them.
    """
    var = variance(raw_variance)
    nll = 0.5 * ((target - prediction) ** 2 / var + var.log() + math.log(2 * math.pi))
    beta = alphas_cumprod_t.sqrt()[:, None, None, None]
    return (var.detach() ** beta * nll).mean()


# ----------------------------------------------------------------------------------------------------------
# The network: channel surgery, conditioning


def widen_input(unet: UNet) -> None:
    """Doubles the input channels in place, for SAR latent and noisy latent: halves conv_in's weights, repeats them."""
    old = unet.conv_in
    unet.conv_in = nn.Conv2d(2 * old.in_channels, old.out_channels, 3, padding=1, device="meta")
    unet.conv_in.weight = nn.Parameter(old.weight.detach().repeat(1, 2, 1, 1) * 0.5)
    unet.conv_in.bias = old.bias
    unet.config["in_channels"] = unet.conv_in.in_channels


def add_variance_channel(unet: UNet) -> None:
    """Adds an output channel in place, the raw variance, with zero weights and bias."""
    old = unet.conv_out
    unet.conv_out = nn.Conv2d(old.in_channels, old.out_channels + 1, 3, padding=1, device="meta")
    unet.conv_out.weight = nn.Parameter(torch.cat([old.weight.detach(), torch.zeros_like(old.weight[:1])]))
    unet.conv_out.bias = nn.Parameter(torch.cat([old.bias.detach(), torch.zeros_like(old.bias[:1])]))
    unet.config["out_channels"] = unet.conv_out.out_channels


def denoise(
    unet: Callable[..., Tensor], z_sar: Tensor, z_t: Tensor, t: Tensor | int, context: Tensor
) -> tuple[Tensor, Tensor | None]:
    """One call of the U-Net: z_sar, z_t (B, 4, h, w), t scalar or (B,), context (1 or B, tokens, width)
    -> prediction (B, 4, h, w) and raw variance (B, 1, h, w), None from a model without the fifth channel.
    """
    channels = z_t.shape[1]
    output = unet(torch.cat([z_sar, z_t], dim=1), t, context)
    raw_variance = output[:, channels:] if output.shape[1] > channels else None
    return output[:, :channels], raw_variance


# ----------------------------------------------------------------------------------------------------------
# The model


class CDiffSET(nn.Module):
    """VAE, U-Net, prompt embedding (1, tokens, width) and noise schedule, in evaluation mode.

    from_base: whether the U-Net is a text-to-image model's, which has to be fine-tuned before it translates.
    assumptions: one line for each value that the loaded files did not give.
    trained_on: JSON values that describe the training data; saved with the model; {} if unknown.
    """

    def __init__(self, vae: AutoencoderKL, unet: UNet, prompt_embedding: Tensor, scheduler: DDPMScheduler):
        super().__init__()
        self.vae, self.unet, self.scheduler = vae, unet, scheduler
        self.register_buffer("prompt_embedding", prompt_embedding)
        self.from_base = False
        self.assumptions: list[str] = []
        self.trained_on: dict = {}
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        unet: str | Path | None = None,
        *,
        variance_channel: bool = True,
        prediction_type: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "CDiffSET":
        """Loads a diffusers folder or an original single file.

        unet: a safetensors file whose U-Net replaces that of `path` (the released checkpoints).
        variance_channel: whether a base Stable Diffusion (4 channels in, 4 out) gets the fifth output channel besides
            the wider input; False for stage 1 of the training. A C-DiffSET model keeps its channels.
        prediction_type: "epsilon", "v_prediction" or "sample", where the files do not say it or are wrong.
        Raises ValueError, with the file and the first tensors concerned, if anything does not fit.
        """
        parts = weights.open_model(path)
        assumptions = weights.list_assumptions(path, parts["vae"], unet, prediction_type)
        embedding = weights.load_prompt_embedding(path)
        if embedding is None:
            if "text_encoder" not in parts:
                raise ValueError(f"{path}: holds neither prompt_embedding.safetensors nor a text encoder")
            embedding = embed_prompt(parts["text_encoder"])  # first: its memory is free again before the rest is loaded
        network = weights.build(UNet, weights.open_unet(unet, parts["unet"]) if unet else parts["unet"], dtype)
        vae = weights.build(AutoencoderKL, parts["vae"], dtype)
        shape, width = tuple(embedding.shape), network.config["cross_attention_dim"]
        if len(shape) != 3 or (shape[0], shape[2]) != (1, width):
            problem = f"prompt embedding of shape {shape}, but the U-Net's cross-attention needs (1, tokens, {width})"
            raise ValueError(f"{path}: {problem}; is the text encoder another model's?")

        model = cls(vae, network, embedding.to(dtype), weights.load_scheduler(path, prediction_type))
        model.assumptions, model.trained_on = assumptions, {} if unet else weights.load_trained_on(path)
        latent = vae.config["latent_channels"]
        channels = (network.config["in_channels"], network.config["out_channels"])
        if channels == (latent, latent):
            model.from_base = True
            widen_input(network)
            if variance_channel:
                add_variance_channel(network)
        elif channels not in ((2 * latent, latent), (2 * latent, latent + 1)):
            raise ValueError(
                f"{unet or path}: U-Net with {channels[0]} input and {channels[1]} output channels; expected "
                f"{latent} and {latent} (Stable Diffusion), or {2 * latent} and {latent} or {latent + 1} (C-DiffSET)"
            )
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a folder that `from_pretrained` and diffusers open, in the model's dtype; each file atomically."""
        weights.save_model(folder, self.vae, self.unet, self.scheduler, self.prompt_embedding, self.trained_on)

    @property
    def unit(self) -> int:
        """Image sides are padded to multiples of this: the VAE's factor times the U-Net's, 64 for SD."""
        return self.vae.factor * self.unet.unit

    @property
    def has_variance(self) -> bool:
        """Whether the U-Net has the fifth output channel; after stage 1 of the training it has not."""
        return self.unet.config["out_channels"] > self.vae.config["latent_channels"]

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.prompt_embedding.device

    def encode(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> latent (B, 4, H/8, W/8): posterior mean * scaling_factor, no sampling."""
        return self.vae.encode(image.to(self.prompt_embedding))[0] * self.vae.scaling_factor

    def decode(self, latent: Tensor) -> Tensor:
        """The inverse of `encode`: (B, 4, h, w) -> (B, 3, 8h, 8w), about [-1, 1], not clamped."""
        return self.vae.decode(latent.to(self.prompt_embedding) / self.vae.scaling_factor)

    @torch.inference_mode()
    def translate(
        self,
        sar: Tensor,
        steps: int = 50,
        seed: int | Sequence[int] = 0,
        spacing: str = "leading",
        progress: Callable[[Sequence[int]], Iterable[int]] = lambda timesteps: timesteps,
    ) -> tuple[Tensor, Tensor | None]:
        """SAR images (B, 3, H, W) in [-1, 1], H and W at least 8 -> EO images (B, 3, H, W) in [-1, 1] and confidence
        (B, 1, H, W), 1 / variance at the middle step, or None from a model without a variance channel.

        Both are float32, on the model's device. The defaults are the paper's (section IV-A).
        seed: image i starts from the noise of seed + i, or of seed[i], which depends on neither device nor batch size.
        progress: wraps the timesteps, e.g. in tqdm.
        Raises ValueError on a wrong shape, number of steps, spacing or number of seeds.
        """
        if sar.ndim != 4 or not len(sar) or sar.shape[1] != 3 or min(sar.shape[2:]) < 8:
            raise ValueError(f"SAR image of shape {tuple(sar.shape)}: expected (B, 3, H, W) with H and W at least 8")
        seeds = [seed + i for i in range(len(sar))] if isinstance(seed, int) else list(seed)
        if len(seeds) != len(sar):
            raise ValueError(f"{len(seeds)} seeds for {len(sar)} images")
        scheduler = DDIMScheduler(**self.scheduler.config | {"steps": steps, "spacing": spacing})
        context = self.prompt_embedding

        height, width = sar.shape[2:]
        padded = pad_to_multiple(sar.float(), self.unit)
        z_sar = self.encode(padded)
        # z_t and the scheduler's arithmetic stay in float32, whatever the networks' precision
        z_t = torch.cat([initial_noise(s, z_sar.shape[1:]) for s in seeds]).to(context.device)
        confidence = None
        with self.unet.keeping(context):
            for i, t in enumerate(progress(scheduler.timesteps.tolist())):
                prediction, raw = denoise(self.unet, z_sar, z_t.to(z_sar.dtype), t, context)
                if raw is not None and i == steps // 2:
                    confidence = 1 / variance(raw.float())
                z_t = scheduler.step(prediction.float(), t, z_t)
        eo = self.decode(z_t).float().clamp(-1, 1)[:, :, :height, :width]
        if confidence is not None:
            confidence = resize_confidence(confidence, padded.shape[2:])[:, :, :height, :width]
        return eo, confidence

    @torch.inference_mode()
    def noise_error(
        self, z_sar: Tensor, z_eo: Tensor, t: Tensor | int, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor | None]:
        """Adds noise to true EO latents and compares the U-Net's prediction with the target, as in training.

        z_sar, z_eo (B, 4, h, w), t scalar or (B,), one seed of the noise per image -> squared error, averaged over the
        channels, and predicted variance (None without a variance channel), each (B, 1, h, w) float32.
        """
        noise = torch.cat([initial_noise(seed, z_eo.shape[1:]) for seed in seeds]).to(z_eo)
        z_t = self.scheduler.add_noise(z_eo, noise, t).to(z_sar.dtype)
        prediction, raw = denoise(self.unet, z_sar, z_t, t, self.prompt_embedding)
        error = (prediction.float() - self.scheduler.target(z_eo, noise, t)).square().mean(dim=1, keepdim=True)
        return error, None if raw is None else variance(raw.float())


@torch.no_grad()
def embed_prompt(text_encoder: weights.Part) -> Tensor:
    """The fixed prompt's embedding, (1, 6, width) float32. Raises ValueError if the encoder is too small for it."""
    encoder = weights.build(CLIPTextModel, text_encoder)
    if encoder.config["vocab_size"] <= max(PROMPT_IDS) or encoder.config["max_position_embeddings"] < len(PROMPT_IDS):
        raise ValueError(f"{text_encoder.source}: the text encoder is not CLIP's (too small a vocabulary or length)")
    return encoder(torch.tensor([PROMPT_IDS]))


def initial_noise(seed: int, shape: Sequence[int]) -> Tensor:
    """Standard normal noise (1, *shape) float32, drawn on the CPU: the same on every device."""
    return torch.randn((1, *shape), generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32)


def pad_to_multiple(image: Tensor, unit: int) -> Tensor:
    """Pads (B, C, H, W) at the right and bottom to multiples of `unit`: by reflection, or, on an axis that is too
    short to reflect, by repeating the edge.
    """
    height, width = image.shape[2:]
    below, right = -height % unit, -width % unit
    image = F.pad(image, (0, right, 0, 0), mode="reflect" if right < width else "replicate")
    return F.pad(image, (0, 0, 0, below), mode="reflect" if below < height else "replicate")


def resize_confidence(confidence: Tensor, size: Sequence[int]) -> Tensor:
    """(B, 1, h, w) -> (B, 1, *size), bicubic as in the paper, but never below 1 / VARIANCE_MAX."""
    resized = F.interpolate(confidence, size=tuple(size), mode="bicubic", align_corners=False)
    return resized.clamp(min=1 / VARIANCE_MAX)

"""The Stable Diffusion VAE (AutoencoderKL), the latent space that SAR and EO images share.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022, section 3.1.
C-DiffSET keeps it frozen and encodes both modalities with it (arXiv 2411.10788, section III-B).

    image (B, 3, H, W) in [-1, 1] -> encode -> mean, logvar (B, 4, H/8, W/8) -> decode -> image

8 is 2 ^ (levels - 1); small models may have fewer levels. Parameter names and constructor arguments are
those of the diffusers files (`vae/config.json`), so that public weights load with `strict=True`.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from layers import Downsample, ResidualBlock, Upsample, attend, require_multiple

EPS = 1e-6  # of every GroupNorm in the VAE


class Attention(nn.Module):
    """Single-head self-attention over all positions, with its own norm and residual: (B, C, H, W) -> same."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, HW, C)
        h = self.to_out[0](attend(self.to_q(h), self.to_k(h), self.to_v(h), heads=1))
        return x + h.transpose(1, 2).reshape(x.shape)


class MidBlock(nn.Module):
    """Residual block, attention (optional), residual block, at the lowest resolution."""

    def __init__(self, channels: int, groups: int, attention: bool):
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(channels, channels, groups, EPS) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in [self.resnets[0], *self.attentions, self.resnets[1]]:
            x = layer(x)
        return x


class Block(nn.Module):
    """One level: residual blocks; then, except at the last level, half (encoder) or twice (decoder) the resolution."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, resample: type | None):
        super().__init__()
        widths = [in_channels] + [out_channels] * layers
        self.resnets = nn.ModuleList(ResidualBlock(a, b, groups, EPS) for a, b in zip(widths, widths[1:]))
        self.downsamplers = nn.ModuleList([Downsample(out_channels, asymmetric=True)] if resample is Downsample else [])
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if resample is Upsample else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.resnets, *self.downsamplers, *self.upsamplers]:
            x = layer(x)
        return x


class Encoder(nn.Module):
    """Image (B, 3, H, W) -> moments (B, 2 * latent_channels, H/8, W/8)."""

    def __init__(self, channels: int, latents: int, widths: list[int], layers: int, groups: int, attention: bool):
        super().__init__()
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            resample = Downsample if i < len(widths) - 1 else None
            self.down_blocks.append(Block(widths[max(i - 1, 0)], width, layers, groups, resample))
        self.mid_block = MidBlock(widths[-1], groups, attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * latents, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latent (B, latent_channels, h, w) -> image (B, 3, 8h, 8w). Each level has layers + 1 residual blocks."""

    def __init__(self, channels: int, latents: int, widths: list[int], layers: int, groups: int, attention: bool):
        super().__init__()
        widths = widths[::-1]  # from the lowest resolution up
        self.conv_in = nn.Conv2d(latents, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, attention)
        self.up_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            resample = Upsample if i < len(widths) - 1 else None
            self.up_blocks.append(Block(widths[max(i - 1, 0)], width, layers + 1, groups, resample))
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """The VAE. Arguments are the keys of diffusers' `vae/config.json`; the defaults are SD 1.x and 2.x (83.7 M).

    scaling_factor: makes the variance of the latents about 1. `CDiffSET.encode` multiplies by it, this class does not.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 4,
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        mid_block_add_attention: bool = True,
        scaling_factor: float = 0.18215,
    ):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        rest = (latent_channels, list(block_out_channels), layers_per_block, norm_num_groups, mid_block_add_attention)
        self.encoder = Encoder(in_channels, *rest)
        self.decoder = Decoder(out_channels, *rest)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.factor = 2 ** (len(block_out_channels) - 1)
        self.scaling_factor = scaling_factor

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> mean and log-variance of q(z | x), each (B, latent_channels, H/8, W/8), unscaled.

        Raises ValueError if H or W is not a multiple of `factor` (8).
        """
        require_multiple(x, self.factor, "image")
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)  # as in diffusers' DiagonalGaussianDistribution

    def decode(self, z: Tensor) -> Tensor:
        """(B, latent_channels, h, w), unscaled -> (B, 3, 8h, 8w), about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(z))

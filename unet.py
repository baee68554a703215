"""The conditional U-Net of Stable Diffusion 1.x and 2.x: denoises a latent, given timestep and text embedding.

Rombach et al., CVPR 2022, appendix; diffusers' `UNet2DConditionModel` is the reference. C-DiffSET gives it
8 input channels (SAR latent, noisy EO latent) and a fifth output channel (raw variance): see `cdiffset.py`.

    x (B, in, h, w) -> conv_in -> down blocks -> mid block -> up blocks -> conv_out -> (B, out, h, w)
                                       \\_________ skips _________/

Each block consists of residual blocks, which receive the timestep, and transformers, which receive the text
embedding. Parameter names and constructor arguments are those of the diffusers files (`unet/config.json`), so that
public weights load with `strict=True`.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layers import Downsample, ResidualBlock, Upsample, attend, require_multiple

# ----------------------------------------------------------------------------------------------------------
# Timestep


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding, cosines first: (B,) -> (B, dim), float32.

    diffusers' `get_timestep_embedding` with flip_sin_to_cos=True and freq_shift=0, SD's settings.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


# ----------------------------------------------------------------------------------------------------------
# Transformer


class Attention(nn.Module):
    """Multi-head attention from x (B, N, C) to a context (B or 1, M, D), or to x itself if there is none."""

    def __init__(self, channels: int, context_channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.kept = None  # keys and values of a fixed context: see UNet.keeping
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_channels, channels, bias=False)
        self.to_v = nn.Linear(context_channels, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        keys, values = self.kept or self.keys_and_values(x if context is None else context)
        return self.to_out[0](attend(self.to_q(x), keys, values, self.heads))

    def keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Context (B or 1, M, D) -> keys and values, each (B or 1, M, C)."""
        return self.to_k(context), self.to_v(context)


class GEGLU(nn.Module):
    """Gated GELU (Shazeer, 2020): (B, N, in) -> (B, N, out), value * gelu(gate)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.proj = nn.Linear(in_channels, 2 * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward; each pre-norm and residual: (B, N, C) -> (B, N, C)."""

    def __init__(self, channels: int, context_channels: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, context_channels, heads)
        self.norm3 = nn.LayerNorm(channels)
        # so named in the weights; index 1 is diffusers' dropout, unused in SD
        net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))
        self.ff = nn.Sequential(OrderedDict(net=net))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """One transformer block over the positions of a feature map: (B, C, H, W) -> (B, C, H, W), residual.

    linear: SD 2.x projects with Linear layers, SD 1.x with 1x1 convolutions: the same map, other shapes.
    """

    def __init__(self, channels: int, context_channels: int, heads: int, groups: int, linear: bool):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, context_channels, heads)])
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm(x).flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, HW, C)
        h = self.transformer_blocks[0](project(self.proj_in, h), context)
        return x + project(self.proj_out, h).transpose(1, 2).reshape(x.shape)


def project(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """A linear layer, or a 1x1 convolution as one: (B, N, C) -> (B, N, C)."""
    return F.linear(x, layer.weight.flatten(1), layer.bias)


# ----------------------------------------------------------------------------------------------------------
# The network


class Block(nn.Module):
    """The layers of one level. A "stage" is one residual block and the transformer after it, if there is one.

    inputs: the channels that enter each residual block; all leave with `channels`. common: what all blocks share.
    """

    def __init__(
        self, inputs: list[int], channels: int, transformers: int, heads: int, resample: type | None, common: tuple
    ):
        super().__init__()
        time_channels, context_channels, groups, eps, linear = common
        self.resnets = nn.ModuleList(ResidualBlock(width, channels, groups, eps, time_channels) for width in inputs)
        self.attentions = nn.ModuleList(
            Transformer(channels, context_channels, heads, groups, linear) for _ in range(transformers)
        )
        self.downsamplers = nn.ModuleList([Downsample(channels)] if resample is Downsample else [])
        self.upsamplers = nn.ModuleList([Upsample(channels)] if resample is Upsample else [])

    def stage(self, i: int, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """Residual block i, then transformer i if the block has it: (B, inputs[i], H, W) -> (B, channels, H, W)."""
        x = self.resnets[i](x, time)
        return self.attentions[i](x, context) if i < len(self.attentions) else x


class UNet(nn.Module):
    """The U-Net. Arguments are the keys of diffusers' `unet/config.json`; the defaults are SD 1.x (859.5 M parameters).

    SD 2.x (865.9 M): attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True.

    attention_head_dim is diffusers' misnomer: for these models it is the NUMBER of heads, at each level.
    gradient_checkpointing (attribute): whether the backward pass recomputes the stages: less memory, a third slower.
    """

    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 4,
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        attention_head_dim: int | Sequence[int] = 8,
        cross_attention_dim: int = 768,
        use_linear_projection: bool = False,
        down_block_types: Sequence[str] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types: Sequence[str] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        widths, levels, time = list(block_out_channels), len(block_out_channels), 4 * block_out_channels[0]
        heads = [attention_head_dim] * levels if isinstance(attention_head_dim, int) else list(attention_head_dim)
        for width, count in zip(widths, heads):
            if width % count:
                raise ValueError(f"{width} channels cannot be shared by {count} attention heads")
        self.unit = 2 ** (levels - 1)
        self.gradient_checkpointing = False

        common = (time, cross_attention_dim, norm_num_groups, norm_eps, use_linear_projection)
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        layers = {"linear_1": nn.Linear(widths[0], time), "act": nn.SiLU(), "linear_2": nn.Linear(time, time)}
        self.time_embedding = nn.Sequential(OrderedDict(layers))

        self.down_blocks = nn.ModuleList()
        skips = [widths[0]]  # channels of the feature maps that the up blocks concatenate
        for i, width in enumerate(widths):
            inputs = [skips[-1]] + [width] * (layers_per_block - 1)
            transformers = layers_per_block if down_block_types[i].startswith("CrossAttn") else 0
            resample = Downsample if i < levels - 1 else None
            self.down_blocks.append(Block(inputs, width, transformers, heads[i], resample, common))
            skips += [width] * (layers_per_block + (resample is not None))

        self.mid_block = Block([widths[-1]] * 2, widths[-1], 1, heads[-1], None, common)

        self.up_blocks = nn.ModuleList()
        channels = widths[-1]
        for i, width in enumerate(reversed(widths)):
            inputs = [(channels if j == 0 else width) + skips.pop() for j in range(layers_per_block + 1)]
            transformers = layers_per_block + 1 if up_block_types[i].startswith("CrossAttn") else 0
            resample = Upsample if i < levels - 1 else None
            self.up_blocks.append(Block(inputs, width, transformers, heads[-1 - i], resample, common))
            channels = width

        self.conv_norm_out = nn.GroupNorm(norm_num_groups, widths[0], eps=norm_eps)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor | int, context: Tensor) -> Tensor:
        """x (B, in_channels, h, w), t scalar or (B,) in 0..999, context (B or 1, tokens, cross_attention_dim)
        -> (B, out_channels, h, w). Raises ValueError if h or w is not a multiple of `unit` (8 for SD).
        """
        require_multiple(x, self.unit, "latent")
        t = torch.as_tensor(t, device=x.device).expand(x.shape[0])
        time = self.time_embedding(timestep_embedding(t, self.conv_in.out_channels).to(x.dtype))

        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            for i in range(len(block.resnets)):
                x = self._run(block.stage, i, x, time, context)
                skips.append(x)
            for downsample in block.downsamplers:
                x = downsample(x)
                skips.append(x)
        for i in range(2):
            x = self._run(self.mid_block.stage, i, x, time, context)
        for block in self.up_blocks:
            for i in range(len(block.resnets)):
                x = self._run(block.stage, i, torch.cat([x, skips.pop()], dim=1), time, context)
            for upsample in block.upsamplers:
                x = upsample(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    @contextmanager
    def keeping(self, context: Tensor) -> Iterator[None]:
        """In a `with` block, the U-Net attends to this context; its keys and values are computed only once."""
        attentions = [module.attn2 for module in self.modules() if isinstance(module, TransformerBlock)]
        try:
            for attention in attentions:
                attention.kept = attention.keys_and_values(context)
            yield
        finally:
            for attention in attentions:
                attention.kept = None

    def _run(self, stage, *args):
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(stage, *args, use_reentrant=False)
        return stage(*args)

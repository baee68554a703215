"""The layers that the networks share: residual block, downsampling, upsampling; and attention.

Parameter names are those of the diffusers files (`diffusers/models/resnet.py`, `downsampling.py`,
`upsampling.py`), so that public Stable Diffusion weights load with `strict=True`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """x -> shortcut(x) + conv(silu(norm(conv(silu(norm(x))) + time))): (B, in, H, W) -> (B, out, H, W).

    time_channels: width of the time embedding that is added between the convolutions; None in the VAE.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int, eps: float, time_channels: int | None = None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if time_channels is not None:
            self.time_emb_proj = nn.Linear(time_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, time_embedding: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if time_embedding is not None:
            h = h + self.time_emb_proj(F.silu(time_embedding))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """Stride-2 convolution: (B, C, H, W) -> (B, C, H/2, W/2).

    asymmetric: the VAE pads right and bottom only, (0, 1, 0, 1); the U-Net pads all four sides.
    """

    def __init__(self, channels: int, asymmetric: bool = False):
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a convolution: (B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """Multi-head attention, softmax(q k^T / sqrt(d)) v: (B, N, C), 2 x (B or 1, M, C) -> (B, N, C)."""
    batch = q.shape[0]
    # (B, N, heads * d) -> (B, heads, N, d); keys and values of a shared context are expanded, not copied
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2).expand(batch, -1, -1, -1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


def require_multiple(x: Tensor, unit: int, name: str) -> None:
    """Raises ValueError unless height and width of x (B, C, H, W) are multiples of `unit`."""
    if x.ndim != 4 or x.shape[2] % unit or x.shape[3] % unit or 0 in x.shape:
        shape = tuple(x.shape)
        raise ValueError(f"{name} of shape {shape}: expected (B, C, H, W) with H and W multiples of {unit}")


# ----------------------------------------------------------------------------------------------------------
# Low-rank adaptation, `train.py --lora`


class LoRALinear(nn.Linear):
    """A frozen Linear layer plus a trainable update of low rank, W x + b + B A x (Hu et al., "LoRA", ICLR 2022).

    (B, N, in) -> (B, N, out). A (rank, in), `down`, is random and B (out, rank), `up`, is zero: at first nothing
    changes. `state_dict` gives the merged layer, W + B A under the names of an ordinary Linear layer, so that a network
    with such layers is saved as an ordinary network.
    """

    def __init__(self, layer: nn.Linear, rank: int, generator: torch.Generator):
        nn.Module.__init__(self)  # not nn.Linear's, which would make another weight
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        bound = self.in_features**-0.5
        down = torch.empty(rank, self.in_features).uniform_(-bound, bound, generator=generator)
        self.down = nn.Parameter(down.to(layer.weight.device))
        self.up = nn.Parameter(torch.zeros(self.out_features, rank, device=layer.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.down), self.up)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = (self.weight.float() + self.up @ self.down).detach()
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias.detach()


LORA_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")  # the projections of every attention


def add_lora(network: nn.Module, rank: int, seed: int = 0, frozen_dtype: torch.dtype = torch.float32) -> None:
    """Freezes a U-Net except conv_in and conv_out, and gives its attention projections trainable updates. In place.

    The frozen weights are kept in `frozen_dtype`; the norms and biases, which are small, stay float32.
    """
    for p in network.parameters():
        p.requires_grad_(False)
        if p.ndim > 1:
            p.data = p.data.to(frozen_dtype)
    generator = torch.Generator().manual_seed(seed)
    for name, layer in list(network.named_modules()):
        if name.endswith(LORA_LAYERS):
            parent, _, attribute = name.rpartition(".")
            setattr(network.get_submodule(parent), attribute, LoRALinear(layer, rank, generator))
    for layer in (network.conv_in, network.conv_out):  # they have the new channels
        layer.float().requires_grad_(True)
    network.register_state_dict_post_hook(
        lambda _net, state, *_: state.update({k: v.float() for k, v in state.items()})
    )

"""CLIP's text encoder ("text tower"), used once per model, to embed the fixed prompt "electro-optical image".

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021. SD 1.x has
CLIP ViT-L's tower (12 layers, quick_gelu), SD 2.x OpenCLIP ViT-H's, cut to 23 layers (gelu); transformers'
`CLIPTextModel` is the reference. Parameter names are those of its files without the prefix `text_model.`;
constructor arguments are the keys of `text_encoder/config.json`.

    token ids (B, N) -> embeddings -> causal transformer -> final LayerNorm -> (B, N, hidden_size)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers import attend


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x): the approximation of GELU that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": quick_gelu}


class SelfAttention(nn.Module):
    """Causal multi-head self-attention: (B, N, C) -> (B, N, C)."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.out_proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, causal=True))


class MLP(nn.Module):
    """Two-layer perceptron: (B, N, C) -> (B, N, C)."""

    def __init__(self, channels: int, hidden: int, activation: str):
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    """One pre-norm transformer layer: (B, N, C) -> (B, N, C)."""

    def __init__(self, channels: int, hidden: int, heads: int, activation: str, eps: float):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(channels, eps=eps)
        self.self_attn = SelfAttention(channels, heads)
        self.layer_norm2 = nn.LayerNorm(channels, eps=eps)
        self.mlp = MLP(channels, hidden, activation)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPTextModel(nn.Module):
    """The text tower. The defaults are SD 1.x (123.1 M parameters).

    SD 2.x (340.4 M): hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16,
    hidden_act="gelu".
    """

    def __init__(
        self,
        vocab_size: int = 49408,
        max_position_embeddings: int = 77,
        hidden_size: int = 768,
        intermediate_size: int = 3072,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
    ):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        if hidden_size % num_attention_heads:
            raise ValueError(f"{hidden_size} channels cannot be shared by {num_attention_heads} attention heads")
        self.embeddings = nn.ModuleDict()  # for the published names; so is "encoder.layers"
        self.embeddings["token_embedding"] = nn.Embedding(vocab_size, hidden_size)
        self.embeddings["position_embedding"] = nn.Embedding(max_position_embeddings, hidden_size)
        layer = (hidden_size, intermediate_size, num_attention_heads, hidden_act, layer_norm_eps)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(Layer(*layer) for _ in range(num_hidden_layers))})
        self.final_layer_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, N), N <= 77 -> last hidden state after the final LayerNorm, (B, N, hidden_size)."""
        positions = self.embeddings["position_embedding"].weight[: ids.shape[1]]
        x = self.embeddings["token_embedding"](ids) + positions
        for layer in self.encoder["layers"]:
            x = layer(x)
        return self.final_layer_norm(x)

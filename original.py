"""Older names and formats of Stable Diffusion's weights, translated into those of today's diffusers files.

`v1-5-pruned-emaonly.safetensors`, `v2-1_512-ema-pruned.safetensors` and similar files (CompVis, Stability AI) hold
U-Net, VAE and text encoder in one file, under the names of the original code, without any configuration.
`convert_single_file` translates the names by a short table of rules for each network; the configuration follows from
the width of the cross-attention. `convert_vae` and `convert_text_encoder` serve older diffusers folders, too.

Everything here works on names and shapes: a tensor is a `weights.Stored`, whose data stay on disk.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import some

Tensors = dict[str, Any]  # name -> weights.Stored
Rule = tuple[str, str | Callable[[re.Match], str]]  # pattern and replacement, as for re.sub

# ----------------------------------------------------------------------------------------------------------
# Names

PREFIXES = (
    "model.diffusion_model.",
    "first_stage_model.",
    "cond_stage_model.transformer.text_model.",  # SD 1.x: CLIP, with transformers' names
    "cond_stage_model.model.",  # SD 2.x: OpenCLIP
)
# The only tensors that are left out: EMA copies, the original code's noise schedule, and what Stable Diffusion does
# not use of the text encoders (the last of OpenCLIP's 24 blocks, for example)
IGNORED = re.compile(
    r"model_ema\..*"
    r"|betas|alphas_cumprod|alphas_cumprod_prev|sqrt_alphas_cumprod|sqrt_one_minus_alphas_cumprod"
    r"|log_one_minus_alphas_cumprod|sqrt_recip_alphas_cumprod|sqrt_recipm1_alphas_cumprod|posterior_variance"
    r"|posterior_log_variance_clipped|posterior_mean_coef1|posterior_mean_coef2|scale_factor"
    r"|cond_stage_model\.(.*\.)?(embeddings\.position_ids|logit_scale|text_projection)"
    r"|cond_stage_model\.model\.transformer\.resblocks\.23\..*"
)

UNET_RULES: list[Rule] = [  # the original numbers all blocks in one sequence, three to a level
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
VAE_RULES: list[Rule] = [
    (r"^encoder\.down\.", "encoder.down_blocks."),
    (r"^decoder\.up\.(\d+)\.", lambda m: f"decoder.up_blocks.{3 - int(m[1])}."),  # numbered from the output side
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.(down|up)sample\.", r".\1samplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.(q|k|v)\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    # diffusers' own former names, which the published folders still have
    (r"\.attentions\.0\.(q|k|v)(uery|ey|alue)\.", r".attentions.0.to_\1."),
    (r"\.attentions\.0\.proj_attn\.", ".attentions.0.to_out.0."),
]
OPENCLIP_RULES: list[Rule] = [
    (r"^transformer\.resblocks\.", "encoder.layers."),
    (r"\.ln_(1|2)\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"^token_embedding\.", "embeddings.token_embedding."),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^ln_final\.", "final_layer_norm."),
]


def rename(tensors: Tensors, rules: list[Rule]) -> Tensors:
    """Applies every rule to every name, in order. Raises ValueError if two tensors get the same name."""
    renamed: Tensors = {}
    for old, tensor in tensors.items():
        new = old
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        if new in renamed:
            raise ValueError(f"{tensor.file.path}: holds one tensor twice, as {renamed[new].key} and {tensor.key}")
        renamed[new] = tensor
    return renamed


def strip(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors whose names start with `prefix`, without it."""
    return {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def convert_vae(tensors: Tensors) -> Tensors:
    """A VAE with the original names, or diffusers' former or present ones, to the present ones.

    Attention weights that are stored as 1x1 convolutions, (C, C, 1, 1), become (C, C).
    """
    renamed = rename(tensors, VAE_RULES)
    for key, tensor in renamed.items():
        if ".attentions." in key and tensor.shape[2:] == (1, 1):
            renamed[key] = tensor._replace(shape=tensor.shape[:2])
    return renamed


def convert_text_encoder(tensors: Tensors) -> Tensors:
    """CLIP's text encoder as transformers 4 or 5 saves it: drops the prefix `text_model.` and the position ids."""
    tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith("embeddings.position_ids")}
    return rename(tensors, [(r"^text_model\.", "")])


def convert_openclip(tensors: Tensors) -> Tensors:
    """OpenCLIP's text encoder to transformers' names. The rows of q, k and v, stacked there, become three tensors."""
    converted: Tensors = {}
    for key, tensor in rename(tensors, OPENCLIP_RULES).items():
        stacked = re.fullmatch(r"(.*)\.in_proj_(weight|bias)", key)
        if stacked and tensor.shape:
            width = tensor.shape[0] // 3
            for i, name in enumerate("qkv"):
                rows = slice(i * width, (i + 1) * width)
                part = tensor._replace(shape=(width, *tensor.shape[1:]), rows=rows)
                converted[f"{stacked[1]}.{name}_proj.{stacked[2]}"] = part
        else:
            converted[key] = tensor
    return converted


# ----------------------------------------------------------------------------------------------------------
# Single files

VAE = {"scaling_factor": 0.18215}
CONFIGS = {  # by cross-attention width; what is left out has the default of our constructors, which is SD 1.x's value
    768: {"unet": {}, "vae": VAE, "text_encoder": {"hidden_act": "quick_gelu"}},  # SD 1.x
    1024: {  # SD 2.x
        "unet": {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True},
        "vae": VAE,
        "text_encoder": {
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
            "hidden_act": "gelu",
        },
    },
}  # fmt: skip


def convert_single_file(path: Path, tensors: Tensors) -> dict[str, tuple[dict, Tensors]]:
    """The tensors of an original single file -> configuration and tensors of "unet", "vae" and, where the file holds
    one, "text_encoder". Raises ValueError if this is not Stable Diffusion 1.x or 2.x.
    """
    tensors = {key: tensor for key, tensor in tensors.items() if not IGNORED.fullmatch(key)}
    unknown = [key for key in tensors if not key.startswith(PREFIXES)]
    unet, vae, clip, openclip = (strip(tensors, prefix) for prefix in PREFIXES)
    if unknown or not unet or not vae or (clip and openclip):
        problem = f"unknown tensors: {some(unknown)}" if unknown else "it needs one U-Net, one VAE, one text encoder"
        raise ValueError(
            f"{path}: not an original Stable Diffusion 1.x or 2.x file ({problem}); "
            "give a diffusers folder, or pass a separate U-Net as --unet together with a --model"
        )
    to_k = unet.get("middle_block.1.transformer_blocks.0.attn2.to_k.weight")
    width = to_k.shape[-1] if to_k and to_k.shape else None
    if width not in CONFIGS:
        raise ValueError(f"{path}: cross-attention of width {width}; expected 768 (SD 1.x) or 1024 (SD 2.x)")
    networks = {"unet": rename(unet, UNET_RULES), "vae": convert_vae(vae)}
    if clip or openclip:
        networks["text_encoder"] = clip or convert_openclip(openclip)
    return {name: (CONFIGS[width][name], network) for name, network in networks.items()}

"""The original single files of Stable Diffusion 1.x and 2.x (CompVis, Stability), told in diffusers' terms.

`v1-5-pruned-emaonly.safetensors`, `v2-1_512-ema-pruned.safetensors` and their like hold U-Net, VAE and text tower
under the names of the original code, and no configuration. `open_original` finds both: names by a short table of
rules for each network, the configuration from the tensors' shapes. Nothing is read but the header.
"""

import re
from pathlib import Path

from common import some
from stored import Rule, Tensors, count, open_tensors, rename, strip

# ----------------------------------------------------------------------------------------------------------
# Names

PREFIXES = (
    "model.diffusion_model.",
    "first_stage_model.",
    "cond_stage_model.transformer.text_model.",  # SD 1.x: CLIP, by transformers' names
    "cond_stage_model.model.",  # SD 2.x: OpenCLIP
)
# ldm's schedule buffers and leftovers of training, and what SD does not use of the text towers (of OpenCLIP's
# 24 blocks the last): the only tensors that are not ours
IGNORED = re.compile(
    r"model_ema\..*"
    r"|betas|alphas_cumprod|alphas_cumprod_prev|sqrt_alphas_cumprod|sqrt_one_minus_alphas_cumprod"
    r"|log_one_minus_alphas_cumprod|sqrt_recip_alphas_cumprod|sqrt_recipm1_alphas_cumprod|posterior_variance"
    r"|posterior_log_variance_clipped|posterior_mean_coef1|posterior_mean_coef2|scale_factor"
    r"|cond_stage_model\.(.*\.)?(embeddings\.position_ids|logit_scale|text_projection)"
    r"|cond_stage_model\.model\.transformer\.resblocks\.23\..*"
)

UNET_RULES: list[Rule] = [  # blocks are numbered through; every third ends a level
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
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.(down|up)sample\.", r".\1samplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.(q|k|v)\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
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


def open_original(path: Path) -> dict[str, tuple[dict, Tensors]]:
    """Configuration and tensors, by diffusers' names, of "unet", "vae" and, if there, "text_encoder".

    The VAE's attention keeps the shape of 1x1 convolutions, which `weights.modern_vae` flattens. Raises ValueError if
    it is no such file.
    """
    tensors = {key: tensor for key, tensor in open_tensors(path).items() if not IGNORED.fullmatch(key)}
    unknown = [key for key in tensors if not key.startswith(PREFIXES)]
    unet, vae, text_1, text_2 = (strip(tensors, prefix) for prefix in PREFIXES)
    if unknown or not unet or not vae or (text_1 and text_2):
        problem = f"unknown tensors: {some(unknown)}" if unknown else "it needs one U-Net, one VAE and one text tower"
        raise ValueError(
            f"{path}: not an original Stable Diffusion 1.x or 2.x file ({problem}); "
            "give a diffusers folder, or pass a U-Net on its own as --unet beside a --model"
        )
    unet, vae = rename(unet, UNET_RULES), vae_by_diffusers_names(vae)
    text = text_1 or openclip_by_transformers_names(text_2)
    try:
        parts = {"unet": (unet_config(unet), unet), "vae": (vae_config(vae), vae)}
        if text:
            parts["text_encoder"] = (text_config(text, quick=bool(text_1)), text)
    except (KeyError, IndexError) as error:
        raise ValueError(f"{path}: {error} is missing or misshapen, which every Stable Diffusion file has") from error
    if parts["unet"][0]["cross_attention_dim"] not in (768, 1024):
        width = parts["unet"][0]["cross_attention_dim"]
        raise ValueError(f"{path}: cross-attention width {width}; expected 768 (SD 1.x) or 1024 (SD 2.x)")
    return parts


def vae_by_diffusers_names(tensors: Tensors) -> Tensors:
    """Applies VAE_RULES, and turns the decoder's levels round: ldm counts them from the output side."""
    last = count(tensors, "decoder.up") - 1
    reverse = (r"^decoder\.up\.(\d+)\.", lambda m: f"decoder.up_blocks.{last - int(m[1])}.")
    return rename(tensors, [reverse, *VAE_RULES])


def openclip_by_transformers_names(tensors: Tensors) -> Tensors:
    """Applies OPENCLIP_RULES, and unstacks the rows of q, k and v."""
    renamed: Tensors = {}
    for key, tensor in rename(tensors, OPENCLIP_RULES).items():
        stacked = re.fullmatch(r"(.*)\.in_proj_(weight|bias)", key)
        if stacked:
            width = tensor.shape[0] // 3
            for i, name in enumerate("qkv"):
                rows = slice(i * width, (i + 1) * width)
                part = tensor._replace(shape=(width, *tensor.shape[1:]), rows=rows)
                renamed[f"{stacked[1]}.{name}_proj.{stacked[2]}"] = part
        else:
            renamed[key] = tensor
    return renamed


# ----------------------------------------------------------------------------------------------------------
# Configurations, from the shapes; KeyError or IndexError where a tensor that they need is missing


def unet_config(unet: Tensors) -> dict:
    """SD 1.x has 8 heads at every level, SD 2.x 64 channels a head: told by the cross-attention width."""
    levels = range(count(unet, "down_blocks"))
    widths = [unet[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in levels]
    attention = [count(unet, f"down_blocks.{i}.attentions") > 0 for i in levels]
    context = unet["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape[1]
    return {
        "in_channels": unet["conv_in.weight"].shape[1],
        "out_channels": unet["conv_out.weight"].shape[0],
        "block_out_channels": widths,
        "attention_head_dim": 8 if context == 768 else [width // 64 for width in widths],
        "cross_attention_dim": context,
        "use_linear_projection": len(unet["mid_block.attentions.0.proj_in.weight"].shape) == 2,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)],
    }


def vae_config(vae: Tensors) -> dict:
    """As many latent channels and levels as there are weights; the rest is as in every Stable Diffusion."""
    levels = range(count(vae, "encoder.down_blocks"))
    return {
        "latent_channels": vae["decoder.conv_in.weight"].shape[1],
        "block_out_channels": [vae[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in levels],
    }


def text_config(text: Tensors, quick: bool) -> dict:
    """quick: whether it is OpenAI's CLIP (SD 1.x), trained with quick_gelu."""
    width = text["final_layer_norm.weight"].shape[0]
    return {
        "hidden_size": width,
        "intermediate_size": text["encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": count(text, "encoder.layers"),
        "num_attention_heads": width // 64,
        "hidden_act": "quick_gelu" if quick else "gelu",
        "vocab_size": text["embeddings.token_embedding.weight"].shape[0],
    }

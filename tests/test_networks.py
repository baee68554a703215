"""The U-Net, the VAE and the text tower compute what diffusers and transformers compute, on random weights."""

import inspect

import pytest
import torch
from record_golden import (
    GOLDEN,
    NETWORKS,
    UNETS,
    VAES,
    fill,
    inputs,
    norms,
    reference,
    reference_of_case,
    reference_outputs,
)
from safetensors.torch import load_file

from clip import CLIPTextModel
from unet import UNet
from vae import AutoencoderKL

TOLERANCE = 1e-4  # of the output's standard deviation
CLASSES = {"unet": UNet, "vae": AutoencoderKL, "clip": CLIPTextModel}


def ours(name: str) -> torch.nn.Module:
    return CLASSES[name.split("_")[0]](**NETWORKS[name][0]).eval()


@torch.no_grad()
def outputs(name: str, model: torch.nn.Module, x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if name in UNETS:
        return {"y": model(x["x"], x["t"], x["context"])}
    if name in VAES:
        mean, logvar = model.encode(x["image"])
        return {"mean": mean, "logvar": logvar, "decoded": model.decode(x["latent"])}
    return {"y": model(x["ids"])}


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute error, in units of the expected output's standard deviation."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    return ((actual - expected).abs().max() / expected.std()).item()


def import_reference(name: str) -> None:
    pytest.importorskip("transformers" if name.startswith("clip") else "diffusers")


def reference_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name.removeprefix("text_model."): tensor for name, tensor in model.state_dict().items()}


# ----------------------------------------------------------------------------------------------------------
# The same numbers as the references


@pytest.mark.parametrize("name", NETWORKS)
def test_network_repeats_the_recorded_reference(name):
    golden, model = load_file(GOLDEN / f"{name}.safetensors"), fill(ours(name), seed=0)
    for key, value in outputs(name, model, golden).items():
        assert error(value, golden[key]) <= TOLERANCE, key
    assert torch.equal(norms(model), golden["norms"])


@pytest.mark.parametrize("name", NETWORKS)
def test_network_repeats_the_live_reference_with_its_weights(name):
    import_reference(name)
    theirs, model = fill(reference_of_case(name), seed=1), ours(name)
    model.load_state_dict(reference_state(theirs), strict=True)
    x = inputs(name, seed=1)
    expected = reference_outputs(name, theirs, x)
    for key, value in outputs(name, model, x).items():
        assert error(value, expected[key]) <= TOLERANCE, key


# ----------------------------------------------------------------------------------------------------------
# The published sizes and names

SD15_UNET = {
    "act_fn": "silu", "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False, "cross_attention_dim": 768, "downsample_padding": 1, "flip_sin_to_cos": True,
    "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05,
    "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
SD21_UNET = SD15_UNET | {
    "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "dual_cross_attention": False,
    "num_class_embeds": None, "only_cross_attention": False, "upcast_attention": False, "use_linear_projection": True,
}  # fmt: skip
SD_VAE = {
    "act_fn": "silu", "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3,
    "sample_size": 512, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
SD15_CLIP = {
    "hidden_act": "quick_gelu", "hidden_size": 768, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77, "num_attention_heads": 12, "num_hidden_layers": 12, "vocab_size": 49408,
}  # fmt: skip
SD21_CLIP = SD15_CLIP | {
    "hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
    "num_hidden_layers": 23,
}  # fmt: skip

# published config, parameters, tensors
PUBLISHED = {
    "unet of SD 1.5": (SD15_UNET, 859_520_964, 686),
    "unet of SD 2.1": (SD21_UNET, 865_910_724, 686),
    "vae": (SD_VAE, 83_653_863, 248),
    "clip of SD 1.5": (SD15_CLIP, 123_060_480, 196),
    "clip of SD 2.1": (SD21_CLIP, 340_387_840, 372),
}


def published(name: str) -> torch.nn.Module:
    """Our network of that config, without memory for its weights. `flip_sin_to_cos`, ... are fixed in ours."""
    network, config = CLASSES[name.split()[0]], PUBLISHED[name][0]
    with torch.device("meta"):
        return network(**{k: v for k, v in config.items() if k in inspect.signature(network).parameters})


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_gives_the_published_size(name):
    _, parameters, tensors = PUBLISHED[name]
    state = published(name).state_dict()
    assert len(state) == tensors
    assert sum(tensor.numel() for tensor in state.values()) == parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_gives_the_reference_names_shapes_and_norms(name):
    import_reference(name)
    with torch.device("meta"):
        theirs = reference(name.split()[0], **PUBLISHED[name][0])
    model = published(name)
    expected = {key: tensor.shape for key, tensor in reference_state(theirs).items()}
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == expected
    assert torch.equal(norms(model), norms(theirs))


@pytest.mark.parametrize("name", ["unet of SD 1.5", "vae", "clip of SD 1.5"])
def test_keys_that_the_sd_1_config_leaves_out_have_its_values_by_default(name):
    with torch.device("meta"):
        default = CLASSES[name.split()[0]]().config
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in default.items()} == published(name).config


# ----------------------------------------------------------------------------------------------------------
# Statements about our own interface


@torch.no_grad()
def test_a_kept_context_is_not_looked_at_again_and_gives_the_same():
    name = "unet_sd2_cdiffset"
    model, x = fill(ours(name), seed=2), inputs(name, seed=2)
    context = x["context"][:1]
    expected, other = model(x["x"], 317, context), model(x["x"], 317, 2 * context)
    assert error(other, expected) > TOLERANCE
    with model.keeping(context):
        assert torch.equal(model(x["x"], 317, 2 * context), expected)
    assert torch.equal(model(x["x"], 317, 2 * context), other)


@torch.no_grad()
def test_log_variance_is_clamped():
    model = fill(ours("vae_two_levels"), seed=2)
    model.quant_conv.bias[3] = 100.0
    model.quant_conv.bias[4] = -100.0
    _, logvar = model.encode(inputs("vae_two_levels", seed=2)["image"])
    assert (logvar[:, 0] == 20).all() and (logvar[:, 1] == -30).all()


def test_gradient_checkpointing_recomputes_and_changes_nothing():
    name = "unet_sd2_cdiffset"
    model, x = fill(ours(name), seed=2).train(), inputs(name, seed=2)
    calls, gradients = [], []
    model.mid_block.resnets[0].register_forward_hook(lambda *_: calls.append(1))
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        noisy = x["x"].clone().requires_grad_()
        model(noisy, x["t"], x["context"]).square().mean().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters()} | {"x": noisy.grad})
    assert len(calls) == 1 + 2
    for key, gradient in gradients[0].items():
        assert error(gradients[1][key], gradient) <= TOLERANCE, key
    with torch.no_grad():
        model(x["x"], x["t"], x["context"])
    assert len(calls) == 1 + 2 + 1  # sampling recomputes nothing


@pytest.mark.parametrize(
    "name, unit", [("unet_sd1", 8), ("unet_three_levels", 4), ("vae_sd", 8), ("vae_two_levels", 2)]
)
def test_sizes_that_do_not_halve_evenly_are_refused(name, unit):
    model = ours(name)
    assert unit == (model.unit if name in UNETS else model.factor)
    channels = NETWORKS[name][0].get("in_channels", 3)
    for shape in ((1, channels, 15, 16), (1, channels, 16, 17), (channels, 16, 16), (1, channels, 0, 16)):
        with pytest.raises(ValueError, match=f"multiples of {unit}"):
            model(torch.zeros(shape), 1, torch.zeros(1, 7, 24)) if name in UNETS else model.encode(torch.zeros(shape))

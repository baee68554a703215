"""The U-Net, the VAE and the text tower compute what diffusers and transformers compute, on random weights."""

import inspect

import pytest
import torch
from record_golden import (
    CLIPS,
    GOLDEN,
    NETWORKS,
    UNETS,
    VAES,
    fill,
    inputs,
    norms,
    reference,
    reference_clip,
    reference_outputs,
    reference_unet,
    reference_vae,
)
from safetensors.torch import load_file

from clip import CLIPTextModel
from unet import UNet
from vae import AutoencoderKL

TOLERANCE = 1e-4  # of the output's standard deviation


def ours(name: str) -> torch.nn.Module:
    network = UNet if name in UNETS else AutoencoderKL if name in VAES else CLIPTextModel
    return network(**NETWORKS[name][0]).eval()


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
    pytest.importorskip("transformers" if name in CLIPS else "diffusers")


def reference_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name.removeprefix("text_model."): tensor for name, tensor in model.state_dict().items()}


# ----------------------------------------------------------------------------------------------------------
# The same numbers as the references


@pytest.mark.parametrize("name", NETWORKS)
def test_network_repeats_the_recorded_reference(name):
    golden = load_file(GOLDEN / f"{name}.safetensors")
    for key, value in outputs(name, fill(ours(name), seed=0), golden).items():
        assert error(value, golden[key]) <= TOLERANCE, key


@pytest.mark.parametrize("name", NETWORKS)
def test_network_repeats_the_live_reference_with_its_weights(name):
    import_reference(name)
    theirs, model = fill(reference(name), seed=1), ours(name)
    model.load_state_dict(reference_state(theirs), strict=True)
    x = inputs(name, seed=1)
    expected = reference_outputs(name, theirs, x)
    for key, value in outputs(name, model, x).items():
        assert error(value, expected[key]) <= TOLERANCE, key


@pytest.mark.parametrize("name", NETWORKS)
def test_every_norm_has_the_recorded_eps_and_groups(name):
    assert torch.equal(norms(ours(name)), load_file(GOLDEN / f"{name}.safetensors")["norms"])


@pytest.mark.parametrize("name", ["unet_three_levels", "vae_two_levels", "clip_sd1"])
def test_comparison_notices_every_single_tensor(name):
    """Else a tensor that the network forgets, or applies in the wrong place, could pass the tests above."""
    model, x = fill(ours(name), seed=0), inputs(name, seed=0)
    expected = outputs(name, model, x)
    for key, tensor in model.state_dict().items():
        if key.endswith(("to_k.bias", "k_proj.bias")):
            continue  # adds the same to all logits of a query: softmax does not see it
        kept = tensor.clone()
        tensor.fill_(1 if "norm" in key and key.endswith("weight") else 0)
        changed = outputs(name, model, x)
        assert max(error(changed[k], expected[k]) for k in expected) > 50 * TOLERANCE, key
        tensor.copy_(kept)


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

# our class, the reference, published config, parameters, tensors
PUBLISHED = {
    "SD 1.5 U-Net": (UNet, reference_unet, SD15_UNET, 859_520_964, 686),
    "SD 2.1 U-Net": (UNet, reference_unet, SD21_UNET, 865_910_724, 686),
    "SD VAE": (AutoencoderKL, reference_vae, SD_VAE, 83_653_863, 248),
    "SD 1.5 text tower": (CLIPTextModel, reference_clip, SD15_CLIP, 123_060_480, 196),
    "SD 2.1 text tower": (CLIPTextModel, reference_clip, SD21_CLIP, 340_387_840, 372),
}


def published(name: str) -> torch.nn.Module:
    """Our network of that config, without memory for its weights. `flip_sin_to_cos`, ... are fixed in ours."""
    network, _, config, _, _ = PUBLISHED[name]
    with torch.device("meta"):
        return network(**{k: v for k, v in config.items() if k in inspect.signature(network).parameters})


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_gives_the_published_size(name):
    _, _, _, parameters, tensors = PUBLISHED[name]
    state = published(name).state_dict()
    assert len(state) == tensors
    assert sum(tensor.numel() for tensor in state.values()) == parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_gives_the_reference_names_shapes_and_norms(name):
    pytest.importorskip("transformers" if "text" in name else "diffusers")
    _, build, config, _, _ = PUBLISHED[name]
    with torch.device("meta"):
        theirs = build(**config)
    model = published(name)
    expected = {key: tensor.shape for key, tensor in reference_state(theirs).items()}
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == expected
    assert torch.equal(norms(model), norms(theirs))


def test_keys_that_the_sd_1_config_leaves_out_have_its_values_by_default():
    for name in ("SD 1.5 U-Net", "SD VAE", "SD 1.5 text tower"):
        with torch.device("meta"):
            default = PUBLISHED[name][0]()
        config = published(name).config
        assert {k: list(v) if isinstance(v, tuple) else v for k, v in default.config.items()} == config


# ----------------------------------------------------------------------------------------------------------
# Statements about our own interface


@torch.no_grad()
def test_scalar_timestep_and_single_context_serve_the_whole_batch():
    name = "unet_sd2_cdiffset"
    model, x = fill(ours(name), seed=2), inputs(name, seed=2)
    batch = len(x["x"])
    once = model(x["x"], 317, x["context"])
    each = model(x["x"], torch.full((batch,), 317), x["context"].repeat(batch, 1, 1))
    assert error(once, each) <= TOLERANCE
    assert error(model(x["x"], torch.tensor(317), x["context"]), each) <= TOLERANCE


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
def test_images_of_a_batch_do_not_see_each_other():
    name = "unet_sd1"
    model, x = fill(ours(name), seed=2), inputs(name, seed=2)
    t = torch.tensor([20, 900])
    together = model(x["x"], t, x["context"])
    alone = torch.cat([model(x["x"][i : i + 1], t[i], x["context"][i : i + 1]) for i in range(2)])
    assert error(alone, together) <= TOLERANCE


@torch.no_grad()
def test_text_tower_is_causal():
    name = "clip_sd2"
    model, ids = fill(ours(name), seed=2), inputs(name, seed=2)["ids"]
    other = ids.clone()
    other[:, 9] = (ids[:, 9] + 1) % 60
    before, after = model(ids), model(other)
    assert error(after[:, :9], before[:, :9]) < 1e-5
    assert error(after[:, 9:], before[:, 9:]) > 0.1


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
    calls = []
    model.mid_block.resnets[0].register_forward_hook(lambda *_: calls.append(1))
    results = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        noisy = x["x"].clone().requires_grad_()
        y = model(noisy, x["t"], x["context"])
        y.square().mean().backward()
        gradients = {key: p.grad for key, p in model.named_parameters()} | {"x": noisy.grad}
        results.append((y.detach(), gradients, len(calls)))
    (y, gradients, once), (y_again, gradients_again, in_all) = results
    assert (once, in_all) == (1, 1 + 2)
    assert error(y_again, y) < 1e-6
    for key, gradient in gradients.items():
        assert error(gradients_again[key], gradient) <= TOLERANCE, key

    with torch.no_grad():
        assert error(model(x["x"], x["t"], x["context"]), y) < 1e-6
    assert len(calls) == in_all + 1  # sampling recomputes nothing


@pytest.mark.parametrize("shape", [(1, 4, 15, 16), (1, 4, 16, 20), (4, 16, 16), (1, 4, 0, 16)])
def test_unet_refuses_sizes_that_do_not_halve_evenly(shape):
    model = ours("unet_sd1")
    assert model.unit == 8
    with pytest.raises(ValueError, match="multiples of 8"):
        model(torch.zeros(shape), 1, torch.zeros(1, 7, 24))


@pytest.mark.parametrize("shape", [(1, 3, 30, 32), (1, 3, 32, 33), (3, 32, 32), (1, 3, 32, 0)])
def test_vae_refuses_sizes_that_do_not_halve_evenly(shape):
    model = ours("vae_sd")
    assert model.factor == 8
    with pytest.raises(ValueError, match="multiples of 8"):
        model.encode(torch.zeros(shape))


def test_size_units_follow_the_number_of_levels():
    assert (ours("unet_two_levels").unit, ours("unet_three_levels").unit) == (2, 4)
    assert (ours("vae_two_levels").factor, ours("vae_three_levels_without_attention").factor) == (2, 4)

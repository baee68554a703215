"""Variance, loss, channel surgery, conditioning and translation do what the paper's formulas and our contracts say."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from record_golden import CLIPS, fill, reference_clip
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cdiffset import (
    PROMPT_IDS,
    CDiffSET,
    add_variance_channel,
    cdiff_loss,
    denoise,
    initial_noise,
    pad_to_multiple,
    variance,
    widen_input,
)
from clip import CLIPTextModel
from common import write_json
from scheduler import DDPMScheduler
from unet import UNet
from vae import AutoencoderKL
from weights import save_model, save_tensors

# ----------------------------------------------------------------------------------------------------------
# Small models


def small_unet(in_channels: int = 8, out_channels: int = 5, levels: int = 2, seed: int = 0) -> UNet:
    blocks = {
        "block_out_channels": [16] * levels,
        "down_block_types": ["DownBlock2D"] * (levels - 1) + ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"] + ["UpBlock2D"] * (levels - 1),
    }
    rest = {"layers_per_block": 1, "attention_head_dim": 2, "cross_attention_dim": 24, "norm_num_groups": 4}
    return fill(UNet(in_channels, out_channels, **blocks, **rest), seed)


def small_model(in_channels=8, out_channels=5, levels=2, prediction_type="epsilon") -> CDiffSET:
    """All weights random. Sides are multiples of 4 with two levels, of SD's 64 with four."""
    vae = AutoencoderKL(block_out_channels=[16] * levels, layers_per_block=1, norm_num_groups=4, scaling_factor=0.3)
    prompt = torch.randn(1, 6, 24, generator=torch.Generator().manual_seed(2))
    unet = small_unet(in_channels, out_channels, levels)
    return CDiffSET(fill(vae, seed=1), unet, prompt, DDPMScheduler(prediction_type=prediction_type))


def images(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.rand((count, 3, height, width), generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture
def base(tmp_path):
    """A folder with a small text-to-image model: 4 channels in, 4 out."""
    model = small_model(4, 4)
    save_model(tmp_path / "base", model.vae, model.unet, model.scheduler, model.prompt_embedding)
    return tmp_path / "base"


# ----------------------------------------------------------------------------------------------------------
# The variance


def test_zero_raw_variance_means_variance_one():
    assert torch.allclose(variance(torch.zeros(3)), torch.ones(3), rtol=0, atol=1e-6)
    assert abs(variance(torch.zeros((), dtype=torch.float64)).item() - 1) < 1e-12


def test_variance_stays_between_1e_6_and_10():
    raw = torch.tensor([-torch.inf, -1e30, -1e4, -20.0, 0.0, 5.0, 9.0, 1e4, 1e30, torch.inf])
    var = variance(raw)
    assert var.min().item() == pytest.approx(1e-6) and var.max().item() == 10
    assert var[0] == var[2] and var[-1] == var[-3] == 10
    assert bool((var.diff() >= 0).all())


def test_variance_is_a_shifted_softplus():
    raw = torch.linspace(-12, 9, 301, dtype=torch.float64)
    shift = math.log(math.exp(1 - 1e-6) - 1)
    expected = np.log1p(np.exp(raw.numpy() + shift)) + 1e-6
    assert np.allclose(variance(raw).numpy(), expected, rtol=1e-12)
    assert np.allclose(variance(raw.float()).numpy(), expected, rtol=2e-6)


# ----------------------------------------------------------------------------------------------------------
# The loss


def loss_inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """prediction, raw variance (in the middle of its range), target, alphas_cumprod_t, float32."""
    g = torch.Generator().manual_seed(seed)
    a = DDPMScheduler().alphas_cumprod[torch.tensor([0, 250, 980])]
    shapes = (3, 4, 6, 5), (3, 1, 6, 5), (3, 4, 6, 5)
    return *(torch.randn(shape, generator=g) for shape in shapes), a


def loss_by_hand(prediction, raw, target, a) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loss and gradients (prediction, raw variance) in float64; the weight var^beta counts as a constant."""
    p, r, e, a = (x.double().numpy() for x in (prediction, raw, target, a))
    shifted = r + np.log(np.exp(1 - 1e-6) - 1)
    var = np.log(1 + np.exp(shifted)) + 1e-6
    weight = var ** np.sqrt(a).reshape(-1, 1, 1, 1)
    loss = np.mean(weight * 0.5 * ((e - p) ** 2 / var + np.log(var) + np.log(2 * np.pi)))
    of_prediction = weight * (p - e) / var / p.size
    of_variance = weight * 0.5 * (1 / var - (e - p) ** 2 / var**2) / p.size
    of_raw = of_variance.sum(axis=1, keepdims=True) / (1 + np.exp(-shifted))
    return loss, of_prediction, of_raw


def gradients(loss, *inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    value = loss(*inputs)
    return value.detach(), torch.autograd.grad(value, inputs)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_loss_and_gradients_are_those_of_the_formula(dtype, tolerance):
    """Each image with the weight of its own timestep, through which no gradient flows."""
    p, raw, e, a = (x.to(dtype) for x in loss_inputs())
    value, grads = gradients(lambda p, raw: cdiff_loss(p, raw, e, a), p, raw)
    expected, *expected_grads = loss_by_hand(p, raw, e, a)
    assert value.shape == () and abs(value.item() - expected) <= tolerance * abs(expected)
    for actual, by_hand in zip(grads, expected_grads):
        assert np.abs(actual.double().numpy() - by_hand).max() <= tolerance * np.abs(by_hand).max()


def test_at_the_clean_end_or_at_zero_raw_variance_the_prediction_learns_from_half_of_l2():
    p, raw, e, a = loss_inputs()
    l2, (half,) = gradients(lambda p: 0.5 * F.mse_loss(p, e), p)
    _, (clean,) = gradients(lambda p: cdiff_loss(p, raw, e, torch.ones(3)), p)
    assert torch.allclose(clean, half, rtol=1e-5, atol=1e-9)
    _, (at_0,) = gradients(lambda p: cdiff_loss(p, raw, e, a[:1].expand(3)), p)  # sqrt(alphas_cumprod[0]) = 0.9996
    assert torch.allclose(at_0, half, rtol=5e-3)
    value, (zero_raw,) = gradients(lambda p: cdiff_loss(p, torch.zeros(3, 1, 6, 5), e, a), p)
    assert torch.allclose(zero_raw, half, rtol=1e-5, atol=1e-9)
    assert value.item() == pytest.approx(l2.item() + 0.5 * math.log(2 * math.pi), rel=1e-6)


def test_the_best_variance_is_the_mean_squared_error():
    p, _, e, a = (x.double() for x in loss_inputs())
    e = p + 0.7 * (e - p)  # within the variance's range
    error = ((e - p) ** 2).mean(dim=1, keepdim=True)
    best = torch.log(torch.expm1(error - 1e-6)) - math.log(math.expm1(1 - 1e-6))
    assert torch.allclose(variance(best), error)
    _, (at_best,) = gradients(lambda raw: cdiff_loss(p, raw, e, a), best)
    _, (above,) = gradients(lambda raw: cdiff_loss(p, raw, e, a), best + 0.1)
    assert at_best.abs().max() < 1e-12 < 1e-6 < above.min()


# ----------------------------------------------------------------------------------------------------------
# Channel surgery and conditioning


def test_a_widened_input_layer_repeats_the_old_one_on_the_same_latent_twice():
    unet = small_unet(4, 4)
    z, old = torch.randn(2, 4, 8, 12), unet.conv_in
    expected, bias = old(z), old.bias.clone()
    widen_input(unet)
    assert torch.allclose(unet.conv_in(torch.cat([z, z], dim=1)), expected, atol=1e-6)
    assert torch.equal(unet.conv_in.bias, bias)
    sar, eo = unet.conv_in.weight.chunk(2, dim=1)
    assert torch.equal(sar, eo) and torch.equal(sar, old.weight / 2)
    assert unet.config["in_channels"] == 8 and unet.conv_in.weight.requires_grad


def test_a_variance_channel_leaves_the_four_others_and_starts_at_one():
    unet, context = small_unet(8, 4), torch.randn(1, 6, 24)
    x = torch.randn(2, 8, 8, 12)
    expected = unet(x, 500, context)
    add_variance_channel(unet)
    output = unet(x, 500, context)
    assert output.shape == (2, 5, 8, 12) and unet.config["out_channels"] == 5
    assert torch.allclose(output[:, :4], expected, atol=1e-6)
    assert torch.equal(output[:, 4:], torch.zeros(2, 1, 8, 12))
    assert torch.allclose(variance(output[:, 4:]), torch.ones(2, 1, 8, 12))


def test_training_reaches_every_channel_after_the_surgery():
    unet = small_unet(4, 4)
    widen_input(unet)
    add_variance_channel(unet)
    z = torch.randn(2, 4, 8, 8)
    prediction, raw = denoise(unet, torch.randn(2, 4, 8, 8), z, torch.tensor([10, 900]), torch.randn(1, 6, 24))
    cdiff_loss(prediction, raw, torch.randn(2, 4, 8, 8), torch.tensor([0.9, 0.1])).backward()
    assert set(unet.state_dict()) == {name for name, p in unet.named_parameters() if p.grad is not None}
    for weight in (unet.conv_in.weight.grad.transpose(0, 1), unet.conv_out.weight.grad):
        assert all(channel.abs().max() > 0 for channel in weight)


def test_denoise_puts_the_sar_latent_first_and_splits_the_output():
    z_sar, z_t, context = torch.full((2, 4, 8, 8), 1.0), torch.full((2, 4, 8, 8), 2.0), torch.randn(1, 6, 24)
    seen = []

    def unet(outputs):
        def call(x, t, context):
            seen.append((x, t, context))
            return torch.arange(outputs).reshape(1, -1, 1, 1).expand(2, -1, 8, 8)

        return call

    prediction, raw = denoise(unet(5), z_sar, z_t, 7, context)
    x, t, c = seen[0]
    assert torch.equal(x, torch.cat([z_sar, z_t], dim=1)) and t == 7 and c is context
    assert prediction[0, :, 0, 0].tolist() == [0, 1, 2, 3] and raw[0, :, 0, 0].tolist() == [4]
    assert denoise(unet(4), z_sar, z_t, 7, context)[1] is None


# ----------------------------------------------------------------------------------------------------------
# Loading


@pytest.mark.parametrize("variance_channel", [True, False])
def test_a_base_model_gets_the_surgery_and_says_so(base, variance_channel):
    """Without the variance channel for stage 1 of the training."""
    model, before = CDiffSET.from_pretrained(base, variance_channel=variance_channel), small_unet(4, 4)
    assert model.from_base and model.has_variance == variance_channel
    assert (model.unet.conv_in.in_channels, model.unet.conv_out.out_channels) == (8, 4 + variance_channel)
    z = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        prediction, raw = denoise(model.unet, z, z, 300, model.prompt_embedding)
        assert torch.allclose(prediction, before(z, 300, model.prompt_embedding), atol=1e-4)
    assert torch.equal(raw, torch.zeros(1, 1, 8, 8)) if variance_channel else raw is None


@pytest.mark.parametrize("outputs", [5, 4])
def test_a_cdiffset_model_is_taken_as_it_is(tmp_path, outputs):
    saved = small_model(8, outputs)
    saved.save_pretrained(tmp_path)
    model = CDiffSET.from_pretrained(tmp_path)
    assert not model.from_base and not model.training
    states = model.state_dict(), saved.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert all(p.requires_grad for p in model.unet.parameters()) and not model.prompt_embedding.requires_grad


def test_a_saved_base_model_after_surgery_loads_as_a_cdiffset_model(base, tmp_path):
    CDiffSET.from_pretrained(base).save_pretrained(tmp_path / "mine")
    model = CDiffSET.from_pretrained(tmp_path / "mine")
    assert (model.unet.config["in_channels"], model.unet.config["out_channels"]) == (8, 5) and not model.from_base


def test_a_released_unet_takes_the_place_of_the_base_models(base, tmp_path):
    released = small_unet(8, 5, seed=4)
    save_file({f"module.{key}": tensor for key, tensor in released.state_dict().items()}, tmp_path / "m.safetensors")
    model = CDiffSET.from_pretrained(base, unet=tmp_path / "m.safetensors")
    assert not model.from_base
    assert all(torch.equal(a, b) for a, b in zip(model.unet.state_dict().values(), released.state_dict().values()))


@pytest.mark.parametrize("channels", [(4, 5), (9, 4), (8, 6), (8, 8), (4, 8)])
def test_other_channels_are_refused(tmp_path, channels):
    small_model(*channels).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{channels[0]} input and {channels[1]} output channels") as error:
        CDiffSET.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_is_loaded_in_the_precision_asked_for(tmp_path, dtype):
    small_model().save_pretrained(tmp_path)
    model = CDiffSET.from_pretrained(tmp_path, dtype=dtype)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype}


def test_the_prediction_type_is_the_folders_unless_told_otherwise(tmp_path):
    small_model(prediction_type="v_prediction").save_pretrained(tmp_path)
    assert CDiffSET.from_pretrained(tmp_path).scheduler.prediction_type == "v_prediction"
    assert CDiffSET.from_pretrained(tmp_path, prediction_type="epsilon").scheduler.prediction_type == "epsilon"


def write_text_encoder(folder, **config) -> dict:
    """A text encoder in place of the prompt embedding. Returns its configuration."""
    config = CLIPS["clip_sd1"][0] | {"vocab_size": 49408, "hidden_size": 24, "max_position_embeddings": 77} | config
    write_json(folder / "text_encoder" / "config.json", config)
    save_tensors(folder / "text_encoder" / "model.safetensors", fill(CLIPTextModel(**config), seed=3).state_dict())
    (folder / "prompt_embedding.safetensors").unlink(missing_ok=True)
    return config


def test_the_prompt_embedding_is_what_transformers_makes_of_electro_optical_image(base):
    pytest.importorskip("transformers")
    assert PROMPT_IDS == (49406, 23244, 268, 16822, 2867, 49407)
    config = write_text_encoder(base)
    reference = reference_clip(**config)
    names = {name.removeprefix("text_model."): name for name in reference.state_dict()}
    ours = fill(CLIPTextModel(**config), seed=3).state_dict()
    reference.load_state_dict({names[key]: tensor for key, tensor in ours.items()}, strict=True)
    with torch.no_grad():
        expected = reference.eval()(torch.tensor([PROMPT_IDS])).last_hidden_state
    model = CDiffSET.from_pretrained(base)
    assert model.prompt_embedding.shape == (1, 6, 24)
    assert (model.prompt_embedding - expected).abs().max() <= 1e-4 * expected.std()
    assert not model.prompt_embedding.is_inference()  # training uses it


def test_a_model_trained_from_a_text_encoder_needs_it_no_more(base, tmp_path):
    write_text_encoder(base)
    model = CDiffSET.from_pretrained(base)
    model.save_pretrained(tmp_path / "mine")
    assert not (tmp_path / "mine" / "text_encoder").exists()
    assert torch.equal(CDiffSET.from_pretrained(tmp_path / "mine").prompt_embedding, model.prompt_embedding)


def test_a_text_encoder_of_another_width_is_refused(base):
    write_text_encoder(base, hidden_size=32)
    with pytest.raises(
        ValueError, match=r"shape \(1, 6, 32\), but the U-Net's cross-attention needs \(1, tokens, 24\)"
    ):
        CDiffSET.from_pretrained(base)


@pytest.mark.parametrize("config", [{"vocab_size": 100}, {"max_position_embeddings": 5}])
def test_a_text_encoder_too_small_for_the_prompt_is_refused(base, config):
    write_text_encoder(base, **config)
    with pytest.raises(ValueError, match="text_encoder.*not CLIP's"):
        CDiffSET.from_pretrained(base)


# ----------------------------------------------------------------------------------------------------------
# Latents


def test_encoding_is_the_scaled_posterior_mean_and_decoding_undoes_the_scale():
    model = small_model()
    image = images(2, 12, 20)
    with torch.no_grad():
        z = model.encode(image)
        assert z.shape == (2, 4, 6, 10)
        assert torch.equal(z, model.vae.encode(image)[0] * 0.3)
        assert torch.equal(z, model.encode(image))  # no sampling
        assert torch.equal(model.decode(z), model.vae.decode(z / 0.3))


@pytest.mark.parametrize("levels, unit", [(2, 4), (4, 64)])
def test_sides_are_padded_to_the_vaes_factor_times_the_unets(levels, unit):
    assert small_model(levels=levels).unit == unit


@pytest.mark.parametrize("height, width", [(64, 128), (63, 65), (8, 9), (33, 32), (130, 9), (1, 40)])
def test_padding_reflects_and_repeats_the_edge_where_it_cannot(height, width):
    image = images(2, height, width)
    pads = [-height % 64, -width % 64]
    expected = image.numpy()
    for axis, pad in enumerate(pads, start=2):
        amount = [(0, pad if i == axis else 0) for i in range(4)]
        expected = np.pad(expected, amount, mode="reflect" if pad < image.shape[axis] else "edge")
    padded = pad_to_multiple(image, 64)
    assert padded.shape[2] % 64 == padded.shape[3] % 64 == 0
    assert np.array_equal(padded.numpy(), expected)


# ----------------------------------------------------------------------------------------------------------
# Translation


def translate_by_hand(
    model: CDiffSET, sar: Tensor, timesteps: list[int], seeds: list[int], unit: int
) -> tuple[Tensor, Tensor]:
    """The contract in one function: padding by numpy, DDIM in float64, the networks ours."""
    height, width = sar.shape[2:]
    pads = [(0, 0), (0, 0), (0, -height % unit), (0, -width % unit)]
    for axis in (2, 3):
        amount = [pads[axis] if i == axis else (0, 0) for i in range(4)]
        mode = "reflect" if pads[axis][1] < sar.shape[axis] else "edge"
        sar = torch.from_numpy(np.pad(sar.numpy(), amount, mode=mode))
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, dim=0)
    z_sar = model.vae.encode(sar)[0] * model.vae.config["scaling_factor"]
    noise = [torch.randn((1, *z_sar.shape[1:]), generator=torch.Generator("cpu").manual_seed(s)) for s in seeds]
    z = torch.cat(noise).double()
    for i, t in enumerate(timesteps):
        output = model.unet(torch.cat([z_sar, z.float()], dim=1), t, model.prompt_embedding).double()
        if i == len(timesteps) // 2:
            raw = output[:, 4:] + math.log(math.exp(1 - 1e-6) - 1)
            confidence = 1 / (torch.log(1 + raw.exp()) + 1e-6).clamp(1e-6, 10)
        a, a_next = alphas[t], alphas[timesteps[i + 1] if i + 1 < len(timesteps) else 0]
        p, kind = output[:, :4], model.scheduler.prediction_type
        if kind == "epsilon":
            epsilon, x0 = p, (z - (1 - a) ** 0.5 * p) / a**0.5
        elif kind == "sample":
            epsilon, x0 = (z - a**0.5 * p) / (1 - a) ** 0.5, p
        else:
            epsilon, x0 = a**0.5 * p + (1 - a) ** 0.5 * z, a**0.5 * z - (1 - a) ** 0.5 * p
        z = a_next**0.5 * x0 + (1 - a_next) ** 0.5 * epsilon
    eo = model.vae.decode(z.float() / model.vae.config["scaling_factor"]).clamp(-1, 1)
    confidence = F.interpolate(confidence.float(), size=sar.shape[2:], mode="bicubic")
    return eo[:, :, :height, :width], confidence[:, :, :height, :width]


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype == torch.float32
    assert (actual - expected).abs().max() <= tolerance * max(1, expected.abs().max())


LEADING = {1: [1], 3: [667, 334, 1], 4: [751, 501, 251, 1], 5: [801, 601, 401, 201, 1]}
TRAILING = {1: [999], 3: [999, 666, 332], 4: [999, 749, 499, 249]}


@pytest.mark.parametrize("height, width", [(64, 64), (8, 8), (9, 130), (65, 63), (33, 100)])
def test_translation_of_any_size_is_the_contracts(height, width):
    model, sar = small_model(levels=4), images(2, height, width)
    eo, confidence = model.translate(sar, steps=3, seed=11)
    assert eo.shape == (2, 3, height, width) and confidence.shape == (2, 1, height, width)
    with torch.no_grad():
        expected = translate_by_hand(model, sar, LEADING[3], [11, 12], unit=64)
    assert_near(eo, expected[0])
    assert_near(confidence, expected[1])
    assert eo.abs().max() <= 1 and eo.std() > 0.1  # not all clamped, not all grey


@pytest.mark.parametrize(
    "spacing, timesteps", [*(("leading", t) for t in LEADING.values()), *(("trailing", t) for t in TRAILING.values())]
)
def test_translation_takes_the_steps_of_both_spacings(spacing, timesteps):
    model, sar = small_model(), images(1, 17, 22)
    eo, confidence = model.translate(sar, steps=len(timesteps), seed=3, spacing=spacing)
    with torch.no_grad():
        expected = translate_by_hand(model, sar, timesteps, [3], unit=4)
    assert_near(eo, expected[0])
    assert_near(confidence, expected[1])


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_translation_follows_the_models_prediction_type(prediction_type):
    model, sar = small_model(prediction_type=prediction_type), images(1, 16, 12)
    with torch.no_grad():
        expected = translate_by_hand(model, sar, LEADING[4], [0], unit=4)
    assert_near(model.translate(sar, steps=4)[0], expected[0])


def test_the_papers_fifty_steps_are_the_default():
    model, calls = small_model(), []
    model.unet.register_forward_hook(lambda module, inputs, output: calls.append((inputs, output)))
    sar = images(1, 16, 24)
    eo, confidence = model.translate(sar)
    assert [int(inputs[1]) for inputs, _ in calls] == list(range(981, 0, -20))
    with torch.inference_mode():
        z_sar = model.encode(sar)
        assert all(torch.equal(inputs[0][:, :4], z_sar) for inputs, _ in calls)
        assert torch.equal(calls[0][0][0][:, 4:], initial_noise(0, (4, 8, 12)))
        middle = 1 / variance(calls[25][1][:, 4:])
        assert torch.equal(confidence, F.interpolate(middle, size=(16, 24), mode="bicubic", align_corners=False))


def test_an_image_alone_or_in_a_batch_gives_the_same_pixels():
    model, sar = small_model(levels=4), images(3, 40, 70)
    eo, confidence = model.translate(sar, steps=4, seed=5)
    for i in range(3):
        alone = model.translate(sar[i : i + 1], steps=4, seed=5 + i)
        assert (alone[0] - eo[i : i + 1]).abs().max() <= 2e-5
        assert (alone[1] - confidence[i : i + 1]).abs().max() <= 2e-5 * confidence.abs().max()


def test_each_image_has_its_own_seed():
    model, sar = small_model(), images(1, 16, 16).expand(4, -1, -1, -1)
    eo, _ = model.translate(sar, steps=2, seed=[7, 8, 7, -1])
    assert (eo[0] - eo[2]).abs().max() <= 2e-5 < 0.05 < (eo[0] - eo[1]).abs().max()
    assert_near(eo[:2], model.translate(sar[:2], steps=2, seed=7)[0])
    assert_near(eo[3:], model.translate(sar[:1], steps=2, seed=-1)[0])


def test_noise_is_the_cpu_generators_whatever_happened_before():
    expected = torch.randn((1, 4, 5, 6), generator=torch.Generator("cpu").manual_seed(42), dtype=torch.float32)
    torch.manual_seed(1)
    assert torch.equal(initial_noise(42, (4, 5, 6)), expected)
    model, sar = small_model(), images(1, 8, 8)
    translation = model.translate(sar, steps=1)
    torch.rand(5)
    assert torch.equal(model.translate(sar, steps=1)[0], translation[0])


def test_a_translation_leaves_the_random_state_and_the_model_alone():
    model = small_model()
    state, before = torch.get_rng_state(), {key: t.clone() for key, t in model.state_dict().items()}
    sar = images(1, 9, 9)
    copy = sar.clone()
    model.translate(sar, steps=2)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(sar, copy)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_a_model_without_variance_channel_translates_without_confidence():
    model, sar = small_model(8, 4), images(2, 13, 9)
    eo, confidence = model.translate(sar, steps=2)
    assert eo.shape == sar.shape and confidence is None


def test_confidence_is_one_over_the_variance_also_at_its_bounds():
    for raw, expected in ((-1e4, 1e6), (0.0, 1.0), (1e4, 0.1)):
        model = small_model()
        with torch.no_grad():
            model.unet.conv_out.weight[4] = 0
            model.unet.conv_out.bias[4] = raw
        _, confidence = model.translate(images(1, 10, 10), steps=1)
        assert torch.allclose(confidence, torch.full((1, 1, 10, 10), expected), rtol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_stays_near_float32(dtype, tolerance):
    model, sar = small_model(), images(1, 21, 16)
    eo, confidence = model.translate(sar, steps=4)
    half_eo, half_confidence = model.to(dtype).translate(sar, steps=4)
    assert half_eo.dtype == half_confidence.dtype == torch.float32
    assert (half_eo - eo).abs().mean() <= tolerance
    assert ((half_confidence - confidence).abs() / confidence.abs().mean()).mean() <= 2 * tolerance


def test_images_of_any_float_type_are_translated_alike_and_progress_sees_the_timesteps():
    model, sar, seen = small_model(), images(1, 8, 12), []
    double = model.translate(sar.double(), steps=4, progress=lambda timesteps: seen.extend(timesteps) or timesteps)
    assert_near(double[0], model.translate(sar, steps=4)[0])
    assert seen == LEADING[4]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_noise_error_is_that_of_the_prediction_and_comes_with_the_expected_variance(prediction_type):
    model, t, seeds = small_model(prediction_type=prediction_type), torch.tensor([10, 900]), [5, 9]
    z_sar, z_eo = torch.randn(2, 2, 4, 8, 6, generator=torch.Generator().manual_seed(0))
    error, expected = model.noise_error(z_sar, z_eo, t, seeds)
    noise = torch.cat([initial_noise(seed, (4, 8, 6)) for seed in seeds])
    a = model.scheduler.alphas_cumprod[t].reshape(2, 1, 1, 1)
    z_t, velocity = a.sqrt() * z_eo + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * z_eo
    with torch.no_grad():
        output = model.unet(torch.cat([z_sar, z_t], dim=1), t, model.prompt_embedding)
    target = {"epsilon": noise, "v_prediction": velocity, "sample": z_eo}[prediction_type]
    assert_near(error, ((output[:, :4] - target) ** 2).mean(dim=1, keepdim=True))
    assert_near(expected, variance(output[:, 4:]))
    assert small_model(8, 4).noise_error(z_sar, z_eo, t, seeds)[1] is None


@pytest.mark.parametrize(
    "shape", [(1, 1, 16, 16), (1, 4, 16, 16), (3, 16, 16), (1, 3, 7, 16), (1, 3, 16, 7), (0, 3, 8, 8)]
)
def test_images_that_cannot_be_are_refused(shape):
    with pytest.raises(ValueError, match="expected"):
        small_model().translate(torch.zeros(shape))


SETTINGS = [{"steps": 0}, {"steps": -1}, {"steps": 1001}, {"spacing": "linspace"}]


@pytest.mark.parametrize("arguments", [*SETTINGS, {"seed": [1, 2]}, {"seed": []}, {"seed": 2**64}])
def test_settings_that_cannot_be_are_refused(arguments):
    with pytest.raises(ValueError):
        small_model().translate(images(1, 8, 8), **arguments)


# ----------------------------------------------------------------------------------------------------------
# Devices: `meta`, which computes nothing, stands for a GPU


class SameDevice(TorchDispatchMode):
    """Fails if an operation gets tensors of two devices, as on a GPU; `meta` itself does not check all operations."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        devices = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim}
        assert len(devices) < 2 or operation is torch.ops.aten.copy_.default, f"{operation} on {devices}"
        return operation(*args, **(kwargs or {}))


def train_step(model: CDiffSET, z_sar: Tensor, z_eo: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    z_t = model.scheduler.add_noise(z_eo, noise, t)
    prediction, raw = denoise(model.unet, z_sar, z_t, t.to(z_eo.device), model.prompt_embedding)
    target = model.scheduler.target(z_eo, noise, t)
    loss = cdiff_loss(prediction, raw, target, model.scheduler.alphas_cumprod[t].to(target))
    loss.backward()
    return loss


PATHS = {
    "translate": lambda model, z, t: model.translate(torch.zeros(2, 3, 9, 10, device="meta"), steps=3)[0],
    "confidence": lambda model, z, t: model.translate(torch.zeros(2, 3, 9, 10, device="meta"), steps=3)[1],
    "translate from the CPU": lambda model, z, t: model.translate(torch.zeros(2, 3, 9, 10), steps=3)[0],
    "noise_error": lambda model, z, t: model.noise_error(z, z, t, [1, 2])[0],
    "noise_error at one timestep": lambda model, z, t: model.noise_error(z, z, 500, [1, 2])[1],
    "training": lambda model, z, t: train_step(model, z, z, torch.zeros_like(z), t),
}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("path", PATHS)
def test_no_tensor_is_left_on_another_device(path, prediction_type):
    model = small_model(prediction_type=prediction_type).to("meta")
    z, t = torch.zeros(2, 4, 8, 6, device="meta"), torch.tensor([10, 900])
    with SameDevice():
        assert PATHS[path](model, z, t).device.type == "meta"
        model.unet.conv_in.bias = torch.nn.Parameter(torch.zeros(16))
        with pytest.raises(AssertionError, match="conv"):
            PATHS[path](model, z, t)

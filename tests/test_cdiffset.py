"""Variance, loss, channel surgery, conditioning and translation do what the paper's formulas and our contracts say."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from record_golden import CLIPS, fill, reference
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cdiffset import PROMPT_IDS, CDiffSET, cdiff_loss, denoise, initial_noise, variance
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


def test_variance_is_a_shifted_softplus_between_1e_6_and_10():
    raw = torch.tensor([-torch.inf, -1e30, *torch.linspace(-14, 14, 301).tolist(), 1e30, torch.inf]).double()
    shift = math.log(math.exp(1 - 1e-6) - 1)
    expected = np.clip(np.logaddexp(0, raw.numpy() + shift) + 1e-6, 1e-6, 10)
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


# ----------------------------------------------------------------------------------------------------------
# Channel surgery, loading


@pytest.mark.parametrize("variance_channel", [True, False])
def test_a_base_model_gets_the_surgery_and_computes_what_it_did(base, tmp_path, variance_channel):
    """Given the same latent twice, and variance 1. Stage 1 of the training has no variance channel."""
    model, before = CDiffSET.from_pretrained(base, variance_channel=variance_channel), small_unet(4, 4)
    assert model.from_base and model.has_variance == variance_channel
    for half in model.unet.conv_in.weight.chunk(2, dim=1):
        assert torch.equal(half, before.conv_in.weight / 2)
    z = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        prediction, raw = denoise(model.unet, z, z, 300, model.prompt_embedding)
        assert torch.allclose(prediction, before(z, 300, model.prompt_embedding), atol=1e-4)
    assert torch.equal(raw, torch.zeros(1, 1, 8, 8)) if variance_channel else raw is None
    model.save_pretrained(tmp_path / "mine")
    again = CDiffSET.from_pretrained(tmp_path / "mine")
    assert not again.from_base and again.unet.config == model.unet.config


def test_training_reaches_every_channel_after_the_surgery(base):
    model, (z_sar, z_t, target) = CDiffSET.from_pretrained(base), torch.randn(3, 2, 4, 8, 8)
    unet = model.unet
    prediction, raw = denoise(unet, z_sar, z_t, torch.tensor([10, 900]), model.prompt_embedding)
    cdiff_loss(prediction, raw, target, torch.tensor([0.9, 0.1])).backward()
    assert set(unet.state_dict()) == {name for name, p in unet.named_parameters() if p.grad is not None}
    for weight in (unet.conv_in.weight.grad.transpose(0, 1), unet.conv_out.weight.grad):
        assert all(channel.abs().max() > 0 for channel in weight)


@pytest.mark.parametrize("channels", [(4, 5), (9, 4), (8, 6), (8, 8), (4, 8)])
def test_other_channels_are_refused(tmp_path, channels):
    small_model(*channels).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}.*{channels[0]} input and {channels[1]} output channels"):
        CDiffSET.from_pretrained(tmp_path)


def write_text_encoder(folder, **config) -> dict:
    """A text encoder in place of the prompt embedding. Returns its configuration."""
    config = CLIPS["clip_sd1"][0] | {"vocab_size": 49408, "hidden_size": 24, "max_position_embeddings": 77} | config
    write_json(folder / "text_encoder" / "config.json", config)
    save_tensors(folder / "text_encoder" / "model.safetensors", fill(CLIPTextModel(**config), seed=3).state_dict())
    (folder / "prompt_embedding.safetensors").unlink(missing_ok=True)
    return config


def test_the_prompt_embedding_is_what_transformers_makes_of_electro_optical_image(base, tmp_path):
    pytest.importorskip("transformers")
    assert PROMPT_IDS == (49406, 23244, 268, 16822, 2867, 49407)
    config = write_text_encoder(base)
    theirs = reference("clip", **config)
    names = {name.removeprefix("text_model."): name for name in theirs.state_dict()}
    ours = fill(CLIPTextModel(**config), seed=3).state_dict()
    theirs.load_state_dict({names[key]: tensor for key, tensor in ours.items()}, strict=True)
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor([PROMPT_IDS])).last_hidden_state
    model = CDiffSET.from_pretrained(base)
    assert model.prompt_embedding.shape == (1, 6, 24)
    assert (model.prompt_embedding - expected).abs().max() <= 1e-4 * expected.std()
    assert not model.prompt_embedding.is_inference()  # training uses it
    model.save_pretrained(tmp_path / "mine")  # which needs no text encoder
    assert torch.equal(CDiffSET.from_pretrained(tmp_path / "mine").prompt_embedding, model.prompt_embedding)


TEXT_ENCODERS = [
    ({"hidden_size": 32}, r"shape \(1, 6, 32\), but the U-Net's cross-attention needs \(1, tokens, 24\)"),
    ({"vocab_size": 100}, "text_encoder.*not CLIP's"),
    ({"max_position_embeddings": 5}, "text_encoder.*not CLIP's"),
]


@pytest.mark.parametrize("config, message", TEXT_ENCODERS)
def test_a_text_encoder_that_does_not_fit_the_unet_or_the_prompt_is_refused(base, config, message):
    write_text_encoder(base, **config)
    with pytest.raises(ValueError, match=message):
        CDiffSET.from_pretrained(base)


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
    confidence = F.interpolate(confidence.float(), size=sar.shape[2:], mode="bicubic").clamp(min=1 / 10)
    return eo[:, :, :height, :width], confidence[:, :, :height, :width]


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype == torch.float32
    assert (actual - expected).abs().max() <= tolerance * max(1, expected.abs().max())


# height, width, levels, prediction type, spacing, timesteps. Sides are padded to multiples of 64 with four levels, of 4
# with two: by reflection, and by the edge where a side is too short to reflect.
CASES = [
    (64, 64, 4, "epsilon", "leading", [667, 334, 1]),
    (8, 8, 4, "epsilon", "leading", [667, 334, 1]),
    (9, 130, 4, "epsilon", "trailing", [999, 666, 332]),
    (65, 63, 4, "epsilon", "leading", [667, 334, 1]),
    (33, 100, 4, "epsilon", "leading", [667, 334, 1]),
    (17, 22, 2, "epsilon", "leading", [1]),
    (17, 22, 2, "epsilon", "trailing", [999]),
    (17, 22, 2, "epsilon", "leading", [801, 601, 401, 201, 1]),
    (17, 22, 2, "v_prediction", "leading", [751, 501, 251, 1]),
    (16, 12, 2, "sample", "trailing", [999, 749, 499, 249]),
]


@pytest.mark.parametrize("height, width, levels, prediction_type, spacing, timesteps", CASES)
def test_translation_is_the_contracts(height, width, levels, prediction_type, spacing, timesteps):
    model, sar = small_model(levels=levels, prediction_type=prediction_type), images(2, height, width)
    eo, confidence = model.translate(sar, steps=len(timesteps), seed=11, spacing=spacing)
    assert eo.shape == (2, 3, height, width) and confidence.shape == (2, 1, height, width)
    with torch.no_grad():
        expected = translate_by_hand(model, sar, timesteps, [11, 12], unit=64 if levels == 4 else 4)
    assert_near(eo, expected[0])
    assert_near(confidence, expected[1])
    assert eo.abs().max() <= 1 and eo.std() > 0.1  # not all clamped, not all grey


def test_the_papers_fifty_steps_are_the_default_and_progress_sees_the_timesteps():
    model, sar, seen = small_model(), images(1, 16, 24), []
    eo, confidence = model.translate(sar, progress=lambda timesteps: seen.extend(timesteps) or timesteps)
    assert seen == list(range(981, 0, -20))
    with torch.no_grad():
        expected = translate_by_hand(model, sar, seen, [0], unit=4)
    assert_near(eo, expected[0])
    assert_near(confidence, expected[1])


def test_an_image_with_its_seed_gives_the_same_pixels_alone_or_in_a_batch():
    model, sar, seeds = small_model(levels=4), images(3, 40, 70), [7, -1, 7]
    eo, confidence = model.translate(sar, steps=4, seed=seeds)
    for i, seed in enumerate(seeds):
        alone = model.translate(sar[i : i + 1], steps=4, seed=seed)
        assert_near(alone[0], eo[i : i + 1])
        assert_near(alone[1], confidence[i : i + 1])
    assert (model.translate(sar[:1], steps=4, seed=8)[0] - eo[:1]).abs().max() > 0.05


def test_a_translation_neither_sees_nor_changes_the_random_state_the_image_and_the_model():
    model, sar = small_model(), images(1, 9, 9)
    copy, before = sar.clone(), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    torch.manual_seed(1)
    state, first = torch.get_rng_state(), model.translate(sar, steps=2)[0]
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(sar, copy)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    torch.manual_seed(2)
    assert torch.equal(model.translate(sar, steps=2)[0], first)
    assert_near(model.translate(sar.double(), steps=2)[0], first)


def test_a_model_without_variance_channel_translates_without_confidence():
    model, sar = small_model(8, 4), images(2, 13, 9)
    eo, confidence = model.translate(sar, steps=2)
    assert eo.shape == sar.shape and confidence is None


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_stays_near_float32(dtype, tolerance):
    model, sar = small_model(), images(1, 21, 16)
    eo, confidence = model.translate(sar, steps=4)
    half_eo, half_confidence = model.to(dtype).translate(sar, steps=4)
    assert half_eo.dtype == half_confidence.dtype == torch.float32
    assert (half_eo - eo).abs().mean() <= tolerance
    assert ((half_confidence - confidence).abs() / confidence.abs().mean()).mean() <= 2 * tolerance


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


SHAPES = [(1, 1, 16, 16), (1, 4, 16, 16), (3, 16, 16), (1, 3, 7, 16), (1, 3, 16, 7), (0, 3, 8, 8)]
SETTINGS = [{"steps": 0}, {"steps": 1001}, {"spacing": "linspace"}, {"seed": [1, 2]}, {"seed": []}, {"seed": 2**64}]


@pytest.mark.parametrize("shape, settings", [*((s, {}) for s in SHAPES), *(((1, 3, 8, 8), s) for s in SETTINGS)])
def test_images_and_settings_that_cannot_be_are_refused(shape, settings):
    with pytest.raises(ValueError):
        small_model().translate(torch.zeros(shape), **settings)


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
    "translate": lambda model, z, t: model.translate(torch.zeros(2, 3, 9, 10, device="meta"), steps=3),
    "translate from the CPU": lambda model, z, t: model.translate(torch.zeros(2, 3, 9, 10), steps=3),
    "noise_error": lambda model, z, t: model.noise_error(z, z, t, [1, 2]),
    "noise_error at one timestep": lambda model, z, t: model.noise_error(z, z, 500, [1, 2]),
    "training": lambda model, z, t: [train_step(model, z, z, torch.zeros_like(z), t)],
}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("path", PATHS)
def test_no_tensor_is_left_on_another_device(path, prediction_type):
    model = small_model(prediction_type=prediction_type).to("meta")
    z, t = torch.zeros(2, 4, 8, 6, device="meta"), torch.tensor([10, 900])
    with SameDevice():
        assert {tensor.device.type for tensor in PATHS[path](model, z, t)} == {"meta"}
        model.unet.conv_in.bias = torch.nn.Parameter(torch.zeros(16))
        with pytest.raises(AssertionError, match="conv"):
            PATHS[path](model, z, t)

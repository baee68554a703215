"""On a GPU, in float32 without TF32, everything computes what it computes on the CPU. Run with `pytest -m cuda`."""

import pytest
import torch
from record_golden import NETWORKS, UNETS, VAES, ddim_chain, fill, inputs, latents
from test_cdiffset import images, small_model
from test_networks import ours, outputs

from cdiffset import cdiff_loss, denoise
from scheduler import PREDICTION_TYPES, SPACINGS, DDIMScheduler, DDPMScheduler

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


@pytest.fixture(autouse=True)
def full_precision():
    """No TF32, which cuDNN's convolutions use by default: its mantissa has 10 bits. Matrix products do not use it."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


def assert_close(gpu: torch.Tensor, cpu: torch.Tensor, tolerance: float) -> None:
    """The largest error is at most `tolerance` times the largest value on the CPU."""
    assert gpu.is_cuda and gpu.dtype == cpu.dtype and gpu.shape == cpu.shape
    assert (gpu.cpu() - cpu).abs().max() <= tolerance * cpu.abs().max()


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_equal_the_cpu(name):
    model, x = fill(ours(name), seed=0), inputs(name, seed=0)
    expected = outputs(name, model, x)
    found = outputs(name, model.cuda(), {key: tensor.cuda() for key, tensor in x.items()})
    for key in expected:
        assert_close(found[key], expected[key], 1e-4)


@pytest.mark.parametrize("name", [*UNETS, *VAES])
def test_channels_last_networks_equal_the_cpu(name):
    model, x = fill(ours(name), seed=0), inputs(name, seed=0)
    expected = outputs(name, model, x)
    model = model.to("cuda", memory_format=torch.channels_last)
    found = outputs(name, model, {key: tensor.cuda() for key, tensor in x.items()})
    for key in expected:
        assert_close(found[key], expected[key], 1e-4)


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_scheduler_steps_and_targets_equal_the_cpu(prediction):
    x, noise, t = latents(seed=1)
    ddpm = DDPMScheduler(prediction_type=prediction)
    for compute in (ddpm.add_noise, ddpm.target):
        assert_close(compute(x.cuda(), noise.cuda(), t), compute(x, noise, t), 1e-6)
    for spacing in SPACINGS:
        ddim = DDIMScheduler(10, spacing, prediction)
        assert_close(ddim_chain(ddim, noise.cuda()), ddim_chain(ddim, noise), 1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_equal_the_cpu(checkpointing):
    generator = torch.Generator().manual_seed(3)
    z_sar, z_t, target = torch.randn(3, 2, 4, 8, 8, generator=generator)
    a = DDPMScheduler().alphas_cumprod[[10, 900]]
    results = []
    for device in ("cpu", "cuda"):
        model = small_model().to(device)
        model.unet.gradient_checkpointing = checkpointing
        t, context = torch.tensor([10, 900], device=device), model.prompt_embedding
        prediction, raw = denoise(model.unet, z_sar.to(device), z_t.to(device), t, context)
        loss = cdiff_loss(prediction, raw, target.to(device), a.to(device))
        loss.backward()
        results.append({"loss": loss.detach()} | {name: p.grad for name, p in model.unet.named_parameters()})
    largest = max(gradient.abs().max() for gradient in results[0].values())
    for key, expected in results[0].items():
        assert (results[1][key].cpu() - expected).abs().max() <= 1e-4 * largest, key


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_translation_equals_the_cpu(prediction_type, spacing):
    """The noise, too: it is drawn on the CPU. Ten steps add up the differences of one."""
    model, sar = small_model(levels=4, prediction_type=prediction_type), images(2, 65, 100)
    expected = model.translate(sar, steps=10, seed=5, spacing=spacing)
    for x in (sar, sar.cuda()):
        eo, confidence = model.cuda().translate(x, steps=10, seed=5, spacing=spacing)
        assert (eo.cpu() - expected[0]).abs().max() <= 1e-3
        assert_close(confidence, expected[1], 1e-3)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_noise_error_equals_the_cpu(prediction_type):
    model = small_model(prediction_type=prediction_type)
    z_sar, z_eo = torch.randn(2, 2, 4, 8, 6, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([10, 900])
    expected = model.noise_error(z_sar, z_eo, t, [5, 9])
    for found, value in zip(model.cuda().noise_error(z_sar.cuda(), z_eo.cuda(), t, [5, 9]), expected):
        assert_close(found, value, 1e-4)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_stays_near_the_cpus_float32(dtype, tolerance):
    model, sar = small_model(), images(1, 21, 16)
    eo, confidence = model.translate(sar, steps=4)
    half_eo, half_confidence = model.to("cuda", dtype).translate(sar, steps=4)
    assert half_eo.dtype == half_confidence.dtype == torch.float32
    assert (half_eo.cpu() - eo).abs().mean() <= tolerance
    assert ((half_confidence.cpu() - confidence).abs() / confidence.abs().mean()).mean() <= 2 * tolerance

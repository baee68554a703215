"""Noising and denoising are those of diffusers' schedulers, and follow the formulas that define them."""

import itertools
from fractions import Fraction

import pytest
import torch
from record_golden import (
    CHAINS,
    GOLDEN,
    PREDICTIONS,
    SPACINGS,
    ddim_chain,
    ddpm_results,
    generator,
    latents,
    reference_ddim,
    reference_ddpm,
    scheduler_results,
    toy_model,
)
from safetensors.torch import load_file

from scheduler import DDIMScheduler, DDPMScheduler

DIVISORS = [n for n in range(1, 1001) if 1000 % n == 0]


def ddpm(prediction_type: str) -> DDPMScheduler:
    return DDPMScheduler(prediction_type=prediction_type)


def ddim(steps: int, spacing: str, prediction_type: str) -> DDIMScheduler:
    return DDIMScheduler(steps, spacing=spacing, prediction_type=prediction_type)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> None:
    """The largest error is at most `tolerance` times the largest expected value."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert (actual - expected).abs().max().item() <= tolerance * expected.abs().max().item()


# ----------------------------------------------------------------------------------------------------------
# The same numbers as diffusers


def test_schedulers_repeat_the_recorded_reference():
    golden = load_file(GOLDEN / "schedulers.safetensors")
    results = scheduler_results(ddpm, ddim, seed=0)
    assert results.keys() == golden.keys()
    for key, value in results.items():
        # float32 alphas_cumprod rounds differently on other processors; fifty steps add that up
        assert_close(value, golden[key], 5e-6 if "_50_" in key else 1e-6)


def test_ddpm_repeats_the_live_reference():
    pytest.importorskip("diffusers")
    expected = ddpm_results(reference_ddpm, seed=1)
    for key, value in ddpm_results(ddpm, seed=1).items():
        assert_close(value, expected[key])


@pytest.mark.parametrize("chain", CHAINS)
def test_ddim_chain_repeats_the_live_reference(chain):
    pytest.importorskip("diffusers")
    steps, spacing, prediction, eta = CHAINS[chain]
    noise = latents(seed=1)[1]
    expected = ddim_chain(reference_ddim(steps, spacing, prediction), noise, eta)
    assert_close(ddim_chain(ddim(steps, spacing, prediction), noise, eta), expected)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_repeats_the_live_reference_wherever_the_steps_divide_1000(spacing):
    pytest.importorskip("diffusers")
    noise = latents(seed=2)[1]
    for n in DIVISORS:
        if (n, spacing) == (1000, "leading"):
            continue  # diffusers starts at timestep 1000, which does not exist
        mine, theirs = ddim(n, spacing, "v_prediction"), reference_ddim(n, spacing, "v_prediction")
        assert torch.equal(mine.timesteps, theirs.timesteps)
        assert_close(ddim_chain(mine, noise), ddim_chain(theirs, noise))


# ----------------------------------------------------------------------------------------------------------
# The timesteps


def timesteps_by_hand(n: int, spacing: str) -> list[int]:
    if spacing == "leading":
        offset = 1 if n < 1000 else 0  # else the first would be 1000
        return [i * (1000 // n) + offset for i in reversed(range(n))]
    return [round(Fraction(1000 * (n - i), n)) - 1 for i in range(n)]


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_number_of_steps_gives_exactly_so_many_descending_timesteps(spacing):
    for n in range(1, 1001):
        timesteps = DDIMScheduler(n, spacing=spacing).timesteps.tolist()
        assert timesteps == timesteps_by_hand(n, spacing)
        assert len(timesteps) == n
        assert timesteps[0] <= 999 and timesteps[-1] >= 0
        assert all(a > b for a, b in itertools.pairwise(timesteps))


def test_fifty_steps_are_the_papers():
    assert DDIMScheduler(50).timesteps.tolist() == list(range(981, 0, -20))
    assert DDIMScheduler(50, spacing="trailing").timesteps.tolist() == list(range(999, 0, -20))


# ----------------------------------------------------------------------------------------------------------
# The formulas, in float64


def test_noise_schedule_is_scaled_linear():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    expected = torch.cumprod(1 - betas, dim=0)
    a = DDPMScheduler().alphas_cumprod
    assert a.dtype == torch.float32 and a.shape == (1000,)
    assert ((a - expected) / expected).abs().max() < 1e-5
    assert torch.equal(DDIMScheduler(7).alphas_cumprod, a)


def test_noising_mixes_signal_and_noise_by_timestep():
    x0, noise, t = (x.double() if x.is_floating_point() else x for x in latents(seed=3))
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    x_t, velocity = scheduler.add_noise(x0, noise, t), scheduler.target(x0, noise, t)
    for i in range(4):
        a = scheduler.alphas_cumprod[t[i]].double()
        assert_close(x_t[i], a.sqrt() * x0[i] + (1 - a).sqrt() * noise[i], 1e-12)
        assert_close(velocity[i], a.sqrt() * noise[i] - (1 - a).sqrt() * x0[i], 1e-12)
        assert_close(scheduler.add_noise(x0, noise, int(t[i]))[i], x_t[i], 1e-12)  # scalar timestep


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_target_holds_signal_and_noise(prediction):
    x0, noise, t = (x.double() if x.is_floating_point() else x for x in latents(seed=3))
    scheduler = ddpm(prediction)
    found = scheduler.x0_and_noise(scheduler.target(x0, noise, t), t, scheduler.add_noise(x0, noise, t))
    assert_close(found[0], x0, 1e-12)
    assert_close(found[1], noise, 1e-12)


def chain_by_hand(n: int, spacing: str, prediction: str, x: torch.Tensor) -> torch.Tensor:
    """DDIM (Song et al., equation 12, sigma 0) from one timestep of the list to the next, at last to 0."""
    a = DDPMScheduler().alphas_cumprod.double()
    timesteps = timesteps_by_hand(n, spacing)
    for t, previous in zip(timesteps, timesteps[1:] + [0]):
        signal, sigma = a[t] ** 0.5, (1 - a[t]) ** 0.5
        output = toy_model(x, t)
        if prediction == "epsilon":
            x0 = (x - sigma * output) / signal
        elif prediction == "v_prediction":
            x0 = signal * x - sigma * output
        else:
            x0 = output
        noise = (x - signal * x0) / sigma
        x = a[previous] ** 0.5 * x0 + (1 - a[previous]) ** 0.5 * noise
    return x


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_steps_to_the_next_timestep_of_the_list(spacing, prediction):
    x = latents(seed=4)[1].double()
    for n in (3, 7, 30, 333, 999):
        expected = chain_by_hand(n, spacing, prediction, x)
        assert_close(ddim_chain(ddim(n, spacing, prediction), x), expected, 1e-10)
        assert_close(
            ddim_chain(ddim(n, spacing, prediction), x.float()), expected.float(), 1e-4
        )  # up to 1000 roundings


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_with_the_truth_as_prediction_follows_the_noising_path(spacing, prediction):
    x0, noise, _ = (x.double() for x in latents(seed=5))
    for n in (1, 13, 50):
        scheduler = ddim(n, spacing, prediction)
        timesteps = scheduler.timesteps.tolist()
        x = scheduler.add_noise(x0, noise, timesteps[0])
        for t, following in zip(timesteps, timesteps[1:] + [0]):
            x = scheduler.step(scheduler.target(x0, noise, t), t, x)
            assert_close(x, scheduler.add_noise(x0, noise, following), 1e-11)


def test_ddim_at_eta_1_with_every_timestep_is_ddpm():
    _, x, _ = (v.double() for v in latents(seed=6))
    every, posterior = DDIMScheduler(1000), DDPMScheduler()
    for t in (999, 400, 2, 1):
        step = every.step(toy_model(x, t), t, x, eta=1.0, generator=generator(t))
        assert_close(step, posterior.step(toy_model(x, t), t, x, generator=generator(t)), 1e-9)


def test_ddim_at_eta_0_draws_no_random_numbers():
    x = latents(seed=6)[1]
    source = generator(0)
    before = source.get_state()
    scheduler = DDIMScheduler(10)
    scheduler.step(x, scheduler.timesteps[0], x, generator=source)
    assert torch.equal(source.get_state(), before)


# ----------------------------------------------------------------------------------------------------------
# What cannot be


@pytest.mark.parametrize(
    "arguments",
    [
        {"steps": 0},
        {"steps": -1},
        {"steps": 1001},
        {"steps": 10, "spacing": "linspace"},
        {"steps": 10, "prediction_type": "noise"},
    ],
)
def test_ddim_refuses_settings_that_do_not_exist(arguments):
    with pytest.raises(ValueError, match="expected"):
        DDIMScheduler(**arguments)


def test_ddpm_refuses_an_unknown_prediction_type():
    with pytest.raises(ValueError, match="expected one of epsilon, v_prediction, sample"):
        DDPMScheduler(prediction_type="flow")


def test_ddim_refuses_a_timestep_that_is_not_in_its_list():
    x = torch.zeros(1, 4, 2, 2)
    with pytest.raises(ValueError, match="timestep 980"):
        DDIMScheduler(50).step(x, 980, x)

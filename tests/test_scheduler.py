"""Noising and denoising are those of diffusers' schedulers, and follow the formulas that define them."""

import itertools
from fractions import Fraction

import pytest
import torch
from record_golden import (
    GOLDEN,
    PREDICTIONS,
    SPACINGS,
    ddim_chain,
    generator,
    latents,
    reference_ddim,
    reference_ddpm,
    scheduler_results,
    toy_model,
)
from safetensors.torch import load_file

from scheduler import DDIMScheduler, DDPMScheduler


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


def test_schedulers_repeat_the_live_reference():
    pytest.importorskip("diffusers")
    expected = scheduler_results(reference_ddpm, reference_ddim, seed=1)
    for key, value in scheduler_results(ddpm, ddim, seed=1).items():
        assert_close(value, expected[key])


@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_repeats_the_live_reference_wherever_the_steps_divide_1000(spacing):
    pytest.importorskip("diffusers")
    noise = latents(seed=2)[1]
    for n in (n for n in range(1, 1001) if 1000 % n == 0):
        if (n, spacing) == (1000, "leading"):
            continue  # diffusers starts at timestep 1000, which does not exist
        mine, theirs = ddim(n, spacing, "v_prediction"), reference_ddim(n, spacing, "v_prediction")
        assert torch.equal(mine.timesteps, theirs.timesteps)
        assert_close(ddim_chain(mine, noise), ddim_chain(theirs, noise))


# ----------------------------------------------------------------------------------------------------------
# The timesteps, and the formulas in float64


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


def test_noising_mixes_signal_and_noise_by_timestep():
    x0, noise, t = (x.double() if x.is_floating_point() else x for x in latents(seed=3))
    scheduler = ddpm("v_prediction")
    x_t, velocity = scheduler.add_noise(x0, noise, t), scheduler.target(x0, noise, t)
    for i in range(4):
        a = scheduler.alphas_cumprod[t[i]].double()
        assert_close(x_t[i], a.sqrt() * x0[i] + (1 - a).sqrt() * noise[i], 1e-12)
        assert_close(velocity[i], a.sqrt() * noise[i] - (1 - a).sqrt() * x0[i], 1e-12)
        assert_close(scheduler.add_noise(x0, noise, int(t[i]))[i], x_t[i], 1e-12)  # scalar timestep


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_with_the_truth_as_prediction_follows_the_noising_path(spacing, prediction):
    """From one timestep of the list to the next, at last to 0. A step is linear, so the path determines it."""
    x0, noise, _ = (x.double() for x in latents(seed=5))
    for n in (1, 3, 7, 50, 333, 999):
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


def test_settings_and_timesteps_that_do_not_exist_are_refused():
    for steps in (0, -1, 1001):
        with pytest.raises(ValueError, match="expected 1 to 1000"):
            DDIMScheduler(steps)
    with pytest.raises(ValueError, match="expected 'leading' or 'trailing'"):
        DDIMScheduler(10, spacing="linspace")
    with pytest.raises(ValueError, match="expected one of epsilon, v_prediction, sample"):
        DDPMScheduler(prediction_type="flow")
    x = torch.zeros(1, 4, 2, 2)
    with pytest.raises(ValueError, match="timestep 980"):
        DDIMScheduler(50).step(x, 980, x)

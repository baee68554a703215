"""The diffusion process: DDPM noising for training, DDIM denoising for sampling. Pure arithmetic on tensors.

Ho et al., "Denoising Diffusion Probabilistic Models", NeurIPS 2020 (DDPM); Song et al., "Denoising Diffusion
Implicit Models", ICLR 2021 (DDIM); v-prediction: Salimans and Ho, ICLR 2022, appendix D; trailing timesteps:
Lin et al., WACV 2024. In all formulas a is `alphas_cumprod[t]`, the share of the signal's variance at t:

    x_t = sqrt(a) * x_0 + sqrt(1 - a) * epsilon
"""

import torch
from torch import Tensor

MAX_TIMESTEPS = 10**5
SPACINGS = ("leading", "trailing")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class DDPMScheduler:
    """Adds noise in training; also steps backwards ancestrally, one timestep at a time.

    The defaults are SD's: "scaled_linear" betas, linear in their square root. Attributes: `timesteps`
    (descending, int64) and `alphas_cumprod` (num_train_timesteps,), float32. Raises ValueError on unknown or
    impossible settings.
    """

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        prediction_type: str = "epsilon",
    ):
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type {prediction_type!r}: expected one of {', '.join(PREDICTION_TYPES)}")
        if not 1 <= num_train_timesteps <= MAX_TIMESTEPS or not 0 < beta_start <= beta_end < 1:
            betas = f"betas from {beta_start} to {beta_end}"
            raise ValueError(f"{num_train_timesteps} timesteps, {betas}: expected 1 to {MAX_TIMESTEPS}, rising in 0..1")
        self.config = {k: v for k, v in locals().items() if k != "self"}
        # float32 throughout, as in diffusers: SD was trained with these very numbers
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float32) ** 2
        self.alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
        self.num_train_timesteps = num_train_timesteps
        self.prediction_type = prediction_type
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)

    def alpha_bar(self, t: Tensor | int, like: Tensor) -> Tensor:
        """alphas_cumprod[t] on the device of `like`, shaped to broadcast with it: () or (B, 1, 1, 1).

        In float32 or float64: bfloat16 would lose the smallest noise levels. Raises ValueError if t is out of range.
        """
        t = torch.as_tensor(t).cpu()
        if t.min() < 0 or t.max() >= self.num_train_timesteps:
            raise ValueError(f"timestep {t.tolist()}: expected 0 to {self.num_train_timesteps - 1}")
        a = self.alphas_cumprod[t].to(like.device, torch.promote_types(like.dtype, torch.float32))
        return a.reshape(-1, *[1] * (like.ndim - 1)) if a.ndim else a

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """x_t = sqrt(a) x_0 + sqrt(1 - a) noise. x0, noise (B, C, h, w), t scalar or (B,) -> (B, C, h, w)."""
        a = self.alpha_bar(t, x0)
        return a.sqrt() * x0 + (1 - a).sqrt() * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """What the network should predict: the noise, the velocity sqrt(a) noise - sqrt(1 - a) x_0, or x_0."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x0
        a = self.alpha_bar(t, x0)
        return a.sqrt() * noise - (1 - a).sqrt() * x0

    def x0_and_noise(self, model_output: Tensor, t: Tensor | int, x_t: Tensor) -> tuple[Tensor, Tensor]:
        """Solves the noising equation for x_0 and epsilon, given the network's prediction at x_t."""
        a = self.alpha_bar(t, x_t)
        if self.prediction_type == "epsilon":
            return (x_t - (1 - a).sqrt() * model_output) / a.sqrt(), model_output
        if self.prediction_type == "sample":
            return model_output, (x_t - a.sqrt() * model_output) / (1 - a).sqrt()
        return a.sqrt() * x_t - (1 - a).sqrt() * model_output, a.sqrt() * model_output + (1 - a).sqrt() * x_t

    def step(self, model_output: Tensor, t: int, x_t: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x_t -> x_(t-1), a sample of the posterior q(x_(t-1) | x_t, x_0) (Ho et al., equations 6 and 7)."""
        t = int(t)
        x0, _ = self.x0_and_noise(model_output, t, x_t)
        if t == 0:
            return x0
        a, a_prev = self.alpha_bar(t, x_t), self.alpha_bar(t - 1, x_t)
        alpha = a / a_prev  # of this one step; its beta is 1 - alpha
        mean = (a_prev.sqrt() * (1 - alpha) * x0 + alpha.sqrt() * (1 - a_prev) * x_t) / (1 - a)
        variance = (1 - a_prev) / (1 - a) * (1 - alpha)
        return mean + variance.sqrt() * _noise_like(x_t, generator)


class DDIMScheduler(DDPMScheduler):
    """Denoises in `steps` steps, deterministically unless eta > 0.

    spacing "leading" (the paper's): i * (1000 // steps) + 1; "trailing": round(1000 - i * 1000 / steps) - 1,
    which starts at the highest noise level. `timesteps` has exactly `steps` entries, none above 999. The
    timestep before t is the next in the list; after the last one the sample is at alphas_cumprod[0], as with
    diffusers' set_alpha_to_one=False. Raises ValueError if steps is not in 1..num_train_timesteps.
    """

    def __init__(self, steps: int, spacing: str = "leading", prediction_type: str = "epsilon", **process: float):
        super().__init__(prediction_type=prediction_type, **process)  # the process that the network was trained on
        num_train_timesteps = self.num_train_timesteps
        if not 1 <= steps <= num_train_timesteps:
            raise ValueError(f"{steps} sampling steps: expected 1 to {num_train_timesteps}")
        i = torch.arange(steps, dtype=torch.float64)
        if spacing == "leading":
            offset = min(1, num_train_timesteps - steps)  # 0 if every timestep is used
            self.timesteps = (i * (num_train_timesteps // steps) + offset).flip(0).long()
        elif spacing == "trailing":
            self.timesteps = (num_train_timesteps - i * num_train_timesteps / steps).round().long() - 1
        else:
            raise ValueError(f"spacing {spacing!r}: expected 'leading' or 'trailing'")
        timesteps = self.timesteps.tolist()
        self._previous = dict(zip(timesteps, timesteps[1:] + [0]))

    def step(
        self, model_output: Tensor, t: int, x_t: Tensor, eta: float = 0.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """x_t -> x at the next timestep of the list (Song et al., equations 12 and 16). Shapes as x_t's.

        Raises ValueError if t is not in `timesteps`, or eta not in 0..1.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta {eta}: expected 0 (DDIM) to 1 (DDPM)")
        if int(t) not in self._previous:
            raise ValueError(f"timestep {int(t)} is not one of the {len(self.timesteps)} sampling timesteps")
        a, a_prev = self.alpha_bar(int(t), x_t), self.alpha_bar(self._previous[int(t)], x_t)
        x0, noise = self.x0_and_noise(model_output, int(t), x_t)
        sigma = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).sqrt()
        x = a_prev.sqrt() * x0 + (1 - a_prev - sigma**2).sqrt() * noise
        return x + sigma * _noise_like(x_t, generator) if eta else x


def _noise_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise of x's shape, drawn where the generator lives, so that devices agree."""
    device = generator.device if generator is not None else x.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)

"""Draws the pictures and prints the numbers of docs/tour.md, section by section, with models/tiny.

    python -m experiments.tour        three minutes on two CPU cores

Writes docs/tour/, and the numbers into docs/tour.md. All pairs are synthetic; models/tiny has not seen them.
"""

import copy
import re
import tempfile
from collections.abc import Iterator, Sequence
from functools import partialmethod
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from cdiffset import CDiffSET, add_variance_channel, cdiff_loss, denoise, initial_noise, variance, widen_input
from common import Parser, run
from data import find_pairs
from experiments.report import BLUE, GREEN, GREY, ORANGE, PURPLE, pyplot
from experiments.synth import write_dataset
from images import read_eo, read_sar, to_uint8, write_png
from metrics import psnr
from scene import blend, translate_scene
from scheduler import DDIMScheduler, DDPMScheduler

MODEL, PAGE = "models/tiny", Path("docs/tour.md")
OUT = PAGE.with_suffix("")  # docs/tour/
ANSWERS = OUT / "answers.md"
TEST, LESSONS = 16, 64  # pairs to measure on, and to train on
STEPS = 60  # of each short training
SHOWN = 9  # the pair in the pictures
HOUSES = np.s_[48:112, 40:104]  # a part of it
BORDER = np.s_[104:168, 96:160]  # a part of the scene, where four tiles meet
LAYERS = "resnets", "attentions", "downsamplers", "upsamplers"  # of a block of the U-Net, in their order
SEEN = (100, 500, 900)  # timesteps at which errors are measured


class Pairs:
    """Synthetic pairs: sar, eo (N, 3, H, W) in [-1, 1]; changed (N, 1, H, W) bool: an object is in one image only."""

    def __init__(self, count: int, size: int, seed: int):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name, "pairs")
            write_dataset(folder, pairs=count, size=size, seed=seed)
            pairs = find_pairs(folder).pairs
            masks = [folder / str(pair.sar.relative_to(folder)).replace("s1_", "change_") for pair in pairs]
            self.sar = torch.stack([read_sar(pair.sar) for pair in pairs])
            self.eo = torch.stack([read_eo(pair.eo) for pair in pairs])
            self.changed = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in masks]))[:, None] > 0


# ----------------------------------------------------------------------------------------------------------
# What several sections use


def decibels(image: Tensor, truth: Tensor) -> Tensor:
    """PSNR of images in [-1, 1]: two (B, 3, H, W) -> (B,)."""
    return psnr(image.clamp(-1, 1) / 2 + 0.5, truth / 2 + 0.5)


def detail(image: Tensor, truth: Tensor) -> str:
    """The mean difference between neighbouring pixels, as a share of the true image's: small in a blurred image."""
    made, true = (sum(float(x.diff(dim=axis).abs().mean()) for axis in (-1, -2)) for x in (image, truth))
    return f"{made / true:.0%}"


def predict(model: CDiffSET, z_sar: Tensor, z_eo: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """Noises z_eo with fixed seeds and predicts -> prediction - target (B, 4, h, w), variance (B, 1, h, w)."""
    noise = torch.cat([initial_noise(i, z_eo.shape[1:]) for i in range(len(z_eo))])
    prediction, raw = denoise(model.unet, z_sar, model.scheduler.add_noise(z_eo, noise, t), t, model.prompt_embedding)
    return prediction - model.scheduler.target(z_eo, noise, t), variance(raw)


def table(head: Sequence[str], *rows: Sequence[str | float]) -> str:
    """Text in columns. Numbers get two decimals; strings stay as they are."""
    cells = [head, *([x if isinstance(x, str) else f"{float(x):.2f}" for x in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("   ".join(f"{x:{'<>'[j > 0]}{widths[j]}}" for j, x in enumerate(row)).rstrip() for row in cells)


def picture(image: Tensor) -> np.ndarray:
    """(3, H, W) in [-1, 1] -> (H, W, 3) in [0, 1]."""
    return (image.clamp(-1, 1) / 2 + 0.5).permute(1, 2, 0).numpy()


def panels(name: str, rows: list[list], titles: list[list[str]], limits: tuple | None = (None, None)) -> None:
    """Draws rows of images with a title each: (H, W, 3) arrays; (H, W) tensors in colours from limits[0] to [1]."""
    height = 8 / len(rows[0]) * len(rows) + 0.3
    figure, axes = pyplot().subplots(len(rows), len(rows[0]), figsize=(8, height), squeeze=False)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            axes[i][j].imshow(image, vmin=limits[0], vmax=limits[1], interpolation="nearest")
            axes[i][j].set(xticks=[], yticks=[], frame_on=False, title=titles[i][j])
    write(name, figure)


def write(name: str, figure) -> None:
    """Writes a figure of 8 inches as 1,000 pixels."""
    figure.savefig(OUT / name, dpi=125, pil_kwargs={"quality": 82} if name.endswith("jpg") else {"optimize": True})
    pyplot().close(figure)


# ----------------------------------------------------------------------------------------------------------
# The sections


def section_1(model: CDiffSET, test: Pairs) -> str:
    """SAR and EO: how much of the colour the SAR level tells."""
    sar, colours = test.sar[:, :1] / 2 + 0.5, test.eo.permute(0, 2, 3, 1).reshape(-1, 3)
    smooth = F.avg_pool2d(sar, 9, 1, 4, count_include_pad=False)
    total = colours.var(dim=0).mean()

    def told(level: Tensor) -> str:  # by the mean colour of all pixels with this level
        bins = (level * 50).long().flatten()
        means = torch.zeros(51, 3).index_add(0, bins, colours) / torch.bincount(bins, minlength=51)[:, None]
        return f"{1 - float((colours - means[bins]).square().mean() / total):.0%}"

    made = model.translate(test.sar, 10, spacing="trailing")[0]
    whole = f"{1 - float((made - test.eo).square().mean() / total):.0%}"

    swatch, generator = np.ones((24, 40, 3)), np.random.default_rng(0)
    edges, levels = np.linspace(20, 220, 41), 255 * smooth.numpy().ravel()
    for j in range(40):
        found = colours.numpy()[(levels >= edges[j]) & (levels < edges[j + 1])] / 2 + 0.5
        some = generator.choice(found, 24)
        swatch[:, j] = some[np.argsort(some @ (0.3, 0.6, 0.1))]  # by brightness
    images = [picture(test.sar[SHOWN]), picture(test.eo[SHOWN]), swatch.repeat(5, axis=0).repeat(3, axis=1)]
    panels("1-sar-eo.jpg", [images], [["SAR", "EO", "EO colours by SAR level"]])
    rows = ("one SAR pixel", told(sar)), ("the mean of 9x9 SAR pixels", told(smooth)), ("models/tiny", whole)
    return table(("the EO colour's variance is explained by", ""), *rows)


def section_2(model: CDiffSET, test: Pairs) -> tuple[str, ...]:
    """The VAE: latents, their distances, and what comes back."""
    z_sar, z_eo = model.encode(test.sar), model.encode(test.eo)
    back = model.decode(z_sar), model.decode(z_eo)
    shown = zip((test.sar, test.eo), (z_sar, z_eo), back)
    rows = [[picture(image[SHOWN]), *z[SHOWN], picture(decoded[SHOWN])] for image, z, decoded in shown]
    titles = [[name, *(f"channel {c}" for c in range(4)), f"{name} decoded"] for name in ("SAR", "EO")]
    panels("2-vae.jpg", rows, titles, (-2.5, 2.5))
    spreads = [(f"{name} standard deviation", *z.std(dim=(0, 2, 3))) for name, z in (("SAR", z_sar), ("EO", z_eo))]
    pairs = {
        "SAR and EO of one place": z_eo - z_sar,
        "SAR and EO of two places": z_eo.roll(1, 0) - z_sar,
        "EO and EO of two places": z_eo.roll(1, 0) - z_eo,
    }
    distances = [(name, x.square().mean().sqrt()) for name, x in pairs.items()]
    for name, a, b in zip(("SAR", "EO"), back, (test.sar, test.eo)):
        distances.append((f"PSNR of the decoded {name} image, dB", decibels(a, b).mean()))
    head = "root mean square distance of latents", ""
    return table(("channel", *"0123"), *spreads), table(head, *distances)


def section_3(model: CDiffSET, test: Pairs) -> str:
    """Noise: z_t, the two factors, and the first timestep of a translation."""
    z, a = model.encode(test.eo[SHOWN, None]), DDPMScheduler().alphas_cumprod
    times, noise = (0, 250, 500, 750, 999), initial_noise(0, z.shape[1:])
    figure, axes = pyplot().subplot_mosaic([[*times], ["curve"] * 5], figsize=(8, 4.2))
    for t in times:
        axes[t].imshow(picture(model.decode(model.scheduler.add_noise(z, noise, t))[0]))
        axes[t].set(xticks=[], yticks=[], frame_on=False, title=f"t = {t}")
    axes["curve"].plot(a.sqrt(), color=BLUE, label="signal, $\\sqrt{a}$")
    axes["curve"].plot((1 - a).sqrt(), color=ORANGE, label="noise, $\\sqrt{1-a}$")
    axes["curve"].set(xlabel="timestep t", ylabel="factor", xlim=(0, 1000), ylim=(0, 1.02))
    axes["curve"].legend(loc="center right")
    write("3-noise.jpg", figure)
    counts, points, scores = (1, 2, 5, 10), (1, 901, 981, 999), []
    for spacing in ("leading", "trailing"):
        made = [model.translate(test.sar, steps, spacing=spacing)[0] for steps in counts]
        scores.append((spacing, *(decibels(image, test.eo).mean() for image in made)))
    left = ("sqrt(a), what is left of the picture", *(f"{x:.3f}" for x in a[[*points]].sqrt()))
    return table(("timestep", *map(str, points)), left), table(
        ("PSNR in dB by number of steps", *map(str, counts)), *scores
    )


def section_4(base: CDiffSET, wide: CDiffSET, doubled: CDiffSET, test: Pairs) -> tuple[str, ...]:
    """Surgery: what it adds, and that it changes nothing if both halves of the input are the same."""
    z_eo = base.encode(test.eo)
    z = base.scheduler.add_noise(z_eo, initial_noise(0, z_eo.shape[1:]), 500)
    old = base.unet(z, 500, base.prompt_embedding)
    new, raw = denoise(wide.unet, z, z, 500, wide.prompt_embedding)
    wrong, _ = denoise(doubled.unet, z, z, 500, wide.prompt_embedding)
    rows = [("parameters", *(f"{sum(p.numel() for p in model.unet.parameters()):,}" for model in (base, wide)))]
    for layer in ("conv_in", "conv_out"):
        rows += [(f"{layer}.weight", *(str(tuple(getattr(x.unet, layer).weight.shape)) for x in (base, wide)))]
    measured = {
        "largest output of the old network at t = 500": old.abs().max(),
        "largest difference of the new network, fed (z, z)": (new - old).abs().max(),
        "largest difference without the halving": (wrong - old).abs().max(),
        "largest difference of the variance from 1": (variance(raw) - 1).abs().max(),
    }
    return table(("", "before", "after"), *rows), table(*((name, f"{x:.6f}") for name, x in measured.items()))


def section_5(model: CDiffSET, test: Pairs) -> str:
    """The U-Net: its parts, recorded by hooks, and what its inputs do to its output."""
    unet, shapes, hooks = model.unet, {}, []
    parts = {"time_embedding": unet.time_embedding}
    parts |= {f"down_blocks[{i}]": block for i, block in enumerate(unet.down_blocks)} | {"mid_block": unet.mid_block}
    parts |= {f"up_blocks[{i}]": block for i, block in enumerate(unet.up_blocks)}
    for name, part in parts.items():  # a block's forward() is not called, but those of its layers are
        layers = [x for kind in LAYERS for x in getattr(part, kind, ())]
        keep = lambda _, __, output, name=name: shapes.update({name: str(tuple(output.shape[1:]))})  # noqa: E731
        hooks.append((layers or [part])[-1].register_forward_hook(keep))
    z_sar, z_eo = model.encode(test.sar), model.encode(test.eo)
    z_t = model.scheduler.add_noise(z_eo, initial_noise(0, z_eo.shape[1:]), 500)
    right, _ = denoise(unet, z_sar, z_t, 500, model.prompt_embedding)
    for hook in hooks:
        hook.remove()
    rows = []
    for name, part in parts.items():
        inside = [str(len(getattr(part, kind, ()))).replace("0", "") for kind in LAYERS[:2]]
        rows.append((name, shapes[name], f"{sum(p.numel() for p in part.parameters()):,}", *inside))
    wrong = {
        "the prompt embedding is zero": (z_sar, z_t, 500, model.prompt_embedding * 0),
        "the network is told t = 700": (z_sar, z_t, 700, model.prompt_embedding),
        "the SAR latent is zero": (z_sar * 0, z_t, 500, model.prompt_embedding),
    }
    changes = {name: (denoise(unet, *inputs)[0] - right).norm() / right.norm() for name, inputs in wrong.items()}
    return (
        table(("part", "output", "parameters", "residual blocks", "transformers"), *rows),
        table(("change of the prediction at t = 500 if", ""), *((k, f"{x:.1%}") for k, x in changes.items())),
    )


def section_6(model: CDiffSET, test: Pairs) -> str:
    """The loss: the weight of an error by the variance that the network expects."""
    z_sar, z_eo = model.encode(test.sar), model.encode(test.eo)
    changed = F.max_pool2d(test.changed.float(), model.vae.factor).bool()  # latent pixels
    betas = model.scheduler.alphas_cumprod[[*SEEN]].sqrt().tolist()
    rows, pulls = [], []
    for t, beta in zip(SEEN, betas):
        error, var = predict(model, z_sar, z_eo, t)
        size = error.abs().mean(dim=1, keepdim=True)
        gradients = size, size * var ** (beta - 1), size / var  # L2, C-Diff, likelihood
        pulls.append([float(x[changed].mean() / x[~changed].mean()) for x in gradients])
        rows.append((str(t), var[changed].mean(), var[~changed].mean(), *pulls[-1]))

    figure, (left, right) = pyplot().subplots(1, 2, figsize=(8, 2.9), width_ratios=(1.2, 1))
    var = torch.logspace(-2, 1, 100)
    left.plot(var, var**0, color=GREY, ls="--", label="squared error")
    for t, beta, colour in zip(SEEN, betas, (BLUE, GREEN, ORANGE)):
        left.plot(var, var ** (beta - 1), color=colour, label=f"C-Diff, t = {t}")
    left.plot(var, 1 / var, color=PURPLE, ls="--", label="likelihood")
    left.set(xscale="log", yscale="log", xlabel="variance", ylabel="weight of an error", title="by formula")
    left.legend()
    for i, (name, colour) in enumerate((("squared error", GREY), ("C-Diff", BLUE), ("likelihood", PURPLE))):
        right.bar([x + 0.27 * (i - 1) for x in range(3)], [x[i] for x in pulls], 0.25, color=colour, label=name)
    right.axhline(1, color="#444444", lw=0.8)
    right.set_xticks(range(3), [f"t = {t}" for t in SEEN])
    right.set(ylabel="pull of a changed pixel", title="measured")
    right.legend(loc="upper left")
    write("6-loss.png", figure)
    head = "t", "variance, changed", "others", "pull: squared error", "C-Diff", "likelihood"
    return f"{100 * float(changed.float().mean()):.1f} % of the latent pixels changed.\n" + table(head, *rows)


def blind(model: CDiffSET) -> CDiffSET:
    """A copy with 4 channels in and out, without SAR latent and variance: a stand-in for Stable Diffusion."""
    base = copy.deepcopy(model)
    unet, old_in, old_out = base.unet, model.unet.conv_in, model.unet.conv_out
    unet.conv_in, unet.conv_out = nn.Conv2d(4, 64, 3, padding=1), nn.Conv2d(64, 4, 3, padding=1)
    unet.conv_in.load_state_dict({"weight": old_in.weight[:, 4:], "bias": old_in.bias})
    unet.conv_out.load_state_dict({"weight": old_out.weight[:4], "bias": old_out.bias[:4]})
    unet.config |= {"in_channels": 4, "out_channels": 4}
    return base


def widened(base: CDiffSET, halve: bool = True) -> CDiffSET:
    """A copy after the surgery, with or without the halving of conv_in's weights."""
    wide = copy.deepcopy(base)
    widen_input(wide.unet)
    add_variance_channel(wide.unet)
    if not halve:
        wide.unet.conv_in.weight *= 2
    return wide


def fine_tuned(start: CDiffSET, latents: tuple[Tensor, Tensor], beta: float | None = None) -> CDiffSET:
    """A copy after STEPS steps on random halves of 8 latents: with squared error if it has 4 input channels, else with
    the C-Diff loss, in which beta (0 or 1) may replace sqrt(alphas_cumprod[t]).
    """
    torch.manual_seed(0)
    model, side = copy.deepcopy(start), latents[0].shape[2] // 2
    optimizer = torch.optim.AdamW(model.unet.parameters(), lr=3e-4)
    for _ in range(STEPS):
        which, (top, left) = torch.randperm(LESSONS)[:8], torch.randint(side + 1, (2,)).tolist()
        z_sar, z_eo = (z[which, :, top : top + side, left : left + side] for z in latents)
        noise, t = torch.randn_like(z_eo), torch.randint(1000, (8,))
        z_t, target = model.scheduler.add_noise(z_eo, noise, t), model.scheduler.target(z_eo, noise, t)
        a = model.scheduler.alphas_cumprod[t]
        with torch.enable_grad():
            if model.unet.config["in_channels"] == 4:
                loss = F.mse_loss(model.unet(z_t, t, model.prompt_embedding), target)
            else:
                prediction, raw = denoise(model.unet, z_sar, z_t, t, model.prompt_embedding)
                loss = cdiff_loss(prediction, raw, target, a if beta is None else torch.full_like(a, beta))
            loss.backward()
        nn.utils.clip_grad_norm_(model.unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


def compare(models: dict[str, CDiffSET], test: Pairs) -> str:
    """The squared error of each model's prediction on the test pairs, and the variance that it expects."""
    rows = []
    for name, model in models.items():
        z_sar, z_eo = model.encode(test.sar), model.encode(test.eo)
        seen = [predict(model, z_sar, z_eo, t) for t in SEEN]
        numbers = [error.square().mean() for error, _ in seen] + [var.mean() for _, var in seen]
        rows.append((name, *(f"{x:.3f}" for x in numbers)))
    return table(("t", *(f"error, {t}" for t in SEEN), *(f"variance, {t}" for t in SEEN)), *rows)


def sample(model: CDiffSET, sar: Tensor, steps: int = 10) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
    """The loop of `CDiffSET.translate`: yields t, z_t, the prediction, x_0 and the variance of each step."""
    scheduler = DDIMScheduler(**model.scheduler.config | {"steps": steps, "spacing": "trailing"})
    z_sar = model.encode(sar)
    z_t = torch.cat([initial_noise(i, z_sar.shape[1:]) for i in range(len(sar))])
    for t in scheduler.timesteps.tolist():
        prediction, raw = denoise(model.unet, z_sar, z_t, t, model.prompt_embedding)
        yield t, z_t, prediction, scheduler.x0_and_noise(prediction, t, z_t)[0], variance(raw)
        z_t = scheduler.step(prediction, t, z_t)


def section_8(model: CDiffSET, test: Pairs) -> str:
    """DDIM: x_0 at each step, and translations in one step and in fifty."""
    at = {f"t = {t}": model.decode(x0).clamp(-1, 1) for t, _, _, x0, _ in sample(model, test.sar)}
    one, fifty = (model.translate(test.sar, steps, spacing="trailing")[0] for steps in (1, 50))
    last = {"SAR": test.sar, "1 step": one, "10 steps": at["t = 99"], "50 steps": fifty, "true EO": test.eo}
    titles = [[*at][:5], [*at][5:], [*last]]
    panels("8-ddim.jpg", [[picture((at | last)[name][SHOWN])[HOUSES] for name in row] for row in titles], titles)
    shown = ("t = 999", "t = 699", "t = 99", "1 step", "50 steps")
    rows = [(name, decibels((at | last)[name], test.eo).mean(), detail((at | last)[name], test.eo)) for name in shown]
    return table(("", "PSNR, dB", "detail"), *rows)


def section_9(model: CDiffSET, test: Pairs) -> str:
    """Confidence: the variance and the true squared error of the prediction, at four of ten steps."""
    z_eo, shown, rows, maps = model.encode(test.eo), (999, 699, 499, 99), [], ([], [])
    for step in sample(model, test.sar):
        t, z_t, prediction, x0, var = step
        if t in shown:
            a = model.scheduler.alphas_cumprod[t]
            noise = (z_t - a.sqrt() * z_eo) / (1 - a).sqrt()  # by which the true latent would become this z_t
            error = (prediction - model.scheduler.target(z_eo, noise, t)).square().mean(dim=1, keepdim=True)
            ranks = torch.stack([x.flatten().argsort().argsort().float() for x in (var, error)])
            rows.append((str(t), var.mean(), error.mean(), torch.corrcoef(ranks)[0, 1]))
            for side, x in zip(maps, (var, error)):
                side.append(x[SHOWN, 0].log10())
    images = [[picture(x[SHOWN]), *row] for x, row in zip((model.decode(x0), test.eo), maps)]
    names = ("generated", "variance"), ("true EO", "error")
    panels("9-confidence.jpg", images, [[a, *(f"{b}, t = {t}" for t in shown)] for a, b in names], (-2.5, 0.5))
    return table(("t", "variance", "true error", "rank correlation"), *rows)


def section_10(model: CDiffSET, scene: Pairs, tile: int = 64) -> str:
    """Scenes: tiles side by side, tiles blended afterwards, and tiles denoised together."""
    sar, size, seeds = scene.sar[0], scene.sar.shape[2], iter(range(1000))
    beside, after, together = torch.empty(3, 3, size, size)

    def alone(tiles: list) -> Tensor:  # each from noise of its own
        return torch.cat([model.translate(sar[None, :, y, x], 10, next(seeds), "trailing")[0] for _, y, x in tiles])

    starts = range(0, size, tile)
    for place in [(slice(y, y + tile), slice(x, x + tile)) for y in starts for x in starts]:
        beside[:, *place] = alone([(0, *place)])[0]
    for y, x, part in blend(size, size, tile, alone):
        after[:, y, x] = part[0]
    read = lambda top, bottom, left, right: sar[:, top:bottom, left:right]  # noqa: E731
    for top, left, part, _ in translate_scene(model, read, size, size, tile, 10, spacing="trailing"):
        together[:, top : top + part.shape[2], left : left + part.shape[3]] = part[0]

    names = ["side by side", "blended afterwards", "denoised together"]
    whole = [picture(x) for x in (beside, after, together)]
    panels("10-scene.jpg", [whole, [x[BORDER] for x in whole]], [names, ["detail"] * 3])
    rows, at = [], torch.arange(1, size) % tile == 0
    for name, x in zip(names, (beside, after, together)):
        steps = torch.stack([x.diff(dim=2).abs().mean(dim=(0, 1)), x.diff(dim=1).abs().mean(dim=(0, 2))])
        numbers = [f"{steps[:, where].mean():.3f}" for where in (at, ~at)]
        rows.append((name, *numbers, f"{decibels(x[None], scene.eo)[0]:.1f}", detail(x, scene.eo)))
    return table(("tiles", "step at borders", "elsewhere", "PSNR, dB", "detail"), *rows)


def section_11(model: CDiffSET, test: Pairs) -> str:
    """The exercises that need no training."""

    def row(name: str, model: CDiffSET = model) -> tuple:
        torch.manual_seed(0)
        made, confidence = model.translate(test.sar[SHOWN, None], 10, spacing="trailing")
        torch.manual_seed(0)
        others, _ = model.translate(test.sar, 10, spacing="trailing")
        scores = decibels(made, test.eo[SHOWN, None])[0], confidence.mean(), decibels(others, test.eo).mean()
        return name, *scores, detail(others, test.eo)

    rows = [row("as it is")]
    no_sar = lambda unet, z_sar, z_t, t, context: denoise(unet, z_sar * 0, z_t, t, context)  # noqa: E731
    swapped = lambda unet, z_sar, z_t, t, context: denoise(unet, z_t, z_sar, t, context)  # noqa: E731
    for name, wrong in (("1 no SAR latent", no_sar), ("2 swapped inputs", swapped)):
        with patch("cdiffset.denoise", wrong):
            rows.append(row(name))
    rows.append(row("3 epsilon for v", CDiffSET.from_pretrained(MODEL, prediction_type="epsilon")))
    with patch.object(DDIMScheduler, "step", partialmethod(DDIMScheduler.step, eta=1.0)):
        rows.append(row("4 eta = 1"))
    return table(("exercise", "PSNR, this pair", "confidence", f"PSNR, {TEST} pairs", "detail"), *rows)


# ----------------------------------------------------------------------------------------------------------


def fill(page: str, blocks: list[str]) -> str:
    """The page with its blocks of printed text replaced by these, in order."""
    new = iter(blocks)
    return re.sub(r"```text\n.*?```", lambda _: f"```text\n{next(new)}\n```", page, flags=re.DOTALL)


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    """Draws, prints, and updates the page; returns the exit code."""
    Parser(__doc__).parse_args(arguments)
    OUT.mkdir(exist_ok=True)
    model = CDiffSET.from_pretrained(MODEL)
    test, scene, lessons = Pairs(TEST, 128, seed=5), Pairs(1, 256, seed=5), Pairs(LESSONS, 128, seed=6)
    write_png(OUT / "sar.png", to_uint8(test.sar[SHOWN]))
    write_png(OUT / "eo.png", to_uint8(test.eo[SHOWN]))
    latents = model.encode(lessons.sar), model.encode(lessons.eo)
    base = fine_tuned(blind(model), latents)
    start, doubled = widened(base), widened(base, halve=False)
    learned = fine_tuned(start, latents)
    answers = {"before": start, "before, not halved": doubled, "beta = sqrt(a)": learned}
    answers |= {f"5 beta = {beta}": fine_tuned(start, latents, beta) for beta in (0, 1)}
    answers |= {"6 not halved": fine_tuned(doubled, latents)}
    blocks = [
        section_1(model, test),
        section_2(model, test),
        section_3(model, test),
        section_4(base, start, doubled, test),
        section_5(model, test),
        section_6(model, test),
        compare({"before": start, f"after {STEPS} steps": learned, "models/tiny": model}, test),
        section_8(model, test),
        section_9(model, test),
        section_10(model, scene),
        (section_11(model, test), compare(answers, test)),
    ]
    blocks = [block if isinstance(block, str) else "\n".join(block) for block in blocks]
    (OUT / "printed.txt").write_text("\n\n".join(blocks) + "\n")
    PAGE.write_text(fill(PAGE.read_text(), blocks))
    ANSWERS.write_text(fill(ANSWERS.read_text(), blocks[-1:]))
    print((OUT / "printed.txt").read_text())
    return 0


if __name__ == "__main__":
    run(main)

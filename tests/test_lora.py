"""train.py --lora: low-rank updates train, an ordinary model is saved."""

import copy
import shutil

import pytest
import torch
from conftest import Forked, assert_same_tensors, run
from safetensors.torch import load_file, save_file

import train
from cdiffset import CDiffSET, denoise
from checkpoint import checkpoints
from layers import LoRALinear, add_lora

BATCH = [
    torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16),
    torch.linspace(1, -1, 3 * 16 * 16).reshape(1, 3, 16, 16),
]


@pytest.fixture()
def command(dataset, base, tmp_path):
    options = "--size 16 --steps 8 --batch-size 4 --lr 3e-2 --workers 0 --device cpu --save-every 3 --lora 2"
    options += " --validate-every 4 --validate-images 2 --validate-steps 2 --dtype float32"
    return ["--data", str(dataset), "--model", str(base), *options.split()]


def predict(model):
    z_sar, z_t = (model.encode(x).float() for x in BATCH)
    with torch.no_grad():
        return torch.cat(denoise(model.unet, z_sar, z_t, 500, model.prompt_embedding), dim=1)


def test_zero_initialised_updates_change_nothing(base):
    model = CDiffSET.from_pretrained(base)
    before = predict(model)
    add_lora(model.unet, 4)
    assert sum(isinstance(layer, LoRALinear) for layer in model.unet.modules()) == 8 * 4  # four transformers
    assert torch.equal(predict(model), before)


def test_the_saved_model_is_merged_and_equals_the_unmerged_one(base, tmp_path):
    model = CDiffSET.from_pretrained(base)
    names = list(model.unet.state_dict())
    add_lora(model.unet, 4, frozen_dtype=torch.bfloat16)
    model.unet.float()  # the rounded weights, so that rounding in bfloat16 arithmetic does not hide a difference
    for layer in model.unet.modules():
        if isinstance(layer, LoRALinear):
            torch.nn.init.normal_(layer.up, std=0.1)
    assert list(model.unet.state_dict()) == names
    model.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        predict(CDiffSET.from_pretrained(tmp_path / "merged")), predict(model), rtol=1e-4, atol=1e-5
    )
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "merged", subfolder="unet")
    assert all(torch.equal(tensor, model.unet.state_dict()[name]) for name, tensor in unet.state_dict().items())


def test_a_step_changes_the_updates_and_the_first_and_last_layer_only(base):
    model = CDiffSET.from_pretrained(base)
    add_lora(model.unet, 4, frozen_dtype=torch.bfloat16)
    before = copy.deepcopy(dict(model.unet.named_parameters()))
    trainable = [p for p in model.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, 0.1)
    for _ in range(2):  # `down` has no gradient while `up` is zero
        with train.precision("cpu", "bfloat16"):
            train.objective(model, "cdiff", 0, cached=False)(model.unet, BATCH, [0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, p in model.unet.named_parameters() if not torch.equal(p, before[name])}
    expected = {name for name in before if name.endswith((".down", ".up")) or name.startswith(("conv_in", "conv_out."))}
    assert changed == expected
    frozen = [p for p in model.unet.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen if p.ndim > 1} == {torch.bfloat16} and {p.dtype for p in trainable} == {
        torch.float32
    }


def test_a_killed_run_resumes_to_the_same_end_from_small_checkpoints(command, base, tmp_path):
    assert train.main([*command, "--ema", "0.9", "--out", str(tmp_path / "whole")]) == 0
    out = tmp_path / "run"
    arguments = [*command, "--ema", "0.9", "--out", str(out), "--resume"]
    process = Forked(train.main, arguments)
    while not checkpoints(out) and process.process.is_alive():
        pass
    process.signal(9)
    process.wait()
    assert run(train.main, arguments)[0] == 0
    assert_same_tensors(out, tmp_path / "whole")
    stored = load_file(checkpoints(out)[-1])
    assert all("conv_in" in name or "conv_out" in name or name.partition(".to_")[2] for name in stored)
    assert CDiffSET.from_pretrained(out / "model").unet.config["out_channels"] == 5


def test_options_work_together_and_another_base_or_rank_is_refused(command, base, tmp_path):
    more = ["--size", "64", "--steps", "2", "--cache", str(tmp_path / "cache"), "--accumulate", "2", "--checkpointing"]
    out = ["--out", str(tmp_path / "run")]
    assert train.main([*command, *more, "--dtype", "bfloat16", *out]) == 0
    with pytest.raises(ValueError, match="lora 2 is now 3"):
        train.main([*command, *more, "--dtype", "bfloat16", *out, "--resume", "--lora", "3"])
    other = shutil.copytree(base, tmp_path / "base")
    file = other / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_norm_out.weight"] += 1
    file.unlink()
    save_file(tensors, file)
    with pytest.raises(ValueError, match="model .* is now"):
        train.main([*command, *more, "--dtype", "bfloat16", *out, "--resume", "--model", str(other)])

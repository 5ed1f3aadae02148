import math

import pytest
import torch
import torch.nn as nn

from guided_diffusion.fp16_util import (
    LG_LOSS_SCALE_RANGE,
    MixedPrecisionTrainer,
    convert_module_to_f16,
    convert_module_to_f32,
)
from guided_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults


class Half(nn.Module):
    """Convolutions that can be cast, and a float32 norm between them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(2, 4, 1), nn.GroupNorm(2, 4)
        self.last = nn.Conv2d(4, 1, 1)

    def convert_to_fp16(self):
        self.apply(convert_module_to_f16)

    def forward(self, x):
        h = self.first(x.to(self.first.weight.dtype))
        return self.last(self.norm(h.float()).to(h.dtype)).float().mean()


def trainer(**options):
    mp = MixedPrecisionTrainer(model=Half(), use_fp16=True, **options)
    return mp, torch.optim.AdamW(mp.master_params, lr=1e-2)


def test_casts_go_there_and_back():
    model = Half()
    model.apply(convert_module_to_f16)
    assert model.first.weight.dtype == torch.float16 and model.norm.weight.dtype == torch.float32
    model.apply(convert_module_to_f32)
    assert model.first.weight.dtype == torch.float32


def test_all_master_parameters_are_unscaled():
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    plain = Half()
    plain(x).backward()
    mp, _ = trainer(initial_lg_loss_scale=12.0)
    mp.backward(mp.model(x))
    norm = mp.gather_gradients()
    for (name, want), got in zip(plain.named_parameters(), mp.master_params, strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=2e-2, atol=2e-4, msg=name)
    want = torch.cat([p.grad.flatten() for p in plain.parameters()]).norm()
    torch.testing.assert_close(norm, want, rtol=2e-2, atol=0)


def test_masters_start_unrounded_and_the_model_follows_them():
    mp, opt = trainer(initial_lg_loss_scale=8.0)
    exact = dict(Half().named_parameters())
    for (name, _), master in zip(mp.model.named_parameters(), mp.master_params, strict=True):
        assert torch.equal(master, exact[name])
    mp.backward(mp.model(torch.ones(1, 2, 4, 4)))
    assert mp.optimize(opt)
    for parameter, master in zip(mp.model_params, mp.master_params, strict=True):
        assert torch.equal(parameter, master.to(parameter.dtype))
    assert mp.model_params[0].dtype == torch.float16


def test_overflow_skips_the_step_and_halves_the_scale():
    mp, opt = trainer(initial_lg_loss_scale=8.0)
    before = [p.clone() for p in mp.master_params]
    mp.backward(mp.model(torch.ones(1, 2, 4, 4)) * 1e30)
    assert not mp.optimize(opt)
    assert mp.lg_loss_scale == 7.0
    assert all(torch.equal(a, b) for a, b in zip(before, mp.master_params, strict=True))
    mp.zero_grad()
    mp.backward(mp.model(torch.ones(1, 2, 4, 4)))
    assert mp.optimize(opt)
    assert mp.lg_loss_scale == pytest.approx(7.001)


def test_the_scale_stays_in_its_range():
    mp, opt = trainer(initial_lg_loss_scale=0.0, fp16_scale_growth=5.0)
    lowest, highest = LG_LOSS_SCALE_RANGE
    for _ in range(10):  # gradients of exactly zero never overflow
        mp.zero_grad()
        mp.backward(mp.model(torch.ones(1, 2, 4, 4)) * 0.0)
        assert mp.optimize(opt)
    assert mp.lg_loss_scale == highest
    for _ in range(60):
        mp.zero_grad()
        mp.backward(mp.model(torch.ones(1, 2, 4, 4)) * math.inf)
        assert not mp.optimize(opt)
    assert mp.lg_loss_scale == lowest and 2.0**lowest >= torch.finfo(torch.float16).tiny


def test_a_unet_trains_in_float16():
    flags = {**model_and_diffusion_defaults(), "image_size": 8, "num_channels": 32}
    flags |= {"num_res_blocks": 1, "channel_mult": "1", "use_fp16": True}
    torch.manual_seed(0)
    model, diffusion = create_model_and_diffusion(**flags)
    mp = MixedPrecisionTrainer(model=model, use_fp16=True)
    opt = torch.optim.AdamW(mp.master_params, lr=1e-3)
    x, noise, t = torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, 3, 8, 8), torch.tensor([10, 900])
    losses = []
    for _ in range(12):
        mp.zero_grad()
        loss = diffusion.training_losses(model, x, t, noise=noise)["loss"].mean()
        mp.backward(loss)
        assert mp.optimize(opt)
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_state_dict_and_back():
    mp, _ = trainer()
    state = mp.master_params_to_state_dict([p + 1 for p in mp.master_params])
    assert state.keys() == mp.model.state_dict().keys()
    assert all(value.dtype == torch.float32 for value in state.values())
    for got, master in zip(mp.state_dict_to_master_params(state), mp.master_params, strict=True):
        assert torch.equal(got, master + 1)

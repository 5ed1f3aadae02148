"""The three networks against the published code's outputs, names, shapes and precision."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from guided_diffusion.unet import AttentionBlock, Downsample, EncoderUNetModel, SuperResModel
from tests.golden_values import arrays, fill, meta, shapes, small_model, tensor

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def small_superres(**changes):
    kwargs = {
        "image_size": 16,
        "in_channels": 3,
        "model_channels": 32,
        "out_channels": 6,
        "num_res_blocks": 1,
        "attention_resolutions": (2,),
        "channel_mult": (1, 2),
        "num_head_channels": 16,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
    }
    return SuperResModel(**{**kwargs, **changes})


def small_classifier(pool):
    return EncoderUNetModel(**meta()[f"classifier_{pool}"]["kwargs"])


@pytest.mark.parametrize("name", ["imagenet64_like", "lsun_like", "plain"])
def test_unet_matches_published_outputs(name):
    model, _ = small_model(name)
    assert shapes(model) == meta()[name]["state_dict"]
    labels = {"y": tensor("unet_forward", f"{name}/y")} if model.num_classes else {}
    with torch.no_grad():
        out = model(
            tensor("unet_forward", f"{name}/x"), tensor("unet_forward", f"{name}/t"), **labels
        )
    np.testing.assert_allclose(out, arrays("unet_forward")[f"{name}/out"], **CLOSE)


@pytest.mark.parametrize("name", ["imagenet64_like", "lsun_like", "plain"])
def test_half_precision_touches_the_published_tensors(name):
    model, _ = small_model(name)
    model.convert_to_fp16()
    halves = sorted(n for n, p in model.named_parameters() if p.dtype == torch.float16)
    assert halves == meta()[name]["fp16"]
    model.convert_to_fp32()
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_bfloat16_trunk_stays_near_float32_and_returns_float32():
    model, _ = small_model("lsun_like")
    x, t = tensor("unet_forward", "lsun_like/x"), tensor("unet_forward", "lsun_like/t")
    with torch.no_grad():
        full = model(x, t)
        model.convert_to(torch.bfloat16)
        half = model(x, t)
    assert half.dtype == torch.float32
    # bfloat16 keeps 8 bits: errors of a per cent of the output's spread are its own rounding.
    assert 0 < (half - full).abs().max() < 0.1 * full.std() + 0.1


@pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial", "spatial_v2"])
def test_classifier_matches_published_logits_and_gradients(pool):
    model = fill(small_classifier(pool))
    assert shapes(model) == meta()[f"classifier_{pool}"]["state_dict"]
    x = tensor("classifier_forward", f"{pool}/x").requires_grad_(True)
    logits = model(x, tensor("classifier_forward", f"{pool}/t"))
    log_p = F.log_softmax(logits, dim=-1)[range(3), [1, 2, 3]].sum()
    (gradient,) = torch.autograd.grad(log_p, x)
    want = arrays("classifier_forward")
    np.testing.assert_allclose(logits.detach(), want[f"{pool}/logits"], **CLOSE)
    np.testing.assert_allclose(gradient, want[f"{pool}/grad_x_logp_123"], **CLOSE)


def test_super_resolution_matches_published_output():
    model = fill(small_superres())
    assert shapes(model) == meta()["superres"]["state_dict"]
    with torch.no_grad():
        out = model(
            tensor("superres_forward", "x"),
            tensor("superres_forward", "t"),
            low_res=tensor("superres_forward", "low_res"),
        )
    np.testing.assert_allclose(out, arrays("superres_forward")["out"], **CLOSE)


def test_gradient_checkpointing_changes_no_gradient():
    x, t = tensor("unet_forward", "lsun_like/x"), tensor("unet_forward", "lsun_like/t")
    gradients = []
    for use_checkpoint in (False, True):
        model, _ = small_model("lsun_like", use_checkpoint=use_checkpoint)
        model(x, t).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_channels_last_changes_only_rounding():
    model, _ = small_model("plain")
    x, t = tensor("unet_forward", "plain/x"), tensor("unet_forward", "plain/t")
    with torch.no_grad():
        want = model(x, t)
        got = model.to(memory_format=torch.channels_last)(x, t)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_volumes_and_sequences_run():
    for dims, size in ((1, (8,)), (3, (2, 8, 8))):
        model = EncoderUNetModel(
            image_size=8,
            in_channels=1,
            model_channels=32,
            out_channels=4,
            num_res_blocks=1,
            attention_resolutions=(2,),
            channel_mult=(1, 1),
            dims=dims,
            pool="attention" if dims == 2 else "adaptive",
            num_head_channels=32,
        )
        outputs, h = model._encode(torch.randn(2, 1, *size), model._embed(torch.zeros(2)))
        assert h.shape == outputs[-1].shape
        assert h.shape[-1] == 4


def test_wrong_calls_name_what_is_missing():
    conditional, _ = small_model("imagenet64_like")
    unconditional, _ = small_model("lsun_like")
    x, t = torch.zeros(2, 3, 16, 16), torch.zeros(2)
    with pytest.raises(ValueError, match=r"y \(labels\) must be given"):
        conditional(x, t)
    with pytest.raises(ValueError, match="without classes"):
        unconditional(x, t, y=torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        conditional(x, t, y=torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="low_res"):
        small_superres()(x, t)
    with pytest.raises(ValueError, match="pool must be"):
        EncoderUNetModel(**{**meta()["classifier_adaptive"]["kwargs"], "pool": "max"})
    with pytest.raises(ValueError, match="must divide"):
        AttentionBlock(96, num_head_channels=64)
    with pytest.raises(ValueError, match="multiple of 32"):
        small_superres(model_channels=48)
    with pytest.raises(ValueError, match="pooling cannot"):
        Downsample(32, use_conv=False, out_channels=64)

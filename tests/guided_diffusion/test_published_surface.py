"""What code written for guided-diffusion imports: names, parameters, attributes, what they do."""

import importlib
import inspect
import json

import numpy as np
import pytest
import torch
import torch.nn as nn

from guided_diffusion import dist_util, fp16_util, logger, respace, unet
from guided_diffusion import nn as layers
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, LossType, ModelVarType
from guided_diffusion.image_datasets import ImageDataset, load_data
from guided_diffusion.resample import LossSecondMomentResampler, UniformSampler
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.train_util import find_ema_checkpoint, find_resume_checkpoint
from tests.golden_values import FOLDER, arrays, small_model

SURFACE = json.loads((FOLDER / "published_surface.json").read_text())
FUNCTIONS = [(m, n, w) for m, names in SURFACE.items() for n, w in names.items()]
# TensorFlow's modules, and what only a table with another separator needs.
ABSENT = {"event_pb2", "pywrap_tensorflow", "tf", "sep"}


def is_public(name):
    return name == "__init__" or not name.startswith("_")


def parameters_missing(function, wanted):
    there = inspect.signature(function).parameters
    free = {p.kind for p in there.values()} & {inspect.Parameter.VAR_KEYWORD}
    return [] if free else [name for name in wanted if name not in there]


@pytest.mark.parametrize(
    ("module", "name", "what"),
    [row for row in FUNCTIONS if is_public(row[1])],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_published_names_and_parameters_are_there(module, name, what):
    ours = getattr(importlib.import_module(f"guided_diffusion.{module}"), name)
    if isinstance(what, list):
        assert not parameters_missing(ours, what)
    elif isinstance(what, dict):
        for method, wanted in what.items():
            if method != "attributes" and is_public(method) and name != "SiLU":
                assert not parameters_missing(getattr(ours, method), wanted), method


def instances(folder):
    """One of every published class that has attributes, but for `TrainLoop`."""
    model, diffusion = small_model("imagenet64_like")
    options = {"image_size": 16, "in_channels": 3, "model_channels": 32, "out_channels": 3}
    options |= {"num_res_blocks": 1, "attention_resolutions": (2,), "channel_mult": (1, 2)}
    yield from (model, diffusion, diffusion, model.input_blocks[1][0])
    yield unet.EncoderUNetModel(**options)
    yield unet.SuperResModel(**options, num_classes=4)
    yield from (unet.Upsample(8, True), unet.Downsample(8, True), unet.AttentionBlock(32))
    yield unet.AttentionPool2d(2, 32, 16)
    yield from (unet.QKVAttention(1), unet.QKVAttentionLegacy(1))
    yield from (UniformSampler(diffusion), LossSecondMomentResampler(diffusion))
    yield fp16_util.MixedPrecisionTrainer(model=nn.Linear(2, 2))
    yield respace._WrappedModel(model, [0], False, 10)
    yield ImageDataset(8, ["a.png"])
    yield logger.Logger(None, [])
    formats = ("log", "csv", "json", "tensorboard")
    yield from (logger.make_output_format(name, folder) for name in formats)


def test_published_attributes_are_there(tmp_path):
    pytest.importorskip("tensorboard")
    seen = set()
    wanted = {n: w.get("attributes", []) for _, n, w in FUNCTIONS if isinstance(w, dict)}
    for instance in instances(tmp_path):
        for name in (cls.__name__ for cls in type(instance).__mro__):
            seen.add(name)
            public = {a for a in wanted.get(name, []) if is_public(a)} - ABSENT
            assert not {a for a in public if not hasattr(instance, a)}, name
    # That of TrainLoop is in test_train_util.py.
    assert {name for name, attributes in wanted.items() if attributes} - seen == {"TrainLoop"}


def test_respaced_chains_keep_the_published_steps():
    kept = np.unpackbits(arrays("space_timesteps_1000")["kept"], axis=1)[:, :1000]
    for count in range(1, 1001):
        ours = sorted(respace.space_timesteps(1000, [count]))
        assert ours == np.flatnonzero(kept[count - 1]).tolist(), count


def test_a_wrapped_model_sees_original_timesteps():
    seen = []
    wrapped = respace._WrappedModel(lambda x, t, y: seen.append((t, y)), [0, 5, 20], True, 500)
    wrapped(torch.zeros(2), torch.tensor([1, 2]), y=3)
    assert seen[0][0].tolist() == [10.0, 40.0] and seen[0][1] == 3


@pytest.mark.parametrize("use_kl", [False, True])
def test_losses_go_through_the_methods_that_subclasses_override(use_kl):
    calls = []

    class Counting(GaussianDiffusion):
        def p_mean_variance(self, *args, **kwargs):
            calls.append("p_mean_variance")
            return super().p_mean_variance(*args, **kwargs)

        def _vb_terms_bpd(self, *args, **kwargs):
            calls.append("_vb_terms_bpd")
            out = super()._vb_terms_bpd(*args, **kwargs)
            return {**out, "output": out["output"] + 100.0}

    base = create_gaussian_diffusion(learn_sigma=True, use_kl=use_kl)
    diffusion = Counting(
        betas=base.betas,
        model_mean_type=base.model_mean_type,
        model_var_type=base.model_var_type,
        loss_type=base.loss_type,
    )
    x, t = torch.zeros(2, 3, 4, 4), torch.tensor([0, 7])
    terms = diffusion.training_losses(lambda x, t: torch.zeros(2, 6, 4, 4), x, t)
    assert calls[-2:] == ["_vb_terms_bpd", "p_mean_variance"]
    assert (terms["loss" if use_kl else "vb"] > 99).all()


def test_variances_have_the_shape_of_x():
    diffusion = create_gaussian_diffusion()
    x, t = torch.ones(2, 3, 4, 4), torch.tensor([3, 900])
    for values in (diffusion.q_mean_variance(x, t), diffusion.q_posterior_mean_variance(x, x, t)):
        assert [value.shape for value in values] == [x.shape] * 3


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, ModelVarType.FIXED_LARGE),
        ({"sigma_small": True}, ModelVarType.FIXED_SMALL),
        ({"learn_sigma": True}, ModelVarType.LEARNED_RANGE),
    ],
)
def test_variance_types_of_the_flags(options, kind):
    diffusion = create_gaussian_diffusion(**options)
    assert diffusion.model_var_type == kind and diffusion.loss_type == LossType.MSE


def test_flat_master_parameters_go_there_and_back():
    model = nn.Sequential(nn.Linear(3, 2), nn.GroupNorm(1, 2)).half()
    groups = fp16_util.get_param_groups_and_shapes(model.named_parameters())
    assert [[name for name, _ in group] for group, _ in groups] == [
        ["0.bias", "1.weight", "1.bias"],
        ["0.weight"],
    ]
    masters = fp16_util.make_master_params(groups)
    assert [tuple(m.shape) for m in masters] == [(6,), (1, 6)]
    assert {m.dtype for m in masters} == {torch.float32}
    model[0].bias.grad = torch.ones(2).half()
    fp16_util.model_grads_to_master_grads(groups, masters)
    assert masters[0].grad.tolist() == [1, 1, 0, 0, 0, 0] and not masters[1].grad.any()
    before = fp16_util.master_params_to_state_dict(model, groups, masters, True)
    for name, value in model.state_dict().items():
        assert before[name].dtype == torch.float32 and torch.equal(before[name], value.float())
    again = fp16_util.state_dict_to_master_params(model, before, True)
    assert all(torch.equal(a, b) for a, b in zip(again, masters, strict=True))
    before = {name: value.detach().clone() for name, value in before.items()}
    with torch.no_grad():
        masters[1].add_(1)
    fp16_util.master_params_to_model_params(groups, masters)
    torch.testing.assert_close(model[0].weight.float(), before["0.weight"] + 1, rtol=0, atol=2e-3)
    fp16_util.zero_master_grads(masters)
    assert [m.grad for m in masters] == [None, None]


def test_the_checkpoint_function_gives_the_gradients_of_the_function():
    layer, x = nn.Linear(3, 3), torch.randn(2, 3, requires_grad=True)
    index, params = torch.tensor([1, 0]), list(layer.parameters())

    def function(x, index):
        return layer(x)[index].relu_()

    want = torch.autograd.grad(function(x, index).sum(), [x, *params])
    out = layers.CheckpointFunction.apply(function, 2, x, index, *params)
    for a, b in zip(torch.autograd.grad(out.sum(), [x, *params]), want, strict=True):
        torch.testing.assert_close(a, b)


def test_averages_of_half_precision_weights():
    average = [torch.ones(3)]
    layers.update_ema(average, [torch.full((3,), 3.0, dtype=torch.float16)], rate=0.5)
    assert average[0].tolist() == [2, 2, 2] and average[0].dtype == torch.float32
    with pytest.raises(ValueError, match="argument 2 is"):
        layers.update_ema(average, [torch.ones(3)] * 2)


def test_operations_of_an_attention():
    attention = unet.QKVAttention(2)
    attention.total_ops = torch.zeros(1, dtype=torch.float64)
    attention.count_flops(attention, None, (torch.zeros(5, 8, 4, 3),))
    assert attention.total_ops.item() == 2 * 5 * 12**2 * 8


def test_checkpoints_beside_one_another(tmp_path):
    assert find_resume_checkpoint() is None
    (tmp_path / "ema_0.99_000007.pt").touch()
    main = str(tmp_path / "model000007.pt")
    assert find_ema_checkpoint(main, 7, 0.99) == str(tmp_path / "ema_0.99_000007.pt")
    assert find_ema_checkpoint(main, 8, 0.99) is None
    assert find_ema_checkpoint("", 7, 0.99) is None


def test_batches_are_contiguous(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", arr_0=pixels)
    batch, _ = next(load_data(data_dir=str(tmp_path / "data.npz"), batch_size=3, image_size=8))
    assert batch.is_contiguous() and batch.view(3, -1).shape == (3, 192)


def test_what_torch_load_takes_is_taken(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pt")
    loaded = dist_util.load_state_dict(
        str(tmp_path / "w.pt"), map_location="cpu", weights_only=True
    )
    assert loaded["w"].tolist() == [1, 1]


def test_the_rank_without_mpi(monkeypatch):
    assert logger.get_rank_without_mpi_import() == 0
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "1")
    assert logger.get_rank_without_mpi_import() == 1


def test_a_residual_block_adds_its_embedding_unless_told_otherwise():
    block = unet.ResBlock(32, 8, 0.0)
    assert block.emb_layers[1].out_features == 32  # and twice as many to scale and shift

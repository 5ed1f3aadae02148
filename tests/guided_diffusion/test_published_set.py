"""Optimiser states by position: a set that the published code wrote, and other layouts."""

import gzip
import json
import shutil

import numpy as np
import pytest
import torch

from esddpm_io.errors import UserError
from guided_diffusion import logger
from guided_diffusion.checkpoint_sets import fit_optimizer_state
from guided_diffusion.commands import image_train
from guided_diffusion.image_datasets import load_data
from guided_diffusion.script_util import create_model_and_diffusion
from guided_diffusion.train_util import Draws, Trainer
from tests.golden_values import FOLDER, arrays

PUBLISHED = FOLDER / "published_set"
INFO = json.loads((PUBLISHED / "flags.json").read_text())


@pytest.fixture(autouse=True)
def log_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "run"))
    logger.configure(str(tmp_path / "run"), ["csv"])
    yield
    logger.reset()


@pytest.fixture
def published(tmp_path):
    """The path of modelNNNNNN.pt with its optimiser beside it."""
    for name in ("model000003.pt", "opt000003.pt"):
        with gzip.open(PUBLISHED / f"{name}.gz") as packed, open(tmp_path / name, "wb") as file:
            shutil.copyfileobj(packed, file)
    return tmp_path / "model000003.pt"


def resumed(published, data, loss=None, **changes):
    model, diffusion = create_model_and_diffusion(**INFO["flags"])
    steps = iter(arrays("published_set/continued")[f"step{k}/t"] for k in range(3))

    def published_loss(model, batch, cond, draw):
        cond = dict(cond)
        t, noise = torch.from_numpy(next(steps)), cond.pop("noise")
        return diffusion.training_losses(model, batch, t, cond, noise=noise)

    options = {"batch_size": 4, "lr": INFO["lr"], "weight_decay": INFO["weight_decay"]}
    return Trainer(
        model=model,
        data=data,
        loss=loss or published_loss,
        ema_rate="",
        resume_checkpoint=str(published),
        **{**options, **changes},
    )


@pytest.mark.parametrize("count", [torch.tensor, int])  # of steps, as PyTorch 1.11 saved it
def test_a_published_set_goes_on_to_its_own_result(published, count):
    path = published.with_name("opt000003.pt")
    state = torch.load(path, weights_only=True)
    for moments in state["state"].values():
        moments["step"] = count(float(moments["step"]))
    torch.save(state, path)
    want = arrays("published_set/continued")
    parts = [
        {name: torch.from_numpy(want[f"step{k}/{name}"]) for name in ("x", "y", "noise")}
        for k in range(3)
    ]
    data = iter([(part.pop("x"), part) for part in parts])
    trainer = resumed(published, data, iterations=6)
    for k in range(3):
        trainer.run_step(*next(data))
        assert trainer._last_loss == pytest.approx(float(want[f"step{k}/loss"]), abs=1e-4)
    ours, rows = trainer.model.state_dict(), want["after/label_emb.weight rows"]
    names = [key for key in want if key.startswith("after/") and not key.endswith("rows")]
    assert len(names) > 80
    for key in names:
        name = key.removeprefix("after/")
        got = ours[name][rows] if name == "label_emb.weight" else ours[name]
        # A bias in front of a norm has no gradient but rounding, which Adam enlarges.
        np.testing.assert_allclose(got, want[key], rtol=0, atol=3e-4, err_msg=name)


def test_image_train_goes_on_from_a_published_set(published, tmp_path):
    """Three steps of the command, against AdamW on the same data and random numbers."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", arr_0=pixels, arr_1=np.arange(9))
    data = {"data_dir": str(tmp_path / "data.npz"), "batch_size": 3}
    common = {"lr": INFO["lr"], "weight_decay": INFO["weight_decay"], "iterations": 6}
    options = {**INFO["flags"], **data, **common, "resume_checkpoint": published, "ema_rate": ""}
    image_train.main([part for k, v in options.items() for part in (f"--{k}", str(v))])
    ours = torch.load(tmp_path / "run/model000006.pt", weights_only=True)

    model, diffusion = create_model_and_diffusion(**INFO["flags"])
    model.load_state_dict(torch.load(published, weights_only=True))
    opt = torch.optim.AdamW(model.parameters())
    opt.load_state_dict(torch.load(tmp_path / "opt000003.pt", weights_only=True))
    opt.param_groups[0].update(lr=INFO["lr"], weight_decay=INFO["weight_decay"])
    stream = load_data(**data, image_size=16, class_cond=True, seed=0)
    stream.seek(3)
    for step in range(3, 6):
        batch, cond = next(stream)
        draw = Draws(0, step, 3, 0)
        t = torch.from_numpy((draw.uniforms(3) * 1000).astype(np.int64))
        losses = diffusion.training_losses(model, batch, t, cond, noise=draw.noise(batch))
        opt.zero_grad()
        losses["loss"].mean().backward()
        opt.step()
    start = torch.load(published, weights_only=True)
    moved = sum((ours[name] - start[name]).square().sum() for name in start).sqrt()
    apart = sum((ours[name] - p.detach()).square().sum() for name, p in model.named_parameters())
    assert apart.sqrt() < 1e-2 * moved


def state_of(shapes):
    """An AdamW state for tensors of these shapes, each with moments of its own."""
    moments = {
        index: {"step": 5, "exp_avg": torch.full(shape, index), "exp_avg_sq": torch.ones(shape)}
        for index, shape in enumerate(shapes)
    }
    return {"state": moments, "param_groups": [{"lr": 1.0, "params": list(range(len(shapes)))}]}


PARAMS = {
    "time_embed.0.weight": torch.zeros(4, 2),
    "time_embed.0.bias": torch.zeros(4),
    "label_emb.weight": torch.zeros(10, 4),
    "input_blocks.0.weight": torch.zeros(3, 3, 1, 1),
    "output_blocks.0.weight": torch.zeros(3, 3, 1, 1),
}


OTHER_SQUARES = state_of([tuple(p.shape) for p in PARAMS.values()])
OTHER_SQUARES["state"][0]["exp_avg_sq"] = torch.ones(1)  # which PyTorch would broadcast


def test_a_set_of_our_first_versions_takes_the_published_order():
    late = [0, 1, 3, 2, 4]  # label_emb came right before the decoder
    shapes = [tuple(p.shape) for p in PARAMS.values()]
    fitted = fit_optimizer_state(state_of([shapes[i] for i in late]), PARAMS, "opt.pt")
    firsts = [fitted["state"][i]["exp_avg"].flatten()[0].item() for i in range(5)]
    assert firsts == [0, 1, 3, 2, 4]
    assert fitted["param_groups"][0]["params"] == list(range(5))
    same = fit_optimizer_state(state_of(shapes), PARAMS, "opt.pt")
    assert [same["state"][i]["exp_avg"].flatten()[0].item() for i in range(5)] == list(range(5))


def test_flat_moments_of_float16_training_are_cut_into_parameters():
    state = state_of([(4,), (1, 8 + 40 + 9 + 9)])
    state["state"][1]["exp_avg"] = torch.arange(66.0).view(1, 66)
    fitted = fit_optimizer_state(state, PARAMS, "opt.pt")["state"]
    assert [fitted[i]["step"] for i in range(5)] == [5] * 5
    for index, value in enumerate(PARAMS.values()):
        assert fitted[index]["exp_avg"].shape == value.shape
    assert fitted[2]["exp_avg"].flatten().tolist() == list(range(8, 48))
    assert fitted[2]["exp_avg_sq"].flatten().tolist() == [1.0] * 40
    assert fitted[4]["exp_avg"].flatten().tolist() == list(range(57, 66))


@pytest.mark.parametrize(
    "state",
    [
        state_of([(4, 2), (4,), (10, 4), (3, 3, 1, 1)]),
        state_of([(4, 2), (4,), (10, 3), (3, 3, 1, 1), (3, 3, 1, 1)]),
        state_of([(4,), (1, 65)]),
        {"w": torch.zeros(3)},
        {"state": {}, "param_groups": []},
        OTHER_SQUARES,
    ],
)
def test_states_of_other_models_are_refused(state):
    with pytest.raises(UserError, match=r"^--resume_checkpoint: .*run/opt000003\.pt"):
        fit_optimizer_state(state, PARAMS, "run/opt000003.pt")


def test_moments_of_another_model_do_not_reach_the_optimiser(published):
    """As shapes were not compared, the fused kernel wrote beyond them."""
    path = published.with_name("opt000003.pt")
    state = torch.load(path, weights_only=True)
    state["state"][4], state["state"][5] = state["state"][5], state["state"][4]
    torch.save(state, path)
    with pytest.raises(UserError, match=r"opt000003\.pt are those of other parameters"):
        resumed(published, iter([]))

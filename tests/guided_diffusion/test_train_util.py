import contextlib
import copy
import errno
import json
import math
import types

import numpy as np
import pytest
import torch
import torch.nn as nn

from esddpm_io.errors import UserError
from guided_diffusion import checkpoint_sets, logger
from guided_diffusion.image_datasets import ArrayImages, BatchStream
from guided_diffusion.resample import UniformSampler, create_named_schedule_sampler
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.train_util import (
    Draws,
    Trainer,
    TrainLoop,
    get_blob_logdir,
    log_loss_dict,
    parse_resume_step_from_filename,
)
from guided_diffusion.training.diffusion import min_snr_weights
from tests.golden_values import FOLDER, arrays, meta, small_model


@pytest.fixture(autouse=True)
def log_folder(tmp_path):
    logger.configure(str(tmp_path / "log"), ["csv"])
    yield tmp_path / "log"
    logger.reset()


class Network(nn.Module):
    """A denoiser small enough for hundreds of steps, with dropout, as the U-Net has."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Dropout(0.2), nn.Conv2d(8, 3, 3, padding=1)
        )

    def forward(self, x, t):
        return self.layers(x) * (1 + t.view(-1, 1, 1, 1) / 1000)


class Process:
    """The least that `TrainLoop` asks of a diffusion process."""

    num_timesteps = 8

    def training_losses(self, model, x, t, model_kwargs=None, noise=None):
        noise = torch.randn_like(x) if noise is None else noise
        level = (t + 1).view(-1, 1, 1, 1) / self.num_timesteps
        error = model((1 - level) * x + level * noise, t) - noise
        return {"loss": error.square().flatten(1).mean(1)}


def batches(batch_size=4):
    pixels = np.random.default_rng(0).integers(0, 256, (11, 6, 6, 3), dtype=np.uint8)
    return BatchStream(ArrayImages(pixels, None), batch_size, seed=3)


class TimeBlind(nn.Sequential):
    def forward(self, x, t):
        return super().forward(x)


def train_loop(sampler="uniform", model=None, process=None, **changes):
    options = {
        "data": batches(),
        "batch_size": 4,
        "microbatch": -1,
        "lr": 1e-2,
        "ema_rate": "0.9,0.99",
        "log_interval": 2,
        "save_interval": 1000,
        "resume_checkpoint": "",
        "weight_decay": 0.01,
        "seed": 7,
    }
    process = process or Process()
    if isinstance(sampler, str):
        sampler = create_named_schedule_sampler(sampler, process)
    return TrainLoop(
        model=model or Network(),
        diffusion=process,
        schedule_sampler=sampler,
        **{**options, **changes},
    )


def everything(loop):
    """All that a resumed run must have in common with one that was not interrupted."""
    moments = [list(state.values()) for state in loop.opt.state.values()]
    parts = [loop.master_params, *loop.ema_params, *moments, *loop.sampler_state().values()]
    tensors = [t for part in parts for t in (part if isinstance(part, list) else [part])]
    return [t.detach().clone() for t in tensors]


def equal(first, second):
    return len(first) == len(second) and all(
        torch.equal(a, b) for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("sampler", ["uniform", "loss-second-moment"])
def test_three_steps_match_the_reference(sampler):
    golden = arrays("training")
    seed = next(iter(meta()["trajectories"].values()))["seed"] - 4321 + 55
    model, diffusion = small_model("lsun_like", dropout=0.0)
    model.train()
    steps = [(torch.from_numpy(golden[f"{sampler}/batch{i}"]), {}) for i in range(3)]
    torch.manual_seed(seed)
    np.random.seed(seed)
    loop = TrainLoop(
        model=model,
        diffusion=diffusion,
        data=iter(steps),
        batch_size=4,
        microbatch=2,
        lr=1e-3,
        ema_rate="0.9,0.99",
        log_interval=10**9,
        save_interval=10**9,
        resume_checkpoint="",
        schedule_sampler=create_named_schedule_sampler(sampler, diffusion),
        weight_decay=0.01,
        lr_anneal_steps=10,
    )
    for batch, cond in steps:
        loop.run_step(batch, cond)
        loop.step += 1
    names = [name for name, _ in model.named_parameters()]
    values = {"param": loop.master_params, "ema_0.9": loop.ema_params[0]}
    values["ema_0.99"] = loop.ema_params[1]
    checked = 0
    for key, want in golden.items():
        kind, what, *name = key.split("/", 2)
        if kind == sampler and what in values:
            got = values[what][names.index(name[0])].detach().numpy()
            np.testing.assert_allclose(got, want, rtol=1e-3, atol=2e-4, err_msg=key)
            checked += 1
    assert checked == 12


def test_microbatches_do_not_change_the_gradients():
    whole = train_loop(model=Network().eval())
    parts = train_loop(model=Network().eval(), microbatch=3)
    batch, cond = next(batches())
    for loop in (whole, parts):
        loop.forward_backward(batch, cond)
    for a, b in zip(whole.model_params, parts.model_params, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("microbatch", [-1, 1])
def test_gradients_are_of_weighted_losses(microbatch):
    """Weights 1 / (T p(t)) keep the expectation under a sampler that prefers some timesteps."""
    weights = torch.tensor([0.5, 3.0, 0.0])

    def loss(model, batch, cond, draw):
        return {"loss": model(batch).flatten(1).sum(1), "weight": cond["weight"]}

    model = nn.Linear(4, 2, bias=False)
    options = {"model": model, "data": iter([]), "batch_size": 3, "microbatch": microbatch}
    trainer = Trainer(loss=loss, ema_rate="", **options)
    batch = torch.arange(12.0).view(3, 4)
    terms = trainer.forward_backward(batch, {"weight": weights})
    assert terms["weight"].tolist() == weights.tolist()
    want = (weights[:, None] * batch).sum(0) / 3
    torch.testing.assert_close(model.weight.grad, want.expand(2, 4))


@pytest.mark.parametrize("sampler", ["uniform", "loss-second-moment"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(sampler):
    straight = train_loop(sampler, lr_anneal_steps=50, iterations=45)
    straight.run_loop()
    first = train_loop(sampler, lr_anneal_steps=50, iterations=23)
    first.run_loop()
    second = train_loop(sampler, lr_anneal_steps=50, iterations=45, resume_checkpoint="auto")
    assert second.global_step == 45, "auto takes the newest set, the straight run's"
    path = f"{logger.get_dir()}/model000023.pt"
    second = train_loop(sampler, lr_anneal_steps=50, iterations=45, resume_checkpoint=path)
    assert second.global_step == 23 and equal(everything(first), everything(second))
    second.run_loop()
    assert equal(everything(straight), everything(second))


def test_another_average_starts_from_the_weights_and_says_so(log_folder):
    train_loop(iterations=3).run_loop()
    logger.configure(str(log_folder), ["log"])
    loop = train_loop(resume_checkpoint="auto", ema_rate="0.99,0.5")
    assert loop.global_step == 3
    kept, fresh = loop.ema_params
    saved = torch.load(log_folder / "ema_0.99_000003.pt", weights_only=True)
    assert equal(kept, list(saved.values()))
    assert equal(fresh, [p.detach() for p in loop.master_params])
    told = (log_folder / "log.txt").read_text()
    assert "ema_0.5_000003.pt: this average starts from the model's weights" in told


@pytest.mark.parametrize(
    "before, now, said",
    [
        ("uniform", "loss-second-moment", "the saved sampler kept no losses: this one starts anew"),
        ("loss-second-moment", "uniform", "the saved sampler went by losses: this one starts anew"),
        ("loss-second-moment", "loss-second-moment", None),
        ("uniform", "uniform", None),
    ],
)
def test_another_sampler_of_timesteps_starts_anew(before, now, said, log_folder):
    train_loop(before, iterations=3).run_loop()
    logger.configure(str(log_folder), ["log"])
    loop = train_loop(now, iterations=5, resume_checkpoint="auto")
    told = (log_folder / "log.txt").read_text()
    assert f"--schedule_sampler: {said}" in told if said else "--schedule_sampler" not in told
    if now == "loss-second-moment":
        assert loop.schedule_sampler._loss_counts.sum() == (0 if said else 12)
    loop.run_loop()


def test_the_sampler_learns_once_a_step_whatever_the_microbatch(monkeypatch):
    """Else the draws of a step's later microbatches would depend on its earlier ones."""
    states = []
    for microbatch in (-1, 1):
        loop = train_loop("loss-second-moment", model=Network().eval(), microbatch=microbatch)
        calls = []
        update = loop.schedule_sampler.update_with_all_losses
        monkeypatch.setattr(
            loop.schedule_sampler,
            "update_with_all_losses",
            lambda ts, losses, update=update, calls=calls: (calls.append(ts), update(ts, losses)),
        )
        data = batches()
        for _ in range(40):
            loop.run_step(*next(data))
            loop.step += 1
        assert len(calls) == 40 and all(len(ts) == 4 for ts in calls)
        assert loop.schedule_sampler._warmed_up()
        states.append(calls)
    assert states[0] == states[1]


@pytest.mark.parametrize("flag", ["iterations", "lr_anneal_steps"])
def test_steps_that_are_done_already(flag, log_folder):
    train_loop(iterations=5).run_loop()
    before = {path: path.stat().st_mtime_ns for path in log_folder.glob("*.pt")}
    logger.configure(str(log_folder), ["log"])
    train_loop(**{flag: 3}, resume_checkpoint="auto").run_loop()
    assert f"--{flag} 3: 5 steps are done already" in (log_folder / "log.txt").read_text()
    assert before == {path: path.stat().st_mtime_ns for path in log_folder.glob("*.pt")}


def test_steps_beyond_the_fall_of_lr_are_told_of(log_folder):
    logger.configure(str(log_folder), ["log"])
    loop = train_loop(iterations=5, lr_anneal_steps=3)
    loop.run_loop()
    assert "lr is 0 after --lr_anneal_steps 3" in (log_folder / "log.txt").read_text()
    assert loop.global_step == 5 and loop.opt.param_groups[0]["lr"] == 0


def test_another_batch_size_goes_on_with_the_data_and_the_count(log_folder):
    def stream(size):
        pixels = np.arange(11 * 108, dtype=np.uint16).astype(np.uint8).reshape(11, 6, 6, 3)
        return BatchStream(ArrayImages(pixels, None), size, shuffle=False, random_flip=False)

    train_loop(iterations=5, data=stream(3), batch_size=3).run_loop()
    logger.configure(str(log_folder), ["log", "csv"])
    data = stream(4)
    options = {"data": data, "batch_size": 4, "log_interval": 1, "save_interval": 1}
    loop = train_loop(iterations=7, resume_checkpoint="auto", **options)
    loop.run_loop()
    assert "the data go on after 15 images" in (log_folder / "log.txt").read_text()
    rows = (log_folder / "progress.csv").read_text().splitlines()
    column = rows[0].split(",").index("samples")
    assert [row.split(",")[column] for row in rows[-2:]] == ["19", "23"]
    batch, _ = next(data)
    want = stream(1)
    want.seek(23)
    assert torch.equal(batch[:1], next(want)[0])
    again = train_loop(iterations=8, resume_checkpoint="auto", **options)
    assert again.samples == 23


def test_a_run_for_a_test_ends_after_its_first_save(log_folder, monkeypatch):
    monkeypatch.setenv("DIFFUSION_TRAINING_TEST", "1")
    loop = train_loop(iterations=50, save_interval=4)
    loop.run_loop()
    assert loop.global_step == 4
    assert [path.name for path in log_folder.glob("model*")] == ["model000004.pt"]


def test_published_attributes_are_there():
    surface = json.loads((FOLDER / "published_surface.json").read_text())
    loop = train_loop(fp16_scale_growth=2e-3)
    published = surface["train_util"]["TrainLoop"]["attributes"]
    assert not [name for name in published if not hasattr(loop, name)]
    assert (loop.fp16_scale_growth, loop.use_fp16, loop.use_ddp) == (2e-3, False, False)


def test_without_a_seed_the_global_generators_go_on():
    def unseeded(**options):
        # A plain iterator, as other people's code has: constant data, so only the draws differ.
        torch.manual_seed(5)
        np.random.seed(5)
        batch = torch.linspace(-1, 1, 432).view(4, 3, 6, 6)
        return train_loop(seed=None, data=iter([(batch, {})] * 40), **options)

    straight = unseeded(iterations=8)
    straight.run_loop()
    unseeded(iterations=5).run_loop()
    path = f"{logger.get_dir()}/model000005.pt"
    resumed = unseeded(iterations=8, resume_checkpoint=path)
    resumed.run_loop()
    assert equal(everything(straight), everything(resumed))


def test_file_names_and_contents(log_folder):
    sidecar = {"flags": {"image_size": 6}, "kind": "model", "early_stop_steps": 5}
    loop = train_loop(iterations=4, save_interval=2, keep_checkpoints=1, sidecar=sidecar)
    loop.run_loop()
    assert {p.name for p in log_folder.iterdir()} == {
        "progress.csv",
        "progress.png",
        *(f"{name}000004.pt" for name in ("model", "opt", "state", "ema_0.9_", "ema_0.99_")),
        *(f"{name}000004.json" for name in ("model", "ema_0.9_", "ema_0.99_")),
    }
    state = torch.load(log_folder / "ema_0.9_000004.pt", weights_only=True)
    assert state.keys() == Network().state_dict().keys()
    for value, param in zip(state.values(), loop.ema_params[0], strict=True):
        assert torch.equal(value, param)


def test_a_published_set_without_our_extra_file_resumes(log_folder):
    train_loop(iterations=3).run_loop()
    (log_folder / "state000003.pt").unlink()
    loop = train_loop(iterations=5, resume_checkpoint=f"{log_folder}/model000003.pt")
    assert loop.resume_step == 3 and loop.opt.state
    loop.run_loop()
    assert (log_folder / "model000005.pt").exists()


def test_weights_alone_start_a_new_run(log_folder, tmp_path):
    train_loop(iterations=3).run_loop()
    weights = tmp_path / "64x64_diffusion.pt"
    (log_folder / "model000003.pt").rename(weights)
    loop = train_loop(resume_checkpoint=str(weights))
    assert loop.resume_step == 0 and not loop.opt.state
    state = torch.load(weights, weights_only=True)
    assert equal(list(state.values()), [p.detach() for p in loop.master_params])
    assert equal(list(state.values()), loop.ema_params[0])


def test_a_resumed_run_has_the_rates_that_are_asked_for_now():
    train_loop(iterations=2).run_loop()
    loop = train_loop(resume_checkpoint="auto", lr=3e-3, weight_decay=0.2, iterations=3)
    loop.run_loop()
    (group,) = loop.opt.param_groups
    assert (loop.global_step, group["lr"], group["weight_decay"]) == (3, 3e-3, 0.2)


def test_networks_of_a_wrapped_model_resume(log_folder):
    """DistributedDataParallel puts `module.` before all names."""
    train_loop(iterations=3).run_loop()
    want = everything(train_loop(resume_checkpoint="auto"))
    for path in (*log_folder.glob("model*.pt"), *log_folder.glob("ema*.pt")):
        state = torch.load(path, weights_only=True)
        torch.save({f"module.{name}": value for name, value in state.items()}, path)
    assert equal(everything(train_loop(resume_checkpoint="auto")), want)
    torch.save({"layers.0.weight": torch.zeros(3)}, log_folder / "ema_0.9_000003.pt")
    with pytest.raises(UserError, match=r"--resume_checkpoint: .*ema_0\.9_000003\.pt does not fit"):
        train_loop(resume_checkpoint="auto")


def test_checkpoints_that_do_not_fit_are_explained(log_folder, tmp_path):
    with pytest.raises(UserError, match=r"--resume_checkpoint: there is no file .*model000009\.pt"):
        train_loop(resume_checkpoint=f"{log_folder}/model000009.pt")
    train_loop(iterations=1).run_loop()
    path = log_folder / "model000001.pt"
    other = nn.Sequential(nn.Conv2d(3, 3, 1))
    with pytest.raises(UserError, match=r"--resume_checkpoint: .*does not fit.*layers\.0\.weight"):
        train_loop(model=other, resume_checkpoint=str(path))
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match=r"--resume_checkpoint: .*truncated"):
        train_loop(resume_checkpoint=str(path))


def test_a_full_disk_leaves_the_set_before_usable(log_folder, monkeypatch):
    loop = train_loop(iterations=2)
    loop.run_loop()
    before = everything(loop)

    def full(obj, path, save=checkpoint_sets.save_checkpoint):
        if "model" in path:
            raise OSError(errno.ENOSPC, "No space left on device", path)
        save(obj, path)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(checkpoint_sets, "save_checkpoint", full)
        sidecar = {"flags": {}, "kind": "model"}
        train_loop(iterations=4, resume_checkpoint="auto", sidecar=sidecar).run_loop()
    assert not list(log_folder.glob("*000004*"))
    resumed = train_loop(resume_checkpoint="auto")
    assert resumed.global_step == 2 and equal(everything(resumed), before)


class Broken(Process):
    """Losses that are NaN in chosen calls, for the examples with the highest t."""

    def __init__(self, calls):
        self.calls, self.count = calls, 0

    def training_losses(self, model, x, t, **more):
        terms = super().training_losses(model, x, t, **more)
        self.count += 1
        if self.count in self.calls:
            terms["loss"] = torch.where(t == t.max(), math.nan, terms["loss"])
        return terms


def run_broken(calls, steps=6):
    loop = train_loop(iterations=steps)
    loop.diffusion = Broken(calls)
    loop.run_loop()
    return loop


def test_a_loss_that_is_not_finite_is_reported_and_skipped(tmp_path, capsys):
    logger.configure(str(tmp_path / "other"), ["stdout"])
    loop = run_broken({2, 3, 5})
    out = capsys.readouterr().out
    told = [line for line in out.splitlines() if "not finite" in line]
    assert [line.split(":")[0] for line in told] == ["step 2", "step 3", "step 5"]
    t, _ = loop.schedule_sampler.sample(4, loop.device, Draws(7, 1, 4, 0).uniforms(4))
    highest = [step for step in sorted(t.tolist()) if step == t.max()]
    assert told[0] == f"step 2: the loss is not finite at timesteps {highest}; no update"
    assert all(torch.isfinite(p).all() for p in (*loop.master_params, *loop.ema_params[0]))


def test_evaluation_has_noise_of_its_own_and_changes_nothing():
    seen = []

    def loss(model, batch, cond, draw):
        seen.append((model.training, draw.noise(batch)))
        return {"loss": model(batch).flatten(1).square().mean(1)}

    options = {"data": iter([]), "batch_size": 2, "ema_rate": "", "seed": 0}
    trainer = Trainer(model=nn.Linear(4, 4), loss=loss, **options)
    batch = torch.ones(2, 4)
    trainer.run_step(batch, {})
    weights = everything(trainer)
    trainer.evaluate(batch, {}, "val_")
    assert equal(everything(trainer), weights) and "val_loss" in logger.getkvs()
    (training, noise), (evaluating, other) = seen
    assert training and not evaluating and trainer.model.training
    assert not torch.equal(noise, other), "else the validation would see what was trained on"


def test_a_loss_that_is_not_finite_halves_the_loss_scale():
    def loss(model, batch, cond, draw):
        return {"loss": model(batch.half())[:, 0].float() * cond["factor"]}

    options = {"data": iter([]), "batch_size": 1, "ema_rate": "", "precision": "float16"}
    trainer = Trainer(model=Half(4, 1), loss=loss, initial_lg_loss_scale=8.0, **options)
    for factor, scale in ((1.0, 8.001), (math.inf, 7.001)):
        trainer.run_step(torch.ones(1, 4), {"factor": torch.tensor([factor])})
        assert trainer.mp_trainer.lg_loss_scale == pytest.approx(scale)


def test_dropout_repeats_in_a_step_and_differs_from_process_to_process():
    drawn = []

    def loss(model, batch, cond, draw):
        drawn.append(torch.rand(3).tolist())
        return {"loss": model(batch)[:, 0]}

    options = {"data": iter([]), "batch_size": 1, "ema_rate": "", "seed": 0}
    trainer = Trainer(model=nn.Linear(4, 1), loss=loss, **options)
    for rank, step in ((0, 0), (0, 0), (1, 0), (0, 1)):
        trainer.rank, trainer.step = rank, step
        trainer.forward_backward(torch.ones(1, 4), {})
    assert drawn[0] == drawn[1] and drawn[0] != drawn[2] and drawn[0] != drawn[3]


def test_three_in_a_row_stop_the_run(log_folder):
    with pytest.raises(
        UserError, match=r"not finite in 3 steps in a row, up to step 4: lower --lr"
    ):
        run_broken({2, 3, 4})
    assert not list(log_folder.glob("model*"))


def test_figures_by_quarter_of_the_early_stopped_steps(log_folder):
    process = Process()
    sampler = create_named_schedule_sampler("uniform", process, 2)
    train_loop(
        sampler=sampler, lr=1e-3, ema_rate="0.9", log_interval=5, iterations=5, data=batches()
    ).run_loop()
    header, row = (log_folder / "progress.csv").read_text().splitlines()
    figures = dict(zip(header.split(","), map(float, row.split(",")), strict=True))
    # t is 0 or 1 of T' = 2: the first and the third quarter.
    assert {"loss_q0", "loss_q2"} <= figures.keys() and "loss_q1" not in figures
    assert figures["step"] == 5 and figures["samples"] == 20
    assert figures["lr"] == 1e-3 and figures["param_norm"] > 0 and figures["grad_norm"] > 0


def test_lr_falls_to_the_end():
    loop = train_loop(lr_anneal_steps=4)
    loop.run_loop()
    assert loop.global_step == 4
    assert loop.opt.param_groups[0]["lr"] == pytest.approx(1e-2 * (1 - 2 / 4))


def test_lr_rises_from_the_start_and_falls_to_the_end():
    loop = train_loop(lr_warmup=4, lr_anneal_steps=10)
    rates = []
    for batch, cond in (next(batches()) for _ in range(6)):
        loop.run_step(batch, cond)
        loop.step += 1
        rates.append(loop.opt.param_groups[0]["lr"] / loop.lr)
    assert rates == pytest.approx([0.25, 0.5, 0.75 * 0.9, 0.8, 0.7, 0.6])


class Half(nn.Linear):
    def convert_to_fp16(self):
        self.half()


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize(("limit", "factor"), [(0.0, 1), (0.5, 0.5), (3.0, 1)])
def test_gradients_are_scaled_down_to_the_longest_that_is_wanted(precision, limit, factor):
    """The length of all gradients together, in units of the loss."""

    def loss(model, batch, cond, draw):
        return {"loss": model(batch.to(model.weight.dtype))[:, 0].float()}

    kept = []
    trainer = Trainer(
        model=Half(4, 1, bias=False),
        data=iter([]),
        batch_size=1,
        loss=loss,
        ema_rate="",
        precision=precision,
        initial_lg_loss_scale=4.0,
        grad_clip=limit,
    )
    trainer.opt.register_step_pre_hook(
        lambda *_: kept.append([p.grad.clone() for p in trainer.master_params])
    )
    batch = torch.tensor([[0.6, 0.0, -0.8, 0.0]])
    assert trainer.run_step(batch, {})
    torch.testing.assert_close(kept[0][0], factor * batch, rtol=1e-3, atol=1e-6)
    assert logger.getkvs()["grad_norm"] == pytest.approx(1, rel=1e-3)  # before it was scaled


@pytest.mark.parametrize(
    ("flags", "per_x_start"),
    [
        ({}, lambda snr: snr),
        ({"predict_xstart": True}, lambda snr: np.ones_like(snr)),
        ({"v_prediction": True}, lambda snr: snr + 1),
        ({"learn_sigma": True}, lambda snr: snr),
    ],
)
def test_min_snr_weighs_squared_errors_alone(flags, per_x_start):
    """Whatever the network predicts, an error of x_0 counts min(SNR, gamma), up to one factor."""
    diffusion = create_gaussian_diffusion(steps=1000, noise_schedule="cosine", **flags)
    model = nn.Conv2d(3, 6 if flags.get("learn_sigma") else 3, 1)
    loop = train_loop(
        UniformSampler(diffusion, 400),
        model=TimeBlind(model),
        process=diffusion,
        snr_gamma=5.0,
    )
    batch, cond = next(batches())
    terms = loop.compute_losses(batch, cond, Draws(7, 0, 4, 0))
    levels = diffusion.alphas_cumprod[:400]
    snr = levels / (1 - levels)
    weights = np.minimum(snr, 5) / per_x_start(snr)
    weights = torch.from_numpy(weights / weights.mean())[terms["t"]]
    expected = weights * terms["mse"] + terms.get("vb", 0)
    torch.testing.assert_close(terms["loss"].double(), expected.double(), rtol=1e-5, atol=1e-6)


def test_a_run_that_goes_on_with_other_weights_says_so(log_folder):
    diffusion = create_gaussian_diffusion(steps=1000)
    options = {"model": TimeBlind(nn.Conv2d(3, 3, 1)), "process": diffusion}
    loop = train_loop(UniformSampler(diffusion), snr_gamma=5.0, **options)
    loop.run_step(*next(batches()))
    loop.save()
    for gamma, says in ((5.0, False), (0.0, True)):
        logger.configure(str(log_folder), ["log"])
        train_loop(UniformSampler(diffusion), snr_gamma=gamma, resume_checkpoint="auto", **options)
        logger.reset()
        said = (log_folder / "log.txt").read_text()
        assert ("--snr_gamma 0: the steps so far had 5 (0: no weights)" in said) == says


def test_min_snr_is_refused_where_there_is_no_squared_error():
    diffusion = create_gaussian_diffusion(steps=1000, use_kl=True)
    with pytest.raises(ValueError, match="^snr_gamma goes with losses of the squared error"):
        min_snr_weights(diffusion, 5.0, 10)


def test_averages_follow_their_rates():
    loop = train_loop(ema_rate="0.5,0.9")
    start = [p.detach().clone() for p in loop.master_params]
    loop.run_step(*next(batches()))
    for rate, params in zip((0.5, 0.9), loop.ema_params, strict=True):
        for ema, old, new in zip(params, start, loop.master_params, strict=True):
            torch.testing.assert_close(ema, rate * old + (1 - rate) * new.detach())


def test_bfloat16_autocast_trains_close_to_float32():
    losses = {}
    for precision in ("float32", "bfloat16"):
        seen = []

        def loss(model, batch, cond, draw, seen=seen):
            output = model(batch, torch.zeros(len(batch)))
            seen.append(torch.is_autocast_enabled("cpu"))
            return {"loss": (output.float() - batch).square().flatten(1).mean(1)}

        trainer = Trainer(
            model=Network().eval(),
            data=batches(),
            batch_size=4,
            loss=loss,
            lr=1e-2,
            iterations=30,
            precision=precision,
            seed=1,
        )
        trainer.run_loop()
        losses[precision] = trainer._last_loss
        assert all(p.dtype == torch.float32 for p in trainer.master_params)
        assert set(seen) == {precision == "bfloat16"}
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.1)
    assert losses["float32"] < 0.2


def test_float16_unscales_saves_and_resumes():
    class Half(Network):
        def convert_to_fp16(self):
            self.layers.half()

        def forward(self, x, t):
            return super().forward(x.to(self.layers[0].weight.dtype), t).float()

    straight = train_loop(model=Half(), use_fp16=True, iterations=6, initial_lg_loss_scale=8.0)
    straight.run_loop()
    assert straight.model.layers[0].weight.dtype == torch.float16
    assert straight.mp_trainer.lg_loss_scale == pytest.approx(8.006)
    first = train_loop(model=Half(), use_fp16=True, iterations=3, initial_lg_loss_scale=8.0)
    first.run_loop()
    path = f"{logger.get_dir()}/model000003.pt"
    second = train_loop(model=Half(), use_fp16=True, iterations=6, resume_checkpoint=path)
    second.run_loop()
    assert second.mp_trainer.lg_loss_scale == straight.mp_trainer.lg_loss_scale
    assert equal(everything(straight), everything(second))


def test_channels_last_changes_memory_not_results():
    # Without dropout: its mask is drawn in memory order.
    plain = train_loop(model=Network().eval(), iterations=5)
    last = train_loop(model=Network().eval(), iterations=5, channels_last=True)
    for loop in (plain, last):
        loop.run_loop()
    assert last.model.layers[0].weight.is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(plain.master_params, last.master_params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    path = f"{logger.get_dir()}/model000005.pt"
    resumed = train_loop(iterations=5, channels_last=False, resume_checkpoint=path)
    for param, moments in resumed.opt.state.items():
        assert moments["exp_avg"].stride() == param.stride()


def test_compiling_changes_no_results():
    """One compilation, though the last microbatch is smaller; the loss to a rounding."""
    plain, compiled = (
        train_loop(model=Network().eval(), microbatch=3, compile=compile)
        for compile in (False, True)
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    data = batches()
    for _ in range(3):
        batch, cond = next(data)
        losses = [loop.forward_backward(batch, cond)["loss"] for loop in (plain, compiled)]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
        for loop in (plain, compiled):
            loop.run_step(batch, cond)
            loop.step += 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for a, b in zip(plain.master_params, compiled.master_params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    compiled.save()
    state = torch.load(f"{logger.get_dir()}/model000003.pt", weights_only=True)
    assert state.keys() == Network().state_dict().keys()


def test_draws_belong_to_positions_of_the_global_batch():
    like = torch.zeros(6, 3, 4, 4)
    whole = Draws(1, 5, 6, 0)
    t, noise = whole.uniforms(6), whole.noise(like)
    for first in (0, 3):
        part = Draws(1, 5, 6, first)
        np.testing.assert_array_equal(part.uniforms(3), t[first : first + 3])
        assert torch.equal(part.noise(like[:3]), noise[first : first + 3])
    again = Draws(1, 6, 6, 0)
    assert not np.array_equal(again.uniforms(6), t) and not torch.equal(again.noise(like), noise)
    assert abs(noise.mean()) < 0.2 and abs(noise.std() - 1) < 0.2


def test_sample_grids_use_the_average_and_disturb_nothing(log_folder):
    drawn = []

    def draw(model):
        drawn.append((copy.deepcopy(list(model.parameters())), model.training))
        torch.rand(3)
        return np.zeros((4, 4, 3), np.uint8)

    plain = train_loop(iterations=4, seed=None, data=batches())
    torch.manual_seed(1)
    np.random.seed(1)
    plain.run_loop()
    sampling = train_loop(
        iterations=4, seed=None, data=batches(), sample_interval=2, draw_samples=draw
    )
    torch.manual_seed(1)
    np.random.seed(1)
    sampling.run_loop()
    assert equal(everything(plain), everything(sampling)) and sampling.model.training
    pictures = {p.name for p in log_folder.glob("samples*.png")}
    assert pictures == {"samples000002.png", "samples000004.png"}
    weights, training = drawn[1]
    assert not training and equal([w.detach() for w in weights], sampling.ema_params[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"ema_rate": "0.9,x"},
            r'ema_rate must be a comma list of numbers in \[0, 1\], not "0.9,x"',
        ),
        ({"ema_rate": "1.5"}, "ema_rate must be"),
        ({"precision": "int8"}, "precision must be one of float32, bfloat16, float16"),
        ({"shard": True, "compile": True}, "shard goes with float32 and bfloat16, and without"),
        ({"shard": True, "precision": "float16"}, "shard goes with float32 and bfloat16"),
    ],
)
def test_impossible_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        train_loop(**options)


def test_a_folder_is_needed_to_save():
    logger.reset()
    with pytest.raises(UserError, match="logger.configure"):
        train_loop(iterations=1).run_loop()


def test_newest_set_that_is_whole(log_folder):
    train_loop(iterations=4, save_interval=1).run_loop()
    (log_folder / "opt000004.pt").unlink()
    (log_folder / "opt000003.pt").unlink()
    assert checkpoint_sets.newest_set(log_folder).step == 2
    checkpoint_sets.prune_sets(log_folder, 2, written=4)
    assert sorted({p.name[-9:-3] for p in log_folder.glob("*.pt")}) == ["000003", "000004"]


def test_what_was_just_saved_is_kept_beside_sets_that_went_further(log_folder):
    """A run resumed from an earlier set than the newest must not lose what it writes."""
    train_loop(iterations=6, save_interval=2).run_loop()
    resume = str(log_folder / "model000002.pt")
    train_loop(iterations=3, keep_checkpoints=1, resume_checkpoint=resume).run_loop()
    steps = sorted({p.name[-9:-3] for p in log_folder.glob("*.pt")})
    assert steps == ["000003", "000004", "000006"]
    train_loop(
        iterations=7, save_interval=2, keep_checkpoints=2, resume_checkpoint="auto"
    ).run_loop()
    assert sorted({p.name[-9:-3] for p in log_folder.glob("*.pt")}) == ["000006", "000007"]


def test_a_loop_of_ones_own_on_the_published_parts(log_folder):
    """The parts that scripts written for guided-diffusion put together themselves."""
    from guided_diffusion import dist_util
    from guided_diffusion.fp16_util import MixedPrecisionTrainer

    dist_util.setup_dist()
    model, process = Network().eval().to(dist_util.dev()), Process()
    sampler = create_named_schedule_sampler("uniform", process)
    trainer = MixedPrecisionTrainer(model=model, use_fp16=False, initial_lg_loss_scale=16.0)
    opt = torch.optim.AdamW(trainer.master_params, lr=1e-2)
    data = batches()
    for step in range(3):
        logger.logkv("step", step)
        batch, _ = next(data)
        t, _ = sampler.sample(len(batch), dist_util.dev())
        losses = process.training_losses(model, batch, t)
        log_loss_dict(process, t, {f"train_{name}": value for name, value in losses.items()})
        trainer.zero_grad()
        trainer.backward(losses["loss"].mean())
        assert trainer.optimize(opt)
        logger.dumpkvs()
    header = (log_folder / "progress.csv").read_text().splitlines()[0].split(",")
    assert {"step", "train_loss", "grad_norm", "param_norm"} <= set(header)
    state = trainer.master_params_to_state_dict(trainer.master_params)
    torch.save(state, log_folder / "model000003.pt")
    loaded = dist_util.load_state_dict(
        str(log_folder / "model000003.pt"), map_location=dist_util.dev()
    )
    assert equal(list(loaded.values()), [p.detach() for p in model.parameters()])


def test_checkpoints_lie_in_the_folder_of_the_log(log_folder):
    assert get_blob_logdir() == str(log_folder)
    logger.reset()
    assert get_blob_logdir() is None


def test_step_of_a_file_name():
    assert parse_resume_step_from_filename("a/model012345.pt") == 12345
    assert parse_resume_step_from_filename("a/64x64_diffusion.pt") == 0
    assert parse_resume_step_from_filename("a/supermodel000001.pt") == 0


@pytest.mark.parametrize("device", ["cuda:1", "cpu"])
def test_samples_while_training_save_the_generators_of_their_device_alone(
    device, tmp_path, monkeypatch
):
    """torch would save those of all GPUs of the machine, and make contexts on each."""
    saved = []

    def fork_rng(devices):
        saved.extend(devices)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    run = types.SimpleNamespace(
        rank=0,
        shard=False,
        device=torch.device(device),
        model=None,
        draw_samples=lambda model: np.zeros((4, 4, 3), np.uint8),
        global_step=7,
        _averaged_weights=contextlib.nullcontext,
        _folder=lambda: tmp_path,
    )
    TrainLoop.save_samples(run)
    assert saved == ([torch.device("cuda", 1)] if device != "cpu" else [])
    assert (tmp_path / "samples000007.png").exists()

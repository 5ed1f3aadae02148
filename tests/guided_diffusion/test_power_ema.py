import numpy as np
import pytest
import torch

from esddpm_io.errors import UserError
from guided_diffusion import logger
from guided_diffusion.checkpoints import read_sidecar
from guided_diffusion.commands import power_ema as command
from guided_diffusion.power_ema import Profile, gamma_of, kept_share, mixture, widths
from tests.guided_diffusion.test_train_util import equal, everything, train_loop


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.97), (0.10, 6.94), (0.25, 0.72)])
def test_exponents_are_those_of_the_paper_and_have_the_width(width, gamma):
    found = gamma_of(width)
    assert found == pytest.approx(gamma, abs=0.005)
    share = (np.arange(100_000) + 0.5) / 100_000
    weights = share**found / np.sum(share**found)
    spread = np.sqrt(np.sum(weights * share**2) - np.sum(weights * share) ** 2)
    assert spread == pytest.approx(width, rel=1e-3)


@pytest.mark.parametrize("text", ["0.3", "0", "-0.1", "nan", "0.1,wide"])
def test_impossible_widths_are_named(text):
    with pytest.raises(ValueError, match="^power_ema must be "):
        widths(text)


def path_of_weights(steps):
    """A walk that drifts, [steps, 50], as weights do."""
    draws = np.random.default_rng(0).standard_normal((steps, 50))
    return np.cumsum(draws, axis=0) + 0.2 * np.arange(steps)[:, None]


def average(walk, gamma):
    """At every step."""
    current, found = np.zeros(walk.shape[1]), []
    for step, values in enumerate(walk, start=1):
        kept = kept_share(step, gamma)
        current = kept * current + (1 - kept) * values
        found.append(current)
    return np.array(found)


def test_the_first_weights_are_the_first_average_and_all_alike_is_the_mean():
    walk = path_of_weights(40)
    np.testing.assert_allclose(average(walk, 0.0)[-1], walk.mean(axis=0))
    np.testing.assert_array_equal(average(walk, gamma_of(0.1))[0], walk[0])


@pytest.mark.parametrize("width", [0.06, 0.08, 0.15])
def test_averages_of_other_widths_come_out_of_saved_ones(width):
    steps, every = 2000, 125
    walk = path_of_weights(steps)
    saved, values = [], []
    for gamma in (gamma_of(0.05), gamma_of(0.10)):
        tracked = average(walk, gamma)
        for step in range(every, steps + 1, every):
            saved.append(Profile(step, gamma))
            values.append(tracked[step - 1])
    for step in (steps, 1000):
        used = [i for i, profile in enumerate(saved) if profile.step <= step]
        factors = mixture([saved[i] for i in used], Profile(step, gamma_of(width)))
        want = average(walk[:step], gamma_of(width))[-1]
        got = factors @ np.array([values[i] for i in used])
        nearest = min(np.abs(value - want).mean() for value in values)
        assert np.abs(got - want).mean() < 0.05 * nearest
        assert factors.sum() == pytest.approx(1)


def test_a_saved_profile_is_itself():
    saved = [Profile(step, gamma_of(w)) for w in (0.05, 0.1) for step in (100, 200)]
    np.testing.assert_allclose(mixture(saved, saved[3]), [0, 0, 0, 1], atol=1e-9)


@pytest.fixture
def folder(tmp_path):
    logger.configure(str(tmp_path), ["log"])
    yield tmp_path
    logger.reset()


def test_training_keeps_saves_and_resumes_them(folder):
    options = {"power_ema": "0.1", "ema_rate": "0.9", "sidecar": {"flags": {"a": 1}}}
    straight = train_loop(**options, iterations=6, save_interval=3, keep_checkpoints=1)
    seen = []
    straight.after_step = lambda: seen.append([p.detach().clone() for p in straight.master_params])
    straight.run_loop()
    walk = np.array([torch.cat([p.flatten() for p in one]).numpy() for one in seen])
    got = torch.cat([p.flatten() for p in straight.ema_params[1]])
    want = torch.from_numpy(average(walk, gamma_of(0.1))[-1]).float()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    names = {path.name for path in folder.glob("ema*.pt")}
    # Older sets were to go, their power-function averages are what others are made of.
    want_names = {"ema_0.9_000006.pt", "ema_power0.1_000003.pt", "ema_power0.1_000006.pt"}
    assert names == want_names and not (folder / "model000003.pt").exists()
    resumed = train_loop(**options, resume_checkpoint="auto")
    assert equal(everything(resumed), everything(straight)) and len(resumed.ema_params) == 2


def test_averages_of_two_ways_of_a_run_are_never_mixed(folder):
    """Steps 4 … 6 are gone another way: what the first way saved there is put aside."""
    train_loop(power_ema="0.1", iterations=6, save_interval=3).run_loop()
    first = str(folder / "model000003.pt")
    train_loop(power_ema="0.1", resume_checkpoint=first)
    kept = [path.name for path in folder.glob("ema_power*")]
    assert kept == ["ema_power0.1_000003.pt"]
    assert (folder / "earlier-1/ema_power0.1_000006.pt").exists()
    assert (folder / "model000006.pt").exists()
    with pytest.raises(UserError, match="^--power_ema: there is no .*ema_power0.2_000003.pt"):
        train_loop(power_ema="0.1,0.2", resume_checkpoint=first)


def test_without_the_flag_nothing_changes(folder):
    loop = train_loop(iterations=2)
    loop.run_loop()
    assert len(loop.ema_params) == 2 and not list(folder.glob("ema_power*"))


def test_the_command_writes_a_network_with_its_sidecar(folder, capsys):
    flags = {"flags": {"a": 1}, "early_stop_steps": 40}
    options = {"power_ema": "0.05,0.1", "ema_rate": "", "sidecar": flags}
    loop = train_loop(**options, iterations=8, save_interval=2)
    loop.run_loop()
    command.main([str(folder), "--sigma_rel", "0.1"])
    path = folder / "posthoc_0.1_000008.pt"
    assert f"{path}, of 8 averages" in capsys.readouterr().out
    made = torch.load(path, weights_only=True)
    torch.testing.assert_close(list(made.values()), [p.detach() for p in loop.ema_params[1]])
    assert read_sidecar(str(path))["early_stop_steps"] == 40
    command.main([str(folder), "--sigma_rel", "0.2", "--step", "4"])
    assert "posthoc_0.2_000004.pt, of 4 averages" in capsys.readouterr().out


def test_the_command_names_what_is_wrong(folder, tmp_path):
    with pytest.raises(UserError, match="has no ema_powerWIDTH_NNNNNN.pt: train with --power_ema"):
        command.main([str(folder), "--sigma_rel", "0.1"])
    with pytest.raises(UserError, match="^--sigma_rel must be widths above 0 and up to 0.288"):
        command.main([str(folder), "--sigma_rel", "0.4"])
    train_loop(power_ema="0.1", iterations=2).run_loop()
    with pytest.raises(UserError, match="^--step 3: .* has no averages of this step"):
        command.main([str(folder), "--sigma_rel", "0.1", "--step", "3"])

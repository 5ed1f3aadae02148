import types

import numpy as np
import pytest
import torch

from guided_diffusion.resample import (
    LossSecondMomentResampler,
    UniformSampler,
    create_named_schedule_sampler,
)

CPU = torch.device("cpu")


def process(steps):
    return types.SimpleNamespace(num_timesteps=steps)


def test_names():
    assert isinstance(create_named_schedule_sampler("uniform", process(9)), UniformSampler)
    sampler = create_named_schedule_sampler("loss-second-moment", process(9))
    assert isinstance(sampler, LossSecondMomentResampler)
    with pytest.raises(ValueError, match="schedule_sampler must be one of uniform, loss-second-mo"):
        create_named_schedule_sampler("other", process(9))


@pytest.mark.parametrize("name", ["uniform", "loss-second-moment"])
def test_early_stop_draws_only_below_t(name):
    sampler = create_named_schedule_sampler(name, process(1000), 7)
    np.random.seed(0)
    for _ in range(30):
        t, weights = sampler.sample(16, CPU)
        assert t.max() < 7 and t.dtype == torch.int64 and weights.dtype == torch.float32
        if name != "uniform":
            sampler.update_with_local_losses(t, t.float() + 1)
    assert sampler.weights().shape == (7,)
    t, _ = sampler.sample(500, CPU)
    assert set(t.tolist()) == set(range(7))


@pytest.mark.parametrize("steps", [0, 1001, -3])
def test_early_stop_outside_the_process_is_refused(steps):
    with pytest.raises(ValueError, match=r"early_stop_steps must be in 1 … 1000"):
        create_named_schedule_sampler("uniform", process(1000), steps)


def test_draws_are_those_of_numpys_choice():
    sampler = LossSecondMomentResampler(process(5), history_per_term=1)
    sampler.update_with_all_losses(range(5), [1.0, 2.0, 3.0, 4.0, 5.0])
    p = sampler.weights() / sampler.weights().sum()
    np.random.seed(3)
    want = np.random.choice(5, size=(200,), p=p)
    np.random.seed(3)
    t, weights = sampler.sample(200, CPU)
    assert t.tolist() == want.tolist()
    np.testing.assert_allclose(weights, 1 / (5 * p[want]), rtol=1e-6)


def test_loss_aware_weights_follow_the_second_moment():
    sampler = LossSecondMomentResampler(process(2), history_per_term=2, uniform_prob=0.1)
    sampler.update_with_local_losses(torch.tensor([0, 0, 1]), torch.tensor([9.0, 3.0, 1.0]))
    assert sampler.weights().tolist() == [1, 1]  # one history is not full yet
    # The oldest loss of step 0 drops out, a loss that is not finite never gets in.
    sampler.update_with_local_losses(
        torch.tensor([0, 1, 1]), torch.tensor([4.0, float("nan"), 7.0])
    )
    root = np.sqrt([(9 + 16) / 2, (1 + 49) / 2])
    np.testing.assert_allclose(sampler.weights(), 0.9 * root / root.sum() + 0.05)


def test_state_goes_on():
    first = LossSecondMomentResampler(process(3), history_per_term=2)
    first.update_with_all_losses([0, 0, 1, 1, 2, 2], [1.0, 2, 3, 4, 5, 6])
    second = LossSecondMomentResampler(process(3), history_per_term=2)
    second.load_state_dict(first.state_dict())
    for sampler in (first, second):
        sampler.update_with_all_losses([1, 2], [0.5, 0.25])
    assert first.weights().tolist() == second.weights().tolist()
    with pytest.raises(ValueError, match="history_per_term is 10, the saved sampler's was 2"):
        LossSecondMomentResampler(process(3)).load_state_dict(first.state_dict())


def test_state_of_other_steps_counts_for_the_common_ones():
    """A network of early-stopped training may go on with other timesteps."""
    first = LossSecondMomentResampler(process(2), history_per_term=1, uniform_prob=0.0)
    first.update_with_all_losses([0, 1], [1.0, 3.0])
    longer = LossSecondMomentResampler(process(3), history_per_term=1, uniform_prob=0.0)
    longer.load_state_dict(first.state_dict())
    assert longer.weights().tolist() == [1, 1, 1]  # nothing is known of the last step
    longer.update_with_all_losses([2], [4.0])
    np.testing.assert_allclose(longer.weights(), [1 / 8, 3 / 8, 4 / 8])
    shorter = LossSecondMomentResampler(process(1), history_per_term=1, uniform_prob=0.0)
    shorter.load_state_dict(longer.state_dict())
    assert shorter.weights().tolist() == [1]

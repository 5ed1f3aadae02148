"""The grids of samples that a training run draws."""

import numpy as np
import pytest
import torch

from guided_diffusion.image_datasets import ArrayImages, BatchStream
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.train_diffusion import sample_drawer


class Recorder(torch.nn.Module):
    """A network that predicts no noise and notes the timesteps it is asked for."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def forward(self, x, t):
        self.seen += t[:1].tolist()
        return x * self.scale


def stream():
    pixels = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), dtype=np.uint8)
    return BatchStream(ArrayImages(pixels, None), 10, shuffle=False, random_flip=False)


@pytest.mark.parametrize(
    ("stop", "first", "count"), [(None, 999, 25), (500, 499, 25), (3, 2, 3), (1, 0, 1)]
)
def test_samples_take_even_steps_from_the_first_noise_level_to_the_last(stop, first, count):
    model = Recorder()
    sample_drawer(create_gaussian_diffusion(), stream(), stop)(model)
    assert len(model.seen) == count and model.seen == sorted(set(model.seen), reverse=True)
    assert (model.seen[0], model.seen[-1]) == (first, 0)
    gaps = -np.diff(model.seen)
    assert count == 1 or gaps.max() - gaps.min() <= 1


def test_of_a_respaced_process_the_network_is_asked_at_original_timesteps():
    model, diffusion = Recorder(), create_gaussian_diffusion(timestep_respacing="5")
    sample_drawer(diffusion, stream())(model)
    assert model.seen == diffusion.timestep_map[::-1] == [999, 749, 500, 250, 0]


def test_a_grid_repeats_and_leaves_the_data_where_they_were():
    data, diffusion = stream(), create_gaussian_diffusion()
    draw = sample_drawer(diffusion, data)
    first, second = draw(Recorder()), draw(Recorder())
    np.testing.assert_array_equal(first, second)
    assert first.shape == (2 + 6, 2 + 8 * 6, 3)  # eight in a row, framed
    assert torch.equal(next(data)[0], next(stream())[0])


def test_the_first_row_of_an_early_stopped_run_is_what_it_starts_from():
    grid = sample_drawer(create_gaussian_diffusion(), stream(), 20)(Recorder())
    assert grid.shape == (2 + 2 * 6, 2 + 8 * 6, 3)
    start = next(stream())[0][:8]
    want = ((start + 1) * 127.5).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    for column in range(8):
        left = 2 + column * 6
        np.testing.assert_array_equal(grid[2:6, left : left + 4], want[column])
        apart = np.abs(grid[8:12, left : left + 4].astype(int) - want[column])
        assert 0 < apart.mean() < 40  # little noise was added, none of it taken away

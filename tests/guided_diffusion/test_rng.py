import numpy as np
import torch

from guided_diffusion.rng import DrawnAhead, RandomStreams, random_labels


def draws(seed: int, start: int, stop: int, times: int = 3) -> np.ndarray:
    streams = RandomStreams(seed, start, stop)
    return np.stack([streams.randn(torch.empty(stop - start, 3, 4, 4)) for _ in range(times)])


def test_noise_belongs_to_seed_and_index_alone():
    whole = draws(5, 0, 7)
    np.testing.assert_array_equal(whole[:, 2:5], draws(5, 2, 5))
    np.testing.assert_array_equal(whole[:, 6:], draws(5, 6, 7))
    assert (whole != draws(6, 0, 7)).mean() > 0.99
    # No two samples, and no two steps, share their noise.
    assert len(np.unique(whole.round(6)[..., 0, 0])) == 3 * 7 * 3


def test_noise_drawn_ahead_is_the_same():
    """Also beyond the draws that were said, and after some that nobody took."""
    like = torch.empty(4, 3, 4, 4, dtype=torch.float64)
    for said in (1, 3, 9):
        streams, ahead = RandomStreams(5, 2, 6), DrawnAhead(RandomStreams(5, 2, 6), said)
        taken = [ahead.randn(like) for _ in range(5)]  # kept: no buffer is used twice
        assert all(torch.equal(noise, streams.randn(like)) for noise in taken)
        assert taken[0].dtype == like.dtype


def test_noise_is_standard_normal():
    noise = draws(0, 0, 200, times=5)
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert noise.dtype == np.float32


def test_values_are_pinned():
    # A change here would change every sample of every seed.
    first = RandomStreams(0, 3, 4).randn(torch.empty(1, 4))
    np.testing.assert_allclose(first, [[-0.2006754, -1.124339, 1.1052213, 0.7590764]], rtol=1e-6)
    assert random_labels(0, 0, 5, 1000).tolist() == [722, 824, 484, 547, 161]


def test_largest_seed_and_other_dtypes():
    streams = RandomStreams(2**64 - 1, 0, 2)
    assert streams.randn(torch.empty(2, 3, dtype=torch.float64)).dtype == torch.float64


def test_labels_follow_the_index_and_leave_noise_alone():
    labels = random_labels(1, 0, 500, 10)
    np.testing.assert_array_equal(labels[100:200], random_labels(1, 100, 200, 10))
    assert labels.min() == 0 and labels.max() == 9 and labels.dtype == np.int64
    assert abs(labels.mean() - 4.5) < 0.5


def test_no_number_serves_two_purposes():
    """A generator's latent is not the noise that its image is diffused with, same seed or not."""
    noise, latents = (
        RandomStreams(0, 5, 6, purpose).randn(torch.empty(1, 1000))
        for purpose in ("noise", "latents")
    )
    assert len(np.intersect1d(noise, latents)) == 0

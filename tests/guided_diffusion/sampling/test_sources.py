import numpy as np
import pytest
import torch

from esddpm_io.errors import UserError
from guided_diffusion.sampling.sources import PureNoise, open_generator_images


def save(path, size=8, labels=None):
    pixels = np.full((4, size, size, 3), 255, np.uint8)
    pixels[0] = 0
    np.savez(path, pixels) if labels is None else np.savez(path, pixels, np.array(labels))
    return str(path)


def test_images_come_as_the_model_takes_them(tmp_path):
    source = open_generator_images(save(tmp_path / "a.npz", labels=[3, 1, 4, 1]))
    source.check(8, "image_size", num_classes=5)
    start = source.start(0, 3)
    assert start.images.shape == (3, 3, 8, 8) and start.images.dtype == torch.float32
    assert start.images[0].unique().tolist() == [-1] and start.images[1].unique().tolist() == [1]
    assert start.labels.tolist() == [3, 1, 4] and len(source) == 4


@pytest.mark.parametrize(
    ("labels", "size", "message"),
    [
        (None, 8, r"--dataset_path: .*a\.npz has no labels, or not for all images"),
        ([0, 5, 1, 9], 8, r"--dataset_path: label 5 of image 1 in .* classes 0 … 4"),
        ([0, -1, 1, 9], 8, r"--dataset_path: label -1 of image 1"),
        ([0, 1, 1, 2], 16, r"--dataset_path: the images of .* are 16x16, the network takes 8x8"),
    ],
)
def test_what_does_not_suit_the_model_is_refused(tmp_path, labels, size, message):
    path = save(tmp_path / "a.npz", size, labels)
    with pytest.raises(UserError, match=message):
        open_generator_images(path).check(8, "image_size", num_classes=5)


def test_an_unconditional_model_needs_no_labels(tmp_path):
    source = open_generator_images(save(tmp_path / "a.npz"))
    source.check(8, "image_size", None)
    assert source.start(1, 2).labels is None
    with pytest.raises(UserError, match="--dataset_path: name the"):
        open_generator_images("")


def test_pure_noise_has_labels_only_for_models_with_classes():
    assert PureNoise(5, 0, None).start(0, 5).labels is None
    source = PureNoise(5, 0, 1000)
    np.testing.assert_array_equal(source.start(0, 5).labels[2:4], source.start(2, 4).labels)
    assert source.start(0, 5).images is None

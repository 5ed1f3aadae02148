import numpy as np
import torch

from guided_diffusion.pixels import to_float, to_uint8


def test_bytes_are_truncated():
    x = torch.tensor([-2.0, -1.0, -0.999, 0.0, 0.9999, 1.0, 3.0]).view(1, 1, 7, 1)
    x = x.expand(1, 3, 7, 1)
    assert to_uint8(x)[0, :, 0, 0].tolist() == [0, 0, 0, 127, 254, 255, 255]


def test_every_byte_as_a_float():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    images = to_float(pixels)
    assert images.shape == (1, 3, 16, 16) and images.dtype == torch.float32
    expected = np.arange(256, dtype=np.float32) / np.float32(127.5) - 1
    np.testing.assert_array_equal(images[0, 0].flatten(), expected)

"""Pixels as files have them, and as networks take and give them."""

import numpy as np
import torch


def to_float(pixels: np.ndarray) -> torch.Tensor:
    """Pixels uint8 [n, H, W, 3] as networks take them: float32 [n, 3, H, W] in [-1, 1].

    The view is NCHW over NHWC memory, which is what a channels-last network wants.
    """
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Images in [-1, 1], [n, 3, H, W], as uint8 [n, H, W, 3]: (x + 1) × 127.5, truncated."""
    pixels = ((images.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()

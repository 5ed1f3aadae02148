"""Data of a super-resolution model: images, and the same ones made small."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from guided_diffusion.image_datasets import load_data


class SmallImages:
    """Batches of `load_data` with cond["low_res"], the images reduced by area averages."""

    def __init__(self, data, small_size: int):
        self._data, self._small_size = data, small_size
        self.seek, self.figures = data.seek, data.figures
        self.end_workers = data.end_workers

    def __iter__(self) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        return self

    def __next__(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        batch, cond = next(self._data)
        return batch, {**cond, "low_res": F.interpolate(batch, self._small_size, mode="area")}


def load_superres_data(
    data_dir: str, batch_size: int, large_size: int, small_size: int, **more
) -> SmallImages:
    """Endless (images, {"low_res": small images, ["y": labels]}); `more` goes to `load_data`."""
    data = load_data(data_dir=data_dir, batch_size=batch_size, image_size=large_size, **more)
    return SmallImages(data, small_size)

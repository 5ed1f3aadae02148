"""The U-Net of diffusers, called as our networks are."""

import json

import torch


class DiffusersNetwork(torch.nn.Module):
    """A UNet2DModel that is called as our networks are."""

    def __init__(self, unet: torch.nn.Module):
        super().__init__()
        self.unet = unet

    def forward(
        self, x: torch.Tensor, timesteps: torch.Tensor, y: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `UNetModel.forward`."""
        dtype = next(self.unet.parameters()).dtype
        return self.unet(x.to(dtype), timesteps, y, return_dict=False)[0].to(x.dtype)

    def convert_to(self, dtype: torch.dtype) -> None:
        """Compute in `dtype`, as diffusers does: all of the U-Net but its sinusoids."""
        self.unet.to(dtype)


def create_diffusers(unet: str) -> DiffusersNetwork:
    """A new network; unet: the JSON of a UNet2DModel's config."""
    from diffusers import UNet2DModel

    return DiffusersNetwork(UNet2DModel.from_config(json.loads(unet)))

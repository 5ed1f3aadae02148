"""The U-Net of guided diffusion (Dhariwal and Nichol 2021) and the two models made of its parts.

One encoder builder serves all three. Module names follow the published checkpoints, whose
state-dict keys load unchanged.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from .nn import (
    avg_pool_nd,
    checkpoint,
    conv_nd,
    convert_convolutions,
    linear,
    normalization,
    timestep_embedding,
    zero_module,
)

# Width of the hidden layer of the "spatial" classifier heads, as published.
SPATIAL_HEAD_WIDTH = 2048
# Heads of the classifier.
POOLS = ("adaptive", "attention", "spatial", "spatial_v2")


class TimestepBlock(nn.Module):
    """A module whose forward takes a timestep embedding as its second argument."""

    @abstractmethod
    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """x: [N, C, ...]; emb: float32 [N, E]."""


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """A sequence that hands the timestep embedding to those of its children that take one."""

    def forward(  # type: ignore[override] # nn.Sequential takes one input
        self, x: torch.Tensor, emb: torch.Tensor
    ) -> torch.Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, TimestepBlock) else layer(x)
        return x


class Upsample(nn.Module):
    """Doubles height and width (nearest neighbour), then convolves if `use_conv`."""

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None
    ):
        super().__init__()
        self.channels, self.out_channels = channels, out_channels or channels
        self.use_conv, self.dims = use_conv, dims
        if use_conv:
            self.conv = conv_nd(dims, channels, self.out_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Volumes keep their depth: only the two inner dimensions change.
        scale = (1.0, 2.0, 2.0) if self.dims == 3 else 2.0
        x = F.interpolate(x, scale_factor=scale, mode="nearest")
        return self.conv(x) if self.use_conv else x


class Downsample(nn.Module):
    """Halves height and width: strided convolution if `use_conv`, else average pooling."""

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None
    ):
        super().__init__()
        self.channels, self.out_channels = channels, out_channels or channels
        self.use_conv, self.dims = use_conv, dims
        stride = (1, 2, 2) if dims == 3 else 2
        if use_conv:
            self.op = conv_nd(dims, channels, self.out_channels, 3, stride=stride, padding=1)
        elif out_channels not in (None, channels):
            raise ValueError(f"pooling cannot turn {channels} channels into {out_channels}")
        else:
            self.op = avg_pool_nd(dims, kernel_size=stride, stride=stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(x)


class ResBlock(TimestepBlock):
    """Residual block: norm, SiLU, conv twice, with the timestep embedding between the two.

    The embedding is added, or, with `use_scale_shift_norm`, scales and shifts the second norm's
    output. `up` and `down` resample both branches before the first convolution.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
    ):
        super().__init__()
        out_channels = out_channels or channels
        self.channels, self.out_channels, self.emb_channels = channels, out_channels, emb_channels
        self.dropout = dropout
        self.use_conv = use_conv
        self.use_scale_shift_norm = use_scale_shift_norm
        self.use_checkpoint = use_checkpoint
        self.updown = up or down
        self.h_upd: nn.Module
        self.x_upd: nn.Module
        if self.updown:
            self.h_upd = self.x_upd = (Upsample if up else Downsample)(channels, False, dims)
        else:
            self.h_upd = self.x_upd = nn.Identity()
        self.in_layers = nn.Sequential(
            normalization(channels),
            nn.SiLU(),
            conv_nd(dims, channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(),
            linear(emb_channels, 2 * out_channels if use_scale_shift_norm else out_channels),
        )
        self.out_layers = nn.Sequential(
            normalization(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_module(conv_nd(dims, out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection: nn.Module
        if out_channels == channels:
            self.skip_connection = nn.Identity()
        elif use_conv:
            self.skip_connection = conv_nd(dims, channels, out_channels, 3, padding=1)
        else:
            self.skip_connection = conv_nd(dims, channels, out_channels, 1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        return checkpoint(self._forward, (x, emb), self.parameters(), self.use_checkpoint)

    def _forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        norm, activation, conv = self.in_layers
        h = conv(self.h_upd(activation(norm(x))))
        x = self.x_upd(x)
        emb = self.emb_layers(emb).to(h.dtype)
        emb = emb.reshape(*emb.shape, *[1] * (h.ndim - 2))
        norm, rest = self.out_layers[0], self.out_layers[1:]
        if self.use_scale_shift_norm:
            scale, shift = emb.chunk(2, dim=1)
            # Two roundings, as published: Adam enlarges a gradient that is only rounding.
            h = rest((norm(h) * (1 + scale)).add_(shift))
        else:
            h = rest(norm(h + emb))
        return self.skip_connection(x) + h


def count_flops_attn(model: Any, _x: object, y: Sequence[torch.Tensor]) -> None:
    """Add an attention's operations to `model.total_ops`: a counter for the thop package.

    y: the attention's output [N, C, ...] first; two products of [T, C] with [C, T] a head.
    """
    batch, channels, *spatial = y[0].shape
    length = math.prod(spatial)
    model.total_ops += torch.DoubleTensor([2 * batch * length**2 * channels])


class QKVAttention(nn.Module):
    """Multi-head self-attention over stacked queries, keys and values.

    The channel axis of the input holds (q, k, v) of all heads, each [heads, channels per head].
    """

    legacy_order = False

    def __init__(self, n_heads: int):
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv: torch.Tensor) -> torch.Tensor:
        """qkv: [N, 3 * heads * C, T]; returns [N, heads * C, T]."""
        batch, width, length = qkv.shape
        if self.legacy_order:
            parts = qkv.reshape(batch, self.n_heads, 3, -1, length).unbind(2)
        else:
            parts = qkv.reshape(batch, 3, self.n_heads, -1, length).unbind(1)
        q, k, v = (part.transpose(-1, -2) for part in parts)
        out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(-1, -2).reshape(batch, width // 3, length)

    @staticmethod
    def count_flops(model: Any, _x: object, y: Sequence[torch.Tensor]) -> None:
        """`count_flops_attn`, where guided-diffusion has it."""
        count_flops_attn(model, _x, y)


class QKVAttentionLegacy(QKVAttention):
    """The same attention where the channel axis is [heads, (q, k, v), channels per head]."""

    legacy_order = True


class AttentionBlock(nn.Module):
    """Residual self-attention between all positions of a feature map.

    `num_head_channels`, where given (not -1), decides the number of heads.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_checkpoint: bool = False,
        use_new_attention_order: bool = False,
    ):
        super().__init__()
        if num_head_channels != -1:
            if channels % num_head_channels:
                raise ValueError(
                    f"num_head_channels {num_head_channels} must divide the {channels} channels"
                    " of every attention level"
                )
            num_heads = channels // num_head_channels
        elif channels % num_heads:
            raise ValueError(f"num_heads {num_heads} must divide {channels} channels")
        self.channels = channels
        self.num_heads = num_heads
        self.use_checkpoint = use_checkpoint
        self.norm = normalization(channels)
        self.qkv = conv_nd(1, channels, channels * 3, 1)
        attention = QKVAttention if use_new_attention_order else QKVAttentionLegacy
        self.attention = attention(num_heads)
        self.proj_out = zero_module(conv_nd(1, channels, channels, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self._forward, (x,), self.parameters(), self.use_checkpoint)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(2)
        h = self.attention(self.qkv(self.norm(flat)))
        return (flat + self.proj_out(h)).reshape(x.shape)


class AttentionPool2d(nn.Module):
    """Pools a square feature map by attention from its mean (CLIP's image head).

    Input [N, embed_dim, S, S], S = spacial_dim; output [N, output_dim or embed_dim].
    """

    def __init__(
        self,
        spacial_dim: int,
        embed_dim: int,
        num_heads_channels: int,
        output_dim: int | None = None,
    ):
        super().__init__()
        self.positional_embedding = nn.Parameter(
            torch.randn(embed_dim, spacial_dim**2 + 1) / embed_dim**0.5
        )
        self.qkv_proj = conv_nd(1, embed_dim, 3 * embed_dim, 1)
        self.c_proj = conv_nd(1, embed_dim, output_dim or embed_dim, 1)
        self.num_heads = embed_dim // num_heads_channels
        self.attention = QKVAttention(self.num_heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(2)
        x = torch.cat([x.mean(dim=-1, keepdim=True), x], dim=-1)
        x = x + self.positional_embedding.to(x.dtype)
        # Only the mean's own position is read from the result.
        return self.c_proj(self.attention(self.qkv_proj(x)))[:, :, 0]


class _Blocks:
    """Makes the residual, attention and resampling blocks of one model from its settings."""

    def __init__(
        self,
        emb_channels: int,
        dropout: float,
        dims: int,
        conv_resample: bool,
        num_head_channels: int,
        use_checkpoint: bool,
        use_scale_shift_norm: bool,
        resblock_updown: bool,
        use_new_attention_order: bool,
    ):
        self.dims = dims
        self.conv_resample = conv_resample
        self.resblock_updown = resblock_updown
        self._residual: dict[str, Any] = {
            "emb_channels": emb_channels,
            "dropout": dropout,
            "dims": dims,
            "use_checkpoint": use_checkpoint,
            "use_scale_shift_norm": use_scale_shift_norm,
        }
        self._attention: dict[str, Any] = {
            "num_head_channels": num_head_channels,
            "use_checkpoint": use_checkpoint,
            "use_new_attention_order": use_new_attention_order,
        }

    def residual(
        self, channels: int, out_channels: int | None = None, **resample: bool
    ) -> ResBlock:
        return ResBlock(channels, out_channels=out_channels, **resample, **self._residual)

    def attention(self, channels: int, num_heads: int) -> AttentionBlock:
        return AttentionBlock(channels, num_heads=num_heads, **self._attention)

    def down(self, channels: int) -> nn.Module:
        if self.resblock_updown:
            return self.residual(channels, down=True)
        return Downsample(channels, self.conv_resample, self.dims)

    def up(self, channels: int) -> nn.Module:
        if self.resblock_updown:
            return self.residual(channels, up=True)
        return Upsample(channels, self.conv_resample, self.dims)

    def middle(self, channels: int, num_heads: int) -> TimestepEmbedSequential:
        return TimestepEmbedSequential(
            self.residual(channels), self.attention(channels, num_heads), self.residual(channels)
        )


class _DiffusionNetwork(nn.Module):
    """What the U-Net and the classifier share: timestep embedding, encoder, middle, precision.

    image_size: height and width of the images. model_channels: base width, which the entries of
    `channel_mult`, one a level, multiply. `attention_resolutions` holds the downsampling factors
    (1 = full size) of the levels with attention. `num_head_channels`, where not -1, overrules
    `num_heads`; `num_heads_upsample` (-1 = num_heads) is for the decoder. `use_fp16` is accepted
    as published; `convert_to_fp16` does the cast.

    Optimisers keep their state by a parameter's position: parts are made in the published order.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float = 0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        *,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
    ):
        super().__init__()
        self.image_size = image_size
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.out_channels = out_channels
        self.num_res_blocks = num_res_blocks
        self.attention_resolutions = attention_resolutions
        self.dropout = dropout
        self.channel_mult = channel_mult
        self.conv_resample = conv_resample
        self.use_checkpoint = use_checkpoint
        self.widths = [int(mult * model_channels) for mult in channel_mult]
        self.dims = dims
        self.use_fp16 = use_fp16
        self.num_heads = num_heads
        self.num_head_channels = num_head_channels
        self.num_heads_upsample = num_heads if num_heads_upsample == -1 else num_heads_upsample
        self.dtype = torch.float32
        self.emb_channels = 4 * model_channels
        self.time_embed = nn.Sequential(
            linear(model_channels, self.emb_channels),
            nn.SiLU(),
            linear(self.emb_channels, self.emb_channels),
        )
        self.num_classes = num_classes
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, self.emb_channels)
        self._blocks = _Blocks(
            emb_channels=self.emb_channels,
            dropout=dropout,
            dims=dims,
            conv_resample=conv_resample,
            num_head_channels=num_head_channels,
            use_checkpoint=use_checkpoint,
            use_scale_shift_norm=use_scale_shift_norm,
            resblock_updown=resblock_updown,
            use_new_attention_order=use_new_attention_order,
        )
        self._build_encoder()
        self.middle_block = self._blocks.middle(self.widths[-1], num_heads)

    def _build_encoder(self) -> None:
        """Make `input_blocks`, and note the width of each one's output and the downsampling."""
        blocks, channels = self._blocks, self.widths[0]
        stem = conv_nd(self.dims, self.in_channels, channels, 3, padding=1)
        self.input_blocks = nn.ModuleList([TimestepEmbedSequential(stem)])
        self.encoder_channels = [channels]
        self.downsampling = 1
        for level, width in enumerate(self.widths):
            for _ in range(self.num_res_blocks):
                layers: list[nn.Module] = [blocks.residual(channels, width)]
                channels = width
                if self.downsampling in self.attention_resolutions:
                    layers.append(blocks.attention(channels, self.num_heads))
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                self.encoder_channels.append(channels)
            if level + 1 < len(self.widths):
                self.input_blocks.append(TimestepEmbedSequential(blocks.down(channels)))
                self.encoder_channels.append(channels)
                self.downsampling *= 2

    def _embed(self, timesteps: torch.Tensor) -> torch.Tensor:
        return self.time_embed(timestep_embedding(timesteps, self.model_channels))

    def _encode(
        self, x: torch.Tensor, emb: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Outputs of all encoder blocks, and of the middle block."""
        h = x.to(self.dtype)
        outputs = []
        for block in self.input_blocks:
            h = block(h, emb)
            outputs.append(h)
        return outputs, self.middle_block(h, emb)

    def _trunk(self) -> list[nn.Module]:
        return [self.input_blocks, self.middle_block]

    def convert_to(self, dtype: torch.dtype) -> None:
        """Run the trunk in `dtype`: its convolutions are cast in place, the rest stays float32."""
        self.dtype = dtype
        for part in self._trunk():
            convert_convolutions(part, dtype)

    def convert_to_fp16(self) -> None:
        """Cast the trunk's convolutions to float16."""
        self.convert_to(torch.float16)

    def convert_to_fp32(self) -> None:
        """Cast the trunk's convolutions back to float32."""
        self.convert_to(torch.float32)


class UNetModel(_DiffusionNetwork):
    """U-Net with attention and timestep embedding; class-conditional if `num_classes` is given.

    The other arguments are those of `_DiffusionNetwork`.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._build_decoder()
        self.out = nn.Sequential(
            normalization(self.widths[0]),
            nn.SiLU(),
            zero_module(conv_nd(self.dims, self.widths[0], self.out_channels, 3, padding=1)),
        )

    def _build_decoder(self) -> None:
        blocks, skips = self._blocks, list(self.encoder_channels)
        channels, factor = self.widths[-1], self.downsampling
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(self.widths))):
            # One block more than in the encoder: it takes the skip of the level's resampling.
            for i in range(self.num_res_blocks + 1):
                layers: list[nn.Module] = [blocks.residual(channels + skips.pop(), width)]
                channels = width
                if factor in self.attention_resolutions:
                    layers.append(blocks.attention(channels, self.num_heads_upsample))
                if level and i == self.num_res_blocks:
                    layers.append(blocks.up(channels))
                    factor //= 2
                self.output_blocks.append(TimestepEmbedSequential(*layers))

    def _trunk(self) -> list[nn.Module]:
        return [*super()._trunk(), self.output_blocks]

    def forward(
        self, x: torch.Tensor, timesteps: torch.Tensor, y: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x: [N, C, H, W] in about [-1, 1]; timesteps: [N]; y: int labels [N] if conditional.

        Returns [N, out_channels, H, W] in the dtype of x.
        """
        if (y is None) != (self.num_classes is None):
            raise ValueError(
                "y (labels) must be given"
                if y is None
                else "y (labels) was given to a model without classes"
            )
        emb = self._embed(timesteps)
        if y is not None:
            if y.shape != (x.shape[0],):
                raise ValueError(f"y must have shape ({x.shape[0]},), not {tuple(y.shape)}")
            emb = emb + self.label_emb(y)
        skips, h = self._encode(x, emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h.to(x.dtype))


class SuperResModel(UNetModel):
    """A U-Net that also sees a smaller image, resized bilinearly to the size of its input.

    The resize uses half-pixel centres (align_corners=False), as the published upsamplers need.
    """

    def __init__(self, image_size: int, in_channels: int, *args: Any, **kwargs: Any):
        super().__init__(image_size, in_channels * 2, *args, **kwargs)

    def forward(  # type: ignore[override] # the published order of arguments
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        low_res: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """low_res: [N, C, h, w] in [-1, 1]; everything else as in `UNetModel.forward`."""
        if low_res is None:
            raise ValueError("low_res (the images to enlarge) must be given")
        enlarged = F.interpolate(low_res, x.shape[-2:], mode="bilinear", align_corners=False)
        return super().forward(torch.cat([x, enlarged], dim=1), timesteps, **kwargs)


class EncoderUNetModel(_DiffusionNetwork):
    """The encoder half of the U-Net with a classification head: [N, C, H, W] -> [N, out_channels].

    `pool` chooses the head: "adaptive" (average), "attention", "spatial" and "spatial_v2" (a
    multilayer perceptron over the means of all blocks). The other arguments are those of
    `_DiffusionNetwork`.
    """

    def __init__(self, *args: Any, pool: str = "adaptive", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.pool = pool
        self.out = self._build_head()

    def _build_head(self) -> nn.Sequential:
        channels = self.widths[-1]
        features = sum(self.encoder_channels) + channels
        if self.pool == "adaptive":
            return nn.Sequential(
                normalization(channels),
                nn.SiLU(),
                nn.AdaptiveAvgPool2d((1, 1)),
                zero_module(conv_nd(self.dims, channels, self.out_channels, 1)),
                nn.Flatten(),
            )
        if self.pool == "attention":
            if self.num_head_channels == -1:
                raise ValueError('pool "attention" needs num_head_channels')
            side = self.image_size // self.downsampling
            return nn.Sequential(
                normalization(channels),
                nn.SiLU(),
                AttentionPool2d(side, channels, self.num_head_channels, self.out_channels),
            )
        if self.pool == "spatial":
            return nn.Sequential(
                linear(features, SPATIAL_HEAD_WIDTH),
                nn.ReLU(),
                linear(SPATIAL_HEAD_WIDTH, self.out_channels),
            )
        if self.pool == "spatial_v2":
            return nn.Sequential(
                linear(features, SPATIAL_HEAD_WIDTH),
                normalization(SPATIAL_HEAD_WIDTH),
                nn.SiLU(),
                linear(SPATIAL_HEAD_WIDTH, self.out_channels),
            )
        raise ValueError(f'pool must be one of {", ".join(POOLS)}, not "{self.pool}"')

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x: [N, C, H, W]; timesteps: [N]. Returns logits [N, out_channels]."""
        outputs, h = self._encode(x, self._embed(timesteps))
        if self.pool.startswith("spatial"):
            means = [block.to(x.dtype).mean(dim=(2, 3)) for block in [*outputs, h]]
            return self.out(torch.cat(means, dim=-1))
        return self.out(h.to(x.dtype))

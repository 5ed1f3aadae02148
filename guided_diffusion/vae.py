"""A small convolutional VAE: the generator that early-stopped diffusion starts from.

Encoder q(z | x, y) and decoder p(x | z, y) are trained as a VAE against the prior N(0, I) (Kingma
and Welling 2014). The codes of a small data set do not fill that prior, and codes drawn where none
lie decode to blurs; so once it is trained, a mixture of Gaussians a class is fitted to the codes of
the training images, and samples are drawn from it (ex-post density estimation, Ghosh et al. 2020,
section 4). Images are NCHW float in [-1, 1], labels int64 [N].
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

# Side of the coarsest feature map: sizes are halved until they are near it.
COARSEST_SIDE = 4
# Widths grow up to this multiple of the first: beyond it parameters grow and samples do not gain.
MAX_WIDENING = 4
# Width of the decoder's Laplace noise on images in [-1, 1], about 13 grey levels. It sets the
# exchange rate of pixels against nats, which `kl_weight` then adjusts.
PIXEL_SCALE = 0.1
# Bounds of log sigma of q: wide enough never to bind on real data, and exp() stays finite.
LOG_SIGMA_RANGE = (-8.0, 4.0)
# A class gets no more Gaussians than one for this many images, so that each describes a group of
# images rather than one of them.
IMAGES_PER_COMPONENT = 16


def create_vae(
    image_size: int,
    num_channels: int,
    latent_dim: int,
    prior_components: int,
    num_classes: int,
) -> "VAE":
    """Build a `VAE` from the flags of `vae_defaults`.

    Raises:
        ValueError: naming the flag, if a value is outside its range.
    """
    lowest = {
        "image_size": (image_size, 8),
        "num_channels": (num_channels, 8),
        "latent_dim": (latent_dim, 1),
        "prior_components": (prior_components, 1),
        "num_classes": (num_classes, 0),
    }
    for flag, (value, low) in lowest.items():
        if value < low:
            raise ValueError(f"{flag} is {value}, but must be at least {low}")
    if num_channels % 8:
        raise ValueError(f"num_channels is {num_channels}, but must be a multiple of 8")
    return VAE(image_size, num_channels, latent_dim, prior_components, num_classes)


def vae_loss(latent_dim: int, kl_weight: float) -> Callable:
    """A loss for `train_util.Trainer`: (reconstruction + kl_weight · KL), in nats per pixel value.

    kl_weight 1 is the ELBO; less gives sharper images whose codes fill N(0, I) less evenly, which
    the fitted prior then has to describe.
    """

    def loss(model, batch: torch.Tensor, cond: dict, draw) -> dict[str, torch.Tensor]:
        noise = draw.noise(batch.new_empty(len(batch), latent_dim))
        terms = model(batch, cond.get("y"), noise)
        values = batch[0].numel()
        terms = {**terms, "reconstruction": terms["reconstruction"] / values}
        return {"loss": terms["reconstruction"] + kl_weight * terms["kl"] / values, **terms}

    return loss


class ResidualBlock(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))), NCHW, shape kept."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            *normalised(channels),
            nn.Conv2d(channels, channels, 3, padding=1),
            *normalised(channels),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


def normalised(channels: int) -> tuple[nn.Module, nn.Module]:
    """Group norm in eight groups (a sample does not depend on its batch), then ReLU."""
    return nn.GroupNorm(8, channels), nn.ReLU()


class MixturePrior(nn.Module):
    """p(z | y): for each class a mixture of up to K Gaussians with diagonal covariances.

    Buffers, not parameters: nothing here is trained by gradients. Until `fit` is called it is the
    standard normal distribution, and `fitted` is False.
    """

    def __init__(self, num_classes: int, components: int, latent_dim: int):
        super().__init__()
        weight = torch.zeros(num_classes, components)
        weight[:, 0] = 1.0
        self.register_buffer("weight", weight)
        self.register_buffer("mean", torch.zeros(num_classes, components, latent_dim))
        self.register_buffer("variance", torch.ones(num_classes, components, latent_dim))

    @property
    def fitted(self) -> bool:
        return bool(self.mean.any())

    def codes(
        self, labels: torch.Tensor, uniform: torch.Tensor, normal: torch.Tensor
    ) -> torch.Tensor:
        """Samples of p(z | y), float [N, latent_dim], as a function of their random numbers.

        `uniform` in [0, 1), float [N], picks the component by its cumulative weight; `normal`,
        float [N, latent_dim], is its standard normal noise.
        """
        # In float64, where a float32 below 1 times the total stays below the total.
        cumulative = self.weight[labels].double().cumsum(dim=1)
        picked = (uniform[:, None].double() * cumulative[:, -1:] >= cumulative).sum(dim=1)
        return self.mean[labels, picked] + self.variance[labels, picked].sqrt() * normal

    @torch.no_grad()
    def fit(
        self, labels: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, rng: torch.Generator
    ) -> None:
        """Fit each class that occurs to q's of its images: means and variances [N, latent_dim]."""
        for label in labels.unique().tolist():
            of_class = labels == label
            limit = -(-int(of_class.sum()) // IMAGES_PER_COMPONENT)
            components = min(self.weight.shape[1], limit)
            fitted = fit_mixture(mean[of_class], variance[of_class], components, rng)
            self.weight[label] = 0.0
            for buffer, values in zip((self.weight, self.mean, self.variance), fitted, strict=True):
                buffer[label, :components] = values


def fit_mixture(
    mean: torch.Tensor,
    variance: torch.Tensor,
    components: int,
    rng: torch.Generator,
    iterations: int = 50,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Expectation maximisation of a diagonal Gaussian mixture over N Gaussians.

    The data are the posteriors N(mean, variance), float [N, D] each, not points drawn from them:
    the E step takes the expected log density under each (so nothing is random after the start),
    the M step matches first and second moments. Starts with k-means++ (Arthur and Vassilvitskii
    2007). Returns weights [K], means [K, D] and variances [K, D].
    """
    centres = mean[spread_indices(mean, components, rng)]
    overall = mean.var(dim=0, correction=0) + variance.mean(dim=0)
    spread, weight = overall.expand_as(centres), torch.full((components,), 1.0 / components)
    second = mean**2 + variance
    for _ in range(iterations):
        # E: log w_k + E_q[log N(z; centre_k, spread_k)], by products so that no [N, K, D] appears.
        density = second @ (1 / spread).T - 2 * mean @ (centres / spread).T
        density = density + (centres**2 / spread + spread.log()).sum(dim=1)
        share = F.softmax(weight.log() - 0.5 * density, dim=1)
        # M: moments, with one made-up image of a tenth of the overall variance in each component,
        # so that a component of few images does not shrink to a point.
        count = share.sum(dim=0)[:, None].clamp_min(1e-6)
        centres = share.T @ mean / count
        within = (share.T @ second / count - centres**2).clamp_min(0.0)
        spread = (within * count + 0.1 * overall) / (count + 1.0)
        weight = (count / count.sum()).squeeze(1)
    return weight, centres, spread


def spread_indices(points: torch.Tensor, count: int, rng: torch.Generator) -> list[int]:
    """k-means++: `count` indices of `points` [N, D], each drawn by its squared distance to those
    before it."""
    chosen = [int(torch.randint(len(points), (1,), generator=rng))]
    distance = torch.full((len(points),), math.inf)
    for _ in range(count - 1):
        distance = torch.minimum(distance, ((points - points[chosen[-1]]) ** 2).sum(dim=1))
        # The small addend keeps the draw possible when all points coincide.
        chosen.append(int(torch.multinomial(distance + 1e-12, 1, generator=rng)))
    return chosen


class VAE(nn.Module):
    """Variational autoencoder of square images of any size, with or without labels.

    Args:
        image_size: side of the images; sizes that cannot be halved often enough are padded inside.
        num_channels: width of the finest layers.
        latent_dim: length of the code z.
        prior_components: most Gaussians in the prior of a class.
        num_classes: 0 for data without labels; `labels` arguments are then None.
    """

    def __init__(
        self,
        image_size: int,
        num_channels: int,
        latent_dim: int,
        prior_components: int,
        num_classes: int = 0,
    ):
        super().__init__()
        self.image_size, self.latent_dim, self.num_classes = image_size, latent_dim, num_classes
        levels = max(1, round(math.log2(image_size / COARSEST_SIDE)))
        self.side = -(-image_size // 2**levels)
        self.padding = self.side * 2**levels - image_size
        widths = [num_channels * min(2**level, MAX_WIDENING) for level in range(levels)]
        flat, classes = widths[-1] * self.side**2, max(num_classes, 1)
        self.coarsest = (widths[-1], self.side, self.side)
        self.encoder_label = nn.Embedding(classes, 32)
        self.decoder_label = nn.Embedding(classes, 32)
        self.encoder = encoder_layers(widths)
        self.to_posterior = nn.Linear(flat + 32, 2 * latent_dim)
        self.from_code = nn.Linear(latent_dim + 32, flat)
        self.decoder = decoder_layers(widths[::-1])
        self.prior = MixturePrior(classes, prior_components, latent_dim)
        # How often each label occurs in the training data; samples get them as often.
        self.register_buffer("label_counts", torch.ones(classes, dtype=torch.int64))

    def encode(
        self, x: torch.Tensor, labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log sigma of q(z | x, y), float [N, latent_dim] each, of images NCHW."""
        labels = self._labels(labels, len(x))
        if self.padding:
            x = F.pad(x, (0, self.padding, 0, self.padding), mode="replicate")
        h = torch.cat([self.encoder(x), self.encoder_label(labels)], dim=1)
        mean, log_sigma = self.to_posterior(h).chunk(2, dim=1)
        return mean, log_sigma.clamp(*LOG_SIGMA_RANGE)

    def decode(self, z: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """Images NCHW (about [-1, 1], not clamped) of codes float [N, latent_dim]."""
        labels = self._labels(labels, len(z))
        h = self.from_code(torch.cat([z, self.decoder_label(labels)], dim=1))
        h = h.view(-1, *self.coarsest).contiguous(memory_format=torch.channels_last)
        return self.decoder(h)[:, :, : self.image_size, : self.image_size]

    def forward(
        self, x: torch.Tensor, labels: torch.Tensor | None, noise: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Terms of the negative ELBO, float [N] each, in nats up to a constant.

        `noise`: N(0, 1), float [N, latent_dim], makes z of q's mean and sigma.

        `reconstruction` = |x - x̂| / PIXEL_SCALE summed over the image, with x̂ decoded from one z
        of q (a Laplace likelihood); `kl` = KL(q(z | x, y) || N(0, I)); `mse` of x̂ over its pixels,
        for the log.
        """
        mean, log_sigma = self.encode(x, labels)
        z = mean + torch.exp(log_sigma) * noise
        error = self.decode(z, labels) - x
        kl = 0.5 * (mean**2 + torch.exp(2 * log_sigma) - 1.0) - log_sigma
        return {
            "reconstruction": error.abs().sum(dim=(1, 2, 3)) / PIXEL_SCALE,
            "kl": kl.sum(dim=1),
            "mse": (error.detach() ** 2).mean(dim=(1, 2, 3)),
        }

    @torch.no_grad()
    def fit_prior(
        self,
        labels: torch.Tensor | None,
        mean: torch.Tensor,
        variance: torch.Tensor,
        seed: int = 0,
    ) -> None:
        """Fit the prior to q's of training images: means and variances float [N, latent_dim]."""
        rng = torch.Generator().manual_seed(seed)
        labels = self._labels(labels, len(mean))
        self.prior.cpu().fit(labels.cpu(), mean.cpu(), variance.cpu(), rng)
        self.prior.to(self.label_counts.device)

    @torch.no_grad()
    def sample(
        self, labels: torch.Tensor | None, uniform: torch.Tensor, normal: torch.Tensor
    ) -> torch.Tensor:
        """Images NCHW of codes from the prior; random numbers as in `MixturePrior.codes`."""
        codes = self.prior.codes(self._labels(labels, len(normal)), uniform, normal)
        return self.decode(codes, labels)

    def _labels(self, labels: torch.Tensor | None, n: int) -> torch.Tensor:
        if (labels is None) != (self.num_classes == 0):
            raise ValueError(
                f"labels must {'be given' if self.num_classes else 'be None'} for a VAE of "
                f"num_classes {self.num_classes}"
            )
        if labels is None:
            return torch.zeros(n, dtype=torch.int64, device=self.label_counts.device)
        return labels


def encoder_layers(widths: list[int]) -> nn.Sequential:
    """RGB NCHW -> flat features; `widths` from fine to coarse, each level half the last's side."""
    # 2 x 2 pixels become channels: a convolution at full size would cost more than all the others.
    layers: list[nn.Module] = [nn.PixelUnshuffle(2), nn.Conv2d(12, widths[0], 3, padding=1)]
    for fine, coarse in pairwise(widths):
        layers += [*normalised(fine), nn.Conv2d(fine, coarse, 4, stride=2, padding=1)]
    layers += [ResidualBlock(widths[-1]), *normalised(widths[-1]), nn.Flatten()]
    return nn.Sequential(*layers)


def decoder_layers(widths: list[int]) -> nn.Sequential:
    """Coarsest features -> RGB NCHW; `widths` from coarse to fine."""
    layers: list[nn.Module] = [ResidualBlock(widths[0])]
    for coarse, fine in pairwise(widths):
        layers += [nn.ConvTranspose2d(coarse, fine, 4, stride=2, padding=1), ResidualBlock(fine)]
    layers += [*normalised(widths[-1]), nn.Conv2d(widths[-1], 12, 3, padding=1)]
    layers += [nn.PixelShuffle(2)]
    return nn.Sequential(*layers)

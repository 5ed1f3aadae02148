"""Gaussian diffusion: schedules, the processes q and p, losses, and one reverse loop.

Papers: DDPM (Ho et al. 2020, arXiv 2006.11239), improved DDPM (Nichol and Dhariwal 2021,
arXiv 2102.09672), DDIM (Song et al. 2020, arXiv 2010.02502), guidance (Dhariwal and Nichol 2021,
arXiv 2105.05233), early stop (Lyu et al. 2022, arXiv 2205.12524). Images are NCHW float tensors
in [-1, 1]; t is an int64 tensor [N] of step indices, 0 the least noisy.
"""

import enum
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .losses import discretized_gaussian_log_likelihood, normal_kl
from .nn import mean_flat
from .solvers import evaluation_timesteps, make_solver

if TYPE_CHECKING:
    from .respace import SpacedDiffusion

Randn = Callable[[torch.Tensor], torch.Tensor]

# The networks' time axis: models with `rescale_timesteps` see t scaled to 0 ... 1000.
MODEL_TIME_SPAN = 1000.0


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> np.ndarray:
    """Betas of a published schedule, float64 [num_diffusion_timesteps].

    "linear" is DDPM's, stretched so that any number of steps reaches the same noise; "cosine" is
    improved DDPM's (eq. 17). Those of diffusers: "linear FIRST LAST" is as it is, "scaled_linear
    FIRST LAST" linear in the square root of beta, and "betas B B …" names them all.
    """
    name, *numbers = schedule_name.split() or [""]
    if numbers:
        return _betas_from(name, numbers, schedule_name, num_diffusion_timesteps)
    if schedule_name == "linear":
        scale = 1000 / num_diffusion_timesteps
        return np.linspace(scale * 1e-4, scale * 0.02, num_diffusion_timesteps, dtype=np.float64)
    if schedule_name == "cosine":
        offset = 0.008  # keeps beta_1 from vanishing (improved DDPM, section 3.2)
        return betas_for_alpha_bar(
            num_diffusion_timesteps,
            lambda t: math.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2,
        )
    raise ValueError(f'noise_schedule must be "linear" or "cosine", not "{schedule_name}"')


def _betas_from(name: str, numbers: list[str], text: str, steps: int) -> np.ndarray:
    try:
        values = np.array([float(number) for number in numbers])
    except ValueError:
        raise ValueError(f'noise_schedule "{text}": only numbers may follow {name}') from None
    if name == "betas" and len(values) == steps:
        return values
    if name == "linear" and len(values) == 2:
        return np.linspace(values[0], values[1], steps)
    if name == "scaled_linear" and len(values) == 2:
        return np.linspace(values[0] ** 0.5, values[1] ** 0.5, steps) ** 2
    raise ValueError(
        f'noise_schedule must be "linear FIRST LAST", "scaled_linear FIRST LAST", or "betas" and '
        f'{steps} numbers, not "{text[:80]}"'
    )


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> np.ndarray:
    """Betas whose cumulative products of 1 - beta follow `alpha_bar(time)`, time in [0, 1].

    `max_beta` caps the last steps, where alpha_bar reaches 0.
    """
    levels = np.array(
        [alpha_bar(i / num_diffusion_timesteps) for i in range(num_diffusion_timesteps + 1)]
    )
    return np.minimum(1 - levels[1:] / levels[:-1], max_beta)


class ModelMeanType(enum.Enum):
    """What the network predicts."""

    PREVIOUS_X = enum.auto()  # the mean of x_{t-1}
    START_X = enum.auto()  # x_0
    EPSILON = enum.auto()  # the noise in x_t
    VELOCITY = enum.auto()  # sqrt(ᾱ) noise - sqrt(1-ᾱ) x_0 (arXiv 2202.00512, appendix D)


class ModelVarType(enum.Enum):
    """Where the variance of p(x_{t-1} | x_t) comes from."""

    LEARNED = enum.auto()  # the network gives its logarithm
    FIXED_SMALL = enum.auto()  # the posterior's variance
    FIXED_LARGE = enum.auto()  # beta_t
    LEARNED_RANGE = enum.auto()  # the network interpolates between the two (improved DDPM, eq. 15)


class LossType(enum.Enum):
    """The training objective."""

    MSE = enum.auto()  # mean squared error (and the variational bound for a learned variance)
    RESCALED_MSE = enum.auto()  # the same, the bound weighted as if all steps were summed
    KL = enum.auto()  # the variational bound of one step
    RESCALED_KL = enum.auto()  # the bound, times the number of steps

    def is_vb(self) -> bool:
        """Whether the loss is the variational bound alone."""
        return self in (LossType.KL, LossType.RESCALED_KL)


_LEARNED = (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)


def _extract_into_tensor(
    arr: np.ndarray, timesteps: torch.Tensor, broadcast_shape: tuple[int, ...]
) -> torch.Tensor:
    """Float32 values of `arr` [T] at `timesteps` [N], as a tensor of `broadcast_shape` (N, ...).

    Not used here; processes that others derived from guided-diffusion's import it.
    """
    values = torch.from_numpy(arr).to(timesteps.device)[timesteps].float()
    return values.view(-1, *[1] * (len(broadcast_shape) - 1)).expand(broadcast_shape)


class GaussianDiffusion:
    """A diffusion process over `betas` and the way a network parametrises its reverse.

    The coefficient arrays (`betas`, `alphas_cumprod`, `posterior_variance`, ...) are public,
    float64 [num_timesteps].
    """

    def __init__(
        self,
        *,
        betas: np.ndarray,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        loss_type: LossType,
        rescale_timesteps: bool = False,
    ):
        betas = np.asarray(betas, dtype=np.float64)
        if betas.ndim != 1 or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError("betas must be one-dimensional with values in (0, 1]")
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.loss_type = loss_type
        self.rescale_timesteps = rescale_timesteps
        self.betas = self.original_betas = betas
        self.num_timesteps = len(betas)

        alphas = 1.0 - betas
        self.alphas_cumprod = np.cumprod(alphas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.alphas_cumprod_next = np.append(self.alphas_cumprod[1:], 0.0)

        # q(x_t | x_0) and its inversion (DDPM, eq. 4).
        one_minus = 1.0 - self.alphas_cumprod
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(one_minus)
        self.log_one_minus_alphas_cumprod = np.log(one_minus)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod - 1)

        # q(x_{t-1} | x_t, x_0) (DDPM, eq. 6 and 7).
        self.posterior_variance = betas * (1.0 - self.alphas_cumprod_prev) / one_minus
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / one_minus
        self.posterior_mean_coef2 = (1.0 - self.alphas_cumprod_prev) * np.sqrt(alphas) / one_minus
        # The posterior of step 0 is a point; its logarithm takes the variance of step 1.
        first = self.posterior_variance[1] if self.num_timesteps > 1 else betas[0]
        clipped = np.append(first, self.posterior_variance[1:])
        self.posterior_log_variance_clipped = np.log(clipped)
        self._log_betas = np.log(betas)
        self._large_variance = np.append(first, betas[1:])
        self._log_large_variance = np.log(self._large_variance)
        self._tables: dict[tuple[str, torch.device], torch.Tensor] = {}

    # --- coefficients and time ---

    def _at(self, name: str, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Float32 values of the coefficient array `name` at t, shaped to broadcast over `like`.

        Tables go to each device once: a lookup during sampling costs no transfer.
        """
        key = (name, t.device)
        if key not in self._tables:
            self._keep_table(key, torch.from_numpy(getattr(self, name)).float())
        return self._tables[key][t].view(-1, *[1] * (like.ndim - 1))

    def _keep_table(self, key: tuple[str, torch.device], table: torch.Tensor) -> None:
        # A table made in inference mode could not take part in a later training step.
        with torch.inference_mode(False):
            self._tables[key] = table.to(key[1], copy=True)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_tables": {}}

    def _scale_timesteps(self, t: torch.Tensor) -> torch.Tensor:
        """The time that the network sees for step index t."""
        if self.rescale_timesteps:
            return t.float() * (MODEL_TIME_SPAN / self.num_timesteps)
        return t

    # --- the forward process q ---

    def q_mean_variance(self, x_start: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Mean, variance and log variance of q(x_t | x_0), each of x_0's shape (DDPM, eq. 4)."""
        mean = self._at("sqrt_alphas_cumprod", t, x_start) * x_start
        log_variance = self._at("log_one_minus_alphas_cumprod", t, x_start).expand_as(x_start)
        return mean, log_variance.exp(), log_variance

    def q_sample(
        self, x_start: torch.Tensor, t: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Diffuse x_0 to step t: a draw from q(x_t | x_0)."""
        if noise is None:
            noise = torch.randn_like(x_start)
        return (
            self._at("sqrt_alphas_cumprod", t, x_start) * x_start
            + self._at("sqrt_one_minus_alphas_cumprod", t, x_start) * noise
        )

    def q_posterior_mean_variance(
        self, x_start: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Mean, variance and clipped log variance of q(x_{t-1} | x_t, x_0) (DDPM, eq. 6, 7).

        Each has the shape of x_t.
        """
        mean = (
            self._at("posterior_mean_coef1", t, x_t) * x_start
            + self._at("posterior_mean_coef2", t, x_t) * x_t
        )
        names = "posterior_variance", "posterior_log_variance_clipped"
        variance, log_variance = (self._at(name, t, x_t).expand_as(x_t) for name in names)
        return mean, variance, log_variance

    # --- the reverse process p ---

    def p_mean_variance(
        self,
        model: Callable,
        x: torch.Tensor,
        t: torch.Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable | None = None,
        model_kwargs: dict | None = None,
    ) -> dict[str, torch.Tensor]:
        """Run the network on x_t and parametrise p(x_{t-1} | x_t).

        Returns "mean", "variance", "log_variance" and "pred_xstart", each the shape of x.
        `denoised_fn` is applied to the predicted x_0 before `clip_denoised` clamps it to [-1, 1].
        """
        output = model(x, self._scale_timesteps(t), **(model_kwargs or {}))
        return self._parametrise(output, x, t, clip_denoised, denoised_fn)

    def _parametrise(
        self,
        output: torch.Tensor,
        x: torch.Tensor,
        t: torch.Tensor,
        clip_denoised: bool,
        denoised_fn: Callable | None = None,
    ) -> dict[str, torch.Tensor]:
        output, variance, log_variance = self._variance(output, x, t)
        if self.model_mean_type == ModelMeanType.START_X:
            pred_xstart = output
        elif self.model_mean_type == ModelMeanType.EPSILON:
            pred_xstart = self._predict_xstart_from_eps(x, t, output)
        elif self.model_mean_type == ModelMeanType.VELOCITY:
            pred_xstart = self._rotated(x, output, t)
        else:
            pred_xstart = self._predict_xstart_from_xprev(x, t, output)
        if denoised_fn is not None:
            pred_xstart = denoised_fn(pred_xstart)
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
        if self.model_mean_type == ModelMeanType.PREVIOUS_X:
            mean = output
        else:
            mean = self.q_posterior_mean_variance(pred_xstart, x, t)[0]
        return {
            "mean": mean,
            "variance": variance,
            "log_variance": log_variance,
            "pred_xstart": pred_xstart,
        }

    def _variance(
        self, output: torch.Tensor, x: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Split the network's output into its mean part, and the variance and log variance."""
        if self.model_var_type in _LEARNED:
            channels = x.shape[1]
            if output.shape != (x.shape[0], 2 * channels, *x.shape[2:]):
                raise ValueError(
                    f"a learned variance needs {2 * channels} output channels:"
                    f" the model gave shape {tuple(output.shape)} for input {tuple(x.shape)}"
                )
            output, values = torch.split(output, channels, dim=1)
            if self.model_var_type == ModelVarType.LEARNED:
                log_variance = values
            else:
                # values in [-1, 1] interpolate between the two extremes.
                low = self._at("posterior_log_variance_clipped", t, x)
                high = self._at("_log_betas", t, x)
                log_variance = low + (values + 1) / 2 * (high - low)
            return output, log_variance.exp(), log_variance
        if output.shape != x.shape:
            raise ValueError(
                f"a fixed variance needs {x.shape[1]} output channels:"
                f" the model gave shape {tuple(output.shape)} for input {tuple(x.shape)}"
            )
        if self.model_var_type == ModelVarType.FIXED_LARGE:
            names = "_large_variance", "_log_large_variance"
        else:
            names = "posterior_variance", "posterior_log_variance_clipped"
        variance, log_variance = (self._at(name, t, x).expand_as(x) for name in names)
        return output, variance, log_variance

    def _predict_xstart_from_eps(
        self, x_t: torch.Tensor, t: torch.Tensor, eps: torch.Tensor
    ) -> torch.Tensor:
        return (
            self._at("sqrt_recip_alphas_cumprod", t, x_t) * x_t
            - self._at("sqrt_recipm1_alphas_cumprod", t, x_t) * eps
        )

    def _rotated(self, a: torch.Tensor, b: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """sqrt(ᾱ) a - sqrt(1-ᾱ) b: x_0 of x_t and the velocity, or that of the noise and x_0."""
        return (
            self._at("sqrt_alphas_cumprod", t, a) * a
            - self._at("sqrt_one_minus_alphas_cumprod", t, a) * b
        )

    def _predict_xstart_from_xprev(
        self, x_t: torch.Tensor, t: torch.Tensor, xprev: torch.Tensor
    ) -> torch.Tensor:
        """Solve the posterior's mean for x_0."""
        remainder = xprev - self._at("posterior_mean_coef2", t, x_t) * x_t
        return remainder / self._at("posterior_mean_coef1", t, x_t)

    def _predict_eps_from_xstart(
        self, x_t: torch.Tensor, t: torch.Tensor, pred_xstart: torch.Tensor
    ) -> torch.Tensor:
        return (self._at("sqrt_recip_alphas_cumprod", t, x_t) * x_t - pred_xstart) / self._at(
            "sqrt_recipm1_alphas_cumprod", t, x_t
        )

    # --- guidance ---

    def condition_mean(
        self,
        cond_fn: Callable,
        p_mean_var: dict[str, torch.Tensor],
        x: torch.Tensor,
        t: torch.Tensor,
        model_kwargs: dict | None = None,
    ) -> torch.Tensor:
        """The guided mean of a DDPM step: mean + variance * cond_fn(x, t) (guidance, alg. 1).

        cond_fn returns the gradient of log p(y | x_t) with respect to x_t.
        """
        gradient = cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))
        return p_mean_var["mean"].float() + p_mean_var["variance"] * gradient.float()

    def condition_score(
        self,
        cond_fn: Callable,
        p_mean_var: dict[str, torch.Tensor],
        x: torch.Tensor,
        t: torch.Tensor,
        model_kwargs: dict | None = None,
    ) -> dict[str, torch.Tensor]:
        """p_mean_var with noise, x_0 and mean shifted along the gradient (guidance, alg. 2)."""
        gradient = cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))
        eps = self._predict_eps_from_xstart(x, t, p_mean_var["pred_xstart"])
        eps = eps - self._at("sqrt_one_minus_alphas_cumprod", t, x) * gradient
        pred_xstart = self._predict_xstart_from_eps(x, t, eps)
        mean = self.q_posterior_mean_variance(pred_xstart, x, t)[0]
        return {**p_mean_var, "pred_xstart": pred_xstart, "mean": mean}

    # --- single steps ---

    def p_sample(
        self,
        model: Callable,
        x: torch.Tensor,
        t: torch.Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable | None = None,
        cond_fn: Callable | None = None,
        model_kwargs: dict | None = None,
        randn: Randn | None = None,
    ) -> dict[str, torch.Tensor]:
        """One DDPM step (DDPM, alg. 2): "sample" is x_{t-1}, "pred_xstart" the predicted x_0.

        `randn(x)` supplies noise of the shape of x; drawn at t = 0 too, where it is not used.
        """
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        noise = (randn or torch.randn_like)(x)
        mean = out["mean"]
        if cond_fn is not None:
            mean = self.condition_mean(cond_fn, out, x, t, model_kwargs)
        scale = (0.5 * out["log_variance"]).exp() * _not_last(t, x)
        return {"sample": mean + scale * noise, "pred_xstart": out["pred_xstart"]}

    def ddim_sample(
        self,
        model: Callable,
        x: torch.Tensor,
        t: torch.Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable | None = None,
        cond_fn: Callable | None = None,
        model_kwargs: dict | None = None,
        eta: float = 0.0,
        randn: Randn | None = None,
    ) -> dict[str, torch.Tensor]:
        """One DDIM step (DDIM, eq. 12 and 16); eta 0 is deterministic, eta 1 is DDPM's variance."""
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs)
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        level = self._at("alphas_cumprod", t, x)
        previous = self._at("alphas_cumprod_prev", t, x)
        sigma = eta * ((1 - previous) / (1 - level) * (1 - level / previous)).sqrt()
        noise = (randn or torch.randn_like)(x)
        mean = out["pred_xstart"] * previous.sqrt() + (1 - previous - sigma**2).sqrt() * eps
        sample = mean + _not_last(t, x) * sigma * noise
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_reverse_sample(
        self,
        model: Callable,
        x: torch.Tensor,
        t: torch.Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable | None = None,
        model_kwargs: dict | None = None,
        eta: float = 0.0,
    ) -> dict[str, torch.Tensor]:
        """One step of DDIM's ODE towards noise: "sample" is x_{t+1} (encoding)."""
        if eta != 0.0:
            raise ValueError(f"eta must be 0 for the reverse ODE, not {eta}")
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        following = self._at("alphas_cumprod_next", t, x)
        sample = out["pred_xstart"] * following.sqrt() + (1 - following).sqrt() * eps
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    # --- the reverse loop ---

    def p_sample_loop(
        self, model: Callable, shape: tuple[int, ...], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Samples in [-1, 1] of `shape`, by DDPM; arguments of `p_sample_loop_progressive`."""
        return _final_sample(self.p_sample_loop_progressive(model, shape, *args, **kwargs))

    def p_sample_loop_progressive(
        self,
        model: Callable,
        shape: tuple[int, ...],
        noise: torch.Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable | None = None,
        cond_fn: Callable | None = None,
        model_kwargs: dict | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        denoise_steps: int | None = None,
        randn: Randn | None = None,
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the dict of `p_sample` for every step of the chain; see `_reverse_loop`."""

        def step(x: torch.Tensor, t: torch.Tensor) -> dict[str, torch.Tensor]:
            return self.p_sample(
                model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, randn
            )

        return self._reverse_loop(step, model, shape, noise, device, progress, denoise_steps, randn)

    def ddim_sample_loop(
        self, model: Callable, shape: tuple[int, ...], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Samples in [-1, 1] of `shape`, by DDIM; arguments of `ddim_sample_loop_progressive`."""
        return _final_sample(self.ddim_sample_loop_progressive(model, shape, *args, **kwargs))

    def ddim_sample_loop_progressive(
        self,
        model: Callable,
        shape: tuple[int, ...],
        noise: torch.Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable | None = None,
        cond_fn: Callable | None = None,
        model_kwargs: dict | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        denoise_steps: int | None = None,
        randn: Randn | None = None,
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the dict of `ddim_sample` for every step of the chain; see `_reverse_loop`."""

        def step(x: torch.Tensor, t: torch.Tensor) -> dict[str, torch.Tensor]:
            return self.ddim_sample(
                model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, eta, randn
            )

        return self._reverse_loop(step, model, shape, noise, device, progress, denoise_steps, randn)

    def solver_sample_loop(
        self, model: Callable, shape: tuple[int, ...], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Samples in [-1, 1] of `shape`; arguments of `solver_sample_loop_progressive`."""
        return _final_sample(self.solver_sample_loop_progressive(model, shape, *args, **kwargs))

    def solver_sample_loop_progressive(
        self,
        model: Callable,
        shape: tuple[int, ...],
        noise: torch.Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable | None = None,
        cond_fn: Callable | None = None,
        model_kwargs: dict | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        t_prime: int | None = None,
        steps: int | None = None,
        sampler: str = "dpmpp_2m_sde",
        spacing: str = "uniform",
        eta: float | None = None,
        randn: Randn | None = None,
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Yield "sample" and "pred_xstart" of every step of a solver; see `_reverse_loop`.

        The network runs at the `evaluation_timesteps` of t_prime, steps and spacing (without
        `steps` at all steps of this process below t_prime). t_prime and the timesteps are the
        original process's, also where this one is respaced. With `t_prime` `noise` holds clean
        images (early stop); without it `noise` is x_T, drawn if None. `sampler` and `eta` are
        those of `make_solver`; a learned variance is not used, guidance goes by
        `condition_score`. ValueError that names the argument if one is out of its range.
        """
        if self.model_mean_type == ModelMeanType.PREVIOUS_X:
            raise ValueError("solvers need a network that predicts the noise, x_0 or the velocity")
        if t_prime is not None and noise is None:
            raise ValueError("t_prime needs the clean start images as `noise`")
        process = self._respaced(t_prime, steps, spacing)
        solver = make_solver(sampler, process.alphas_cumprod[::-1], eta)

        def step(x: torch.Tensor, t: torch.Tensor) -> dict[str, torch.Tensor]:
            out = process.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
            if cond_fn is not None:
                out = process.condition_score(cond_fn, out, x, t, model_kwargs)
            z = (randn or torch.randn_like)(x)
            return {"sample": solver(x, out["pred_xstart"], z), "pred_xstart": out["pred_xstart"]}

        stop = None if t_prime is None else process.num_timesteps
        return process._reverse_loop(step, model, shape, noise, device, progress, stop, randn)

    def _respaced(self, t_prime: int | None, steps: int | None, spacing: str) -> "SpacedDiffusion":
        """The process that keeps only the timesteps that a solver evaluates."""
        total = len(self.original_betas)
        stop = total if t_prime is None else t_prime
        levels = np.cumprod(1.0 - self.original_betas)
        # Also without `steps`, so that t_prime and spacing are checked.
        times = evaluation_timesteps(levels, stop, 1 if steps is None else steps, spacing)
        if steps is None:
            times = [t for t in self._kept_timesteps() if t < stop]
        return self.keeping(times)

    def keeping(self, timesteps: Iterable[int]) -> "SpacedDiffusion":
        """The process that keeps only these timesteps of the original one."""
        from .respace import SpacedDiffusion  # which is derived from this class

        return SpacedDiffusion(
            use_timesteps=timesteps,
            betas=self.original_betas,
            model_mean_type=self.model_mean_type,
            model_var_type=self.model_var_type,
            loss_type=self.loss_type,
            rescale_timesteps=self.rescale_timesteps,
        )

    def _kept_timesteps(self) -> list[int]:
        return list(range(self.num_timesteps))

    def _reverse_loop(
        self,
        step: Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]],
        model: Callable,
        shape: tuple[int, ...],
        noise: torch.Tensor | None,
        device: torch.device | str | None,
        progress: bool,
        denoise_steps: int | None,
        randn: Randn | None,
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Yield `step(x, t)` for t = K-1 ... 0, each from the sample of the one before.

        Without `denoise_steps` K is the whole chain and `noise` is x_T (drawn if None). With it
        (early stop, arXiv 2205.12524) `noise` holds clean images in [-1, 1], which are diffused
        to index K-1 first. `randn(like)` is the only source of randomness: one call for the start
        and one a step, the last step and deterministic ones included.
        """
        start, indices = self._start_state(model, shape, noise, device, denoise_steps, randn)
        steps: Iterable[int] = indices
        if progress:
            from tqdm.auto import tqdm

            steps = tqdm(indices)
        return _iterate(step, start, steps)

    def _start_state(
        self,
        model: Any,
        shape: tuple[int, ...],
        noise: torch.Tensor | None,
        device: torch.device | str | None,
        denoise_steps: int | None,
        randn: Randn | None,
    ) -> tuple[torch.Tensor, range]:
        """The first x of the loop, and the step indices that lead from it to a sample."""
        if device is None:
            device = next(model.parameters()).device
        randn = randn or torch.randn_like
        if noise is not None and tuple(noise.shape) != tuple(shape):
            raise ValueError(f"noise has shape {tuple(noise.shape)}, but shape is {tuple(shape)}")
        if denoise_steps is None:
            if noise is None:
                noise = randn(torch.empty(*shape, device=device))
            return noise.to(device), range(self.num_timesteps)[::-1]
        if noise is None:
            raise ValueError("denoise_steps needs the clean start images as `noise`")
        if not 1 <= denoise_steps <= self.num_timesteps:
            raise ValueError(
                f"denoise_steps must be in 1 ... {self.num_timesteps}, not {denoise_steps}"
            )
        noise = noise.to(device)
        t = torch.full((shape[0],), denoise_steps - 1, device=device)
        return self.q_sample(noise, t, noise=randn(noise)), range(denoise_steps)[::-1]

    # --- likelihood and training ---

    def _vb_terms_bpd(
        self,
        model: Callable,
        x_start: torch.Tensor,
        x_t: torch.Tensor,
        t: torch.Tensor,
        clip_denoised: bool = True,
        model_kwargs: dict | None = None,
    ) -> dict[str, torch.Tensor]:
        """One term of the variational bound in bits per dimension [N], and "pred_xstart"."""
        p = self.p_mean_variance(
            model, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs
        )
        # KL(q(x_{t-1} | x_t, x_0) || p), or at t = 0 the decoder's negative log likelihood.
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        kl = normal_kl(true_mean, true_log_variance, p["mean"], p["log_variance"])
        likelihood = discretized_gaussian_log_likelihood(
            x_start, means=p["mean"], log_scales=0.5 * p["log_variance"]
        )
        nats = torch.where(t == 0, -mean_flat(likelihood), mean_flat(kl))
        return {"output": nats / math.log(2.0), "pred_xstart": p["pred_xstart"]}

    def training_losses(
        self,
        model: Callable,
        x_start: torch.Tensor,
        t: torch.Tensor,
        model_kwargs: dict | None = None,
        noise: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Losses [N] of one step each: "loss", and its parts "mse" and "vb" where it has them."""
        if noise is None:
            noise = torch.randn_like(x_start)
        x_t = self.q_sample(x_start, t, noise=noise)
        bound: dict[str, Any] = {"x_start": x_start, "x_t": x_t, "t": t, "clip_denoised": False}
        if self.loss_type.is_vb():
            loss = self._vb_terms_bpd(model, **bound, model_kwargs=model_kwargs)["output"]
            scale = self.num_timesteps if self.loss_type == LossType.RESCALED_KL else 1
            return {"loss": loss * scale}

        output = model(x_t, self._scale_timesteps(t), **(model_kwargs or {}))
        terms = {}
        if self.model_var_type in _LEARNED:
            # The bound trains the variance only: its gradient must not reach the mean
            # (improved DDPM, section 3.1).
            output, values = torch.split(output, x_start.shape[1], dim=1)
            frozen = torch.cat([output.detach(), values], dim=1)
            terms["vb"] = self._vb_terms_bpd(lambda *_: frozen, **bound)["output"]
            if self.loss_type == LossType.RESCALED_MSE:
                # A thousandth of the summed bound balances the mean squared error.
                terms["vb"] = terms["vb"] * (self.num_timesteps / 1000.0)
        target = self._target(x_start, x_t, t, noise)
        terms["mse"] = mean_flat((target - output) ** 2)
        terms["loss"] = terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]
        return terms

    def _target(
        self, x_start: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """What the network should have predicted."""
        if self.model_mean_type == ModelMeanType.EPSILON:
            return noise
        if self.model_mean_type == ModelMeanType.START_X:
            return x_start
        if self.model_mean_type == ModelMeanType.VELOCITY:
            return self._rotated(noise, x_start, t)
        return self.q_posterior_mean_variance(x_start, x_t, t)[0]

    def _prior_bpd(self, x_start: torch.Tensor) -> torch.Tensor:
        """KL of q(x_T | x_0) from N(0, 1) in bits per dimension [N]; no network can change it."""
        t = torch.full((len(x_start),), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        kl = normal_kl(mean, log_variance, 0.0, 0.0)
        return mean_flat(kl) / math.log(2.0)

    @torch.no_grad()
    def calc_bpd_loop(
        self,
        model: Callable,
        x_start: torch.Tensor,
        clip_denoised: bool = True,
        model_kwargs: dict | None = None,
    ) -> dict[str, torch.Tensor]:
        """The whole variational bound, one draw of noise a step.

        Returns "total_bpd" and "prior_bpd" [N], and "vb", "xstart_mse", "mse" [N, T] whose
        columns run from step T-1 down to 0.
        """
        columns: dict[str, list[torch.Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        for index in reversed(range(self.num_timesteps)):
            t = torch.full((len(x_start),), index, device=x_start.device)
            noise = torch.randn_like(x_start)
            x_t = self.q_sample(x_start, t, noise=noise)
            term = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised, model_kwargs)
            eps = self._predict_eps_from_xstart(x_t, t, term["pred_xstart"])
            columns["vb"].append(term["output"])
            columns["xstart_mse"].append(mean_flat((term["pred_xstart"] - x_start) ** 2))
            columns["mse"].append(mean_flat((eps - noise) ** 2))
        out = {name: torch.stack(values, dim=1) for name, values in columns.items()}
        out["prior_bpd"] = self._prior_bpd(x_start)
        out["total_bpd"] = out["vb"].sum(dim=1) + out["prior_bpd"]
        return out


def _not_last(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """1 where noise is still to be added, 0 at t = 0; broadcasts over `like`."""
    return (t != 0).to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def _iterate(
    step: Callable, x: torch.Tensor, steps: Iterable[int]
) -> Iterator[dict[str, torch.Tensor]]:
    for index in steps:
        t = torch.full((x.shape[0],), index, device=x.device)
        with torch.no_grad():
            out = step(x, t)
        yield out
        x = out["sample"]


def _final_sample(outputs: Iterator[dict[str, torch.Tensor]]) -> torch.Tensor:
    for out in outputs:
        final = out
    return final["sample"]

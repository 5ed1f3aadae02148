"""The models on a device: a range of indices in, finished images out."""

import functools
import inspect
from collections.abc import Callable

import numpy as np
import torch

from esddpm_io.errors import UserError
from guided_diffusion.checkpoints import load_weights
from guided_diffusion.dist_util import cpu_has_bfloat16, find_launch
from guided_diffusion.pixels import to_uint8
from guided_diffusion.sampling.random_streams import RandomStreams
from guided_diffusion.sampling.settings import (
    WITHOUT_EFFECT,
    Job,
    diffusion_from,
)
from guided_diffusion.sampling.sources import Start
from guided_diffusion.script_util import (
    classifier_defaults,
    create_classifier,
    create_model,
    sr_create_model,
)

Report = Callable[[int], None]


class Sampler:
    """Samples index ranges of one job on one device.

    A sample depends on the job's settings and its own index alone, whatever range it is in.
    """

    def __init__(self, job: Job, log: Callable[[str], None] = print):
        self._job = job
        settings = job.settings
        self.device = choose_device(job.device)
        self.diffusion = diffusion_from(settings)
        create = sr_create_model if "large_size" in settings else create_model
        self._model = load_network(
            create,
            flags_of(create, settings),
            job.info["model_path"],
            self.device,
            half=settings["use_fp16"],
            log=log,
        )
        self._cond_fn = self._make_cond_fn(log) if job.is_guided else None
        self.steps = settings["denoise_steps"] or self.diffusion.num_timesteps

    @torch.inference_mode()
    def sample(self, start: int, stop: int, report: Report = lambda step: None):
        """Samples start … stop-1: images uint8 [n, H, W, 3], labels int64 [n] or None.

        `report` is told the number of steps done. Raises UserError, naming index and step, if a
        sample is NaN or infinite.
        """
        settings = self._job.settings
        begin = self._job.source.start(start, stop)
        streams = RandomStreams(settings["seed"], start, stop)
        loop = self.diffusion.p_sample_loop_progressive
        if settings["use_ddim"]:
            ddim = self.diffusion.ddim_sample_loop_progressive
            loop = functools.partial(ddim, eta=settings["eta"])
        size = settings.get("large_size") or settings["image_size"]
        finite = []
        for done, out in enumerate(
            loop(
                self._predict,
                (stop - start, 3, size, size),
                noise=self._to_device(begin.images),
                clip_denoised=settings["clip_denoised"],
                cond_fn=self._cond_fn,
                model_kwargs=self._model_kwargs(begin),
                device=self.device,
                denoise_steps=settings["denoise_steps"],
                randn=streams.randn,
            ),
            start=1,
        ):
            # Looked at only after the last step, so that the device never waits for the CPU.
            finite.append(out["sample"].isfinite().flatten(1).all(dim=1))
            report(done)
        self._check_finite(torch.stack(finite).cpu().numpy(), start)
        return to_uint8(out["sample"]), begin.labels

    def free_memory(self) -> None:
        """Give memory that a failed batch has left behind back to the device."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _predict(self, x: torch.Tensor, t: torch.Tensor, **kwargs) -> torch.Tensor:
        """The model's output; labels that are there for the classifier alone are left out."""
        if not self._job.settings["class_cond"]:
            kwargs.pop("y", None)
        return self._model(x, t, **kwargs)

    def _model_kwargs(self, begin: Start) -> dict:
        kwargs = {}
        if self._job.settings["class_cond"] or self._cond_fn:
            kwargs["y"] = torch.from_numpy(begin.labels).to(self.device)
        if begin.low_res is not None:
            kwargs["low_res"] = self._to_device(begin.low_res)
        return kwargs

    def _to_device(self, images: torch.Tensor | None) -> torch.Tensor | None:
        if images is None:
            return None
        if self.device.type == "cuda":
            images = images.pin_memory()
        return images.to(self.device, non_blocking=True, memory_format=torch.channels_last)

    def _check_finite(self, finite: np.ndarray, start: int) -> None:
        """finite: bool [steps, n], in the order of the chain."""
        if finite.all():
            return
        step, row = np.argwhere(~finite)[0]
        left = len(finite) - 1 - step
        halved = self._job.settings["use_fp16"]
        advice = "try --use_fp16 False, and check" if halved else "check"
        raise UserError(
            f"sample {start + row} became NaN or infinite at step {step + 1} of {len(finite)} "
            f"(index {left} of the chain, original timestep {self.diffusion.timestep_map[left]}); "
            f"{advice} that the checkpoint fits the flags"
        )

    def _make_cond_fn(self, log: Callable[[str], None]) -> Callable:
        settings = self._job.settings
        flags = {key: settings[key] for key in classifier_defaults()}
        classifier = load_network(
            create_classifier,
            flags,
            self._job.info["classifier_path"],
            self.device,
            half=settings["classifier_use_fp16"],
            kind="classifier",
            log=log,
        )
        scale = settings["classifier_scale"]

        def gradient(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            """scale × the gradient of log p(y | x_t) with respect to x_t (guidance, alg. 1)."""
            with torch.inference_mode(False), torch.enable_grad():
                x, t, y = x.clone().requires_grad_(), t.clone(), y.clone()
                log_probabilities = classifier(x, t).float().log_softmax(dim=-1)
                chosen = log_probabilities.gather(1, y[:, None]).sum()
                return torch.autograd.grad(chosen, x)[0] * scale

        return gradient


def load_network(
    create: Callable[..., torch.nn.Module],
    flags: dict,
    path: str,
    device: torch.device,
    *,
    half: bool,
    kind: str = "model",
    log: Callable[[str], None] = print,
) -> torch.nn.Module:
    """Make a network with `create(**flags)`, load the checkpoint at `path`, put it on the device.

    With `half` it computes in float16 on CUDA, and on a CPU in bfloat16 where the processor has it
    and float32 elsewhere. `kind` is "model" or "classifier", for the flags that errors name.
    """
    try:
        network = create(**flags)
    except ValueError as error:
        raise UserError(f"{kind} flags: {error}") from error
    load_weights(network, path, flag=f"--{kind}_path")
    network = network.eval().requires_grad_(False)
    network = network.to(device, memory_format=torch.channels_last)
    if half and device.type == "cpu":
        dtype = torch.bfloat16 if cpu_has_bfloat16() else torch.float32
        flag = "--use_fp16" if kind == "model" else "--classifier_use_fp16"
        log(f"{flag} True on a CPU: computing in {str(dtype).removeprefix('torch.')}")
        network.convert_to(dtype)
    elif half:
        network.convert_to_fp16()
    return network


def flags_of(create: Callable, settings: dict) -> dict:
    """The settings that `create` takes."""
    known = {**WITHOUT_EFFECT, **settings}
    return {name: known[name] for name in inspect.signature(create).parameters if name in known}


def choose_device(text: str) -> torch.device:
    """The device that `--device` names: `cpu`, an index or `cuda:INDEX`; empty = one for the rank.

    Raises UserError, listing the valid values, if it is not there.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not text:
        local = find_launch().local_rank
        return torch.device("cuda", local % count) if count else torch.device("cpu")
    if text == "cpu":
        return torch.device("cpu")
    index = text.removeprefix("cuda:")
    if not index.isdecimal() or int(index) >= count:
        valid = ", ".join(["cpu", *map(str, range(count))])
        raise UserError(f"--device {text} is not there; valid on this machine: {valid}")
    device = torch.device("cuda", int(index))
    torch.cuda.set_device(device)
    return device


# What torch's CPU allocator, and oneDNN (which gives no reason), say when memory runs out.
_OUT_OF_MEMORY = ("allocate memory", "could not create a primitive", "could not create a memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device, or the machine for the CPU, had no memory left."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)
    )

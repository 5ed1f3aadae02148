"""The models on a device: a range of indices in, finished images out."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from esddpm_io.errors import UserError
from esddpm_io.launch import find_launch
from esddpm_io.processes import cpu_has_bfloat16
from guided_diffusion.checkpoints import check_fit, fingerprint, read_checkpoint
from guided_diffusion.compiling import Compiled, compile_for_sampling
from guided_diffusion.diffusers_network import DiffusersNetwork
from guided_diffusion.pixels import to_uint8
from guided_diffusion.rng import DrawnAhead, RandomStreams
from guided_diffusion.sampling.job import Job
from guided_diffusion.sampling.sources import Start
from guided_diffusion.script_util import create_network
from guided_diffusion.settings.record import WITHOUT_EFFECT, Network, diffusion_of
from guided_diffusion.solvers import SOLVERS
from guided_diffusion.unet import EncoderUNetModel, UNetModel

Report = Callable[[int], None]


class Sampler:
    """Samples index ranges of one job on one device.

    A sample depends on the job's settings and its own index alone, whatever range it is in.
    networks: those of the last job of this process, which are not loaded again.
    """

    def __init__(
        self,
        job: Job,
        log: Callable[[str], None] = print,
        networks: "LoadedNetworks | None" = None,
    ):
        self._run, self._source = job.run, job.source
        self.device = choose_device(job.device)
        self.device_name = name_of(self.device)
        self.diffusion = diffusion_of(job.run)
        precision = job.run.network.precision
        if self.device.type == "cuda" and precision in ("float32", "tf32"):
            set_tf32(precision == "tf32")
        self._networks = networks or LoadedNetworks()
        rows = min(job.batch_size, job.chunk_size, job.run.num_samples) if job.compile else None
        load = functools.partial(self._networks.load, device=self.device, rows=rows, log=log)
        guidance = job.run.guidance
        wanted = [job.run.network, *([guidance.classifier] if guidance else [])]
        self._networks.forget_all_but(wanted)
        self._model = load(job.run.network, flag="--model_path")
        self._cond_fn = None
        if guidance:
            classifier = load(guidance.classifier, flag="--classifier_path")
            self._cond_fn = _gradient_of(classifier, guidance.scale)
        self.steps = len(job.run.sampler.timesteps)

    @torch.inference_mode()
    def sample(
        self, start: int, stop: int, report: Report = lambda step: None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Samples start … stop-1: images uint8 [n, H, W, 3], labels int64 [n] or None.

        `report` is told the number of steps done. Raises UserError, naming index and step, if a
        sample is NaN or infinite.
        """
        sampler = self._run.sampler
        begin = self._source.start(start, stop)
        streams = RandomStreams(self._run.seed, start, stop)
        # A CPU has no time to spare while the network runs.
        ahead = DrawnAhead(streams, draws=self.steps + 1) if self.device.type == "cuda" else None
        finite = []
        for done, out in enumerate(
            self._loop()(
                self._predict,
                (stop - start, 3, *self._run.image_shape),
                noise=self._to_device(begin.images),
                clip_denoised=sampler.clip_denoised,
                cond_fn=self._cond_fn,
                model_kwargs=self._model_kwargs(begin),
                device=self.device,
                randn=(ahead or streams).randn,
            ),
            start=1,
        ):
            # Looked at only after the last step, so that the device never waits for the CPU.
            finite.append(out["sample"].isfinite().flatten(1).all(dim=1))
            report(done)
        self._check_finite(torch.stack(finite).cpu().numpy(), start)
        return to_uint8(out["sample"]), begin.labels

    def _loop(self) -> Callable[..., Iterator[dict[str, torch.Tensor]]]:
        """The reverse loop of the run's sampler, with what only this sampler takes."""
        sampler, diffusion = self._run.sampler, self.diffusion
        if sampler.name in SOLVERS:
            t_prime = None if sampler.steps is None else sampler.timesteps[0] + 1
            solve = diffusion.solver_sample_loop_progressive
            name, eta = sampler.name, sampler.eta
            return functools.partial(solve, t_prime=t_prime, sampler=name, eta=eta)
        if sampler.name == "ddim":
            ddim = diffusion.ddim_sample_loop_progressive
            return functools.partial(ddim, eta=sampler.eta, denoise_steps=sampler.steps)
        return functools.partial(diffusion.p_sample_loop_progressive, denoise_steps=sampler.steps)

    def shrink(self, batch_size: int) -> None:
        """Give memory that a failed batch has left behind back; from now on batches are smaller."""
        self._networks.shrink(batch_size)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _predict(self, x: torch.Tensor, t: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        """The model's output; labels that are there for the classifier alone are left out."""
        if not self._run.network.flags["class_cond"]:
            kwargs.pop("y", None)
        output = self._model(x, t, **kwargs)
        if self._run.sampler.variance == "posterior":
            # The lower end of the range that a learned variance lies in (improved DDPM, eq. 15).
            output = torch.cat([output[:, : x.shape[1]], torch.full_like(x, -1)], dim=1)
        return output

    def _model_kwargs(self, begin: Start) -> dict[str, torch.Tensor | None]:
        kwargs: dict[str, torch.Tensor | None] = {}
        if self._run.takes_labels:
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
        halved = self._run.network.precision == "float16"
        advice = "try --precision float32, and check" if halved else "check"
        raise UserError(
            f"sample {start + row} became NaN or infinite at step {step + 1} of {len(finite)} "
            f"(index {left} of the chain, original timestep {self.diffusion.timestep_map[left]}); "
            f"{advice} that the checkpoint fits the flags"
        )


def _gradient_of(classifier: Callable, scale: float) -> Callable:
    def gradient(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """scale × the gradient of log p(y | x_t) with respect to x_t (guidance, alg. 1)."""
        with torch.inference_mode(False), torch.enable_grad():
            x, t, y = x.clone().requires_grad_(), t.clone(), y.clone()
            log_probabilities = classifier(x, t).float().log_softmax(dim=-1)
            chosen = log_probabilities.gather(1, y[:, None]).sum()
            return torch.autograd.grad(chosen, x)[0] * scale

    return gradient


class LoadedNetworks:
    """The networks that a process has on its device, kept from one run to the next."""

    def __init__(self) -> None:
        self._kept: list[tuple[Network, torch.device, int | None, Callable]] = []

    def forget_all_but(self, wanted: Sequence[Network]) -> None:
        """Let go of the rest before others are loaded: both might not fit into memory."""
        self._kept = [kept for kept in self._kept if any(_same(kept[0], one) for one in wanted)]

    def load(
        self,
        record: Network,
        device: torch.device,
        *,
        flag: str,
        rows: int | None = None,
        log: Callable[[str], None],
    ) -> Callable:
        """The network of a record on the device, as `load_network`, read once.

        rows: compile it for batches of up to that many, or None.
        """
        for kept, where, its_rows, network in self._kept:
            if (where, its_rows) == (device, rows) and _same(kept, record):
                return network
        network = load_network(record, device, flag=flag, log=log)
        if rows is not None:
            log(f"compiling the {record.kind} at its first evaluation")
            network = compile_for_sampling(network, rows, device)
        self._kept.append((record, device, rows, network))
        return network

    def joined(self, others: "LoadedNetworks") -> "LoadedNetworks":
        """Those of both."""
        both = LoadedNetworks()
        both._kept = [*self._kept, *others._kept]
        return both

    def shrink(self, rows: int) -> None:
        """From now on compiled networks get batches of at most so many rows."""
        for *_, network in self._kept:
            if isinstance(network, Compiled):
                network.rows = rows


def _same(one: Network, other: Network) -> bool:
    """Whether two records build the same network, whatever file its tensors lie in."""
    return dataclasses.replace(one, path=other.path) == other


def load_network(
    record: Network,
    device: torch.device,
    *,
    flag: str,
    log: Callable[[str], None] = print,
) -> torch.nn.Module:
    """Make the network of a record, load its checkpoint, put it on the device.

    It computes in its precision if the device has it, see `dtype_on`. UserError, naming `flag`, if
    the checkpoint is not the recorded one any more.
    """
    state_dict = read_checkpoint(record.path, flag=flag)
    if fingerprint(state_dict) != record.sha256:
        raise UserError(
            f"{flag}: {record.path} has changed since the run's settings were written: start it "
            "anew in another folder"
        )
    network = create_network(record.kind, {**record.flags, **WITHOUT_EFFECT})
    check_fit(network, state_dict, record.path, flag=flag)
    network.load_state_dict(state_dict)
    dtype = dtype_on(device, record.precision)
    name = str(dtype).removeprefix("torch.")
    if device.type == "cpu" and name != record.precision:
        log(f"{record.kind}: {record.precision} on a CPU: computing in {name}")
    return place(network, device, dtype)


def place(
    network: UNetModel | EncoderUNetModel | DiffusersNetwork,
    device: torch.device,
    dtype: torch.dtype,
) -> torch.nn.Module:
    """A network made ready for sampling: on the device, frozen, its trunk in `dtype`."""
    network.eval().requires_grad_(False).to(device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # not in its stub
    if dtype != torch.float32:
        network.convert_to(dtype)
    return network


def dtype_on(device: torch.device, precision: str) -> torch.dtype:
    """What a network of a precision (one of PRECISIONS) computes in.

    A CPU has no tf32, float16 only to store, and bfloat16 where the processor says so: half
    precision is bfloat16 there, or float32. tf32 is float32 to torch; `set_tf32` tells them apart.
    """
    if precision in ("float32", "tf32"):
        return torch.float32
    if device.type != "cpu":
        return torch.float16 if precision == "float16" else torch.bfloat16
    return torch.bfloat16 if cpu_has_bfloat16() else torch.float32


def set_tf32(allowed: bool) -> None:
    """Let CUDA round the factors of float32 products to tf32, or not, in this whole process.

    Left to itself torch does so in convolutions and not in matrix products.
    """
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def name_of(device: torch.device) -> str:
    """What the device is: the GPU's name, or "cpu" with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} threads)"


def choose_device(text: str) -> torch.device:
    """The device that `--device` names: `cpu`, an index or `cuda:INDEX`; empty = one for the rank.

    Raises UserError, listing the valid values, if it is not there.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not text:
        if not count:
            return torch.device("cpu")
        text = str(find_launch().local_rank % count)
    if text == "cpu":
        return torch.device("cpu")
    index = text.removeprefix("cuda:")
    if not index.isdecimal() or int(index) >= count:
        valid = ["cpu", *map(str, range(count))]
        raise UserError(
            f"--device {text} is not there; valid on this machine: {', '.join(valid)}",
            got=text,
            valid=valid,
        )
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

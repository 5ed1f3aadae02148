"""The flags of a sampling script, checked and turned into one record, before anything expensive."""

import argparse
import dataclasses
import os
from collections.abc import Iterable, Mapping

from esddpm_io.atomic import write_json
from esddpm_io.errors import UserError
from esddpm_io.files import absolute, exists, fingerprint_file, join, read_json
from guided_diffusion.checkpoints import explicit_flags, read_sidecar, settle_flags
from guided_diffusion.dist_util import find_launch
from guided_diffusion.sampling.chunks import default_chunk_size
from guided_diffusion.sampling.sources import (
    PureNoise,
    Source,
    open_generator_images,
    open_images_to_enlarge,
)
from guided_diffusion.script_util import (
    NUM_CLASSES,
    add_dict_to_argparser,
    args_to_dict,
    classifier_defaults,
    create_gaussian_diffusion,
    model_and_diffusion_defaults,
    sr_model_and_diffusion_defaults,
    str2bool,
)

# Model flags that sampling does not depend on, and what they are while it runs.
WITHOUT_EFFECT = {"use_checkpoint": False, "dropout": 0.0}
IMAGES_FILE = "generator_images.json"
_LARGEST_SEED = 2**64 - 1
# Flags of every sampling command, and their defaults.
COMMON_DEFAULTS = {
    "clip_denoised": True,
    "num_samples": 10000,
    "batch_size": 16,
    "use_ddim": False,
    "eta": 0.0,
    "model_path": "",
    "device": "",
    "seed": 0,
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One process's part in sampling a folder.

    settings: all that the samples depend on, as plain values; info: where it came from.
    rank, world_size: this process's place. With `any_chunk` it does whatever chunk is missing,
    beginning with its own block; without it only its block.
    """

    settings: dict
    info: dict
    source: Source
    save_dir: str
    device: str
    rank: int
    world_size: int
    any_chunk: bool
    batch_size: int
    chunk_size: int
    save_numpy_array: bool
    save_png_files: bool

    @property
    def block(self) -> tuple[int, int]:
        """This rank's own block of indices: ceil(N / world_size) from rank × that."""
        return self.block_of(self.rank)

    def block_of(self, rank: int) -> tuple[int, int]:
        """The block of any rank."""
        share = -(-len(self.source) // self.world_size)
        start = min(rank * share, len(self.source))
        return start, min(start + share, len(self.source))

    @property
    def is_guided(self) -> bool:
        return self.settings["classifier_scale"] != 0


def sampling_defaults(guided: bool) -> dict:
    """All flags of a sampling script that take a value, and their defaults."""
    defaults = {
        **_worker_defaults(),
        "dataset_path": "",
        "limit": 0,
        "denoise_steps": 25,
        **model_and_diffusion_defaults(),
    }
    if guided:
        defaults |= {"classifier_path": "", "classifier_scale": 1.0, **classifier_defaults()}
    return defaults


def super_resolution_defaults() -> dict:
    """The same for a super-resolution script."""
    return {**_worker_defaults(), "base_samples": "", **sr_model_and_diffusion_defaults()}


def _worker_defaults() -> dict:
    return {
        **COMMON_DEFAULTS,
        "save_dir": "",
        "global_rank": None,
        "world_size": None,
        "any_chunk": None,
        "chunk_size": 0,
    }


_TYPES_OF_UNSET = {"global_rank": int, "world_size": int, "any_chunk": str2bool}
_SWITCHES = ("save_numpy_array", "save_png_files")


def build_parser(guided: bool, prog: str | None = None) -> argparse.ArgumentParser:
    """The command line of a sampling script; switches may be given a truth value too."""
    parser = _parser(sampling_defaults(guided), prog)
    parser.add_argument("--start_from_scratch", nargs="?", const=True, default=False, type=str2bool)
    return parser


def build_super_resolution_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line of a super-resolution script."""
    return _parser(super_resolution_defaults(), prog)


def _parser(defaults: dict, prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog)
    add_dict_to_argparser(parser, {k: v for k, v in defaults.items() if k not in _TYPES_OF_UNSET})
    for name, kind in _TYPES_OF_UNSET.items():
        parser.add_argument(f"--{name}", type=kind, default=None)
    for name in _SWITCHES:
        parser.add_argument(f"--{name}", nargs="?", const=True, default=False, type=str2bool)
    return parser


def read_job(argv: list[str] | None, *, guided: bool) -> Job:
    """Parse and check a sampling script's command line.

    Raises UserError, naming the flag and the valid values, for anything that could only fail
    later; of the input files it reads headers, labels and what tells them from others.
    """
    parser = build_parser(guided)
    args = parser.parse_args(argv)
    scale = args.classifier_scale if guided else 0.0
    _check_common(args)
    _require(args.limit >= 0, "--limit must be at least 1, or 0 for all generator images")
    typed = {name: getattr(args, name) for name in explicit_flags(parser, argv)}
    remarks = _settle_flags(args, typed, "model")
    if scale:
        remarks += _settle_flags(args, typed, "classifier")
        _check_same_noise(args)
    remarks += without_effect(
        typed,
        {
            "num_samples": (not args.start_from_scratch, "without --start_from_scratch"),
            "denoise_steps": (args.start_from_scratch, "with --start_from_scratch"),
            "dataset_path": (args.start_from_scratch, "with --start_from_scratch"),
            "limit": (args.start_from_scratch, "with --start_from_scratch"),
            "eta": (not args.use_ddim, "without --use_ddim True"),
        },
    )
    start_timestep = _check_steps(args, guided=bool(scale))
    source = _open_source(args, needs_labels=args.class_cond or bool(scale))
    settings = _settings(args, source, model_and_diffusion_defaults())
    settings["classifier_scale"] = scale
    if scale:
        settings |= args_to_dict(args, classifier_defaults())
        settings["classifier"] = fingerprint_file(args.classifier_path, flag="--classifier_path")
    info = {
        "model_path": absolute(args.model_path),
        "classifier_path": absolute(args.classifier_path) if scale else None,
        "dataset_path": _generator_path(args),
        "start_timestep": start_timestep,
        "flags": remarks,
    }
    return _job(args, settings, info, source)


def read_super_resolution_job(argv: list[str] | None) -> Job:
    """The same for a super-resolution script, which enlarges `--base_samples`."""
    parser = build_super_resolution_parser()
    args = parser.parse_args(argv)
    _check_common(args)
    typed = {name: getattr(args, name) for name in explicit_flags(parser, argv)}
    remarks = _settle_flags(args, typed, "sr")
    remarks += without_effect(typed, {"eta": (not args.use_ddim, "without --use_ddim True")})
    args.start_from_scratch = True
    start_timestep = _check_steps(args, guided=False)
    source = open_images_to_enlarge(
        args.base_samples,
        small_size=args.small_size,
        num_samples=args.num_samples,
        num_classes=NUM_CLASSES if args.class_cond else None,
    )
    settings = _settings(args, source, sr_model_and_diffusion_defaults())
    settings["classifier_scale"] = 0.0
    info = {
        "model_path": absolute(args.model_path),
        "base_samples": absolute(args.base_samples),
        "dataset_path": None,
        "start_timestep": start_timestep,
        "flags": remarks,
    }
    return _job(args, settings, info, source)


def _job(args: argparse.Namespace, settings: dict, info: dict, source: Source) -> Job:
    rank, world_size, launched = _place(args, os.environ)
    return Job(
        settings=settings,
        info=info,
        source=source,
        save_dir=args.save_dir,
        device=args.device,
        rank=rank,
        world_size=world_size,
        any_chunk=launched if args.any_chunk is None else args.any_chunk,
        batch_size=args.batch_size,
        chunk_size=args.chunk_size or default_chunk_size(len(source), args.batch_size),
        save_numpy_array=args.save_numpy_array,
        save_png_files=args.save_png_files,
    )


def _check_common(args: argparse.Namespace) -> None:
    for name in ("num_samples", "batch_size"):
        _require(getattr(args, name) >= 1, f"--{name} must be at least 1")
    _require(args.chunk_size >= 0, "--chunk_size must be at least 1, or 0 to choose by itself")
    _require(0 <= args.seed <= _LARGEST_SEED, f"--seed must be in 0 … {_LARGEST_SEED}")
    _require(0 <= args.eta <= 1, f"--eta must be in 0 … 1, not {args.eta:g}")
    _require(bool(args.save_dir), "--save_dir: name the folder for the samples")


def _settle_flags(args: argparse.Namespace, typed: dict, kind: str) -> list[str]:
    """Fill in the flags of a network that its sidecar or its file tells; remarks for the log."""
    flag = "classifier_path" if kind == "classifier" else "model_path"
    path = getattr(args, flag)
    require_file(path, f"--{flag}")
    if kind == "classifier":
        typed = {name: value for name, value in typed.items() if name in classifier_defaults()}
    flags, remarks = settle_flags(path, kind, typed, flag=f"--{flag}")
    own = [name for name in flags if kind != "classifier" or name.startswith("classifier_")]
    for name in own:
        setattr(args, name, flags[name])
    return remarks


def _check_same_noise(args: argparse.Namespace) -> None:
    """UserError for a classifier whose sidecar says it was trained on other noise."""
    sidecar = read_sidecar(args.classifier_path)
    for name in ("noise_schedule", "diffusion_steps"):
        chosen = getattr(args, name)
        trained = sidecar["flags"].get(name, chosen) if sidecar else chosen
        _require(
            trained == chosen,
            f"--classifier_path: {args.classifier_path} was trained with {name} {trained}, the "
            f"diffusion model has {name} {chosen}: guidance needs a classifier of the same noise",
        )


def without_effect(typed: Iterable[str], conditions: Mapping[str, tuple[bool, str]]) -> list[str]:
    """A remark for each typed flag that does nothing; `conditions`: whether it does, and when."""
    return [
        f"--{name} has no effect {when}"
        for name, (useless, when) in conditions.items()
        if useless and name in typed
    ]


def diffusion_from(settings: Mapping):
    """The diffusion process that the settings (or parsed flags) name."""
    return create_gaussian_diffusion(
        steps=settings["diffusion_steps"],
        **{
            key: settings[key]
            for key in (
                "learn_sigma",
                "noise_schedule",
                "use_kl",
                "predict_xstart",
                "rescale_timesteps",
                "rescale_learned_sigmas",
                "timestep_respacing",
            )
        },
    )


def _check_steps(args: argparse.Namespace, guided: bool) -> int:
    """Check chain and number of steps; return the original timestep that sampling starts at."""
    networks = ("model_path", "classifier_path") if guided else ("model_path",)
    paths = [getattr(args, flag) for flag in networks]
    try:
        diffusion = diffusion_from(vars(args))
    except ValueError as error:
        raise UserError(f"--{error}") from error  # begins with the flag's name
    steps = diffusion.num_timesteps
    if args.start_from_scratch:
        args.denoise_steps = None
        return _trained_start(paths, diffusion.timestep_map, steps, "--start_from_scratch")
    _require(
        1 <= args.denoise_steps <= steps,
        f"--denoise_steps must be in 1 … {steps}, the chain's length, not {args.denoise_steps}",
    )
    return _trained_start(paths, diffusion.timestep_map, args.denoise_steps, "--denoise_steps")


def _trained_start(paths: list[str], timestep_map: list[int], steps: int, flag: str) -> int:
    """The original timestep that `steps` steps start at, if the networks were trained on it."""
    start = timestep_map[steps - 1]
    for path in paths:
        trained = trained_steps(path)
        if trained is not None and start >= trained:
            most = sum(timestep < trained for timestep in timestep_map)
            raise UserError(
                f"{flag}: sampling would start at original timestep {start}, but {path} was "
                f"trained on timesteps below {trained} only; --denoise_steps can be 1 … {most} "
                "here (--reverse_steps of the driver)"
            )
    return start


def trained_steps(path: str) -> int | None:
    """T' of a network whose sidecar says that it was trained on timesteps below T' only."""
    sidecar = read_sidecar(path)
    return sidecar["early_stop_steps"] if sidecar else None


def _open_source(args: argparse.Namespace, needs_labels: bool) -> Source:
    classes = NUM_CLASSES if needs_labels else None
    if args.start_from_scratch:
        return PureNoise(args.num_samples, args.seed, classes)
    return open_generator_images(
        args.dataset_path, image_size=args.image_size, num_classes=classes, limit=args.limit
    )


def _settings(args: argparse.Namespace, source: Source, flags: Iterable[str]) -> dict:
    settings = {
        key: value for key, value in args_to_dict(args, flags).items() if key not in WITHOUT_EFFECT
    }
    return settings | {
        "num_samples": len(source),
        "seed": args.seed,
        "start_from_scratch": args.start_from_scratch,
        "denoise_steps": args.denoise_steps,
        "use_ddim": args.use_ddim,
        "eta": args.eta if args.use_ddim else None,
        "clip_denoised": args.clip_denoised,
        "checkpoint": fingerprint_file(args.model_path, flag="--model_path"),
        "generator_images": _fingerprint(source, args.save_dir),
    }


def _fingerprint(source: Source, save_dir: str) -> str | None:
    """The hash of the images' contents.

    What costs reading all files is noted in `save_dir`, so that the driver, or whoever is first,
    does it for all processes.
    """
    stamp = source.stamp()
    if stamp is None:
        return source.fingerprint()
    path = join(save_dir, IMAGES_FILE)
    known = read_json(path)
    if known is None or known["stamp"] != stamp:
        known = {"stamp": stamp, "fingerprint": source.fingerprint()}
        write_json(path, known)
    return known["fingerprint"]


def _generator_path(args: argparse.Namespace) -> str | None:
    if args.start_from_scratch:
        return None
    return absolute(args.dataset_path)


def _place(args: argparse.Namespace, environ: Mapping[str, str]) -> tuple[int, int, bool]:
    """Rank, world size, and whether a launcher set them: flags first, then the environment."""
    if args.global_rank is not None or args.world_size is not None:
        rank, size, launched = args.global_rank or 0, args.world_size or 1, False
    else:
        rank, size, launched = rank_from_environment(environ)
    _require(size >= 1, f"--world_size must be at least 1, not {size}")
    _require(0 <= rank < size, f"--global_rank must be in 0 … {size - 1}, not {rank}")
    return rank, size, launched


def rank_from_environment(environ: Mapping[str, str]) -> tuple[int, int, bool]:
    """Rank and size that torchrun, mpiexec or srun gave, and whether one of them did.

    The tasks of a Slurm job array count as one world: task a of process p has rank a × size + p.
    """
    launch = find_launch(environ)
    rank, size = launch.rank, launch.world_size
    if "SLURM_ARRAY_TASK_ID" in environ:
        tasks = int(environ.get("SLURM_ARRAY_TASK_COUNT", "1"))
        first = int(environ.get("SLURM_ARRAY_TASK_MIN", "0"))
        task = min(int(environ["SLURM_ARRAY_TASK_ID"]) - first, tasks - 1)
        return task * size + rank, tasks * size, True
    return rank, size, launch.launcher != "alone"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def require_file(path: str, flag: str) -> None:
    """UserError, naming `flag`, if `path` is empty or there is no such file."""
    _require(bool(path), f"{flag}: name the checkpoint file")
    _require(exists(path), f"{flag}: there is no file {path}")

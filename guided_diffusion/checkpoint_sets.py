"""The files that one save of a training run leaves: names, order of writing, search, removal."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from esddpm_io.errors import UserError
from esddpm_io.files import exists, remove

from .checkpoints import save_checkpoint, sidecar_path, write_sidecar
from .fp16_util import get_param_groups_and_shapes, unflatten_master_params

_MODEL_NAME = re.compile(r"model(\d{6,})\.pt$")
_SET_MEMBER = re.compile(r"(?:model|opt|state|ema_[\d.e+-]+_)(\d{6,})\.(?:pt|json)$")
_POWER_AVERAGE = re.compile(r"(?:ema_power|posthoc_)[\d.e-]+_(\d{6,})\.(?:pt|json)$")
_OF_A_RUN = re.compile(
    rf"{_SET_MEMBER.pattern}|{_POWER_AVERAGE.pattern}|vae\d+\.(?:pt|json)|samples\d+\.png"
    r"|(?:progress|log)[\w-]*\.(?:csv|json|png|txt)|tb|wandb|wandb_id\.txt"
)

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class CheckpointSet:
    """modelNNNNNN.pt and its siblings; `step` is NNNNNN, the number of steps done."""

    folder: Path | str
    step: int

    @classmethod
    def of_model(cls, path: str) -> "CheckpointSet | None":
        """The set of a modelNNNNNN.pt, None for a file of another name (weights alone).

        UserError if there is no such file.
        """
        if not exists(path):
            raise UserError(f'--resume_checkpoint: there is no file {path} (or say "auto")')
        step = step_of_model(path)
        if step is None:
            return None
        return cls(os.path.dirname(path) or ".", step)

    @property
    def model(self) -> str:
        return self._path("model")

    @property
    def opt(self) -> str:
        return self._path("opt")

    @property
    def state(self) -> str:
        return self._path("state")

    def ema(self, name: float | str) -> str:
        return self._path(f"ema_{name}_")

    def _path(self, prefix: str) -> str:
        return f"{self.folder}/{prefix}{self.step:06d}.pt"

    def write(
        self,
        *,
        model: dict,
        emas: dict[float | str, dict],
        opt: dict,
        state: dict[str, Any],
        sidecar: dict | None,
    ) -> None:
        """Write all files, each under a temporary name, the model last: it marks a whole set.

        If a write fails (a full disk), what this set already has is removed and the error goes on:
        the sets before it stay as they are.
        """
        try:
            remove(self.model)  # of an earlier run: its set would be a mixture for a while
            for name, params in emas.items():
                save_checkpoint(params, self.ema(name))
            save_checkpoint(opt, self.opt)
            save_checkpoint(state, self.state)
            if sidecar is not None:
                for path in (*map(self.ema, emas), self.model):
                    write_sidecar(path, **sidecar)
            save_checkpoint(model, self.model)
        except OSError:
            for path in (*map(self.ema, emas), self.opt, self.state, self.model):
                remove(path)
                remove(sidecar_path(path))
            raise


def fit_optimizer_state(state: dict, params: Mapping[str, torch.Tensor], path: str) -> dict:
    """The AdamW state saved at `path` as the one of `params` (by name, in the model's order).

    It belongs to parameters by position, so shapes are compared before any kernel meets them. Two
    other layouts become the model's: that of sets that this package wrote before it registered
    parameters in the published order, and guided-diffusion's two flat tensors of float16 training.
    Raises UserError, naming `path`, for any other.
    """
    is_state = isinstance(state, dict) and state.keys() == {"state", "param_groups"}
    if not is_state or not state["param_groups"]:
        raise UserError(f"--resume_checkpoint: {path} is not the state of an optimiser")
    moments = state["state"]
    by_name = _split_flat(moments, params)
    for names in (list(params), _label_embedding_late(params)):
        fits = len(state["param_groups"][0]["params"]) == len(names) and all(
            getattr(moment.get(key), "shape", None) == params[names[i]].shape
            for i, moment in moments.items()
            for key in MOMENTS
        )
        if by_name is None and fits:
            by_name = {names[i]: moment for i, moment in moments.items()}
    if by_name is None:
        raise UserError(
            f"--resume_checkpoint: the moments in {path} are those of other parameters: resume with"
            " the model flags of that run, or move this file away to start the optimiser anew"
        )
    indices = {name: index for index, name in enumerate(params)}
    group = {**state["param_groups"][0], "params": list(indices.values())}
    return {"state": {indices[n]: m for n, m in by_name.items()}, "param_groups": [group]}


def _label_embedding_late(params: Mapping[str, torch.Tensor]) -> list[str]:
    """Names in the order of our first versions: the label embedding before the decoder."""
    names = [name for name in params if name != "label_emb.weight"]
    if len(names) < len(params):
        decoder = next(i for i, name in enumerate(names) if name.startswith("output_blocks."))
        names.insert(decoder, "label_emb.weight")
    return names


def _split_flat(moments: dict[int, dict], params: Mapping[str, torch.Tensor]) -> dict | None:
    """Moments of all vectors in one tensor [n] and of all others in one [1, m], by name."""
    groups = [group for group, _ in get_param_groups_and_shapes(params.items())]
    sizes = [sum(p.numel() for _, p in group) for group in groups]
    if [list(m["exp_avg"].shape) for m in moments.values()] != [[sizes[0]], [1, sizes[1]]]:
        return None
    by_name = {}
    for group, moment in zip(groups, moments.values(), strict=True):
        parts = {key: unflatten_master_params(group, moment[key]) for key in MOMENTS}
        for index, (name, _) in enumerate(group):
            by_name[name] = {**moment, **{key: values[index] for key, values in parts.items()}}
    return by_name


def step_of_model(path: str) -> int | None:
    """NNNNNN of a path …/modelNNNNNN.pt, None for another name."""
    match = _MODEL_NAME.fullmatch(Path(path).name)
    return int(match[1]) if match else None


def find_set(resume_checkpoint: str, folder: Path | str | None) -> CheckpointSet | None:
    """The set that a `resume_checkpoint` means: "auto" is the newest whole one in `folder`.

    None for no set ("", "auto" without one, a file that is weights alone); UserError if the file
    named is not there, or "auto" has no folder to look in.
    """
    if not resume_checkpoint:
        return None
    if resume_checkpoint != "auto":
        return CheckpointSet.of_model(resume_checkpoint)
    if folder is None:
        raise UserError("call logger.configure() first: checkpoints go to its folder")
    return newest_set(Path(folder))


def newest_set(folder: Path) -> CheckpointSet | None:
    """The newest set in `folder` of which model and optimiser are there.

    Averages may be of other rates than the ones that are wanted now.
    """
    for found in sorted(_sets(folder), key=lambda s: s.step, reverse=True):
        if Path(found.opt).exists():
            return found
    return None


def prune_sets(folder: Path, keep: int, written: int) -> None:
    """Remove all files of sets older than the newest `keep` up to step `written`, just saved.

    Power-function averages stay: the more of them, the better is what is made of them. Sets beyond
    `written` are of another run in the same folder, which went further: they stay, too.
    """
    steps = sorted((s.step for s in _sets(folder) if s.step <= written), reverse=True)
    if len(steps) <= keep:
        return
    oldest_kept = steps[keep - 1]
    # The model first: without it the rest of a set cut short does not look whole.
    for path in sorted(folder.iterdir(), key=lambda p: not p.name.startswith("model")):
        match = _SET_MEMBER.fullmatch(path.name)
        if match and int(match[1]) < oldest_kept:
            path.unlink()


def set_aside(folder: Path, beyond: int | None = None) -> Path | None:
    """Move sets, pictures and logs of the run in `folder` to a new folder earlier-N in it.

    Or, with `beyond`, the power-function averages of later steps than that alone: they are of
    another way that the run has gone, and may not be mixed with those of this one. Returns the new
    folder, None if there was nothing to move.
    """
    found = [path for path in sorted(folder.glob("*")) if _OF_A_RUN.fullmatch(path.name)]
    if beyond is not None:
        averages = ((path, _POWER_AVERAGE.fullmatch(path.name)) for path in found)
        found = [path for path, match in averages if match and int(match[1]) > beyond]
    if not found:
        return None
    there = [int(path.name[8:]) for path in folder.glob("earlier-*") if path.name[8:].isdigit()]
    target = folder / f"earlier-{max(there, default=0) + 1}"
    target.mkdir()
    for path in found:
        path.rename(target / path.name)
    return target


def _sets(folder: Path) -> list[CheckpointSet]:
    matches = (_MODEL_NAME.fullmatch(path.name) for path in Path(folder).glob("model*.pt"))
    return [CheckpointSet(folder, int(match[1])) for match in matches if match]

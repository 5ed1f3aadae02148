"""Presets: one TOML file a data set, read into one frozen record.

The published data sets and the one that ships with the repository are the files of `preset_data/`;
a user's own is any other TOML file, named by its path. A new data set needs no code.
"""

import dataclasses
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path

from esddpm_io.errors import UserError, check_known
from esddpm_io.files import is_blob
from guided_diffusion.flags import (
    classifier_defaults,
    diffusion_defaults,
    model_and_diffusion_defaults,
)
from guided_diffusion.settings.layers import check_flags

PRESET_FOLDER = Path(__file__).parent / "preset_data"
# The published commands are typed in scripts/, so the paths of shipped presets start there.
_IN_WHEEL = Path(__file__).parents[1] / "scripts"  # setup.py puts them there
SCRIPTS_FOLDER = _IN_WHEEL if _IN_WHEEL.is_dir() else Path(__file__).parents[2] / "scripts"
# Where exps/ and logs/ go by default: as published in scripts/, of a wheel where the user stands.
RESULTS_FOLDER = Path() if _IN_WHEEL.is_dir() else SCRIPTS_FOLDER

GUIDED_SAMPLER = "classifier_sample_diffusion_and_reverse.py"
PLAIN_SAMPLER = "image_sample_diffusion_and_reverse.py"

_PATH_KEYS = (
    "checkpoint",
    "classifier",
    "generator_images",
    "reference_batch",
    "feature_graph",
)
_FLAG_TABLES = ("model_flags", "diffusion_flags", "classifier_flags")
# Keys that name a published network in place of its flags, and its kind.
_NETWORK_KEYS = {"network": "model", "classifier_network": "classifier"}
_DOWNLOAD_KEYS = ("url", "path", "bytes")


@dataclasses.dataclass(frozen=True)
class Download:
    """One file to fetch: its URL, where it goes, and its size in bytes where that is known."""

    url: str
    path: str
    bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Preset:
    """All that the driver, the samplers and the downloader need to know of a data set.

    Paths are absolute (blob paths stay as they are) and need not exist. The flags are those that
    the preset sets, under the names and with the types of `flags`' defaults.
    """

    name: str
    sampler_script: str
    checkpoint: str
    classifier: str | None = None
    generator_images: str | None = None
    reference_batch: str | None = None
    feature_graph: str | None = None  # None: the 2015 Inception graph
    metric_name: str | None = None  # of the distance in features of `feature_graph`
    model_flags: Mapping[str, object] = dataclasses.field(default_factory=dict)
    diffusion_flags: Mapping[str, object] = dataclasses.field(default_factory=dict)
    classifier_flags: Mapping[str, object] = dataclasses.field(default_factory=dict)
    download: tuple[Download, ...] = ()
    source: str = ""  # as --dataset names it from anywhere: the shipped name or an absolute path

    @property
    def is_own(self) -> bool:
        """Whether the user wrote it."""
        return self.source.endswith(".toml")

    @property
    def is_guided(self) -> bool:
        """Whether the sampler is the classifier-guided one."""
        return self.sampler_script == GUIDED_SAMPLER


def preset_names() -> list[str]:
    """Names of the presets that ship with the package, sorted."""
    return sorted(path.stem for path in PRESET_FOLDER.glob("*.toml"))


def load_preset(name_or_path: str | os.PathLike, *, flag: str = "--dataset") -> Preset:
    """Read a shipped preset by its name, or a user's own by the path of its TOML file.

    Relative paths inside start at scripts/ for a shipped preset and at the TOML file's folder for
    a user's own. Raises UserError, naming `flag` or the file, if there is no such preset, a key or
    flag is unknown, or a value has the wrong type.
    """
    text = str(name_or_path)
    if text in preset_names():
        return _read_preset(PRESET_FOLDER / f"{text}.toml", SCRIPTS_FOLDER, text)
    path = Path(text).expanduser()
    if path.suffix != ".toml":
        raise UserError(
            f"{flag}: unknown data set '{text}'; valid are {', '.join(preset_names())}, "
            "or the path of a preset file ending in .toml",
            got=text,
            valid=preset_names(),
        )
    return _read_preset(path, path.parent, os.path.abspath(path))


def _read_preset(path: Path, base: Path, source: str) -> Preset:
    content = _parse(path)
    known = [f.name for f in dataclasses.fields(Preset) if f.name != "source"]
    check_known(f"preset {path}: unknown key", content, [*known, *_NETWORK_KEYS])
    if "checkpoint" not in content:
        raise UserError(f"preset {path}: the key 'checkpoint' is missing")
    fields = {"name": path.stem, "sampler_script": PLAIN_SAMPLER, **content}
    for key in ("name", "sampler_script", "metric_name", *_PATH_KEYS):
        if key in fields and not (isinstance(fields[key], str) and fields[key]):
            raise UserError(f"preset {path}: {key} must be a text that is not empty")
    if fields["sampler_script"] not in (GUIDED_SAMPLER, PLAIN_SAMPLER):
        raise UserError(
            f"preset {path}: unknown sampler_script '{fields['sampler_script']}'; "
            f"valid are {GUIDED_SAMPLER}, {PLAIN_SAMPLER}"
        )
    for key in _PATH_KEYS:
        if key in fields:
            fields[key] = _resolve(fields[key], base)
    for table in _FLAG_TABLES:
        if table in fields:
            _check_flags(path, table, fields[table])
    for key, kind in _NETWORK_KEYS.items():
        if key in fields:
            _add_published(path, key, kind, fields)
    fields["download"] = _read_downloads(path, content.get("download", []), base)
    return Preset(**fields, source=source)


def _parse(path: Path) -> dict:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"there is no preset file {path}") from error
    except OSError as error:
        raise UserError(f"cannot read the preset file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"preset {path} is not valid TOML: {error}") from error


def _resolve(text: str, base: Path) -> str:
    if is_blob(text):
        return text
    return os.path.abspath(base / os.path.expanduser(text))


def _check_flags(path: Path, table: str, flags: object) -> None:
    """Hold a table of flags against the defaults: same names, same types."""
    if not isinstance(flags, dict):
        raise UserError(f"preset {path}: {table} must be a table of flags")
    check_flags(f"preset {path}, {table}", flags, _flag_groups()[table])


def _flag_groups() -> dict[str, dict]:
    """The flags of each table, with their defaults; the chain is the command's to say."""
    diffusion, model = diffusion_defaults(), model_and_diffusion_defaults()
    model = {key: value for key, value in model.items() if key not in diffusion}
    del diffusion["timestep_respacing"]
    return {
        "model_flags": model,
        "diffusion_flags": diffusion,
        "classifier_flags": classifier_defaults(),
    }


def _add_published(path: Path, key: str, kind: str, fields: dict) -> None:
    """Put the flags of the published network that `key` names under those that the preset sets."""
    from guided_diffusion.settings.recognition import published_flags

    table = {name: entry for name, entry in published_flags().items() if entry["kind"] == kind}
    name = fields.pop(key)
    if not isinstance(name, str) or name not in table:
        raise UserError(
            f"preset {path}: {key} must be a published network, not {name!r}; valid are "
            f"{', '.join(table)}",
            got=str(name),
            valid=table,
        )
    for flag, value in table[name]["flags"].items():
        for group, defaults in _flag_groups().items():
            if flag in defaults and not (kind == "classifier" and group == "model_flags"):
                fields[group] = {flag: value, **fields.get(group, {})}
                break


def _read_downloads(path: Path, entries: object, base: Path) -> tuple[Download, ...]:
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"preset {path}: download must be a list of tables [[download]]")
    downloads = []
    for entry in entries:
        check_known(f"preset {path}: unknown key in [[download]]:", entry, _DOWNLOAD_KEYS)
        if not all(isinstance(entry.get(key), str) for key in ("url", "path")):
            raise UserError(f"preset {path}: each [[download]] needs a url and a path")
        size = entry.get("bytes")
        if size is not None and (type(size) is not int or size <= 0):
            raise UserError(f"preset {path}: bytes must be a positive whole number, not {size!r}")
        downloads.append(Download(entry["url"], _resolve(entry["path"], base), size))
    return tuple(downloads)

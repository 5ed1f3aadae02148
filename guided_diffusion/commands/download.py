"""Fetch the published files of a data set into the folders where the other commands look for them.

    python scripts/download.py imagenet64

Files that are there already are kept; a download that was cut off goes on where it stopped.
"""

import argparse
import os

from esddpm_io.download import download
from esddpm_io.errors import UserError
from esddpm_io.help import CommandLine
from guided_diffusion.settings.presets import Download, Preset, load_preset, preset_names

PUBLISHED_URL = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/"


def create_argparser() -> argparse.ArgumentParser:
    parser = CommandLine(description=__doc__)
    parser.add_argument(
        "dataset", metavar="DATASET", help=f"{', '.join(preset_names())}, or a preset file (.toml)"
    )
    parser.add_argument(
        "--base_url",
        default=os.environ.get("ES_DDPM_BASE_URL", PUBLISHED_URL),
        help="a mirror with the same folders (also ES_DDPM_BASE_URL); default: %(default)s",
    )
    parser.add_argument("--list", action="store_true", help="only print URLs and paths")
    return parser


def files_of(preset: Preset, base_url: str) -> list[Download]:
    """All that the preset's commands need, the Inception graph included if they evaluate with it.

    `base_url` takes the place of the published folder; URLs elsewhere stay as they are.
    """
    from evaluations.features import GRAPH_URL, cached_graph_path

    files = list(preset.download)
    if files and preset.feature_graph is None:
        files.append(Download(GRAPH_URL, str(cached_graph_path())))
    base = base_url.rstrip("/") + "/"
    return [
        Download(base + file.url.removeprefix(PUBLISHED_URL), file.path, file.bytes)
        if file.url.startswith(PUBLISHED_URL)
        else file
        for file in files
    ]


def main(argv: list[str] | None = None) -> None:
    from evaluations.features import GRAPH_URL, remember_graph

    args = create_argparser().parse_args(argv)
    if not args.base_url.startswith(("http://", "https://")):
        raise UserError(f"--base_url must start with http:// or https://, not '{args.base_url}'")
    preset = load_preset(args.dataset, flag="DATASET")
    files = files_of(preset, args.base_url)
    if not files:
        print(f"{preset.name} has nothing to download: its files come with it")
    for file in files:
        if args.list:
            print(f"{file.url} -> {file.path}")
            continue
        fetched = download(file.url, file.path, expected_bytes=file.bytes)
        if fetched and file.url == GRAPH_URL:  # a mirror's may be any graph
            remember_graph(file.path)
        print(f"{file.path}: {'fetched' if fetched else 'already there'}", flush=True)

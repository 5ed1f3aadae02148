"""A checkpoint in another form: of guided-diffusion, of diffusers, .pt or safetensors.

    python scripts/convert_checkpoint.py model.pt FOLDER            guided-diffusion to diffusers
    python scripts/convert_checkpoint.py FOLDER model.pt            and back
    python scripts/convert_checkpoint.py model.pt model.safetensors the same tensors in another file

FOLDER is a DDPMPipeline: unet/, scheduler/ and a model card, or hf://owner/name[@revision] to read.
A network that the other side does not have is refused with the reason; after conversion both must
give the same output for random input. Flags of the network are needed where a bare file does not
tell them.
"""

import argparse
import os

from esddpm_io.files import check_output_file
from esddpm_io.help import CommandLine
from esddpm_io.hub import fetched
from guided_diffusion.flags import add_dict_to_argparser, model_and_diffusion_defaults
from guided_diffusion.settings.layers import parse, require


def create_argparser() -> argparse.ArgumentParser:
    """The command line: two places and the flags of an image model."""
    parser = CommandLine(description=__doc__)
    parser.add_argument("source", metavar="A", help="checkpoint, or folder of diffusers, to read")
    parser.add_argument("target", metavar="B", help="file (.pt, .safetensors) or folder to write")
    drop = "leave the learned variance out: for schedulers other than DDPM, which have none"
    parser.add_argument("--drop_variance", action="store_true", help=drop)
    add_dict_to_argparser(parser, model_and_diffusion_defaults())
    return parser


def main(argv: list[str] | None = None) -> None:
    args, typed = parse(create_argparser(), argv)

    from guided_diffusion.conversion_files import FILES, copy, to_file, to_folder
    from guided_diffusion.diffusers_folder import is_diffusers

    source, target = fetched(args.source, flag="A"), args.target
    flags = {name: getattr(args, name) for name in typed & model_and_diffusion_defaults().keys()}
    from_folder, is_file = is_diffusers(source), target.endswith(FILES)
    require(from_folder or not os.path.isdir(source), f"A: {source} is no folder of diffusers")
    if is_file:
        check_output_file(target, flag="B")
    surplus = sorted(typed & {*flags, "drop_variance"}) if is_file else []
    require(not surplus, f"{', '.join(f'--{name}' for name in surplus)}: only for a folder B")
    if from_folder:
        require(is_file, f"B: {target} must be a file, {' or '.join(FILES)}, for A is a folder")
        to_file(source, target)
    elif is_file:
        copy(source, target)
    else:
        empty = not os.path.exists(target) or (os.path.isdir(target) and not os.listdir(target))
        require(empty, f"B: {target} is there already: give the name of a new folder")
        to_folder(source, target, flags, args.drop_variance)

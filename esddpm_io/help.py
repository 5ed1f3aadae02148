"""The parser of all command lines: how help is laid out, and what a mistyped flag is told."""

import argparse
import re
import sys
from collections.abc import Iterator
from typing import NoReturn

from esddpm_io.errors import EXIT_USER_ERROR, did_you_mean

# Flags of all scripts by the part of the help that they are in, in its order; what is in none of
# them is shown first. A script of a few flags shows them in one list.
GROUPS = {
    "files": """
        data_dir val_data_dir dataset dataset_path generator limit model_path classifier_path
        base_samples settings again resume_checkpoint start_anew output_dir save_dir
        save_dir_suffix save_png_files save_numpy_array json plot""",
    "sampling": """
        num_samples num_images t_prime steps sampler spacing eta variance clip_denoised chain_length
        reverse_steps denoise_steps use_ddim start_from_scratch
        classifier_guidance_scale classifier_scale""",
    "training": """
        iterations lr lr_warmup lr_anneal_steps anneal_lr weight_decay grad_clip ema_rate power_ema
        schedule_sampler snr_gamma early_stop_steps noised kl_weight prior_components prior_images
        fp16_scale_growth log_interval eval_interval save_interval sample_interval
        keep_checkpoints""",
    "training images": "random_crop random_flip label_from num_workers",
    "devices and processes": """
        device devices batch_size microbatch precision use_fp16 channels_last compile machine_idx
        num_machines global_rank world_size any_chunk chunk_size shard""",
    "Slurm": "submit print_sbatch slurm_args",
    "network": """
        override_checkpoint_flags image_size large_size small_size num_channels num_res_blocks
        num_heads num_heads_upsample num_head_channels attention_resolutions channel_mult dropout
        class_cond use_checkpoint use_scale_shift_norm resblock_updown use_new_attention_order
        latent_dim""",
    "diffusion process": """
        learn_sigma diffusion_steps noise_schedule timestep_respacing use_kl predict_xstart
        rescale_timesteps rescale_learned_sigmas""",
    "classifier": """
        classifier_use_fp16 classifier_width classifier_depth classifier_attention_resolutions
        classifier_use_scale_shift_norm classifier_resblock_updown classifier_pool""",
    "evaluation": """
        not_eval_metrics ref_batch inception_path eval_backend eval_device eval_cache_dir
        eval_while_sampling eval_bootstrap""",
}
_GROUP_OF = {name: title for title, names in GROUPS.items() for name in names.split()}
FEW = 10  # flags that are read faster in one list
_METAVARS = {"int": "N", "float": "X", "str2bool": "BOOL"}


class _Layout(argparse.RawDescriptionHelpFormatter):
    """Descriptions as they are written; after a flag's help its default, where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        is_switch = action.nargs in (0, "?")
        none = action.default in (None, "", (), argparse.SUPPRESS)
        if none or (is_switch and not action.default) or "default" in text:
            return text
        if not action.option_strings:
            return text
        if isinstance(action.default, tuple):
            return f"{text} (default: {' '.join(action.default)})"
        return f"{text} (default: %(default)s)"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        kind = getattr(action.type, "__name__", "str")
        return _METAVARS.get(kind, action.dest.rpartition("_")[2].upper())


class CommandLine(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with the name that was probably meant."""

    def __init__(self, description: str | None = None):
        super().__init__(description=description, formatter_class=_Layout)

    def format_help(self) -> str:
        """The usage in one line, the description, and the flags in the groups of `GROUPS`."""
        formatter = self._get_formatter()
        formatter.add_usage(self._short_usage(), [], [])
        formatter.add_text(self.description)
        for title, actions in self._sections():
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        return formatter.format_help()

    def _short_usage(self) -> str:
        """What has to be given; all flags in a row are no help."""
        words = []
        for action in self._actions:
            name = action.metavar or action.dest.upper()
            if not action.option_strings:
                words.append(f"{name} [{name} ...]" if action.nargs == "+" else str(name))
            elif action.required:
                words.append(f"{action.option_strings[0]} {name}")
        return " ".join(["%(prog)s", *words, "[flags]"])

    def _sections(self) -> Iterator[tuple[str | None, list[argparse.Action]]]:
        """Titles and flags; a group that the script itself has made stays as it is."""
        flags = self._optionals._group_actions
        is_long = len(flags) > FEW
        for group in self._action_groups:
            if group is not self._optionals:
                yield group.title, group._group_actions
                continue
            titles = [_GROUP_OF.get(flag.dest) if is_long else None for flag in flags]
            for title in (None, *GROUPS):
                chosen = [flag for flag, of in zip(flags, titles, strict=True) if of == title]
                yield title or self._optionals.title, chosen

    def error(self, message: str) -> NoReturn:
        print(
            f"error: {message}{self._meant(message)} (--help explains all flags)", file=sys.stderr
        )
        sys.exit(EXIT_USER_ERROR)

    def _meant(self, message: str) -> str:
        """Names like those that are wrong."""
        known = [name for action in self._actions for name in action.option_strings]
        wrong = re.findall(r"--[\w-]+", message.partition("unrecognized arguments:")[2])
        if bad_choice := re.search(r"argument (--\w+).*: invalid choice: '(.*?)'", message):
            wrong, flag = [bad_choice[2]], bad_choice[1]
            action = next(a for a in self._actions if flag in a.option_strings)
            known = [str(choice) for choice in action.choices or ()]
        return did_you_mean(wrong, known)

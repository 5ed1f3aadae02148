"""Checkpoints in other forms give the same outputs, or are refused with the reason."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from esddpm_io.errors import UserError
from guided_diffusion.checkpoints import fingerprint, read_checkpoint, read_sidecar, write_sidecar
from guided_diffusion.commands import sample
from guided_diffusion.commands.convert import main
from guided_diffusion.script_util import create_network, flag_defaults
from guided_diffusion.settings.recognition import published_flags
from tests.golden_values import fill
from tests.small_pipelines import save
from tests.tiny_sampling import MODEL, chunks

PAGE = Path(__file__).parents[2] / "docs" / "bring_your_own.md"
TABLE = dict(re.findall(r"^\| (\S+\.pt) \| (yes|no) \|", PAGE.read_text(), re.MULTILINE))
REASONS = {
    "128x128_diffusion.pt": "same width",
    "512x512_diffusion.pt": "channel_mult begins with 0.5",
    "classifier": "diffusers has none",
    "sr": "no input for the small image",
}
# Beside what the published networks have: attention nowhere, in the first and the last level,
# plain layers to resample, one head, other orders, no scale and shift.
OTHERS = {
    "no attention": {"attention_resolutions": "", "resblock_updown": True},
    "first level": {"attention_resolutions": "8", "learn_sigma": False, "class_cond": False},
    "last level": {"attention_resolutions": "4", "use_new_attention_order": True},
    "everywhere": {"attention_resolutions": "8,4", "num_heads": 1, "resblock_updown": True},
    "added": {"use_scale_shift_norm": False, "num_head_channels": 16, "channel_mult": "1,3,2"},
    "x_0": {"predict_xstart": True, "noise_schedule": "cosine", "learn_sigma": False},
    "classes": {"num_classes": 10},
    "T": {"diffusion_steps": 400, "noise_schedule": "scaled_linear 0.001 0.02"},
}


def write(path: Path, kind: str, flags: dict, early_stop_steps: int | None = None) -> str:
    """A checkpoint with random weights and its sidecar."""
    flags = {**flag_defaults(kind), **flags}
    torch.save(fill(create_network(kind, flags)).state_dict(), path)
    write_sidecar(str(path), flags, kind=kind, early_stop_steps=early_stop_steps)
    return str(path)


def assert_same_tensors(one: str, other: str) -> None:
    assert fingerprint(read_checkpoint(one, flag="A")) == fingerprint(
        read_checkpoint(other, flag="B")
    )


@torch.inference_mode()
def output(path: str) -> torch.Tensor:
    """What the network of a checkpoint and its sidecar gives for one input."""
    flags = read_sidecar(path)["flags"]
    network = create_network("model", flags).eval()
    network.load_state_dict(read_checkpoint(path, flag="A"))
    x = torch.randn(2, 3, *[min(flags["image_size"], 32)] * 2, generator=torch.manual_seed(0))
    labels = {"y": torch.tensor([3, 7])} if flags["class_cond"] else {}
    return network(x, torch.tensor([10, 300]), **labels)


def there_and_back(source: str, tmp_path: Path) -> dict:
    """Convert to a folder and back; the sidecar of what comes back."""
    main([source, str(tmp_path / "folder")])
    back = str(tmp_path / "back.pt")
    main([str(tmp_path / "folder"), back])
    flags = read_sidecar(source)["flags"]
    if flags["use_new_attention_order"]:  # comes back in the other order, with its tensors
        torch.testing.assert_close(output(back), output(source), rtol=1e-5, atol=1e-5)
    else:
        assert_same_tensors(source, back)
    variance = "learned_range" if flags["learn_sigma"] else "fixed_large"
    scheduler = json.loads((tmp_path / "folder/scheduler/scheduler_config.json").read_text())
    assert scheduler["variance_type"] == variance
    return read_sidecar(back)


@pytest.mark.parametrize("flags", OTHERS.values(), ids=OTHERS)
def test_there_and_back(tmp_path, flags):
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    source = write(tmp_path / "a.pt", "model", {**MODEL, **flags})
    before, after = read_sidecar(source)["flags"], there_and_back(source, tmp_path)["flags"]
    names = "predict_xstart", "noise_schedule", "diffusion_steps", "class_cond", "learn_sigma"
    for name in (*names, "num_classes"):
        assert after.get(name) == before.get(name)
    if classes := flags.get("num_classes"):
        assert f" {classes} classes" in (tmp_path / "folder" / "README.md").read_text()


def reduced(name: str) -> tuple[str, dict]:
    """Kind and flags of a published network with fewer channels."""
    entry = published_flags()[name]
    kind, flags = entry["kind"], dict(entry["flags"])
    if kind == "classifier":
        flags["classifier_width"] = 64  # its heads have that many channels
    else:
        flags["num_channels"] = 64 if flags.get("image_size") == 512 else 32
        if "num_head_channels" in flags:
            flags["num_head_channels"] = 32
    return kind, flags


def test_the_table_has_every_published_network():
    assert TABLE.keys() == published_flags().keys()


# Some were trained with the same flags on other images.
CONVERTING = {str(reduced(name)): name for name, converts in TABLE.items() if converts == "yes"}


@pytest.mark.parametrize("name", CONVERTING.values())
def test_published_networks_that_convert(tmp_path, name):
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    kind, flags = reduced(name)
    there_and_back(write(tmp_path / name, kind, flags), tmp_path)


@pytest.mark.parametrize("name", [name for name, converts in TABLE.items() if converts == "no"])
def test_published_networks_that_do_not(tmp_path, name):
    kind, flags = reduced(name)
    source = write(tmp_path / name, kind, flags)
    with pytest.raises(UserError, match=REASONS.get(name) or REASONS[kind]):
        main([source, str(tmp_path / "folder")])
    assert not (tmp_path / "folder").exists()


def test_a_learned_variance_can_be_dropped(tmp_path, capsys):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    source = write(tmp_path / "a.pt", "model", MODEL, early_stop_steps=300)
    main([source, str(tmp_path / "folder"), "--drop_variance"])
    assert "dropped" in capsys.readouterr().out
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "folder")
    assert pipeline.unet.config.out_channels == 3
    assert pipeline.scheduler.config.variance_type == "fixed_small"
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "dropped" in card and "T' = 300" in card
    back = str(tmp_path / "back.safetensors")
    main([str(tmp_path / "folder"), back])
    assert "fixed_small" in capsys.readouterr().out
    kept = read_checkpoint(source, flag="A")["out.2.weight"][:3]
    assert torch.equal(read_checkpoint(back, flag="B")["out.2.weight"], kept)


@pytest.mark.parametrize("kind", ["model", "classifier"])
def test_safetensors_hold_the_tensors_and_the_flags(tmp_path, kind):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    flags = MODEL if kind == "model" else {"image_size": 64, "classifier_depth": 1}
    source = write(tmp_path / "a.pt", kind, flags, early_stop_steps=300)
    middle, back = str(tmp_path / "b.safetensors"), str(tmp_path / "c.pt")
    main([source, middle])
    assert not (tmp_path / "b.json").exists()
    main([middle, back])
    for path in (middle, back):
        assert_same_tensors(source, path)
        assert read_sidecar(path) == read_sidecar(source)
    # What stands beside the file was put there by somebody who knew better.
    write_sidecar(middle, {}, kind=kind)
    assert read_sidecar(middle)["early_stop_steps"] is None


def test_safetensors_are_sampled_from(tiny, tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    source = write(tmp_path / "a.pt", "model", MODEL)
    main([source, str(tmp_path / "b.safetensors")])
    for path in (source, tmp_path / "b.safetensors"):
        own = {"model_path": path, "dataset_path": tiny.images, "timestep_respacing": "5"}
        own |= {"denoise_steps": 2, "device": "cpu", "save_dir": tmp_path / Path(path).stem}
        argv = [part for key, value in own.items() for part in (f"--{key}", str(value))]
        sample.main(argv, guided=False)
    for one, other in zip(chunks(tmp_path / "a"), chunks(tmp_path / "b"), strict=True):
        np.testing.assert_array_equal(one, other)


def test_flags_of_another_network_beside_the_target_are_refused(tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    source = write(tmp_path / "a.pt", "model", MODEL)
    bare = tmp_path / "bare.pt"
    bare.write_bytes(Path(source).read_bytes())
    write_sidecar(str(tmp_path / "b.pt"), {**MODEL, "num_heads": 2})
    for argv in ([str(bare), "b.pt"], [str(bare), "b.safetensors"], [source, "b.safetensors"]):
        with pytest.raises(UserError, match=r"^B: .*b\.json is there already"):
            main([argv[0], str(tmp_path / argv[1])])
    assert not (tmp_path / "b.pt").exists() and not (tmp_path / "b.safetensors").exists()
    main([source, str(tmp_path / "b.pt")])  # writes its own
    main([source, str(tmp_path / "a.safetensors")])  # whose flags are beside it
    for path in ("b.pt", "a.safetensors"):
        assert read_sidecar(str(tmp_path / path)) == read_sidecar(source)


@pytest.mark.parametrize("name", ["b.safetensors", "b.pt"])
def test_flags_beside_what_a_folder_becomes(tmp_path, name, capsys):
    folder = save(tmp_path / "folder")
    write_sidecar(str(tmp_path / name), MODEL)
    if name == "b.pt":
        main([folder, str(tmp_path / name)])
        assert f"A: flags from the config of {folder}\n" in capsys.readouterr().out
        assert read_sidecar(str(tmp_path / name))["flags"]["channel_mult"] == "1,2"
    else:
        with pytest.raises(UserError, match=r"^B: .*b\.json is there already"):
            main([folder, str(tmp_path / name)])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"norm_eps": 1e-6}, "norm_eps is 1e-06"),
        ({"freq_shift": 1}, "freq_shift is 1"),
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos"),
        ({"add_attention": False}, "add_attention"),
        ({"downsample_padding": 0}, "downsample_padding"),
        ({"attention_head_dim": 24}, "num_head_channels"),
        ({"up_block_types": ("UpBlock2D", "UpBlock2D")}, "up_block_types"),
        ({"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups is None"),
    ],
)
def test_networks_of_diffusers_that_ours_do_not_have(tmp_path, changes, reason):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    folder = save(tmp_path / "folder")
    config = {**json.loads((tmp_path / "folder/unet/config.json").read_text()), **changes}
    diffusers.UNet2DModel.from_config(config).save_pretrained(tmp_path / "folder" / "unet")
    with pytest.raises(UserError, match=reason):
        main([folder, str(tmp_path / "b.pt")])
    assert not (tmp_path / "b.pt").exists()


def test_a_v_prediction_is_refused(tmp_path):
    folder = save(tmp_path / "folder", prediction_type="v_prediction")
    with pytest.raises(UserError, match="predicts v"):
        main([folder, str(tmp_path / "b.pt")])


def test_wrong_places_are_told(tmp_path):
    source = write(tmp_path / "a.pt", "model", MODEL)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for argv, reason in (
        ([source, str(tmp_path / "full")], "B: .* is there already"),
        ([str(tmp_path / "full"), "b.pt"], "A: .* no folder of diffusers"),
        ([str(tmp_path / "none.pt"), "b.pt"], "A: there is no file"),
        (
            [source, "b.pt", "--num_heads", "2", "--drop_variance"],
            "--drop_variance, --num_heads: o",
        ),
        (["hf://owner", "b.pt"], "A: hf://owner is not of the form"),
    ):
        with pytest.raises(UserError, match=reason):
            main(argv)

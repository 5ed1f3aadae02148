"""Where the flags of a network come from, which source wins, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from esddpm_io.errors import UserError
from guided_diffusion import script_util
from guided_diffusion.checkpoints import save_checkpoint, write_sidecar
from guided_diffusion.script_util import create_network
from guided_diffusion.settings.presets import load_preset
from guided_diffusion.settings.recognition import outline_of
from guided_diffusion.settings.resolver import check_same_noise, resolve_network

SCRIPTS = Path(__file__).parents[3] / "scripts"

TINY = {
    "image_size": 32,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2",
    "attention_resolutions": "16",
}
DEFAULTS = script_util.model_and_diffusion_defaults()


@pytest.fixture
def bare(tmp_path) -> str:
    """A checkpoint of a network that no published one looks like."""
    torch.manual_seed(0)
    path = str(tmp_path / "model000100.pt")
    save_checkpoint(script_util.create_model(**TINY).state_dict(), path)
    return path


@pytest.fixture
def with_sidecar(bare) -> str:
    flags = {**DEFAULTS, **TINY, "use_scale_shift_norm": False, "noise_schedule": "cosine"}
    write_sidecar(bare, flags, early_stop_steps=500)
    return bare


def resolve(path, preset=None, **options):
    options.setdefault("typed", {})
    return resolve_network("model", path, flag="--model_path", preset=preset, **options)


def own_preset(folder: Path, checkpoint: str, *lines: str):
    path = folder / "mine.toml"
    path.write_text("\n".join([f'checkpoint = "{checkpoint}"', *lines]))
    return load_preset(path)


def test_the_sidecar_wins_over_a_preset_and_says_so(with_sidecar):
    preset = load_preset("emoji32")
    assert preset.diffusion_flags["noise_schedule"] == "cosine"
    write_sidecar(
        with_sidecar,
        {**DEFAULTS, **TINY, "use_scale_shift_norm": False, "noise_schedule": "linear"},
    )
    found = resolve(with_sidecar, preset)
    assert found.flags["noise_schedule"] == "linear"
    assert found.origins["noise_schedule"] == "sidecar of model000100.pt"
    remark = "noise_schedule is linear (sidecar of model000100.pt), not cosine (preset emoji32)"
    assert f"--model_path: {remark}" in found.remarks
    assert found.flags["num_heads"] == 4 and found.flags["num_head_channels"] == -1


def test_a_typed_flag_that_the_sidecar_contradicts_is_an_error_unless_it_is_asked_for(
    with_sidecar,
):
    typed = {"noise_schedule": "linear", "use_fp16": True}
    message = (
        r"--noise_schedule is linear \(typed\) but cosine \(sidecar of model000100\.pt\), for "
        r"--model_path .*: leave it out, or say --override_checkpoint_flags True"
    )
    with pytest.raises(UserError, match=message):
        resolve(with_sidecar, typed=typed)
    found = resolve(with_sidecar, typed=typed, override=True)
    assert found.flags["noise_schedule"] == "linear" and found.origins["noise_schedule"] == "typed"
    agreed = {"noise_schedule": "cosine", "dropout": 0.3, "attention_resolutions": "16"}
    assert resolve(with_sidecar, typed=agreed).flags["dropout"] == 0.3
    assert found.early_stop_steps == 500


def test_an_own_preset_wins_over_a_sidecar_only_if_it_is_asked_for(with_sidecar, tmp_path):
    preset = own_preset(tmp_path, "x.pt", "[diffusion_flags]", 'noise_schedule = "linear"')
    assert resolve(with_sidecar, preset).flags["noise_schedule"] == "cosine"
    found = resolve(with_sidecar, preset, override=True)
    assert found.flags["noise_schedule"] == "linear"


def test_guided_diffusion_s_commands_are_told_what_was_assumed(bare):
    found = resolve(bare, typed={"noise_schedule": "cosine"})
    assert found.flags["image_size"] == 64 and found.flags["num_channels"] == 32
    [assumed] = found.remarks
    assert "assumed by default: num_heads 4, num_head_channels -1" in assumed
    assert "noise_schedule" not in assumed and "use_new_attention_order False" in assumed
    heads = resolve(bare, typed={"num_head_channels": 16})
    assert "num_heads" not in heads.remarks[-1] and "noise_schedule linear" in heads.remarks[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_head": 2}, "unknown flag num_head; valid are .*; did you mean num_heads"),
        ({"num_heads": "2"}, "num_heads '2': its type must be int"),
        ({"num_heads": 2.0}, "num_heads 2.0: its type must be int"),
        ({"predict_xstart": "False"}, "predict_xstart 'False': its type must be bool"),
    ],
)
def test_a_sidecar_says_flags_that_there_are(bare, flags, message):
    sidecar = Path(bare).with_suffix(".json")
    sidecar.write_text(json.dumps({"kind": "model", "flags": flags}))
    with pytest.raises(UserError, match=rf"--model_path: the sidecar of .*\.pt: {message}"):
        resolve(bare)


def test_a_preset_must_say_what_a_bare_file_does_not(bare, tmp_path):
    named = own_preset(tmp_path, bare, "[model_flags]", "image_size = 32")
    message = (
        r"--model_path: names and shapes of .*model000100\.pt do not tell num_heads, "
        r"num_head_channels, use_new_attention_order, noise_schedule\. .*for example "
        r"num_heads = 4; num_head_channels = -1; use_new_attention_order = false; "
        r'noise_schedule = "linear"\) or in a sidecar \.json beside it'
    )
    with pytest.raises(UserError, match=message) as error:
        resolve(bare, named)
    assert "\n" not in str(error.value)
    said = own_preset(
        tmp_path,
        bare,
        "model_flags = {num_head_channels = 32, use_new_attention_order = false}",
        'diffusion_flags = {noise_schedule = "linear"}',
    )
    found = resolve(bare, said, images_size=32)
    assert found.flags["image_size"] == 32  # the start images', which nothing else says
    assert "assumed by default: diffusion_steps 1000" in found.remarks[-1]


def test_a_shipped_preset_does_not_speak_of_another_bare_file(bare, tmp_path):
    """The emoji32 network under another name, without its sidecar."""
    copy = tmp_path / "renamed.pt"
    shutil.copy(SCRIPTS / "models" / "emoji32_diffusion.pt", copy)
    with pytest.raises(UserError, match=r'renamed\.pt do not tell noise_schedule, .*"cosine"'):
        resolve(str(copy), load_preset("emoji32"))


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> str:
    """A file with the names and shapes of 64x64_diffusion.pt; one number seen as every tensor."""
    preset = load_preset("imagenet64")
    with torch.device("meta"):
        network = create_network("model", {**preset.model_flags, **preset.diffusion_flags})
    path = tmp_path_factory.mktemp("published") / "mine.pt"
    state = {n: torch.zeros(()).expand(t.shape) for n, t in network.state_dict().items()}
    save_checkpoint(state, str(path))
    return str(path)


def test_a_published_file_is_known_by_names_and_shapes(published, tmp_path):
    found = resolve(published, load_preset("lsun_cat"))
    assert found.flags["noise_schedule"] == "cosine"
    assert found.origins["noise_schedule"] == "published 64x64_diffusion.pt"
    assert found.flags["num_head_channels"] == 64 and found.flags["use_new_attention_order"]
    assert resolve(published, typed={"use_fp16": False}).flags["noise_schedule"] == "cosine"


def test_a_command_that_types_the_network_means_the_defaults_and_is_told(published):
    typed = {"image_size": 64, "num_channels": 192, "num_head_channels": 64}
    found = resolve(published, typed=typed)
    assert found.flags["noise_schedule"] == "linear"
    assert "noise_schedule linear" in found.remarks[-1]
    assert "it has the shapes of 64x64_diffusion.pt" in found.remarks[-1]


def test_an_own_preset_that_says_otherwise_than_the_published_file_is_asked(published, tmp_path):
    lines = ("[diffusion_flags]", 'noise_schedule = "linear"')
    preset = own_preset(tmp_path, published, *lines)
    message = r"noise_schedule is linear \(preset mine\) but cosine \(published 64x64_diffusion"
    with pytest.raises(UserError, match=message):
        resolve(published, preset)
    found = resolve(published, preset, override=True)
    assert found.flags["noise_schedule"] == "linear" and found.flags["num_head_channels"] == 64


def test_what_does_not_fit_is_named_before_anything_is_built(with_sidecar, bare, tmp_path):
    for typed, message in (
        ({"num_channels": 64}, "does not fit the model flags: .* of another shape"),
        ({"num_channels": 33}, r"^--num_channels 33 times 1, 2 gives widths"),
        ({"channel_mult": "1,x"}, r"^--channel_mult must be a comma list"),
    ):
        with pytest.raises(UserError, match=message):
            resolve(bare, typed=typed, override=True)
    with pytest.raises(UserError, match="sidecar of .* says it is a model, not a classifier"):
        resolve_network("classifier", with_sidecar, flag="--classifier_path", typed={})
    with pytest.raises(UserError, match="--model_path: there is no file none.pt"):
        resolve("none.pt")
    with pytest.raises(UserError, match="--model_path: name the checkpoint file"):
        resolve("")


def test_the_published_classifier_goes_with_the_published_network(published, tmp_path):
    """Its file and its documentation say nothing of noise: no default stands against cosine."""
    flags = load_preset("imagenet64").classifier_flags
    network = outline_of("classifier", flags)
    path = str(tmp_path / "classifier.pt")
    state = {n: torch.zeros(()).expand(t.shape) for n, t in network.state_dict().items()}
    save_checkpoint(state, path)
    for preset in (None, load_preset("imagenet64")):
        model = resolve(published, preset)
        options = {"flag": "--classifier_path", "typed": {"image_size": 64}, "preset": preset}
        classifier = resolve_network("classifier", path, **options)
        assert model.flags["noise_schedule"] == "cosine"
        check_same_noise(model, classifier)


def test_a_classifier_of_other_noise_is_refused(with_sidecar, tmp_path):
    flags = {**script_util.classifier_defaults(), "classifier_width": 32, "image_size": 32}
    flags |= {"classifier_depth": 1, "classifier_attention_resolutions": "8"}
    path = str(tmp_path / "classifier.pt")
    save_checkpoint(script_util.create_classifier(**flags).state_dict(), path)
    options = {"flag": "--classifier_path", "typed": {"image_size": 32}}
    bare = resolve_network("classifier", path, **options)
    assert bare.flags["classifier_width"] == 32
    check_same_noise(resolve(with_sidecar), bare)
    write_sidecar(path, {**flags, "noise_schedule": "linear"}, kind="classifier")
    trained = resolve_network("classifier", path, **options)
    with pytest.raises(UserError, match="was trained with noise_schedule linear, the"):
        check_same_noise(resolve(with_sidecar), trained)

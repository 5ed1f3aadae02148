import dataclasses
import gzip
import json
from pathlib import Path

import pytest

from esddpm_io.errors import UserError
from guided_diffusion.settings.presets import load_preset, preset_names

ROOT = Path(__file__).parents[3]
BASE_URL = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/"


def published_flags(checkpoint):
    """The flags of a published checkpoint, as its own documentation types them."""
    path = ROOT / "tests/golden/published_checkpoints.json.gz"
    words = json.loads(gzip.decompress(path.read_bytes()))[checkpoint]["flags"].split()
    return dict(zip([word.removeprefix("--") for word in words[::2]], words[1::2], strict=True))


def test_names():
    assert preset_names() == ["emoji32", "emoji32_guided", "imagenet64", "lsun_bedroom", "lsun_cat"]


@pytest.mark.parametrize(
    ("name", "checkpoint"),
    [
        ("imagenet64", "64x64_diffusion.pt"),
        ("lsun_bedroom", "lsun_bedroom.pt"),
        ("lsun_cat", "lsun_cat.pt"),
    ],
)
def test_flags_are_those_of_the_published_checkpoints(name, checkpoint):
    preset = load_preset(name)
    given = {**preset.model_flags, **preset.diffusion_flags}
    assert {key: str(value) for key, value in given.items()} == published_flags(checkpoint)
    assert Path(preset.checkpoint).name == checkpoint


def test_classifier_flags_of_imagenet64():
    preset = load_preset("imagenet64")
    published = published_flags("64x64_classifier.pt")
    assert {key: str(value) for key, value in preset.classifier_flags.items()} == published
    assert preset.is_guided
    assert preset.classifier == str(ROOT / "scripts/models/64x64_classifier.pt")


@pytest.mark.parametrize(
    ("name", "images", "reference", "folder"),
    [
        ("imagenet64", "biggan_deep_imagenet64", "VIRTUAL_imagenet64_labeled", ""),
        ("lsun_bedroom", "stylegan_lsun_bedroom", "VIRTUAL_lsun_bedroom256", "lsun"),
        ("lsun_cat", "stylegan2_lsun_cat", "VIRTUAL_lsun_cat256", "lsun"),
        ("emoji32", "vae_emoji32", "VIRTUAL_emoji32_labeled", ""),
    ],
)
def test_files_lie_where_users_put_them(name, images, reference, folder):
    preset = load_preset(name)
    batches = ROOT / "evaluations/precomputed" / folder
    assert preset.generator_images == str(batches / f"{images}.npz")
    assert preset.reference_batch == str(batches / f"{reference}.npz")
    assert (preset.feature_graph is None) == (preset.metric_name is None)


def test_downloads():
    by_name = {name: load_preset(name).download for name in preset_names()}
    assert by_name.pop("emoji32") == ()
    fetched = {item.url.removeprefix(BASE_URL): item.path for d in by_name.values() for item in d}
    scripts, batches = ROOT / "scripts", ROOT / "evaluations/precomputed"
    bedroom, cat = "ref_batches/lsun/bedroom/", "ref_batches/lsun/cat/"
    assert {url: Path(path) for url, path in fetched.items()} == {
        "64x64_diffusion.pt": scripts / "models/64x64_diffusion.pt",
        "64x64_classifier.pt": scripts / "models/64x64_classifier.pt",
        "lsun_bedroom.pt": scripts / "models/lsun/lsun_bedroom.pt",
        "lsun_cat.pt": scripts / "models/lsun/lsun_cat.pt",
        "ref_batches/imagenet/64/biggan_deep_imagenet64.npz": batches
        / "biggan_deep_imagenet64.npz",
        "ref_batches/imagenet/64/VIRTUAL_imagenet64_labeled.npz": batches
        / "VIRTUAL_imagenet64_labeled.npz",
        f"{bedroom}stylegan_lsun_bedroom.npz": batches / "lsun/stylegan_lsun_bedroom.npz",
        f"{bedroom}VIRTUAL_lsun_bedroom256.npz": batches / "lsun/VIRTUAL_lsun_bedroom256.npz",
        f"{cat}stylegan2_lsun_cat.npz": batches / "lsun/stylegan2_lsun_cat.npz",
        f"{cat}VIRTUAL_lsun_cat256.npz": batches / "lsun/VIRTUAL_lsun_cat256.npz",
    }


def test_a_preset_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_preset("emoji32").name = "other"


def write(folder, text):
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_users_own_preset_starts_paths_at_its_folder(tmp_path, monkeypatch):
    path = write(
        tmp_path,
        """
        checkpoint = "weights/ema.pt"
        generator_images = "../vae.npz"
        reference_batch = "gs://bucket/reference.npz"
        model_flags = {image_size = 16, dropout = 0, channel_mult = "1,2"}
        diffusion_flags = {noise_schedule = "cosine"}
        download = [{url = "http://host/ema.pt", path = "weights/ema.pt", bytes = 17}]
        """,
    )
    monkeypatch.chdir(tmp_path.parent)
    for preset in (load_preset(path), load_preset(f"{tmp_path.name}/mine.toml")):
        assert preset.name == "mine"
        assert preset.sampler_script == "image_sample_diffusion_and_reverse.py"
        assert preset.checkpoint == str(tmp_path / "weights/ema.pt")
        assert preset.generator_images == str(tmp_path.parent / "vae.npz")
        assert preset.reference_batch == "gs://bucket/reference.npz"
        assert preset.model_flags == {"image_size": 16, "dropout": 0, "channel_mult": "1,2"}
        assert preset.download[0].bytes == 17
        assert preset.download[0].path == preset.checkpoint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chekpoint = 'a.pt'", "unknown key chekpoint; valid are name, .*checkpoint"),
        ("metric_name = 'FID'", "the key 'checkpoint' is missing"),
        ("checkpoint = 3", "checkpoint must be a text that is not empty"),
        ("checkpoint = ''", "checkpoint must be a text that is not empty"),
        ("checkpoint = ", "is not valid TOML"),
        ("checkpoint = 'a'\nsampler_script = 'x.py'", "unknown sampler_script 'x.py'; valid are"),
        ("checkpoint = 'a'\nmodel_flags = 3", "model_flags must be a table"),
        ("checkpoint = 'a'\n[model_flags]\nimage = 3", "unknown .* image; valid are image_size, "),
        ("checkpoint = 'a'\n[model_flags]\nlearn_sigma = true", "unknown .* learn_sigma; valid"),
        ("checkpoint = 'a'\n[model_flags]\nimage_size = '64'", "image_size '64': its type must"),
        ("checkpoint = 'a'\n[model_flags]\nimage_size = true", "image_size True: its type must"),
        (
            "checkpoint = 'a'\n[diffusion_flags]\nlearn_sigma = 1",
            "learn_sigma 1: its type must be bool",
        ),
        ("checkpoint = 'a'\n[diffusion_flags]\ntimestep_respacing = '50'", "unknown .* timestep_r"),
        ("checkpoint = 'a'\n[[download]]\nurl = 'u'", "needs a url and a path"),
        ("checkpoint = 'a'\n[[download]]\nurl = 'u'\npath = 'p'\nbytes = 0", "bytes must be a pos"),
        ("checkpoint = 'a'\n[[download]]\nuri = 'u'", "unknown .* uri; valid are url, path, bytes"),
        ("checkpoint = 'a'\ndownload = 'u'", "must be a list of tables"),
        ("checkpoint = 'a'\nnetwork = 'x.pt'", "network must be a published network, not 'x.pt'; "),
        ("checkpoint = 'a'\nnetwork = '64x64_classifier.pt'", "valid are 64x64_diffusion.pt, "),
        ("checkpoint = 'a'\nclassifier_network = 3", "classifier_network must be a published"),
    ],
)
def test_faults_of_a_preset_file_are_named(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=message) as error:
        load_preset(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_preset_names_a_published_network_and_may_differ_from_it(tmp_path):
    lines = ["checkpoint = 'a'", "network = '64x64_diffusion.pt'"]
    lines += ["diffusion_flags = {noise_schedule = 'linear'}"]
    mine, published = load_preset(write(tmp_path, "\n".join(lines))), load_preset("imagenet64")
    assert mine.model_flags == published.model_flags
    assert mine.diffusion_flags == {**published.diffusion_flags, "noise_schedule": "linear"}
    assert mine.is_own and not published.is_own


def test_unknown_data_set_lists_the_valid_ones(tmp_path):
    with pytest.raises(
        UserError, match=r"--dataset: unknown data set 'cifar'; valid are emoji32, "
    ):
        load_preset("cifar")
    with pytest.raises(UserError, match="there is no preset file"):
        load_preset(tmp_path / "none.toml")
    with pytest.raises(UserError, match="cannot read the preset file .*directory"):
        (tmp_path / "folder.toml").mkdir()
        load_preset(tmp_path / "folder.toml")

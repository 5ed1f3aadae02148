"""Early stop as a Python call."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from guided_diffusion import early_stop, load_network
from guided_diffusion.sampling.sampler import Sampler
from tests.tiny_sampling import IMAGE_SIZE, NUM_IMAGES, TinyFiles, read_job

ROOT = Path(__file__).parents[2]
KNOWN = {"num_heads": 4, "use_new_attention_order": False, "noise_schedule": "linear"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> TinyFiles:
    return TinyFiles(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def network(tiny):
    return load_network(str(tiny.model), "cpu", image_size=IMAGE_SIZE, **KNOWN)


@pytest.fixture(scope="module")
def classifier(tiny):
    return load_network(str(tiny.classifier), "cpu", image_size=IMAGE_SIZE)


@pytest.fixture(scope="module")
def data(tiny):
    with np.load(tiny.images) as npz:
        return npz["arr_0"], npz["arr_1"]


@pytest.mark.parametrize("scale", [0.0, 20.0])
@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m_sde"])
def test_the_same_samples_as_the_scripts(tiny, tmp_path, network, classifier, data, sampler, scale):
    argv = tiny.guided_flags(tmp_path, classifier_scale=scale, seed=3)
    for flag in ("--timestep_respacing", "--denoise_steps"):
        del argv[argv.index(flag) : argv.index(flag) + 2]
    argv += ["--t_prime", "400", "--steps", "3", "--sampler", sampler]
    engine = Sampler(read_job(argv, guided=True))
    expected = np.concatenate([engine.sample(0, 8)[0], engine.sample(8, NUM_IMAGES)[0]])
    images, labels = data
    given = {"seed": 3, "labels": labels, "classifier": classifier, "guidance_scale": scale}
    found = early_stop(network, images, 400, 3, sampler, **given, batch_size=8)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


def test_paths_numbers_of_numpy_and_devices_are_taken(tiny, network, data):
    images, labels = data
    again = load_network(tiny.model, torch.device("cpu"), image_size=IMAGE_SIZE, **KNOWN)
    found = early_stop(again, images[:3], np.int64(400), steps=np.int32(2), labels=labels[:3])
    expected = early_stop(network, images[:3], 400, steps=2, labels=labels[:3])
    np.testing.assert_array_equal(found, expected)


def test_what_has_no_effect_is_warned_of(tiny, network, classifier, data):
    images, labels = data
    free = load_network(tiny.variant(class_cond=False), "cpu", image_size=IMAGE_SIZE, **KNOWN)
    for wanted, argument, value in [
        (network, "eta", {"eta": 0.5, "sampler": "ddpm"}),
        (network, "classifier", {"classifier": classifier}),
        (free, "labels", {}),
    ]:
        given = {"labels": labels[:2], **value}
        with pytest.warns(UserWarning, match=f"^{argument} has no effect with") as told:
            early_stop(wanted, images[:2], steps=2, **given)
        assert [one.filename for one in told] == [__file__]


def test_what_cannot_be_names_the_argument(tiny, network, classifier, data):
    images, labels = data
    good = {"labels": labels, "steps": 2}

    def refused(message: str, wanted=network, given=images, **changes) -> None:
        with pytest.raises(ValueError, match=message):
            early_stop(wanted, given, **{**good, **changes})

    refused("^images must be a NumPy array of uint8", given=images / 255)
    refused(r"^images must have shape \[N, 8, 8, 3\]", given=images[:, :5])
    refused("^labels: the network or the classifier needs one", labels=None)
    refused("^labels must be 10 integers", labels=labels[:3])
    refused("^labels must be in 0 … 999", labels=labels - 5000)
    refused("^classifier: guidance_scale needs one", guidance_scale=1.0)
    refused("^t_prime must be in 1 ... 1000, not 0", t_prime=0)
    refused("^steps must be in 1 ... 400", steps=0)
    refused("^sampler must be one of ddpm, ddim", sampler="euler")
    refused("^batch_size must be at least 1", batch_size=0)
    refused("^seed must be in 0 …", seed=-1)
    refused("^network must be a U-Net", wanted=str(tiny.model))
    refused("^network must be a U-Net", wanted=classifier)
    refused("^classifier must be a classifier", classifier=network)
    for scale in (math.nan, math.inf):
        given = {"classifier": classifier, "guidance_scale": scale}
        refused("^guidance_scale must be a finite number", **given)
    for name, value in {
        "t_prime": (None, 400.0, "auto"),
        "steps": (2.0, True),
        "seed": (None, 1.5),
        "batch_size": (2.5,),
        "sampler": (None,),
        "guidance_scale": ("1",),
        "clip_denoised": ("False",),
    }.items():
        for one in value:
            refused(f"^{name} {one!r}: its type must be ", **{name: one})
    flags = {"noise_shedule": "cosine", "timestep_respacing": "10"}
    for name, value in flags.items():
        with pytest.raises(ValueError, match=f"^flags: unknown flag {name}; valid"):
            load_network(str(tiny.model), **{name: value})
    with pytest.raises(ValueError, match="^flags: num_heads '4': its type must be int"):
        load_network(str(tiny.model), num_heads="4")
    with pytest.raises(ValueError, match="^path: there is no file nowhere.pt"):
        load_network("nowhere.pt")
    with pytest.raises(ValueError, match="^path: "):
        load_network(str(tiny.images))


def test_the_package_is_imported_without_torch():
    code = "import sys, guided_diffusion; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_notebook_runs():
    notebook = json.loads((ROOT / "examples" / "early_stop.ipynb").read_text())
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    assert len(cells) >= 3
    script = "\n".join(cells)
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT / "examples",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "(16, 32, 32, 3) uint8" in done.stdout

"""Networks of guided-diffusion that know others than 1000 classes: their shapes say how many."""

import json

import numpy as np
import pytest
import torch

from esddpm_io.errors import UserError
from guided_diffusion import early_stop, load_network
from guided_diffusion.commands import sample
from guided_diffusion.script_util import create_network
from guided_diffusion.unet import POOLS
from tests.golden_values import fill
from tests.tiny_sampling import CLASSIFIER, IMAGE_SIZE, MODEL, chunks, read_job

CLASSES = 7


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory):
    """model.pt and a classifier of each pool, with seven classes, and images with these labels."""
    root = tmp_path_factory.mktemp("classes")
    flags = {**MODEL, "num_classes": CLASSES}
    torch.save(fill(create_network("model", flags)).state_dict(), root / "model.pt")
    for pool in POOLS:
        flags = {**CLASSIFIER, "image_size": IMAGE_SIZE, "classifier_pool": pool}
        network = create_network("classifier", {**flags, "num_classes": CLASSES})
        torch.save(fill(network).state_dict(), root / f"{pool}.pt")
    with np.load(tiny.images) as npz:
        np.savez(root / "images.npz", npz["arr_0"], npz["arr_1"] % CLASSES)
    return root


@pytest.mark.parametrize("pool", POOLS)
def test_early_stop_with_a_guide(tiny, files, tmp_path, pool):
    own = {"model_path": files / "model.pt", "classifier_path": files / f"{pool}.pt"}
    own |= {"dataset_path": files / "images.npz", "classifier_pool": pool, "batch_size": 10}
    sample.main(tiny.guided_flags(tmp_path, **own), guided=True)
    images, labels = chunks(tmp_path)
    assert len(images) == 10 and labels.max() < CLASSES
    [settings] = tmp_path.glob("settings.json")
    run = json.loads(settings.read_text())
    assert run["start"]["num_classes"] == CLASSES
    for network in (run["network"], run["guidance"]["classifier"]):
        assert network["flags"]["num_classes"] == CLASSES


def test_labels_beyond_them_are_refused_and_drawn_below(tiny, files, tmp_path):
    own = {"model_path": files / "model.pt"}
    with pytest.raises(UserError, match=r"is not one of the classes 0 … 6$"):
        read_job(tiny.worker_flags(tmp_path, **own), guided=False)
    noise = {"start_from_scratch": True, "num_samples": 40, "timestep_respacing": "2"}
    job = read_job(tiny.worker_flags(tmp_path, **own, **noise), guided=False)
    assert set(job.source.start(0, 40).labels.tolist()) == set(range(CLASSES))
    thousand = read_job(tiny.worker_flags(tmp_path), guided=False)
    assert "num_classes" not in thousand.run.network.flags


def test_flags_that_do_not_fit_are_told_those_that_do(tiny, files, tmp_path):
    argv = tiny.worker_flags(tmp_path, model_path=files / "model.pt", num_channels=64)
    with pytest.raises(UserError, match=r"does not fit .*looks like .*--num_channels 32"):
        read_job(argv, guided=False)


def test_the_python_call(files):
    known = {"num_heads": 4, "use_new_attention_order": False, "noise_schedule": "linear"}
    network = load_network(str(files / "model.pt"), "cpu", image_size=IMAGE_SIZE, **known)
    images = np.zeros((2, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    assert early_stop(network, images, 100, 1, labels=np.array([0, 6])).shape == images.shape
    with pytest.raises(ValueError, match=r"labels must be in 0 … 6"):
        early_stop(network, images, 100, 1, labels=np.array([0, 7]))

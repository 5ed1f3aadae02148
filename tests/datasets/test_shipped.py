"""The files of emoji32 that ship: what they hold, and that they belong together."""

from pathlib import Path

import numpy as np
import pytest

from datasets.emoji32 import CATEGORIES
from guided_diffusion.vae_sampling import load_vae, sample_range

REPOSITORY = Path(__file__).resolve().parents[2]
PRECOMPUTED = REPOSITORY / "evaluations" / "precomputed"
MODELS = REPOSITORY / "scripts" / "models"
COUNTS = [85, 159, 5, 270, 131, 264, 2261, 169, 224, 218]  # drawings of each category


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    with np.load(PRECOMPUTED / "VIRTUAL_emoji32_labeled.npz") as data:
        return dict(data)


def test_reference_holds_all_drawings_and_their_statistics(reference):
    assert reference["arr_0"].shape == (3786, 32, 32, 3)
    assert np.bincount(reference["arr_1"]).tolist() == COUNTS
    assert len(CATEGORIES) == len(COUNTS)
    for mean, covariance, width in (("mu", "sigma", 128), ("mu_s", "sigma_s", 448)):
        assert reference[mean].shape == (width,)
        assert reference[covariance].shape == (width, width)
        np.testing.assert_allclose(reference[covariance], reference[covariance].T, atol=1e-12)
        spectrum = np.linalg.eigvalsh(reference[covariance])
        assert spectrum.min() > 0


def test_reference_was_measured_with_the_shipped_graph(reference):
    """Features of every 20th drawing scatter about the stored mean as samples of it do."""
    from evaluations.evaluation import Settings
    from evaluations.features import choose_engine, extract, load_graph
    from evaluations.inputs import ArrayImages

    images = ArrayImages(reference["arr_0"][::20], flag="it")
    defaults = Settings()
    graph = load_graph(str(PRECOMPUTED / "emoji32_features.pb"))
    assert reference["feature_network"] == [graph.digest]
    engine = choose_engine(graph, "torch", defaults.precision, "cpu")
    features = extract(engine, images, name="drawings", batch_size=64, keep_pool=True)
    deviation = features.pool_gaussian.mean - reference["mu"]
    error = np.sqrt(np.diag(reference["sigma"]) / len(images))
    assert np.abs(deviation / error).max() < 3


def test_vae_images_are_those_of_the_shipped_vae():
    vae = load_vae(str(MODELS / "emoji32_vae.pt"))
    assert vae.label_counts.tolist() == COUNTS
    assert vae.prior.fitted
    with np.load(PRECOMPUTED / "vae_emoji32.npz") as data:
        images, labels = data["arr_0"], data["arr_1"]
    assert images.shape == (3786, 32, 32, 3) and images.dtype == np.uint8
    again, its_labels = sample_range(vae, 0, 0, 16)
    np.testing.assert_array_equal(its_labels, labels[:16])
    # Another processor, or another batch, rounds differently.
    difference = np.abs(again.astype(int) - images[:16])
    assert difference.max() <= 2
    # Labels as often as in the data, to within four standard deviations of drawing them.
    expected = np.array(COUNTS)
    drawn = np.bincount(labels, minlength=len(COUNTS))
    assert (np.abs(drawn - expected) <= 4 * np.sqrt(expected) + 1).all()


def test_shipped_files_stay_small():
    files = [*PRECOMPUTED.glob("*emoji32*"), *MODELS.glob("emoji32*")]
    assert sum(path.stat().st_size for path in files) < 52e6

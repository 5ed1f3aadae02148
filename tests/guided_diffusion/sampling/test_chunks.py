import json

import numpy as np
import pytest

from esddpm_io.errors import UserError
from guided_diffusion.sampling.chunks import ChunkFolder, default_chunk_size

SETTINGS = {"num_samples": 10, "seed": 0, "classifier_scale": 1.0}


def test_the_grid_covers_every_index_once(tmp_path):
    folder = ChunkFolder.open(tmp_path, SETTINGS, {}, 4)
    assert [folder.bounds(chunk) for chunk in range(len(folder))] == [(0, 4), (4, 8), (8, 10)]
    assert list(folder.chunks_of(3, 9)) == [0, 1, 2] and list(folder.chunks_of(4, 8)) == [1]


def test_chunks_are_whole_or_missing(tmp_path):
    folder = ChunkFolder.open(tmp_path, SETTINGS, {}, 4)
    assert folder.missing() == [0, 1, 2] and folder.count_done() == 0
    images = np.arange(2 * 2 * 2 * 3, dtype=np.uint8).reshape(2, 2, 2, 3)
    folder.write(2, images, np.array([7, 8]))
    assert folder.missing() == [0, 1] and folder.count_done() == 2 and folder.is_done(2)
    with folder.reader(2) as reader:
        np.testing.assert_array_equal(reader.array("arr_0"), images)
        assert reader.array("arr_1").tolist() == [7, 8]
    assert [path.name for path in (tmp_path / "chunks").iterdir()] == ["0000008-0000010.npz"]


def test_other_settings_are_refused_with_what_differs(tmp_path):
    ChunkFolder.open(tmp_path, SETTINGS, {"model_path": "a"}, 4)
    with pytest.raises(UserError, match=r"classifier_scale is 1\.0 there, 0\.0 now; eta is None"):
        ChunkFolder.open(tmp_path, {**SETTINGS, "classifier_scale": 0.0, "eta": 1}, {}, 4)


def test_same_settings_go_on_with_the_chunk_size_of_the_folder(tmp_path):
    ChunkFolder.open(tmp_path, SETTINGS, {"model_path": "a"}, 4)
    again = ChunkFolder.open(tmp_path, SETTINGS, {"model_path": "b"}, 3)
    assert again.chunk_size == 4 and again.info == {"model_path": "a"}
    assert ChunkFolder.load(tmp_path).settings == SETTINGS
    assert json.loads((tmp_path / "settings.json").read_text())["chunk_size"] == 4


def test_a_folder_without_settings_is_no_folder_of_samples(tmp_path):
    with pytest.raises(UserError, match=r"is not a folder of samples: it has no settings\.json"):
        ChunkFolder.load(tmp_path)


def test_small_batches_share_a_chunk_when_there_are_many():
    assert default_chunk_size(50_000, 32) == 32
    assert default_chunk_size(50_000, 1) == 13
    assert default_chunk_size(3, 16) == 16

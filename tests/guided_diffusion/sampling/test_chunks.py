import json
import os

import numpy as np
import pytest

from esddpm_io.errors import UserError
from guided_diffusion.sampling.chunks import ChunkFolder, default_chunk_size
from guided_diffusion.sampling.claims import Heart

SETTINGS = {"num_samples": 10, "seed": 0, "classifier_scale": 1.0}
OTHER = {**SETTINGS, "seed": 1}


def sample_first_chunk(folder: ChunkFolder) -> None:
    folder.write(0, np.zeros((4, 2, 2, 3), np.uint8), None)


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
    sample_first_chunk(ChunkFolder.open(tmp_path, SETTINGS, {"model_path": "a"}, 4))
    with pytest.raises(UserError, match=r"classifier_scale is 1\.0 there, 0\.0 now; eta is None"):
        ChunkFolder.open(tmp_path, {**SETTINGS, "classifier_scale": 0.0, "eta": 1}, {}, 4)


def test_settings_without_samples_give_way(tmp_path):
    """A run that could not load its checkpoint does not stand in the way of the mended command."""
    ChunkFolder.open(tmp_path, SETTINGS, {"model_path": "cut"}, 4)
    mended = ChunkFolder.open(tmp_path, OTHER, {"model_path": "whole"}, 2)
    assert (mended.settings, mended.info) == (OTHER, {"model_path": "whole"})
    assert ChunkFolder.load(tmp_path).chunk_size == 2
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def test_settings_with_a_live_process_do_not_give_way(tmp_path):
    ChunkFolder.open(tmp_path, SETTINGS, {}, 4)
    with (
        Heart(str(tmp_path), rank=0, device="cpu"),
        pytest.raises(UserError, match="is being worked on with them"),
    ):
        ChunkFolder.open(tmp_path, OTHER, {}, 4)
    assert ChunkFolder.open(tmp_path, OTHER, {}, 4).settings == OTHER  # it has ended


def test_settings_with_gathered_samples_do_not_give_way(tmp_path):
    ChunkFolder.open(tmp_path, SETTINGS, {}, 4)
    (tmp_path / "samples_all.npz").touch()
    with pytest.raises(UserError, match="holds samples of other settings"):
        ChunkFolder.open(tmp_path, OTHER, {}, 4)


@pytest.mark.parametrize("other", [OTHER, SETTINGS])
def test_a_process_whose_settings_were_replaced_cannot_write(tmp_path, other):
    late = ChunkFolder.open(tmp_path, SETTINGS, {}, 4)
    ChunkFolder.open(tmp_path, OTHER, {}, 4)
    ChunkFolder.open(tmp_path, other, {}, 2)  # with other settings, or other chunks
    with pytest.raises(UserError, match="was given other settings by another process"):
        sample_first_chunk(late)
    assert list((tmp_path / "chunks").iterdir()) == []


def test_a_chunk_that_comes_while_settings_are_moved_away_keeps_them(tmp_path, monkeypatch):
    writer = ChunkFolder.open(tmp_path, SETTINGS, {}, 4)

    def write_then_rename(source, target) -> None:
        monkeypatch.undo()
        sample_first_chunk(writer)
        os.rename(source, target)

    monkeypatch.setattr(os, "rename", write_then_rename)
    with pytest.raises(UserError, match="seed is 0 there, 1 now"):
        ChunkFolder.open(tmp_path, OTHER, {}, 4)
    assert ChunkFolder.load(tmp_path).settings == SETTINGS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chunks", "settings.json"]


def test_chunks_without_settings_are_not_taken_for_ones_own(tmp_path):
    sample_first_chunk(ChunkFolder.open(tmp_path, SETTINGS, {}, 4))
    (tmp_path / "settings.json").unlink()
    with pytest.raises(UserError, match=r"has chunks but no settings\.json"):
        ChunkFolder.open(tmp_path, OTHER, {}, 4)


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

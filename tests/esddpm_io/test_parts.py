"""Folders of parts that grow while they are read."""

import threading

import numpy as np
import pytest

from esddpm_io import parts
from esddpm_io.atomic import atomic_path
from esddpm_io.errors import UserError
from esddpm_io.parts import GrowingImages, cover, find_parts, gaps, part_path
from tests.waiting import PATIENCE_S

IMAGES = np.random.default_rng(0).integers(0, 256, (10, 4, 5, 3), np.uint8)


def write(folder, start, stop, **labels):
    with atomic_path(part_path(str(folder), (start, stop))) as temporary:
        np.savez(temporary, arr_0=IMAGES[start:stop], **labels)


def test_gaps_and_cover_of_overlapping_parts():
    there = [(0, 4), (2, 3), (3, 6), (8, 12)]
    assert list(gaps(there, 0, 12)) == [(6, 8)]
    assert list(gaps(there, 1, 6)) == []
    assert list(gaps(there, 7, 20)) == [(7, 8), (12, 20)]
    assert list(gaps([], 3, 5)) == [(3, 5)]
    assert cover(there, 1, 6) == [((0, 4), (1, 4)), ((3, 6), (4, 6))]


def test_images_are_waited_for(tmp_path, monkeypatch):
    """And read across parts, one of which goes beyond the images that are wanted."""
    monkeypatch.setattr(parts, "_POLL_S", 0.01)
    later = threading.Event()

    def others():
        write(tmp_path, 0, 3)
        assert later.wait(PATIENCE_S)
        write(tmp_path, 5, 10)
        (tmp_path / ".tmp-0000003-0000005.npz").write_bytes(b"half")
        write(tmp_path, 3, 5)

    writer = threading.Thread(target=others)
    writer.start()
    source = GrowingImages(str(tmp_path), 9, flag="SAMPLE")
    assert source.shape == (9, 4, 5, 3) and not source.has_labels
    np.testing.assert_array_equal(source.read(1, 3), IMAGES[1:3])
    later.set()
    np.testing.assert_array_equal(source.read(1, 9), IMAGES[1:9])
    assert source.labels(0, 9) is None
    writer.join()


def test_labels_come_with_them(tmp_path):
    write(tmp_path, 0, 4, arr_1=np.arange(4))
    write(tmp_path, 4, 10, arr_1=np.arange(4, 10))
    source = GrowingImages(str(tmp_path), 10, flag="SAMPLE")
    assert source.has_labels
    np.testing.assert_array_equal(source.labels(2, 7), np.arange(2, 7))


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"arr_0": IMAGES[4:9]}, r"the shape \[5, 4, 5, 3\], not \[6, 4, 5, 3\]"),
        ({"arr_0": IMAGES[4:, :3]}, r"the shape \[6, 3, 5, 3\], not \[6, 4, 5, 3\]"),
        ({"arr_0": IMAGES[4:] / 255}, "float64"),
        ({"arr_0": IMAGES[4:], "arr_1": np.arange(6)}, "its labels"),
    ],
)
def test_every_part_is_what_the_first_says(tmp_path, arrays, words):
    write(tmp_path, 0, 4)
    np.savez(part_path(str(tmp_path), (4, 10)), **arrays)
    source = GrowingImages(str(tmp_path), 10, flag="SAMPLE")
    with pytest.raises(UserError, match=f"^SAMPLE: arr_0 of .*0000004-0000010.npz.*{words}"):
        source.read(2, 7)


def test_what_never_grows_is_refused(tmp_path):
    with pytest.raises(UserError, match="SAMPLE: there is no folder .*nowhere"):
        GrowingImages(str(tmp_path / "nowhere"), 9, flag="SAMPLE")
    (tmp_path / "settings.json").touch()
    with pytest.raises(UserError, match=r"SAMPLE: the folder .* has no chunks START-STOP.npz"):
        GrowingImages(str(tmp_path), 9, flag="SAMPLE")


def test_what_is_no_part_of_images(tmp_path):
    assert find_parts(str(tmp_path / "nowhere")) == []
    (tmp_path / "3-4.npz").touch()
    assert find_parts(str(tmp_path)) == []
    np.savez(part_path(str(tmp_path), (0, 2)), arr_0=np.zeros((2, 4, 4, 3)))
    with pytest.raises(UserError, match=r"SAMPLE: arr_0 of .*0000000-0000002.npz is float64"):
        GrowingImages(str(tmp_path), 2, flag="SAMPLE")

import os
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from esddpm_io.errors import UserError
from esddpm_io.images import decode_image, image_grid, open_images, save_png
from tests.waiting import wait_until


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (12, 6, 4, 3), dtype=np.uint8)


def test_npz_npy_and_folder_hold_the_same(tmp_path, images):
    labels = np.arange(12) % 5
    np.savez(tmp_path / "a.npz", images, labels)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=images, arr_1=labels.astype(np.uint8))
    np.save(tmp_path / "a.npy", images)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        save_png(tmp_path / "folder" / f"{index}_label_{label}.png", image)
    for name in ("a.npz", "packed.npz", "a.npy", "folder"):
        source = open_images(tmp_path / name, flag="--d")
        assert len(source) == 12 and source.shape == images.shape
        np.testing.assert_array_equal(source.read(3, 11), images[3:11])
        if name == "a.npy":
            assert source.labels(0, 12) is None
        else:
            assert source.labels(0, 12).dtype == np.int64
            np.testing.assert_array_equal(source.labels(9, 12), labels[9:12])


def test_fingerprint_follows_the_contents(tmp_path, images):
    for kind in ("npz", "npy"):
        save = np.savez if kind == "npz" else np.save
        other = images.copy()
        other[-1] += 1
        save(tmp_path / f"a.{kind}", images)
        save(tmp_path / f"same.{kind}", images)
        save(tmp_path / f"other.{kind}", other)
        a, same, other = (
            open_images(tmp_path / f"{n}.{kind}", flag="").fingerprint()
            for n in ("a", "same", "other")
        )
        assert a == same != other


def test_fingerprint_of_a_folder_follows_names_and_contents(tmp_path, images):
    """Not sizes (bmp files have but one) and not times, which a copy elsewhere does not keep."""
    for index in range(3):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.fromarray(images[index]).save(tmp_path / "a" / f"{index}.bmp")

    def fingerprint(name: str) -> str:
        return open_images(tmp_path / name, flag="").fingerprint()

    first = fingerprint("a")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    os.utime(tmp_path / "copy" / "1.bmp", (0, 0))
    assert fingerprint("copy") == first
    Image.fromarray(images[5]).save(tmp_path / "copy" / "1.bmp")
    assert fingerprint("copy") != first
    (tmp_path / "a" / "2.bmp").rename(tmp_path / "a" / "3.bmp")
    assert fingerprint("a") != first


@pytest.mark.parametrize("name", ["a.npy", "folder"])
def test_stamp_changes_with_the_files_even_if_times_are_set_back(tmp_path, images, name):
    if name == "folder":
        file = tmp_path / name / "0.png"
        save_png(file, images[0])
    else:
        file = tmp_path / name
        np.save(file, images)
    before = open_images(tmp_path / name, flag="").stamp()
    assert open_images(tmp_path / name, flag="").stamp() == before
    status = file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    wait_until(lambda: time.time_ns() > status.st_ctime_ns + 50_000_000)  # clocks of disks are slow
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert open_images(tmp_path / name, flag="").stamp() != before


def test_folder_order_colours_and_labels(tmp_path):
    Image.new("L", (3, 3), 10).save(tmp_path / "img10.png")
    Image.new("RGBA", (3, 3), (1, 2, 3, 0)).save(tmp_path / "img9.png")
    Image.new("RGB", (3, 3), (7, 8, 9)).save(tmp_path / "img11.JPG")
    (tmp_path / "notes.txt").write_text("not an image")
    source = open_images(f"{tmp_path}/", flag="--d")
    assert source.read(0, 2)[:, 0, 0].tolist() == [[1, 2, 3], [10, 10, 10]]
    assert len(source) == 3 and source.labels(0, 3) is None


def test_numbers_in_names_count_as_numbers_and_come_before_letters(tmp_path):
    names = ["2.png", "10.png", "a2.png", "a10.png", "b1.png"]
    for index, name in enumerate(names):
        Image.new("L", (1, 1), index).save(tmp_path / name)
    source = open_images(tmp_path, flag="--d")
    assert source.read(0, 5)[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]


def test_classes_are_subfolders_in_the_order_of_their_names(tmp_path):
    names = ["n02/9.png", "n02/10.png", "n10/deep/3.jpg", "n1/1.png", ".cache/x/1.png"]
    for index, name in enumerate(names):
        save_png(tmp_path / name, np.full((1, 1, 3), index, np.uint8))
    source = open_images(tmp_path, flag="--d")
    assert source.read(0, 4)[:, 0, 0, 0].tolist() == [3, 0, 1, 2]
    assert source.labels(0, 4).tolist() == [1, 0, 0, 2] and source.labels(0, 4).dtype == np.int64
    assert source.class_names == ("n02", "n1", "n10")
    source.check()
    first = source.fingerprint()
    (tmp_path / "n02").rename(tmp_path / "n3")
    assert open_images(tmp_path, flag="--d").fingerprint() != first


def test_links_to_folders_are_followed_unless_they_lead_back(tmp_path):
    for name in ("set/cats/1.png", "set/dogs/1.png", "elsewhere/1.png", "elsewhere/deep/2.png"):
        save_png(tmp_path / name, np.zeros((1, 1, 3), np.uint8))
    for name in ("set/birds", "set/eagles"):  # of the same folder, which is no loop
        (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / ".hidden").symlink_to(tmp_path / "set")
    assert open_images(tmp_path / "set", flag="--d").labels(0, 6).tolist() == [0, 0, 1, 2, 3, 3]
    back = tmp_path / "elsewhere" / "deep" / "back"
    for target in (tmp_path / "set", tmp_path / "elsewhere"):
        back.symlink_to(target)
        with pytest.raises(UserError, match=r"^--d: \S+ is a link to a folder that it lies in"):
            open_images(tmp_path / "set", flag="--d")
        back.unlink()


def test_labels_in_names_win_over_subfolders_and_images_beside_them_are_refused(tmp_path):
    for name in ("a/0_label_7.png", "b/1_label_3.png"):
        save_png(tmp_path / name, np.zeros((1, 1, 3), np.uint8))
    source = open_images(tmp_path, flag="--d")
    assert source.labels(0, 2).tolist() == [7, 3] and source.class_names is None
    save_png(tmp_path / "2.png", np.zeros((1, 1, 3), np.uint8))
    beside = r"^--d: .* has images itself \(2\.png\) and in subfolders \((a/0|b/1)_label"
    with pytest.raises(UserError, match=beside):
        open_images(tmp_path, flag="--d")


SIXTEEN_BITS = np.array([[0, 128, 129], [257, 32768, 65535]], np.uint16)
EIGHT_BITS = [[0, 0, 1], [1, 128, 255]]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_of_grey_become_eight(suffix, tmp_path):
    """Pillow alone clips them: all but the darkest becomes white."""
    Image.fromarray(SIXTEEN_BITS).save(tmp_path / f"a.{suffix}")
    (image,) = open_images(tmp_path, flag="--d").read(0, 1)
    assert image.dtype == np.uint8 and image.shape == (2, 3, 3)
    assert all(image[..., channel].tolist() == EIGHT_BITS for channel in range(3))


def test_values_without_a_known_range_are_refused(tmp_path):
    Image.fromarray(np.full((2, 2), 0.5, np.float32)).save(tmp_path / "a.tif")
    Image.fromarray(np.full((2, 2), 70000, np.int32)).save(tmp_path / "b.tif")
    for name in "ab":
        with pytest.raises(UserError, match="no known range"):
            decode_image(tmp_path / f"{name}.tif")


def test_bad_images_name_flag_and_file(tmp_path, images):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"--d: the folder .*empty has no images"):
        open_images(tmp_path / "empty", flag="--d")
    save_png(tmp_path / "mixed" / "1.png", images[0])
    save_png(tmp_path / "mixed" / "2.png", images[0][:2])
    (tmp_path / "mixed" / "3.png").write_bytes(b"\x89PNG nothing")
    mixed = open_images(tmp_path / "mixed", flag="--d")
    with pytest.raises(UserError, match=r"--d: .*2\.png is 4x2, the first image of the folder 4x6"):
        mixed.read(0, 2)
    with pytest.raises(UserError, match=r"--d: cannot read the image .*3\.png"):
        mixed.read(2, 3)
    with pytest.raises(UserError, match="--d: there is no file or folder"):
        open_images(tmp_path / "none", flag="--d")
    np.savez(tmp_path / "float.npz", images / 255.0)
    with pytest.raises(UserError, match=r"--d: arr_0 of .* is float64\[12, 6, 4, 3\], it must be"):
        open_images(tmp_path / "float.npz", flag="--d")
    np.savez(tmp_path / "named.npz", images=images)
    with pytest.raises(UserError, match=r"--d: .* has no arr_0 \(it has images\)"):
        open_images(tmp_path / "named.npz", flag="--d")
    np.savez(tmp_path / "labels.npz", images, np.zeros(11, int))
    with pytest.raises(UserError, match=r"--d: the labels arr_1 .* one for each of the 12 images"):
        open_images(tmp_path / "labels.npz", flag="--d")


def test_grid_places_images_row_by_row(images):
    grid = image_grid(images[:5], columns=3)
    assert grid.shape == (2 * 8 + 2, 3 * 6 + 2, 3)
    np.testing.assert_array_equal(grid[10:16, 8:12], images[4])
    assert (grid[10:16, 14:18] == 255).all()

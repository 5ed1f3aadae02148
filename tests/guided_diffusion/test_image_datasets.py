import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from esddpm_io.errors import UserError
from guided_diffusion import image_datasets, logger
from guided_diffusion.image_datasets import (
    ImageDataset,
    center_crop_arr,
    label_files,
    list_image_files,
    load_data,
    random_crop_arr,
)
from tests.golden_values import arrays


def write_images(folder, names, size=(12, 10)):
    """One PNG a name; the red channel holds its number."""
    for number, name in enumerate(names):
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((size[1], size[0], 3), 100, np.uint8)
        pixels[..., 0] = number
        Image.fromarray(pixels).save(path)
    return str(folder)


def numbers(batch):
    """What `write_images` or `write_npz` put into the red channel."""
    return ((batch[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def write_npz(path, n=10, size=8, **more):
    pixels = np.zeros((n, size, size, 3), np.uint8)
    pixels[..., 0] = np.arange(n)[:, None, None]
    np.savez(path, arr_0=pixels, **more)
    return str(path)


@pytest.mark.parametrize("case", sorted({key.split("/")[0] for key in arrays("crops")}))
def test_crops_match_the_reference(case):
    golden = arrays("crops")
    image, size = Image.fromarray(golden[f"{case}/src"]), int(golden[f"{case}/size"])
    np.testing.assert_array_equal(center_crop_arr(image, size), golden[f"{case}/center"])
    random.seed(int(case))
    np.testing.assert_array_equal(random_crop_arr(image, size), golden[f"{case}/random_seed{case}"])
    rng = random.Random(int(case))
    np.testing.assert_array_equal(
        random_crop_arr(image, size, rng=rng), golden[f"{case}/random_seed{case}"]
    )


def test_folder_of_any_depth_with_labels_from_names(tmp_path):
    folder = write_images(tmp_path, ["b_1.png", "deep/er/a_2.jpg", "c_0.PNG", ".hidden_1.png"])
    (tmp_path / "notes.txt").write_text("no image")
    data = load_data(
        data_dir=folder,
        batch_size=3,
        image_size=8,
        class_cond=True,
        deterministic=True,
        random_flip=False,
        num_workers=0,
    )
    batch, cond = next(data)
    assert batch.shape == (3, 3, 8, 8) and batch.dtype == torch.float32
    assert batch.min() >= -1 and batch.max() <= 1
    # Sorted by path: b_1, c_0, deep/er/a_2; classes numbered a, b, c.
    assert cond["y"].tolist() == [1, 2, 0] and cond["y"].dtype == torch.int64
    assert numbers(batch)[:2] == [0, 2]


def test_labels_from_folders(tmp_path):
    folder = write_images(tmp_path, ["dogs/2_x.png", "cats/1_x.png", "deep/cats/3.png"])
    paths = list_image_files(folder)
    assert label_files(paths, "folder", folder) == [0, 0, 1]
    write_images(tmp_path, ["loose.png"])
    with pytest.raises(UserError, match=r"--label_from folder: .*loose\.png"):
        label_files(list_image_files(folder), "folder", folder)


def test_npz_is_shuffled_anew_each_round_and_repeats_with_its_seed(tmp_path):
    path = write_npz(tmp_path / "a.npz", arr_1=np.arange(10) % 3)

    def stream(seed):
        return load_data(data_dir=path, batch_size=4, image_size=8, class_cond=True, seed=seed)

    data = stream(1)
    seen = [next(data) for _ in range(5)]  # two rounds of 10 in batches of 4
    order = [number for batch, _ in seen for number in numbers(batch)]
    labels = [label for _, cond in seen for label in cond["y"].tolist()]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]
    assert labels == [number % 3 for number in order]
    again = stream(1)
    again.seek(3)
    assert torch.equal(next(again)[0], seen[3][0])
    assert numbers(next(stream(2))[0]) != order[:4]


def test_flips_mirror_some_images(tmp_path):
    pixels = np.zeros((64, 4, 4, 3), np.uint8)
    pixels[:, :, 0] = 255
    np.savez(tmp_path / "a.npz", arr_0=pixels)
    batch, _ = next(load_data(data_dir=tmp_path / "a.npz", batch_size=64, image_size=4, seed=0))
    left = batch[:, 0, 0, 0] == 1
    assert torch.equal(batch[:, 0, 0, 3] == 1, ~left) and 16 < left.sum() < 48


def test_two_processes_share_the_batch_of_one(tmp_path, monkeypatch):
    path = write_npz(tmp_path / "a.npz")
    options = {"data_dir": path, "image_size": 8, "seed": 5}
    whole = [next(data)[0] for data in [load_data(batch_size=6, **options)] for _ in range(3)]
    monkeypatch.setattr(image_datasets.dist_util, "world_size", lambda: 2)
    halves = []
    for rank in range(2):
        monkeypatch.setattr(image_datasets.dist_util, "rank", lambda rank=rank: rank)
        data = load_data(batch_size=3, **options)
        halves.append([next(data)[0] for _ in range(3)])
    for step in range(3):
        assert torch.equal(torch.cat([halves[0][step], halves[1][step]]), whole[step])


def test_worker_processes_give_what_one_process_gives(tmp_path):
    folder = write_images(tmp_path, [f"{i}.png" for i in range(7)], size=(30, 25))

    def batches(workers):
        data = load_data(
            data_dir=folder,
            batch_size=4,
            image_size=8,
            random_crop=True,
            num_workers=workers,
            seed=3,
        )
        data.seek(2)
        return torch.stack([next(data)[0] for _ in range(4)])

    assert torch.equal(batches(0), batches(2))


def test_worker_processes_leave_torchs_global_generator_alone(tmp_path):
    folder = write_images(tmp_path, ["0.png", "1.png"])
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(load_data(data_dir=folder, batch_size=2, image_size=8, num_workers=1, seed=0))
    assert torch.equal(torch.get_rng_state(), before)


def test_unreadable_images_are_named_skipped_and_counted(tmp_path):
    folder = write_images(tmp_path, [f"{i}.png" for i in range(5)])
    broken = tmp_path / "2.png"
    noise = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(noise).save(broken)
    broken.write_bytes(broken.read_bytes()[:600])
    (tmp_path / "4.png").write_text("not an image")
    data = load_data(data_dir=folder, batch_size=5, image_size=8, deterministic=True, seed=0)
    with logger.scoped_configure(str(tmp_path / "log"), ["log"]):
        for _ in range(2):
            batch, _ = next(data)
            # The next image that can be read takes the place.
            assert numbers(batch) == [0, 1, 3, 3, 0]
    assert data.figures() == {"unreadable_images": 2}
    out = (tmp_path / "log/log.txt").read_text()
    assert out.count("2.png") == 1 and out.count("4.png: not an image") == 1


def test_sixteen_bits_of_grey_are_trained_on_as_eight(tmp_path):
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    Image.fromarray(values).save(tmp_path / "a.png")
    data = load_data(data_dir=str(tmp_path), batch_size=1, image_size=8, random_flip=False)
    batch, _ = next(data)
    want = torch.from_numpy(values / 65535 * 2 - 1).float()
    torch.testing.assert_close(batch[0], want.expand(3, 8, 8), rtol=0, atol=1.001 / 255)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_in_which_nothing_can_be_read_is_an_error(workers, tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_text("text")
    data = load_data(
        data_dir=str(tmp_path), batch_size=2, image_size=8, num_workers=workers, seed=0
    )
    line = r"--data_dir: cannot read 2 images in a row, \S*\.png first \(not an image\)"
    with pytest.raises(UserError, match=f"^{line}$"):
        next(data)


def test_arrays_too_large_for_memory_are_read_in_place(tmp_path, monkeypatch):
    path = write_npz(tmp_path / "a.npz")
    options = {"data_dir": path, "batch_size": 4, "image_size": 8, "seed": 0}
    held = next(load_data(**options))[0]
    monkeypatch.setattr(image_datasets, "_IN_MEMORY_BYTES", 0)
    data = load_data(**options)
    assert not isinstance(data.images._pixels, np.ndarray)
    assert torch.equal(next(data)[0], held)


def test_published_dataset_class(tmp_path):
    folder = write_images(tmp_path, [f"{i}.png" for i in range(4)])
    paths = list_image_files(folder)
    dataset = ImageDataset(8, paths, classes=[5, 6, 7, 8], shard=1, num_shards=2, random_flip=False)
    pixels, cond = dataset[1]
    assert len(dataset) == 2 and cond == {"y": 8}
    assert pixels.shape == (3, 8, 8) and pixels.dtype == np.float32


def test_grey_palette_and_transparent_images_become_rgb(tmp_path):
    for mode in ("L", "P", "RGBA", "1"):
        Image.new(mode, (9, 9)).save(tmp_path / f"{mode}.png")
    data = load_data(data_dir=str(tmp_path), batch_size=4, image_size=8, num_workers=0, seed=0)
    assert next(data)[0].shape == (4, 3, 8, 8)


BAD = {
    "": "--data_dir: give a folder",
    "missing": "--data_dir: .*missing is neither a folder nor an .npz",
    "empty": "--data_dir: .*empty has no images",
    "missing.npz": "--data_dir: there is no file .*missing.npz",
    "size.npz": r"--data_dir: arr_0 of .*size.npz is uint8\[10, 4, 4, 3\].*\[N, 8, 8, 3\]",
    "float.npz": "--data_dir: arr_0 of .*float.npz is float64",
    "other.npz": "--data_dir: .*other.npz has no arr_0",
    "unlabelled.npz": "--data_dir: .*unlabelled.npz has no arr_1",
    "labels.npz": "--data_dir: .*labels.npz has labels 0 … 9, the model knows 0 … 4",
    "few.npz": r"--data_dir: arr_1 of .*few.npz is int64\[3\]",
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_are_one_clear_line(tmp_path, name):
    (tmp_path / "empty").mkdir()
    write_npz(tmp_path / "size.npz", size=4)
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((2, 8, 8, 3)))
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    write_npz(tmp_path / "unlabelled.npz")
    write_npz(tmp_path / "labels.npz", arr_1=np.arange(10))
    write_npz(tmp_path / "few.npz", arr_1=np.zeros(3, np.int64))
    path = str(tmp_path / name) if name else ""
    with pytest.raises(UserError, match=BAD[name]):
        load_data(data_dir=path, batch_size=2, image_size=8, class_cond=True, num_classes=5)


def test_unknown_label_source_is_named(tmp_path):
    with pytest.raises(UserError, match="--label_from must be name or folder, not size"):
        load_data(data_dir=str(tmp_path), batch_size=1, image_size=8, label_from="size")

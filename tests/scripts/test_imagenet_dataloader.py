import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from esddpm_io.errors import UserError
from guided_diffusion.commands import (
    imagefolder_to_npz,
    imagenet_dataset,
    npz_to_imagefolder,
    process_labels,
)

RNG = np.random.default_rng(0)
WNIDS = [f"n{number:08d}" for number in RNG.permutation(90_000_000)[:1000]]
RANK = {wnid: index for index, wnid in enumerate(sorted(WNIDS))}


def val_name(number):
    return f"ILSVRC2012_val_{number:08d}.JPEG"


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    source, blocked = tmp_path / "batch.npz", tmp_path / "afile"
    np.savez(source, np.zeros((2, 4, 4, 3), np.uint8))
    blocked.touch()
    with pytest.raises(UserError, match="^--output: .*afile cannot be written: .*not a folder"):
        npz_to_imagefolder.main(["--dataset", str(source), "--output", str(blocked)])
    npz_to_imagefolder.main(["--dataset", str(source)])
    argv = ["--folder", str(tmp_path / "batch"), "--output", str(blocked / "x.npz")]
    with pytest.raises(UserError, match="^--output: .*x.npz cannot be written: .*not a folder"):
        imagefolder_to_npz.main(argv)


@pytest.mark.parametrize("labelled", [True, False])
def test_npz_to_folder_and_back(tmp_path, labelled):
    images = RNG.integers(0, 256, (12, 6, 5, 3), dtype=np.uint8)
    arrays = {"arr_0": images} | ({"arr_1": np.arange(12) * 80} if labelled else {})
    source = tmp_path / "batch.npz"
    np.savez(source, **arrays)
    npz_to_imagefolder.main(["--dataset", str(source)])
    names = {path.name for path in (tmp_path / "batch").iterdir()}
    assert len(names) == 12
    assert ("11_label_880.png" if labelled else "11.png") in names

    back = tmp_path / "back.npz"
    imagefolder_to_npz.main(["--folder", str(tmp_path / "batch"), "--output", str(back)])
    again = np.load(back)
    assert sorted(again.files) == sorted(arrays)
    for name in again.files:
        np.testing.assert_array_equal(again[name], arrays[name])


def test_unpacking_goes_on_where_it_stopped(tmp_path):
    source = tmp_path / "batch.npz"
    np.savez(source, arr_0=np.zeros((3, 4, 4, 3), np.uint8))
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "1.png").write_bytes(b"kept")
    npz_to_imagefolder.main(["--dataset", str(source), "--output", str(folder)])
    assert sorted(path.name for path in folder.iterdir()) == ["0.png", "1.png", "2.png"]
    assert (folder / "1.png").read_bytes() == b"kept"


def test_a_preset_stands_for_its_generator_images(tmp_path):
    np.savez(tmp_path / "vae.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    preset = tmp_path / "mine.toml"
    preset.write_text('checkpoint = "m.pt"\ngenerator_images = "vae.npz"\n')
    npz_to_imagefolder.main(["--dataset", str(preset)])
    assert len(list((tmp_path / "vae").iterdir())) == 2
    preset.write_text('checkpoint = "m.pt"\n')
    with pytest.raises(UserError, match="names no generator_images"):
        npz_to_imagefolder.main(["--dataset", str(preset)])


def test_folder_errors(tmp_path):
    with pytest.raises(UserError, match="--folder: there is no folder"):
        imagefolder_to_npz.main(["--folder", str(tmp_path / "none")])
    with pytest.raises(UserError, match="--folder: .* has no images"):
        imagefolder_to_npz.main(["--folder", str(tmp_path)])
    with pytest.raises(UserError, match=r"--output must end in \.npz"):
        imagefolder_to_npz.main(["--folder", str(tmp_path), "--output", "x.npy"])
    (tmp_path / "0.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"cannot read the image .*0\.png"):
        imagefolder_to_npz.main(["--folder", str(tmp_path)])


@pytest.fixture
def development_kit(tmp_path):
    """valprep.sh, and the ground truth with meta.mat, for the same 2,000 images."""
    of_image = [*WNIDS, *reversed(WNIDS)]
    moves = [f"mv {val_name(i)} {wnid}/" for i, wnid in enumerate(of_image, start=1)]
    folders = [f"mkdir -p {wnid}" for wnid in WNIDS]
    (tmp_path / "valprep.sh").write_text("\n".join(["#!/bin/bash", *folders, *moves]) + "\n")
    numbers = {wnid: number for number, wnid in enumerate(WNIDS, start=1)}
    truth = "".join(f"{numbers[wnid]}\n" for wnid in of_image)
    (tmp_path / "truth.txt").write_text(truth)
    dtype = [("ILSVRC2012_ID", "f8"), ("WNID", object), ("words", object)]
    rows = [(float(numbers[wnid]), wnid, "some words") for wnid in WNIDS]
    rows.append((1001.0, "n00000001", "an inner node"))
    savemat(tmp_path / "meta.mat", {"synsets": np.array(rows, dtype)[:, None]})
    return tmp_path, [RANK[wnid] for wnid in of_image]


def test_both_sources_give_the_same_labels(development_kit):
    folder, expected = development_kit
    process_labels.main(
        ["--valprep", str(folder / "valprep.sh"), "--output", str(folder / "a.txt")]
    )
    truth = ["--ground_truth", str(folder / "truth.txt"), "--meta", str(folder / "meta.mat")]
    process_labels.main([*truth, "--output", str(folder / "b.txt")])
    table = imagenet_dataset.read_labels(str(folder / "a.txt"))
    assert table == {val_name(i): label for i, label in enumerate(expected, start=1)}
    assert (folder / "a.txt").read_text() == (folder / "b.txt").read_text()


def test_label_errors(development_kit):
    folder, _ = development_kit
    truth = ["--ground_truth", str(folder / "truth.txt")]
    with pytest.raises(UserError, match="--meta: give"):
        process_labels.main(truth)
    with pytest.raises(UserError, match=r"--meta: .*truth\.txt is not the development kit's"):
        process_labels.main([*truth, "--meta", str(folder / "truth.txt")])
    with pytest.raises(UserError, match="--meta: there is no file"):
        process_labels.main([*truth, "--meta", str(folder / "none.mat")])
    with pytest.raises(UserError, match=r"^--meta: cannot read .*: Is a directory$"):
        process_labels.main([*truth, "--meta", str(folder)])
    whole = (folder / "meta.mat").read_bytes()
    for size in (0, 100, 200, len(whole) // 2, len(whole) - 20):
        (folder / "cut.mat").write_bytes(whole[:size])
        with pytest.raises(
            UserError, match=r"^--meta: .*cut\.mat is not .*, or not all of it: .+$"
        ):
            process_labels.main([*truth, "--meta", str(folder / "cut.mat")])
    with (folder / "truth.txt").open("a") as lines:
        lines.write("1001\n")
    with pytest.raises(UserError, match=r"line 2001 of .* is '1001', not an id 1 … 1000"):
        process_labels.main([*truth, "--meta", str(folder / "meta.mat")])
    (folder / "short.sh").write_text(f"mv {val_name(1)} n00000001/\n")
    with pytest.raises(UserError, match="--valprep: .* into 1 classes, not 1000"):
        process_labels.main(["--valprep", str(folder / "short.sh")])
    with pytest.raises(UserError, match="--valprep: there is no file"):
        process_labels.main(["--valprep", str(folder / "none.sh")])


@pytest.fixture
def validation(tmp_path):
    """Three validation images, two of them in folders of their class, and their table."""
    folder = tmp_path / "val"
    sizes = {2: (40, 30), 1: (30, 60), 3: (33, 33)}
    for number, (width, height) in sizes.items():
        path = folder / ("n1" if number < 3 else "") / val_name(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = "L" if number == 3 else "RGB"
        Image.new(mode, (width, height), number * 50).save(path)
    table = tmp_path / "labels.txt"
    table.write_text("".join(f"{val_name(i)} {i * 100}\n" for i in range(1, 5)))
    return folder, table


def test_validation_images_become_an_npz(validation, tmp_path):
    folder, table = validation
    output = tmp_path / "val.npz"
    argv = ["--folder", str(folder), "--labels", str(table), "--image_size", "16"]
    imagenet_dataset.main([*argv, "--output", str(output)])
    with np.load(output) as packed:
        assert packed["arr_0"].shape == (3, 16, 16, 3)
        assert packed["arr_1"].tolist() == [100, 200, 300]
        # Grey 150 stays grey; pixels of a plain image survive the crop, JPEG aside.
        assert np.abs(packed["arr_0"][2].astype(int) - 150).max() <= 2


def test_validation_errors(validation, tmp_path):
    folder, table = validation

    def build():
        return imagenet_dataset.ImageNetValidation(str(folder), str(table), 8)

    assert len(build()) == 3
    (folder / val_name(9)).write_bytes(b"x")
    with pytest.raises(UserError, match=r"--labels: .* has no class for ILSVRC2012_val_00000009"):
        build()
    with table.open("a") as lines:
        lines.write(f"{val_name(9)} 7\n")
    with pytest.raises(UserError, match=r"cannot read the image .*00000009"):
        build()[3]
    (folder / val_name(9)).unlink()
    table.write_text("nothing\n")
    with pytest.raises(UserError, match="--labels: line 1 of .* is not `NAME CLASS`"):
        build()
    table.write_text("")
    with pytest.raises(UserError, match=r"--folder: there are no \.JPEG files"):
        imagenet_dataset.ImageNetValidation(str(tmp_path / "none"), str(table), 8)
    with pytest.raises(UserError, match="--image_size must be at least 1"):
        imagenet_dataset.main(["--folder", str(folder), "--image_size", "0"])

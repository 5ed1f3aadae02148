"""emoji32 from a package: composition, labels, order, and errors, on packages of a few drawings."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.emoji32 import CATEGORIES, build, main, open_package, reduce_on_white
from esddpm_io.errors import UserError


def png(rgba: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(rgba, "RGBA").save(stream, format="PNG")
    return stream.getvalue()


def plain(colour: tuple[int, int, int, int]) -> np.ndarray:
    return np.tile(np.array(colour, np.uint8), (64, 64, 1))


def drawing(name: str, category: str, **more) -> dict:
    return {"image": name, "category": category, "has_img_google": True, **more}


def write_package(root: Path, version: str = "16.0.0") -> Path:
    tone = {"image": "b-tone.png", "has_img_google": True}
    absent = {"image": "b-absent.png", "has_img_google": False}
    emoji = [
        drawing("c.png", "Flags"),
        drawing("b.png", "People & Body", skin_variations={"1F3FB": tone, "1F3FC": absent}),
        drawing("a.png", "Symbols"),
    ]
    folder = root / "package" / "img" / "google" / "64"
    folder.mkdir(parents=True)
    (root / "package" / "package.json").write_text(json.dumps({"version": version}))
    (root / "package" / "emoji.json").write_text(json.dumps(emoji))
    for value, name in enumerate(("a.png", "b.png", "b-tone.png", "c.png")):
        (folder / name).write_bytes(png(plain((10 * value, 0, 0, 255))))
    return root


def test_colours_are_weighed_by_coverage():
    rgba = plain((0, 0, 0, 0))  # black, but not there: must not darken anything
    rgba[0, 0] = (200, 100, 0, 255)
    rgba[0, 1] = (200, 100, 0, 128)
    image = reduce_on_white(png(rgba))
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    covered = (1 + 128 / 255) / 4
    expected = np.rint(255 + covered * (np.array([200, 100, 0]) - 255))
    np.testing.assert_array_equal(image[0, 0], expected)
    assert (image.reshape(-1, 3)[1:] == 255).all()


def test_palettes_and_grey_are_read():
    grey = Image.fromarray(np.full((64, 64), 40, np.uint8), "L")
    for image in (grey, grey.convert("P"), grey.convert("LA")):
        stream = io.BytesIO()
        image.save(stream, format="PNG")
        assert (reduce_on_white(stream.getvalue()) == 40).all()


def test_all_drawings_sorted_by_name_with_their_variants(tmp_path):
    images, labels = build(open_package(write_package(tmp_path)), "it")
    assert images[:, 0, 0, 0].tolist() == [0, 20, 10, 30]  # a, b-tone, b, c
    names = [CATEGORIES[label] for label in labels]
    assert names == ["Symbols", "People & Body", "People & Body", "Flags"]


def test_tarball_and_folder_give_the_same_file(tmp_path):
    write_package(tmp_path)
    with tarfile.open(tmp_path / "it.tgz", "w:gz") as tar:
        tar.add(tmp_path / "package", "package")
    outputs = []
    for number, package in enumerate((tmp_path / "it.tgz", tmp_path, tmp_path / "package")):
        out = tmp_path / f"{number}.npz"
        main(["--package", str(package), "--out", str(out)])
        outputs.append(out.read_bytes())
    assert outputs[0] == outputs[1] == outputs[2]
    with np.load(tmp_path / "0.npz") as data:
        assert data["arr_0"].shape == (4, 32, 32, 3)
        assert data["arr_1"].dtype == np.int64


def test_what_is_no_such_package_is_named(tmp_path):
    old = write_package(tmp_path / "old", version="15.1.2")
    with pytest.raises(UserError, match="version 15.1.2, but 16.0.0 is needed"):
        main(["--package", str(old)])
    with pytest.raises(UserError, match="--package .*no such file"):
        main(["--package", str(tmp_path / "missing")])
    with pytest.raises(UserError, match=r"package.json.* missing"):
        main(["--package", str(tmp_path)])
    (tmp_path / "cut.tgz").write_bytes(b"\x1f\x8b\x08\x00cut short")
    with pytest.raises(UserError, match="not a readable tarball"):
        main(["--package", str(tmp_path / "cut.tgz")])
    assert not list(tmp_path.glob("*.npz"))


def test_without_npm_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"npm was not found.*--package"):
        main(["--out", str(tmp_path / "out.npz")])

import io

import numpy as np
import pytest
from PIL import Image

from datasets import lsun_bedroom
from esddpm_io.errors import UserError
from guided_diffusion.image_datasets import center_crop_arr, load_data

lmdb = pytest.importorskip("lmdb")


@pytest.fixture
def database(tmp_path):
    """Three images and one that is none, as LSUN stores them: hash keys, encoded files."""
    path = tmp_path / "bedroom_lmdb"
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (20, 30 + i, 3), dtype=np.uint8) for i in range(3)]
    with lmdb.open(str(path)) as env, env.begin(write=True) as transaction:
        for index, pixels in enumerate(images):
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, format="PNG")
            transaction.put(f"{index}abc".encode(), file.getvalue())
        transaction.put(b"0broken", b"no image")
    return str(path), images


def test_images_are_cropped_named_and_broken_ones_told(database, tmp_path, capsys):
    path, images = database
    out = tmp_path / "out"
    lsun_bedroom.main([path, str(out), "--image_size", "8", "--threads", "2"])
    printed = capsys.readouterr().out
    assert "skipping 0broken" in printed and f"3 images in {out}, 1 skipped" in printed
    names = sorted(p.name for p in out.iterdir())
    assert names == ["bedroom_0000000.png", "bedroom_0000002.png", "bedroom_0000003.png"]
    for name, pixels in zip(names, images, strict=True):
        want = center_crop_arr(Image.fromarray(pixels), 8)
        np.testing.assert_array_equal(np.asarray(Image.open(out / name)), want)
    batch, cond = next(
        load_data(data_dir=str(out), batch_size=3, image_size=8, class_cond=True, num_workers=0)
    )
    assert batch.shape == (3, 3, 8, 8) and cond["y"].tolist() == [0, 0, 0]


def test_a_second_run_goes_on(database, tmp_path):
    path, _ = database
    out = tmp_path / "out"
    lsun_bedroom.main([path, str(out), "--image_size", "8", "--limit", "1"])
    first = out / "bedroom_0000000.png"
    before = first.stat().st_mtime_ns
    lsun_bedroom.main([path, str(out), "--image_size", "8"])
    assert first.stat().st_mtime_ns == before and len(list(out.iterdir())) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing", "out"], "lmdb_path: there is no folder missing"),
        ([".", "out"], r"lmdb_path: \. is not an LMDB"),
        ([".", "out", "--image_size", "0"], "--image_size is 0"),
        ([".", "out", "--prefix", "bed_room"], "--prefix"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        lsun_bedroom.main(arguments)

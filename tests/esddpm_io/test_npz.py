import io
import zipfile

import numpy as np
import pytest

from esddpm_io.errors import UserError
from esddpm_io.npz import DamagedFile, NpyReader, NpzReader, NpzWriter


def sample_arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "arr_0": rng.integers(0, 256, (11, 4, 5, 3), dtype=np.uint8),
        "arr_1": rng.integers(0, 9, 11),
        "mu": rng.standard_normal(7),
        "columns": np.asfortranarray(rng.standard_normal((6, 3))),
        "scalar": np.float64(2.5),
    }


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_reads_what_numpy_wrote_by_rows_and_whole(tmp_path, save):
    arrays = sample_arrays()
    save(tmp_path / "a.npz", **arrays)
    with NpzReader(tmp_path / "a.npz") as reader:
        assert reader.names == list(arrays)
        for name, array in arrays.items():
            assert reader.shape(name) == array.shape and reader.dtype(name) == array.dtype
            np.testing.assert_array_equal(reader.array(name), array)
        # Two members in turn, forward, backward and over again.
        for start, stop in [(2, 5), (5, 5), (5, 11), (0, 3), (0, 3)]:
            for name in ("arr_0", "arr_1"):
                np.testing.assert_array_equal(
                    reader.rows(name, start, stop), arrays[name][start:stop]
                )
        np.testing.assert_array_equal(reader.rows("columns", 1, 4), arrays["columns"][1:4])
        with pytest.raises(ValueError, match="outside arr_1"):
            reader.rows("arr_1", 5, 12)


def test_writer_appends_in_any_alternation_and_numpy_reads_it(tmp_path):
    arrays = {k: v for k, v in sample_arrays().items() if k in ("arr_0", "arr_1")}
    path = tmp_path / "new" / "out.npz"
    with NpzWriter(path, {k: (v.shape, v.dtype) for k, v in arrays.items()}) as writer:
        for start in range(0, 11, 4):
            writer.append("arr_1", arrays["arr_1"][start : start + 4])
            writer.append("arr_0", arrays["arr_0"][start : start + 4])
        assert not path.exists()
    with np.load(path) as loaded:
        assert sorted(loaded.files) == ["arr_0", "arr_1"]
        for name, array in arrays.items():
            np.testing.assert_array_equal(loaded[name], array)
    assert [p.name for p in path.parent.iterdir()] == ["out.npz"]


def test_writer_deflates_where_asked(tmp_path):
    array = np.zeros((100, 50), np.uint8)
    for compressed in (False, True):
        arrays = {"arr_0": (array.shape, array.dtype), "arr_1": ((2,), np.int64)}
        with NpzWriter(tmp_path / f"{compressed}.npz", arrays, compressed=compressed) as writer:
            writer.append("arr_0", array)
            writer.append("arr_1", np.array([3, 4]))
        with np.load(tmp_path / f"{compressed}.npz") as data:
            np.testing.assert_array_equal(data["arr_0"], array)
            assert data["arr_1"].tolist() == [3, 4]
    sizes = [(tmp_path / f"{compressed}.npz").stat().st_size for compressed in (False, True)]
    assert sizes[1] < 1000 < array.nbytes < sizes[0]


def test_writer_leaves_nothing_behind_when_it_fails(tmp_path):
    def write(rows, then: Exception | None = None):
        with NpzWriter(tmp_path / "a.npz", {"arr_0": ((3, 2), np.uint8)}) as writer:
            writer.append("arr_0", rows)
            if then:
                raise then

    with pytest.raises(ValueError, match="arr_0 got 1 of 3 rows"):
        write(np.zeros((1, 2), np.uint8))
    with pytest.raises(ValueError, match="does not fit arr_0"):
        write(np.zeros((1, 2), np.float32))
    with pytest.raises(KeyError):
        write(np.zeros((3, 2), np.uint8), then=KeyError("own"))
    assert list(tmp_path.iterdir()) == []


def test_broken_files_are_one_line(tmp_path):
    whole = tmp_path / "whole.npz"
    np.savez(whole, arr_0=np.zeros((100, 8), np.uint8))
    cut = tmp_path / "cut.npz"
    cut.write_bytes(whole.read_bytes()[:500])
    text = tmp_path / "text.npz"
    text.write_text("not an archive")
    for path in (cut, text):
        with pytest.raises(UserError, match=f"--x: .*{path.name} is not a complete .npz file"):
            NpzReader(path, flag="--x")
    with pytest.raises(UserError, match=r"--x: there is no file .*none\.npz"):
        NpzReader(tmp_path / "none.npz", flag="--x")
    with pytest.raises(UserError, match=r"has no arr_1 \(it has arr_0\)"):
        NpzReader(whole).array("arr_1")
    np.savez(tmp_path / "objects.npz", arr_0=np.array([{}], object))
    with pytest.raises(UserError, match="Python objects"):
        NpzReader(tmp_path / "objects.npz").array("arr_0")


def test_corrupt_compressed_member_is_one_line(tmp_path):
    path = tmp_path / "c.npz"
    noise = np.random.default_rng(0).integers(0, 256, (500, 8), dtype=np.uint8)
    np.savez_compressed(path, arr_0=noise)
    data = bytearray(path.read_bytes())
    data[1500:1600] = bytes(100)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"arr_0 in .* is not a complete"):
        NpzReader(path).array("arr_0")


def test_npy(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(6, 4)
    np.save(tmp_path / "a.npy", array)
    reader = NpyReader(tmp_path / "a.npy")
    np.testing.assert_array_equal(reader.rows(2, 5), array[2:5])
    np.testing.assert_array_equal(reader.rows(0, 2), array[:2])
    (tmp_path / "cut.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-3])
    with pytest.raises(UserError, match=r"cut\.npy is not a complete"):
        NpyReader(tmp_path / "cut.npy").rows(0, 6)


def flip_byte(path, array: np.ndarray) -> None:
    """Change one byte of a stored array's last row."""
    data = bytearray(path.read_bytes())
    data[data.index(array.tobytes()) + array.nbytes - 2] ^= 1
    path.write_bytes(data)


def test_a_changed_byte_is_found_by_reading_all_rows(tmp_path):
    path = tmp_path / "a.npz"
    arrays = sample_arrays()
    np.savez(path, **arrays)
    flip_byte(path, arrays["arr_0"])
    wrong = r"--x: arr_0 in .*a\.npz is not .*CRC-32"
    with pytest.raises(DamagedFile, match=wrong):
        NpzReader(path, flag="--x").array("arr_0")
    with pytest.raises(DamagedFile, match=wrong):
        NpzReader(path, flag="--x").verify()
    with NpzReader(path, flag="--x") as reader:
        reader.rows("arr_0", 8, 11)  # not in order: unverified
        reader.rows("arr_0", 0, 5)
        reader.rows("arr_0", 3, 9)  # overlaps what was seen
        with pytest.raises(DamagedFile, match=wrong):
            reader.rows("arr_0", 9, 11)
        with pytest.raises(DamagedFile, match=wrong):
            reader.rows("arr_0", 0, 1)
        np.testing.assert_array_equal(reader.array("arr_1"), arrays["arr_1"])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_whole_files_verify(tmp_path, save):
    save(tmp_path / "a.npz", empty=np.zeros((0, 3)), **sample_arrays())
    with NpzReader(tmp_path / "a.npz") as reader:
        reader.verify()
        for name in reader.names:
            reader.array(name)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_changed_byte_of_every_compression_is_found(tmp_path, method):
    buffer = io.BytesIO()
    np.save(buffer, np.random.default_rng(0).integers(0, 256, 5000, np.uint8))
    with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as file:
        file.writestr("a.npy", buffer.getvalue())
    whole = (tmp_path / "a.npz").read_bytes()
    for place in range(60, 5000, 700):
        data = bytearray(whole)
        data[place] ^= 1
        (tmp_path / "a.npz").write_bytes(data)
        with pytest.raises(DamagedFile), NpzReader(tmp_path / "a.npz") as reader:
            reader.array("a")


def test_a_changed_header_is_found(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.arange(6, dtype=np.int32))
    path.write_bytes(path.read_bytes().replace(b"<i4", b"<f4"))
    with pytest.raises(DamagedFile, match="CRC-32"):
        NpzReader(path).array("a")


@pytest.mark.parametrize(
    "shape", ["(-3, 4)", "(3, 10**9)", "(3000000000000000000000, 4)", "(3, 4", "[]", "None"]
)
@pytest.mark.parametrize("version", [b"\x01\x00", b"\x02\x00"])
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_headers_that_cannot_be_are_one_line(tmp_path, shape, version, suffix):
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
    length = len(text).to_bytes(2 if version[0] == 1 else 4, "little")
    data = b"\x93NUMPY" + version + length + text + bytes(12)
    path = tmp_path / f"a{suffix}"
    if suffix == ".npy":
        path.write_bytes(data)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", data)
    with pytest.raises(DamagedFile, match=f"a{suffix} is not a complete"):
        NpyReader(path) if suffix == ".npy" else NpzReader(path).shape("arr_0")

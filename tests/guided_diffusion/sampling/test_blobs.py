"""The engine on blob paths, with a folder in the place of the store.

The stand-in has the names and the behaviour of blobfile that we use; no store is reached here.
"""

import itertools
import json
import os
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from esddpm_io import files
from esddpm_io.errors import UserError, run_main
from esddpm_io.images import open_images, save_png
from guided_diffusion.commands import report, sample
from guided_diffusion.sampling import outputs
from guided_diffusion.sampling.chunks import ChunkFolder
from guided_diffusion.sampling.status import Monitor
from tests.tiny_sampling import chunks


@pytest.fixture
def bucket(tmp_path, monkeypatch) -> Path:
    """The folder that gs://bucket/ stands for."""
    root = tmp_path / "bucket"
    root.mkdir()

    def local(path: str) -> Path:
        return root / path.removeprefix("gs://bucket").lstrip("/") if "://" in path else Path(path)

    def opened(path: str, mode: str):
        if "w" in mode:
            local(path).parent.mkdir(parents=True, exist_ok=True)
        return open(local(path), mode)

    def write_text(path: str, text: str) -> None:
        with opened(path, "w") as stream:
            stream.write(text)

    def copy(source: str, target: str, overwrite: bool = False) -> None:
        if local(target).exists() and not overwrite:
            raise FileExistsError(target)
        local(target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(local(source), local(target))

    store = types.ModuleType("blobfile")
    store.Error = RuntimeError
    store.create_context = lambda **settings: store
    store.BlobFile = opened
    store.exists = lambda path: local(path).exists()
    store.isdir = lambda path: local(path).is_dir()
    store.listdir = lambda path: os.listdir(local(path))
    store.walk = lambda path: (
        (f"gs://bucket/{Path(folder).relative_to(root)}", below, names)
        for folder, below, names in os.walk(local(path))
    )
    store.stat = lambda path: types.SimpleNamespace(size=local(path).stat().st_size)
    store.remove = lambda path: local(path).unlink()
    store.read_text = lambda path: local(path).read_text()
    store.write_text, store.copy = write_text, copy
    monkeypatch.setitem(sys.modules, "blobfile", store)
    return root


def test_inputs_checkpoint_and_chunks_in_a_bucket(tiny, tmp_path, bucket):
    shutil.copytree(tiny.folder, bucket / "images")
    shutil.copy(tiny.model, bucket / "model.pt")
    paths = {"model_path": "gs://bucket/model.pt", "dataset_path": "gs://bucket/images"}
    sample.main(tiny.worker_flags("gs://bucket/out", **paths), guided=False)
    sample.main(tiny.worker_flags(tmp_path / "local"), guided=False)
    images, labels = chunks(tmp_path / "local")
    np.testing.assert_array_equal(chunks(bucket / "out")[0], images)
    np.testing.assert_array_equal(chunks(bucket / "out")[1], labels)

    folder = ChunkFolder.load("gs://bucket/out")
    assert Monitor(folder).look().complete
    outputs.join_parts(outputs.parts_of(folder, 0, 10), "gs://bucket/out/samples_all.npz")
    outputs.save_grid("gs://bucket/out/samples_all.npz", None, "gs://bucket/out/grid.png")
    with np.load(bucket / "out" / "samples_all.npz") as npz:
        np.testing.assert_array_equal(npz["arr_0"], images)
    assert (bucket / "out" / "grid.png").exists()
    with pytest.raises(UserError, match="denoise_steps is 2 there, 3 now"):
        sample.main(tiny.worker_flags("gs://bucket/out", **paths, denoise_steps=3), guided=False)


def test_a_report_of_runs_in_a_bucket(bucket):
    for name, t_prime in {"generator": 0, "t400": 400}.items():
        folder = bucket / "runs" / name
        folder.mkdir(parents=True)
        point = {"t_prime": t_prime, "seed": 0, "network_evaluations": 2, "sampler": "ddpm"}
        result = {"metrics": {"fid": 1.0 + t_prime}, "labels": {"fid": "FID"}, "images": 4}
        record = {"point": point, "evaluation": {"results": [result], "reference": "ref.npz"}}
        (folder / "metrics.json").write_text(json.dumps(record))
        np.savez(folder / "samples_all.npz", np.zeros((4, 8, 8, 3), np.uint8))
    report.write(["gs://bucket/runs"], "gs://bucket/out")
    assert "gs://bucket/runs/t400" in (bucket / "out" / "report.html").read_text()
    assert {path.name for path in (bucket / "out").iterdir()} == {
        "report.html",
        "strip.png",
        "sweep.png",
    }


def test_subfolders_of_a_bucket_are_classes(bucket):
    for name in ("b/1.png", "a/2.png"):
        save_png(bucket / "images" / name, np.zeros((2, 2, 3), np.uint8))
    images = open_images("gs://bucket/images/", flag="--dataset_path")
    assert images.read(0, 2).shape == (2, 2, 2, 3) and images.labels(0, 2).tolist() == [0, 1]


def test_a_missing_blob_is_named(bucket):
    with pytest.raises(UserError, match=r"--dataset_path: cannot read gs://bucket/none\.npz"):
        open_images("gs://bucket/none.npz", flag="--dataset_path")


@pytest.mark.parametrize("path", ["s3://b/x.npz", "https://example.org/x.npz", "hdfs://b/x.npz"])
def test_a_store_of_another_kind_is_refused_with_those_that_work(path):
    with pytest.raises(UserError, match=f"{path} cannot be used: .* gs:// or az://$"):
        open_images(path, flag="--dataset_path")


def test_a_store_that_cannot_be_reached_is_given_up(monkeypatch, capsys):
    """The real package, its connections refused: so many tries, then one line."""
    package = pytest.importorskip("blobfile")
    common = pytest.importorskip("blobfile._common")
    tries = []

    class Pool:
        def request(self, **request):
            tries.append(request["url"])
            raise ProtocolError("connection refused")

    from urllib3.exceptions import ProtocolError

    monkeypatch.setattr(common, "exponential_sleep_generator", lambda: itertools.repeat(0))
    context = files._blob_context(package)
    monkeypatch.setattr(context._conf, "_get_http_pool", Pool)
    with pytest.raises(UserError, match="--model_path: cannot read az://account/box/x.pt: "):
        files.open_binary("az://account/box/x.pt", flag="--model_path")
    assert len(tries) == files._BLOB_RETRIES + 1
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: files.exists("az://account/box/x.pt"))
    assert stopped.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: the blob store: ")

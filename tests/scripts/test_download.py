import functools
import hashlib
import http.server
import json
import threading

import numpy as np
import pytest

from esddpm_io.errors import UserError
from evaluations.features import GRAPH_NAME
from guided_diffusion.commands import download
from guided_diffusion.settings.presets import load_preset

PRESET = f"""
checkpoint = "models/mine.pt"
reference_batch = "batches/reference.npz"

[[download]]
url = "{download.PUBLISHED_URL}mine.pt"
path = "models/mine.pt"
bytes = 5

[[download]]
url = "{download.PUBLISHED_URL}ref_batches/mine/reference.npz"
path = "batches/reference.npz"
"""


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def mirror(tmp_path):
    """A server on loopback with the files of PRESET, in the published folders."""
    root = tmp_path / "mirror"
    (root / "ref_batches/mine").mkdir(parents=True)
    (root / "mine.pt").write_bytes(b"abcde")
    np.savez(root / "ref_batches/mine/reference.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    (root / "ref_batches" / GRAPH_NAME).write_bytes(b"graph")
    handler = functools.partial(_QuietHandler, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_fetches_what_is_missing_and_keeps_what_is_there(mirror, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ES_DDPM_CACHE", str(tmp_path / "cache"))
    preset = tmp_path / "mine.toml"
    preset.write_text(PRESET)
    download.main([str(preset), "--base_url", mirror])
    assert capsys.readouterr().out.count(": fetched") == 3
    assert (tmp_path / "models/mine.pt").read_bytes() == b"abcde"
    assert np.load(tmp_path / "batches/reference.npz")["arr_0"].shape == (2, 8, 8, 3)
    assert (tmp_path / "cache" / GRAPH_NAME).read_bytes() == b"graph"

    (tmp_path / "models/mine.pt").unlink()
    monkeypatch.setenv("ES_DDPM_BASE_URL", mirror + "/")
    download.main([str(preset)])
    out = capsys.readouterr().out
    assert (out.count(": fetched"), out.count(": already there")) == (1, 2)


def test_the_published_graph_is_known_again_and_a_mirror_s_is_not(mirror, tmp_path, monkeypatch):
    monkeypatch.setenv("ES_DDPM_CACHE", str(tmp_path / "cache"))
    preset, known = tmp_path / "mine.toml", tmp_path / "cache" / "known_graphs.json"
    preset.write_text(PRESET)
    download.main([str(preset), "--base_url", mirror])
    assert not known.exists()
    (tmp_path / "cache" / GRAPH_NAME).unlink()
    monkeypatch.setattr("evaluations.features.GRAPH_URL", f"{mirror}/ref_batches/{GRAPH_NAME}")
    download.main([str(preset), "--base_url", mirror])
    digest = hashlib.sha256(b"graph").hexdigest()
    assert json.loads(known.read_text()) == {GRAPH_NAME: digest}


def test_a_preset_with_its_own_graph_needs_no_inception(mirror, tmp_path, capsys):
    preset = tmp_path / "mine.toml"
    preset.write_text('feature_graph = "features.pb"\n' + PRESET)
    download.main([str(preset), "--base_url", mirror, "--list"])
    assert capsys.readouterr().out.splitlines() == [
        f"{mirror}/mine.pt -> {tmp_path}/models/mine.pt",
        f"{mirror}/ref_batches/mine/reference.npz -> {tmp_path}/batches/reference.npz",
    ]
    assert not (tmp_path / "models").exists()


def test_published_addresses_unless_told_otherwise():
    files = download.files_of(load_preset("lsun_cat"), download.PUBLISHED_URL)
    assert [file.url for file in files[:-1]] == [f.url for f in load_preset("lsun_cat").download]
    assert files[-1].url == f"{download.PUBLISHED_URL}ref_batches/{GRAPH_NAME}"


def test_the_shipped_data_set_needs_nothing(capsys):
    download.main(["emoji32"])
    assert "nothing to download" in capsys.readouterr().out


def test_bad_arguments_are_named():
    with pytest.raises(UserError, match="DATASET: unknown data set 'imagenet'; valid are emoji32"):
        download.main(["imagenet"])
    with pytest.raises(UserError, match="--base_url must start with http"):
        download.main(["imagenet64", "--base_url", "ftp://host"])

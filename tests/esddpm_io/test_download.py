import base64
import hashlib
import http.server
import io
import threading

import numpy as np
import pytest

from esddpm_io import download as module
from esddpm_io.download import download
from esddpm_io.errors import UserError

DATA = np.random.default_rng(0).bytes(3_000_000)


class _Server(http.server.ThreadingHTTPServer):
    """Serves `files`; `cut` bytes end each connection, `ranges` says whether Range is known."""

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.cut, self.ranges, self.md5 = files, None, True, None
        self.requests, self.busy, self.shift = [], 0, 0
        self.passwords = set()

    def url(self, name):
        return f"http://127.0.0.1:{self.server_port}/{name}"


class _Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        wanted = self.headers["Range"]
        self.server.passwords.add(self.headers["Authorization"])
        self.server.requests.append((self.command, wanted))
        if self.server.busy:
            self.server.busy -= 1
            self.send_error(503)
            return
        data = self.server.files.get(self.path[1:])
        if data is None:
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if wanted and self.server.ranges:
            self.send_response(206)
            self.send_header(
                "Content-Range", f"bytes {start + self.server.shift}-{len(data) - 1}/{len(data)}"
            )
        else:
            start = 0
            self.send_response(200)
        rest = data[start:]
        self.send_header("Content-Length", str(len(rest)))
        if self.server.md5:
            self.send_header("Content-MD5", base64.b64encode(self.server.md5).decode())
        self.end_headers()
        if body:
            self.wfile.write(rest[: self.server.cut])


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    with _Server({"weights.pt": DATA}) as it:
        threading.Thread(target=it.serve_forever, daemon=True).start()
        yield it
        it.shutdown()


def test_fetches_and_then_keeps(server, tmp_path):
    path = tmp_path / "models" / "weights.pt"
    assert download(server.url("weights.pt"), path) is True
    assert path.read_bytes() == DATA
    assert [p.name for p in path.parent.iterdir()] == ["weights.pt"]
    server.requests.clear()
    assert download(server.url("weights.pt"), path) is False
    assert [method for method, _ in server.requests] == ["HEAD"]
    server.requests.clear()
    assert download(server.url("weights.pt"), path, expected_bytes=len(DATA)) is False
    assert server.requests == []


def test_goes_on_where_the_last_call_stopped(server, tmp_path):
    path = tmp_path / "weights.pt"
    (tmp_path / "weights.pt.part").write_bytes(DATA[:1_234_567])
    assert download(server.url("weights.pt"), path)
    assert path.read_bytes() == DATA
    assert server.requests[-1] == ("GET", "bytes=1234567-")


def test_goes_on_after_lost_connections(server, tmp_path):
    server.cut = 700_000
    assert download(server.url("weights.pt"), tmp_path / "weights.pt")
    assert (tmp_path / "weights.pt").read_bytes() == DATA
    assert [r for m, r in server.requests if m == "GET"] == [
        None,
        "bytes=700000-",
        "bytes=1400000-",
        "bytes=2100000-",
        "bytes=2800000-",
    ]


def test_a_busy_server_is_asked_again(server, tmp_path):
    server.busy = 2
    assert download(server.url("weights.pt"), tmp_path / "weights.pt")
    assert (tmp_path / "weights.pt").read_bytes() == DATA
    server.busy = 100
    with pytest.raises(UserError, match="the server answers 503"):
        download(server.url("weights.pt"), tmp_path / "other.pt")
    assert server.busy == 96  # the first try and three more


def test_a_whole_part_is_not_fetched_again(server, tmp_path):
    (tmp_path / "weights.pt.part").write_bytes(DATA)
    assert download(server.url("weights.pt"), tmp_path / "weights.pt")
    assert [method for method, _ in server.requests] == ["HEAD"]


def test_another_range_than_asked_for_is_not_appended(server, tmp_path):
    server.shift = 7
    (tmp_path / "weights.pt.part").write_bytes(DATA[:1000])
    with pytest.raises(UserError, match=r"not the bytes from 1000 on: remove .*\.part"):
        download(server.url("weights.pt"), tmp_path / "weights.pt")
    assert (tmp_path / "weights.pt.part").read_bytes() == DATA[:1000]


def test_passwords_come_from_netrc(server, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login ann password pw")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert download(server.url("weights.pt"), tmp_path / "weights.pt")
    assert server.passwords == {"Basic " + base64.b64encode(b"ann:pw").decode()}


def test_gives_up_when_nothing_arrives_and_keeps_the_part(server, tmp_path):
    (tmp_path / "weights.pt.part").write_bytes(DATA[:1000])
    server.cut = 0
    with pytest.raises(UserError, match=r"lost at 1,000 of 3,000,000 bytes .* same command again"):
        download(server.url("weights.pt"), tmp_path / "weights.pt")
    assert (tmp_path / "weights.pt.part").read_bytes() == DATA[:1000]
    assert not (tmp_path / "weights.pt").exists()


def test_begins_again_at_a_server_without_ranges(server, tmp_path):
    server.ranges = False
    (tmp_path / "weights.pt.part").write_bytes(b"x" * 5000)
    assert download(server.url("weights.pt"), tmp_path / "weights.pt")
    assert (tmp_path / "weights.pt").read_bytes() == DATA


def test_a_part_that_is_too_long_is_not_used(server, tmp_path):
    (tmp_path / "weights.pt.part").write_bytes(DATA + b"more")
    assert download(server.url("weights.pt"), tmp_path / "weights.pt")
    assert (tmp_path / "weights.pt").read_bytes() == DATA


def test_md5_of_the_server_is_checked(server, tmp_path):
    path = tmp_path / "weights.pt"
    (tmp_path / "weights.pt.part").write_bytes(b"x" * 1000)  # of another version of the file
    server.md5 = hashlib.md5(DATA).digest()
    with pytest.raises(UserError, match="arrived damaged .its MD5 digest"):
        download(server.url("weights.pt"), path)
    assert list(tmp_path.iterdir()) == []
    assert download(server.url("weights.pt"), path)
    assert path.read_bytes() == DATA


def test_a_file_that_is_there_is_never_overwritten(server, tmp_path):
    path = tmp_path / "weights.pt"
    path.write_bytes(b"mine")
    with pytest.raises(UserError, match=r"has 4 bytes and .* 3000000: it is truncated or another"):
        download(server.url("weights.pt"), path)
    with pytest.raises(UserError, match="move it away"):
        download(server.url("weights.pt"), path, expected_bytes=len(DATA))
    assert path.read_bytes() == b"mine"


def test_a_zip_must_have_its_directory(server, tmp_path):
    stream = io.BytesIO()
    np.savez(stream, arr_0=np.zeros(100_000))
    good, path = stream.getvalue(), tmp_path / "images.npz"
    server.files["images.npz"] = good[:-100]
    with pytest.raises(UserError, match="not a zip archive"):
        download(server.url("images.npz"), path)
    assert not path.exists()
    server.files["images.npz"] = good
    assert download(server.url("images.npz"), path)
    assert np.load(path)["arr_0"].shape == (100_000,)


def test_errors_name_the_url(server, tmp_path):
    with pytest.raises(UserError, match=r"none\.pt: the server answers 404"):
        download(server.url("none.pt"), tmp_path / "none.pt")
    with pytest.raises(UserError, match="has 3000000 bytes now, not the 17 expected"):
        download(server.url("weights.pt"), tmp_path / "weights.pt", expected_bytes=17)
    with pytest.raises(UserError, match=r"cannot reach http://127\.0\.0\.1:9/x\.pt .* put it at"):
        download("http://127.0.0.1:9/x.pt", tmp_path / "x.pt")


def test_without_network_a_file_that_is_there_is_kept(tmp_path, capsys):
    path = tmp_path / "x.pt"
    path.write_bytes(DATA)
    assert download("http://127.0.0.1:9/x.pt", path) is False
    assert "its size was not checked" in capsys.readouterr().err


def test_too_small_a_disk_is_refused_before_the_transfer(server, tmp_path, monkeypatch):
    usage = module.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="needs 3,000,000 bytes more, and .* has 1,000 free"):
        download(server.url("weights.pt"), tmp_path / "weights.pt")
    assert [method for method, _ in server.requests] == ["HEAD"]

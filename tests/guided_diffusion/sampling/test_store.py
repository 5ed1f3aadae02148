"""gs:// through the real blobfile to a server that speaks the protocol of Google Cloud Storage."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest

from guided_diffusion.commands import sample
from tests.tiny_sampling import chunks
from tests.waiting import PATIENCE_S, wait_until

emulator = pytest.importorskip(
    "gcp_storage_emulator.server", reason="pip install gcp-storage-emulator"
)
pytest.importorskip("blobfile")

# What a user's process does, but for the address of the store.
PROCESS = """
import sys
import blobfile._common, blobfile._gcp
blobfile._common.GCP_BASE_URL = blobfile._gcp.GCP_BASE_URL = sys.argv.pop(1)
from esddpm_io.errors import run_main
from guided_diffusion.commands import sample
run_main(lambda: sample.main(sys.argv[1:], guided=False))
"""
# What reads the store as the gathering does.
READ = """
import sys
import blobfile._common, blobfile._gcp
blobfile._common.GCP_BASE_URL = blobfile._gcp.GCP_BASE_URL = sys.argv[1]
from guided_diffusion.sampling import outputs
from guided_diffusion.sampling.chunks import ChunkFolder
folder = ChunkFolder.load("gs://bucket/out")
assert not folder.remove_damaged(print, all_bytes=True)
for chunk in folder.finished():
    with folder.reader(chunk) as reader:
        assert len(reader.array("arr_0")) == len(reader.array("arr_1")) == chunk[1] - chunk[0]
print("whole:", folder.finished())
if len(sys.argv) > 2:
    outputs.join_parts(outputs.parts_of(folder, 0, folder.num_samples), sys.argv[2])
"""


class Line:
    """A line to the server that passes requests on, and stalls half-way through a certain one."""

    def __init__(self, port: int):
        self._port, self.cut = port, None
        self.stalled = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self._socket.accept()[0]
                threading.Thread(target=self._pass_on, args=(client,), daemon=True).start()

    def _pass_on(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._port)) as server:
            stream = client.makefile("rb")
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                line = stream.readline()
                if not line:
                    return
                head += line
            length = re.search(rb"(?i)content-length: *(\d+)", head)
            size = int(length[1]) if length else 0
            server.sendall(re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", head))
            if self.cut and size > 1 and re.search(self.cut, head):
                server.sendall(stream.read(size // 2))
                self.stalled.set()
                stream.read()  # until the client is gone
                return
            server.sendall(stream.read(size))
            answer = b"".join(iter(lambda: server.recv(1 << 16), b""))
            if head.startswith(b"DELETE"):  # what Google answers, and blobfile expects
                answer = answer.replace(b" 200 OK", b" 204 No Content", 1)
            client.sendall(answer)


@pytest.fixture
def store(monkeypatch):
    """A line to a server with an empty bucket."""
    monkeypatch.setenv("BLOBFILE_FORCE_GOOGLE_ANONYMOUS_AUTH", "1")
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    line = Line(server._api._httpd.server_address[1])
    yield line
    line.close()
    server.stop()


def start(code: str, *argv: object) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *map(str, argv)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(code: str, *argv: object) -> str:
    process = start(code, *argv)
    output = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 0, output
    return output


@pytest.mark.parametrize(
    ("upload", "whole"),
    [
        (rb"PUT [^ ]*settings\.json", None),
        (rb"PUT [^ ]*chunks[^ ]*0000000-0000004\.npz", "whole: []"),
        (rb"PUT [^ ]*chunks[^ ]*0000004-0000008\.npz", "whole: [(0, 4)]"),
    ],
    ids=["settings", "first chunk", "second chunk"],
)
def test_a_worker_killed_in_the_middle_of_an_upload(tiny, tmp_path, store, upload, whole):
    """What is half there is not there, and the next worker goes on with what is whole."""
    store.cut = upload
    argv = tiny.worker_flags("gs://bucket/out")
    worker = start(PROCESS, store.url, *argv)
    wait_until(lambda: store.stalled.is_set() or worker.poll() is not None)
    assert worker.poll() is None, worker.communicate()[0]
    os.kill(worker.pid, signal.SIGKILL)
    worker.communicate()
    store.cut = None
    if whole is not None:
        assert whole in run(READ, store.url)
    run(PROCESS, store.url, *argv)
    assert "whole: [(0, 4), (4, 8), (8, 10)]" in run(READ, store.url, tmp_path / "all.npz")
    sample.main(tiny.worker_flags(tmp_path / "local"), guided=False)
    with np.load(tmp_path / "all.npz") as found:
        for array, expected in zip(found.values(), chunks(tmp_path / "local"), strict=True):
            np.testing.assert_array_equal(array, expected)

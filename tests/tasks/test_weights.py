"""Models in an object store come to a machine once: the embedded models on a real S3 server, behind a proxy that counts."""

import os
import shutil
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import fsspec
import pytest

from tasks.engines import EngineError
from tasks.engines.models import ModelFolder, locate, model_digest
from tasks.scorers import ScorerError, openclip
from tests.flows.conftest import MODEL, ROOT, SCORER

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
FETCH = "import sys; from tasks.engines.models import locate; print(locate(sys.argv[1]))"


class Proxy:
    """Stands before the S3 server, counts the objects that are fetched, and can hold one back in the middle."""

    def __init__(self, endpoint: str) -> None:
        parts = urlsplit(endpoint)
        self._server = (parts.hostname, parts.port)
        self.fetched: Counter[str] = Counter()
        self.hold: str | None = None
        self.held, self.release = threading.Event(), threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.release.set()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server = socket.create_connection(self._server)
        holding = threading.Event()

        def requests() -> None:
            while data := _received(client):
                if data.startswith(b"GET /") and b"list-type" not in data.partition(b"\r\n")[0]:
                    name = data.split()[1].decode().partition("?")[0].split("/", 2)[2]
                    self.fetched[name] += 1
                    if name == self.hold:
                        holding.set()
                server.sendall(data)
            server.close()

        threading.Thread(target=requests, daemon=True).start()
        sent = 0
        while data := _received(server):
            if holding.is_set() and sent + len(data) > 20_000:
                self.held.set()
                self.release.wait()
            try:
                client.sendall(data)
            except OSError:
                break
            sent += len(data) if holding.is_set() else 0
        client.close()


def _received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(16_384)
    except OSError:
        return b""


@pytest.fixture
def proxy(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    proxy = Proxy(os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    fsspec.filesystem("s3").clear_instance_cache()  # they keep the endpoint they were made for
    yield proxy
    proxy.close()
    fsspec.filesystem("s3").clear_instance_cache()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DARKROOM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights"


@pytest.fixture
def url(s3_url: str, tmp_path: Path) -> str:
    """The embedded model on S3, among copies of the weights that nobody loads."""
    url = f"{s3_url}/{tmp_path.name}/models/tiny"
    upload(MODEL, url)
    for name in (
        "whole.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.bin",
    ):
        fsspec.open(f"{url}/{name}").fs.pipe_file(f"{url}/{name}", b"unused")
    return url


def upload(folder: str, url: str) -> None:
    fs, root = fsspec.url_to_fs(url)
    for file in (file for file in Path(folder).rglob("*") if file.is_file()):
        fs.put_file(str(file), f"{root}/{file.relative_to(folder).as_posix()}")


def start(url: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, url], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def result(process: subprocess.Popen) -> Path:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return Path(out.strip())


def test_a_model_on_s3_has_the_digest_of_the_same_folder_on_disk(url: str, cache: Path) -> None:
    folder = locate(url)
    assert folder.parent == cache
    assert model_digest(folder) == model_digest(Path(MODEL))
    local = {file.relative_to(MODEL) for file in ModelFolder(Path(MODEL)).files()} | {Path("darkroom.json")}
    assert {file.relative_to(folder) for file in folder.rglob("*") if file.is_file()} == local


def test_a_scorer_on_s3_has_the_fingerprint_of_the_same_folder_on_disk(url: str, cache: Path) -> None:
    upload(SCORER, f"{url}-clip")
    assert openclip.fingerprint(f"{url}-clip") == openclip.fingerprint(SCORER)
    assert openclip.locate(f"{url}-clip").weights.is_relative_to(cache)


def test_processes_that_start_at_once_fetch_once(url: str, proxy: Proxy) -> None:
    proxy.hold = f"{url.split('/', 3)[3]}/{WEIGHTS}"
    both = [start(url), start(url)]
    assert proxy.held.wait(60)  # the first is in the middle of it, while the second has all the time to do it too
    proxy.release.set()
    first, second = map(result, both)
    assert first == second
    assert len(proxy.fetched) == sum(file.is_file() for file in first.rglob("*"))
    assert set(proxy.fetched.values()) == {1}
    assert result(start(url)) == first
    assert set(proxy.fetched.values()) == {1}


def test_a_fetch_killed_in_the_middle_leaves_no_half_model_and_the_next_goes_on(
    url: str, proxy: Proxy, cache: Path
) -> None:
    held = proxy.hold = f"{url.split('/', 3)[3]}/{WEIGHTS}"
    process = start(url)
    assert proxy.held.wait(60)
    wanted = len(ModelFolder(Path(MODEL)).files()) + 1
    finished = 0
    while finished < wanted - 1:  # the other files come beside the one that hangs
        finished = sum(f.is_file() and f.suffix != ".growing" for f in cache.glob("*.part/**/*"))
        assert process.poll() is None
    process.kill()
    process.wait()
    assert not [folder for folder in cache.iterdir() if folder.is_dir() and folder.suffix != ".part"]
    proxy.hold = None
    proxy.release.set()
    folder = result(start(url))
    assert model_digest(folder) == model_digest(Path(MODEL))
    assert proxy.fetched.pop(held) == 2
    assert set(proxy.fetched.values()) == {1}
    assert not list(cache.glob("*.part"))


def test_a_model_that_changed_under_its_url_is_fetched_anew(url: str, tmp_path: Path) -> None:
    before = locate(url)
    changed = shutil.copytree(MODEL, tmp_path / "changed")
    weights = bytearray((changed / WEIGHTS).read_bytes())
    weights[-1] ^= 1  # of the same size
    (changed / WEIGHTS).write_bytes(weights)
    fs, root = fsspec.url_to_fs(url)
    fs.put_file(str(changed / WEIGHTS), f"{root}/{WEIGHTS}")
    after = locate(url)
    assert after != before
    assert model_digest(after) == model_digest(changed) != model_digest(before)


def test_a_folder_of_this_machine_is_not_copied(cache: Path) -> None:
    assert locate(Path(MODEL).as_uri()) == Path(MODEL)
    assert not cache.exists()


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("s3://darkroom/nothing/here", "holds none of a model's files.*copy the model's folder"),
        ("s3://no-such-bucket-here/model", "s3://no-such-bucket-here/model"),
        ("s3://key:hidden/secret@darkroom/model", "put them into the environment"),
        ("nowhere://bucket/model", "cannot be opened"),
    ],
)
def test_what_is_not_there_is_told_without_secrets(s3_url: str, url: str, told: str) -> None:
    with pytest.raises(EngineError, match=told) as error:
        locate(url)
    assert "hidden" not in str(error.value)
    with pytest.raises(ScorerError, match=told):
        openclip.locate(url)

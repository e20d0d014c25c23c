"""Law: what is fetched is what is recorded, lies where it is found again, and whatever goes
wrong is one line without a secret.
"""

import dataclasses
import datetime
import hashlib
import io
import json
import os
import ssl
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from fixtures.process import one_line

from finrepro.catalogue import reader
from finrepro.catalogue.spec import Hub
from finrepro.data import files as data
from finrepro.data.fetch import fetch
from finrepro.data.files import File
from finrepro.data.hub_client import reason_of
from finrepro.errors import EnvironmentFault
from finrepro.settings import Choice

CONTENT = b'{"news": "Up.", "label": "neutral"}\n'


def archive() -> bytes:
    """A zip file that holds `CONTENT`."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as written:
        written.writestr("inside/b.txt", CONTENT)
    return file.getvalue()


ARCHIVE = archive()


def certificate(folder: Path) -> tuple[Path, Path]:
    """A key and its own certificate for 127.0.0.1."""
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(address, critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "key.pem").write_bytes(private)
    (folder / "cert.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    return folder / "cert.pem", folder / "key.pem"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        exists = self.path.endswith("/test.jsonl")
        self.send_response(200 if exists else 404)
        self.send_header("Content-Length", str(len(CONTENT) if exists else 0))
        self.end_headers()
        self.wfile.write(CONTENT if exists else b"")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a real server on this machine that speaks TLS, and whose certificate is
    trusted.
    """
    cert, key = certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(cert))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"https://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    return tmp_path / "hub"


def dataset(hub: Hub | None = None, **files: File) -> Choice:
    """NWGI from other places."""
    nwgi = reader.dataset("nwgi")
    columns = dict.fromkeys(files, nwgi.config.columns["train"])
    return dataclasses.replace(
        nwgi, config=dataclasses.replace(nwgi.config, hub=hub, files=files, columns=columns)
    )


def served(url: str, sha256: str | None = hashlib.sha256(CONTENT).hexdigest()) -> File:
    return File(path="nwgi/test.jsonl", url=url, sha256=sha256, rows=1)


@pytest.mark.parametrize("pinned", [True, False])
def test_a_file_at_an_address_is_fetched_and_found_again(site: str, pinned: bool):
    file = served(f"{site}/a/test.jsonl") if pinned else served(f"{site}/a/test.jsonl", None)
    nwgi_set = dataset(test=file)
    assert data.dataset_missing_reason(nwgi_set, None) is not None
    (path,) = fetch(nwgi_set)
    assert path.read_bytes() == CONTENT and data.dataset_missing_reason(nwgi_set, None) is None
    loaded = data.load(nwgi_set, None, ("test",))
    assert loaded.origin == {"test": "fetched"} and loaded.files == {
        "test": hashlib.sha256(CONTENT).hexdigest()
    }
    assert not list(path.parent.glob("*.partial"))


def test_other_bytes_than_the_recorded_ones_never_take_the_files_place(site: str, cache: Path):
    with pytest.raises(EnvironmentFault, match="sha256") as refused:
        fetch(dataset(test=served(f"{site}/test.jsonl", "0" * 64)))
    assert site in one_line(refused.value) and not list(cache.rglob("*"))


def test_one_file_that_is_not_there_does_not_keep_the_others_away(site: str):
    nwgi_set = dataset(train=served(f"{site}/gone.jsonl"), test=served(f"{site}/test.jsonl"))
    with pytest.raises(
        EnvironmentFault, match=r"gone\.jsonl.*404.*1 of 2 files are here now"
    ) as refused:
        fetch(nwgi_set)
    assert refused.value.exit_code == 3 and one_line(refused.value)
    assert data.dataset_missing_reason(nwgi_set, None, ("test",)) is None


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9/test.jsonl", "file:///etc/hostname", "https://127.0.0.1:9/x"]
)
def test_an_address_that_gives_nothing_is_one_line(url: str):
    with pytest.raises(EnvironmentFault, match="could not fetch") as refused:
        fetch(dataset(test=served(url)))
    assert url in one_line(refused.value)


def test_a_split_that_only_the_hubs_library_can_name_is_kept_as_json_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A folder in the place of a dataset of the hub: the library reads both alike."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(CONTENT * 2)
    hub = Hub(id=str(tmp_path / "set"), revision=None, source="this test")
    nwgi_set = dataset(hub, train=File(path="nwgi/train.jsonl", sha256=None, rows=None))
    (path,) = fetch(nwgi_set)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [json.loads(CONTENT)] * 2
    assert [e.label for e in data.load(nwgi_set, None, ("train",)).splits["train"]] == [
        "neutral"
    ] * 2


class HubHandler(BaseHTTPRequestHandler):
    """A file of one repository, as the hub answers for it: with its commit and its digest."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        exists = self.path == "/datasets/owner/set/resolve/main/files/a.zip"
        self.send_response(200 if exists else 404)
        self.send_header("Content-Length", str(len(ARCHIVE) if exists else 0))
        if not exists:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("ETag", '"' + hashlib.sha256(ARCHIVE).hexdigest() + '"')
        self.end_headers()
        if exists and self.command == "GET":
            self.wfile.write(ARCHIVE)

    def log_message(self, *_: object) -> None:
        pass


FETCHING = """
import sys
from finrepro.catalogue.spec import Hub
from finrepro.data.fetch import fetch
from finrepro.errors import EnvironmentFault
from finrepro.data.files import File
from test_fetch import dataset
hub = Hub(id="owner/set", revision=None, source="this test")
path = sys.argv[1]
try:
    print(*fetch(dataset(hub, test=File(path="a.txt", hub_path=path, sha256=None, rows=None))))
except EnvironmentFault as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_member_of_an_archive_on_the_hub_is_fetched(hub: str, cache: Path):
    """In a process of its own: the hub's client reads its address once."""

    def fetched(path: str) -> "subprocess.CompletedProcess[str]":
        environment = os.environ | {
            "HF_ENDPOINT": hub,
            "HF_HOME": str(cache),
            "HF_HUB_ETAG_TIMEOUT": "120",
            "HF_HUB_DOWNLOAD_TIMEOUT": "120",
            "no_proxy": "127.0.0.1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        }
        command = [sys.executable, "-c", FETCHING, path]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    answer = fetched("files/a.zip!inside/b.txt")
    assert answer.returncode == 0, answer.stderr
    assert Path(answer.stdout.strip()).read_bytes() == CONTENT
    answer = fetched("files/none.zip")
    assert answer.returncode == 3 and answer.stdout.count("\n") == 1
    assert "could not fetch hf://datasets/owner/set@main/files/none.zip: " in answer.stdout


def test_a_file_in_the_place_of_the_cache_is_one_line(site: str, cache: Path):
    cache.write_text("not a folder")
    with pytest.raises(EnvironmentFault, match=r"could not write .*HF_HOME") as refused:
        fetch(dataset(test=served(f"{site}/test.jsonl")))
    assert refused.value.exit_code == 3 and one_line(refused.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("401 for hf_AbCdEf012345 at hub", "401 for [token] at hub"),
        ("proxy https://me:secret@proxy:80 refused", "proxy https://***@proxy:80 refused"),
        ("header Bearer my-own-token", "header Bearer [token]"),
        ("a client logged in as stored-secret", "a client logged in as [token]"),
        ("the word shelf_life stays", "the word shelf_life stays"),
        ("\n first\nsecond", "first"),
        ("", "ValueError"),
    ],
)
def test_no_secret_stands_in_a_message(
    text: str, expected: str, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_TOKEN", "my-own-token")
    cache.mkdir()
    (cache / "token").write_text("stored-secret\n")
    assert reason_of(ValueError(text)) == expected


@pytest.mark.parametrize("name", reader.entries("datasets"))
def test_every_file_has_an_address(name: str):
    config = reader.dataset(name).config
    for file in config.files.values():
        assert file.url or config.hub, f"{file.path} comes from nowhere"
        assert not file.url or file.url.startswith("https://")
        assert (file.sha256 is None) == (file.rows is None), "a file is pinned or it is not"
        assert file.sha256 is not None or not (file.url or file.hub_path)

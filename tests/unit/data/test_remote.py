"""Tars at a URL: a real HTTP server and a real S3 server on this machine, broken connections, and what is not there."""

from __future__ import annotations

import io
import re
import socket
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prgkit.config.shard import NOTHING, Shard
from prgkit.data.index import index_images
from prgkit.data.sources import open_images
from prgkit.demo.digits import load_digits
from prgkit.errors import ImagesError
from prgkit.storage import remote

pytest.importorskip("fsspec")
aiohttp = pytest.importorskip("aiohttp")


class Handler(BaseHTTPRequestHandler):
    """Serves files, in ranges; breaks off the first answers of a path as often as it is told."""

    files: dict[str, bytes]
    breaks: dict[str, int]
    refusals: list[int]
    served: list[str]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(send=False)

    def do_GET(self) -> None:
        self.answer(send=True)

    def answer(self, *, send: bool) -> None:
        content = self.files.get(self.path)
        if content is None or self.refusals:
            self.send_response(404 if content is None else self.refusals.pop())
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(match[1]), int(match[2] or len(content) - 1)) if match else (0, len(content) - 1)
        part = content[first : last + 1]
        self.send_response(206 if match else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", '"1"')
        if match:
            self.send_header("Content-Range", f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if not send:
            return
        self.served.append(self.path)
        if self.breaks.get(self.path, 0):
            self.breaks[self.path] -= 1
            self.wfile.write(part[: len(part) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(part)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Handler.files, Handler.breaks, Handler.served, Handler.refusals = {}, {}, [], []
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    http.server_close()


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSES_SECONDS", (0.0, 0.0))
    folder = tmp_path / "local"
    folder.mkdir()
    images = load_digits("train")[0]
    for number in range(3):
        with tarfile.open(folder / f"s-{number}.tar", "w") as tar:
            for place in range(10 * number, 10 * number + 10):
                buffer = io.BytesIO()
                images[place].save(buffer, "PNG")
                for name, data in ((f"{place}.png", buffer.getvalue()), (f"{place}.cls", str(place % 3).encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


def serve(folder: Path) -> None:
    Handler.files = {f"/{path.name}": path.read_bytes() for path in folder.iterdir()}


def same(spec: str, folder: Path) -> None:
    there, here = (index_images(open_images(one), workers=2) for one in (spec, f"{folder}/s-{{0..2}}.tar"))
    assert there.keys == here.keys
    assert np.array_equal(there.indices, here.indices)
    for position in range(len(here)):
        assert (np.asarray(there.read(position)) == np.asarray(here.read(position))).all()
    assert there.source.labels(range(30), ()) == here.source.labels(range(30), ())
    assert [there.source.name(index) for index in range(30)] == [here.source.name(index) for index in range(30)]


def test_tars_over_http_are_what_they_are_here_and_come_once(server: str, shards: Path) -> None:
    serve(shards)
    Handler.breaks["/s-1.tar"] = 2  # taken up again
    same(server + "/s-{0..2}.tar", shards)
    fetched = len(Handler.served)
    same(server + "/s-{0..2}.tar", shards)
    assert len(Handler.served) == fetched


def test_a_server_that_stays_away_and_a_tar_that_is_not_there_are_named(server: str, shards: Path) -> None:
    serve(shards)
    Handler.breaks["/s-1.tar"] = 100
    with pytest.raises(ImagesError, match=r"/s-1\.tar could not be fetched in 3 attempts: ") as caught:
        open_images(server + "/s-{0..2}.tar")
    assert caught.value.fix == "check the network and the server; the same command goes on from what came so far"
    with pytest.raises(ImagesError, match=r"/s-3\.tar does not exist"):
        open_images(server + "/s-{0..3}.tar")
    with pytest.raises(ImagesError, match=r"pictures is no tar file"):
        open_images(server + "/pictures")
    with pytest.raises(ImagesError, match=r"^nowhere://a\.tar cannot be opened: "):
        open_images("nowhere://a.tar")


def test_a_server_that_cannot_be_reached_is_asked_again(server: str, shards: Path) -> None:
    """fsspec says of every failure over HTTP that the file is not there."""
    serve(shards)
    Handler.refusals = [503, 503, 429, 429]  # HEAD, and then GET
    assert remote.look_up(server + "/s-0.tar").size == (shards / "s-0.tar").stat().st_size
    Handler.refusals = [403, 403]
    with pytest.raises(ImagesError, match=r"/s-0\.tar does not exist"):
        remote.look_up(server + "/s-0.tar")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}/s-0.tar"
    with pytest.raises(ImagesError, match=r"s-0\.tar could not be fetched in 3 attempts: Cannot connect to host"):
        remote.look_up(closed)


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (aiohttp.ClientOSError(104, "Connection reset by peer"), 3),
        (ConnectionResetError(104, "Connection reset by peer"), 3),
        (socket.gaierror(-2, "Name or service not known"), 3),
        (caused(FileNotFoundError("a"), aiohttp.ServerDisconnectedError()), 3),
        (caused(FileNotFoundError("a"), TimeoutError()), 3),
        (caused(OSError(5, "an S3 server's own mistake"), Exception("a client's")), 3),
        (caused(FileNotFoundError(2, "No such key"), Exception("a client's")), 1),
        (FileNotFoundError("a"), 1),
        (OSError(28, "No space left on device"), 1),
    ],
)
def test_what_another_attempt_may_mend_is_tried_again(
    error: Exception, attempts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PAUSES_SECONDS", (0.0, 0.0))
    tried = []

    def fail() -> None:
        tried.append(1)
        raise error

    with pytest.raises(ImagesError if attempts > 1 else type(error)):
        remote.persist("http://a", fail)
    assert len(tried) == attempts


def test_the_oldest_copies_make_room_and_come_back(server: str, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(shards)
    size = (shards / "s-0.tar").stat().st_size
    monkeypatch.setattr(remote, "SHARE_OF_DISK", 1.0)

    def free(folder: Path) -> int:
        return int(2.5 * size) - sum(path.stat().st_size for path in folder.iterdir() if path.is_file())

    monkeypatch.setattr(remote, "free_bytes", free)
    same(server + "/s-{0..2}.tar", shards)
    assert Handler.served.count("/s-0.tar") > 1


def test_a_shard_fetches_the_tars_that_it_reads(
    server: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prgkit.config.recipe import validate
    from prgkit.progress import NullProgress
    from prgkit.teacher.ensemble import existing_targets
    from prgkit.teacher.shards import embed_shard, join_shards

    serve(shards)
    stores = []
    for place in (server, str(shards)):
        page = {
            "data": {"images": f"{place}/s-{{0..2}}.tar", "classes": ["zero", "one"], "prompts": ["the digit {}"]},
            "teacher": {"model": "demo:digits", "batch_size": 16},
            "views": {"count": 1},
            "student": {"model": "test_efficientnet", "image_size": 32},
            "objective": {"name": "prg"},
            "training": {"workers": 0},
        }
        recipe, root = validate(page, where="test").resolved(), tmp_path / f"targets-{len(stores)}"
        for number in range(3):
            Handler.served.clear()
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache-{number}"))  # another machine
            embed_shard(recipe, root, Shard(number, 3), NullProgress())
            assert set(Handler.served) == ({f"/s-{number}.tar"} if place == server else set())
        (joined,) = join_shards(recipe, root, NullProgress())
        assert joined.images == 30
        targets = existing_targets(recipe, root)
        assert targets is not None
        stores.append(targets.stores[0])
    keys = index_images(open_images(f"{shards}/s-{{0..2}}.tar"), workers=1).keys
    there, here = (store.stored_features(store.rows(keys, views=1), 1).tobytes() for store in stores)
    assert there == here


def test_what_a_part_leaves_unopened_is_listed_all_the_same(server: str, shards: Path) -> None:
    serve(shards)
    spec = server + "/s-{0..2}.tar"
    nothing = open_images(spec, shard=NOTHING)
    assert (Handler.served, len(nothing), nothing.tars) == ([], 0, 3)
    parts = [open_images(spec, shard=Shard(number, 2)) for number in range(2)]
    assert [len(part) for part in parts] == [20, 10]
    assert [part.share(Shard(number, 2)).tolist() for number, part in enumerate(parts)] == [[*range(20)], [*range(10)]]
    assert parts[1].name(0) == "s-1.tar/10.png"
    blocks = open_images(spec, shard=Shard(0, 4))  # more shards than tars: each needs all
    assert (len(blocks), len(parts[1].whole())) == (30, 30)
    assert nothing.listing() == parts[0].listing() == blocks.listing()
    assert len(index_images(parts[0], workers=1)) == 20
    Handler.files["/s-2.tar"] += bytes(1024)
    assert open_images(spec, shard=NOTHING).listing() != nothing.listing()


def test_tars_over_s3(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    server_of = pytest.importorskip("moto.server").ThreadedMotoServer
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    s3 = server_of(ip_address="127.0.0.1", port=0, verbose=False)
    s3.start()
    try:
        host, port = s3.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        files = remote.file_system("s3://pictures")
        files.mkdir("pictures")
        for path in shards.iterdir():
            files.put_file(str(path), f"pictures/{path.name}")
        same("s3://pictures/s-{0..2}.tar", shards)
        with pytest.raises(ImagesError, match=r"s3://pictures/t\.tar does not exist"):
            open_images("s3://pictures/t.tar")
    finally:
        s3.stop()


def test_tars_that_do_not_fit_are_read_one_after_the_other(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_images(f"{shards}/s-{{0..2}}.tar")
    everything, generator = np.arange(30), np.random.default_rng(0)
    assert source.windows(everything, generator) is None
    monkeypatch.setattr("prgkit.data.sources.MOST_BYTES_AT_HAND", 0)
    monkeypatch.setattr("prgkit.data.sources.WINDOW_BYTES", 1)
    windows = source.windows(everything, generator)
    assert windows is not None
    assert {tuple(np.unique(windows[start : start + 10])) for start in (0, 10, 20)} == {
        (one,) for one in np.unique(windows)
    }
    assert len(np.unique(windows)) == 3


def test_a_student_taught_from_a_server_is_the_one_taught_from_the_disk(
    server: str, shards: Path, tmp_path: Path
) -> None:
    from prgkit.config.recipe import validate
    from prgkit.progress import NullProgress
    from prgkit.training.distill import distill

    serve(shards)
    runs = []
    for name, place in (("here", str(shards)), ("there", server)):
        page = {
            "data": {"images": f"{place}/s-{{0..2}}.tar", "classes": ["zero", "one"], "prompts": ["the digit {}"]},
            "teacher": {"model": "demo:digits", "batch_size": 16},
            "views": {"count": 2},
            "student": {"model": "test_efficientnet", "image_size": 32},
            "objective": {"name": "prg"},
            "training": {"epochs": 2, "batch_size": 8, "workers": 1, "precision": "fp32"},
        }
        recipe = validate(page, where="test").resolved()
        runs.append(distill(recipe, tmp_path / name, tmp_path / f"targets-{name}", NullProgress()))
    assert runs[0].weights.read_bytes() == runs[1].weights.read_bytes()

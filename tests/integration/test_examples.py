"""The programs of examples/, each run as its users would, answer as predict does; one whose library is not here is skipped."""

from __future__ import annotations

import asyncio
import importlib.util
import io
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import prgkit
from tests.conftest import pictures

EXAMPLES = Path(__file__).parents[2] / "examples"


def load_example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    return [Image.fromarray(pixels).resize((50 + number, 40)) for number, pixels in enumerate(pictures(12))]


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


# The service.


@pytest.fixture(scope="module")
def service() -> Any:
    for module in ("fastapi", "httpx2", "prometheus_client", "python_multipart"):
        pytest.importorskip(module)
    return load_example("fastapi_service")


@pytest.fixture
def client(service: Any, project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from fastapi.testclient import TestClient

    monkeypatch.setenv("BUNDLE", str(project / "runs/tiny/bundle"))
    with TestClient(service.app) as opened:
        yield opened


def test_the_service_answers_many_at_once_as_predict_does(client: Any, project: Path, photos: list[Any]) -> None:
    with prgkit.load(project / "runs/tiny") as model:
        expected = model.predict(photos)

    def ask(picture: Image.Image) -> Any:
        return client.post("/predict", files={"image": ("a.png", png(picture))})

    with ThreadPoolExecutor(len(photos)) as pool:
        answers = list(pool.map(ask, photos))
    assert [answer.status_code for answer in answers] == [200] * len(photos)
    for answer, one in zip(answers, expected, strict=True):
        assert answer.json()["class"] == one.label
        assert answer.json()["probability"] == pytest.approx(one.probability, abs=1e-4)
        assert [name for name, _ in answer.json()["top"]] == [name for name, _ in one.top]
    assert client.get("/health").json() == {"status": "ok", "artifact": "onnx-fp32", "classes": 3}
    told = client.get("/metrics").text.splitlines()
    assert f"prgkit_batch_images_sum {len(photos)}.0" in told
    assert f'prgkit_requests_total{{status="200"}} {len(photos)}.0' in told
    assert "prgkit_waiting_images 0.0" in told


def test_what_the_service_cannot_name_is_refused_with_a_reason(
    client: Any, service: Any, photos: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(data: bytes) -> tuple[int, str]:
        answer = client.post("/predict", files={"image": ("a.png", data)})
        return answer.status_code, answer.json()["detail"]

    why = "a.png is no picture that can be read: send JPEG, PNG, WebP, ..."
    assert refusal(b"%PDF-1.7") == (415, why)
    assert refusal(b"") == (415, why)
    assert refusal(png(photos[0])[:-300]) == (415, why)
    assert client.post("/predict").status_code == 422
    assert client.post("/predict", files={"image": ("a.png", png(photos[0]))}).status_code == 200
    monkeypatch.setattr(service, "MOST_BYTES", 1000)
    assert refusal(png(photos[0])) == (413, "a.png has more than 0 MiB")
    assert 'prgkit_requests_total{status="415"} 3.0' in client.get("/metrics").text


def test_what_waits_goes_through_the_network_together_and_a_failure_is_told(service: Any) -> None:
    sizes = []

    def predict(asked: list[Any], *, batch_size: int) -> list[Any]:
        sizes.append(batch_size)
        if len(sizes) == 2:
            raise RuntimeError("the GPU is gone")
        return [SimpleNamespace(error=None, place=place) for place in asked]

    async def serve() -> list[Any]:
        queue: asyncio.Queue[Any] = asyncio.Queue(17)
        asked = [asyncio.create_task(service.in_a_batch(queue, place)) for place in range(18)]
        await asyncio.sleep(0)  # all but the last find a place
        asked[3].cancel()  # who asked goes away
        batches = asyncio.create_task(service.run_batches(SimpleNamespace(predict=predict), queue))
        found = await asyncio.gather(*asked, return_exceptions=True)
        batches.cancel()
        return found

    found = asyncio.run(serve())
    assert sizes == [8, 8, 1]
    assert [found[place].place for place in (0, 1, 2, 4, 5, 6, 7, 16)] == [0, 1, 2, 4, 5, 6, 7, 16]
    assert isinstance(found[3], asyncio.CancelledError)
    assert {str(one) for one in found[8:16]} == {"the GPU is gone"}
    assert (found[17].status_code, found[17].headers) == (503, {"Retry-After": "1"})


# The page.


def test_the_page_names_a_picture(
    project: Path, photos: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    pytest.importorskip("gradio")
    from gradio_client import Client, handle_file

    photos[0].save(tmp_path / "a.png")
    with prgkit.load(project / "runs/tiny") as model:
        page = load_example("gradio_page").page(model)
        _, address, _ = page.launch(prevent_thread_lock=True, server_name="127.0.0.1", quiet=True)
        try:
            shown = Client(address, verbose=False).predict(handle_file(tmp_path / "a.png"), api_name="/name")
        finally:
            page.close()
        (expected,) = model.predict(tmp_path / "a.png")
    assert shown["label"] == expected.label
    found = [(one["label"], one["confidence"]) for one in shown["confidences"]]
    assert found == [(name, pytest.approx(share, abs=1e-5)) for name, share in expected.top]


# The C++ program.


def onnxruntime_headers() -> Path | None:
    """Return the folder with ONNX Runtime's C++ headers: of a distribution's package, or the one that ORT_INCLUDE names."""
    places = [
        os.environ.get("ORT_INCLUDE"),
        "/usr/include/onnxruntime",
        "/usr/local/include/onnxruntime",
        "/usr/include",
    ]
    return next((Path(place) for place in places if place and (Path(place) / "onnxruntime_cxx_api.h").exists()), None)


@pytest.fixture(scope="module")
def name_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, compiled, with the library of the Python package."""
    headers = onnxruntime_headers()
    if headers is None:
        pytest.skip("no headers of ONNX Runtime: apt install libonnxruntime-dev, or ORT_INCLUDE=FOLDER")
    if not shutil.which("cmake") or not shutil.which("c++"):
        pytest.skip("no CMake or no C++ compiler")
    folder = tmp_path_factory.mktemp("cpp")
    origin = importlib.util.find_spec("onnxruntime")
    assert origin
    assert origin.origin
    (library,) = Path(origin.origin).parent.glob("capi/libonnxruntime.so.*")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):  # what the linker and what the loader look for
        (folder / name).symlink_to(library)
    given = [f"-DORT_INCLUDE={headers}", f"-DORT_LIBRARY={folder / 'libonnxruntime.so'}", "-DCMAKE_BUILD_TYPE=Debug"]
    flags = "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror"
    subprocess.run(["cmake", "-S", EXAMPLES / "cpp", "-B", folder, *given, flags], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", folder], check=True, capture_output=True)
    return folder / "name_image"


def test_the_program_answers_as_predict_does(
    name_image: Path, project: Path, photos: list[Any], tmp_path: Path
) -> None:
    bundle = project / "runs/tiny/bundle"
    with prgkit.load(bundle) as model:
        for picture in (*photos, Image.new("RGB", (9, 300), "teal")):
            picture.save(tmp_path / "a.ppm")
            (expected,) = model.predict(tmp_path / "a.ppm")
            done = subprocess.run([name_image, bundle, tmp_path / "a.ppm"], check=True, capture_output=True, text=True)
            found = [line.split(" ", 1) for line in done.stdout.splitlines()]
            assert [(name, float(share)) for share, name in found] == [
                (name, pytest.approx(share, abs=2e-5)) for name, share in expected.top
            ]
    (tmp_path / "a.ppm").write_bytes(b"P6 20 20 255\nshort")
    done = subprocess.run([name_image, bundle, tmp_path / "a.ppm"], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, f"Error: {tmp_path / 'a.ppm'} is truncated\n")

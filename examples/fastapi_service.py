"""An HTTP service that names pictures; what arrives while the network runs goes through it together, next.

    pip install prgkit fastapi uvicorn python-multipart prometheus_client
    BUNDLE=runs/demo/bundle uvicorn --app-dir examples fastapi_service:app
    curl -F image=@photo.jpg http://127.0.0.1:8000/predict

GET /health says what is loaded, GET /metrics is for Prometheus. Each worker process opens its own model, and they share
the cores.
"""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple

from fastapi import FastAPI, HTTPException, Request, Response, UploadFile
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, Counter, Gauge, Histogram, generate_latest

import prgkit

LARGEST_BATCH = 8
MOST_WAITING = 64  # pictures; who comes then is told to come again
MOST_BYTES = 20 << 20

REQUESTS = Counter("prgkit_requests", "Requests for a prediction.", ["status"])
SECONDS = Histogram("prgkit_request_seconds", "Time from the upload to the answer.")
BATCH = Histogram("prgkit_batch_images", "Pictures that went through the network together.", buckets=(1, 2, 4, 8, 16))
WAITING = Gauge("prgkit_waiting_images", "Pictures that wait for the network.")


class Waiting(NamedTuple):
    """A picture that waits for its turn, and where its answer goes."""

    picture: Image.Image
    answer: asyncio.Future[prgkit.Prediction]


@asynccontextmanager
async def opened(app: FastAPI) -> AsyncIterator[None]:
    """Open the bundle when the service starts, and close it at its end."""
    app.state.queue = asyncio.Queue(MOST_WAITING)
    with prgkit.load(os.environ["BUNDLE"]) as model:
        app.state.model = model
        batches = asyncio.create_task(run_batches(model, app.state.queue))
        yield
        batches.cancel()
        with suppress(asyncio.CancelledError):
            await batches


app = FastAPI(title="prgkit", lifespan=opened)


@app.post("/predict")
async def predict(request: Request, image: UploadFile) -> dict[str, Any]:
    """Name what is in a picture."""
    with SECONDS.time():
        try:
            picture = await asyncio.to_thread(decode, await image.read(MOST_BYTES + 1), image.filename or "the file")
            answer = await in_a_batch(request.app.state.queue, picture)
        except HTTPException as error:
            REQUESTS.labels(error.status_code).inc()
            raise
    REQUESTS.labels(200).inc()
    return {"class": answer.label, "probability": answer.probability, "top": answer.top}


@app.get("/health")
async def health(request: Request) -> dict[str, Any]:
    """Say that the model is loaded, and which."""
    model = request.app.state.model
    return {"status": "ok", "artifact": model.artifact.name, "classes": len(model.classes)}


@app.get("/metrics")
async def metrics(request: Request) -> Response:
    """Give the figures in Prometheus's text format."""
    WAITING.set(request.app.state.queue.qsize())
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


def decode(data: bytes, name: str) -> Image.Image:
    """Read a picture whole, so that a damaged one fails here and not in a batch with others."""
    if len(data) > MOST_BYTES:
        raise HTTPException(413, f"{name} has more than {MOST_BYTES >> 20} MiB")
    try:
        picture = Image.open(io.BytesIO(data))
        picture.load()
    except Image.DecompressionBombError as error:
        raise HTTPException(413, f"{name} has too many pixels") from error
    except Exception as error:  # on damaged bytes Pillow's readers raise nearly anything
        raise HTTPException(415, f"{name} is no picture that can be read: send JPEG, PNG, WebP, ...") from error
    return picture


async def in_a_batch(queue: asyncio.Queue[Waiting], picture: Image.Image) -> prgkit.Prediction:
    """Wait for the turn of a picture, and return its answer."""
    waiting = Waiting(picture, asyncio.get_running_loop().create_future())
    try:
        queue.put_nowait(waiting)
    except asyncio.QueueFull:
        raise HTTPException(503, "too many pictures are waiting", {"Retry-After": "1"}) from None
    answer = await waiting.answer
    if answer.error is not None:
        raise HTTPException(415, answer.error.what)
    return answer


async def run_batches(model: prgkit.Model, queue: asyncio.Queue[Waiting]) -> None:
    """Take what waits, up to a batch, and answer it; the network runs in a thread, so that uploads go on meanwhile."""
    while True:
        batch = [await queue.get()]
        while len(batch) < LARGEST_BATCH and not queue.empty():
            batch.append(queue.get_nowait())
        BATCH.observe(len(batch))
        pictures = [waiting.picture for waiting in batch]
        answers: list[prgkit.Prediction | Exception]
        try:
            answers = list(await asyncio.to_thread(model.predict, pictures, batch_size=len(batch)))
        except Exception as error:  # such as a GPU that went away: each of them is told, and the next batch is tried
            answers = [error] * len(batch)
        for waiting, answer in zip(batch, answers, strict=True):
            if waiting.answer.done():  # who asked has gone
                continue
            if isinstance(answer, Exception):
                waiting.answer.set_exception(answer)
            else:
                waiting.answer.set_result(answer)

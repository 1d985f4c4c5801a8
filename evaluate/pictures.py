"""What people ask about, as pictures with names: files, folders, archives, videos, and pictures in memory."""

from __future__ import annotations

import glob
import os
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prgkit.data.archives import is_archive
from prgkit.data.decode import GreyRange, UnreadableImage, upright_rgb
from prgkit.data.files import printable
from prgkit.data.preprocessing import Preprocessing, load_image
from prgkit.data.sources import open_images
from prgkit.errors import ImagesError, PrgkitError, one_line
from prgkit.evaluate.live import WrittenOver, comes_over_time, frames, is_live, is_video, paths_on_stdin
from prgkit.progress import silent
from prgkit.workers import available_cores

DECODERS = 8  # threads that read pictures ahead of the network, at most
READ_AHEAD = 8  # pictures, unless a network takes more at a time

Item = TypeVar("Item")
Result = TypeVar("Result")


class NamedPicture(NamedTuple):
    """A picture that is read when it is its turn."""

    name: str
    read: Callable[[], Image.Image]
    live: bool = False  # others come later: it is not to wait for them


class PreparedPicture(NamedTuple):
    """A picture as the network takes it, [S, S, 3]; or why it cannot be read."""

    picture: NamedPicture
    pixels: NDArray[np.uint8] | None
    error: PrgkitError | None


# A path, folder, archive, video or pattern of paths; or a picture, as Pillow's or as uint8 [H, W, 3] in RGB order.
Picture: TypeAlias = str | os.PathLike[str] | Image.Image | NDArray[np.uint8] | NamedPicture
Pictures: TypeAlias = Picture | Iterable[Picture]


def open_pictures(
    images: Pictures,
    grey: GreyRange | None = None,
    note: Callable[[str], None] = silent,
    *,
    fps: float | None = None,
    skip: Container[str] = (),
    live: bool = False,
) -> Iterator[NamedPicture]:
    """Yield each picture that ``images`` stands for.

    Args:
        images: one or several; ``"-"`` stands for the paths on stdin, ``"0"`` for the first camera.
        grey: the values of a deep grey that are black and white.
        note: told which files of a folder are no pictures, and how many frames were skipped.
        fps: the most frames a second that are taken of a video; None for all of a file, the newest of a camera.
        skip: the names of pictures that are left out; a camera's frames never are, nor what was written over.
        live: whether what comes later must not keep any waiting, as of a camera and of stdin anyway.

    Raises:
        PrgkitError: a video cannot be opened.
    """
    if isinstance(images, str | os.PathLike | Image.Image | NamedPicture) or getattr(images, "ndim", 4) < 4:
        images = [images]  # type: ignore[list-item]
    for place, given in enumerate(images):
        comes, again = live, skip
        if isinstance(given, NamedPicture):
            found: Iterator[NamedPicture] = iter([given])
        elif isinstance(given, str | os.PathLike):
            text = os.fspath(given)
            found, comes = pictures_at(text, grey, note, fps), live or comes_over_time(text)
            again = () if is_live(text) or isinstance(given, WrittenOver) else skip
        elif isinstance(given, Image.Image):
            name = str(getattr(given, "filename", "") or place)
            found = iter([NamedPicture(name, partial(from_pillow, given, name, grey))])
        else:
            found = iter([NamedPicture(str(place), partial(from_array, given, place))])
        for picture in found:
            if (name := printable(picture.name)) not in again:
                yield picture._replace(name=name, live=picture.live or comes)


def pictures_at(
    given: str, grey: GreyRange | None, note: Callable[[str], None], fps: float | None
) -> Iterator[NamedPicture]:
    """Yield the picture of a file, or those of a folder, an archive, a video, a pattern or stdin."""
    if given == "-":
        for line in paths_on_stdin():
            yield from pictures_at(line, grey, note, fps)
    elif is_video(given):
        for name, read in frames(given, fps, note):
            yield NamedPicture(name, read)
    elif os.path.isdir(given) or is_archive(Path(given)):
        try:
            images = open_images(given, note=note).with_grey(grey)
        except PrgkitError as error:
            yield NamedPicture(given, partial(refuse, error))
            return
        if images.left_out:
            note(f"{given}: {images.left_out}")
        for index in range(len(images)):
            yield NamedPicture(images.path(index), partial(images.read, index))
    else:
        found = [] if os.path.lexists(given) else sorted(glob.glob(given, recursive=True))
        for path in found or [given]:
            yield NamedPicture(path, partial(load_image, path, grey=grey))


def from_pillow(picture: Image.Image, name: str, grey: GreyRange | None) -> Image.Image:
    """Return Pillow's image upright and in RGB; one of a file is decoded only now."""
    try:
        return upright_rgb(picture, grey)
    except Exception as error:  # on damaged bytes Pillow's plugins raise nearly anything
        raise UnreadableImage(name, one_line(error)) from error


def from_array(values: NDArray[np.uint8], place: int) -> Image.Image:
    """Return an array uint8 [H, W, 3] in RGB order, or [H, W] in grey, as a picture."""
    values = np.asarray(values)
    if values.dtype != np.uint8 or values.ndim not in (2, 3) or values.shape[2:] not in ((), (3,)) or not values.size:
        raise ImagesError(
            f"array {place} is no picture: {values.dtype} {list(values.shape)}",
            fix="give uint8 [height, width, 3], RGB from 0 to 255",
        )
    return Image.fromarray(values).convert("RGB")


def refuse(error: PrgkitError) -> Image.Image:
    """Say when it is asked for its pictures what is wrong with a folder."""
    raise error


def prepared_ahead(
    pictures: Iterable[NamedPicture], preprocessing: Preprocessing, *, ahead: int = READ_AHEAD
) -> Iterator[PreparedPicture]:
    """Yield each picture as the network takes it; up to ``ahead`` further ones are read meanwhile, in threads."""

    def prepare(picture: NamedPicture) -> PreparedPicture:
        try:
            return PreparedPicture(picture, preprocessing.prepare(picture.read()), None)
        except PrgkitError as error:
            return PreparedPicture(picture, None, error)

    yield from in_order(
        prepare, pictures, threads=min(DECODERS, available_cores()), ahead=lambda picture: 0 if picture.live else ahead
    )


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int, ahead: Callable[[Item], int]
) -> Iterator[Result]:
    """Yield the function of each item, in their order; that of up to ``ahead`` later ones is found meanwhile."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            while len(waiting) > ahead(item):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

"""`predict`: which pictures are asked about, and what becomes of the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from prgkit.cli.options import FOLDER, PLACE, json_option, run_option, with_options
from prgkit.cli.state import Document, Session
from prgkit.errors import ImagesError

if TYPE_CHECKING:
    from prgkit.evaluate.predict import Prediction
    from prgkit.evaluate.search import Neighbours

AnswerType = TypeVar("AnswerType", "Prediction", "Neighbours")


def predict_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what predict takes: pictures, how sure an answer has to be, and where answers go."""
    options: list[Callable[..., Any]] = [
        click.argument("images", nargs=-1, metavar="IMAGE..."),
        click.option("--top-k", type=click.IntRange(min=1), default=3, show_default=True, help="How many answers."),
        click.option(
            "--min-confidence", type=click.FloatRange(0, 1), default=0.0, help="Abstain below this probability."
        ),
        click.option(
            "--reject-unknown", is_flag=True, help="Abstain where an image seems to show none of the classes."
        ),
        click.option(
            "--runtime", metavar="NAME", help="Answer with this runtime, e.g. litert.  [default: what bench chose]"
        ),
        click.option(
            "--gallery", type=PLACE, metavar="FILE", help="Name no class: find the most alike images in this gallery."
        ),
        click.option(
            "--batch",
            "batch_size",
            type=click.IntRange(min=1),
            default=1,
            show_default=True,
            help="How many pictures the network is given at a time.",
        ),
        click.option(
            "--out",
            type=click.Path(path_type=Path),
            metavar="PLACE",
            help="Keep the answers in a .csv, a .jsonl, or a folder of pictures with their answers on them; what has "
            "one there is not asked again.",
        ),
        click.option(
            "--fps",
            type=click.FloatRange(min=0, min_open=True),
            metavar="N",
            help="At most N frames a second of a video.",
        ),
        click.option(
            "--explain",
            type=FOLDER,
            metavar="FOLDER",
            help="Also draw there what spoke for each answer; the bundle needs export --explain.",
        ),
        click.option("--watch", type=FOLDER, metavar="FOLDER", help="Also name what is put there, until Ctrl-C."),
        run_option,
        json_option,
    ]
    return with_options(command, options)


@dataclass(frozen=True)
class AskedPictures:
    """Which pictures `predict` is to name."""

    images: tuple[str, ...]
    watch: Path | None  # a folder that more are put into
    fps: float | None  # the most frames a second of a video

    @property
    def endless(self) -> bool:
        """Whether they come over time, so that each is answered at once, and Ctrl-C is how they end."""
        from prgkit.evaluate.live import comes_over_time

        return self.watch is not None or any(map(comes_over_time, self.images))

    @property
    def countable(self) -> bool:
        """Whether all can be listed first: a list of frames would hold a whole video."""
        from prgkit.evaluate.live import is_video

        return not self.endless and not any(map(is_video, self.images))

    def paths(self) -> Iterator[str]:
        """Yield what was named, and then what comes."""
        from prgkit.evaluate.live import watched

        yield from self.images
        if self.watch is not None:
            yield from watched(self.watch)


def name_pictures(
    session: Session, asked: AskedPictures, place: Path | None, *, out: Path | None, explain: Path | None, **how: Any
) -> Document:
    """Name what is in pictures: print it, or keep it in ``out``; draw in ``explain`` what spoke for it."""
    from prgkit.evaluate import system
    from prgkit.evaluate.answers import in_words, open_answers, place_below, save_picture
    from prgkit.evaluate.pictures import open_pictures
    from prgkit.evaluate.predict import Model
    from prgkit.storage.find import find_bundle

    bundle, run = find_bundle(session.folder or place)
    terminal = session.terminal
    kept = None if out is None else open_answers(out)
    measured = system.bench_folder(bundle, run)
    with Model(bundle, bench=measured, runtime=how.pop("runtime"), note=terminal.note) as model:
        if explain is not None:
            model.require_heat_maps()
        grey, live = model.bundle.preprocessing.grey_range, asked.endless
        pictures = open_pictures(asked.paths(), grey, terminal.note, fps=asked.fps, skip=kept or (), live=live)
        if kept is not None and asked.countable:
            listed = list({picture.name: picture for picture in pictures}.values())  # one row each
            terminal.start("pictures", len(listed), "img")
            pictures = iter(listed)

        def tell(answer: Prediction) -> None:
            if kept is not None:
                kept.add(answer)
                terminal.advance(1)
            elif answer.error is None:
                scores = ", ".join(f"{name} {100 * score:.1f} %" for name, score in answer.top)
                terminal.say(f"{answer.image}: ", (in_words(answer), "bold"), f"  ({scores})")
            if explain is not None and answer.read is not None:
                page = model.heat_map(answer.read(), answer.top[0][0])
                save_picture(page, place_below(explain, answer.image))

        told = tell_each(session, asked, model.stream(pictures, **how), tell)
    if out is not None:
        terminal.say((str(out), "bold"), f": {told.count:,} pictures answered, {told.failed:,} of them unreadable")
    return told.answers


@dataclass
class Told:
    """What has been told of pictures so far."""

    count: int = 0
    failed: int = 0
    answers: list[object] = field(default_factory=list)  # of --json alone: a camera's have no end


def tell_each(
    session: Session, asked: AskedPictures, answers: Iterable[AnswerType], tell: Callable[[AnswerType], None]
) -> Told:
    """Have each answer told as it comes, and note which pictures cannot be read."""
    told, first = Told(), None
    with ending(session, told) if asked.endless else nullcontext():
        for answer in answers:
            told.count += 1
            if session.as_json:
                told.answers.append(answer.to_json())
            error = answer.error
            try:
                tell(answer)
            except ImagesError as gone:  # what it is drawn on was there when it was answered
                error = gone
            if error is not None:
                told.failed, first = told.failed + 1, first or error
                if asked.images != (answer.image,):  # else it is the line's own failure
                    session.terminal.note(str(error))
    if told.failed and session.failure is None:
        what = f"{told.failed} of {told.count} pictures have no answer; the others are answered"
        session.failure = first if told.count == 1 else ImagesError(what)
    return told


@contextmanager
def ending(session: Session, told: Told) -> Iterator[None]:
    """Have what comes over time end at Ctrl-C, or with what stops it: then what was told of it still stands."""
    try:
        yield
    except KeyboardInterrupt:
        pass
    except ImagesError as error:
        if not told.count:
            raise
        session.failure = error


def search_gallery(session: Session, asked: AskedPictures, place: Path | None, gallery: Path, top_k: int) -> Document:
    """Say which images of a gallery each picture is most like."""
    from prgkit.evaluate.search import search
    from prgkit.storage.find import find_bundle

    def tell(answer: Neighbours) -> None:
        if answer.error is None:
            near = ", ".join(f"{name} {cosine:.3f}" for name, cosine in answer.nearest)
            session.terminal.say((answer.image, "bold"), f": {near}")

    bundle, _ = find_bundle(session.folder or place)
    note, live = session.terminal.note, asked.endless
    found = search(bundle, asked.paths(), gallery, top_k=top_k, note=note, fps=asked.fps, live=live)
    return tell_each(session, asked, found, tell).answers

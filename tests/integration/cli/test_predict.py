"""What `predict` answers for pictures, folders and archives."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from prgkit.storage.atomic import read_json, write_sealed
from tests.conftest import PrgkitCommand


def test_predict_abstains_and_keeps_the_brackets_of_a_name(prgkit: PrgkitCommand, project_copy: Path) -> None:
    shutil.copy("photos/00.png", "photos/a[bold].png")
    result = prgkit("predict", "photos/a[bold].png", "--min-confidence", "1", "--top-k", "1")
    assert result.out.startswith("photos/a[bold].png: abstains  (")
    result = prgkit("predict", "nothing.jpg")
    assert result.code == 1
    assert result.err.startswith("Error: nothing.jpg does not exist")


def test_predict_answers_every_picture_that_it_can_read(prgkit: PrgkitCommand, project_copy: Path) -> None:
    whole = Path("photos/01.png").read_bytes()
    Path("cut.png").write_bytes(whole[:60])
    result = prgkit("predict photos/00.png cut.png nothing.jpg photos/01.png --top-k 1")
    assert result.code == 1
    assert [line.partition(":")[0] for line in result.out.splitlines()] == ["photos/00.png", "photos/01.png"]
    assert result.err.startswith("cut.png cannot be read: truncated\nnothing.jpg does not exist")
    assert result.err.endswith("Error: 2 of 4 pictures have no answer; the others are answered\n")
    result = prgkit("predict cut.png photos/00.png --json")
    assert result.code == 1
    bad, good = result.json["predict"]
    assert bad == {
        "image": "cut.png",
        "error": {"what": "cut.png cannot be read: truncated", "where": None, "fix": None},
    }
    assert good["class"] in ("one", "two", "three")


def test_predict_takes_folders_and_archives(prgkit: PrgkitCommand, project_copy: Path) -> None:
    alone = prgkit("predict photos/00.png photos/01.png --json").json["predict"]
    mine = Path("mine")
    (mine / "deep").mkdir(parents=True)
    shutil.copy("photos/00.png", mine / "deep" / "a")  # no suffix: its content tells
    shutil.copy("photos/01.png", mine)
    (mine / "notes.txt").write_text("x")
    result = prgkit("predict mine --json")
    assert result.code == 0
    assert result.json["predict"] == [{**alone[1], "image": "mine/01.png"}, {**alone[0], "image": "mine/deep/a"}]
    assert result.err == "mine: passed over 1 file that is no picture: 1 .txt\n"
    shutil.make_archive("packed", "zip", "mine")
    shutil.make_archive("packed", "tar", "mine")
    result = prgkit("predict packed.zip packed.tar --top-k 1")
    assert sorted(line.partition(":")[0] for line in result.out.splitlines()) == [
        *("packed.tar/01.png", "packed.tar/deep/a", "packed.zip/01.png", "packed.zip/deep/a")
    ]
    Path("empty").mkdir()
    result = prgkit("predict empty")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("Error: empty holds no images\n  where: empty\n  fix: it is empty")


CALIBRATED = {
    "temperature": 4.0, "fitted_to": "teacher", "images": 40, "calibration_error": 1.0, "uncalibrated_error": 9.0,
    "right": [0.5] * 39, "wrong": [0.3], "held_out": 40, "reject_below": -1e9,
}  # fmt: skip


def calibrate(confidence: Any) -> None:
    """Change what the bundle says of its confidences; None takes it out, as in a bundle of before."""
    path = Path("runs/tiny/bundle/manifest.json")
    manifest = read_json(path)
    manifest.pop("confidence")
    write_sealed(path, manifest if confidence is None else {**manifest, "confidence": confidence})


def test_confidence_is_calibrated_and_a_promise(prgkit: PrgkitCommand, project_copy: Path) -> None:
    picture = "predict photos/00.png --json --min-confidence"
    result = prgkit(picture, "0.2")  # five images are held out
    assert result.err == "confidences are not calibrated: prgkit export does so, with 20 held-out images or more\n"
    (before,) = result.json["predict"]
    calibrate(CALIBRATED)
    result = prgkit(picture, "0.2")
    assert result.err == (
        "of the answers at 0.2 or above, at least 87.1 % were the teacher's on held-out images (39 of 40; lower 95 % "
        "bound); 100.0 % of the 40 images have one\n"
    )
    (after,) = result.json["predict"]
    cooled = {name: probability**0.25 for name, probability in before["top"]}  # softmax(logits / 4)
    for name, probability in after["top"]:
        assert probability == pytest.approx(cooled[name] / sum(cooled.values()), abs=1e-5)
    assert prgkit("predict photos/00.png").err == ""


def test_what_shows_none_of_the_classes_is_rejected_where_that_is_asked_for(
    prgkit: PrgkitCommand, project_copy: Path
) -> None:
    line = "predict photos/00.png --top-k 1"
    calibrate({**CALIBRATED, "reject_below": 1e9})
    assert prgkit(f"{line} --reject-unknown").out.startswith("photos/00.png: none of the classes  (")
    (answer,) = prgkit(f"{line} --reject-unknown --json").json["predict"]
    assert (answer["class"], answer["abstained"], answer["rejected"]) == (None, True, True)
    (answer,) = prgkit(f"{line} --json").json["predict"]
    assert (answer["class"], answer["abstained"], answer["rejected"]) == (answer["top"][0][0], False, False)
    calibrate(CALIBRATED)
    assert not prgkit(f"{line} --reject-unknown --json").json["predict"][0]["rejected"]
    calibrate(None)
    result = prgkit(f"{line} --reject-unknown")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith(
        "Error: pictures of none of the classes cannot be told: confidences are not calibrated: prgkit export does so"
    )


def test_predict_says_what_it_answers_as_it_goes(project_copy: Path) -> None:
    from prgkit.evaluate.predict import Model

    with Model(Path("runs/tiny/bundle")) as model:
        answers = model.stream([Path("photos/00.png"), Path("photos")])
        assert next(answers).image == "photos/00.png"
        answers.close()


def test_a_picture_that_comes_over_time_waits_for_no_batch(project_copy: Path) -> None:
    from prgkit.evaluate.pictures import NamedPicture
    from prgkit.evaluate.predict import Model

    taken = []

    def coming() -> Iterator[NamedPicture]:
        for number in range(4):
            taken.append(number)
            yield NamedPicture(str(number), lambda: Image.open("photos/00.png").convert("RGB"), live=True)

    with Model(Path("runs/tiny/bundle")) as model:
        for number, answer in enumerate(model.stream(coming(), batch_size=3)):
            assert (answer.image, taken) == (str(number), list(range(number + 1)))
    assert len(taken) == 4


def test_what_is_no_number_is_no_answer(project_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prgkit.evaluate.predict import Model

    with Model(Path("runs/tiny/bundle")) as model:
        run = model._runner.run
        monkeypatch.setattr(model._runner, "run", lambda pixels: run(pixels) * np.array([1, 1, np.nan], np.float32))
        (answer,) = model.predict("photos/00.png", min_confidence=0.5)
    assert (answer.label, answer.abstained, str(answer.error).split("\n")[0]) == (
        *(None, False, "onnx-fp32 answers with what is no number"),
    )


def test_an_opened_picture_that_is_cut_short_is_an_answer_of_its_own(project_copy: Path) -> None:
    from prgkit.evaluate.predict import Model

    Image.effect_noise((64, 64), 90).save("cut.png")
    Path("cut.png").write_bytes(Path("cut.png").read_bytes()[:-900])
    with Model(Path("runs/tiny/bundle")) as model:
        cut, whole = model.predict([Image.open("cut.png"), "photos/00.png"])
    assert str(cut.error).startswith("cut.png cannot be read: ")
    assert whole.label is not None


@pytest.mark.parametrize("batch_size", [1, 3])
def test_of_many_pictures_each_core_answers_its_own(
    project_copy: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    from prgkit.evaluate import predict
    from prgkit.export.runtimes.base import Setup

    opened, together, open_file = [], [Path(f"photos/{number:02}.png") for number in range(4)], Setup.open
    cut = Path("photos/cut.png")
    cut.write_bytes(together[0].read_bytes()[:60])
    many = [*(5 * together), cut, *(5 * together)]

    def noted(setup: Setup) -> object:
        opened.append(setup.threads)
        return open_file(setup)

    monkeypatch.setattr(Setup, "open", noted)
    monkeypatch.setattr(predict, "available_cores", lambda: 3)
    with predict.Model(Path("runs/tiny/bundle")) as model:
        alone = model.predict(together, batch_size=batch_size)
        assert opened == [None]  # few: all cores work on each
        for _ in range(2):
            answers = model.predict(many, batch_size=batch_size)
            assert answers[20].error is not None
            assert [answer.image for answer in answers] == [str(path) for path in many]
            for answer, expected in zip([*answers[:20], *answers[21:]], 10 * alone, strict=True):
                assert answer.label == expected.label
                assert answer.probability == pytest.approx(expected.probability, abs=1e-5)
        assert 2 <= len(opened) <= 4
        assert opened[1:] == [1] * (len(opened) - 1)
        taken = []
        going = model.stream((taken.append(path) or path for path in many), batch_size=batch_size)
        next(going)
        going.close()
    assert len(taken) == batch_size + {1: 8, 3: 12}[batch_size]  # a batch for each core, and one beside them


def test_answers_are_kept_and_gone_on_with(prgkit: PrgkitCommand, project_copy: Path) -> None:
    printed = prgkit("predict photos --json").json["predict"]
    Path("photos/cut.png").write_bytes(Path("photos/01.png").read_bytes()[:60])
    result = prgkit("predict photos/00.png photos/0[1-4].png photos/cut.png --out new/a.jsonl")
    assert (result.code, result.out) == (1, "new/a.jsonl: 6 pictures answered, 1 of them unreadable\n")
    lines = Path("new/a.jsonl").read_bytes().splitlines(keepends=True)
    assert [json.loads(line) for line in lines[:5]] == printed[:5]
    assert json.loads(lines[5])["error"]["what"] == "photos/cut.png cannot be read: truncated"
    again = prgkit("predict photos/0[0-4].png photos/cut.png --out new/a.jsonl")
    assert (again.code, again.out) == (1, "new/a.jsonl: 1 pictures answered, 1 of them unreadable\n")
    assert Path("new/a.jsonl").read_bytes().splitlines(keepends=True) == lines
    Path("new/a.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:9])  # what a kill leaves
    Path("photos/cut.png").unlink()
    assert prgkit("predict photos --out new/a.jsonl").out == "new/a.jsonl: 21 pictures answered, 0 of them unreadable\n"
    assert (
        sorted(map(json.loads, Path("new/a.jsonl").read_text().splitlines()), key=lambda row: row["image"]) == printed
    )
    assert prgkit("predict photos/00.png photos/01.png --out a.csv").code == 0
    header, first, _ = Path("a.csv").read_text().splitlines()
    assert header == "image,class,probability,second_class,second_probability,abstained,rejected,error"
    (name, probability), (second, less), *_ = printed[0]["top"]
    assert first == f"photos/00.png,{name},{probability},{second},{less},false,false,"
    Path("a.csv").write_text("x,y\n")
    refused = prgkit("predict photos --out a.csv")
    assert refused.err == (
        "Error: the file holds something else than answers\n  where: a.csv\n  fix: name another file, or delete this one\n"
    )
    assert prgkit("predict photos --out tiny.yaml").err.startswith(
        "Error: answers go to a .csv, a .jsonl, or a folder of pictures\n  where: tiny.yaml\n"
    )


def test_answers_are_written_on_pictures(prgkit: PrgkitCommand, project_copy: Path) -> None:
    assert prgkit("predict photos/00.png ../project/photos/01.png --out seen").code == 0
    assert sorted(str(path) for path in Path("seen").rglob("*.jpg")) == [
        "seen/_/project/photos/01.png.jpg", "seen/photos/00.png.jpg",
    ]  # fmt: skip
    before = Image.open("photos/00.png").convert("RGB")
    page = Image.open("seen/photos/00.png.jpg")
    assert page.width == before.width
    assert page.height > before.height
    assert np.asarray(page)[before.height + 2 :].max() > 150  # there is something bright on the bar
    assert prgkit("predict photos/00.png --out seen").out == "seen: 0 pictures answered, 0 of them unreadable\n"


def test_heat_maps_are_drawn_where_the_bundle_has_them(prgkit: PrgkitCommand, project_copy: Path) -> None:
    refused = prgkit("predict photos/00.png --explain maps")
    assert refused.err == (
        "Error: the bundle holds no file that says where a class was found\n  where: runs/tiny/bundle\n"
        "  fix: export again with heat maps: prgkit export --explain\n"
    )
    assert not Path("maps").exists()
    assert "its last feature map has one place" in prgkit("export --explain").err
    exported = prgkit("distill tiny.yaml --set student.image_size=64 --run runs/large export --explain")
    assert "model.explain.onnx" in exported.out
    result = prgkit("predict photos/00.png photos/01.png --explain maps --json")
    assert result.code == 0
    assert sorted(path.name for path in Path("maps/photos").iterdir()) == ["00.png.jpg", "01.png.jpg"]
    readme = Path("runs/large/bundle/README.md").read_text()
    assert "`model.explain.onnx` has a second output, `evidence` [batch, 3, h, w] float32" in readme
    rows = prgkit("bench --seconds 0.1 --batches 1 --json").json["bench"]["rows"]
    assert "onnx-explain" not in {row["artifact"] for row in rows}
    (report,) = Path("runs/large/bench").rglob("report.html")
    assert 'alt="where the student found its answer" src="data:image/jpeg;base64,' in report.read_text()
    sheet = Path(prgkit("audit -n 6 --json").json["audit"]["sheet"])
    assert sheet.read_text().count('<img alt="where the student finds ') == 6
    with open("runs/large/student.safetensors", "ab") as weights:
        weights.write(b" ")  # another student than the bundle's
    assert "the sheet has no heat maps: the bundle is stale" in prgkit("audit").err
    assert "where the student finds" not in sheet.read_text()


def test_paths_on_stdin(prgkit: PrgkitCommand, project_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("photos/01.png\n\nphotos/00.png\n"))
    assert [row["image"] for row in prgkit("predict - --json").json["predict"]] == ["photos/01.png", "photos/00.png"]
    assert prgkit("predict").err.endswith("Error: Missing argument 'IMAGE...'.\n")


def test_a_folder_is_watched_until_ctrl_c(project_copy: Path) -> None:
    Path("drop").mkdir()
    shutil.copy("photos/00.png", "drop/a.png")
    command = [sys.executable, "-m", "prgkit", "predict", "--watch", "drop", "--out", "seen.jsonl"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert told("seen.jsonl", 1) == ["drop/a.png"]
            Path("drop/notes.txt").write_text("x")
            shutil.copy("photos/01.png", "drop/b.png")
            assert told("seen.jsonl", 2) == ["drop/a.png", "drop/b.png"]
        finally:
            process.terminate()  # as Ctrl-C does, which a shell's background jobs ignore
            out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "seen.jsonl: 2 pictures answered, 0 of them unreadable\n", "")


def told(file: str, count: int) -> list[str]:
    """Wait until so many answers are in a file, and return the names of their pictures."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        lines = Path(file).read_text().splitlines() if Path(file).exists() else []
        if len(lines) >= count:
            return [json.loads(line)["image"] for line in lines]
        time.sleep(0.1)
    raise AssertionError(f"{file} has no {count} answers")


def test_the_frames_of_a_video(prgkit: PrgkitCommand, project_copy: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    writer = cv2.VideoWriter("cam.avi", cv2.VideoWriter_fourcc(*"MJPG"), 10.0, (64, 64))
    pictures = [np.asarray(Image.open(f"photos/{n:02}.png").convert("RGB").resize((64, 64))) for n in range(20)]
    for picture in pictures:
        writer.write(np.ascontiguousarray(picture[..., ::-1]))
    writer.release()
    answers = prgkit("predict cam.avi --json").json["predict"]
    assert [row["image"] for row in answers] == [f"cam.avi/{place / 10:08.3f}s" for place in range(20)]
    for place in (0, 7):
        Image.fromarray(pictures[place]).save("frame.png")
        (alone,) = prgkit("predict frame.png --json").json["predict"]
        assert dict(answers[place]["top"]) == pytest.approx(dict(alone["top"]), abs=0.05)  # JPEG's loss, and no BGR
    few = prgkit("predict cam.avi --fps 4 --json").json["predict"]
    assert [row["image"] for row in few] == [f"cam.avi/{place / 10:08.3f}s" for place in (0, 3, 5, 8, 10, 13, 15, 18)]
    Path("not.mp4").write_bytes(b"x")
    assert "Error: video not.mp4 cannot be opened\n  fix: " in prgkit("predict not.mp4").err


def test_a_long_video_is_answered_as_it_is_read(
    prgkit: PrgkitCommand, project_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for a video of 60 frames that sees at its last one how many answers are in the file."""
    written = []

    def frames(*_: Any) -> Any:
        for place in range(60):
            yield f"long.mp4/{place}", lambda: Image.new("RGB", (8, 8))
        written.append(len(Path("a.jsonl").read_text().splitlines()))

    monkeypatch.setattr("prgkit.evaluate.pictures.frames", frames)
    result = prgkit("predict long.mp4 --out a.jsonl")
    assert result.out == "a.jsonl: 60 pictures answered, 0 of them unreadable\n"
    assert 60 > written[0] >= 10
    assert len(prgkit("predict long.mp4 --json").json["predict"]) == 60


def test_answers_that_nobody_asked_for_as_json_are_not_held() -> None:
    from prgkit.cli.naming import AskedPictures, tell_each
    from prgkit.cli.state import Session
    from prgkit.errors import ImagesError
    from prgkit.evaluate.predict import Prediction

    told: list[str] = []
    bad = ImagesError("cut.png cannot be read")
    answers = [Prediction("a.png", "one"), Prediction("cut.png", error=bad)]
    terminal: Any = SimpleNamespace(note=told.append)
    for as_json, held in ((False, []), (True, [answer.to_json() for answer in answers])):
        session = Session(terminal, as_json=as_json)
        asked = AskedPictures(("0",), None, None)
        found = tell_each(session, asked, iter(answers), lambda answer: told.append(answer.image))
        assert (found.count, found.failed, found.answers) == (2, 1, held)
        assert "1 of 2 pictures have no answer" in str(session.failure)
    assert told == 2 * ["a.png", "cut.png", "cut.png cannot be read"]


def test_a_gallery_is_searched_picture_by_picture_until_ctrl_c(
    prgkit: PrgkitCommand, project_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prgkit.errors import ImagesError
    from prgkit.evaluate.search import Neighbours

    asked: list[Any] = []

    def search(*_: Any, **how: Any) -> Any:
        asked.append((how["top_k"], how["fps"], how["live"]))
        yield Neighbours("a.png", "onnx-embedding-fp32", (("b.png", 0.5), ("c.png", 0.25)))
        yield Neighbours("cut.png", "onnx-embedding-fp32", error=ImagesError("cut.png cannot be read"))
        raise KeyboardInterrupt

    monkeypatch.setattr("prgkit.evaluate.search.search", search)
    result = prgkit("predict cam.mp4 --watch photos --gallery g.npz --top-k 2 --fps 3")
    assert (result.code, result.out) == (1, "a.png: b.png 0.500, c.png 0.250\n")
    assert result.err.endswith("Error: 1 of 2 pictures have no answer; the others are answered\n")
    found = prgkit("predict 0 --gallery g.npz --json").json["predict"]
    assert [answer.get("nearest") for answer in found] == [[["b.png", 0.5], ["c.png", 0.25]], None]
    assert found[1]["error"]["what"] == "cut.png cannot be read"
    assert asked == [(2, 3.0, True), (3, None, True)]


def test_a_camera_gives_its_newest_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a camera that gives a frame every 5 ms, to one who takes 50 ms for each."""
    from prgkit.evaluate import live

    camera = plug_in_a_camera(monkeypatch)
    notes: list[str] = []
    seen, late = [], []
    for _, read in live.frames("0", None, notes.append):
        seen.append(int(np.asarray(read())[0, 0, 0]))
        late.append(camera.count - seen[-1])
        time.sleep(0.05)
    assert seen == sorted(set(seen))
    assert len(seen) < 30
    assert late[0] <= late[-1] + 5  # it does not fall behind
    assert notes == [f"0: {len(seen)} of 60 frames answered, the others skipped so that no answer is late"]


def test_frames_of_two_sessions_have_two_names_and_none_is_skipped(
    prgkit: PrgkitCommand, project_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []
    for _ in range(2):
        camera = plug_in_a_camera(monkeypatch)
        monkeypatch.setattr("prgkit.evaluate.answers.AnswerLines.__contains__", lambda *_: True)
        before = datetime.now(timezone.utc).replace(microsecond=0)
        assert " pictures answered, 0 of them unreadable\n" in prgkit("predict 0 --fps 10 --out seen.jsonl").out
        assert camera.count == 61
        lines = [json.loads(line)["image"] for line in Path("seen.jsonl").read_text().splitlines()]
        assert len(lines) > len(names)
        for name in lines[len(names) :]:
            came = datetime.strptime(name, "0/%Y%m%dT%H%M%S.%fZ").replace(tzinfo=timezone.utc)
            assert before <= came <= datetime.now(timezone.utc)
        names = lines
    assert len(set(names)) == len(names)


def plug_in_a_camera(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a stand-in for a camera that gives 60 frames, one every 5 ms, and counts how many it was asked for."""

    class Camera:
        count = 0

        def __init__(self, number: int) -> None:
            assert number == 0

        def isOpened(self) -> bool:  # noqa: N802 - OpenCV's name
            return True

        def read(self) -> tuple[bool, Any]:
            time.sleep(0.005)
            Camera.count += 1
            return Camera.count <= 60, np.full((2, 2, 3), Camera.count, np.uint8)

        def release(self) -> None:
            pass

    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace(VideoCapture=Camera))
    return Camera


def test_the_range_of_deep_greys_travels(prgkit: PrgkitCommand, project_copy: Path) -> None:
    """Twelve bits in a file of 16: found from the images, said, noted, and used on the device."""
    grain = np.random.default_rng(0)
    Path("deep").mkdir()
    for number in range(12):
        values = grain.integers(300, 3000 + 80 * number, (32, 32), dtype=np.uint16)
        Image.fromarray(values).save(f"deep/{number:02}.png")
    Path("deep/notes.txt").write_text("x")
    result = prgkit("distill tiny.yaml --set data.images=deep --run runs/deep export")
    assert result.code == 0
    assert "deep: passed over 1 file that is no picture: 1 .txt\n" in result.err
    assert "12 images are deep grey; the values of the 12 looked at go from 300 to 3,87" in result.err
    assert "so 0 to 4,095 (12 bits) is black to white" in result.err
    assert "nearly black" not in result.err
    images = json.loads(Path("runs/deep/card.json").read_text())["images"]
    assert images["grey_range"] == [0.0, 4095.0]
    assert images["left_out"] == "passed over 1 file that is no picture: 1 .txt"
    manifest = json.loads(Path("runs/deep/bundle/manifest.json").read_text())
    assert manifest["preprocessing"]["grey_range"] == [0.0, 4095.0]
    Image.fromarray(np.full((32, 32), 900, dtype=np.uint16)).save("dark.png")  # by itself it would be 10 bits
    Image.fromarray(np.full((32, 32), round(900 * 255 / 4095), dtype=np.uint8)).save("same.png")
    dark, same = prgkit("predict dark.png same.png --run runs/deep --json").json["predict"]
    assert dark["top"] == same["top"]
    golden = np.asarray(Image.open("runs/deep/bundle/golden/00.png"))
    assert golden.max() > 150

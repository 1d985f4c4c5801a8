"""The command line: how a line is split, what is printed where, and that every mistake is told with its fix."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import pytest
from PIL import Image

from prgkit.cli.chain import split_at_commands
from prgkit.cli.main import cli, main
from prgkit.config.objectives import OBJECTIVES
from prgkit.config.recipe import shipped_recipes
from prgkit.errors import PrgkitError

HELP = """\
Usage: prgkit [OPTIONS] COMMAND [ARGS]...

  Distil CLIP into a small classifier for your device, without a label.

  Commands chain; each one works on what the one before made:
    prgkit distill demo export --trt bench
    prgkit distill --images photos/ --classes names.txt export bench

Options:
  --version   Show the version and exit.
  -h, --help  Show this message and exit.

Commands:
  distill        Teach a student from unlabelled images.
  export         Turn the student into ONNX and TensorRT.
  relabel        Give an open-vocabulary bundle other classes.
  bench          Measure every artifact on this machine.
  predict        Name what is in an image.
  targets        Let the teacher see the images, and no more.
  adapt-teacher  Fit the teacher to your images by a few labels.
  audit          Tick some of the teacher's answers yourself.
  compare        Set objectives and students against each other.
  recipes        List the recipes.
  doctor         Say what can run on this machine.
"""
COMMANDS = (
    *("distill", "export", "relabel", "bench", "predict", "targets", "adapt-teacher", "audit", "recipes", "doctor"),
)

# A recipe that trains in a second: the demo's teacher, timm's smallest student, 24 pictures.
TINY = """\
# Distil a few pictures, to try the command line.
data: {images: photos, classes: [one, two, three], prompts: ["a {}", "the digit {}"], held_out: 0.2}
teacher: {model: "demo:digits", batch_size: 8}
views: {count: 1, flip: false}
student: {model: test_efficientnet, image_size: 32}
objective: {name: ce}
training: {epochs: 1, batch_size: 8, workers: 0, precision: fp32}
"""


@dataclass(frozen=True)
class Said:
    """What a call of the command line left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Call = Callable[..., Said]


@pytest.fixture
def prgkit(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Call the command line in this process; an error that is a bug comes out as itself."""
    monkeypatch.setenv("COLUMNS", "80")

    def call(line: str = "", *more: str) -> Said:
        arguments = [*shlex.split(line), *more]
        monkeypatch.setattr(sys, "argv", ["prgkit", *arguments])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        said = capfd.readouterr()
        assert "Traceback" not in said.err
        return Said(code, said.out, said.err)

    return call


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Replace the work of every command by a note of what it was called with."""
    made: list[tuple[str, dict[str, Any]]] = []

    def noting(name: str) -> Callable[..., Any]:
        def note(**given: Any) -> dict[str, Any]:
            made.append((name, given))
            print("a library that prints")
            return {"did": name}

        return note

    for name, command in cli.commands.items():
        monkeypatch.setattr(command, "callback", noting(name))
    monkeypatch.setattr("prgkit.export.runtimes.gpu.choose_backend", lambda name=None: SimpleNamespace(name="none"))
    monkeypatch.setattr("prgkit.export.runtimes.gpu.choose_targets", lambda backend, asked: asked)
    return made


def photos(folder: Path, count: int = 24) -> Path:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures, a recipe, a finished run and its bundle; tests copy it."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("project")
    photos(folder / "photos")
    (folder / "tiny.yaml").write_text(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["prgkit", "distill", "tiny.yaml", "export"])
        main()
    return folder


@pytest.fixture
def standing(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in a copy of the project."""
    shutil.copytree(project, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


# What the line means.


def test_help_is_one_screen(prgkit: Call) -> None:
    assert prgkit("--help") == Said(0, HELP, "")
    assert prgkit("-h").out == HELP
    assert prgkit().code == 2
    assert prgkit("--version").out.startswith("prgkit, version ")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_help_in_80_columns(prgkit: Call, name: str) -> None:
    said = prgkit(name, "--help")
    assert said.code == 0
    assert said.out.startswith(f"Usage: prgkit {name} ")
    assert max(map(len, said.out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (
            "distill cifar100 --set a=1 export --trt bench",
            ["distill cifar100 --set a=1", "export --trt", "bench"],
        ),
        ("distill --images d --classes c export --trt", ["distill --images d --classes c", "export --trt"]),
        ("predict a.jpg --json", ["predict a.jpg --json"]),
        ("distill --images ./export bench", ["distill --images ./export", "bench"]),
        ("--help", []),
    ],
)
def test_a_line_is_split_at_command_names(line: str, parts: list[str]) -> None:
    head, split = split_at_commands(line.split(), COMMANDS)
    assert [" ".join(part) for part in split] == parts
    assert head == ([] if parts else ["--help"])


def test_a_chain_runs_in_order_with_options_in_any_order(prgkit: Call, calls: list[Any]) -> None:
    assert prgkit("distill cifar100 --set a=1 --set b.c=d export --trt bench").code == 0
    assert [name for name, _ in calls] == ["distill", "export", "bench"]
    assert calls[0][1]["recipe"] == "cifar100"
    assert calls[0][1]["overrides"] == ("a=1", "b.c=d")
    assert calls[1][1]["trt"]
    assert calls[2][1]["batches"] == [1, 8, 32]
    calls.clear()
    assert prgkit("distill --set a=1 cifar100 --run here export").code == 0
    assert (calls[0][1]["recipe"], calls[0][1]["folder"]) == ("cifar100", Path("here"))
    calls.clear()
    assert prgkit("export --open-vocabulary relabel --classes names.txt bench").code == 0
    assert [name for name, _ in calls] == ["export", "relabel", "bench"]
    assert prgkit("export --open-vocabulary input --zip").code == 0
    assert [given["open_vocabulary"] for name, given in calls if name == "export"] == ["initializer", "input"]
    calls.clear()
    assert prgkit("export --sm 8.6,89 --batch 1,8,32").code == 0
    assert calls[0][1] == {"fp16": False, "int8": False, "trt": False, "backend": None, "batch": (1, 8, 32), "sm": ("SM86", "SM89"),
                           "open_vocabulary": None, "float_input": False, "evaluation_images": None, "packs": False,
                           "folder": None, "as_json": False}  # fmt: skip
    calls.clear()
    assert prgkit("distill --images d --classes c export --trt").code == 0
    assert (calls[0][1]["recipe"], calls[0][1]["images"], calls[0][1]["classes"]) == (None, "d", "c")
    assert calls[1][0] == "export"
    calls.clear()
    assert prgkit("predict ./export a.jpg --top-k 2 b.jpg").code == 0
    assert calls == [
        ("predict", {"images": (Path("export"), Path("a.jpg"), Path("b.jpg")), "top_k": 2, "min_confidence": 0.0,
                     "folder": None, "as_json": False})
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("distil demo", "No such command 'distil'. Did you mean 'distill'?"),
        ("distill demo export --trtt", "No such option '--trtt'. Did you mean '--trt'?"),
        ("distill demo bench --batches 1,x", "write batch sizes as 1,8,32, not '1,x'."),
        ("distill demo export --batch 4,1,8", "write the least, the usual and the largest as 1,1,32, not '4,1,8'."),
        ("distill demo export --sm ada", "write compute capabilities as 86,89, not 'ada'."),
        ("distill demo bench --seconds 0", "0.0 is not in the range x>=0.1."),
        ("distill demo bench --tolerance 3%", "--tolerance is for --baseline, and there is none."),
        ("bench --baseline . --tolerance 5", "write a tolerance as 5% or 0.05, not '5'."),
        ("bench --soak nan", "write minutes above 0 and up to 1440, a day, as 30; not 'nan'."),
        ("bench --soak 0", "write minutes above 0 and up to 1440, a day, as 30; not '0'."),
        ("bench --soak -1", "write minutes above 0 and up to 1440, a day, as 30; not '-1'."),
        ("bench --soak 2h", "write minutes above 0 and up to 1440, a day, as 30; not '2h'."),
        ("bench --sweep-threads 1,x", "write numbers of threads as 1,2,4, not '1,x'."),
        ("bench more", "Got unexpected extra argument (more); --merge compares reports."),
        ("bench --merge a.json", "--merge compares two reports or more: bench --merge a.json b.json."),
        ("bench --merge a b --baseline .", "--merge measures nothing that could be held against --baseline."),
        ("distill demo bench --baseline no.json", "Invalid value for '--baseline': Path 'no.json' does not exist."),
        ("distill demo more", "Got unexpected extra argument (more)"),
        ("predict", "Missing argument 'IMAGE...'."),
        ("distill --images bench --classes c", "Option '--images' requires an argument: 'bench' is read as a command; "
                                               "a file of that name is written ./bench."),
        ("predict a bench predict b", "'predict' stands twice; a file that is named like a command is written ./predict."),
        ("distill demo export --run x", "A chain works on one run: give --run to its first command."),
        ("distill demo --run x export --run y", "A chain works on one run: give --run to its first command."),
    ],
)  # fmt: skip
def test_a_wrong_line_is_told_before_anything_runs(prgkit: Call, calls: list[Any], line: str, told: str) -> None:
    said = prgkit(line)
    assert said.code == 2
    assert said.out == ""
    assert said.err.startswith("Usage: prgkit ")
    assert said.err.rstrip().endswith(f"Error: {told}") or said.err.rstrip().endswith(told)
    assert calls == []


def test_the_same_run_may_be_named_again(prgkit: Call, calls: list[Any]) -> None:
    assert prgkit("distill demo --run x export --run x bench").code == 0
    assert len(calls) == 3


def test_a_recipe_or_both_images_and_classes(prgkit: Call, place: Path) -> None:
    said = prgkit("distill", "--images", "photos")
    assert (said.code, said.out) == (2, "")
    assert said.err.endswith("Error: Name a RECIPE, or give both --images and --classes.\n")


# What is printed where.


def test_json_is_one_document_keyed_by_command(prgkit: Call, calls: list[Any]) -> None:
    said = prgkit("distill demo export bench --json")
    assert said.json == {name: {"did": name} for name in ("distill", "export", "bench")}
    assert said.err.count("a library that prints") == 3


def test_recipes(prgkit: Call) -> None:
    listed = prgkit("recipes").out
    assert [line.split()[0] for line in listed.splitlines() if line[2] != " "] == list(shipped_recipes())
    assert "cifar100      Distil CLIP ViT-L/14 into RepViT-M1.1 on CIFAR-100.\n" in listed
    page = shipped_recipes()["custom"].read_text()
    assert prgkit("recipes", "--show", "custom").out == page
    assert prgkit("recipes", "--show", "custom", "--json").json == {"recipes": {"custom": page}}
    objectives = prgkit("recipes", "--objectives").out
    assert [line.split()[0] for line in objectives.splitlines() if line[2] != " "] == list(OBJECTIVES)
    assert "  ce        Cross-entropy with the teacher's pseudo-labels.\n" in objectives
    assert prgkit("recipes", "--show", "custum").err.startswith(
        "Error: unknown recipe 'custum'; did you mean 'custom'?\n"
    )


NO_TORCH = SimpleNamespace(returncode=1, stdout="", stderr="")  # what a broken torch does; asking takes seconds


def test_doctor_is_aligned_and_tells_extras_with_their_brackets(prgkit: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    import prgkit.cli.doctor as doctor

    versions = dict.fromkeys(doctor.PACKAGES) | {"onnxruntime": "1.20", "onnxruntime-gpu": "1.20"}
    monkeypatch.setattr(doctor, "version_of", versions.get)
    said = prgkit("doctor")
    assert (said.code, said.err) == (0, "")
    lines = said.out.splitlines()
    assert all(line == line.rstrip() and (len(line) <= 80 or line.startswith("clash")) for line in lines)
    rows = lines[lines.index("backends") + 1 :]
    assert any(re.fullmatch(r"  no   torch \(distill, export\) +pip install 'prgkit\[distill\]'", row) for row in rows)
    assert any(line.startswith("  yes  onnxruntime CPU") for line in rows)
    assert lines[-1].startswith("clash: onnxruntime is installed over onnxruntime-gpu")
    assert "  torch                 not installed" in lines
    document = prgkit("doctor", "--json").json["doctor"]
    assert set(document) == {"versions", "machine", "backends", "clashes"}
    assert all(set(row) == {"name", "runs", "detail"} for row in document["backends"])


def test_doctor_tells_building_engines_from_running_them(prgkit: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from prgkit.export.runtimes.gpu import Backend, Gpu

    found = {"tensorrt": Backend("tensorrt", None, "not installed; pip"), "tensorrt_rtx": Backend("rtx", "1.7", None)}
    monkeypatch.setattr("prgkit.export.runtimes.tensorrt.probe_backend", found.get)
    monkeypatch.setattr("prgkit.export.runtimes.pytorch.subprocess.run", lambda *_, **__: NO_TORCH)

    def engines() -> dict[str, str]:
        rows = prgkit("doctor", "--json").json["doctor"]["backends"]
        return {row["name"]: row["detail"] for row in rows if "engines" in row["name"]}

    monkeypatch.setattr("prgkit.export.runtimes.tensorrt.find_gpu", lambda: None)
    assert engines() == {
        "tensorrt: build engines": "not installed; pip",
        "tensorrt: run engines": "not installed; pip",
        "tensorrt_rtx: build engines": "",
        "tensorrt_rtx: run engines": "it needs an NVIDIA GPU and its driver",
    }
    monkeypatch.setattr("prgkit.export.runtimes.tensorrt.find_gpu", lambda: Gpu("some GPU", "SM89"))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    assert engines()["tensorrt_rtx: run engines"].startswith("cuda-python is not installed: pip install cuda-python")


def test_doctor_survives_a_broken_onnxruntime(prgkit: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr("prgkit.export.runtimes.pytorch.subprocess.run", lambda *_, **__: NO_TORCH)
    said = prgkit("doctor")
    assert said.code == 0
    assert "no   onnxruntime " in said.out


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("distill demo --run a --run=b", "--run is given 2 times, as a and as b; give it once."),
        ("distill demo --run a --run a", "--run is given 2 times, as a and as a; give it once."),
        ("bench --seconds 1 --seconds 2 --seconds 3", "--seconds is given 3 times, as 1 and as 2 and as 3; give it once."),
        ("audit -n 5 --count 6", "--count is given 2 times, as 5 and as 6; give it once."),
        ("export --open-vocabulary --int8 --open-vocabulary input",
         "--open-vocabulary is given 2 times, as nothing and as input; give it once."),
        ("targets demo --set a.b=1 --set a.c=1 --set a.b=2=3",
         "--set a.b is given 2 times, as 1 and as 2=3; give it once."),
        ("compare demo --sweep w=0,1 --sweep w=2", "--sweep w is given 2 times, as 0,1 and as 2; give it once."),
    ],
)  # fmt: skip
def test_what_has_one_value_is_given_once(prgkit: Call, calls: list[Any], line: str, told: str) -> None:
    said = prgkit(line)
    assert (said.code, calls) == (2, [])
    assert said.err.endswith(f"Error: {told}\n")


def test_flags_and_lists_may_be_given_often(prgkit: Call, calls: list[Any]) -> None:
    assert prgkit("export --fp16 --fp16 --run x bench a.json --merge b.json --merge").code == 0
    assert prgkit("distill demo --set a=1 --set b=1").code == 0
    assert [name for name, _ in calls] == ["export", "bench", "distill"]


def test_a_terminal_that_is_not_utf_8_loses_nothing_and_ends_nothing(
    prgkit: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = {"käse – 3 × 2 ± 1 …": "5 µs → 日\udce9 ┃━"}
    monkeypatch.setattr(
        "prgkit.config.recipe.shipped_recipes", lambda: {name: Path(text) for name, text in lines.items()}
    )
    monkeypatch.setattr("prgkit.config.recipe.summary_line", str)
    said = {}
    for encoding in ("ascii", "latin-1", "cp1252"):
        for option in ("", "--json"):
            stream = io.TextIOWrapper(io.BytesIO(), encoding)
            monkeypatch.setattr(sys, "stdout", stream)
            assert prgkit(f"recipes {option}").code == 0
            stream.flush()
            said[encoding + option] = stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert said["ascii"] == "  k\\xe4se - 3 x 2 +- 1 ...  5 us -> \\u65e5\\udce9 |-\n"
    assert said["latin-1"] == "  käse - 3 × 2 ± 1 ...  5 µs -> \\u65e5\\udce9 |-\n"
    assert said["cp1252"] == "  käse – 3 × 2 ± 1 …  5 µs -> \\u65e5\\udce9 |-\n"
    assert all(json.loads(said[f"{encoding}--json"]) == {"recipes": lines} for encoding in ("ascii", "latin-1"))


@pytest.mark.parametrize("line", ["recipes", "recipes --json", "recipes --show demo"])
def test_a_reader_that_has_seen_enough_is_no_error(place: Path, line: str) -> None:
    ends, writes = os.pipe()
    os.close(ends)
    command = [sys.executable, "-m", "prgkit", *line.split()]
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writes)
    assert (done.returncode, done.stderr) == (1, "")


def test_without_a_home_the_temporary_folder_stands_for_it(prgkit: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_: int) -> None:
        raise KeyError

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert prgkit("recipes").code == 0
    assert os.environ["HOME"] == tempfile.gettempdir()
    monkeypatch.delenv("HOME")
    assert prgkit("predict ~/x.png --run nowhere").err.startswith("Error: there is no such run folder\n")


# How a run ends.


def ending(error: BaseException) -> Callable[..., Any]:
    def raises(**_: Any) -> None:
        raise error

    return raises


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (PrgkitError("it is wrong", where="here", fix="do this"), 1, "Error: it is wrong\n  where: here\n  fix: do this\n"),
        (KeyboardInterrupt(), 130, "\nStopped. What was finished is kept; the same command goes on from there.\n"),
        (OSError(errno.ENOSPC, "No space left on device", "x.bin"), 1,
         "Error: no disk space left\n  where: x.bin\n  fix: free some and run the same command again\n"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 1,
         "Error: no disk space left\n  fix: free some and run the same command again\n"),
        (OSError(errno.EROFS, "Read-only file system", "bench"), 1, "Error: read-only file system\n  where: bench\n"
         "  fix: make it accessible, or name another folder (--out, --run)\n"),
    ],
)  # fmt: skip
def test_exit_codes(prgkit: Call, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, told: str) -> None:
    monkeypatch.setattr(cli.commands["doctor"], "callback", ending(error))
    assert prgkit("doctor") == Said(code, "", told)


@pytest.mark.parametrize("bug", [ValueError("a bug"), OSError(errno.EACCES, "denied"), EOFError("a bug")])
def test_a_bug_keeps_its_traceback(prgkit: Call, monkeypatch: pytest.MonkeyPatch, bug: Exception) -> None:
    monkeypatch.setattr(cli.commands["doctor"], "callback", ending(bug))
    with pytest.raises(type(bug)) as caught:
        prgkit("doctor")
    assert caught.value is bug


def test_being_stopped_is_no_error(prgkit: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from prgkit.storage.run import Interrupted

    stopped = Interrupted("stopped in epoch 1 of 2; everything up to here is saved", fix="the same command goes on")
    monkeypatch.setattr(cli.commands["doctor"], "callback", ending(stopped))
    told = "Stopped in epoch 1 of 2; everything up to here is saved\n  fix: the same command goes on\n"
    assert prgkit("doctor") == Said(130, "", told)


# Which run is meant.


def test_distill_names_the_run_and_says_what_it_learned(prgkit: Call, standing: Path) -> None:
    said = prgkit("distill", "tiny.yaml")
    assert said.code == 0
    assert said.err == "runs/tiny is finished already\n"
    assert said.out.startswith("runs/tiny: test_efficientnet agrees with its teacher on ")
    assert "of the held-out images (epoch 1 of 1; 24 images; " in said.out


def test_a_student_that_is_not_square_goes_all_the_way(prgkit: Call, standing: Path) -> None:
    said = prgkit("distill tiny.yaml --run runs/tall --set student.image_size=[48,32] --json")
    assert said.code == 0, said.err
    said = prgkit("export --run runs/tall --float-input bench --run runs/tall --seconds 0.1 --json")
    assert said.code == 0, said.err
    manifest = said.json["export"]
    assert manifest["input"]["shape"] == ["batch", 48, 32, 3]
    assert (manifest["preprocessing"]["image_size"], manifest["student"]["image_size"]) == ([48, 32], [48, 32])
    assert {row["status"] for row in said.json["bench"]["rows"] if row["artifact"] != "onnx-fp16"} == {"measured"}
    bundle = standing / "runs/tall/bundle"
    read = (bundle / "README.md").read_text()
    assert "3 classes, 48x32 px" in read
    assert "optShapes=pixels:1x48x32x3" in read
    assert "{1, 48, 32, 3}" in read
    assert "shape [batch, 3, 48, 32]" in read or "[batch, 3, 48, 32] float32" in read
    picture = sorted((standing / "photos").iterdir())[0]
    answer = prgkit(f"predict {picture} --run runs/tall --json").json
    code = read.split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", code, str(picture)], cwd=bundle, capture_output=True, text=True)
    assert done.stdout.strip() in json.dumps(answer)
    assert done.stdout.strip()


def test_a_finished_run_goes_on_with_the_chain(prgkit: Call, standing: Path) -> None:
    said = prgkit("distill tiny.yaml --run runs/tiny export predict photos/00.png --json")
    assert said.code == 0
    document = said.json
    assert list(document) == ["distill", "export", "predict"]
    assert document["distill"]["run"] == "runs/tiny"
    assert document["export"]["bundle"] == "runs/tiny/bundle"
    assert [artifact["name"] for artifact in document["export"]["artifacts"]] == ["onnx-fp32"]
    assert document["predict"][0]["image"] == "photos/00.png"
    assert document["predict"][0]["class"] in ("one", "two", "three")
    assert "runs/tiny is finished already" in said.err


def test_parity_is_checked_on_distinct_images_and_their_number_is_said(prgkit: Call, standing: Path) -> None:
    said = prgkit("export", "--json")
    assert said.json["export"]["artifacts"][0]["parity"]["images"] == 24  # the few that travel, and those learned from
    assert "there are 24 images to compare the exports on; 256 would be better\n" in said.err
    assert said.json["export"]["run"]["quality"]["images"] == 24
    photos(standing / "judged/two", 30)  # 24 of them are those of photos/
    assert prgkit("distill tiny.yaml --run new --set data.evaluation=judged").code == 0
    (standing / "judged/two/29.png").unlink()
    manifest = prgkit("export", "--run", "new", "--json").json["export"]
    assert manifest["evaluation"]["images"] == 29
    assert manifest["artifacts"][0]["parity"]["images"] == 29
    shutil.rmtree(standing / "judged/two")
    photos(standing / "judged/two", 2)
    Image.new("RGB", (8, 8), "red").save(standing / "judged/two/red.png")
    manifest = prgkit("export", "--run", "new", "--json").json["export"]
    assert manifest["artifacts"][0]["parity"]["images"] == 25  # two are in both folders


def test_golden_images_are_of_moderate_size(standing: Path) -> None:
    from prgkit.data.index import index_images, open_images
    from prgkit.export.from_run import golden_pictures

    for number in range(3):
        Image.new("RGB", (1500 + number, 1300)).save(standing / f"photos/large{number}.png")
    images = index_images(open_images("photos"), workers=1)
    assert {picture.size for picture in golden_pictures(images, np.arange(len(images)))} == {(8, 8)}
    large = np.array([position for position in range(len(images)) if images.read(position).width > 8])
    assert sorted(picture.size for picture in golden_pictures(images, large)) == [
        (1182, 1024),
        (1182, 1024),
        (1183, 1024),
    ]
    picks = golden_pictures(images, np.array([large[0], *np.setdiff1d(np.arange(9), large)]))
    assert picks[-1].height == 1024  # after those that are as they were


def test_two_exports_of_one_run_do_not_meet(prgkit: Call, standing: Path) -> None:
    from prgkit.storage.locks import locked

    with locked(standing / "runs/tiny", "run"):
        said = prgkit("export")
    assert said.code == 1
    told = f"Error: another process ({os.getpid()}) is working on this run\n  where: runs/tiny\n"
    assert said.err.startswith(told)


def test_the_newest_run_is_found_and_distill_alone_goes_on_with_it(prgkit: Call, standing: Path) -> None:
    shutil.copytree("runs/tiny", "runs/older")
    (standing / "runs/tiny/card.json").touch()
    assert prgkit("distill", "--json").json["distill"]["run"] == "runs/tiny"
    (standing / "runs/older/card.json").touch()
    assert prgkit("distill", "--json").json["distill"]["run"] == "runs/older"
    said = prgkit("distill", "--run", "runs/tiny", "--set", "training.epochs=3")
    assert said.code == 1
    assert said.err == (
        "Error: this run was made from another recipe; it differs in training.epochs\n"
        "  where: runs/tiny\n"
        "  fix: start a new run with --run runs/tiny-2, or delete runs/tiny\n"
    )


def test_a_run_from_another_recipe_is_refused_by_the_keys_that_differ(prgkit: Call, standing: Path) -> None:
    (standing / "tiny.yaml").write_text(TINY.replace("{name: ce}", "{name: kd}").replace("count: 1", "count: 2"))
    said = prgkit("distill", "tiny.yaml")
    assert said.code == 1
    assert "it differs in objective.alpha, objective.name, objective.temperature, views.count\n" in said.err


def test_what_is_not_learned_from_may_change(prgkit: Call, standing: Path) -> None:
    assert prgkit("distill", "tiny.yaml", "--set", "export.batch=[1, 4, 4]").code == 0
    from prgkit.storage.run import Run

    assert Run(Path("runs/tiny")).recipe.export.batch == (1, 4, 4)


def test_a_run_and_its_bundle_can_be_stood_in(prgkit: Call, standing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = str(standing / "photos/00.png")
    expected = prgkit("predict", picture, "--json").json
    monkeypatch.chdir(standing / "runs/tiny")
    assert prgkit("predict", picture, "--json").json == expected
    assert prgkit("distill", "--json").json["distill"]["run"] == str(standing / "runs/tiny")
    said = prgkit("export")  # its images are named relative to where the run was started
    assert said.code == 0
    assert said.out.endswith(f"{standing}/runs/tiny/bundle is ready to travel\n")
    assert Path.cwd() == standing / "runs/tiny"
    monkeypatch.chdir(standing / "runs/tiny/bundle")
    assert prgkit("predict", picture, "--json").json == expected
    said = prgkit("export")
    assert said.code == 2
    assert "A bundle is exported already; export --trt builds its engines, export --zip packs it." in said.err
    for option, does in (("--fp16", "halves"), ("--int8", "quantises")):
        said = prgkit(f"export --zip {option}")
        assert (said.code, said.err.splitlines()[-1]) == (
            *(2, f"Error: {option} {does} where the student was trained; in a bundle it is for --trt."),
        )
    for option in ("--open-vocabulary", "--float-input", "--evaluation-images 5"):
        said = prgkit(f"export --zip {option}")
        assert (said.code, said.err.splitlines()[-1]) == (
            *(2, f"Error: {option.split()[0]} is for where the student was trained; this is a bundle."),
        )


def test_a_bundle_leaves_as_one_file(prgkit: Call, standing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prgkit.storage.run import Run

    (standing / "runs/tiny/bundle/bench").mkdir()
    document = prgkit("export --float-input --evaluation-images 3 --zip --json").json["export"]
    archive = standing / document["zip"]
    assert (document["zip"], document["zip_bytes"]) == ("runs/tiny/tiny.zip", archive.stat().st_size)
    assert [artifact["name"] for artifact in document["artifacts"]] == ["onnx-fp32", "onnx-nchw"]
    assert document["evaluation"]["images"] == 3
    assert document["recipe"]["export"]["evaluation_images"] == 3  # as it was used
    assert Run(Path("runs/tiny")).recipe.export.evaluation_images == 2000  # as it was written
    said = prgkit("export", "--zip", "--run", "runs/tiny/bundle")
    assert said.out.splitlines()[-1].startswith("runs/tiny/tiny.zip (")
    assert said.out.endswith("iB) is ready to travel\n")
    assert said.err == "tiny.zip: without bench, which this machine made or you put there\n"
    monkeypatch.setattr("prgkit.export.from_run.export_best", lambda *_: document)
    assert prgkit("export").err == "tiny.zip is still the bundle before this one; --zip packs it again\n"
    shutil.unpack_archive(archive, standing)
    predicted = prgkit("predict photos/00.png --json").json
    assert prgkit("predict photos/00.png --run tiny --json").json == predicted


def test_fewer_evaluation_images_than_asked_for_are_said(
    prgkit: Call, standing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {"run": {"name": "tiny"}, "artifacts": [], "evaluation": {"images": 12}}
    monkeypatch.setattr("prgkit.export.from_run.export_best", lambda *_: made)
    assert prgkit("export --evaluation-images 13").err == ("there are 12 images to evaluate on; 13 were asked for\n")
    assert prgkit("export --evaluation-images 12").err == ""
    assert prgkit("export").err == ""


@pytest.mark.parametrize("command", ["bench", "export", "export --trt", "predict photos/00.png"])
def test_a_packed_bundle_is_not_opened(prgkit: Call, standing: Path, command: str) -> None:
    assert prgkit("export --zip --run runs/tiny/bundle").code == 0
    assert prgkit(f"{command} --run runs/tiny/tiny.zip") == Said(
        1,
        "",
        "Error: this bundle is still packed\n  where: runs/tiny/tiny.zip\n"
        "  fix: unpack it here, and give its folder: python -m zipfile -e runs/tiny/tiny.zip .\n",
    )
    assert prgkit(f"{command} --run tiny.yaml").err == (
        "Error: this is a file, not a run or a bundle\n  where: tiny.yaml\n  fix: give the folder that holds it\n"
    )


def test_a_project_can_be_moved(prgkit: Call, standing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(standing.parent)
    standing.rename("moved")
    assert prgkit("export", "--run", "moved/runs/tiny").code == 0
    said = prgkit("predict", "--run", "moved/runs/tiny/bundle", "moved/photos/00.png")
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith("moved/photos/00.png: ")


def test_bench_is_given_the_run_or_the_bundle_alone(
    prgkit: Call, standing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def measure(bundle: Path, **given: Any) -> dict[str, Any]:
        seen.append({"bundle": bundle, **given})
        return {"rows": []}

    monkeypatch.setattr("prgkit.evaluate.bench.bench.bench", measure)
    monkeypatch.setattr("prgkit.evaluate.report.terminal.report_table", lambda report: "the table")
    said = prgkit("bench", "--threads", "1", "--batches", "4,2", "--seconds", "1")
    assert said.out.startswith("the table\nreport: runs/tiny/bench/")
    shutil.copytree("runs/tiny/bundle", "device")
    monkeypatch.chdir("device")
    assert prgkit("bench").out.startswith("the table\nreport: bench/")
    assert [(call["bundle"], call["run_folder"]) for call in seen] == [
        (Path("runs/tiny/bundle"), Path("runs/tiny")),
        (Path(), None),
    ]
    assert (seen[0]["threads"], seen[0]["batches"], seen[0]["seconds"]) == (1, [4, 2], 1.0)
    assert seen[0]["command"] == "prgkit bench --threads 1 --batches 4,2 --seconds 1"


def test_a_bench_that_is_worse_than_its_baseline_tells_all_and_exits_1(
    prgkit: Call, standing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prgkit.evaluate.bench import latency

    really, found = latency.measure, list[latency.Session]()

    def measure(*arguments: Any, **named: Any) -> latency.Session:
        if not found:
            found.append(really(*arguments, **named))
        return found[0]  # every bench finds what the first one measured

    monkeypatch.setattr(latency, "measure", measure)
    shutil.copytree("runs/tiny/bundle", "device")  # without PyTorch's row, which no baseline judges
    measured = ("bench", "--run", "device", "--threads", "1", "--seconds", "0.3", "--batches", "1")
    first = prgkit(*measured, "--out", "first")
    assert (first.code, first.out.splitlines()[-1]) == (0, "report: first/report.html")
    before = json.loads((standing / "first/report.json").read_text())
    onnx = before["rows"][0]
    onnx["latency"] |= {"p50_ms": 1e6, "p50_interval_ms": [1e6, 1e6]}  # however busy this machine is, it was busier
    (standing / "base.json").write_text(json.dumps(before))
    assert prgkit(*measured, "--out", "new", "--baseline", "base.json", "--tolerance", "10%").code == 0
    onnx["size_mib"] = 0.01
    (standing / "base.json").write_text(json.dumps(before))
    said = prgkit(*measured, "--out", "new", "--baseline", "base.json")
    size = json.loads((standing / "new/report.json").read_text())["rows"][0]["size_mib"]
    assert said.code == 1
    assert "Against base.json (run tiny, " in said.out
    assert said.out.splitlines()[-1] == "report: new/report.html"
    assert said.err.endswith(
        "Error: 1 regression against base.json:\n"
        f"  onnx-fp32: size 0.01 MiB → {size:.2f} MiB, {100 * (size / 0.01 - 1):+.1f} %\n"
        "  where: new/report.html\n"
        "  fix: make it good again, or accept it: this report.json is then the next baseline\n"
    )
    assert "## Against the baseline" in (standing / "new/report.md").read_text()
    assert "<h2>Against the baseline</h2>" in (standing / "new/report.html").read_text()
    again = prgkit(*measured, "--out", "new", "--baseline", "base.json", "--json")
    assert (again.code, again.json["bench"]["baseline"]["regressions"]) == (1, 1)
    assert prgkit(*measured, "--out", "new", "--baseline", "new").err.startswith(
        "Error: the new report would overwrite its baseline, and the next bench would be held against that\n"
        "  where: new/report.json\n"
    )
    said = prgkit("bench", "--run", "device", "--threads", "2", "--baseline", "base.json", "--out", "new")
    assert said.err.startswith(
        "Error: the baseline was measured with --threads 1, and this would be with --threads 2\n"
    )


def test_reports_are_merged_into_a_comparison_without_a_run(prgkit: Call, place: Path) -> None:
    row = {"artifact": "onnx-fp32", "backend": "onnxruntime", "device": "cpu", "precision": "fp32", "threads": 2,
           "status": "measured", "reason": None, "size_mib": 18.4, "top1": None, "agreement_teacher": 79.4, "agreement_fp32": 100.0, "throughput": [], "latency": {"p50_ms": 2.0, "p50_interval_ms": [1.9, 2.1]}}  # fmt: skip
    for name in ("a", "b"):
        report = {
            "schema": "prgkit.report/1",
            "created": "2026-01-02T03:04:05+00:00",
            "machine": {"cpu": f"CPU {name}", "usable_cores": 2},
            "run": {"name": "tiny", "student": "repvit_m0_9", "teacher": "ViT-S-16"},
            "evaluation": {"images": 20, "labelled": False, "source": "", "digest": "d"},
            "teacher": {"top1": None},
            "rows": [row],
        }
        (place / f"{name}.json").write_text(json.dumps(report))
    said = prgkit("bench", "--merge", "a.json", "b.json")
    assert (said.code, said.err) == (0, "")
    assert "\n".join(line.rstrip() for line in said.out.splitlines()) == MERGED
    assert sorted(path.name for path in (place / "comparison").iterdir()) == [
        "comparison.html", "comparison.json", "comparison.md"
    ]  # fmt: skip
    assert prgkit("bench a.json b.json --merge --out there --json").json["bench"]["reports"][1]["file"] == "b.json"
    assert (place / "there/comparison.md").is_file()
    assert prgkit("bench --merge a.json c.json").err == (
        "Error: there is no c.json\n  where: .\n  fix: name the report.json that prgkit bench wrote\n"
    )


MERGED = """\
RepViT-M0.9 in 2 benches: fastest is onnx-fp32 at 2.00 ms on CPU a, 2 cores

 device          artifact   p50 ms  images/s  = teacher   MiB
 ────────────────────────────────────────────────────────────
 CPU a, 2 cores  onnx-fp32    2.00         –     79.4 %  18.4
 CPU b, 2 cores  onnx-fp32    2.00         –     79.4 %  18.4

comparison: comparison/comparison.html"""


def test_no_run_no_bundle_and_a_stale_bundle(prgkit: Call, standing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = standing / "runs/tiny/student.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    stale = "Error: the bundle is stale: it holds another student than the run\n"
    assert prgkit("bench").err == f"{stale}  where: runs/tiny/bundle\n  fix: prgkit export --run runs/tiny\n"
    assert prgkit("predict", "photos/00.png", "--run", "runs/tiny/bundle").err.startswith(stale)
    shutil.rmtree("runs/tiny/bundle")
    assert prgkit("bench").err == (
        "Error: the run has not been exported yet\n  where: runs/tiny\n  fix: prgkit export --run runs/tiny\n"
    )
    assert prgkit("bench", "--run", "runs/tine").err.startswith(
        "Error: there is no such run folder\n  where: runs/tine"
    )
    assert prgkit("bench", "--run", "photos").err.startswith("Error: this is no run folder: it has no recipe.yaml\n")
    shutil.rmtree("runs")
    assert prgkit("export").err == (
        f"Error: there is no run here\n  where: {standing}\n"
        "  fix: prgkit distill demo makes one, or name one with --run FOLDER\n"
    )
    assert prgkit("distill").code == 1


def test_predict_abstains_and_keeps_the_brackets_of_a_name(prgkit: Call, standing: Path) -> None:
    shutil.copy("photos/00.png", "photos/a[bold].png")
    said = prgkit("predict", "photos/a[bold].png", "--min-confidence", "1", "--top-k", "1")
    assert said.out.startswith("photos/a[bold].png: abstains  (")
    said = prgkit("predict", "nothing.jpg")
    assert said.code == 1
    assert said.err.startswith("Error: nothing.jpg does not exist")


def test_predict_answers_every_picture_that_it_can_read(prgkit: Call, standing: Path) -> None:
    whole = Path("photos/01.png").read_bytes()
    Path("cut.png").write_bytes(whole[:60])
    said = prgkit("predict photos/00.png cut.png nothing.jpg photos/01.png --top-k 1")
    assert said.code == 1
    assert [line.partition(":")[0] for line in said.out.splitlines()] == ["photos/00.png", "photos/01.png"]
    assert said.err.startswith("cut.png cannot be read: truncated\nnothing.jpg does not exist")
    assert said.err.endswith("Error: 2 of 4 pictures cannot be read; the others are answered\n")
    said = prgkit("predict cut.png photos/00.png --json")
    assert said.code == 1
    bad, good = said.json["predict"]
    assert bad == {
        "image": "cut.png",
        "error": {"what": "cut.png cannot be read: truncated", "where": None, "fix": None},
    }
    assert good["class"] in ("one", "two", "three")


def test_predict_takes_folders_and_archives(prgkit: Call, standing: Path) -> None:
    alone = prgkit("predict photos/00.png photos/01.png --json").json["predict"]
    mine = Path("mine")
    (mine / "deep").mkdir(parents=True)
    shutil.copy("photos/00.png", mine / "deep" / "a")  # no suffix: its content tells
    shutil.copy("photos/01.png", mine)
    (mine / "notes.txt").write_text("x")
    said = prgkit("predict mine --json")
    assert said.code == 0
    assert said.json["predict"] == [{**alone[1], "image": "mine/01.png"}, {**alone[0], "image": "mine/deep/a"}]
    assert said.err == "mine: passed over 1 file that is no picture: 1 .txt\n"
    shutil.make_archive("packed", "zip", "mine")
    shutil.make_archive("packed", "tar", "mine")
    said = prgkit("predict packed.zip packed.tar --top-k 1")
    assert sorted(line.partition(":")[0] for line in said.out.splitlines()) == [
        *("packed.tar/01.png", "packed.tar/deep/a", "packed.zip/01.png", "packed.zip/deep/a")
    ]
    Path("empty").mkdir()
    said = prgkit("predict empty")
    assert (said.code, said.out) == (1, "")
    assert said.err.startswith("Error: empty holds no images\n  where: empty\n  fix: it is empty")


def test_predict_says_what_it_answers_as_it_goes(standing: Path) -> None:
    from prgkit.evaluate.predict import predict

    answers = predict(Path("runs/tiny/bundle"), [Path("photos/00.png"), Path("photos")], top_k=1, min_confidence=0)
    assert next(answers)["image"] == "photos/00.png"
    answers.close()


def test_the_range_of_deep_greys_travels(prgkit: Call, standing: Path) -> None:
    """Twelve bits in a file of 16: found from the images, said, noted, and used on the device."""
    grain = np.random.default_rng(0)
    Path("deep").mkdir()
    for number in range(12):
        values = grain.integers(300, 3000 + 80 * number, (32, 32), dtype=np.uint16)
        Image.fromarray(values).save(f"deep/{number:02}.png")
    Path("deep/notes.txt").write_text("x")
    said = prgkit("distill tiny.yaml --set data.images=deep --run runs/deep export")
    assert said.code == 0
    assert "deep: passed over 1 file that is no picture: 1 .txt\n" in said.err
    assert "12 images are deep grey; the values of the 12 looked at go from 300 to 3,87" in said.err
    assert "so 0 to 4,095 (12 bits) is black to white" in said.err
    assert "nearly black" not in said.err
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


def test_pictures_that_are_nearly_black_are_told_of_before_training(prgkit: Call, standing: Path) -> None:
    grain = np.random.default_rng(0)
    Path("black").mkdir()
    for number in range(8):
        values = grain.integers(0, 16, (32, 32, 3), dtype=np.uint8)
        values[0, 0] = 255  # a hot pixel
        Image.fromarray(values).save(f"black/{number}.png")
    said = prgkit("targets tiny.yaml --set data.images=black")
    assert "black is nearly black: 999 of 1,000 values are at most 15 of 255." in said.err


def test_targets_then_distill_are_about_the_same_recipe(prgkit: Call, standing: Path) -> None:
    said = prgkit("targets", "tiny.yaml", "--set", "views.count=2", "distill", "--run", "runs/two", "--json")
    assert said.code == 0
    assert said.json["targets"]["images"] == 24
    assert said.json["targets"]["bytes"] > 0
    assert said.json["distill"]["run"] == "runs/two"
    from prgkit.storage.run import Run

    assert Run(Path("runs/two")).recipe.views.count == 2


def test_ticks_on_the_sheet_become_an_accuracy_in_the_report(prgkit: Call, standing: Path) -> None:
    document = prgkit("audit", "-n", "8", "export", "--json").json
    found = document["audit"]
    assert (found["run"], found["images"], found["drawn_from"], found["ticked"]) == ("runs/tiny", 8, 24, 0)
    assert 0 < found["held_out"] < 8
    ticks = standing / "runs/tiny/audit/ticks.csv"
    blank = ticks.read_text("utf-8-sig")
    assert (standing / "runs/tiny/bundle/audit/ticks.csv").read_text("utf-8-sig") == blank
    # Right on every second one: "number,file,key,teacher,confidence" and then y or n.
    lines = blank.splitlines()
    lines[1:] = [line.removesuffix(",,") + (",n," if number % 2 else ",y,") for number, line in enumerate(lines[1:])]
    ticks.write_text("\n".join(lines))
    said = prgkit("audit")
    assert said.out == (
        "runs/tiny/audit/sheet.html: 8 of 8 ticked; the teacher is right on 50.0 % of them (95 % interval 21.5–78.5 %)\n"
    )
    measured = "--threads 1 --seconds 0.3 --batches 1"
    report = prgkit(f"bench {measured} --json").json["bench"]
    assert report["audit"]["teacher"] == {
        "images": 8, "right": 4, "top1": 50.0, "top1_interval": pytest.approx([21.52, 78.48], abs=0.01)
    }  # fmt: skip
    assert {row["images"] for row in report["audit"]["rows"]} == {found["held_out"]}
    assert {row["artifact"] for row in report["audit"]["rows"]} == {"onnx-fp32", "torch"}
    ticks.write_text("\n".join([*lines[:4], lines[4].replace(",y,", ",ja,").replace(",n,", ",ja,")]))
    said = prgkit(f"bench {measured}")
    assert said.err == (
        "Error: right is 'ja', neither yes nor no\n  where: runs/tiny/audit/ticks.csv, line 5\n"
        "  fix: write y (or yes, x, 1, true, right), n (or no, 0, false, wrong), or nothing\n"
    )


def test_a_fresh_audit_says_what_to_do_next(prgkit: Call, standing: Path) -> None:
    assert prgkit("audit").out == (
        "runs/tiny/audit/sheet.html: 24 of 24 images to tick in a browser; put the ticks.csv that it saves in the "
        "place of runs/tiny/audit/ticks.csv, then: prgkit bench\n"
    )
    assert prgkit("distill tiny.yaml audit --json").json["audit"]["run"] == "runs/tiny"


def test_an_audit_stands_between_the_targets_and_the_training(
    prgkit: Call, standing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def distil(recipe: Any, folder: Path, *_: Any) -> None:
        asked.append((recipe.views.count, folder))
        raise SystemExit

    monkeypatch.setattr("prgkit.training.distill.distill", distil)
    assert prgkit("audit tiny.yaml --set views.count=2 --run runs/new distill export").code == 0
    assert prgkit("targets tiny.yaml audit distill").code == 0
    assert asked == [(2, Path("runs/new")), (1, Path("runs/tiny"))]
    assert (standing / "runs/new/audit/sheet.html").exists()


def test_images_and_classes_need_no_recipe(prgkit: Call, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr("prgkit.training.dry_run.PROBE_SECONDS", 0.0)
    photos(place / "my photos")
    (place / "names.txt").write_text("one\ntwo\n")
    tiny = ["teacher={model: 'demo:digits'}", "student={model: test_efficientnet, image_size: 32}"]
    sets = [word for value in tiny for word in ("--set", value)]
    said = prgkit("distill", "--images", "my photos/", "--classes", "names.txt", *sets, "--dry-run", "export", "bench")
    assert said.code == 0
    assert said.err == "probing demo:digits and test_efficientnet for some seconds\nthen export\nthen bench\n"
    told = dict(line.split(maxsplit=1) for line in said.out.splitlines())
    assert told["run"] == "runs/my-photos"
    assert told["images"] == "24 in my photos/, 24 new to the teacher"
    assert told["evaluation"] == "none"
    assert told["classes"] == "2, 7 templates"
    assert told["teacher"].startswith("demo:digits, 9 views an image, about ")
    assert told["student"].startswith("test_efficientnet at 32 px, 30 epochs, about ")
    assert told["disk"].startswith("27.0 KiB of targets, up to 4.5 KiB of decoded pictures, ")
    assert said.out.rstrip().endswith(" free")
    assert sorted(path.name for path in place.iterdir()) == ["my photos", "names.txt"]  # nothing was written
    sets += ["--set", "data.keep.weighted=true"]  # how many images that leaves is not known yet
    document = prgkit("distill", "--images", "my photos/", "--classes", "names.txt", *sets, "--dry-run", "--json").json
    assert document["distill"]["images"] == document["distill"]["images_missing"] == 24
    assert document["distill"]["told"]["student"].startswith("test_efficientnet at 32 px, 30 epochs, at most ")


@pytest.mark.parametrize("option", ["", "--dry-run"])
def test_a_rehearsal_refuses_what_the_work_would_refuse(
    prgkit: Call, standing: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr("prgkit.training.dry_run.PROBE_SECONDS", 0.0)
    (standing / "mine").mkdir()
    (standing / "mine/thesis.tex").touch()
    for line, told in (
        ("distill tiny.yaml --set training.epochs=3", "this run was made from another recipe; it differs in training"),
        ("distill tiny.yaml --run mine", "the folder is not empty and holds no run\n"),
        ("distill tiny.yaml --run new --set data.evaluation=labelled", "1 of 1 labels match no class: 'tow' (did you"),
    ):
        if "labelled" in line:
            photos(standing / "labelled/tow", 2)
        said = prgkit(f"{line} {option}")
        assert said.code == 1
        assert f"Error: {told}" in said.err
    usage = type(shutil.disk_usage(standing))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - 1024, 1024))
    said = prgkit(f"distill tiny.yaml --run newer --targets elsewhere {option}")
    assert said.code == 1
    assert re.search(r"Error: the target store needs \d+\.\d KiB, and 1\.0 KiB are free\n", said.err)


def test_a_rehearsal_counts_the_evaluation_images_for_the_teacher_too(
    prgkit: Call, standing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prgkit.training.dry_run.PROBE_SECONDS", 0.0)
    photos(standing / "judged/two", 30)  # 24 of them are those of photos/
    line = "distill tiny.yaml --run new --set data.evaluation=judged --dry-run --json"
    found = prgkit(line).json["distill"]
    assert (found["images"], found["images_missing"]) == (24, 0)
    assert (found["evaluation_images"], found["evaluation_missing"]) == (30, 6)
    assert found["targets_bytes"] == 6 * 64 * 2
    assert found["told"]["evaluation"] == "30 in judged, 6 new to the teacher"


# Bad input, one by one.


def tiny(place: Path, *changes: tuple[str, str]) -> None:
    text = TINY
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (place / "tiny.yaml").write_text(text)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("test_efficientnet", "repvit_m0_99"), "timm has no model 'repvit_m0_99'; did you mean 'repvit_m0_9'?"),
        (('"demo:digits"', "ViT-B-61"), "open_clip has no model 'ViT-B-61'; did you mean 'ViT-B-16'?"),
        (('"demo:digits"', "ViT-B-32, weights: openay"), "ViT-B-32 has no weights 'openay'; did you mean 'openai'?"),
        (('"demo:digits"', "ViT-B-32"), "teacher.weights is missing for ViT-B-32"),
        (('"demo:digits"', "local-dir:nowhere"), "there is no such folder\n  where: nowhere\n"),
        (("{name: ce}", "{name: cee}"), "the recipe has a mistake:\n    objective.name: unknown objective 'cee', known are "
                                        "prg, kd, ce, dkd, dist, rkd, crd, nd, pld, ofa, promptkd, clipkd, dho; did you mean 'ce'?"),
        (("[one, two, three]", "[one, two, One]"), "class names repeat: 'One' (entry 1 and entry 3)"),
        (("[one, two, three]", "[one]"), "there is only one class, 'one'"),
        (('"a {}"', "a"), "the template 'a' has not exactly one {}"),
        (("images: photos", "images: photo"), "photo does not exist; did you mean 'photos'?"),
        (("images: photos", "images: empty"), "empty holds no images"),
        (("images: photos", "images: broken"), "none of the 3 images in broken can be read"),
        (("held_out: 0.2", "evaluation: labelled"), "1 of 1 labels match no class: 'tow' (did you mean 'two'?)"),
    ],
)  # fmt: skip
def test_bad_input_is_told_with_its_fix(prgkit: Call, place: Path, change: tuple[str, str], told: str) -> None:
    pytest.importorskip("torch")
    photos(place / "photos", 4)
    photos(place / "labelled/tow", 2)
    (place / "empty").mkdir()
    (place / "broken").mkdir()
    for number in range(3):
        (place / f"broken/{number}.jpg").write_bytes(b"no picture")
    tiny(place, change)
    said = prgkit("distill", "tiny.yaml", "export")
    assert said.code == 1
    error = said.err[said.err.index("Error: ") :]
    assert error.startswith(f"Error: {told}")
    assert "\n  fix: " in error or "did you mean" in error
    assert len(error) < 800
    assert said.out == "" or "labels" in told


def test_trt_without_tensorrt_is_told_before_the_training(
    prgkit: Call, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    said = prgkit("distill", "demo", "export", "--trt")
    assert said.code == 1
    assert said.out == ""
    assert said.err.startswith(
        "Error: no TensorRT can build an engine here\n  tensorrt: not installed; pip install 'prgkit[trt]'"
    )
    assert "\n  fix: pip install 'prgkit[rtx]'" in said.err
    assert not list(place.iterdir())
    only = prgkit("export", "--backend", "tensorrt_rtx").err
    assert "tensorrt_rtx: not installed" in only
    assert "tensorrt:" not in only


@pytest.mark.parametrize("command", ["bench", "predict photos/00.png"])
def test_a_truncated_onnx_file_is_named(prgkit: Call, standing: Path, command: str) -> None:
    model = standing / "runs/tiny/bundle/model.onnx"
    whole = model.read_bytes()
    model.write_bytes(whole[:-100])
    said = prgkit(command)
    assert (said.code, said.out) == (1, "")
    assert said.err == (
        f"Error: model.onnx is truncated: {len(whole) - 100} of {len(whole)} bytes\n"
        "  where: runs/tiny/bundle/model.onnx\n"
        "  fix: copy the bundle again, or make the file again: prgkit export\n"
    )


def test_a_truncated_engine_is_named(prgkit: Call, standing: Path) -> None:
    from prgkit.export.bundle.bundle import describe_artifact
    from prgkit.storage.atomic import read_sealed, write_sealed

    bundle = standing / "runs/tiny/bundle"
    engine = bundle / "model.fp32.tensorrt_rtx.engine"
    engine.write_bytes(b"x" * 1000)
    manifest = read_sealed(bundle / "manifest.json")
    manifest["artifacts"].append(
        describe_artifact(bundle, engine.name, name="tensorrt_rtx-fp32", format_="engine", precision="fp32",
                          backend="tensorrt_rtx", executed=False, note=None, parity=None)
    )  # fmt: skip
    write_sealed(bundle / "manifest.json", manifest)
    engine.write_bytes(b"x" * 900)
    said = prgkit("bench")
    assert said.code == 1
    assert said.err.startswith("Error: model.fp32.tensorrt_rtx.engine is truncated: 900 of 1000 bytes\n")
    assert said.err.endswith("make the file again: prgkit export --trt\n")


def test_a_full_disk_is_told_before_the_work(prgkit: Call, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    photos(place / "photos")
    tiny(place)
    usage = type(shutil.disk_usage(place))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - 1024, 1024))
    said = prgkit("distill", "tiny.yaml")
    assert said.code == 1
    assert re.search(r"Error: the target store needs 5\.\d KiB, and 1\.0 KiB are free\n  where: targets/", said.err)
    assert "  fix: free some space, or choose another disk with --run and --targets\n" in said.err


def test_a_disk_that_fills_up_is_told_with_what_was_needed(
    prgkit: Call, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    from safetensors import SafetensorError

    photos(place / "photos")
    tiny(place)

    def full(*_: Any, **__: Any) -> None:  # what safetensors says, on a file system of 1 MiB
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("prgkit.storage.tensors.save_file", full)
        said = prgkit("distill", "tiny.yaml")
    assert said.code == 1
    error = said.err[said.err.index("Error: ") :].splitlines()
    assert error[0].startswith("Error: no disk space left for ")
    assert "; it needed " in error[0]
    assert error[2] == "  fix: free some space and run the same command again: finished work is kept"

    def write(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write)
        said = prgkit("distill", "tiny.yaml", "--run", "other")
    assert said.code == 1
    assert "Error: no disk space left for recipe.yaml; it needed " in said.err
    assert prgkit("distill", "tiny.yaml").code == 0  # space was made, and the same command goes on


@pytest.mark.parametrize(
    "line",
    ["distill demo", "targets demo", "audit demo", "distill demo --dry-run", "distill imagenet1k", "export --run run"],
)
def test_the_base_install_says_which_extra_a_command_needs(place: Path, line: str) -> None:
    (place / "run").mkdir()
    (place / "run/recipe.yaml").write_text(TINY)
    (place / "run/card.json").write_text("{}")
    code = f"import sys; sys.modules['torch'] = None; sys.argv[1:] = {line.split()}; from prgkit.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert Said(done.returncode, done.stdout, done.stderr) == Said(
        1,
        "",
        "Error: this command needs torch, which the base install leaves out\n  fix: pip install 'prgkit[distill]'\n",
    )


def test_only_the_first_of_several_processes_prints(
    prgkit: Call, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert prgkit("distill demo export bench --json").out == ""
    assert [name for name, _ in calls] == ["distill"]


def test_a_distillation_after_adapt_teacher_uses_its_context(
    prgkit: Call, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def distil(recipe: Any, *_: Any) -> None:
        asked.append(recipe)
        raise SystemExit

    for grey, name in enumerate(("one", "two", "three")):
        (place / "labelled" / name).mkdir(parents=True)
        Image.new("L", (8, 8), 80 * grey).save(place / "labelled" / name / "1.png")
    (place / "tiny.yaml").write_text(TINY)
    monkeypatch.setattr("prgkit.teacher.prompt_tuning.EPOCHS", 1)
    monkeypatch.setattr("prgkit.training.distill.distill", distil)
    line = "adapt-teacher tiny.yaml --shots 1 --set data.labelled=labelled --out 'here/a #1.safetensors'"
    said = prgkit(line)
    assert said.out.startswith("here/a #1.safetensors: the teacher names ")
    assert said.out.endswith("to use it: --set teacher.context='here/a #1.safetensors'\n")
    assert prgkit(line, "--json").json["adapt-teacher"]["learned"]["images"] == 3
    prgkit(line, "distill")
    (place / "here" / "a #1.safetensors").unlink()
    monkeypatch.setenv("RANK", "1")
    prgkit(line, "distill")
    assert [recipe.teacher[0].context for recipe in asked] == ["here/a #1.safetensors"] * 2
    assert not (place / "here" / "a #1.safetensors").exists()  # it has one writer


def test_only_the_first_of_several_processes_asks_the_teacher(
    prgkit: Call, standing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def distil(recipe: Any, *_: Any) -> None:
        asked.append(recipe)
        raise SystemExit  # as every process but the first ends

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("prgkit.training.prepare.prepare", ending(AssertionError("a second writer")))
    monkeypatch.setattr("prgkit.training.distill.distill", distil)
    assert prgkit("targets tiny.yaml --set views.count=2") == Said(0, "", "")
    assert prgkit("targets tiny.yaml --set views.count=2 distill") == Said(0, "", "")
    assert prgkit("audit tiny.yaml --set views.count=2 --run x distill") == Said(0, "", "")
    assert asked[0].views.count == 2  # it goes on with the same recipe, and waits for the first there
    monkeypatch.setattr("prgkit.training.dry_run.estimate", ending(AssertionError("a second probe")))
    assert prgkit("distill tiny.yaml --dry-run") == Said(0, "", "")


def test_a_terminal_shows_a_bar_that_long_facts_do_not_push_away(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from prgkit.cli.terminal import Terminal

    monkeypatch.setenv("COLUMNS", "80")

    with Terminal(says_results=True, shows_progress=True) as terminal:
        terminal.err._force_terminal = True
        terminal.start("teacher", 10, "img")
        terminal.advance(4, "epoch 1/2  loss [0.5]" + 10 * "  agreement 98.4 %")
        terminal.note("a [note]")
        terminal.advance(6)
        terminal.end_stage()
        terminal.start("student", 5, "img")
        terminal.say("done [all]")
    said = capsys.readouterr()
    assert said.out == "done [all]\n"
    assert "10/10" in said.err
    assert "epoch 1/2  loss [0.5]" in said.err
    assert "a [note]" in said.err


def test_where_no_bar_can_move_a_line_comes_every_30_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from prgkit.cli.terminal import Terminal

    clock = iter([100.0, 110.0, 129.9, 130.0, 150.0, 3760.0])
    monkeypatch.setattr("prgkit.cli.terminal.time.monotonic", lambda: next(clock))
    with Terminal(says_results=True, shows_progress=True) as terminal:
        terminal.start("student", 100_000, "img")
        terminal.advance(40_000)  # a stage that goes on where another process stopped
        for _ in range(5):
            terminal.advance(1_000, "epoch 1/2  loss [0.5]")
        terminal.end_stage()
    assert capsys.readouterr().err == (
        "student: 100,000 img\n"
        "student: 43,000/100,000 img  100 img/s  10 min left  epoch 1/2  loss [0.5]\n"
        "student: 45,000/100,000 img  1.4 img/s  11 h 11 min left  epoch 1/2  loss [0.5]\n"
    )
    with Terminal(says_results=True, shows_progress=False) as terminal:
        terminal.start("student", 10, "img")
        terminal.advance(10)
    assert capsys.readouterr().err == ""


def test_options_say_what_they_take() -> None:
    for command in cli.commands.values():
        for option in command.params:
            assert isinstance(option, click.Argument) or option.help, option.name

"""How a line is split into commands, and what is refused before the first of them runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest

from prgkit.cli.chain import split_at_commands
from prgkit.cli.main import cli
from prgkit.errors import BenchError
from tests.conftest import PrgkitCommand


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
    head, split = split_at_commands(line.split(), cli.commands)
    assert [" ".join(part) for part in split] == parts
    assert head == ([] if parts else ["--help"])


def test_a_chain_runs_in_order_with_options_in_any_order(prgkit: PrgkitCommand, calls: list[Any]) -> None:
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
                           "open_vocabulary": None, "embedding": False, "explain": False, "float_input": False, "evaluation_images": None, "packs": False, "formats": (),
                           "litert": False, "executorch": False, "ncnn": False, "coreml": False, "qnn": None, "folder": None, "as_json": False}  # fmt: skip
    calls.clear()
    assert prgkit("distill --images d --classes c export --trt").code == 0
    assert (calls[0][1]["recipe"], calls[0][1]["images"], calls[0][1]["classes"]) == (None, "d", "c")
    assert calls[1][0] == "export"
    calls.clear()
    assert prgkit("predict ./export a.jpg --top-k 2 b.jpg").code == 0
    assert calls == [
        ("predict", {"images": ("./export", "a.jpg", "b.jpg"), "top_k": 2, "min_confidence": 0.0,
                     "reject_unknown": False, "runtime": None, "gallery": None, "batch_size": 1, "explain": None, "out": None, "fps": None, "watch": None,
                     "folder": None, "as_json": False})
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("distil demo", "No such command 'distil'. Did you mean 'distill'?"),
        ("distill demo export --int88", "No such option '--int88'. Did you mean '--int8'?"),
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
        ("pull o/n bench --run x", "A chain works on one run: leave --run out behind pull."),
        ("predict a.jpg --gallery g.npz --out a.csv", "--out means nothing with --gallery."),
        ("predict a.jpg --gallery g.npz --explain maps", "--explain means nothing with --gallery."),
        ("predict a.jpg --gallery g.npz --runtime ncnn", "--runtime means nothing with --gallery."),
        ("predict a.jpg --gallery g.npz --min-confidence 0", "--min-confidence means nothing with --gallery."),
        ("predict a.jpg --gallery g.npz --reject-unknown", "--reject-unknown means nothing with --gallery."),
        ("predict a.jpg --gallery g.npz --batch 1", "--batch means nothing with --gallery."),
        ("predict a.jpg --top-k 5 --out k5.csv",
         "--top-k means nothing with --out k5.csv: a table has two answers, a .jsonl as many as asked."),
        ("predict a.jpg --top-k 1 --out x.csv",
         "--top-k means nothing with --out x.csv: a table has two answers, a .jsonl as many as asked."),
        ("predict a.jpg --top-k 3 --out seen",
         "--top-k means nothing with --out seen: a picture has one answer, a .jsonl as many as asked."),
        ("predict a.jpg more --fps 3", "--fps is for a video, and there is none."),
        ("predict --watch drop --fps 3", "--fps is for a video, and there is none."),
        ("predict a.jpg --watch drop --batch 8",
         "--batch means nothing with pictures that come over time: each is answered at once."),
        ("predict - --batch 1", "--batch means nothing with pictures that come over time: each is answered at once."),
        ("predict 0 --batch 8", "--batch means nothing with pictures that come over time: each is answered at once."),
        ("predict --watch . --out .", "--out . puts pictures into ., which --watch looks into; name another folder."),
        ("predict --watch drop --out .",
         "--out . puts pictures into drop, which --watch looks into; name another folder."),
        ("predict --watch drop --out ./drop/x/..",
         "--out drop/x/.. puts pictures into drop, which --watch looks into; name another folder."),
        ("predict --watch drop --explain drop",
         "--explain drop puts pictures into drop, which --watch looks into; name another folder."),
        ("targets demo --join --gallery g.npz", "--gallery means nothing with --join."),
        ("targets demo --shard 0/2 --join", "--join means nothing with --shard."),
        ("targets demo --shard 0/2 --engine ray", "--engine means nothing with --shard."),
        ("targets demo --engine ray --gallery g.npz", "--gallery means nothing with --engine."),
        ("targets demo --workers 2:2", "--workers is for --engine, and there is none."),
        ("targets demo --list", "RECIPE means nothing with --list."),
        ("targets --list --prune", "--prune means nothing with --list."),
        ("targets --prune --shard 0/2", "--shard means nothing with --prune."),
        ("compare demo --ladder --objectives kd", "--objectives means nothing with --ladder."),
        ("compare demo --rank-students --random-teacher", "--random-teacher means nothing with --rank-students."),
        ("recipes --images x --classes y", "--images is for --new, and there is none."),
        ("recipes --classes y", "--classes is for --new, and there is none."),
        ("recipes --new a --images x --classes y --show demo", "--show means nothing with --new."),
        ("recipes --show demo --objectives", "--objectives means nothing with --show."),
        ("bench --merge a b --fps 30", "--fps means nothing with --merge."),
        ("bench --merge a b --run x", "--run means nothing with --merge."),
    ],
)  # fmt: skip
def test_a_wrong_line_is_told_before_anything_runs(
    prgkit: PrgkitCommand, calls: list[Any], line: str, message: str
) -> None:
    result = prgkit(line)
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("Usage: prgkit ")
    assert result.err.rstrip().endswith(f"Error: {message}") or result.err.rstrip().endswith(message)
    assert calls == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--explain --open-vocabulary", "there are no heat maps of a student that is scored by class vectors"),
        ("--explain --embedding", "there are no heat maps of a student that is scored by class vectors"),
        ("--open-vocabulary input --trt", "engines hold their class vectors; they cannot take them as an input"),
        ("--format tflite", "there is no format 'tflite'"),
    ],
)
def test_an_export_that_cannot_be_is_refused_before_the_training(
    prgkit: PrgkitCommand, calls: list[Any], options: str, message: str
) -> None:
    result = prgkit(f"distill demo export {options}")
    assert (result.code, result.out, calls) == (1, "", [])
    assert result.err.startswith(f"Error: {message}\n")


def test_what_plays_a_part_together_is_taken(prgkit: PrgkitCommand, calls: list[Any]) -> None:
    for line in (
        "predict cam.mp4 --gallery g.npz --fps 2 --top-k 1 --watch drop --run x --json",
        "predict --watch drop --out drop/a.csv --explain drop/maps",
        "predict a.jpg --out a.jsonl --top-k 5",
        "predict a.jpg --out a.csv --top-k 5 --json",
        "predict - --fps 2",
        "predict 0 --fps 2",
        "predict cam.mp4 --batch 8",
        "targets demo --engine ray --workers 2:2",
        "targets --prune --dry-run --targets t",
        "pull o/n --out x bench",
    ):
        assert prgkit(line).code == 0


def test_the_same_run_may_be_named_again(prgkit: PrgkitCommand, calls: list[Any]) -> None:
    assert prgkit("distill demo --run x export --run x bench").code == 0
    assert len(calls) == 3


@pytest.mark.parametrize("given", [("--images", "photos"), ("--images", ""), ("--classes", ""), ("",)])
def test_a_recipe_or_both_images_and_classes(
    prgkit: PrgkitCommand, empty_folder: Path, given: tuple[str, ...]
) -> None:  # an empty one, of a variable that is not set, does not mean the newest run
    result = prgkit("distill", *given)
    assert (result.code, result.out) == (2, "")
    assert result.err.endswith("Error: Name a RECIPE, or give both --images and --classes.\n")


@pytest.mark.parametrize(
    ("line", "message"),
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
def test_what_has_one_value_is_given_once(prgkit: PrgkitCommand, calls: list[Any], line: str, message: str) -> None:
    result = prgkit(line)
    assert (result.code, calls) == (2, [])
    assert result.err.endswith(f"Error: {message}\n")


def test_flags_and_lists_may_be_given_often(prgkit: PrgkitCommand, calls: list[Any]) -> None:
    assert prgkit("export --fp16 --fp16 --run x bench a.json --merge b.json --merge").code == 0
    assert prgkit("distill demo --set a=1 --set b=1").code == 0
    assert [name for name, _ in calls] == ["export", "bench", "distill"]


def test_json_is_one_document_keyed_by_command(prgkit: PrgkitCommand, calls: list[Any]) -> None:
    result = prgkit("distill demo export bench --json")
    assert result.json == {name: {"did": name} for name in ("distill", "export", "bench")}
    assert result.err.count("a library that prints") == 3


def test_what_follows_a_failure_is_not_done(
    prgkit: PrgkitCommand, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(**_: Any) -> dict[str, str]:
        click.get_current_context().obj.failure = BenchError("1 regression")
        return {"did": "bench"}

    monkeypatch.setattr(cli.commands["bench"], "callback", failing)
    result = prgkit("export bench push owner/name --json")
    assert (result.code, list(result.json)) == (1, ["export", "bench"])
    assert result.err.endswith("not done after that: push\nError: 1 regression\n")
    assert [name for name, _ in calls] == ["export"]


def test_only_the_first_of_several_processes_prints(
    prgkit: PrgkitCommand, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert prgkit("distill demo export bench --json").out == ""
    assert [name for name, _ in calls] == ["distill"]

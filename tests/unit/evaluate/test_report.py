"""The report from a made-up bench: complete, well-formed, self-contained, and safe from what it quotes."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from prgkit import metrics
from prgkit.evaluate.accuracy import per_class
from prgkit.evaluate.report import bench_report, formatting, html, quality_sections
from prgkit.evaluate.report import markdown as md
from prgkit.evaluate.report.examples import Picture
from prgkit.evaluate.report.html import asset
from prgkit.evaluate.report.latency_sections import latencies_ms
from prgkit.evaluate.report.plots import figures, svg
from prgkit.evaluate.report.samples import Samples
from prgkit.evaluate.report.schema import PerClass, Report, Row
from prgkit.evaluate.report.sections import Section

VOID = {"meta", "img", "br", "link"}
EVIL = '<script>alert("x")</script>'


def row(artifact: str, p50_ms: float, top1: float | None, **changes: Any) -> dict[str, Any]:
    found = {
        "artifact": artifact,
        "file": f"{artifact}.onnx",
        "backend": "onnxruntime",
        "device": "cpu",
        "precision": artifact[-4:],
        "threads": 2,
        "status": "measured",
        "reason": None,
        "size_mib": 18.4,
        "load_ms": 82.1,
        "peak_memory_mib": 64.2,
        "latency": {
            "batch": 1,
            "stage": "io",
            "samples": 2613,
            "p50_ms": p50_ms,
            "p90_ms": 1.2 * p50_ms,
            "p95_ms": 1.3 * p50_ms,
            "p99_ms": 1.9 * p50_ms,
            "max_ms": 2.0 * p50_ms,
            "p50_interval_ms": [0.98 * p50_ms, 1.03 * p50_ms],
            "round_p50_ms": [p50_ms],
            "steady": True,
            "rounds": 10,
        },
        "throughput": [{"batch": 1, "images_per_s": 990 / p50_ms}, {"batch": 32, "images_per_s": 1600 / p50_ms}],
        "top1": top1,
        "top1_interval": None if top1 is None else [top1 - 2.1, top1 + 2.1],
        "top5": None if top1 is None else 84.0,
        "agreement_teacher": 79.4,
        "agreement_teacher_interval": [77.6, 81.1],
        "agreement_fp32": 99.95,
        "kl_teacher": 0.31,
    }
    return {**found, **changes}


def missing(artifact: str, status: str, reason: str) -> dict[str, Any]:
    kept = ("artifact", "file", "backend", "device", "precision", "threads", "size_mib")
    return {k: v for k, v in row(artifact, 1, 1).items() if k in kept} | {
        "status": status,
        "reason": reason,
        "throughput": [],
        "backend": "tensorrt_rtx",
        "device": "cuda",
        "threads": None,
    }


def made_up(*, labelled: bool = True) -> dict[str, Any]:
    top1 = (60.0, 59.9, 60.0) if labelled else (None, None, None)
    return {
        "schema": "prgkit.report/3",
        "prgkit": "0.1.0",
        "created": "2026-01-02T03:04:05+00:00",
        "command": "prgkit distill cifar100 export --fp16 --trt bench",
        "machine": {
            "cpu": "AMD EPYC",
            "cores": 2,
            "usable_cores": 2,
            "busy_cores": 0.05,
            "load_average": [0.2, 0.3, 0.4],
            "governor": None,
            "clock_range_mhz": None,
            "clocks_locked": None,
            "temperature_c": None,
            "memory_gib": 23.5,
            "os": "Debian GNU/Linux 12 (bookworm)",
            "kernel": "6.1",
            "architecture": "x86_64",
            "virtual": True,
            "python": "3.11.7",
            "versions": {"onnxruntime": "1.31.1", "numpy": "2.4.6"},
            "gpus": [],
            "clocks_mhz": [],
            "temperatures_c": [],
            "stolen_percent": 0.0,
        },
        "run": {
            "name": "cifar100",
            "student": "repvit_m0_9",
            "teacher": "ViT-S-16 / small100",
            "objective": "prg",
            "classes": 100,
            "epochs": 12,
        },
        "evaluation": {"images": 2000, "labelled": labelled, "source": "test-000000.tar", "digest": "d"},
        "teacher": {
            "top1": 61.2 if labelled else None,
            "top5": 86.0 if labelled else None,
            "top1_uniform_prompts": 60.8 if labelled else None,
        },
        "student": {"top1": top1[0], "top5": 84.0 if labelled else None, "agreement": 79.4},
        "accuracy_ratio": 60.0 / 61.2 if labelled else None,
        "rows": [
            row("onnx-fp32", 1.903, top1[0]),
            row("onnx-fp16", 2.71, top1[1], size_mib=9.3),
            row("torch-fp32", 8.4, top1[2], backend="torch", file=None, size_mib=None, peak_memory_mib=402.0),
            missing("engine-fp16", "not executed", "it needs an NVIDIA GPU and its driver"),
        ],
        "training": [
            {
                "epoch": e,
                "loss": 9 / e + 1,
                "nodes": 6 / e,
                "edges": 3 / e + 1,
                "agreement": 80 - 50 / e,
                "seconds": 9.0,
            }
            for e in range(1, 13)
        ],
        "notes": ["Clocks cannot be read or locked here (virtual machine).", "engine-fp16 was never executed here."],
    }


def page(report: dict[str, Any], *, samples: Samples | None = None, pictures: list[Picture]) -> str:
    document = bench_report.bench_document(
        Report.model_validate(report), samples or Samples(order=[], rows=[]), pictures
    )
    return html.page(document)


def markdown(report: dict[str, Any]) -> str:
    whole = Report.model_validate(report)
    return md.markdown(bench_report.bench_document(whole, Samples(order=[], rows=[]), []))


def headline(report: dict[str, Any]) -> str:
    return bench_report.headline(Report.model_validate(report))


def samples_of(report: dict[str, Any]) -> Samples:
    generator = np.random.default_rng(0)
    rows = []
    for one in report["rows"]:
        if one["status"] != "measured":
            continue
        spread = generator.lognormal(0, 0.04, size=(10, 260)) + (generator.random((10, 260)) < 0.01) * generator.random(
            (10, 260)
        )
        rounds = (one["latency"]["p50_ms"] * 1e6 * spread).astype(int).tolist()
        rows.append({**{key: one[key] for key in ("artifact", "backend", "device")}, "rounds_ns": rounds})
    return Samples.model_validate({"schema": "prgkit.samples/2", "order": [[0, 1, 2]], "rows": rows})


def pictures(count: int = 3, *, label: str | None = "cat", group: str = "sample", size: int = 8) -> list[Picture]:
    pixels = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
    return [Picture(pixels, group, "cat", 91.0, "dog", 55.0, label) for _ in range(count)]


class Reader(HTMLParser):
    """Holds the page to what a strict reader asks: every element closed in order; and collects what it refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


def test_write_report_leaves_four_files_that_keep_the_report(tmp_path: Path) -> None:
    report = made_up()
    whole = Report.model_validate(report)
    bench_report.write_report(tmp_path, whole, samples=samples_of(report), pictures=pictures())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
        "samples.json",
    ]
    written = json.loads((tmp_path / "report.json").read_text())
    assert Report.model_validate(written) == whole
    assert {key: written[key] for key in report if key not in ("machine", "run", "evaluation", "rows")} == {
        key: report[key] for key in report if key not in ("machine", "run", "evaluation", "rows")
    }
    assert json.loads((tmp_path / "samples.json").read_text())["rows"][0].keys() >= {"rounds_ns"}


@pytest.mark.parametrize("labelled", [True, False])
def test_the_page_is_well_formed_and_needs_nothing_else(labelled: bool) -> None:
    report = made_up(labelled=labelled)
    html = page(report, samples=samples_of(report), pictures=pictures(label="cat" if labelled else None))
    reader = read(html)
    assert all(link.startswith("data:image/") for link in reader.links)
    assert "script" not in reader.tags
    assert "url(" not in html
    assert "@import" not in html
    assert re.sub(r'xmlns="http://www.w3.org/2000/svg"', "", html).count("http") == 0
    for drawing in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        root = ElementTree.fromstring(drawing)
        assert root[0].tag.endswith("title")
        assert "viewBox" in root.attrib
    assert html.count("<svg") == 4  # accuracy, distribution, loss, agreement


def test_a_student_that_learned_from_labels_is_not_said_to_be_without() -> None:
    report = made_up()
    assert " without labels (objective prg" in page(report, samples=samples_of(report), pictures=[])
    report["run"]["uses_labels"] = True
    html = page(report, samples=samples_of(report), pictures=[])
    assert " with a few labels (objective prg" in html
    assert "without labels" not in html
    assert "answers, and it or its teacher from a few labels." in html


def test_what_came_from_outside_is_escaped_everywhere() -> None:
    report = made_up()
    report["run"].update(name=EVIL, teacher=EVIL, student=EVIL, objective=EVIL)
    report["rows"][0].update(artifact=EVIL, backend=EVIL, precision=EVIL)
    report["rows"][3].update(reason=EVIL, artifact=EVIL + "2")
    report["machine"].update(cpu=EVIL, os=EVIL, versions={EVIL: EVIL})
    report.update(command=EVIL, made_by=[EVIL], notes=[EVIL], created=EVIL, prgkit=EVIL)
    report["training"] = [{**epoch, EVIL: 1.0 + epoch["epoch"]} for epoch in report["training"]]
    evil = [Picture(np.zeros((8, 8, 3), np.uint8), "differs", EVIL, 50.0, EVIL + '"', 50.0, EVIL)]
    html = page(report, samples=samples_of(report), pictures=evil)
    assert "script" not in read(html).tags
    assert "<script" not in html
    assert html.count("&lt;script&gt;") > 10
    assert "<script" not in re.sub(r"```.*?```|`[^`]*`", "", markdown(report), flags=re.DOTALL)
    assert EVIL in terminal(report)  # rich prints it as it is


def test_a_class_named_like_a_script_is_shown_as_text() -> None:
    name, shown = "<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"
    report = made_up()
    report["per_class"] = per_class.by_class("onnx-fp32", STUDENT, TEACHER, LABELS, (name, "dog", "hen")).model_dump()
    picture = Picture(np.zeros((8, 8, 3), np.uint8), "sample", name, 50.0, "dog", 50.0, name)
    html = page(report, samples=samples_of(report), pictures=[picture])
    assert "script" not in read(html).tags
    for start in (
        f'<th scope="row">{shown}',
        f"<b>{shown}</b>",
        f'<td class="name" data-name="Taken for"><span>{shown}',
    ):
        assert start in html
    assert re.search(f"<text [^>]*>{re.escape(shown[:12])}", html)  # in the chart, as far as there is room
    assert "&lt;script>alert(1)&lt;/script>" in markdown(report)


def test_brackets_in_names_are_text_in_the_terminal() -> None:
    report = made_up()
    report["rows"][0]["artifact"] = "[red]onnx[/nothing]"
    report["notes"] = ["[/bold]"]
    assert "[red]onnx[/nothing]" in terminal(report)


def test_an_audit_is_told_in_a_line_a_table_and_a_section_and_bounds_stay_bounds() -> None:
    report = made_up(labelled=False)
    assert "Audit" not in terminal(report) + markdown(report)
    of_all = {"images": 62, "right": 50, "top1": 80.64, "top1_interval": [69.1, 88.6]}
    bounded = {"images": 60, "right": 39, "top1": 64.5, "top1_at_most": 69.4, "top1_interval": [52.1, 79.5]}
    rows = [
        {"artifact": EVIL, "backend": "onnxruntime", "device": "cpu", "unknown": 3, **bounded},
        {"artifact": "onnx-fp16", "backend": "onnxruntime", "device": "cuda", "unknown": 0, **of_all}
        | {"top1_at_most": 80.64},
    ]
    report["audit"] = {"images": 100, "ticked": 62, "teacher": of_all, "rows": rows}
    assert audit_summary(report) == [
        "Audit, right on ticked images (95 % interval): the teacher 80.6 % (69.1–88.6 %) of 62; "
        f"{EVIL} 64.5–69.4 % (52.1–79.5 %) of 60; onnx-fp16 (cuda) 80.6 % (69.1–88.6 %) of 62."
    ]
    assert audit_summary(report)[0] in " ".join(terminal(report).split())
    html = page(report, samples=samples_of(report), pictures=[])
    assert "script" not in read(html).tags
    assert "On 62 ticked images of a sample of 100, in which" in html
    assert "| 64.5–69.4 % | 52.1–79.5 % | 60 |" in markdown(report)
    report["audit"]["rows"] = []  # none of the ticked images travelled
    assert audit_summary(report)[0].endswith("the teacher 80.6 % (69.1–88.6 %) of 62.")


def audit_summary(report: dict[str, Any]) -> list[str]:
    section = quality_sections.audit(Report.model_validate(report))
    assert section is not None
    return list(section.summary)


def terminal(report: dict[str, Any], width: int = 400) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(bench_report.report_table(Report.model_validate(report)))
    return console.export_text()


def test_the_headline_says_what_is_kept_and_how_fast() -> None:
    report = made_up()
    assert (
        headline(report)
        == "RepViT-M0.9 keeps 98.0 % of its teacher's accuracy at 1.90 ms an image on 2 threads of AMD EPYC"
    )
    report["rows"][0].update(top1=63.0, top1_interval=[61.0, 64.9], lead_bound=0.2)
    assert "beats its teacher (" in headline(report), "paired by image, however wide its own interval is"
    report["rows"][0].update(top1_interval=[61.3, 64.7], lead_bound=0.0)  # so much more could be chance
    assert headline(report).startswith(
        "RepViT-M0.9 matches its teacher (63.0 % against its teacher's 61.2 %, without a label) at 1.90 ms"
    )
    report["pseudo_labels"] = doubtful() | {
        "correction": DEBIASED
    }  # the teacher by itself is what the student is held against
    report["teacher"].update(top1=62.5, top1_uniform_prompts=58.0)
    report["rows"][0]["lead_bound"] = 4.0
    assert "beats its teacher (63.0 % against its teacher's 58.0 %, 62.5 % corrected, without a label)" in headline(
        report
    )
    report["pseudo_labels"] = None
    assert headline(made_up(labelled=False)).startswith(
        "RepViT-M0.9 gives its teacher's answer on 79.4 % of the images at"
    )
    report["rows"] = report["rows"][3:]
    assert headline(report) == "RepViT-M0.9: nothing could be measured on this machine"


DEBIASED = {
    "refine": None,
    "debias": 0.5,
    "entropy": None,
    "temperature": 1.0,
    "changed": 3,
    "images": 10,
    "effective_classes": {"before": 1.5, "after": 2.0},
}


def doubtful() -> dict[str, Any]:
    """Return the statistics of pseudo-labels that look like chance."""
    flat = {"mean": 0.5, "histogram": [0, 10]}
    return {
        "doubts": ["nearly even odds for every class"],
        "images": 10,
        "confidence": flat,
        "margin": flat,
        "close_calls": 10,
        "balance": {
            "counts": [5, 5],
            "uniform": 5.0,
            "largest": {"class": "cat", "count": 5},
            "smallest": {"class": "dog", "count": 5},
            "unmatched": [],
            "effective_classes": 2.0,
        },
        "confused": [],
        "near_duplicates": {"compared": 10, "images": 0, "pairs": []},
        "outliers": {"count": 0, "floor": 0.5, "lowest": []},
        "templates": [{"template": "a {}", "agreement": 100.0}],
    }


def test_a_student_of_a_teacher_that_answers_by_chance_is_not_praised() -> None:
    report = made_up(labelled=False)
    report["pseudo_labels"] = doubtful()
    for said in (headline(report), markdown(report)):
        assert "teacher's answers look like chance" in said
        assert "gives its teacher" not in said
    report = made_up()
    report["pseudo_labels"] = doubtful()
    assert "keeps 98.0 %" in headline(report)  # the labels say that the teacher is right
    report["teacher"]["top1"] = 1.4  # of 2,000 images: at least 0.97 %
    assert headline(report) == (
        "RepViT-M0.9 at 1.90 ms an image on 2 threads of AMD EPYC: its teacher's answers look like chance, so keeping "
        "to them means nothing (right on 1.4 % of 2,000 labelled images, where chance gives 1.0 %)"
    )
    report["teacher"]["top1"] = 1.6
    assert "look like chance" not in headline(report)


def test_what_classes_counted_in_training_stands_beside_their_figures() -> None:
    report = made_up()
    plain = page(report, samples=None, pictures=[])
    assert "counted" not in plain
    report["per_class"] = per_class.by_class("onnx-fp32", STUDENT, TEACHER, LABELS, NAMES)
    first, second = NAMES[:2]
    report["pseudo_labels"] = {**doubtful(), "class_weights": {first: 0.4, second: 3.2}}
    text = page(report, samples=None, pictures=[])
    assert f"an image of {second} counted 3.20, one of {first} 0.40, by the teacher&#39;s answer" in text
    assert f"an image counts 0.40 ({first}) to 3.20 ({second})" in text
    row = next(part for part in re.findall("<tr.*?</tr>", text, re.DOTALL) if f">{first}<" in part)
    assert "0.40" in row


def test_the_corrections_of_the_answers_are_a_table_with_the_ticks_where_there_are_any() -> None:
    report = made_up()
    row = {
        "name": "none",
        "images": 90,
        "changed": 0.0,
        "mass": [0.7, 0.3],
        "effective_classes": 1.84,
        "two_views": 91.0,
    }
    inmap = {**row, "name": "inmap", "used": True, "changed": 12.5, "mass": [0.5, 0.5], "ticked": [41, 44, 50]}
    report["pseudo_labels"] = {**doubtful(), "corrections": [{**row, "ticked": [38, 38, 50], "agreement": {"inmap": 87.5}},
                                                             {**inmap, "agreement": {"none": 87.5}}]}  # fmt: skip
    text = page(report, samples=None, pictures=[])
    assert "Fitted to 90 unlabelled images before the first epoch" in text
    line = next(part for part in re.findall("<tr.*?</tr>", text, re.DOTALL) if "41 to 44 of 50" in part)
    cells = [cell.strip() for cell in re.sub("<[^>]*>", "|", line).split("|") if cell.strip()]
    assert cells == ["inmap (used)", "12.5 %", "50.0 to 50.0 %", "1.8", "91.0 %", "41 to 44 of 50"]


def test_the_row_to_speak_of_is_the_fastest_that_loses_less_than_a_point() -> None:
    report = made_up()
    report["rows"] = [row("slow", 4.0, 60.0), row("fast-but-wrong", 1.0, 40.0), row("fast", 2.0, 59.4)]
    rows = Report.model_validate(report).rows
    assert formatting.lead_row(rows, []) is rows[2]


def test_one_file_on_two_runtimes_is_told_apart_everywhere() -> None:
    report = made_up()
    report["rows"] = [row("onnx-fp32", 2.0, 60.0), row("onnx-fp32", 1.0, 60.0, backend="openvino")]
    taken = samples_of(report)
    names = ["onnx-fp32", "onnx-fp32 (OpenVINO)"]
    series = latencies_ms(Report.model_validate(report).rows, taken)
    assert list(series) == names
    assert np.median(series[names[0]]) > 1.5 > np.median(series[names[1]])
    assert headline(report).endswith(" at 1.00 ms an image on 2 threads of AMD EPYC, with OpenVINO")
    for text in (markdown(report), page(report, samples=taken, pictures=[])):
        assert all(text.count(name) >= 2 for name in names)


def test_what_was_unstable_says_so_where_its_figures_stand() -> None:
    report = made_up()
    assert "unstable" not in page(report, pictures=[])
    report["rows"][0]["latency"]["round_p50_ms"] = [1.9, 2.1, 2.0]  # 2.1 is more than 1.1 times 1.9
    html = page(report, pictures=[])
    assert "<b>it was unstable</b>, see the notes" in html
    assert html.count(">unstable</span>") == 1


def test_model_names() -> None:
    names = ["repvit_m0_9", "repvit_m1_1.dist_450e_in1k", "efficientnet_b0", "resnet50", "vit_tiny_patch16_224"]
    assert [formatting.model_name(name) for name in names] == [
        "RepViT-M0.9",
        "RepViT-M1.1",
        "EfficientNet-B0",
        "resnet50",
        "vit_tiny_patch16_224",
    ]


def test_almost_everything_is_not_everything() -> None:
    assert [formatting.percent(value) for value in (100.0, 99.97, 99.94, 99.85, 0.0, None)] == [
        "100.0 %",
        "99.9 %",
        "99.9 %",
        "99.8 %",
        "0.0 %",
        "–",
    ]


def test_rows_without_figures_say_why() -> None:
    report = made_up()
    report["rows"].append(missing("onnx-int8", "failed", "its process was ended by SIGKILL"))
    html = page(report, samples=samples_of(report), pictures=[])
    assert "never executed here</span> it needs an NVIDIA GPU and its driver" in html
    assert "its process was ended by SIGKILL" in html
    assert "| never executed here: it needs an NVIDIA GPU and its driver |" in markdown(report)
    assert "failed" in terminal(report)


def test_a_report_in_which_nothing_was_measured_is_still_a_page() -> None:
    report = made_up()
    report["rows"], report["training"] = report["rows"][3:], []
    reader = read(page(report, pictures=[]))
    assert "svg" not in reader.tags
    assert "nothing could be measured" in markdown(report)
    assert "nothing could be measured" in terminal(report)


def test_the_markdown_tables_have_as_many_cells_as_columns() -> None:
    report = made_up()
    report["rows"][3]["reason"] = "no a|b here"
    lines = [line for line in markdown(report).splitlines() if line.startswith("|")]
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in lines]
    assert widths[:6] == [13] * 6
    assert set(widths[6:]) == {4, 5}


def test_at_most_48_pictures_and_each_says_who_was_wrong() -> None:
    report = made_up()
    html = page(report, pictures=[*pictures(30), *pictures(30, group="differs")])
    assert read(html).tags.count("img") == 48
    assert html.count(">student wrong<") == 48
    big = page(report, pictures=pictures(1, label=None, size=300))
    assert ">differ<" in big
    assert "data:image/jpeg" in big


def test_ticks_are_round_and_inside() -> None:
    assert svg.nice_ticks(0, 1) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert svg.nice_ticks(57.2, 63.1) == [58, 60, 62]
    assert svg.nice_ticks(3, 3) == [3]
    assert svg.log_ticks(0.9, 110) == [1, 3, 10, 30, 100]
    assert svg.log_ticks(1.81, 2.12) == [1.9, 2.0, 2.1]
    assert all(0.02 <= tick <= 5000 for tick in svg.log_ticks(0.02, 5000))


def test_the_pareto_front_holds_what_nothing_beats() -> None:
    made = [(1.0, 50.0), (2.0, 60.0), (3.0, 55.0), (4.0, 60.0), (5.0, 70.0)]
    points = [figures.Point(str(i), ms, (ms, ms), score, None, i) for i, (ms, score) in enumerate(made)]
    assert [point.label for point in figures.pareto(points)] == ["0", "1", "4"]


def test_labels_of_equal_points_do_not_cover_each_other() -> None:
    points = [figures.Point(f"artifact-{i}", 2.0 + i / 100, (1.99, 2.02), 60.0, (58.0, 62.0), i) for i in range(4)]
    root = ElementTree.fromstring(figures.accuracy_latency(points, score_name="Top-1, %", reference=("teacher", 61.2)))
    boxes = []
    for node in root.iter():
        if node.tag.endswith("text") and (node.text or "").startswith("artifact-"):
            x, y, width = float(node.attrib["x"]), float(node.attrib["y"]), svg.text_width(node.text or "")
            left = x if node.attrib["text-anchor"] == "start" else x - width
            assert left >= 0
            assert left + width <= svg.WIDTH
            boxes.append((left, y - svg.FONT, left + width, y + 3))
    assert len(boxes) == 4
    assert not any(figures.overlap(a, b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_a_long_name_does_not_lie_under_the_figures_of_its_lane() -> None:
    name = "onnx-int8-longer-tensorrt (OpenVINO)"
    root = ElementTree.fromstring(figures.latency_distribution({name: [0.376] * 1200, "torch": [45.3] * 1200}))
    told = [node.text or "" for node in root.iter() if node.tag.endswith("text") and "p50" in (node.text or "")]
    assert told[1] == "p50 45.3 · p90 45.3 · p99 45.3 · slowest 45.3"
    assert told[0].startswith("p50 0.376")
    assert 1.12 * svg.text_width(name) + svg.text_width(told[0]) < svg.WIDTH


def test_of_many_points_no_labels_overlap_and_the_front_keeps_its_own() -> None:
    made = [(0.5 + i / 50, 60.0 + (i == 3)) for i in range(30)]
    points = [figures.Point(f"artifact-{i} (cuda)", ms, (ms, ms), score, None, i) for i, (ms, score) in enumerate(made)]
    root = ElementTree.fromstring(figures.accuracy_latency(points, score_name="Top-1, %"))
    labels = [node for node in root.iter() if node.tag.endswith("text") and (node.text or "").startswith("artifact-")]
    boxes = []
    for node in labels:
        x, y, width = float(node.attrib["x"]), float(node.attrib["y"]), svg.text_width(node.text or "")
        left = x if node.attrib["text-anchor"] == "start" else x - width
        boxes.append((left, y - svg.FONT, left + width, y + 3))
    assert not any(figures.overlap(a, b) for i, a in enumerate(boxes) for b in boxes[:i])
    bold = {node.text for node in labels if "font-weight" in node.attrib}
    assert bold == {point.label for point in figures.pareto(points)} == {"artifact-0 (cuda)", "artifact-3 (cuda)"}


def test_the_distribution_shows_the_slowest_run() -> None:
    drawing = figures.latency_distribution({"a": [1.0] * 2000 + [250.0], "b": [2.0, 2.1]})
    assert "slowest 250" in drawing
    assert "p99 1.00" in drawing
    assert drawing.count("p99") == 1  # two samples have no 99th percentile
    ElementTree.fromstring(drawing)


def test_values_that_leave_no_room_still_make_axes() -> None:
    same = figures.Point("only", 2.0, (2.0, 2.0), 100.0, None, 0)
    ElementTree.fromstring(figures.accuracy_latency([same], score_name="Top-1, %"))
    ElementTree.fromstring(figures.latency_distribution({"a": [1.0, 1.0]}))
    zero = [{"epoch": e, "loss": 0.0, "agreement": 0.0} for e in (1, 2)]
    section = training(zero)
    assert section is not None
    for drawing in section.plots:
        ElementTree.fromstring(drawing)
    assert training([{"epoch": 1, "loss": 1.0, "agreement": None}]) is None


def training(epochs: list[dict[str, Any]]) -> Section | None:
    return quality_sections.training(Report.model_construct(training=epochs))


def names_of_teachers(report: dict[str, Any]) -> list[str]:
    section = quality_sections.teacher_and_student(Report.model_validate(report))
    assert section is not None
    return [line[0] for line in md.table_rows(section)[:2]]


def test_a_corrected_teacher_is_said_to_be_corrected() -> None:
    report = made_up()
    plain = names_of_teachers(report)
    assert plain[1] == "Teacher, prompts weighted equally"
    report["pseudo_labels"] = doubtful() | {"correction": DEBIASED}
    corrected = names_of_teachers(report)
    assert corrected == [f"{plain[0]}, corrected", f"{plain[1]}, uncorrected"]


# Seven images of three classes; nobody ever saw a "hen", and the teacher errs with the student once of three times.
LABELS, STUDENT, TEACHER = (
    np.array(one) for one in ([0, 0, 0, 0, 1, 1, 1], [0, 1, 1, 0, 1, 0, 1], [0, 1, 0, 0, 1, 1, 0])
)
NAMES = ("cat", "dog", "hen")


def test_shares_by_class_are_of_the_labels_images() -> None:
    found = per_class.by_class("onnx-fp32", STUDENT, TEACHER, LABELS, NAMES)
    assert found.measure == "recall"
    cat, dog, hen = found.classes
    assert (cat.images, cat.student, cat.teacher) == (4, 50.0, 75.0)
    assert (dog.images, dog.student, dog.teacher) == (3, pytest.approx(66.667, abs=1e-3), dog.student)
    assert dog.student_interval == metrics.wilson(2, 3)
    assert hen.model_dump() == {
        "name": "hen", "images": 0, "student": None, "student_interval": None, "teacher": None, "teacher_interval": None
    }  # fmt: skip
    assert [pair.model_dump() for pair in found.pairs] == [
        {"name": "cat", "answer": "dog", "images": 2, "teacher_too": 1},
        {"name": "dog", "answer": "cat", "images": 1, "teacher_too": 0},
    ]


def test_without_labels_shares_by_class_are_of_the_teachers_answers() -> None:
    found = per_class.by_class("onnx-fp32", STUDENT, TEACHER, None, NAMES)
    assert found.measure == "agreement"
    assert [(one.images, one.student, one.teacher) for one in found.classes] == [
        *((4, 50.0, None), (3, pytest.approx(66.667, abs=1e-3), None), (0, None, None)),
    ]
    assert [(one.name, one.answer, one.images) for one in found.pairs] == [
        *(("cat", "dog", 2), ("dog", "cat", 1)),
    ]


def many(count: int, *, labelled: bool = True) -> PerClass:
    """Return the section of so many hostile classes with ten images each, the first the worst."""
    generator = np.random.default_rng(0)
    truth = np.repeat(np.arange(count), 10)
    student, teacher = (
        np.where(generator.random(len(truth)) < 0.8, truth, generator.integers(0, count, len(truth))) for _ in range(2)
    )
    student[:10] = count - 1
    names = [f"{EVIL}|{index}" for index in range(count)]
    return per_class.by_class(EVIL, student, teacher, truth if labelled else None, names)


@pytest.mark.parametrize("labelled", [True, False])
def test_few_classes_are_shown_whole_and_of_many_the_worst_and_the_best(labelled: bool) -> None:
    report = made_up(labelled=labelled)
    for count, shown in ((10, 10), (100, 16)):
        report["per_class"] = many(count, labelled=labelled)
        html = page(report, samples=samples_of(report), pictures=[])
        assert "script" not in read(html).tags
        (drawing,) = re.findall(r"<svg[^>]*><title>Share by class.*?</svg>", html, re.DOTALL)
        assert drawing.count("<circle") == 1 + shown  # one in the key
        assert (f"… {count - shown} more …" in drawing) == (count > shown)
        (table,) = re.findall(r"<details>.*?</details>", html, re.DOTALL)
        assert table.count("<tr>") == 1 + count
        text = markdown(report)
        assert "<script" not in re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
        lines = text[text.index("## Class by class") : text.index("## Notes")].splitlines()
        assert len(re.findall(r"\| \d+ \| \d+\.\d % \|", "\n".join(lines))) == shown
        tables = [[len(re.findall(r"(?<!\\)\|", line)) for line in lines if line.startswith("|")]]
        assert set(tables[0]) == ({7, 5} if labelled else {5, 4})
    assert quality_sections.worst_first(report["per_class"])[0].student == 0


def test_a_report_of_an_earlier_version_has_no_classes() -> None:
    report = made_up()
    assert "Class by class" not in page(report, pictures=[]) + markdown(report)
    report["per_class"] = per_class.by_class("onnx-fp32", *(np.zeros(0, int),) * 3, NAMES)  # no class has an image
    assert "Class by class" not in page(report, pictures=[]) + markdown(report)


def test_the_classes_are_those_of_the_artifact_that_the_headline_speaks_of() -> None:
    rows = Report.model_validate(made_up()).rows
    logits = np.eye(3, dtype=np.float32)[STUDENT]
    given: list[tuple[Row, Any]] = [(one, logits if one is rows[0] else None) for one in rows]
    evaluation: Any = type("Evaluation", (), {"teacher_logits": np.eye(3)[TEACHER], "labels": LABELS})
    found = per_class.per_class(evaluation, given, [], NAMES)
    assert found is not None
    assert (found.artifact, found.classes[0].student) == ("onnx-fp32", 50.0)
    assert per_class.per_class(evaluation, given[1:], [], NAMES) is None


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    darker, lighter = sorted((luminance(a), luminance(b)))
    return (lighter + 0.05) / (darker + 0.05)


def test_every_colour_is_defined_for_light_and_dark_and_can_be_read_there() -> None:
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{(.*?)\n *\}", asset("report.css"), re.DOTALL)[:2]
    )
    used = set(re.findall(r"var\(--([\w-]+)", asset("report.css"))) | {
        f"series-{index + 1}" for index in range(len(svg.COLOURS))
    }
    for scheme in (light, dark):
        assert used <= scheme.keys()
        for name in ("ink", "muted", "accent", "good", "warn", "bad"):  # WCAG AA: text
            for behind in ("page", "card"):
                assert contrast(scheme[name], scheme[behind]) >= 4.5, (name, behind)
        for name in ("good", "warn", "bad"):
            assert contrast(scheme[name], scheme[f"{name}-soft"]) >= 4.5, name
        for index in range(len(svg.COLOURS)):  # WCAG AA: what must be seen to understand a drawing
            assert contrast(scheme[f"series-{index + 1}"], scheme["card"]) >= 3, index

"""Whether INT8 is kept on this machine: it must be as good as FP32 here, and faster than FP32 and FP16 here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from prgkit.evaluate.report.schema import Int8Verdict, Interval, Model, Row, measured_latency
from prgkit.export.bundle.bundle import Bundle, fp32_onnx
from prgkit.export.bundle.fidelity import comparison_sentence, int8_sentence
from prgkit.export.bundle.manifest import Artifact, NonInferiority
from prgkit.metrics import mean_interval
from prgkit.storage.atomic import write_sealed
from prgkit.storage.documents import read_document

FILE = "selection.json"  # beside the report
SCHEMA: Literal["prgkit.selection/2"] = "prgkit.selection/2"


class Selection(Model):
    """selection.json: the file that `predict` runs on this machine, and why."""

    schema_version: Literal["prgkit.selection/2"] = Field(SCHEMA, alias="schema")
    artifact: str
    sha256: str
    int8: list[Int8Verdict] = Field(description="The verdict on each INT8 file, the best first.")


def judge_int8(bundle: Bundle, rows: Sequence[Row]) -> list[Int8Verdict]:
    """Judge every INT8 file that ONNX Runtime ran on this machine's CPU, by the report's ``rows``.

    Without evaluation images no row has been compared with FP32, and none is judged: `predict` keeps to FP32.
    """
    on_cpu = [row for row in rows if row.backend == "onnxruntime" and row.device == "cpu"]
    ran = {row.artifact: row for row in on_cpu if row.status == "measured"}
    floats = [row for row in ran.values() if row.precision in ("fp32", "fp16")]
    if not floats:
        return []
    against = min(floats, key=lambda row: measured_latency(row).p50_ms)
    files = [one for one in bundle.artifacts if (one.format, one.precision) == ("onnx", "int8")]
    return [
        judge(row, row.comparison, against, margin=bundle.manifest.margin)
        for one in files
        if (row := ran.get(one.name)) is not None and row.comparison is not None
    ]


def judge(row: Row, comparison: NonInferiority, against: Row, *, margin: float) -> Int8Verdict:
    """Return whether one INT8 file is kept, and why.

    It must be as good as FP32 (`NonInferiority.holds`). The latency counts by the ratio to that of ``against``, the
    faster of FP32 and FP16: its whole 95 % interval must lie below 1.
    """
    ratio, interval = round_ratio(measured_latency(row).round_p50_ms, measured_latency(against).round_p50_ms)
    faithful, faster = comparison.holds(margin), interval[1] < 1
    return Int8Verdict(
        artifact=row.artifact,
        backend=row.backend,
        device=row.device,
        kept=faithful and faster,
        faithful=faithful,
        faster=faster,
        comparison=comparison,
        margin=margin,
        against=against.artifact,
        ratio=ratio,
        ratio_interval=interval,
    )


def round_ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, Interval]:
    """Return the ratio of two latencies by their rounds' medians, with its 95 % interval over rounds.

    The artifacts took turns within each round, so the ratio is taken there, where drift has hit both alike; it is the
    geometric mean over the rounds, with the interval of the logarithms' mean by Student's t.
    """
    rounds = min(len(ours), len(theirs))
    logs = np.log(np.asarray(ours[:rounds]) / np.asarray(theirs[:rounds]))  # [rounds]
    low, high = mean_interval(logs.tolist())
    return float(np.exp(logs.mean())), (math.exp(low), math.exp(high))


def int8_notes(bundle: Bundle, verdicts: Sequence[Int8Verdict]) -> list[str]:
    """Say of every INT8 file whether it is kept, and why not; what was not kept at export says so again."""
    notes = [f"{facts.name}: {int8_sentence(facts)}." for facts in bundle.manifest.not_kept]
    return notes + [in_words(verdict) for verdict in verdicts]


def in_words(verdict: Int8Verdict) -> str:
    """Say of one INT8 file whether it is kept, with the figures."""
    low, high = verdict.ratio_interval
    latency = f"{verdict.ratio:.2f} times the latency of {verdict.against} ({low:.2f}–{high:.2f})"
    kept = "is kept on this machine" if verdict.kept else "is not kept on this machine"
    return f"{verdict.artifact} {kept}: {latency}; {comparison_sentence(verdict.comparison, verdict.margin)}."


def write_selection(folder: Path, bundle: Bundle, verdicts: Sequence[Int8Verdict]) -> None:
    """Write into ``folder`` which file `predict` runs on this machine; without INT8, there is none."""
    if not verdicts:
        (folder / FILE).unlink(missing_ok=True)
        return
    artifact = fp32_onnx(bundle)
    if verdicts[0].kept:
        artifact = next(one for one in bundle.artifacts if one.name == verdicts[0].artifact)
    selection = Selection(artifact=artifact.name, sha256=artifact.sha256, int8=list(verdicts))
    write_sealed(folder / FILE, selection.model_dump(mode="json"))


def selected_artifact(bundle: Bundle, folder: Path | None, runtime: str | None = None) -> Artifact:
    """Return the entry that `predict` runs: the one selected in this machine's bench folder, else the FP32 file.

    A selection of files that were exported anew since counts no more, nor one for another ``runtime``: whether INT8 is
    as good and faster was measured with the runtime that the verdict names.

    Raises:
        PrgkitError: the selection is damaged, or was written by another version.
        ExportError: the bundle has no FP32 file.
    """
    if folder is not None and (folder / FILE).exists():
        fix = "measure again: prgkit bench"
        selection = read_document(folder / FILE, Selection, SCHEMA, what="a bench's selection", fix=fix)
        judged_with = {verdict.artifact: verdict.backend for verdict in selection.int8}
        for artifact in bundle.artifacts:
            if artifact.sha256 == selection.sha256 and runtime in (None, judged_with.get(artifact.name)):
                return artifact
    return fp32_onnx(bundle)

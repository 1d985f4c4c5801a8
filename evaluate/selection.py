"""Whether INT8 is kept on this machine: it must hold the fidelity floor here, and be faster than FP32 and FP16 here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prgkit.export.bundle.bundle import Bundle, fp32_onnx
from prgkit.export.bundle.fidelity import fidelity, int8_sentence
from prgkit.export.bundle.manifest import Artifact
from prgkit.storage.atomic import read_sealed, write_sealed

FILE = "choice.json"  # beside the report
SCHEMA = "prgkit.choice/1"
Row = dict[str, Any]
Facts = dict[str, Any]


def choose(bundle: Bundle, rows: Sequence[Row], *, images: int) -> Facts | None:
    """Return which INT8 file is kept on this machine's CPU, with the figures; None where none was measured.

    ``rows`` are the report's, with agreement on ``images`` images. Of several that are kept it is the fastest, and what
    was found of the rest is under ``others``; where none is kept, it is the bundle's first.
    """
    here = [row for row in rows if row["backend"] == "onnxruntime" and row["device"] == "cpu"]
    ran = {row["artifact"]: row for row in here if row["status"] == "measured"}
    floats = [row for row in ran.values() if row["precision"] in ("fp32", "fp16")]
    if not floats:
        return None
    against = min(floats, key=lambda row: float(row["latency"]["p50_ms"]))
    files = [one for one in bundle.artifacts if (one.format, one.precision) == ("onnx", "int8")]
    floors = {one.name: bundle.manifest.fidelity_floor(one) for one in files}
    found = [judge(name, ran[name], against, floor, images) for name, floor in floors.items() if name in ran]
    ranked = sorted(found, key=lambda one: (not one["kept"], one["kept"] and one["ratio"]))
    return {**ranked[0], "others": ranked[1:]} if ranked else None


def judge(name: str, row: Row, against: Row, floor: float, images: int) -> Facts:
    """Return whether one INT8 file is kept, and why.

    The fidelity counts by the lower bound of its 95 % interval. The latency counts by the ratio to that of ``against``,
    the faster of FP32 and FP16: its whole 95 % interval must lie below 1.
    """
    ratio, interval = round_ratio(row["latency"]["round_p50_ms"], against["latency"]["round_p50_ms"])
    found = fidelity(round(row["agreement_fp32"] * images / 100), images)
    faithful, faster = found.holds(floor), interval[1] < 1
    return {
        "artifact": name,
        "kept": faithful and faster,
        "faithful": faithful,
        "faster": faster,
        **found.to_json(),
        "floor": floor,
        "against": against["artifact"],
        "ratio": ratio,
        "ratio_interval": interval,
    }


def round_ratio(
    ours: Sequence[float], theirs: Sequence[float], *, resamples: int = 1000, seed: int = 0
) -> tuple[float, list[float]]:
    """Return the ratio of two latencies by their rounds' medians, with its 95 % bootstrap interval over rounds.

    The artifacts took turns within each round, so the ratio is taken there, where drift has hit both alike, and its
    geometric mean over the rounds is resampled.
    """
    rounds = min(len(ours), len(theirs))
    logs = np.log(np.asarray(ours[:rounds]) / np.asarray(theirs[:rounds]))  # [rounds]
    drawn = np.random.default_rng(seed).integers(rounds, size=(resamples, rounds))
    low, high = np.exp(np.percentile(logs[drawn].mean(axis=1), [2.5, 97.5]))
    return float(np.exp(logs.mean())), [float(low), float(high)]


def int8_notes(bundle: Bundle, found: Facts | None) -> list[str]:
    """Say of every INT8 file whether it is kept, and why not; what was not kept at export says so again."""
    notes = [f"{facts.name}: {int8_sentence(facts)}." for facts in bundle.manifest.not_kept]
    notes += [verdict(one) for one in findings(found)]
    if found and sum(one["kept"] for one in findings(found)) > 1:
        notes.append(f"predict runs {found['artifact']}, the fastest of these.")
    return notes


def findings(found: Facts | None) -> list[Facts]:
    """Return what `choose` found of each INT8 file, the chosen one first."""
    return [found, *found.get("others", [])] if found else []


def verdict(found: Facts) -> str:
    """Say of one INT8 file whether it is kept, with the figures."""
    share = (
        f"the same answer as FP32 on {found['agreement']:.2f} % of {found['images']:,} images, lower 95 % bound "
        f"{found['interval'][0]:.2f} %, floor {found['floor']:g} %"
    )
    low, high = found["ratio_interval"]
    pace = f"{found['ratio']:.2f} times the latency of {found['against']} ({low:.2f}–{high:.2f})"
    kept = "is kept on this machine" if found["kept"] else "is not kept on this machine"
    return f"{found['artifact']} {kept}: {share}; {pace}."


def write_choice(folder: Path, bundle: Bundle, found: Facts | None) -> None:
    """Write into ``folder`` what `predict` obeys on this machine; where INT8 was not measured, there is no choice."""
    if found is None:
        (folder / FILE).unlink(missing_ok=True)
        return
    chosen = next(one for one in bundle.artifacts if one.name == found["artifact"])
    chosen = chosen if found["kept"] else fp32_onnx(bundle)
    write_sealed(
        folder / FILE,
        {"schema": SCHEMA, "artifact": chosen.name, "sha256": chosen.sha256, "int8": found},
    )


def chosen_artifact(bundle: Bundle, folder: Path | None) -> Artifact:
    """Return the entry that `predict` runs: the one chosen in this machine's bench folder, else the FP32 file.

    A choice of files that were exported anew since counts no more.

    Raises:
        PrgkitError: the choice is damaged.
        ExportError: the bundle has no FP32 file.
    """
    if folder is not None and (folder / FILE).exists():
        choice = read_sealed(folder / FILE, fix="measure again: prgkit bench")
        for artifact in bundle.artifacts:
            if artifact.sha256 == choice.get("sha256"):
                return artifact
    return fp32_onnx(bundle)

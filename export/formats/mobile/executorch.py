"""ExecuTorch: a .pte file whose network runs in XNNPACK, pixels in and logits out."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from prgkit.export.bundle.manifest import EXECUTORCH
from prgkit.export.formats.base import Format, Made
from prgkit.export.formats.mobile.apart import run_apart
from prgkit.export.formats.mobile.require import require_converter
from prgkit.export.formats.snippets import section
from prgkit.export.runtimes.executorch import ExecuTorchRunner

if TYPE_CHECKING:
    from prgkit.export.formats.student_export import StudentExport


def make_executorch(export: StudentExport) -> Made:
    """Lower the fused student to XNNPACK; it must give PyTorch's logits."""

    def write(path: Path) -> None:
        export.note("ExecuTorch: lowering takes a minute")
        run_apart(lower, export.program, path)

    artifact = export.finish(
        "executorch",
        "model.pte",
        write=write,
        converters=("executorch",),
        runner=ExecuTorchRunner,
        format=EXECUTORCH,
        precision="fp32",
        export_options=("--executorch",),
    )
    return Made([artifact])


def lower(program: Path, path: Path) -> None:
    """Write a program of torch.export as a .pte file: what XNNPACK has in XNNPACK, the rest by portable kernels."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    lowered = to_edge_transform_and_lower(torch.export.load(program), partitioner=[XnnpackPartitioner()])
    path.write_bytes(lowered.to_executorch().buffer)


EXECUTORCH_FORMAT = Format(
    "executorch",
    wanted=lambda options: "executorch" in options.formats,
    make=make_executorch,
    require=partial(require_converter, what="ExecuTorch", modules=("executorch",), extra="executorch"),
    how_to_run=partial(section, "executorch.md"),
)

"""The formats that a student leaves in; the list of all is here, and no other module knows one by its name."""

from prgkit.errors import ExportError
from prgkit.export.formats.base import Format
from prgkit.export.formats.mobile.coreml import COREML_FORMAT
from prgkit.export.formats.mobile.executorch import EXECUTORCH_FORMAT
from prgkit.export.formats.mobile.litert import LITERT_FORMAT
from prgkit.export.formats.mobile.ncnn import NCNN_FORMAT
from prgkit.export.formats.mobile.qnn import QNN_FORMAT
from prgkit.export.formats.onnx import ONNX_EMBEDDING, ONNX_EXPLAIN, ONNX_FP16, ONNX_FP32
from prgkit.export.formats.onnx_int8 import ONNX_INT8
from prgkit.export.formats.onnx_nchw import ONNX_NCHW
from prgkit.export.formats.options import ExportOptions
from prgkit.export.formats.tensorrt import FLOAT_ENGINES, INT8_ENGINES

# In the order in which they are made: each may be made of those before it.
FORMATS: list[Format] = [
    *(ONNX_FP32, ONNX_FP16, FLOAT_ENGINES, ONNX_NCHW, ONNX_EXPLAIN, ONNX_INT8, INT8_ENGINES, ONNX_EMBEDDING),
    *(LITERT_FORMAT, EXECUTORCH_FORMAT, NCNN_FORMAT, COREML_FORMAT, QNN_FORMAT),
]


def wanted_formats(options: ExportOptions) -> list[Format]:
    """Return the formats that options ask for, in the order in which they are made.

    Raises:
        PrgkitError: one of them cannot be made here, is none, or is not asked for by its name.
    """
    formats = [one for one in FORMATS if one.wanted(options)]
    wanted, known = {one.name for one in formats}, {one.name: one for one in FORMATS}
    for name in options.formats:
        if name not in known:
            by_name = ", ".join(one.name for one in FORMATS if one.asked_by is None)
            raise ExportError(f"there is no format {name!r}", fix=f"one of: {by_name}")
        if name not in wanted:
            fix = f"{known[name].asked_by} asks for it; in Python, arguments of these names"
            raise ExportError(f"the format {name!r} is not asked for by its name", fix=fix)
    for one in formats:
        one.require(options)
    return formats

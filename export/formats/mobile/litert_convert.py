"""What LiteRT's converter and its quantiser do, each in a process that is theirs alone: see `run_apart`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

INPUT = "pixels"
SIGNATURE = "serving_default"


def convert(program: Path, path: Path) -> None:
    """Write a program of torch.export, of uint8 pixels [1, S, S, 3], as a .tflite file."""
    import litert_torch
    import torch

    exported = torch.export.load(program)
    _, named = exported.example_inputs
    litert_torch.convert(exported.module(), sample_kwargs=named).export(str(path))


def halve(fp32: Path, path: Path) -> None:
    """Write a .tflite file again with its weights in float16; runtimes without float16 widen them when they open it."""
    from ai_edge_quantizer import qtyping, quantizer

    config = qtyping.OpQuantizationConfig(
        weight_tensor_config=qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT),
        compute_precision=qtyping.ComputePrecision.FLOAT,
        explicit_dequantize=True,
    )
    made = quantizer.Quantizer(str(fp32))
    made.update_quantization_recipe(".*", qtyping.TFLOperationName.ALL_SUPPORTED, config, algorithm_key="float_casting")
    made.quantize(enable_progress_report=False).export_model(str(path))


def quantise(fp32: Path, calibration: Path, path: Path) -> None:
    """Write a .tflite file again with weights and activations in int8; logits stay float32.

    Args:
        fp32: the file.
        calibration: a .npy file of the pixels [n, S, S, 3] that ranges of activations are taken from.
        path: the file that is written.
    """
    from ai_edge_quantizer import qtyping, quantizer, recipe

    made = quantizer.Quantizer(str(fp32), recipe.static_wi8_ai8())
    made.update_quantization_recipe(".*", qtyping.TFLOperationName.OUTPUT, algorithm_key="no_quantize")
    samples = [{INPUT: pixels} for pixels in np.load(calibration)[:, None]]
    ranges = made.calibrate({SIGNATURE: samples}, num_threads=1)
    made.quantize(ranges, enable_progress_report=False).export_model(str(path))

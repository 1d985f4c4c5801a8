"""Deploy a student: ONNX, TensorRT, and the runners that prove they agree."""

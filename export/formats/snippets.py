"""Programs that run a bundle's files without prgkit: a few lines of Python, C++ for ONNX Runtime and for TensorRT."""

from __future__ import annotations

import math
import textwrap

from prgkit.config.image_size import Size, sides
from prgkit.data.decode import LARGEST, NO_DATA
from prgkit.data.preprocessing import LONGEST, Preprocessing
from prgkit.export.bundle.manifest import Manifest

TWO_INPUTS = """In other languages give both inputs, too: `pixels`, and `class_vectors` [classes, D] float32. Engines
hold their class vectors: `prgkit export --open-vocabulary --trt`, where the student was trained, makes such a bundle.
"""


def cpp_section(manifest: Manifest) -> str:
    """Return how the student runs in C++."""
    size = manifest.preprocessing.image_size
    if takes_class_vectors(manifest):
        return TWO_INPUTS
    return f"""## C++, with onnxruntime

```cpp
{onnxruntime_lines(size)}
```

It reads prepared pixels, {math.prod(sides(size)) * 3:,} bytes, from standard input. Some to try it with:

```console
$ python -c "import sys; from PIL import Image; sys.stdout.buffer.write(Image.open(sys.argv[1]).tobytes())" \\
    golden/00.input.png | ./name
```

OpenVINO reads the file as it is, too; told nothing, it computes in bfloat16 where the processor can:
`openvino.Core().compile_model("model.onnx", "CPU", {{"INFERENCE_PRECISION_HINT": "f32"}})`.
"""


def tensorrt_section(manifest: Manifest) -> str:
    """Return how the student runs as an engine."""
    if takes_class_vectors(manifest):
        return ""
    size = manifest.preprocessing.image_size
    return f"""
## TensorRT

`prgkit export --trt` in this folder builds engines and compares them with the ONNX file. Without prgkit:

```console
{trtexec_line(manifest)}
```

Types come from the file: for FP16 give `model.fp16.onnx` in place of `model.onnx` (made by `prgkit export --fp16`), and
do not add `--fp16`. TensorRT 11 is always strongly typed; leave `--stronglyTyped` out there. Class names are not in an
engine: read them from `manifest.json`.

```cpp
{tensorrt_lines(size, len(manifest.classes))}
```

Both C++ programs are written from the documented interfaces; prgkit's tests run the Python lines only.
"""


def takes_class_vectors(manifest: Manifest) -> bool:
    """Tell whether the ONNX files take their class vectors as an input."""
    return manifest.open_vocabulary is not None and manifest.open_vocabulary.class_vectors == "input"


def python_lines(facts: Preprocessing, *, takes_vectors: bool = False) -> str:
    """Return lines that name what is in an image file, read as `load_image` and ``prepare`` do.

    They need numpy, Pillow and onnxruntime.
    """
    given = '"pixels": np.asarray(image)[None]'
    if takes_vectors:
        given += ', "class_vectors": np.load("class_vectors.npy")'
    return f"""import json, sys, numpy as np, onnxruntime
from PIL import Image, ImageChops, ImageOps
image, session = Image.open(sys.argv[1]), onnxruntime.InferenceSession("model.onnx")
classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
{reading(facts)}
{resizing(facts)}
print(classes[session.run(None, {{{given}}})[0][0].argmax()])"""


def reading(facts: Preprocessing) -> str:
    """Return the lines that bring an image of any kind to upright 8-bit RGB, as `data.decode.upright_rgb` does."""
    return f"""if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
    image = ImageChops.invert(image)  # Pillow takes every CMYK JPEG for Adobe's inverted kind
tags, image = getattr(image, "tag_v2", {{262: 1, 338: (2,)}}), ImageOps.exif_transpose(image)  # the tags of a TIFF
if image.mode[0] in "IF":  # grey of more than 8 bits
    values = np.asarray(image).astype(np.float32)
    real = (np.abs(values) < {LARGEST!r}) & ~np.isin(values, {NO_DATA})
{textwrap.indent(range_of_deep_grey(facts), "    ")}
    low, high = (high, low) if tags.get(262) == 0 else (low, high)  # white is 0
    values = np.rint(np.where(real, values - low, 0) * (255 / (high - low or 1)))
    image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
if image.has_transparency_data and tags.get(338, (0,))[0] in (1, 2) and image.convert("RGBA").getextrema()[3][1] > 1:
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
left, top = (max(0, side - {LONGEST} * min(image.size)) // 2 for side in image.size)  # of a line, the middle
image = image.convert("RGB").crop((left, top, image.width - left, image.height - top))"""


def range_of_deep_grey(facts: Preprocessing) -> str:
    """Return the lines that say which values are black and white, as `prgkit.data.decode.grey_range` does."""
    if facts.grey_range:
        low, high = facts.grey_range
        return f"low, high = {low!r}, {high!r}  # black and white in the images that were learned from"
    return """numbers = np.sort(values[real]) if real.any() else np.zeros(1)
low, high = numbers[[numbers.size // 1000, -1 - numbers.size // 1000]].tolist()  # a few lie far from all others
low, high = numbers[np.abs(numbers - (low + high) / 2) <= 1.5 * (high - low)][[0, -1]].tolist()
if low >= 0 and not high / 2 < low < high:  # as many bits as hold the largest; a narrow band is stretched
    depths = [top for top in (255, 1023, 4095, 16383, 65535) if high <= top and image.mode != "F"]
    low, high = 0, 1 if image.mode == "F" and 0.25 < high <= 1 else (depths or [high])[0]"""


def resizing(facts: Preprocessing) -> str:
    """Return the lines that bring an image to the input's size, as `Preprocessing.prepare` does."""
    (height, width), filter_ = sides(facts.image_size), f"Image.Resampling.{facts.interpolation.upper()}"
    if facts.squash:
        return f"image = image.resize(({width}, {height}), {filter_})"
    tall, wide = (math.floor(side / facts.crop) for side in (height, width))
    size = f"tuple(int({tall} * side / min(image.size)) for side in image.size)"
    if tall != wide:
        size = f"tuple(round(side / min(image.width / {wide}, image.height / {tall})) for side in image.size)"
    return f"""size = {size}
left, top = round((size[0] - {width}) / 2), round((size[1] - {height}) / 2)
image = image.resize(size, {filter_}).crop((left, top, left + {width}, top + {height}))"""


def onnxruntime_lines(size: Size) -> str:
    """Return a program in C++17 that names what is in prepared pixels."""
    height, width = sides(size)
    return f"""// g++ -std=c++17 name.cpp -I ORT/include -L ORT/lib -lonnxruntime -o name
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <vector>
#include <onnxruntime_cxx_api.h>
int main() {{
  Ort::Env env;
  Ort::Session session(env, ORT_TSTR("model.onnx"), Ort::SessionOptions());
  std::vector<uint8_t> pixels({height} * {width} * 3);  // rows of RGB
  if (std::fread(pixels.data(), 1, pixels.size(), stdin) != pixels.size()) return 1;
  const std::array<int64_t, 4> shape{{1, {height}, {width}, 3}};
  auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  auto input = Ort::Value::CreateTensor<uint8_t>(memory, pixels.data(), pixels.size(), shape.data(), shape.size());
  const char* input_name = "pixels";
  const char* output_name = "logits";
  auto outputs = session.Run(Ort::RunOptions(), &input_name, &input, 1, &output_name, 1);
  const float* logits = outputs[0].GetTensorData<float>();
  const size_t classes = outputs[0].GetTensorTypeAndShapeInfo().GetElementCount();
  Ort::AllocatorWithDefaultOptions allocator;
  auto names = session.GetModelMetadata().LookupCustomMetadataMapAllocated("classes", allocator);
  std::printf("class %td, counted from 0, of %s\\n", std::max_element(logits, logits + classes) - logits, names.get());
}}"""


def trtexec_line(manifest: Manifest) -> str:
    """Return the command that builds an FP32 engine with TensorRT's own tool, for the recipe's batch sizes."""
    height, width = sides(manifest.preprocessing.image_size)
    shapes = " ".join(
        f"--{bound}Shapes=pixels:{count}x{height}x{width}x3"
        for bound, count in zip(("min", "opt", "max"), manifest.export.batch, strict=True)
    )
    return f"$ trtexec --onnx=model.onnx --saveEngine=model.engine --stronglyTyped --noTF32 {shapes}"


def tensorrt_lines(size: Size, classes: int) -> str:
    """Return a program in C++17 for TensorRT 10 and 11 that names what is in prepared pixels."""
    height, width = sides(size)
    return f"""// g++ -std=c++17 name.cpp -I CUDA/include -L CUDA/lib64 -lnvinfer -lcudart -o name
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <memory>
#include <vector>
#include <NvInfer.h>
#include <cuda_runtime_api.h>
struct Log : nvinfer1::ILogger {{
  void log(Severity severity, const char* text) noexcept override {{
    if (severity <= Severity::kWARNING) std::fprintf(stderr, "%s\\n", text);
  }}
}};
int main() {{
  Log log;
  std::ifstream file("model.engine", std::ios::binary);
  std::vector<char> bytes{{std::istreambuf_iterator<char>(file), {{}}}};
  std::unique_ptr<nvinfer1::IRuntime> runtime(nvinfer1::createInferRuntime(log));
  std::unique_ptr<nvinfer1::ICudaEngine> engine(runtime->deserializeCudaEngine(bytes.data(), bytes.size()));
  if (!engine) return 1;  // it was built for another GPU or another TensorRT
  std::unique_ptr<nvinfer1::IExecutionContext> context(engine->createExecutionContext());
  std::vector<uint8_t> pixels({height} * {width} * 3);  // rows of RGB
  std::vector<float> logits({classes});
  if (std::fread(pixels.data(), 1, pixels.size(), stdin) != pixels.size()) return 1;
  void *input, *output;
  cudaStream_t stream;
  cudaStreamCreate(&stream);
  cudaMalloc(&input, pixels.size());
  cudaMalloc(&output, logits.size() * sizeof(float));
  context->setInputShape("pixels", nvinfer1::Dims4(1, {height}, {width}, 3));
  context->setTensorAddress("pixels", input);
  context->setTensorAddress("logits", output);
  cudaMemcpyAsync(input, pixels.data(), pixels.size(), cudaMemcpyHostToDevice, stream);
  if (!context->enqueueV3(stream)) return 1;
  cudaMemcpyAsync(logits.data(), output, logits.size() * sizeof(float), cudaMemcpyDeviceToHost, stream);
  if (cudaStreamSynchronize(stream) != cudaSuccess) return 1;
  std::printf("class %td, counted from 0\\n", std::max_element(logits.begin(), logits.end()) - logits.begin());
}}"""


def vocabulary_section(manifest: Manifest) -> str:
    """Return how the classes are changed where the network has no class head; nothing where it has one."""
    scoring = manifest.open_vocabulary
    if scoring is None:
        return ""
    place = "the second input" if takes_class_vectors(manifest) else "the initializer"
    return f"""
## Other classes

This student has no class head. It ends in features in its teacher's space, and a logit is {scoring.logit_scale:.6g}
times the cosine between them and the class's vector. These are {place} `class_vectors` [classes, {scoring.width}] of
every ONNX file here, and `class_vectors.npy`. Where the teacher is at hand,

```console
$ prgkit relabel --classes new.txt --run FOLDER
```

(FOLDER is this one, from outside it) gives it the classes of a text file with one name a line, in seconds, without an
image and without training. Engines are then built again: `prgkit export --trt`.
"""

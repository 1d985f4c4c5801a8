// Names what is in a picture with a bundle's model.onnx, as `prgkit predict` does, without Python:
//   name_image BUNDLE PICTURE.ppm
// The picture is a binary PPM (P6) of any size: convert photo.jpg photo.ppm, or what your decoder or camera gives, as
// rows of RGB. It is resized and cropped here as the student was taught, by Pillow's filters; the mean and the standard
// deviation are applied inside of the model, which takes uint8.
#include <algorithm>
#include <array>
#include <cctype>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <numeric>
#include <regex>
#include <stdexcept>
#include <string>
#include <vector>

#include <onnxruntime_cxx_api.h>

struct Image {
  int width = 0, height = 0;
  std::vector<uint8_t> rgb;  // rows of RGB
};

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), {}};
}

Image read_ppm(const std::string& path) {
  const std::string data = read_file(path);
  size_t place = 0;
  auto word = [&] {  // the next one of the header, in which # begins a comment
    while (place < data.size() && (std::isspace(static_cast<unsigned char>(data[place])) || data[place] == '#')) {
      if (data[place] == '#') place = std::min(data.find('\n', place), data.size());
      else ++place;
    }
    const size_t start = place;
    while (place < data.size() && !std::isspace(static_cast<unsigned char>(data[place]))) ++place;
    return data.substr(start, place - start);
  };
  const std::string kind = word();
  if (kind != "P6") throw std::runtime_error(path + " is no binary PPM (P6): convert it");
  Image image;
  image.width = std::stoi(word());
  image.height = std::stoi(word());
  if (word() != "255") throw std::runtime_error(path + " has not 8 bits a colour");
  const size_t bytes = size_t{3} * image.width * image.height;
  if (image.width < 1 || image.height < 1 || data.size() < place + 1 + bytes)
    throw std::runtime_error(path + " is truncated");
  image.rgb.assign(data.begin() + place + 1, data.begin() + place + 1 + bytes);
  return image;
}

// What a key of the model's or the manifest's JSON holds; these are written by prgkit, each in one way.
std::string value_of(const std::string& json, const std::string& key) {
  std::smatch found;
  if (!std::regex_search(json, found, std::regex("\"" + key + "\"\\s*:\\s*(\\[[^\\]]*\\]|\"[^\"]*\"|[^,}\\s]+)")))
    throw std::runtime_error("the bundle does not say its " + key);
  return found[1];
}

std::vector<std::string> strings_in(const std::string& json) {  // of an array of strings
  std::vector<std::string> found;
  for (size_t place = 0; place < json.size(); ++place) {
    if (json[place] != '"') continue;
    std::string text;
    for (++place; place < json.size() && json[place] != '"'; ++place) {
      if (json[place] == '\\') ++place;  // \" and \\; class names are written in UTF-8, and have no line breaks
      text += json[place];
    }
    found.push_back(text);
  }
  return found;
}

double filter(double x, bool cubic) {
  x = std::abs(x);
  if (!cubic) return x < 1 ? 1 - x : 0;
  constexpr double a = -0.5;
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

// One direction of Pillow's resize: rows are resampled to a width, with a filter as wide as the picture shrinks.
Image resample_rows(const Image& image, int width, bool cubic) {
  constexpr int bits = 22;  // of the weights' fractions
  const double scale = static_cast<double>(image.width) / width, stretch = std::max(scale, 1.0);
  const double support = (cubic ? 2.0 : 1.0) * stretch;
  Image out{width, image.height, std::vector<uint8_t>(size_t{3} * width * image.height)};
  for (int x = 0; x < width; ++x) {
    const double centre = (x + 0.5) * scale;
    const int first = std::max(0, static_cast<int>(centre - support + 0.5));
    const int last = std::min(image.width, static_cast<int>(centre + support + 0.5));
    std::vector<double> weights;
    for (int from = first; from < last; ++from) weights.push_back(filter((from - centre + 0.5) / stretch, cubic));
    const double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
    std::vector<int> rounded;
    for (double weight : weights) rounded.push_back(static_cast<int>(std::lround(weight / sum * (1 << bits))));
    for (int y = 0; y < image.height; ++y)
      for (int colour = 0; colour < 3; ++colour) {
        int64_t value = 1 << (bits - 1);
        for (int from = first; from < last; ++from)
          value += int64_t{rounded[from - first]} * image.rgb[(size_t{3} * (size_t(y) * image.width + from)) + colour];
        out.rgb[size_t{3} * (size_t(y) * width + x) + colour] =
            static_cast<uint8_t>(std::clamp<int64_t>(value >> bits, 0, 255));
      }
  }
  return out;
}

Image transposed(const Image& image) {
  Image out{image.height, image.width, std::vector<uint8_t>(image.rgb.size())};
  for (int y = 0; y < image.height; ++y)
    for (int x = 0; x < image.width; ++x)
      for (int colour = 0; colour < 3; ++colour)
        out.rgb[3 * (size_t(x) * image.height + y) + colour] = image.rgb[3 * (size_t(y) * image.width + x) + colour];
  return out;
}

Image resized(const Image& image, int width, int height, bool cubic) {
  Image out = width == image.width ? image : resample_rows(image, width, cubic);
  return height == out.height ? out : transposed(resample_rows(transposed(out), height, cubic));
}

// Resize until the picture covers the crop, and crop the centre; or resize both sides, where the student squashes.
Image prepared(const Image& image, int width, int height, const std::string& preprocessing) {
  const std::string interpolation = value_of(preprocessing, "interpolation");
  if (interpolation == "\"nearest\"") throw std::runtime_error("interpolation nearest is not written here");
  const bool cubic = interpolation == "\"bicubic\"";
  if (value_of(preprocessing, "squash") == "true") return resized(image, width, height, cubic);
  const double crop = std::stod(value_of(preprocessing, "crop"));
  const int tall = static_cast<int>(std::floor(height / crop)), wide = static_cast<int>(std::floor(width / crop));
  int to_width, to_height;
  if (tall == wide) {
    const double least = std::min(image.width, image.height);
    to_width = static_cast<int>(tall * double(image.width) / least);
    to_height = static_cast<int>(tall * double(image.height) / least);
  } else {
    const double ratio = std::min(image.height / double(tall), image.width / double(wide));
    to_width = static_cast<int>(std::nearbyint(image.width / ratio));
    to_height = static_cast<int>(std::nearbyint(image.height / ratio));
  }
  const Image large = resized(image, to_width, to_height, cubic);
  const int left = static_cast<int>(std::nearbyint((large.width - width) / 2.0));
  const int top = static_cast<int>(std::nearbyint((large.height - height) / 2.0));
  Image out{width, height, {}};
  for (int y = top; y < top + height; ++y) {
    const auto row = large.rgb.begin() + 3 * (size_t(y) * large.width + left);
    out.rgb.insert(out.rgb.end(), row, row + 3 * width);
  }
  return out;
}

void name_image(const std::string& bundle, const std::string& picture) {
  Ort::Env env(ORT_LOGGING_LEVEL_ERROR);
  const std::string path = bundle + "/model.onnx";
  Ort::Session session(env, std::basic_string<ORTCHAR_T>(path.begin(), path.end()).c_str(), Ort::SessionOptions());
  Ort::AllocatorWithDefaultOptions allocator;
  auto facts = session.GetModelMetadata();
  const std::string preprocessing = facts.LookupCustomMetadataMapAllocated("preprocessing", allocator).get();
  const auto classes = strings_in(facts.LookupCustomMetadataMapAllocated("classes", allocator).get());

  const auto takes = session.GetInputTypeInfo(0).GetTensorTypeAndShapeInfo().GetShape();  // batch, height, width, 3
  Image image = prepared(read_ppm(picture), static_cast<int>(takes[2]), static_cast<int>(takes[1]), preprocessing);
  const std::array<int64_t, 4> shape{1, image.height, image.width, 3};
  auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  auto input = Ort::Value::CreateTensor<uint8_t>(memory, image.rgb.data(), image.rgb.size(), shape.data(), shape.size());
  const char *input_name = "pixels", *output_name = "logits";
  auto outputs = session.Run(Ort::RunOptions(), &input_name, &input, 1, &output_name, 1);
  const float* logits = outputs[0].GetTensorData<float>();

  const std::string manifest = read_file(bundle + "/manifest.json");
  const size_t calibrated = manifest.find("\n  \"confidence\": {");  // of the bundle; what lies deeper is indented more
  const double temperature =
      calibrated == std::string::npos ? 1 : std::stod(value_of(manifest.substr(calibrated), "temperature"));
  const double largest = *std::max_element(logits, logits + classes.size());
  std::vector<double> shares;
  for (size_t place = 0; place < classes.size(); ++place)
    shares.push_back(std::exp((logits[place] - largest) / temperature));
  const double sum = std::accumulate(shares.begin(), shares.end(), 0.0);
  std::vector<size_t> order(classes.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](size_t one, size_t other) { return shares[one] > shares[other]; });
  for (size_t place = 0; place < std::min<size_t>(3, order.size()); ++place)
    std::printf("%.6f %s\n", shares[order[place]] / sum, classes[order[place]].c_str());
}

int main(int count, char** arguments) {
  if (count != 3) return std::fprintf(stderr, "name_image BUNDLE PICTURE.ppm\n"), 2;
  try {
    name_image(arguments[1], arguments[2]);
  } catch (const std::exception& error) {
    return std::fprintf(stderr, "Error: %s\n", error.what()), 1;
  }
}

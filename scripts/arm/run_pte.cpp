// Feeds a script of calls (scripts/arm/feed.py) to a .pte, and writes what the file answers.
//
//   run_pte MODEL SCRIPT PIXELS ANSWERS LIBRARY...
//
// PIXELS: the images, float32, one after another, as the vision encoder takes them. ANSWERS: float32, the soft tokens
// of each `encode` (without the image flag) and the logits of each `logits`, in order. LIBRARY: registers operators.

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/extension/threadpool/threadpool_guard.h>

using executorch::aten::ScalarType;
using executorch::extension::from_blob;
using executorch::extension::Module;
using executorch::runtime::EValue;
using Floats = std::vector<float>;

[[noreturn]] void fail(const std::string& reason) {
  std::fprintf(stderr, "%s\n", reason.c_str());
  std::exit(1);
}

class Model {
 public:
  explicit Model(const std::string& path) : module_(path, Module::LoadMode::Mmap) {
    auto names = module_.method_names();
    if (!names.ok()) fail(path + ": ExecuTorch does not load it");
    sees_ = names->count("text_decoder") > 0;
  }

  void reset() { position_ = 0; }

  // The soft tokens of an image [1, 3, side, side], each with the image flag, 1, as the last number.
  Floats encode(Floats pixels, int side) {
    auto output = call("vision_encoder", {EValue(from_blob(pixels.data(), {1, 3, side, side}))});
    width_ = static_cast<int>(output.size(2));
    const float* values = output.const_data_ptr<float>();
    return Floats(values, values + output.numel());
  }

  void text(std::vector<int64_t> ids) {
    const int count = static_cast<int>(ids.size());
    auto tokens = from_blob(ids.data(), {1, count}, ScalarType::Long);
    if (!sees_) {
      decode("forward", EValue(tokens), count);
      return;
    }
    auto output = call("token_embedding", {EValue(tokens)});
    const float* values = output.const_data_ptr<float>();
    Floats embeddings(values, values + output.numel());
    decode("text_decoder", EValue(from_blob(embeddings.data(), {1, count, static_cast<int>(output.size(2))})), count);
  }

  void image(Floats soft_tokens) {
    const int count = static_cast<int>(soft_tokens.size()) / width_;
    for (int token = 0; token < count; ++token) soft_tokens[(token + 1) * width_ - 1] = 1.0f;
    decode("text_decoder", EValue(from_blob(soft_tokens.data(), {1, count, width_})), count);
  }

  const Floats& logits() const { return logits_; }
  int width() const { return width_; }

 private:
  executorch::aten::Tensor call(const char* method, std::vector<EValue> inputs) {
    auto result = module_.execute(method, inputs);
    if (!result.ok()) fail(std::string(method) + ": error " + std::to_string(static_cast<int>(result.error())));
    return result->at(0).toTensor();
  }

  void decode(const char* method, EValue input, int count) {
    int64_t position = position_;
    auto output = call(method, {input, EValue(from_blob(&position, {1}, ScalarType::Long))});
    const float* values = output.const_data_ptr<float>();
    logits_.assign(values, values + output.numel());
    position_ += count;
  }

  Module module_;
  bool sees_ = false;
  int width_ = 0;
  int64_t position_ = 0;
  Floats logits_;
};

int main(int count, char** arguments) {
  if (count < 5) fail("run_pte MODEL SCRIPT PIXELS ANSWERS LIBRARY...");
  for (int index = 5; index < count; ++index) {
    if (!dlopen(arguments[index], RTLD_LAZY | RTLD_GLOBAL)) fail(dlerror());
  }
  // One thread, so that the number of instructions does not depend on the machine.
  executorch::extension::threadpool::NoThreadPoolGuard one_thread;
  Model model(arguments[1]);
  std::ifstream script(arguments[2]), pixels(arguments[3], std::ios::binary);
  std::ofstream answers(arguments[4], std::ios::binary);
  std::map<int, Floats> encoded;
  std::string line;
  while (std::getline(script, line)) {
    std::istringstream words(line);
    std::string verb;
    words >> verb;
    if (verb == "reset") {
      model.reset();
    } else if (verb == "text") {
      std::vector<int64_t> ids;
      for (int64_t id; words >> id;) ids.push_back(id);
      model.text(ids);
    } else if (verb == "encode") {
      int number = 0, side = 0;
      words >> number >> side;
      Floats image(3 * static_cast<size_t>(side) * side);
      const auto bytes = static_cast<std::streamsize>(image.size() * sizeof(float));
      pixels.seekg(number * bytes);
      if (!pixels.read(reinterpret_cast<char*>(image.data()), bytes)) fail("PIXELS is cut short");
      encoded[number] = model.encode(std::move(image), side);
      const Floats& soft_tokens = encoded[number];
      for (size_t start = 0; start < soft_tokens.size(); start += model.width()) {
        answers.write(reinterpret_cast<const char*>(&soft_tokens[start]), (model.width() - 1) * sizeof(float));
      }
    } else if (verb == "image") {
      int number = 0;
      words >> number;
      model.image(encoded.at(number));
    } else if (verb == "logits") {
      const Floats& logits = model.logits();
      answers.write(reinterpret_cast<const char*>(logits.data()), logits.size() * sizeof(float));
    } else {
      fail("unknown line: " + line);
    }
  }
  if (!answers.flush()) fail(std::string(arguments[4]) + ": cannot be written");
}

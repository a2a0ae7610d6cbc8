// libonnxruntime.so for ONNX Runtime's Java classes: another version's library under the name that they link to.
//
// The JNI library in the Java package asks for symbols of its own release. ONNX Runtime keeps its C interface, so a newer
// library serves it too. RUNTIME is the path of that library.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>

namespace {

void *symbol(const char *name) {
  static void *library = dlopen(RUNTIME, RTLD_NOW | RTLD_LOCAL);
  void *found = library == nullptr ? nullptr : dlsym(library, name);
  if (found == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    std::abort();
  }
  return found;
}

}  // namespace

extern "C" {

const void *OrtGetApiBase() { return reinterpret_cast<const void *(*)()>(symbol("OrtGetApiBase"))(); }

void *OrtSessionOptionsAppendExecutionProvider_CPU(void *options, int use_arena) {
  constexpr auto kName = "OrtSessionOptionsAppendExecutionProvider_CPU";
  return reinterpret_cast<void *(*)(void *, int)>(symbol(kName))(options, use_arena);
}
}

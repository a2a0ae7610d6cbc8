// libexecutorch.so for the JVM: the native methods of org.pytorch.executorch.Module, over the C++ SDK in the executorch
// wheel. The app's engine, and ExecuTorch's own Java classes above these methods, run unchanged on a laptop.
//
// It follows ExecuTorch's own extension/android/jni/jni_layer.cpp, without fbjni: outputs alias the method's memory until
// its next call, inputs are read in place, a method without inputs runs as it is, and errors are
// ExecutorchRuntimeExceptions.
#include "fbjni.h"

#include <memory>
#include <string>
#include <vector>

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

// threadpool.h is not among the SDK's headers.
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool *get_threadpool();
}  // namespace executorch::extension::threadpool

using executorch::aten::ScalarType;
using executorch::extension::Module;
using executorch::extension::TensorPtr;
using executorch::runtime::Error;
using executorch::runtime::EValue;

namespace {

constexpr jint kTensor = 1, kInt = 4;  // EValue.TYPE_CODE_TENSOR, TYPE_CODE_INT

// DType.jniCode and the element types that Gemma's graphs have.
struct Type {
  jint code;
  ScalarType scalar;
  jlong size;
};
constexpr Type kTypes[] = {{4, ScalarType::Long, 8}, {6, ScalarType::Float, 4}};

struct Loaded : Hybrid {
  explicit Loaded(std::unique_ptr<Module> loaded) : module(std::move(loaded)) {}
  std::unique_ptr<Module> module;
};

std::string text(JNIEnv *env, jstring value) {
  const char *characters = env->GetStringUTFChars(value, nullptr);
  std::string result(characters);
  env->ReleaseStringUTFChars(value, characters);
  return result;
}

void fail(JNIEnv *env, Error error, const std::string &details) {
  jclass type = env->FindClass("org/pytorch/executorch/ExecutorchRuntimeException");
  jmethodID make =
      env->GetStaticMethodID(type, "makeExecutorchException", "(ILjava/lang/String;)Ljava/lang/RuntimeException;");
  jobject exception =
      env->CallStaticObjectMethod(type, make, static_cast<jint>(error), env->NewStringUTF(details.c_str()));
  env->Throw(static_cast<jthrowable>(exception));
}

Module &module_of(JNIEnv *env, jobject self) {
  jfieldID data = env->GetFieldID(env->GetObjectClass(self), "mHybridData", "Lcom/facebook/jni/HybridData;");
  jobject hybrid = env->GetObjectField(self, data);
  jfieldID destructor = env->GetFieldID(env->GetObjectClass(hybrid), "mDestructor",
                                        "Lcom/facebook/jni/HybridData$Destructor;");
  jobject owner = env->GetObjectField(hybrid, destructor);
  jlong pointer = env->GetLongField(owner, env->GetFieldID(env->GetObjectClass(owner), "mNativePointer", "J"));
  return *static_cast<Loaded *>(reinterpret_cast<Hybrid *>(pointer))->module;
}

// The Java Tensor's memory as a tensor; null, with a pending exception, if it does not fit its shape.
TensorPtr tensor_of(JNIEnv *env, jobject java) {
  jclass type = env->FindClass("org/pytorch/executorch/Tensor");
  jint code = env->CallIntMethod(java, env->GetMethodID(type, "dtypeJniCode", "()I"));
  auto shape = static_cast<jlongArray>(env->GetObjectField(java, env->GetFieldID(type, "shape", "[J")));
  jobject buffer = env->CallObjectMethod(java, env->GetMethodID(type, "getRawDataBuffer", "()Ljava/nio/Buffer;"));
  std::vector<jlong> lengths(env->GetArrayLength(shape));
  env->GetLongArrayRegion(shape, 0, static_cast<jsize>(lengths.size()), lengths.data());
  jlong count = 1;
  for (jlong length : lengths) count *= length;
  jlong capacity = env->GetDirectBufferCapacity(buffer);
  for (const Type &known : kTypes) {
    if (known.code != code) continue;
    if (capacity != count && capacity != count * known.size) break;
    return executorch::extension::from_blob(env->GetDirectBufferAddress(buffer), {lengths.begin(), lengths.end()},
                                            known.scalar);
  }
  fail(env, Error::InvalidArgument, "a tensor of type " + std::to_string(code) + " with " + std::to_string(count) +
                                        " elements over a buffer of " + std::to_string(capacity));
  return nullptr;
}

// ``value`` as a Java EValue over the same memory; null, with a pending exception, for a type without a counterpart.
jobject evalue_of(JNIEnv *env, const EValue &value) {
  jclass type = env->FindClass("org/pytorch/executorch/EValue");
  if (value.isInt()) {
    jmethodID from = env->GetStaticMethodID(type, "from", "(J)Lorg/pytorch/executorch/EValue;");
    return env->CallStaticObjectMethod(type, from, static_cast<jlong>(value.toInt()));
  }
  if (value.isBool()) {
    jmethodID from = env->GetStaticMethodID(type, "from", "(Z)Lorg/pytorch/executorch/EValue;");
    return env->CallStaticObjectMethod(type, from, static_cast<jboolean>(value.toBool()));
  }
  if (value.isTensor()) {
    const auto &tensor = value.toTensor();
    for (const Type &known : kTypes) {
      if (known.scalar != tensor.scalar_type()) continue;
      std::vector<jlong> lengths(tensor.sizes().begin(), tensor.sizes().end());
      jlongArray shape = env->NewLongArray(static_cast<jsize>(lengths.size()));
      env->SetLongArrayRegion(shape, 0, static_cast<jsize>(lengths.size()), lengths.data());
      jobject buffer = env->NewDirectByteBuffer(tensor.mutable_data_ptr(), static_cast<jlong>(tensor.nbytes()));
      jclass order = env->FindClass("java/nio/ByteOrder");
      jobject native = env->CallStaticObjectMethod(
          order, env->GetStaticMethodID(order, "nativeOrder", "()Ljava/nio/ByteOrder;"));
      jmethodID set = env->GetMethodID(env->GetObjectClass(buffer), "order",
                                       "(Ljava/nio/ByteOrder;)Ljava/nio/ByteBuffer;");
      env->CallObjectMethod(buffer, set, native);
      jclass tensors = env->FindClass("org/pytorch/executorch/Tensor");
      jmethodID make = env->GetStaticMethodID(
          tensors, "nativeNewTensor",
          "(Ljava/nio/ByteBuffer;[JILcom/facebook/jni/HybridData;)Lorg/pytorch/executorch/Tensor;");
      jobject java = env->CallStaticObjectMethod(tensors, make, buffer, shape, known.code, nullptr);
      jmethodID from = env->GetStaticMethodID(
          type, "from", "(Lorg/pytorch/executorch/Tensor;)Lorg/pytorch/executorch/EValue;");
      return env->CallStaticObjectMethod(type, from, java);
    }
  }
  fail(env, Error::InvalidArgument, "an output that is neither a float or long tensor nor a number");
  return nullptr;
}

jobjectArray strings(JNIEnv *env, const std::vector<std::string> &values) {
  jobjectArray array =
      env->NewObjectArray(static_cast<jsize>(values.size()), env->FindClass("java/lang/String"), nullptr);
  for (size_t i = 0; i < values.size(); ++i) {
    env->SetObjectArrayElement(array, static_cast<jsize>(i), env->NewStringUTF(values[i].c_str()));
  }
  return array;
}

}  // namespace

extern "C" {

JNIEXPORT jobject JNICALL Java_org_pytorch_executorch_Module_initHybrid(JNIEnv *env, jclass, jstring path, jint mode,
                                                                       jint threads) {
  constexpr Module::LoadMode kModes[] = {Module::LoadMode::File, Module::LoadMode::Mmap,
                                         Module::LoadMode::MmapUseMlock,
                                         Module::LoadMode::MmapUseMlockIgnoreErrors};
  if (threads > 0) executorch::extension::threadpool::get_threadpool()->_unsafe_reset_threadpool(threads);
  auto module = std::make_unique<Module>(text(env, path), kModes[mode]);
  jclass type = env->FindClass("com/facebook/jni/HybridData");
  jobject hybrid = env->NewObject(type, env->GetMethodID(type, "<init>", "()V"));
  jfieldID field = env->GetFieldID(type, "mDestructor", "Lcom/facebook/jni/HybridData$Destructor;");
  jobject owner = env->GetObjectField(hybrid, field);
  Hybrid *loaded = new Loaded(std::move(module));
  env->SetLongField(owner, env->GetFieldID(env->GetObjectClass(owner), "mNativePointer", "J"),
                    reinterpret_cast<jlong>(loaded));
  return hybrid;
}

JNIEXPORT jobjectArray JNICALL Java_org_pytorch_executorch_Module_getMethodsNative(JNIEnv *env, jobject self) {
  auto names = module_of(env, self).method_names();
  if (!names.ok()) {
    fail(env, names.error(), "Cannot load the program");
    return nullptr;
  }
  return strings(env, {names->begin(), names->end()});
}

JNIEXPORT jobjectArray JNICALL Java_org_pytorch_executorch_Module_getUsedBackends(JNIEnv *env, jobject self,
                                                                                  jstring name) {
  auto meta = module_of(env, self).method_meta(text(env, name));
  if (!meta.ok()) {
    fail(env, meta.error(), "Cannot describe the method");
    return nullptr;
  }
  std::vector<std::string> backends;
  for (size_t i = 0; i < meta->num_backends(); ++i) backends.emplace_back(*meta->get_backend_name(i));
  return strings(env, backends);
}

JNIEXPORT jint JNICALL Java_org_pytorch_executorch_Module_loadMethodNative(JNIEnv *env, jobject self, jstring name) {
  return static_cast<jint>(module_of(env, self).load_method(text(env, name)));
}

JNIEXPORT jobjectArray JNICALL Java_org_pytorch_executorch_Module_executeNative(JNIEnv *env, jobject self,
                                                                                jstring name, jobjectArray inputs) {
  jclass type = env->FindClass("org/pytorch/executorch/EValue");
  jfieldID code = env->GetFieldID(type, "mTypeCode", "I");
  std::vector<TensorPtr> tensors;
  std::vector<EValue> values;
  for (jsize i = 0; i < env->GetArrayLength(inputs); ++i) {
    jobject input = env->GetObjectArrayElement(inputs, i);
    jint kind = env->GetIntField(input, code);
    if (kind == kTensor) {
      jmethodID to = env->GetMethodID(type, "toTensor", "()Lorg/pytorch/executorch/Tensor;");
      TensorPtr tensor = tensor_of(env, env->CallObjectMethod(input, to));
      if (tensor == nullptr) return nullptr;
      tensors.push_back(tensor);
      values.emplace_back(tensor);
    } else if (kind == kInt) {
      values.emplace_back(static_cast<int64_t>(env->CallLongMethod(input, env->GetMethodID(type, "toInt", "()J"))));
    } else {
      fail(env, Error::InvalidArgument, "Unsupported input type code: " + std::to_string(kind));
      return nullptr;
    }
  }
  auto outputs = module_of(env, self).execute(text(env, name), values);
  if (!outputs.ok()) {
    fail(env, outputs.error(), "Execution failed for method: " + text(env, name));
    return nullptr;
  }
  jobjectArray array = env->NewObjectArray(static_cast<jsize>(outputs->size()), type, nullptr);
  for (size_t i = 0; i < outputs->size(); ++i) {
    jobject output = evalue_of(env, (*outputs)[i]);
    if (output == nullptr) return nullptr;
    env->SetObjectArrayElement(array, static_cast<jsize>(i), output);
  }
  return array;
}

JNIEXPORT jobjectArray JNICALL Java_org_pytorch_executorch_Module_readLogBufferStaticNative(JNIEnv *env, jclass) {
  return strings(env, {});
}
}

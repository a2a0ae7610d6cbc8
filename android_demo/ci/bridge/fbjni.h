// The part of fbjni that the two libraries share: a C++ object owned by a com.facebook.jni.HybridData.
#pragma once

#include <jni.h>

// HybridData deletes its object through this type.
struct Hybrid {
  virtual ~Hybrid() = default;
};

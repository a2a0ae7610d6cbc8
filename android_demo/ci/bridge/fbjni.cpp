// libfbjni.so: what com.facebook.jni.HybridData needs of it.
#include "fbjni.h"

extern "C" JNIEXPORT void JNICALL
Java_com_facebook_jni_HybridData_00024Destructor_deleteNative(JNIEnv *, jclass, jlong pointer) {
  delete reinterpret_cast<Hybrid *>(pointer);
}

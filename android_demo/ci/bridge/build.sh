#!/usr/bin/env bash
# build.sh OUT: builds what the JVM needs to run ExecuTorch and the newer ONNX Runtime, in OUT/executorch and
# OUT/onnxruntime. Prints the formats that can then run, one a line; what cannot is skipped by name, on stderr.
#
# PYTHON has the project's packages (torch, onnxruntime). CACHE keeps downloads. ONNXRUNTIME_JAR is ONNX Runtime's Java package.
set -euo pipefail
HERE="$(cd "$(dirname "$0")" && pwd)"
OUT="$(mkdir -p "$1" && cd "$1" && pwd)"
EXECUTORCH=1.5.1 # the first wheel with the C++ SDK; it runs the files of 1.4.1
CXX="${CXX:-g++}"

skip() { echo "skipped: $*" >&2; }

python_value() { "$PYTHON" -c "import sys, sysconfig; from importlib.util import find_spec; from pathlib import Path; print($1)"; }

JAVA_HOME="${JAVA_HOME:-$(dirname "$(dirname "$(readlink -f "$(command -v javac)")")")}"
JNI=(-I"$JAVA_HOME/include" -I"$JAVA_HOME/include/linux")
BUILD=("$CXX" -std=c++17 -O2 -fPIC -shared -Wall -Wextra -Wno-unused-parameter)

# The project's own version of ONNX Runtime, behind the Java classes of another.
onnxruntime() {
  local library version
  library="$(python_value 'next(iter(sorted((Path(find_spec("onnxruntime").submodule_search_locations[0]) / "capi").glob("libonnxruntime.so.*"))), "")')"
  if [ -z "$library" ]; then skip ".onnx on the JVM (this onnxruntime wheel has no libonnxruntime.so)"; return; fi
  mkdir -p "$OUT/onnxruntime"
  unzip -qoj "$ONNXRUNTIME_JAR" 'ai/onnxruntime/native/linux-x64/libonnxruntime4j_jni.so' -d "$OUT/onnxruntime"
  version="$(basename "$ONNXRUNTIME_JAR" .jar)"
  echo "VERS_${version#onnxruntime-} { global: Ort*; local: *; };" > "$OUT/onnxruntime/symbols.map"
  "${BUILD[@]}" -DRUNTIME="\"$library\"" "$HERE/onnxruntime.cpp" -o "$OUT/onnxruntime/libonnxruntime.so" \
    -Wl,-soname,libonnxruntime.so.1 -Wl,--version-script="$OUT/onnxruntime/symbols.map" -ldl
  echo onnx
}

executorch() {
  local sdk="$CACHE/executorch-$EXECUTORCH" torch python libraries include
  if [ ! -e "$sdk/executorch/lib/libexecutorch.so" ]; then
    local wheels="$CACHE/wheels"
    if ! "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: -d "$wheels" \
        "executorch==$EXECUTORCH" >"$OUT/pip.log" 2>&1; then
      skip ".pte on the JVM (no executorch $EXECUTORCH wheel: $(tail -1 "$OUT/pip.log"))"; return
    fi
    rm -rf "$sdk" && mkdir -p "$sdk" && unzip -qo "$wheels/executorch-$EXECUTORCH"-*.whl -d "$sdk"
  fi
  sdk="$sdk/executorch"
  include="$sdk/include"
  # The operators of attention and of the caches are only in a library that also registers them with PyTorch, for Python.
  # It loads in any process that has these libraries; nothing of Python runs.
  torch="$(python_value 'Path(find_spec("torch").submodule_search_locations[0]) / "lib"')"
  python="$(python_value 'next((p for p in (Path(sysconfig.get_config_var("LIBDIR")) / str(sysconfig.get_config_var("INSTSONAME")),) if ".so" in p.name and p.exists()), "")')"
  if [ -z "$python" ]; then skip ".pte on the JVM (this Python has no shared library, such as libpython3.11.so)"; return; fi
  mkdir -p "$OUT/executorch"
  libraries="$sdk/lib:$torch:$(dirname "$python"):$sdk/extension/llm/custom_ops:$sdk/extension/pybindings"
  "${BUILD[@]}" "${JNI[@]}" "$HERE/fbjni.cpp" -o "$OUT/executorch/libfbjni.so"
  "${BUILD[@]}" -Wno-deprecated-declarations -DC10_USING_CUSTOM_GENERATED_MACROS "${JNI[@]}" -isystem "$include" \
    -isystem "$include/executorch/runtime/core/portable_type/c10" "$HERE/executorch.cpp" \
    -o "$OUT/executorch/libexecutorch.so" -L"$sdk/lib" -L"$torch" -Wl,--no-as-needed -lexecutorch \
    -lexecutorch_threadpool -lexecutorch_kernels_optimized -lexecutorch_kernels_quantized -lexecutorch_backend_xnnpack \
    "$python" -lc10 -ltorch -ltorch_cpu -ltorch_python "$sdk/extension/llm/custom_ops/libcustom_ops_aot_lib.so" \
    -Wl,--disable-new-dtags,-rpath,"$libraries" -Wl,--allow-shlib-undefined
  echo pte
}

if ! command -v "$CXX" >/dev/null; then
  skip ".onnx and .pte on the JVM (no C++ compiler: $CXX)"
elif [ "$(uname -sm)" != "Linux x86_64" ]; then
  skip ".onnx and .pte on the JVM (the libraries are for Linux on x86_64, this is $(uname -sm))"
else
  onnxruntime
  executorch
fi

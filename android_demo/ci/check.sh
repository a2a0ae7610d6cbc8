#!/usr/bin/env bash
# Compiles and tests the app where there is no phone, no Gradle and no Android SDK.
#
#   check.sh fast    core and engines: unit tests, and the .onnx of the demo bundles run for real. Part of `make test`.
#   check.sh         also the .pte, every screen, planted faults, and the APK. `make test-android`.
#
# Needs a JDK, Maven, unzip, npm and g++; installs the first three with apt-get if they are missing. Downloads are kept in .cache.
# What cannot be had here is skipped by name, one line each; what fails, fails. BUNDLES: a folder with the demo bundles
# `demo` and `demo-vision`, in both formats, instead of exporting them.
set -euo pipefail
HERE="$(cd "$(dirname "$0")" && pwd)"
ROOT="$(cd "$HERE/../.." && pwd)"
MODE="${1:-full}"
export PYTHON="${PYTHON:-$ROOT/.venv/bin/python}" CACHE="$HERE/.cache" OMP_NUM_THREADS=1
BUNDLES="${BUNDLES:+$(cd "$BUNDLES" && pwd)}"
CLASSES=0.9.3 # of react-native-executorch: the newest npm package with ExecuTorch's own classes.jar
TARGET="$HERE/target"
mkdir -p "$CACHE" "$TARGET"
cd "$HERE"
case "$MODE" in fast | full) ;; *) echo "usage: check.sh [fast|full]" >&2; exit 2 ;; esac

skip() { echo "skipped: $*"; }

property() { sed -n "s:.*<$1>\(.*\)</$1>.*:\1:p" "$HERE/pom.xml"; }

changed_since() { # FILE [MORE…]: it is not there, or the Python that makes it, or one of MORE, is newer
  [ ! -e "$1" ] || [ -n "$(find "$ROOT"/{gemma3,quant,export,runtime_py} "${@:2}" -type f -not -name '*.pyc' -newer "$1" -print -quit)" ]
}

maven() { # Quiet, but for the tests' summary; everything when it fails.
  local log="$TARGET/maven.log"
  if mvn -B -ntp "$@" >"$log" 2>&1; then
    grep -E '^\[(INFO|WARNING)\] Tests run:.*[^n]$' "$log" | grep -v 'Time elapsed' || true
  else
    grep -vE '^\[INFO\]|^$' "$log" >&2 || tail -40 "$log" >&2
    echo "check.sh: Maven failed: mvn $*" >&2
    exit 1
  fi
}

# 1. Tools. Without the network and without the tools there is nothing to check.
missing=()
command -v javac >/dev/null || missing+=(openjdk-17-jdk-headless)
command -v mvn >/dev/null || missing+=(maven)
command -v unzip >/dev/null || missing+=(unzip)
if [ ${#missing[@]} -gt 0 ]; then
  if ! { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}"; } >"$TARGET/apt.log" 2>&1; then
    skip "the app (no ${missing[*]}: $(tail -1 "$TARGET/apt.log"))"
    exit 0
  fi
fi
if ! mvn -B -ntp -q -pl core test-compile >"$TARGET/maven.log" 2>&1 && grep -qE 'Unknown host|Connection (refused|timed out)|Could not transfer' "$TARGET/maven.log"; then
  skip "the app (no Maven repository within reach: $(grep -m1 -oE 'Could not transfer[^:]*|Unknown host[^:]*' "$TARGET/maven.log"))"
  exit 0
fi

# 2. ExecuTorch's own classes, for the engine to be compiled against. Its AAR is on no registry that CI reaches.
modules=core,engines
formats=""
coordinates=(-DgroupId=org.gemmaedge.ci -DartifactId=executorch-classes -Dversion=$CLASSES -Dpackaging=jar)
jar="$CACHE/executorch-classes-$CLASSES.jar"
if [ ! -e "$jar" ]; then
  if (cd "$CACHE" && npm pack --silent "react-native-executorch@$CLASSES") >"$TARGET/npm.log" 2>&1; then
    tar -xzOf "$CACHE/react-native-executorch-$CLASSES.tgz" package/android/libs/classes.jar >"$jar"
    rm "$CACHE/react-native-executorch-$CLASSES.tgz"
  else
    skip "the engines (no npm package react-native-executorch $CLASSES: $(tail -1 "$TARGET/npm.log"))"
    modules=core
  fi
fi

# 3. What makes the engines run here, and the bundles for them.
libraries=""
if [ $modules != core ]; then
  mvn -B -ntp -q install:install-file -Dfile="$jar" "${coordinates[@]}" >"$TARGET/maven.log" 2>&1
  mvn -B -ntp -q dependency:get -Dartifact="com.microsoft.onnxruntime:onnxruntime:$(property onnxruntime.version)" >"$TARGET/maven.log" 2>&1
  repository="$(mvn -B -q help:evaluate -Dexpression=settings.localRepository -DforceStdout 2>/dev/null | sed 's/\x1b\[[0-9;]*m//g')"
  export ONNXRUNTIME_JAR="$repository/com/microsoft/onnxruntime/onnxruntime/$(property onnxruntime.version)/onnxruntime-$(property onnxruntime.version).jar"
  formats="$(bridge/build.sh "$TARGET/bridge")"
  if [ "$MODE" = fast ] && [ -z "$BUNDLES" ] && [ "$formats" != onnx ]; then
    skip "the .pte on the JVM, in the fast part (its export takes minutes: make test-android)"
    formats=onnx
  fi
  formats="$(echo $formats | tr ' ' ,)"
  if [ -z "$BUNDLES" ]; then
    BUNDLES="$TARGET/bundles-$MODE"
    mkdir -p "$BUNDLES"
    for demo in demo demo-vision; do
      bundle="$BUNDLES/$demo"
      changed_since "$bundle/manifest.json" || continue
      rm -rf "$bundle"
      (cd "$ROOT" && "$PYTHON" -m cli export $demo --format "$([ "$MODE" = fast ] && echo onnx || echo both)" -o "$bundle") >"$TARGET/export.log" 2>&1 ||
        { cat "$TARGET/export.log" >&2; exit 1; }
    done
  fi
  libraries="-Djava.library.path=$TARGET/bridge/executorch -Donnxruntime.native.path=$TARGET/bridge/onnxruntime"
fi

# 4. The tests, against what Python says.
if [ -n "$formats" ] || [ $modules = core ]; then tests=(); else tests=(-DskipTests); fi
if changed_since "$TARGET/vectors/done" vectors vectors.py; then
  rm -rf "$TARGET/vectors"
  "$PYTHON" vectors.py "$TARGET/vectors" >"$TARGET/vectors.log" 2>&1 || { cat "$TARGET/vectors.log" >&2; exit 1; }
  touch "$TARGET/vectors/done"
fi
if [ "$MODE" = full ] && [ -d screens ] && [ $modules != core ]; then modules=core,engines,screens; fi
maven -pl $modules test -Dvectors="$TARGET/vectors" -Dbundles="$BUNDLES" -Dformats="$formats" \
  -Dnative.libraries="$libraries" "${tests[@]}"

# 5. Python and the app, token by token.
if [ -n "$formats" ]; then
  mvn -B -ntp -q -pl core,engines test-compile dependency:build-classpath -Dmdep.outputFile="$TARGET/classpath" >"$TARGET/maven.log" 2>&1 ||
    { cat "$TARGET/maven.log" >&2; exit 1; }
  {
    tr ' ' '\n' <<<"$libraries"
    echo "-cp $HERE/engines/target/test-classes:$HERE/engines/target/classes:$HERE/core/target/classes:$(cat "$TARGET/classpath")"
  } >"$TARGET/jvm"
  cd "$ROOT" # so that these are this checkout's packages
  "$PYTHON" -m android_demo.ci.replay "$BUNDLES" --java "$TARGET/jvm" --formats "$formats" $([ "$MODE" = full ] && echo --faults)
fi

# 6. The APK.
if [ "$MODE" = full ] && [ -x "$HERE/apk/build.sh" ]; then "$HERE/apk/build.sh"; fi

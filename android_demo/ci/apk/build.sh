#!/usr/bin/env bash
# Checks the Gradle build, then assembles the APKs and checks them; what this machine lacks is skipped by name.
set -euo pipefail
cd "$(dirname "$0")"
for tool in mvn java javac javap keytool npm; do
  command -v "$tool" >/dev/null || { echo "skipped: no APK is assembled; this machine lacks $tool"; exit 0; }
done
python="${PYTHON:-python3.11}"
"$python" check_gradle.py
exec "$python" build.py "$@"

"""Assembles the app's APKs from the sources and libraries that ship, without Gradle and without the Android SDK.

    python android_demo/ci/apk/build.py [--app FOLDER]

What the SDK would do is done by the same or the next best parts: Kotlin with the Compose compiler, the manifest merger,
R8 and apksig are those of Google's registry; aapt2 is Debian's; Android's classes are Robolectric's. Everything lies in
android_demo/ci/target/apk. What this machine lacks is named on a line that begins with "skipped:".
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import entry_points
import pages
from maven import classpath, fetch
from package import write_apk

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent.parent
TARGET = DEMO / "ci/target/apk"
FILES = TARGET / "files"
CATALOG = tomllib.loads((DEMO / "gradle/libs.versions.toml").read_text())["versions"]
NAMESPACE, APPLICATION = "org.gemmaedge.app", "org.gemmaedge.demo"
# The second is androidx.core's, for receivers inside the app.
PERMISSIONS = {"android.permission.INTERNET", f"{APPLICATION}.DYNAMIC_RECEIVER_NOT_EXPORTED_PERMISSION"}
PROCESSORS = ["arm64-v8a", "x86_64"]

# Android's classes of the API level that the app is compiled for, and the resources of one that Debian's aapt2 reads.
ANDROID = "org.robolectric:android-all:17-robolectric-16653203:jar"
ANDROID_RESOURCES = "org.robolectric:android-all:12-robolectric-7732740:jar"
# The same classes as onnxruntime-android's, for the desktop.
ONNXRUNTIME = "com.microsoft.onnxruntime:onnxruntime:1.29.0:jar"
# An npm package with executorch-android's classes and libraries, of ExecuTorch 1.1 or so.
EXECUTORCH = "react-native-executorch@0.9.3"
AGP = f"com.android.tools.build:gradle:{CATALOG['agp']}:jar"
MERGER = "com.android.tools.build:manifest-merger:32.3.0"
R8 = "com.android.tools:r8:9.3.29:jar"
APKSIG = f"com.android.tools.build:apksig:{CATALOG['agp']}:jar"
KOTLIN = f"org.jetbrains.kotlin:kotlin-compiler-embeddable:{CATALOG['kotlin']}"
PLUGINS = [
    f"org.jetbrains.kotlin:{name}:{CATALOG['kotlin']}:jar"
    for name in ("kotlin-compose-compiler-plugin-embeddable", "kotlin-serialization-compiler-plugin-embeddable")
]
# Debian's aapt2 and the libraries it needs, unpacked rather than installed.
AAPT_PACKAGES = ["aapt", "libprotobuf-lite32", "p7zip-full"] + [
    f"android-lib{name}"
    for name in ["aapt", "androidfw", "backtrace", "base", "cutils", "log", "unwind", "utils", "ziparchive"]
]
# onnxruntime-android's libraries for arm64-v8a in bytes, as others published them: libonnxruntime.so 1.30.0 compressed,
# and libonnxruntime4j_jni.so 1.28.0 as it is.
PUBLISHED_ONNXRUNTIME = 12_409_002 + 111_648


class Missing(Exception):
    """A part that this machine or its registries do not have."""


def run(command: list[str | Path], **options: object) -> None:
    """Runs a tool. Its output is shown only when it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-6000:], sep="\n", file=sys.stderr)
        raise SystemExit(f"{Path(str(command[0])).name} failed with exit code {done.returncode}")


@contextmanager
def step(what: str) -> Iterator[None]:
    """Says what was done, and in how many seconds."""
    start = time.monotonic()
    yield
    print(f"{what} ({time.monotonic() - start:.0f} s)", flush=True)


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def aapt2() -> tuple[Path, dict[str, str]]:
    """aapt2 and the environment it needs: the machine's own, or Debian's packages unpacked in the target folder."""
    if found := shutil.which("aapt2"):
        return Path(found), {}
    root = TARGET / "aapt2"
    program = root / "usr/bin/aapt2"
    if not program.exists():
        if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
            raise Missing("aapt2: neither on the path nor to be had from Debian's package aapt")
        debs = fresh(TARGET / "debs")
        if subprocess.run(["apt-get", "download", "-q", *AAPT_PACKAGES], cwd=debs, capture_output=True).returncode:
            raise Missing("aapt2: apt-get does not serve Debian's package aapt")
        for deb in debs.glob("*.deb"):
            run(["dpkg-deb", "-x", deb, root])
    libraries = root / "usr/lib"
    path = [libraries / "x86_64-linux-gnu/android", libraries / "x86_64-linux-gnu", libraries / "p7zip"]
    return program, {**os.environ, "LD_LIBRARY_PATH": ":".join(map(str, path))}


def executorch_package() -> Path:
    """The unpacked npm package with ExecuTorch's classes and libraries."""
    root = TARGET / "executorch"
    if not (root / "package/package.json").exists():
        if not shutil.which("npm"):
            raise Missing("npm, for ExecuTorch's classes")
        fresh(root)
        run(["npm", "pack", "--silent", EXECUTORCH], cwd=root)
        with tarfile.open(next(root.glob("*.tgz"))) as archive:
            archive.extractall(root, filter="data")
    return root / "package"


class Aar:
    """An unpacked Android library."""

    def __init__(self, coordinate: str, file: Path) -> None:
        self.name = ":".join(coordinate.split(":")[:2])
        self.folder = TARGET / "aars" / file.stem
        if not self.folder.exists():
            with zipfile.ZipFile(file) as archive:
                archive.extractall(self.folder)
        self.jars = [jar for jar in [self.folder / "classes.jar", *self.folder.glob("libs/*.jar")] if jar.exists()]
        self.manifest = self.folder / "AndroidManifest.xml"
        self.resources = self.folder / "res"
        self.rules = self.folder / "proguard.txt"
        package = re.search(r'package="([^"]+)"', self.manifest.read_text())
        self.package = package[1] if package else ""


def check_metadata(aars: list[Aar]) -> None:
    """What Gradle checks before it builds: each library's least compile API and least Android plugin.

    Raises SystemExit naming the libraries that ask for more than the catalog has.
    """
    limits = {"minCompileSdk": CATALOG["compileSdk"], "minAndroidGradlePluginVersion": CATALOG["agp"]}
    problems = []
    for aar in aars:
        file = aar.folder / "META-INF/com/android/build/gradle/aar-metadata.properties"
        lines = file.read_text().splitlines() if file.exists() else []
        for key, _, value in (line.partition("=") for line in lines):
            if key in limits and numbers(value) > numbers(limits[key]):
                problems.append(f"{aar.name} has {key} {value}, above {limits[key]}")
    if problems:
        raise SystemExit("; ".join(problems))


def numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def merge_manifests(app: Path, aars: list[Aar]) -> Path:
    """The app's manifest with those of its libraries, merged as Gradle does."""
    source = TARGET / "AndroidManifest.app.xml"
    text = (app / "AndroidManifest.xml").read_text()
    source.write_text(re.sub(r"<manifest\b", f'<manifest package="{NAMESPACE}"', text, count=1))
    merged = TARGET / "AndroidManifest.xml"
    libraries = [HERE / "onnxruntime-manifest.xml", *(aar.manifest for aar in aars)]
    properties = {
        "PACKAGE": APPLICATION,
        "MIN_SDK_VERSION": CATALOG["minSdk"],
        "TARGET_SDK_VERSION": CATALOG["targetSdk"],
        "VERSION_CODE": "1",
        "VERSION_NAME": "0.1",
    }
    command: list[str | Path] = ["java", "-cp", ":".join(classpath(MERGER)), "com.android.manifmerger.Merger"]
    command += ["--main", source, "--libs", ":".join(map(str, libraries)), "--out", merged]
    command += ["--remove-tools-declarations"]
    for name, value in properties.items():
        command += ["--property", f"{name}={value}"]
    run(command)
    text = merged.read_text().replace("<application", '<application android:extractNativeLibs="true"', 1)
    merged.write_text(text)
    asked = set(re.findall(r'<uses-permission[^>]*android:name="([^"]+)"', text)) - PERMISSIONS
    if asked or "TelemetryInitializer" in text:
        raise SystemExit(f"the merged manifest has what the app must not have: {asked or 'TelemetryInitializer'}")
    return merged


def link_resources(app: Path, aars: list[Aar], manifest: Path, android: Path) -> tuple[Path, Path]:
    """The APK with resources alone, and a jar of the R classes."""
    program, environment = aapt2()
    options = {"env": environment} if environment else {}
    compiled = fresh(TARGET / "compiled")
    folders = [aar.resources for aar in aars if aar.resources.is_dir() and any(aar.resources.iterdir())]
    flat: list[str | Path] = []
    for index, folder in enumerate([*folders, app / "res"]):
        output = compiled / f"{index}.zip"
        run([program, "compile", "--dir", folder, "-o", output], **options)
        flat += ["-R", output]
    sources = fresh(TARGET / "r")
    base = TARGET / "resources.apk"
    command: list[str | Path] = [program, "link", "-I", android, "--manifest", manifest, "-o", base, "--java", sources]
    command += ["--auto-add-overlay", "--no-version-vectors", "--custom-package", NAMESPACE]
    command += ["--proguard", TARGET / "aapt.pro", "--extra-packages", ":".join(sorted({aar.package for aar in aars}))]
    run([*command, *flat], **options)
    classes = fresh(TARGET / "r-classes")
    run(["javac", "-nowarn", "-d", classes, *sources.rglob("*.java")])
    return base, archive(classes, TARGET / "r.jar")


def archive(folder: Path, jar: Path) -> Path:
    with zipfile.ZipFile(jar, "w") as output:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                output.write(file, file.relative_to(folder))
    return jar


def compile_kotlin(app: Path, libraries: list[Path]) -> Path:
    """The classes of core, engines and app, compiled from their sources as one."""
    sources = [DEMO / "core/src/main/kotlin", DEMO / "engines/src/main/kotlin", app / "kotlin"]
    plugins = fetch(PLUGINS, FILES)
    output = fresh(TARGET / "classes")
    command: list[str | Path] = ["java", "-Xmx2g", "-XX:TieredStopAtLevel=1", "-cp", ":".join(classpath(KOTLIN))]
    command += ["org.jetbrains.kotlin.cli.jvm.K2JVMCompiler", "-no-stdlib", "-no-reflect", "-jvm-target", "11"]
    command += [f"-Xplugin={plugin}" for plugin in plugins.values()]
    command += ["-module-name", "app", "-nowarn", "-classpath", ":".join(map(str, libraries)), "-d", output]
    run([*command, *(folder for folder in sources if folder.is_dir())])
    return archive(output, TARGET / "app.jar")


def shrink(program: list[Path], aars: list[Aar], android: Path, files: dict[str, Path]) -> Path:
    """R8 with the rules of the project and of its libraries: an archive of .dex files and of the libraries' files."""
    rules = TARGET / "rules.pro"
    parts = [embedded_rules(jar) for jar in program]
    with zipfile.ZipFile(files[AGP]) as agp:
        for name in ("common", "optimizations"):
            parts.append(agp.read(f"com/android/build/gradle/proguard-{name}.txt").decode())
    parts += [aar.rules.read_text() for aar in aars if aar.rules.exists()]
    parts += [(DEMO / name).read_text() for name in ("engines/consumer-rules.pro", "app/proguard-rules.pro")]
    parts.append((TARGET / "aapt.pro").read_text())
    rules.write_text("\n".join(parts))
    output = TARGET / "shrunk.zip"
    command: list[str | Path] = [
        "java",
        "-Xmx3g",
        "-XX:+UseParallelGC",
        "-cp",
        files[R8],
        "com.android.tools.r8.R8",
        "--release",
    ]
    command += ["--min-api", CATALOG["minSdk"], "--lib", android, "--lib", java_home(), "--pg-conf", rules]
    command += ["--pg-map-output", TARGET / "mapping.txt", "--output", output]
    run([*command, *program])
    return output


def java_home() -> Path:
    java = shutil.which("java")
    assert java
    return Path(os.environ.get("JAVA_HOME") or Path(java).resolve().parent.parent)


def embedded_rules(jar: Path) -> str:
    """The rules that a library carries for whoever shrinks it: those for R8 where it has some."""
    with zipfile.ZipFile(jar) as content:
        names = [name for name in content.namelist() if name.startswith("META-INF/") and name.endswith(".pro")]
        for_r8 = [name for name in names if name.startswith("META-INF/com.android.tools/r8/")]
        plain = [name for name in names if name.startswith("META-INF/proguard/")]
        return "\n".join(content.read(name).decode() for name in for_r8 or plain)


def native_libraries(aars: list[Aar], package: Path) -> dict[str, dict[str, Path]]:
    """Processor to file name to library."""
    found: dict[str, dict[str, Path]] = {processor: {} for processor in PROCESSORS}
    for processor, files in found.items():
        for aar in aars:
            for file in sorted((aar.folder / "jni" / processor).glob("*.so")):
                files.setdefault(file.name, file)
        for file in sorted((package / "third-party/android/libs/executorch" / processor).glob("*.so")):
            files[file.name] = file
    return found


def packaged(name: str) -> bool:
    """Whether a file that R8 leaves goes into the APK: code, and what java.util.ServiceLoader reads."""
    return name.endswith(".dex") or name.startswith("META-INF/services/")


def named_in(natives: dict[str, dict[str, Path]]) -> list[bytes]:
    return [file.read_bytes() for libraries in natives.values() for file in libraries.values()]


def desktop_jni(jar: Path) -> bytes:
    """ONNX Runtime's library of native methods for Linux: the same sources as Android's, so the same names."""
    with zipfile.ZipFile(jar) as content:
        return content.read("ai/onnxruntime/native/linux-x64/libonnxruntime4j_jni.so")


def sign(unsigned: Path, signed: Path, files: dict[str, Path]) -> None:
    """Signs with a key made for this build and verifies."""
    keys = TARGET / "throw-away.p12"
    if not keys.exists():
        command: list[str | Path] = ["keytool", "-genkeypair", "-keystore", keys, "-storetype", "PKCS12"]
        command += ["-storepass", "throw-away", "-alias", "demo", "-keyalg", "RSA", "-keysize", "3072"]
        run([*command, "-dname", "CN=throw-away", "-validity", "30"])
    command = ["java", "-cp", files[APKSIG], HERE / "Sign.java", keys, "throw-away"]
    run([*command, unsigned, signed, CATALOG["minSdk"]])


def contents(apk: Path) -> str:
    """The APK's bytes by kind, compressed as they lie in it."""
    sizes: dict[str, int] = {}
    with zipfile.ZipFile(apk) as archive:
        for entry in archive.infolist():
            name = entry.filename
            kind = "code" if name.endswith(".dex") else "native libraries" if name.startswith("lib/") else "resources"
            sizes[kind] = sizes.get(kind, 0) + entry.compress_size
    sizes["signature and zip"] = apk.stat().st_size - sum(sizes.values())
    return ", ".join(f"{kind} {size / 1e6:.2f} MB" for kind, size in sorted(sizes.items()))


def build(app: Path) -> list[Path]:
    TARGET.mkdir(parents=True, exist_ok=True)
    locked = (HERE / "libraries.lock").read_text().split()
    files = fetch([*locked, ANDROID, ANDROID_RESOURCES, ONNXRUNTIME, AGP, R8, APKSIG], FILES)
    package = executorch_package()
    aars = [Aar(coordinate, files[coordinate]) for coordinate in locked if coordinate.endswith(":aar")]
    check_metadata(aars)
    print(f"{len(aars)} Android libraries accept API {CATALOG['compileSdk']} and the Android plugin {CATALOG['agp']}")
    runtimes = [package / "android/libs/classes.jar", files[ONNXRUNTIME]]
    jars = [files[coordinate] for coordinate in locked if coordinate.endswith(":jar")]
    jars += [jar for aar in aars for jar in aar.jars] + runtimes

    with step("manifests merged, resources linked"):
        manifest = merge_manifests(app, aars)
        base, r_jar = link_resources(app, aars, manifest, files[ANDROID_RESOURCES])
    with step("core, engines and app compiled against the libraries of the app"):
        app_jar = compile_kotlin(app, [*jars, r_jar, files[ANDROID]])
    program = [*jars, r_jar, app_jar]
    with step("shrunk by R8"):
        output = shrink(program, aars, files[ANDROID], files)
    natives = native_libraries(aars, package)
    fbjni = [jar for aar in aars if aar.name == "com.facebook.fbjni:fbjni" for jar in aar.jars]
    named = [*named_in(natives), desktop_jni(files[ONNXRUNTIME])]
    print(entry_points.check(output, program, named, [*runtimes, *fbjni]))

    print(f"skipped: onnxruntime-android {CATALOG['onnxruntime']} was not found: its libraries are left out;")
    print(f"         its classes are those of onnxruntime {ONNXRUNTIME.split(':')[2]} for the desktop")
    print(f"skipped: executorch-android {CATALOG['executorch']} was not found: {EXECUTORCH} stands in for it,")
    print("         an older and larger build of the same library")
    apks = []
    for processor, libraries in natives.items():
        unsigned = TARGET / f"unsigned-{processor}.apk"
        entries = {f"lib/{processor}/{name}": file.read_bytes() for name, file in libraries.items()}
        with zipfile.ZipFile(output) as shrunk:
            entries |= {name: shrunk.read(name) for name in shrunk.namelist() if packaged(name)}
        write_apk(base, entries, unsigned)
        apk = TARGET / f"gemma-edge-demo-{processor}.apk"
        sign(unsigned, apk, files)
        apks.append(apk)
    return apks


def report(apk: Path) -> bool:
    found = pages.libraries(apk)
    size = apk.stat().st_size
    print(f"\n{apk.name}: {size / 1e6:.1f} MB, signed and verified; {contents(apk)}")
    if "arm64" in apk.name:
        whole = size + PUBLISHED_ONNXRUNTIME
        print(f"with the libraries of onnxruntime-android, at the size that others published: {whole / 1e6:.1f} MB")
    print(pages.table(found))
    return all(library.passes for library in found)


def main() -> int:
    parser = argparse.ArgumentParser(description="Assembles the app's APKs without Gradle and without the Android SDK.")
    parser.add_argument("--app", type=Path, default=DEMO / "app/src/main", help="the app's sources")
    arguments = parser.parse_args()
    try:
        apks = build(arguments.app.resolve())
    except Missing as reason:
        print(f"skipped: no APK is assembled; this machine lacks {reason}")
        return 0
    return 0 if all([report(apk) for apk in apks]) else 5


if __name__ == "__main__":
    sys.exit(main())

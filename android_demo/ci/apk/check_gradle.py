"""Checks the Gradle build where Gradle is not to be had.

    python android_demo/ci/apk/check_gradle.py

Compiles the android {} blocks of the build scripts against the Android plugin's own API: a name or a type that the
plugin does not know fails here. Asks the registry for every version in the catalog, and names those that it lacks.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from maven import classpath, fetch

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent.parent
TARGET = DEMO / "ci/target/apk"
WHOLE_CATALOG = tomllib.loads((DEMO / "gradle/libs.versions.toml").read_text())
CATALOG = WHOLE_CATALOG["versions"]
API = f"com.android.tools.build:gradle-api:{CATALOG['agp']}:jar"
COMPILER = f"org.jetbrains.kotlin:kotlin-compiler-embeddable:{CATALOG['kotlin']}"
STDLIB = f"org.jetbrains.kotlin:kotlin-stdlib:{CATALOG['kotlin']}:jar"
SCRIPTS = {"app": "ApplicationExtension", "engines": "LibraryExtension"}


def block(script: str, name: str) -> str:
    """The text between the braces after ``name`` at the start of a line. Raises ValueError if there is none."""
    start = re.search(rf"^{name} \{{$", script, re.MULTILINE)
    end = re.search(r"^\}$", script[start.end() :], re.MULTILINE) if start else None
    if start is None or end is None:
        raise ValueError(f"no {name} block")
    return script[start.end() : start.end() + end.start()]


def wrapped(module: str, extension: str) -> str:
    """A Kotlin file with the module's android block as the body of a function on the plugin's extension."""
    script = (DEMO / module / "build.gradle.kts").read_text()
    versions = "\n".join(f'    val {name} = Version("{value}")' for name, value in CATALOG.items())
    return f"""package check.{module}

import com.android.build.api.dsl.{extension}
import java.util.Properties
import org.gradle.api.JavaVersion
import org.gradle.api.Project

class Version(private val text: String) {{ fun get() = text }}
object Versions {{
{versions}
}}
object libs {{ val versions = Versions }}

fun {extension}.configure(rootProject: Project, keystore: Properties) {{{block(script, "android")}}}
"""


def compiles() -> bool:
    """Whether the android blocks compile; the compiler's words are printed if not."""
    sources = TARGET / "dsl"
    shutil.rmtree(sources, ignore_errors=True)
    shutil.copytree(HERE / "gradle_stubs", sources)
    for module, extension in SCRIPTS.items():
        (sources / f"{module}.kt").write_text(wrapped(module, extension))
    jars = fetch([API, STDLIB], TARGET / "files")
    command = [
        "java",
        "-XX:TieredStopAtLevel=1",
        "-cp",
        os.pathsep.join(classpath(COMPILER)),
        "org.jetbrains.kotlin.cli.jvm.K2JVMCompiler",
    ]
    command += ["-no-stdlib", "-no-reflect", "-nowarn", "-classpath", os.pathsep.join(map(str, jars.values()))]
    done = subprocess.run([*command, "-d", str(TARGET / "dsl-classes"), str(sources)], capture_output=True, text=True)
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr)
    return done.returncode == 0


def in_catalog() -> list[str]:
    """The poms of every library and plugin that the catalog gives a version."""
    found = [
        f"{entry['module']}:{CATALOG[entry['version']['ref']]}:pom"
        for entry in WHOLE_CATALOG["libraries"].values()
        if "version" in entry
    ]
    for entry in WHOLE_CATALOG["plugins"].values():
        plugin = entry["id"]
        found.append(f"{plugin}:{plugin}.gradle.plugin:{CATALOG[entry['version']['ref']]}:pom")
    return found


def not_served(coordinates: list[str]) -> list[str]:
    """Those that the registry does not have: asked for together, and one by one only if that fails."""
    try:
        fetch(coordinates, TARGET / "files")
        return []
    except subprocess.CalledProcessError:
        if len(coordinates) == 1:
            return coordinates
        return [missing for coordinate in coordinates for missing in not_served([coordinate])]


def main() -> int:
    if not compiles():
        return 5
    print(f"the android blocks of {', '.join(SCRIPTS)} compile against the Android plugin {CATALOG['agp']}")
    coordinates = in_catalog()
    missing = not_served(coordinates)
    print(f"{len(coordinates) - len(missing)} of {len(coordinates)} libraries and plugins of the catalog were found")
    for coordinate in missing:
        print(f"skipped: not found at the registry, so not verified: {coordinate.removesuffix(':pom')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Writes libraries.lock: every library of the app with its version, as Gradle resolves them from the catalog.

    python android_demo/ci/apk/lock.py

Gradle takes the highest version that anyone asks for, and so does this; Maven's nearest-first rule would not. Run it
when a version in the catalog changes. Needs mvn, which fetches the poms in a few batches.
"""

import re
import sys
import tempfile
import tomllib
from pathlib import Path
from xml.etree import ElementTree

from maven import fetch

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent.parent
LOCK = HERE / "libraries.lock"
POM = "{http://maven.apache.org/POM/4.0.0}"
# Not at every registry; build.py says what stands in for them.
RUNTIMES = {"org.pytorch:executorch-android", "com.microsoft.onnxruntime:onnxruntime-android"}
# What executorch-android's own pom asks for.
RUNTIME_LIBRARIES = ["com.facebook.fbjni:fbjni:0.7.0", "com.facebook.soloader:nativeloader:0.10.5"]


def order(version: str) -> tuple[tuple[int, int, str], ...]:
    """Sorts versions as Gradle does for releases: numbers by value, a pre-release below its release."""
    parts = re.split(r"[.\-+]", version)
    return (*((1, int(part), "") if part.isdigit() else (0, 0, part) for part in parts), (0, 1, ""))


def wanted() -> dict[str, str]:
    """What app, engines and core declare: module to version, with the versions of the BOM left empty."""
    catalog = tomllib.loads((DEMO / "gradle/libs.versions.toml").read_text())
    versions = catalog["versions"]
    aliases = {name.replace("-", "."): entry for name, entry in catalog["libraries"].items()}
    roots = {}
    for module in ("core", "engines", "app"):
        script = (DEMO / module / "build.gradle.kts").read_text()
        for alias in re.findall(r"^\s+(?:implementation|api)\((?:platform\()?libs\.([\w.]+)\)", script, re.MULTILINE):
            entry = aliases[alias]
            roots[entry["module"]] = versions[entry["version"]["ref"]] if "version" in entry else ""
    # Kotlin's Gradle plugin adds the library of its own version.
    roots["org.jetbrains.kotlin:kotlin-stdlib"] = versions["kotlin"]
    for coordinate in RUNTIME_LIBRARIES:
        module, version = coordinate.rsplit(":", 1)
        roots[module] = version
    return {module: version for module, version in roots.items() if module not in RUNTIMES}


def text(element: ElementTree.Element, tag: str) -> str:
    return (element.findtext(POM + tag) or "").strip()


class Project:
    """What a pom says: its packaging, what it needs, and the versions it insists on where others need them too."""

    def __init__(self, file: Path) -> None:
        root = ElementTree.parse(file).getroot()
        properties = {entry.tag.removeprefix(POM): entry.text or "" for entry in root.iterfind(f"{POM}properties/*")}
        parent = root.find(f"{POM}parent")
        properties["project.version"] = text(root, "version") or (text(parent, "version") if parent is not None else "")
        properties["project.groupId"] = text(root, "groupId") or (text(parent, "groupId") if parent is not None else "")

        def filled(value: str) -> str:
            value = re.sub(r"\$\{([^}]+)\}", lambda match: properties.get(match[1], ""), value)
            return value.strip("[]").split(",")[0]

        self.packaging = text(root, "packaging") or "jar"
        self.managed = {
            f"{filled(text(entry, 'groupId'))}:{text(entry, 'artifactId')}": filled(text(entry, "version"))
            for entry in root.iterfind(f"{POM}dependencyManagement/{POM}dependencies/{POM}dependency")
            if text(entry, "scope") != "import"
        }
        self.needs = {
            f"{filled(text(entry, 'groupId'))}:{text(entry, 'artifactId')}": filled(text(entry, "version"))
            for entry in root.iterfind(f"{POM}dependencies/{POM}dependency")
            if text(entry, "scope") in ("", "compile", "runtime") and text(entry, "optional") != "true"
        }


def resolve(roots: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Module to (version, packaging), the highest version of each that the roots and what they need ask for."""
    projects: dict[str, Project] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        while True:
            chosen, missing = walk(roots, projects)
            if not missing:
                return chosen
            for coordinate, file in fetch([f"{coordinate}:pom" for coordinate in missing], folder).items():
                projects[coordinate.removesuffix(":pom")] = Project(file)


def walk(roots: dict[str, str], projects: dict[str, Project]) -> tuple[dict[str, tuple[str, str]], set[str]]:
    """One pass over the poms known so far: what is chosen, and which poms must be read first."""
    versions = dict(roots)
    while True:
        before = dict(versions)
        missing: set[str] = set()
        reached: set[str] = set()
        queue = list(roots)
        while queue:
            module = queue.pop()
            if module in reached or not versions.get(module):
                continue
            reached.add(module)
            project = projects.get(f"{module}:{versions[module]}")
            if project is None:
                missing.add(f"{module}:{versions[module]}")
                continue
            for other, version in project.needs.items():
                version = version or project.managed.get(other, "")
                if version and order(version) > order(versions.get(other, "0")):
                    versions[other] = version
                queue.append(other)
            for other, version in project.managed.items():
                if other in versions and version and order(version) > order(versions[other] or "0"):
                    versions[other] = version
        if versions == before:
            break
    return {
        module: (versions[module], project.packaging)
        for module in sorted(reached)
        if (project := projects.get(f"{module}:{versions[module]}"))
    }, missing


def doubled(module: str, chosen: dict[str, tuple[str, str]]) -> bool:
    """Whether a variant of a multiplatform library stands for it: ui-android for ui, annotation-jvm for annotation."""
    root = re.sub("-(jvm|android)$", "", module)
    if f"{root}-android" in chosen:
        return module != f"{root}-android"
    return module == root and f"{root}-jvm" in chosen


def main() -> int:
    roots = wanted()
    chosen = resolve(roots)
    unknown = sorted(module for module in roots if module not in chosen)
    if unknown:
        print("no version for " + ", ".join(unknown), file=sys.stderr)
        return 1
    lines = [
        f"{module}:{version}:{'aar' if kind == 'aar' else 'jar'}"
        for module, (version, kind) in chosen.items()
        if kind != "pom" and not doubled(module, chosen)
    ]
    LOCK.write_text("\n".join(lines) + "\n")
    print(f"{len(lines)} libraries in {LOCK.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

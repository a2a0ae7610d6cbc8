"""The Gradle project of the app, as far as it can be checked without Gradle."""

import hashlib
import re
import tomllib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

DEMO = Path(__file__).resolve().parents[2] / "android_demo"
MODULES = ["core", "engines", "app"]
SCRIPTS = [DEMO / "build.gradle.kts", *(DEMO / module / "build.gradle.kts" for module in MODULES)]
POM = {"maven": "http://maven.apache.org/POM/4.0.0"}


@pytest.fixture(scope="module")
def catalog() -> dict[str, Any]:
    return tomllib.loads((DEMO / "gradle/libs.versions.toml").read_text())


def accessors(names: list[str]) -> set[str]:
    return {re.sub("[-_]", ".", name) for name in names}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.parent.name)
def test_scripts_use_what_the_catalog_has(script: Path, catalog: dict[str, Any]) -> None:
    known = (
        accessors(list(catalog["libraries"]))
        | {f"versions.{name}" for name in accessors(list(catalog["versions"]))}
        | {f"plugins.{name}" for name in accessors(list(catalog["plugins"]))}
    )
    used = {match.removesuffix(".get") for match in re.findall(r"\blibs\.([a-zA-Z0-9.]+)", script.read_text())}
    assert used
    assert used <= known


def test_the_catalog_has_nothing_that_no_script_uses(catalog: dict[str, Any]) -> None:
    text = "\n".join(script.read_text() for script in SCRIPTS)
    for name in accessors(list(catalog["libraries"])):
        assert f"libs.{name})" in text, name
    for name in accessors(list(catalog["plugins"])):
        assert f"libs.plugins.{name})" in text, name
    entries = [*catalog["libraries"].values(), *catalog["plugins"].values()]
    referenced = {entry["version"]["ref"] for entry in entries if "version" in entry}
    for name in catalog["versions"]:
        assert name in referenced or f"libs.versions.{name}." in text, name


def test_versions_are_said_once(catalog: dict[str, Any]) -> None:
    """No script has a version of its own."""
    for script in SCRIPTS:
        for line in script.read_text().splitlines():
            assert not re.search(r'"[\w.-]+:[\w.-]+:\d', line), line
            assert not re.search(r"\bversion\s+\"", line), line


def test_modules_exist_and_have_their_namespaces() -> None:
    settings = (DEMO / "settings.gradle.kts").read_text()
    assert re.findall(r'":(\w+)"', settings) == MODULES
    for module in MODULES:
        assert (DEMO / module / "build.gradle.kts").is_file()
        assert (DEMO / module / "src/main/kotlin").is_dir()
    for module in ("engines", "app"):
        assert f'namespace = "org.gemmaedge.{module}"' in (DEMO / module / "build.gradle.kts").read_text()


def test_core_needs_no_android() -> None:
    assert "android" not in (DEMO / "core/build.gradle.kts").read_text().replace("android_demo", "")
    for source in (DEMO / "core/src").rglob("*.kt"):
        assert not re.search(r"^import (android|androidx)\.", source.read_text(), re.MULTILINE), source.name


@pytest.mark.parametrize("module", MODULES)
def test_ci_compiles_with_the_same_versions(module: str, catalog: dict[str, Any]) -> None:
    """ci/pom.xml and the catalog say the same of Kotlin, coroutines, serialization and JUnit."""
    root = ElementTree.parse(DEMO / "ci/pom.xml").getroot()
    for name in ("kotlin", "coroutines", "serialization", "junit"):
        assert root.findtext(f"maven:properties/maven:{name}.version", namespaces=POM) == catalog["versions"][name]
    target = root.findtext("maven:properties/maven:maven.compiler.release", namespaces=POM)
    assert f"JavaVersion.VERSION_{target}" in (DEMO / module / "build.gradle.kts").read_text()


def test_the_app_names_the_runtimes_that_it_ships(catalog: dict[str, Any]) -> None:
    """The screens run on a laptop too, where Gradle generates no constants."""
    source = (DEMO / "app/src/main/kotlin/org/gemmaedge/app/model/Runtimes.kt").read_text()
    for name in ("executorch", "onnxruntime"):
        assert f'const val {name.upper()} = "{catalog["versions"][name]}"' in source


def test_nothing_is_reported_to_the_makers_of_the_runtimes() -> None:
    """onnxruntime-android brings a provider that starts with the process; the app removes it and tells the library."""
    tools = "{http://schemas.android.com/tools}node"
    name = "{http://schemas.android.com/apk/res/android}name"
    manifest = ElementTree.parse(DEMO / "app/src/main/AndroidManifest.xml").getroot()
    removed = {element.get(name) for element in manifest.iter() if element.get(tools) == "remove"}
    assert removed == {"android.permission.ACCESS_NETWORK_STATE", "ai.onnxruntime.TelemetryInitializer"}
    application = (DEMO / "app/src/main/kotlin/org/gemmaedge/app/GemmaEdge.kt").read_text()
    assert 'Os.setenv("ORT_DISABLE_TELEMETRY", "1", true)' in application


def test_the_lock_is_of_this_catalog(catalog: dict[str, Any]) -> None:
    """`python android_demo/ci/apk/lock.py` writes it again."""
    lock = dict(line.rsplit(":", 2)[:2] for line in (DEMO / "ci/apk/libraries.lock").read_text().split())
    versions = catalog["versions"]
    found = 0
    for name, entry in catalog["libraries"].items():
        if "version" not in entry or name in ("executorch", "onnxruntime", "compose-bom", "kotlin-test", "junit"):
            continue
        module = entry["module"]
        locked = next(lock[key] for key in (f"{module}-android", f"{module}-jvm", module) if key in lock)
        assert locked == versions[entry["version"]["ref"]], module
        found += 1
    assert found >= 4
    assert lock["org.jetbrains.kotlin:kotlin-stdlib"] == versions["kotlin"]


def test_the_wrapper_is_genuine() -> None:
    """The jar is that of Gradle 9.4.1, and the wrapper checks the bytes of the distribution it downloads."""
    properties = (DEMO / "gradle/wrapper/gradle-wrapper.properties").read_text()
    assert re.search(r"^distributionSha256Sum=[0-9a-f]{64}$", properties, re.MULTILINE)
    assert "gradle-9.5.0-bin.zip" in properties
    jar = (DEMO / "gradle/wrapper/gradle-wrapper.jar").read_bytes()
    assert hashlib.sha256(jar).hexdigest() == "55243ef57851f12b070ad14f7f5bb8302daceeebc5bce5ece5fa6edb23e1145c"
    assert (DEMO / "gradlew").stat().st_mode & 0o111

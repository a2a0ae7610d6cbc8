"""Downloads files by Maven coordinates, many in one run of mvn."""

import subprocess
import tempfile
from pathlib import Path


def fetch(coordinates: list[str], folder: Path) -> dict[str, Path]:
    """The files of group:artifact:version:type in the folder; those already there are not asked for again.

    Raises CalledProcessError when the registry lacks one; its output says which.
    """
    files = {coordinate: folder / file_name(coordinate) for coordinate in sorted(coordinates)}
    missing = [coordinate for coordinate, file in files.items() if not file.exists()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            project = Path(scratch) / "pom.xml"
            project.write_text(copying(missing, folder))
            command = ["mvn", "-q", "-B", "-f", str(project), "dependency:copy"]
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return files


def file_name(coordinate: str) -> str:
    group, artifact, version, kind = coordinate.split(":")
    return f"{group}+{artifact}+{version}.{kind}"


def copying(coordinates: list[str], folder: Path) -> str:
    """A project that copies the files into the folder."""
    items = "".join(
        "<artifactItem><groupId>{}</groupId><artifactId>{}</artifactId><version>{}</version><type>{}</type>".format(
            *coordinate.split(":")
        )
        + f"<destFileName>{file_name(coordinate)}</destFileName></artifactItem>"
        for coordinate in coordinates
    )
    return (
        '<project xmlns="http://maven.apache.org/POM/4.0.0"><modelVersion>4.0.0</modelVersion><groupId>fetch</groupId>'
        "<artifactId>fetch</artifactId><version>1</version><packaging>pom</packaging><build><plugins><plugin>"
        "<groupId>org.apache.maven.plugins</groupId><artifactId>maven-dependency-plugin</artifactId>"
        f"<version>3.8.1</version><configuration><outputDirectory>{folder.resolve()}</outputDirectory>"
        f"<artifactItems>{items}</artifactItems></configuration></plugin></plugins></build></project>"
    )


def classpath(coordinate: str) -> list[str]:
    """The jars of a tool and of all that it needs, in Maven's own folder."""
    group, artifact, version = coordinate.split(":")
    with tempfile.TemporaryDirectory() as scratch:
        project = Path(scratch) / "pom.xml"
        project.write_text(
            '<project xmlns="http://maven.apache.org/POM/4.0.0"><modelVersion>4.0.0</modelVersion>'
            "<groupId>fetch</groupId><artifactId>fetch</artifactId><version>1</version><dependencies><dependency>"
            f"<groupId>{group}</groupId><artifactId>{artifact}</artifactId><version>{version}</version>"
            "</dependency></dependencies></project>"
        )
        output = Path(scratch) / "classpath"
        command = ["mvn", "-q", "-B", "-f", str(project), "dependency:build-classpath", f"-Dmdep.outputFile={output}"]
        subprocess.run(command, check=True, stdout=subprocess.PIPE)
        return output.read_text().split(":")

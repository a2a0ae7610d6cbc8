"""Measures a bundle in the demo app on a phone, where ``push`` has put it."""

import logging
import secrets
import shlex
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from export.manifest import read_manifest
from gemma3 import typed_json
from gemma3.errors import BadInput, DeviceError
from gemma3.host.files import parse_json
from runtime_py.backends import formats_of
from runtime_py.measure.bench import Measurement, bench_table, check_counts
from runtime_py.phone.adb import Device, connect
from runtime_py.phone.folder import BENCHMARKS, PACKAGE, check_app, files_of, folder_of, held, name_of

log = logging.getLogger(__name__)

ACTIVITY = f"{PACKAGE}/org.gemmaedge.app.BenchmarkActivity"
SCHEMA_VERSION = 1
LOOK = 2.0  # seconds between two looks for the report
IDLE = 120.0  # seconds after which an app that has not computed will not answer
COMPUTED = 100  # clock ticks, of which Android has 100 a second, that count as computing
NOT_YET, GONE = 8, 9  # exit codes of the script that looks for the report
# PowerManager.getCurrentThermalStatus, in its order and with the app's words.
THERMAL = ("cool", "light", "moderate", "severe", "critical", "emergency", "shutdown")


@dataclass(frozen=True)
class DeviceInfo:
    """The phone, in the app's words: model, system on a chip, Android version, ABI, number of cores."""

    model: str
    soc: str
    android: str
    abi: str
    cores: int

    def __str__(self) -> str:
        return f"{self.model} ({self.soc}), Android {self.android}, {self.abi}, {self.cores} cores"


@dataclass(frozen=True)
class PhoneBench:
    """The measurements that the app has made, and its thermal status after each: an index of THERMAL."""

    device: DeviceInfo
    measurements: tuple[Measurement, ...]
    thermal_status: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        rows = zip(self.measurements, self.thermal_status, strict=True)
        return {
            "measurements": [one.to_dict() | {"thermal_status": status} for one, status in rows],
            "device": asdict(self.device),
        }

    def show(self) -> str:
        thermal = [THERMAL[status] for status in self.thermal_status]
        return f"{self.device}\n\n{bench_table(self.measurements, {'thermal': thermal})}"


def bench_on_phone(
    bundle: Path,
    serial: str | None = None,
    format: str | None = None,
    *,
    prompt: int = 128,
    new_tokens: int = 32,
    repetitions: int = 5,
    threads: int | None = None,
) -> PhoneBench:
    """Measure the graph of ``format``, or all graphs of ``bundle``, in the app, as ``measure.bench`` does on the host.

    Raises what ``check_counts``, ``read_manifest`` and ``connect`` raise, BadInput when the bundle on the device is
    another one or none, and DeviceError when the app is not installed, reports an error, ends or does nothing.
    """
    manifest = read_manifest(bundle)
    check_counts(manifest, prompt, new_tokens, repetitions)
    formats = formats_of(bundle, manifest, format)
    name, files = name_of(bundle), files_of(bundle, manifest)
    device = connect(serial)
    check_app(device)
    there = held(device, folder_of(name), files)
    chosen = f" --serial {shlex.quote(serial)}" if serial else ""
    advice = f"run gemma-edge push {shlex.quote(str(bundle))}{chosen} first"
    if there is None:
        raise BadInput(f"{device.serial}: has no bundle {name}; {advice}")
    if lacking := [*there.lacks(files), *there.foreign]:
        raise BadInput(f"{device.serial}: its bundle {name} is another one (differs in {lacking[0]}); {advice}")
    reports = []
    for one in formats:
        log.info("%s: measuring .%s in the app; leave it open", device.serial, one)
        extras = {"prompt": prompt, "new_tokens": new_tokens, "repetitions": repetitions}
        report = _report(device, name, one, extras | ({} if threads is None else {"threads": threads}))
        reports.append(_parsed(device, report, name, one, extras))
    return PhoneBench(
        reports[0].device,
        tuple(one for report in reports for one in report.measurements),
        tuple(one for report in reports for one in report.thermal_status),
    )


def _report(device: Device, name: str, format: str, extras: dict[str, int]) -> str:
    """Start the app's benchmark and wait for its report. Returns the report's text.

    The app is stopped first (-S), so that each graph is measured in a new process, and its peak memory is its own.
    """
    id = secrets.token_hex(8)
    path = f"{BENCHMARKS}/{id}.json"
    texts = {"bundle": name, "format": format, "report": id}
    arguments = [f"--es {key} {shlex.quote(value)}" for key, value in texts.items()]
    arguments += [f"--ei {key} {value}" for key, value in extras.items()]
    started = device.run(f"am start -S -W -n {ACTIVITY} {' '.join(arguments)}")
    said = [line.strip() for line in f"{started.out}\n{started.err}".splitlines()]
    errors = [line for line in said if line.startswith("Error") or "Exception" in line]
    if started.code != 0 or errors:
        raise DeviceError(
            f"{device.serial}: the app's benchmark did not start ({(errors or [started.words])[-1]}); install the app "
            "of this version"
        )
    report = _wait(device, path)
    device.run(f"rm -f {path}")
    return report


def _wait(device: Device, path: str) -> str:
    """The text of the report at ``path``, once it is there.

    There is no limit to the time, as long as the app computes: what it has used of the CPU grows.
    """
    script = (
        f"cat {path} 2>/dev/null && exit 0\n"
        f"p=$(pidof {PACKAGE}) || exit {GONE}\n"
        f"cat /proc/${{p%% *}}/stat 2>/dev/null\n"
        f"exit {NOT_YET}"
    )
    gone, used, computed = 0, 0, time.monotonic()
    while True:
        answer = device.run(script)
        if answer.code == 0:
            return answer.out
        gone = gone + 1 if answer.code == GONE else 0
        if gone > 1:  # it may have ended just after it wrote the report
            raise DeviceError(
                f"{device.serial}: the app ended before it had measured; most often the model is too big for the "
                "phone's memory (adb logcat says why)"
            )
        ticks = _ticks(answer.out)
        if ticks is None or ticks - used >= COMPUTED or ticks < used:
            used, computed = ticks or used, time.monotonic()
        elif time.monotonic() - computed > IDLE:
            raise DeviceError(
                f"{device.serial}: the app has done nothing for {IDLE:.0f} s; open it, leave the screen on, try again"
            )
        time.sleep(LOOK)


def _ticks(stat: str) -> int | None:
    """The CPU time of a process, in clock ticks, of the text of its /proc/PID/stat. None when that cannot be read."""
    fields = stat.rpartition(")")[2].split()
    times = fields[11:13]  # utime and stime
    return sum(map(int, times)) if len(times) == 2 and all(one.isdecimal() for one in times) else None


def _parsed(device: Device, text: str, name: str, format: str, asked: dict[str, int]) -> PhoneBench:
    """The report of one format. Raises DeviceError for an error that it holds, and for one that cannot be used."""
    try:
        data = parse_json(text)
        if not isinstance(data, dict) or data.get("schema_version") != SCHEMA_VERSION:
            raise BadInput(f"its schema_version is not {SCHEMA_VERSION}")
        if isinstance(data.get("error"), str):
            raise DeviceError(f"{device.serial}: {data['error'] or 'the app reports an error without words'}")
        report = _decoded(data)
        if data.get("bundle") != name:
            raise BadInput(f"it is on the bundle {ascii(data.get('bundle'))[:60]}")
        for one in report.measurements:
            measured = {key: getattr(one, key) for key in ("format", *asked)}
            if measured != {"format": format, **asked}:
                raise BadInput(f"it has measured {measured}")
        if not report.measurements:
            raise BadInput("it has no measurements")
        return report
    except BadInput as error:
        raise DeviceError(
            f"{device.serial}: the app's report cannot be used ({error}); install the app of this version"
        ) from None


def _decoded(data: dict[str, Any]) -> PhoneBench:
    rows = data.get("measurements")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise BadInput("measurements is not a list of objects")
    statuses = [row.get("thermal_status") for row in rows]
    for status in statuses:
        if type(status) is not int or not 0 <= status < len(THERMAL):
            raise BadInput(f"thermal_status is {ascii(status)[:60]}")
    return PhoneBench(
        typed_json.decode(DeviceInfo, data.get("device"), "device", ignore_unknown=True),
        tuple(typed_json.decode(Measurement, row, "measurement", ignore_unknown=True) for row in rows),
        tuple(statuses),
    )

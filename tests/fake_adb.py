"""A stand-in for the adb program, with a folder as the phone. tests/phone.py installs it; it needs no package.

Its words and exit codes are those of adb 1.0.41 and Android's mksh and toybox, as their sources and a real client give
them: a failed `adb push` speaks on stdout, and `adb shell` ends with 0 when the connection breaks. Scripts run in a
real shell, with nothing on the PATH but a few programs, and with the phone's folder in place of /sdcard.

Beside this file: ``state.json`` (tests/phone.py: Phone) and ``calls``, a line of JSON for each call.
"""

from __future__ import annotations

import json
import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:  # the module typing is slow to import
    from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))
STATE = os.path.join(HERE, "state.json")


def read() -> Any:
    with open(STATE, encoding="utf-8") as file:
        return json.load(file)


def write(state: Any) -> None:
    with open(STATE + ".new", "w", encoding="utf-8") as file:
        json.dump(state, file)
    os.replace(STATE + ".new", STATE)


def say(stream: Any, text: str) -> None:
    stream.buffer.write(text.encode("utf-8", "surrogateescape"))
    stream.flush()


def unplug(state: Any) -> None:
    write(state | {"devices": []})


def trouble(state: Any, serial: str | None) -> str | None:
    """Why there is no connection to the device, in adb's words; None if there is one."""
    serial = serial or os.environ.get("ANDROID_SERIAL")
    states = dict(state["devices"])
    if serial is None and len(states) != 1:
        return "more than one device/emulator" if states else "no devices/emulators found"
    if serial is not None and serial not in states:
        return f"device '{serial}' not found"
    found = states[serial] if serial is not None else next(iter(states.values()))
    if found == "unauthorized":
        return (
            "device unauthorized.\nThis adb server's $ADB_VENDOR_KEYS is not set\nTry 'adb kill-server' if that seems "
            "wrong.\nOtherwise check for a confirmation dialog on your device."
        )
    return None if found == "device" else f"device {found}"


def devices(state: Any) -> int:
    say(sys.stdout, "List of devices attached\n" + "".join(f"{a}\t{b}\n" for a, b in state["devices"]) + "\n")
    return 0


def shell(state: Any, serial: str | None, words: list[str]) -> int:
    problem = trouble(state, serial)
    if problem:
        say(sys.stderr, f"error: {problem}\n")
        return 1
    script = " ".join(words)  # as adb joins them
    fault = state["shell"]
    if fault and fault["match"] in script:
        if fault["how"] == "hang":
            time.sleep(1000)
        if fault["how"] == "unplug":
            unplug(state)
            say(sys.stdout, script.split("\n")[0].removeprefix("echo ") + "\n")
            return 0
    # A path with letters only, so that no test passes because of what its own folder is called.
    script = script.replace("/sdcard", os.path.join(HERE, "sdcard"))
    environment = {"PATH": os.path.join(HERE, "tools"), "FAKE_ADB": HERE}
    command = [state["sh"], "-c", script]
    if not state["crlf"]:
        os.execve(command[0], command, environment)
    import subprocess

    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE)
    sys.stdout.buffer.write(done.stdout.replace(b"\n", b"\r\n"))
    return done.returncode


def push(state: Any, serial: str | None, local: str, remote: str) -> int:
    problem = trouble(state, serial)
    if problem:
        say(sys.stdout, f"adb: error: failed to get feature set: {problem}\n")
        return 1
    try:
        with open(local, "rb") as file:
            content = file.read()
    except OSError as error:
        say(sys.stdout, f"adb: error: cannot stat '{local}': {error.strerror}\n")
        return 1
    target = os.path.join(HERE, remote.lstrip("/"))
    failed = f"adb: error: failed to copy '{local}' to '{remote}': "
    fault = state["push"]
    if fault and remote.endswith(fault["file"]):
        how = fault["how"]
        half = content[: len(content) // 2]
        if how == "denied":
            say(sys.stdout, failed + "remote couldn't create file: Permission denied\n")
            return 1
        if how == "replaced":  # the bundle is changed meanwhile
            with open(local, "ab") as file:
                file.write(b"more")
            content += b"more"
        if how == "vanished":
            os.unlink(local)
            say(sys.stdout, f"adb: error: cannot stat '{local}': No such file or directory\n")
            return 1
        if how == "corrupt":
            content = bytes([content[0] ^ 1]) + content[1:]
        if how in ("full", "unplug", "hang"):
            with open(target, "wb") as file:
                file.write(half)
        if how == "full":
            say(sys.stdout, failed + "remote write failed: No space left on device\n")
            return 1
        if how == "unplug":
            unplug(state)
            say(sys.stdout, "adb: error: failed to read copy response\n")
            return 1
        if how == "hang":
            time.sleep(1000)
        if how == "slow":
            with open(target, "wb", buffering=0) as file:
                for start in range(0, len(content), len(content) // 8 + 1):
                    file.write(content[start : start + len(content) // 8 + 1])
                    time.sleep(0.5)
    with open(target, "wb") as file:
        file.write(content)
    say(sys.stdout, f"{local}: 1 file pushed, 0 skipped. 38.1 MB/s ({len(content)} bytes in 0.015s)\n")
    return 0


def am(arguments: list[str]) -> int:
    """The device's `am start`: the app's benchmark, which ends in the way that the state says."""
    app = read()["app"]
    component = arguments[arguments.index("-n") + 1]
    if app["how"] == "missing":
        say(sys.stdout, f"Starting: Intent {{ cmp={component} }}\nError type 3\n")
        say(sys.stderr, f"Error: Activity class {{{component}}} does not exist.\n")
        return 0  # as older versions of am end
    extras: dict[str, Any] = {}
    for index, word in enumerate(arguments):
        if word in ("--es", "--ei"):
            value = arguments[index + 2]
            extras[arguments[index + 1]] = int(value) if word == "--ei" else value
    say(sys.stdout, f"Starting: Intent {{ cmp={component} (has extras) }}\nStatus: ok\nComplete\n")
    pid = os.fork()
    if pid:
        with open(os.path.join(HERE, "pid"), "w") as file:
            file.write(f"{pid}\n")
        return 0
    os.setsid()
    for number in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), number)
    if app["how"] == "idle":
        time.sleep(30)
    if app["how"] == "late":
        end = time.process_time() + app["seconds"]
        while time.process_time() < end:
            pass
    if app["how"] != "dies":
        report = json.dumps(app["report"] if app["how"] == "garbage" else filled(app["report"], extras))
        path = os.path.join(HERE, app["reports"], f"{extras['report']}.json")
        with open(path + ".part", "w") as file:
            file.write(report)
        os.replace(path + ".part", path)
    os._exit(0)


def filled(report: Any, extras: Any) -> Any:
    """The report with what was asked for in each of its measurements."""
    if "measurements" in report:
        asked = {key: extras[key] for key in ("format", "prompt", "new_tokens", "repetitions")}
        rows = [asked | {"threads": extras.get("threads")} | row for row in report["measurements"]]
        return {"bundle": extras["bundle"]} | report | {"measurements": rows}
    return report


def main(arguments: list[str]) -> int:
    if arguments[0] == "--am":
        return am(arguments[1:])
    state = read()
    with open(os.path.join(HERE, "calls"), "a", encoding="utf-8") as file:
        file.write(json.dumps(arguments) + "\n")
    if state["noise"]:
        say(
            getattr(sys, state["noise"]),
            "* daemon not running; starting now at tcp:5037\n* daemon started successfully\n",
        )
        state["noise"] = ""
        write(state)
    serial = None
    if arguments[0] == "-s":
        serial, arguments = arguments[1], arguments[2:]
    if arguments == ["devices"]:
        return devices(state)
    if arguments[0] == "shell":
        return shell(state, serial, arguments[1:])
    if arguments[0] == "push" and len(arguments) == 3:
        return push(state, serial, *arguments[1:])
    say(sys.stderr, f"adb: unknown command {arguments[0]}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""One device behind adb, the client of Android's platform tools, which is run as a program.

adb's exit code says little: when a connection breaks during `adb shell`, the client ends with 0. So each script is
framed by two lines, and an answer without the second one is a broken connection. Scripts use what Android 8 has: mksh
and toybox.
"""

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

from gemma3.errors import BadInput, DeviceError, DoesNotFit
from gemma3.host.files import reason

POLL = 1.0  # seconds between two looks at a running adb
QUICK = 60.0  # seconds in which a short command answers, although the phone was asleep or adb has to start its server
STALL = 60.0  # seconds after which a copy that does not grow has hung
BEGIN, END = "gemma-edge-begin", "gemma-edge-end"

# What to do about a device in a state of `adb devices` in which it cannot be used.
STATES = {
    "unauthorized": "has not allowed this computer; unlock it and accept its question about USB debugging",
    "authorizing": "is still connecting; try again in a moment",
    "connecting": "is still connecting; try again in a moment",
    "offline": "is offline; connect it again, or restart adb with adb kill-server",
    "no permissions": "cannot be opened by this user; add a udev rule (Debian: apt install "
    "android-sdk-platform-tools-common)",
}


@dataclass(frozen=True)
class Answer:
    """What a script on the device ended with: its exit code, and its output as text with ``\\n`` line ends."""

    code: int
    out: str
    err: str

    @property
    def words(self) -> str:
        """The last line that says something, for an error message."""
        return last_line(self.out, self.err)


@dataclass(frozen=True)
class Device:
    """A device that adb can use. Both methods raise DeviceError when the connection breaks or adb does not answer."""

    client: str
    serial: str

    def run(self, script: str, more: float = 0) -> Answer:
        """Run a shell script on the device, with nothing as its input. It must end within QUICK + ``more`` seconds."""
        return self._shell(script, QUICK + more)

    def _shell(self, script: str, seconds: float) -> Answer:
        framed = f"echo {BEGIN}\n(\n{script}\n)\necho {END}$?"
        deadline = time.monotonic() + seconds
        ended = _execute([self.client, "-s", self.serial, "shell", framed], lambda: time.monotonic() < deadline)
        if ended is None:
            raise DeviceError(f"{self.serial}: adb gave no answer for {seconds:.0f} s; connect the device again")
        _, _, framed_out = ended.out.partition(f"{BEGIN}\n")
        out, end, code = framed_out.rpartition(END)
        if not end or not code.strip().isdecimal():
            raise self._broken(ended.words)
        return Answer(int(code), out, ended.err)

    def ask(self, script: str, more: float = 0) -> str:
        """The output of a script that must succeed. Raises DeviceError with the device's own words when it fails."""
        answer = self.run(script, more)
        if answer.code != 0:
            raise DeviceError(f"{self.serial}: {answer.words or f'a command ended with {answer.code}'}")
        return answer.out

    def copy(self, local: Path, remote: str, show: Callable[[int], None]) -> None:
        """Copy a plain file to ``remote``, whose folder exists. ``show`` gets the bytes that have arrived so far.

        Raises DoesNotFit when the device is full, BadInput when ``local`` cannot be read, and DeviceError when the
        device does not let it write there, when the connection breaks, or when nothing arrives for a minute. What has
        arrived then stays.
        """
        arrived, grown = 0, time.monotonic()

        def arriving() -> bool:
            # adb shows its progress on a terminal only, so the device is asked.
            nonlocal arrived, grown
            try:
                size = self._shell(f"stat -c %s {shlex.quote(remote)}", 10 * POLL).out.strip()
            except DeviceError:
                size = ""
            if size.isdecimal() and int(size) > arrived:
                arrived, grown = int(size), time.monotonic()
                show(arrived)
            return time.monotonic() - grown < STALL

        ended = _execute([self.client, "-s", self.serial, "push", str(local), remote], arriving)
        if ended is None:
            raise DeviceError(
                f"{self.serial}: nothing arrived for {STALL:.0f} s; connect the device again, and run the same command"
            )
        if ended.code == 0:
            return
        if not os.access(local, os.R_OK):
            raise BadInput(f"{local}: is gone or cannot be read any more; leave the bundle alone while it is copied")
        said = f"{ended.out}\n{ended.err}"
        if "No space left on device" in said:
            raise DoesNotFit(f"{self.serial}: is full; free some space on it, and run the same command again")
        if any(words in said for words in ("Permission denied", "Operation not permitted", "Read-only file system")):
            raise DeviceError(
                f"{self.serial}: may not write {remote} ({ended.words}); open the app once, then try again"
            )
        raise self._broken(ended.words)

    def _broken(self, words: str) -> DeviceError:
        return DeviceError(
            f"{self.serial}: the connection broke ({words or 'adb said nothing'}); connect the device again, and run "
            "the same command"
        )


def connect(serial: str | None = None) -> Device:
    """The device with the given serial number, or ``$ANDROID_SERIAL``'s, or the only one.

    Raises DeviceError when there is no adb, no device, or one that cannot be used, and BadInput when the choice is not
    one of several devices.
    """
    client = shutil.which("adb")
    if client is None:
        raise DeviceError("adb is not on the PATH; install Android's platform tools (Debian: apt install adb)")
    states = _devices(client)
    wanted = serial or os.environ.get("ANDROID_SERIAL")
    shown = ", ".join(f"{name} ({state})" for name, state in states.items())
    if not states:
        raise DeviceError(
            f"adb sees no device{f' {wanted}' if wanted else ''}; connect a phone with USB debugging switched on, or "
            "start an emulator"
        )
    if wanted is None and len(states) > 1:
        raise BadInput(
            f"adb sees {len(states)} devices: {shown}; choose one with push --serial SERIAL, bench --device "
            "adb:SERIAL, or $ANDROID_SERIAL"
        )
    chosen = wanted or next(iter(states))
    if chosen not in states:
        source = "the device" if serial else "$ANDROID_SERIAL"
        raise BadInput(f"{source} {chosen!r} is not among those that adb sees: {shown}; choose one of them")
    state = states[chosen]
    if state != "device":
        advice = next((text for start, text in STATES.items() if state.startswith(start)), None)
        raise DeviceError(f"{chosen} {advice or f'is in the state {state!r}; start Android on it'}")
    return Device(client, chosen)


def last_line(*texts: str) -> str:
    """The last line of adb's output that is no notice of its server, without the prefix of an error."""
    lines = [line.strip() for text in texts for line in text.splitlines()]
    said = [line for line in lines if line and not line.startswith(("* ", BEGIN, "adb server version"))]
    return said[-1].removeprefix("adb: ").removeprefix("error: ") if said else ""


def _devices(client: str) -> dict[str, str]:
    """State by serial number, of the devices that adb sees."""
    deadline = time.monotonic() + QUICK
    ended = _execute([client, "devices"], lambda: time.monotonic() < deadline)
    if ended is None:
        raise DeviceError(f"adb devices gave no answer for {QUICK:.0f} s; restart adb with adb kill-server")
    _, heading, listed = ended.out.partition("List of devices attached")
    if ended.code != 0 or not heading:
        raise DeviceError(f"adb devices failed ({ended.words or f'exit code {ended.code}'}); try adb kill-server")
    rows = [line.split("\t", 1) for line in listed.splitlines() if "\t" in line]
    return {serial.strip(): state.strip() for serial, state in rows}


def _execute(command: list[str], wait_on: Callable[[], bool]) -> Answer | None:
    """Run adb. Every POLL seconds it asks ``wait_on``; at False it ends adb and returns None.

    The output goes to files and not to pipes, because a server that adb starts could hold a pipe open. adb runs in a
    session of its own, so that Ctrl-C reaches this process alone, which then ends it.
    """
    with TemporaryFile() as out, TemporaryFile() as err:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )
        except OSError as error:
            raise DeviceError(
                f"{command[0]}: cannot be run ({reason(error)}); install Android's platform tools"
            ) from None
        try:
            while True:
                try:
                    process.wait(POLL)
                    break
                except subprocess.TimeoutExpired:
                    if not wait_on():
                        return None
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "surrogateescape").replace("\r\n", "\n"))
        return Answer(process.returncode, *texts)

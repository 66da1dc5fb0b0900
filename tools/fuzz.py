"""Fuzzes one reader of files from outside: python tools/fuzz.py READER --seconds 60.

An exception that is no SafeGeneError, two seconds of processor time, 64 MiB more memory, a tensor that
an independent reader reads otherwise, and a libllama that dies of what we accepted are findings. Each is
kept, with its input, in DIR/findings; one line of figures comes at the end.

Exit code 0: no finding. 1: findings. 2: it could not be done, or not all of it: somebody to compare with
is missing. With Atheris (`pip install safegene[fuzz]`) inputs are guided by coverage; without, they are
mutations of the seeds, and the line says so.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib
import json
import os
import random
import re
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parent
NAMES = ("gguf", "lora", "safetensors", "onnx", "json", "peft")
HANG_SECONDS = 2.0
MAX_GROWTH = 64 << 20
MAX_INPUT = 16384
COMPARE_SHARE, NATIVE_SHARE = 0.25, 0.15
"""Of the time: what the independent reader and libllama may take; what they do not get is counted."""
ANSWER_SECONDS, START_SECONDS = 15, 120
KINDS = ("untyped error", "hang", "memory growth", "disagreement", "native death")


class Hang(BaseException):
    """Two seconds of processor time are over."""


class Other:
    """The process with the independent readers; started again when it hangs or dies."""

    def __init__(self, name: str, folder: Path) -> None:
        self._command = [sys.executable, str(TOOLS / "fuzz_readers.py"), name, str(folder)]
        self._log = folder / "other.log"
        self._start()

    def _start(self) -> None:
        with self._log.open("ab") as log:
            self._child = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=paths()
            )  # fmt: skip
        self.missing = (self._read(START_SECONDS) or {"error": "it does not start"}).get("error")

    def _read(self, seconds: float) -> dict[str, Any] | None:
        assert self._child.stdout is not None
        if not select.select([self._child.stdout], [], [], seconds)[0]:
            return None
        line = self._child.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def ask(self, command: str) -> dict[str, Any] | None:
        """Its answer about the input; None where there is none in time."""
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(command.encode() + b"\n")
            self._child.stdin.flush()
            found = self._read(ANSWER_SECONDS)
        except OSError:
            found = None
        if found is None:
            self.close()
            self._start()
        return found

    def close(self) -> None:
        """Ends the process."""
        self._child.kill()
        self._child.wait()


class Run:
    """What happens to each input, and the figures.

    Args:
        reader: what is fuzzed, a `fuzz_readers.Reader`.
        folder: where its input lies, and where findings are kept.
        other: who is asked about what it accepts.
    """

    def __init__(self, reader: Any, folder: Path, other: Other | None) -> None:
        from safegene_runtime.errors import SafeGeneError

        self._typed = SafeGeneError
        self._reader, self._folder, self._other = reader, folder, other
        self._path = folder / "input"
        self._findings = folder / "findings"
        self._in_ours = False
        self.counts: Counter[str] = Counter()
        self.found: dict[str, int] = {}
        """How often, by kind and place."""
        self._spent = {"compared": 0.0, "native": 0.0}
        self._began, self._began_cpu = time.monotonic(), time.process_time()
        self._start_peak = self._peak = _lowered_peak()
        signal.signal(signal.SIGVTALRM, self._alarm)

    def _alarm(self, *_: object) -> None:
        if self._in_ours:
            raise Hang

    def one(self, data: bytes) -> None:
        """Feeds one input."""
        self.counts["executions"] += 1
        value = None
        accepted = loadable = False
        signal.setitimer(signal.ITIMER_VIRTUAL, HANG_SECONDS)
        self._in_ours = True
        try:
            value = self._reader.read(self._path, data)
            accepted = True
            loadable = self._reader.loadable is not None and self._reader.loadable(self._path)
        except self._typed:
            pass
        except Hang:
            self._keep("hang", _place(), data, traceback.format_exc())
        except Exception as error:
            kind, place = type(error).__name__, _place()
            self._keep("untyped error", f"{kind} {place}", data, traceback.format_exc())
        finally:
            self._in_ours = False
        peak = _peak()
        if peak > self._peak:
            if peak - self._peak > MAX_GROWTH:
                grown = (peak - self._peak) >> 20
                # the same growth is never measured alike twice: its power of two names it
                over = 1 << (grown.bit_length() - 1)
                self._keep("memory growth", f"over {over} MiB", data, f"{grown} MiB")
                peak = _lowered_peak()
            self._peak = peak
        if accepted:
            self.counts["accepted"] += 1
            self._ask(value, data, loadable)

    def _due(self, what: str, share: float) -> bool:
        return self._spent[what] <= share * (time.monotonic() - self._began + 1)

    def _ask(self, value: Any, data: bytes, loadable: bool) -> None:
        if self._other is None or self._reader.summary is None or self._other.missing:
            return
        if self._due("compared", COMPARE_SHARE):
            start = time.monotonic()
            self._path.write_bytes(data)
            ours = json.loads(json.dumps(self._reader.summary(value)))
            theirs = self._other.ask("compare") or {"refused": "it hung or died"}
            if "read" not in theirs:
                reason = re.sub(r"\d+|'.*'|\".*\"", "#", theirs["refused"])[:80]
                self._keep("disagreement", f"refused there: {reason}", data, theirs["refused"])
            elif theirs["read"] != ours:
                what = _difference(ours, theirs["read"])
                self._keep("disagreement", re.sub(r"\d+|'.*'", "#", what)[:80], data, what)
            self._spent["compared"] += time.monotonic() - start
            self.counts["compared"] += 1
        if loadable and self._due("native", NATIVE_SHARE):
            start = time.monotonic()
            self._path.write_bytes(data)
            died = (self._other.ask("native") or {"died": "with its parent"}).get("died")
            if died:
                self._keep("native death", died, data, "")
            self._spent["native"] += time.monotonic() - start
            self.counts["native"] += 1

    def _keep(self, kind: str, place: str, data: bytes, report: str) -> None:
        key = f"{kind}: {place}"
        self.found[key] = self.found.get(key, 0) + 1
        self.counts[kind] += 1
        if self.found[key] > 1:
            return
        self._findings.mkdir(parents=True, exist_ok=True)
        name = f"{kind.replace(' ', '-')}-{hashlib.sha256(data).hexdigest()[:12]}"
        (self._findings / name).write_bytes(data)
        (self._findings / f"{name}.txt").write_text(f"{key}\n{report}\n", "utf-8", "replace")

    def figures(self) -> dict[str, Any]:
        """So far."""
        return {
            "seconds": time.monotonic() - self._began,
            "cpu_seconds": time.process_time() - self._began_cpu,
            "growth": _peak() - self._start_peak,
            "counts": dict(self.counts),
            "found": self.found,
            "missing": self._other.missing if self._other else None,
        }


def _place() -> str:
    """Where the exception at hand was raised, as file:line of our code."""
    frames = [
        frame
        for frame in traceback.extract_tb(sys.exc_info()[2])
        if "safegene" in frame.filename or "fuzz_readers" in frame.filename
    ]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "elsewhere"


def _difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    for name in [*ours, *theirs]:
        one, two = ours.get(name, "nothing"), theirs.get(name, "nothing")
        if one != two:
            return f"{name!r}: ours {one}, theirs {two}"[:1000]
    return "order"


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _lowered_peak() -> int:
    """The peak from here on, so that the next growth shows."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def paths() -> dict[str, str]:
    """The environment in which this repository's code is found."""
    places = [str(ROOT / "converter"), str(ROOT / "runtime"), str(TOOLS)]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*places, os.environ.get("PYTHONPATH", "")]),
    }


# --- engines: both run in a process of their own ----------------------------------------------------


def mutated(data: bytes, seeds: list[bytes], words: list[bytes], chance: random.Random) -> bytes:
    """An input near a seed."""
    found = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randint(0, len(found))
        what = chance.randrange(7)
        if what == 0 and found:
            found[at % len(found)] ^= 1 << chance.randrange(8)
        elif what == 1 and found:
            found[at % len(found)] = chance.choice((0, 1, 127, 128, 255, chance.randrange(256)))
        elif what == 2:
            width = chance.choice((4, 8))
            number = chance.choice((0, 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1))
            found[at : at + width] = number.to_bytes(8, "little")[:width]
        elif what == 3:
            del found[at : at + chance.randint(1, 16)]
        elif what == 4:
            found[at:at] = found[at : at + chance.randint(1, 32)]
        elif what == 5:
            found[at:at] = chance.choice(words)
        else:
            other = chance.choice(seeds)
            start = chance.randint(0, len(other))
            found[at : at + 16] = other[start : start + chance.randint(1, 32)]
    return bytes(found[:MAX_INPUT])


def engine(options: argparse.Namespace) -> None:
    """Runs until time or executions are over; writes the figures, and ends the process."""
    guided = options.engine == "atheris"
    if guided:
        import atheris

        with atheris.instrument_imports(include=["safegene_runtime", "safegene_converter"]):
            readers = importlib.import_module("fuzz_readers")
    else:
        readers = importlib.import_module("fuzz_readers")
    reader, folder = readers.READERS[options.reader], options.corpus
    other = Other(options.reader, folder) if reader.other else None
    run = Run(reader, folder, other)
    end = time.monotonic() + options.seconds
    counts = run.counts

    def over() -> bool:
        return time.monotonic() > end or counts["executions"] >= options.executions

    def finish() -> None:
        (folder / "figures.json").write_text(json.dumps(run.figures()))
        if other is not None:
            other.close()
        sys.stdout.flush()
        os._exit(0)

    def one(data: bytes) -> None:
        run.one(data)
        if over():
            finish()

    if guided:
        (folder / "words.dict").write_text(
            "".join('"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"\n' for word in reader.words)
        )  # fmt: skip
        (folder / "corpus").mkdir(exist_ok=True)
        arguments = [
            "fuzz", f"-dict={folder / 'words.dict'}", f"-max_len={MAX_INPUT}", "-timeout=60",
            "-rss_limit_mb=0", f"-artifact_prefix={folder}/killed-", f"-seed={options.seed}",
            str(folder / "corpus"), str(folder / "seeds"),
        ]  # fmt: skip
        atheris.Setup(arguments, one)
        atheris.Fuzz()
    else:
        chance = random.Random(options.seed)
        seeds = [path.read_bytes() for path in sorted((folder / "seeds").iterdir())]
        words = [word.encode() for word in reader.words]
        for seed in seeds:
            one(seed)
        while True:
            one(mutated(chance.choice(seeds), seeds, words, chance))


# --- the command ------------------------------------------------------------------------------------


def atheris_version() -> str | None:
    """Of the installed Atheris."""
    try:
        importlib.import_module("atheris")
        return metadata.version("atheris")
    except ImportError:
        return None


def main() -> int:
    """See the module's description."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("reader", choices=NAMES)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--executions", type=int, default=sys.maxsize)
    parser.add_argument("--corpus", type=Path, metavar="DIR", help="default: .cache/fuzz/READER")
    parser.add_argument("--engine", choices=("atheris", "mutations"), help="default: what is there")
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time")
    parser.add_argument("--as-child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_child:
        engine(options)
    version = atheris_version()
    options.engine = options.engine or ("atheris" if version else "mutations")
    options.corpus = (options.corpus or ROOT / ".cache" / "fuzz" / options.reader).resolve()
    options.seed = options.seed or random.randrange(1, 1 << 31)
    folder = options.corpus
    folder.mkdir(parents=True, exist_ok=True)
    # two runs in one folder would read each other's inputs, and find disagreements that there are not
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{options.reader}: waits for another run in {folder}", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        return fuzzed(options, folder, version)


def fuzzed(options: argparse.Namespace, folder: Path, version: str | None) -> int:
    """One run in a folder that is ours; prints its line, and returns the exit code."""
    if not any((folder / "seeds").glob("*")):
        command = [
            sys.executable,
            str(TOOLS / "fuzz_seeds.py"),
            options.reader,
            str(folder / "seeds"),
        ]
        if subprocess.run(command, env=paths()).returncode:
            print(f"{options.reader}: no seeds could be made", file=sys.stderr)
            return 2
    figures = folder / "figures.json"
    figures.unlink(missing_ok=True)
    command = [sys.executable, __file__, options.reader, "--as-child"]
    for name in ("seconds", "executions", "corpus", "engine", "seed"):
        command += [f"--{name}", str(getattr(options, name))]
    log = folder / "engine.log"
    with log.open("wb") as output:
        code = subprocess.run(command, stdout=output, stderr=output, env=paths()).returncode
    if code or not figures.exists():
        killed = [path.name for path in folder.glob("killed-*")]
        print(f"{options.reader}: the fuzzer's process ended with {code}; {killed or log}")
        print(log.read_text("utf-8", "replace")[-2000:], file=sys.stderr)
        return 1 if killed else 2
    found = json.loads(figures.read_text())
    coverage = re.findall(r"cov: (\d+)", log.read_text("utf-8", "replace"))
    print(line(options, found, version, coverage[-1] if coverage else None))
    for place, count in found["found"].items():
        print(f"    {count} x {place}")
    if found["missing"]:
        print(f"{options.reader}: nothing was compared: {found['missing']}", file=sys.stderr)
    return 1 if found["found"] else 2 if found["missing"] else 0


def line(
    options: argparse.Namespace, found: dict[str, Any], version: str | None, coverage: str | None
) -> str:
    """The line of figures."""
    counts = Counter(found["counts"])
    how = f"Atheris {version}, {coverage or 'unknown'} edges covered"
    if options.engine == "mutations":
        why = "asked for" if version else "Atheris is not installed"
        how = f"mutations of the seeds, not guided by coverage ({why})"
    per_second = counts["executions"] / max(found["cpu_seconds"], 1e-9)
    return (
        f"{options.reader}: {counts['executions']} executions in {found['seconds']:.0f} s "
        f"({found['cpu_seconds']:.0f} CPU-s, {per_second:.0f} per CPU-s), {how}, seed {options.seed}; "
        f"{counts['accepted']} accepted, {counts['compared']} of them compared, "
        f"{counts['native']} loaded by libllama; {counts['untyped error']} untyped errors, "
        f"{counts['hang']} hangs over {HANG_SECONDS:.0f} s, {counts['memory growth']} growths over "
        f"{MAX_GROWTH >> 20} MiB, {counts['disagreement']} disagreements, "
        f"{counts['native death']} deaths of libllama; memory grew by "
        f"{found['growth'] >> 20} MiB in all"
    )


if __name__ == "__main__":
    sys.exit(main())

"""The sandbox: well-behaved programs pass or fail, hostile ones can do nothing."""

from __future__ import annotations

import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minicpm_mlx.errors import InvalidArgumentError
from minicpm_mlx.evals.sandbox import runner
from minicpm_mlx.evals.sandbox.jail import landlock, seatbelt, seccomp
from minicpm_mlx.evals.sandbox.runner import Outcome, containment, run_program, run_programs

pytestmark = pytest.mark.skipif(
    sys.platform == "linux" and not landlock.version(), reason="this kernel has no Landlock"
)

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="how Linux holds programs")


def not_refused(*attempts: str) -> str:
    """The first attempt in a program that does not raise PermissionError; "" where all do."""
    program = "import os, socket, sys\n"
    for index, attempt in enumerate(attempts):
        body = "\n    ".join(attempt.splitlines())
        program += f"try:\n    {body}\nexcept PermissionError:\n    pass\n"
        program += f"else:\n    raise type('No{index}', (Exception,), {{}})\n"
    outcome = run_program(program)
    if outcome.passed:
        return ""
    index = re.fullmatch(r"failed: No(\d+)", outcome.reason)
    return attempts[int(index[1])] if index else outcome.reason


def running(marker: str) -> list[str]:
    """The command lines of processes that have `marker` in them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if marker in line and str(os.getpid()) != path.parent.name:
            found.append(line)
    return found


def wait_until(true: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---- well-behaved programs ----


def test_a_program_passes_when_its_last_line_has_run() -> None:
    programs = [
        "assert sorted([3, 1]) == [1, 3]",
        "print('é' * 1000, input.__name__)",
        "import hashlib; assert hashlib.md5(b'a').hexdigest().startswith('0cc1')",
        "import math, re, collections, itertools, heapq, cmath, typing, random, datetime, decimal",
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nassert A(1) == A(1)",
        "import statistics; assert statistics.mean([1, 3]) == 2",  # Python's, not our own
        "import time; time.sleep(0.05)",
        "import signal\nsignal.alarm(0)\nassert 'é' == chr(233)",
        "x = '🙂'",
        "if __name__ == '__main__':\n    assert False",
        "",
    ]
    for program, outcome in zip(programs, run_programs(programs), strict=True):
        assert outcome == Outcome(True, "passed"), program


def test_a_program_that_does_not_reach_its_end_fails() -> None:
    reasons = {
        "assert 1 == 2": "failed: AssertionError",
        "def f(:": "failed: SyntaxError",
        "x = 1\0": "failed: (SyntaxError|ValueError)",
        "raise KeyboardInterrupt": "failed: KeyboardInterrupt",
        "f = lambda: f()\nf()": "failed: RecursionError",
        "x = input()": "failed: EOFError",
        "import numpy": "failed: ModuleNotFoundError",
        "x = '\udc80' + 1": "failed: (UnicodeEncodeError|SyntaxError|TypeError)",
        "import ctypes; ctypes.string_at(0)": "killed: SIG(SEGV|BUS)",
        "class E(Exception): pass\nE.__name__ = 'passed: x\\n'\nraise E": "left before its end",
        # Our library is not there to be imported.
        **{
            f"import {name}": "failed: ModuleNotFoundError"
            for name in ("minicpm_mlx", "jail", "jail.main", "pip")
        },
    }
    for program, outcome in zip(reasons, run_programs(reasons), strict=True):
        assert re.fullmatch(reasons[program], outcome.reason), program
        assert not outcome.passed


def test_sets_come_in_the_same_order_each_time() -> None:
    word = [sys.executable, "-c", "print(list(set('abcdefgh')))"]
    order = subprocess.check_output(word, env={"PYTHONHASHSEED": "0"}, text=True)
    assert run_program(f"assert list(set('abcdefgh')) == {order}").passed


def test_many_run_at_once_and_come_back_in_order() -> None:
    programs = [f"import time; time.sleep({0.3 - n / 10}); assert {n} != 1" for n in range(4)]
    assert [o.passed for o in run_programs(programs, workers=4)] == [True, False, True, True]


def test_a_program_starts_in_a_tenth_of_a_second() -> None:
    containment()
    times = []
    for _ in range(5):
        before = sum(os.times()[:4])
        run_program("")
        times.append(sum(os.times()[:4]) - before)
    assert statistics.median(times) < 0.1  # of the processor, on a machine that others use too


def test_impossible_limits_are_refused() -> None:
    limits: list[dict[str, Any]] = [{"seconds": s} for s in (0, -1, float("nan"), "3")]
    for limit in [*limits, {"memory": 1}, {"memory": 1.5}]:
        with pytest.raises(InvalidArgumentError):
            run_program("", **limit)


# ---- cheating ----


CHEATS = (
    "import sys; sys.exit(0)",
    "import os; os._exit(0)",
    "raise SystemExit(0)",
    "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "import builtins; builtins.AssertionError = int",
    "import builtins; builtins.exec = builtins.compile = builtins.type = None",
    "import os; os.write = lambda *a: 0; os.read = lambda *a: b''",
    "import sys; sys.modules.clear()",
    "import atexit, os; atexit.register(os._exit, 0)",
    "import sys; sys.excepthook = lambda *a: None",
    "import sys; sys.stdout.write('passed'); sys.stderr.write('passed')",
    "import os\nfor n in range(3, 64):\n    try: os.write(n, b'passed')\n    except OSError: 0",
    "import os\nfor n in range(3, 64):\n"
    "    try: os.write(n, os.read(n, 64))\n    except OSError: 0\nos._exit(0)",
    "import sys\nwhile (f := sys._getframe(0)).f_back and f.f_back.f_back: break\n"
    "for v in list(sys._getframe(1).f_locals.values()):\n    pass",
    "import gc, os\nfound = [o for o in gc.get_objects() if isinstance(o, bytes)]",
    "def check(candidate): pass",
    "__debug__ and globals().update(AssertionError=ValueError)",
)


def test_checks_after_a_cheat_still_count() -> None:
    outcomes = run_programs(f"{cheat}\nassert False\n" for cheat in CHEATS)
    assert not [cheat for cheat, o in zip(CHEATS, outcomes, strict=True) if o.passed]


def test_the_token_is_not_in_the_process_before_the_end() -> None:
    program = """
import gc, sys
frame = sys._getframe()
while frame:
    for name, value in list(frame.f_locals.items()):
        assert not (isinstance(value, bytes) and len(value) == 32), name
    frame = frame.f_back
assert not [o for o in gc.get_objects() if isinstance(o, bytes) and len(o) == 32]
"""
    assert run_program(program).passed


# ---- hostile programs ----


def test_no_file_can_be_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    paths = [secret, "/etc/passwd", Path.home(), __file__, "/proc/self/environ"]
    existing = [path for path in map(Path, paths) if path.exists()]
    assert not not_refused(
        *(f"{'os.listdir' if path.is_dir() else 'open'}({str(path)!r})" for path in existing)
    )


@ON_LINUX
def test_the_parents_memory_and_environment_cannot_be_read() -> None:
    assert not not_refused(
        *(
            f"open(f'/proc/{{os.getppid()}}/{name}', 'rb')"
            for name in ("environ", "cmdline", "mem", "maps", "fd/0")
        )
    )


def test_no_environment_and_no_open_files_are_inherited(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SECRET", "secret")
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        program = f"import os\nassert not os.environ\ntry: os.fstat({file.fileno()})\n"
        # The lowest number that is free is the channel's, unless the file has it.
        outcome = run_program(program + "except OSError: pass\nelse: assert 0")
    assert outcome.passed


def test_nothing_can_be_written_changed_or_removed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("kept")
    name = repr(str(kept))
    assert not not_refused(
        f"open({name}, 'w')",
        f"open({name}, 'r+')",
        f"os.open({name}, os.O_RDONLY | os.O_TRUNC)",
        f"os.remove({name})",
        f"os.rename({name}, {name} + 'x')",
        f"os.truncate({name}, 0)",
        f"os.chmod({name}, 0)",
        f"os.utime({name})",
        f"os.symlink({name}, {name} + 'x')",
        f"os.mkdir({str(tmp_path / 'made')!r})",
        "open('here', 'w')",
        "open('/dev/null', 'w')",
        "import tempfile\ntempfile.mkdtemp(dir='.')",
    )
    assert kept.read_text() == "kept"
    assert kept.stat().st_mode & 0o400
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_there_is_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        attempts = [f"socket.create_connection(('127.0.0.1', {port}), 1)"]
        attempts += ["socket.socketpair()"] * (sys.platform == "linux")
        assert not not_refused(*attempts)
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()
    outcome = run_program("import socket\nsocket.getaddrinfo('example.com', 80)")
    assert outcome.reason in ("failed: gaierror", "failed: PermissionError")


def test_no_process_can_be_started() -> None:
    fork = "multiprocessing.get_context('fork').Process(target=print).start()"
    assert not not_refused(
        "os.fork()",
        "import subprocess\nsubprocess.run(['ls'])",
        "os.posix_spawn('/bin/ls', ['ls'], {})",
        "os.execv('/bin/ls', ['ls'])",
        f"import multiprocessing\n{fork}",
    )
    assert run_program("import os\nassert os.system('true') != 0").passed


def test_a_fork_bomb_starts_nothing_and_is_cut_off() -> None:
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert run_program(bomb, seconds=0.5) == Outcome(False, "timed out")


@ON_LINUX
def test_no_thread_can_be_started() -> None:
    outcome = run_program("import threading; threading.Thread(target=print).start()")
    assert outcome.reason == "failed: RuntimeError"


def test_nobody_else_can_be_signalled() -> None:
    signals = [f"os.kill({process}, 0)" for process in ("os.getppid()", "1", "-1")]
    assert not not_refused(*signals, "os.killpg(os.getpgid(os.getppid()), 9)")


@ON_LINUX
def test_raw_system_calls_are_held_too() -> None:
    program = """
import ctypes, errno
call = ctypes.CDLL(None, use_errno=True).syscall
for number in {numbers}:
    assert call(number, 0, 0, 0, 0, 0, 0) == -1 and ctypes.get_errno() == errno.EPERM, number
"""
    x86 = os.uname().machine == "x86_64"
    # socket, clone3, execve, ptrace, process_vm_readv, setrlimit, prctl, unshare, io_uring_setup,
    # seccomp, keyctl, bpf, memfd_create
    numbers = (
        [41, 435, 59, 101, 310, 160, 157, 272, 425, 317, 250, 321, 319]
        if x86
        else [198, 435, 221, 117, 270, 164, 167, 97, 425, 277, 219, 280, 279]
    )
    assert run_program(program.format(numbers=numbers)).passed


@ON_LINUX
def test_limits_cannot_be_raised_again() -> None:
    program = """
from resource import RLIMIT_AS, getrlimit, setrlimit
for limits in ((-1, -1), (1 << 30, 1 << 30), (1 << 28, 1 << 30), (1 << 27, 1 << 27)):
    try:
        setrlimit(RLIMIT_AS, limits)
    except ValueError:  # how Python puts EPERM
        pass
assert getrlimit(RLIMIT_AS) == (1 << 28, 1 << 28)
"""
    assert run_program(program, memory=1 << 28).passed


def test_ten_gigabytes_are_not_to_be_had() -> None:
    outcome = run_program("x = bytearray(10 ** 10)\nx[::4096] = b'1' * len(x[::4096])")
    assert outcome.reason in ("failed: MemoryError", "killed: memory")


def test_memory_taken_bit_by_bit_ends_too() -> None:
    outcome = run_program("x = []\nwhile True: x.append(bytes(1 << 20))", seconds=20)
    assert outcome.reason in ("failed: MemoryError", "killed: memory")


ENDLESS = (
    "while True: pass",
    "import time; time.sleep(100)",
    "while True: print('x' * 10000)",
    "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
    "import signal\nfor n in (1, 2, 3, 14, 15): signal.signal(n, signal.SIG_IGN)\nwhile 1: 0",
    "import re; re.match('(a+)+$', 'a' * 50 + 'b')",
    "import os\nwhile True:\n  for n in range(3, 9):\n    try: os.write(n, b'')\n"
    "    except OSError: pass",
)


def test_a_program_without_end_is_cut_off() -> None:
    start = time.monotonic()
    outcomes = list(run_programs(ENDLESS, workers=len(ENDLESS), seconds=0.4))
    assert set(outcomes) == {Outcome(False, "timed out")}
    assert time.monotonic() - start < 10


def test_a_flood_on_the_channel_is_cut_off() -> None:
    flood = "import os\nwhile True:\n  for n in range(3, 64):\n    try: os.write(n, b'x' * 9999)\n"
    assert not run_program(f"{flood}    except OSError: pass", seconds=1).passed


def test_a_deep_recursion_hurts_only_itself() -> None:
    program = "import sys; sys.setrecursionlimit(10 ** 9)\nf = lambda x: [f(x)]\nf(1)"
    assert not run_program(program, seconds=1).passed


@ON_LINUX
@pytest.mark.usefixtures("altered")  # nothing is, but the files are in a folder to tell them by
def test_nothing_outlives_its_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folders = tmp_path / "folders"
    folders.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folders))
    run_program("import time; time.sleep(50)", seconds=0.2)
    run_program("import os; os._exit(0)")
    assert not running(str(runner.FOLDER))
    assert not list(folders.iterdir())


@ON_LINUX
def test_a_program_dies_with_its_parent(tmp_path: Path) -> None:
    folder = tmp_path / "told by this"
    shutil.copytree(runner.FOLDER / "jail", folder / "jail")
    program = """
import sys; from pathlib import Path
from minicpm_mlx.evals.sandbox import runner
runner.FOLDER = Path(sys.argv[1])
runner.run_program("import signal, time; signal.alarm(0); time.sleep(99)", seconds=99)
"""
    env = {**os.environ, "TMPDIR": str(tmp_path)}  # where it leaves what it has no time to remove
    parent = subprocess.Popen([sys.executable, "-c", program, str(folder)], env=env)
    try:
        wait_until(lambda: len(running(f"{folder} ")) == 2)
        time.sleep(0.3)  # the probe, which comes first, has ended by now
        wait_until(lambda: len(running(f"{folder} ")) == 2)
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not running(str(folder)))


# ---- containment ----


def test_the_level_of_containment_is_known() -> None:
    assert re.fullmatch(r"Landlock \d+ and seccomp|sandbox-exec", containment())


@pytest.fixture
def altered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Has processes load our files with one text in one of them put in another's place."""
    folder = tmp_path / "jail"
    folder.mkdir()
    for path in (runner.FOLDER / "jail").glob("*.py"):
        (folder / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(runner, "FOLDER", tmp_path)

    def alter(name: str, old: str, new: str) -> None:
        text = (folder / name).read_text()
        assert text.count(old) == 1
        (folder / name).write_text(text.replace(old, new))

    containment.cache_clear()
    yield alter
    containment.cache_clear()


@ON_LINUX
@pytest.mark.parametrize(
    ("barrier", "error"),
    [("landlock.restrict(readable)", "ReadsFiles"), ("seccomp.restrict()", "StartsProcesses")],
)
def test_what_cannot_be_contained_is_not_run(
    barrier: str, error: str, altered: Callable[..., None]
) -> None:
    altered("main.py", barrier, "pass")
    with pytest.raises(InvalidArgumentError, match=f"does not contain them .*{error}"):
        run_program("")


@ON_LINUX
def test_a_kernel_without_landlock_is_refused_with_advice(altered: Callable[..., None]) -> None:
    altered("landlock.py", "return max(0, ", "return min(0, ")
    with pytest.raises(InvalidArgumentError, match=r"no Landlock.*leave code tasks out"):
        run_program("")


@pytest.mark.parametrize(("machine", "column"), [("x86_64", 0), ("aarch64", 1)])
def test_numbers_of_system_calls_are_the_kernels(machine: str, column: int) -> None:
    header = {
        "x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h",
        "aarch64": "/usr/include/asm-generic/unistd.h",
    }[machine]
    if not Path(header).exists():
        pytest.skip("the kernel's headers are not installed")
    text = Path(header).read_text()
    names = {"fstatat": "newfstatat"}
    found = {
        names.get(name, name): int(number)
        for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)
    }
    for name, numbers in (seccomp.PLAIN | seccomp.CHECKED).items():
        expected = numbers[column]
        assert (name not in found) if expected == seccomp.NONE else found[name] == expected, name


def test_an_unknown_processor_is_refused() -> None:
    with pytest.raises(OSError, match="riscv64"):
        seccomp.assemble("riscv64", 1)


def decide(code: bytes, number: int, arguments: tuple[int, ...], counted: int) -> int:
    """What a filter answers, reckoned as the kernel's documentation has it."""
    seen = number.to_bytes(4, "little") + counted.to_bytes(4, "little") + bytes(8)
    seen += b"".join(value.to_bytes(8, "little") for value in (*arguments, *[0] * 6)[:6])
    at = word = 0
    while True:
        operation = int.from_bytes(code[8 * at : 8 * at + 2], "little")
        true, false = code[8 * at + 2], code[8 * at + 3]
        value = int.from_bytes(code[8 * at + 4 : 8 * at + 8], "little")
        if operation == seccomp.RETURN:
            return value
        if operation == seccomp.LOAD:
            word = int.from_bytes(seen[value : value + 4], "little")
        elif operation == seccomp.AND:
            word &= value
        else:
            assert operation == seccomp.EQUAL
            at += true if word == value else false
        at += 1


@pytest.mark.parametrize(("machine", "column"), [("x86_64", 0), ("aarch64", 1)])
def test_the_filter_decides_as_the_rules_say(machine: str, column: int) -> None:
    code = seccomp.assemble(machine, 77)
    counted = seccomp.MACHINES[machine][0]
    calls = {name: n[column] for name, n in (seccomp.PLAIN | seccomp.CHECKED).items()}

    def allows(name: str, *arguments: int) -> bool:
        answer = decide(code, calls[name], arguments, counted)
        assert answer in (seccomp.ALLOW, seccomp.REFUSE)
        return answer == seccomp.ALLOW

    assert all(allows(n) for n in seccomp.PLAIN if calls[n] != seccomp.NONE)
    assert allows("openat", 3, 0, os.O_RDONLY | os.O_CLOEXEC)
    assert not any(allows("openat", 3, 0, flag) for flag in (1, 2, os.O_CREAT, os.O_TRUNC))
    assert allows("kill", 77, 9)
    assert not allows("kill", 78, 9)
    assert not allows("kill", (1 << 32) - 1, 9)
    assert allows("fcntl", 0, 1)
    assert not allows("fcntl", 0, 8)
    assert not allows("ioctl", 0, 0x5412)
    assert allows("prlimit64", 0, 7, 0, 1 << 40)
    assert not allows("prlimit64", 0, 7, 1 << 40, 0)
    assert not allows("prlimit64", 1, 7, 0, 1)
    assert decide(code, 0, (), 0x40000003) == seccomp.KILL
    known = set(calls.values())
    others = set(range(500)) - known | {n | 0x40000000 for n in range(500)}
    assert {decide(code, n, (), counted) for n in others} == {seccomp.REFUSE}


def test_the_profile_of_macos_names_what_may_be_read_and_run(tmp_path: Path) -> None:
    odd = tmp_path / 'a "quoted" \\ folder'
    odd.mkdir()
    line = seatbelt.command(["/usr/bin/python3", "-c", "x"], [str(odd), "/no/such"], str(odd))
    assert line[:2] == [seatbelt.SANDBOX_EXEC, "-p"]
    assert line[3:] == ["/usr/bin/python3", "-c", "x"]
    profile = line[2]
    quoted = str(odd).replace("\\", "\\\\").replace('"', '\\"')
    assert f'(subpath "{quoted}")' in profile
    assert "/no/such" not in profile
    assert profile.index("(deny default)") < profile.index("import") < profile.index("(deny net")
    assert profile.count("(") == profile.count(")")


@pytest.mark.skipif(sys.platform != "darwin", reason="macOS's own count")
def test_memory_of_a_process_is_counted() -> None:
    assert seatbelt.footprint(os.getpid()) > 1 << 20

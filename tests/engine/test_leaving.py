"""How processes of a job end: what they say, what is said for them, and what is left."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, IterableDataset

from coca_scale.engine.leaving import told
from coca_scale.recipe.process import Process

START = """
import os, signal, subprocess, sys, time
from multiprocessing.util import get_temp_dir
from coca_scale.engine.leaving import appoint_witness, leave
appoint_witness()
print(get_temp_dir(), flush=True)
"""


def ended(code, **options):
    """Exit code, what it said on stderr, and its scratch folder; at the end of its witness."""
    done = subprocess.run(
        [sys.executable, "-c", START + code], capture_output=True, text=True, check=False, **options
    )
    return done.returncode, done.stderr, Path(done.stdout.split()[0])


@pytest.mark.parametrize(
    ("code", "number"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", -9),
        ("os.kill(os.getpid(), signal.SIGSEGV)", -11),
        ("os._exit(3)", 3),  # as a library does that gives up
        ("[os.kill(p, signal.SIGTERM) for p in (0, os.getpid())]", -15),  # its group too
    ],
)
def test_a_death_is_told_once(code, number):
    found, errors, scratch = ended(code, env={**os.environ, "RANK": "5"}, start_new_session=True)
    assert found == number
    assert len(re.findall(r"^coca-scale: rank 5 on \S+ is dead: ", errors, re.M)) == 1
    assert not scratch.exists()


@pytest.mark.parametrize(
    ("code", "number"), [("leave(75)", 75), ("sys.exit(2)", 2), ("print('finished')", 0)]
)
def test_who_leaves_is_not_mourned(code, number):
    found, errors, scratch = ended(code)
    assert (found, errors) == (number, "")
    assert not scratch.exists()


def test_leaving_takes_along_what_was_started():
    code = "child = subprocess.Popen(['sleep', '60']); print(child.pid, flush=True); leave(0)"
    done = subprocess.run(
        [sys.executable, "-c", START + code], capture_output=True, text=True, check=True, timeout=50
    )  # its output ends when the child has
    assert done.stderr == ""


def test_leaving_takes_along_what_was_started_and_is_stopped():
    code = (
        "nowhere = {'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL}\n"
        "child = subprocess.Popen(['sleep', '60'], **nowhere)\n"
        "print(child.pid, flush=True); child.send_signal(signal.SIGSTOP); leave(0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", START + code], capture_output=True, text=True, check=True
    )
    child = Process.at(int(done.stdout.split()[-1]))
    deadline = time.monotonic() + 20
    while child is not None and child.alive:
        if time.monotonic() > deadline:
            os.kill(child.pid, signal.SIGKILL)
            raise TimeoutError("it is stopped still")
        time.sleep(0.05)


MEMORY = Path("/sys/fs/cgroup/memory")


@pytest.mark.skipif(not os.access(MEMORY, os.W_OK), reason="needs the right to limit memory")
def test_the_kernel_is_named_where_it_ended_a_rank_for_memory():
    group = MEMORY / f"coca-scale-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(100 * 2**20))
        code = f"open('{group}/tasks', 'w').write(str(os.getpid())); b'x' * 2**29"
        found, errors, _ = ended(code)
    finally:
        group.rmdir()
    assert found == -9
    assert "is dead: killed by the kernel, which found no memory left" in errors


def test_the_scratch_folder_of_who_forked_a_rank_is_not_its_own():
    code = (
        "import multiprocessing\n"
        "def rank():\n"
        "    appoint_witness()\n"
        "    leave(0)\n"
        "child = multiprocessing.get_context('fork').Process(target=rank)\n"
        "child.start(); child.join()\n"
        "print(child.exitcode, os.path.isdir(get_temp_dir()), file=sys.stderr)\n"
    )
    code_of_parent, errors, _ = ended(code)
    assert (code_of_parent, errors) == (0, "0 True\n")


def test_frames_of_torch_are_left_out():
    message = (
        "recvValue failed: Connection reset by peer\n"
        "Exception raised from recvBytes at /torch/Utils.hpp:783 (most recent call first):\n"
        "frame #0: c10::Error::Error(c10::SourceLocation) + 0x9d (0x7ffa in libc10.so)\n"
        "frame #17: <unknown function> + 0x69c7453 (0x7ffa in libtorch_cpu.so)\n"
        "<omitting python frames>\n"
        "and so on"
    )
    try:
        raise RuntimeError(message)
    except RuntimeError as error:
        text = told(error)
    assert text.startswith("Traceback")
    assert text.endswith("RuntimeError: recvValue failed: Connection reset by peer\nand so on")


class Dying(IterableDataset):
    """Whose process ends where it should read a second sample."""

    def __init__(self, number):
        self.number = number

    def __iter__(self):
        yield 1
        os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_the_death_of_a_loader_process_is_a_line_with_its_own_cause(number):
    samples = iter(DataLoader(Dying(number), num_workers=1, prefetch_factor=1))
    next(samples)
    with pytest.raises(RuntimeError) as caught:
        next(samples)
    (line,) = told(caught.value).splitlines()
    assert f"killed by signal: {signal.strsignal(number)}" in line
    assert ("memory" in line) == (number == signal.SIGKILL)


def test_a_run_goes_on_when_nobody_reads_what_it_says():
    code = (
        "import os, sys\n"
        "from coca_scale.engine.streams import outlive_readers\n"
        "outlive_readers()\n"
        "print('one', flush=True)\n"
        "sys.stdin.read()\n"
        "for stream in (sys.stdout, sys.stderr):\n"
        "    print('two' * 100_000, file=stream, flush=True)\n"
        "os.write(int(sys.argv[1]), b'saved')\n"
    )
    saved, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(write)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=[write],
    )
    os.close(write)
    assert process.stdout.readline() == b"one\n"
    for end in (process.stdout, process.stderr, process.stdin):
        end.close()
    assert process.wait() == 0
    assert os.read(saved, 99) == b"saved"
    os.close(saved)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_run_needs_no_streams(closed, tmp_path):
    """Files that it opens do not get their numbers either, and so nothing that C++ prints."""
    code = (
        "import os, sys\n"
        "from coca_scale.engine.streams import outlive_readers\n"
        "outlive_readers()\n"
        "file = open(sys.argv[1], 'w')\n"
        "for number in (1, 2):\n"
        "    os.write(number, b'from C++\\n')\n"
        "for stream in (sys.stdout, sys.stderr):\n"
        "    print('\u00e9', file=stream, flush=True)\n"
        "file.write('saved'); file.close()\n"
    )
    line = shlex.join([sys.executable, "-c", code, str(tmp_path / "file")])
    done = subprocess.run(["bash", "-c", f"{line} {closed}"], capture_output=True, text=True)
    assert (done.returncode, done.stderr.replace("from C++\n\u00e9\n", "")) == (0, "")
    assert (tmp_path / "file").read_text() == "saved"

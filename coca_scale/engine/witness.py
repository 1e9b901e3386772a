"""Says that a rank died, which it cannot say itself: a script for `leaving.appoint_witness`.

Another process, so that a dead rank is named under every launcher, and where it is the only one. It
outlives its rank by a line, and every signal that means the rank.

python -I -S witness.py PID_OF_RANK NAME_OF_RANK FOLDER_TO_REMOVE
"""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

LOOK_SECONDS = 0.2
LOOKS_PER_WINDOW = 50


def main() -> None:
    """Wait until this process has another parent than the rank."""
    rank, name, scratch = int(sys.argv[1]), *sys.argv[2:]
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    before = lately = oom_kills()  # counts at least one window old, and less
    looks = 0
    while os.getppid() == rank:
        time.sleep(LOOK_SECONDS)
        looks += 1
        if looks % LOOKS_PER_WINDOW == 0:
            before, lately = lately, oom_kills()
    cause = "killed by a signal, or crashed outside Python"
    if oom_kills() > before:
        cause = (
            "killed by the kernel, which found no memory left on this node for it (out of memory); "
            "`coca-scale plan` says what a rank needs"
        )
    if scratch:
        shutil.rmtree(scratch, ignore_errors=True)
    os.write(sys.stderr.fileno(), f"coca-scale: {name} is dead: {cause}\n".encode())


def oom_kills() -> int:
    """How many processes this kernel has ended for want of memory; 0 where it does not say."""
    try:
        lines = Path("/proc/vmstat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


if __name__ == "__main__":
    main()

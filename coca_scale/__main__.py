"""The `coca-scale` command; `python -m coca_scale` where only an interpreter is at hand."""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # nobody has it ignored
    # what follows takes seconds on some disks, and Ctrl-C in it needs no traceback of imports
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from coca_scale.cli import main

if __name__ == "__main__":
    main()

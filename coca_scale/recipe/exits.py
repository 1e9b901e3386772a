"""Exit codes of the main job, which job scripts act on; 0, 1 and 2 mean what they usually do."""

CRASHED = 70  # EX_SOFTWARE of sysexits.h: nobody's recipe or data, so a job may try again
REQUEUE = 75  # EX_TEMPFAIL: asked to leave; start the same command again to go on
INTERRUPTED = 130  # as shells have it for SIGINT: ended at once, without a save

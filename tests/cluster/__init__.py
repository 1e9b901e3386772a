"""SLURM jobs on a real cluster of pretended nodes."""

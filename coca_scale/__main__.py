"""`python -m coca_scale` is `coca-scale`, for places where only an interpreter is at hand."""

from coca_scale.cli import main

main()

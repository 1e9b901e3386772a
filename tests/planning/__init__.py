"""Tests of coca_scale.planning."""

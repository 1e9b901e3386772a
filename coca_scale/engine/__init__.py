"""Sharding, stepping, checkpoints: of it zero*.py and launch.py know DeepSpeed."""

"""Sharding, stepping, checkpoints: of it zero.py, zero3.py and launch.py know DeepSpeed."""

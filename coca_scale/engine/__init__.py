"""Sharding, stepping, checkpoints: the only room that knows DeepSpeed."""

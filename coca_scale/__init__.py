"""Train, export and use CoCa (contrastive captioner) models, sharded by DeepSpeed ZeRO-3."""

from coca_scale.version import __version__

__all__ = ["__version__"]

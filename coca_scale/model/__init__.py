"""CoCa in plain PyTorch (Yu et al. 2022, arXiv:2205.01917), as OpenCLIP lays it out."""

from coca_scale.model.coca import CoCa
from coca_scale.model.config import ModelConfig, load_model_config
from coca_scale.model.logit_scale import MAX_LOG_SCALE, LogitScale

__all__ = ["MAX_LOG_SCALE", "CoCa", "LogitScale", "ModelConfig", "load_model_config"]

"""Image towers from timm, which takes seconds to import and is so only where a model has one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from coca_scale.errors import UserError
from coca_scale.model.image import PooledTower
from coca_scale.model.recompute import Recomputable
from coca_scale.model.tower_config import VisionConfig


def make_trunk(config: VisionConfig, pool: str) -> Any:
    """The timm model without its classifier, for images of `config.image_size`.

    Raises:
        UserError: timm does not know it, or cannot build it for this image size.
    """
    import timm

    name = config.timm_model_name
    assert name is not None
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:3]
        hint = f"; it has {', '.join(near)}, ..." if near else ""
        raise UserError(f"timm has no model {name!r}{hint}")
    options: dict[str, Any] = {}
    if takes_image_size(name):
        options["img_size"] = config.image_size
    try:
        trunk = timm.create_model(name, **options)
        trunk.reset_classifier(0, global_pool=pool)  # as OpenCLIP does: other norms otherwise
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"timm cannot build {name} for {config.image_size} px with pooling {pool!r}: {error}"
        ) from error
    return trunk


def takes_image_size(name: str) -> bool:
    """Whether the model is built for one image size (a ViT is, a convolutional network is not)."""
    import timm

    found = timm.get_pretrained_cfg(name, allow_unregistered=False)
    return bool(found is not None and found.fixed_input_size)


def has_batch_norm(model: nn.Module) -> bool:
    """Whether some layer depends on statistics of the batch."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def cast_statistics(model: nn.Module, dtype: torch.dtype) -> None:
    """Statistics of BatchNorm in the dtype of its weights, which ZeRO-3 casts alone."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean = module.running_mean.to(dtype)
            module.running_var = module.running_var.to(dtype)


class _Trunk(Recomputable):
    """Shared by both timm towers.

    BatchNorm runs with its stored statistics, always: those of a micro-batch would make the result
    depend on how a batch is cut over ranks.
    """

    trunk: Any

    def train(self, mode: bool = True) -> _Trunk:
        """As of `nn.Module`, but BatchNorm stays in evaluation mode."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def _switch(self, enabled: bool) -> None:
        """timm recomputes the blocks of models that can."""
        if hasattr(self.trunk, "set_grad_checkpointing"):
            self.trunk.set_grad_checkpointing(enabled)

    def _trunk_groups(self) -> list[list[nn.Parameter]]:
        from timm.models import group_parameters

        by_layer = group_parameters(self.trunk, self.trunk.group_matcher())
        named = dict(self.trunk.named_parameters())
        return [[named[n] for n in by_layer[layer] if n in named] for layer in sorted(by_layer)]


class TimmTower(_Trunk, PooledTower):
    """A timm trunk under attentional pooling, for a CoCa.

    Feature maps of convolutional networks become tokens with a fixed 2-D sine-cosine position
    (they carry none themselves), so any image size works.
    """

    def __init__(self, config: VisionConfig, embed_dim: int) -> None:
        trunk = make_trunk(config, pool="")
        query_std, self.skipped = 1.0, 0
        if isinstance(config.attentional_pool, str):
            # as OpenCLIP's CoCa2: its poolers do not see what a model has in front of its patches,
            # nor the norm that some have behind their own pooling
            query_std, self.skipped = embed_dim**-0.5, int(getattr(trunk, "num_prefix_tokens", 0))
            if hasattr(trunk, "fc_norm"):
                trunk.fc_norm = nn.Identity()
        PooledTower.__init__(self, config, int(trunk.num_features), embed_dim, query_std)
        self.trunk = trunk
        output_format = str(getattr(trunk, "output_fmt", "NCHW"))
        self.channels_last = output_format == "NHWC"
        self.norm_map: nn.LayerNorm | None = None
        with torch.no_grad():
            size = config.image_size
            device = next(trunk.parameters()).device
            shape = trunk.eval()(torch.zeros(1, 3, size, size, device=device)).shape
        if len(shape) == 4:
            from timm.layers import build_sincos2d_pos_embed

            self._build_position = build_sincos2d_pos_embed
            self.norm_map = nn.LayerNorm(int(trunk.num_features))
        self.train()

    def forward(self, images: Tensor, _: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As of `towers.ImageTower`; nothing is drawn at random."""
        x = self.trunk(images)
        if self.norm_map is not None:
            map_BHWC = x if self.channels_last else x.permute(0, 2, 3, 1)
            height, width, channels = map_BHWC.shape[1:]
            position = self._build_position(
                [height, width], channels, device=x.device, dtype=torch.float32
            )
            x = self.norm_map(map_BHWC.flatten(1, 2)) + position.to(x.dtype)
        return self.pool(x[:, self.skipped :])

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """timm's own groups from input to output, poolers with the last, then the projection."""
        groups = self._trunk_groups()
        groups[-1] += self._pooling_parameters()
        if self.norm_map is not None:
            groups[-1] += self.norm_map.parameters()
        return [*groups, *self._head_groups()]


class TimmClipTower(_Trunk):
    """A timm model with its own pooling and a linear projection, as OpenCLIP's `TimmModel`."""

    def __init__(self, config: VisionConfig, embed_dim: int) -> None:
        super().__init__()
        self.trunk = make_trunk(config, config.timm_pool)
        projection = nn.Linear(int(self.trunk.num_features), embed_dim, config.timm_proj_bias)
        nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
        self.head = nn.ModuleDict({"proj": projection})

    def forward(self, images: Tensor, _: Tensor | None = None) -> tuple[Tensor, None]:
        """Normalised images [B, 3, H, W] → embedding [B, embed_dim], and no tokens."""
        return self.head["proj"](self.trunk(images)), None

    def contrastive_parameters(self) -> list[nn.Parameter]:
        """All of them: without a decoder there is no other loss."""
        return list(self.parameters())

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """timm's own groups from input to output, then the projection."""
        return [*self._trunk_groups(), list(self.head.parameters())]

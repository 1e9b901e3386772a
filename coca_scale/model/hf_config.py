"""Architectures of Hugging Face text models, without a hub where possible."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from coca_scale.errors import UserError, system_faults
from coca_scale.model.sizes import Count, Layers, TokenId, Vocabulary
from coca_scale.recipe.files import read_json, validated

SHIPPED = Path(__file__).parent / "configs" / "huggingface"
# models whose attention becomes causal with `is_decoder`, each covered by a test
CAUSAL_TYPES = ("bert", "camembert", "roberta", "xlm-roberta")


class _Architecture(BaseModel):
    """What a `config.json` says of the shape of such a model.

    The rest is dropped: it names code to fetch and run, ways to load, or heads that are not used.
    """

    model_type: Literal["bert", "camembert", "roberta", "xlm-roberta"]
    hidden_size: Count
    vocab_size: Vocabulary
    pad_token_id: TokenId
    max_position_embeddings: Annotated[int, Field(ge=3, le=2**20)]
    num_hidden_layers: Layers = 12
    num_attention_heads: Count = 12
    intermediate_size: Annotated[int, Field(ge=1, le=2**20)] = 3072
    hidden_act: Literal[
        "gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "tanh"
    ] = "gelu"
    type_vocab_size: Count = 2
    layer_norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-12
    initializer_range: Annotated[float, Field(gt=0, lt=1)] = 0.02
    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | None = None

    @model_validator(mode="after")
    def _divides(self) -> _Architecture:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} over {self.num_attention_heads} heads"
            )
        if self.pad_token_id >= self.vocab_size:
            raise ValueError(f"pad_token_id {self.pad_token_id} is none of {self.vocab_size}")
        return self


def architecture(name: str, given: Any, origin: str) -> dict[str, Any]:
    """The shape of a Hugging Face model, as its `config.json` says it.

    Args:
        name: of a local folder, a shipped copy, or a model on the hub.
        given: the content, where it is known already; None to look for it.
        origin: what names the model, for messages.

    Raises:
        UserError: not found, wrong, or of a kind that cannot be made causal.
    """
    with system_faults():  # such as a name that is longer than names can be
        config = _read(name, origin) if given is None else given
    of_model = f"{origin}: the config of {name!r}"
    if not isinstance(config, dict):
        raise UserError(f"{of_model} is no object")
    kind = config.get("model_type")
    if kind is not None and kind not in CAUSAL_TYPES:
        raise UserError(
            f"{origin}: text_cfg.hf_model_name {name!r} is of type {kind!r}; "
            f"supported are {', '.join(CAUSAL_TYPES)}"
        )
    return validated(config, _Architecture, of_model).model_dump(exclude_unset=True)


def _read(name: str, origin: str) -> Any:
    is_folder = Path(name).is_dir()
    file = Path(name) / "config.json"
    if not is_folder:
        file = SHIPPED / f"{name.removeprefix('FacebookAI/')}.json"
    if file.is_file():
        return read_json(file)
    if is_folder:
        raise UserError(f"{origin}: text_cfg.hf_model_name {name}: no config.json in this folder")
    from transformers import AutoConfig  # slow to import, rarely needed

    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False).to_dict()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{origin}: text_cfg.hf_model_name {name!r} is neither a folder nor in the local cache "
            "nor reachable on the hub, or needs code of its own; download it where there is a "
            "network and give the folder"
        ) from error

"""How large the parts of a model may be: far above any that exists, and low enough to be built."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Count = Annotated[int, Field(ge=1, le=2**16)]  # widths, heads, queries, tokens
Layers = Annotated[int, Field(ge=1, le=512)]
Vocabulary = Annotated[int, Field(ge=1, le=2**24)]
TokenId = Annotated[int, Field(ge=0, lt=2**24)]
Pixels = Annotated[int, Field(ge=1, le=2**13)]
MlpRatio = Annotated[float, Field(gt=0, le=64)]
Name = Annotated[str, Field(max_length=1024)]  # of a model elsewhere, or a folder
MOST_PATCHES = 2**16

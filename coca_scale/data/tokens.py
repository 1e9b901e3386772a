"""Captions to token ids and back.

Two tokenizers: CLIP's BPE as OpenCLIP has it (49,408 tokens, padding 0), and prefixes of the same
BPE for small models, named `coca-scale/clip-bpe-N`: its 512 byte symbols, its first merges, and the
special tokens <pad>, <start_of_text>, <end_of_text> as ids 0, 1, 2, N tokens in all.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from open_clip.tokenizer import SimpleTokenizer, bytes_to_unicode, default_bpe, get_clean_fn
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as HuggingFaceTokenizer
from torch import Tensor

from coca_scale.model.config import ModelConfig

PREFIX_NAME = re.compile(r"coca-scale/clip-bpe-(\d+)")
TOKENIZER_FILE = "tokenizer.json"
PAD, START, END = "<pad>", "<start_of_text>", "<end_of_text>"
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer(Protocol):
    """Turns captions into padded rows of token ids."""

    context_length: int
    vocab_size: int
    start_id: int
    end_id: int

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Token ids [n, context_length]: start, words, end, padding 0; long captions are cut."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The words before the first end token, without special tokens."""
        ...


class ClipTokenizer:
    """CLIP's BPE, by OpenCLIP's own code."""

    def __init__(self, context_length: int) -> None:
        self._bpe = SimpleTokenizer(context_length=context_length)
        self.context_length = context_length
        self.vocab_size = int(self._bpe.vocab_size)
        self.start_id = int(self._bpe.sot_token_id)
        self.end_id = int(self._bpe.eot_token_id)

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Token ids [n, context_length]."""
        ids: Tensor = self._bpe(list(captions))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The words before the first end token."""
        text: str = self._bpe.decode(_words(ids, self))
        return text.strip()


class ClipPrefixTokenizer:
    """The first merges of CLIP's BPE, in the file format of the tokenizers library."""

    def __init__(self, backend: HuggingFaceTokenizer, context_length: int) -> None:
        backend.enable_padding(length=context_length, pad_id=0, pad_token=PAD)
        backend.enable_truncation(context_length)
        self._backend = backend
        self._clean = get_clean_fn("whitespace")  # as OpenCLIP's HFTokenizer does
        self.context_length = context_length
        self.vocab_size = backend.get_vocab_size()
        self.start_id = _special_id(backend, START)
        self.end_id = _special_id(backend, END)

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Token ids [n, context_length]."""
        rows = self._backend.encode_batch([self._clean(caption) for caption in captions])
        return torch.tensor([row.ids for row in rows])

    def decode(self, ids: Sequence[int]) -> str:
        """The words before the first end token."""
        text: str = self._backend.decode(_words(ids, self))
        return text.strip()

    def save(self, folder: Path) -> None:
        """Write the files that OpenCLIP's HFTokenizer reads."""
        self._backend.save(str(folder / TOKENIZER_FILE))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": PAD,
            "bos_token": START,
            "eos_token": END,
            "model_max_length": self.context_length,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def make_tokenizer(config: ModelConfig, folder: Path | None = None) -> Tokenizer:
    """The tokenizer of a model; `folder` is searched for its files first.

    Raises:
        ValueError: unknown tokenizer, or a vocabulary larger than the model's.
    """
    text = config.text_cfg
    tokenizer: Tokenizer
    if text.hf_tokenizer_name is None:
        tokenizer = ClipTokenizer(text.context_length)
    elif folder is not None and (folder / TOKENIZER_FILE).is_file():
        backend = HuggingFaceTokenizer.from_file(str(folder / TOKENIZER_FILE))
        tokenizer = ClipPrefixTokenizer(backend, text.context_length)
    elif match := PREFIX_NAME.fullmatch(text.hf_tokenizer_name):
        tokenizer = ClipPrefixTokenizer(clip_bpe_prefix(int(match[1])), text.context_length)
    else:
        raise ValueError(
            f"tokenizer {text.hf_tokenizer_name!r} is not known; leave text_cfg.hf_tokenizer_name "
            "out for CLIP's BPE, or name coca-scale/clip-bpe-N"
        )
    if tokenizer.vocab_size > text.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, "
            f"text_cfg.vocab_size is {text.vocab_size}"
        )
    return tokenizer


def clip_bpe_prefix(size: int) -> HuggingFaceTokenizer:
    """CLIP's BPE cut to `size` tokens.

    Raises:
        ValueError: fewer tokens than bytes and special tokens, or more than CLIP has.
    """
    symbols = list(bytes_to_unicode().values())
    base = [PAD, START, END, *symbols, *(symbol + "</w>" for symbol in symbols)]
    lines = gzip.decompress(Path(default_bpe()).read_bytes()).decode("utf-8").split("\n")
    merges: list[tuple[str, str]] = []
    for line in lines[1 : 49152 - 256 - 2 + 1]:
        left, right = line.split()
        merges.append((left, right))
    if not len(base) <= size <= len(base) + len(merges):
        limits = f"{len(base)} to {len(base) + len(merges)}"
        raise ValueError(f"coca-scale/clip-bpe-{size}: the size is between {limits}")
    merges = merges[: size - len(base)]
    vocabulary = {token: i for i, token in enumerate([*base, *("".join(m) for m in merges)])}
    tokenizer = HuggingFaceTokenizer(
        models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, 1), (END, 2)]
    )
    # Ġ is the byte-level name of a space
    tokenizer.decoder = decoders.Sequence([decoders.Replace("</w>", "Ġ"), decoders.ByteLevel()])
    tokenizer.add_special_tokens([PAD, START, END])
    return tokenizer


def _special_id(backend: HuggingFaceTokenizer, token: str) -> int:
    number = backend.token_to_id(token)
    if number is None:
        raise ValueError(f"the tokenizer has no {token} token")
    return number


def _words(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """Ids up to the first end token, without start and padding."""
    listed = [int(i) for i in ids]
    if tokenizer.end_id in listed:
        listed = listed[: listed.index(tokenizer.end_id)]
    return [i for i in listed if i not in (0, tokenizer.start_id)]

"""Captions to token ids and back.

CLIP's BPE as OpenCLIP has it (49,408 tokens, padding 0), or any fast Hugging Face tokenizer: a
local folder, a name on the hub, or `coca-scale/clip-bpe-N`, a prefix of CLIP's BPE for small models
(its 512 byte symbols, its first merges, <pad>, <start_of_text>, <end_of_text> as ids 0, 1, 2).
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as HuggingFaceTokenizer
from torch import Tensor

from coca_scale.errors import UserError
from coca_scale.model.config import ModelConfig
from coca_scale.openclip.alone import open_clip_module
from coca_scale.recipe.files import read_json_as
from coca_scale.recipe.text import cleaned, one_line
from coca_scale.recipe.whole_files import write_whole

_openclip = open_clip_module("tokenizer")

PREFIX_NAME = re.compile(r"coca-scale/clip-bpe-([0-9]{1,9})")
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL = ("pad_token", "bos_token", "eos_token")
PAD, START, END = "<pad>", "<start_of_text>", "<end_of_text>"
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer(Protocol):
    """Turns captions into padded rows of token ids."""

    context_length: int
    vocab_size: int
    start_id: int
    end_id: int
    pad_id: int

    def __call__(self, captions: str | Sequence[str]) -> Tensor:
        """Token ids [n, context_length]: start, words, end, padding; long captions are cut."""
        ...

    def cuts(self, caption: str) -> bool:
        """Whether a caption has more tokens than the context, start and end included."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The words before the first end token, without special tokens, as one clean line."""
        ...


class ClipTokenizer:
    """CLIP's BPE, by OpenCLIP's own code."""

    def __init__(self, context_length: int) -> None:
        self._bpe = _openclip.SimpleTokenizer(context_length=context_length)
        self.context_length = context_length
        self.vocab_size = int(self._bpe.vocab_size)
        self.start_id = int(self._bpe.sot_token_id)
        self.end_id = int(self._bpe.eot_token_id)
        self.pad_id = 0

    def __call__(self, captions: str | Sequence[str]) -> Tensor:
        """Token ids [n, context_length]."""
        ids: Tensor = self._bpe(_listed(captions))
        return ids

    def cuts(self, caption: str) -> bool:
        """Whether a caption has more tokens than the context, start and end included."""
        return len(self._bpe.encode(caption)) + 2 > self.context_length

    def decode(self, ids: Sequence[int]) -> str:
        """The words before the first end token."""
        return one_line(self._bpe.decode(_words(ids, self)))


class FastTokenizer:
    """A tokenizer of the tokenizers library, cleaned and padded as OpenCLIP's HFTokenizer does."""

    def __init__(
        self, backend: HuggingFaceTokenizer, context_length: int, special: Mapping[str, str]
    ) -> None:
        """`special` names the tokens `pad_token`, `bos_token` and `eos_token`.

        Raises:
            UserError: one of them is not a token.
        """
        ids = {role: _special_id(backend, special, role) for role in SPECIAL}
        self.pad_id, self.start_id, self.end_id = (ids[role] for role in SPECIAL)
        backend.enable_padding(
            length=context_length, pad_id=self.pad_id, pad_token=special["pad_token"]
        )
        backend.enable_truncation(context_length)
        self._backend = backend
        self._special = {role: special[role] for role in SPECIAL}
        self._clean = _openclip.get_clean_fn("whitespace")
        self.context_length = context_length
        self.vocab_size = 1 + max(backend.get_vocab().values(), default=-1)

    def __call__(self, captions: str | Sequence[str]) -> Tensor:
        """Token ids [n, context_length]."""
        rows = self._backend.encode_batch([self._clean(c) for c in _listed(captions)])
        return torch.tensor([row.ids for row in rows])

    def cuts(self, caption: str) -> bool:
        """Whether a caption has more tokens than the context, start and end included."""
        return bool(self._backend.encode(self._clean(caption)).overflowing)

    def decode(self, ids: Sequence[int]) -> str:
        """The words before the first end token."""
        return one_line(self._backend.decode(_words(ids, self)))

    def save(self, folder: Path) -> None:
        """Write the files that OpenCLIP's HFTokenizer reads."""
        write_whole(folder / TOKENIZER_FILE, self._backend.to_str(pretty=True))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self._special,
            "model_max_length": self.context_length,
        }
        write_whole(folder / TOKENIZER_CONFIG, json.dumps(config, indent=2) + "\n")


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Start token and words of a prompt, without the end that a whole caption has.

    Raises:
        UserError: the tokenizer marks no end.
    """
    ids: list[int] = tokenizer([cleaned(prompt)])[0].tolist()
    if tokenizer.end_id not in ids[1:]:
        raise UserError("the tokenizer puts no end token behind captions: this model writes none")
    return ids[: ids.index(tokenizer.end_id, 1)]


def make_tokenizer(config: ModelConfig, folder: Path | None = None) -> Tokenizer:
    """The tokenizer of a model; `folder` is searched for its files first.

    Raises:
        UserError: not found, or one that does not fit the model's vocabulary and padding.
    """
    text = config.text
    name = text.hf_tokenizer_name or text.hf_model_name
    tokenizer: Tokenizer
    if name is None:
        tokenizer = ClipTokenizer(text.context_length)
    elif folder is not None and (folder / TOKENIZER_FILE).is_file():
        tokenizer = _from_hugging_face(str(folder), text.context_length)
    elif match := PREFIX_NAME.fullmatch(name):
        special = dict(zip(SPECIAL, (PAD, START, END), strict=True))
        backend = clip_bpe_prefix(int(match[1]))
        tokenizer = FastTokenizer(backend, text.context_length, special)
    else:
        tokenizer = _from_hugging_face(name, text.context_length)
    if tokenizer.vocab_size > text.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, "
            f"text_cfg.vocab_size is {text.vocab_size}"
        )
    used = int(tokenizer("a word").max())  # which a template may add
    if used >= text.vocab_size:
        raise UserError(f"the tokenizer writes id {used}, text_cfg.vocab_size is {text.vocab_size}")
    if tokenizer.pad_id != text.pad_id:
        raise UserError(
            f"the tokenizer pads with id {tokenizer.pad_id}, text_cfg.pad_id is {text.pad_id}"
        )
    if text.reads_the_end and text.eos_id != tokenizer.end_id:
        raise UserError(
            f"the tokenizer ends captions with id {tokenizer.end_id}, "
            f"text_cfg.eos_id is {text.eos_id}"
        )
    return tokenizer


def _from_hugging_face(name: str, context_length: int) -> FastTokenizer:
    """A tokenizer in a local folder, in the local cache or on the hub."""
    from transformers import AutoTokenizer  # slow to import

    with _readable(name):
        for file in (Path(name) / TOKENIZER_FILE, Path(name) / TOKENIZER_CONFIG):
            if file.is_file():
                read_json_as(file, dict[str, Any])  # transformers says less of what is wrong
        try:  # code that a tokenizer brings is not run, nor is anybody asked about it
            found = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError, ImportError) as error:
            raise UserError(
                f"tokenizer {name!r} is neither a folder with {TOKENIZER_FILE} nor in the local "
                "cache nor reachable on the hub, or brings code of its own, which is never run; "
                "download it where there is a network and give the folder as "
                "text_cfg.hf_tokenizer_name"
            ) from error
    backend = getattr(found, "backend_tokenizer", None)
    if not isinstance(backend, HuggingFaceTokenizer):
        raise UserError(f"tokenizer {name!r} has no fast version ({TOKENIZER_FILE})")
    special = {
        "pad_token": found.pad_token,
        "bos_token": found.bos_token or found.cls_token,
        "eos_token": found.eos_token or found.sep_token,
    }
    missing = [role for role, token in special.items() if token is None]
    if missing:
        raise UserError(f"tokenizer {name!r} has no {' and no '.join(missing)}")
    with _readable(name):
        tokenizer = FastTokenizer(backend, context_length, special)
        tokenizer("a word")  # some faults of its files show only now
    return tokenizer


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Reading a tokenizer's files: of rubbish in them, two libraries raise anything.

    Raises:
        UserError: what they say.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # Rust's
            raise
        reason = str(error).partition("\n")[0]
        raise UserError(f"tokenizer {name!r} is not readable ({reason})") from error


def clip_bpe_prefix(size: int) -> HuggingFaceTokenizer:
    """CLIP's BPE cut to `size` tokens.

    Raises:
        UserError: fewer tokens than bytes and special tokens, or more than CLIP has.
    """
    symbols = list(_openclip.bytes_to_unicode().values())
    base = [PAD, START, END, *symbols, *(symbol + "</w>" for symbol in symbols)]
    lines = gzip.decompress(Path(_openclip.default_bpe()).read_bytes()).decode("utf-8").split("\n")
    merges: list[tuple[str, str]] = []
    for line in lines[1 : 49152 - 256 - 2 + 1]:
        left, right = line.split()
        merges.append((left, right))
    if not len(base) <= size <= len(base) + len(merges):
        limits = f"{len(base)} to {len(base) + len(merges)}"
        raise UserError(f"coca-scale/clip-bpe-{size}: the size is between {limits}")
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


def _special_id(backend: HuggingFaceTokenizer, special: Mapping[str, str], role: str) -> int:
    number = backend.token_to_id(special[role])
    if number is None:
        raise UserError(f"the tokenizer's {role} {special[role]!r} is not one of its tokens")
    return int(number)


def _listed(captions: str | Sequence[str]) -> list[str]:
    return [captions] if isinstance(captions, str) else list(captions)


def _words(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """Ids up to the first end token, without start and padding."""
    listed = [int(i) for i in ids]
    if tokenizer.end_id in listed[1:]:  # where start and end are one token, the first is the start
        listed = listed[: listed.index(tokenizer.end_id, 1)]
    return [i for i in listed if i not in (tokenizer.pad_id, tokenizer.start_id)]

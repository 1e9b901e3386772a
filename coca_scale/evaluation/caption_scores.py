"""Scores of captions against references, by pycocoevalcap, the code of the COCO server.

BLEU, ROUGE-L and CIDEr need no Java. With Java, captions are tokenised as that code does it
(Stanford's PTB tokeniser), and METEOR is computed, and SPICE if its models have been downloaded;
without, NLTK's Treebank tokeniser takes its place, which cuts sentences alike but for rare signs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coca_scale.errors import UserError

_SPICE = "stanford-corenlp-3.6.0.jar"
Texts = Mapping[int, Sequence[str]]


@dataclass(frozen=True)
class CaptionScores:
    """Scores by name, and what was left out and why.

    Attributes:
        values: bleu_1 … bleu_4, rouge_l, cider, and meteor and spice where they could be computed.
        left_out: reasons by name.
        tokenizer: PTB or NLTK.
    """

    values: dict[str, float]
    left_out: dict[str, str]
    tokenizer: str


def score_captions(references: Texts, captions: Mapping[int, str], java: bool) -> CaptionScores:
    """Score captions.

    Args:
        references: true captions of every picture.
        captions: one of every picture.
        java: use Java if it is there.

    Raises:
        UserError: no pictures, or not the same ones.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    if not captions or captions.keys() != references.keys():
        raise UserError("captions can be scored for the pictures that have references, no others")
    written = {key: [caption] for key, caption in captions.items()}
    with_java = java and shutil.which("java") is not None
    tokenize = _ptb if with_java else _treebank
    true, ours = tokenize(references), tokenize(written)
    bleu, _ = Bleu(4).compute_score(true, ours, verbose=0)
    values = {f"bleu_{n}": float(value) for n, value in enumerate(bleu, 1)}
    values["rouge_l"] = float(Rouge().compute_score(true, ours)[0])
    values["cider"] = float(Cider().compute_score(true, ours)[0])
    left_out = {}
    for name in ("meteor", "spice"):
        found = _in_java(name, true, ours) if with_java else "needs Java"
        if isinstance(found, float):
            values[name] = found
        else:
            left_out[name] = found
    return CaptionScores(values, left_out, "PTB" if with_java else "NLTK")


def _in_java(name: str, references: Any, captions: Any) -> float | str:
    """A score, or why there is none."""
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.spice import spice

    if name == "spice" and not Path(spice.__file__).with_name("lib").joinpath(_SPICE).is_file():
        return (
            "its models (0.5 GB) are not there; python -c 'from pycocoevalcap.spice import "
            "get_stanford_models as g; g.get_stanford_models()' downloads them"
        )
    try:
        scorer = Meteor() if name == "meteor" else spice.Spice()
        with _quiet():
            return float(scorer.compute_score(references, captions)[0])
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]


def _ptb(texts: Texts) -> dict[int, list[str]]:
    """Raises UserError if Java does not tokenise all of them."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    listed = {key: [{"caption": text} for text in of_key] for key, of_key in texts.items()}
    with _quiet():
        found: dict[int, list[str]] = PTBTokenizer().tokenize(listed)
    if {k: len(v) for k, v in found.items()} != {k: len(v) for k, v in texts.items()}:
        raise UserError("Java did not tokenise the captions; see that `java -version` works")
    return found


def _treebank(texts: Texts) -> dict[int, list[str]]:
    from nltk.tokenize import TreebankWordTokenizer
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

    split = TreebankWordTokenizer()

    def words(text: str) -> str:
        found = (word.lower() for word in split.tokenize(text, convert_parentheses=True))
        return " ".join(word for word in found if word not in PUNCTUATIONS)

    return {key: [words(text) for text in of_key] for key, of_key in texts.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Java's programs tell standard error how many tokens they read."""
    sys.stderr.flush()
    kept = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)

"""Caption scores are those of COCO's code, and of others where there are others."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path

import pytest
from nltk.translate.bleu_score import corpus_bleu

from coca_scale.errors import UserError
from coca_scale.evaluation import caption_scores
from coca_scale.evaluation.caption_scores import score_captions

CASES = json.loads((Path(__file__).parent / "annotated.json").read_text())
REFERENCES = {number: case["references"] for number, case in enumerate(CASES)}
CAPTIONS = {number: case["caption"] for number, case in enumerate(CASES)}
# of pycocoevalcap 1.2 with Java 17: PTBTokenizer, then each scorer
COCO = {
    "bleu_1": 0.7727272727155647,
    "bleu_2": 0.6215815604979936,
    "bleu_3": 0.43968296720813926,
    "bleu_4": 0.317164747436623,
    "rouge_l": 0.5776567205893401,
    "cider": 1.343286498701036,
}
METEOR = 0.25357380863826173


def ngrams(words: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def cider_d(references: dict[int, list[str]], captions: dict[int, list[str]]) -> float:
    """Vedantam et al. 2015, section 5 and the CIDEr-D of section 5.1, from the formulas."""
    scores = []
    for key, texts in references.items():
        total = 0.0
        for n in (1, 2, 3, 4):
            known = [
                set().union(*(ngrams(r.split(), n) for r in refs)) for refs in references.values()
            ]

            def vector(text: str, n: int = n, known: list[set] = known) -> dict:
                return {
                    gram: count * math.log(len(known) / max(1, sum(gram in k for k in known)))
                    for gram, count in ngrams(text.split(), n).items()
                }

            ours = vector(captions[key][0])
            for text in texts:
                true = vector(text)
                dot = sum(min(w, true[g]) * true[g] for g, w in ours.items() if g in true)
                norm = math.hypot(*ours.values()) * math.hypot(*true.values())
                gap = len(captions[key][0].split()) - len(text.split())
                total += (dot / norm if norm else 0.0) * math.exp(-(gap**2) / 72) / len(texts) / 4
        scores.append(10 * total)
    return sum(scores) / len(scores)


def longest_common(a: list[str], b: list[str]) -> int:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = (
                table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
            )
    return table[-1][-1]


def rouge_l(references: dict[int, list[str]], captions: dict[int, list[str]]) -> float:
    """Lin 2004 with β = 1.2, the best precision and recall of the references."""
    scores = []
    for key, texts in references.items():
        ours = captions[key][0].split()
        found = [(longest_common(ours, t.split()), len(t.split())) for t in texts]
        precision = max(common / len(ours) for common, _ in found)
        recall = max(common / length for common, length in found)
        bottom = recall + 1.44 * precision
        scores.append(2.44 * precision * recall / bottom if bottom else 0.0)
    return sum(scores) / len(scores)


def test_scores_without_java_are_those_of_cocos_code_and_of_the_formulas():
    found = score_captions(REFERENCES, CAPTIONS, java=False)
    assert found.values == pytest.approx(COCO, rel=1e-9)
    assert found.tokenizer == "NLTK" and set(found.left_out) == {"meteor", "spice"}
    true = caption_scores._treebank(REFERENCES)
    ours = caption_scores._treebank({key: [text] for key, text in CAPTIONS.items()})
    bleu = corpus_bleu(
        [[t.split() for t in true[key]] for key in true], [ours[key][0].split() for key in true]
    )
    assert found.values["bleu_4"] == pytest.approx(bleu, rel=1e-6)
    assert found.values["rouge_l"] == pytest.approx(rouge_l(true, ours), rel=1e-9)
    assert found.values["cider"] == pytest.approx(cider_d(true, ours), rel=1e-6)


@pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")
def test_scores_with_java_are_those_of_cocos_code(capfd):
    found = score_captions(REFERENCES, CAPTIONS, java=True)
    assert found.tokenizer == "PTB"
    values = dict(found.values)
    values.pop("spice", None)  # only where its models have been downloaded
    assert values == pytest.approx(COCO | {"meteor": METEOR}, rel=1e-9)
    assert "PTBTokenizer" not in capfd.readouterr().err


def test_only_captions_with_references_are_scored():
    with pytest.raises(UserError, match="that have references"):
        score_captions(REFERENCES, {0: "a man"}, java=False)
    with pytest.raises(UserError, match="that have references"):
        score_captions({}, {}, java=False)

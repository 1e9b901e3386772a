"""All kinds of evaluation. A new one is a module like `retrieval.py`, and its `KIND` in this list.

Its scores then have their names in the tables of `coca-scale eval`, in a run's log, on its page and
in the model card. `cli/evaluate.py` gives it a verb.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from coca_scale.evaluation import captioning_scores, retrieval, zeroshot
from coca_scale.evaluation.results import Kind, Score

KINDS = {kind.name: kind for kind in (zeroshot.KIND, retrieval.KIND, captioning_scores.KIND)}


def flat_scores() -> Iterator[tuple[str, Kind, Score]]:
    """Every score under the name that `Result.flat` gives it."""
    for kind in KINDS.values():
        for name, score in kind.scores.items():
            yield kind.prefix + name, kind, score


def by_kind(flat: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Scores that stand together, by kind and their own names; other entries are left out."""
    found: dict[str, dict[str, float]] = {}
    for flat_name, kind, _ in flat_scores():
        if flat.get(flat_name) is not None:
            name = flat_name.removeprefix(kind.prefix)
            found.setdefault(kind.name, {})[name] = flat[flat_name]
    return found

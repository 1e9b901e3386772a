"""What an evaluation yields, and what is known of it before: its scores and their names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.table import Column, Table

from coca_scale.evaluation.encoder import Encoder, Feeding

if TYPE_CHECKING:
    from coca_scale.evaluation.captioning import Captioned


@dataclass(frozen=True)
class Score:
    """One number of an evaluation.

    Attributes:
        label: as people call it.
        percent: whether it is a share of 1 (CIDEr: up to 10), and so shown times 100.
        headline: whether it is told in a line of a run's log and among the facts of its page.
        charted: whether a run's page has its curve.
    """

    label: str
    headline: bool = False
    charted: bool = False
    percent: bool = True

    def shown(self, value: float) -> float:
        """The number as it is shown."""
        return 100 * value if self.percent else value


@dataclass(frozen=True)
class Kind:
    """A kind of evaluation.

    Attributes:
        name: of the verb, `coca-scale eval NAME`, and in files.
        hub_task: what the Hugging Face hub calls it.
        scores: by their names in files.
        prefix: before these names where scores of several kinds stand together.
    """

    name: str
    hub_task: str
    scores: Mapping[str, Score]
    prefix: str = ""


class Evaluator(Protocol):
    """An evaluation with its data."""

    def run(self, encoder: Encoder, feeding: Feeding) -> Result:
        """Measure. A collective; all ranks get the same result.

        Raises:
            AgreedError: no usable picture, or data that cannot be read.
        """
        ...


@dataclass
class Result:
    """What was found.

    Attributes:
        kind: of the evaluation.
        scores: by name.
        counts: pictures, and what belongs to them.
        left_out: scores that could not be computed, and why.
        bad: unusable pictures by cause.
        captioned: pictures with the model's captions, where it wrote some.
    """

    kind: Kind
    scores: dict[str, float]
    counts: dict[str, int]
    left_out: dict[str, str] = field(default_factory=dict)
    bad: Counter[str] = field(default_factory=Counter)
    captioned: list[Captioned] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        """For a file."""
        return {
            "task": self.kind.name,
            "scores": self.scores,
            **self.counts,
            "left_out": self.left_out,
            "skipped": dict(self.bad),
        }

    def flat(self) -> dict[str, float]:
        """Scores under names that stand beside those of other kinds."""
        return {self.kind.prefix + name: value for name, value in self.scores.items()}

    def headline(self) -> str:
        """The scores that matter most, in a line."""
        scores = self.kind.scores
        told = (f"{scores[n].label} {v:.3f}" for n, v in self.scores.items() if scores[n].headline)
        return ", ".join(told)

    def show(self, console: Console) -> None:
        """A table; scores in percent, CIDEr as COCO's server shows it."""
        known = ((name.replace("_", " "), count) for name, count in self.counts.items() if count)
        counts = ", ".join(f"{count} {name}" for name, count in known)
        console.print(f"{self.kind.name}: {counts}", highlight=False)
        scores = self.kind.scores
        unit = "%" if all(scores[name].percent for name in self.scores) else "value"
        table = Table("score", Column(unit, justify="right"), box=None)
        for name, value in self.scores.items():
            table.add_row(scores[name].label, f"{scores[name].shown(value):.2f}")
        console.print(table)
        for name, reason in self.left_out.items():
            label = self.kind.scores[name].label
            console.print(f"without {label}: {reason}", highlight=False, markup=False)

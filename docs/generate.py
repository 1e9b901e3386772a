"""Write what the docs take from the code; the tests see that it is current.

    python docs/generate.py

writes recipes/schema.json, docs/keys.md, docs/memory.svg and, between their marks, the tables of
recipes in docs/recipes.md and README.md, of OpenCLIP's options in docs/migration.md and of modules
in docs/code.md. Some minutes: every recipe's costs are counted.
"""

from __future__ import annotations

import ast
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from coca_scale.openclip.options import options_table
from coca_scale.planning.gpus import GPUS
from coca_scale.planning.plan import Costs, Plan
from coca_scale.planning.staged import PlannedStage, plan_stages, total_of
from coca_scale.recipe import Recipe, load_recipe
from coca_scale.recipe.distill import DistillSection
from coca_scale.recipe.load import schema_json
from coca_scale.recipe.section import Section
from coca_scale.recipe.stage_section import StageSection

ROOT = Path(__file__).resolve().parents[1]
MARKS = "<!-- {}: made by docs/generate.py -->", "<!-- end -->"


@dataclass(frozen=True)
class Entry:
    """A shipped recipe: where it is planned, and what is known about its results."""

    name: str
    purpose: str
    gpus: int
    gpu: str
    published: str
    measured: str = "not yet run on GPUs"


ENTRIES = (
    Entry(
        "tiny",
        "drawings, 2 CPU cores",
        1,
        "cpu",
        "",
        "5 to 14 min; 235 of 256 captions right, R@1 0.92/0.96",
    ),
    Entry(
        "tiny_staged",
        "drawings of 96 px, most samples at 48 px",
        1,
        "cpu",
        "",
        "5 min; 222 of 256 captions right, R@1 0.88/0.95",
    ),
    Entry(
        "tiny_two_captions",
        "drawings; short captions to match, long ones to write",
        1,
        "cpu",
        "",
        "5 min; R@1 0.75/0.83, CIDEr 0.92",
    ),
    Entry("cc3m", "CC3M, one node", 8, "h100-80gb", ""),
    Entry("small", "CC12M, one node", 8, "h100-80gb", ""),
    Entry(
        "base",
        "CC12M, one node; CoCa-Base of the paper",
        8,
        "h100-80gb",
        "paper, on JFT-3B and ALIGN: ImageNet 82.6",
    ),
    Entry("roberta", "CC12M, one node; RoBERTa text tower, causal", 8, "h100-80gb", ""),
    Entry(
        "large",
        "LAION-2B, 64 GPUs and up",
        64,
        "h100-80gb",
        "OpenCLIP, same samples: ImageNet 75.6; COCO R@1 62.9/45.7; Flickr R@1 88.4/74.3",
    ),
    Entry(
        "small_staged",
        "as small, most samples at 128 px",
        8,
        "h100-80gb",
        "",
    ),
    Entry(
        "large_staged",
        "as large, most samples at 84 px",
        64,
        "h100-80gb",
        "",
    ),
    Entry(
        "coca_2b",
        "LAION-2B, 512 GPUs",
        512,
        "h100-80gb",
        "paper, on JFT-3B and ALIGN: ImageNet 86.3",
    ),
    Entry(
        "clip_l14",
        "the CLIP that large is compared with",
        64,
        "h100-80gb",
        "OpenCLIP, 12.8 B samples of LAION-400M: ImageNet 72.8",
    ),
    Entry(
        "coco_finetune",
        "MSCOCO captions, one node, from LAION-2B weights",
        8,
        "a100-80gb",
        "OpenCLIP, same settings: CIDEr 125.3, BLEU-4 35.6, METEOR 29.8, SPICE 23.4",
    ),
    Entry(
        "domain_finetune",
        "your pictures, long captions, 448 px, from LAION-2B weights",
        8,
        "a100-80gb",
        "",
    ),
)


@dataclass(frozen=True)
class Planned:
    """An entry with the plan of its stages; what is said of one of them is of the last."""

    entry: Entry
    stages: list[PlannedStage]

    @property
    def recipe(self) -> Recipe:
        """Of the stage."""
        return self.stages[-1].recipe

    @property
    def costs(self) -> Costs:
        """Of the stage."""
        return self.stages[-1].costs

    @property
    def plan(self) -> Plan:
        """Of the stage."""
        return self.stages[-1].plan

    @property
    def most_bytes(self) -> int:
        """Of a GPU, in any stage."""
        return max(stage.plan.total_bytes for stage in self.stages)

    @property
    def length(self) -> str:
        """Of the run."""
        hours = total_of(self.stages).hours
        return "as long as your data" if hours is None else _length(hours)

    def parts(self) -> dict[str, int]:
        """Bytes of a GPU, by what they are for."""
        plan = self.plan
        states = plan.parameters_bytes + plan.gradients_bytes + plan.optimizer_bytes
        kept = dict(sorted(self.costs.kept_bytes.items(), key=lambda part: -part[1]))
        shares = {"weights, gradients, optimizer": states}
        shares |= {f"kept: {name}": size for name, size in kept.items()}
        most = self.costs.peak_bytes - sum(shares.values()) + states
        return {
            **shares,
            "while a block computes": most,
            "kept: graphs that wait": plan.activations_bytes - self.costs.peak_bytes,
            "contrastive loss": plan.loss_bytes,
            "gathered layers, CUDA, NCCL": plan.buffers_bytes,
        }

    @classmethod
    def of(cls, entry: Entry, *changes: str) -> Planned:
        """Count the costs of its recipe."""
        recipe = load_recipe(ROOT / "recipes" / f"{entry.name}.yaml", changes)
        return cls(entry, plan_stages(recipe, entry.gpus, GPUS[entry.gpu]))


def plan_all() -> list[Planned]:
    """Every shipped recipe."""
    return [Planned.of(entry) for entry in ENTRIES]


def keys_page() -> str:
    """A table per section of a recipe: key, default, meaning."""
    lines = ["# Recipe keys", "", "Made from `coca_scale/recipe/schema.py`.", ""]
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        assert isinstance(section, type) and issubclass(section, Section)
        lines += _keys_table(name, section)
    lines += _keys_table("loss.distill", DistillSection)
    return "\n".join([*lines, *_keys_table("schedule.stages, each", StageSection)])


def _keys_table(name: str, section: type[Section]) -> list[str]:
    lines = [f"## {name}", "", (section.__doc__ or "").strip(), ""]
    lines += ["| key | default | meaning |", "|---|---|---|"]
    for key, entry in section.model_fields.items():
        if entry.is_required():
            default = "required"
        else:
            value = entry.get_default(call_default_factory=True)
            default = f"`{'null' if value is None else value}`"
        lines.append(f"| `{key}` | {default} | {entry.description or ''} |")
    return [*lines, ""]


def recipe_table(rows: list[Planned]) -> str:
    """What the recipes are for, what they need, how long they take."""
    head = ("recipe", "model", "planned on", "batch", "memory per GPU", "samples/s", "length")
    return _table(head, [_recipe_row(row) for row in rows])


def _by_stage(row: Planned, of: Callable[[PlannedStage], str]) -> str:
    """What differs from stage to stage, in the cell of a run."""
    return ", then ".join(of(stage) for stage in row.stages)


def scores_table() -> str:
    """What the recipes are for, and scores where some are published."""
    head = ("recipe", "for", "published scores of this model")
    lines = [(f"`{e.name}.yaml`", e.purpose, e.published or "–") for e in ENTRIES]
    return _table(head, lines)


def _recipe_row(row: Planned) -> tuple[str, ...]:
    entry = row.entry

    def batch(stage: PlannedStage) -> str:
        found = stage.batch
        return (
            f"{found.global_batch:,} = {found.ranks} × {found.accumulation} × {found.micro_batch}"
        )

    return (
        f"`{entry.name}.yaml`",
        f"{row.recipe.model.name}, {row.costs.parameters / 1e6:,.1f} M",
        f"{entry.gpus} × {entry.gpu}",
        _by_stage(row, batch),
        f"{row.most_bytes / 1e9:,.1f} GB",
        _by_stage(row, lambda stage: f"{stage.plan.samples_per_second:,.0f}"),
        row.length,
    )


def short_table(rows: list[Planned]) -> str:
    """The README's."""
    head = ("recipe", "model", "for", "planned", "measured")
    lines = []
    for row in rows:
        plan = f"{row.entry.gpus} × {row.entry.gpu}: {row.most_bytes / 1e9:,.1f} GB each"
        lines.append(
            (
                f"`{row.entry.name}.yaml`",
                f"{row.recipe.model.name}, {row.costs.parameters / 1e6:,.1f} M",
                row.entry.purpose,
                f"{plan}, {row.length}",
                row.entry.measured,
            )
        )
    return _table(head, lines)


def _length(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:,.0f} min"
    return f"{hours:,.0f} h" if hours < 48 else f"{hours / 24:,.1f} days"


ROOMS = (  # as imports go, from top to bottom
    *("cli", "training", "reports", "doctor", "planning", "evaluation", "inference", "engine"),
    *("data", "openclip", "model", "losses", "recipe"),
)


def code_tree() -> str:
    """Every room and module with the first sentence of its docstring."""
    package = ROOT / "coca_scale"
    lines = ["```text", "coca_scale/"]
    for path in (package / "train.py", package / "errors.py"):
        lines.append(_tree_line(path, 2))
    for room in ROOMS:
        lines.append(f"  {room + '/':<24}{_first_sentence(package / room / '__init__.py')}")
        modules = sorted((package / room).glob("*.py"))
        lines += [_tree_line(path, 4) for path in modules if path.name != "__init__.py"]
    return "\n".join([*lines, "```"]) + "\n"


def _tree_line(path: Path, indent: int) -> str:
    return f"{' ' * indent + path.name:<26}{_first_sentence(path)}"


def _first_sentence(path: Path) -> str:
    """Of a module's docstring, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    words = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z`])", words, maxsplit=1)[0].rstrip(".")


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def memory_bars() -> dict[str, Planned]:
    """large.yaml on 64 H100s, with each kind of recomputation."""
    large = next(entry for entry in ENTRIES if entry.name == "large")
    return {
        kind: Planned.of(large, f"engine.activation_checkpointing={kind}")
        for kind in ("none", "selective", "full")
    }


def memory_picture(bars: Mapping[str, Planned]) -> str:
    """SVG with what fills a GPU, part by part."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    settings = {"svg.fonttype": "none", "svg.hashsalt": "coca-scale", "font.family": "sans-serif"}
    with pyplot.rc_context(settings):
        figure, axes = pyplot.subplots(figsize=(8, 3), layout="constrained")
        left = dict.fromkeys(bars, 0.0)
        for part in next(iter(bars.values())).parts():
            sizes = {kind: row.parts()[part] / 1e9 for kind, row in bars.items()}
            axes.barh(list(bars), list(sizes.values()), left=list(left.values()), label=part)
            left = {kind: left[kind] + sizes[kind] for kind in bars}
        for row, (_, total) in enumerate(left.items()):
            axes.text(total + 0.6, row, f"{total:.1f} GB", va="center")
        axes.axvline(79.1, color="black", linewidth=1)
        axes.set(xlim=(0, 88), xlabel="GB of an H100's 79.1", ylabel="recomputation")
        axes.invert_yaxis()
        figure.legend(ncols=3, fontsize="small", frameon=False, loc="outside upper center")
        axes.spines[["top", "right"]].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return buffer.getvalue()


def between(text: str, mark: str, content: str) -> str:
    """A page with what is between its marks replaced."""
    begin, end = MARKS[0].format(mark), MARKS[1]
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    assert len(pattern.findall(text)) == 1, f"{mark}: no single mark"
    return pattern.sub(lambda _: f"{begin}\n\n{content}\n{end}", text)


def pages() -> dict[Path, str]:
    """All generated texts by path; pictures are not in it."""
    rows = plan_all()
    readme, recipes = ROOT / "README.md", ROOT / "docs" / "recipes.md"
    migration, code = ROOT / "docs" / "migration.md", ROOT / "docs" / "code.md"
    return {
        ROOT / "recipes" / "schema.json": schema_json(),
        ROOT / "docs" / "keys.md": keys_page(),
        readme: between(readme.read_text(), "recipes", short_table(rows)),
        recipes: between(
            between(recipes.read_text(), "recipes", recipe_table(rows)), "scores", scores_table()
        ),
        migration: between(migration.read_text(), "options", options_table()),
        code: between(code.read_text(), "tree", code_tree()),
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
    (ROOT / "docs" / "memory.svg").write_text(memory_picture(memory_bars()))

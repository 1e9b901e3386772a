"""The recipe reference of the docs, from the schema."""

from __future__ import annotations

from coca_scale.recipe.schema import Recipe, Section


def reference_markdown() -> str:
    """A table per section: key, default, meaning. `docs/recipes.md` is this text."""
    lines = ["# Recipe keys", "", "Made from `coca_scale/recipe/schema.py`.", ""]
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        assert isinstance(section, type) and issubclass(section, Section)
        lines += [f"## {name}", "", (section.__doc__ or "").strip(), ""]
        lines += ["| key | default | meaning |", "|---|---|---|"]
        for key, entry in section.model_fields.items():
            if entry.is_required():
                default = "required"
            else:
                value = entry.get_default(call_default_factory=True)
                default = f"`{'null' if value is None else value}`"
            lines.append(f"| `{key}` | {default} | {entry.description or ''} |")
        lines.append("")
    return "\n".join(lines)

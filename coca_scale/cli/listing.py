"""How verbs read lists: the same options for all that take folders, tables and annotations."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from coca_scale.cli.arguments import give_parameters

ListArguments = dict[str, Any]  # of data.listing.ListOptions, whose module is slow to import


def _options(
    image_column: Annotated[
        str, typer.Option(help="CSV/TSV column with the image path.")
    ] = "filepath",
    caption_column: Annotated[str, typer.Option(help="CSV/TSV column with the caption.")] = "title",
    images: Annotated[Path | None, typer.Option(help="Pictures of a .json.")] = None,
    split: Annotated[
        str | None, typer.Option(help="Of a .json with Karpathy's splits: train, val, test …")
    ] = None,
    first_line: Annotated[
        bool, typer.Option("--first-line", help="Of a .txt side-car, take no further lines.")
    ] = False,
    encoding: Annotated[
        str | None,
        typer.Option(help="Of side-cars and lists that are neither UTF-8 nor UTF-16: cp1252, …"),
    ] = None,
) -> None:
    """In the place of `listing`."""


def lists_data(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Give a verb the options of lists in the place of its argument `listing: ListArguments`."""
    options = inspect.signature(_options, eval_str=True).parameters
    parameters = []
    for name, parameter in inspect.signature(verb, eval_str=True).parameters.items():
        its = options.values() if name == "listing" else [parameter]
        parameters += [p.replace(kind=p.POSITIONAL_OR_KEYWORD) for p in its]

    def command(**arguments: Any) -> Any:
        listing = {name: arguments.pop(name) for name in options}
        return verb(**arguments, listing=listing)

    give_parameters(command, verb, parameters)
    return command

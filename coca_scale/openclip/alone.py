"""Modules of open_clip without the package around them.

`import open_clip` takes seconds, since it brings all of torchvision, timm and transformers with it;
every command and every loader process would pay that for a tokenizer.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType


def open_clip_module(name: str) -> ModuleType:
    """A module of open_clip that imports none of its others: tokenizer, zero_shot_metadata."""
    alias = f"{__name__}.{name}"
    if alias not in sys.modules:
        package = find_spec("open_clip")
        assert package is not None and package.submodule_search_locations
        path = Path(package.submodule_search_locations[0]) / f"{name}.py"
        spec = spec_from_file_location(alias, path)
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[alias] = module
    return sys.modules[alias]

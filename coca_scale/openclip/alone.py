"""Parts of open_clip, and of timm which it needs, without the packages around them.

`import open_clip` takes seconds, since it brings all of torchvision, timm and transformers with it;
every command and every loader process would pay that for a tokenizer.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType


def package_folder(package: str) -> Path:
    """Where a package is installed, which is not imported."""
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def open_clip_module(name: str) -> ModuleType:
    """A module of open_clip that imports none of its others: tokenizer, zero_shot_metadata."""
    alias = f"{__name__}.{name}"
    if alias not in sys.modules:
        spec = spec_from_file_location(alias, package_folder("open_clip") / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[alias] = module
    return sys.modules[alias]


def imagenet_names() -> dict[str, str]:
    """ImageNet's 1000 classes by WordNet id, as OpenCLIP calls them; timm has the ids in order."""
    ids = (package_folder("timm") / "data" / "_info" / "imagenet_synsets.txt").read_text().split()
    names = open_clip_module("zero_shot_metadata").IMAGENET_CLASSNAMES
    return dict(zip(ids, names, strict=True))

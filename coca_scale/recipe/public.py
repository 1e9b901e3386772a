"""What of a recipe and a run may leave the machine: what is known to be harmless, and nothing else.

Everything that is published, sent to Weights & Biases or put on a page goes through here. Numbers
and switches stay. Of a text its last part stays, as in `laion2b-{00000..99999}.tar`, if all its
words are in the lists below: names of public data sets and models, and the words of our recipes
and of DeepSpeed's settings. All other text becomes `(private)`, with the suffix where that is a
known one: folders, hosts, buckets, users, tokens, commands and every name of one's own. `run.name`
and `log.wandb` are given to be shown, and stay if they look like names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from coca_scale.recipe.loss_weights import POSITION
from coca_scale.recipe.schema import Recipe
from coca_scale.recipe.section import Section

PRIVATE = "(private)"
HUB = "hf-hub:"
_DATA_WORDS = """
    aesthetic alt caltech caption captions cars cc cifar class cls coco commonpool conceptual
    country coyo csv data datacomp de dev dfn dtd en es eurosat filepath flickr flickr30k
    flickr8k folder food fr height high image imagenet imagenet1k images in1k in21k in22k jpeg
    jpg json jsonl karpathy key label laion lang language large medium merlion metaclip mnist
    mscoco multi nocaps nolang objectnet original parquet part pets picture pictures png punsafe
    pwatermark recaption redcaps relaxed resolution sbu shard shards similarity sketch small
    split sugarcrepe sun tar test text textcaps title train training tsv txt url val valid
    validation vizwiz wds webp width winoground wit xlarge yaml yfcc zh zip
"""
_MODEL_WORDS = """
    alt altogether apple augreg base basic bert big bigg camembert cased clip clipa coca
    convnext core cross datacompdr deepspeed dfndr domain eva facebook facebookai finetune
    finetuned frozen ft fullcc google gopt hf hub i18n laion laion2b laion400m laion5b language
    lt ltt mammut merged meta microsoft mobileclip moderntext mrl mscoco mt5 net nllb open openai
    patch pe plus python quickgelu reg res resnet rewind rn roberta scale siglip so soup swin timm
    tiny torch
    uncased vision vit vitamin webli window worldwide xl xlarge xlm xxl xxlarge
"""
# of DeepSpeed's settings, and of ours that are text
_ENGINE_WORDS = """
    16bit accum accumulation activation activations adam adamw agent alignment all allgather
    allow allreduce amp and apex apply arguments async auto autocast autotuning batch before
    bf16 bfloat16 bias block breakdown bucket buffer bytes cache cast check checkpoint
    checkpointing checks clipping clock comm comms communication compression compute config
    consecutive contiguous copy cores correction count cpu cpuadam cuda curriculum data
    dataloader ddp debug detailed device disable distance distributed drop ds dtype dump dynamic
    efficient elastic elasticity enable enabled encode excluded exec expert fast fetch flops for
    force format fp16 fp32 from full fusion gather gpu grad gradient gradients granularity group
    half hierarchical hpz hysteresis ignore immediate in init initial input int8 interval ipg is
    last latency leaf legacy level limit linear live load loading local logger loss lower lr
    managed master max memory micro min mode model module modules momentum monitor muon never
    none nontrainable norm num number nvme offload on only op open optimization optimizer out
    output overflow overlap override parallel parallelism param parameter parameters params
    partition partitioning partitions path per perc persistence pin pipe pipeline power predict
    predivide prefetch prescale print prof profile profiler quantized rank ratio read reduce
    reduction replicated reuse rng robin round safe sanity scale scatter scheduler seed seq
    sequential show single size sparse stage state states step steps storage sub sum super swap
    synchronization synchronize table tag tensor tensorboard threshold top total trace train
    trainable type types universal untested unused update use validation verbose vocabulary wall
    wandb warmup warnings weight weights window world write zenflow zero zeropp
"""
_ITEM = re.compile(r"[A-Za-z0-9_.{},*+@\[\]-]{1,200}")
_TOKEN = re.compile(r"([a-z]*)([0-9]{0,6})((?:[a-z][0-9]{0,3})?)")
_SUFFIX = re.compile(r"\.(?:tar|csv|tsv|jsonl?|yaml|txt|pt|bin|safetensors)$")
_SYNTHETIC = re.compile(r"synthetic://[a-z]+(?:\?[a-z_]+=[0-9]{1,9}(?:&[a-z_]+=[0-9]{1,9})*)?")
_NAME = re.compile(r"\w[\w .+()-]{0,79}")
_HUB_NAME = re.compile(rf"(?:{HUB})?\w[\w.-]{{0,95}}(?:/\w[\w.-]{{0,95}})?", re.ASCII)
_VERSION = re.compile(
    r"[0-9]{1,4}(?:\.[0-9]{1,4}){1,3}(?:\.?(?:a|b|rc|post|dev)[0-9]{1,8})?(?:\+[a-z]{1,4}[0-9]{0,4})?"
)
_COMMIT = re.compile(r"[0-9a-f]{7,40}")
_CAUSE = re.compile(r"[a-z]+(?:_[a-z]+){0,6}")
_FILTERED = "filtered_"
_WORD = re.compile(r"[A-Za-z0-9][\w.-]{0,47}", re.ASCII)
_MOST_DIGITS = 14


def public(value: Any) -> Any:
    """Plain data without what is of one machine, of one person or secret."""
    if isinstance(value, Mapping):
        made: dict[str, Any] = {}
        for key, item in value.items():
            place = POSITION.fullmatch(str(key))  # of a weight's points
            name = place[0] if place else public_text(str(key))
            made[name if name not in made else f"{name} {len(made)}"] = public(item)
        return made
    if isinstance(value, list | tuple):
        return [public(item) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return public_text(str(value))


def public_recipe(sections: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of a recipe as others may see them; still a recipe, keys in the same order."""
    shown: dict[str, Any] = public(sections)
    for section, key in (("run", "name"), ("log", "wandb")):
        kept = sections.get(section)
        name = kept.get(key) if isinstance(kept, Mapping) else None
        if isinstance(name, str):
            shown[section][key] = public_name(name)
    return shown


def public_text(text: str) -> str:
    """A text of any key: what is known of it, else `(private)`."""
    if not text or text in _own_words() or _SYNTHETIC.fullmatch(text):
        return text
    at_hub = text.startswith(HUB)
    parts = text.removeprefix(HUB).split("/") if at_hub else [re.split(r"[/\\]", text)[-1]]
    if all(map(_known, parts)) and len(parts) <= 2:
        return f"{HUB if at_hub else ''}{'/'.join(parts)}"
    suffix = _SUFFIX.search(text)
    return PRIVATE + (suffix[0] if suffix else "")


def public_name(name: str) -> str:
    """A name that was given to be shown, unless it looks like a path, an address or a key."""
    return name if _NAME.fullmatch(name) and not _like_a_key(name) else PRIVATE


def public_hub_name(name: str) -> str:
    """A model or tokenizer that is loaded by this name everywhere; a folder of ours is not."""
    everywhere = _HUB_NAME.fullmatch(name) and not _like_a_key(name) and not Path(name).exists()
    return name if everywhere else PRIVATE


def public_architecture(config: Any) -> Any:
    """A Hugging Face config, which has to stay what it is: numbers and single words stay, the
    rest, such as where it was loaded from, is dropped."""
    if isinstance(config, Mapping):
        pairs = ((key, public_architecture(item)) for key, item in config.items() if _word(key))
        return {key: item for key, item in pairs if item != PRIVATE}
    if isinstance(config, list):
        return [item for item in map(public_architecture, config) if item != PRIVATE]
    return PRIVATE if isinstance(config, str) and not _word(config) else config


def _word(text: str) -> bool:
    return _WORD.fullmatch(text) is not None and not _like_a_key(text)


def public_versions(about: Mapping[str, Any]) -> dict[str, str]:
    """Packages and their versions, of a run's versions.json."""
    found = about.get("versions")
    pairs = found.items() if isinstance(found, Mapping) else ()
    return {public_text(str(p)): str(v) for p, v in pairs if _VERSION.fullmatch(str(v))}


def public_commit(about: Mapping[str, Any]) -> str:
    """The commit of coca-scale, of a run's versions.json; `unknown` if there is none."""
    commit = str(about.get("git_commit"))
    return commit[:12] if _COMMIT.fullmatch(commit) else "unknown"


def public_cause(cause: object) -> str:
    """Why a sample was left out: a cause of ours, of which a filtered field's name is not."""
    if not isinstance(cause, str):
        return PRIVATE
    if cause.startswith(_FILTERED):
        return _FILTERED + public_text(cause.removeprefix(_FILTERED))
    return cause if _CAUSE.fullmatch(cause) else PRIVATE


def _known(part: str) -> bool:
    """Whether a name is made of known words and of a few short numbers, like those of shards."""
    if not _ITEM.fullmatch(part) or part.count("{") != part.count("}"):
        return False
    words, digits = 0, 0
    for token in re.findall(r"[a-z0-9]+", part.lower()):
        found = _TOKEN.fullmatch(token)
        if token in _words():
            words += 1
        elif found is None or (len(found[1]) > 1 and found[1] not in _words()):
            return False
        else:
            words += len(found[1]) > 1
            digits += sum(map(str.isdigit, token))
            if sum(map(str.isdigit, token)) > 6:
                return False
    return words > 0 and digits <= _MOST_DIGITS


def _like_a_key(name: str) -> bool:
    """Whether a part of a name is long and mixed, as tokens and passwords are."""
    for run in re.findall(r"[^\W_]+", name):
        mixed = any(c.isdigit() for c in run) and any(c.isalpha() for c in run)
        if len(run) >= (16 if mixed else 28):
            return True
    return False


@lru_cache(maxsize=1)
def _own_words() -> frozenset[str]:
    """Keys of recipes, the choices of those that have some, and texts that are defaults."""
    return frozenset(_schema_words(Recipe))


def _schema_words(section: type[Section]) -> Iterator[str]:
    for key, field in section.model_fields.items():
        yield key
        if isinstance(field.default, str):
            yield field.default
        yield from _choices(field.annotation)


def _choices(kind: Any) -> Iterator[str]:
    if isinstance(kind, type) and issubclass(kind, Section):
        yield from _schema_words(kind)
    elif get_origin(kind) is Literal:
        yield from (choice for choice in get_args(kind) if isinstance(choice, str))
    else:
        for inner in get_args(kind):
            yield from _choices(inner)


@lru_cache(maxsize=1)
def _words() -> frozenset[str]:
    ours = re.findall(r"[a-z0-9]{2,}", " ".join(_own_words()).lower())
    return frozenset([*ours, *f"{_DATA_WORDS} {_MODEL_WORDS} {_ENGINE_WORDS}".split()])

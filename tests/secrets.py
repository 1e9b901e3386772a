"""Secrets as people put them into recipes, in every text that a recipe has."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from coca_scale.recipe import Recipe, recipe_from_dict
from tests.conftest import tiny_recipe

# `{}` is the secret
SHAPES = (
    *("{}", "https://me:{}@node17/a.tar", "HTTPS://{}@node17/x.tar", "https://h/a.tar?token={}"),
    *("https://h/a.tar?X-Amz-Signature={}&x=1", "az://c/{}/a.tar?sig=hunter2", "s3://{}/a.tar"),
    *("https://h/coco.tar#{}", "https://10.0.0.7:80/{}/coco.tar", "https://u:{}@[::1]/x"),
    *("{https://me:{}@h/a.tar,https://h/b.tar}", "{/home/{}/a,/home/{}/b}/coco.tar"),
    *("simplecache::https://me:{}@h/a.tar", "filecache::s3://AKIA:{}@b/a.tar", "tar://x::{}"),
    *("pipe:aws s3 cp s3://b/a.tar - --key {}", "pipe:curl -H 'Authorization: {}' https://h/coco"),
    *("AWS_SECRET_ACCESS_KEY={}", "export K={};coco", "/mnt/private/{}/coco.tar", "/home/{}/train"),
    *("~{}/x", "file:///home/{}/a.tar", "file:/home/{}", "\\\\node17\\{}\\x", "C:\\Users\\{}\\x"),
    *("//node17/{}/x.tar", "$HOME/{}/x", "coca_ViT-L-14@/home/{}/w.pt", "hf-hub:acme/{}"),
    *("hf-hub:coco/coco@{}", "coco-{}.tar", "coco {}", "a\n/home/{}", "train/{}", "{}/../.."),
    *("https://h/a.tar https://me:{}@h/b", "me@node17:/{}", "synthetic://shapes?count={}"),
)
# long and mixed, as keys are; what is given as a name is told from a name by that alone
SECRETS = st.from_regex(r"(?=[A-Za-z]*[0-9])(?=[0-9]*[A-Za-z])[A-Za-z0-9]{16,24}", fullmatch=True)
# every key of a recipe that has text; tests hold the list complete
PLACES = (
    *("run.name", "run.dir", "model.name", "model.pretrained", "data.train", "data.val"),
    *("data.cache_dir", "data.image_column", "data.caption_column", "data.captions"),
    *("data.contrastive_captions", "data.caption_captions"),
    *(
        "data.filters.fields",
        "engine.deepspeed",
        "checkpoint.resume",
        "checkpoint.local_dir",
        "eval.zeroshot",
    ),
    *("eval.classnames", "eval.templates", "log.wandb", "schedule.stages"),
    *("loss.distill.teacher", "loss.distill.config", "checkpoint.mirror"),
)


def recipe_with(text: str) -> Recipe:
    """A recipe that has this text in all places, also as a key where keys are one's own."""
    raw: dict[str, Any] = tiny_recipe().model_dump()
    for place in PLACES:
        *sections, key = place.split(".")
        node = raw
        for section in sections:
            node = node[section]
        node[key] = text
    raw["data"] |= {
        "train": [text, {"shards": [text, text], "weight": 2.0}],
        "val": [text],
        "captions": {text: 0.5, "txt": 0.5},
        "contrastive_captions": {text: 1.0},
        "caption_captions": {text: 1.0},
    }
    raw["data"]["filters"]["fields"] = {text: {"one_of": [text, 1, True]}}
    raw["schedule"]["stages"] = [{"steps": 3, "train": text}]
    raw["train"]["steps"] = None
    raw["checkpoint"]["mirror"] = f"s3://{text.replace(':', '')}"  # no password may be in it
    raw["engine"]["deepspeed"] = {text: text, "zero_optimization": {"stage": [text, 1]}}
    return recipe_from_dict(raw)

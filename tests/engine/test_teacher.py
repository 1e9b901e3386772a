"""Steps with a teacher: exact on any ranks, stage and micro-batches, wherever its weights are."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, DistillClipLoss

from coca_scale.engine.objective import Objective
from coca_scale.engine.teacher import RunningTeacher, StoredTeacher, resized
from coca_scale.engine.world import World
from coca_scale.model import CoCa, LogitScale, ModelConfig
from coca_scale.model.config import parse_model_config
from coca_scale.model.freeze import freeze
from coca_scale.model.image import normalize_pixels
from coca_scale.model.weights import Model
from coca_scale.recipe import BatchSplit
from tests.conftest import tiny_recipe
from tests.engine.batches import BATCH, batch_of
from tests.ranks import on_ranks, quiet
from tests.variants import raw_config, variant

STEPS, TEACHER_LOG_SCALE = 3, 3.0
LEARNS = {"teacher": "named by the test", "weight": 1.5, "feature_weight": 0.5}


def teacher_model():
    """With a pooler of its own, other sizes, and features of the student's size."""
    torch.manual_seed(7)
    raw = raw_config("coca_tiny", vision_cfg__width=160, vision_cfg__image_size=60)
    coca = CoCa(parse_model_config(raw, "teacher")).eval().requires_grad_(False)
    scale = LogitScale(math.exp(-TEACHER_LOG_SCALE))
    return Model(coca, scale.requires_grad_(False))


def student(recipe):
    torch.manual_seed(0)
    model = CoCa(ModelConfig.from_recipe(recipe.model))
    freeze(model, recipe.model, recipe.loss)
    return model


def curve_of(rank, ranks, world, placement, changes):
    from coca_scale.engine.train_engine import TrainEngine

    recipe = tiny_recipe(loss__distill=LEARNS, **{"train__micro_batch": BATCH // ranks, **changes})
    teacher = RunningTeacher(teacher_model(), torch.float32, world, placement == "sharded")
    split = BatchSplit.from_recipe(recipe, ranks)
    engine = TrainEngine(student(recipe), LogitScale(), recipe, split, world, (), teacher)
    rows, curve = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks), []
    for step in range(STEPS):
        images, tokens = (whole[rows] for whole in batch_of(step))
        about = (engine.lay_out(tokens), 1e-3, 0, None, engine.lay_out_lesson(tokens))
        result = engine.step(images, *about).result()
        assert result.applied
        curve.append([result.loss, result.grad_norm, result.logit_scale, *result.losses.values()])
    names = list(result.losses)
    engine.close()
    return names, curve, teacher.resident_bytes


def curves_on_rank(rank, ranks, cases):
    from coca_scale.engine.launch import start_world

    with quiet():
        world = start_world()
        return [curve_of(rank, ranks, world, *case) for case in cases]


CASES = [
    ("replicated", {}),
    ("sharded", {}),
    ("sharded", {"train__micro_batch": 4}),
    ("replicated", {"train__micro_batch": 2, "engine__kept_graphs": 3}),
    ("replicated", {"engine__zero_stage": 2}),
    ("sharded", {"engine__zero_stage": 1, "train__micro_batch": 4}),
    ("replicated", {"engine__zero_stage": 0}),
    ("replicated", {"loss__contrastive_resident": 8}),
]


def reference():
    """Loss, gradient norm and losses of the first step, by autograd over the whole batch."""
    recipe = tiny_recipe()
    model, teacher, log_scale = student(recipe), teacher_model(), LogitScale().log_scale
    images, tokens = batch_of(0)
    captions = model.text.pack(tokens)

    def prepared(pixels, coca):
        return normalize_pixels(pixels, torch.float32, coca.config.preprocess_cfg)

    features, sums = model(prepared(images, model), captions)
    with torch.no_grad():
        pixels = F.interpolate(images.float(), (60, 60), mode="bicubic", antialias=True)
        taught = teacher.coca.encode(prepared(pixels.clamp(0, 255), model), captions).features
    scales = log_scale.exp(), teacher.logit_scale()
    contrastive = ClipLoss()(*features.unbind(1), scales[0])
    _, distill = DistillClipLoss()(*features.unbind(1), scales[0], *taught.unbind(1), scales[1])
    apart = (1 - (features * taught).sum(2)).mean()
    caption = sums["caption"] / len(captions.labels_K)
    loss = contrastive + 1.5 * distill + 0.5 * apart + 2 * caption
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    return [float(x.detach()) for x in (loss, norm, contrastive, distill, apart, caption)]


def test_a_step_is_exact_on_any_ranks_stage_and_accumulation():
    found = on_ranks(curves_on_rank, 2, CASES)
    alone = on_ranks(curves_on_rank, 1, CASES[3:5])
    expected = torch.tensor(reference(), dtype=torch.float64)
    names, first, whole_bytes = found[0][0]
    assert names == ["contrastive", "distill", "distill_features", "caption"]
    for _, curve, _ in (*found[0], *found[1], *alone[0]):
        loss, norm, _, *losses = curve[0]
        measured = torch.tensor([loss, norm, *losses], dtype=torch.float64)
        assert torch.allclose(measured, expected, rtol=2e-6), (measured, expected)
        assert torch.allclose(torch.tensor(curve), torch.tensor(first), rtol=2e-4)
    assert found[0][1][1] == first, "where the teacher's weights lie changes nothing"
    assert found[0][1][2] < 0.6 * whole_bytes


def features_on_rank(rank, ranks, folder, kinds):
    from coca_scale.engine.launch import start_world

    found = []
    with quiet():
        world = start_world()
    for kind in kinds:
        for cut in (False, True):
            torch.manual_seed(1)
            coca = CoCa(variant(kind, folder)).eval().requires_grad_(False)
            teacher = RunningTeacher(Model(coca, LogitScale()), torch.float32, world, cut)
            images, tokens = batch_of(0)
            tokens = tokens[:, :12].clamp(max=coca.config.text_cfg.vocab_size - 1)
            (lesson,) = teacher.lay_out([tokens])
            for _ in range(2):  # the second time it knows what comes next
                features = teacher.features(images, lesson)
            found.append((features, teacher.resident_bytes))
    return found


def test_towers_of_all_libraries_can_be_cut(tmp_path):
    kinds = ("clip", "timm_vit", "clip_roberta")
    variant("clip_roberta", tmp_path)  # whose files both ranks read
    for found in on_ranks(features_on_rank, 2, tmp_path, kinds):
        for kind, whole, cut in zip(kinds, found[::2], found[1::2], strict=True):
            assert whole[0].equal(cut[0]), kind
            assert torch.allclose(whole[0].norm(dim=2), torch.ones(BATCH, 2))
            assert cut[1] < 0.75 * whole[1], kind


def test_without_a_teacher_nothing_is_said_of_one():
    alone = World.alone(torch.device("cpu"))
    assert Objective(tiny_recipe().loss, alone).names == ["contrastive", "caption"]


def test_stored_features_are_handed_on_in_the_precision_of_the_run():
    world, dtype = World.alone(torch.device("cpu")), torch.bfloat16
    stored = F.normalize(torch.randn(6, 2, 8), dim=2).half()
    teacher = StoredTeacher(8, 2.0, dtype, world)
    lessons = teacher.lay_out(stored.split(3))
    images = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    found = torch.cat([teacher.features(images, lesson) for lesson in lessons])
    assert found.dtype == dtype and found.equal(stored.to(dtype))


@pytest.mark.parametrize("size", [24, 60])
def test_pictures_are_resized_as_pixels(size):
    images = torch.zeros(1, 3, 48, 48, dtype=torch.uint8)
    images[:, :, 16:32, 16:32] = 255
    found = resized(images, size)
    assert found.shape == (1, 3, size, size)
    assert found.min() == 0 and found.max() == 255
    assert abs(found.mean() - images.float().mean()) < 2
    assert resized(images, 48) is images

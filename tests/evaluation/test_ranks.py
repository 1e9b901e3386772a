"""What many ranks find is what one finds, to the last digit."""

from __future__ import annotations

import tarfile

import pytest

from coca_scale.data.synthetic import Shapes
from tests.ranks import on_ranks

CLASSES = ("circle", "square", "star")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """60 drawings in class folders with side-cars, some of them broken, and two shards of them."""
    folder = tmp_path_factory.mktemp("pictures")
    shapes = Shapes(400, 48, "val")
    chosen = [s for s in map(shapes.__getitem__, range(400)) if s.caption.split()[-1] in CLASSES]
    for number, sample in enumerate(chosen[:60]):
        file = folder / "by_class" / sample.caption.split()[-1] / f"{number:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        sample.image.save(file)
        file.with_suffix(".txt").write_text(f"{sample.caption} {number}\n")
        if number in (4, 31, 59):
            file.write_bytes(b"no picture")
    files = sorted((folder / "by_class").rglob("*.png"))
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number, file in enumerate(files[shard::2]):
                for path in (file, file.with_suffix(".txt")):
                    tar.add(path, f"{number:06d}{path.suffix}")
    return folder


def evaluate_on_rank(rank, ranks, model, folder, limits):
    import torch

    from coca_scale.data.listing import ListOptions
    from coca_scale.engine.launch import end_world, start_world
    from coca_scale.engine.world import World
    from coca_scale.evaluation.captioning_scores import Captioning
    from coca_scale.evaluation.encoder import Feeding, loaded_encoder
    from coca_scale.evaluation.pictures import InputPictures, open_pictures
    from coca_scale.evaluation.retrieval import Retrieval
    from coca_scale.evaluation.zeroshot import ZeroShot, open_labelled
    from coca_scale.inference.generation_options import GenerationOptions
    from coca_scale.inference.load import load_model
    from coca_scale.recipe.data import DataSection

    world = start_world(60) if ranks > 1 else World.alone(torch.device("cpu"))
    encoder = loaded_encoder(load_model(model), world)
    by_class = str(folder / "by_class")
    section = DataSection.model_validate({"train": by_class})
    shards = InputPictures(open_pictures([str(folder)], section, ListOptions()))
    files = InputPictures(open_pictures([by_class], section, ListOptions()))
    options = GenerationOptions("greedy", 10)
    evaluators = {
        "zeroshot": ZeroShot(open_labelled([by_class], section, None, "simple")),
        "retrieval of files": Retrieval(files),
        "retrieval of shards": Retrieval(shards),
        "captioning": Captioning(shards, options, shown=3),
    }
    told = []
    for limit in limits:
        feeding = Feeding(batch_size=7, limit=limit)
        found = {name: e.run(encoder, feeding) for name, e in evaluators.items()}
        shown = [(item.picture.key, item.captions) for item in found["captioning"].captioned]
        told.append(({name: result.json() for name, result in found.items()}, shown))
    if ranks > 1:
        end_world()
    return told


@pytest.mark.slow
def test_three_ranks_find_what_one_finds(trained, inputs):
    limits = (None, 40)
    arguments = (str(trained.folder), inputs, limits)
    alone = on_ranks(evaluate_on_rank, 1, *arguments)[0]
    for of_rank in on_ranks(evaluate_on_rank, 3, *arguments):
        assert of_rank == alone
    for limit, (results, shown) in zip(limits, alone, strict=True):
        assert {r["pictures"] for r in results.values()} == {57 if limit is None else limit}
        assert len(shown) == 3
        if limit is None:
            assert all(r["skipped"] == {"broken_image": 3} for r in results.values())
        assert 0 < results["retrieval of files"]["scores"]["image_to_text_r1"] < 1


def fail_on_rank(rank, ranks, model, folder):
    from coca_scale.data.sample import DataError
    from coca_scale.engine.launch import end_world, start_world
    from coca_scale.errors import AgreedError
    from coca_scale.evaluation.encoder import Feeding, loaded_encoder
    from coca_scale.evaluation.retrieval import Retrieval
    from coca_scale.inference.load import load_model

    class Broken:
        name, count = "a disk", None

        def entries(self, image_size, here, of, strided):
            if rank == 1:
                raise DataError("the disk of this node is gone")
            yield from ()

    class Empty(Broken):
        def entries(self, image_size, here, of, strided):
            yield from ()

    world = start_world(60)
    encoder, told = loaded_encoder(load_model(model), world), []
    for source in (Broken(), Empty()):
        try:
            Retrieval(source).run(encoder, Feeding())
        except AgreedError as error:
            told.append(str(error))
    end_world()
    return told


@pytest.mark.slow
def test_all_ranks_fail_if_one_cannot_read(trained, inputs):
    expected = ["the disk of this node is gone", "a disk has no usable picture (found nothing)"]
    assert on_ranks(fail_on_rank, 2, str(trained.folder), inputs) == [expected, expected]

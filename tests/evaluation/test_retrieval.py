"""Recall against its definition, in pieces, and against open_clip's features."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from timm.data import ImageNetInfo
from typer.testing import CliRunner

from coca_scale.cli import app
from coca_scale.data.images import decode_image
from coca_scale.data.sample import DataError
from coca_scale.data.synthetic import Shapes
from coca_scale.evaluation import retrieval
from coca_scale.evaluation.results import Result
from coca_scale.evaluation.retrieval import recall, same_caption_ids
from coca_scale.evaluation.zeroshot import make_classes
from tests.invoke import output_of

evaluate = partial(output_of, "eval")


def by_definition(scores, query_ids, key_ids, k):
    """Share of rows with a right column among the k best, one row after the other."""
    hits = 0
    for row, own in zip(scores, query_ids, strict=True):
        order = sorted(range(len(row)), key=lambda j: -row[j])
        hits += any(key_ids[j] == own for j in order[:k])
    return hits / len(scores)


@pytest.mark.parametrize("piece", [7, 10_000])
def test_recall_with_several_captions_per_image(piece, monkeypatch):
    monkeypatch.setattr(retrieval, "_QUERIES", piece)
    monkeypatch.setattr(retrieval, "_KEYS", 2 * piece)
    torch.manual_seed(0)
    images = F.normalize(torch.randn(40, 8), dim=-1)
    text_ids = torch.arange(40).repeat_interleave(torch.arange(40) % 5 + 1)
    texts = F.normalize(images[text_ids] + 0.6 * torch.randn(len(text_ids), 8), dim=-1)
    found = recall(images, texts, torch.arange(40), text_ids)
    scores = (images @ texts.T).tolist()
    turned = (texts @ images.T).tolist()
    ids = list(range(40))
    for k in (1, 5, 10):
        assert found.image_to_text[k] == pytest.approx(by_definition(scores, ids, text_ids, k))
        assert found.text_to_image[k] == pytest.approx(by_definition(turned, text_ids, ids, k))
    assert 0.2 < found.image_to_text[1] < found.image_to_text[10] < 1
    assert (found.images, found.texts) == (40, len(text_ids))


def test_a_model_that_sees_no_difference_has_recall_by_chance():
    same = F.normalize(torch.ones(200, 4), dim=-1)
    found = recall(same, same, torch.arange(200), torch.arange(200))
    assert found.image_to_text == {1: 0.005, 5: 0.025, 10: 0.05}


def test_pairs_with_equal_captions_are_right_for_each_other():
    ids = same_caption_ids(["A cat.", "a dog", "a  cat ."])
    assert ids.tolist() == [0, 1, 0]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """60 drawings in class folders, with side-cars, and as Karpathy's json with two captions."""
    folder = tmp_path_factory.mktemp("pictures")
    shapes, entries = Shapes(60, 64, "val"), []
    for number in range(60):
        sample = shapes[number]
        name = sample.caption.split()[-1]
        (folder / "by_class" / name).mkdir(parents=True, exist_ok=True)
        file = folder / "by_class" / name / f"{number:03d}.png"
        sample.image.save(file)
        file.with_suffix(".txt").write_text(sample.caption + "\n")
        # no two are equal: which of equal scores comes first, nobody promises
        texts = (f"{sample.caption} {number}", f"{number} {sample.caption}")
        sentences = [{"raw": text} for text in texts]
        split = "test" if number < 50 else "val"
        entries.append({"filename": f"{name}/{file.name}", "split": split, "sentences": sentences})
    (folder / "karpathy.json").write_text(json.dumps({"images": entries}))
    return folder


def open_clip_features(trained, files, captions):
    """By open_clip alone: its model, preprocessing and tokenizer."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{trained.folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{trained.folder}")
    images = torch.stack([preprocess(Image.open(file)) for file in files])
    model.eval()
    with torch.no_grad():
        texts = model.encode_text(tokenizer(captions), normalize=True)
        return model, tokenizer, model.encode_image(images, normalize=True), texts


def test_retrieval_is_what_open_clip_finds(trained, pictures, tmp_path):
    out = tmp_path / "r.json"
    data = [pictures / "karpathy.json", "--images", pictures / "by_class", "--split", "test"]
    shown = evaluate("retrieval", trained.folder, *data, "--out", out)
    found = json.loads(out.read_text())
    images = json.loads((pictures / "karpathy.json").read_text())["images"][:50]
    files = [pictures / "by_class" / image["filename"] for image in images]
    captions = [s["raw"] for image in images for s in image["sentences"]]
    _, _, image_features, texts = open_clip_features(trained, files, captions)
    owners = [i for i in range(50) for _ in range(2)]
    for k in (1, 5, 10):
        i2t = by_definition((image_features @ texts.T).tolist(), range(50), owners, k)
        t2i = by_definition((texts @ image_features.T).tolist(), owners, range(50), k)
        assert found["scores"][f"image_to_text_r{k}"] == pytest.approx(i2t)
        assert found["scores"][f"text_to_image_r{k}"] == pytest.approx(t2i)
    assert found["scores"]["text_to_image_r10"] > 0.3, "the model learnt something"
    assert (found["pictures"], found["captions"]) == (50, 100)
    assert "image to text, R@10" in shown


def test_words_of_others_are_no_markup_of_a_table(capsys):
    reason = "OSError: [/usr/bin/java] is [bold]gone"
    Result(retrieval.KIND, {}, {"pictures": 1}, {"image_to_text_r1": reason}).show(Console())
    assert reason in capsys.readouterr().out


def test_folders_of_wordnet_ids_are_called_as_open_clip_calls_them():
    metadata = open_clip.zero_shot_metadata.IMAGENET_CLASSNAMES
    some = ["n01440764", "n02012849", "n02102040", "n03000684", "n03126707"]
    expected = ["tench", "crane bird", "English Springer Spaniel", "chainsaw", "construction crane"]
    assert set(expected) <= set(metadata)
    for classnames in (None, "imagenet"):
        assert make_classes(classnames, "simple", some).names == expected
    assert make_classes(None, "simple", some).prompts()[0] == "itap of a tench."
    everything = ImageNetInfo().label_names()
    assert make_classes(None, "simple", everything).names == list(metadata)
    mixed = ["big_cat", "n01440764", "n02085620-Chihuahua", "n0144076"]
    names = ["big cat", "tench", "Chihuahua", "n0144076"]
    assert make_classes(None, "simple", mixed).names == names
    with pytest.raises(DataError, match=r"n00004475 has the WordNet id of none.*--classnames FILE"):
        make_classes(None, "simple", ["n00004475", "n01440764"])
    with pytest.raises(DataError, match="1000 class names for 2 class folders"):
        make_classes("imagenet", "simple", ["a", "b"])


def test_zeroshot_is_what_open_clip_finds(trained, pictures, tmp_path):
    templates = tmp_path / "templates.txt"
    templates.write_text("a small red {}\na large blue {}\n")
    out = tmp_path / "z.json"
    arguments = ("--templates", templates, "--out", out)
    evaluate("zeroshot", trained.folder, pictures / "by_class", *arguments)
    found = json.loads(out.read_text())
    classes = sorted(p.name for p in (pictures / "by_class").iterdir())
    files = [f for name in classes for f in sorted((pictures / "by_class" / name).glob("*.png"))]
    labels = torch.tensor([classes.index(file.parent.name) for file in files])
    model, tokenizer, image_features, _ = open_clip_features(trained, files, ["a"])
    weights = open_clip.build_zero_shot_classifier(
        model,
        tokenizer,
        classes,
        [lambda c: f"a small red {c}", lambda c: f"a large blue {c}"],
        num_classes_per_batch=None,
    )
    best = (image_features @ weights).topk(5).indices
    top_1 = float((best[:, 0] == labels).float().mean())
    assert found["scores"]["top_1"] == pytest.approx(top_1)
    assert found["scores"]["top_5"] == pytest.approx(
        float((best == labels[:, None]).any(1).float().mean())
    )
    per_class = [float((best[labels == c, 0] == c).float().mean()) for c in range(len(classes))]
    assert found["scores"]["mean_per_class"] == pytest.approx(sum(per_class) / len(classes))
    assert top_1 > 1 / len(classes), "no better than chance"
    assert (found["pictures"], found["classes"]) == (60, len(classes))


def test_class_numbers_of_shards(trained, pictures, tmp_path):
    """As ImageNet's shards have them: 000001.jpg, 000001.cls."""
    import tarfile

    classes = sorted(p.name for p in (pictures / "by_class").iterdir())
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for number, name in enumerate(classes):
            (tmp_path / "x.cls").write_text(f"{number}\n")
            file = sorted((pictures / "by_class" / name).glob("*.png"))[0]
            tar.add(file, f"{number:06d}.png")
            tar.add(tmp_path / "x.cls", f"{number:06d}.cls")
    (tmp_path / "names.txt").write_text("\n".join(classes))
    out = tmp_path / "z.json"
    arguments = ("--classnames", tmp_path / "names.txt", "--templates", "simple", "--out", out)
    evaluate("zeroshot", trained.folder, tmp_path, *arguments)
    assert json.loads(out.read_text())["pictures"] == len(classes)
    (tmp_path / "names.txt").write_text("\n".join(classes[:2]))
    done = CliRunner().invoke(app, ["eval", "zeroshot", str(trained.folder), str(tmp_path)])
    assert "give --classnames" in str(done.exception)
    few = ["eval", "zeroshot", str(trained.folder), str(tmp_path), "--classnames"]
    done = CliRunner().invoke(app, [*few, str(tmp_path / "names.txt")])
    assert "is none of 0 … 1" in str(done.exception)


def test_captioning_scores_and_their_table(trained, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a worker's temporary path alone fills 80 columns
    out = Path("c.json")
    data = pictures / "by_class"
    shown = evaluate("captioning", trained.folder, data, "--method", "greedy", "--out", out)
    found = json.loads(out.read_text())
    assert found["pictures"] == found["references"] == 60
    assert 0 <= found["scores"]["exact"] <= 1 and found["scores"]["cider"] > 0
    assert found["scores"]["bleu_1"] >= found["scores"]["bleu_4"]
    assert "CIDEr" in shown and max(map(len, shown.splitlines())) <= 80


def test_pictures_that_cannot_be_used_are_counted(trained, pictures, tmp_path):
    folder = tmp_path / "some"
    folder.mkdir()
    for number, file in enumerate(sorted((pictures / "by_class").rglob("*.png"))[:4]):
        (folder / f"{number}.png").write_bytes(file.read_bytes())
        (folder / f"{number}.txt").write_text("a thing")
    (folder / "0.png").write_bytes(b"no picture")
    (folder / "1.txt").unlink()
    decode_image((folder / "2.png").read_bytes(), "2")
    out = tmp_path / "r.json"
    shown = evaluate("retrieval", trained.folder, folder, "--equal-captions", "--out", out)
    found = json.loads(out.read_text())
    assert found["pictures"] == 2 and found["scores"]["image_to_text_r1"] == 1.0
    assert found["skipped"] == {"broken_image": 1, "missing_caption": 1}
    assert "skipped 2" in shown

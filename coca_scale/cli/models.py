"""Verbs that use a model: caption, demo, export, publish."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from coca_scale.cli.arguments import (
    METHODS,
    BatchSize,
    ConfigOption,
    MaxLength,
    Method,
    MethodOption,
    MinLength,
    ModelArgument,
    NumBeams,
    Precision,
    PrecisionOption,
    RawWeights,
    progress_bar,
    say,
    skipped,
)
from coca_scale.cli.inputs import load, open_inputs, ranks
from coca_scale.cli.listing import ListArguments, lists_data
from coca_scale.errors import UserError
from coca_scale.version import __version__

VERIFY_TOLERANCE = 1e-3


def export_command(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    verify: Annotated[
        bool, typer.Option(help="Load the result with open_clip and compare outputs.")
    ] = False,
    config: ConfigOption = None,
    raw_weights: RawWeights = False,
) -> None:
    """Write an OpenCLIP model folder, or say why OpenCLIP cannot have this model.

    Example: coca-scale export runs/tiny --out runs/tiny/export --verify
    """
    from coca_scale.inference.export import export
    from coca_scale.inference.load import load_model
    from coca_scale.openclip.folder import verify_folder, what_reads

    loaded = load_model(model, config, raw_weights)
    obstacle = export(loaded, out)
    if obstacle is None:
        newer = what_reads(loaded.config)
        say(f"wrote {out}; load it with open_clip as local-dir:{out}")
        if newer is not None:
            say(newer)
    else:
        say(f"wrote {out} for coca-scale alone: {obstacle}")
    if verify:
        found = verify_folder(out, loaded.model)
        say("largest difference to open_clip on random inputs (fp32):")
        say(f"  image features  {found.image_features:.2e}")
        say(f"  text features   {found.text_features:.2e}")
        say(f"  caption logits  {found.caption_logits:.2e}")
        if not found.largest < VERIFY_TOLERANCE:
            raise UserError(f"{out}: open_clip computes something else with this model")


def publish_command(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Exported folder, or a run with its export.")
    ],
    repo: Annotated[str, typer.Option(help="ORG/NAME on the Hugging Face hub.")],
    run: Annotated[
        Path | None, typer.Option(help="Run it came from; default: the folder the export is in.")
    ] = None,
    scores: Annotated[
        list[Path] | None, typer.Option(help="JSON of coca-scale eval --out; as many as you like.")
    ] = None,
    licence: Annotated[str | None, typer.Option(help="As the hub calls it: mit, ...")] = None,
    private: Annotated[bool, typer.Option("--private", help="If the repository is new.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show model card and files, and send nothing.")
    ] = False,
) -> None:
    """Push an exported model to the Hugging Face hub, with a model card filled in from its run.

    Example: coca-scale publish runs/large --repo my-org/coca-large --licence mit --dry-run
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    from coca_scale.openclip.hub import upload
    from coca_scale.reports.publish import prepare

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--repo {repo}: {error}") from error
    if "/" not in repo:
        raise UserError(f"--repo {repo}: say whose it is, ORG/{repo}")
    publication = prepare(folder, repo, run, scores or (), licence)
    if dry_run:
        say(publication.card)
    for file in publication.files:
        say(f"{file.size_bytes / 1e6:10,.3f} MB  {file.name}")
    for warning in publication.warnings:
        say(f"warning: {warning}", err=True)
    if dry_run:
        say(f"nothing was sent; without --dry-run these files go to {repo}")
        return
    message = f"Upload of coca-scale {__version__}"
    say(upload(repo, publication.files, private or None, message))


@lists_data
def caption_command(
    model: ModelArgument,
    inputs: Annotated[
        list[str],
        typer.Argument(help="Pictures, folders, .csv/.tsv, .json, shards, synthetic://shapes."),
    ],
    out: Annotated[
        Path, typer.Option(help="JSONL file, or a folder for one file per input shard.")
    ],
    *,
    method: MethodOption = Method.BEAM,
    num_beams: NumBeams = 6,
    num_beam_groups: Annotated[int, typer.Option(help="Beams in groups that differ.")] = 1,
    diversity_penalty: Annotated[float, typer.Option(help="How much groups differ.")] = 0.0,
    length_penalty: Annotated[float, typer.Option(help="Above 0 favours long captions.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from that many tokens.")] = 1,
    top_p: Annotated[float, typer.Option(help="Draw from that share of probability.")] = 0.1,
    temperature: Annotated[float, typer.Option(help="Of drawing.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="1 is none.")] = 1.0,
    max_length: MaxLength = None,
    min_length: MinLength = 5,
    samples: Annotated[int, typer.Option(help="Captions per picture.")] = 1,
    seed: Annotated[int, typer.Option(help="Of drawing.")] = 0,
    prompt: Annotated[str, typer.Option(help="Words that every caption begins with.")] = "",
    picture: Annotated[Path | None, typer.Option(help="Also draw a PNG grid.")] = None,
    batch_size: BatchSize = 64,
    precision: PrecisionOption = Precision.FP32,
    listing: ListArguments,
    config: ConfigOption = None,
    raw_weights: RawWeights = False,
) -> None:
    """Caption pictures; goes on where an interrupted call stopped.

    Example: coca-scale caption runs/tiny photos/ --out captions.jsonl

    On 8 GPUs: torchrun --nproc-per-node 8 -m coca_scale caption MODEL shards/ --out captions/
    """
    from coca_scale.evaluation import captioning
    from coca_scale.evaluation.caption_job import CaptionJob
    from coca_scale.evaluation.encoder import loaded_encoder
    from coca_scale.inference.generation_options import GenerationOptions

    options = GenerationOptions(
        generation_type=METHODS[method],
        seq_len=max_length,
        min_seq_len=min_length,
        num_beams=num_beams,
        num_beam_groups=num_beam_groups,
        diversity_penalty=diversity_penalty,
        length_penalty=length_penalty,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        samples=samples,
        seed=seed,
    )
    with ranks() as world:
        parts = world.agree(lambda: open_inputs(inputs, listing, captions_needed=False))
        encoder = loaded_encoder(load(model, config, raw_weights, precision, world), world)
        captioner = world.agree(lambda: captioning.Captioner(encoder, options, prompt, batch_size))
        settings = {"model": model, "raw_weights": raw_weights, "inputs": inputs, "prompt": prompt}
        settings |= {"precision": precision.value, "split": listing["split"], **asdict(options)}
        settings |= {key: listing[key] for key in ("first_line", "encoding") if listing[key]}
        with progress_bar("pictures", world.rank == 0) as progress:
            job = CaptionJob(captioner, parts, settings, world, progress)
            in_file = out.suffix in (".jsonl", ".json")
            done = job.to_file(out) if in_file else job.to_folder(out)
        if world.rank > 0:
            return
    before = f", {done.there} were there before" if done.there else ""
    rate = f" in {done.seconds:.1f} s ({done.per_second:.1f} pictures/s)"
    say(f"{done.written} pictures captioned in {out}{rate}{before}{skipped(done.bad)}")
    if picture is not None:
        captioning.draw_grid(done.shown, picture)
        say(f"picture: {picture}")


def demo_command(
    model: ModelArgument,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 7860,
    num_beams: NumBeams = 6,
    max_length: MaxLength = None,
    min_length: MinLength = 5,
    upload_megabytes: Annotated[float, typer.Option(min=0.1, help="Of one picture.")] = 20.0,
    precision: PrecisionOption = Precision.FP32,
    config: ConfigOption = None,
    raw_weights: RawWeights = False,
) -> None:
    """A local web page: drop a picture, get captions and scores of labels.

    Example: coca-scale demo runs/tiny
    """
    from coca_scale.inference.demo import LOOPBACK, Describer, Limits, listen, make_app, serve
    from coca_scale.inference.generation_options import GenerationOptions
    from coca_scale.recipe.public import public_text

    options = GenerationOptions(
        seq_len=max_length, min_seq_len=min_length, num_beams=num_beams, samples=min(3, num_beams)
    )
    socket = listen(host, port)
    describer = Describer(load(model, config, raw_weights, precision), options)
    on_loopback = host in LOOPBACK
    limits = Limits(upload_bytes=int(upload_megabytes * 1e6))
    site = make_app(describer, model if on_loopback else public_text(model), limits, host)
    if not on_loopback:
        say(f"warning: everybody who reaches {host} can use this page", err=True)
    say(f"http://{host}:{socket.getsockname()[1]}   (ctrl-c ends it)")
    serve(site, socket)

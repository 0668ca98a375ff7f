"""``sgm eval``: how good a set of samples is. Nothing heavy is imported before the command runs."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from sgm_engine.cli.arguments import MAX_ID, MAX_SEED, QUALITIES, add_engine, at_least, positive
from sgm_engine.cli.model import engines, load_model, load_plan

EXAMPLES = """\
examples:
  sgm eval digits.npz --reference DATA:test --training DATA:train --features digits
  sgm eval --n 1000 --plan fast.json --reference DATA:test …        draws them itself, from the bundled weights
  sgm eval fast.npz --against slow.npz --reference DATA:test …      and the difference of the two, with its interval
  sgm eval digits.npz --nll --weights cdm --reference DATA:test     bits per dimension of both, by a model's log_prob
  sgm eval digits.npz --nll --nll-images 8 --reference DATA:test    by a score network's probability flow: slow
  sgm eval part-*.npz --reference images/ --features torchscript:mine.pt --trust-features --json report.json

What images may be: folder:train, folder:test (MNIST's IDX or CIFAR-10's binary files), .npz, .npy, .safetensors, a
folder of pictures. docs/evaluation.md explains every figure.
"""
FLOW_IMAGES = 16  # that a probability flow scores unless it is told how many
COUNT, TOLERANCE = 1000, 0.01
EXECUTION = ("batch", "device", "precision", "float8", "emulate_float8", "executor")
DRAWING = ("plan", "nfe", "quality", "n", "seed", *EXECUTION)
MODEL = ("checkpoint", "weights", "config", "image_size", "sigmas", "class_labels", "guidance", "ema")


def register(commands) -> None:
    p = commands.add_parser("eval", help="say how good samples are", epilog=EXAMPLES)
    p.description = "Measure samples against a reference set, with confidence intervals."
    p.set_defaults(run=run)
    add = p.add_argument_group("what to measure").add_argument
    add("samples", nargs="*", metavar="SAMPLES", help="files of one set; none: draw them, as given below")
    add("--reference", required=True, metavar="IMAGES", help="what samples should look like")
    add("--training", metavar="IMAGES", help="what the model was trained on: gives the floor and finds copies")
    add("--against", nargs="+", action="extend", default=[], metavar="SAMPLES",
        help="another set: is its Fréchet distance the same?")  # fmt: skip
    add("--features", default="pixels", metavar="KIND:FILE",
        help="digits (a classifier of MNIST, bundled), classifier:FILE (trained on --training if FILE is new), "
        "torchscript:FILE, export:FILE (.pt2), inception:FILE, or pixels (default)")  # fmt: skip
    add("--trust-features", action="store_true",
        help="open torchscript:, export: and inception: FILEs, which run what is in them")  # fmt: skip
    add("--metrics", metavar="A,B",
        help="of frechet, score, classes, sliced, mmd, precision, recall, density, coverage, copies, nll "
        "(default: what the features and --training allow)")  # fmt: skip
    add("--nll", action="store_true",
        help="bits per dimension of SAMPLES and --reference by the log_prob of --weights or --checkpoint; of a score "
        "network by its probability flow, hundreds of evaluations and gradients an image")  # fmt: skip
    add("--nll-images", type=at_least(1), metavar="N",
        help=f"so many of each set, drawn at random (default: all; by a probability flow {FLOW_IMAGES})")  # fmt: skip
    add("--nll-tolerance", type=positive, metavar="BITS",
        help=f"of the flow's steps, per dimension (default: {TOLERANCE})")  # fmt: skip
    add("--neighbours", type=at_least(1), default=5, metavar="K", help="of precision to coverage (default: 5)")
    add("--replicates", type=at_least(2), default=200, metavar="N", help="of each bootstrap (default: 200)")
    add("--json", metavar="PATH", help="write the report there as well, with each sample's nearest training image")
    add("--copies", metavar="PNG",
        help="draw the samples that lie nearest to training images there, each above its image")  # fmt: skip
    group = p.add_argument_group("if samples are to be drawn")
    add = group.add_argument
    add("--plan", metavar="PLAN", help="a plan's JSON file, or the name of one (default: what the weights recommend)")
    add("--nfe", type=at_least(1), metavar="N", help="the best plan of at most N evaluations, as of `sgm sample`")
    add("--quality", choices=QUALITIES, help="as of `sgm sample`")
    add("--n", type=at_least(2, MAX_ID), metavar="N", help=f"how many (default: {COUNT})")
    add("--seed", type=at_least(0, MAX_SEED), metavar="N", help="of their noise (default: 0)")
    add_engine(group)


def run(args: argparse.Namespace) -> int:
    from sgm_engine.cli.console import DONE, bad_input

    with bad_input():
        from sgm_engine.data.sets import open_images
        from sgm_engine.evaluation import evaluate as e
        from sgm_engine.evaluation.draw import drawn
        from sgm_engine.evaluation.features import open_extractor
        from sgm_engine.files.writing import check_writable, write_file
        from sgm_engine.models.conditioning import conditioned

        for path in filter(None, (args.json, args.copies)):
            check_writable(Path(path))
        metrics, extra = _metrics(args, e.METRICS)
        scored = args.nll or "nll" in extra
        _refuse_unused(args, scored)
        open_set = partial(open_images, data_range=args.data_range)
        reference_set = open_set(args.reference)
        training = open_set(args.training) if args.training else None
        sets = [open_set(*files) for files in (args.samples, args.against) if files]
        engine = plan = None
        own = None if args.samples and not scored else load_model(args)
        n, seed = args.n or COUNT, args.seed or 0
        if not args.samples:
            model, plan = conditioned(own, load_plan(args.plan, own, args.nfe, args.quality))
            engine = engines(args, own)(model)
        shapes = {s.name: tuple(s.shape) for s in (reference_set, training, *sets) if s is not None}
        shapes |= {"the model": tuple(engine.shape if engine else own.shape)} if own else {}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"images must have one shape: {', '.join(f'{n} {s}' for n, s in shapes.items())}")
        report_line = lambda line: print(line, file=sys.stderr)  # noqa: E731
        extractor = open_extractor(args.features, training, report_line, args.trust_features)

        lost: list = []
        if engine:
            name = f"{plan.name}, {plan.nfe} NFE, seed {seed}"
            blocks = drawn(engine, plan, range(n), seed, lost, progress=True)
            samples = e.summarise(blocks, extractor, name, total=n)
        else:
            samples = e.summarise(sets[0].blocks(), extractor, sets[0].name, total=len(sets[0]))
        reference = e.summarise(reference_set.blocks(), extractor, reference_set.name, total=len(reference_set))
        floor_set = training.take(samples.n) if training else None
        floor = e.summarise(floor_set.blocks(), extractor, floor_set.name) if training else None
        report = e.evaluate(samples, reference, metrics, floor, args.neighbours, args.replicates)

        if args.against:
            other = e.summarise(sets[-1].blocks(), extractor, sets[-1].name)
            report.rows += _difference(samples, other, reference, report)
        if scored:
            _likelihoods(args, own, [reference_set, *sets[: args.nll and bool(args.samples)]], report)
        if "copies" in extra:
            found = e.copies(samples, reference, training.blocks(1024))
            near = {name: found.pop(name) for name in ("nearest", "distance")}
            report.details["nearest training images"] = near
            report.notes["distance to the nearest training image"] = found
            if args.copies:
                _draw_pairs(Path(args.copies), e.pairs(samples, reference, training.blocks(1024), near))
        if lost:
            report.notes["diverged and left out"] = f"{len(lost)}, such as {lost[0]}"
        if args.json:
            write_file(Path(args.json), report.to_json())
    print(report.table())
    return DONE


def _refuse_unused(args: argparse.Namespace, scored: bool) -> None:
    """ValueError names an argument that would change nothing. scored: by a likelihood, which needs a model."""
    unused = () if scored else ("nll_images", "nll_tolerance")
    if given := _first_given(args, unused):
        raise ValueError(f"argument {given}: goes with --nll, or nll among --metrics")
    unused = (*DRAWING, *(() if scored else MODEL)) if args.samples else ()
    if given := _first_given(args, unused):
        raise ValueError(f"argument {given}: says how samples are drawn, and {args.samples[0]} holds them: take one")


def _first_given(args: argparse.Namespace, names: tuple[str, ...]) -> str | None:
    given = (name for name in names if getattr(args, name) not in (None, False, "auto", "float32"))
    return next((f"--{name.replace('_', '-')}" for name in given), None)


def _draw_pairs(path: Path, images) -> None:
    """images uint8 [2n, H, W, C]: n above n."""
    from sgm_engine.outputs.images import grid, save_png

    save_png(path, grid(images, columns=len(images) // 2))


def _likelihoods(args: argparse.Namespace, model, sets: list, report) -> None:
    """A row of bits per dimension for each set, and what the steps of a probability flow err by."""
    from sgm_engine.evaluation.evaluate import Row, bits_per_dimension
    from sgm_engine.evaluation.likelihood import FlowDensity

    one_pass = callable(getattr(model, "log_prob", None))
    density = model if one_pass else FlowDensity(model, args.nll_tolerance or TOLERANCE)
    count = args.nll_images or (None if one_pass else FLOW_IMAGES)
    for images in sets:
        few = images if count is None else images.take(count)
        what = "bits per dimension" + f", {images.name}" * args.nll + f", {len(few)} images" * (count is not None)
        report.rows.append(Row(what, *bits_per_dimension(density.log_prob, few.blocks())))
    if not one_pass:
        report.notes["by the probability flow"] = (
            f"the last doubling of its levels, to {max(density.levels)} at most, moved an image's figure by "
            f"{max(density.errors):.2g} bits per dimension at most; one random sign vector an image"
        )


def _metrics(args: argparse.Namespace, known: tuple[str, ...]) -> tuple[list[str] | None, list[str]]:
    """(those of evaluate, or None for its default; the others)."""
    if args.copies and Path(args.copies).suffix.lower() != ".png":
        raise ValueError(f"argument --copies: must end in .png, got {args.copies!r}")
    if args.copies and not (args.training and (args.metrics is None or "copies" in args.metrics)):
        raise ValueError("argument --copies: pass --training, and copies among --metrics if those are named")
    if args.metrics is None:
        return None, ["copies"] if args.training else []
    asked = [m.strip() for m in args.metrics.split(",")]
    if "copies" in asked and not args.training:
        raise ValueError("metrics copies: pass --training, the images that might have been copied")
    others = [m for m in asked if m in ("copies", "nll")]
    if unknown := [m for m in asked if m not in (*known, "copies", "nll")]:
        raise ValueError(f"argument --metrics: must be of {', '.join(known)}, copies, nll, got {unknown[0]!r}")
    return [m for m in asked if m not in others], others


def _difference(samples, other, reference, report) -> list:
    from sgm_engine.evaluation.evaluate import Row
    from sgm_engine.evaluation.frechet import frechet, frechet_difference

    if samples.n != other.n:
        report.notes["careful"] = f"{samples.n} images against {other.n}: the Fréchet distance falls with their number"
    return [
        Row("Fréchet of --against", *frechet(other.moments, reference.moments)),
        Row("first minus second", *frechet_difference(samples.moments, other.moments, reference.moments)),
    ]

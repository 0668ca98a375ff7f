"""``sgm tune``: find the plan that a budget of evaluations buys. Nothing heavy is imported before the command runs."""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from sgm_engine.cli.arguments import MAX_SEED, add_engine, add_ray, at_least, positive
from sgm_engine.cli.model import engine_options, engines, load_model, load_plan, weights_path

MEASURES = ("frechet", "sliced", "mmd")


EXAMPLES = """\
examples:
  sgm tune --budget 50 --reference DATA:test --training DATA:train --features digits
  sgm tune --seconds 0.2 --checkpoint mine.safetensors --reference images/ --features classifier:classes.safetensors
  sgm tune --budget 50 --baseline annealed_langevin …               and how the chosen plan compares with that one

writes into --out: front.md and front.png (NFE against quality, on held-out seeds), front.json, and plan.json, which
`sgm sample --plan OUT/plan.json` takes.
"""


def register(commands) -> None:
    p = commands.add_parser("tune", help="find a plan with fewer network evaluations", epilog=EXAMPLES)
    p.description = "Search the samplers' tables for the best samples within a budget."
    p.set_defaults(run=run)
    group = p.add_argument_group("goal")
    budget = group.add_mutually_exclusive_group(required=True).add_argument
    budget("--budget", type=at_least(2), metavar="NFE", help="network evaluations a sample, at most")
    budget("--at", type=evaluations, metavar="N,N,…", help="the best plan of at most N, for each of these numbers")
    budget(
        "--seconds",
        type=positive,
        metavar="X",
        help="seconds a sample, at most; a short measurement turns them into NFE",
    )
    add = group.add_argument
    add("--reference", required=True, metavar="IMAGES", help="what samples should look like; forms as in `sgm eval`")
    add("--training", metavar="IMAGES", help="what the model was trained on: gives the floor, trains a new classifier")
    add("--features", default="pixels", metavar="KIND:FILE", help="as in `sgm eval` (default: pixels)")
    add("--trust-features", action="store_true", help="as in `sgm eval`: run what is in that FILE")
    add("--measure", choices=MEASURES, default="frechet", help="what makes samples good (default: frechet)")
    add("--baseline", metavar="PLAN|SAMPLES", help="a plan to beat, or samples of one drawn with --held-out-seed")
    add = p.add_argument_group("search").add_argument
    add("--families", metavar="A,B", help="samplers to try (default: all)")
    add("--own-levels", action="store_true", help="only plans on the model's levels, which an Engine takes by itself")
    add("--candidates", type=at_least(2), default=48, metavar="N", help="plans to begin with (default: 48)")
    add("--first", type=at_least(2), default=128, metavar="N", help="samples of each, at first (default: 128)")
    add("--last", type=at_least(2), default=1024, metavar="N", help="of the survivors, at last (default: 1024)")
    add("--seed", type=at_least(0, MAX_SEED), default=0, metavar="N", help="of the search (default: 0)")
    add("--held-out-seed", type=at_least(0, MAX_SEED), default=1000, metavar="N", help="of the front (default: 1000)")
    add("--held-out", type=at_least(2), default=1024, metavar="N", help="samples for each figure (default: 1024)")
    add("--out", default="tuned/", metavar="FOLDER", help="a new folder, or s3://… (default: tuned/)")
    add(
        "--write", metavar="FILE.safetensors", help="the weights with the front in them; may be the --checkpoint itself"
    )
    group = p.add_argument_group("model and execution")
    add_engine(group)
    add_ray(group.add_argument)


def run(args: argparse.Namespace) -> int:
    from sgm_engine.cli.console import bad_input
    from sgm_engine.files.storage import is_url
    from sgm_engine.files.writing import check_writable
    from sgm_engine.tuning.kept import claimed

    with ExitStack() as stack:
        with bad_input():
            out = args.out.rstrip("/") if is_url(args.out) else Path(args.out).expanduser()
            if isinstance(out, Path):
                if out.is_file():
                    raise ValueError(f"argument --out: {out} is a file: name a folder")
                check_writable(out, folder=True)
            kept = stack.enter_context(claimed(out))
        return _run(args, out, kept, stack)


def _run(args: argparse.Namespace, out: Path | str, kept, stack: ExitStack) -> int:
    from sgm_engine.cli.console import DONE, bad_input
    from sgm_engine.cli.console import say_beside_bar as say

    with bad_input():
        from sgm_engine.checkpoints.good_plan import start_at
        from sgm_engine.data.sets import open_images
        from sgm_engine.engine.progress import counting
        from sgm_engine.evaluation.evaluate import summarise
        from sgm_engine.evaluation.features import open_extractor
        from sgm_engine.files.writing import check_writable
        from sgm_engine.jobs.identity import weights_digest
        from sgm_engine.jobs.spec import Geometry
        from sgm_engine.pace import BAR_FIRST
        from sgm_engine.plans.front import recipe_of
        from sgm_engine.plans.law import DataLaw
        from sgm_engine.plans.plan import Plan
        from sgm_engine.tuning.candidates import FAMILIES, draw_candidates
        from sgm_engine.tuning.front import check_plotting
        from sgm_engine.tuning.tune import Tuner, finalists

        check_plotting()
        if args.write:
            if Path(args.write).suffix != ".safetensors":
                raise ValueError(f"argument --write: must end in .safetensors, got {args.write!r}")
            check_writable(Path(args.write).expanduser())
        if args.ray is None and (given := [name for name in ("actors", "patience") if getattr(args, name)]):
            raise ValueError(f"argument --{given[0]}: goes with --ray")
        if args.ray and args.seconds:
            raise ValueError("argument --seconds: not with --ray, since it is measured on this machine: take --budget")
        if args.held_out_seed == args.seed:
            raise ValueError(f"argument --held-out-seed: must differ from --seed, both are {args.seed}")
        if args.first > args.last:
            raise ValueError(f"argument --first: must be at most --last, got {args.first} and {args.last}")
        model = load_model(args)
        make_engine = engines(args, model)
        engine = make_engine(model)
        open_set = partial(open_images, data_range=args.data_range)
        reference_set = open_set(args.reference)
        training = open_set(args.training) if args.training else None
        for name, count in (("held-out", args.held_out), ("reference", len(reference_set))):
            if args.measure == "frechet" and count < 3:
                raise ValueError(f"argument --{name}: a Fréchet distance's interval needs 3 images, got {count}")
        for s in (reference_set, training):
            if s is not None and tuple(s.shape) != engine.shape:
                raise ValueError(f"{s.name} holds images {tuple(s.shape)}, the model draws {engine.shape}")
        baseline = _baseline(args, model)
        extractor = open_extractor(args.features, training, say, args.trust_features)
        measured = (kept.about or {}).get("budget") if args.seconds else None  # an earlier run's clock counts
        budget = args.budget or max(args.at or (0,)) or measured or _evaluations(args.seconds, engine, say)
        families = args.families.split(",") if args.families else tuple(FAMILIES)
        if getattr(model, "law", None) is None and training is not None:
            model.law = DataLaw.of(training.blocks(), *engine.data_range)
            say(f"the weights have no law of the data, so that of {training.name} is taken: {model.law}")
        start = partial(start_at, model)
        draw = partial(draw_candidates, engine.sigmas, seed=args.seed, families=families, start=partial(_start, model))
        draw = partial(draw, between=not args.own_levels and _between(model))
        if args.at:
            groups = [draw(nfe, max(1, args.candidates // len(args.at)), least=nfe) for nfe in args.at]
        else:
            groups = [draw(budget, args.candidates)]
        if args.write and baseline is not None:
            recipe_of(getattr(baseline, "plan", baseline), engine.sigmas, start)  # refused now rather than at the end
        pool = _pool(args, model, stack)
        geometry = pool.geometry if pool else Geometry.of(engine)

    reference = summarise(reference_set.blocks(), extractor, reference_set.name)
    with bad_input():
        kept.begin(_about(args, budget, groups, geometry, weights_digest(model), reference))
    if kept:
        say(f"{out} has {len(kept)} figures of this search: it goes on from there")
    floor = summarise(training.take(args.held_out).blocks(), extractor) if training else None
    tuner = Tuner(model, make_engine, extractor, reference, args.measure, kept, pool)
    began = time.perf_counter()
    survivors = []
    with counting(_of_search(groups, args.first, args.last), "evaluation", after=BAR_FIRST) as tell:
        for plans in groups:
            survivors += tuner.search(plans, args.seed, args.first, args.last, say, bool(args.at), tell)
    again = [t.plan for t in finalists(survivors)] + ([baseline] if isinstance(baseline, Plan) else [])
    with counting(args.held_out * sum(plan.nfe for plan in again), "evaluation", after=BAR_FIRST) as tell:
        outcome = tuner.confirm(survivors, args.held_out_seed, args.held_out, floor, baseline, say, tell)
    outcome.about |= {"budget": budget, "candidates": sum(map(len, groups)), "seed": args.seed,
        "features": extractor.name, "first": args.first, "last": args.last, "held_out_seed": args.held_out_seed,
        "seconds": round(time.perf_counter() - began), "precision": geometry.precision,
        "executor": geometry.executor, "batch": geometry.batch}  # fmt: skip
    outcome.write(out)
    print(outcome.table())
    if args.write:
        front = outcome.travelling(engine.sigmas, start, geometry.precision, extractor.name, _command(args))
        _write(model, args, front)
        print(f"written: {args.write}, the weights with this front")
    print(f"written: {out}/ with front.md, front.json, front.png and plan.json")
    return DONE


def _pool(args: argparse.Namespace, model, stack: ExitStack):
    """The Pool of --ray, gone when the command ends; None without."""
    if args.ray is None:
        return None
    from sgm_engine.jobs.ray_pool import PATIENCE
    from sgm_engine.tuning.pool import Pool

    pool = Pool(model, engine_options(args, model), args.ray, args.actors, args.patience or PATIENCE)
    stack.callback(pool.close)
    return pool


def _of_search(groups: list, first: int, last: int) -> int:
    """Evaluations of the search, where those that survive a round are as long as the others."""
    from sgm_engine.tuning.search import samples_of

    return sum(samples_of(len(g), first, last) * sum(plan.nfe for plan in g) // len(g) for g in groups)


def _about(args: argparse.Namespace, budget: int, groups, geometry, weights: str, reference) -> dict[str, object]:
    """All that decides a figure of the search, or which ones there will be."""
    import hashlib

    import sgm_engine

    names = ("seconds", "measure", "first", "last", "seed", "held_out", "held_out_seed")
    plans = " ".join(plan.digest for plans in groups for plan in plans)
    n, *arrays = reference.moments.moments()
    moments = f"{n} {hashlib.sha256(b''.join(a.tobytes() for a in arrays if a is not None)).hexdigest()}"
    about = {"budget": budget, "plans": hashlib.sha256(plans.encode()).hexdigest(), "weights": weights}
    about |= {"reference": moments, "features": reference.extractor.name, "engine": sgm_engine.__version__}
    return about | vars(geometry) | {name: getattr(args, name) for name in names}


def _start(model, sigma: float) -> dict[str, object]:
    from sgm_engine.checkpoints.good_plan import start_at

    return {"start_scale": sigma} | start_at(model, sigma)


def _command(args: argparse.Namespace) -> str:
    """What was typed, without the places of files."""
    names = ("budget", "at", "seconds", "families", "candidates", "first", "last", "seed", "held_out_seed", "held_out")
    values = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    values |= {"at": ",".join(map(str, args.at))} if args.at else {}
    values |= {"baseline": Path(args.baseline).name} if args.baseline else {}
    given = ["--own-levels"] if args.own_levels else []
    given += [f"--{name.replace('_', '-')} {value}" for name, value in values.items()]
    return f"sgm tune {' '.join(given)} --precision {args.precision}"


def _write(model, args: argparse.Namespace, front) -> None:
    """The weights with ``front``: a file of ours keeps its tensors as they are."""
    from sgm_engine.checkpoints.checkpoint import save_checkpoint
    from sgm_engine.checkpoints.notes import is_ours, write_notes

    model.front = front if model.front is None else front.beside(model.front)
    source, target = weights_path(args), Path(args.write).expanduser()
    if is_ours(source):
        write_notes(source, target, model)
    else:
        save_checkpoint(model, target)


def evaluations(text: str) -> tuple[int, ...]:
    return tuple(map(at_least(2), text.split(",")))


def _baseline(args: argparse.Namespace, model):
    """A Plan, an ImageSet of samples drawn before (with the plan that they carry, if any), or None."""
    from sgm_engine.data.sets import open_images
    from sgm_engine.tuning.tune import Drawn, plan_of_samples

    if args.baseline is None:
        return None
    path = Path(args.baseline).expanduser()
    if path.is_dir() or path.suffix in (".npz", ".safetensors"):
        images = open_images(path, data_range=args.data_range)
        if len(images) < args.held_out:
            raise ValueError(f"argument --baseline: {len(images)} samples, fewer than --held-out {args.held_out}")
        return Drawn(images.take(args.held_out), plan_of_samples(path))
    return load_plan(args.baseline, model)


def _between(model) -> bool:
    """Can the model be conditioned between its levels?"""
    from sgm_engine.models.conditioning import at_sigmas

    try:
        at_sigmas(model, (model.sigmas[:1] * model.sigmas[1:2]) ** 0.5)
    except ValueError:
        return False
    return True


def _evaluations(seconds: float, engine, say) -> int:
    """How many evaluations a sample fit into ``seconds``, from two short runs of the engine."""
    from sgm_engine.plans.plan import ancestral

    plan = ancestral(engine.sigmas)
    engine.sample(engine.batch, plan=plan)  # captures, packs
    start = time.perf_counter()
    engine.sample(engine.batch, plan=plan)
    each = (time.perf_counter() - start) / (engine.batch * plan.nfe)
    if seconds < 2 * each:
        raise ValueError(f"argument --seconds: {seconds:g} s buy no 2 evaluations here, one takes {each:.3g} s")
    say(f"{each:.3g} s an evaluation and sample at batch {engine.batch}: {seconds:g} s are {int(seconds / each)} NFE")
    return int(seconds / each)

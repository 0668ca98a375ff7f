"""``sgm train``: a TrainConfig, a folder of data and a folder for the run. Lightning does the training."""

from __future__ import annotations

import argparse
import logging
import os
from contextlib import ExitStack
from pathlib import Path

from sgm_engine.cli.arguments import BadInput, at_least
from sgm_engine.cli.console import Printed, heard
from sgm_engine.files.storage import is_url

EPILOG = """\
examples:
  sgm train --config mnist_tiny --data mnist/ --out run          a first look on a CPU; pictures in run/samples
  sgm train --config mnist_tiny --data mnist/ --out run          killed? the same command goes on where it was
  sgm train --config ncsnv2_cifar10 --data cifar/ --out run --set batch=64 lr=5e-5
  sgm train --config mine.yaml --data pictures/ --out run --set image_size=64
  torchrun --nproc-per-node 4 -m sgm_engine train --config ncsn_cifar10 --data cifar/ --out run
  sgm train --objective cdm --data mnist/ --out run    a classifier of noise levels, for likelihoods
  sgm train --objective multi_sample --copies 4 --data mnist/ --out run    several noisy copies of an image at once
  sgm train --list                                               the configs that come with the package

run/ then holds checkpoints/ (Lightning's), samples/ (PNG), metrics.csv, config.yaml, and at the end model.safetensors,
which `sgm sample --checkpoint` takes. Needs: pip install 'sgm-engine[train]'.
"""
OWN_CONFIG = {"cdm": "cdm_mnist", "multi_sample": "mnist_multi_sample"}  # of an --objective, if no --config is named


def register(commands) -> None:
    """Add ``train`` to the subparsers of ``sgm``."""
    p = commands.add_parser("train", help="train a score network (needs the extra [train])", epilog=EPILOG)
    p.description = "Train a score network on images."
    add = p.add_argument
    add("--config", metavar="NAME", help="a YAML file, or the name of a bundled one (--list)")
    add("--objective", metavar="NAME",
        help="--set objective=NAME; without --config cdm means cdm_mnist, multi_sample mnist_multi_sample")  # fmt: skip
    add("--copies", type=at_least(1), metavar="M", help="--set copies=M, noisy copies an image, of multi_sample")
    add("--reference-batch", type=at_least(0), metavar="N",
        help="--set reference_batch=N, further images a step that stable_target weighs")  # fmt: skip
    add("--data", metavar="PATH", help="MNIST's IDX files, CIFAR-10's .bin files, a .npy, or a folder of pictures")
    add("--out", metavar="FOLDER", help="the run; resumed if it has checkpoints; or s3://BUCKET/NAME (gs://, az://)")
    add("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="changes to the config")
    add("--init", metavar="PATH", help="start from these weights, of the same network")
    add("--accelerator", default="auto", choices=("auto", "cpu", "gpu"), help="Lightning's (default: auto)")
    add("--tensorboard", action="store_true", help="write TensorBoard logs too")
    add("--list", action="store_true", help="list the bundled configs and stop")
    add("--advise", action="store_true", help="say which levels and steps NCSNv2's rules choose for --data, and stop")
    p.set_defaults(run=train)


def train(args: argparse.Namespace) -> int:
    from sgm_engine.files.reading import read_text
    from sgm_engine.training.config import FOLDER, TrainConfig, config_names

    if args.list:
        for name in config_names():
            first = read_text(FOLDER / f"{name}.yaml").partition("\n")[0]
            print(f"{name:18} {first.removeprefix('# ')}")
        return 0
    if args.advise:
        print(_advice(args).to_yaml())
        return 0
    if args.config is None:
        args.config = OWN_CONFIG.get(args.objective)
    try:
        for name in ("config", "data", "out"):
            if getattr(args, name) is None:
                raise ValueError(f"--{name} is missing (see `sgm train --help`)")
        objective = {} if args.objective is None else {"objective": args.objective}
        also = {"copies": args.copies, "reference_batch": args.reference_batch}
        objective |= {name: value for name, value in also.items() if value is not None}
        config = TrainConfig.read(args.config, objective | _changes(args.set))
        try:
            from sgm_engine.training import run
        except ImportError as error:
            raise ValueError(f"training needs Lightning ({error}): pip install 'sgm-engine[train]'") from None
        _check_accelerator(args.accelerator)
    except (ValueError, TypeError, OSError) as error:
        raise _bad_input(error) from error
    with ExitStack() as held:
        mirror = None
        try:
            if is_url(args.out):
                from sgm_engine.training.far import mirrored

                mirror = held.enter_context(mirrored(args.out))
            folder = Path(args.out).expanduser() if mirror is None else mirror.folder
            job = run.prepare(config, args.data, folder, args.init, mirror)
        except (ValueError, TypeError, OSError) as error:
            text = str(error) if mirror is None else mirror.shown(str(error))
            raise _bad_input(error, text) from error
        _quiet()
        with heard("sgm_engine.training", Printed(), logging.INFO):
            job.fit(args.accelerator, args.tensorboard)
    return 0


def _bad_input(error: Exception, text: str | None = None) -> Exception:
    return error if os.environ.get("SGM_DEBUG") else BadInput(error if text is None else text)


def _advice(args: argparse.Namespace):
    from sgm_engine.data.images import load_images
    from sgm_engine.training.advice import advise

    try:
        if args.data is None:
            raise ValueError("--data is missing (see `sgm train --help`)")
        changes = _changes(args.set)
        return advise(load_images(args.data, size=changes.get("image_size")))
    except (ValueError, OSError) as error:
        raise BadInput(error) from error


def _check_accelerator(name: str) -> None:
    import torch

    if name == "gpu" and not torch.accelerator.is_available():
        raise ValueError("argument --accelerator: there is no GPU that PyTorch can use, take cpu")


def _quiet() -> None:
    """This process is the command's own: leave out Lightning's advertising and warnings that are no fault of a run."""
    import warnings

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*(treespec|does not have many workers|no `val_dataloader`).*")


def _changes(pairs: list[str]) -> dict[str, object]:
    from sgm_engine.files.reading import parse_yaml

    changes = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise ValueError(f"--set takes NAME=VALUE, got {pair!r}")
        try:
            changes[name] = parse_yaml(text)
        except ValueError:
            raise ValueError(f"--set {name}: {text[:60]!r} is no YAML value") from None
    return changes

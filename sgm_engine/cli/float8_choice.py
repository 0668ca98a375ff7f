"""What ``--precision float8`` quantises by."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from sgm_engine.cli.console import say
from sgm_engine.files.reading import read_text
from sgm_engine.files.writing import check_writable, write_file
from sgm_engine.jobs.bucket import open_folder
from sgm_engine.jobs.worker import Worker
from sgm_engine.rewriting.float8.config import Float8Config, lacking
from sgm_engine.tuning.float8_calibration import calibrate_float8


def chosen_scales(
    args: argparse.Namespace, model: nn.Module, device: str, job: str | None = None, quiet: bool = False
) -> Float8Config | None:
    """The scales in --float8 FILE, else those of a job in the folder ``job``, else made now, at the model's own levels,
    and kept in FILE. None for any other precision. ValueError names arguments that do not go together."""
    if args.precision != "float8":
        if args.float8 is not None or args.emulate_float8:
            given = "--emulate-float8" if args.float8 is None else "--float8"
            raise ValueError(f"argument {given}: goes with --precision float8")
        return None
    path = None if args.float8 is None else Path(args.float8).expanduser()
    scales = _of_job(job) if path is None else _read(path)
    emulate = args.emulate_float8 or (scales is not None and scales.emulate)
    pool = vars(args).get("ray") is not None  # its actors' devices count, and they look themselves
    if not (emulate or pool) and (lack := lacking(torch.device(device))):
        raise ValueError(
            f"argument --precision: float8 needs {lack}: take bfloat16, or --emulate-float8, which computes the same "
            "numbers slowly"
        )
    if scales is None:
        if job is not None and (pool or _worker(args).count > 1):
            raise ValueError(
                "argument --float8: several workers need the same scales: make FILE first, in one process, with "
                "`sgm sample --n 1 --precision float8 --float8 FILE`"
            )
        scales = _make(model, device, path, quiet)
    return replace(scales, emulate=emulate)


def _make(model: nn.Module, device: str, path: Path | None, quiet: bool) -> Float8Config:
    if path is not None:
        check_writable(path)
    if not quiet:
        say(f"float8: taking scales from 16 samples in bfloat16{'' if path else '; --float8 FILE keeps them'}")
    scales = calibrate_float8(model, device=device)
    if path is not None:
        write_file(path, scales.to_json() + "\n")
        if not quiet:
            say(f"float8: scales written to {path}")
    return scales


def _worker(args: argparse.Namespace) -> Worker:
    return Worker.parse(args.worker) if args.worker else Worker.from_environment()


def _read(path: Path) -> Float8Config | None:
    """None: there is no such file yet."""
    try:
        return Float8Config.from_json(read_text(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"argument --float8: {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"argument --float8: {path}: {error}") from None


def _of_job(out: str | None) -> Float8Config | None:
    """The scales that the job in a folder has recorded, if there is one and it has."""
    folder = open_folder(out) if out else None
    notes = folder.load()[1] if folder and folder.begun() else {}
    return Float8Config.from_json(notes["float8"]) if "float8" in notes else None

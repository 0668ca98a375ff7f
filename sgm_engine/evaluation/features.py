"""Feature extractors: uint8 images in, vectors (and logits, where the network is a classifier) out."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sgm_engine.data.sets import ImageSet
from sgm_engine.files.reading import read_bytes
from sgm_engine.numerics import undisturbed

log = logging.getLogger("sgm_engine.evaluation")

FORMS = "pixels, digits, classifier:FILE, torchscript:FILE, export:FILE, inception:FILE"
DIGITS = Path(__file__).parent / "weights" / "digits.safetensors"  # weights/CARD.md says whence


class Features(NamedTuple):
    """vectors: float32 [b, D]; logits: float32 [b, K], or None where there are no classes."""

    vectors: np.ndarray
    logits: np.ndarray | None


@dataclass(frozen=True)
class Extractor:
    """extractor(images uint8 [b, C, H, W]) → Features. name: what a report prints, with a digest of the weights.

    inception: these are the features that FID and the Inception score are defined in.
    """

    name: str
    network: Callable[[Tensor], object]
    inception: bool = False

    def __call__(self, images: Tensor) -> Features:
        with undisturbed(), torch.inference_mode():
            out = self.network(images)
        vectors, *rest = out if isinstance(out, (tuple, list)) else (out,)
        if not isinstance(vectors, Tensor) or len(vectors) != len(images):
            raise ValueError(f"{self.name}: must return one vector an image, [b, D] or ([b, D], logits [b, K])")
        logits = rest[0].flatten(1).float().cpu().numpy() if rest else None
        return Features(vectors.flatten(1).float().cpu().numpy(), logits)


def pixels() -> Extractor:
    """The pixels themselves, in [0, 1]: D = C·H·W."""
    return Extractor("pixels", lambda images: _unit(images).flatten(1))


def open_extractor(
    text: str, training: ImageSet | None = None, report: Callable[[str], object] = log.info, trust: bool = False
) -> Extractor:
    """The extractor that ``text`` names:

    pixels · digits, the evaluation's classifier of MNIST, which comes with it · classifier:FILE, one of one's own; FILE
    is made from the labelled ``training`` images if it does not exist · torchscript:FILE · export:FILE (.pt2) ·
    inception:FILE, torch-fidelity's Inception-v3 with these weights.
    The last three run what is in FILE, and are refused unless ``trust``.
    A user's network takes float32 [b, C, H, W] in [0, 1] and returns features [b, D], or (features, logits).
    """
    kind, colon, path = text.partition(":")
    if text == "pixels":
        return pixels()
    if text == "digits":
        return _classifier(DIGITS, None, report)
    if kind not in _KINDS or not colon or not path:
        raise ValueError(f"features must be one of {FORMS}, got {text!r}")
    file = Path(path).expanduser()
    if kind == "classifier":
        return _classifier(file, training, report)
    if not file.is_file():
        raise FileNotFoundError(f"features {text}: there is no file {file}")
    if not trust:
        raise ValueError(
            f"features {kind}:{file}: such a file can run any program when it is opened: pass --trust-features "
            "(trust=True) if you know who made it"
        )
    return _KINDS[kind](file)


def _classifier(file: Path, training: ImageSet | None, report: Callable[[str], object]) -> Extractor:
    from sgm_engine.evaluation.classifier import load_classifier, save_classifier, train_classifier
    from sgm_engine.files.writing import check_writable

    if not file.exists():
        if training is None:
            raise FileNotFoundError(f"there is no classifier {file}: pass labelled training images to make it from")
        check_writable(file)
        report(f"training the classifier {file} on {training.name}: about a minute, once")
        model, accuracy = train_classifier(training, report=report)
        save_classifier(model, file, {"images": len(training), "accuracy": accuracy})
    model, about = load_classifier(file)
    name = f"classifier, penultimate layer (accuracy {about['accuracy']:.4f}, sha256 {_digest(file)})"

    def network(images: Tensor) -> object:
        if tuple(images.shape[1:]) != model.shape:
            raise ValueError(f"the classifier {file} takes images {model.shape}, got {tuple(images.shape[1:])}")
        return model(_unit(images))

    return Extractor(name, network)


def _torchscript(file: Path) -> Extractor:
    try:
        module = torch.jit.load(file, map_location="cpu").eval()
    except RuntimeError as error:
        raise ValueError(f"{file} is no TorchScript module: {str(error).splitlines()[0]}") from None
    return Extractor(f"TorchScript {file.name} (sha256 {_digest(file)})", lambda images: module(_unit(images)))


def _export(file: Path) -> Extractor:
    try:
        module = torch.export.load(file).module()
    except Exception as error:
        raise ValueError(f"{file} is no program of torch.export: {str(error).splitlines()[0]}") from None
    return Extractor(f"torch.export {file.name} (sha256 {_digest(file)})", lambda images: module(_unit(images)))


def _inception(file: Path) -> Extractor:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ValueError(f"inception needs torch-fidelity ({error}): pip install 'sgm-engine[fid]'") from None
    names = ["2048", "logits_unbiased"]
    module = FeatureExtractorInceptionV3("inception-v3-compat", names, feature_extractor_weights_path=str(file))

    def network(images: Tensor) -> object:
        if images.shape[1] != 3:
            raise ValueError(f"Inception takes RGB images, these have {images.shape[1]} channel(s)")
        return module(images)

    return Extractor(f"Inception-v3 of torch-fidelity (weights sha256 {_digest(file)})", network, inception=True)


def _unit(images: Tensor) -> Tensor:
    return images.float() / 255


def _digest(file: Path) -> str:
    return hashlib.sha256(read_bytes(file)).hexdigest()[:12]


_KINDS = {"classifier": _classifier, "torchscript": _torchscript, "export": _export, "inception": _inception}

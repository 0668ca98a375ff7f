"""A small image classifier for the evaluation's own use: trained in about a minute of one core, the same every time.

For digits and the like, where Inception's features mean little. Its penultimate layer, 64 numbers, are the features.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sgm_engine.data.sets import ImageSet
from sgm_engine.files.reading import open_safetensors, parse_json, short
from sgm_engine.files.writing import write_file
from sgm_engine.numerics import undisturbed

FORMAT = "sgm-evaluation-classifier-1"
FEATURES = 64
BATCH, EPOCHS, RATE = 64, 3, 2e-3
CHECKED = 5000  # images kept out of the training, that the stated accuracy is measured on


class Classifier(nn.Module):
    """x [B, C, H, W] in [0, 1] → (features [B, 64], logits [B, classes]). H and W at least 8."""

    def __init__(self, shape: tuple[int, int, int], classes: int):
        super().__init__()
        channels, height, width = shape
        if min(height, width) < 8:
            raise ValueError(f"the classifier needs images of at least 8×8, got {height}×{width}")
        self.shape, self.classes = tuple(shape), classes
        self.conv1 = nn.Conv2d(channels, 16, 5, padding=2)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * (height // 4) * (width // 4), FEATURES)
        self.out = nn.Linear(FEATURES, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.max_pool2d(F.elu(self.conv1(x)), 2)
        x = F.max_pool2d(F.elu(self.conv2(x)), 2)
        features = F.elu(self.hidden(x.flatten(1)))
        return features, self.out(features)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for PyTorch's operators inside, and as many as before after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
@undisturbed()
def train_classifier(
    images: ImageSet, seed: int = 0, epochs: int = EPOCHS, report: Callable[[str], object] = lambda line: None
) -> tuple[Classifier, float]:
    """A classifier of labelled ``images``, and its accuracy on images of the set that were kept out of the training.

    Every random choice comes from one torch.Generator; the global one is left alone. Bits repeat on one machine and
    build. It runs on one thread of PyTorch's: its layers are so small that several would wait for each other, and on a
    busy machine spin.
    """
    if images.labels is None:
        raise ValueError(f"{images.name} has no labels to train a classifier with: name MNIST's or CIFAR-10's folder")
    pixels, labels = images.all(), images.labels
    classes = int(labels.max()) + 1
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):  # initial weights from our generator, not from the global one
        model = Classifier(images.shape, classes)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_uniform_(parameter, generator=generator)
        else:
            nn.init.zeros_(parameter)
    order = torch.randperm(len(pixels), generator=generator)
    kept = min(CHECKED, len(order) // 6)
    check, train = order[:kept], order[kept:]
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=1e-2)
    steps = epochs * -(-len(train) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    for epoch in range(epochs):
        for index in train[torch.randperm(len(train), generator=generator)].split(BATCH):
            loss = F.cross_entropy(model(pixels[index].float() / 255)[1], labels[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        report(f"classifier: epoch {epoch + 1} of {epochs}, loss of the last batch {loss.item():.3f}")
    return model.eval().requires_grad_(False), accuracy(model, pixels[check], labels[check])


@torch.inference_mode()
def accuracy(model: Classifier, pixels: Tensor, labels: Tensor) -> float:
    """Share of uint8 images [N, C, H, W] whose most probable class is their label."""
    found = torch.cat([model(part.float() / 255)[1].argmax(1) for part in pixels.split(512)])
    return float((found == labels).double().mean())


def save_classifier(model: Classifier, path: str | Path, about: dict[str, object]) -> None:
    from safetensors.torch import save

    config = {"shape": model.shape, "classes": model.classes}
    metadata = {"format": FORMAT, "config": json.dumps(config), "about": json.dumps(about)}
    write_file(path, save(model.state_dict(), metadata))


def load_classifier(path: str | Path) -> tuple[Classifier, dict[str, object]]:
    """What ``save_classifier`` wrote; ValueError says why a file is none."""
    try:
        with open_safetensors(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path} holds no classifier of this version ({FORMAT}): delete it to train a new one")
            config, about = parse_json(metadata["config"]), parse_json(metadata["about"])
            sizes = [*config["shape"], config["classes"]]
            if len(sizes) != 4 or any(type(n) is not int or not 1 <= n < 2**20 for n in sizes):
                raise ValueError(f"no classifier has shape and classes {short(sizes)}")
            names = set(file.keys())
            with torch.device("meta"):  # nothing is allocated before the file is known to hold it
                model = Classifier(tuple(config["shape"]), config["classes"])
            for name, tensor in model.state_dict().items():
                if name not in names or file.get_slice(name).get_shape() != list(tensor.shape):
                    raise ValueError(f"it has no {name} of shape {list(tensor.shape)}")
            state = {name: file.get_tensor(name).float() for name in names}
            if bad := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
                raise ValueError(f"it holds NaN or Inf in {bad[0]}")
            model.load_state_dict(state, assign=True)
        about = {"accuracy": float(about["accuracy"])} | about
    except (KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{path} is damaged: {short(error)}") from None
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path} is damaged: {error}") from None
    return model.eval().requires_grad_(False), about

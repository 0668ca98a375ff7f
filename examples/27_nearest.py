"""Are they copies? (NCSN, appendix B) python examples/27_nearest.py mnist/ → nearest.png      (MNIST's IDX files)

Each row: a digit drawn with the bundled weights, its four nearest training images by pixels, and its four nearest in a
classifier's features. Some seconds.
"""

import sys

import torch

from sgm_engine import Engine, load_bundled
from sgm_engine.data.images import load_images
from sgm_engine.evaluation.features import open_extractor
from sgm_engine.images import grid, save_png, to_uint8

N = 6
training = torch.tensor(load_images(sys.argv[1]))  # uint8 [60000, 1, 28, 28]
model, plan = load_bundled()
drawn = torch.from_numpy(to_uint8(Engine(model, batch=N).sample(N, seed=1, plan=plan))).permute(0, 3, 1, 2)
digits = open_extractor("digits")

rows = [drawn[:, None]]
measures = {"pixels": lambda x: x.flatten(1).float() / 255, "features": lambda x: torch.from_numpy(digits(x).vectors)}
for name, measure in measures.items():
    parts = [torch.cdist(measure(drawn), measure(part)) for part in training.split(2000)]
    distance, index = torch.cat(parts, 1).topk(4, largest=False)
    rows.append(training[index])
    print(f"{name}: distance to the nearest", *(f"{d:.2f}" for d in distance[:, 0]), "image", *index[:, 0].tolist())
save_png("nearest.png", grid(torch.cat(rows, 1).flatten(0, 1).permute(0, 2, 3, 1).numpy(), columns=9))

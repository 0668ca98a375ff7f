"""Pictures completed (NCSN, algorithm 2 and figure 6): python examples/28_inpainting.py → inpainting.png

Each row: a digit, what is known of it, and completions of the rest. The pixels that are known come back to the bit.
Some seconds, with the bundled weights.
"""

import torch

from sgm_engine import Engine, annealed_langevin, load_bundled
from sgm_engine.images import grid, save_png, to_uint8

COMPLETIONS = 6
model, good = load_bundled()
plan = annealed_langevin(model.sigmas, 10, step_lr=4e-5, start="normal", start_scale=5.0, start_shift=0.13)
engine = Engine(model, batch=4 * COMPLETIONS)
digits = engine.sample(4, seed=3, plan=good).clamp(0, 1)
masks = torch.zeros(4, 1, 28, 28, dtype=torch.bool)
masks[:2, :, :14], masks[2:, :, :, :14] = True, True  # the upper half of two, the left half of two

known, mask = (t.repeat_interleave(COMPLETIONS, 0) for t in (digits, masks))
completed = engine.inpaint(known, mask, seed=4, plan=plan)
assert torch.equal(completed[mask], known[mask])
spread = completed.view(4, COMPLETIONS, -1).std(1).mean(1)
print("standard deviation between completions, mean over pixels:", *(f"{s:.3f}" for s in spread))

half = torch.where(masks, digits, 0.5)
rows = torch.cat([digits[:, None], half[:, None], completed.view(4, COMPLETIONS, 1, 28, 28)], 1)
save_png("inpainting.png", grid(to_uint8(rows.flatten(0, 1), quiet=True), columns=2 + COMPLETIONS))

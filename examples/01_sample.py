"""Draw 64 digits with the bundled weights and write them as one picture: python examples/01_sample.py"""

import time

from sgm_engine import Engine, load_bundled
from sgm_engine.images import grid, save_png, to_uint8

model, plan = load_bundled()  # an ordinary nn.Module, and the table of steps that suits it
print(plan.describe())

engine = Engine(model, batch=64)  # 64 slots: so many samples share one network call
start = time.perf_counter()
x = engine.sample(64, seed=0, plan=plan, progress=True)  # float32 [64, 1, 28, 28]
seconds = time.perf_counter() - start

save_png("digits.png", grid(to_uint8(x)))
print(f"digits.png: {len(x)} samples, {plan.nfe} evaluations each, {engine.stats.nfe / seconds:.0f} evaluations/s")

# Sample i is sample i: number 7 by itself starts from the same noise and meets the same noise at every step. One slot
# instead of 64 is another order of arithmetic inside the network, so the last bits may differ; the digit does not.
again = Engine(model, batch=1).sample(1, seed=0, plan=plan, first_id=7)
print(f"sample 7 by itself differs from sample 7 of 64 by at most {(again[0] - x[7]).abs().max():.1g}")

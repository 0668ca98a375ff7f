"""What a user writes, checked by mypy --strict (tests/test_typing.py); nobody runs it."""

from pathlib import Path

import torch
from torch import Tensor, nn

from sgm_engine import (
    Engine,
    Job,
    Plan,
    SampleDiverged,
    SamplerService,
    StepInfo,
    accelerate,
    annealed_langevin,
    as_score,
    at_sigmas,
    calibrate_float8,
    classifier_free,
    generate,
    geometric,
    heun,
    karras,
    load_bundled,
    load_checkpoint,
    log_likelihood,
    posterior,
    save_checkpoint,
    with_drift,
)
from sgm_engine.data.sets import open_images
from sgm_engine.evaluation.evaluate import Report, evaluate, summarise
from sgm_engine.images import grid, save_png, to_uint8
from sgm_engine.models.inverse import mask


class Denoiser(nn.Module):
    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x


def watch(info: StepInfo) -> None:
    print(info.step, info.levels, info.denoised.mean())


def main(folder: Path) -> Plan:
    model, plan = load_bundled()
    engine = Engine(model, batch=16)
    x: Tensor = engine.sample(64, seed=0, plan=plan, callback=watch, progress=True)
    save_png(folder / "x.png", grid(engine.pictures(x), columns=8))
    print(grid(to_uint8(x)).shape, engine.stats.nfe, engine.describe(), engine.sigmas[0])
    for sample_id, image in engine.stream([3, 1], seed=7, plan=annealed_langevin(engine.sigmas, steps_per_level=5)):
        print(sample_id + 1, image.shape)
    score = as_score(Denoiser(), "denoiser", sigmas=geometric(80, 0.002, 40), data_range=(-1, 1))
    few: Plan = heun(karras(80, 0.002, 18))
    other = Engine(at_sigmas(score, few.sigmas), shape=(3, 32, 32))
    report = generate(other, folder / "run", 100, plan=few, format="npz")
    print(report.complete, report.samples, Job(other, folder / "run", 100, plan=few, format="npz").spec.run)
    with SamplerService(engine) as service:
        try:
            y: Tensor = service.submit(8, seed=1, deadline=3.0).result()
        except SampleDiverged as error:
            y = error.samples
        print(service.metrics().wait_p50)
    known = torch.zeros(1, 28, 28)
    z = engine.inpaint(known, known > 0, n=4)
    fast = accelerate(Denoiser(), shape=(1, 28, 28))
    print(fast.report, log_likelihood(model, y).shape, z.shape)
    save_checkpoint(load_checkpoint(folder / "x.safetensors"), folder / "y.safetensors")
    drifted = with_drift(score, lambda x, sigma: -x / sigma)
    both = classifier_free(drifted, score, 2.0)
    seen = posterior(both, mask(known > 0, (1, 28, 28)), known)
    print(Engine(seen, float8=calibrate_float8(model)).default_plan.describe())
    return plan


async def serve(service: SamplerService) -> Tensor:
    return await service.draw(8, seed=1)


def measure(path: str) -> Report:
    from sgm_engine.evaluation.features import pixels

    summary = summarise(open_images(path).blocks(), pixels())
    return evaluate(summary, summary)


main(Path("x"))

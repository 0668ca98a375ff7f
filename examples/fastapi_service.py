"""The sampler behind HTTP: samples as they come, cancelled when the client goes, metrics for Prometheus.

pip install fastapi uvicorn; cd examples; uvicorn fastapi_service:app
curl -N 'localhost:8000/samples?n=8&seed=1'      a line of JSON for each sample, its picture as PNG in base64
curl localhost:8000/metrics
"""

import asyncio
import base64
import json
from contextlib import asynccontextmanager
from dataclasses import asdict

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse, StreamingResponse

from sgm_engine import Engine, SamplerService, load_bundled
from sgm_engine.images import png_bytes

model, plan = load_bundled()
service = SamplerService(Engine(model, batch=16))


@asynccontextmanager
async def lifespan(app):
    yield
    await asyncio.to_thread(service.shutdown)  # finishes what was accepted


app = FastAPI(lifespan=lifespan)


@app.get("/samples")
async def samples(n: int = 8, seed: int = 0) -> StreamingResponse:
    return StreamingResponse(stream(n, seed), media_type="application/x-ndjson")


async def stream(n, seed):
    """A request for each sample: they share the batch, and each has the bits that it has in a request of n."""

    async def one(i):
        return i, await service.draw(1, seed, plan, first_id=i)

    tasks = [asyncio.create_task(one(i)) for i in range(n)]
    try:
        for done, task in enumerate(asyncio.as_completed(tasks), 1):
            i, x = await task
            picture = base64.b64encode(png_bytes(service.engine.pictures(x)[0])).decode()
            yield json.dumps({"done": done, "of": n, "sample_id": i, "png": picture}) + "\n"
    finally:  # the client has gone: the slots are others'
        for task in tasks:
            task.cancel()


@app.get("/metrics", response_class=PlainTextResponse)
def metrics() -> str:
    found = asdict(service.metrics())
    outcomes = found.pop("requests").items()
    lines = [f"sgm_{name} {value}" for name, value in found.items()]
    return "\n".join(lines + [f'sgm_requests_total{{outcome="{name}"}} {count}' for name, count in outcomes]) + "\n"

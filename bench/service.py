"""A SamplerService under load, every request compared with its solo run: ``python -m bench.service``.

--clients 8 --requests 500 is the full run (the default); tests/service/test_service.py runs a short one. ``--rate 0.8``
adds an open loop: requests arrive at random moments (Poisson) at that share of the throughput that the first part
measured.
"""

from __future__ import annotations

import random
import threading
import time

import torch
from torch import Tensor

from sgm_engine.engine.engine import Engine
from sgm_engine.executors.choice import EXECUTORS
from sgm_engine.models import NCSN
from sgm_engine.plans.plan import annealed_langevin, consistent_annealed, ddim
from sgm_engine.programs.arguments import Program, at_least, number
from sgm_engine.service.queue import Metrics
from sgm_engine.service.service import SamplerService

SIGMAS = [1.0, 0.3, 0.1]


def tiny(executor: str = "auto", batch: int = 8) -> Engine:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = NCSN(SIGMAS, channels=1, ngf=4, divide_by_sigma=True, image_size=8).eval()
    return Engine(net, batch, executor=executor)


def requests(clients: int, each: int, shape: tuple[int, int, int]) -> list[list[dict]]:
    """Of each client its requests: 1–6 samples, five plans of 3–10 rows, a few seeds, some with an init."""
    plans = [*(annealed_langevin(SIGMAS, k, 1e-3) for k in (1, 2, 3)), consistent_annealed(SIGMAS, 2), ddim(SIGMAS)]
    draw = random.Random(0)
    out = []
    for _ in range(clients):
        mine = []
        for _ in range(each):
            n, first = draw.randint(1, 6), draw.choice((0, 5, 2**40))
            seed = draw.choice((0, 7, 2**64 - 1, [draw.randrange(2**64) for _ in range(n)]))
            request = dict(n=n, seed=seed, plan=draw.choice(plans), first_id=first)
            if draw.random() < 0.2:
                request["init"] = torch.full((n, *shape), draw.random())
            mine.append(request)
        out.append(mine)
    return out


def closed_loop(service: SamplerService, asked: list[list[dict]]) -> tuple[list[list[Tensor]], Metrics]:
    """Every client is a thread that submits all it has, waiting for room, then takes its results."""
    got: list[list[Tensor]] = [[] for _ in asked]

    def client(i: int) -> None:
        futures = [service.submit(**request) for request in asked[i]]
        got[i] = [future.result() for future in futures]

    threads = [threading.Thread(target=client, args=(i,)) for i in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return got, service.metrics()


def open_loop(service: SamplerService, asked: list[dict], rate: float) -> Metrics:
    """Requests at random moments, ``rate`` a second on average, whether earlier ones are done or not."""
    draw, futures, due = random.Random(1), [], time.monotonic()
    for request in asked:
        due += draw.expovariate(rate)
        time.sleep(max(0.0, due - time.monotonic()))
        futures.append(service.submit(**request))
    for future in futures:
        future.result()
    return service.metrics()


def differing(asked: list[list[dict]], got: list[list[Tensor]], solo: Engine) -> int:
    """How many of the requests differ from the engine's own run in any bit."""
    return sum(
        not torch.equal(x, solo.sample(**request))
        for mine, results in zip(asked, got, strict=True)
        for request, x in zip(mine, results, strict=True)
    )


def main() -> None:
    parser = Program("bench.service", __doc__.split("\n")[0])
    parser.add_argument("--clients", type=at_least(1), default=8, metavar="N", help="at a time")
    parser.add_argument("--requests", type=at_least(1), default=500, metavar="N", help="of each client")
    parser.add_argument("--batch", type=at_least(1), default=8, metavar="N", help="slots of the engine")
    parser.add_argument("--executor", choices=EXECUTORS, default="auto", help="of the engine")
    parser.add_argument("--rate", type=number, default=0.8, metavar="X",
        help="of the open loop, over the throughput; 0 leaves it out")  # fmt: skip
    args = parser.parse_args()
    torch.set_num_threads(1)
    engine = tiny(args.executor, args.batch)
    asked = requests(args.clients, args.requests, engine.shape)
    with SamplerService(engine) as service:
        got, m = closed_loop(service, asked)
    wrong = differing(asked, got, tiny(args.executor, args.batch))
    print(
        f"{args.clients} clients × {args.requests} requests, {m.finished} samples; {args.batch} slots, {args.executor}"
    )
    print(f"requests that differ from their solo run: {wrong}")
    print(f"slots in use: {m.occupancy:.1%}; {m.samples_per_second:.0f} samples/s")
    if args.rate:
        flat = [request for mine in asked for request in mine][: 2 * args.requests]
        samples = sum(request["n"] for request in flat)
        rate = args.rate * m.samples_per_second * len(flat) / samples
        with SamplerService(engine, capacity=samples) as service:
            m = open_loop(service, flat, rate)
        print(
            f"open loop, {len(flat)} requests at {args.rate:.0%} of that ({rate:.0f} requests/s): wait for a slot "
            f"p50 {1e3 * m.wait_p50:.1f} ms, p99 {1e3 * m.wait_p99:.1f} ms; whole request p50 "
            f"{1e3 * m.latency_p50:.1f} ms, p99 {1e3 * m.latency_p99:.1f} ms; slots in use {m.occupancy:.1%}"
        )
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()

"""examples/fastapi_service.py over the loopback: what it streams, what it counts, and a client that goes."""

import base64
import http.client
import importlib.util
import io
import json
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sgm_engine
from tests.service.services import PLAN, SHAPE, SIGMAS, Gate

uvicorn = pytest.importorskip("uvicorn", reason="pip install 'sgm-engine[test]'")
pytest.importorskip("fastapi", reason="pip install 'sgm-engine[test]'")


def until(true):
    """Wait for what another thread does: half a minute is a fault."""
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def example(monkeypatch):
    """The module, its network the exact score of data at 0 behind a gate, and the port that it answers at."""
    gate = Gate()
    gate.sigmas, gate.shape = SIGMAS, SHAPE
    gate.open.set()
    monkeypatch.setattr(sgm_engine, "load_bundled", lambda: (gate, PLAN), raising=False)
    path = Path(__file__).parents[2] / "examples" / "fastapi_service.py"
    spec = importlib.util.spec_from_file_location("fastapi_service", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    server = uvicorn.Server(uvicorn.Config(module.app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    module.gate, module.port = gate, server.servers[0].sockets[0].getsockname()[1]
    yield module
    gate.open.set()
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive() and not [t for t in threading.enumerate() if t.name == "SamplerService"]


def get(example, path):
    connection = http.client.HTTPConnection("127.0.0.1", example.port, timeout=30)
    connection.request("GET", path)
    return connection.getresponse().read().decode()


def test_it_streams_samples_and_counts_requests(example):
    found = [json.loads(line) for line in get(example, "/samples?n=5&seed=7").splitlines()]
    assert [line["done"] for line in found] == [1, 2, 3, 4, 5] and {line["of"] for line in found} == {5}
    want = example.service.engine.pictures(example.service.engine.sample(5, seed=7, plan=PLAN))
    assert sorted(line["sample_id"] for line in found) == [0, 1, 2, 3, 4]
    for line in found:
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(line["png"]))))
        assert np.array_equal(picture, want[line["sample_id"], :, :, 0])
    counted = dict(line.rsplit(" ", 1) for line in get(example, "/metrics").splitlines())
    assert counted['sgm_requests_total{outcome="finished"}'] == "5" and counted["sgm_pending"] == "0"
    assert all(float(value) >= 0 for value in counted.values())


def test_a_client_that_goes_takes_its_requests_along(example):
    example.gate.open.clear()
    with socket.create_connection(("127.0.0.1", example.port)) as client:
        client.sendall(b"GET /samples?n=4 HTTP/1.1\r\nHost: here\r\n\r\n")
        until(lambda: example.service.metrics().pending == 4)
    until(lambda: len(example.service._cancelled) >= 4)  # the network still waits: none can have been finished
    example.gate.open.set()
    until(lambda: example.service.metrics().requests["cancelled"] == 4)
    assert example.service.metrics().pending == 0

"""The yardsticks of bench/: ratios, peers and their table, on figures whose answer is known."""

import pytest
import torch

from bench import table
from bench.common import Ratio, median_ratio
from bench.peers import PEERS, plain
from sgm_engine.models import NCSN, NCSNv2


def test_median_ratio():
    ratio = median_ratio([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    assert (ratio.median, ratio.f_seconds, ratio.g_seconds) == (2.0, 4.0, 2.0)
    assert 2.0 <= ratio.low <= ratio.high <= 3.0


@pytest.mark.parametrize("own_statistics", [True, False])
@pytest.mark.parametrize("kind", [NCSN, NCSNv2])
def test_the_peers_network_is_the_same_network(kind, own_statistics):
    torch.manual_seed(0)
    model = kind([1.0, 0.1, 0.01], channels=1, ngf=8, image_size=8).eval()
    x, level = torch.rand(2, 1, 8, 8), torch.tensor([0, 2])
    copy = plain(model, own_statistics)
    assert not any("Norm" in type(m).__name__ and type(m).__name__ != "PlainNorm" for m in copy.children())
    with torch.no_grad():
        torch.testing.assert_close(copy(x, level), model(x, level), rtol=1e-4, atol=1e-4 * model(x, level).abs().max())
        for p in model.parameters():
            p.add_(0.1)
        assert not torch.allclose(copy(x, level), model(x, level)), "the copy shares its parameters"


@pytest.fixture
def row(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "FOLDER", tmp_path)
    ratios = {name: Ratio(1.5 + i, 1.4 + i, 1.6 + i, 0.3, 0.2) for i, name in enumerate(PEERS)}
    case = {"network": "net", "batch": 8, "dtype": "float32", "threads": 1, "device": "cpu", "torch": "2"}
    speed = {"ms": 200.0, "TFLOP/s": 0.5, "share of multiply-add peak": 2.0}
    return case | speed | {"ratios": ratios, "left out": {"X": "no bfloat16"}}


def test_table(row, tmp_path):
    table.keep(row)
    table.keep(row | {"batch": 1})
    table.keep(row | {"ms": 100.0})  # replaces the first
    rows = table.load()
    assert [(r["batch"], r["ms"]) for r in rows] == [(1, 200.0), (8, 100.0)]
    text = table.markdown(rows)
    assert "| net | 8 | float32 | 100.0 | 0.500 | 2.00 | 1.50 [1.40, 1.60] |" in text and "— X: no bfloat16." in text
    pytest.importorskip("matplotlib", reason="pip install 'sgm-engine[test]'")
    assert [file.name for file in table.write()] == ["peers.json", "peers.md", "peers.png"]
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")


def test_the_readmes_table_is_the_measured_one():
    rows = table.load()
    assert rows and table.short(rows) in table.README.read_text(), "python -m bench.table --readme"


def test_short_table(row):
    rows = [row, row | {"batch": 32}, row | {"threads": 2, "batch": 1}]
    assert "| net | – / 6.5 / 6.5 | – / 5.5 / 5.5 | – / 4.5 / 4.5 | – / 2.5 / 2.5 |" in table.short(rows)

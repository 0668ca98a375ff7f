"""The fuzzer sees what it looks for; and records that hypothesis draws end in a value or in one line."""

import json
import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sgm_engine.jobs.spec import JobSpec
from sgm_engine.models import ModelConfig
from sgm_engine.models.cdm.config import CDMConfig
from sgm_engine.plans.plan import Plan, annealed_langevin
from sgm_engine.rewriting.float8.config import Float8Config
from sgm_engine.training.config import TrainConfig
from tests.fuzz.__main__ import fuzz
from tests.fuzz.mutate import damaged


def test_planted_faults_are_found():
    done, findings = fuzz("planted", 0, 0, 7, time.monotonic() + 200, limit=6)
    words = ("died with -11", "no answer", "GB at its peak", "KeyError in planted.py", "planted words")
    assert done == 7 and len(findings) == 5
    for number, (finding, what) in enumerate(zip(findings, words, strict=True), 1):
        assert finding.startswith(f"planted {number}: ") and what in finding


def test_a_case_is_decided_by_its_number():
    draws = [damaged(b"PK" + bytes(100), np.random.default_rng([3, n])) for n in (5, 5, 6)]
    assert draws[0] == draws[1] != draws[2]


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=9),
    st.sampled_from([0, 1, 2, 8, 1.0, "NCSNv2", "CDM", "ddpm", "png", "cpu x", "uniform", "0-9", "annealed_langevin"]),
)  # fmt: skip
values = st.recursive(scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=5), v, max_size=4))
CONFIG = {"architecture": "NCSNv2", "channels": 1, "image_size": 8, "ngf": 2, "sigmas": [1.0, 0.5], "plan": None}
CDM = {"channels": 1, "image_size": 8, "width": 4, "multipliers": [1], "blocks": 1, "schedule": "ddpm", "levels": 4}
TRAIN = {"architecture": "NCSNv2", "ngf": 8, "levels": 10, "sigma_begin": 1.0, "plan": {}, "network": {}, "lr": 1e-4}
PLAN = json.loads(annealed_langevin([1.0, 0.5], 1, 1e-5).to_json())
FLOAT8 = json.loads(Float8Config({"a": 1.0}, emulate=True).to_json())
RECORDS = {
    "config": (CONFIG | {"divide_by_sigma": True}, ModelConfig.from_dict),
    "cdm": (CDM, CDMConfig.from_dict),
    "train": (TRAIN, lambda fields: TrainConfig(**fields)),
    "plan": (PLAN, lambda fields: Plan.from_json(json.dumps(fields))),
    "float8": (FLOAT8, lambda fields: Float8Config.from_json(json.dumps(fields))),
    "job": ({"format": "sgm-job", "version": 1, "run": "", "job": {}, "notes": {}, "plan": PLAN},
            lambda fields: JobSpec.from_json(json.dumps(fields))),
}  # fmt: skip


@settings(max_examples=600, deadline=None, derandomize=True)
@given(st.data())
def test_any_record_is_a_value_or_one_line(data):
    fields, read = RECORDS[data.draw(st.sampled_from(sorted(RECORDS)))]
    changed = data.draw(st.sampled_from(sorted(fields)))
    try:
        read(fields | {changed: data.draw(values)})
    except (ValueError, TypeError) as error:
        assert str(error) and "\n" not in str(error)

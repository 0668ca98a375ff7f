"""The README.md of a job's folder: what is known about the samples, and what only their maker can add."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sgm_engine.jobs.formats import FORMATS
from sgm_engine.jobs.spec import JobSpec
from sgm_engine.plans.report import plan_words

CARD = """\
# {count} samples

Drawn with sgm-engine {engine}: seed {seed}, sample ids {ids}, shape {shape} (C × H × W), in {shards} shards of
{shard_size} ids, as {format} ({values}).

- Weights: sha256 `{weights}`{checkpoint}
- Plan: {plan}, {nfe} network evaluations a sample; the whole table is in `run.json`
- Computed in {precision} by the {executor} executor, batch {batch}, on {device}, PyTorch {torch}
- Run hash: `{run}`

`manifest/` has a record for each shard: its files with their sha256, and the samples that became non-finite and were
left out. From the folder above:

    sgm verify DIR                        # every shard against its record
    sgm merge DIR --out all.npz           # one file
    sgm resample DIR --id {first} --out x.safetensors   # one sample again, the same bytes

## To be filled in

- Training data of the model, and its licence:
- Licence of these samples, and what they may be used for:
- Known flaws, and what was measured (FID, …):
"""


def model_card(spec: JobSpec, notes: Mapping[str, Any]) -> str:
    """Nothing in it depends on when or by which worker it was written."""
    low, high = spec.data_range
    values = f"float32, as drawn, of data in [{low:g}, {high:g}]"
    if not FORMATS[spec.format].lossless:
        values = f"8 bits a value, from [{low:g}, {high:g}]"
    checkpoint = f" ({notes['checkpoint']})" if notes.get("checkpoint") else ""
    facts = spec.identity | vars(spec.geometry) | {"plan": plan_words(spec.plan), "nfe": spec.plan.nfe}
    facts |= {"count": len(spec.ids), "shards": spec.shards, "run": spec.run, "first": spec.ids[0] if spec.ids else 0}
    facts |= {"shape": " × ".join(map(str, spec.shape)), "values": values, "checkpoint": checkpoint}
    return CARD.format(**facts)

"""Which of a file's tensors are the weights: the averaged ones where there are any, without what wraps their names.

A file is nested dicts and lists. Every dict of tensors in it is looked through for the tensor by which a family is
known (its anchor); what comes before the anchor's name is a prefix, ``module.`` or ``ema_model.model.`` or whatever
it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from sgm_engine.checkpoints.torch_file import CheckpointError, StoredTensor

# The tensor by which each family is known, and what its other tensors are called, after a prefix.
FAMILIES = {
    "CDM": (r"linear_layer\.weight", r"(conv_in|down|mid|up|norm_out|conv_out|linear_layer|temb|label_emb)\."),
    "NCSN": (r"begin_conv\.weight", r"(begin_conv|end_conv|normalizer|res\d+|refine\d+)\."),
    "score_sde": (r"all_modules\.0\.(?:W|weight|Conv_0\.weight)", r"all_modules\.\d+\."),
    "EDM2": (r"emb_noise\.weight", r"((emb_\w+|(enc|dec)\.\d+x\d+_\w+|out_conv)\.|out_gain$)"),
    "EDM": (r"map_layer0\.weight", r"(map_\w+|(enc|dec)\.\d+x\d+_\w+|out_norm|out_conv)\."),
    "ADM": (r"time_embed\.0\.weight", r"(time_embed|label_emb|input_blocks|middle_block|output_blocks|out)\."),
    "diffusers": (
        r"time_embedding\.linear_1\.weight",
        r"(time_embedding|conv_in|(down|up)_blocks|mid_block|conv_\w*out)\.",
    ),
    "lucidrains": (r"init_conv\.weight", r"(init_conv|time_mlp|downs|ups|mid_(block|attn)\w*|final_\w+)\."),
}
UNTRAINED = re.compile(
    r"(^|\.)(sigmas|resample_filter|freqs|phases|num_batches_tracked|running_mean|running_var)$|all_modules\.0\.W$"
)
AVERAGES = {"ema", "swa", "shadow", "averaged", "average", "avg"}
MAX_DEPTH, MAX_CONTAINERS = 5, 10_000


class Chosen(NamedTuple):
    """tensors: of ``family`` by the names of the family. beside: all others of the same dict, by what follows the
    name of the module that holds the network. averaged: whether they are. where: as "ema/ema_model.model."."""

    family: str
    tensors: dict[str, StoredTensor]
    beside: dict[str, StoredTensor]
    averaged: bool
    where: str


def choose(content: object, ema: bool | None, name: str = "") -> Chosen | None:
    """The weights of a known family, None where there is none. ema as of load_checkpoint. Raises CheckpointError.

    name: of the file, which says it for weights without a name: ema_0.9999_050000.pt.
    """
    found = [c._replace(averaged=c.averaged or (not c.where and is_average(name))) for c in _candidates(content)]
    if not found:
        return None
    raw = [c for c in found if not c.averaged]
    averaged = [c for c in found if c.averaged]
    averaged += [_listed(name, value, raw) for name, value in _shadows(content)]
    averaged += _without_dots(content, raw)
    if ema and not averaged:
        raise CheckpointError("holds no averaged weights: leave out ema=True")
    if ema is not False and not averaged and (strange := _strange(content, raw)):
        raise CheckpointError(
            f"holds an average {strange!r} in a form that is not understood: ema=False takes the weights themselves"
        )
    kind = averaged if averaged and ema is not False else raw or averaged
    # {"model": …, "ema": {"online_model": the same once more}}
    outer = [c for c in kind if c.averaged or not is_average(c.where.split("/")[0])]
    chosen = outer if len(outer) == 1 else kind
    if len(chosen) > 1:
        names = ", ".join(c.where for c in chosen)
        raise CheckpointError(f"holds {len(chosen)} networks ({names}): save the one you want by itself")
    if ema is False and chosen[0].averaged:
        raise CheckpointError("holds averaged weights only: leave out ema=False")
    return _with_buffers(chosen[0], raw)


def nearest(names: Mapping[str, object]) -> str:
    """Which family's names these are most like, and how many: a clause of an error."""
    counts = {f: sum(bool(re.search(rf"(^|\.){rest}", n)) for n in names) for f, (_, rest) in FAMILIES.items()}
    family = max(counts, key=counts.__getitem__)
    return (
        f"nearest is {family}, with {counts[family]} of {len(names)} tensors" if counts[family] else "no family is near"
    )


def is_state(value: object) -> bool:
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(k, str) and isinstance(v, StoredTensor) for k, v in value.items())
    )


def is_average(name: str) -> bool:
    words = re.split(r"[._/\-]+", name.lower())
    return bool(AVERAGES & set(words)) and "online" not in words


def _candidates(content: object) -> Iterator[Chosen]:
    """Every network of a known family that is there."""
    for path, tensors in _states(content, ()):
        for family, (anchor, _) in FAMILIES.items():
            for name in tensors:
                match = re.fullmatch(rf"(.*\.)?{anchor}", name)
                if match and (match[1] or "").count(".") <= MAX_DEPTH:
                    yield _candidate(family, path, match[1] or "", tensors)


def _candidate(family: str, path: tuple[str, ...], prefix: str, tensors: dict[str, StoredTensor]) -> Chosen:
    holder = re.sub(r"[^.]*\.$", "", prefix)
    inside = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    beside = {
        n.removeprefix(holder): t for n, t in tensors.items() if n.startswith(holder) and not n.startswith(prefix)
    }
    where = "/".join([*path, prefix]) if prefix else "/".join(path)
    inner = [n for n in inside if not re.match(FAMILIES[family][1], n) and not prefix]
    beside |= {n: inside.pop(n) for n in inner if inside[n].shape == () or is_average(n.split(".")[0])}
    # The fifth of NCSNv2's list is the average; online_model is the weights themselves, inside the average's dict.
    return Chosen(family, inside, beside, path[:1] == ("4",) or is_average(where), where)


def _states(
    content: object, path: tuple[str, ...], seen: list[int] | None = None
) -> Iterator[tuple[tuple[str, ...], dict[str, StoredTensor]]]:
    """Every dict of tensors, with its path. seen: how many containers so far: few objects can hold each other often."""
    seen = [0] if seen is None else seen
    seen[0] += 1
    if seen[0] > MAX_CONTAINERS:
        raise CheckpointError(f"nests its content in more than {MAX_CONTAINERS} places, where a few would do")
    if len(path) > MAX_DEPTH:
        return
    if isinstance(content, (list, tuple)):
        content = {str(i): value for i, value in enumerate(content[:8])}
    if isinstance(content, dict):
        tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, StoredTensor)}
        if tensors:
            yield path, tensors
        for key, value in content.items():
            if isinstance(key, str) and isinstance(value, (dict, list, tuple)):
                yield from _states(value, (*path, key), seen)


def _shadows(content: object) -> Iterator[tuple[str, list]]:
    """Averages that are lists of tensors, in the order of the trainable parameters."""
    for key, value in content.items() if isinstance(content, dict) else ():
        if isinstance(key, str) and is_average(key):
            listed = value.get("shadow_params") if isinstance(value, dict) else value
            if isinstance(listed, (list, tuple)) and listed and all(isinstance(t, StoredTensor) for t in listed):
                yield key, list(listed)


def _listed(name: str, values: list[StoredTensor], raw: list[Chosen]) -> Chosen:
    """The average ``values`` under the names of the weights, checked one by one."""
    if len(raw) != 1:
        raise CheckpointError(
            f"holds {len(raw)} networks and an average {name!r} without names: ema=False leaves it out"
        )
    names = list(raw[0].tensors)
    if len(values) != len(names):
        names = [n for n in names if not UNTRAINED.search(n)]
    if len(values) != len(names):
        raise CheckpointError(f"averages {len(values)} parameters in {name!r}, where the weights have {len(names)}")
    for parameter, value in zip(names, values, strict=True):
        if value.shape != raw[0].tensors[parameter].shape:
            raise CheckpointError(
                f"averages {parameter} in {name!r} with shape {list(value.shape)}, where the weights have "
                f"{list(raw[0].tensors[parameter].shape)}"
            )
    return raw[0]._replace(tensors=dict(zip(names, values, strict=True)), averaged=True, where=name)


def _beside(content: object, raw: list[Chosen]) -> Iterator[tuple[str, dict[str, StoredTensor], Chosen]]:
    """Modules of averages in one dict with the weights, as (prefix, tensors by what follows it, the weights)."""
    for path, tensors in _states(content, ()):
        names = {".".join(k.split(".")[:depth]) for k in tensors for depth in (1, 2) if k.count(".") >= depth}
        prefixes = sorted(f"{n}." for n in names if is_average(n.rpartition(".")[2]))[:MAX_DEPTH]
        for prefix in prefixes:
            inside = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            yield from ((prefix, inside, c) for c in raw if c.where.split("/")[: len(path)] == list(path))


def _without_dots(content: object, raw: list[Chosen]) -> Iterator[Chosen]:
    """Averages under the names of the weights less their dots, as latent diffusion has them."""
    for prefix, inside, weights in _beside(content, raw):
        holders = weights.where.rpartition("/")[2].split(".")[:-1]
        for cut in range(len(holders) + 1):
            names = {"".join(holders[cut:]) + n.replace(".", ""): n for n in weights.tensors}
            found = {names[k]: t for k, t in inside.items() if k in names}
            if {n for n in weights.tensors if not UNTRAINED.search(n)} <= found.keys():
                yield weights._replace(tensors=found, averaged=True, where=prefix)
                break


def _with_buffers(chosen: Chosen, raw: list[Chosen]) -> Chosen:
    """An average that leaves out what is not trained takes it from the weights."""
    if not chosen.averaged or not raw or raw[0].family != chosen.family:
        return chosen
    missing = {n: t for n, t in raw[0].tensors.items() if n not in chosen.tensors and UNTRAINED.search(n)}
    return chosen._replace(tensors=missing | chosen.tensors, beside=raw[0].beside | chosen.beside)


def _strange(content: object, raw: list[Chosen]) -> str | None:
    """The name of an average that none of the above understands."""
    for key, value in content.items() if isinstance(content, dict) else ():
        if isinstance(key, str) and is_average(key) and isinstance(value, (dict, list, tuple, StoredTensor)) and value:
            tensors = value if isinstance(value, StoredTensor) else list(_states({"": value}, ()))
            if tensors or isinstance(value, (list, tuple)):
                return key
        states = value.get("state") if isinstance(value, dict) else None  # of an optimizer that averages
        if isinstance(states, dict) and any(isinstance(s, dict) and "ema" in s for s in states.values()):
            return f"{key}/state/ema"
    return next((prefix for prefix, inside, c in _beside(content, raw) if 2 * len(inside) > len(c.tensors)), None)

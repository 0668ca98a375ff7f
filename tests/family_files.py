"""Golden outputs of the original networks of the diffusion families, and weights as their programs write them."""

import inspect
import io
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from sgm_engine import load_checkpoint
from sgm_engine.checkpoints.checkpoint import CheckpointError
from sgm_engine.models.adm import ADMUNet
from sgm_engine.models.edm2_unet import EDM2UNet
from sgm_engine.models.edm_unet import DhariwalUNet, SongUNet
from sgm_engine.models.lucidrains import Unet
from sgm_engine.models.score_sde import NCSNpp
from sgm_engine.models.unet2d import UNet2D

DATA = Path(__file__).parent / "data"
SHARED = Path(__file__).parents[2] / "shared" / "golden"
GOLDEN = (
    "score_sde_ncsnpp_ve_32",
    "score_sde_ddpmpp_vp_32",
    "edm_ddpmpp_32",
    "edm_ncsnpp_32",
    "edm_adm_32_labels",
    "improved_diffusion_32_labels",
    "adm_64",
)


def golden(name):
    """(config, state by name, {"x", "told", "out_f64"}) of an original network; adm_64 is too large to be kept here."""
    path = next((f for f in (DATA / f"golden_{name}.safetensors", SHARED / f"{name}.safetensors") if f.exists()), None)
    if path is None:
        pytest.skip(f"../shared/golden/{name}.safetensors is not there, and no copy is kept")
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
        config = json.loads(file.metadata()["config"])
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    if (
        "label_emb.weight" in state and len(state["label_emb.weight"]) < 1000
    ):  # the rows of the labels, others are not asked
        rows = torch.zeros(1000, state["label_emb.weight"].shape[1])
        rows[config["labels"]] = state["label_emb.weight"]
        state["label_emb.weight"] = rows
    return config, state, tensors


def network_of(name, config):
    """Our network for a golden file's config, with random weights."""
    if name.startswith("score_sde"):
        cls, arguments = NCSNpp, config
    elif name.startswith("edm"):
        cls = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}[config["model_type"]]
        arguments = config | {"img_resolution": config["image_size"], "in_channels": 3, "out_channels": 3}
    else:
        cls = ADMUNet
        classes = 1000 if config["class_cond"] else None
        arguments = config | {name: listed(config[name]) for name in ("channel_mult", "attention_resolutions")}
        arguments |= {"num_classes": classes}
    return cls(**{k: v for k, v in arguments.items() if k in inspect.signature(cls).parameters}).eval()


def listed(text):
    return [int(word) for word in text.split(",")]


def relative(found, expected):
    """‖found − expected‖/‖expected‖, in float64."""
    return ((found.double() - expected).norm() / expected.norm()).item()


def score_sde_files(folder, name, average=0.5):
    """A score_sde checkpoint whose average is ``average``·weights, and its config: (.pth, .py)."""
    config, state, _ = golden(name)
    state = {k: state[k] for k in [*network_of(name, config).state_dict(), "sigmas"]}  # in the order of the modules
    trained = [v * average for k, v in state.items() if k not in ("sigmas", "all_modules.0.W" if config["fir"] else "")]
    content = {"optimizer": {"state": {}, "param_groups": [{"lr": 2e-4, "params": [0, 1]}]},
               "model": {f"module.{k}": v for k, v in state.items()},
               "ema": {"decay": 0.999, "num_updates": 7, "shadow_params": trained}, "step": 7}  # fmt: skip
    torch.save(content, folder / "checkpoint_7.pth")
    skipped = ("sde", "image_size", "num_channels", "centered", "continuous", "sigma_min", "sigma_max", "num_scales",
               "beta_min", "beta_max")  # fmt: skip
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k not in skipped}
    lines = [f"  model.{k} = {v!r}" for k, v in fields.items()]
    (folder / "config.py").write_text(
        "import torch\nfrom configs.default_cifar10_configs import get_default_configs\n\n\ndef get_config():\n"
        "  config = get_default_configs()\n  training = config.training\n"
        f"  training.sde = {config['sde']!r}\n  training.continuous = True\n"
        f"  data = config.data\n  data.centered = {config['centered']}\n  model = config.model\n"
        + "\n".join(lines)
        + "\n  config.device = torch.device('cuda:0')\n  return config\n"
    )
    return folder / "checkpoint_7.pth", folder / "config.py"


class _EasyDict(dict):
    """Pickled under the name of dnnlib's."""


class _Persistent:
    """Stands for an object that EDM's programs pickle with its source: what is written names a function, not this."""

    def __init__(self, class_name, state):
        self.meta = _EasyDict(
            type="class", version=6, module_src="raise SystemExit", class_name=class_name, state=state
        )

    def __reduce__(self):
        return _reconstruct, (self.meta,)


def _reconstruct(meta):
    raise AssertionError("something ran")


_reconstruct.__module__, _reconstruct.__qualname__ = "torch_utils.persistence", "_reconstruct_persistent_obj"
_EasyDict.__module__, _EasyDict.__qualname__ = "dnnlib.util", "EasyDict"


class _Pickler(pickle._Pickler):
    """Writes the names above without asking whether they can be imported."""

    def save_global(self, obj, name=None):
        if obj in (_reconstruct, _EasyDict):
            self.save(obj.__module__)
            self.save(obj.__qualname__)
            self.write(pickle.STACK_GLOBAL)
            self.memoize(obj)
        else:
            super().save_global(obj, name)

    dispatch = pickle._Pickler.dispatch | {type(_reconstruct): save_global, type: save_global}


def _module(module, class_name=None, made=None, **own):
    """An nn.Module as EDM's persistence writes it; made: by the module's id, for those that stand in several places."""
    made = {} if made is None else made
    for child in module._modules.values():
        if child is not None and id(child) not in made:
            made[id(child)] = _module(child, None, made)
    children = {n: made[id(m)] for n, m in module._modules.items() if m is not None}
    kept = {"training": False, "_parameters": dict(module._parameters), "_buffers": dict(module._buffers)}
    state = kept | {"_modules": children} | own
    return _Persistent(class_name or type(module).__name__, state)


def edm_pickle(path, network, arguments, precond="EDMPrecond", own=None):
    """{"ema": precond(network)} as a network-snapshot .pkl."""
    inner = _module(network, type(network).__name__, _init_args=(), _init_kwargs=_EasyDict(arguments))
    return _snapshot(path, precond, {"model": inner}, own)


def edm2_pickle(path, network, arguments, unnamed=(), encoder="StandardRGBEncoder", precond="Precond"):
    """The same of EDM2: its network is called UNet, and stands beside the layer that learns uncertainties."""
    inner = _module(network, "UNet", _init_args=unnamed, _init_kwargs=_EasyDict(arguments))
    logvar = _module(nn.Linear(4, 1, bias=False), "MPConv")
    encoder = None if encoder is None else _Persistent(encoder, {"_init_args": (), "_init_kwargs": _EasyDict()})
    return _snapshot(path, precond, {"unet": inner, "logvar_linear": logvar}, {"sigma_data": 0.5}, encoder=encoder)


def _snapshot(path, precond, modules, own, **beside):
    outer = _module(nn.Module(), precond, _init_args=(), _init_kwargs=_EasyDict(own or {}), **(own or {}))
    outer.meta["state"]["_modules"] = modules
    content = {"ema": outer, "loss_fn": None, "dataset_kwargs": {"path": "cifar10.zip"}} | beside
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=4).dump(content)
    path.write_bytes(buffer.getvalue())
    return path


TINY_EDM2 = {
    "img_resolution": 16, "img_channels": 3, "label_dim": 5, "model_channels": 32, "channel_mult": [1, 2],
    "num_blocks": 1, "attn_resolutions": [8], "channels_per_head": 16,
}  # fmt: skip


def edm2_network(**changed):
    """Small, of random weights; its gains are not 0, where nothing could be seen."""
    torch.manual_seed(0)
    network = EDM2UNet(**TINY_EDM2 | changed).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("gain"):
                parameter.uniform_(0.5, 1.5)
    return network


def edm_arguments(config):
    """Keyword arguments of the inner network, as a pickle holds them."""
    left_out = ("image_size", "img_channels", "labels", "preconditioning", "model_type")
    arguments = {k: v for k, v in config.items() if k not in left_out}
    return {"img_resolution": config["image_size"], "in_channels": 3, "out_channels": 3, "label_dim": 0} | arguments


TINY_UNET = {
    "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": [16, 32], "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 8,
}  # fmt: skip


def refused(*arguments, **options):
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(*arguments, **options)
    assert "\n" not in str(error.value) and str(arguments[0]) in str(error.value)
    return str(error.value)


def same_network(model, name, scale=1.0):
    """model.network computes what the golden file's does, its weights ``scale`` times those."""
    config, state, _ = golden(name)
    reference = network_of(name, config)
    weights = {k.removeprefix("model."): v for k, v in state.items() if k != "sigmas"}
    fixed = ("all_modules.0.W", "freqs", "resample_filter")
    reference.load_state_dict({k: v if k.endswith(fixed) else scale * v for k, v in weights.items()})
    assert all(torch.equal(v, model.network.state_dict()[k]) for k, v in reference.state_dict().items())


def lucidrains_file(path, objective="pred_v", **arguments):
    torch.manual_seed(0)
    kinds = {"full_attn": (False, True), "attn_heads": (2, 2), "attn_dim_head": (8, 8), "memories": (4, 4)}
    network = Unet(16, (1, 2), 3, **kinds | arguments).eval()
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    snr = alphas / (1 - alphas)
    weight = {"pred_noise": torch.ones_like(snr), "pred_x0": snr, "pred_v": snr / (snr + 1)}[objective]
    whole = {"betas": 1 - alphas, "alphas_cumprod": alphas, "loss_weight": weight}
    whole |= {f"model.{k}": v for k, v in network.state_dict().items()}
    average = {"initted": torch.tensor([True]), "step": torch.tensor([9])}
    average |= {f"online_model.{k}": v for k, v in whole.items()}
    average |= {f"ema_model.{k}": v * 0.5 if k.startswith("model.") else v for k, v in whole.items()}
    torch.save({"step": 9, "model": whole, "opt": {"state": {}, "param_groups": []}, "ema": average, "scaler": None,
                "version": "2.2.5"}, path)  # fmt: skip
    return network


def diffusers_folder(folder, scheduler=None, **changed):
    """A pipeline's folder of random weights, without diffusers."""
    torch.manual_seed(0)
    network = UNet2D(**TINY_UNET | changed).eval()
    (folder / "unet").mkdir(parents=True)
    (folder / "scheduler").mkdir()
    save_file(network.state_dict(), folder / "unet" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    config = {"_class_name": "UNet2DModel", "_diffusers_version": "0.21.0", **TINY_UNET, **changed}
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    own = {"_class_name": "DDPMScheduler", "clip_sample": False} | (scheduler or {})
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(own))
    index = {
        "_class_name": "DDPMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return network

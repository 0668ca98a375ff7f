"""Configurations that must not load, in YAML."""

from tests.checkpoints.bad_files import CANARY

CONFIG = """\
data: {channels: 3, image_size: 32, logit_transform: false}
model: {ngf: 8, num_classes: 232, sigma_begin: 50, sigma_end: 0.01}
sampling: {n_steps_each: 5, step_lr: 6.2e-6}
"""


NAMESPACE = "!!python/object:argparse.Namespace"


YAML = {
    "apply os.system": f"!!python/object/apply:os.system ['touch {CANARY}']",
    "apply inside": CONFIG + f"x: !!python/object/apply:os.system ['touch {CANARY}']",
    "new": f"!!python/object/new:subprocess.Popen [['touch', '{CANARY}']]",
    "new with state": "!!python/object/new:type\nargs: [z, !!python/tuple [], {extend: !!python/name:exec }]\n"
    f"listitems: touch {CANARY}",
    "name": "data: !!python/name:os.system ''",
    "module": "data: !!python/module:os ''",
    "another object": "!!python/object:subprocess.Popen {args: touch}",
    "namespace of a list": f"{NAMESPACE} [1, 2]",
    "namespace with unhashable keys": f"{NAMESPACE} {{[1, 2]: 3}}",
    "aliases": "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n" + CONFIG,
    "merge": "a: &a {x: 1}\n" + CONFIG.replace("data: {", "data: {<<: *a, "),
    "deep": "[" * 3000 + "]" * 3000,
    "not YAML": "data: {channels: 3",
    "tabs": "data:\n\t- 1",
    "binary": "\x00\x01\x02",
    "empty": "",
    "a list": "- 1\n- 2",
    "two documents": CONFIG + "---\n" + CONFIG,
    "too long": CONFIG + "# " + "x" * (1 << 21),
    "no data": CONFIG.replace("data:", "date:"),
    "data a text": CONFIG.replace("data: {channels: 3, image_size: 32, logit_transform: false}", "data: none"),
    "no ngf": CONFIG.replace("ngf: 8, ", ""),
    "ngf a word": CONFIG.replace("ngf: 8", "ngf: eight"),
    "ngf a fraction": CONFIG.replace("ngf: 8", "ngf: 8.5"),
    "ngf true": CONFIG.replace("ngf: 8", "ngf: true"),
    "ngf a list": CONFIG.replace("ngf: 8", "ngf: [8]"),
    "ngf zero": CONFIG.replace("ngf: 8", "ngf: 0"),
    "number with a tail": CONFIG.replace("6.2e-6", "6.2e-6; rm"),
    "number in words": CONFIG.replace("6.2e-6", "'0x1p-3'"),
    "step_lr negative": CONFIG.replace("6.2e-6", "-6.2e-6"),
    "step_lr NaN": CONFIG.replace("6.2e-6", ".nan"),
    "step_lr 'nan'": CONFIG.replace("6.2e-6", "nan"),
    "sigma_begin Inf": CONFIG.replace("sigma_begin: 50", "sigma_begin: .inf"),
    "sigma_begin huge": CONFIG.replace("sigma_begin: 50", "sigma_begin: 1e999"),
    "sigmas ascend": CONFIG.replace("sigma_begin: 50", "sigma_begin: 0.001"),
    "a billion levels": CONFIG.replace("num_classes: 232", "num_classes: 1000000000"),
    "other levels than the file": CONFIG.replace("num_classes: 232", "num_classes: 10"),
    "other sigmas than the file": CONFIG.replace("sigma_begin: 50", "sigma_begin: 90"),
    "other channels than the file": CONFIG.replace("channels: 3", "channels: 1"),
    "odd size": CONFIG.replace("image_size: 32", "image_size: 33"),
    "logit_transform": CONFIG.replace("logit_transform: false", "logit_transform: true"),
    "rescaled": CONFIG.replace("logit_transform: false", "rescaled: true"),
    "another norm": CONFIG.replace("ngf: 8", "ngf: 8, normalization: BatchNorm"),
    "another nonlinearity": CONFIG.replace("ngf: 8", "ngf: 8, nonlinearity: swish"),
    "another distribution": CONFIG.replace("ngf: 8", "ngf: 8, sigma_dist: cosine"),
}

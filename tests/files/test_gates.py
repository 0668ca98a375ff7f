"""The gates are the only way in and out: nothing else of the package opens files, archives, arrays or pictures."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "sgm_engine"
GATES = PACKAGE / "files"
MODULES = {"zipfile", "tarfile", "gzip", "bz2", "lzma", "tempfile", "shutil", "pickle", "shelve", "mmap"}
CALLS = {
    *("open", "io.open", "os.open", "os.fdopen", "os.replace", "os.rename", "os.link", "os.unlink", "os.remove"),
    *("np.load", "np.save", "np.savez", "np.memmap", "np.fromfile", "np.loadtxt", "Image.open", "safe_open"),
    *("torch.load", "torch.save", "load_file", "save_file", "yaml.load", "yaml.safe_load", "json.load", "os.makedirs"),
}
METHODS = {"write_text", "write_bytes", "read_text", "read_bytes", "unlink", "touch", "symlink_to", "hardlink_to"}
ALLOWED = {  # with the reason
    ("cli/main.py", "open"): "/dev/null in place of a closed stream",
    ("cli/main.py", "os.open"): "the same",
    ("cli/doctor.py", "read_text"): "/proc/cpuinfo",
    ("cli/doctor.py", "shutil"): "which",
    ("jobs/formats.py", "tarfile"): "into memory",
    ("outputs/output.py", "np.savez"): "into memory",
    ("checkpoints/torch_file.py", "mmap"): "of a file that the gate has opened",
}


def names(node: ast.AST) -> str | None:
    """``a.b`` for a call of a.b(…)."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return f"{node.value.id}.{node.attr}"
    return None


def found(source: str) -> set[str]:
    """What a source text does by itself that is a gate's."""
    seen = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            seen |= {alias.name for alias in node.names} & MODULES
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            seen.add(node.module)
        elif isinstance(node, ast.Call):
            seen |= {names(node.func)} & CALLS
            seen |= {node.func.attr} & METHODS if isinstance(node.func, ast.Attribute) else set()
    return seen


def test_nothing_else_opens_files():
    sources = {p: p.read_text() for p in PACKAGE.rglob("*.py") if GATES not in p.parents}
    strays = {(str(p.relative_to(PACKAGE)), what) for p, text in sources.items() for what in found(text)}
    strays = {s for s in strays if not s[0].startswith("kernels/")}
    assert strays == set(ALLOWED)


@pytest.mark.parametrize(
    "line", ["import zipfile", "from gzip import open", "np.load('x')", "f = open('x', 'w')", "path.write_text('')",
             "with Image.open(p) as x: pass", "torch.load(p)", "yaml.safe_load(t)", "safe_open(p, 'pt')"]
)  # fmt: skip
def test_a_stray_is_seen(line):
    assert found(line)

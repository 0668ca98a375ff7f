"""The rooms of the house: who may import whom, no circle anywhere, few modules on the top shelf; every public name."""

import importlib
import subprocess
from pathlib import Path

import grimp
import networkx as nx
import pytest

import sgm_engine

ROOT = Path(__file__).parents[1]
# Each floor imports only from floors below it, and from its own by files that form no circle.
FLOORS = (
    "errors pace files whereabouts lazy numerics kernels plans outputs programs",
    "checks keys models",
    "data checkpoints",
    "rewriting",
    "executors",
    "engine",
    "evaluation training service jobs integrations",
    "cdm tuning",
    "cli",
    "__main__ images likelihood plan samplers schedule",  # another name of a module below: nobody here imports them
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}
PACKAGE = "sgm_engine"
OF_THE_ROOT = ("from sgm_engine import _C", "import sgm_engine")  # the extension, and the version


def room(module: str) -> str:
    return module.split(".")[1]


@pytest.fixture(scope="module")
def imports():
    """Every file of the package → every file that it imports, inside functions and for types alone too."""
    graph = grimp.build_graph(PACKAGE, exclude_type_checking_imports=False, cache_dir=None)
    files = [m for m in graph.modules if "." in m and room(m) in FLOOR]  # a source tree shows its other folders too
    found = nx.DiGraph()
    found.add_nodes_from(files)
    for module in files:
        for imported in graph.find_modules_directly_imported_by(module):
            if imported == PACKAGE:
                for detail in graph.get_import_details(importer=module, imported=imported):
                    assert detail["line_contents"] in OF_THE_ROOT, detail
            else:
                found.add_edge(module, imported)
    return found


def test_every_room_has_a_floor(imports):
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", PACKAGE], capture_output=True, text=True, check=True).stdout
    parts = {Path(name).parts[1].removesuffix(".py") for name in listed.split() if name.endswith(".py")}
    assert parts - {"__init__"} == set(FLOOR) - {"kernels"}
    assert set(FLOOR) == {room(module) for module in imports}


def test_imports_go_one_way(imports):
    upwards = [(a, b) for a, b in imports.edges if FLOOR[room(a)] < FLOOR[room(b)]]
    assert not upwards


def test_no_circle_between_files_or_rooms(imports):
    assert [c for c in nx.strongly_connected_components(imports) if len(c) > 1] == []
    rooms = nx.DiGraph((room(a), room(b)) for a, b in imports.edges if room(a) != room(b))
    assert [c for c in nx.strongly_connected_components(rooms) if len(c) > 1] == []
    assert nx.dag_longest_path_length(rooms) + 1 <= 12


def test_nobody_imports_a_command_or_another_name(imports):
    last = len(FLOORS) - 1
    assert [(a, b) for a, b in imports.edges if FLOOR[room(b)] == last] == []
    commands = {f"{PACKAGE}.cli.{name}" for name in ("sample", "convert", "doctor", "plans", "train", "eval", "tune")}
    assert {a for a, b in imports.edges if b in commands} == {f"{PACKAGE}.cli.main"}
    assert {a for a, b in imports.edges if b == f"{PACKAGE}.cli.main"} == {f"{PACKAGE}.__main__"}


def test_the_top_shelf_is_short():
    assert len([*(ROOT / PACKAGE).glob("*.py")]) <= 14


def test_no_file_is_long():
    listed = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True, check=True).stdout.split()
    files = [ROOT / name for name in listed if Path(name).suffix in (".py", ".cpp", ".cu", ".h", ".cuh")]
    lines = {file: len(file.read_text().splitlines()) for file in files if file.exists()}
    assert {str(file.relative_to(ROOT)): n for file, n in lines.items() if n > 300} == {}


DOCUMENTED = """
    cdm cdm.ablation cdm.report engine evaluation.evaluate images integrations integrations.azula integrations.deepinv
    integrations.diffusers integrations.edm integrations.k_diffusion jobs jobs.job kernels.ops kernels.reference
    likelihood models models.ncsn plan samplers schedule service training training.advice training.callbacks
    training.compare training.data training.keys training.module training.objectives training.toy training.vincent
"""


@pytest.mark.parametrize("path", DOCUMENTED.split())
def test_documented_modules_import(path):
    if path.startswith("training."):
        pytest.importorskip("lightning", reason="pip install 'sgm-engine[train]'")
    if path == "integrations.diffusers":
        pytest.importorskip("diffusers", reason="pip install 'sgm-engine[integrations]'")
    module = importlib.import_module(f"{PACKAGE}.{path}")
    doors = [name for name in getattr(module, "__all__", ()) if not hasattr(module, name)]
    assert doors == []


@pytest.mark.parametrize("name", sgm_engine.__all__)
def test_every_public_name_is_there(name):
    assert getattr(sgm_engine, name).__name__ == name
    assert name in dir(sgm_engine)


def test_another_name_is_the_same_module():
    from sgm_engine import plan, plans
    from sgm_engine.training import data

    assert plan is importlib.import_module("sgm_engine.plans.plan") and plan.Plan is plans.Plan
    assert data is importlib.import_module("sgm_engine.data.images")


def test_names_that_are_not_there():
    with pytest.raises(AttributeError, match="module 'sgm_engine' has no attribute 'Motor'"):
        _ = sgm_engine.Motor
    with pytest.raises(ImportError, match="Motor"):
        from sgm_engine.engine import Motor  # noqa: F401

"""Imports go one way: a module may import only from rooms below its own."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "edge_moe": ROOT / "edge_moe",
    "edge_moe_export": ROOT / "export" / "edge_moe_export",
    "edge_moe_quant": ROOT / "quant" / "edge_moe_quant",
}
# From low to high; the rooms of one line do not import each other. A folder is one room.
ROOMS = [
    ["errors"],
    ["config", "files", "formats"],
    ["gguf", "kernels", "safetensors"],
    ["weights", "saved_logits"],
    ["metadata"],
    ["checkpoint"],
    ["token_cache"],
    ["direct_io", "eviction", "lookahead", "resident_pages"],
    ["slice_reader"],
    ["expert_store"],
    ["latent_cache", "kv_cache", "onnx_folder"],
    ["backends"],
    ["models"],
    ["sampling", "chat", "generate", "pretokenizers"],
    ["vocabulary"],
    ["encoders"],
    ["tokenizer"],
    ["memory_plan", "routes"],
    ["api"],
    ["divergence", "plan"],
    ["evaluate"],
    ["cli"],
    ["__main__"],
]
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}


def imports_of(path):
    """(imported module, does loading the file not import it) for each import of our own packages in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner = {id(node) for part in ast.walk(tree) if _waits(part) for node in ast.walk(part)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] in PACKAGES:
                yield name, id(node) in inner


def _waits(node):
    """A function, or what only a type checker reads."""
    types_only = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return types_only or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def room_of(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "edge_moe" and parts[1] in RANK else None


@pytest.mark.parametrize("path", sorted(PACKAGES["edge_moe"].rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_runtime_imports_point_down(path):
    own = path.relative_to(PACKAGES["edge_moe"]).with_suffix("").parts[0]
    if own == "__init__":
        return  # the package's front door names what is inside, lazily
    assert own in RANK, f"{own} has no place in ROOMS: give it one"
    for module, later in imports_of(path):
        package = module.split(".")[0]
        if package != "edge_moe":
            assert own == "cli", f"{path} imports {module}: only a CLI subcommand may"
            assert later, f"{path} imports {module} at its top: do it inside the subcommand"
        room = room_of(module)
        if room and room != own:
            assert RANK[room] < RANK[own], f"{path} imports {module}, which is not below it"


def test_no_two_files_import_each_other():
    """Not even inside one room, and not even inside functions."""
    root = PACKAGES["edge_moe"]
    files = {
        ".".join(("edge_moe", *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in root.rglob("*.py")
    }
    graph = {name: {module for module, _ in imports_of(path)} & (set(files) - {name}) for name, path in files.items()}
    for name in graph:  # importing a module of a folder names the folder, too: that is no arrow
        graph[name] -= {name.rpartition(".")[0], "edge_moe"}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the files


@pytest.mark.parametrize("path", sorted(PACKAGES["edge_moe_export"].rglob("*.py")), ids=lambda p: p.name)
def test_export_does_not_import_quant(path):
    assert not [module for module, _ in imports_of(path) if module.startswith("edge_moe_quant")]


@pytest.mark.parametrize("path", sorted(PACKAGES["edge_moe"].joinpath("kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernels_know_no_models(path):
    """Kernels take arrays and numbers; of the rest they know only what blocks and errors are."""
    rooms = {room_of(module) for module, _ in imports_of(path)} - {None}
    assert rooms <= {"kernels", "formats", "errors"}


def test_every_file_says_what_it_is_for():
    for folder in PACKAGES.values():
        for path in folder.rglob("*.py"):
            doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
            assert doc, f"{path}: no docstring"
            assert doc.splitlines()[0].endswith("."), f"{path}: its first line is not a sentence"

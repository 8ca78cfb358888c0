"""The house keeps its shape: imports run one way, torch stays in the workshop, names come from where they are made."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "localdepth": ROOT / "localdepth",
    "localdepth_export": ROOT / "export" / "localdepth_export",
    "localdepth_train": ROOT / "export" / "localdepth_train",
    "localdepth_router": ROOT / "router" / "localdepth_router",
    "localdepth_apps": ROOT / "apps" / "localdepth_apps",
}
# Rooms of the runtime from the ground up; a room imports only from rooms below it, or from itself.
RANKS = [
    {"errors"},
    {"config", "console", "memory", "threads"},
    {"backtracking"},
    {"tokenizer_limits"},
    {"slots", "gguf_container", "quant", "sampling", "tokenizer", "chat", "policy", "record"},
    {"gguf", "onnx_folder"},
    {"prompt", "store"},
    {"engine"},
    {"loop"},
    {"prefix"},
    {"generate"},
    {"batch"},
    {"model"},
    {"loading", "conversation"},
    {"__init__", "doctor"},
    {"cli"},
    {"__main__"},
]
TRAIN_MAY = {"errors", "config", "memory", "slots", "policy", "tokenizer", "engine.base", "engine.eager"}


def modules() -> Iterator[tuple[str, Path]]:
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join([package, *parts]).removesuffix(".__init__"), path


MODULES = dict(modules())


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of every import in a file, those inside functions too; name is empty for ``import module``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from ((node.module or "", alias.name) for alias in node.names)


def targets(path: Path) -> Iterator[str]:
    """Modules of ours that a file imports; ``from package import module`` counts as that module."""
    for module, name in imports(path):
        whole = f"{module}.{name}"
        if whole in MODULES:
            yield whole
        elif module in MODULES:
            yield module


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def rank(module: str) -> int:
    return next(i for i, names in enumerate(RANKS) if room(module) in names)


@pytest.mark.parametrize("name", [name for name in MODULES if name.split(".")[0] == "localdepth"])
def test_runtime_imports_run_one_way(name: str) -> None:
    for target in targets(MODULES[name]):
        if target.split(".")[0] == "localdepth" and room(target) != room(name):
            assert rank(target) < rank(name), f"{name} imports {target}"


@pytest.mark.parametrize("name", [name for name in MODULES if name.split(".")[0] == "localdepth"])
def test_runtime_names_neither_torch_nor_transformers(name: str) -> None:
    assert not {module.split(".")[0] for module, _ in imports(MODULES[name])} & {"torch", "transformers"}


@pytest.mark.parametrize("name", list(MODULES))
def test_only_the_command_line_reaches_every_package(name: str) -> None:
    package = name.split(".")[0]
    allowed = {
        "localdepth": {"localdepth"},
        "localdepth_train": {"localdepth", "localdepth_train"},
        "localdepth_export": {"localdepth", "localdepth_train", "localdepth_export"},
        "localdepth_router": {"localdepth", "localdepth_router"},
        "localdepth_apps": {"localdepth", "localdepth_apps"},
    }[package]
    reached = {target.split(".")[0] for target in targets(MODULES[name])}
    assert name.startswith("localdepth.cli") or reached <= allowed


def test_training_uses_only_the_foundations_of_the_runtime() -> None:
    for name, path in MODULES.items():
        if name.startswith("localdepth_train"):
            used = {t.removeprefix("localdepth.") for t in targets(path) if t.startswith("localdepth.")}
            assert {u for u in used if u.split(".")[0] not in TRAIN_MAY and u not in TRAIN_MAY} == set(), name


def test_export_sees_the_reference_only_in_verify() -> None:
    for name, path in MODULES.items():
        if name.startswith("localdepth_export"):
            trained = {target for target in targets(path) if target.startswith("localdepth_train")}
            extra = trained - {
                "localdepth_train.checkpoint",
                "localdepth_train.output",
                "localdepth_train.checkpoint.special_tokens",
            }
            assert extra <= ({"localdepth_train.reference_engine"} if name.endswith(".verification") else set()), name


@pytest.mark.parametrize("name", list(MODULES))
def test_names_come_from_the_module_that_defines_them(name: str) -> None:
    for module, imported in imports(MODULES[name]):
        if module in PACKAGES and imported:
            assert f"{module}.{imported}" in MODULES, f"{name} takes {imported} from the package {module}"
        assert not (module in MODULES and imported.startswith("_")), f"{name} takes the private {module}.{imported}"


def test_there_are_no_import_cycles() -> None:
    # a package's own module only hands on what its modules define
    graph = {name: set(targets(path)) - {name, *PACKAGES} for name, path in MODULES.items() if name not in PACKAGES}
    TopologicalSorter(graph).prepare()


def test_checkpoints_tasks_export_and_router_import_without_torch() -> None:
    program = (
        "import sys, localdepth_export, localdepth_router, localdepth_train.checkpoint, localdepth_train.tasks\n"
        "import localdepth_train.surgery\n"
        "import localdepth_export.convert, localdepth_apps.curve, localdepth_apps.text_curve\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith(".__main__")])
def test_exported_names_exist(name: str) -> None:
    tree = ast.parse(MODULES[name].read_text())
    assert ast.get_docstring(tree), f"{name} has no docstring"
    listed = [n for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"]
    if not listed:
        assert name in PACKAGES or MODULES[name].name == "__init__.py", f"{name} has no __all__"
        return
    exported = ast.literal_eval(listed[0].value)
    defined = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    defined |= {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
    defined |= {a.name for n in tree.body if isinstance(n, ast.If) for i in n.body for a in getattr(i, "names", [])}
    defined |= {n.target.id for n in tree.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    if MODULES[name].name == "__init__.py":
        defined |= {imported for _, imported in imports(MODULES[name])}
    for n in tree.body:
        if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Tuple):
            defined |= {element.id for element in n.targets[0].elts if isinstance(element, ast.Name)}
    assert set(exported) <= defined, f"{name} exports what it does not define"

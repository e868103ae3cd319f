"""The house rules that a machine can check: imports, one door per framework, sizes."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import UnionType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

# Imports point from later lines to earlier ones; names of one line never import one another.
LEVELS = [
    ("types",),
    ("plugins",),
    ("failures",),
    ("processes",),
    ("config",),
    ("storage",),
    ("models",),
    ("engine_kind",),
    ("layout",),
    ("run_dir",),
    ("doctor",),
    # above: torch-free, and all that jobs/ sees
    ("batch", "process_groups", "sealed_bucket", "shared_bytes", "tensor_storage"),
    ("algorithms", "tracking"),
    ("rollout", "training", "weight_sync", "rehearsal"),
    ("orchestration",),
    ("train", "evaluate"),
]
TORCH_FREE = {room for level in LEVELS[: LEVELS.index(("doctor",)) + 1] for room in level}
LEVEL_OF = {room: i for i, level in enumerate(LEVELS) for room in level}
DOORS = {  # the only places that may import these
    "ray": ("nanoslime/orchestration/ray/",),
    "megatron": ("nanoslime/training/megatron/", "tools/conversion/gpt_logits.py"),
    "sglang": (
        "nanoslime/rollout/sglang_plugin.py",
        "nanoslime/rollout/sglang_stubs/",
        "nanoslime/weight_sync/colocated.py",
    ),
}
HEAVY = ("torch", "transformers", "ray", "megatron", "sglang")
MAX_FILE = 500
MAX_FUNCTION = 100
MAX_ALL = 19_750  # lines of code; the design wants 20,000
MAX_UNFORMATTED = 10
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


CODE = sources("nanoslime", "jobs", "tools")
NAMES = {path: str(path.relative_to(ROOT)) for path in CODE}


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room(module: str) -> str:
    """The room of a module: `config` of nanoslime.config.load, `jobs` of jobs.node."""
    parts = module.split(".")
    return parts[1] if parts[0] == "nanoslime" and len(parts) > 1 else parts[0]


def imports(path: Path, *, typing_too: bool = True) -> Iterator[tuple[int, str]]:
    """Yields (line, module) of every import at any depth.

    `from a import b` counts as a.b where that is a module. typing_too: also under TYPE_CHECKING.
    """
    skipped = set() if typing_too else set(typing_only(path))
    for node in ast.walk(parse(path)):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{NAMES[path]}:{node.lineno}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield node.lineno, full if is_module(full) else str(node.module)


def typing_only(path: Path) -> Iterator[ast.AST]:
    """All nodes under an `if TYPE_CHECKING:`."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from ast.walk(node)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def test_every_room_has_a_level():
    rooms = {path.relative_to(ROOT / "nanoslime").parts[0] for path in sources("nanoslime")}
    assert {room.removesuffix(".py") for room in rooms} - {"__init__"} <= set(LEVEL_OF)


def test_imports_point_downwards_only():
    wrong = []
    for path in CODE:
        here = room(module_name(path))
        for line, module in imports(path):
            there = room(module)
            if module.split(".")[0] not in ("nanoslime", "jobs", "tools") or there == here:
                continue
            if here == "jobs":
                allowed = there in TORCH_FREE
            elif here == "tools":
                allowed = True
            else:
                allowed = LEVEL_OF.get(there, 99) < LEVEL_OF.get(here, -1)
            if not allowed:
                wrong.append(f"{NAMES[path]}:{line} imports {module}")
    assert not wrong


def test_no_modules_import_one_another_in_a_circle():
    graph = {
        module_name(p): {m for _, m in imports(p, typing_too=False) if is_module(m)} for p in CODE
    }
    try:
        TopologicalSorter({name: needs - {name} for name, needs in graph.items()}).prepare()
    except CycleError as e:
        pytest.fail(f"import circle: {' -> '.join(e.args[1])}")


@pytest.mark.parametrize("framework", DOORS)
def test_a_framework_has_one_door(framework):
    tops = [(p, line, m) for p in CODE for line, m in imports(p) if m.split(".")[0] == framework]
    assert not [
        f"{NAMES[p]}:{line}" for p, line, _ in tops if not NAMES[p].startswith(DOORS[framework])
    ]


def is_torch_free(path: Path) -> bool:
    """Whether it has to run on a login node, or before Ray starts."""
    is_light = NAMES[path].startswith(("tools/submit/", "tools/preflight/", "tools/memory/"))
    return is_light or room(module_name(path)) in TORCH_FREE | {"jobs"}


def test_torch_free_rooms_import_nothing_heavy():
    free = [p for p in CODE if is_torch_free(p)]
    assert not [
        f"{NAMES[p]}:{line} {m}" for p in free for line, m in imports(p) if m.split(".")[0] in HEAVY
    ]


def test_torch_free_modules_load_where_torch_transformers_ray_and_megatron_do_not_exist():
    names = [module_name(p) for p in CODE if is_torch_free(p)]
    names = [name for name in names if not name.endswith("__main__")]
    assert {
        "tools.submit.grpo",
        "jobs.requeue",
        "nanoslime.layout",
        "nanoslime.config.load",
    } <= set(names)
    code = f"""
import importlib, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)
sys.meta_path.insert(0, Blocked())
for name in {names!r}:
    importlib.import_module(name)
print("loaded", *sorted(set(sys.modules) & set({HEAVY!r})))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "loaded\n"), done.stderr


def test_modules_are_imported_by_name_in_one_place_only():
    by_name = r"\b(import_module|__import__)\b"
    lazy = [
        NAMES[path]
        for path, node in nodes(ast.Name | ast.Attribute | ast.alias)
        if re.search(by_name, ast.unparse(node))
    ]
    assert set(lazy) == {"nanoslime/plugins.py"}


def test_every_plug_in_string_names_something_that_exists():
    checked = 0
    for path, node in nodes(ast.Constant):
        if not isinstance(node.value, str):
            continue
        match = re.fullmatch(r"((?:nanoslime|jobs|tools)(?:\.\w+)+):(\w+)", node.value)
        if match is None:
            continue
        module, name = match.groups()
        assert is_module(module), f"{place(path, node)}: no module {module}"
        assert name in top_level_names(file_of(module)), f"{place(path, node)}: no {name}"
        checked += 1
    assert checked >= 3


def file_of(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    file = path.with_suffix(".py")
    return file if file.exists() else path / "__init__.py"


def top_level_names(path: Path) -> set[str]:
    names: set[str] = set()
    for node in parse(path).body:
        if isinstance(node, FUNCTION | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def test_the_package_logs_and_does_not_print():
    printing = [
        place(path, call)
        for path, call in nodes(ast.Call)
        if NAMES[path].startswith("nanoslime/") and ast.unparse(call.func) == "print"
    ]
    assert not printing


def test_no_exception_is_caught_without_a_name():
    handlers = nodes(ast.ExceptHandler)
    assert not [place(path, handler) for path, handler in handlers if handler.type is None]


def test_files_are_short():
    assert not [f"{NAMES[path]} {num_lines(path)}" for path in CODE if num_lines(path) > MAX_FILE]


def test_functions_are_short():
    long = []
    for path, function in nodes(FUNCTION):
        size = function.end_lineno - function.lineno + 1
        if size > MAX_FUNCTION:
            long.append(f"{place(path, function)} {function.name} {size}")
    assert not long


def test_the_whole_stays_small():
    """The suite itself is counted, and what explains it costs nothing: neither comments and
    docstrings nor the programs in tools/ are in it.
    """
    written = sum(num_code_lines(path) for path in sources("nanoslime", "jobs"))
    assert written < MAX_ALL


def test_the_formatter_decides_line_breaks():
    """Only a table that is read as a table may be excepted; `ruff format` holds the rest."""
    excepted = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in [*CODE, *sources("tests")]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(r"# fmt: (skip|off)", line) and path != Path(__file__)
    ]
    assert len(excepted) <= MAX_UNFORMATTED, excepted


def nodes(kind: type | UnionType) -> Iterator[tuple[Path, Any]]:
    """Yields every syntax node of a kind in the code, with its file."""
    for path in CODE:
        for node in ast.walk(parse(path)):
            if isinstance(node, kind):
                yield path, node


def place(path: Path, node: ast.expr | ast.stmt | ast.excepthandler) -> str:
    return f"{NAMES[path]}:{node.lineno}"


def num_lines(path: Path) -> int:
    return path.read_text(encoding="utf-8").count("\n")


def num_code_lines(path: Path) -> int:
    """The lines that are neither blank nor part of a comment or a docstring, be it of a field."""
    text = path.read_text(encoding="utf-8")
    explained = set()
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Expr(ast.Constant(str())):
                explained.update(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(
        number not in explained and bool(line.strip()) and not line.strip().startswith("#")
        for number, line in lines
    )

"""The direction of imports, held by parsing import statements: what stands left knows nothing of what stands right."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "almost_jax"

# Left to right. A file may import its own rank and the ranks before it; parts that share a rank (sampling and io, which
# only io's models and the micro-world's data stand beside) are kept apart by APART.
RANKS = {
    "config": 0,
    "errors": 0,
    "core": 1,
    "sampling": 2,
    "io": 2,
    "microworld": 2,
    "stages": 3,
    "evaluation": 4,
    "report": 5,
    "experiments": 6,
    "folder": 6,
    "inputs": 6,
    "pipeline": 7,
    "plan": 7,
    "commands": 8,
    "cli": 8,
    "__main__": 9,
}
APART = {("sampling", "io"), ("io", "sampling"), ("sampling", "microworld"), ("io", "microworld"), ("config", "errors")}
# The package's own __init__ holds the version and imports nothing.
ROOT = "almost_jax"
# The method must not see the gold score; the evaluation and the tools that build the micro-world do.
GOLD = "almost_jax.microworld.gold"
BLIND = ("config", "errors", "core", "sampling", "io", "stages", "experiments", "inputs", "folder")
# The tools that build the micro-world pretrain models and grade answers: they may use io, core and the gold score.
TOOLS = {"almost_jax.microworld.build", "almost_jax.microworld.pretrain", "almost_jax.microworld.answers"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(source: str, module: str, modules: dict[str, Path]) -> Iterator[str]:
    """Our modules that a source imports, anywhere in it: at its top, in functions, for type checkers only."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide the direction"
            names = [name for alias in node.names for name in (f"{node.module}.{alias.name}", str(node.module))]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            raise AssertionError(f"{module}: imports by a computed name hide the direction")
        else:
            continue
        for name in names:
            if name in modules:
                yield name


def part(module: str) -> str:
    return module.split(".")[1] if "." in module else ROOT


GRAPH = {
    name: sorted(set(imported(path.read_text(encoding="utf-8"), name, MODULES)) - {ROOT, name})
    for name, path in MODULES.items()
}


def reachable(start: str) -> dict[str, str]:
    """Every module that importing `start` brings in, and by which module it came; packages bring their __init__."""
    came_from = {start: ""}
    waiting = [start]
    while waiting:
        module = waiting.pop()
        for name in GRAPH[module]:
            parents = [name.rsplit(".", n)[0] for n in range(1, name.count("."))]
            for found in (name, *parents):
                if found not in came_from:
                    came_from[found] = module
                    waiting.append(found)
    return came_from


def test_every_file_has_a_rank() -> None:
    assert {part(module) for module in MODULES} - {ROOT} <= set(RANKS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_left(module: str) -> None:
    for name in GRAPH[module]:
        here, there = part(module), part(name)
        if module == ROOT:
            pytest.fail(f"the package's __init__ imports {name}")
        assert RANKS[there] <= RANKS[here], f"{module} imports {name}, which stands to its right"
        if module not in TOOLS:
            assert (here, there) not in APART, f"{module} imports {name}: {here} and {there} stand side by side"


@pytest.mark.parametrize("module", [module for module in MODULES if part(module) in BLIND])
def test_the_method_never_reaches_the_gold_score(module: str) -> None:
    came_from = reachable(module)
    trail = [GOLD]
    while trail[-1] in came_from and came_from[trail[-1]]:
        trail.append(came_from[trail[-1]])
    assert GOLD not in came_from, " <- ".join(trail)


def test_the_gold_score_is_found_where_it_is_used() -> None:
    # Otherwise the test above could pass for want of a module of that name.
    assert GOLD in MODULES
    assert GOLD in reachable("almost_jax.evaluation.gold")


def test_only_the_evaluation_and_the_micro_worlds_tools_import_the_gold_score() -> None:
    users = {module for module, names in GRAPH.items() if GOLD in names}
    assert {part(module) for module in users} <= {"evaluation", "microworld"}
    assert {module for module in users if part(module) == "microworld"} <= TOOLS


@pytest.mark.parametrize(
    "source",
    [
        "import almost_jax.microworld.gold",
        "from almost_jax.microworld import gold",
        "from almost_jax.microworld.gold import gold_score",
        "def f():\n    from almost_jax.microworld import world, gold as g\n",
        "if TYPE_CHECKING:\n    import almost_jax.microworld.gold as g\n",
    ],
)
def test_every_way_of_importing_is_seen(source: str) -> None:
    assert GOLD in set(imported(source, "probe", MODULES))


@pytest.mark.parametrize("source", ["from . import gold", "import importlib\nimportlib.import_module('x')"])
def test_ways_that_hide_are_refused(source: str) -> None:
    with pytest.raises(AssertionError):
        list(imported(source, "probe", MODULES))

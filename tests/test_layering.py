"""Imports run one way, packages import nothing, and torch stays out of the package."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "mpd_jax"

# A module imports only from lower layers, or from its own layer inside its own folder.
LAYERS = [
    {"types", "arguments"},
    {"hosts"},
    {"files"},
    {"trees"},
    {"lock", "named"},
    {
        "sharding",
        "recipe.loss",
        "recipe.fused",
        "recipe.weights",
        "sampling.sampler",
        "eval.grade",
        "eval.grade_worker",
        "eval.workers",
    },
    {"models"},
    {"data", "sampling", "train.state"},
    {"recipe.write", "recipe.keep", "recipe.rewrite", "recipe.target"},
    {
        "recipe.recipe",
        "train.step",
        "train.checkpoint",
        "train.metrics",
        "train.records",
        "train.making",
        "train.trackers",
        "train.ahead",
    },
    {"eval.statistics", "eval.samples", "eval.figures", "eval.tables", "eval.evaluate", "eval.intervals", "eval.plot"}
    | {"train.loop", "train.guards", "train.curriculum"},
    {"config"},
    {"screen", "beside"},
    {"roles"},
    {"samplers", "serving"},
    {"rollouts"},
    {"batches"},
    {"scoring"},
    {"build"},
    {"plan"},
    {"doctor"},
    {"run"},
    {"use"},
    {
        "offline",
        "dedup",
        "report",
        "eval.command",
        "eval.instructions",
        "eval.arms",
        "eval.comparison",
        "eval.pareto",
        "eval.compare",
    },
    {"bench"},
    {"cli"},
    {"__main__"},
]


def modules() -> dict[str, Path]:
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        names[name] = path
    return names


def layer(name: str) -> int:
    for candidate in (name, name.split(".")[0]):
        for number, members in enumerate(LAYERS):
            if candidate in members:
                return number
    raise AssertionError(f"{name} stands in no layer; add it to LAYERS and to the design")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            raise AssertionError(f"{path}: relative import")
    return found


def test_imports_run_one_way():
    known = modules()
    for name, path in known.items():
        if name.endswith("__init__") or name.startswith("tiny_world"):
            continue
        for target in imports(path):
            inner = target.removeprefix("mpd_jax.")
            if not target.startswith("mpd_jax.") or inner not in known:
                continue
            if inner.startswith("tiny_world"):
                assert name in ("build", "run", "cli"), f"{name} reaches tiny_world; only build, run and cli may"
                continue
            same_folder = name.split(".")[0] == inner.split(".")[0] and "." in name
            assert layer(inner) < layer(name) or (layer(inner) == layer(name) and same_folder), (
                f"{name} (layer {layer(name)}) imports {inner} (layer {layer(inner)})"
            )


def test_package_init_files_import_nothing():
    for name, path in modules().items():
        if name.endswith("__init__"):
            assert not imports(path), f"{name} imports {imports(path)}"


def test_torch_and_model_classes_of_transformers_stay_under_tests():
    for name, path in modules().items():
        if name == "bench.sample":  # compares with transformers' own generate; imports it inside the bench only
            continue
        for target in imports(path):
            assert target.split(".")[0] not in ("torch", "vllm", "tensorflow"), f"{name} imports {target}"
            if target.startswith("transformers."):
                assert target == "transformers.AutoTokenizer", f"{name} imports {target}"


def test_only_the_command_line_reads_the_environment():
    for name, path in modules().items():
        if name != "cli":
            text = path.read_text()
            assert "os.environ" not in text and "getenv" not in text, f"{name} reads the environment"

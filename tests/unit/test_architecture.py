"""Imports point one way: cli -> lopd_train -> lopd_store, and inside the store from the Hub down to the leaves."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"lopd_store": ROOT / "lopd_store", "lopd_train": ROOT / "lopd_train", "lopd_cli": ROOT / "cli"}
EMBEDDED = ["teachers.transformers", "teachers.tensor_parallel"]
ENGINES = ["teachers", "teachers.flat", "teachers.union", *EMBEDDED, "teachers.vllm", "teachers.http"]
EXPORTS = ["interop.target", "interop.trl", "interop.lightning_opd", "interop.distillkit", "interop.axolotl"]
SAMPLERS = ["samplers", "samplers.transformers", "samplers.vllm"]
# A module imports only what stands before it, wherever in the file the import is: DESIGN.md, section 3.
LAYERS = [
    (
        "leaves",
        ["errors", "strictjson", "digest", "durable", "layout", "compiled", "lookup", "pco", "journal", "processes"],
    ),
    ("remote", ["hub", "cache", "sources"]),
    ("models", ["models", "license", "weights", "identity", "provenance"]),
    ("values", ["grid", "topk", "encoding", "statistic", "manifest", "gate", "view", "remembered"]),
    ("files", ["signatures", "container", "table", "part", "plots", "checks", "contents"]),
    ("beside", ["rollouts", "prompts", "listing", "card"]),
    ("making", [*ENGINES, "noise", *SAMPLERS, "sampler", "audit", "differences"]),
    ("scoring", ["survey", "plan", "scoring", "building", "remote", "handout", "cluster", "workers"]),
    ("records", ["lineage", "declare"]),
    ("judging", ["reader", "rescore", "verifier"]),
    ("artifacts", ["builder", "forecast", "subset", "combining", "catalog", "download", "upload", "columns"]),
    ("interop", [*EXPORTS, "interop"]),
    ("door", ["__init__"]),
]
ORDER = [module for _, modules in LAYERS for module in modules]
SOURCES = sorted((package, path) for package, folder in PACKAGES.items() for path in folder.rglob("*.py"))


def module_of(path: Path, folder: Path) -> str:
    """`teachers.transformers` for lopd_store/teachers/transformers.py, `teachers` for its `__init__`."""
    parts = path.relative_to(folder).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports_of(package: str, path: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or inside a function, as a dotted name."""
    folder = PACKAGES[package]
    here = [package, *path.relative_to(folder).with_suffix("").parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*(here[: -node.level] if node.level else []), *([node.module] if node.module else [])])
            for alias in node.names:
                is_module = (ROOT / base.replace(".", "/") / f"{alias.name}.py").is_file()
                yield f"{base}.{alias.name}" if is_module else base


@pytest.mark.parametrize(("package", "path"), SOURCES, ids=[str(path.relative_to(ROOT)) for _, path in SOURCES])
def test_a_package_imports_none_above_it(package: str, path: Path) -> None:
    above = list(PACKAGES)[list(PACKAGES).index(package) + 1 :]
    assert [name for name in imports_of(package, path) if name.partition(".")[0] in [*above, "cli", "tests"]] == []


def test_every_module_of_the_store_has_its_place() -> None:
    assert sorted(ORDER) == sorted(module_of(path, PACKAGES["lopd_store"]) for p, path in SOURCES if p == "lopd_store")


@pytest.mark.parametrize("module", ORDER)
def test_a_module_of_the_store_imports_only_what_stands_before_it(module: str) -> None:
    (path,) = (path for p, path in SOURCES if p == "lopd_store" and module_of(path, PACKAGES[p]) == module)
    imported = {name.removeprefix("lopd_store.") for name in imports_of("lopd_store", path) if "lopd_store" in name}
    # A package's door may open onto the modules behind it.
    allowed = {*ORDER[: ORDER.index(module)], *(other for other in ORDER if other.startswith(f"{module}."))}
    assert imported - allowed == set()


@pytest.mark.parametrize(
    "heavy", ["torch", "transformers", "typer", "huggingface_hub", "vllm", "ray", "cryptography", "matplotlib"]
)
def test_only_what_runs_models_or_the_hub_imports_heavy_libraries_at_its_top(heavy: str) -> None:
    runs_models = {"samplers.transformers", *EMBEDDED}
    importing = set()
    for module in set(ORDER) - runs_models:
        (path,) = (path for p, path in SOURCES if p == "lopd_store" and module_of(path, PACKAGES[p]) == module)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            importing |= {module for name in names if name.partition(".")[0] == heavy}
    assert importing == set()


def test_every_package_is_installed() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        ".".join((package, *path.parent.relative_to(PACKAGES[package]).parts))
        for package, path in SOURCES
        if path.name == "__init__.py"
    }
    assert set(tools["packages"]) == found


def test_every_file_that_a_package_reads_is_installed() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    listed = {
        path
        for package, patterns in tools["package-data"].items()
        for pattern in patterns
        for path in PACKAGES[package].glob(pattern)
    }
    beside = {path for folder in PACKAGES.values() for path in folder.rglob("*") if path.is_file()}
    assert {path for path in beside - listed if path.suffix != ".py" and "__pycache__" not in path.parts} == set()


def test_the_trainer_stays_small() -> None:
    lines = [line.strip() for path in PACKAGES["lopd_train"].glob("*.py") for line in path.read_text().splitlines()]
    assert sum(bool(line) and not line.startswith("#") for line in lines) < 1800


def test_importing_the_store_loads_no_heavy_library() -> None:
    heavy = [
        "torch",
        "transformers",
        "typer",
        "huggingface_hub",
        "vllm",
        "rich",
        "cryptography",
        "matplotlib",
        "lopd_train",
        "lopd_cli",
    ]
    code = f"import sys, lopd_store; print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("", "")


@pytest.mark.parametrize(("package", "path"), SOURCES, ids=[str(path.relative_to(ROOT)) for _, path in SOURCES])
def test_only_the_console_prints(package: str, path: Path) -> None:
    calls = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not calls or path == PACKAGES["lopd_cli"] / "console.py"

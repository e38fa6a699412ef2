"""The rooms of the house: who imports whom, what is loaded when, what is public."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gguf3n
from tests import micro

PACKAGE = Path(gguf3n.__file__).parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))

BELOW: dict[str, set[str]] = {
    "outside": set(),
    "errors": {"outside"},
    "dates": {"errors"},
    "progress": set(),
    "workers": {"errors"},
    "regexes": set(),
    "formats": {"errors", "outside"},
    "quants": {"errors", "formats"},
    "recipes": {"errors", "formats", "regexes"},
    "gemma3n": {"errors", "formats", "regexes"},
    "plots": {"errors", "formats"},
    "inspection": {"errors", "formats", "gemma3n", "progress", "recipes", "workers"},
    "deciding": {"formats", "gemma3n", "recipes"},
    "choosing": {"deciding", "gemma3n", "recipes"},
    "planning": {"deciding", "errors", "formats", "gemma3n", "inspection", "recipes"},
    "pipeline": {"errors", "formats", "planning", "progress", "quants", "workers"},
    "slicing": {"deciding", "errors", "formats", "gemma3n", "planning", "progress", "recipes"},
    "conversion": {"errors", "formats", "gemma3n", "pipeline", "planning", "progress", "recipes", "slicing", "workers"},
    "adapter_file": {"conversion", "errors", "gemma3n", "planning", "progress", "recipes"},
    "engines": {"errors", "formats", "gemma3n", "inspection", "outside", "progress", "recipes", "workers"},
    "validation": {
        "errors", "formats", "gemma3n", "recipes", "quants", "pipeline", "conversion", "inspection", "engines",
        "dates", "outside", "plots", "progress", "workers",
    },
    "publishing": {
        "errors", "formats", "gemma3n", "recipes", "planning", "pipeline", "conversion", "inspection", "engines",
        "plots", "regexes", "validation", "dates", "outside", "progress", "workers", "",
    },
    "schemas": {"inspection", "publishing", "recipes", "tuning", "validation"},
    "tuning": {
        "errors", "formats", "gemma3n", "recipes", "quants", "planning", "conversion", "engines", "progress",
        "validation", "workers",
    },
    "cli": {
        "adapter_file", "choosing", "deciding", "errors", "formats", "gemma3n", "recipes", "planning", "conversion",
        "inspection", "engines", "plots", "slicing", "publishing", "tuning", "validation", "outside", "progress",
        "workers", "",
    },
    "__main__": {"cli", ""},
    "": {
        "conversion", "errors", "formats", "gemma3n", "planning", "progress", "quants", "recipes", "inspection",
        "adapter_file", "engines", "slicing", "publishing", "tuning", "validation",
    },
}  # fmt: skip
"""Room -> the rooms it may import; "" is the package itself."""

ONLY_IN = {
    "numba": "quants",
    "llvmlite": "quants",
    "torch": "engines",
    "transformers": "engines",
    "xllamacpp": "engines",
    "psutil": "engines",
    "matplotlib": "plots",
    "typer": "cli",
    "rich": "cli",
    "sentencepiece": "gemma3n",
    "huggingface_hub": "formats",
    "distributed": "publishing",
}
"""Third-party package -> the one room that may import it."""

NEVER_AT_THE_TOP = (
    "torch", "transformers", "xllamacpp", "psutil", "matplotlib", "sentencepiece", "huggingface_hub", "rich",
    "distributed",
)  # fmt: skip


def room(path: Path) -> str:
    """`formats` for gguf3n/formats/x.py, `planning` for gguf3n/planning.py, "" for gguf3n/__init__.py."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imports(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Every imported module, and whether the import is carried out when the module is."""
    inside = {id(child) for node in ast.walk(tree) if is_deferred(node) for child in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) not in inside
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, "relative import"
            for alias in node.names:
                name = f"gguf3n.{alias.name}" if node.module == "gguf3n" else node.module
                yield name, id(node) not in inside


def is_deferred(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


every_module = pytest.mark.parametrize("path", MODULES, ids=[path.relative_to(PACKAGE).as_posix() for path in MODULES])


@every_module
def test_imports_point_down(path: Path) -> None:
    here = room(path)
    assert here in BELOW, f"{here}: say in BELOW what this room may import"
    for name, _ in imports(ast.parse(path.read_text("utf-8"))):
        package, _, rest = name.partition(".")
        there = rest.partition(".")[0]
        if package == "gguf3n" and there != here:
            assert there in BELOW[here], f"{here} imports {name}"


@every_module
def test_heavy_packages_stay_in_their_rooms(path: Path) -> None:
    for name, at_the_top in imports(ast.parse(path.read_text("utf-8"))):
        package = name.partition(".")[0]
        assert ONLY_IN.get(package, room(path)) == room(path), f"{room(path)} imports {name}"
        assert not (at_the_top and package in NEVER_AT_THE_TOP), f"{name} is imported at the top of the module"


@every_module
def test_every_module_says_what_it_is(path: Path) -> None:
    source = path.read_text("utf-8")
    assert not source.strip() or ast.get_docstring(ast.parse(source))


def test_public_names() -> None:
    assert gguf3n.__all__ == sorted(gguf3n.__all__)
    assert set(gguf3n._HOMES) == set(gguf3n.__all__)
    for name in gguf3n.__all__:
        value = getattr(gguf3n, name)
        assert value.__name__ == name
        assert value.__module__.startswith("gguf3n.")
        assert value.__doc__ and not value.__doc__.startswith(f"{name}("), f"{name} has no docstring of its own"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = gguf3n.no_such_name


def test_every_public_name_is_known_to_type_checkers() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))
    block = next(node for node in tree.body if is_deferred(node))
    found = {
        alias.name: node.module for node in ast.walk(block) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert found == {name: f"gguf3n.{home}" for name, home in gguf3n._HOMES.items()}


def test_every_error_has_its_own_exit_code() -> None:
    errors = importlib.import_module("gguf3n.errors")
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    codes = {error.__name__: error.exit_code for error in classes}
    assert len(set(codes.values())) == len(codes)
    drawn = [line.lstrip(" │├└─").split() for line in errors.__doc__.splitlines()]
    assert {words[0]: int(words[1]) for words in drawn if words and words[0] in codes} == codes


RUN = """
import json, runpy, sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None  # importing it fails
code = 0
try:
    exec(sys.argv[2])
except SystemExit as exit:
    code = exit.code or 0
loaded = [name for name, module in sys.modules.items() if module is not None]
print(json.dumps({"code": code, "loaded": loaded}), file=sys.stderr)
"""

COMMAND = "import gguf3n.cli; sys.argv[1:] = {arguments}; gguf3n.cli.main()"
CONVERTERS = "numba,llvmlite,torch,transformers,xllamacpp,huggingface_hub"


def loaded_by(code: str, without: str) -> set[str]:
    """The modules that are loaded after running code in a fresh interpreter where some packages are missing."""
    process = subprocess.run(
        [sys.executable, "-c", RUN, without, code], capture_output=True, text=True, cwd=PACKAGE.parent, check=False
    )
    result = json.loads(process.stderr.splitlines()[-1])
    assert result["code"] == 0, process.stderr
    return set(result["loaded"])


def test_importing_the_package_loads_nothing_of_it() -> None:
    loaded = loaded_by("import gguf3n", "numpy,gguf,typer")
    assert {name for name in loaded if name.startswith("gguf3n")} == {"gguf3n"}


MAIN = "sys.argv[1:] = {arguments}; runpy.run_module('gguf3n', run_name='__main__')"
CONSOLE = ("cli", "cli.console", "cli.overview", "cli.paint", "errors", "outside")
STARTS = [
    (["--version"], "typer,rich,numpy,gguf,dataclasses", {"gguf3n", "gguf3n.__main__"}),
    (["--help"], "typer,rich,numpy,gguf", {"gguf3n", "gguf3n.__main__", *(f"gguf3n.{name}" for name in CONSOLE)}),
    (["help"], "typer,rich,numpy,gguf", {"gguf3n", "gguf3n.__main__", *(f"gguf3n.{name}" for name in CONSOLE)}),
]


@pytest.mark.parametrize(("arguments", "without", "modules"), STARTS, ids=[words[0] for words, *_ in STARTS])
def test_what_a_word_of_help_loads(arguments: list[str], without: str, modules: set[str]) -> None:
    """Nobody waits for what only a command needs; `scripts/bench_startup.py` says how long it takes."""
    loaded = loaded_by(MAIN.format(arguments=arguments), without)
    assert {name for name in loaded if name.partition(".")[0] == "gguf3n"} == modules - {"gguf3n.__main__"}


def test_what_a_list_of_recipes_loads() -> None:
    """Nothing that plans, inspects, validates or downloads."""
    loaded = loaded_by(MAIN.format(arguments=["recipes", "list"]), f"{CONVERTERS},sentencepiece,rich,matplotlib")
    ours = {name.split(".")[1] for name in loaded if name.startswith("gguf3n.")}
    assert ours == {
        "choosing",
        "cli",
        "deciding",
        "errors",
        "formats",
        "gemma3n",
        "outside",
        "recipes",
        "regexes",
        "validation",
    }
    assert {name for name in loaded if name.startswith("gguf3n.validation.")} == {"gguf3n.validation.result"}


def test_inspect_needs_no_converter(tmp_path: Path) -> None:
    """gguf's own package loads sentencepiece where it is installed; inspect works where it is not."""
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF\x03" + bytes(19))
    code = COMMAND.format(arguments=["inspect", str(path)])
    loaded = loaded_by(code, f"{CONVERTERS},sentencepiece,rich.progress")
    assert "gguf3n.formats.gguf_reader" in loaded
    assert "gguf3n.quants" not in loaded


def test_a_dry_run_needs_no_converter(tmp_path: Path) -> None:
    source = micro.make(tmp_path / "source")
    code = COMMAND.format(arguments=["convert", str(source), "-q", "Q8_0", "--dry-run", "--quiet"])
    loaded = loaded_by(code, CONVERTERS)
    assert "gguf3n.gemma3n.tokenizer" in loaded
    assert "gguf3n.quants" not in loaded

"""Rules of the whole package: layers and their imports, public names, errors, docstrings, fast imports."""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib
import inspect
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import offcut
import offcut.errors

ROOT = Path(inspect.getfile(offcut)).parent
# Layers of the package, the lowest first. A layer may import itself and the layers before it.
LAYERS = ["errors", "exporter", "engines", "runtime", "benchmarks", "cli"]
PUBLIC = {
    "Bundle",
    "Calibration",
    "DeepCacheSDHelper",
    "Extrapolate",
    "OffcutError",
    "Quad",
    "Steps",
    "Tuned",
    "UNet",
    "Uniform",
    "Worker",
    "attach",
    "build",
    "export",
    "find_cuts",
    "load",
    "split",
}


def modules() -> list[Path]:
    """Return the package's source files, without the top ``__init__.py``."""
    files = [ROOT / "errors.py"]
    for layer in LAYERS[1:]:
        files += sorted((ROOT / layer).rglob("*.py"))
    return files


def imports(path: Path) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield the line and the module of each import of offcut in a file, also those inside functions."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - (node.level - 1)]
            target = (*base, *(node.module.split(".") if node.module else ()))
            if target:
                yield node.lineno, target
            else:  # from . import x, at the top: x is a layer or a public name
                yield from ((node.lineno, (alias.name,)) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "offcut":
            yield node.lineno, tuple(node.module.split(".")[1:]) or ("offcut",)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, ("offcut",)) for a in node.names if a.name.split(".")[0] == "offcut")


def test_every_layer_has_a_file() -> None:
    layers = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in modules()}
    assert layers == set(LAYERS)


@pytest.mark.smoke
def test_a_layer_imports_only_itself_and_lower_layers() -> None:
    upward = []
    for path in modules():
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for line, target in imports(path):
            layer = target[0]
            if layer not in LAYERS or LAYERS.index(layer) > LAYERS.index(own):
                upward.append(f"{path.relative_to(ROOT)}:{line} imports {'.'.join(target)}")
    assert upward == []


def test_the_checker_sees_imports_of_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "exporter").mkdir()
    file = tmp_path / "exporter" / "cut.py"
    file.write_text("from .graph import x\ndef f():\n    from ..cli import main\n    import offcut\n", encoding="utf-8")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert list(imports(file)) == [(1, ("exporter", "graph")), (3, ("cli",)), (4, ("offcut",))]


@pytest.mark.smoke
def test_the_public_names_exist_and_have_docstrings() -> None:
    assert set(offcut.__all__) == PUBLIC
    assert sorted(offcut.__all__) == offcut.__all__
    for name in offcut.__all__:
        assert getattr(offcut, name).__doc__, name
    assert set(offcut.__all__) <= set(dir(offcut))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        offcut.nothing  # noqa: B018


def modules_loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(process.stdout.split())


@pytest.mark.parametrize("statement", ["import offcut", "import offcut.cli", "import offcut; offcut.OffcutError"])
def test_importing_the_package_imports_nothing_heavy(statement: str) -> None:
    heavy = {"torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino", "numpy"}
    assert modules_loaded_by(statement) & heavy == set()


def test_every_error_is_in_the_tree_of_the_docstring() -> None:
    text = offcut.errors.__doc__ or ""
    documented: dict[str, str] = {}  # base class by name
    open_branches: list[tuple[int, str]] = []
    for line in text.splitlines():
        if match := re.match(r"^([\s│]*(?:[├└]── )?)(\w+(?:Error|OffcutError))\b", line):
            depth, name = len(match[1]), match[2]
            while open_branches and open_branches[-1][0] >= depth:
                open_branches.pop()
            documented[name] = open_branches[-1][1] if open_branches else "Exception"
            open_branches.append((depth, name))
    real = {
        name: kind.__bases__[0].__name__
        for name, kind in vars(offcut.errors).items()
        if isinstance(kind, type) and issubclass(kind, Exception)
    }
    assert documented == real


def test_every_error_is_either_a_user_error_or_an_internal_error() -> None:
    kinds = [kind for kind in vars(offcut.errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    for kind in kinds:
        assert issubclass(kind, offcut.OffcutError)
        assert kind.__doc__
        if kind is not offcut.OffcutError:
            is_internal = issubclass(kind, offcut.errors.InternalError)
            assert is_internal is not issubclass(kind, offcut.errors.UserError), kind


def test_a_missing_extra_says_what_to_install() -> None:
    error = offcut.errors.MissingExtraError("the tensorrt engine", "tensorrt", "cuda")
    assert str(error) == (
        "the tensorrt engine needs the package tensorrt, which is not installed: pip install 'offcut[cuda]'"
    )


def test_no_error_is_defined_outside_errors_py() -> None:
    """Private errors, which never leave their module, begin with an underscore."""
    elsewhere = []
    for path in modules():
        if path != ROOT / "errors.py":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef) and node.name.endswith("Error") and not node.name.startswith("_"):
                    elsewhere.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert elsewhere == []


def test_examples_in_docstrings_hold() -> None:
    files = [path for path in modules() if ">>> " in path.read_text(encoding="utf-8")]
    names = [".".join(("offcut", *path.relative_to(ROOT).with_suffix("").parts)) for path in files]
    results = {name: doctest.testmod(importlib.import_module(name)) for name in names}
    assert sum(result.attempted for result in results.values()) >= 4
    assert not {name: result for name, result in results.items() if result.failed}


def classes() -> Iterator[tuple[str, Path]]:
    """Yield the public classes at the top of each module."""
    for path in modules():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield node.name, path.relative_to(ROOT)


def test_a_class_name_is_used_once() -> None:
    places: dict[str, list[str]] = {}
    for name, path in classes():
        places.setdefault(name, []).append(str(path))
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


def test_a_file_name_is_used_at_most_three_times() -> None:
    counts = Counter(path.name for path in modules() if path.name != "__init__.py")
    assert {name: count for name, count in counts.items() if count > 3} == {}


def test_every_package_has_a_docstring() -> None:
    packages = [ROOT / "__init__.py", *(path for path in modules() if path.name == "__init__.py")]
    assert len(packages) > 15
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in packages}
    assert [str(path.relative_to(ROOT)) for path, tree in trees.items() if not ast.get_docstring(tree)] == []


# Private names of libraries that have no public equivalent.
LIBRARY_INTERNALS = {
    "aten._to_copy": "the ATen operator of a cast",
    "layer._active_adapter": "PEFT: the LoRAs that pipelines read as active",
    "module._forward_hooks": "hooks of a layer, which engines would not run",
    "module._forward_pre_hooks": "hooks of a layer, which engines would not run",
    "os._exit": "ends a worker process without the handlers of its parent",
    "pipe._encode_image": "diffusers: an input of Stable Video Diffusion's UNet",
    "pipe._encode_vae_image": "diffusers: an input of Stable Video Diffusion's UNet",
    "pipeline._interrupt": "diffusers: ends a denoising loop from a callback",
    "tensor._base": "the tensor that a view belongs to",
    "torch._C._autograd._profiler_enabled": "whether a profiler records",
    "torch._C._nn._parse_to": "reads the arguments of torch.nn.Module.to",
    "torch._check": "a condition that torch.export may assume",
    "torch._foreach_copy_": "one kernel for many copies",
    "torch._inductor": "AOTInductor",
    "torch.cpu._is_amx_tile_supported": "instruction sets of the CPU",
    "torch.cpu._is_avx512_bf16_supported": "instruction sets of the CPU",
    "torch.cpu._is_vnni_supported": "instruction sets of the CPU",
    "torch.cuda._sleep": "a kernel of known duration",
    "unet._load_ip_adapter_weights": "diffusers: how its pipelines load IP-Adapters",
}


def private_attributes(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and expression of each attribute ``x._name`` that is read or written where x is not self or cls."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.endswith("__"):
            continue
        owner = ast.unparse(node.value)
        if owner not in ("self", "cls", "super()"):
            yield node.lineno, f"{owner}.{node.attr}"


def test_no_private_attribute_of_another_object_is_used() -> None:
    uses = {
        f"{path.relative_to(ROOT)}:{line} {expression}": expression
        for path in modules()
        for line, expression in private_attributes(ast.parse(path.read_text(encoding="utf-8")))
    }
    allowed = {name for name in LIBRARY_INTERNALS if name in uses.values()}
    assert allowed == set(LIBRARY_INTERNALS), "a name is not used any more: take it off the list"
    others = [
        place
        for place, expression in uses.items()
        if not any(name == expression or name.startswith(f"{expression}.") for name in LIBRARY_INTERNALS)
    ]
    assert others == []


def test_the_checker_sees_private_attributes_of_other_objects() -> None:
    tree = ast.parse("self._a\nother._b\nself._c._d\nother.__dict__\nother._e = 1")
    assert list(private_attributes(tree)) == [(2, "other._b"), (3, "self._c._d"), (5, "other._e")]


@pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="an installed package has no setup.py")
def test_setup_lists_every_package() -> None:
    """``setup.py`` finds every package folder, except the training code, which is not shipped."""
    lists: list[list[str]] = []
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert "\nsetup(" in setup
    with contextlib.chdir(ROOT):
        exec(setup.replace("\nsetup(", "\nrecord("), {"record": lambda packages, **_: lists.append(packages)})
    folders = {path.parent.relative_to(ROOT) for path in modules() if path.name == "__init__.py"}
    shipped = {folder for folder in folders if folder != Path("benchmarks/shapes/training")}
    assert shipped != folders
    assert sorted(lists[0]) == sorted(["offcut", *(".".join(("offcut", *folder.parts)) for folder in shipped)])
    # setup.py would leave out a folder with modules and without an __init__.py.
    assert {path.parent.relative_to(ROOT) for path in modules() if path.parent != ROOT} == folders

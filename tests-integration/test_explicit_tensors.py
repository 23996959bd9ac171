"""No source file makes a tensor whose dtype or device is torch's default.

Frameworks set those defaults while they build models. What they change is no error but other
numbers, so it is looked for in the sources, besides the law (``testing.independence``).
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

MAKERS = {
    "arange",
    "as_tensor",
    "asarray",
    "empty",
    "empty_strided",
    "eye",
    "full",
    "linspace",
    "logspace",
    "normal",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "scalar_tensor",
    "tensor",
    "tril_indices",
    "triu_indices",
    "zeros",
}
#: of torch.nn, those that make their own weights
LAYERS = {"Bilinear", "Conv1d", "Conv2d", "Conv3d", "Embedding", "LayerNorm", "Linear", "RMSNorm"}
#: constructors that name neither
UNNAMED = {"Tensor", "FloatTensor", "DoubleTensor", "HalfTensor", "BFloat16Tensor"}
CACHES = {"cache", "cached_property", "lru_cache"}


def is_kernel(function: ast.FunctionDef) -> bool:
    """Whether it is compiled by triton, whose ``tl`` has makers of the same names."""
    return any(ast.unparse(d) in ("jit", "triton.jit") for d in function.decorator_list)


def returns_tensor(function: ast.FunctionDef) -> bool:
    return function.returns is not None and "Tensor" in ast.unparse(function.returns)


def is_number(node: ast.expr) -> bool:
    node = node.operand if isinstance(node, ast.UnaryOp) else node
    return isinstance(node, ast.Constant)


def complaints(node: ast.AST) -> Iterator[str]:
    """What is wrong with a node itself."""
    if isinstance(node, ast.ImportFrom) and node.module == "torch":
        yield from (
            f"from torch import {alias.name}: call torch.{alias.name}"
            for alias in node.names
            if alias.name in MAKERS
        )
    if isinstance(node, ast.FunctionDef) and returns_tensor(node):
        for decorator in node.decorator_list:
            name = decorator.func if isinstance(decorator, ast.Call) else decorator
            if ast.unparse(name).rpartition(".")[2] in CACHES:
                yield f"{node.name}: keeps a tensor; use optstate_codecs.tables.cached_table"
    if not isinstance(node, ast.Call):
        return
    module, _, name = ast.unparse(node.func).rpartition(".")
    given = {keyword.arg for keyword in node.keywords}
    # where keywords come in a dict, what is in it is named there
    missing = [] if None in given else [key for key in ("dtype", "device") if key not in given]
    if (module == "torch" and name in MAKERS) or (
        module in ("nn", "torch.nn") and (name in LAYERS or name.startswith("ConvTranspose"))
    ):
        yield from (f"{ast.unparse(node)}: {key}= is missing" for key in missing)
    if module == "torch" and name in UNNAMED:
        yield f"{ast.unparse(node)}: use torch.empty or torch.tensor"
    if module == "torch" and name == "where" and all(map(is_number, node.args[1:3])):
        yield f"{ast.unparse(node)}: two numbers make a tensor of the default dtype"


def in_source(source: str) -> list[str]:
    """Everything wrong in a file, with its line."""
    found = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef) and is_kernel(node):
            return
        line = getattr(node, "lineno", 0)
        found.extend(f"line {line}: {complaint}" for complaint in complaints(node))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found


def test_dtype_and_device_are_named(package) -> None:
    files = sorted(package.source.rglob("*.py"))
    assert files
    wrong = {
        str(path.relative_to(package.folder)): found
        for path in files
        if (found := in_source(path.read_text()))
    }
    assert not wrong


@pytest.mark.parametrize(
    "source",
    [
        "torch.tensor(0.5)",
        "torch.zeros((), dtype=torch.float32)",
        "torch.full((), 6 / 7, device=x.device)",
        "torch.arange(3, device=x.device)",
        "def f():\n    return [torch.ones(n) for n in sizes]",
        "nn.Linear(3, 4)",
        "torch.nn.LayerNorm(3, device='cpu')",
        "torch.Tensor([1.0])",
        "torch.where(flag, 1.0, -1.0)",
        "from torch import Tensor, zeros",
        "@lru_cache(maxsize=4)\ndef table(n: int) -> Tensor:\n    return make(n)",
        "@functools.cache\ndef table(n: int) -> torch.Tensor:\n    return make(n)",
    ],
)
def test_what_leaves_it_to_torch_is_found(source: str) -> None:
    assert in_source(source)


@pytest.mark.parametrize(
    "source",
    [
        "torch.tensor(0.5, dtype=torch.float32, device='cpu')",
        "torch.arange(8, **kind)",
        "torch.empty_like(x)",
        "torch.frombuffer(region, dtype=torch.uint8)",
        "torch.where(flag, x, 0.0)",
        "numpy.zeros(3)",
        "nn.GELU()",
        "@jit\ndef kernel(x):\n    return torch.zeros(3) + tl.zeros([4], tl.float32)",
        "@cached_table()\ndef table(n: int) -> Tensor:\n    return make(n)",
        "@cache\ndef named(n: int) -> str:\n    return str(n)",
    ],
)
def test_what_names_them_is_not(source: str) -> None:
    assert not in_source(source)


def test_kernels_are_told_apart(root: Path) -> None:
    """Triton's own makers are in functions that are left out, and there are such functions."""
    kernel = root / "packages/optstate-codecs/src/optstate_codecs/engine/triton/means.py"
    tree = ast.parse(kernel.read_text())
    kernels = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and is_kernel(n)]
    assert [function.name for function in kernels] == ["means_kernel"]

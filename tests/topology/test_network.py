"""What goes over the network is numbers and short texts: nothing that is received is ever unpickled."""

import ast
from pathlib import Path

import replica_newton

# `torch.distributed` pickles whatever goes through its object collectives, `send_object_list` and RPC.
FORBIDDEN = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "rpc", "multiprocessing"}
MODULES = sorted(
    file for part in ("topology", "optim") for file in (Path(replica_newton.__file__).parent / part).glob("*.py")
)


def names_in(source: str) -> set[str]:
    """Every name, attribute and part of an imported module in a source."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.Import):
            names.update(part for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            names.update((node.module or "").split("."), (alias.name for alias in node.names))
    return names


def offences(source: str) -> set[str]:
    return {name for name in names_in(source) if name in FORBIDDEN or "_object" in name}


def test_no_module_that_talks_to_others_pickles() -> None:
    assert len(MODULES) > 8
    assert {file.name: offences(file.read_text()) for file in MODULES if offences(file.read_text())} == {}


def test_this_would_be_found() -> None:
    assert offences("import torch.distributed as dist\ndist.broadcast_object_list(x)") == {"broadcast_object_list"}
    assert offences("from torch.distributed import all_gather_object") == {"all_gather_object"}
    assert offences("from torch.distributed import rpc\nimport pickle") == {"rpc", "pickle"}

"""The public surface, which users may depend on. `python -m tests.house.surface` records it again."""

from __future__ import annotations

import importlib
import inspect
import json
import pathlib
import pkgutil
import re

import torch
import typer

import flowseg
import flowseg_kernels as fk

ROOT = pathlib.Path(__file__).parents[2]
RECORD = pathlib.Path(__file__).with_name("surface.json")


def parameters_of(function) -> list[str]:
    """ "name KIND default" of each parameter, without the default where there is none."""
    return [
        f"{p.name} {p.kind.name}" + ("" if p.default is p.empty else f" {p.default!r}")
        for p in inspect.signature(function).parameters.values()
        if p.name not in ("self", "cls")
    ]


def documented_paths() -> set[str]:
    """Dotted names that the API pages document, those of whole modules one by one."""
    found = set()
    for page in (ROOT / "docs" / "api").glob("*.md"):
        for kind, name in re.findall(r"auto(\w+):: ([\w.]+)", page.read_text()):
            if kind == "module":
                module = importlib.import_module(name)
                found |= {f"{name}.{leaf}" for leaf in getattr(module, "__all__", ())}
            else:
                found.add(name)
    for package in ("flowseg", *(f"flowseg.{m.name}" for m in pkgutil.iter_modules(flowseg.__path__) if m.ispkg)):
        found |= {f"{package}.{leaf}" for leaf in getattr(importlib.import_module(package), "__all__", ())}
    return found | {f"flowseg_kernels.{name}" for name in fk.__all__}


def callables() -> dict[str, list]:
    """Signatures of the documented functions, classes and public methods, by dotted name."""
    table = {}
    for path in sorted(documented_paths()):
        module, name = path.rsplit(".", 1)
        thing = getattr(importlib.import_module(module), name)
        if not callable(thing):
            table[path] = []
            continue
        if inspect.isclass(thing):
            is_model = hasattr(thing, "model_fields")
            table[path] = [] if is_model or issubclass(thing, Exception) else parameters_of(thing.__init__)
            if not is_model:
                for leaf, method in vars(thing).items():
                    method = getattr(method, "__func__", method)
                    if inspect.isfunction(method) and not leaf.startswith("_"):
                        table[f"{path}.{leaf}"] = parameters_of(method)
                    elif isinstance(method, property) and not leaf.startswith("_"):
                        table[f"{path}.{leaf}"] = []
        else:
            table[path] = parameters_of(thing)
    return table


def op_schemas() -> list[str]:
    """Schemas of `torch.ops.flowseg.*`."""
    return sorted(str(s) for s in torch._C._jit_get_all_schemas() if s.name.startswith("flowseg::"))


def state_keys() -> dict[str, list[str]]:
    """Keys of the state dict of each public module and of a whole network."""
    from flowseg.config import Config
    from flowseg.model import build_model

    codebook = fk.Codebook(fk.kronecker_centroids(num_classes=5, channels=3))
    modules = {
        "Codebook": codebook,
        "CentroidDecoder": fk.CentroidDecoder(codebook),
        "FlowLoss": fk.FlowLoss(codebook),
        "NeuralFieldDecoder": fk.NeuralFieldDecoder(dim=32),
        "FlowSegModel": build_model(Config()),
    }
    return {name: sorted(module.state_dict()) for name, module in modules.items()}


def _settings(model, prefix: str = "") -> dict[str, str]:
    table = {}
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if inspect.isclass(annotation) and hasattr(annotation, "model_fields"):
            table |= _settings(annotation, f"{prefix}{name}.")
        else:
            table[f"{prefix}{name}"] = repr(field.default)
    return table


def settings() -> dict[str, str]:
    """Default of each setting of a run, by its dotted name."""
    from flowseg.config import Config

    return _settings(Config)


def commands() -> dict[str, list[str]]:
    """Options and arguments of each sub-command of `flowseg`, with their defaults."""
    from flowseg.cli import app

    group = typer.main.get_command(app)
    context = group.make_context("flowseg", [], resilient_parsing=True)
    table = {}
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        table[name] = sorted(" ".join([*p.opts, *p.secondary_opts, "=", str(p.default)]) for p in command.params)
    return table


def environment() -> list[str]:
    """Environment variables that the documentation lists."""
    return sorted(set(re.findall(r"FLOWSEG_[A-Z_]+", (ROOT / "docs" / "environment.md").read_text())))


def surface() -> dict:
    """Everything above, as one document."""
    return {
        "callables": callables(),
        "op schemas": op_schemas(),
        "state-dict keys": state_keys(),
        "settings": settings(),
        "commands": commands(),
        "environment": environment(),
    }


if __name__ == "__main__":
    RECORD.write_text(json.dumps(surface(), indent=1) + "\n")
    print(f"{RECORD.relative_to(ROOT)} is written")

"""The layers of both packages. A module may import modules of lower layers only, and modules of its own folder without circles."""

from __future__ import annotations

from . import closure

#: Package -> layers, the lowest first. An entry is a module, or a folder with all its modules unless they have an own entry.
#: "" is the package's `__init__`.
LAYERS: dict[str, list[set[str]]] = {
    "flowseg_kernels": [
        {"runtime", "runtime.backend", "runtime.transforms", "runtime.triton", "bare_layers"},
        {"runtime.checks", "runtime.extension"},
        {"runtime.registry"},
        # It also calls torch.ops.flowseg.nearest_centroid, which an import would not show.
        {"derived"},
        {"codes", "decode_grid", "decode_guesses", "ops.triton_pixels"},
        {"decode_tables"},
        {"ops.distance_correction", "ops.flow_interpolate", "ops.neural_field"},
        {"ops.flow_loss", "ops.nearest_centroid"},
        {"ops.class_probabilities", "ops.decode_confusion"},
        {"ops.top_classes"},
        {"ops"},
        {"functional"},
        {"codebook"},
        {"nn"},
        {""},
        {"info"},
    ],
    "flowseg": [
        {"devices"},
        {"", "data_names", "errors", "flow", "label_kinds"},
        {"runs"},
        {"config", "shards"},
        {"codes", "model"},
        {"checkpoint"},
        {"build", "data"},
        {"inference"},
        {"segment"},
        {"hub", "report", "training"},
        {"experiments"},
        {"cli"},
        {"__main__"},
    ],
}


def entry_of(package: str, module: str) -> str | None:
    """The entry of a module: the longest one that names the module or a folder above it."""
    entries = set().union(*LAYERS[package])
    parts = module.split(".") if module else []
    names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)] or [""]
    return next((name for name in names if name in entries), None)


def rank_of(package: str, entry: str) -> int:
    """The layer of an entry, 0 for the lowest."""
    return next(rank for rank, layer in enumerate(LAYERS[package]) if entry in layer)


def imports(package: str) -> dict[str, set[str]]:
    """Module -> modules of the same package that it imports, inside functions too. Names are without the package."""
    table = {}
    for file in sorted((closure.ROOT / package).rglob("*.py")):
        parts = file.relative_to(closure.ROOT / package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found = {".".join(target[1:]) for target in closure.imports_of(file) if target[0] == package}
        table[name] = found - {name}
    return table


def circle(table: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, or [] without one."""
    done: set[str] = set()

    def visit(module: str, above: list[str]) -> list[str]:
        if module in above:
            return [*above[above.index(module) :], module]
        if module not in done:
            for target in sorted(table[module]):
                found = visit(target, [*above, module])
                if found:
                    return found
            done.add(module)
        return []

    return next((found for module in table if (found := visit(module, []))), [])

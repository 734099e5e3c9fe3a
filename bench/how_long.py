"""Print the tables of docs/guides/how_long.md.

FLOPs of an image, the rate at which an H100 did the one training step that was timed, the work of the recipes, and their hours
if all of this work, REPA's too, runs at that rate.
"""

import argparse
import dataclasses

from .results import RESULTS, load, slug

#: Recipes, with the number of processes that they were written for.
RECIPES = {"ade20k_l16": 8, "ade20k_xl16": 8}
GPUS = (1, 8, 64)
#: Dense bf16 products of an H100 SXM by NVIDIA's data sheet, and the machine whose results are used.
PEAK_TFLOPS, GPU = 989.4, "NVIDIA H100 80GB HBM3"


@dataclasses.dataclass
class Measured:
    """The training step that an H100 has timed, and the rate of a matrix product through torch on the same GPU."""

    network: str
    side: int
    batch: int
    ms: float
    product_tflops: float


def measured() -> Measured:
    rows = load(RESULTS / slug(GPU))["rows"]
    step = next(r for r in rows if r["op"] == "training step" and r["entry"] == "ours" and "batch" in r["workload"])
    network, side, _, batch, _ = step["workload"].split()
    product = next(r["rate"] for r in rows if r["entry"] == "GFLOP/s of bf16 matrix products")
    return Measured(network, int(side), int(batch), step["ms"], product / 1000)


def rate_tflops() -> float:
    """Model TFLOP/s of the measured step."""
    from flowseg.config import config_from_tree
    from flowseg.model.flops import count_flops

    step = measured()
    config = config_from_tree({"model": {"size": step.network}, "codes": {"channels": 3, "sequence": "sqrt_primes"}})
    return step.batch * count_flops(config, step.side, step.side).training / step.ms / 1e9


def stages_of_recipes() -> dict:
    """Recipe -> the work of its stages."""
    from flowseg.config import load_config
    from flowseg.training.work import work_of

    root = RESULTS.parents[1]
    return {name: work_of(load_config(root / "configs" / f"{name}.yaml"), n) for name, n in RECIPES.items()}


def tables() -> list[str]:
    """The tables of the page in Markdown."""
    from flowseg.training.work import amount

    step, rate, recipes = measured(), rate_tflops(), stages_of_recipes()
    per_image = [
        "| recipe | image | forward | backward | recomputed | REPA | training step, all of it |",
        "|---|---|---|---|---|---|---|",
    ]
    whole = ["| recipe | steps | image | images of a step, 8 GPUs | images | work |", "|---|---|---|---|---|---|"]
    hours = [f"| recipe | {' | '.join(f'{n} GPU' + 's' * (n > 1) for n in GPUS)} |", "|---|" + "---|" * len(GPUS)]
    for name, stages in recipes.items():
        for s in stages:
            size, flops = f"{s.height} x {s.width}", s.flops
            cells = [flops.forward, flops.backward, flops.recomputed, s.alignment, s.per_image]
            per_image.append(f"| `{name}` | {size} | {' | '.join(amount(c) if c else '' for c in cells)} |")
            together = s.images // (s.last - s.first)
            whole.append(
                f"| `{name}` | {s.first:,} to {s.last:,} | {size} | {together} | {s.images:,} | {amount(s.total)} |"
            )
        total = sum(s.total for s in stages)
        times = [total / (rate * 1e12) / 3600 / n for n in GPUS]
        hours.append(f"| `{name}` | {' | '.join(map(duration, times))} |")
    of_peak, of_product = (f"{rate / most:.0%}".replace("%", " %") for most in (PEAK_TFLOPS, step.product_tflops))
    derivation = [
        "| quantity | value |",
        "|---|---|",
        f"| training step of {step.network}, {step.side} x {step.side}, {step.batch} images, bf16, measured | {step.ms:.1f} ms |",
        f"| model FLOPs of that step | {amount(rate * step.ms * 1e9)} |",
        f"| rate | {rate:.0f} TFLOP/s |",
        f"| share of the {PEAK_TFLOPS:.0f} TFLOP/s of dense bf16 in NVIDIA's data sheet (MFU) | {of_peak} |",
        f"| share of the {step.product_tflops:.0f} TFLOP/s of a matrix product through torch, measured | {of_product} |",
    ]
    return ["\n".join(lines) for lines in (per_image, derivation, whole, hours)]


def duration(hours: float) -> str:
    """Hours, or days from two days on."""
    return f"{hours / 24:.1f} days" if hours >= 48 else f"{hours:.1f} h"


def main(arguments=None):
    argparse.ArgumentParser(prog="python -m bench how-long", description=__doc__).parse_args(arguments)
    print("\n\n".join(tables()))

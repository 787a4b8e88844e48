"""``xattn bench kernels``: are the Hopper kernels right, how fast are they, which tiles are best? One command, one GPU.

The stages run in this order. Every configuration is compiled, with registers and spills as the assembler reports them.
Errors are measured against float64 (xattn/bench/kernel_accuracy.py). The kernels are timed beside cuDNN's softmax,
XLA's S×S form and this package's others, and so are other tiles (xattn/bench/kernel_times.py). A failure is reported
with its error, and the rest continues. ``kernels.json`` holds all that the tables show.

``--stages compile`` needs no GPU, only the extra ``cuda`` and NVIDIA's ``ptxas``: it compiles for an absent H100.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import jax

from xattn.backend import dispatch
from xattn.backend.hopper.sizes import WIDTHS, Tiles
from xattn.bench import kernel_accuracy, ptxas
from xattn.bench.kernel_bench import PASSES, Bench, kernel, program
from xattn.bench.kernel_times import sweep_stage, time_stage
from xattn.system.arguments import Parser

STAGES = ("compile", "accuracy", "time", "sweep")


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0, or 1 if anything failed or missed its accuracy. A missed speed target is a result, not an error."""
    parser = options_parser()
    options = parser.parse_args(argv)
    on_hopper = dispatch.target().compute_capability == "9.0"
    if not on_hopper and options.stages != ["compile"]:
        parser.error("needs a CUDA device of compute capability 9.0 (H100, H200); --stages compile needs none")
    bench = Bench(options)
    if on_hopper:
        bench.record["device"] = jax.local_devices()[0].device_kind
    accurate = True
    if "compile" in options.stages:
        compile_stage(bench, on_hopper)
    bench.save()
    if "accuracy" in options.stages:
        accurate = accuracy_stage(bench)
        bench.save()
    if "time" in options.stages:
        time_stage(bench)
        bench.save()
    if "sweep" in options.stages:
        sweep_stage(bench)
    bench.console.print(f"written: {bench.save()}", highlight=False, soft_wrap=True)
    return 0 if accurate and not bench.record["failures"] else 1


def options_parser() -> Parser:
    parser = Parser(prog="xattn bench kernels", description="Measure the Hopper kernels' accuracy, times and tiles.")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--activations", nargs="+", choices=("sigmoid", "none"), default=["sigmoid", "none"])
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float16"), default=["bfloat16", "float16"])
    parser.add_argument("--widths", nargs="+", type=int, choices=WIDTHS, default=list(WIDTHS))
    parser.add_argument("--lengths", nargs="+", type=int, metavar="S", default=[1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--accuracy-lengths", nargs="+", type=int, metavar="S", default=[128, 1000, 4096, 32768])
    parser.add_argument("--sweep-length", type=int, metavar="S", default=4096)
    parser.add_argument("--tokens", type=int, default=32768, help="B · S of what is timed")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15, help="number of timings per subject")
    parser.add_argument("--memory-limit", type=float, default=40.0, metavar="GB", help="do not time larger programs")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"))
    return parser


def _cases(options: argparse.Namespace) -> list[tuple[str, bool, str, int]]:
    """Return (activation, causal, dtype, D) of each case."""
    return list(itertools.product(options.activations, (True, False), options.dtypes, options.widths))


def _named(activation: str, causal: bool, dtype: str, width: int) -> str:
    return f"{activation}, {'causal' if causal else 'full'}, {dtype}, D {width}"


def compile_stage(bench: Bench, on_hopper: bool) -> None:
    """Compile each configuration; report registers per thread, bytes spilled out and in, and warnings."""
    table = bench.table("compiled for sm_90a", "kernel", "registers", "spilled", "warnings")
    bench.record["compiled"] = []
    with bench.attempt("a device to compile for"), tempfile.TemporaryDirectory(prefix="xattn-kernels-") as scratch:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0] if on_hopper else ptxas.absent_h100())
        for activation, causal, dtype, width in _cases(bench.options):
            case = _named(activation, causal, dtype, width)
            with bench.attempt(f"compiling {case}"):
                x = jax.ShapeDtypeStruct((1, 4, 512, width), dtype, sharding=sharding)
                k = jax.ShapeDtypeStruct((1, 2, 512, width), dtype, sharding=sharding)
                bias = jax.ShapeDtypeStruct((4,), "float32", sharding=sharding)
                function = program(kernel(activation, Tiles(), causal=causal), PASSES[1])
                table.add_row(case)
                for report in ptxas.compile_and_report(function, (x, k, k, bias, x), Path(scratch)):
                    bench.record["compiled"].append(asdict(report) | {"case": case})
                    spilled = f"{report.spill_stores} + {report.spill_loads}"
                    table.add_row(f"  {report.kernel}", str(report.registers), spilled, "; ".join(report.warnings))
    bench.console.print_table(table)


def accuracy_stage(bench: Bench) -> bool:
    """Measure errors against float64; return whether all were measured and are at most 1.2 times the floor."""
    table = bench.table("error over the dtype's own", "case", "S", *kernel_accuracy.RESULTS, "")
    found = []
    cases = list(itertools.product(_cases(bench.options), bench.options.accuracy_lengths))
    for (activation, causal, dtype, width), length in cases:
        case = _named(activation, causal, dtype, width)
        with bench.attempt(f"accuracy of {case}, S {length}"):
            function = kernel(activation, Tiles(), causal=causal)
            accuracy = kernel_accuracy.measure(function, activation, dtype, width, length, causal=causal)
            found.append(accuracy)
            cells = [f"{accuracy.ratios[name]:.2f}" for name in kernel_accuracy.RESULTS]
            table.add_row(case, str(length), *cells, "" if accuracy.holds else "MISSED")
    bench.record["accuracy"] = [asdict(a) | {"ratios": a.ratios, "holds": a.holds} for a in found]
    bench.console.print_table(table)
    return len(found) == len(cases) and all(accuracy.holds for accuracy in found)


if __name__ == "__main__":
    sys.exit(main())

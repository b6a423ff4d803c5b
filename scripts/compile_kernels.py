"""Compile every GPU kernel to machine code for H100, A100 and L40S on a machine without a GPU, and check the result.

    pip install --no-deps jax-cuda13-plugin==VERSION jax-cuda13-pjrt==VERSION    # VERSION of the installed jax, 150 MB
    python scripts/compile_kernels.py [--target h100] [--only NAME]

Needs ptxas, which JAX finds on PATH or under /usr/local/cuda. About 3 s of CPU time per kernel and target, and as
many at a time as there are CPUs. Prints registers, spills, shared memory and tensor-core instructions (in PTX: wgmma on
Hopper, mma.sync below), and exits with 1 if a kernel does not compile, spills, calls a function, exceeds the device's
shared memory, or multiplies without tensor cores. It says nothing about speed.
"""

import argparse
import contextlib
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

TOKENS, BATCH = 197, 32


@dataclass(frozen=True)
class Device:
    """What the compiler asks of a device; capacities in bytes."""

    name: str
    capability: tuple[int, int]
    shared_memory: int
    shared_memory_per_core: int
    cores: int
    memory: int
    l2: int
    bandwidth: int
    clock: float
    threads_per_core: int = 2048
    features: str = "NONE"

    def topology(self) -> str:
        """The text form of XLA's GpuTargetConfigProto."""
        major, minor = self.capability
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {self.threads_per_core}
              shared_memory_per_block: 49152 shared_memory_per_block_optin: {self.shared_memory}
              shared_memory_per_core: {self.shared_memory_per_core} core_count: {self.cores} fpus_per_core: 128
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              memory_bandwidth: {self.bandwidth} l2_cache_size: {self.l2} clock_rate_ghz: {self.clock}
              device_memory_size: {self.memory} device_vendor: "NVIDIA Corporation" device_address_bits: 64
              cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {self.features} }}
              name: "{self.name}" driver_version: "13.0.0" runtime_version: "13.0.0"
              compile_time_toolkit_version: "13.0.0" dnn_version: "9.12.0"
            }}
            platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
            device_description_str: "{self.name}"
        """


DEVICES = {
    "h100": Device(
        "NVIDIA H100 80GB HBM3", (9, 0), 232448, 233472, 132, 84942979072, 52428800, 3352320000000, 1.98,
        features="ACCELERATED_FEATURES",
    ),
    "a100": Device(
        "NVIDIA A100-SXM4-80GB", (8, 0), 166912, 167936, 108, 85100068864, 41943040, 2039040000000, 1.41
    ),
    "l40s": Device(
        "NVIDIA L40S", (8, 9), 101376, 102400, 142, 47000000000, 100663296, 864000000000, 2.52, threads_per_core=1536
    ),
}  # fmt: skip


def shape_of_split(config: Any, batch: int, tokens: int, channels: int) -> Any:
    """The shapes of a `Split`."""
    import jax

    from ouromamba_jax.ops.split import split_outliers

    x, scale = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((batch, tokens, channels), (tokens,)))
    return jax.eval_shape(lambda x, scale: split_outliers(x, scale, config, implementation="xla"), x, scale)


def matmul(
    inputs: int,
    outputs: int,
    bits: int,
    outlier_bits: int = 8,
    dtype: str = "float32",
    batch: int = BATCH,
    bias: bool = False,
    residual: bool = False,
    implementation: str = "mosaic_gpu",
) -> tuple[Callable, list]:
    import jax

    from ouromamba_jax.ops.matmul import outlier_matmul
    from ouromamba_jax.ops.qtensor import QTensor
    from ouromamba_jax.ops.split import OutlierConfig

    def run(split, values, columns, more):
        return outlier_matmul(split, QTensor(values, columns, bits), **more, dtype=dtype, implementation=implementation)

    split = shape_of_split(OutlierConfig(outlier_bits=outlier_bits), batch, TOKENS, inputs)
    more = {"bias": jax.ShapeDtypeStruct((outputs,), "float16")} if bias else {}
    if residual:
        more["residual"] = jax.ShapeDtypeStruct((batch, TOKENS, outputs), "float32")
    shapes = [((inputs, outputs), "int8"), ((1, outputs), "float32")]
    return run, [split, *(jax.ShapeDtypeStruct(*shape) for shape in shapes), more]


def int4_matmul(inputs: int, outputs: int, dtype: str = "float32", bias: bool = False) -> tuple[Callable, list]:
    """With the dense kernel, which runs where a tile lists too many channels."""
    return matmul(inputs, outputs, 4, 8, dtype, BATCH, bias, implementation="mosaic_gpu_int4")


def split(
    channels: int, dtype: str = "float32", act_bits: int = 4, outlier_bits: int = 8, shift: bool = False
) -> tuple[Callable, list]:
    import jax

    from ouromamba_jax.ops.split import OutlierConfig, split_outliers

    def run(x, scale, theta, shift=None):
        config = OutlierConfig(act_bits, outlier_bits)
        return split_outliers(x, scale, config, theta=theta, shift=shift, implementation="mosaic_gpu")

    tokens = [((TOKENS,), "float32")] * 2 + ([((TOKENS,), "int8")] if shift else [])
    return run, [jax.ShapeDtypeStruct(*shape) for shape in (((BATCH, TOKENS, channels), dtype), *tokens)]


def producer(name: str, channels: int, outlier_bits: int = 8, **options: Any) -> tuple[Callable, list]:
    """With bfloat16 activations of 196 tokens, and the float activation too where the models want it."""
    import jax

    from ouromamba_jax.ops import producers
    from ouromamba_jax.ops.split import OutlierConfig

    tokens, wide, vector = (BATCH, 196, channels), (BATCH, 196, 2 * channels), (channels,)
    grid = (BATCH, 14, 14, channels)
    shapes = {
        "rms_norm": [(tokens, "float32"), (vector, "bfloat16")],
        "layer_norm": [(tokens, "float32"), (vector, "bfloat16"), (vector, "bfloat16")],
        "merged_routes": [((BATCH, 196, 4, channels), "bfloat16"), (vector, "bfloat16"), (vector, "bfloat16")],
        "gelu": [(tokens, "bfloat16")],
        "conv_silu": [(wide, "bfloat16"), ((4, channels), "bfloat16"), (vector, "bfloat16")],
        "gated_mean": [((BATCH, 196, 2, channels), "bfloat16"), (wide, "bfloat16")],
        "beside_conv_silu": [(tokens, "bfloat16"), (wide, "bfloat16"), ((3, channels), "bfloat16")],
        "route": [(grid, "bfloat16")],
        "patches3x3": [(grid, "float32")],
    }[name]
    if name in ("rms_norm", "layer_norm", "merged_routes", "conv_silu", "beside_conv_silu", "patches3x3"):
        options |= {"dtype": "bfloat16"}
    arrays = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    length = 49 if options.get("stride") == 2 else 196

    def run(arrays, scale, theta):
        if name == "beside_conv_silu":
            arrays = (*arrays, None)
        return producers.split_after(
            getattr(producers, name), tuple(arrays), options, scale, OutlierConfig(outlier_bits=outlier_bits),
            theta=theta, keep=name == "conv_silu", implementation="mosaic_gpu",
        )  # fmt: skip

    return run, [arrays, *[jax.ShapeDtypeStruct((length,), "float32")] * 2]


def scan_shapes(channels: int, states: int, groups: int, dtype: str, length: int = TOKENS) -> dict[str, Any]:
    """The arguments of a scan by name."""
    import jax

    tokens, projection = (BATCH, length, channels), (BATCH, length, groups, states)
    inputs = {"u": tokens, "delta": tokens, "z": tokens, "B": projection, "C": projection}
    parameters = {"A": (channels, states), "D": (channels,), "delta_bias": (channels,)}
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in inputs.items()} | {
        name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in parameters.items()
    }


def scan(
    channels: int, states: int, groups: int, dtype: str = "float32", length: int = TOKENS
) -> tuple[Callable, list]:
    from ouromamba_jax.ops.scan import selective_scan

    def run(arrays):
        return selective_scan(**arrays, delta_softplus=True, implementation="mosaic_gpu")[:2]

    return run, [scan_shapes(channels, states, groups, dtype, length)]


def scan_gradient(channels: int, states: int, groups: int, dtype: str, collect: bool) -> tuple[Callable, list]:
    """Both passes; with `collect`, also from what is collected of the states between them."""
    import jax
    import jax.numpy as jnp

    from ouromamba_jax.ops.scan import selective_scan

    def loss(arrays):
        reduce = (lambda h: h.mean(1)) if collect else None
        out = selective_scan(**arrays, delta_softplus=True, collect=reduce, implementation="mosaic_gpu")
        return sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(out))

    return jax.grad(loss), [scan_shapes(channels, states, groups, dtype)]


def scan_levels(
    channels: int,
    states: int,
    groups: int,
    dtype: str = "float32",
    u: str = "floats",
    delta: str = "levels",
    outlier_bits: int = 8,
    length: int = TOKENS,
) -> tuple[Callable, list]:
    """Inputs in levels, or of these names split in the scan; the others' groups one by one."""
    import jax

    from ouromamba_jax.ops.qtensor import QTensor
    from ouromamba_jax.ops.scan import selective_scan
    from ouromamba_jax.ops.scan_types import Product, Routed, Unsplit
    from ouromamba_jax.ops.split import OutlierConfig

    def run(arrays):
        return selective_scan(**arrays, delta_softplus=True, implementation="mosaic_gpu")[:2]

    width = channels // groups
    config = OutlierConfig(outlier_bits=outlier_bits)
    levels, few = (shape_of_split(config, BATCH, length, inputs) for inputs in (width, -(-width // 32)))
    part = jax.ShapeDtypeStruct((BATCH, length, width), dtype)
    tokens = jax.ShapeDtypeStruct((length,), "float32")
    shapes = ((few.shape[2], width), "int8"), ((1, width), "float32")
    weight = QTensor(*(jax.ShapeDtypeStruct(*shape) for shape in shapes), 8)
    kinds = {"levels": levels, "unsplit": Unsplit(part, tokens, config, tokens)}
    kinds |= {"product": Unsplit(Product(part, few, weight, dtype), tokens, config, tokens)}
    kinds |= {"floats": part, "routed": Routed(part, (1, length), True, True)}
    arrays = {name: x for name, x in scan_shapes(channels, states, groups, dtype, length).items() if name != "z"}
    return run, [arrays | {name: (kinds[kind],) * groups for name, kind in (("u", u), ("delta", delta))}]


KERNELS: dict[str, tuple[Any, ...]] = {  # a function, its arguments, and perhaps its options
    # Layers of Vim: every tile width, packed and not, ragged rows (6304), padded rows (197), inputs (192) and outputs
    # (56, 80); two bytes in one launch for 4-bit weights, in two for 8-bit ones
    "matmul 768x3072 W4": (matmul, (768, 3072, 4)),
    "matmul 768x3072 W4 bf16, bias": (matmul, (768, 3072, 4, 8, "bfloat16", BATCH, True)),
    "matmul 1536x768 W8 bf16": (matmul, (1536, 768, 8, 8, "bfloat16")),
    "matmul 1536x768 W8 16-bit bf16, bias": (matmul, (1536, 768, 8, 16, "bfloat16", BATCH, True)),
    "matmul 192x384 W4 bf16": (matmul, (192, 384, 4, 8, "bfloat16")),
    "matmul 192x384 W4 16-bit": (matmul, (192, 384, 4, 16)),
    "matmul 768x3072 W4 16-bit bf16": (matmul, (768, 3072, 4, 16, "bfloat16")),
    "matmul 384x56 W4, bias": (matmul, (384, 56, 4, 8, "float32", BATCH, True)),
    "matmul 384x768 W4 1 image": (matmul, (384, 768, 4, 8, "float32", 1)),
    "matmul 1536x80 W8 bf16": (matmul, (1536, 80, 8, 8, "bfloat16")),
    "matmul 384x96 W4 bf16, residual": (matmul, (384, 96, 4, 8, "bfloat16", BATCH, True, True)),
    "matmul 96x96 W8 bf16": (matmul, (96, 96, 8, 8, "bfloat16")),
    "int4 matmul 768x3072 bf16, bias": (int4_matmul, (768, 3072, "bfloat16", True)),
    "int4 matmul 384x56": (int4_matmul, (384, 56)),
    # Inputs of layers: whole blocks of channels, a ragged last one, one that is not full
    "split 3072 bf16": (split, (3072, "bfloat16")),
    "split 192 A8 16-bit": (split, (192, "float32", 8, 16)),
    "split 96 second byte bf16": (split, (96, "bfloat16", 4, 8, True)),
    # What makes them with the split
    "split rms_norm 768": (producer, ("rms_norm", 768, 8), {"eps": 1e-5}),
    "split layer_norm 96 16-bit": (producer, ("layer_norm", 96, 16), {"eps": 1e-5}),
    "split merged_routes 192": (producer, ("merged_routes", 192, 8), {"eps": 1e-5, "grid": (14, 14)}),
    "split gelu 384": (producer, ("gelu", 384), {"approximate": False}),
    "split gelu 640 tanh 16-bit": (producer, ("gelu", 640, 16), {"approximate": True}),
    "split conv_silu 1536": (producer, ("conv_silu", 1536), {"reverse": True}),
    "split gated_mean 1536": (producer, ("gated_mean", 1536), {"start": 1536}),
    "split beside_conv_silu 160": (producer, ("beside_conv_silu", 160), {"start": 160, "causal": False}),
    "split route 96": (producer, ("route", 96), {"transpose": True, "reverse": True}),
    "split patches3x3 80": (producer, ("patches3x3", 80), {"stride": 2, "tanh_gelu": True}),
    # Directions of Vim, MambaVision and VMamba: groups of 96 and 160 channels, the 3136 tokens of stage 1 cut in 4
    "scan 1536x16 bf16": (scan, (1536, 16, 1, "bfloat16")),
    "scan 160x8": (scan, (160, 8, 1)),
    "scan 384x1 in 4 bf16": (scan, (384, 1, 4, "bfloat16", 3136)),
    "scan 3072x16 in 2, delta split": (scan_levels, (3072, 16, 2, "bfloat16", "floats", "unsplit")),
    "scan 3072x16 in 2 int8, u too": (scan_levels, (3072, 16, 2, "bfloat16", "levels", "levels")),
    "scan 160x8 16-bit, bf16": (scan_levels, (160, 8, 1, "bfloat16", "unsplit", "unsplit", 16)),
    "scan 384x1 in 4 int8, routes": (scan_levels, (384, 1, 4, "bfloat16", "routed", "levels")),
    "scan 3072x16 in 2, product": (scan_levels, (3072, 16, 2, "bfloat16", "floats", "product")),
    "scan 3072x16 in 2, product 16-bit": (scan_levels, (3072, 16, 2, "bfloat16", "floats", "product", 16)),
    "scan 384x1 in 4, routes, product": (scan_levels, (384, 1, 4, "bfloat16", "routed", "product", 16, 3136)),
    "scan gradient 384x16": (scan_gradient, (384, 16, 1, "float32", False)),
    "scan gradient 1536x16": (scan_gradient, (1536, 16, 1, "bfloat16", True)),
    "scan gradient 160x8": (scan_gradient, (160, 8, 1, "bfloat16", False)),
    "scan gradient 384x1": (scan_gradient, (384, 1, 4, "float32", True)),
}


def targets_of(kernel: str) -> list[str]:
    """Hopper's tensor cores multiply no 4-bit integers."""
    return [target for target in DEVICES if target != "h100" or not kernel.startswith("int4")]


# Each compilation has a process of its own, since a compiler that cannot go on aborts it. They are forked from a server
# that has imported these; without it imports take half the time.
PROCESSES = multiprocessing.get_context("forkserver")
IMPORTED = (
    "ops.matmul",
    "ops.scan",
    "ops.split",
    "pallas.int4_matmul_sm80",
    "pallas.outlier_matmul_sm80",
    "pallas.outlier_matmul_sm90",
    "ops.producers",
    "pallas.outlier_split",
    "pallas.producer_split",
    "pallas.selective_scan",
)
# Only what the report reads: a dump of everything takes longer than the compilation.
DUMPS = ("MOSAIC_GPU_DUMP_RESOURCES", "MOSAIC_GPU_DUMP_PTX", "MOSAIC_GPU_DUMP_PTXAS")


@contextlib.contextmanager
def compiling_for(target: str) -> Iterator[Any]:
    """A sharding of arrays on this device, which is the default one meanwhile; this machine need not have it."""
    import jax
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=DEVICES[target].topology())
    mesh = topologies.make_mesh(topology, (1,), ("x",))
    with jax.default_device(topology.devices[0]):  # this sets the capability that Mosaic compiles for
        yield jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def compile_one(kernel: str, target: str, output: str) -> None:
    """Compiles, with all that is printed in the file `output`."""
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import jax

    build, arguments, *options = KERNELS[kernel]
    with compiling_for(target) as sharding:
        run, shapes = build(*arguments, **(options[0] if options else {}))
        specs = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes)
        jax.jit(run).lower(*specs).compile()


@dataclass(frozen=True)
class Report:
    registers: int
    spills: int
    calls: int
    shared_memory: int
    tensor_core: int
    int4: int

    @classmethod
    def read(cls, printed: str) -> "Report":
        """From what Mosaic prints of a compilation: its resources, the PTX, ptxas -v."""
        spilled = re.findall(r"(\d+) bytes (?:spill|stack)", printed)
        instructions = r"(?:wgmma\.mma_async|mma)\.sync\.aligned\.\S*s32\.s8\.s8"
        int4 = r"mma\.sync\.aligned\.\S*s32\.s4\.s4"
        return cls(
            registers=max(map(int, re.findall(r"Used (\d+) registers", printed))),
            spills=sum(map(int, spilled)),
            calls=len(re.findall(r"^\s*call", printed, re.MULTILINE)),
            shared_memory=max(map(int, re.findall(r"smem_scratch_bytes=(\d+)", printed))),
            tensor_core=len(re.findall(instructions, printed)),
            int4=len(re.findall(int4, printed)),
        )

    def problems(self, kernel: str, device: Device) -> list[str]:
        found = []
        if self.spills:
            found.append(f"{self.spills} bytes spilled")
        if self.calls:
            found.append(f"{self.calls} function calls")
        if self.shared_memory > device.shared_memory:
            found.append(f"more than {device.shared_memory} bytes of shared memory")
        if "matmul" in kernel and not self.tensor_core:
            found.append("no int8 tensor-core instruction")
        if kernel.startswith("int4") and not self.int4:
            found.append("no int4 tensor-core instruction")
        return found


def check(kernel: str, target: str, exitcode: int, printed: str) -> bool:
    if exitcode:
        print(f"{target:5} {kernel:30} does not compile, exit code {exitcode}:\n{printed[-2000:]}", flush=True)
        return False
    report = Report.read(printed)
    problems = report.problems(kernel, DEVICES[target])
    print(
        f"{target:5} {kernel:30} {report.registers:4} registers {report.spills:4} B spilled "
        f"{report.shared_memory:7} B shared {report.tensor_core:4} int8 {report.int4:4} int4 tensor-core  "
        f"{'; '.join(problems) or 'ok'}",
        flush=True,
    )
    return not problems


def check_all(pairs: list[tuple[str, str]]) -> bool:
    """Compiles as many at a time as there are CPUs.

    One thread starts and joins all processes: `multiprocessing` looks after finished ones in every start, and when
    another thread is joining them, an exit code is read by one and lost to the other, which then reports 255.
    """
    waiting, running, good = list(reversed(pairs)), {}, True
    with contextlib.ExitStack() as files:
        while waiting or running:
            while waiting and len(running) < len(os.sched_getaffinity(0)):
                kernel, target = waiting.pop()
                output = files.enter_context(tempfile.NamedTemporaryFile("r", errors="replace"))
                process = PROCESSES.Process(target=compile_one, args=(kernel, target, output.name))
                process.start()
                running[process.sentinel] = process, kernel, target, output
            for sentinel in wait(list(running)):
                process, kernel, target, output = running.pop(sentinel)
                process.join()
                good &= check(kernel, target, process.exitcode, output.read())
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=DEVICES, help="one device instead of all")
    parser.add_argument("--only", choices=KERNELS, help="one kernel instead of all")
    args = parser.parse_args()
    os.environ.update(dict.fromkeys(DUMPS, "1"))
    PROCESSES.set_forkserver_preload([f"ouromamba_jax.{name}" for name in IMPORTED])
    targets = [args.target] if args.target else list(DEVICES)
    kernels = [args.only] if args.only else list(KERNELS)
    pairs = [(kernel, target) for target in targets for kernel in kernels if target in targets_of(kernel)]
    return 0 if check_all(pairs) else 1


if __name__ == "__main__":
    sys.exit(main())

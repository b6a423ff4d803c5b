"""The emulator of PTX against NumPy and the PTX manual, and that it fails a kernel that only luck would let pass."""

import ml_dtypes
import numpy as np
import pytest
from ptx.program import Launch, TensorMap, parse, parse_host
from ptx.threads import Fault, Threads

HEADER = """
.version 9.0
.visible .entry kernel(
	.param .u64 .ptr .align 256 in,
	.param .u64 .ptr .align 256 out{maps}
)
.maxntid {threads}, 1, 1
{{
	.reg .pred %p<9>;
	.reg .b16 %rs<9>;
	.reg .b32 %r<40>;
	.reg .b64 %rd<20>;
	ld.param::entry.b64 %rd1, [in];
	ld.param::entry.b64 %rd2, [out];
	mov.u32 %r1, %tid.x;
	mul.wide.u32 %rd3, %r1, 4;
	add.s64 %rd4, %rd1, %rd3;
	add.s64 %rd5, %rd2, %rd3;
	ld.global.b32 %r2, [%rd4];  // this thread's word
"""
STORE = "\tst.global.b32 [%rd5], %r3;\n\tret;\n}\n"


def run(body, x, *, threads=128, out=None, late=True, seed=0, maps=(), blocks=1, tail=STORE):
    """`body` on a word of `x` in %r2 to one of the result in %r3, for each thread; `out` is the result's shape."""
    declared = ",\n\t.param .align 64 .b8 maps[512]" if maps else ""
    program = parse(HEADER.format(threads=threads, maps=declared) + body + tail)
    launch = Launch((blocks, 1, 1), 4096, [0, 1, *([list(maps)] if maps else [])])
    result = np.zeros(x.shape, x.dtype) if out is None else out
    return Threads(program, launch, [x], [result], late=late, seed=seed).run()[0]


def words(n=128, seed=0):
    return np.random.default_rng(seed).integers(0, 2**32, n, np.uint32)


def floats(n=128, seed=0):
    return np.random.default_rng(seed).normal(size=n).astype(np.float32)


INTEGERS = {
    "add.s32 %r3, %r2, -7;": lambda x: x - np.uint32(7),
    "mul.lo.s32 %r3, %r2, %r2;": lambda x: x * x,
    "mul.hi.u32 %r3, %r2, 2863311531;": lambda x: (x.astype(np.uint64) * 2863311531 >> np.uint64(32)).astype(np.uint32),
    "mul.hi.s32 %r3, %r2, -3;": lambda x: (x.view(np.int32) * np.int64(-3) >> 32).astype(np.int32).view(np.uint32),
    "shr.u32 %r3, %r2, 5;": lambda x: x >> np.uint32(5),
    "shr.s32 %r3, %r2, 40;": lambda x: (x.view(np.int32) >> 31).view(np.uint32),
    "shl.b32 %r3, %r2, 32;": lambda x: 0 * x,
    "bfe.u32 %r3, %r2, 3, 9;": lambda x: x >> np.uint32(3) & np.uint32(511),
    "prmt.b32 %r3, %r2, 0, 0x3210U;": lambda x: x,
    "prmt.b32 %r3, %r2, 0, 0xbbb3U;": lambda x: (x & 0xFF000000) >> 24 | np.where(x >> 31, np.uint32(0xFFFFFF00), 0),
    "cvt.s8.s32 %rs1, %r2; cvt.s32.s16 %r3, %rs1;": lambda x: x.astype(np.int8).astype(np.int32).view(np.uint32),
    "mov.b32 {%rs1, %rs2}, %r2; mov.b32 %r3, {%rs2, %rs1};": lambda x: x >> np.uint32(16) | x << np.uint32(16),
    "setp.lt.s32 %p1, %r2, 0; selp.b32 %r3, 1, %r2, %p1;": lambda x: np.where(x >> 31, np.uint32(1), x),
    "shfl.sync.bfly.b32 %r3, %r2, 5, 31, -1;": lambda x: x[np.arange(128) ^ 5],
    "shfl.sync.idx.b32 %r3, %r2, 3, 31, -1;": lambda x: x[np.arange(128) // 32 * 32 + 3],
    "shfl.sync.down.b32 %r3, %r2, 30, 31, -1;": lambda x: x[np.arange(128) + 30 * (np.arange(128) % 32 < 2)],
}  # fmt: skip


@pytest.mark.parametrize("code", INTEGERS)
def test_instructions_on_integers(code):
    x = words()
    np.testing.assert_array_equal(run(code, x), INTEGERS[code](x))


FLOATS = {
    "fma.rn.f32 %r3, %r2, %r2, 0f3F800000;": lambda x: (x.astype(np.float64) ** 2 + 1).astype(np.float32),
    "max.NaN.f32 %r3, %r2, 0f00000000;": lambda x: np.maximum(x, 0),
    "max.f32 %r3, %r2, 0f00000000;": lambda x: np.fmax(x, 0),
    "cvt.rni.f32.f32 %r3, %r2;": np.rint,
    "cvt.rzi.s16.f32 %rs1, %r2; cvt.rn.f32.s16 %r3, %rs1;": lambda x: np.nan_to_num(np.trunc(x)) + np.float32(0),
    "cvt.rn.f16.f32 %rs1, %r2; cvt.f32.f16 %r3, %rs1;": lambda x: x.astype(np.float16).astype(np.float32),
    "cvt.rn.bf16.f32 %rs1, %r2; cvt.f32.bf16 %r3, %rs1;": lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32),
    "cvt.rn.bf16x2.f32 %r4, %r2, 0f00000000; and.b32 %r3, %r4, 0xffff0000;": (
        lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32)
    ),
    "setp.ltu.f32 %p1, %r2, 0f00000000; selp.f32 %r3, 0f00000000, %r2, %p1;": lambda x: np.fmax(x, 0),
    "setp.equ.f32 %p1, %r2, 0f3F800000; selp.f32 %r3, 0f00000000, %r2, %p1;": (
        lambda x: np.where(np.isnan(x) | (x == 1), np.float32(0), x)
    ),
}  # fmt: skip


@pytest.mark.parametrize("code", FLOATS)
def test_instructions_on_floats(code):
    x = floats()
    x[5], x[7] = np.nan, 1
    expected = FLOATS[code](x)
    np.testing.assert_array_equal(run(code, x).view(np.uint32), expected.view(np.uint32))


def test_branches_part_and_meet_again():
    """Odd threads loop as often as their number says; then the warp exchanges."""
    code = """
	mov.b32 %r3, 0;
	and.b32 %r4, %r1, 1;
	setp.eq.b32 %p1, %r4, 0;
	@%p1 bra $meet;
$loop:
	add.s32 %r3, %r3, 2;
	setp.lt.s32 %p2, %r3, %r1;
	@%p2 bra $loop;
$meet:
	shfl.sync.bfly.b32 %r3, %r3, 1, 31, -1;
"""
    thread = np.arange(128)
    mine = np.where(thread % 2, thread + 1, 0)
    np.testing.assert_array_equal(run(code, words()), mine[thread ^ 1])


def test_a_warp_waits_for_threads_that_run_far_away():
    """Odd threads take a way whose code lies behind the exchange, to which all then come together."""
    code = """
	mov.b32 %r3, 7;
	and.b32 %r4, %r1, 1;
	setp.eq.b32 %p1, %r4, 1;
	@%p1 bra $far;
$back:
	shfl.sync.bfly.b32 %r3, %r3, 1, 31, -1;
	bra $end;
$far:
	mov.b32 %r3, %r1;
	bra $back;
$end:
"""
    thread = np.arange(128)
    mine = np.where(thread % 2, thread, 7)
    np.testing.assert_array_equal(run(code, words()), mine[thread ^ 1])


EXCHANGE = """
	mov.b64 %rd6, __dynamic_shmem__0;
	add.s64 %rd7, %rd6, %rd3;
	st.shared.b32 [%rd7], %r2;
	{barrier}
	xor.b32 %r5, %r1, 64;
	mul.wide.u32 %rd8, %r5, 4;
	add.s64 %rd9, %rd6, %rd8;
	ld.shared.b32 %r3, [%rd9];
"""


@pytest.mark.parametrize("barrier", ["bar.sync 0;", "bar.sync 1, 128;"])
def test_warps_exchange_through_shared_memory(barrier):
    x = words()
    np.testing.assert_array_equal(run(EXCHANGE.format(barrier=barrier), x), x[np.arange(128) ^ 64])


def test_without_a_barrier_an_exchange_fails():
    x = words()
    assert (run(EXCHANGE.format(barrier=""), x) != x[np.arange(128) ^ 64]).any()


ASYNCHRONOUS = """
	mov.b64 %rd6, __dynamic_shmem__0;
	add.s64 %rd7, %rd6, %rd3;
	cp.async.ca.shared.global [%rd7], [%rd4], 4;
	cp.async.commit_group;
	cp.async.ca.shared.global [%rd7+512], [%rd4], 4;
	cp.async.commit_group;
	{wait}
	ld.shared.b32 %r3, [%rd7{offset}];
	cp.async.wait_group 0;
"""


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("left", "offset"), [(1, ""), (0, "+512")])
def test_copies_have_landed_after_their_wait(late, left, offset):
    x = words()
    code = ASYNCHRONOUS.format(wait=f"cp.async.wait_group {left};", offset=offset)
    np.testing.assert_array_equal(run(code, x, late=late), x)


def test_a_wait_for_too_few_copies_fails():
    x = words()
    assert (run(ASYNCHRONOUS.format(wait="cp.async.wait_group 1;", offset="+512"), x) != x).any()


FAULTS = {
    "outside every array": "ld.global.b32 %r3, [%rd4+512];",
    "writes to an argument": "st.global.b32 [%rd4], %r2;",
    "misaligned": "ld.global.b32 %r3, [%rd4+2];",
    "outside shared memory": "mov.b64 %rd6, __dynamic_shmem__0; ld.shared.b32 %r3, [%rd6+4096];",
    "wait for ever": "bar.sync 1, 160;",
    "more threads at a barrier": "bar.sync 1, 96;",
    "part of a warp": "setp.lt.s32 %p1, %r2, 0; @%p1 shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;",
    "ended before its copies": "mov.b64 %rd6, __dynamic_shmem__0; cp.async.ca.shared.global [%rd6], [%rd4], 4;",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault):
    with pytest.raises(Fault, match=fault):
        run("mov.b32 %r3, 0; " + FAULTS[fault], words())


@pytest.mark.parametrize(
    ("instruction", "bits"), [("m16n8k32.row.col.s32.s8.s8", 8), ("m16n8k64.row.col.s32.s4.s4", 4)]
)
def test_the_tensor_cores_product(instruction, bits):
    """A warp multiplies A (16, 32) by B (8, 32) transposed, which ldmatrix loads as the manual lays their rows out.

    Of 4 bits it multiplies rows twice as long, the lower half of each byte first.
    """
    rng = np.random.default_rng(0)
    A, B = (rng.integers(-128, 128, (n, 32), np.int8) for n in (16, 8))
    copies = "".join(
        f"ld.global.b32 %r4, [%rd4+{k}]; st.shared.b32 [%rd7+{k}], %r4;" for k in range(0, A.nbytes + B.nbytes, 128)
    )

    def rows(mask, shift):
        """The address of this lane's row, of `mask` + 1, and of its half, in %rd9."""
        return f"""
	and.b32 %r9, %r1, {mask};
	shr.u32 %r10, %r1, {shift};
	and.b32 %r10, %r10, 1;
	mul.lo.s32 %r11, %r9, 32;
	mad.lo.s32 %r12, %r10, 16, %r11;
	cvt.u64.u32 %rd8, %r12;
	add.s64 %rd9, %rd6, %rd8;
"""

    code = f"""
	mov.b64 %rd6, __dynamic_shmem__0;
	add.s64 %rd7, %rd6, %rd3;
	{copies}
	bar.sync 0;
	{rows(15, 4)}
	ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r20, %r21, %r22, %r23}}, [%rd9];
	{rows(7, 3)}
	ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r24, %r25, %r26, %r27}}, [%rd9+512];
	mov.b32 %r30, 1;
	mma.sync.aligned.{instruction}.s32
		{{%r34,%r35,%r36,%r37}}, {{%r20,%r21,%r22,%r23}}, {{%r24,%r25}}, {{%r30,%r30,%r30,%r30}};
	mul.lo.s32 %r16, %r1, 8;
	cvt.u64.u32 %rd11, %r16;
	add.s64 %rd12, %rd2, %rd11;
	st.global.v2.b32 [%rd12], {{%r34, %r35}};
	st.global.v2.b32 [%rd12+256], {{%r36, %r37}};
	ret;
}}
"""
    x = np.concatenate([A, B]).view(np.uint32).ravel()
    result = run(code, x, threads=32, out=np.zeros((16, 8), np.int32), tail="")
    if bits == 4:
        A, B = (np.stack([(levels << 4) >> 4, levels >> 4], axis=-1).reshape(len(levels), 64) for levels in (A, B))
    np.testing.assert_array_equal(result, A.astype(np.int32) @ B.T.astype(np.int32) + 1)


LOADED = """
	mov.b64 %rd6, __dynamic_shmem__0;
	cvt.u32.u64 %r4, %rd6;
	add.s32 %r5, %r4, 2048;
	setp.eq.b32 %p1, %r1, 0;
	mov.b64 %rd7, maps;
	mov.b32 %r6, {corner};
	mov.b32 %r7, 0;
	mov.b32 %r8, 1;
	mov.b32 %r9, 1024;
	@%p1 mbarrier.init.shared::cta.b64 [%r5], %r8;
	bar.sync 0;
	@%p1 mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%r5], %r9;
	@%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r4], [%rd7, {{%r7,%r6}}], [%r5];
	{{
	.reg .pred P1;
	WAIT:
	mbarrier.try_wait.parity.shared.b64 P1, [%r5], %r7, %r9;
	@P1 bra.uni DONE;
	bra.uni WAIT;
	DONE:
	}}
	add.s64 %rd8, %rd6, %rd3;
	ld.shared.b32 %r3, [%rd8];
"""


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("corner", [0, 3])
def test_a_window_arrives_swizzled_and_padded_with_zeros(late, corner):
    """8 rows of 128 bytes from row 0 or 3 of 8; each 16-byte unit lies at its number xor its row."""
    x = words(256)
    tensor_map = TensorMap(0, (8, 32), (32, 1), (8, 32), 128)
    result = run(LOADED.format(corner=corner), x, threads=256, late=late, maps=[tensor_map])
    rows = np.concatenate([x.reshape(8, 8, 4)[corner:], np.zeros((corner, 8, 4), np.uint32)])
    expected = np.stack([rows[r, np.arange(8) ^ r] for r in range(8)])
    np.testing.assert_array_equal(result.reshape(8, 8, 4), expected)


def test_writes_must_be_fenced_before_the_accelerator_reads_them():
    code = """
	mov.b64 %rd6, __dynamic_shmem__0;
	cvt.u32.u64 %r4, %rd6;
	add.s64 %rd8, %rd6, %rd3;
	st.shared.b32 [%rd8], %r2;
	{fence}
	bar.sync 0;
	setp.eq.b32 %p1, %r1, 0;
	mov.b64 %rd7, maps;
	mov.b32 %r7, 0;
	@%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd7, {{%r7,%r7}}], [%r4];
	cp.async.bulk.commit_group;
	ret;
}}
"""
    x, tensor_map = words(256), TensorMap(1, (8, 32), (32, 1), (8, 32), 128)
    options = dict(threads=256, maps=[tensor_map], tail="")
    result = run(code.format(fence="fence.proxy.async.shared::cta;"), x, **options).reshape(8, 8, 4)
    expected = np.stack([x.reshape(8, 8, 4)[r, np.arange(8) ^ r] for r in range(8)])
    np.testing.assert_array_equal(result, expected)
    with pytest.raises(Fault, match="without a fence"):
        run(code.format(fence=""), x, **options)


def test_host_code():
    """The order of parameters is the kernel's own; %1 points to the arrays."""
    host = """
define void @kernel(ptr %0, ptr %1) {
  %2 = getelementptr ptr, ptr %1, i32 2
  %3 = load ptr, ptr %2, align 8
  %4 = load ptr, ptr %1, align 8
  %5 = alloca { ptr, ptr }, align 8
  %6 = alloca [2 x i64], align 8
  %7 = getelementptr { ptr, ptr }, ptr %5, i32 0, i32 0
  store ptr %3, ptr %7, align 8
  %8 = getelementptr i64, ptr %6, i32 0
  store ptr %7, ptr %8, align 8
  %9 = getelementptr { ptr, ptr }, ptr %5, i32 0, i32 1
  store ptr %4, ptr %9, align 8
  %10 = getelementptr i64, ptr %6, i32 1
  store ptr %9, ptr %10, align 8
  call void @mosaic_gpu_build_kernel_spec(ptr %0, {numbers}, ptr %6, ptr %6)
  ret void
}
"""
    numbers = ", ".join(f"i32 {n}" for n in (3, 50, 1, 0, 0, 0, 128, 1, 1, 64, 0, 2))
    assert parse_host(host.replace("{numbers}", numbers)) == Launch((3, 50, 1), 64, [2, 0])

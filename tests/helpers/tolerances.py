"""Every tolerance of the test suite, each with its reason."""

PARITY = 1e-5
"""Logits and block outputs against the official float32 code; a wrong eps or activation moves them by 7e-5 or more."""

# attention
ATTENTION_ROUNDING = 2e-5
"""Two float32 orders of summation of one attention map, relative to its largest entry; exponents come from a cumsum."""

# data
PIXEL = 1e-6
"""Normalised pixels in float32 against float64: values up to 3, one division and one subtraction."""

# Quantiser (test_qtensor, test_split, test_split_calibration, test_matmul)
SCALE_ROUNDING = 5e-7
"""A searched scale is max * fraction / q: three float32 roundings, ours and the official code's in different order."""
EPILOGUE = 2e-5
"""Integer products with a float epilogue against one float product, relative to the largest output: float32 sums of
up to 2000 terms."""

# generation
CONTRASTIVE_LOSS = 1e-4
"""Float32 against a float64 loop; similarities are divided by the temperature, and the guard of their norm is 1e-6."""

# selective scan (test_scan), relative to the largest entry of what is compared
SCAN_VALUE = {"float32": 5e-6, "bfloat16": 8e-3}
"""By dtype of the inputs. The state is float32 in both: roundings of 200 steps, worst where many terms cancel. bfloat16
adds the rounding of y (2^-8), and none of the inputs, since the float64 loop sees them rounded."""
SCAN_GRADIENT = {"float32": 2e-5, "bfloat16": 8e-3}
"""As above; the sums over tokens and channels behind dA, dB and dC are longer; a bfloat16 gradient rounds to 2^-8."""
SCAN_VALUE_GPU = {"float32": 1e-4, "bfloat16": 8e-3}
"""The GPU kernels take 2^x and log2 from the special-function unit, each up to 2^-22 off. A state is a product of up to
197 decays: 4.7e-5. A softplus by logarithm is at least 0.03 and 2.3e-7 off: 7.7e-6 of a step size, once in the input
and at most once in all decays. The roundings above come on top: 7e-5 in all. bfloat16 hides that."""
SCAN_GRADIENT_GPU = {"float32": 2e-4, "bfloat16": 8e-3}
"""As above, over at most 50 tokens 3e-5 in the states and in the adjoint, in sums of a third of their terms' size."""
LOGITS_GPU = {"float": 1e-4, "quantised": 0.015}
"""Of models whose scans run on a GPU's kernels, relative to the largest logit. Behind a quantiser the difference of a
scan vanishes, or moves an entry across the edge between two levels: one of 15 in a row of 20 entries."""
SITE_SQNR_GPU = 0.1
"""Decibels at a site of some hundred entries: one on the edge between two levels may take either."""

# models (test_models), on values of size about 1
REORDERED = 5e-6
"""The same float32 sums in another order or another program: a few dozen roundings of values around 1."""
BFLOAT16_LOGITS = 0.03
"""Relative error of the logits of a two-block model computed in bfloat16 (2^-8 per rounding)."""

# quantised models (test_fake), relative to the largest entry
FAKE_AGAINST_INTEGER = 5e-6
"""One float product of rounded values against integers with a float epilogue."""

# --- interpolated positions (test_convert.py)

INTERPOLATION = 1e-6
"""Computed in float64, rounded to float32 once, on values up to 5."""

# VMamba (test_vmamba)
VMAMBA_SCAN = 2e-6
"""y of one scan against float64 loops, relative to its largest entry: a dozen float32 roundings of inputs and state."""

# MambaVision (test_mambavision)
MAMBAVISION_BLOCK = 2e-5
"""Outputs of up to 5.5 behind a scan whose y is 3e-5 off, see below."""
MAMBAVISION_SCAN = 1e-5
"""y and h of one scan, relative to the largest entry: its operands come from two convolutional levels and are 4e-6 off,
and y sums eight products of up to 19 of them; on the same operands the scans agree to 7e-7."""

# baselines (test_baselines)
BATCHED_FLOAT = 2e-6
"""Logits of size 1 after float products (a float stem, kSQ-VMM), whose sums' order may vary with the batch."""
FLOAT64_LOOP = 5e-6
"""y of a scan against a float64 recurrence on rescaled states, relative to its largest entry."""

# --- several devices (test_sharding)
SHARDED = 1e-5
"""Logits of size 1: a smaller part per device sums products in another order."""
SHARDED_PIXELS_MEAN = 5e-4
"""Pixels of size 1 on average: Adam divides by the gradient's size; near zero a rounding becomes a whole step."""

# benchmark of the kernels (test_bench_kernels)
SAME_PRODUCT = 0.9
"""Correlation of a layer at 4 bits with the same layer in bfloat16, on 84 outputs; with another layer it is near 0."""

# --- what the compiler fuses (test_miscompile.py)

FUSED = 2e-5
"""The same float32 operations fused and one by one, relative to the largest entry; sums have up to 4,096 terms. A
miscompiled product is off by more than it is."""
EPILOGUE_GPU = {"float32": 1e-6, "bfloat16": 2**-7}
"""Of a product's float epilogue: where a compiler contracts a product and a sum, the last bit moves."""

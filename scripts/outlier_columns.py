"""How many channels of an activation are outliers, as the GPU's integer product sees them: in tiles of rows.

    python scripts/outlier_columns.py [--models vim_micro vmamba_micro] [--bits w4a4] [--json FILE]

Takes three minutes on one CPU core. Quantises each model on 64 digits, untuned, and splits the activations of 64
held-out ones. Per kind of matmul, means over the sites: the share of entries that are outliers, of channels that any
row of a tile lists (64 and 128 consecutive tokens), of tiles of 128 whose list holds more than half of all channels
(one of these sends a call of "mosaic_gpu_int4" to the dense kernel), of tokens whose outliers need a larger step
(j > 0), and of tiles of 128 that hold one.

The last column is the reason why models multiply dense int8 levels on sm80 and sm89, too, whose tensor cores take 4-bit
integers: the least time of 4-bit inliers (at twice the speed) and of the listed channels alone in int8, divided by that
of the dense int8 product. Tensor cores only, tiles of 128 rows; gathering the channels and padding them come on top.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from unittest import mock

import numpy as np

import ouromamba_jax as oj
from ouromamba_jax.data import load_images
from ouromamba_jax.evaluation.bench import write_results
from ouromamba_jax.ops.split_types import OutlierSplit
from ouromamba_jax.quantize.modules import ActQuantizer, QuantLinear
from ouromamba_jax.quantize.sites import named_modules
from ouromamba_jax.report.tables import print_table

MODELS = ("vim_micro", "vmamba_micro", "mambavision_micro")
IMAGES = 64
HEADERS = (
    "matmul", "inputs", "outliers, %", "of 64 rows, %", "of 128 rows, %", "lists over half, %", "tokens j > 0, %",
    "tiles j > 0, %", "least time",
)  # fmt: skip


def describe(split: OutlierSplit) -> list[float]:
    """Inputs, shares in the order of `HEADERS`, and the time relative to the dense product's."""
    mask, shifted = (np.asarray(x).reshape(-1, *x.shape[2:]) for x in (split.mask, split.shifted))
    inputs = mask.shape[-1]

    def tiles(x: np.ndarray, rows: int) -> np.ndarray:
        return np.stack([x[start : start + rows].any(axis=0) for start in range(0, len(x), rows)])

    lists = tiles(mask, 128)
    listed = lists.mean()
    return [
        inputs,
        mask.mean(),
        tiles(mask, 64).mean(),
        listed,
        (lists.mean(axis=1) > 0.5).mean(),
        shifted.mean(),
        tiles(shifted, 128).mean(),
        0.5 + listed,
    ]


def rows_of(name: str, bits: str) -> list[list]:
    model = oj.load(name)
    images = {
        split: load_images("digits", split, model.config.img_size, model.config.preprocessing, limit=IMAGES).images
        for split in ("train", "test")
    }
    config = oj.QuantConfig.preset(bits, tune_epochs=0)
    quantised, _ = oj.quantize(model, images["train"], config)
    kinds = {
        id(module.act): path.rsplit(".", 1)[-1]
        for path, module in named_modules(quantised)
        if isinstance(module, QuantLinear) and module.spec.config.act_bits == config.act_bits  # no stem, no head
    }
    found = defaultdict(list)
    for_product = ActQuantizer.split_for_product

    def recording(self, x, **options):
        if id(self) in kinds:
            found[kinds[id(self)]].append(describe(self.split(x, with_mask=True)))
        return for_product(self, x, **options)

    with mock.patch.object(ActQuantizer, "split_for_product", recording):
        quantised(images["test"])
    rows = []
    for kind, sites in found.items():
        inputs, *shares, time = np.mean(sites, axis=0)
        rows.append([f"{name} {kind}", int(inputs), *(100 * share for share in shares), time])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME", help="or folders of checkpoints")
    parser.add_argument("--bits", default="w4a4", help="a preset of QuantConfig (default: w4a4)")
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    rows = [row for name in arguments.models for row in rows_of(name, arguments.bits)]
    print_table(rows, HEADERS, title=arguments.bits)
    if arguments.json:
        write_results(arguments.json, dict(bits=arguments.bits, headers=HEADERS, rows=rows))


if __name__ == "__main__":
    main()

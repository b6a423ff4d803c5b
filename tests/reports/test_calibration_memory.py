"""Calibration holds the activations of one batch, however many images there are."""

import jax
from quantising import float_model, images

from ouromamba_jax import QuantConfig
from ouromamba_jax.quantize import run
from ouromamba_jax.quantize.sites import resolve_sites
from ouromamba_jax.quantize.stages import StageInputs

BLOCK = "blocks.0"


def inputs(count, batch_size, config):
    model = float_model()
    x = model.stem(images(2, count))
    configs = {path.removeprefix(f"{BLOCK}."): c for path, c in resolve_sites(model, config).items() if BLOCK in path}
    return StageInputs(BLOCK, model.blocks[0], x, x, configs, batch_size)


def test_no_more_than_a_batch_is_alive(monkeypatch):
    batches = StageInputs.batches

    def watched(self):
        for captured in batches(self):
            alive.append(sum(array.nbytes for array in jax.live_arrays()))
            yield captured

    monkeypatch.setattr(StageInputs, "batches", watched)
    peaks = []
    for count in (8, 40):
        alive = []
        of = inputs(count, 4, QuantConfig(scale_search="max"))
        own = of.exact.nbytes
        specs, found = run.calibrate_sites(of.stage, of)
        run.fitted(of.stage, of, specs, found)
        passes, rest = divmod(len(alive), count // 4)
        assert (3 <= passes <= 7, rest) == (True, 0)
        peaks.append(max(alive) - own)
    assert peaks[1] < 1.02 * peaks[0]

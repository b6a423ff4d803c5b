"""A quantisation that was interrupted goes on behind its finished stages, to the same bits, and only its own."""

import dataclasses

import pytest
from flax import nnx
from quantising import bits_of, float_model, images

from ouromamba_jax import QuantConfig, quantize
from ouromamba_jax.quantize import run

# At 5 bits some outliers take a second byte: arrays of every type are kept.
CONFIG = QuantConfig.preset("w4a4", scale_search="max", tune_epochs=0, outlier_bits=5)
STAGES = ["stem", "blocks.0", "head"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder with a run that was interrupted before its last stage, a whole one without a folder)."""
    folder = tmp_path_factory.mktemp("run") / "new"

    def interrupt(done, total, name):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(float_model(), images(), CONFIG, progress=interrupt, resume=folder)
    return folder, quantize(float_model(), images(), CONFIG)


@pytest.fixture
def calibrated(monkeypatch):
    """The names of the stages that are calibrated from now on."""
    names, calibrate = [], run.calibrate_sites
    monkeypatch.setattr(
        run, "calibrate_sites", lambda stage, inputs: names.append(inputs.name) or calibrate(stage, inputs)
    )
    return names


def test_it_goes_on_behind_the_last_finished_stage_to_the_same_bits(finished, calibrated):
    folder, (whole, report) = finished
    assert sorted(path.name for path in folder.iterdir()) == ["blocks.0.npz", "stem.npz"]
    for expected in (STAGES[2:], []):
        calibrated.clear()
        low, again = quantize(float_model(), images(), CONFIG, resume=folder)
        assert calibrated == expected
        assert bits_of(low) == bits_of(whole)
        assert nnx.graphdef(low) == nnx.graphdef(whole)
        assert again == report
    assert any(site.second_byte for site in report.sites)


def other_weights():
    model = nnx.clone(float_model())
    model.head.proj.bias.set_value(model.head.proj.bias[...] + 1)
    return model


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(model=other_weights), "another weights"),
        (dict(images=lambda: images(1)), "another images"),
        (dict(config=lambda: dataclasses.replace(CONFIG, sigma=2.0)), "another config"),
    ],
)
def test_stages_of_another_run_are_refused(fields, says, finished):
    call = dict(model=float_model, images=images, config=lambda: CONFIG) | fields
    with pytest.raises(ValueError, match=rf"holds an unfinished run with {says}; delete that folder\.$"):
        quantize(*(make() for make in call.values()), resume=finished[0])


def test_a_damaged_stage_is_refused(finished, tmp_path):
    content = (finished[0] / "stem.npz").read_bytes()
    (tmp_path / "stem.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"stem\.npz cannot be read as an \.npz"):
        quantize(float_model(), images(), CONFIG, resume=tmp_path)


def test_losses_of_tuning_are_kept(tmp_path):
    fitted = run.Fitted({}, (), (0.5, 0.25))
    run.keep_stage(tmp_path, "blocks.0", fitted, {})
    assert run.kept_stage(tmp_path, "blocks.0", float_model().stem, {}) == fitted

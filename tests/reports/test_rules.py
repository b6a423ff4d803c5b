"""Rules that refine, override and miss: field by field, none without a word, and all of them in the report."""

import pytest
from quantising import float_model, images

from ouromamba_jax import QuantConfig, QuantRule
from ouromamba_jax.quantize import SiteReport
from ouromamba_jax.quantize.sites import resolve_sites
from ouromamba_jax.quantize.stages import Fitted, quantize_stages

SCAN = "blocks.0.mixer.scan"
X_PROJ = "blocks.0.mixer.directions.1.x_proj"


@pytest.mark.parametrize("rule", [QuantRule("in_proj", act_bits=8), QuantRule("scan", operands=("delta",))])
def test_a_rule_that_a_later_one_shadows_is_an_error_that_names_both(rule):
    shadow = QuantRule("mixer", act_bits=6, operands=("delta", "B"))
    config = QuantConfig.preset("w4a4", rules=(rule, shadow))
    with pytest.raises(ValueError, match=f"rule '{rule.pattern}' decides nothing: 'mixer' overrides it at every site"):
        resolve_sites(float_model(), config)
    assert resolve_sites(float_model(), QuantConfig.preset("w4a4", rules=(shadow, rule)))


def test_a_rule_for_what_another_leaves_out_is_an_error():
    rules = (QuantRule("mixer", skip=True), QuantRule("in_proj", act_bits=8))
    with pytest.raises(ValueError, match="rule 'in_proj' decides nothing: 'mixer' overrides it at every site"):
        resolve_sites(float_model(), QuantConfig.preset("w4a4", rules=rules))
    back = (*rules, QuantRule("in_proj", skip=False))
    assert resolve_sites(float_model(), QuantConfig.preset("w4a4", rules=back)).keys() == {
        "stem.proj",
        "blocks.0.mixer.in_proj",
        "head.proj",
    }


@pytest.mark.parametrize(
    ("rule", "fields"),
    [
        (QuantRule("in_proj", operands=("delta",)), {}),
        (QuantRule("scan$", weight_bits=8), {}),
        (QuantRule("in_proj", outlier_bits=8), dict(act_bits=None)),
    ],
)
def test_settings_that_no_matched_site_has_are_an_error(rule, fields):
    with pytest.raises(ValueError, match=f"decides nothing: no quantised site .* has {next(iter(rule.settings()))};"):
        resolve_sites(float_model(), QuantConfig.preset("w4a4", rules=(rule,), **fields))


def test_a_preset_may_be_overridden_in_full():
    rules = (QuantRule("stem|head", skip=True),)
    assert not [p for p in resolve_sites(float_model(), QuantConfig.preset("w4a4", rules=rules)) if "mixer" not in p]


def unchanged(stage, inputs):
    """A method that leaves every site as it is, and reports it; of a scan, two operands."""
    paths = [path + end for path in inputs.configs for end in ((".delta", ".A") if path.endswith("scan") else ("",))]
    return Fitted({}, tuple(SiteReport(path, "matmul", 4, 4, 8, "token", 0.0, 20.0) for path in paths))


def test_the_report_says_what_each_site_got_and_from_which_rule():
    edges, inside = r"^(stem|head)\.", "blocks"
    rules = (
        QuantRule(inside, weight_bits=5),
        QuantRule("x_proj", act_bits=0),
        QuantRule("head", weight_bits=6),
        QuantRule("scan", operands=("delta", "A")),
    )
    config = QuantConfig.preset("w4a4", rules=rules)
    _, report = quantize_stages(float_model(), images(), config, unchanged)
    by_path = {site.path: site for site in report.sites}
    assert by_path["stem.proj"].rules == (
        ("weight_bits", 8, edges),
        ("act_bits", 8, edges),
        ("outlier_bits", 16, edges),
    )
    assert by_path["head.proj"].rules == (("weight_bits", 6, "head"), *by_path["stem.proj"].rules[1:])
    assert by_path["blocks.0.mixer.in_proj"].rules == (("weight_bits", 5, inside),)
    for name in ("delta", "A"):
        assert by_path[f"{SCAN}.{name}"].rules == (("operands", ("delta", "A"), "scan"),)
    assert by_path[X_PROJ].rules == (("weight_bits", 5, inside), ("act_bits", 0, "x_proj"))
    assert f"weight_bits=6 by head; act_bits=8 by {edges}" in str(report)

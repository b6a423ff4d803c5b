"""Where the tensors of hustvl/Vim's VisionMamba go; direction 0 runs forward, direction 1 (names with b) backward."""

from ouromamba_jax.convert.keymap import Rule, depthwise1d, linear, patches, squeeze

_MIXER = "layers.{i}.mixer"
_TARGET = "blocks.{i}.mixer"


def _direction(index: int, b: str) -> tuple[Rule, ...]:
    """One scan direction: its own convolution and projections, and its half of the scan's parameters."""
    own, half = f"{_TARGET}.directions.{index}", (index, 2)
    return (
        Rule(f"{_MIXER}.conv1d{b}.weight", f"{own}.conv.kernel", depthwise1d),
        Rule(f"{_MIXER}.conv1d{b}.bias", f"{own}.conv.bias"),
        Rule(f"{_MIXER}.x_proj{b}.weight", f"{own}.x_proj.kernel", linear),
        Rule(f"{_MIXER}.dt_proj{b}.weight", f"{own}.dt_proj.kernel", linear),
        Rule(f"{_MIXER}.dt_proj{b}.bias", f"{_TARGET}.scan.dt_bias", part=half),
        Rule(f"{_MIXER}.A{b}_log", f"{_TARGET}.scan.A_log", part=half),
        Rule(f"{_MIXER}.D{b}", f"{_TARGET}.scan.D", part=half),
    )


VIM_RULES = (
    Rule("patch_embed.proj.weight", "stem.proj.kernel", patches),
    Rule("patch_embed.proj.bias", "stem.proj.bias"),
    Rule("cls_token", "stem.class_token", squeeze(0, 1)),
    Rule("pos_embed", "stem.positions", squeeze(0)),
    Rule("layers.{i}.norm.weight", "blocks.{i}.norm.scale"),
    Rule(f"{_MIXER}.in_proj.weight", f"{_TARGET}.in_proj.kernel", linear),
    *_direction(0, ""),
    *_direction(1, "_b"),
    Rule(f"{_MIXER}.out_proj.weight", f"{_TARGET}.out_proj.kernel", linear),
    Rule("norm_f.weight", "head.norm.scale"),
    Rule("head.weight", "head.proj.kernel", linear),
    Rule("head.bias", "head.proj.bias"),
)

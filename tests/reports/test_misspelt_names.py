"""A misspelt name of a model, data set, preset or rival: the error offers the nearest one."""

import pytest

from ouromamba_jax import QuantConfig, create_model, load
from ouromamba_jax.baselines import quantize_baseline
from ouromamba_jax.cli.main import main

COMMANDS = {
    "bench": (("bench", "vim_mikro"), "vim_micro"),
    "evaluate": (("evaluate", "Vim-Micro", "--data", "digits"), "vim_micro"),
    "compare": (("compare", "vim_micro", "vmamba_mirco", "--data", "digits"), "vmamba_micro"),
    "generate": (("generate", "vim_mcro", "out.npz"), "vim_micro"),
    "quantize": (("quantize", "vim_mikro", "out", "--bits", "w4a4"), "vim_micro"),
    "quantize --model": (("quantize", "a.pth", "out", "--bits", "w4a4", "--model", "vim_tinny"), "vim_tiny"),
    "convert": (("convert", "vim_tinny", "a.pth", "out"), "vim_tiny"),
    "inspect": (("inspect", "vim_mikro"), "vim_micro"),
    "export": (("export", "vim_mikro", "a.stablehlo"), "vim_micro"),
    "--data": (("evaluate", "vim_micro", "--data", "digit"), "digits"),
    "--images": (("quantize", "vim_micro", "out", "--bits", "w4a4", "--images", "cifar-10"), "cifar10"),
}


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_verb_offers_the_nearest(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, meant = COMMANDS[verb]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert f"did you mean {meant}" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", [*COMMANDS])
def test_what_resembles_nothing_gets_the_choice(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, _ = COMMANDS[verb]
    names = {"vim_mikro", "Vim-Micro", "vmamba_mirco", "vim_mcro", "vim_tinny", "digit", "cifar-10"}
    assert main(["qqq" if argument in names else argument for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert "did you mean" not in error
    assert "vim_micro" in error or "tfds:NAME" in error


def test_names_in_python():
    for call, meant in (
        (lambda: load("vim_mikro"), "vim_micro"),
        (lambda: create_model("vim_tinny"), "vim_tiny"),
        (lambda: QuantConfig.preset("W4-A4"), "w4a4"),
        (lambda: quantize_baseline(None, None, "ptq4vim", weight_bits=4, act_bits=4), "ptq4vm"),
    ):
        with pytest.raises(ValueError, match=f"did you mean {meant}"):
            call()
    with pytest.raises(ValueError, match=r"there is no checkpoint at runs/vim_mikro: .* shipped ones are .*vim_micro"):
        load("runs/vim_mikro")

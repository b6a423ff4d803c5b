"""The runs that a study is made of: what they vary, how they are named and kept, and the tables they become."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

from ouromamba_jax import GenConfig, QuantConfig
from ouromamba_jax.baselines import BASELINES
from ouromamba_jax.files import write_text
from ouromamba_jax.quantize import PRESETS

OURS = "ouromamba"
BITS = tuple(reversed(PRESETS))
OPTIONAL = ("strengths", "attention")
"""Tables that are made only where they are named, since they take an hour per seed, and days."""
HEADERS = (
    "method",
    "calibration",
    "bits",
    "setting",
    "seeds",
    "top-1 %",
    "top-1 +-",
    "agree %",
    "SQNR dB",
    "SQNR +-",
    "outl. %",
    "bits of act.",
)
SCORES = ("top1", "agreement", "sqnr_db", "outlier_rate", "mean_bits")
PLAIN_PIXELS = dict(scales=1, chroma=1.0, jitter=0.0, total_variation=0.0)
STRENGTHS = ("learning_rate", "temperature", "jitter", "total_variation", "chroma", "contrastive", "batch_size")
Fields = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Run:
    """One quantised model: how it is calibrated, by which method, at which bits.

    `common` (the same in every run) and `gen` are fields of GenConfig, for synthetic images only; `settings` are fields
    of the method's config.
    """

    method: str = OURS
    source: str = "synthetic"
    bits: str = "w4a4"
    images: int = 128
    common: Fields = ()
    gen: Fields = ()
    settings: Fields = ()

    @property
    def title(self) -> str:
        """The method's name in tables and figures."""
        return "OuroMamba" if self.method == OURS else BASELINES[self.method].title

    @property
    def setting(self) -> str:
        """What the row is about, in words."""
        return ", ".join(f"{name} {value}" for name, value in (*self.gen, *self.settings)) or "default"

    @property
    def gen_config(self) -> GenConfig:
        """How the synthetic images are made."""
        return GenConfig(num_images=self.images, **dict(self.common + self.gen))

    def key(self, seed: int) -> str:
        """What the run's line is found by: all that differs from the defaults, so that equal runs have one key."""
        described: dict[str, Any] = dict(method=self.method, source=self.source, bits=self.bits, images=self.images)
        settings = dict(self.settings)
        if self.source == "synthetic":
            described["gen"] = _changed(self.gen_config, GenConfig(num_images=self.images))
        if self.method == OURS:
            default = QuantConfig.preset(self.bits)
            settings = _changed(dataclasses.replace(default, **settings), default)
        return json.dumps(described | dict(settings=settings, seed=seed), sort_keys=True)


def _changed(config: Any, default: Any) -> dict[str, Any]:
    names = (field.name for field in dataclasses.fields(config))
    return {name: getattr(config, name) for name in names if getattr(config, name) != getattr(default, name)}


def tables(images: int, **common: Any) -> dict[str, list[Run]]:
    """The study: the runs of every table, in order. Equal runs of two tables are made once.

    Args:
      images: for calibration, where a table does not vary their number.
      common: fields of GenConfig for all synthetic images.
    """
    base = Run(images=images, common=tuple(common.items()))

    def vary(*, bits: tuple[str, ...] = ("w4a8", "w4a4"), gen: dict[str, Any] | None = None, **fields: Any):
        fields["settings"] = tuple(fields.get("settings", {}).items())
        return [dataclasses.replace(base, bits=b, gen=tuple((gen or {}).items()), **fields) for b in bits]

    def ours(**settings: Any):
        return vary(settings=settings)

    rivals = [run for name in BASELINES for run in vary(bits=BITS, method=name, source="real")]
    return {
        # Tables 1 and 2 of the paper: rivals with real images, ours with none.
        "methods": [*vary(bits=BITS), *vary(bits=BITS, source="real"), *rivals],
        # Table 4: where the calibration images come from.
        "calibration": [
            *(run for source in ("synthetic", "real", "noise") for run in vary(bits=BITS, source=source)),
            *(run for source in ("synthetic", "real") for run in vary(method="ptq4vm", source=source)),
        ],
        # Table 5: how outliers are found.
        "detection": [
            *ours(detection="none"),
            *(run for statistic in ("mean", "max") for run in ours(detection="static", static_list=statistic)),
            *ours(),
        ],
        "tuning": [
            run
            for epochs in (0, QuantConfig.tune_epochs)
            for source in ("synthetic", "real")
            for run in vary(source=source, settings=dict(tune_epochs=epochs))
        ],
        "rounding": [
            run
            for rounding in ("nearest", "gptq")
            for source in ("synthetic", "real")
            for run in vary(source=source, settings=dict(weight_rounding=rounding))
        ],
        # The ablation of the losses; "plain pixels" is the same without our image prior.
        "losses": [
            *vary(gen=dict(contrastive=0.0)),
            *vary(gen=dict(contrastive=1.0, output=0.0)),
            *vary(gen=dict(contrastive=1.0)),
            *vary(),
            *vary(gen=dict(contrastive=0.0, output=0.0, pse=1.0)),
            *vary(gen=dict(contrastive=0.0, pse=1.0)),
            *(run for c in (0.0, 1.0) for run in vary(gen=dict(contrastive=c, **PLAIN_PIXELS))),
        ],
        # The image prior, one part off at a time.
        "prior": [
            *vary(),
            *(run for name, value in PLAIN_PIXELS.items() for run in vary(gen={name: value})),
            *vary(gen=PLAIN_PIXELS),
            *vary(gen=dict(learning_rate=0.05, **PLAIN_PIXELS)),
        ],
        # More outliers cost bits: compare settings of equal mean bits of activations.
        "threshold": [run for sigma in (2.5, 3.0, 3.5, 4.0) for run in ours(sigma=sigma)],
        # 8-bit outliers beside 8-bit inliers make the plainest product.
        "plain int8": [run for bits in (8, 16) for run in vary(bits=("w8a8",), settings=dict(outlier_bits=bits))],
        "refresh": [run for n in (1, 5, 10, 20, 1000) for run in ours(n_refresh=n)],
        "iterations": [run for n in (25, 50, 100, 200, 400) for run in vary(gen=dict(iterations=n))],
        "images": [run for count in (16, 32, 64, 128, 256) for run in vary(images=count)],
        "contrast": [
            *vary(gen=dict(contrastive=1.0)),
            *(
                run
                for n in (3, 7)
                for run in vary(gen=dict(contrastive=1.0, neighbourhood=n, positives=min(12, n * n - 2)))
            ),
            *(run for k in (4, 20) for run in vary(gen=dict(contrastive=1.0, positives=k))),
            *vary(gen=dict(contrastive=1.0, weighting="uniform")),
            *vary(gen=dict(contrastive=1.0, negatives="neighbourhood")),
        ],
        # Defaults of ours, which no paper gives, halved and doubled.
        "strengths": [
            *(
                run
                for gen in ({}, *_halved_and_doubled(base.gen_config, STRENGTHS))
                for run in vary(bits=("w4a4",), gen=gen)
            ),
            *(
                run
                for settings in _halved_and_doubled(QuantConfig(), ("tune_learning_rate", "tune_epochs"))
                for run in vary(bits=("w4a4",), settings=settings)
            ),
        ],
        "attention": vary(gen=dict(contrastive=1.0, features="attention")),
    }


def _halved_and_doubled(config: Any, names: tuple[str, ...]) -> list[dict[str, Any]]:
    values = {name: getattr(config, name) for name in names}
    return [{name: type(value)(factor * value)} for name, value in values.items() for factor in (0.5, 2)]


def read_runs(path: Path) -> dict[str, dict[str, Any]]:
    """Finished runs by key. A last line that was cut off while being written counts as unfinished, and is removed."""
    if not path.exists():
        return {}
    entries, whole = {}, []
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        entries[entry["key"]] = entry
        whole.append(line + "\n")
    if (text := "".join(whole)) != path.read_text():
        write_text(path, text)
    return entries


def finished(run: Run, done: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The run's entries, seed by seed."""
    seeds = sorted({json.loads(key)["seed"] for key in done})
    return [done[key] for seed in seeds if (key := run.key(seed)) in done]


def summarise(every: dict[str, list[Run]], done: dict[str, dict[str, Any]]) -> Iterator[tuple[str, list[list[Any]]]]:
    """(table, rows under HEADERS): means over the seeds that are finished.

    A table is left out if one method, source and setting is all it has, or if it adds no run to those before.
    """
    shown: set[str] = set()
    for table, runs in every.items():
        rows, found = [], set()
        for run in dict.fromkeys(runs):
            if entries := finished(run, done):
                found.add(run.key(0))
                average = {name: mean(e[name] for e in entries) for name in SCORES}
                spread = {name: pstdev(e[name] for e in entries) if len(entries) > 1 else None for name in SCORES}
                rows.append(
                    [
                        run.title,
                        f"{run.images} {run.source}",
                        run.bits.upper(),
                        run.setting,
                        len(entries),
                        _rounded(average["top1"], 100),
                        _rounded(spread["top1"], 100),
                        _rounded(average["agreement"], 100),
                        _rounded(average["sqnr_db"]),
                        _rounded(spread["sqnr_db"]),
                        _rounded(average["outlier_rate"], 100),
                        _rounded(average["mean_bits"]),
                    ]
                )
        if len({(title, images, setting) for title, images, _, setting, *_ in rows}) > 1 and not found <= shown:
            yield table, rows
            shown |= found


def _rounded(value: float | None, unit: int = 1) -> float | None:
    return None if value is None else round(unit * value, 2)

"""Every comparison of the paper on one model: method x bits x calibration source x seed.

    python scripts/study.py --model vim_micro --data digits --out docs/study/vim_micro --images 64 --iterations 60
    python scripts/study.py --model vim_micro_cifar10 --data "cifar10_{split}.npz" --out docs/study/vim_micro_cifar10
    python scripts/study.py --model vim_tiny/ --data tfds:imagenet2012 --test-split validation --out outputs/study

With `--images 128 --iterations 100`, three seeds of `methods calibration detection` of vim_micro_cifar10 took an hour
and a half beside other work on two CPU cores, and one seed of the other tables an hour, without the contrastive loss on
`attention` features, which was stopped after twenty minutes. On the digits, one seed of those first three tables takes
twenty minutes. Every finished run is one line of OUT/runs.jsonl: started again, the study goes on where it stopped. At
the end, or with `--summarise` at any time, the runs become OUT/study.json, OUT/study.md and figures.

Calibration images are the model's own (synthetic), drawn from the training split (real), or noise; a seed draws them
anew. All scores are on the test split, against the float model: top-1, agreement and the logits' signal to
quantisation noise (SQNR, dB). Nothing is chosen on them.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from ouromamba_jax import GenConfig, QuantConfig, generate_images, load, quantize
from ouromamba_jax.baselines import BASELINES, quantize_baseline
from ouromamba_jax.data import iterate_batches, load_images, to_pixels
from ouromamba_jax.demo import outlier_figure
from ouromamba_jax.evaluate import predict, score
from ouromamba_jax.figures import image_grid, line_chart
from ouromamba_jax.models import VisionModel
from ouromamba_jax.tables import markdown_table, print_table

OURS = "ouromamba"
BITS = ("w8a8", "w6a6", "w4a8", "w4a4")
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
)
Fields = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Run:
    """One quantised model: how it is calibrated, by which method, at which bits.

    `gen` are fields of GenConfig (synthetic images only), `settings` fields of the method's config.
    """

    method: str = OURS
    source: str = "synthetic"
    bits: str = "w4a4"
    images: int = 128
    gen: Fields = ()
    settings: Fields = ()

    @property
    def setting(self) -> str:
        """What differs from the defaults, in words."""
        return ", ".join(f"{name} {value}" for name, value in (*self.gen, *self.settings)) or "default"


def tables(images: int, iterations: int) -> dict[str, list[Run]]:
    """The study: the runs of every table, in order. Equal runs of two tables are made once."""
    base = Run(images=images, gen=(("iterations", iterations),))

    def vary(*, bits: tuple[str, ...] = ("w4a8", "w4a4"), gen: dict[str, Any] | None = None, **fields: Any):
        more = (*base.gen, *(gen or {}).items())
        return [dataclasses.replace(base, bits=b, gen=more, **fields) for b in bits]

    def ours(**settings: Any):
        return vary(settings=tuple(settings.items()))

    real: dict[str, Any] = dict(source="real")
    rivals = [
        dataclasses.replace(base, method=name, source="real", gen=(), bits=bits) for name in BASELINES for bits in BITS
    ]
    return {
        # Tables 1 and 2 of the paper: rivals with real images, ours with none.
        "methods": [*vary(bits=BITS), *_without_gen(vary(bits=BITS, **real)), *rivals],
        # Table 4: where the calibration images come from.
        "calibration": [
            *vary(bits=BITS),
            *(r for s in ("real", "noise") for r in _without_gen(vary(bits=BITS, source=s))),
        ],
        # Table 5: how outliers are found.
        "detection": [
            *ours(detection="none"),
            *(run for statistic in ("mean", "max") for run in ours(detection="static", static_list=statistic)),
            *ours(detection="dynamic"),
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
        "contrast": [
            *(
                run
                for n in (3, 7)
                for run in vary(gen=dict(contrastive=1.0, neighbourhood=n, positives=min(12, n * n - 2)))
            ),
            *(run for k in (4, 20) for run in vary(gen=dict(contrastive=1.0, positives=k))),
            *vary(gen=dict(contrastive=1.0, weighting="uniform")),
            *vary(gen=dict(contrastive=1.0, negatives="neighbourhood")),
            *vary(gen=dict(contrastive=1.0, features="attention")),  # takes as many times longer as there are tokens
        ],
        "refresh": [run for n in (1, 5, 10, 20, 1000) for run in ours(n_refresh=n)],
        "images": [dataclasses.replace(run, images=count) for count in (16, 32, 64, 128, 256) for run in vary()],
        "rules": [
            *ours(),
            *ours(threshold="offline"),
            *ours(outlier_scale="free"),
            *ours(outlier_scale="free", spec="released"),
            *(run for sigma in (2.0, 4.0) for run in ours(sigma=sigma)),
        ],
        "tuning": [
            run
            for epochs in (0, 10)
            for run in (*ours(tune_epochs=epochs), *_without_gen(vary(**real, settings=(("tune_epochs", epochs),))))
        ],
    }


PLAIN_PIXELS = dict(scales=1, chroma=1.0, jitter=0.0, total_variation=0.0, learning_rate=0.05)


def _without_gen(runs: list[Run]) -> list[Run]:
    return [dataclasses.replace(run, gen=()) for run in runs]


class Study:
    """The model, its data, and what has been computed so far in `out`."""

    def __init__(self, model: str, data: str, out: Path, *, train_split: str, test_split: str, limit: int | None):
        self.model_name, self.out = model, out
        self.model = load(model)
        self.config = self.model.config
        self.data, self.train_split = data, train_split
        self.test = dict(source=data, split=test_split, limit=limit)
        out.mkdir(parents=True, exist_ok=True)
        self.identity = dict(model=model, data=Path(data).name, test_split=test_split, limit=limit)
        _check_identity(out / "identity.json", self.identity)
        self._reference: tuple[np.ndarray, np.ndarray] | None = None

    def logits(self, model: VisionModel) -> tuple[np.ndarray, np.ndarray]:
        """(logits, labels) of the test split, streamed, so that ImageNet fits."""
        size = self.config.img_size
        batches = iterate_batches(
            self.test["source"],
            self.test["split"],
            size,
            self.config.preprocessing,
            batch_size=512,
            limit=self.test["limit"],
        )
        parts = [(predict(model, b.images, batch_size=QuantConfig.batch_size), b.labels) for b in batches]
        return np.concatenate([p for p, _ in parts]), np.concatenate([np.asarray(labels) for _, labels in parts])

    def reference(self) -> tuple[np.ndarray, np.ndarray]:
        """(float logits, labels), computed once."""
        if self._reference is None:
            self._reference = self.logits(self.model)
        return self._reference

    def float_top1(self) -> float:
        """Top-1 of the float model, in percent."""
        reference, labels = self.reference()
        return 100 * score(reference, reference, labels).top1

    def images(self, run: Run, seed: int) -> np.ndarray:
        """The calibration images of a run; synthetic ones are kept in OUT/images."""
        size = self.config.img_size
        if run.source == "real":
            return load_images(
                self.data, self.train_split, size, self.config.preprocessing, limit=run.images, seed=seed
            ).images
        height, width = (size, size) if isinstance(size, int) else size
        if run.source == "noise":
            noise = jax.random.normal(jax.random.key(seed), (run.images, height, width, 3))
            return np.asarray(jnp.clip(noise, -1, 1))
        name = "-".join(str(part) for pair in run.gen for part in pair) or "default"
        path = self.out / "images" / f"{run.images}-{name}-seed-{seed}.npy"
        if not path.exists():
            config = GenConfig(num_images=run.images, batch_size=min(64, run.images), **dict(run.gen))
            images = np.asarray(generate_images(self.model, config, jax.random.key(seed)).images)
            path.parent.mkdir(exist_ok=True)
            partial = path.with_suffix(".tmp.npy")
            np.save(partial, images)
            partial.replace(path)
        return np.load(path)

    def measure(self, run: Run, seed: int) -> dict[str, Any]:
        """Quantises and scores: one line of runs.jsonl."""
        images, began = self.images(run, seed), time.perf_counter()
        if run.method == OURS:
            low, report = quantize(self.model, jnp.asarray(images), QuantConfig.preset(run.bits, **dict(run.settings)))
        else:
            weight_bits, act_bits = (int(bits) for bits in run.bits[1:].split("a"))
            low, report = quantize_baseline(
                self.model,
                jnp.asarray(images),
                run.method,
                weight_bits=weight_bits,
                act_bits=act_bits,
                **dict(run.settings),
            )
        seconds = time.perf_counter() - began
        reference, labels = self.reference()
        scored = score(self.logits(low)[0], reference, labels)
        sites = {site.path: round(site.sqnr_db, 2) for site in report.sites if site.kind == "matmul"}
        return dict(
            **dataclasses.asdict(scored),
            outlier_rate=report.outlier_rate,
            quantise_seconds=round(seconds, 1),
            sites=sites,
        )


def _check_identity(path: Path, identity: dict[str, Any]) -> None:
    if path.exists() and json.loads(path.read_text()) != identity:
        raise ValueError(f"{path.parent} holds the study of another model or data; choose another --out.")
    path.write_text(json.dumps(identity, indent=1) + "\n")


def title_of(run: Run) -> str:
    """The method's name in tables and figures."""
    return "OuroMamba" if run.method == OURS else BASELINES[run.method].title


def key_of(run: Run, seed: int) -> str:
    """What a line of runs.jsonl is found by."""
    return json.dumps([dataclasses.asdict(run), seed], sort_keys=True)


def read_runs(path: Path) -> dict[str, dict[str, Any]]:
    """Finished runs by key. A last line that was cut off while being written counts as unfinished."""
    done: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        done[entry["key"]] = entry
    return done


def summarise(chosen: dict[str, list[Run]], done: dict[str, dict[str, Any]]) -> Iterator[tuple[str, list[list[Any]]]]:
    """(table, rows under HEADERS): means over the seeds that are finished."""
    seeds = sorted({json.loads(key)[1] for key in done})
    for table, runs in chosen.items():
        rows = []
        for run in dict.fromkeys(runs):
            found = [done[key] for seed in seeds if (key := key_of(run, seed)) in done]
            if found:
                average = {name: mean(entry[name] for entry in found) for name in ("top1", "agreement", "sqnr_db")}
                rows.append(
                    [
                        title_of(run),
                        f"{run.images} {run.source}",
                        run.bits.upper(),
                        run.setting,
                        len(found),
                        round(100 * average["top1"], 2),
                        None if len(found) < 2 else round(100 * pstdev(entry["top1"] for entry in found), 2),
                        round(100 * average["agreement"], 2),
                        round(average["sqnr_db"], 2),
                        None if len(found) < 2 else round(pstdev(entry["sqnr_db"] for entry in found), 2),
                        round(100 * mean(entry["outlier_rate"] for entry in found), 2),
                    ]
                )
        yield table, rows


def write_summary(study: Study, chosen: dict[str, list[Run]], done: dict[str, dict[str, Any]]) -> None:
    """study.json, study.md and the tables on the terminal."""
    float_top1, count = study.float_top1(), len(study.reference()[1])
    title = f"{study.model_name}: float top-1 {float_top1:.2f} % on {count} test images"
    summary = dict(summarise(chosen, done))
    text = [f"# {title}\n", "Means over seeds; +- is the standard deviation over them, if there are several.\n"]
    for table, rows in summary.items():
        if rows:
            print_table(rows, HEADERS, title=f"{table} ({title})")
            text.append(f"## {table}\n\n{markdown_table(rows, HEADERS)}")
    record = dict(
        command=shlex.join(
            ["python", "scripts/study.py", *(Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:])]
        ),
        identity=study.identity,
        float_top1=float_top1,
        tables={table: [dict(zip(HEADERS, row, strict=True)) for row in rows] for table, rows in summary.items()},
        versions={name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "numpy")}
        | {"python": platform.python_version()},
        device=jax.devices()[0].device_kind,
    )
    (study.out / "study.json").write_text(json.dumps(record, indent=1) + "\n")
    (study.out / "study.md").write_text("\n".join(text))


def draw(study: Study, chosen: dict[str, list[Run]], done: dict[str, dict[str, Any]]) -> None:
    """accuracy.png, sqnr.png, sites.png, generated.png and outliers.png, as far as their runs are finished."""
    by_method: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for run in chosen.get("methods", ()):
        found = [done[key] for seed in range(100) if (key := key_of(run, seed)) in done]
        by_method.setdefault(f"{title_of(run)}, {run.source}", {})[run.bits] = found
    complete = {m: cells for m, cells in by_method.items() if all(cells.get(bits) for bits in BITS)}
    if complete:
        top1 = {m: [100 * mean(e["top1"] for e in cells[bits]) for bits in BITS] for m, cells in complete.items()}
        sqnr = {m: [mean(e["sqnr_db"] for e in cells[bits]) for bits in BITS] for m, cells in complete.items()}
        top, name = ("float", study.float_top1()), study.model_name
        line_chart(study.out / "accuracy.png", top1, BITS, ylabel="top-1, %", heading=name, reference=top)
        line_chart(study.out / "sqnr.png", sqnr, BITS, ylabel="SQNR of the logits, dB", heading=name)
        found_sites = {m: cells["w4a4"][0]["sites"] for m, cells in complete.items()}
        common = [site for site in next(iter(found_sites.values())) if all(site in f for f in found_sites.values())]
        by_site = {m: [found[site] for site in common] for m, found in found_sites.items()}
        line_chart(
            study.out / "sites.png",
            by_site,
            [site.removeprefix("blocks.") for site in common],
            xlabel="block and layer",
            ylabel="SQNR of the product, dB",
            heading=f"{name}: every matmul at W4A4, one seed",
        )
    default = next((run for run in chosen.get("methods", ()) if run.method == OURS and run.source == "synthetic"), None)
    if default is not None:
        images = study.images(default, 0)[:40]
        sample = load_images(study.data, study.train_split, study.config.img_size, study.config.preprocessing, limit=1)
        names = sample.classes or [str(label) for label in range(study.config.num_classes)]
        titles = [names[i % len(names)] for i in range(len(images))]  # GenConfig.targets is "round_robin"
        pixels = to_pixels(images, study.config.preprocessing)
        image_grid(study.out / "generated.png", pixels, titles, heading="Synthetic images and their target classes")
        low, _ = quantize(study.model, jnp.asarray(images), QuantConfig.preset("w4a4", tune_epochs=0))
        outlier_figure(study.out / "outliers.png", low, images[:1])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint, e.g. vim_micro")
    parser.add_argument("--data", required=True, help="digits, a path with {split}, or tfds:NAME")
    parser.add_argument("--train-split", default="train")
    parser.add_argument("--test-split", default="test")
    parser.add_argument("--limit", type=int, help="test images, evenly spaced; all by default")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tables", nargs="+", choices=list(tables(1, 1)), help="all by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=GenConfig.num_images, help="calibration images")
    parser.add_argument("--iterations", type=int, default=GenConfig.iterations, help="of the generation")
    parser.add_argument("--summarise", action="store_true", help="compute nothing new")
    return parser.parse_args(arguments)


def main() -> None:
    arguments = parse()
    every = tables(arguments.images, arguments.iterations)
    chosen = {name: every[name] for name in arguments.tables or every}
    runs_file = arguments.out / "runs.jsonl"
    try:
        study = Study(
            arguments.model,
            arguments.data,
            arguments.out,
            train_split=arguments.train_split,
            test_split=arguments.test_split,
            limit=arguments.limit,
        )
        done = read_runs(runs_file)
        # Seed by seed, so that a study that is stopped early has whole tables.
        wanted = [(run, seed) for seed in range(arguments.seeds) for runs in chosen.values() for run in runs]
        missing = [pair for pair in dict.fromkeys(wanted) if key_of(*pair) not in done]
        for count, (run, seed) in enumerate(track([] if arguments.summarise else missing, description="runs")):
            if count % 50 == 49:
                jax.clear_caches()  # compiled code piles up until the process may map no more memory
            entry = dict(key=key_of(run, seed), **study.measure(run, seed))
            with runs_file.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            done[entry["key"]] = entry
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(str(error)) from error
    write_summary(study, chosen, done)
    draw(study, chosen, done)


if __name__ == "__main__":
    main()

"""Every comparison of the paper on one model: method x bits x calibration source x seed.

    python scripts/study.py --model vim_micro --data digits --out outputs/digits --images 64 --seeds 1
    python scripts/study.py --model vim_micro_cifar10 --data "cifar10_{split}.npz" --out outputs/cifar10 --batch-size 64
    python scripts/study.py --model vim_tiny/ --data tfds:imagenet2012 --test-split validation --out outputs/imagenet

The second takes one core two and a half hours per seed: half an hour for `methods calibration detection tuning`, 20
minutes for `losses`, 25 each for `prior`, `iterations` and `contrast`, 20 for `rules refresh images`. 128 images take
three minutes (one without the contrastive loss), a run of ours a quarter of a minute and a rival's up to 75 seconds. A
published model on ImageNet wants a GPU; nobody has timed it yet.

Every finished run is one line of OUT/runs.jsonl: started again, the study goes on where it stopped. At the end, or with
`--summarise` at any time, the runs become OUT/study.json, OUT/study.md and charts; the figures of images and
activations, which take the model, come at the end only. `--tables` names the comparisons wanted. Two are left
out unless named: `strengths` halves and doubles one default at a time (80 minutes per seed), and the features of
`attention` cost as many times more as there are tokens.

Calibration images are the model's own (synthetic), drawn from the training split (real), or noise; each of the
`--seeds` draws them anew. All scores are on the test split, against the float model: top-1, agreement and the logits'
signal to quantisation noise (SQNR, dB). Nothing is chosen on them: for that, `--test-split train` scores on training
images.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.progress import track
from study_figures import draw_activations, draw_charts, draw_images
from study_runs import HEADERS, OPTIONAL, OURS, Run, read_runs, summarise, tables

from ouromamba_jax import GenConfig, QuantConfig, generate_images, load, quantize
from ouromamba_jax.baselines import quantize_baseline
from ouromamba_jax.data import iterate_batches, load_images
from ouromamba_jax.data.preprocessing import image_shape
from ouromamba_jax.evaluation.bench import machine, provenance
from ouromamba_jax.evaluation.evaluate import predict, score
from ouromamba_jax.files import whole_file, write_json, write_text
from ouromamba_jax.models import VisionModel
from ouromamba_jax.report.tables import markdown_table, print_table


class Study:
    """The model, its data, and what has been computed so far in `out`."""

    def __init__(self, model: str, data: str, out: Path, *, train_split: str, test_split: str, limit: int | None):
        self.model_name, self.out = model, out
        self.model = load(model)
        self.config = self.model.config
        self.data, self.train_split, self.test_split, self.limit = data, train_split, test_split, limit
        out.mkdir(parents=True, exist_ok=True)
        # What a result's bits depend on beside its own settings: sums in float32 follow the number of threads.
        self.identity = dict(
            rule="one grid",
            model=model,
            weights=_digest(self.model),
            data=Path(data).name,
            test_split=test_split,
            limit=limit,
            threads=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            machine=machine(),
        )
        check_identity(out / "identity.json", self.identity)
        self._reference: tuple[np.ndarray, np.ndarray] | None = None

    def logits(self, model: VisionModel) -> tuple[np.ndarray, np.ndarray]:
        """(logits, labels) of the test split, streamed, so that ImageNet fits."""
        config = self.config
        batches = iterate_batches(
            self.data,
            self.test_split,
            config.img_size,
            config.preprocessing,
            batch_size=512,
            limit=self.limit,
            labelled=True,
        )
        parts = [(predict(model, b.images, batch_size=QuantConfig.batch_size), b.labels) for b in batches]
        logits, labels = zip(*parts, strict=True)
        return np.concatenate(logits), np.concatenate(labels)

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
        config = self.config
        if run.source == "real":
            return load_images(
                self.data, self.train_split, config.img_size, config.preprocessing, limit=run.images, seed=seed
            ).images
        if run.source == "noise":
            noise = jax.random.normal(jax.random.key(seed), (run.images, *image_shape(config)))
            mean, std = (np.asarray(v, np.float32) for v in (config.preprocessing.mean, config.preprocessing.std))
            return np.clip(np.asarray(noise), -mean / std, (1 - mean) / std)
        differing = "-".join(f"{name}-{value}" for name, value in (*run.common, *run.gen)) or "default"
        path = self.out / "images" / f"{run.images}-{differing}-seed-{seed}.npy"
        if not path.exists():
            images = np.asarray(generate_images(self.model, run.gen_config, jax.random.key(seed)).images)
            with whole_file(path) as file:
                np.save(file, images)
        return np.load(path)

    def quantize(self, run: Run, images: np.ndarray) -> tuple[VisionModel, Any]:
        """The quantised model and its report."""
        if run.method == OURS:
            return quantize(self.model, jnp.asarray(images), QuantConfig.preset(run.bits, **dict(run.settings)))
        weight_bits, act_bits = (int(bits) for bits in run.bits[1:].split("a"))
        widths = dict(weight_bits=weight_bits, act_bits=act_bits)
        return quantize_baseline(self.model, jnp.asarray(images), run.method, **widths, **dict(run.settings))

    def measure(self, run: Run, seed: int) -> dict[str, Any]:
        """Quantises and scores: one line of runs.jsonl."""
        began = time.perf_counter()
        images = self.images(run, seed)
        drawn = time.perf_counter()
        low, report = self.quantize(run, images)
        quantised = time.perf_counter()
        reference, labels = self.reference()
        scored = score(self.logits(low)[0], reference, labels)
        return dict(
            key=run.key(seed),
            **dataclasses.asdict(scored),
            outlier_rate=report.outlier_rate,
            mean_bits=report.mean_bits,
            seconds=dict(images=round(drawn - began, 1), quantise=round(quantised - drawn, 1)),
            sites={site.path: round(site.sqnr_db, 2) for site in report.sites if site.kind == "matmul"},
        )


def _digest(model: nnx.Module) -> str:
    leaves = jax.tree.leaves(nnx.state(model))
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()[:16]


def check_identity(path: Path, identity: dict[str, Any]) -> None:
    """Writes what a study is about, or refuses to mix it with another one's runs.

    Raises:
      ValueError: naming what differs.
    """
    before = json.loads(path.read_text()) if path.exists() else identity
    differs = [name for name in identity | before if before.get(name) != identity.get(name)]
    if differs:
        raise ValueError(f"{path.parent} holds a study with another {', '.join(differs)}; choose another --out.")
    write_json(path, identity)


def write_summary(study: Study, every: dict[str, list[Run]], done: dict[str, dict[str, Any]]) -> None:
    """study.json, study.md and the tables on the terminal."""
    float_top1, count = study.float_top1(), len(study.reference()[1])
    title = f"{study.model_name}: float top-1 {float_top1:.2f} % on {count} images of the {study.test_split} split"
    summary = dict(summarise(every, done))
    command = provenance()["command"].replace(" --summarise", "")
    common = next(iter(every.values()))[0].gen_config
    text = [
        f"# {title}\n",
        f"`{command}`\n",
        f"Means over seeds; +- is the standard deviation over them, if there are several. Synthetic images: "
        f"{common.iterations} iterations, {common.batch_size} at a time.\n",
    ]
    for table, rows in summary.items():
        print_table(rows, HEADERS, title=f"{table} ({title})")
        text.append(f"## {table}\n\n{markdown_table(rows, HEADERS)}")
    record = dict(
        command=command,
        identity=study.identity,
        float_top1=float_top1,
        tables={table: [dict(zip(HEADERS, row, strict=True)) for row in rows] for table, rows in summary.items()},
    )
    write_json(study.out / "study.json", record)
    write_text(study.out / "study.md", "\n".join(text))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint, e.g. vim_micro")
    parser.add_argument("--data", required=True, help="digits, a path with {split}, or tfds:NAME")
    parser.add_argument("--train-split", default="train")
    parser.add_argument("--test-split", default="test")
    parser.add_argument("--limit", type=int, help="test images, evenly spaced; all by default")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tables", nargs="+", choices=list(tables(1)), help="all but the long ones by default")
    parser.add_argument("--seeds", type=int, default=3, help="draws of the calibration images, from seed 0 on")
    parser.add_argument("--images", type=int, default=GenConfig.num_images, help="calibration images")
    parser.add_argument("--iterations", type=int, default=GenConfig.iterations, help="of the generation")
    parser.add_argument("--batch-size", type=int, default=GenConfig.batch_size, help="images generated together")
    parser.add_argument("--summarise", action="store_true", help="compute nothing new")
    parsed = parser.parse_args(arguments)
    if parsed.seeds < 1:
        parser.error(f"--seeds is {parsed.seeds}, but it is how many there are; use at least 1.")
    return parsed


def compute(study: Study, wanted: list[tuple[Run, int]], done: dict[str, dict[str, Any]]) -> int:
    """Makes the runs that are missing and appends them to runs.jsonl; the number that failed, which are reported."""
    failed = 0
    missing = {run.key(seed): (run, seed) for run, seed in wanted if run.key(seed) not in done}
    for count, (key, (run, seed)) in enumerate(track(missing.items(), description="runs")):
        if count % 20 == 19:
            jax.clear_caches()  # compiled code piles up until the process may map no more memory
        try:
            done[key] = study.measure(run, seed)
        except (RuntimeError, ArithmeticError, MemoryError) as error:  # e.g. too large for the device; others may fit
            failed += 1
            print(f"failed, and left out: {key}: {error}", file=sys.stderr)
            continue
        with (study.out / "runs.jsonl").open("a") as file:
            file.write(json.dumps(done[key]) + "\n")
    return failed


def main() -> None:
    arguments = parse()
    every = tables(arguments.images, iterations=arguments.iterations, batch_size=arguments.batch_size)
    chosen = arguments.tables or [name for name in every if name not in OPTIONAL]
    seeds, failed = range(arguments.seeds), 0
    try:
        study = Study(
            arguments.model,
            arguments.data,
            arguments.out,
            train_split=arguments.train_split,
            test_split=arguments.test_split,
            limit=arguments.limit,
        )
        done = read_runs(arguments.out / "runs.jsonl")
        if not arguments.summarise:
            # Seed by seed, so that a study that is stopped early has whole tables.
            wanted = [(run, seed) for seed in seeds for name in chosen for run in every[name]]
            failed = compute(study, wanted, done)
        write_summary(study, every, done)
        draw_charts(study, every["methods"], done)
        if not arguments.summarise:
            draw_images(study, every["methods"][0], seeds[0])
            draw_activations(study, every["calibration"], seeds)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(str(error)) from error
    if failed:
        raise SystemExit(f"{failed} runs failed; the same command tries them again.")


if __name__ == "__main__":
    main()

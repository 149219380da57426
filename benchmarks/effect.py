"""Does the regularizer help where plain training interpolates? CIFAR-10 at a size two cores manage.

    python -m pipelines.prepare cifar10.tar.gz CIFAR10 size=0
    python benchmarks/effect.py CIFAR10 OUTPUT [key=value of a run …]

A ResNet-8 on 3 000 training images as they are, 40 epochs, batch 128, the rate divided by 10 at epochs 20 and 32; the
regularizer, with sub-batches of 16, from epoch 20 on. First β: one run for each of five values over the range of the
paper's list, all on the same images, judged by the error on 2 000 other training images; nothing is chosen on the test
images. Then plain, fused and sampled (k/M = 1/4) with that β, each with the same seeds (of weights, images and order),
judged on the test images. Finished runs are kept, so it may be interrupted and repeated. Prints both tables.
"""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import nn

from infomcr_dist.models.layers import classifier, stem
from infomcr_dist.models.resnet import PaddedShortcut, assemble, basic_block

BETAS = (1, 10, 30, 50, 100)
SEEDS = (1, 2, 3)
SETTINGS = (
    "model=effect:resnet8", "epochs=40", "threads=1", "data.augmentation=none", "data.train_images=3000",
    "data.batch_size=128", "optimizer.learning_rate=0.1", "optimizer.weight_decay=1e-4", "schedule.milestones=[20,32]",
    "regularizer.sub_batch_size=16", "evaluation.every_epochs=0", "metric.every_epochs=0", "metric.trials=30",
    "checkpoint.every_epochs=40", "telemetry.port=null",
)  # fmt: skip


def resnet8(classes: int, image_size: int) -> nn.Module:
    """One basic block a stage of ResNet-20; 0.08 M parameters."""
    blocks: list[nn.Module] = [basic_block(16, 16, 1, nn.Identity())]
    blocks += [basic_block(w // 2, w, 2, PaddedShortcut(w // 2, 2)) for w in (32, 64)]
    return assemble(stem(16, image_size), blocks, classifier(64, classes))


def run(directory: Path, *settings: str) -> dict[str, Any]:
    """Train, unless it is done already; the last test error, train error and γ̂."""
    records = directory / "records.jsonl"
    if not records.exists() or '"kind": "end"' not in records.read_text():
        recipe = directory.parent / "recipe.yaml"
        recipe.touch()
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "infomcr_dist.train", str(recipe), f"run_dir={directory}", "resume=auto"]
        done = subprocess.run([*command, *settings], env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{directory}: {done.stderr}")
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    result = {f"{r['split']} error": 100 * r["top1_error_ratio"] for r in lines if r["kind"] == "evaluation"}
    result["train loss"] = next(r["loss"] for r in lines if r["kind"] == "evaluation" and r["split"] == "train")
    result["γ̂"] = next(r["gamma_hat"] for r in lines if r["kind"] == "metric")
    return result


def main(data: Path, output: Path, extra: list[str]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    common = [*SETTINGS, f"data.path={data}", *extra]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        trials = {
            beta: pool.submit(
                run, output / f"beta-{beta}", *common, "seed=0", "data.holdout_images=2000", f"regularizer.beta={beta}"
            )
            for beta in BETAS
        }
        print("| β | validation error, % | train error, % | γ̂ |\n|---|---|---|---|")
        for beta, trial in trials.items():
            r = trial.result()
            print(f"| {beta} | {r['test error']:.2f} | {r['train error']:.2f} | {r['γ̂']:.1f} |", flush=True)
        best = min(trials, key=lambda beta: trials[beta].result()["test error"])
        print(f"\nchosen: β = {best}\n")
        ways = {
            "plain": ["regularizer.when=never"],
            "fused": [f"regularizer.beta={best}"],
            "sampled 1/4": [f"regularizer.beta={best}", "regularizer.way=sampled", "regularizer.sampled=2"],
        }
        runs = {
            (way, seed): pool.submit(run, output / f"{way.split()[0]}-{seed}", *common, f"seed={seed}", *settings)
            for seed in SEEDS
            for way, settings in ways.items()
        }
        names = (
            "test error, %",
            "train error, %",
            "train loss",
            "γ̂",
            "test error − plain, same seed",
            "γ̂ − plain, each",
        )
        print(f"| {len(SEEDS)} seeds | {' | '.join(names)} |")
        print("|---|---|---|---|---|---|---|")
        for way in ways:
            results = [runs[way, seed].result() for seed in SEEDS]
            plain = [runs["plain", seed].result() for seed in SEEDS]
            paired = [r["test error"] - p["test error"] for r, p in zip(results, plain, strict=True)]
            gammas = ", ".join(f"{r['γ̂'] - p['γ̂']:+.0f}" for r, p in zip(results, plain, strict=True))
            cells = [_plus_minus([r[n] for r in results], d) for n, d in
                     (("test error", 2), ("train error", 2), ("train loss", 4), ("γ̂", 1))]  # fmt: skip
            print(f"| {way} | {' | '.join(cells)} | {_plus_minus(paired, 2)} | {gammas} |", flush=True)
    print("\n± is the standard deviation over seeds")


def _plus_minus(values: list[float], digits: int) -> str:
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python benchmarks/effect.py DATA OUTPUT [key=value …]")
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])

"""What telemetry costs: the time of one record against that of one training step, interleaved in one process.

    python benchmarks/telemetry.py [steps]

Every record goes to the bar, to JSON lines and to Prometheus, whose endpoint is scraped twice a second all along. The
step is a plain one of ResNet-20 at 32×32 with 64 images on one thread: the cheapest the recipes know, so the share is
the largest. Prints a Markdown table: medians, and the 10th and 90th percentile.
"""

import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import torch
from torch.nn import functional as F

from infomcr_dist import models
from infomcr_dist.config import TelemetrySettings
from infomcr_dist.telemetry import StepRecord, Telemetry

PORT = 19_870


def main(steps: int) -> None:
    torch.set_num_threads(1)
    model = models.build("resnet20", classes=10, image_size=32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images, labels = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    done = threading.Event()

    def scrape() -> None:
        while not done.wait(0.5):
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/metrics").read()

    step_seconds, record_seconds = [], []
    with tempfile.TemporaryDirectory() as folder:
        telemetry = Telemetry(TelemetrySettings(port=PORT), rank=0, local_rank=0, world_size=1)
        telemetry.begin(Path(folder) / "records.jsonl", steps, 0)
        scraper = threading.Thread(target=scrape)
        scraper.start()
        for step in range(1, steps + 1):
            began = time.perf_counter()
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            value = loss.item()
            took = time.perf_counter() - began
            step_seconds.append(took)
            record = StepRecord(step, 1, "regularized", value, 1e-4, 10.0, 4, 1.0, 0.1, 64, 0, took, 1e-3, 1e-3)
            began = time.perf_counter()
            telemetry.step(record, 64)
            record_seconds.append(time.perf_counter() - began)
        done.set()
        scraper.join()
        telemetry.close()

    print("\n| | median | 10 % | 90 % |\n|---|---|---|---|")
    for name, seconds in (("training step, ms", step_seconds), ("telemetry of a step, ms", record_seconds)):
        low, *_, high = statistics.quantiles(seconds, n=10)
        print(f"| {name} | {statistics.median(seconds) * 1e3:.3f} | {low * 1e3:.3f} | {high * 1e3:.3f} |")
    share = [record / step for record, step in zip(record_seconds, step_seconds, strict=True)]
    low, *_, high = statistics.quantiles(share, n=10)
    print(f"| share | {statistics.median(share):.2%} | {low:.2%} | {high:.2%} |")
    print(f"| share of all time | {sum(record_seconds) / sum(step_seconds):.2%} | | |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)

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
from infomcr_dist.records import StepRecord
from infomcr_dist.telemetry import Telemetry

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
        settings, device = TelemetrySettings(port=PORT), torch.device("cpu")
        telemetry = Telemetry(settings, rank=0, local_rank=0, world_size=1, device=device, info={})
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
            record = StepRecord(
                step=step, epoch=1, phase="regularized", loss=value, penalty=1e-4, beta=10.0, num_penalized=4,
                gradient_norm=1.0, finite=True, learning_rate=0.1, samples=64, global_samples=64, world_size=1,
                data_errors=0, step_duration_seconds=took, data_wait_seconds=1e-3, gradient_seconds=took,
                allreduce_wait_seconds=1e-3, update_seconds=1e-3, penalty_duration_seconds=took, allreduce_bytes=1,
            )  # fmt: skip
            began = time.perf_counter()
            telemetry.log(record)
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

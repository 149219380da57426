import os

import pytest
import torch
from conftest import needs_horovod

pytestmark = needs_horovod


@pytest.mark.parametrize(
    ("cuda", "given", "expected"), [(False, None, "10"), (False, "1", "1"), (True, None, None), (True, "3", "3")]
)
def test_horovods_thread_wakes_up_rarely_beside_workers_that_compute_on_cpus(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, given: str | None, expected: str | None
) -> None:
    from infomcr_dist.engines import horovod

    monkeypatch.setenv("HOROVOD_CYCLE_TIME", given or "")  # which is undone whatever the world sets
    if given is None:
        monkeypatch.delenv("HOROVOD_CYCLE_TIME")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(horovod, "local_device", lambda _: torch.device("cpu"))
    seen = []
    monkeypatch.setattr(horovod.hvd, "init", lambda: seen.append(os.environ.get("HOROVOD_CYCLE_TIME")))
    for name in ("rank", "size", "local_rank", "local_size"):
        monkeypatch.setattr(horovod.hvd, name, lambda: 1)
    horovod.HorovodWorld(None)
    assert seen == [expected]

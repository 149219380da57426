"""The checks of a machine, or of a job, before it trains; the command is in ``__main__``."""

from __future__ import annotations

from infomcr_dist.config import Config
from infomcr_dist.doctor.disk import check_disk
from infomcr_dist.doctor.memory import check_memory, check_preflight
from infomcr_dist.doctor.network import check_network
from infomcr_dist.doctor.results import Result, attempt
from infomcr_dist.doctor.software import check_software
from infomcr_dist.logger import check_installed
from infomcr_dist.world import World


def examine(config: Config, recipe: str, world: World) -> list[Result]:
    """Make all checks of this rank, some of them together with the others. Raises as the world's collectives do."""
    results: list[Result] = []
    check_software(results, world)
    if config.telemetry.logger is not None and world.rank == 0:  # which alone logs
        attempt(results, "logger", logger, config.telemetry.logger)
    results.append(Result("recipe", True, f"{recipe}: model {config.model}, {config.epochs} epochs"))
    experiment = check_disk(results, config, world)
    check_network(results, config.telemetry, world)
    check_memory(results, experiment, world)
    if experiment is not None and all(result.ok for result in results if result.check in ("model", "memory")):
        check_preflight(results, experiment, world)
    return results


def logger(name: str) -> str:
    """Whether the package of `telemetry.logger` is installed; ValueError if not."""
    check_installed(name)
    return f"{name} is installed"

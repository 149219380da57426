"""The trainer, with one fault in one worker: ``python faulty.py FAULT MOMENT RANK RECIPE key=value …``.

FAULT: the name of a signal this process sends itself, or a function below; ``none``: no fault. MOMENT: where in the
run, which may be a resumed one. Workers that torchrun restarts have no fault.
"""

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from infomcr_dist import assess, checkpoint, diagnostics, evaluate, step, train
from infomcr_dist.engines import launched_rank
from pipelines import LocalBatch, Sampler

STEP = 13
"""The step a fault hits, counted from 0: a regularized one, with 5 steps an epoch and a drop after 2 epochs"""


def at(moment: str, steps: int, strike: Callable[[], None]) -> None:
    """Arrange for a fault to strike once, at a moment of a run that has taken so many steps."""
    struck = False

    def once() -> None:
        nonlocal struck
        if not struck:
            struck = True
            strike()

    train_step = train.train_step

    def counted(*args: Any, **settings: Any) -> Any:
        nonlocal steps
        steps += 1
        if moment == "plain step" and steps == 4:
            once()
        return train_step(*args, **settings)

    train.train_step = counted
    if moment == "regularized step":  # between the two passes over a sub-batch, when w − αg is in use
        from infomcr_dist.passes import Passes

        pure = Passes.pure

        def struck_between(*args: Any) -> Any:
            if steps == STEP + 1:
                once()
            return pure(*args)

        Passes.pure = struck_between  # type: ignore[method-assign]
    elif moment == "last step of an epoch":
        regularized = step.regularized_backward
        plain = step.plain_backward

        def struck_last(backward: Any) -> Any:
            def call(*args: Any, **settings: Any) -> Any:
                if steps == 15:
                    once()
                return backward(*args, **settings)

            return call

        step.regularized_backward, step.plain_backward = struck_last(regularized), struck_last(plain)
    elif moment == "evaluation":
        errors = assess.evaluate

        def struck_before(*args: Any, **settings: Any) -> Any:
            if steps >= STEP:
                once()
            return errors(*args, **settings)

        assess.evaluate = struck_before
    elif moment in ("within an evaluation", "within the last evaluation"):
        count = evaluate._count
        batches = 0

        def struck_within_evaluation(*args: Any) -> Any:
            nonlocal batches
            if steps >= (20 if moment == "within the last evaluation" else STEP):
                batches += 1
                if batches == 2:
                    once()
            return count(*args)

        evaluate._count = struck_within_evaluation
    elif moment in ("metric", "last metric"):
        gram = evaluate.gradient_gram

        def struck_in_trial(*args: Any) -> Any:
            if steps == (20 if moment == "last metric" else 10):
                once()
            return gram(*args)

        evaluate.gradient_gram = struck_in_trial
    elif moment == "save":
        write = checkpoint._Hashing.write
        writes = 0

        def struck_within(self: Any, data: Any) -> int:
            nonlocal writes
            writes += steps > 6
            if writes == 20:  # in the midst of the file of some step
                once()
            return write(self, data)

        checkpoint._Hashing.write = struck_within  # type: ignore[method-assign]


def waits_for_ever() -> None:
    """As a main thread waits for a kernel or a collective that never ends: its other threads run."""
    os.read(os.pipe()[0], 1)


def strike_with(number: signal.Signals, written: bool) -> None:
    """A signal to this process; SIGKILL, if so wished, once the checkpoint under way is written."""
    if written and number == signal.SIGKILL:
        for thread in threading.enumerate():
            if thread is not threading.main_thread() and not thread.daemon:
                thread.join()
    os.kill(os.getpid(), number)


def held() -> None:
    """This worker makes the file ``held`` in the run directory, and does not continue before it has got SIGTERM."""
    handler, received = signal.getsignal(signal.SIGTERM), []

    def receive(*arguments: Any) -> None:
        received.append(arguments)
        handler(*arguments)  # type: ignore[operator]

    signal.signal(signal.SIGTERM, receive)
    (Path(next(a for a in sys.argv if a.startswith("run_dir=")).removeprefix("run_dir=")) / "held").touch()
    while not received:
        time.sleep(0.02)


def not_finite() -> None:
    """The next gradient of this worker is not finite, once."""
    backward = step.regularized_backward

    def infinite(model: Any, *args: Any, **settings: Any) -> Any:
        weight = next(model.parameters())
        weight.grad = torch.full_like(weight, math.inf)  # before the backward, whose hooks send the sum
        step.regularized_backward = backward
        return backward(model, *args, **settings)

    step.regularized_backward = infinite


def flipped_bit() -> None:
    """One bit of one weight of this worker flips, after some step."""
    digest = diagnostics.weights_digest

    def flipped(model: Any, buffers: bool) -> str:
        weight = next(model.parameters()).data.view(-1)
        weight[:1].view(torch.int32).bitwise_xor_(1)
        diagnostics.weights_digest = digest
        return digest(model, buffers)

    diagnostics.weights_digest = flipped


def slow_disk() -> None:
    """The next checkpoint takes 10 seconds to write."""
    save = checkpoint.save

    def slow(*args: Any) -> Any:
        checkpoint.save = save
        time.sleep(10)
        return save(*args)

    checkpoint.save = slow


def one_batch_fewer() -> None:
    """This worker's epochs end a step early."""
    batches = Sampler.local_batches

    def fewer(self: Sampler, epoch: int, rank: int, size: int, start: int = 0) -> Iterator[LocalBatch]:
        return (batch for batch in batches(self, epoch, rank, size, start) if batch.step < self.steps - 1)

    Sampler.local_batches = fewer  # type: ignore[method-assign]


def saved_steps(arguments: list[str]) -> int:
    """The steps of the checkpoint that the run resumes from."""
    run = next(Path(a.removeprefix("run_dir=")) for a in arguments if a.startswith("run_dir="))
    newest = checkpoint.newest_first(run / "checkpoints")[:1]
    return int(newest[0].name.split("-")[1]) if newest else 0


def main() -> int:
    fault, moment, rank, *arguments = sys.argv[1:]
    first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if fault != "none" and int(rank) == launched_rank(os.environ) and first_life:
        if fault.startswith("SIG"):
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests run under nohup
            written = "evaluation" in moment or "metric" in moment
            at(moment, saved_steps(arguments), partial(strike_with, getattr(signal, fault), written=written))
        elif moment == "start":
            globals()[fault]()
        else:
            at(moment, saved_steps(arguments), globals()[fault])
    return train.main(arguments)


if __name__ == "__main__":
    sys.exit(main())

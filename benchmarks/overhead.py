"""What running as a resumable job costs beside the work itself.

    python benchmarks/overhead.py dispatch --keys 200 --seconds 0.1 --workers 2

``dispatch``: short keys that only sleep, on workers that are ready, against the ideal in which workers never wait:
``keys × seconds ÷ workers``. Between two keys lie the call, the receipt that is written, and the answer.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import ray

from ray_tracin.pool import Pool
from ray_tracin.runs import start_run
from ray_tracin.runtime import cluster
from ray_tracin.stages import Attempt, Result, Stage
from ray_tracin.vocabulary import SliceRange


@dataclass(frozen=True)
class Sleep(Stage[SliceRange]):
    """Sleeps at every key."""

    count: int
    seconds: float
    name: ClassVar[str] = "sleep"

    def keys(self) -> Sequence[SliceRange]:
        """As many as asked for."""
        return [SliceRange(number, number + 1) for number in range(self.count)]

    def open(self) -> Callable[[SliceRange], Result]:
        """Sleep."""

        def sleep(_: SliceRange) -> Result:
            time.sleep(self.seconds)
            return {}

        return sleep


def dispatch(keys: int, seconds: float, workers: int, rounds: int) -> str:
    """A table: seconds from the first key given out to the last receipt, and the ratio to the ideal."""
    ideal = keys * seconds / workers
    found = []
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with cluster("local", cpus=workers), tempfile.TemporaryDirectory() as folder:
        pool = Pool({"num_cpus": 1})
        for number in range(rounds + 1):
            run = start_run(Path(folder) / str(number), preset="demo", overrides=[f"resources.workers={workers}"])
            stage, times = Sleep(run, keys, seconds), list[float]()

            def report(key: object, attempt: Attempt | None = None, times: list[float] = times) -> None:
                assert attempt is None, f"{key}: {attempt}"
                times.append(time.perf_counter())

            pool.execute(stage, stage.keys(), report)
            # The first round starts the workers; from the first key's end on, nothing but keys happens.
            if number:
                found.append((times[-1] - times[0]) / (ideal - seconds))
        pool.close()
    return (
        f"| {keys} | {1000 * seconds:.0f} ms | {workers} | {ideal:.2f} s | {statistics.median(found) * ideal:.2f} s | "
        f"{statistics.median(found):.3f} ({min(found):.3f} to {max(found):.3f}) |"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=["dispatch"])
    parser.add_argument("--keys", type=int, default=200)
    parser.add_argument("--seconds", type=float, nargs="+", default=[0.1])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    print(f"ray {ray.__version__}, Python {platform.python_version()}, median of {chosen.rounds} rounds\n")
    print("| keys | of | workers | ideal | measured | measured ÷ ideal |\n|---|---|---|---|---|---|")
    for seconds in chosen.seconds:
        print(dispatch(chosen.keys, seconds, chosen.workers, chosen.rounds), flush=True)


if __name__ == "__main__":
    main()

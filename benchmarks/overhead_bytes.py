"""What checksums and receipts cost, as a share of the work of a finished run.

    python benchmarks/overhead_bytes.py RUN

The work is what the run's receipts say that its keys took. Against it stand the CRC-32C of every byte that the receipts
list, and the writing of as many receipts to the same disk: what each key pays. Reading every byte back is what going on
with a run pays once a command (`resources.check=sizes` spares it).
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ray_tracin.objects import checksum
from ray_tracin.pipeline import all_stages
from ray_tracin.runs import Run, open_run
from ray_tracin.stages import sound_receipts
from ray_tracin.store import Receipt, RunStore


def seconds_of(work: Callable[[], Any]) -> float:
    """How long it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def checksum_seconds(run: Run, receipts: Iterable[Receipt]) -> float:
    """The CRC-32C of every file, without the reading."""
    total = 0.0
    for receipt in receipts:
        for file in receipt.files:
            data = run.store.objects.get(file.path)
            total += seconds_of(lambda data=data: checksum(data))  # type: ignore[misc]
    return total


def receipt_seconds(run: Run, receipts: list[Receipt]) -> float:
    """The same receipts, written beside the run."""
    with tempfile.TemporaryDirectory(dir=Path(run.uri).parent) as folder:
        store = RunStore(folder)

        def write() -> None:
            for receipt in receipts:
                store.write_receipt(receipt)

        return seconds_of(write)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a folder with a finished run")
    run = open_run(parser.parse_args().run)
    names = [stage.name for stage in all_stages(run)]
    receipts = [receipt for name in names for receipt in run.store.receipts(name).values()]
    work, size = sum(r.seconds for r in receipts), sum(file.size for r in receipts for file in r.files)
    parts = {"CRC-32C": checksum_seconds(run, receipts), "receipts": receipt_seconds(run, receipts)}
    parts["together"] = sum(parts.values())
    parts["reading every byte back, once a command"] = seconds_of(lambda: [sound_receipts(run, name) for name in names])
    print(
        f"{len(receipts)} keys, {size / 1e9:.2f} GB, {work:.1f} s of work\n\n| part | seconds | share |\n|---|---|---|"
    )
    for part, took in parts.items():
        print(f"| {part} | {took:.2f} | {took / work:.2%} |")


if __name__ == "__main__":
    main()

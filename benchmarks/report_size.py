"""How large the report of a paper-size run is, and how soon and with how much memory a browser shows it.

    python benchmarks/report_size.py FOLDER [--train 2070] [--test 520] [--size 192]
    python benchmarks/report_size.py RUN --as-it-is

Writes a run of random numbers of that size into FOLDER (a disk with 4 GB free) unless it is there, renders its report,
and opens it from disk with headless Chromium. Slices are phantoms, a few that repeat; tensor, tables and features are
random. With ``--as-it-is`` the report of a finished run is opened.
"""

import argparse
import os
import platform
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
from playwright.sync_api import Browser, Page, sync_playwright

from ray_tracin import store as paths
from ray_tracin.assembly import AssembleStripes, train_regions
from ray_tracin.featuring import MAXIMA
from ray_tracin.pictures import DrawSlices, encode_image, encode_maps, encode_runs, part_path
from ray_tracin.report import RenderReport
from ray_tracin.runs import Run, start_run
from ray_tracin.stages import complete, execute_serially
from ray_tracin.store import Array

CLASSES, MODALITIES, FEATURES, SLICES = ("NCR/NET", "ED", "ET"), ("t1", "t1ce", "t2", "flair"), 64, 10
MADE = "made"
"""A file that says the run of random numbers is whole."""
PICTURES = 20
"""Different slices; the others repeat them."""


def main() -> None:
    """Make the run, render, measure, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=2070)
    parser.add_argument("--test", type=int, default=520)
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--as-it-is", action="store_true")
    arguments = parser.parse_args()
    folder = arguments.folder
    lines = [] if arguments.as_it_is else rendering(arguments)
    lines += [*sizes(folder / "report"), *browse(folder / "report/index.html")]
    print("\n".join([heading(arguments), "| what | measured |", "|---|---|", *lines, ""]))


def rendering(arguments: argparse.Namespace) -> list[str]:
    """Rows about the rendering of a run of random numbers."""
    folder = arguments.folder
    made = (folder / MADE).exists()
    run = start_run(folder) if made else make_run(folder, arguments.train, arguments.test, arguments.size)
    run.store.objects.delete(run.store.objects.sizes(f"{paths.RECEIPTS}/{RenderReport.name}"))
    started = time.perf_counter()
    complete(RenderReport(run), execute_serially, lambda event: None)
    seconds, memory = time.perf_counter() - started, psutil.Process().memory_info().rss
    return [
        f"| rendering, from pictures that are there | {seconds:.1f} s |",
        f"| memory of the rendering process, afterwards | {memory / 1e6:.0f} MB |",
    ]


def make_run(folder: Path, train: int, test: int, size: int) -> Run:
    """A run of random numbers with everything that the report reads."""
    patients = (train + test) // SLICES
    overrides = [
        f"data.size={size}", f"split.validation={test / (train + test)}", "influence.tile_slices=207",
        f"model={{width: {FEATURES}}}",
    ]  # fmt: skip
    run = start_run(folder, preset="paper", overrides=overrides)
    generator = np.random.default_rng(0)
    store = run.store
    names = {"modalities": list(MODALITIES), "classes": list(CLASSES)}
    store.create_array(
        paths.IMAGES, shape=(train + test, 4, size, size), chunks=(1, 4, size, size), dtype="float32",
        dimensions=("slice", "modality", "h", "w"), attributes=names,
    )  # fmt: skip
    store.write_table(paths.SLICES, slices_table(train, test, patients))
    store.write_table(paths.REGIONS, regions_table(train + test, generator))
    store.write_table(paths.SKIPPED, pd.DataFrame(columns=["case", "path", "reason"], dtype=str))
    store.write_table(paths.CHECKPOINTS, checkpoints_table(run, generator))
    run = start_run(folder)
    write_tensor(run, generator)
    write_tables(run, generator)
    write_pictures(run, size, generator)
    (folder / MADE).touch()
    return run


def slices_table(train: int, test: int, patients: int) -> pd.DataFrame:
    """Ten slices a patient, train patients first."""
    number = np.arange(train + test) // SLICES
    case = [f"BraTS19_PHANTOM_{patient % patients:03d}_1" for patient in number]
    rows = np.arange(train + test)
    columns = {"labelled": True, "warnings": "", "pixels_1": 400, "pixels_2": 900, "pixels_3": 300, "source": ""}
    table = pd.DataFrame({"slice": rows, "patient": case, "case": case, "grade": "HGG", **columns})
    return table.assign(index=rows % SLICES + 90, split=np.where(rows < train, "train", "validation"))


def regions_table(slices: int, generator: np.random.Generator) -> pd.DataFrame:
    """Every region exists."""
    count = slices * len(CLASSES)
    return pd.DataFrame(
        {
            "slice": np.repeat(np.arange(slices), len(CLASSES)), "class": np.tile(np.arange(1, 4), slices),
            "pixels": generator.integers(50, 900, count), "overlap": generator.random(count),
            "dice": generator.random(count), "labelled": True,
        }
    )  # fmt: skip


def checkpoints_table(run: Run, generator: np.random.Generator) -> pd.DataFrame:
    """A row an epoch."""
    epochs = np.arange(1, run.config.training.epochs + 1)
    dice = {f"dice_{kind}_{c}": generator.random(len(epochs)) for kind in ("train", "validation") for c in (1, 2, 3)}
    used = np.isin(epochs, run.config.influence_epochs())
    about = {"optimizer": "sgd", "learning_rate": 0.01, "file": "", "influence": used, "loss": 0.5}
    return pd.DataFrame({"epoch": epochs, **about, **dice})


def write_tensor(run: Run, generator: np.random.Generator) -> None:
    """Influence of both query sets, a stripe at a time, and squared norms."""
    AssembleStripes(run).write_layout()
    classes, columns = len(CLASSES), len(CLASSES) * len(run.train_slices)
    for key in AssembleStripes(run).keys():  # noqa: SIM118
        rows = slice(key.start, key.stop)
        values = generator.standard_normal((classes, key.stop - key.start, columns), dtype=np.float32) ** 3
        run.store.write(f"influence.zarr/{key.query_set}", (slice(0, classes), rows), values)
        norms = generator.random((5, classes, key.stop - key.start), dtype=np.float32) + 1
        run.store.write(f"influence.zarr/norm2_{key.query_set}", (slice(0, 5), slice(0, classes), rows), norms)


def write_tables(run: Run, generator: np.random.Generator) -> None:
    """The tables of explainers, features and impact."""
    slices, classes = train_regions(run)
    n, pairs = len(slices), [(query, feature) for query in (1, 2, 3) for feature in range(FEATURES)]
    query, feature = np.asarray(pairs).T
    frame, write = pd.DataFrame, run.store.write_table
    shares = {"share_proponent": generator.random(3 * n) / 3.1, "share_opponent": generator.random(3 * n) / 3.1}
    own = {
        "query_class": np.repeat([1, 2, 3], n),
        "train_slice": np.tile(slices, 3),
        "train_class": np.tile(classes, 3),
    }
    write(paths.GLOBAL_EXPLAINERS, frame({**own, **shares, "is_global": shares["share_proponent"] > 0.3}))
    about = {"train_slice": slices, "train_class": classes, "patient": "", "rank": np.arange(n) + 1}
    write("tables/self_influence.parquet", frame({**about, "self_influence": generator.random(n)}))
    sets = [(s, q, t, 10, 1 / 3) for s in ("train", "test") for q in (1, 2, 3) for t in (1, 2, 3)]
    columns = ["query_set", "query_class", "train_class", "count", "share"]
    write("tables/proponent_classes.parquet", frame(sets, columns=columns))
    trends = {"trend": "u_shaped", "slope": 0.1, "curvature": 0.4, "importance_first": generator.random(len(pairs))}
    predictive = generator.random(len(pairs)) < 0.2
    base = {"feature": feature, "query_class": query, "train_class": 0}
    write(paths.FEATURE_TRENDS, frame({**base, **trends, "predictive": predictive}))
    long = {name: np.repeat(values, n) for name, values in {**base, "train_class": np.zeros(len(pairs), int)}.items()}
    rank, importance = np.tile(np.arange(1, n + 1), len(pairs)), generator.random(n * len(pairs), dtype=np.float32)
    write(paths.FEATURE_IMPORTANCE, frame({**long, "rank": rank, "importance": importance, "queries": 1}))
    impact = {"feature": feature, "class": query, "impact": generator.random(len(pairs)), "slices": 520}
    write(paths.FEATURE_IMPACT, frame(impact))
    names = ["predictive", "others", *(f"random_{number}" for number in range(1, 21))]
    rows = [(name, c, generator.random(), 12, 520) for name in names for c in (1, 2, 3)]
    write(paths.FEATURE_SET_IMPACT, frame(rows, columns=["set", "class", "impact", "size", "slices"]))
    shape = (len(run.slices), len(CLASSES), FEATURES)
    run.store.create_array(
        MAXIMA, shape=shape, chunks=(32, *shape[1:]), dtype="float32", dimensions=("slice", "class", "feature")
    )
    values = generator.random(shape, dtype=np.float32)
    run.store.write(MAXIMA, (slice(0, len(values)),), values)


def write_pictures(run: Run, size: int, generator: np.random.Generator) -> None:
    """What the stage `DrawSlices` would write, of slices that are as hard to compress as real ones."""
    drawn = [picture(size, generator) for _ in range(PICTURES)]
    for key in DrawSlices(run).keys():  # noqa: SIM118
        rows = [{"slice": row, **drawn[row % PICTURES]} for row in range(key.start, key.stop)]
        run.store.write_table(part_path(key), pd.DataFrame(rows))


def picture(size: int, generator: np.random.Generator) -> dict[str, Any]:
    """A disc with noise in four modalities, and three nested regions with ragged edges."""
    y, x = np.mgrid[:size, :size] / size - 0.5
    noise = generator.standard_normal((4, size, size)) * 0.06
    image = np.where(np.hypot(x, y) < 0.42, 0.1 * np.cos(40 * x * y) + noise - 0.1, -1)
    ragged = np.hypot(x - 0.1, y) + 0.012 * generator.standard_normal((size, size))
    labels: Array = np.select([ragged < 0.05, ragged < 0.08, ragged < 0.15], [1, 3, 2], 0)
    return {
        "image": encode_image(image), "maps": encode_maps(generator.random((8, 48, 48)) ** 3),
        "prediction": encode_runs(2 * labels + (ragged < 0.14)), "truth": encode_runs(labels),
        "predicted": [400, 900, 300], "agreed": [350, 800, 250], "annotated": [10, 300, 5, 5] * 3,
    }  # fmt: skip


def sizes(folder: Path) -> list[str]:
    """Rows about the files."""
    kinds = {"the page": "index.html", "pictures": "assets/*.webp", "rows of the tensor": "assets/*.js"}
    rows, total = [], 0.0
    for name, pattern in kinds.items():
        files = list(folder.glob(pattern))
        size = sum(file.stat().st_size for file in files) / 1e6
        total += size
        rows += [f"| {name} | {size:.1f} MB{f' in {len(files)} files' if len(files) > 1 else ''} |"] if files else []
    return [*rows, f"| in all | {total:.1f} MB |"]


def browse(page: Path) -> list[str]:
    """Rows about what a browser needs: to the first view, and after a walk through everything."""
    executable = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        rows = _walk(browser, page)
        browser.close()
    return rows


def _walk(browser: Browser, address: Path) -> list[str]:
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    started = time.perf_counter()
    page.goto(address.as_uri())
    page.wait_for_selector("body[data-ready]", timeout=60_000)
    ready = time.perf_counter() - started
    _wait(page, DRAWN)
    first, memory = time.perf_counter() - started, renderer_memory()
    patients = page.locator("#patient option").count()
    steps = [_timed(page, lambda: page.keyboard.press("PageDown"), DRAWN) for _ in range(patients - 1)]
    views = {"curate": "review", "model": "matrix", "run": "size"}
    opened = [
        _timed(page, partial(page.click, f"#tab-{view}"), f"document.querySelector('[data-testid={testid}]')")
        for view, testid in views.items()
    ]
    page.wait_for_timeout(2000)
    after = renderer_memory()
    page.context.new_cdp_session(page).send("HeapProfiler.collectGarbage")
    page.wait_for_timeout(2000)
    return [
        f"| until the page answers | {ready:.2f} s |",
        f"| until the first view has its pictures | {first:.2f} s |",
        f"| another patient, median and longest of {len(steps)} | {np.median(steps):.2f} s, {max(steps):.2f} s |",
        f"| Curate, The model, This run | {', '.join(f'{seconds:.2f} s' for seconds in opened)} |",
        f"| memory of the page's process, private (resident), first view | {memory} |",
        f"| the same after {patients} patients and all views | {after} |",
        f"| the same after a garbage collection | {renderer_memory()} |",
    ]


DRAWN = """(cards.length || byId("rankings").querySelector(".message")) && !waitingForInfluence.size
  && [...PANES].filter((pane) => pane.element.isConnected)
    .every((pane) => (pane.element.dataset.drawn || "").startsWith(`${SLICES.row[pane.slice]} `))"""
"""Whether every picture that is shown is the one that was asked for."""


def _timed(page: Page, act: Callable[[], None], condition: str) -> float:
    started = time.perf_counter()
    act()
    _wait(page, condition)
    return time.perf_counter() - started


def _wait(page: Page, condition: str) -> None:
    """Until an expression is true; the page forbids the evaluation by which Playwright itself would wait."""
    while not page.evaluate(f"Boolean({condition})"):
        time.sleep(0.005)


def renderer_memory() -> str:
    """The largest browser renderer of this process: its own memory, and the resident size with shared libraries."""
    children = psutil.Process().children(recursive=True)
    renderers = [child.memory_full_info() for child in children if "--type=renderer" in " ".join(child.cmdline())]
    largest = max(renderers, key=lambda memory: memory.rss)
    return f"{largest.uss / 1e6:.0f} MB ({largest.rss / 1e6:.0f} MB)"


def heading(arguments: argparse.Namespace) -> str:
    """What was measured, where."""
    counts = f"FOLDER --train {arguments.train} --test {arguments.test} --size {arguments.size}"
    where = f"{os.cpu_count()} CPU cores, {platform.system()}, Python {platform.python_version()}"
    command = "RUN --as-it-is" if arguments.as_it_is else counts
    return f"`python benchmarks/report_size.py {command}`; {where}, headless Chromium, from disk.\n"


if __name__ == "__main__":
    main()

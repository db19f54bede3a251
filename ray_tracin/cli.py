"""The command line: parse, one call, print where the result is. `jobs/*.py` are the same functions as files.

Exit codes: 0 done, 2 wrong usage or configuration, 1 failed, 130 interrupted. A failure prints what went wrong, where,
and what to do; ``--debug`` shows the traceback.
"""

import json
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from ray_tracin.answers import (
    agreement_table,
    ranking_table,
    region_lines,
    result_lines,
    scan_lines,
    status_table,
    write_ranking,
)
from ray_tracin.branching import take_over
from ray_tracin.capacity import on_one_device
from ray_tracin.claims import current_driver
from ray_tracin.console import configuring, fail, failing_clearly, out, print_lines, print_pairs
from ray_tracin.datasets import execute_on_ray_data
from ray_tracin.explanation import explain_region
from ray_tracin.figures import draw_explanation
from ray_tracin.integrity import refuse_no_run, remedies, repair, verify
from ray_tracin.labelmaps import export_label_maps
from ray_tracin.phantom import Edition
from ray_tracin.pipeline import STEPS, Executors, index_sketches, is_prepared, refuse_missing_patients, run_to, status
from ray_tracin.planning import measure, plan_run
from ray_tracin.progress import progress
from ray_tracin.querying import EXACT, explain_scan
from ray_tracin.report import RenderReport, discard_other_report, read_queries, refuse_wrong_queries
from ray_tracin.runs import Run, open_run, start_run
from ray_tracin.runtime import RayExecutor, cluster, write_phantoms
from ray_tracin.stages import Listener, Report, Stage
from ray_tracin.vocabulary import UsageError

DEMO_PATIENTS = 28
ALL_STEPS = "run"
"""The command that is all steps. Unlike ``report``, the last one's, it leaves a report that exists as it is."""

app = typer.Typer(
    no_args_is_help=True,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RunOption = Annotated[str, typer.Option("--run", help="Folder or URL of the run: ./my-run, s3://bucket/run.")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="YAML file of settings.")]
PresetOption = Annotated[str | None, typer.Option("--preset", help="demo or paper.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="One setting, such as data.root=/data/brats.")]
BaseOption = Annotated[
    str | None, typer.Option("--from", help="Begin with what another run has and the settings given don't change.")
]
AddressOption = Annotated[
    str | None, typer.Option("--address", help="Ray cluster; embedded without it or RAY_ADDRESS.")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")]


@app.callback()
def versioned(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    """Explain a segmentation network by its training data."""
    if version:
        out.print(metadata.version("ray_tracin"))
        raise typer.Exit


@app.command()
def demo(
    run: RunOption = "ray-tracin-demo",
    overrides: SetOption = None,
    address: AddressOption = None,
    debug: DebugOption = False,
) -> None:
    """Synthetic patients, then everything on them: minutes on two CPU cores."""
    with failing_clearly(debug):
        with configuring(debug):
            where = f"data.root={_demo_patients(run)}"
            opened = start_run(run, preset="demo", overrides=[where, *(overrides or [])])
        started = time.monotonic()
        with cluster(address) as kind, progress(out) as listen:
            if not is_prepared(opened):
                write_phantoms(Path(str(opened.config.data.root)), DEMO_PATIENTS, listen)
            _complete(opened, STEPS[-1], listen, kind)
        print_lines(result_lines(opened, time.monotonic() - started))


def _demo_patients(run: str) -> Path:
    """Where the patients of the demo go: in the run or beside it, and where an earlier call from elsewhere put them.

    The folder is part of the run's configuration, and a job that is submitted again may be in another one.
    """
    try:
        root = open_run(run).config.data.root
    except FileNotFoundError:
        root = None
    beside = Path("ray-tracin-demo-patients") if "://" in run else Path(run) / "patients"
    return Path(root) if root else beside.absolute()


@app.command()
def phantom(
    folder: Annotated[Path, typer.Argument(help="Where the patients go.")],
    patients: Annotated[int, typer.Option(min=1)] = DEMO_PATIENTS,
    edition: Annotated[Edition, typer.Option(help="Layout of the folders.")] = "2019",
    seed: Annotated[int, typer.Option()] = 0,
    address: AddressOption = None,
    debug: DebugOption = False,
) -> None:
    """Synthetic patients in a BraTS layout, and nothing else."""
    with failing_clearly(debug), cluster(address), progress(out) as listen:
        write_phantoms(folder, patients, listen, edition=edition, seed=seed)
    out.print(f"{patients} synthetic patients in {folder.absolute()}", markup=False)


def step_command(step: str, before: Callable[[Run], None] | None = None) -> Callable[..., None]:
    """The command that completes a step and all before it; also the whole of a file in ``jobs/``.

    ``before`` is done once the cluster is there.
    """

    def command(
        run: RunOption,
        config: ConfigOption = None,
        preset: PresetOption = None,
        overrides: SetOption = None,
        address: AddressOption = None,
        debug: DebugOption = False,
        base: BaseOption = None,
    ) -> None:
        with failing_clearly(debug):
            opened = _begun(run, config, preset, overrides, debug, base)
            with configuring(debug):
                refuse_missing_patients(opened)
            started = time.monotonic()
            with cluster(address) as kind, progress(out) as listen:
                if before is not None:
                    before(opened)
                _complete(opened, step, listen, kind)
            print_lines(result_lines(opened, time.monotonic() - started))

    return command


def _begun(
    run: str, config: Path | None, preset: str | None, overrides: list[str] | None, debug: bool, base: str | None
) -> Run:
    """The run with its configuration, and with what it takes from another one."""
    with configuring(debug):
        former = None if base is None else open_run(base)
        if former is not None and (preset, config) != (None, None):
            raise UsageError("--from brings the configuration of its run: leave --preset and --config out")
        opened = start_run(run, preset=preset, config=config, overrides=overrides or [], base=former)
    if former is not None:
        with progress(out) as listen:
            take_over(former, opened, listen)
    return opened


def report_command(  # noqa: PLR0913, PLR0917
    run: RunOption,
    queries: Annotated[
        str | None,
        typer.Option(
            help="Slices to explain: all, a number, or a list such as PATIENT_A,PATIENT_B:38; a patient of that very "
            'name comes first. Any names: --set \'report.queries=["12", "A, B:38"]\'.'
        ),
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Proponents and opponents shown at first.")] = None,
    images: Annotated[bool | None, typer.Option(help="Whether pictures of patients are in it.")] = None,
    config: ConfigOption = None,
    preset: PresetOption = None,
    overrides: SetOption = None,
    address: AddressOption = None,
    debug: DebugOption = False,
) -> None:
    """Render the page for readers. Renders again where the options differ from those it was rendered with."""
    with failing_clearly(debug), configuring(debug):
        wanted = None if queries is None else read_queries(queries, run)
        asked = {"queries": wanted, "top_k": top_k, "images": images}
        # JSON would escape what is beyond 16 bits as two characters, and YAML, which reads this, take them for two.
        options = [
            f"report.{name}={json.dumps(value, ensure_ascii=False)}"
            for name, value in asked.items()
            if value is not None
        ]
        everything = [*(overrides or []), *options]
        refuse_wrong_queries(start_run(run, preset=preset, config=config, overrides=everything))
    step_command("report", discard_other_report)(run, config, preset, everything, address, debug)


def job(name: str) -> None:
    """Run a command as a program of its own, a step or ``run``: what a file in ``jobs/`` calls."""
    own = {RenderReport.name: report_command, ALL_STEPS: step_command(STEPS[-1])}
    typer.run(own.get(name) or step_command(name))


_HELP = {
    "prepare": "Cut the patients' volumes into slices.",
    "train": "Train the network, keep its checkpoints, map its regions and their latent features.",
    "gradients": "Compute the region gradients of every checkpoint.",
    "influence": "Assemble the influence tensors.",
    "export": "Write the influence tables.",
    "explainers": "Rank the proponents and opponents of every region, find the global explainers.",
    "features": "Measure how important every latent feature is along the rankings.",
    "ablation": "Mask latent features, and measure what the prediction loses.",
    "figures": "Draw the paper's figures from this run.",
}
for _step, _what in _HELP.items():
    app.command(_step, help=f"{_what} Completes what it needs, resumes where it stands.")(step_command(_step))
app.command(RenderReport.name)(report_command)
app.command(ALL_STEPS, help="All steps, each resumed where it stands.")(step_command(STEPS[-1]))


@app.command("plan")
def plan_command(
    run: Annotated[str | None, typer.Option("--run", help="A run that exists.")] = None,
    config: ConfigOption = None,
    preset: PresetOption = None,
    overrides: SetOption = None,
    patients: Annotated[int | None, typer.Option(min=1, help="Number of patients, where there is no data yet.")] = None,
    calibrated: Annotated[
        bool,
        typer.Option("--calibrate/--no-calibrate", help="Measure this machine, in five seconds, for the time."),
    ] = True,
    debug: DebugOption = False,
) -> None:
    """Before anything runs: bytes, passes, arithmetic, memory of a worker, and which limit it would break."""
    with failing_clearly(debug):
        with configuring(debug):
            planned = plan_run(run, config=config, preset=preset, overrides=overrides or [], patients=patients)
        print_pairs("Plan", planned.lines())
        if calibrated:
            print_pairs("Time, at the rates of this machine", planned.estimate(measure(planned, run)))
        if planned.problems:
            fail("this would not fit:\n  " + "\n  ".join(planned.problems), 1)


@app.command("status")
def status_command(run: RunOption, debug: DebugOption = False) -> None:
    """Keys done of all, rate, time left, retries and cost, per stage."""
    with failing_clearly(debug):
        with configuring(debug):
            opened = open_run(run)
        out.print(status_table(status(opened)))
        driver = current_driver(opened.store.objects)
        out.print(f"being computed by {driver}" if driver else "nobody computes it now", markup=False)


@app.command("verify")
def verify_command(run: RunOption, debug: DebugOption = False) -> None:
    """Check every byte of a run against its receipts."""
    with failing_clearly(debug):
        with configuring(debug):
            opened = open_run(run)
        problems = verify(opened)
        if not problems:
            out.print(f"every file of {opened.uri} is as it was written", markup=False)
            return
        print_lines(f"{key}: {problem}" for key, found in problems.items() for problem in found)
        fail(remedies(problems, opened.uri), 1)


@app.command("repair")
def repair_command(run: RunOption, debug: DebugOption = False) -> None:
    """Restore the configuration's files, delete what belongs to no key; running again computes what is damaged."""
    with failing_clearly(debug):
        with configuring(debug):
            refuse_no_run(run)
        done = repair(run)
        print_lines(done)
        mended = sum(line.endswith((": restored", ": deleted")) for line in done)
        out.print(f"{mended} files mended: the same command as before now computes what is damaged", markup=False)


@app.command()
def explain(
    run: RunOption,
    patient: Annotated[str, typer.Option(help="Patient or case.")],
    index: Annotated[int, typer.Option(help="Position of the slice on its axis.")],
    class_name: Annotated[str, typer.Option("--class", help="Name of the class.")],
    top: Annotated[int, typer.Option(min=1, help="How many proponents and opponents.")] = 10,
    picture: Annotated[Path | None, typer.Option("--out", help="Draw it too: a PNG file.")] = None,
    keep_global: Annotated[bool, typer.Option("--keep-global", help="Global explainers too, marked.")] = False,
    debug: DebugOption = False,
) -> None:
    """The local explanation of one region: which training regions pushed the network to it, and which against it.

    Neutral regions are those with the influence nearest to 0, low overlap left out. The features are the predictive
    ones in which query and train region agree most, with their similarity (eq. 7).
    """
    with failing_clearly(debug):
        with configuring(debug):
            opened = open_run(run)
            _refuse_other_files(picture, ".png")
        found = explain_region(opened, patient, index, class_name, top, keep_global=keep_global)
        print_lines(region_lines(found, keep_global=keep_global))
        for name in found.rankings:
            out.print(ranking_table(found, name))
        if picture is not None:
            draw_explanation(opened, found, picture)
            out.print(f"drawn in {picture}", markup=False)


@app.command("nifti")
def nifti_command(
    run: RunOption,
    folder: Annotated[Path, typer.Option("--out", help="Folder that the files go into.")],
    patient: Annotated[str | None, typer.Option(help="Patient or case; all of the run without it.")] = None,
    debug: DebugOption = False,
) -> None:
    """Predictions and regions as NIfTI label maps over the original images, with colours for 3D Slicer and ITK-SNAP."""
    with failing_clearly(debug):
        with configuring(debug):
            opened = open_run(run)
        print_lines(map(str, export_label_maps(opened, folder, patient)))
        out.print("slices that the run did not cut are 0 in every map", markup=False)


@app.command()
def sketches(
    run: RunOption,
    size: Annotated[int, typer.Option(min=1, help="An axis of a gradient is projected to so many values.")] = 32,
    overrides: SetOption = None,
    address: AddressOption = None,
    debug: DebugOption = False,
) -> None:
    """Index the training set by sketches, for `query`; measures what the index is worth on the run's own tensor."""
    with failing_clearly(debug):
        with configuring(debug):
            opened = start_run(open_run(run).uri, overrides=overrides or [])
            refuse_missing_patients(opened)
        started = time.monotonic()
        with cluster(address) as kind, progress(out) as listen, RayExecutor(elastic=kind == "cluster") as pool:
            index_sketches(on_one_device(opened, kind), size, Executors(pool=pool, tables=pool), listen)
        out.print(f"done in {time.monotonic() - started:.0f} s: index of size {size} in {opened.uri}", markup=False)
        out.print(agreement_table(opened.table(f"sketch_agreement_{size}"), opened.classes))


@app.command()
def query(  # noqa: PLR0913, PLR0917
    run: RunOption,
    case: Annotated[
        Path, typer.Option(exists=True, help="Folder of a new examination (or of several), or a CSV file.")
    ],
    index: Annotated[
        list[int] | None, typer.Option(min=0, help="Slices to explain; the run's own selection without it.")
    ] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Index to use; the largest without it.")] = None,
    exact: Annotated[bool, typer.Option("--exact", help="From the run's gradient shards, not an index.")] = False,
    top: Annotated[int, typer.Option(min=1, help="How many proponents and opponents.")] = 20,
    keep_global: Annotated[bool, typer.Option("--keep-global", help="Global explainers too, marked.")] = False,
    table: Annotated[Path | None, typer.Option("--out", help="Write the ranking: a .parquet or .csv file.")] = None,
    debug: DebugOption = False,
) -> None:
    """Explain a scan that isn't part of the run: the proponents and opponents of every region predicted on it."""
    with failing_clearly(debug):
        with configuring(debug):
            opened = open_run(run)
            _refuse_other_files(table, ".parquet", ".csv")
            if exact and size is not None:
                raise UsageError("--exact reads the run's gradient shards and no index: leave --size out")
        started = time.monotonic()
        wanted = EXACT if exact else size
        found = explain_scan(opened, case, size=wanted, indices=index or (), k=top, keep_global=keep_global)
        print_lines(scan_lines(found))
        if table is not None:
            write_ranking(found.ranking, table)
            out.print(f"ranking in {table}", markup=False)
        out.print(f"answered in {time.monotonic() - started:.1f} s", markup=False)


def _complete(run: Run, step: str, listen: Listener, kind: str) -> None:
    with RayExecutor(elastic=kind == "cluster") as pool:

        def write_tables(stage: Stage[Any], keys: Sequence[Any], report: Report) -> None:
            pool.close()  # Ray Data would wait for the CPUs that idle actors hold.
            execute_on_ray_data(stage, keys, report)

        run_to(on_one_device(run, kind), step, Executors(pool=pool, tables=write_tables), listen)


def _refuse_other_files(path: Path | None, *kinds: str) -> None:
    """Before minutes are spent: the file that is asked for is of a kind that is written, and has a folder."""
    if path is None:
        return
    if path.suffix not in kinds or path.is_dir():
        raise UsageError(f"--out writes a {' or a '.join(kinds)} file, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)


if __name__ == "__main__":
    app()

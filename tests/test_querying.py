"""The index of a run and the explanation of a new scan, against the run's own tensor and through the command line."""

import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from ray_tracin import querying
from ray_tracin.answers import scan_lines
from ray_tracin.attribution import Differentiate
from ray_tracin.claims import ClaimHeldError, driving
from ray_tracin.cli import app
from ray_tracin.config import DataConfig, SliceSelection
from ray_tracin.explaining import known_globals
from ray_tracin.explanation import explain_region
from ray_tracin.indexing import IndexSketches, agreement_path, indexed_sizes
from ray_tracin.integrity import verify
from ray_tracin.pipeline import Executors, index_sketches, release_gradients, status
from ray_tracin.querying import EXACT, ScanExplanation, explain_scan, read_scan, scan_influence
from ray_tracin.regions import region_overlap, region_pixels
from ray_tracin.runs import Run, open_run
from ray_tracin.scores import region_norms
from ray_tracin.sketches import Sketcher
from ray_tracin.stages import Event, complete, execute_serially
from ray_tracin.store import GLOBAL_EXPLAINERS, RunStore
from ray_tracin.vocabulary import UsageError

SERIAL = Executors(execute_serially, execute_serially)
EVERYTHING = 10_000
"""A size at which nothing is projected."""


@pytest.fixture(scope="module")
def indexed(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = open_run(shutil.copytree(tiny_run.uri, tmp_path_factory.mktemp("indexed") / "run"))
    for size in (2, EVERYTHING):
        index_sketches(run, size, SERIAL, lambda event: None)
    return run


def known_case(run: Run) -> tuple[Path, list[int]]:
    """A folder of the run's own test queries, and their rows."""
    rows = run.slices[run.slices["slice"].isin(run.query_slices("test"))]
    case = rows.iloc[0]["case"]
    mine = rows[rows["case"] == case]
    return Path(mine.iloc[0]["source"]), [int(row) for row in mine["slice"]]


@pytest.mark.parametrize("size", [EXACT, EVERYTHING])
def test_a_scan_that_the_run_knows_has_the_influence_of_the_run(indexed: Run, size: int) -> None:
    folder, rows = known_case(indexed)
    positions = [indexed.query_slices("test").index(row) for row in rows]
    expected = torch.from_numpy(indexed.influence("test")[:][:, positions])
    got, norms = scan_influence(indexed, read_scan(indexed, folder), size)
    assert bool((~expected.isnan()).any())
    torch.testing.assert_close(
        got, expected, rtol=1e-3, atol=1e-4 * float(expected[~expected.isnan()].abs().max()), equal_nan=True
    )
    there = ~expected.isnan().all(2)
    torch.testing.assert_close(norms[there], region_norms(indexed, "test")[:, positions][there], rtol=1e-3, atol=1e-6)


def test_the_ranking_is_that_of_the_tensor(indexed: Run) -> None:
    folder, rows = known_case(indexed)
    found = explain_scan(indexed, folder, size=EXACT, k=3, keep_global=True)
    assert found.size == 0
    region = ["case", "index", "class_name"]
    ranked = set(found.ranking[region].itertuples(index=False, name=None))
    silent = [line for line in found.regions[region].itertuples(index=False, name=None) if line not in ranked]
    told = "; ".join(f"{case}, slice {index}, {name}" for case, index, name in silent)
    assert found.notes == ([f"{told}: the gradient is 0, and so is every influence: nothing to rank"] if silent else [])
    without_overlap = found.regions[found.regions["overlap"] == 0]
    assert set(without_overlap[region].itertuples(index=False, name=None)) == set(silent)
    positions = {row: indexed.query_slices("test").index(row) for row in rows}
    by_index = indexed.slices.set_index("slice")["index"]
    for (index, class_id, side), group in found.ranking.groupby(["index", "class_id", "side"]):
        row = next(row for row in rows if by_index[row] == index)
        values = np.asarray(indexed.influence("test")[class_id - 1, positions[row]])
        values = np.sort(values[~np.isnan(values)])
        expected = values[::-1][:3] if side == "proponent" else values[:3]
        np.testing.assert_allclose(group.sort_values("rank")["influence"], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("size", [EXACT, EVERYTHING])
def test_where_cosine_ranks_the_run_it_ranks_a_scan(indexed: Run, size: int) -> None:
    explainers = indexed.config.explainers.model_copy(update={"score": "cosine"})
    run = Run(RunStore(indexed.uri), indexed.config.model_copy(update={"explainers": explainers}))
    folder, _ = known_case(run)
    found = explain_scan(run, folder, size=size, k=5, keep_global=True)
    assert any(note.startswith("ranked by cosine") for note in found.notes)
    assert set(found.ranking["ranked_by"]) == {"cosine"}
    assert not found.ranking.empty
    for (index, name), group in found.ranking.groupby(["index", "class_name"]):
        expected = explain_region(run, folder.name, index, name, 5, keep_global=True)
        for side, table in (("proponent", expected.proponents), ("opponent", expected.opponents)):
            mine = group[group["side"] == side]
            assert mine["train_slice"].tolist() == table["slice"].tolist()
            for score in ("influence", "cosine"):
                np.testing.assert_allclose(mine[score], table[score], rtol=1e-3, atol=1e-6)
    proponents = [line for line in scan_lines(found) if line.startswith("  proponents: ")]
    first = found.ranking[(found.ranking["side"] == "proponent") & (found.ranking["rank"] == 1)]
    assert [line.split()[1] for line in proponents] == [f"{value:+.3g}" for value in first["cosine"]]


@pytest.mark.parametrize("keep_global", [False, True])
def test_a_scan_of_the_run_is_ranked_as_its_own_explanation(indexed: Run, keep_global: bool) -> None:
    globals_of = known_globals(indexed)[0].sum(1).tolist()
    # Of the run's own shares all regions are global for the one class, so that nothing would be left.
    chosen = indexed.store.read_table(GLOBAL_EXPLAINERS)
    is_global = chosen["is_global"] & (chosen["train_slice"] % 2 == 0)
    run = open_run(shutil.copytree(indexed.uri, Path(indexed.uri).with_name(f"some-{keep_global}")))
    run.store.write_table(GLOBAL_EXPLAINERS, chosen.assign(is_global=is_global), recorded=False)
    assert 0 < int(is_global.sum()) < sum(globals_of)
    folder, _ = known_case(run)
    found = explain_scan(run, folder, size=EXACT, k=4, keep_global=keep_global)
    assert bool(found.left_out) is not keep_global
    assert ("--keep-global" in found.notes[-1]) is not keep_global
    assert set(found.ranking["is_global"]) == ({False, True} if keep_global else {False})
    for (index, name), group in found.ranking.groupby(["index", "class_name"]):
        expected = explain_region(run, folder.name, index, name, 4, keep_global=keep_global)
        for side, table in (("proponent", expected.proponents), ("opponent", expected.opponents)):
            mine = group[group["side"] == side]
            columns = {"rank": "rank", "train_slice": "slice", "train_class_id": "class_id", "is_global": "is_global"}
            assert mine[[*columns]].to_numpy().tolist() == table[[*columns.values()]].to_numpy().tolist()


def test_the_agreement_is_measured_on_the_runs_tensor(indexed: Run) -> None:
    poor, whole = (indexed.store.read_table(agreement_path(size)) for size in (2, EVERYTHING))
    assert (whole["difference"] < 1e-3).all()
    assert (whole["spearman"] > 0.999).all()
    assert (poor["difference"] > 1e-2).all()
    assert list(poor["query_set"].unique()) == ["train", "test"]
    note = explain_scan(indexed, known_case(indexed)[0], size=2).notes[-1]
    assert "estimated by sketches of size 2; on the run's own test queries" in note


def test_the_run_is_held_while_it_is_indexed(tiny_run: Run, tmp_path: Path) -> None:
    run = open_run(shutil.copytree(tiny_run.uri, tmp_path / "run"))
    tried = []

    def listen(event: Event) -> None:
        if event.stage.startswith("sketch"):
            with pytest.raises(ClaimHeldError):
                driving(run.store.objects).__enter__()
            tried.append(event.stage)

    index_sketches(run, 2, SERIAL, listen)
    assert len(set(tried)) == 2


def test_the_index_is_a_stage_like_others(indexed: Run) -> None:
    assert indexed_sizes(indexed) == (2, EVERYTHING)
    assert verify(indexed) == {}
    assert {line.stage: line.done == line.total for line in status(indexed)}["sketches-2"]
    done = []
    complete(IndexSketches(indexed, 2), lambda *_: done.append(1), lambda event: None)
    assert not done


def test_a_scan_without_truth_is_explained_with_its_prediction(indexed: Run, tmp_path: Path) -> None:
    folder, _ = known_case(indexed)
    copy = Path(shutil.copytree(folder, tmp_path / "NEW"))
    next(copy.glob("*seg*")).unlink()
    found = explain_scan(indexed, copy, size=2, k=2)
    assert found.notes[0] == "NEW: no ground truth, the network's own prediction stands in for it"
    assert (found.regions["overlap"] == 1).all()
    assert not found.ranking["query_labelled"].any()
    lines = [line for line in scan_lines(found) if line.startswith("NEW, slice")]
    assert lines
    assert all(line.endswith(" pixels, no ground truth") for line in lines)


@pytest.mark.parametrize("selection", ["tumour", "largest"])
def test_a_run_that_chooses_slices_by_labels_asks_for_those_of_a_scan_without(
    indexed: Run, selection: str, tmp_path: Path
) -> None:
    slices = indexed.config.data.slices.model_copy(update={"selection": selection})
    data = indexed.config.data.model_copy(update={"slices": slices})
    run = Run(RunStore(indexed.uri), indexed.config.model_copy(update={"data": data}))
    folder, rows = known_case(run)
    assert len(read_scan(run, folder).images) == slices.count
    copy = Path(shutil.copytree(folder, tmp_path / "NEW"))
    next(copy.glob("*seg*")).unlink()
    with pytest.raises(UsageError) as caught:
        read_scan(run, copy)
    assert str(caught.value) == (
        "NEW: expected labels, by which this run chooses slices (data.slices.selection is "
        f"{selection}), found no segmentation: name slices with --index"
    )
    index = int(run.slices.set_index("slice")["index"][rows[0]])
    assert read_scan(run, copy, [index]).table["index"].tolist() == [index]


def cutting(run: Run, **settings: object) -> Run:
    """The run as if it had been cut otherwise."""
    data = DataConfig.model_validate(run.config.data.model_dump() | settings)
    return Run(RunStore(run.uri), run.config.model_copy(update={"data": data}))


def test_a_slice_that_is_asked_for_is_scaled_as_among_the_runs_own(indexed: Run) -> None:
    run, (folder, rows) = cutting(indexed, intensity="maximum"), known_case(indexed)
    whole = read_scan(run, folder)
    for place, row in enumerate(rows):
        index = int(run.slices.set_index("slice")["index"][row])
        asked = read_scan(run, folder, [index])
        assert asked.table["index"].tolist() == [index]
        assert torch.equal(asked.images[0], whole.images[place])
        assert torch.equal(asked.labels[0], whole.labels[place])


@pytest.mark.parametrize(
    ("slices", "needed"), [(SliceSelection(count=500), 500), (SliceSelection(selection="list", indices=(3, 700)), 701)]
)
def test_a_scan_with_fewer_slices_than_the_run_cuts_asks_for_some(
    indexed: Run, slices: SliceSelection, needed: int
) -> None:
    run, (folder, _) = cutting(indexed, slices=slices), known_case(indexed)
    with pytest.raises(UsageError, match=f"expected at least {needed} slices, as .*: name slices with --index"):
        read_scan(run, folder)
    assert read_scan(run, folder, [4, 2]).table["index"].tolist() == [2, 4]


def test_global_explainers_that_are_not_known_yet_are_told(indexed: Run, tmp_path: Path) -> None:
    run = open_run(shutil.copytree(indexed.uri, tmp_path / "run", ignore=shutil.ignore_patterns("gradients.zarr")))
    told = f"global explainers are not known yet: `ray-tracin explainers --run {run.uri}` finds them"
    assert told not in explain_scan(run, known_case(run)[0], size=2).notes
    (Path(run.uri) / GLOBAL_EXPLAINERS).unlink()
    assert told in explain_scan(run, known_case(run)[0], size=2).notes


def test_the_rows_of_many_slices_are_never_together(indexed: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    scan, counts = read_scan(indexed, known_case(indexed)[0]), []
    expected, _ = scan_influence(indexed, scan, 2)
    sketch = Sketcher.sketch

    def watched(self: Sketcher, packed: torch.Tensor) -> torch.Tensor:
        counts.append(len(packed))
        return sketch(self, packed)

    monkeypatch.setattr(Sketcher, "sketch", watched)
    resources = indexed.config.resources.model_copy(update={"batch_slices": 3})
    run = Run(RunStore(indexed.uri), indexed.config.model_copy(update={"resources": resources}))
    got, _ = scan_influence(run, scan, 2)
    assert counts == [3, 1] * 2
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6, equal_nan=True)


def test_a_case_without_a_region_among_others_is_named(indexed: Run, tmp_path: Path) -> None:
    folder, _ = known_case(indexed)
    shutil.copytree(folder, tmp_path / "new/SICK")
    well = Path(shutil.copytree(folder, tmp_path / "new/WELL"))
    for path in well.glob("*.nii.gz"):
        image = nib.load(path)
        faint = np.zeros(image.shape, np.int16)
        faint[0, 0, :] = "seg" not in path.name
        nib.save(nib.Nifti1Image(faint, image.affine), path)
    found = explain_scan(indexed, tmp_path / "new", size=2, k=2)
    assert set(found.regions["case"]) == {"SICK"}
    assert found.notes[0] == "WELL: the network predicts no region on its slices"


def test_slices_can_be_chosen(indexed: Run) -> None:
    folder, rows = known_case(indexed)
    index = int(indexed.slices.set_index("slice")["index"][rows[1]])
    found = explain_scan(indexed, folder, size=2, indices=[index], k=2)
    assert set(found.regions["index"]) == {index}


def test_a_slice_that_the_scan_lacks_is_wrong_usage(indexed: Run) -> None:
    folder, _ = known_case(indexed)
    done = CliRunner().invoke(app, ["query", "--run", indexed.uri, "--case", str(folder), "--index", "400"])
    assert done.exit_code == 2
    assert f"--index: {folder.name}: expected slice 400, found slices 0 to" in done.output


def test_a_missing_index_or_shards_are_named(tiny_run: Run, indexed: Run, tmp_path: Path) -> None:
    folder, _ = known_case(indexed)
    with pytest.raises(ValueError, match=r"has no index: `ray-tracin sketches .* --size 32` makes one"):
        explain_scan(tiny_run, folder)
    with pytest.raises(ValueError, match=r"has no index of size 7 \(there are \[2, 10000\]\)"):
        explain_scan(indexed, folder, size=7)
    freed = open_run(shutil.copytree(tiny_run.uri, tmp_path / "run"))
    release_gradients(freed, freed.config.influence_epochs()[:1])
    assert any(receipt.released for receipt in freed.store.receipts(Differentiate.name).values())
    with pytest.raises(ValueError, match="doesn't hold the gradient shards of all its checkpoints"):
        explain_scan(freed, folder, size=EXACT)


def test_the_command_answers_and_writes_the_ranking(indexed: Run, tmp_path: Path) -> None:
    folder, _ = known_case(indexed)
    arguments = ["query", "--run", indexed.uri, "--case", str(folder), "--size", "2", "--top", "3", "--keep-global"]
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "new" / "ranking.parquet")])
    assert done.exit_code == 0, done.output
    assert "estimated by sketches of size 2" in done.output
    assert "  proponents: " in done.output
    ranking = pd.read_parquet(tmp_path / "new" / "ranking.parquet")
    assert set(ranking["rank"]) == {1, 2, 3}
    assert ranking["query_labelled"].all()
    assert set(ranking["sketch_size"]) == {2}
    wrong = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "ranking.xlsx")])
    assert wrong.exit_code == 2
    assert "a .parquet or a .csv file" in wrong.output


def test_regions_that_are_annotated_as_nothing_rank_nobody_and_warnings_are_noted(indexed: Run, tmp_path: Path) -> None:
    """No pixel of such a region is of its class: its gradient is 0, and an order of zeros would be that of columns."""
    folder, rows = known_case(indexed)
    copy = Path(shutil.copytree(folder, tmp_path / "EMPTY"))
    path = next(copy.glob("*seg*"))
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine, image.header), path)
    indices = [int(index) for index in indexed.slices.set_index("slice")["index"][rows]]
    found = explain_scan(indexed, copy, size=EXACT, indices=indices, k=2, keep_global=True)
    assert len(found.regions) > 0
    assert (found.regions["overlap"] == 0).all()
    assert found.ranking.empty
    lines = found.regions[["index", "class_name"]].itertuples(index=False, name=None)
    silent = "; ".join(f"EMPTY, slice {index}, {name}" for index, name in lines)
    assert found.notes == [
        "EMPTY: read with a warning: the segmentation is empty: no voxel is labelled",
        f"{silent}: the gradient is 0, and so is every influence: nothing to rank",
    ]


def test_a_region_that_the_checkpoints_alone_predict_is_told(indexed: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = known_case(indexed)
    scan = read_scan(indexed, folder)
    place = next(iter((region_pixels(scan.masks) * (region_overlap(scan.masks, scan.labels) > 0)).nonzero().tolist()))
    masks, scores = scan.masks.clone(), scan.scores.clone()
    masks[*place], scores[*place] = False, torch.nan
    monkeypatch.setattr(querying, "read_scan", lambda *_: replace(scan, masks=masks, scores=scores))
    monkeypatch.setattr(querying, "_masks", lambda *_: scan.masks)
    found = explain_scan(indexed, folder, size=2, k=2, keep_global=True)
    about = folder.name, int(scan.table["index"][place[0]]), indexed.classes[place[1]]
    region = ["case", "index", "class_name"]
    mine = found.regions.set_index(region).loc[about]
    assert (mine["pixels"], mine["in_tensor"]) == (0, True)
    assert about in set(found.ranking[region].itertuples(index=False, name=None))
    named, lines = f"{about[0]}, slice {about[1]}, {about[2]}", list(scan_lines(found))
    assert any(note.startswith(f"{named}: the checkpoints predict it") for note in found.notes)
    assert lines[lines.index(f"{named}: 0 pixels, region Dice –") + 1].startswith("  proponents: ")


def test_what_a_scan_was_cut_with_is_noted_of_cases_without_a_region_too(indexed: Run, tmp_path: Path) -> None:
    folder, _ = known_case(indexed)
    oblong, faint = (Path(shutil.copytree(folder, tmp_path / f"new/{name}")) for name in ("OBLONG", "FAINT"))
    for path in oblong.glob("*.nii.gz"):
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine @ np.diag([1, 2, 1, 1])), path)
    for path in faint.glob("*.nii.gz"):
        image = nib.load(path)
        # Intensity in one corner alone, labels in the first slice, which isn't cut.
        dot = np.zeros(image.shape, np.uint8)
        dot[0, 0, 0 if "seg" in path.name else slice(None)] = 1
        nib.save(nib.Nifti1Image(dot, image.affine), path)
    warned = {
        "OBLONG": "its voxels are 6 × 12 mm in the axial plane",
        "FAINT": "none of its 1 labelled voxels is in what is cut",
    }
    found = explain_scan(indexed, tmp_path / "new", size=2, k=2)
    assert set(found.regions["case"]) == {"OBLONG"}
    for case, warning in warned.items():
        assert any(note.startswith(f"{case}: read with a warning: {warning}") for note in found.notes)
    with pytest.raises(ValueError, match=f"nothing to explain: .*; FAINT: read with a warning: {warned['FAINT']}"):
        explain_scan(indexed, faint, size=2)


def test_notes_name_the_regions_without_a_ranking_and_each_warning_once() -> None:
    regions = pd.DataFrame(
        {
            "case": ["A", "A", "B"],
            "index": [3, 3, 3],
            "class_name": ["ED", "ET", "ED"],
            "labelled": True,
            "in_tensor": True,
            "pixels": 5,
        }
    )
    ranking = regions.iloc[[1, 2]]
    assert ScanExplanation(regions, ranking, EXACT, pd.DataFrame(), warnings={"A": "shifted"}).notes == [
        "A: read with a warning: shifted",
        "A, slice 3, ED: the gradient is 0, and so is every influence: nothing to rank",
    ]
    rare = regions.assign(in_tensor=[False, True, True])
    assert ScanExplanation(rare, ranking, EXACT, pd.DataFrame()).notes == [
        "A, slice 3, ED: not every checkpoint predicts it, so it has no influence (regions.source=checkpoint): nothing "
        "to rank"
    ]
    assert ScanExplanation(regions.iloc[2:], ranking, EXACT, pd.DataFrame()).notes == []
    assert ScanExplanation(regions.iloc[1:2], ranking.iloc[1:], EXACT, pd.DataFrame(), {"ET": 7}).notes == [
        "A, slice 3, ET: every influence is 0 or left out: nothing to rank",
        "global explainers are left out (7 of ET); --keep-global keeps them",
    ]

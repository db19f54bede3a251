"""The report as a reader uses it, in a real browser and from disk: what it shows, what it saves, what it never does."""

import base64
import csv
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import pytest
from conftest import TINY
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright
from typer.testing import CliRunner

from ray_tracin.appendix import about_run, choices
from ray_tracin.claims import driving
from ray_tracin.cli import app
from ray_tracin.phantom import write_patients
from ray_tracin.pictures import DrawSlices, encode_image, encode_runs
from ray_tracin.pipeline import STEPS, Executors, run_to, stage_names
from ray_tracin.report import RenderReport, refuse_wrong_queries
from ray_tracin.runs import Run, open_run, start_run
from ray_tracin.stages import complete, execute_serially
from ray_tracin.vocabulary import UsageError

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def chromium() -> str | None:
    return os.environ.get("CHROMIUM") or next((found for name in NAMES if (found := shutil.which(name))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = chromium()
    if executable is None:
        pytest.skip(f"no browser: install Debian's `chromium`, or set CHROMIUM (looked for {', '.join(NAMES)})")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield launched
        launched.close()


Opener = Callable[..., Page]


def wait(page: Page, condition: str) -> None:
    """Until an expression is true. (Playwright's own waiting evaluates strings in the page, which the page forbids.)"""
    for _ in range(200):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(25)
    raise AssertionError(f"not within 5 s: {condition}")


@pytest.fixture
def look(browser: Browser) -> Iterator[Opener]:
    """Opens a report from disk; afterwards nothing was complained about and no network was asked."""
    complaints: list[str] = []
    asked: list[str] = []
    context = browser.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True)

    def opened(run: Run, view: str = "explain") -> Page:
        page = context.new_page()
        page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((Path(run.uri) / "report/index.html").as_uri() + f"#{view}")
        page.wait_for_selector("body[data-ready]", timeout=10_000)
        return page

    yield opened
    context.close()
    assert complaints == []
    assert {urlsplit(url).scheme for url in asked} <= {"file", "data", "blob"}


def render(run: Run, **options: Any) -> Run:
    """The run with its report rendered anew, in this process."""
    changed = [f"report.{name}={json.dumps(value)}" for name, value in options.items()]
    wanted = start_run(run.uri, overrides=changed)
    for stage in (DrawSlices(wanted), RenderReport(wanted)):
        receipt = wanted.store.read_receipt(stage.name, "index")
        if receipt is not None:
            wanted.store.objects.delete([receipt.path])
        complete(stage, execute_serially, lambda event: None)
    return wanted


@pytest.fixture
def own_run(tiny_run: Run, tmp_path: Path) -> Run:
    """A copy of the finished run that a test may change."""
    return open_run(shutil.copytree(tiny_run.uri, tmp_path / "run"))


def rewrite(run: Run, path: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    run.store.write_table(path, change(run.store.read_table(path)), recorded=False)


def cards(page: Page, which: str) -> list[dict[str, Any]]:
    """What the cards of a list say: their data attributes."""
    found = page.eval_on_selector_all(f"[data-testid={which}] > li", "all => all.map((one) => ({...one.dataset}))")
    return [dict(card) for card in found]


def choose(page: Page, patient: str, index: int, class_name: str) -> None:
    page.select_option("#patient", patient)
    choices = page.evaluate(
        "[...DATA.queries].map((q) => [SLICES.patient[q.slice], SLICES.index[q.slice]])",
    )
    mine = [place for place, (name, _) in enumerate(choices) if name == patient]
    wanted = next(place for place in mine if choices[place][1] == index) - mine[0]
    page.evaluate("(at) => { const s = byId('slice'); s.value = at; s.dispatchEvent(new Event('input')); }", wanted)
    page.get_by_role("radio", name=class_name, exact=True).click()
    wait(page, f"document.querySelector('.chip.chosen').textContent === {json.dumps(class_name)}")


def queried(run: Run) -> pd.DataFrame:
    """The test query regions that exist: slice, class, patient, index."""
    regions = run.table("regions")
    there = regions[(regions.pixels > 0) & regions.slice.isin(run.query_slices("test"))]
    return there.merge(run.slices[["slice", "patient", "index"]], on="slice")


def expected(run: Run, side: str, row: int, class_id: int) -> pd.DataFrame:
    table = run.table(side)
    mine = (table.query_set == "test") & (table.query_slice == row) & (table.query_class == class_id)
    return on_its_side(table[mine], side).sort_values("rank")


def on_its_side(table: pd.DataFrame, side: str) -> pd.DataFrame:
    """Those above 0, or below: tables hold the first ones whatever their sign."""
    return table[table.influence > 0 if side == "proponents" else table.influence < 0]


def assert_lists_equal_the_tables(page: Page, run: Run, row: int, class_id: int, top_k: int) -> None:
    page.locator("#global").check()
    for side in ("proponents", "opponents"):
        table = expected(run, side, row, class_id).head(top_k)
        shown = cards(page, side)
        assert [int(card["slice"]) for card in shown] == table.train_slice.tolist()
        assert [int(card["class"]) for card in shown] == table.train_class.tolist()
        assert [int(card["rank"]) for card in shown] == table["rank"].tolist()
        assert [int(card["localRank"]) for card in shown] == table.local_rank.tolist()
        assert [float(card["influence"]) for card in shown] == table.influence.tolist(), "the very float32"
        np.testing.assert_array_equal([float(card["cosine"]) for card in shown], table.cosine)


def test_scores_are_those_of_the_tables(tiny_run: Run, look: Opener) -> None:
    page = look(tiny_run)
    found = queried(tiny_run)
    assert found["class"].nunique() > 1
    for line in found.itertuples():
        choose(page, line.patient, line.index, tiny_run.classes[line._2 - 1])
        assert_lists_equal_the_tables(page, tiny_run, line.slice, line._2, 10)
        assert page.locator("[data-testid=overlap]").text_content() == f"{line.overlap:.2f}"


def test_filters_show_what_the_tensor_says(tiny_run: Run, look: Opener) -> None:
    page = look(tiny_run)
    line = queried(tiny_run).iloc[0]
    choose(page, line.patient, line["index"], tiny_run.classes[line["class"] - 1])
    page.locator("#global").check()
    every = pd.read_parquet(Path(tiny_run.uri) / "tables/influence")
    mine = every[(every.query_set == "test") & (every.query_slice == line.slice)]
    mine = mine[mine.query_class.astype(int) == line["class"]]
    mine = mine.merge(tiny_run.slices[["slice", "patient"]], left_on="train_slice", right_on="slice")
    shares = tiny_run.table("global_explainers").astype({"train_class": int, "query_class": int})
    everyone = shares[(shares.query_class == line["class"]) & shares.is_global][["train_slice", "train_class"]]
    felt = mine[mine.influence != 0].astype({"train_class": int})
    known = f"global explainers ({len(felt.merge(everyone, on=['train_slice', 'train_class']))} of {len(felt)})"
    assert page.locator("#global-count").inner_text() == known
    page.select_option("#train-class", "2")
    of_class = mine[mine.train_class == 2].sort_values(["influence", "train_slice"], ascending=[False, True])
    above, below = (on_its_side(of_class, side) for side in ("proponents", "opponents"))
    assert len(above) > 0
    assert [int(card["slice"]) for card in cards(page, "proponents")] == above.train_slice.head(10).tolist()
    page.locator("#one-per-patient").check()
    first = above.drop_duplicates("patient").head(10)
    assert [int(card["slice"]) for card in cards(page, "proponents")] == first.train_slice.tolist()
    page.select_option("#top-k", "5")
    assert len(cards(page, "opponents")) == min(5, below.patient.nunique()) > 0
    page.select_option("#score", "cosine")
    assert page.locator("[data-testid=opponents] > li").first.get_attribute("data-cosine") is not None
    cosines = [float(card["cosine"]) for card in cards(page, "proponents")]
    assert cosines == sorted(cosines, reverse=True)
    regions = tiny_run.table("regions").set_index(["slice", "class"])
    neutral = cards(page, "neutral")
    assert neutral
    assert all(regions.overlap[int(card["slice"]), int(card["class"])] >= 0.1 for card in neutral)


def test_a_click_on_a_region_chooses_its_class(tiny_run: Run, look: Opener) -> None:
    page = look(tiny_run)
    masks = tiny_run.store.read("regions.zarr/mask")
    found = queried(tiny_run)
    row = found.groupby("slice")["class"].nunique().idxmax()
    here = found[found.slice == row]
    assert len(here) > 1, "a slice with two regions"
    for line in here[::-1].itertuples():
        other = next(c for c in here["class"] if c != line._2)
        choose(page, line.patient, line.index, tiny_run.classes[other - 1])
        y, x = np.argwhere(masks[row, line._2 - 1])[0]
        box = page.locator("#query-panes .pane").first.bounding_box()
        assert box is not None
        side = tiny_run.config.data.size
        page.mouse.click(box["x"] + (x + 0.5) / side * box["width"], box["y"] + (y + 0.5) / side * box["height"])
        chosen = page.locator(".chip.chosen")
        assert chosen.text_content() == tiny_run.classes[line._2 - 1]


def test_keys_go_through_slices_classes_and_cards(tiny_run: Run, look: Opener) -> None:
    page = look(tiny_run)
    line = queried(tiny_run).iloc[0]
    choose(page, line.patient, line["index"], tiny_run.classes[line["class"] - 1])
    page.locator("#global").check()
    page.locator("h1").click()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    second = page.locator("[data-testid=proponents] > li").nth(1)
    assert "chosen" in (second.get_attribute("class") or "")
    assert page.locator("#comparison").is_visible()
    assert "Proponent 2" in (page.locator("#comparison").text_content() or "")
    page.keyboard.press("Escape")
    assert page.locator("#comparison").is_hidden()
    before = page.locator("#slice-name").text_content()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowDown")
    assert page.locator("#slice-name").text_content() == before
    page.keyboard.press("ArrowDown" if "4 of 4" in (before or "") else "ArrowUp")
    assert page.locator("#slice-name").text_content() != before
    page.keyboard.press("2")
    assert page.locator(".chip.chosen").text_content() == "ED"


def test_filters_move_no_comparison_to_another_region(tiny_run: Run, look: Opener) -> None:
    page = look(tiny_run)
    line = queried(tiny_run).iloc[0]
    choose(page, line.patient, line["index"], tiny_run.classes[line["class"] - 1])
    page.locator("#global").check()
    page.locator("[data-testid=opponents] > li").nth(1).click()
    facts = page.locator("#comparison .facts")
    told = facts.inner_text()
    assert "Opponent 2" in told
    page.select_option("#top-k", "5")
    assert facts.inner_text() == told
    assert [card["rank"] for card in cards(page, "opponents")] == ["1", "2", "3", "4", "5"]
    page.select_option("#top-k", "10")
    page.locator("[data-testid=opponents] > li").nth(8).click()
    page.select_option("#top-k", "5")
    assert page.locator("#comparison").is_hidden(), "it is in no list"
    page.locator("h1").click()
    page.keyboard.press("ArrowRight")
    assert "Proponent 1" in facts.inner_text()


def canvas(page: Page, which: str) -> np.ndarray:
    """RGBA of a canvas of the first pane."""
    script = """(which) => {
      const c = document.querySelector(`#query-panes .pane canvas.${which}`);
      let text = "";
      const {data} = c.getContext("2d").getImageData(0, 0, c.width, c.height);
      for (const value of data) text += String.fromCharCode(value);
      return [c.width, btoa(text)];
    }"""
    width, values = page.evaluate(script, which)
    return np.frombuffer(base64.b64decode(values), dtype=np.uint8).reshape(-1, width, 4)


def test_pictures_and_overlays_are_of_the_slice(tiny_run: Run, look: Opener) -> None:
    page = look(tiny_run)
    line = queried(tiny_run).iloc[-1]
    name = tiny_run.classes[line["class"] - 1]
    choose(page, line.patient, line["index"], name)
    page.wait_for_selector(f"#query-panes .pane[data-drawn='{line.slice} t1']")
    grey = canvas(page, "image")[..., 0].astype(float)
    true = (tiny_run.images([int(line.slice)])[0, 0] + 1) * 127.5
    assert np.abs(grey - true).mean() < 8, "rows from anterior, columns from the patient's right"
    assert np.abs(grey[:, ::-1] - true).mean() > 8
    for box in ("truth", "others"):
        page.locator(f"#overlay-{box}").uncheck()
    mask = tiny_run.store.read("regions.zarr/mask")[line.slice, line["class"] - 1]
    painted = canvas(page, "overlay")
    sharp = painted.shape[0] // len(mask)
    alpha = painted[sharp // 2 :: sharp, sharp // 2 :: sharp, 3]
    strongest = alpha == alpha.max()
    np.testing.assert_array_equal(strongest, mask)
    page.locator("#overlay-prediction").uncheck()
    assert not canvas(page, "overlay").any()
    page.locator("#overlay-truth").check()
    assert canvas(page, "overlay").any() == bool((tiny_run.labels([int(line.slice)]) == line["class"]).any())
    page.select_option("#feature-map", index=1)
    wait(page, "byId('feature-map').value !== ''")
    page.wait_for_timeout(100)
    assert canvas(page, "maps").any()
    for box in ("prediction", "truth"):
        page.locator(f"#overlay-{box}").set_checked(box == "prediction")
    outlined = canvas(page, "overlay")[..., 3]
    assert outlined.any(), "a map is shown with the region's edge"
    inner = mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
    middle = outlined[sharp // 2 :: sharp, sharp // 2 :: sharp][1:-1, 1:-1]
    assert not middle[inner].any(), "and not under its colour"


def test_a_region_is_found_by_its_own_labels_however_many_are_kept(tiny_run: Run, look: Opener) -> None:
    page = look(tiny_run)
    script = """(full) => SLICES.row.flatMap((_, slice) => classIds().map((classId) => {
      keptLabels.clear();
      labelsOf(slice, "prediction");
      for (let i = 1; full && i < KEPT_LABELS; i++) keptLabels.set(i, new Uint16Array(SIZE * SIZE));
      return boxOf(slice, classId);
    }))"""
    boxes = page.evaluate(script, False)
    assert any(boxes)
    assert page.evaluate(script, True) == boxes


ZOOM = "getComputedStyle(document.documentElement).getPropertyValue('--zoom')"


def test_window_and_zoom_reach_every_pane(tiny_run: Run, look: Opener) -> None:
    page = look(tiny_run)
    page.evaluate("() => { const w = byId('view-window'); w.value = 0.5; w.dispatchEvent(new Event('input')); }")
    slopes = page.eval_on_selector_all(
        "#window feComponentTransfer > *",
        "all => all.map((f) => [f.getAttribute('slope'), f.getAttribute('intercept')])",
    )
    assert slopes == [["2", "-0.5"]] * 3, "grey 0.25 to 0.75 become black to white"
    pane = page.locator("#query-panes .pane").first
    pane.hover()
    page.mouse.wheel(0, -500)
    wait(page, f"{ZOOM} > 1.5")
    wide = page.locator("#query-panes .stage").first.bounding_box()
    box = pane.bounding_box()
    assert wide is not None
    assert box is not None
    assert wide["width"] > 1.5 * box["width"]
    page.keyboard.press("0")
    wait(page, f"{ZOOM} == 1")
    page.keyboard.press("+")
    page.locator("#zoom-in").click()
    wait(page, f"Math.abs({ZOOM} - 1.25 ** 2) < 1e-9")
    page.keyboard.press("-")
    page.locator("#zoom-out").click()
    wait(page, f"{ZOOM} == 1")


def saved(page: Page, button: str) -> list[dict[str, str]]:
    with page.expect_download() as waiting:
        page.locator(button).click()
    return list(csv.DictReader(io.StringIO(Path(waiting.value.path()).read_text())))


def test_the_ranking_is_saved_as_shown(tiny_run: Run, look: Opener) -> None:
    page = look(tiny_run)
    line = queried(tiny_run).iloc[0]
    choose(page, line.patient, line["index"], tiny_run.classes[line["class"] - 1])
    page.locator("#global").check()
    rows = saved(page, "#download")
    tables = {
        side: expected(tiny_run, side, line.slice, line["class"]).head(10) for side in ("proponents", "opponents")
    }
    sizes = {"proponents": len(tables["proponents"]), "neutral": 10, "opponents": len(tables["opponents"])}
    assert [row["list"] for row in rows] == [name for name, size in sizes.items() for _ in range(size)]
    for side, table in tables.items():
        mine = [row for row in rows if row["list"] == side]
        assert [float(row["influence"]) for row in mine] == table.influence.tolist()
        assert [row["train_patient"] for row in mine] == table.train_patient.tolist()
        assert [row["is_global"] == "true" for row in mine] == table.is_global.tolist()
        assert {row["query_patient"] for row in mine} == {line.patient}


def test_similarities_are_those_of_the_maxima(tiny_run: Run, look: Opener) -> None:
    page = look(tiny_run)
    line = queried(tiny_run).iloc[0]
    choose(page, line.patient, line["index"], tiny_run.classes[line["class"] - 1])
    maxima = tiny_run.store.read("features.zarr/maxima").astype(np.float64)
    query = maxima[line.slice, line["class"] - 1]
    page.locator("#global").check()
    shown = cards(page, "proponents")[0]
    train = maxima[int(shown["slice"]), int(shown["class"]) - 1]
    order = page.evaluate("orderedFeatures(CHOICE.classId)")
    with np.errstate(invalid="ignore"):
        similar = (query * train / np.maximum(np.abs(query), np.abs(train)) ** 2)[order]
    row = page.eval_on_selector_all(
        "[data-testid=links] tbody tr:first-child td", "all => all.map((one) => Number(one.dataset.value))"
    )
    np.testing.assert_allclose(row, similar, rtol=1e-12)


def test_the_review_list_starts_with_the_worst(tiny_run: Run, look: Opener) -> None:
    page = look(tiny_run, "curate")
    page.locator("#review-signs").uncheck()
    page.select_option("#review-sort", "selfInfluence")
    table = tiny_run.table("self_influence").sort_values("rank")
    shown = page.eval_on_selector_all(
        "[data-testid=review]", "all => all.map((r) => [+r.dataset.slice, +r.dataset.class])"
    )
    assert shown[:20] == table[["train_slice", "train_class"]].head(20).to_numpy().tolist()
    page.locator("[data-testid=review] input").nth(2).check()
    rows = saved(page, "#review-export")
    assert len(rows) == 1
    assert float(rows[0]["self_influence"]) == table.self_influence.iloc[2]


def test_a_run_without_a_region_to_review_has_a_report(own_run: Run, look: Opener) -> None:
    rewrite(own_run, "regions.parquet", lambda table: table.assign(labelled=False))
    page = look(render(own_run), "curate")
    assert page.get_by_text("No region has such a sign.").count() == 1
    assert "Self-influence is not known" not in page.locator("#curate").inner_text()


def test_the_review_goes_by_keys_and_looks_closely(tiny_run: Run, look: Opener) -> None:
    page = look(tiny_run, "curate")
    page.locator("#review-signs").uncheck()
    rows = page.locator("[data-testid=review]")
    page.locator("h1").click()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    assert page.locator("[data-testid=review].chosen").count() == 1
    assert "chosen" in (rows.nth(1).get_attribute("class") or "")
    page.keyboard.press("x")
    assert page.locator("#review-count").text_content() == "1 marked"
    (line,) = saved(page, "#review-export")
    chosen = rows.nth(1)
    assert [line["slice"], line["patient"]] == [chosen.get_attribute("data-slice"), page.evaluate(
        "SLICES.patient[REVIEW.slice[reviewRows()[1]]]"
    )]  # fmt: skip
    assert "scale" in (rows.locator(".stage").first.get_attribute("style") or ""), "thumbnails show the region"
    drawn = "(() => { const c = document.querySelector('.preview canvas.overlay'); return c.getContext('2d')"
    drawn += ".getImageData(0, 0, c.width, c.height).data.some(Boolean); })()"
    assert page.evaluate(drawn)
    page.locator("#overlay-prediction").uncheck()
    page.keyboard.press("t")
    assert not page.evaluate(drawn), "the annotated picture can be seen as it is"
    page.locator("#tab-explain").click()
    assert page.locator(".viewer #overlay-prediction").is_visible()


def test_the_matrix_tells_its_cells(tiny_run: Run, look: Opener) -> None:
    page = look(tiny_run, "model")
    matrix = tiny_run.store.read("influence.zarr/train")
    side = matrix.shape[2]
    box = page.locator("[data-testid=matrix]").bounding_box()
    assert box is not None
    row, column = np.argwhere(~np.isnan(matrix.reshape(side, side)))[5]
    page.mouse.move(box["x"] + (column + 0.5) / side * box["width"], box["y"] + (row + 0.5) / side * box["height"])
    text = page.locator("[data-testid=matrix-value]").text_content() or ""
    value = float(text.split("influence ")[1].replace("−", "-"))
    assert value == pytest.approx(float(matrix.reshape(side, side)[row, column]), rel=1e-5)
    assert page.locator("#model").get_by_text("predictive").count() > 0


def test_charts_tell_their_values(tiny_run: Run, look: Opener) -> None:
    page = look(tiny_run, "model")
    read = page.locator("[data-testid=dice-value]")
    chart = read.locator("xpath=..").locator("svg")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    assert box is not None
    last = tiny_run.table("checkpoints").iloc[-1]
    page.mouse.move(box["x"] + box["width"] - 3, box["y"] + 30)
    text = read.text_content() or ""
    assert text.startswith(f"Epoch {last.epoch} ({last.optimizer}, learning rate {last.learning_rate:g})")
    for kind in ("validation", "train"):
        assert f"ED {last[f'dice_{kind}_2']:.4f}" in text
    page.mouse.move(5, 5)
    assert read.text_content() == "Point at an epoch to read it."
    card = page.locator(".feature:has(svg)").first
    card.scroll_into_view_if_needed()
    curve = card.locator("svg").bounding_box()
    assert curve is not None
    page.mouse.move(curve["x"] + 1, curve["y"] + 5)
    table = tiny_run.table("feature_importance")
    mine = (
        (table.train_class == 0)
        & (table.query_class == 1)
        & (table.feature == int(card.get_attribute("data-feature") or ""))
    )
    first = float(table[mine].sort_values("rank").importance.iloc[0])
    width = -(-int(table[mine]["rank"].max()) // 60)
    assert width == 1
    assert card.locator("[data-testid=curve-value]").text_content() == f"rank 1: {first:.3f}"


def test_the_page_says_how_it_was_made(tiny_run: Run, look: Opener) -> None:
    page = look(tiny_run, "run")
    text = page.locator("#run").text_content() or ""
    assert "the final network, for all checkpoints" in text
    assert f"ray-tracin nifti --run {tiny_run.uri}" in text
    assert "No case was skipped" in text
    notice = page.locator("[data-testid=notice]").text_content() or ""
    assert "Research use only" in notice
    assert "All patients are synthetic" in notice
    size = (Path(tiny_run.uri) / "report/index.html").stat().st_size
    told = page.locator("[data-testid=size]").text_content() or ""
    assert float(told.split("has ")[1].split()[0]) * 1e3 == pytest.approx(size, abs=6e3)
    assert "needs no other file" in told
    page.locator("summary", has_text="Configuration").click()
    assert page.locator("[data-testid=config]").text_content() == tiny_run.config.to_yaml()


def test_what_it_cost_is_told_of_stages_alone(tiny_run: Run) -> None:
    told = {line["stage"] for line in about_run(tiny_run)["cost"]}
    assert told == set(stage_names(tiny_run)) - {RenderReport.name}


def test_features_that_are_not_measured_are_not_called_silent(tiny_run: Run, look: Opener) -> None:
    page = look(tiny_run, "model")
    trends = tiny_run.table("feature_trends").query("train_class == 0")
    kinds = set()
    for class_id, mine in trends.groupby("query_class"):
        page.select_option("#feature-class", str(class_id))
        text = page.locator(".features").inner_text()
        measured = not (mine.trend == "dead").all()
        kinds.add(measured)
        assert text.count("silent in all compared regions") == (mine.trend == "dead").sum() * measured
        assert text.count("not measured") == (0 if measured else len(mine) + 1)
        assert (f"for {tiny_run.classes[class_id - 1]} was not measured: there is no test query" in text) != measured
        assert ("dead" in text) == (measured and (mine.trend == "dead").any())
    assert kinds == {True, False}


@pytest.mark.parametrize(
    ("unlabelled", "who"),
    [
        (0, "the validation patients"),
        (1, "the validation patients and the patients without ground truth"),
        (None, "the patients without ground truth"),
    ],
)
def test_it_says_whose_slices_are_queries(own_run: Run, unlabelled: int | None, who: str) -> None:
    rows = own_run.query_slices("test")[:unlabelled]
    table = own_run.slices
    own_run.store.write_table(
        "slices.parquet", table.assign(split=table["split"].mask(table["slice"].isin(rows), "test"))
    )
    said = dict(choices(open_run(own_run.uri)))["What is explained"]
    assert said == f"{who}, which the network was not trained on"


@pytest.mark.parametrize(
    ("view", "last"), [("explain", ".lists"), ("curate", ".preview"), ("model", None), ("run", None)]
)
def test_on_a_phone_the_page_has_one_column_and_scrolls(
    tiny_run: Run, look: Opener, view: str, last: str | None
) -> None:
    page = look(tiny_run, view)
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("document.documentElement.scrollHeight") > 844
    if last is not None:
        box = page.locator(f"#{view} {last}").bounding_box()
        assert box is not None
        assert (box["x"], box["width"]) == (0, 390)
        assert box["y"] > page.locator(f"#{view} .pane").first.bounding_box()["y"]


def test_on_a_phone_a_finger_on_a_picture_scrolls(tiny_run: Run, look: Opener) -> None:
    """Nothing moves in the pictures of lists; where a finger moves the picture, it still scrolls up and down."""
    page = look(tiny_run)
    page.set_viewport_size({"width": 390, "height": 844})
    page.locator("#global").check()
    page.locator("#tab-curate").click()
    allowed = {
        place: page.locator(f"{place} .pane").first.evaluate("(pane) => getComputedStyle(pane).touchAction")
        for place in (".viewer", ".preview", ".card", ".review-list")
    }
    assert allowed == {".viewer": "pan-y", ".preview": "pan-y", ".card": "auto", ".review-list": "auto"}


def test_a_page_with_patients_says_so(own_run: Run, look: Opener) -> None:
    rewrite(own_run, "slices.parquet", lambda table: table.assign(case=table.case.str.replace("PHANTOM", "TCIA")))
    notice = look(render(own_run)).locator("[data-testid=notice]").text_content() or ""
    assert "This file contains images of patients: treat it as patient data." in notice
    assert "synthetic" not in notice
    page = look(render(own_run, images=False), "run")
    notice = page.locator("[data-testid=notice]").text_content() or ""
    assert "Images are left out; names of patients are in it." in notice
    assert "contains images" not in notice
    assert "It holds no image of a patient, but their names" in (page.locator("#run").text_content() or "")


# What is absent


def test_a_region_without_a_gradient_says_so(tiny_run: Run, look: Opener) -> None:
    page = look(tiny_run)
    norms = tiny_run.store.read("influence.zarr/norm2_test").sum(axis=0)
    found = queried(tiny_run)
    places = {row: place for place, row in enumerate(tiny_run.query_slices("test"))}
    silent = [norms[c - 1, places[row]] == 0 for row, c in zip(found.slice, found["class"], strict=True)]
    assert 0 < sum(silent) < len(found)
    for line, none in zip(found.itertuples(), silent, strict=True):
        choose(page, line.patient, line.index, tiny_run.classes[line._2 - 1])
        assert ("No gradient" in page.locator("#facts").inner_text()) == none
        assert (page.locator("#rankings").inner_text().count("Nothing to rank.") == 3) == none
        assert (page.locator("#rankings .card").count() == 0) == none


def test_where_whole_slices_are_differentiated_overlap_says_nothing(tiny_run: Run, look: Opener) -> None:
    page = look(tiny_run)
    line = queried(tiny_run).iloc[0]
    page.evaluate("DATA.lowOverlap = 2")
    choose(page, line.patient, line["index"], tiny_run.classes[line["class"] - 1])
    page.locator("#global").check()
    assert "Low overlap" in page.locator("#facts").inner_text()
    assert cards(page, "neutral") == []
    page.evaluate("DATA.wholeSlices = true; REGIONS.pixels.fill(0); MAXIMA.fill(NaN); showQuery()")
    position = tiny_run.query_slices("test").index(line.slice)
    influence = tiny_run.influence("test")[line["class"] - 1, position]
    telling = np.abs(influence[~np.isnan(influence) & (influence != 0)])
    shown = np.abs([float(card["influence"]) for card in cards(page, "neutral")])
    np.testing.assert_array_equal(shown, np.sort(telling)[:10])
    assert "Low overlap" not in page.locator("#facts").inner_text()
    assert "low overlap" not in page.locator("#rankings .mark").all_inner_texts()
    titles = page.eval_on_selector_all("[data-testid=links] tbody td", "all => all.map((one) => one.title)")
    assert titles
    assert all(title.endswith(": no region") for title in titles)


def test_regions_of_checkpoints_and_of_the_final_network_are_told_apart(own_run: Run, look: Opener) -> None:
    """``regions.source=checkpoint``: a region that the final network lacks, and the largest that a checkpoint does."""
    norms = own_run.store.read("influence.zarr/norm2_test")
    rows = list(own_run.query_slices("test"))
    found = queried(own_run).sort_values("pixels")
    telling = [norms[:, c - 1, rows.index(row)].sum() > 0 for row, c in zip(found.slice, found["class"], strict=True)]
    alone, largest = found[telling].iloc[0], found[telling].iloc[-1]
    norms[:, largest["class"] - 1, rows.index(largest.slice)] = np.nan
    own_run.store.write("influence.zarr/norm2_test", tuple(slice(0, length) for length in norms.shape), norms)
    tensor = own_run.store.read("influence.zarr/test")
    tensor[largest["class"] - 1, rows.index(largest.slice)] = np.nan
    own_run.store.write("influence.zarr/test", tuple(slice(0, length) for length in tensor.shape), tensor)

    def drop(table: pd.DataFrame) -> pd.DataFrame:
        chosen = (table.slice == alone.slice) & (table["class"] == alone["class"])
        return table.assign(pixels=table.pixels.where(~chosen, 0), overlap=table.overlap.where(~chosen))

    rewrite(own_run, "regions.parquet", drop)
    page = look(render(open_run(own_run.uri)))
    assert "No influence" not in page.locator("#facts").inner_text()
    assert page.locator("#rankings .card").count() > 0
    choose(page, alone.patient, alone["index"], own_run.classes[alone["class"] - 1])
    assert "the final network doesn't" in page.locator("#facts").inner_text()
    assert page.locator("#rankings .card").count() > 0
    choose(page, largest.patient, largest["index"], own_run.classes[largest["class"] - 1])
    assert "No influence: not every checkpoint predicts this region" in page.locator("#facts").inner_text()
    assert page.locator("#rankings .card").count() == 0


def test_it_starts_at_a_region_with_a_gradient_where_its_patient_has_one(tiny_run: Run, look: Opener) -> None:
    page = look(tiny_run)
    norms = tiny_run.store.read("influence.zarr/norm2_test").sum(axis=0)
    rows = list(tiny_run.query_slices("test"))
    patient = tiny_run.slices.set_index("slice").patient[rows[0]]
    mine = queried(tiny_run).query("patient == @patient")
    telling = [norms[c - 1, rows.index(row)] > 0 for row, c in zip(mine.slice, mine["class"], strict=True)]
    assert any(telling)
    assert page.locator("#patient").input_value() == patient
    assert "No gradient" not in page.locator("#facts").inner_text()
    assert page.locator("#rankings .card").count() > 0


def test_examinations_of_a_patient_and_what_they_were_read_with_are_told(own_run: Run, look: Opener) -> None:
    rows = own_run.query_slices("test")
    first = own_run.slices.set_index("slice").patient[rows[0]]
    mine = own_run.slices.query("patient == @first").slice.tolist()

    def two_examinations(table: pd.DataFrame) -> pd.DataFrame:
        later = table.slice.isin(mine[len(mine) // 2 :])
        table["case"] = table.case.where(~later, table.case + "-001")
        return table.assign(warnings=table.slice.isin(mine).map({True: "left and right are a guess", False: ""}))

    rewrite(own_run, "slices.parquet", two_examinations)
    run = render(open_run(own_run.uri))
    page, cases = look(run), run.slices.set_index("slice").case
    for line in queried(run).itertuples():
        choose(page, line.patient, line.index, run.classes[line._2 - 1])
        name = page.locator("#slice-name").inner_text()
        assert name.startswith(f"{cases[line.slice]}, slice " if line.patient == first else "slice ")
        warned = "Read with a warning: left and right are a guess." in page.locator("#facts").inner_text()
        assert warned == (line.patient == first)
        if line.slice in mine and cards(page, "proponents"):
            assert {row["query_case"] for row in saved(page, "#download")} == {cases[line.slice]}
    page.locator("#tab-curate").click()
    review = saved(page, "#review-export")
    assert {row["case"] for row in review} <= set(cases)


def test_a_class_that_is_never_predicted_says_so(own_run: Run, look: Opener) -> None:
    n = len(own_run.train_slices)
    for name in ("train", "test"):
        tensor = own_run.store.read(f"influence.zarr/{name}")
        tensor[2], tensor[:, :, 2 * n :] = np.nan, np.nan
        own_run.store.write(f"influence.zarr/{name}", tuple(slice(0, length) for length in tensor.shape), tensor)
        norms = own_run.store.read(f"influence.zarr/norm2_{name}")
        norms[:, 2] = np.nan
        own_run.store.write(f"influence.zarr/norm2_{name}", tuple(slice(0, length) for length in norms.shape), norms)
    absent = {"pixels": 0, "overlap": np.nan, "dice": np.nan}

    def drop(table: pd.DataFrame) -> pd.DataFrame:
        table.loc[table["class"] == 3, list(absent)] = list(absent.values())
        return table

    rewrite(own_run, "regions.parquet", drop)
    rewrite(own_run, "tables/self_influence.parquet", lambda table: table[table.train_class != 3])
    page = look(render(open_run(own_run.uri)))
    page.get_by_role("radio", name="ET", exact=True).click()
    assert "The network predicts no ET with more than 50 % confidence here" in page.locator("#facts").inner_text()
    assert page.locator("#rankings .card").count() == 0
    page.get_by_role("radio", name="ED", exact=True).click()
    page.select_option("#train-class", "3")
    assert page.locator("#rankings .card").count() == 0
    assert page.get_by_text("No train region passes the filters.").count() == 3
    page.locator("#tab-curate").click()
    page.select_option("#review-class", "3")
    assert "pixels are annotated ET; the network is confident of none" in page.locator("#review-table").inner_text()


HOSTILE = (
    '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked=2">',
    'O\'Brien & "Sons" <b>',
    "=cmd|' /C calc'!A1\u2028{{ 7 * 7 }}",
)


def test_hostile_names_are_only_names(own_run: Run, look: Opener) -> None:
    patients = sorted(own_run.slices.patient.unique())
    names = dict(zip(patients, [*HOSTILE, *HOSTILE][: len(patients)], strict=True))
    names = {patient: f"{name} {number}" for number, (patient, name) in enumerate(names.items())}
    rewrite(own_run, "slices.parquet", lambda table: table.replace({"patient": names}).assign(warnings=HOSTILE[0]))
    skipped = pd.DataFrame({"case": HOSTILE, "path": HOSTILE, "reason": HOSTILE})
    rewrite(own_run, "skipped.parquet", lambda _: skipped)
    run = render(open_run(own_run.uri))
    page = look(run)
    line = queried(run).iloc[0]
    choose(page, line.patient, line["index"], run.classes[line["class"] - 1])
    assert page.locator("#patient").input_value() == line.patient
    assert {card["patient"] for card in cards(page, "proponents")} <= set(names.values())
    rows = saved(page, "#download")
    assert {row["train_patient"] for row in rows} <= set(names.values())
    for view in ("curate", "model", "run"):
        page.locator(f"#tab-{view}").click()
    assert HOSTILE[1] in (page.locator("#run").text_content() or "")
    assert page.evaluate("window.hacked") is None
    assert page.locator("img, b:has-text('Sons')").count() == 0


def test_without_ground_truth_it_says_whose_labels_stand_in(own_run: Run, look: Opener) -> None:
    rows = own_run.query_slices("test")
    for path in ("slices.parquet", "regions.parquet"):
        rewrite(own_run, path, lambda table: table.assign(labelled=table.labelled & ~table.slice.isin(rows)))
    page = look(render(open_run(own_run.uri)))
    line = queried(own_run).iloc[0]
    choose(page, line.patient, line["index"], own_run.classes[line["class"] - 1])
    facts = page.locator("#facts").text_content() or ""
    assert "No ground truth: the network's own prediction stands in for it" in facts
    assert "Dice" not in facts
    page.locator("#tab-run").click()
    assert f"{len(rows)} slices have none" in (page.locator("#run").text_content() or "")


def test_without_a_predictive_feature_it_says_so(own_run: Run, look: Opener) -> None:
    rewrite(own_run, "tables/feature_trends.parquet", lambda table: table.assign(predictive=False))
    rewrite(own_run, "tables/feature_set_impact.parquet", lambda table: table.iloc[:0])
    page = look(render(own_run))
    assert "No feature is predictive for this class" in (page.locator("#links").text_content() or "")
    page.locator("#tab-model").click()
    text = page.locator("#model").text_content() or ""
    assert "there is nothing to compare" in text
    assert f"No feature is predictive for {own_run.classes[0]}" in text


def test_one_slice_of_one_patient(own_run: Run, look: Opener) -> None:
    line = queried(own_run).iloc[0]
    run = render(own_run, queries=[f"{line.patient}:{line['index']}"])
    page = look(run)
    assert page.locator("#patient option").count() == 1
    assert page.locator("#slice-name").text_content() == f"slice {line['index']} (1 of 1)"
    page.keyboard.press("ArrowUp")
    page.keyboard.press("PageDown")
    assert page.locator("#slice-name").text_content() == f"slice {line['index']} (1 of 1)"


def test_a_train_slice_is_explained_without_itself(own_run: Run, look: Opener) -> None:
    regions = own_run.table("regions")
    there = regions[(regions.pixels > 0) & regions.slice.isin(own_run.train_slices)].iloc[0]
    row = own_run.slices.set_index("slice").loc[there.slice]
    page = look(render(own_run, queries=[f"{row.patient}:{row['index']}"], top_k=20))
    page.get_by_role("radio", name=own_run.classes[there["class"] - 1], exact=True).click()
    page.locator("#global").check()
    table = own_run.table("proponents")
    mine = (table.query_set == "train") & (table.query_slice == there.slice) & (table.query_class == there["class"])
    expected = on_its_side(table[mine], "proponents").sort_values("rank").head(20)
    assert [float(card["influence"]) for card in cards(page, "proponents")] == expected.influence.tolist()
    page.locator("#same-patient").uncheck()
    assert row.patient not in {card["patient"] for card in cards(page, "proponents")}


def test_a_name_that_is_no_query_is_refused(tiny_run: Run) -> None:
    with pytest.raises(ValueError, match=r"report\.queries names 'nobody', which is no query of this run"):
        RenderReport(start_run(tiny_run.uri, overrides=["report.queries=[nobody]"])).open()("index")
    row = tiny_run.slices[tiny_run.slices["slice"].isin(tiny_run.query_slices("test"))].iloc[0]
    with pytest.raises(ValueError, match=rf"of {row.patient} there are slices {row['index']}, "):
        RenderReport(start_run(tiny_run.uri, overrides=[f"report.queries=['{row.patient}:999']"])).open()("index")


@pytest.mark.parametrize(
    ("text", "queries"),
    [
        ("all", "all"),
        ("3", 3),
        ("12", ("12",)),
        ("007", ("007",)),
        ("Doe, Jo", ("Doe, Jo",)),
        ("Doe, Jo:12", ("Doe, Jo:12",)),
        ("12, 007:12", ("12", "007:12")),
        ("𠮷田 é", ("𠮷田 é",)),
    ],
)
def test_any_patients_name_can_be_asked_for(
    own_run: Run, monkeypatch: pytest.MonkeyPatch, text: str, queries: str | int | tuple[str, ...]
) -> None:
    renamed = dict(zip(own_run.slices["patient"].unique(), ["12", "007", "Doe, Jo", "𠮷田 é"], strict=False))
    rewrite(own_run, "slices.parquet", lambda table: table.replace({"patient": renamed}))
    given: list[str] = []
    monkeypatch.setattr("ray_tracin.cli.step_command", lambda *_: lambda *arguments: given.extend(arguments[3]))
    done = CliRunner().invoke(app, ["report", "--run", own_run.uri, "--queries", text])
    assert done.exit_code == 0, done.output
    assert start_run(own_run.uri, overrides=given).config.report.queries == queries


def test_a_wrong_name_costs_no_work_but_that_of_the_slices(patients: Path, tmp_path: Path) -> None:
    settings = [*TINY, f"data.root={patients}", "report.queries=[nobody]"]
    run = start_run(tmp_path / "run", preset="demo", overrides=settings)
    refuse_wrong_queries(run)
    with pytest.raises(UsageError, match=r"report\.queries names 'nobody'.*there are \d+ patients, such as"):
        run_to(run, STEPS[-1], Executors(execute_serially, execute_serially), lambda event: None)
    assert not run.store.receipts("train")
    with pytest.raises(UsageError, match=r"report\.queries names 'nobody'"):
        refuse_wrong_queries(run)


@pytest.mark.slow
def test_a_run_of_one_patient(tmp_path: Path, look: Opener) -> None:
    write_patients(tmp_path / "patients", 1, edition="2019", seed=1, spacing=6.0, anatomy="analytic")
    settings = [*TINY, f"data.root={tmp_path / 'patients'}", "split.validation=0"]
    run = start_run(tmp_path / "run", preset="demo", overrides=settings)
    run_to(run, STEPS[-1], Executors(execute_serially, execute_serially), lambda event: None)
    page = look(run)
    assert page.locator("#patient option").count() == 1
    assert page.locator("#rankings .card").count() == 0
    assert page.get_by_text("those that would are global explainers, which are left out").count() > 0
    page.locator("#global").check()
    assert {card["patient"] for card in cards(page, "proponents")} == {run.slices.patient.iloc[0]}
    page.locator("#same-patient").uncheck()
    assert page.get_by_text("No train region passes the filters.").count() == 3
    for view in ("curate", "model", "run"):
        page.locator(f"#tab-{view}").click()
    text = page.locator("main").text_content() or ""
    assert "no test queries" in text
    assert "no query of this class has proponents" in text
    assert not re.search(r"\bnan\b|NaN|undefined", text)


@pytest.mark.slow
@pytest.mark.parametrize("query_set", ["train", "test"])
def test_a_run_of_one_query_set_and_an_unlabelled_patient(
    patients: Path, tmp_path: Path, look: Opener, query_set: str
) -> None:
    root = Path(shutil.copytree(patients, tmp_path / "patients"))
    case = sorted((root / "HGG").iterdir())[0]
    (case / f"{case.name}_seg.nii.gz").unlink()
    settings = [*TINY, f"data.root={root}", f"influence.query_sets=[{query_set}]"]
    run = start_run(tmp_path / "run", preset="demo", overrides=settings)
    run_to(run, STEPS[-1], Executors(execute_serially, execute_serially), lambda event: None)
    page = look(run)
    line = run.slices.set_index("slice").loc[run.query_slices(query_set)[0]]
    assert line.patient in page.locator("#patient").inner_text()
    assert (case.name in page.locator("#patient").inner_text()) == (query_set == "test")
    if query_set == "test":
        page.select_option("#patient", case.name)
        assert page.locator("#facts").get_by_text("No ground truth").count() == 1
    assert page.locator("#score").is_disabled() == (query_set == "test"), "cosines need norms of train regions"
    absent = {"train": ["has no test queries"], "test": ["has no train queries", "Self-influence is not known"]}
    for view in ("curate", "model", "run"):
        page.locator(f"#tab-{view}").click()
    text = page.locator("main").text_content() or ""
    assert all(phrase in text for phrase in absent[query_set])
    assert "4 slices have none" in text


# Pictures in the page, beside it, or nowhere


def strings(values: Any) -> Iterator[str]:
    """Every string in a JSON document."""
    if isinstance(values, str):
        yield values
    elif isinstance(values, dict | list):
        for value in values.values() if isinstance(values, dict) else values:
            yield from strings(value)


def decoded(run: Run) -> Iterator[bytes]:
    """Every base64 text of the page, as bytes."""
    page = (Path(run.uri) / "report/index.html").read_text()
    documents = re.findall(r'<script type="application/json" id="\w+">(.*?)</script>', page, re.DOTALL)
    assert len(documents) == 3
    for document in documents:
        for text in strings(json.loads(document)):
            if re.fullmatch(r"[A-Za-z0-9+/]{8,}={0,2}", text) and len(text) % 4 == 0:
                yield base64.b64decode(text)


def is_image(data: bytes) -> bool:
    try:
        Image.open(io.BytesIO(data), formats=["WEBP", "PNG", "JPEG", "GIF", "BMP", "TIFF"]).verify()
    except (OSError, SyntaxError):
        return False
    return True


def test_without_images_no_pixel_is_left(own_run: Run, look: Opener) -> None:
    labels, masks = own_run.labels(range(len(own_run.slices))), own_run.store.read("regions.zarr/mask")
    outlines = {encode_runs(label) for label in labels if label.any()} | {
        encode_runs(2 * (mask * np.arange(1, 4)[:, None, None]).sum(0) + mask.any(0)) for mask in masks if mask.any()
    }
    whole = list(decoded(own_run))
    assert sum(map(is_image, whole)) == 2 * len(own_run.slices), "the search finds them where they are"
    assert outlines & set(whole)
    run = render(own_run, images=False)
    kept = list(decoded(run))
    assert kept
    assert not any(map(is_image, kept))
    assert not outlines & set(kept)
    pixels = own_run.config.data.size**2
    assert all(len(data) % pixels for data in kept), "no array has the size of a slice"
    assert [path.name for path in (Path(run.uri) / "report").rglob("*") if path.is_file()] == ["index.html"]
    page = look(run)
    assert "Images are left out" in (page.locator("[data-testid=notice]").text_content() or "")
    line = queried(run).iloc[0]
    choose(page, line.patient, line["index"], run.classes[line["class"] - 1])
    assert_lists_equal_the_tables(page, run, line.slice, line["class"], 10)
    for view in ("curate", "model", "run"):
        page.locator(f"#tab-{view}").click()
    drawn = page.eval_on_selector_all(
        ".pane canvas",
        "all => all.some((c) => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(Boolean))",
    )
    assert drawn is False


def test_large_reports_keep_pictures_beside_the_page(own_run: Run, look: Opener) -> None:
    inline = (Path(own_run.uri) / "report/index.html").stat().st_size
    run = render(own_run, inline_megabytes=0)
    folder = Path(run.uri) / "report"
    assert (folder / "index.html").stat().st_size < inline
    assert len(list(folder.glob("assets/slice_*.webp"))) == len(run.slices)
    assert len(list(folder.glob("assets/influence_*.js"))) == len(run.query_slices("test"))
    receipt = run.store.read_receipt("report", "index")
    assert receipt is not None
    listed = {file.path for file in receipt.files}
    assert listed == {str(path.relative_to(run.uri)) for path in folder.rglob("*") if path.is_file()}
    page = look(run)
    line = queried(run).iloc[0]
    choose(page, line.patient, line["index"], run.classes[line["class"] - 1])
    assert_lists_equal_the_tables(page, run, line.slice, line["class"], 10)
    page.wait_for_selector(f"#query-panes .pane[data-drawn='{line.slice} t1']")
    page.locator("#tab-run").click()
    told = page.locator("[data-testid=size]").text_content() or ""
    beside = [path.stat().st_size for path in folder.glob("assets/*")]
    assert f"{len(beside)} files in the folder assets beside it have {sum(beside) / 1e3:.1f} kB" in told
    again = render(run, inline_megabytes=6)
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["index.html"], (
        "what an earlier report left is gone"
    )
    assert again.store.read_receipt("report", "index") is not None


def test_where_a_file_beside_the_page_is_lost_no_other_regions_lists_are_shown(own_run: Run, browser: Browser) -> None:
    run = render(own_run, inline_megabytes=0)
    first, second = queried(run).drop_duplicates("slice").iloc[:2].to_dict("records")
    lost = f"assets/influence_{second['slice']:06d}.js"
    (Path(run.uri) / "report" / lost).unlink()
    page = browser.new_page()  # whose console may complain
    page.goto((Path(run.uri) / "report/index.html").as_uri())
    page.wait_for_selector("body[data-ready]", timeout=10_000)
    page.locator("#global").check()
    for line, missing in ((first, False), (second, True), (first, False)):
        choose(page, line["patient"], line["index"], run.classes[line["class"] - 1])
        wait(page, f"(document.querySelectorAll('#rankings .card').length === 0) === {json.dumps(missing)}")
        assert (f"{lost} is missing" in page.locator("#rankings").inner_text()) == missing
        assert (page.locator("#global-count").inner_text() == "global explainers") == missing
        assert (page.locator("#links table").count() == 0) == missing
    page.close()


def test_pictures_are_read_when_they_are_needed(own_run: Run, look: Opener) -> None:
    page = look(render(own_run, inline_megabytes=0, top_k=1))
    keys, tensor_rows = page.evaluate("[[...keptPictures.keys()].map((key) => key.split(' ')), influenceRows.size]")
    assert {kind for kind, *_ in keys} == {"image"}
    assert len({row for _, row, _ in keys}) <= 4, "the query, a proponent, a neutral region, an opponent"
    assert tensor_rows == 1
    page.select_option("#feature-map", index=1)
    wait(page, "[...keptPictures.keys()].some((key) => key.startsWith('maps'))")


# The command


@pytest.mark.ray
def test_the_command_renders_again_where_options_differ(own_run: Run, local_cluster: str) -> None:
    page = Path(own_run.uri) / "report/index.html"
    command = ["report", "--run", own_run.uri]

    def invoke(*options: str) -> tuple[int, str, float]:
        done = CliRunner().invoke(app, [*command, *options], catch_exceptions=False)
        return done.exit_code, done.output, page.stat().st_mtime_ns

    first = page.stat().st_mtime_ns
    code, output, second = invoke()
    assert (code, second) == (0, first), "nothing differs"
    assert str(page) in output.replace("\n", "")
    code, output, third = invoke("--queries", "nobody")
    assert (code, third) == (2, first), "a wrong name costs nothing"
    assert "'nobody', which is no query of this run" in output
    with driving(own_run.store.objects):
        code, output, third = invoke("--top-k", "3")
    assert (code, third) == (1, first), "a run that another computes loses nothing"
    code, _, fourth = invoke("--no-images", "--queries", "2", "--top-k", "3")
    assert code == 0
    assert fourth > first
    documents = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    data = json.loads(documents[0])
    assert (data["images"], len(data["queries"]), data["topK"]) == (False, 2, 3)
    done = CliRunner().invoke(app, ["run", "--run", own_run.uri], catch_exceptions=False)
    assert done.exit_code == 0
    assert page.stat().st_mtime_ns == fourth, "`run` leaves a report without images as it is"


# Encodings


def decode_runs(data: bytes, shape: tuple[int, int]) -> np.ndarray:
    numbers, value, shift = [], 0, 0
    for byte in data:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            numbers.append(value)
            value = shift = 0
    return np.repeat(numbers[::2], numbers[1::2]).reshape(shape)


def test_runs_hold_any_label_map() -> None:
    generator = np.random.default_rng(0)
    for largest in (1, 3, 127, 128, 511):
        labels = np.repeat(generator.integers(0, largest + 1, (40, 6)), 7, axis=1)
        np.testing.assert_array_equal(decode_runs(encode_runs(labels), labels.shape), labels)
    assert encode_runs(np.zeros((192, 192), dtype=np.uint8)) == bytes([0, 0x80, 0xA0, 0x02])


def test_a_picture_has_its_modalities_side_by_side() -> None:
    image = np.linspace(-1, 1, 4, dtype=np.float32)[:, None, None] * np.ones((4, 32, 32), dtype=np.float32)
    strip = np.asarray(Image.open(io.BytesIO(encode_image(image))).convert("L"))
    assert strip.shape == (32, 128)
    np.testing.assert_allclose(strip[16, [16, 48, 80, 112]], [0, 85, 170, 255], atol=4)

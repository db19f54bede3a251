"""A run that begins with another one: nothing that its settings leave as it is is computed again, and every bit is."""

from pathlib import Path

import pytest
from conftest import TINY, branch
from test_cli import invoke
from test_pipeline import assert_close, bits, expected_tensor, finish, tensor

from ray_tracin.branching import take_over
from ray_tracin.claims import driving
from ray_tracin.integrity import verify
from ray_tracin.pipeline import status
from ray_tracin.runs import Run, open_run, start_run
from ray_tracin.stages import Event
from ray_tracin.vocabulary import UsageError


def test_other_rankings_of_the_same_tensor_and_back(tiny_run: Run, tmp_path: Path) -> None:
    other = branch(tiny_run, tmp_path / "other", "explainers={score: cosine, top_k: 3}", "features.random_sets=2")
    done = {event.stage for event in finish(other, "ablation")}
    assert done & {"cut", "train", "regions", "features", "gradients", "tiles", "influence", "export"} == set()
    assert done >= {"rankings", "feature-sums", "ablation"}
    assert len(other.table("proponents")) < len(tiny_run.table("proponents"))
    back = branch(other, tmp_path / "back", *TINY, "explainers={score: raw, top_k: 20}", "features.random_sets=20")
    assert back.fingerprint == tiny_run.fingerprint
    finish(back, "ablation")
    mine = {path for path in bits(tiny_run) if not path.startswith("gradients.zarr/")}
    assert bits(back) == {path: data for path, data in bits(tiny_run).items() if path in mine}
    for run in (other, back):
        assert verify(open_run(run.uri)) == {}
        assert all(line.done == line.total for line in status(run) if line.stage not in LAST)


LAST = {"figures", "pictures", "report"}


def test_other_gradients_of_the_same_network(tiny_run: Run, tmp_path: Path) -> None:
    run = branch(tiny_run, tmp_path / "head", "gradients.parameters=head")
    done = {event.stage for event in finish(run, "influence")}
    assert done >= {"regions", "gradients", "tiles", "influence"}
    assert done & {"inspect", "cut", "train"} == set()
    assert_close(tensor(run, "test"), expected_tensor(run, "test", ["head.weight"]), 1e-5)
    assert verify(open_run(run.uri)) == {}


def test_what_was_cut_off_goes_on(tiny_run: Run, tmp_path: Path) -> None:
    run = start_run(tmp_path / "run", overrides=["explainers.top_k=4"], base=tiny_run)
    seen: list[Event] = []

    def cut_off(event: Event) -> None:
        seen.append(event)
        if event.done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take_over(tiny_run, run, cut_off)
    again: list[Event] = []
    take_over(tiny_run, run, again.append)
    assert (again[0].kind, again[0].done) == ("begin", 20)
    assert len([event for event in [*seen, *again] if event.kind == "done"]) == again[-1].total
    assert finish(run, "export") == []
    assert verify(open_run(run.uri)) == {}


def test_what_cannot_be_begun_with_is_said(tiny_run: Run, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing that .* can be used .*\n  data\.size: 32 → 16"):
        branch(tiny_run, tmp_path / "size", "data.size=16")
    with pytest.raises(UsageError, match="can't begin with itself"):
        take_over(tiny_run, tiny_run, lambda event: None)
    with driving(tiny_run.store.objects), pytest.raises(ValueError, match="is being computed by process"):
        branch(tiny_run, tmp_path / "busy", "explainers.top_k=3")
    damaged = branch(tiny_run, tmp_path / "damaged", "explainers.top_k=3")
    (tmp_path / "damaged/slices.zarr/images/c/3/0/0/0").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 keys of stage cut are damaged in .*damaged, such as .*: the command that"):
        branch(damaged, tmp_path / "more", "explainers.top_k=4")


def test_the_command_line_begins_with_another_run(tiny_run: Run, tmp_path: Path) -> None:
    base = ["--from", tiny_run.uri]
    refused = invoke("export", "--run", str(tmp_path / "run"), *base, "--preset", "demo")
    assert (refused.exit_code, "--from brings the configuration" in refused.stderr) == (2, True)
    nowhere = invoke("export", "--run", str(tmp_path / "run"), "--from", str(tmp_path / "none"))
    assert (nowhere.exit_code, "no run at" in nowhere.stderr) == (2, True)
    changed = invoke("export", "--run", tiny_run.uri, "--set", "explainers.top_k=3")
    assert (changed.exit_code, f"with --from {tiny_run.uri} it begins with" in changed.stderr) == (2, True)
    assert not (tmp_path / "run").exists()

"""Every damage to any file of a run is found, and nothing else; running again gives the identical bytes."""

import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from test_pipeline import SERIAL, bits

from ray_tracin.indexing import IndexSketches, MeasureSketches
from ray_tracin.integrity import FOREIGN, TABLES_THAT_NAME_KEYS, repair, verify
from ray_tracin.pipeline import STEPS, run_to, stage_names
from ray_tracin.runs import Run, open_run, restore_configuration, start_run
from ray_tracin.soundness import CHECKED
from ray_tracin.store import Receipt

CONFIGURATION = ("config.yaml", "versions.json", "receipts/run/configuration.json")
"""What each other's damage is mended from: one of them at a time may be lost."""
STRAYS = ("stray.parquet", "0#1", "99", "000.partial", "zarr.json.bak", ".hidden")


@dataclass
class Harm:
    """What was done to a run, by path."""

    root: Path
    damaged: dict[str, str] = field(default_factory=dict)
    strays: set[str] = field(default_factory=set)
    of_lost_receipts: set[str] = field(default_factory=set)
    """Files that nothing names any more, because the receipt that did is damaged."""
    named_by: dict[str, set[str]] = field(default_factory=dict)

    def do(self, path: str, kind: str, rng: random.Random) -> None:
        file = self.root / path
        data = file.read_bytes()
        if path.startswith("receipts/"):
            self.named_by[path] = {stored.path for stored in Receipt.from_bytes(data).files}
            self.of_lost_receipts |= self.named_by[path]
        place = rng.randrange(len(data))
        if kind == "delete":
            file.unlink()
        elif kind == "empty":
            file.write_bytes(b"")
        elif kind == "truncate":
            file.write_bytes(data[:place])
        else:
            file.write_bytes(data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :])
        self.damaged[path] = kind

    def add_stray(self, folder: Path, name: str) -> None:
        path = folder / name
        if not path.exists():
            path.write_bytes(b"x")
            self.strays.add(path.relative_to(self.root).as_posix())

    def assert_found(self, problems: dict[str, list[str]]) -> None:
        foreign = {line.rsplit(":", 1)[0] for line in problems.pop(FOREIGN, [])}
        reported = {line.split(":")[0] for lines in problems.values() for line in lines}
        assert self.strays <= foreign
        assert foreign - self.strays <= self.of_lost_receipts
        assert reported <= self.damaged.keys(), "nothing that is whole is reported"
        # Where a key's receipt is damaged too, the key is computed anew whatever became of its files.
        unseen = self.damaged.keys() - reported - self.of_lost_receipts
        for path in unseen:  # A deleted receipt shows by the files that it named, whatever became of the tables.
            assert self.damaged[path] == "delete"
            assert self.named_by[path] & foreign or self.damaged.keys() & TABLES_THAT_NAME_KEYS


def copied(run: Run, folder: Path) -> Path:
    """The run without what others have noted of having read it: that is no part of it, and nobody misses it."""
    return Path(shutil.copytree(run.uri, folder, ignore=shutil.ignore_patterns(CHECKED)))


def harmed(copy: Path, seed: int, damages: int) -> Harm:
    """A run with damages of all kinds spread over all its files."""
    rng, harm = random.Random(seed), Harm(copy)
    files = sorted(path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file())
    folders = sorted(path for path in copy.rglob("*") if path.is_dir())
    strays = damages // 5
    harm.do(CONFIGURATION[seed % 3], ("truncate", "flip", "empty", "delete")[seed % 4], rng)
    chosen = rng.sample([path for path in files if path not in CONFIGURATION], damages - strays - 1)
    for number, path in enumerate(chosen):
        harm.do(path, ("truncate", "flip", "empty", "delete")[number % 4], rng)
    while len(harm.strays) < strays:
        harm.add_stray(rng.choice(folders), rng.choice(STRAYS))
    return harm


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_fifty_random_damages_are_found_and_mended(tiny_run: Run, tmp_path: Path, seed: int) -> None:
    uri = str(copied(tiny_run, tmp_path / "run"))
    own = ("config.yaml", "versions.json")
    before = {**bits(tiny_run), **{name: (Path(tiny_run.uri) / name).read_bytes() for name in own}}
    run = open_run(uri)
    assert verify(run) == {}
    harm = harmed(tmp_path / "run", seed, 50)
    assert len(harm.damaged) + len(harm.strays) == 50
    harm.assert_found(verify(run))
    done = repair(uri) if seed % 2 else restore_configuration(uri)  # Strays are in nobody's way.
    deleted = any(line.endswith(": deleted") for line in done)
    run_to(open_run(uri), STEPS[-1], SERIAL, lambda event: None)
    left = verify(open_run(uri))
    assert {line.rsplit(":", 1)[0] for line in left.pop(FOREIGN, [])} == (set() if deleted else harm.strays)
    assert left == {}
    repair(uri)
    after = {**bits(open_run(uri)), **{name: (Path(uri) / name).read_bytes() for name in own}}
    assert after == before
    assert verify(open_run(uri)) == {}


@pytest.mark.slow
def test_each_of_fifty_random_damages_is_found_alone(tiny_run: Run, tmp_path: Path) -> None:
    """One at a time: no damage hides behind another, and `verify` names its file and nothing else."""
    root, rng = copied(tiny_run, tmp_path / "run"), random.Random(17)
    files = sorted(path for path in root.rglob("*") if path.is_file())
    folders = sorted(path for path in root.rglob("*") if path.is_dir())
    for number in range(50):
        kind = ("truncate", "flip", "empty", "delete", "stray")[number % 5]
        harm, file = Harm(root), rng.choice(files)
        whole, path = file.read_bytes(), file.relative_to(root).as_posix()
        if kind == "stray":
            harm.add_stray(rng.choice(folders), rng.choice(STRAYS))
            path = next(iter(harm.strays))
        else:
            harm.do(path, kind, rng)
        named = _named_by_verify(root)
        # A receipt that is gone shows by the files that nothing names any more, where nothing else misses it.
        assert path in named or (kind == "delete" and harm.of_lost_receipts & named), (kind, path)
        assert named - {path} <= harm.of_lost_receipts, (kind, path)
        (root / path).unlink(missing_ok=True)
        if kind != "stray":
            file.write_bytes(whole)
    assert verify(open_run(root)) == {}


def _named_by_verify(root: Path) -> set[str]:
    """The files that are said to be wrong, in whatever way."""
    try:
        found = verify(open_run(root))
    except (ValueError, FileNotFoundError) as error:
        return {name for name in CONFIGURATION if name in str(error)}
    foreign = {line.rsplit(":", 1)[0] for line in found.pop(FOREIGN, [])}
    return foreign | {line.split(":")[0] for lines in found.values() for line in lines}


def test_a_flipped_bit_anywhere_in_a_receipt_is_noticed(tiny_run: Run) -> None:
    path = next((Path(tiny_run.uri) / "receipts/influence/train").glob("*.json"))
    whole = path.read_bytes()
    Receipt.from_bytes(whole)
    for place in range(len(whole)):
        with pytest.raises(ValueError):
            Receipt.from_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])


@pytest.mark.parametrize("wrong", ["a number for an absent region", "NaN for a pair that exists"])
def test_nan_stands_exactly_where_a_region_is_absent(tiny_run: Run, tmp_path: Path, wrong: str) -> None:
    """Also where every checksum holds: the stripe is declared done with the wrong values."""
    run = open_run(shutil.copytree(tiny_run.uri, tmp_path / "run"))
    stored = run.store.receipts("influence")
    key, receipt = next((key, receipt) for key, receipt in stored.items() if key.startswith("test"))
    values = run.store.read("influence.zarr/test")
    absent = np.isnan(values)
    assert absent.any()
    place = tuple(np.argwhere(absent if wrong.startswith("a number") else ~absent)[0])
    values[place] = 0.0 if wrong.startswith("a number") else np.nan
    run.store.write("influence.zarr/test", tuple(slice(0, length) for length in values.shape), values)
    (written,) = run.store.take_written()
    files = tuple(written if file.path == written.path else file for file in receipt.files)
    run.store.write_receipt(Receipt(receipt.stage, key, receipt.fingerprint, files=files))
    lost, invented = (0, 1) if wrong.startswith("a number") else (1, 0)
    assert verify(open_run(run.uri)) == {
        f"influence/{key}": [
            f"influence.zarr/test: expected NaN exactly where a region is absent; {lost} are NaN although both regions "
            f"exist, {invented} are numbers although one doesn't"
        ]
    }


def test_metadata_is_not_deleted_where_its_receipt_is_gone(tiny_run: Run, tmp_path: Path) -> None:
    """Without it the arrays could not be read any more."""
    home = Path(shutil.copytree(tiny_run.uri, tmp_path / "run"))
    (home / "receipts/layout/influence.json").unlink()
    (left,) = repair(str(home))
    assert left.startswith("files that no receipt names are left for now (7)")
    assert verify(open_run(home))["layout/influence"] == ["receipts/layout/influence.json: missing"]
    run_to(open_run(home), "influence", SERIAL, lambda event: None)
    assert verify(open_run(home)) == {}


def test_an_index_does_not_make_other_steps_and_indexes_missed(tiny_run: Run, tmp_path: Path) -> None:
    """A run that ended with `influence` may be indexed, and an index be begun and given up for one of another size."""
    home = Path(shutil.copytree(tiny_run.uri, tmp_path / "run"))
    run, names = open_run(home), stage_names(tiny_run)
    for name in names[names.index("export") :]:
        shutil.rmtree(home / "receipts" / name, ignore_errors=True)
    for stage in (IndexSketches(run, 2), IndexSketches(run, 4), MeasureSketches(run, 4)):
        run.store.write_receipt(Receipt(stage.name, str(stage.keys()[0]), run.fingerprint))
    found = verify(run)
    del found[FOREIGN]
    indexes = [f"layout/sketches-{size}" for size in (2, 4)]
    assert [*found] == [*indexes, *(f"sketches-4/{key}" for key in IndexSketches(run, 4).keys()[1:])]


def test_a_damaged_configuration_says_how_to_restore_it(tmp_path: Path) -> None:
    uri = start_run(tmp_path / "run", preset="demo").uri
    for name in ("config.yaml", "versions.json"):
        path = tmp_path / "run" / name
        whole = path.read_bytes()
        for damaged in (b"", b"{", whole[:30], whole.replace(b"seed: 0", b"seed: 4").replace(b'"format"', b'"farmat"')):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"`ray-tracin repair --run .*run` restores it|has format None"):
                open_run(uri)
            assert repair(uri) == [f"{name}: restored"]
            assert path.read_bytes() == whole
    assert repair(uri) == []
    (tmp_path / "run/receipts/run/configuration.json").write_bytes(b"")
    assert repair(uri) == ["receipts/run/configuration.json: restored"]
    (tmp_path / "run/receipts/run/configuration.json").unlink()
    (tmp_path / "run/config.yaml").write_bytes(b"seed: 9")
    with pytest.raises(ValueError, match="restores it"):
        repair(uri)


def test_what_an_unreadable_receipt_named_is_not_deleted(tiny_run: Run, tmp_path: Path) -> None:
    home = Path(shutil.copytree(tiny_run.uri, tmp_path / "run"))
    held = [home / f"checkpoints/{name}.pt" for name in ("epoch_08", "final")]
    receipt = home / "receipts/train/epoch_08.json"
    whole = receipt.read_bytes()
    receipt.write_bytes(b"")
    (home / "stray.csv").write_bytes(b"x")
    (left,) = repair(str(home))
    assert left == (
        "files that no receipt names are left for now (3): the same command as before completes the run; "
        "then repair again"
    )
    receipt.unlink()
    assert repair(str(home)) == [left]
    assert all(path.exists() for path in (*held, home / "stray.csv"))
    receipt.write_bytes(whole)
    (home / "versions.json").write_bytes(b"{")
    restored, left = repair(str(home))
    assert restored == "versions.json: restored"
    assert left.startswith("files that no receipt names are left for now (1): `ray-tracin verify` lists them")
    assert repair(str(home)) == ["stray.csv: deleted"]


@pytest.mark.parametrize("given", ["absolute", "relative", "through a link"])
def test_patients_inside_a_run_are_no_strangers_wherever_it_is_moved(
    patients: Path, tmp_path: Path, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    home, root = tmp_path / "run", "run/patients" if given == "relative" else tmp_path / "run/patients"
    if given == "through a link":
        (tmp_path / "real").mkdir()
        home.symlink_to(tmp_path / "real")
    shutil.copytree(patients, home / "patients")
    run_to(
        start_run(home, preset="demo", overrides=[*TINY, f"data.root={root}"]), "prepare", SERIAL, lambda event: None
    )
    kept = {path.relative_to(home) for path in home.rglob("*.nii.gz")}
    assert len(kept) == 6 * 5
    _assert_only_the_stray_goes(home)
    moved = home.resolve().rename(tmp_path / "moved")
    places = [moved]
    if given == "through a link":
        (tmp_path / "again").symlink_to(moved)
        places.append(tmp_path / "again")
    for place in places:
        _assert_only_the_stray_goes(place)
    assert {path.relative_to(moved) for path in moved.rglob("*.nii.gz")} == kept


def _assert_only_the_stray_goes(home: Path) -> None:
    assert verify(open_run(home)) == {}
    assert repair(str(home)) == []
    for name in ("stray.csv", "tables/stray.parquet"):
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_bytes(b"x")
        assert verify(open_run(home)) == {FOREIGN: [f"{name}: belongs to no finished key"]}
        assert repair(str(home)) == [f"{name}: deleted"]

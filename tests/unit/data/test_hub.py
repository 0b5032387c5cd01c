"""Data sets of the hub, at the boundary of its library: what is asked for, what is kept, what goes wrong."""

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import errors

from backpass.data import load_data
from backpass.data.normalisation import known_normalisation
from backpass.errors import BackpassError, UnknownNameError
from support.pictures import parquet, picture

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories in a folder, in place of the library's two functions; keeps what was asked."""

    def __init__(self, root):
        self.root, self.asked, self.files = root, [], {}
        self.online = True
        self.local = root / "downloaded"

    def add(self, repository, *files, revision=None, seed=0, **columns):
        for number, file in enumerate(files):
            path = self.root / repository / str(revision) / file
            if file.endswith(".parquet"):
                parquet(path, [picture(seed + number)[0]], [number], **columns)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("print('never run')")
        self.files[repository, revision] = list(files)

    def dataset_info(self, repo_id, *, revision=None):
        self.asked.append(("info", repo_id, revision))
        if not self.online:
            raise errors.OfflineModeIsEnabled("Cannot reach the hub: offline mode is enabled.")
        if not any(repo_id == repository for repository, _ in self.files):
            raise self.refusal(errors.RepositoryNotFoundError)
        if (repo_id, revision) not in self.files:
            raise self.refusal(errors.RevisionNotFoundError)
        files = [SimpleNamespace(rfilename=name) for name in self.files[repo_id, revision]]
        return SimpleNamespace(sha=COMMIT, siblings=files)

    @staticmethod
    def refusal(kind):
        return kind.__new__(kind, "refused")

    def download(self, repo_id, filename, *, repo_type, revision, local_files_only):
        assert (repo_type, revision) == ("dataset", COMMIT)
        self.asked.append(("file", repo_id, filename, local_files_only))
        kept = self.local / repo_id / revision / filename
        if kept.exists():
            return str(kept)
        if local_files_only or not self.online:
            raise errors.LocalEntryNotFoundError("not there, and no network")
        (source,) = (self.root / repo_id).rglob(filename)
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, kept)
        return str(kept)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: made)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", made.download)
    monkeypatch.setenv("BACKPASS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BACKPASS_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    return made


def test_only_the_parquet_files_of_the_part_are_downloaded_and_named(hub):
    hub.add(
        "somebody/cats",
        "data/test-00000-of-00002.parquet",
        "data/test-00001-of-00002.parquet",
        "data/train-0.parquet",
        "cats.py",
        "README.md",
    )
    data = load_data("somebody/cats")
    assert torch.equal(data.images.pixels, torch.stack([picture(0)[1], picture(1)[1]]))
    assert {asked[2] for asked in hub.asked if asked[0] == "file"} == {
        "data/test-00000-of-00002.parquet",
        "data/test-00001-of-00002.parquet",
    }
    assert data.description == (
        "cats, test: 2 colour images of 6x5 pixels (PNG) of somebody/cats at revision 0123456789ab: "
        "data/test-00000-of-00002.parquet, data/test-00001-of-00002.parquet"
    )


@pytest.mark.parametrize(
    ("name", "repository", "file"),
    [
        ("mnist", "ylecun/mnist", "mnist/train-00000-of-00001.parquet"),
        ("cifar10", "uoft-cs/cifar10", "plain_text/train-00000-of-00001.parquet"),
    ],
)
def test_short_names_stand_for_data_sets_of_the_hub(hub, name, repository, file):
    hub.add(repository, file, image="img")
    short, long = load_data(name, split="train"), load_data(repository, split="train")
    assert repository in short.description
    assert torch.equal(short.images.pixels, long.images.pixels)
    assert known_normalisation(repository) == known_normalisation(name) is not None


def test_after_the_first_time_no_network_is_asked_and_the_revision_stays(hub):
    hub.add("somebody/cats", "test-0.parquet")
    first = load_data("somebody/cats")
    hub.online, hub.asked = False, []
    again = load_data("somebody/cats")
    assert again.description == first.description
    assert torch.equal(again.images.pixels, first.images.pixels)
    assert hub.asked == [("file", "somebody/cats", "test-0.parquet", True)]
    with pytest.raises(BackpassError, match="BACKPASS_DATA"):
        load_data("somebody/cats", split="train")


def test_files_that_were_cleaned_away_are_downloaded_again_at_the_same_revision(hub):
    hub.add("somebody/cats", "test-0.parquet")
    load_data("somebody/cats")
    shutil.rmtree(hub.local)
    hub.asked = []
    load_data("somebody/cats")
    assert hub.asked == [("file", "somebody/cats", "test-0.parquet", local) for local in (True, False)]


def test_a_revision_can_be_named(hub):
    hub.add("somebody/cats", "test-0.parquet", revision="v2")
    assert len(load_data("somebody/cats:revision=v2").images) == 1
    assert ("info", "somebody/cats", "v2") in hub.asked
    with pytest.raises(BackpassError, match="no revision 'v3'"):
        load_data("somebody/cats:revision=v3")


def test_the_hubs_own_parquet_copy_serves_where_a_data_set_has_other_files(hub):
    hub.add("somebody/zip", "images.zip")
    hub.add("somebody/zip", "default/test/0000.parquet", revision="refs/convert/parquet")
    assert "default/test/0000.parquet" in load_data("somebody/zip").description


def test_a_configuration_is_chosen_where_there_are_several(hub):
    hub.add("somebody/cats", "small/test-0.parquet", "large/test-0.parquet", "large/train-0.parquet")
    assert load_data("somebody/cats:config=large").images.labels.tolist() == [1]
    assert "large/train-0" in load_data("somebody/cats", split="train").description
    for name, message in (
        ("somebody/cats", "2 configurations with 'test': 'large', 'small'. Choose one, as in somebody/cats:config="),
        ("somebody/cats:config=big", "no configuration 'big'; it has 'large', 'small'"),
        ("somebody/cats:size=big", "unknown setting of data 'size'"),
    ):
        with pytest.raises(BackpassError, match=message):
            load_data(name)


def test_a_label_column_is_chosen_where_none_has_a_usual_name(hub):
    hub.add("somebody/cats", "test-0.parquet", label="fine_label", coarse_label=[4])
    with pytest.raises(BackpassError, match=r"as in NAME:label=fine_label \(or coarse_label\)"):
        load_data("somebody/cats")
    assert load_data("somebody/cats:label=coarse_label").images.labels.tolist() == [4]


def test_what_the_hub_does_not_have_is_told(hub):
    hub.add("somebody/cats", "train-0.parquet")
    hub.add("somebody/text", "notes.txt")
    for name, message in (
        ("somebody/dogs", "no folder 'somebody/dogs' here and no data set 'somebody/dogs' on the Hugging Face hub"),
        ("somebody/cats", "no part 'test'; it has 'train'. Choose one with --split"),
        ("somebody/text", "no Parquet files"),
    ):
        with pytest.raises(BackpassError, match=message):
            load_data(name)


def test_a_gated_data_set_says_how_to_get_in(hub, monkeypatch):
    hub.add("somebody/cats", "test-0.parquet")

    def refuse(*_, **__):
        raise Hub.refusal(errors.GatedRepoError)

    monkeypatch.setattr(hub, "dataset_info", refuse)
    with pytest.raises(BackpassError, match="gated: ask for access"):
        load_data("somebody/cats")


def test_settings_of_one_value_do_not_share_a_note(hub):
    hub.add("o/n", "en/test-0.parquet")
    hub.add("o/n", "test-1.parquet", revision="en", seed=7)
    config, revision = load_data("o/n:config=en"), load_data("o/n:revision=en")
    assert not torch.equal(config.images.pixels, revision.images.pixels)
    hub.online = False
    assert torch.equal(load_data("o/n:revision=en").images.pixels, revision.images.pixels)


def test_a_missing_shard_is_named(hub):
    hub.add("o/n", "data/test-00001-of-00003.parquet")
    with pytest.raises(BackpassError, match="o/n holds test-00001-of-00003.parquet: expected all 3 shards"):
        load_data("o/n")


def test_a_note_that_is_damaged_is_made_anew(hub, tmp_path):
    hub.add("somebody/cats", "test-0.parquet")
    load_data("somebody/cats")
    (note,) = (tmp_path / "cache" / "hub").iterdir()
    note.write_text('{"revision": 3')
    assert len(load_data("somebody/cats").images) == 1
    assert COMMIT in note.read_text()


@pytest.mark.parametrize("name", ["mnist", "somebody/cats"])
def test_without_a_network_the_message_says_how_to_give_the_data(tmp_path, name):
    """The real library, told by its own switch that there is no network."""
    script = f"from backpass.data import load_data\nload_data({name!r})"
    environment = {k: v for k, v in os.environ.items() if k != "BACKPASS_DATA"}
    environment |= {"HF_HUB_OFFLINE": "1", "BACKPASS_CACHE": str(tmp_path), "HF_HOME": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    last = ended.stderr.strip().splitlines()[-1]
    assert ended.returncode == 1
    assert f"BackpassError: cannot find '{name}'" in last
    assert "offline mode is enabled" in last
    assert f"set BACKPASS_DATA to a folder that holds {name}/train-*.parquet" in last


def test_a_misspelt_short_name_is_answered_with_the_nearest(hub):
    with pytest.raises(UnknownNameError, match="Did you mean 'cifar10'"):
        load_data("cifar1O")

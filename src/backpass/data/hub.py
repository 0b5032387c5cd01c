"""Parquet files of the Hugging Face hub's data sets, downloaded once; no code of the hub is run."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from backpass.data.cache import cache_folder
from backpass.data.names import DataName
from backpass.data.parquet import check_shards
from backpass.errors import BackpassError
from backpass.files import write_whole
from backpass.wording import reason

__all__ = ["Fetched", "fetch"]

_LOG = logging.getLogger(__name__)
_CONVERTED = "refs/convert/parquet"  # where the hub keeps Parquet copies of data sets that have other files


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """The files of one part of a data set of the hub.

    Attributes:
        repository: ``owner/name``.
        revision: the commit, 40 hexadecimal digits.
        names: the files' paths in the repository.
        files: their paths on this machine, in the same order.
    """

    repository: str
    revision: str
    names: tuple[str, ...]
    files: tuple[Path, ...]

    def __str__(self) -> str:
        return f"{self.repository} at revision {self.revision[:12]}: {', '.join(self.names)}"


def fetch(name: DataName, split: str) -> Fetched:
    """Return the Parquet files of a part of a data set, downloaded the first time; later the network is not used.

    A note in the cache keeps the commit that was the newest the first time, for each repository, configuration,
    revision and part. The hub's library shows the progress on a terminal, keeps the files (``HF_HOME``) and reads the
    token for private data sets.

    Args:
        name: with ``repository``; ``config`` and ``revision`` choose.
        split: the part, for instance ``train``.

    Raises:
        BackpassError: the hub has no such data set or part, or cannot be reached; the message says what to do.
    """
    repository = name.repository
    if repository is None:
        raise BackpassError(f"{name.name!r} is no data set of the Hugging Face hub: these are named owner/name.")
    key = {"repository": repository, "config": name.config, "revision": name.revision, "split": split}
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8).hexdigest()
    note = cache_folder() / "hub" / f"{repository.replace('/', '--')}--{digest}.json"
    noted = _read_note(note, key)
    if noted is not None:
        files = _download(name, *noted, local=True)
        if files is not None:
            return Fetched(repository=repository, revision=noted[0], names=noted[1], files=files)
    revision, names = noted or _look_up(name, repository, split)
    files = _download(name, revision, names, local=False)
    if files is None:
        raise BackpassError(
            f"the hub has lost {', '.join(names)} of {repository} at {revision}: name another revision."
        )
    try:
        write_whole(note, json.dumps({"of": key, "revision": revision, "names": names}, indent=1) + "\n")
    except OSError as error:
        _LOG.warning("%s cannot be written, so the hub is asked every time: %s", note, error)
    return Fetched(repository=repository, revision=revision, names=names, files=files)


def _read_note(note: Path, key: dict[str, str | None]) -> tuple[str, tuple[str, ...]] | None:
    try:
        content = json.loads(note.read_text(encoding="utf-8"))
        if content["of"] != key:
            return None
        return str(content["revision"]), tuple(map(str, content["names"]))
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _look_up(name: DataName, repository: str, split: str) -> tuple[str, tuple[str, ...]]:
    """Return the commit, and the files of the split in it."""
    for revision in [name.revision] if name.revision else [None, _CONVERTED]:
        found = _list(name, repository, revision)
        if found is not None and found[1]:
            return found[0], _choose(repository, found[1], name.config, split)
    raise BackpassError(
        f"{repository} on the Hugging Face hub has no Parquet files{f' at {name.revision}' if name.revision else ''}: "
        "convert it, and give the folder instead."
    )


def _list(name: DataName, repository: str, revision: str | None) -> tuple[str, list[str]] | None:
    """Return the commit of a revision and its Parquet files; None where the hub made no such revision."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi().dataset_info(repository, revision=revision)
    except GatedRepoError as error:
        raise BackpassError(
            f"{repository} is gated: ask for access on its page on huggingface.co, then run `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        if revision == _CONVERTED:
            return None
        raise BackpassError(f"{repository} has no revision {revision!r} on the Hugging Face hub.") from error
    except RepositoryNotFoundError as error:
        raise BackpassError(
            f"there is no folder {repository!r} here and no data set {repository!r} on the Hugging Face hub, or it is "
            "private (`hf auth login`)."
        ) from error
    except Exception as error:
        raise _unreachable(name, error) from error
    files = sorted(file.rfilename for file in info.siblings or () if file.rfilename.endswith(".parquet"))
    return str(info.sha), files


def _choose(repository: str, files: Sequence[str], config: str | None, split: str) -> tuple[str, ...]:
    """Return the files of a split and a configuration: ``CONFIG/SPLIT-*.parquet`` or ``CONFIG/SPLIT/*.parquet``."""
    places: dict[tuple[str, str], list[str]] = {}
    for file in files:
        path = PurePosixPath(file)
        part = path.stem.split("-")[0]
        folders = path.parent.parts
        if part.isdigit() and folders:  # CONFIG/SPLIT/0000.parquet
            part, folders = folders[-1], folders[:-1]
        places.setdefault(("/".join(folders), part), []).append(file)
    configs = sorted({place for place, _ in places})
    if config is not None and config not in configs:
        raise BackpassError(f"{repository} has no configuration {config!r}; it has {_listing(configs)}.")
    candidates = [place for place, part in places if part == split and config in (None, place)]
    if not candidates:
        splits = sorted({part for place, part in places if config in (None, place)})
        raise BackpassError(f"{repository} has no part {split!r}; it has {_listing(splits)}. Choose one with --split.")
    if len(candidates) > 1:
        raise BackpassError(
            f"{repository} has {len(candidates)} configurations with {split!r}: {_listing(sorted(candidates))}. Choose "
            f"one, as in {repository}:config={candidates[0]}."
        )
    chosen = places[candidates[0], split]
    check_shards(repository, [PurePosixPath(file).name for file in chosen])
    return tuple(chosen)


def _download(name: DataName, revision: str, files: Sequence[str], *, local: bool) -> tuple[Path, ...] | None:
    """Return the files on this machine; None where one is missing, on this machine if ``local``, else on the hub."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return tuple(
            Path(
                hf_hub_download(
                    str(name.repository), file, repo_type="dataset", revision=revision, local_files_only=local
                )
            )
            for file in files
        )
    except EntryNotFoundError as error:
        # Without a network the library says that the file is not there locally either.
        if local or not isinstance(error, LocalEntryNotFoundError):
            return None
        raise _unreachable(name, error) from error
    except Exception as error:
        raise _unreachable(name, error) from error


def _unreachable(name: DataName, error: Exception) -> BackpassError:
    """Return the error of a data set that is not found; the hub's exceptions differ by version and HTTP client."""
    place = os.environ.get("BACKPASS_DATA")
    here = f"there is no {Path(place) / name.name}" if place else "the environment variable BACKPASS_DATA is not set"
    return BackpassError(
        f"cannot find {name.name!r}: {here}, and {name.repository} cannot be fetched from the Hugging Face hub "
        f"({reason(error)}). Without a network, set BACKPASS_DATA to a folder that holds "
        f"{name.name}/train-*.parquet and {name.name}/test-*.parquet as they are on the hub, or give the folder itself."
    )


def _listing(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown

"""The plots of a card: drawn on seal, pushed and pulled with it, and no part of the artifact."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard
from markdown_it import MarkdownIt

import lopd_store
from lopd_store.layout import ALL_PLOTS
from tests.artifacts import random_pairs, save_rollouts
from tests.hub.server import HubServer

REPO = "acme/art"


@pytest.fixture(scope="module")
def plotted(teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of enough positions for plots; not to be changed."""
    directory = tmp_path_factory.mktemp("plotted")
    rollouts = save_rollouts(directory / "r.parquet", random_pairs([(2, 40)] * 30), logprob=-1.5)
    return lopd_store.build(teacher=teacher_dir, rollouts=rollouts, output=directory / "artifact").path


def plots_in(directory: Path) -> dict[str, bytes]:
    return {f"plots/{path.name}": path.read_bytes() for path in directory.glob("plots/*")}


def shown(card: str) -> dict[str, str]:
    """The images of a card, with the words for who cannot see them."""
    tokens = MarkdownIt("commonmark").parse(DatasetCard(card).text)
    images = [child for token in tokens for child in token.children or () if child.type == "image"]
    return {str(image.attrs["src"]): image.content for image in images}


def test_an_artifact_is_sealed_with_its_plots(plotted: Path, sealed: Path) -> None:
    images = shown((plotted / "README.md").read_text())
    assert images.keys() == plots_in(plotted).keys() == set(ALL_PLOTS)
    assert all(len(words) > 20 for words in images.values())
    assert not plots_in(sealed) and not shown((sealed / "README.md").read_text())  # it has few positions


def test_plots_are_no_part_of_the_artifact(plotted: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(plotted, tmp_path / "copy"))
    shutil.rmtree(copy / "plots")
    assert lopd_store.verify(copy) == lopd_store.verify(plotted)


def test_plots_travel_with_the_card_and_leave_with_it(
    hub: HubServer, plotted: Path, unknown: Path, tmp_path: Path
) -> None:
    first = lopd_store.push(plotted, REPO)
    images = plots_in(plotted)
    assert {path: data for path, data in hub.files(REPO).items() if path in ALL_PLOTS} == images
    assert shown(hub.files(REPO)["README.md"].decode()).keys() == images.keys()
    pulled = lopd_store.pull(REPO, output=tmp_path / "pulled").path
    some = lopd_store.subset(pulled, output=tmp_path / "some", only="sampled").path
    assert plots_in(pulled) == plots_in(some) == images
    commits = len(hub.repo(REPO).commits)
    lopd_store.push(pulled, REPO)
    assert len(hub.repo(REPO).commits) == commits  # all of it is there
    lopd_store.push(unknown, REPO)
    assert not set(ALL_PLOTS) & hub.files(REPO).keys() and "plots/" not in hub.files(REPO)["README.md"].decode()
    assert first.tag is not None and set(ALL_PLOTS) <= hub.files(REPO, first.tag).keys()


def test_other_files_and_links_among_the_plots_stay_where_they_are(
    hub: HubServer, plotted: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(plotted, tmp_path / "copy"))
    (copy / "plots" / "mine.png").write_bytes(b"mine")
    (copy / "plots" / "topk.png").unlink()
    (copy / "plots" / "topk.png").symlink_to("/etc/hostname")
    lopd_store.push(copy, REPO)
    assert {path for path in hub.files(REPO) if path.startswith("plots/")} == set(ALL_PLOTS) - {"plots/topk.png"}
    hub.overwrite(REPO, "plots/evil.png", b"evil", honest=True)
    lopd_store.pull(REPO, output=tmp_path / "pulled")
    assert plots_in(tmp_path / "pulled").keys() == set(ALL_PLOTS) - {"plots/topk.png"}
    shutil.rmtree(copy / "plots")
    (copy / "plots").symlink_to(plotted / "plots")
    lopd_store.push(copy, "acme/linked")
    assert not [path for path in hub.files("acme/linked") if path.startswith("plots/")]

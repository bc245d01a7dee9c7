"""Models named by a Hub id: fetched by the real client, identified with the commit they came from."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import HfApi

import lopd_store
import lopd_store.rollouts
from lopd_store.errors import DataError, InputError
from lopd_store.license import License, read_license
from tests.commands import run_command
from tests.hub.routes import Answer
from tests.hub.server import HubServer


@pytest.fixture
def model_id(hub: HubServer, teacher_dir: Path) -> str:
    """A tiny teacher as a model repository."""
    HfApi().create_repo("acme/teacher")
    HfApi().upload_folder(repo_id="acme/teacher", folder_path=teacher_dir)
    return "acme/teacher"


def test_a_model_on_the_hub_is_the_model_that_was_uploaded(model_id: str, teacher_dir: Path) -> None:
    identity = lopd_store.identify(model_id)
    assert identity.differences(lopd_store.identify(teacher_dir)) == ()
    assert (identity.name, identity.revision) == (model_id, HfApi().model_info(model_id).sha)


def test_a_revision_can_be_named(model_id: str) -> None:
    commit = HfApi().model_info(model_id).sha
    HfApi().create_tag(model_id, tag="v1")
    assert lopd_store.identify(f"{model_id}@v1").revision == commit


def test_a_model_on_the_hub_samples_and_is_recorded(model_id: str, prompts_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "sft.parquet"
    ran = run_command(
        *("lopd-store", "generate", "--model", model_id, "--prompts", prompts_file, "--output", output),
        *("--max-response-tokens", 4),
    )
    assert ran.code == 0, ran.stderr
    record = lopd_store.rollouts.RolloutsFile(output).record
    assert record is not None and record.policy.name == model_id


@pytest.mark.parametrize(("gated", "known"), [(False, False), ("auto", True), ("manual", True)])
def test_licence_and_gating_come_from_the_card_and_the_hub(
    hub: HubServer, model_id: str, gated: bool | str, known: bool
) -> None:
    card = b"---\nlicense: other\nlicense_name: acme-1\n---\n# Teacher\n"
    HfApi().upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=model_id)
    hub.repo(model_id, repo_type="model").gated = gated
    assert read_license(model_id) == License(id="other", name="acme-1", gated=known)


def test_gating_is_unknown_where_the_hub_does_not_answer(
    hub: HubServer, model_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lopd_store.identify(model_id)
    hub.fault = lambda method, path: Answer(status=503) if path.startswith("/api/models") else None
    assert read_license(model_id).gated is None


def test_pickled_weights_on_the_hub_are_not_even_fetched(hub: HubServer) -> None:
    HfApi().create_repo("acme/pickled")
    for name in ("pytorch_model.bin", "config.json"):
        HfApi().upload_file(path_or_fileobj=b"{}", path_in_repo=name, repo_id="acme/pickled")
    hub.requests.clear()
    with pytest.raises(DataError, match="`acme/pickled` has no weights"):
        lopd_store.identify("acme/pickled")
    assert not any(path.endswith(".bin") for _, path in hub.requests)


def test_a_model_that_is_not_there_is_named(hub: HubServer) -> None:
    with pytest.raises(InputError, match="no model `acme/nothing`, neither a local path nor on the Hub"):
        lopd_store.identify("acme/nothing")

"""`lopd-store key`, `sign` and `verify --signed-by` as a user runs them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import lopd_store
from tests.commands import Ran, run_command


@pytest.fixture
def signed(sealed: Path, here: Path) -> Path:
    """`artifact` in the current directory, signed with the key `alice`; there is also a key `bob`."""
    shutil.copytree(sealed, "artifact")
    for name in ("alice", "bob"):
        assert run_command("lopd-store", "key", name).code == 0
    assert run_command("lopd-store", "sign", "artifact", "--key", "alice").code == 0
    return Path("artifact")


def verify(artifact: Path, *more: object) -> Ran:
    return run_command("lopd-store", "verify", artifact, *more)


def test_a_key_pair_is_made_once(here: Path) -> None:
    ran = run_command("lopd-store", "key", "alice")
    text = Path("alice.pub").read_text()
    said = f"alice: the private key, to be kept secret\nalice.pub: the public key, to be shared\n{text}"
    assert ran == Ran(code=0, stdout=said, stderr="")
    before = Path("alice").read_bytes()
    stderr = "error: `alice` exists\n\nhint: choose another name: a key is never overwritten\n"
    assert run_command("lopd-store", "key", "alice") == Ran(code=2, stdout="", stderr=stderr)
    assert Path("alice").read_bytes() == before


def test_signing_says_what_was_signed_and_by_which_key(signed: Path) -> None:
    ran = run_command("lopd-store", "sign", signed, "--key", "bob")
    fingerprint, key = lopd_store.open(signed).fingerprint, Path("bob.pub").read_text()
    assert ran == Ran(code=0, stdout=f"signed: artifact, {fingerprint}\nby {key}", stderr="")
    again = run_command("lopd-store", "sign", signed, "--key", "bob", "--json")
    assert (again.code, again.json["fingerprint"], again.json["public_key"]) == (0, fingerprint, key.strip())


@pytest.mark.parametrize("literal", [False, True], ids=["a file", "the key itself"])
def test_a_signed_artifact_verifies_by_its_key(signed: Path, literal: bool) -> None:
    key = Path("alice.pub").read_text().strip() if literal else "alice.pub"
    ran = verify(signed, "--signed-by", key)
    assert (ran.code, ran.stderr) == (0, "")
    assert f", signed by {key}, sha256:" in ran.stdout
    assert verify(signed, "--signed-by", key, "--json").json["signed_by"] == Path("alice.pub").read_text().strip()


def test_another_key_is_refused_with_those_that_have_signed(signed: Path) -> None:
    alice, bob = (Path(name).read_text() for name in ("alice.pub", "bob.pub"))
    stderr = f"error[A101]: `signatures.json`: there is no signature by the key\n  expected  {bob}  actual    {alice}"
    assert verify(signed, "--signed-by", "bob.pub") == Ran(code=1, stdout="", stderr=stderr)


def test_an_artifact_that_nobody_signed_is_refused(signed: Path) -> None:
    (signed / "signatures.json").unlink()
    ran = verify(signed, "--signed-by", "alice.pub")
    assert (ran.code, ran.stdout) == (1, "")
    assert ran.stderr.endswith("  actual    no signature of this artifact\n")
    assert verify(signed).code == 0


def test_a_damaged_file_of_signatures_is_refused(signed: Path) -> None:
    (signed / "signatures.json").write_text("[{}]")
    ran = verify(signed, "--signed-by", "alice.pub")
    assert (ran.code, ran.stdout) == (1, "")
    assert ran.stderr.startswith("error[A100]: `signatures.json` has an element that is no signature\n")


def test_a_signature_takes_more_than_a_quick_look(signed: Path) -> None:
    stderr = "error: a quick verification does not reach as far as a signature\n\nhint: leave out `--quick`\n"
    assert verify(signed, "--quick", "--signed-by", "alice.pub") == Ran(code=2, stdout="", stderr=stderr)


def test_a_key_that_is_not_there_is_a_usage_error(signed: Path) -> None:
    stderr = "error: no key at `carol.pub`\n\nhint: make one with `lopd-store key NAME`\n"
    assert verify(signed, "--signed-by", "carol.pub") == Ran(code=2, stdout="", stderr=stderr)

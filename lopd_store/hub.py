"""What the Hugging Face Hub is to us: names of repositories, tags, and what to say where it refuses.

Tokens come from huggingface_hub's own places: `hf auth login`, or HF_TOKEN.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lopd_store import layout
from lopd_store.errors import ArtifactError, InputError, UnavailableError

_REPOSITORY = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_TAG = re.compile(r"lopd-[0-9a-f]{12}")


def tag_of(fingerprint: str) -> str:
    """The Hub tag of an artifact: `lopd-` and the first 12 hex digits of its fingerprint."""
    return "lopd-" + fingerprint.removeprefix("sha256:")[:12]


def require_fingerprint(actual: str, place: str, *, wanted: str | None, revision: str | None) -> None:
    """Refuse another artifact than the one that is wanted, by its fingerprint or by a tag that is made of it."""
    if wanted not in (None, actual):
        raise ArtifactError(f"`{place}` holds another artifact", expected=wanted, actual=actual)
    if revision is not None and _TAG.fullmatch(revision) and revision != tag_of(actual):
        raise ArtifactError(f"`{place}` has a tag that is not its own", expected=revision, actual=tag_of(actual))


def check_repository(repository: str) -> None:
    """Refuse what cannot be the name of a repository."""
    if not _REPOSITORY.fullmatch(repository):
        raise InputError("not the name of a repository", expected="OWNER/NAME", actual=repository[:200])


@contextmanager
def hub_errors(repository: str, revision: str | None = None) -> Iterator[None]:
    """Say what to do about the Hub's refusals."""
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise InputError(
            f"`{repository}` has no revision `{revision}`",
            hint="an artifact is tagged `lopd-` and the first 12 digits of its fingerprint; was it pushed there?",
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        raise ArtifactError(
            f"`{repository}` is not an artifact", expected=f"`{layout.MANIFEST}`", actual="no such file"
        ) from error
    except errors.GatedRepoError as error:
        raise InputError(f"`{repository}` is gated", hint="ask for access on its page on the Hub") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"no dataset repository `{repository}` on the Hub, or it is private",
            hint="check the name, or log in with `hf auth login`",
        ) from error
    except errors.HFValidationError as error:
        raise InputError("not the name of a repository", actual=_first_line(error)) from error
    except errors.HfHubHTTPError as error:
        status: Any = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise InputError(
                f"the Hub refused access to `{repository}`",
                actual=_first_line(error),
                hint="log in with `hf auth login`, or set HF_TOKEN to a token that may write there",
            ) from error
        if status == 412:
            raise UnavailableError(
                f"`{repository}` changed while this push was going on",
                hint="push again: what has been uploaded is not sent twice",
            ) from error
        raise _unavailable(error) from error
    except (httpx2.HTTPError, OSError) as error:
        if getattr(error, "errno", None) is not None and not isinstance(error, ConnectionError):
            raise  # the disk's error, not the Hub's
        raise _unavailable(error.__cause__ or error) from error
    except (RuntimeError, errors.XetDownloadError) as error:  # what the client makes of a transfer that failed
        raise _unavailable(error) from error
    except (ValueError, KeyError) as error:  # and of an answer that is none
        raise _unavailable(error) from error


def _unavailable(error: BaseException) -> UnavailableError:
    return UnavailableError(f"the Hub did not answer as it should: {_first_line(error)}", hint="try again")


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]

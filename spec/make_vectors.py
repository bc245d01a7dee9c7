"""Write the conformance vectors: tiny artifacts that are valid, and such that break one thing.

    python spec/make_vectors.py [DIRECTORY]        spec/vectors, where none is said; it is emptied first

valid/SLUG is an artifact; invalid/CODE_SLUG/artifact is one that a verifier must refuse, and expected.json beside it
says with which codes, given which student and which public key.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from recipes import invalid, valid
from recipes.artifact import write

from lopd_store import strictjson


def make(directory: Path) -> None:
    """Write every vector into a directory, from scratch."""
    for name in ("valid", "invalid"):
        shutil.rmtree(directory / name, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    # Git is to change no line endings in here.
    (directory / ".gitattributes").write_text("* -text linguist-generated\n", encoding="utf-8")
    for slug, make_tree in valid.RECIPES.items():
        write(make_tree(), directory / "valid" / slug)
    for slug, vector in invalid.vectors().items():
        write(vector.tree, directory / "invalid" / slug / "artifact")
        (directory / "invalid" / slug / "expected.json").write_bytes(strictjson.pretty(vector.expected()))


if __name__ == "__main__":
    make(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent / "vectors")

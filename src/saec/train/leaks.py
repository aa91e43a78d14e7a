"""Before the first step: no image that trains also validates, and every image is the one its row was written for."""

from __future__ import annotations

from collections.abc import Sequence

from saec.data.hashing import sha256_file
from saec.data.verify import compare_images
from saec.errors import BadInput, GateFailed
from saec.train.rows import Row


def check_leaks(train: Sequence[Row], val: Sequence[Row]) -> None:
    """Prove both lists disjoint: by group, byte for byte, and as near-duplicates. All images are read.

    Raises:
        GateFailed: an image or a group is in both; both names are told.
        BadInput: an image is unreadable or has changed since its row was written.
    """
    for row in (*train, *val):
        if sha256_file(row.image) != row.sha256:
            raise BadInput("the image is not the one of the row", where=row.image, fix="write the rows anew")
    groups = {row.group: row for row in train}
    shared = next(((groups[row.group], row) for row in val if row.group in groups), None)
    if shared is not None:
        raise GateFailed(
            f"training and validation share the group {shared[1].group}: {shared[0].image} and {shared[1].image}"
        )
    report = compare_images([("train", [row.image for row in train]), ("val", [row.image for row in val])])
    if report.unreadable:
        raise BadInput("unreadable image", where=report.unreadable[0], fix="remove its row or repair it")
    try:
        report.require_disjoint()
    except BadInput as error:
        raise GateFailed(f"training and validation share images: {error}") from None

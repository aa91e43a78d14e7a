"""SAEC: edge-cloud industrial visual inspection with a multimodal LLM.

    import saec

    settings = saec.load_settings()
    station = saec.fit_station(saec.read_dataset(Path("parts")), settings)
    result = station.predict(saec.read_image(Path("part.png")), "screw")

These names are the public ones; each is imported when it is first asked for, so that ``import saec`` costs nothing.
Calibration alone is :func:`saec.calibrate.calibrate`: the room has taken the name.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from saec.calibrate.calibration import Calibration, CalibrationData
    from saec.calibrate.policy import Policy
    from saec.cloud.client import HttpCloudClient
    from saec.cloud.embedded import EmbeddedClient
    from saec.cloud.expert import ExpertBackend, fit_expert
    from saec.config import Settings, load_settings
    from saec.data.dataset import Dataset
    from saec.data.decode import UnreadableImage, read_image
    from saec.data.readers import read_dataset
    from saec.edge.fit import fit_station
    from saec.edge.station import Station
    from saec.errors import BadInput
    from saec.fleet.ledger import Ledger
    from saec.route.decide import decide
    from saec.route.pipeline import inspect_stream
    from saec.scene import scene_complexity
    from saec.types import (
        Box,
        CloudError,
        EdgeResult,
        Evidence,
        Label,
        Opinion,
        Part,
        Query,
        Reason,
        Route,
        SceneScore,
        Verdict,
        Where,
    )

__all__ = [
    "BadInput",
    "Box",
    "Calibration",
    "CalibrationData",
    "CloudError",
    "Dataset",
    "EdgeResult",
    "EmbeddedClient",
    "Evidence",
    "ExpertBackend",
    "HttpCloudClient",
    "Label",
    "Ledger",
    "Opinion",
    "Part",
    "Policy",
    "Query",
    "Reason",
    "Route",
    "SceneScore",
    "Settings",
    "Station",
    "UnreadableImage",
    "Verdict",
    "Where",
    "__version__",
    "decide",
    "fit_expert",
    "fit_station",
    "inspect_stream",
    "load_settings",
    "read_dataset",
    "read_image",
    "scene_complexity",
]

_HOMES = {
    "saec.calibrate.calibration": ("Calibration", "CalibrationData"),
    "saec.calibrate.policy": ("Policy",),
    "saec.cloud.client": ("HttpCloudClient",),
    "saec.cloud.embedded": ("EmbeddedClient",),
    "saec.cloud.expert": ("ExpertBackend", "fit_expert"),
    "saec.config": ("Settings", "load_settings"),
    "saec.data.dataset": ("Dataset",),
    "saec.data.decode": ("UnreadableImage", "read_image"),
    "saec.data.readers": ("read_dataset",),
    "saec.edge.fit": ("fit_station",),
    "saec.edge.station": ("Station",),
    "saec.errors": ("BadInput",),
    "saec.fleet.ledger": ("Ledger",),
    "saec.route.decide": ("decide",),
    "saec.route.pipeline": ("inspect_stream",),
    "saec.scene": ("scene_complexity",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name from its home (PEP 562); all value types live in :mod:`saec.types`."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME.get(name, "saec.types")), name)
    globals()[name] = value  # found at once from now on
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

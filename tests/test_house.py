"""The rules of the house: floors, light imports, no pickle, no eval, and the public names."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import saec
from edge_parts import plate, put
from saec.config import Settings, load_settings

ROOT = Path(saec.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))

FLOORS = [
    {"cli", "ui"},
    {"evaluate"},
    {"learn", "route"},
    {"train", "cloud"},
    {"edge", "vlm"},
    {"data", "calibrate", "fleet", "scene"},
    {"config"},
    {"types", "errors"},
]
"""From the top; a room may import itself and whatever is on a lower floor."""

PUBLIC = [
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

HEAVY = (
    "torch",
    "torchvision",
    "transformers",
    "onnx",
    "fastapi",
    "uvicorn",
    "httpx",
    "typer",
    "rich",
    "prometheus_client",
)


def imports(source: Path) -> Iterator[str]:
    """Full names of all that a file imports, wherever it does so."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def calls(source: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def room_of(source: Path) -> str:
    return source.relative_to(ROOT).parts[0].removesuffix(".py")


def floor_of(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


# -- floors


def test_each_room_imports_only_from_the_floors_below():
    wrong = []
    for source in SOURCES:
        room = room_of(source)
        if room in ("__init__", "__main__"):  # the house's own doors
            continue
        for name in imports(source):
            _, _, inside = name.partition("saec.") if name.startswith("saec.") else ("", "", "")
            other = inside.split(".")[0]
            if other in ("", "__version__", room):
                continue
            if floor_of(other) <= floor_of(room):
                wrong.append(f"{source.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_every_room_stands_on_a_floor():
    rooms = {room_of(source) for source in SOURCES} - {"__init__", "__main__"}
    assert rooms <= set().union(*FLOORS)


# -- light imports


def run(code: str, *arguments: object) -> str:
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


def test_import_saec_is_light():
    loaded = set(run("import sys; before = set(sys.modules); import saec; print(*set(sys.modules) - before)").split())
    assert "saec" in loaded
    assert not loaded & {"numpy", "cv2", "onnxruntime", "pydantic", *HEAVY}


EDGE_PATH = """
import sys
from pathlib import Path

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HEAVY:
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)

HEAVY = sys.argv[2].split()
sys.meta_path.insert(0, Absent())

import saec
root = Path(sys.argv[1])
settings = saec.Settings.model_validate({"edge": {"threads": 1}})
station = saec.fit_station(saec.read_dataset(root / "parts"), settings)
station.save(root / "station")
station = saec.Station.load(root / "station", settings=settings)
(product,) = station.products
image = saec.read_image(next((root / "parts" / "good").iterdir()))
result = station.predict(image, product)
route = saec.decide(saec.scene_complexity(image), result, station.policy(product))
import saec.route.pipeline
assert not set(HEAVY) & set(sys.modules)
print(route.where)
"""


def test_the_edge_fits_saves_loads_and_judges_where_nothing_heavy_is_installed(tmp_path):
    for number in range(3):
        put(tmp_path / "parts" / "good" / f"{number}.png", plate(number))
    heavy = " ".join(name for name in HEAVY if name != "prometheus_client")
    assert run(EDGE_PATH, tmp_path, heavy) in ("edge", "cloud")


# -- nothing that runs what it reads


@pytest.mark.parametrize(
    "module", ["pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"]
)
def test_no_file_imports_what_runs_code_from_data(module):
    assert not [str(source) for source in SOURCES for name in imports(source) if name.split(".")[0] == module]


def test_no_file_calls_eval_exec_or_a_shell():
    wrong = []
    for source in SOURCES:
        for name, call in calls(source):
            flags = {word.arg: ast.unparse(word.value) for word in call.keywords}
            if name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput"):
                wrong.append(f"{source.name}:{call.lineno} calls {name}")
            if flags.get("shell", "False") != "False" or flags.get("allow_pickle", "False") != "False":
                wrong.append(f"{source.name}:{call.lineno} {flags}")
            if name in ("torch.load", "np.load") and "weights_only" not in flags and "allow_pickle" not in flags:
                wrong.append(f"{source.name}:{call.lineno} calls {name} without saying that it must not run code")
    assert not wrong


def test_no_file_names_a_folder_of_somebodys_machine():
    for source in SOURCES:
        for folder in ("/work/", "/home/", "/root/", "/Users/"):
            assert folder not in source.read_text(), f"{source.name} names {folder}"


# -- public names


def test_the_public_names_are_these():
    assert sorted(saec.__all__) == saec.__all__ == PUBLIC
    assert dir(saec) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_there_and_has_a_docstring(name):
    value = getattr(saec, name)
    if name != "__version__":
        assert value.__name__ == name
        assert value.__doc__
        assert value.__module__.startswith("saec.")
        assert vars(saec)[name] is value


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'saec' has no attribute 'magic'"):
        saec.magic  # noqa: B018
    assert not hasattr(saec, "fit_memory")


def test_a_star_import_brings_the_public_names():
    assert run("from saec import *; print(Station.__module__, Label.DEFECT)") == "saec.edge.station defect"


def test_type_checkers_see_the_same_homes_as_the_program():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    declared = {
        alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert declared == {name: saec._HOME.get(name, "saec.types") for name in PUBLIC if name != "__version__"}


def test_every_setting_can_be_said_as_text():
    plain = Settings()
    for section in Settings.model_fields:
        for key, value in getattr(plain, section).model_dump(mode="json").items():
            if isinstance(value, list | dict):
                continue
            text = "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
            assert load_settings(None, overrides=[f"{section}.{key}={text}"], environ={}) == plain, f"{section}.{key}"

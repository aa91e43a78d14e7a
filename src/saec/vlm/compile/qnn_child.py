"""The process that runs QNN's compiler: ``python -m saec.vlm.compile.qnn_child FOLDER``. Its output is the log."""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import onnxruntime_qnn
from numpy.typing import NDArray

from saec.errors import GateFailed
from saec.vlm.compile.compare import differences, examples
from saec.vlm.compile.qnn import REQUEST, RESULT, Request
from saec.vlm.compile.record import MODEL, Compiled
from saec.vlm.export.feeds import Feeds
from saec.vlm.export.reread import tied_table

CONTEXT = "model_ctx.onnx"
"""The graph that ONNX Runtime loads: one node, which names ``model.bin``."""


def main(folder: Path) -> None:
    """Compile as the request in the folder says; leave model, context graph and result there.

    Raises:
        GateFailed: the compiler takes only a part of the graph, or what it made cannot be run.
    """
    request = Request.model_validate_json((folder / REQUEST).read_bytes())
    ort.register_execution_provider_library(onnxruntime_qnn.get_ep_name(), onnxruntime_qnn.get_library_path())
    begun = time.perf_counter()
    placement, refused = _compile(request, folder)
    seconds = time.perf_counter() - begun
    if refused:
        kinds = ", ".join(f"{count} {kind}" for kind, count in refused.most_common())
        raise GateFailed(f"the compiler left nodes to the CPU: {kinds}")
    sdk = _rename(folder)
    peak = _peak_mb()
    names = [spec.name for spec in request.outputs]
    fed, expected = _on_cpu(request, names)
    qnn = _on_qnn(folder / CONTEXT, request)
    found = [qnn.run(names, feeds) for feeds in fed]
    result = Compiled(
        seconds=seconds,
        tools={"onnxruntime": ort.__version__, "onnxruntime-qnn": onnxruntime_qnn.__version__, "qnn": sdk},
        placement=placement,
        compared=differences(names, expected, found),
        peak_mb=peak,
    )
    (folder / RESULT).write_text(result.model_dump_json(), encoding="utf-8")


def _compile(request: Request, folder: Path) -> tuple[dict[str, int], Counter[str]]:
    """Return numbers of nodes by provider, and the kinds of those that QNN did not take."""
    entries = {
        "ep.context_enable": "1",
        "ep.context_embed_mode": "0",
        "ep.context_file_path": str(folder / CONTEXT),
        "session.record_ep_graph_assignment_info": "1",
    }
    # The CPU may take nodes here, and only here: else the compiler would not tell which ones it refuses.
    session = _on_qnn(request.graph, request, entries)
    placement: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        nodes = part.get_nodes()
        placement[part.ep_name] += len(nodes)
        if part.ep_name != onnxruntime_qnn.get_ep_name():
            refused.update(node.op_type for node in nodes)
    return dict(placement), refused


def _on_cpu(request: Request, names: list[str]) -> tuple[list[Feeds], list[list[NDArray[Any]]]]:
    """Return inputs, and what the CPU makes of them."""
    cpu = ort.InferenceSession(str(request.graph), _options(), providers=["CPUExecutionProvider"])
    table = tied_table(request.graph, request.signature)
    fed = examples(request.inputs, request.signature, table, lambda feeds: cpu.run(names, feeds))
    return fed, [cpu.run(names, feeds) for feeds in fed]


def _on_qnn(graph: Path, request: Request, entries: dict[str, str] | None = None) -> ort.InferenceSession:
    options = _options()
    for key, value in (entries or {"session.disable_cpu_ep_fallback": "1"}).items():
        options.add_session_config_entry(key, value)
    devices = [device for device in ort.get_ep_devices() if device.ep_name == onnxruntime_qnn.get_ep_name()]
    options.add_provider_for_devices(devices[:1], dict(request.options))
    return ort.InferenceSession(str(graph), options)


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 2
    options.intra_op_num_threads = 2
    return options


def _rename(folder: Path) -> str:
    """Give the binary its name, in the folder and in the graph that refers to it; return QNN's version."""
    model = onnx.load(folder / CONTEXT)
    (node,) = model.graph.node
    stated: dict[str, Any] = {each.name: each for each in node.attribute}
    (folder / stated["ep_cache_context"].s.decode()).rename(folder / MODEL)
    stated["ep_cache_context"].s = MODEL.encode()
    onnx.save(model, folder / CONTEXT)
    return str(stated["ep_sdk_version"].s.decode())


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except Exception as error:  # noqa: BLE001 - the log's last line is what the user sees
        sys.exit(" ".join(str(error).split()))

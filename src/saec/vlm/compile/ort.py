"""ONNX Runtime's own optimised model for this machine's CPU: fused and laid out once, not at each start."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort

from saec.errors import BadInput
from saec.vlm.compile.compare import differences, examples
from saec.vlm.compile.record import MODEL, Compiled, Plan, ProviderName, Target
from saec.vlm.compile.source import Source
from saec.vlm.export.reread import tied_table

GRAPH = "model.onnx"

LEVELS = {"none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL, "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL}


@dataclass(frozen=True, slots=True)
class OrtLocal:
    """Optimises for the CPU it runs on; see :class:`~saec.vlm.compile.job.Provider`."""

    name: ProviderName = "ort"

    def plan(self, source: Source) -> Plan:
        """Return the plan; the graph stays as it is."""
        return Plan(
            provider=self.name,
            target=Target(device=f"{platform.system()} {platform.machine()}"),
            files=source.files(),
            rebuilt=False,
            signature=source.signature,
            inputs=source.inputs,
            outputs=source.outputs,
            options={"graph_optimization_level": "all"},
        )

    def compile(self, source: Source, folder: Path) -> Compiled:
        """Write ``model.onnx`` and its weights, ``model.bin``.

        Raises:
            BadInput: ONNX Runtime refuses the graph.
        """
        begun = time.perf_counter()
        try:
            optimised = _session(source.file, "all", folder / GRAPH)
        except Exception as error:  # noqa: BLE001 - ONNX Runtime raises classes of its own, some plain RuntimeErrors
            problem = " ".join(str(error).split())[:300]
            raise BadInput(f"ONNX Runtime refuses the graph ({problem})", where=source.file) from None
        seconds = time.perf_counter() - begun
        placement = {part.ep_name: 0 for part in optimised.get_provider_graph_assignment_info()}
        for part in optimised.get_provider_graph_assignment_info():
            placement[part.ep_name] += len(part.get_nodes())
        del optimised
        plain = _session(source.file, "none")
        names = [spec.name for spec in source.outputs]
        table = tied_table(source.file, source.signature)
        fed = examples(source.inputs, source.signature, table, lambda feeds: plain.run(names, feeds))
        written = _session(folder / GRAPH, "none")
        found = [written.run(names, feeds) for feeds in fed]
        return Compiled(
            seconds=seconds,
            tools={"onnxruntime": ort.__version__},
            placement=placement,
            compared=differences(names, [plain.run(names, feeds) for feeds in fed], found),
        )


def _session(graph: Path, level: str, written: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 3
    options.graph_optimization_level = LEVELS[level]
    if written is not None:
        options.optimized_model_filepath = str(written)
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", MODEL)
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])

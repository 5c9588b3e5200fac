"""Session options for benchmarks that run several sessions in turn."""

from __future__ import annotations

import onnxruntime


def timed_options(threads: int) -> onnxruntime.SessionOptions:
    """Options of a session that shares the processor's cores with the ones that it is compared with.

    ONNX Runtime's threads spin for a while after a run. With as many threads as cores they would take time from the
    session whose turn is next, so they stop with the run here.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 4
    return options
